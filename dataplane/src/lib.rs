//! The node's outside.

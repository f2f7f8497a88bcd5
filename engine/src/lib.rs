//! The volume engine.

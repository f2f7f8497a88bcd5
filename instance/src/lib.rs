//! Role: supervises one node's data-plane processes.

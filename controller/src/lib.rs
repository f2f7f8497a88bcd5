//! Role: reconcilers and HTTP API.
pub mod http;

//! Role: reconcilers and HTTP API.

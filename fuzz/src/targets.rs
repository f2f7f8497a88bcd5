//! The targets, one file for each noun.

pub mod fuse;
pub mod http;
pub mod json;
pub mod manifest;
pub mod nbd_client;
pub mod nbd_server;
pub mod parameters;
pub mod qcow2;

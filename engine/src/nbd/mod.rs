//! NBD, towards the replicas and for local tools.

pub mod client;
pub mod server;
pub mod wire;

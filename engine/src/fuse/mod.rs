//! FUSE without a library: one regular file that is the root of its own mount.

pub mod mount;
pub mod probe;
pub mod wire;

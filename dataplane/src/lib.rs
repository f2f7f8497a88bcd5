//! The node's outside: `qemu-storage-daemon` and its control protocol, loop devices, filesystems, mounts, external programs.
//!
//! Knows files, devices and processes, nothing of objects, volumes or replicas as users see them.

mod error;
pub mod filesystem;
pub mod limits;
pub mod loop_device;
pub mod mount;
pub mod process;
pub mod qmp;
pub mod stats;
pub mod storage_daemon;

pub use error::DataplaneError;

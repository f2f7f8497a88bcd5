//! The instance role: replica and engine processes of one node, and its disks.
//!
//! It reads the wishes in Replica and Engine objects of its node and keeps processes accordingly. The processes outlive
//! this role and are adopted again by it; it is the only writer of the status of these objects and of its Node.

mod claims;
mod clock;
mod control;
pub mod discovery;
mod disk_calls;
mod disk_watch;
mod disks;
mod endings;
mod engine_decision;
mod engine_progress;
mod engine_upgrade;
mod engines;
mod error;
mod first_pass;
mod image_files;
mod kernel;
mod limits;
mod metrics;
mod ownership;
mod processes;
mod replica_decision;
pub mod replica_process;
mod replicas;
mod role;

pub use error::InstanceError;
pub use metrics::Metrics;
pub use role::{Config, EngineOptions, run};

//! The CSI role: Identity, Controller and Node services on unix sockets.
//!
//! The controller service knows objects in the store only: it writes Volume objects (and BackingImage objects that a StorageClass
//! describes) and waits, by watch, until the reconcilers have done the rest. The node service mounts what the engine on its node serves.
//! Every call answers with a sentence that says what was wrong, what would be right and what to do next; `status.rs` alone knows gRPC codes.

mod capability;
mod controller;
mod deadline;
mod error;
mod flight;
mod identity;
mod limits;
mod metrics;
mod node;
mod parameters;
mod rpc;
mod server;
#[cfg(test)]
mod server_tests;
mod size;
pub mod status;
mod volume;
mod wait;

pub use controller::{ControllerConfig, serve_controller};
pub use error::CsiError;
pub use metrics::Metrics;
pub use node::{NodeConfig, serve_node};
pub use parameters::{ParameterError, Parameters};

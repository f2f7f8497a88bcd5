//! The volume engine: one process for each attached volume, which joins the volume's replicas.
//!
//! - [`core`]: every decision, as a pure state machine.
//! - [`nbd`]: both sides of NBD, towards the replicas and for local tools.
//! - [`fuse`]: the volume as a regular file on `/dev/fuse`, to which a loop device is attached.
//! - [`process`]: the engine process: one thread around the core.
//! - [`holder`]: its parent, which keeps the FUSE connection while an engine is replaced.
//! - [`control_client`]: how others talk to an engine.

pub mod buffers;
pub mod control_client;
pub mod core;
mod error;
pub mod fuse;
pub mod holder;
pub mod limits;
mod lines;
pub mod link;
pub mod nbd;
pub mod process;
mod pulse;
mod queue;
pub mod stream;
mod sys;

pub use error::{EngineError, NOT_REPLACEABLE};

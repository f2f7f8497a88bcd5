//! Process plumbing: what every process of ours needs and no room owns.
//!
//! Detached processes that are found again, unix sockets below long paths, durable files, lines of a bounded length, back-off,
//! logs, shutdown, loopback addresses, metrics, TLS between processes. Knows nothing of images or volumes.

pub mod backoff;
pub mod files;
pub mod lines;
pub mod log;
pub mod loopback;
pub mod memory;
pub mod metrics;
pub mod probes;
pub mod process;
pub mod queue;
pub mod shutdown;
pub mod socket;
pub mod transport;
pub mod words;

//! Bounds and times of local workloads.

use std::time::Duration;

/// How long a workload may take to end after SIGTERM. A pod gets 30 s by default; our roles need no more than this.
pub const STOP_GRACE: Duration = Duration::from_secs(10);

/// The same for one that was not ready in time: it has nothing to finish.
pub const LATE_GRACE: Duration = Duration::from_secs(1);

/// How long a start may take until it is told what it waits for. A role process listens a few milliseconds after its start, and a fault
/// is told within 10 s.
pub const SLOW_START: Duration = Duration::from_secs(5);

/// The first wait between two looks whether a workload is ready. A role process listens a few milliseconds after its start.
pub const READY_WAIT_FIRST: Duration = Duration::from_millis(2);

/// The longest wait between two looks.
pub const READY_WAIT_MAX: Duration = Duration::from_millis(250);

/// How long one connection attempt may take. It stays on this machine.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// Bytes of a log file that start its shortening.
pub const LOG_BYTES: u64 = 8 << 20;

/// Bytes that stay when a log file is shortened.
pub const LOG_KEPT_BYTES: u64 = 1 << 20;

/// How often sizes of log files are looked at.
pub const LOG_CHECK_INTERVAL: Duration = Duration::from_secs(30);

/// Bytes at the end of the log in which a failure looks for its last words.
pub const MESSAGE_BYTES: u64 = 2048;

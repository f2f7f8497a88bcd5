//! Numbers with a reason.

use std::time::Duration;

/// How often disks are looked at without an event: they fill and vanish silently.
pub const DISK_INTERVAL: Duration = Duration::from_secs(30);
/// After a failed pass over one object (the store or the kernel did not do what was asked).
pub const RETRY: runtime::backoff::Backoff =
    runtime::backoff::Backoff { initial: Duration::from_millis(200), max: Duration::from_secs(15) };
/// Somebody uses a device that shall go; its end is no event for us.
pub const BUSY_RECHECK: Duration = Duration::from_secs(1);
/// A started process shows its control socket within moments; there is no event for it.
pub const START_RECHECK: Duration = Duration::from_millis(25);
/// An answer on a control socket of the same node.
pub const CONTROL_TIMEOUT: Duration = Duration::from_secs(10);
/// A replica flushes what it holds when it ends.
pub const REPLICA_STOP_GRACE: Duration = Duration::from_secs(60);
/// An engine finishes what is in flight, flushes and closes its replicas.
pub const ENGINE_STOP_TIMEOUT: Duration = Duration::from_secs(90);
/// A holder that was asked to end by a signal.
pub const HOLDER_STOP_GRACE: Duration = Duration::from_secs(10);
/// A replica without an answer for so long is dropped by its engine.
pub const REPLICA_TIMEOUT: Duration = Duration::from_secs(8);
/// How long I/O is held when no replica is left: a local restart may bring nothing back, so not for long.
pub const NO_REPLICA_HOLD: Duration = Duration::from_secs(30);
/// How long a holder waits for a working engine.
pub const HOLDER_LIMIT: Duration = Duration::from_secs(30);
/// What is shown of a log when a process ended.
pub const LOG_TAIL_LINES: usize = 3;

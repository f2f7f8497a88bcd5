//! Numbers of the instance role, each with its reason.

use std::time::Duration;

use runtime::backoff::Backoff;

/// Delay between failed passes over one object: soon at first, since most causes are short, and never longer than a resync.
pub const RETRY: Backoff = Backoff { initial: Duration::from_millis(100), max: Duration::from_secs(30) };

/// How often disks are looked at and every object is reconciled although nothing happened.
pub const RESYNC: Duration = Duration::from_secs(30);

/// How long the first pass over a replica is waited for before the role counts as ready without it: longer than an answer on its control
/// socket and the end of a process may take together.
pub const FIRST_PASS: Duration = Duration::from_secs(60);

/// How long a look at a disk may take before the disk counts as silent: far longer than one that works needs under load, and a
/// fault is told within 10 s. One at a time is in the way of a glance.
pub const DISK_ANSWER: Duration = Duration::from_secs(5);

/// How often it is glanced at whether disks are what they were: a fault of one is told within 10 s.
pub const GLANCE: Duration = Duration::from_secs(3);

/// How often the clock of the machine is compared with the one that cannot be set: what it did is told within 10 s.
pub const CLOCK_LOOK: Duration = Duration::from_secs(2);
/// What counts as set, within [`CLOCK_LOOK`]: a clock that is kept right is slewed by less than a millisecond in that time, and a leap
/// second or a process that was not run for a moment is no news.
pub const CLOCK_STEP: Duration = Duration::from_secs(5);
/// How long it is told.
pub const CLOCK_TOLD: Duration = Duration::from_secs(600);

/// How many objects are reconciled at a time; starting a process is mostly waiting.
pub const WORKERS: usize = 8;

/// First TCP port of replicas; Longhorn's range begins here too (LF 5.5: instance manager).
pub const FIRST_PORT: u16 = 10_000;
/// Ports are given in pairs (NBD, control) up to here.
pub const LAST_PORT: u16 = 29_999;

/// How long a replica process gets to end: it flushes its layer.
pub const REPLICA_GRACE: Duration = Duration::from_secs(30);
/// After how long it is told that data is being removed: most of it is gone sooner, and a report is an event for everybody.
pub const ENDING_TOLD: Duration = Duration::from_secs(2);
/// How long a holder gets to end after its engine said that it is done.
pub const HOLDER_GRACE: Duration = Duration::from_secs(20);
/// How long one answer on a control socket may take: an answer may have to wait for an fsync.
pub const CONTROL_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest reply on a control socket; a status of 16 replicas with errors is far below.
pub const CONTROL_LINE_BYTES: usize = 256 << 10;
/// Delay between attempts to reach a process that has just been started.
pub const CONNECT: Backoff = Backoff { initial: Duration::from_millis(2), max: Duration::from_millis(250) };

/// A replica that does not answer for this long is dropped.
pub const REPLICA_TIMEOUT: Duration = Duration::from_secs(8);
/// I/O is held this long when no replica is left, so that a replaced engine or a short outage does not turn a filesystem read-only.
pub const NO_REPLICA_HOLD: Duration = Duration::from_secs(30);
/// The holder gives an engine this long to serve before it ends the device.
pub const HOLDER_LIMIT: Duration = Duration::from_secs(60);
/// An engine that answers nobody for this long is killed and replaced: longer than the deadline of a replica, after which an
/// engine that works has said something.
pub const ENGINE_SILENCE_LIMIT: Duration = Duration::from_secs(10);
/// How often an engine that says nothing new is asked whether it is there.
pub const HEARTBEAT: Duration = Duration::from_secs(2);
/// How long the answer may take; a healthy engine takes less than a millisecond.
pub const HEARTBEAT_ANSWER: Duration = Duration::from_secs(1);
/// An engine with requests that completes none of them for this long is told: a replica is dropped after [`REPLICA_TIMEOUT`], which
/// the others must record, and what is asked every [`HEARTBEAT`] is seen late.
pub const ENGINE_STALL_LIMIT: Duration = Duration::from_secs(12);
/// How long a newly installed program may take to say that it can be started.
pub const PROGRAM_CHECK: Duration = Duration::from_secs(10);

/// How much of the end of a log goes into a condition.
pub const LOG_TAIL_BYTES: u64 = 2048;

//! Bounds and times of pods.

use std::time::Duration;

use runtime::backoff::Backoff;

/// Until a request counts as unanswered; reconcilers give a whole pass a minute.
pub const REQUEST: Duration = Duration::from_secs(15);

/// How long a workload may take to end after SIGTERM, as local ones.
pub const STOP_GRACE_SECONDS: u32 = 10;

/// How long a removal waits until the pod is gone: its grace, and what a kubelet takes to end a container and tear the pod down.
pub const REMOVAL: Duration = Duration::from_secs(40);

/// How often a removal looks although the watch said nothing.
pub const LOOK_AGAIN: Duration = Duration::from_secs(3);

/// How often the startup probe asks, in seconds: the shortest that there is, since users wait for it.
pub const STARTUP_PERIOD_SECONDS: i32 = 1;

/// How many startup probes may fail, as long as local workloads get. The image is pulled before.
pub const STARTUP_FAILURES: i32 = 30;

/// How often the readiness probe asks afterwards: its answer is for people, we ask the process itself.
pub const READINESS_PERIOD_SECONDS: i32 = 10;

/// How long one probe may take. It may meet a busy node.
pub const PROBE_TIMEOUT_SECONDS: i32 = 5;

/// When the API server shall end a watch: this spreads the watches again after one API server was away.
pub const WATCH_SECONDS: u32 = 280;

/// Until a watch on which nothing comes counts as dead: longer than it is asked to last.
pub const SILENCE: Duration = Duration::from_secs(300);

/// Between attempts to watch.
pub const RECONNECT: Backoff = Backoff { initial: Duration::from_millis(100), max: Duration::from_secs(10) };

//! Bounds of the embedded store.

use std::time::Duration;

/// Write requests that may wait for the writing thread; more callers wait for room.
pub const WAITING_REQUESTS: usize = 256;

/// Write requests that share one commit. A commit costs one `fsync` however many there are, so this only bounds its size.
pub const REQUESTS_PER_COMMIT: usize = 128;

/// Changes that a slow watcher may be behind before it must list again. Only references are kept, to objects of a few KiB.
pub const HISTORY_EVENTS: usize = 8192;

/// Kubernetes' events are kept as long after their last change as an API server keeps them by default.
pub const KUBERNETES_EVENT_AGE: Duration = Duration::from_secs(3600);

/// And never more than these, the newest ones.
pub const KUBERNETES_EVENTS: usize = 1000;

/// Events that a watcher takes out of the history at a time.
pub const EVENTS_PER_TURN: usize = 64;

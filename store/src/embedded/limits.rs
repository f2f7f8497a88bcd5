//! Bounds of the embedded store.

/// Write requests that may wait for the writing thread; more callers wait for room.
pub const WAITING_REQUESTS: usize = 256;

/// Write requests that share one commit. A commit costs one `fsync` however many there are, so this only bounds its size.
pub const REQUESTS_PER_COMMIT: usize = 128;

/// Changes that a slow watcher may be behind before it must list again. Only references are kept, to objects of a few KiB.
pub const HISTORY_EVENTS: usize = 8192;

/// Events that a watcher takes out of the history at a time.
pub const EVENTS_PER_TURN: usize = 64;

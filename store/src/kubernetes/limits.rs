//! Bounds of the Kubernetes store.

use std::time::Duration;

use runtime::backoff::Backoff;

/// How often a write or a list that somebody else spoilt is tried: each failure means that somebody else's write succeeded.
pub const ATTEMPTS: u32 = 32;

/// Until a request counts as unanswered. The API server gives up after a minute by itself; callers have deadlines of their own that are shorter.
pub const REQUEST: Duration = Duration::from_secs(30);

/// Objects of a page: what `kubectl` and client-go ask for. An object of ours has a few KiB.
pub const PAGE: u32 = 500;

/// Until a watch on which nothing comes counts as dead: the API server sends a bookmark every minute.
pub const SILENCE: Duration = Duration::from_secs(150);

/// When the API server shall end a watch; by itself it would after 30 to 60 minutes. With several of them, this spreads the watches again
/// after one was away.
pub const WATCH_SECONDS: u32 = 290;

/// Between attempts to watch that brought nothing.
pub const RECONNECT: Backoff = Backoff { initial: Duration::from_millis(100), max: Duration::from_secs(10) };

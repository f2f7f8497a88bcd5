//! Bounds and time limits, each with its reason.

use std::time::Duration;

/// Passes at a time: they mostly wait for the store and for agents.
pub const CONCURRENT_PASSES: usize = 16;

/// Everything is looked at again this often, in case an event was lost. No happy path depends on it.
pub const RESYNC: Duration = Duration::from_secs(30);

/// When it is tried again to read everything: passes may wait for that.
pub const RELIST_RETRY: Duration = Duration::from_secs(1);

/// How long a pass waits until the watches have told what this controller wrote; they take milliseconds. It is tried again later then.
pub const CATCH_UP: Duration = Duration::from_secs(10);

/// Longer than the slowest single step (a workload that does not end by SIGTERM), shorter than a user's patience.
pub const PASS_TIMEOUT: Duration = Duration::from_secs(60);

/// How long begun passes may take to finish after a shutdown request.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// Agents and data sources are near; one that takes longer to accept a connection is away.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Reads are answered from memory, but the list of an agent also by a look through two directories: a disk that hangs is told as an
/// agent that does not answer.
pub const READ_TIMEOUT: Duration = Duration::from_secs(3);

/// Requests that begin or end something on a disk.
pub const CHANGE_TIMEOUT: Duration = Duration::from_secs(30);

/// A silent connection to an agent is probed this often, so that a dead peer is noticed without traffic: with the next bound
/// and [`READ_TIMEOUT`], after which it is told, within 10 s.
pub const KEEP_ALIVE: Duration = Duration::from_secs(2);

/// How long the answer to a probe may take; a busy machine takes a second at times.
pub const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(4);

/// A data source that says nothing for this long is asked.
pub const SOURCE_SILENCE: Duration = Duration::from_secs(5);

/// Delay after the first failed pass; it doubles up to [`RESYNC`].
pub const FIRST_RETRY: Duration = Duration::from_millis(50);

/// How soon an agent or data source that could not be told of a limit of bandwidth is told again.
pub const LIMIT_RETRY: Duration = Duration::from_secs(5);

/// How soon is looked again at what the store says is not to be removed yet, or that was ended a moment ago: the watch tells it sooner.
pub const REFUSED_RETRY: Duration = Duration::from_secs(1);

/// The longest line that a data source may send.
pub const MAX_LINE_BYTES: usize = 1 << 20;

/// How long a certificate of the webhook lasts.
pub const CERTIFICATE_DAYS: u32 = 90;

/// The next one is made this long before: a month in which a cluster whose controller is away keeps working.
pub const RENEW_DAYS: u32 = 30;

/// How soon another replica serves the next certificate, and how soon a configuration that was written anew knows us again.
pub const CERTIFICATE_RECHECK: Duration = Duration::from_secs(15);

/// Each failed attempt means that another replica wrote, and there are two.
pub const CERTIFICATE_ATTEMPTS: u32 = 8;

/// An API server waits ten seconds (our configurations); it gets a sentence before that.
pub const REVIEW_TIMEOUT: Duration = Duration::from_secs(8);

/// Two objects of the most that etcd takes (1.5 MiB), written as JSON with what Kubernetes adds.
pub const MAX_REVIEW_BYTES: usize = 8 << 20;

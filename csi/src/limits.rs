//! The numbers of this crate, each with its reason.

use std::time::Duration;

/// How long a call may wait when its caller sets no deadline.
///
/// Below the 30 s that interactive tools give up after, above what an attachment takes whose image is already there.
pub const WAIT_WITHOUT_DEADLINE: Duration = Duration::from_secs(25);

/// How long before the caller's deadline a waiting call answers, so that the caller gets our sentence and not its own timeout.
pub const ANSWER_BEFORE_DEADLINE: Duration = Duration::from_secs(1);

/// How long a volume must stay faulted after an attachment was wished before the call gives up on it.
///
/// The first status that is seen may be from before the wish.
pub const FAULT_SETTLE: Duration = Duration::from_secs(5);

/// How long calls in progress may go on after a shutdown request; below the 30 s a pod gets by default.
pub const DRAIN: Duration = Duration::from_secs(15);

/// How often a change is tried again when somebody else was faster; more than the writers of one object that there are.
pub const CONFLICT_RETRIES: usize = 10;

/// Smallest volume, as in Longhorn.
pub const MIN_VOLUME_BYTES: u64 = 10 << 20;

/// Volumes are a multiple of this, as in Longhorn.
pub const VOLUME_ROUNDING_BYTES: u64 = 2 << 20;

/// Largest volume: what ext4 with 4 KiB blocks, xfs and qcow2 all take with room to spare, and a bound on tables in memory.
pub const MAX_VOLUME_BYTES: u64 = 64 << 40;

/// `mkfs.xfs` refuses anything smaller.
pub const MIN_XFS_BYTES: u64 = 300 << 20;

/// Most replicas of a volume, as in Longhorn.
pub const MAX_REPLICAS: u32 = 20;

/// Most copies that an image may ask for; far above any cluster's number of disks that anyone runs with this product.
pub const MAX_COPIES: u32 = 1000;

/// Minutes, as in Longhorn.
pub const DEFAULT_STALE_REPLICA_TIMEOUT: u32 = 2880;

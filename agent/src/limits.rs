//! Every bound of this crate, with its reason.

use std::time::Duration;

/// Bytes of a chunk: the unit of verification, of repair and of writing.
///
/// Part of the manifest format. Large enough that system calls and BLAKE3 run at full speed, small enough to repair cheaply.
pub const CHUNK_BYTES: u64 = 1 << 20;

/// Granularity of holes inside a chunk. The cluster size of most qcow2 files.
pub const HOLE_BYTES: usize = 64 << 10;

/// Largest file that is accepted. Its manifest (32 bytes a chunk) still fits into memory with ease.
pub const MAX_FILE_BYTES: u64 = 4 << 40;

/// Largest virtual size that a qcow2 header may claim. ext4 ends here with 4 KiB blocks, and so do the volumes on it.
pub const MAX_VIRTUAL_BYTES: u64 = 16 << 40;

/// Chunks that may wait between the network and the disk: together with the hasher's queue, about 16 MiB at most.
pub const INGEST_QUEUE: usize = 8;

/// Bytes after which a file that is being written is begun to be brought to the disk: large requests for the disk, and little
/// left to do for the sync at the end. As many as one request of a sync has.
pub const WRITE_BACK_BYTES: u64 = CHUNKS_PER_REQUEST as u64 * CHUNK_BYTES;

/// Redirects that a download follows.
pub const MAX_REDIRECTS: usize = 10;

/// How long a source or peer may stay silent. Longhorn's value since 1.9.2.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(30);

/// After how much of that silence it is told.
pub const SILENCE_TOLD_AFTER: Duration = Duration::from_secs(5);

/// How long a connection attempt may take. A host that is up answers in far less.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// First and longest pause between two tries of a download.
pub const RETRY_INITIAL: Duration = Duration::from_secs(1);
/// See [`RETRY_INITIAL`].
pub const RETRY_MAX: Duration = Duration::from_secs(60);

/// Tries in a row that bring no byte before a download fails: about two minutes of pauses.
/// The controller then decides when to begin afresh.
pub const MAX_TRIES_WITHOUT_PROGRESS: u32 = 8;

/// How often a download makes durable what it has: so much is fetched again after a power loss or `kill -9`.
pub const CHECKPOINT_INTERVAL: Duration = Duration::from_secs(2);

/// Shortest time between two reports that differ in progress only.
pub const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);

/// Copies that a disk receives at a time. More would only make the disk seek.
pub const MAX_SYNCS: usize = 4;

/// Files that a disk verifies at a time: verification must not starve the volumes on it.
pub const MAX_VERIFICATIONS: usize = 1;

/// Copies of a disk that are read slowly in the background at a time.
pub const MAX_SCRUBS: usize = 1;

/// Bad chunks up to which a damaged copy is repaired where it lies; with more it is made anew, from all peers at once.
pub const MAX_REPAIRED_CHUNKS: usize = 64;

/// Reads for other managers that a manager does at a time; further ones wait. A request that waits under a limit of bandwidth reads nothing.
pub const MAX_PEER_READS: usize = 16;

/// Parallel requests to one peer during a sync. Two keep the line full while a chunk is verified and written.
pub const STREAMS_PER_PEER: usize = 2;

/// Peers used for one sync; more bring nothing on one disk.
pub const MAX_PEERS: usize = 8;

/// Chunks of one range request.
pub const CHUNKS_PER_REQUEST: usize = 8;

/// Failed requests in a row after which a peer is dropped from a sync.
pub const MAX_PEER_FAILURES: u32 = 3;

/// Parallel transfers of one copy to receivers that speak ssync: what is sent is limited by bandwidth, this only bounds the memory for
/// their batches. (Longhorn allows three, LF 5.1: `SendingLimit`.)
pub const MAX_SENDS_PER_COPY: u32 = 16;

/// Workers and batch size of an ssync transfer (LF 5.4).
pub const SSYNC_WORKERS: usize = 4;
/// See [`SSYNC_WORKERS`].
pub const SSYNC_BATCH_BYTES: u64 = 2 << 20;
/// How long an ssync receiver may take to open its file (LF 5.4).
pub const SSYNC_OPEN_TIMEOUT: Duration = Duration::from_secs(120);
/// Tries of one ssync request.
pub const SSYNC_TRIES: u32 = 3;

/// How often a manager looks whether a file was changed or removed behind its back. One `stat` a file.
pub const RECHECK_INTERVAL: Duration = Duration::from_secs(10);

/// Things of images that a manager tells of besides its copies: more would not fit into one message. The next ones follow these.
pub const MAX_REMAINS: usize = 1000;

/// Things that are nothing of ours of which a manager tells: whoever reads of these looks for the others.
pub const MAX_FOREIGN: usize = 20;

/// How long servers and tasks may take to end after a shutdown request, below the 30 s that a pod gets.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a short request to a data source may take.
pub const DATA_SOURCE_TIMEOUT: Duration = Duration::from_secs(10);

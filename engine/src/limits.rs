//! Every bound of this crate, with its reason.

use std::time::Duration;

/// Most replicas of one volume. Longhorn's documents speak of three; the sets are bit masks of 32.
pub const MAX_REPLICAS: usize = 16;

/// Longest read or write that the FUSE frontend offers (the kernel's limit for one request without a sysctl).
pub const FUSE_MAX_IO: usize = 1 << 20;

/// Room for the header of a FUSE request before its payload; the kernel wants a buffer of payload plus one page.
pub const FUSE_HEADER_ROOM: usize = 4096;

/// Longest write-zeroes that is sent to a replica at once; longer ones are cut under one range lock.
///
/// The loop driver allows discards of 4 GiB, which would exceed a replica's deadline.
pub const ZERO_PIECE_BYTES: u64 = 256 << 20;

/// How much of two replicas is compared under one range lock.
pub const COMPARE_STEP_BYTES: u64 = 1 << 20;

/// More places than this where replicas may differ are merged into one range.
pub const MAX_COMPARE_RANGES: usize = 64;

/// How often deadlines are looked at while something is under way.
pub const TICK: Duration = Duration::from_millis(250);

/// How long a replica that broke its connection, and whose process still listens, is waited for to tell who has it now. It answers
/// within a round trip; requests stand still meanwhile.
pub const ASK_LIMIT: Duration = Duration::from_millis(500);

/// The core's clock advances at most this much between two events.
///
/// A process that was stopped for a minute must not find all of its replicas overdue when it continues.
pub const MAX_CLOCK_STEP: Duration = Duration::from_secs(1);

/// How often `/dev/fuse` is read before the replies of replicas get their turn.
pub const FUSE_BATCH: usize = 32;

/// Longest request that is copied out of the buffer into which `/dev/fuse` is read (64 KiB of payload); a longer one takes that
/// buffer with it.
///
/// 16 of them in flight take 1 MiB of memory instead of 16, for a copy that takes about as long as a system call.
pub const COPIED_REQUEST_BYTES: usize = FUSE_HEADER_ROOM + (64 << 10);

/// Requests that one `sendmsg` carries (each takes up to two of the 1,024 vectors).
pub const SEND_BATCH: usize = 32;

/// Buffers that the pool keeps for reuse.
pub const MAX_POOLED_BUFFERS: usize = 160;

/// Memory that was not used for that long is given back: shorter than a pause that anybody would call idle, and long enough that
/// a steady load never allocates.
pub const TRIM_INTERVAL: Duration = Duration::from_secs(1);

/// Allocations from this size on come straight from the kernel and go back to it when they are freed.
pub const MAPPED_ALLOCATION_BYTES: usize = 512 << 10;

/// What is received from a socket at once, before it is known where payload belongs.
pub const RECEIVE_BYTES: usize = 64 << 10;

/// Send buffer of a replica's socket: several large writes, so that one `sendmsg` takes them.
pub const SEND_BUFFER_BYTES: usize = 4 << 20;

/// Longest request that the NBD server takes: what the protocol lets clients assume.
pub const NBD_MAX_IO: u32 = 32 << 20;

/// Requests of one NBD client in flight; more wait in its socket.
pub const NBD_CLIENT_REQUESTS: usize = 64;

/// Payload of one NBD client in flight; more waits in its socket.
pub const NBD_CLIENT_BYTES: usize = 64 << 20;

/// NBD clients at a time.
pub const MAX_NBD_CLIENTS: usize = 32;

/// Longest NBD option that is looked at (an export name is at most 4,096 bytes); a longer one ends the connection.
pub const NBD_MAX_OPTION: usize = 8 << 10;

/// Longest option reply of a replica's NBD server that is taken.
pub const NBD_MAX_OPTION_REPLY: usize = 64 << 10;

/// Option replies of a replica's NBD server before the handshake is given up.
pub const NBD_MAX_OPTION_REPLIES: usize = 64;

/// Longest line of a control protocol; a status of 16 replicas with errors is far below.
pub const MAX_CONTROL_LINE: usize = 256 << 10;

/// Control clients at a time.
pub const MAX_CONTROL_CLIENTS: usize = 64;

/// What a control client may leave unread before it is disconnected (a watcher that does not read).
pub const MAX_CONTROL_BACKLOG: usize = 4 << 20;

/// An engine that served for this long counts as one that works: it is replaced at once when it dies, and the holder's limit
/// begins anew. One that dies sooner, such as at a request that is repeated to each next one, is replaced after a pause.
pub const HOLDER_SETTLED: Duration = Duration::from_secs(1);

/// The first pause after a second quick death; it doubles with each further one.
pub const HOLDER_FIRST_PAUSE: Duration = Duration::from_millis(100);

/// The longest pause.
pub const HOLDER_LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// How often the holder asks an engine that was just started whether it serves.
pub const HOLDER_POLL: Duration = Duration::from_millis(100);

/// How often the holder asks an engine that serves whether it is still there.
pub const HOLDER_HEARTBEAT: Duration = Duration::from_secs(2);

/// How long one answer to that may take before the engine counts as silent; a healthy one takes less than a millisecond.
pub const HOLDER_ANSWER: Duration = Duration::from_secs(1);

/// Engines of the wished program that may fail to serve before every other one is of the holder's own program.
pub const HOLDER_FAILED_STARTS: u32 = 2;

/// How long the kernel may take to say what its FUSE can do; it does so at once.
pub const FUSE_PROBE: Duration = Duration::from_secs(5);

//! Numbers with a reason.

use std::time::Duration;

/// One QMP command: the slowest ones flush a head, which may take long on a slow disk.
pub const QMP_TIMEOUT: Duration = Duration::from_secs(60);
/// From the start of `qemu-storage-daemon` to its greeting.
pub const DAEMON_START_TIMEOUT: Duration = Duration::from_secs(20);
/// From `quit` to the end of `qemu-storage-daemon`: it flushes what it holds.
pub const DAEMON_QUIT_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a `qemu-storage-daemon` keeps free memory for its next requests, in milliseconds.
pub const DAEMON_SPARE_MEMORY_MS: u64 = 1000;
/// Most memory for the tables of a head; QEMU takes no more than the volume needs. 16 bytes for 128 KiB: enough for all of 64 GiB.
/// Random requests all over a larger volume read 4 KiB of table each time that they leave it. QEMU's own limit is 32 MiB.
pub const HEAD_TABLE_CACHE: u64 = 8 << 20;
/// Longest line of QMP that is taken; the description of all nodes of a replica takes a few thousand bytes.
pub const QMP_LINE_BYTES: usize = 1 << 20;
/// Events that a slow reader may be behind before it loses some.
pub const QMP_EVENT_QUEUE: usize = 256;

/// NBD connections of a daemon at a time. An export serves one engine; the rest is room for old ones and for tools. More wait.
pub const NBD_CONNECTIONS: u32 = 64;
/// How long an NBD connection is silent before its peer is asked for a sign of life, and between two questions.
pub const NBD_KEEPALIVE: Duration = Duration::from_secs(20);
/// Questions without an answer after which a connection is given up: a minute and a half in all.
pub const NBD_KEEPALIVE_PROBES: u32 = 3;

/// `blkid` and the like: they read a few blocks.
pub const PROBE_TIMEOUT: Duration = Duration::from_secs(30);
/// `mkfs`, which is begun anew when it was cut off, and checks that only read: proportional to the size of the volume.
pub const FILESYSTEM_TIMEOUT: Duration = Duration::from_secs(600);
/// What is read of the output of a program that runs to its end; what it says last says how it ended.
pub const OUTPUT_BYTES: u64 = 64 << 10;
/// What is kept of the standard error of a program.
pub const STDERR_BYTES: usize = 4096;

/// How long a device may take to go after it was told to.
pub const LOOP_DETACH_TIMEOUT: Duration = Duration::from_secs(5);
/// How often it is looked at meanwhile; the kernel offers no event.
pub const LOOP_DETACH_INTERVAL: Duration = Duration::from_millis(5);
/// How often a free loop device is asked for when others are faster.
pub const LOOP_ATTACH_ATTEMPTS: u32 = 64;

/// How long an ordinary unmount is repeated while the target is busy.
pub const UNMOUNT_TIMEOUT: Duration = Duration::from_secs(10);
/// How often it is repeated.
pub const UNMOUNT_INTERVAL: Duration = Duration::from_millis(50);

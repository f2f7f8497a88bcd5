//! The configuration and the control protocol of an engine process: JSON lines over a unix socket.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// How to reach a replica process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReplicaAddress {
    /// Its directory, when it is on the same node: the sockets in it are used.
    Directory(PathBuf),
    /// `ip:port` of its NBD server; control is the next port.
    Tcp(String),
}

/// What an engine works on. The holder reads it from a file and passes it on to each engine that it starts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Config {
    pub volume: String,
    pub size_bytes: u64,
    /// The attachment begins with a generation above this one and above the highest that any replica has recorded.
    pub generation: u64,
    /// The number of the attachment, above those of all before. 0 in a configuration that an older version wrote.
    #[serde(default)]
    pub attachment: u64,
    /// The current replicas by name.
    pub replicas: BTreeMap<String, ReplicaAddress>,
    /// The replica to read from, when it is in sync (the one on this node).
    pub read_from: Option<String>,
    /// Replicas may differ in writes that were in flight: compare and repair them in the background, read only from one until then.
    pub compare_replicas: bool,
    /// The file to mount the volume on as a block-sized regular file (FUSE).
    pub mount_file: PathBuf,
    /// Where to listen for this protocol.
    pub control_socket: PathBuf,
    /// Where to serve the volume as NBD export named like the volume.
    pub nbd_socket: PathBuf,
    /// After this long without an answer a replica is dropped.
    pub replica_timeout_ms: u64,
    /// How long I/O is held when no replica is left, before it fails.
    pub no_replica_hold_ms: u64,
    /// How long the holder waits for a working engine before it aborts the FUSE connection.
    pub holder_limit_ms: u64,
    /// An engine that answers nobody for this long is killed and replaced.
    #[serde(default = "default_silence_limit_ms")]
    pub silence_limit_ms: u64,
    /// Whether another engine may take the place of one that died; otherwise the device ends with it, as on a kernel before 6.9.
    #[serde(default = "yes")]
    pub replace_engine: bool,
    /// The program of the next engine; absent: the holder's own. The holder reads it before each start.
    #[serde(default)]
    pub program: Option<PathBuf>,
    /// A directory with the certificates of this process (`ca.crt`, `tls.crt`, `tls.key`), for connections to replicas over TCP; absent: they are
    /// plain. It is read at the start, and again when its files were replaced.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificates: Option<PathBuf>,
}

/// For a configuration that an older version wrote.
fn default_silence_limit_ms() -> u64 {
    10_000
}

fn yes() -> bool {
    true
}

/// What a holder says while no engine serves, or the one that serves is silent: the file `<control socket>.holder`, absent while
/// all is well. Times are milliseconds since 1970.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HolderReport {
    /// What is wrong, a sentence.
    pub problem: String,
    /// The engine is there and does not answer; otherwise there is none.
    pub silent: bool,
    /// Since when I/O waits.
    pub since_ms: u64,
    /// Engines that were started since then.
    pub attempts: u32,
    /// What happens when nothing gets better, and when.
    pub then: String,
    pub deadline_ms: u64,
    pub next_attempt_ms: Option<u64>,
}

/// A request to an engine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "request")]
pub enum Request {
    /// One [`Status`].
    Status,
    /// A [`Status`] now and after each change of it, until the connection ends.
    Watch,
    /// Finish what is in flight, flush, close the replicas cleanly, unmount, end. Refused while the device is in use.
    Shutdown,
    /// Finish what is in flight and end, so that the holder starts the next engine; the device stays. Refused with the reason
    /// when the next one might not be able to go on.
    HandOver,
}

/// The reply to a [`Request`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "reply")]
pub enum Reply {
    Status(Status),
    Done,
    Refused { message: String },
}

/// How one replica does, seen from the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReplicaState {
    /// In sync, may serve reads.
    InSync,
    /// Takes writes, is being compared, serves no reads.
    Comparing,
    /// Dropped; it never comes back within this attachment.
    Dropped,
}

/// How an engine does.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Status {
    pub volume: String,
    pub pid: u32,
    pub generation: u64,
    /// It serves I/O (or holds it because no replica is left).
    pub serving: bool,
    pub replicas: BTreeMap<String, ReplicaState>,
    /// Why a replica was dropped, a sentence.
    pub replica_errors: BTreeMap<String, String>,
    /// No replica is left: what happens to I/O now.
    pub faulted: Option<String>,
    pub read_ops: u64,
    pub read_bytes: u64,
    pub write_ops: u64,
    pub write_bytes: u64,
    pub flush_ops: u64,
    pub in_flight: u32,
    /// How often an engine was started for this mount.
    pub lives: u32,
    /// Of the program that serves.
    pub version: String,
}

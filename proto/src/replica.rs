//! The control protocol of a replica process: JSON lines, one reply a request, over a unix socket and over TCP (its NBD port plus one).
//!
//! The engine raises generations with it; the instance role asks for status. A request that changes something is answered
//! only after the change is durable.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// What a replica process works on: read from the file that `backing-image-csi replica --config FILE` names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Config {
    pub volume: String,
    pub replica: String,
    /// Its directory; made when absent.
    pub directory: PathBuf,
    pub size_bytes: u64,
    /// `None`: the volume has no backing image.
    pub image: Option<ImageFile>,
    /// TCP address of NBD; the control protocol is on the next port.
    pub listen: SocketAddr,
    /// A directory with the certificates of this process (`ca.crt`, `tls.crt`, `tls.key`), for connections over TCP; absent: they are
    /// plain. It is read at the start, and again when its files were replaced.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificates: Option<PathBuf>,
}

/// The file below a replica.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ImageFile {
    pub name: String,
    pub uuid: String,
    pub path: PathBuf,
    /// `raw` or `qcow2`, as recorded at ingest; never probed.
    pub format: String,
}

/// File names within a replica's directory.
pub mod file {
    /// The durable record: [`super::Record`].
    pub const RECORD: &str = "replica.json";
    /// The writable qcow2 layer.
    pub const HEAD: &str = "volume-head.qcow2";
    /// NBD of the current export, where a relay stands between it and the network.
    pub const NBD_SOCKET: &str = "nbd.sock";
    /// This protocol.
    pub const CONTROL_SOCKET: &str = "control.sock";
}

/// What a replica knows about itself, durably (`replica.json`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Record {
    pub volume: String,
    pub replica: String,
    pub size_bytes: u64,
    pub backing_image: String,
    pub backing_image_uuid: String,
    /// 0: it was never part of an attachment.
    pub generation: u64,
    /// The replicas that were in sync when that generation began, this one included.
    pub members: Vec<String>,
    /// The attachment of that generation ended cleanly: all members hold the same bytes.
    pub clean: bool,
}

/// A request to a replica process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "request")]
pub enum Request {
    /// How is it?
    Status,
    /// A new engine: end every export, record the generation durably (not clean), open a fresh export for one connection.
    /// Refused unless `generation` is above the recorded one, and when `seen`, the generation that the engine saw here when it
    /// chose its members, is not the recorded one any more: what it chose by is outdated then.
    Open {
        generation: u64,
        members: Vec<String>,
        /// None from an engine of an older version, which is taken at its word.
        #[serde(default)]
        seen: Option<u64>,
    },
    /// A replica was dropped: record the new generation and the remaining members durably; the export stays.
    /// Refused unless `generation` is above the recorded one and `export` is the one that `Open` gave and that still serves:
    /// an engine whose replica was opened by another one must not change the members of that one's generation.
    Fence { generation: u64, members: Vec<String>, export: String },
    /// The attachment of this generation ended cleanly: end the export (everything is flushed), record it as clean.
    Close { generation: u64 },
}

/// The reply to a [`Request`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "reply")]
pub enum Reply {
    Status {
        record: Record,
        export: Option<String>,
        actual_size_bytes: u64,
    },
    /// After `Open`: the NBD export name to ask for.
    Opened {
        export: String,
    },
    /// After `Fence` and `Close`.
    Done,
    /// Nothing was changed; the sentence says why.
    Refused {
        message: String,
    },
}

//! BackingImage: read-only content, its source and its copies (LF 1.1).

use std::collections::BTreeMap;

use kube::CustomResource;
use schemars::JsonSchema;
use serde::de::IntoDeserializer;
use serde::{Deserialize, Deserializer, Serialize};

use crate::{Condition, ErrorKind, Unknown};

/// Where the first file of an image comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SourceType {
    Download,
    Upload,
    ExportFromVolume,
    Restore,
    Clone,
}

impl SourceType {
    /// The name on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            SourceType::Download => "download",
            SourceType::Upload => "upload",
            SourceType::ExportFromVolume => "export-from-volume",
            SourceType::Restore => "restore",
            SourceType::Clone => "clone",
        }
    }
}

/// Longhorn's clients write an empty text where they mean none.
pub(crate) fn some_source_type<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<SourceType>, D::Error> {
    let text = Option::<String>::deserialize(deserializer)?;
    let named = text.filter(|text| !text.is_empty()).map(|text| SourceType::deserialize(text.into_deserializer()));
    named.transpose()
}

/// Which engine serves the data; only `v1` is offered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DataEngine {
    // Go clients write an empty text for the default.
    #[default]
    #[serde(alias = "")]
    V1,
    V2,
}

/// State of one copy. The empty string on the wire means that nothing has begun.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum CopyState {
    #[default]
    #[serde(rename = "")]
    NotStarted,
    Pending,
    Starting,
    InProgress,
    ReadyForTransfer,
    Ready,
    Failed,
    FailedAndCleanup,
    Unknown,
}

impl CopyState {
    /// The name on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            CopyState::NotStarted => "",
            CopyState::Pending => "pending",
            CopyState::Starting => "starting",
            CopyState::InProgress => "in-progress",
            CopyState::ReadyForTransfer => "ready-for-transfer",
            CopyState::Ready => "ready",
            CopyState::Failed => "failed",
            CopyState::FailedAndCleanup => "failed-and-cleanup",
            CopyState::Unknown => "unknown",
        }
    }

    /// The state of that name; an unknown name is [`CopyState::Unknown`].
    pub fn from_name(name: &str) -> CopyState {
        [
            CopyState::NotStarted,
            CopyState::Pending,
            CopyState::Starting,
            CopyState::InProgress,
            CopyState::ReadyForTransfer,
            CopyState::Ready,
            CopyState::Failed,
            CopyState::FailedAndCleanup,
        ]
        .into_iter()
        .find(|state| state.as_str() == name)
        .unwrap_or(CopyState::Unknown)
    }
}

/// The wish for an image.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "longhorn.io",
    version = "v1beta2",
    kind = "BackingImage",
    plural = "backingimages",
    shortname = "lhbi",
    namespaced,
    status = "BackingImageStatus",
    derive = "PartialEq",
    derive = "Default",
    printcolumn = r#"{"name":"UUID","type":"string","jsonPath":".status.uuid"}"#,
    printcolumn = r#"{"name":"SourceType","type":"string","jsonPath":".spec.sourceType"}"#,
    printcolumn = r#"{"name":"Size","type":"integer","jsonPath":".status.size"}"#,
    printcolumn = r#"{"name":"VirtualSize","type":"integer","jsonPath":".status.virtualSize"}"#,
    printcolumn = r#"{"name":"Ready","type":"string","jsonPath":".status.conditions[?(@.type=='Ready')].status"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase", default)]
pub struct BackingImageSpec {
    /// Expected SHA-512 of the whole file, 128 lower-case hexadecimal digits; empty: the first file decides.
    pub checksum: String,
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "some_source_type")]
    pub source_type: Option<SourceType>,
    /// Keys by source type: LF 1.5. Ours: `padToSector: "true"` pads a raw file to a multiple of 512 bytes.
    pub source_parameters: BTreeMap<String, String>,
    /// 0: the setting `default-min-number-of-backing-image-copies`.
    pub min_number_of_copies: u32,
    /// Tags that the node of a copy must all have.
    pub node_selector: Vec<String>,
    /// Tags that the disk of a copy must all have.
    pub disk_selector: Vec<String>,
    pub secret: String,
    pub secret_namespace: String,
    pub data_engine: DataEngine,
    /// Ours: bytes a second that each disk sends of this image, and that its data source downloads; 0: as many as the setting
    /// `backing-image-bandwidth-limit` allows.
    #[serde(skip_serializing_if = "crate::bandwidth::is_none")]
    pub bandwidth_limit: u64,
    /// Ours: copies that were not verified since this time (RFC 3339) are read and compared with their manifest now.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub verify_requested_at: String,
    /// Ours: the disks (UUIDs) that `verifyRequestedAt` is about; empty: all.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub verify_disks: Vec<String>,
    /// Wanted copies by disk UUID.
    pub disk_file_spec_map: BTreeMap<String, DiskFileSpec>,
    #[serde(flatten)]
    pub other: Unknown,
}

/// One wanted copy.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct DiskFileSpec {
    pub eviction_requested: bool,
    pub data_engine: DataEngine,
    /// Ours: why the copy is wanted on this very disk, a sentence; empty: who wrote the entry did not say.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub reason: String,
    #[serde(flatten)]
    pub other: Unknown,
}

/// What is known of an image.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct BackingImageStatus {
    #[serde(rename = "ownerID")]
    pub owner_id: String,
    /// Eight characters, set once; part of every path.
    pub uuid: String,
    /// Bytes of the file.
    pub size: u64,
    /// Bytes that a guest sees; 0 until known.
    pub virtual_size: u64,
    /// Bytes that the file takes on disk.
    pub real_size: u64,
    /// SHA-512 of the file; empty until known.
    pub checksum: String,
    /// Ours: `raw` or `qcow2`, recorded once at ingest and never probed again; empty until known.
    pub format: String,
    /// Observed copies by disk UUID.
    pub disk_file_status_map: BTreeMap<String, DiskFileStatus>,
    /// Since when no replica uses the copy of a disk, RFC 3339.
    pub disk_last_ref_at_map: BTreeMap<String, String>,
    /// Ours.
    pub conditions: Vec<Condition>,
    #[serde(flatten)]
    pub other: Unknown,
}

impl BackingImageStatus {
    /// Bytes that a copy takes on its disk; 0 when not known yet.
    pub fn copy_bytes(&self) -> u64 {
        if self.real_size > 0 { self.real_size } else { self.size }
    }
}

/// One observed copy.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct DiskFileStatus {
    pub data_engine: DataEngine,
    pub state: CopyState,
    /// Percent.
    pub progress: u32,
    /// Why it is in this state; empty when there is nothing to say.
    pub message: String,
    pub last_state_transition_time: String,
    /// Ours: since when no node has its disk any more, RFC 3339; empty: some node has it, or not every node has told.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub gone_since: String,
    /// Ours: when the next attempt comes, RFC 3339; empty when none is scheduled.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub next_retry_time: String,
    /// Ours: what kind of failure `message` tells of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error_kind: Option<ErrorKind>,
    /// Ours: when the whole file was last read and found to match its manifest, RFC 3339; empty: not since it was made.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub verified_at: String,
    /// Ours: the last damage that was found and repaired, a sentence; empty when there never was any.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub damage: String,
}

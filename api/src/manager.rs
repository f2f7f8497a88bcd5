//! BackingImageManager: the agent of one disk (LF 1.2).

use std::collections::BTreeMap;

use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::image::CopyState;
use crate::{Condition, ErrorKind, Unknown};

/// State of an agent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ManagerState {
    #[default]
    #[serde(rename = "")]
    NotStarted,
    Starting,
    Running,
    Stopped,
    Error,
    Unknown,
}

/// The wish for an agent.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "longhorn.io",
    version = "v1beta2",
    kind = "BackingImageManager",
    plural = "backingimagemanagers",
    shortname = "lhbim",
    namespaced,
    status = "BackingImageManagerStatus",
    derive = "PartialEq",
    derive = "Default",
    printcolumn = r#"{"name":"State","type":"string","jsonPath":".status.currentState"}"#,
    printcolumn = r#"{"name":"Node","type":"string","jsonPath":".spec.nodeID"}"#,
    printcolumn = r#"{"name":"DiskUUID","type":"string","jsonPath":".spec.diskUUID"}"#,
    printcolumn = r#"{"name":"DiskPath","type":"string","jsonPath":".spec.diskPath"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase", default)]
pub struct BackingImageManagerSpec {
    pub image: String,
    #[serde(rename = "nodeID")]
    pub node_id: String,
    #[serde(rename = "diskUUID")]
    pub disk_uuid: String,
    pub disk_path: String,
    /// Image name → image uuid: the copies that this disk shall hold.
    pub backing_images: BTreeMap<String, String>,
    #[serde(flatten)]
    pub other: Unknown,
}

impl BackingImageManagerSpec {
    /// Whether this disk shall hold the copy of an image with that uuid.
    pub fn records(&self, image: &str, uuid: &str) -> bool {
        self.backing_images.get(image).is_some_and(|recorded| recorded == uuid)
    }
}

/// What is known of an agent.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct BackingImageManagerStatus {
    #[serde(rename = "ownerID")]
    pub owner_id: String,
    pub current_state: ManagerState,
    /// Image name → file.
    pub backing_image_file_map: BTreeMap<String, FileInfo>,
    /// Its address: gRPC on port 8000, chunk transfer on port 8001.
    pub ip: String,
    #[serde(rename = "storageIP")]
    pub storage_ip: String,
    pub api_min_version: i64,
    pub api_version: i64,
    /// Ours: what lies in the directories of images and belongs to no image that exists, by its path below the disk.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub orphans: BTreeMap<String, Orphan>,
    /// Ours: what lies there and is nothing of ours, by its path below the disk. It is never touched.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub foreign_files: Vec<String>,
    /// Ours.
    pub conditions: Vec<Condition>,
    #[serde(flatten)]
    pub other: Unknown,
}

/// What an image left on a disk.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Orphan {
    /// What it takes on the disk.
    pub size: u64,
    /// Since when it was seen as it is, RFC 3339.
    pub found_at: String,
    /// Why it belongs to nobody, and what is done about it.
    pub message: String,
}

/// One file as its agent reports it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct FileInfo {
    pub name: String,
    pub uuid: String,
    pub size: u64,
    pub virtual_size: u64,
    pub real_size: u64,
    pub state: CopyState,
    pub current_checksum: String,
    pub message: String,
    pub sending_reference: u32,
    pub sender_manager_address: String,
    /// Percent.
    pub progress: u32,
    /// Ours: `raw` or `qcow2`; empty until known.
    pub format: String,
    /// Ours: when the controller tries this file again, RFC 3339; empty when nothing is scheduled.
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

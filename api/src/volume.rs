//! Volume: what CSI hands out.

use std::collections::BTreeMap;

use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::image::DataEngine;
use crate::quantity::SizeBytes;
use crate::{Condition, Unknown};

/// Where a volume stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum VolumeState {
    #[default]
    #[serde(rename = "")]
    NotStarted,
    Creating,
    Detached,
    Attaching,
    Attached,
    Detaching,
    Deleting,
}

/// How many of its replicas a volume can rely on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Robustness {
    #[default]
    Unknown,
    /// All of them.
    Healthy,
    /// Some of them.
    Degraded,
    /// None; the data is untouched.
    Faulted,
}

/// Who may use a volume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum AccessMode {
    #[default]
    Rwo,
    Rwop,
    Rwx,
}

/// The wish for a volume.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "longhorn.io",
    version = "v1beta2",
    kind = "Volume",
    plural = "volumes",
    shortname = "lhv",
    namespaced,
    status = "VolumeStatus",
    derive = "PartialEq",
    derive = "Default",
    printcolumn = r#"{"name":"Data Engine","type":"string","jsonPath":".spec.dataEngine"}"#,
    printcolumn = r#"{"name":"State","type":"string","jsonPath":".status.state"}"#,
    printcolumn = r#"{"name":"Robustness","type":"string","jsonPath":".status.robustness"}"#,
    printcolumn = r#"{"name":"Scheduled","type":"string","jsonPath":".status.conditions[?(@.type=='Scheduled')].status"}"#,
    printcolumn = r#"{"name":"Image","type":"string","jsonPath":".spec.backingImage"}"#,
    printcolumn = r#"{"name":"Size","type":"string","jsonPath":".spec.size"}"#,
    printcolumn = r#"{"name":"Node","type":"string","jsonPath":".status.currentNodeID"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase", default)]
pub struct VolumeSpec {
    pub size: SizeBytes,
    /// `blockdev`.
    pub frontend: String,
    /// The node to attach to; empty: detach.
    #[serde(rename = "nodeID")]
    pub node_id: String,
    pub backing_image: String,
    pub number_of_replicas: u32,
    /// Minutes.
    pub stale_replica_timeout: u32,
    /// Tags that the disk of a replica must all have.
    pub disk_selector: Vec<String>,
    /// Tags that the node of a replica must all have.
    pub node_selector: Vec<String>,
    pub access_mode: AccessMode,
    pub data_engine: DataEngine,
    /// Ours: the StorageClass parameters it was created with, to compare a repeated request.
    pub parameters: BTreeMap<String, String>,
    /// Ours, RFC 3339: replace the running engine by one of the installed version, once for each time that is written here.
    /// What came of it stands in condition `Upgraded` of the Engine.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub engine_upgrade_requested_at: String,
    #[serde(flatten)]
    pub other: Unknown,
}

/// What is known of a volume.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct VolumeStatus {
    #[serde(rename = "ownerID")]
    pub owner_id: String,
    pub state: VolumeState,
    pub robustness: Robustness,
    /// Where it is attached now; empty: nowhere.
    #[serde(rename = "currentNodeID")]
    pub current_node_id: String,
    /// Bytes on disk, of its largest replica.
    pub actual_size: u64,
    /// RFC 3339; empty when not degraded.
    pub last_degraded_at: String,
    /// Ours: the filesystem that the node service makes on this volume, which was blank; gone before anybody uses the volume.
    /// While it stands here, what is there is the remainder of an attempt that was cut off, and is made again.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub unfinished_filesystem: String,
    pub conditions: Vec<Condition>,
    #[serde(flatten)]
    pub other: Unknown,
}

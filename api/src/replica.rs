//! Replica: a volume's overlay on one disk.

use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::engine::{DesireState, InstanceState};
use crate::image::DataEngine;
use crate::quantity::SizeBytes;
use crate::{Condition, Unknown};

/// The wish for a replica. Written by the volume reconciler only.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "longhorn.io",
    version = "v1beta2",
    kind = "Replica",
    plural = "replicas",
    shortname = "lhr",
    namespaced,
    status = "ReplicaStatus",
    derive = "PartialEq",
    derive = "Default",
    printcolumn = r#"{"name":"Data Engine","type":"string","jsonPath":".spec.dataEngine"}"#,
    printcolumn = r#"{"name":"State","type":"string","jsonPath":".status.currentState"}"#,
    printcolumn = r#"{"name":"Node","type":"string","jsonPath":".spec.nodeID"}"#,
    printcolumn = r#"{"name":"Disk","type":"string","jsonPath":".spec.diskID"}"#,
    printcolumn = r#"{"name":"Failed","type":"string","jsonPath":".spec.failedAt"}"#,
    printcolumn = r#"{"name":"Generation","type":"integer","jsonPath":".status.generation"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase", default)]
pub struct ReplicaSpec {
    pub volume_name: String,
    pub volume_size: SizeBytes,
    #[serde(rename = "nodeID")]
    pub node_id: String,
    pub desire_state: DesireState,
    pub engine_name: String,
    /// When it was dropped or found stale (RFC 3339); empty: it is good. A failed replica never rejoins by itself.
    pub failed_at: String,
    /// Ours: why it failed, a sentence.
    pub failed_reason: String,
    /// Ours: why it was placed on its disk, a sentence; written once, when it is made.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub place_reason: String,
    /// UUID of its disk.
    #[serde(rename = "diskID")]
    pub disk_id: String,
    pub disk_path: String,
    /// Its directory below `<disk path>/replicas/`.
    pub data_directory_name: String,
    pub backing_image: String,
    pub active: bool,
    pub data_engine: DataEngine,
    #[serde(flatten)]
    pub other: Unknown,
}

/// What is known of a replica. Written by the instance role of its node only.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ReplicaStatus {
    #[serde(rename = "ownerID")]
    pub owner_id: String,
    pub current_state: InstanceState,
    pub ip: String,
    /// TCP port of its NBD server; the control port is the next one.
    pub port: u16,
    pub started: bool,
    /// Ours: the generation in its `replica.json`; 0 when it holds no data yet.
    pub generation: u64,
    /// Ours: the replicas that were in sync at that generation.
    pub generation_members: Vec<String>,
    /// Ours: its last attachment ended cleanly (also true when it was never attached).
    pub clean: bool,
    /// Ours: the size of the volume as its files have it; 0 when not known.
    pub current_size: SizeBytes,
    /// Ours: bytes that its files take on disk.
    pub actual_size_bytes: u64,
    pub conditions: Vec<Condition>,
    #[serde(flatten)]
    pub other: Unknown,
}

//! Engine: the process that joins the replicas of one attachment.

use std::collections::BTreeMap;

use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::image::DataEngine;
use crate::quantity::SizeBytes;
use crate::{Condition, Unknown};

/// State of an engine or replica process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum InstanceState {
    /// Nobody has looked yet.
    #[default]
    #[serde(rename = "")]
    NotStarted,
    Stopped,
    Starting,
    Running,
    Stopping,
    Error,
    Unknown,
}

/// What an engine or replica shall do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DesireState {
    #[default]
    Stopped,
    Running,
}

/// How an engine uses one replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "UPPERCASE")]
pub enum ReplicaMode {
    /// In sync: it takes every write and may serve reads.
    Rw,
    /// It takes every write and serves no reads, until it was compared.
    Wo,
    /// Dropped.
    Err,
}

/// The wish for an engine. Written by the volume reconciler only.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "longhorn.io",
    version = "v1beta2",
    kind = "Engine",
    plural = "engines",
    shortname = "lhe",
    namespaced,
    status = "EngineStatus",
    derive = "PartialEq",
    derive = "Default",
    printcolumn = r#"{"name":"Data Engine","type":"string","jsonPath":".spec.dataEngine"}"#,
    printcolumn = r#"{"name":"State","type":"string","jsonPath":".status.currentState"}"#,
    printcolumn = r#"{"name":"Node","type":"string","jsonPath":".spec.nodeID"}"#,
    printcolumn = r#"{"name":"Endpoint","type":"string","jsonPath":".status.endpoint"}"#,
    printcolumn = r#"{"name":"Generation","type":"integer","jsonPath":".status.generation"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase", default)]
pub struct EngineSpec {
    pub volume_name: String,
    pub volume_size: SizeBytes,
    #[serde(rename = "nodeID")]
    pub node_id: String,
    pub desire_state: DesireState,
    pub frontend: String,
    /// Replica name → `ip:port` of its NBD server. Exactly the replicas that are current.
    pub replica_address_map: BTreeMap<String, String>,
    pub active: bool,
    pub data_engine: DataEngine,
    /// Ours: the highest generation that this volume is known to have reached (see ARCHITECTURE.md, "Generations"). Never lowered.
    pub generation: u64,
    /// Ours: counts the attachments. Raised with every wish for an engine, so that one that lives on somewhere is told apart from it.
    pub attachment: u64,
    /// Ours: the last attachment did not end cleanly, so replicas may differ in writes that were in flight:
    /// reads stay on one replica until the others were compared with it.
    pub compare_replicas: bool,
    /// Ours: the volume's `engineUpgradeRequestedAt`, for the instance role.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub upgrade_requested_at: String,
    #[serde(flatten)]
    pub other: Unknown,
}

/// What is known of an engine. Written by the instance role of its node only.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct EngineStatus {
    #[serde(rename = "ownerID")]
    pub owner_id: String,
    pub current_state: InstanceState,
    pub ip: String,
    pub port: u16,
    pub current_size: SizeBytes,
    pub current_replica_address_map: BTreeMap<String, String>,
    pub replica_mode_map: BTreeMap<String, ReplicaMode>,
    /// The block device, e.g. `/dev/loop7`; empty while there is none.
    pub endpoint: String,
    pub started: bool,
    /// Ours: the generation that the engine runs with, or ended with.
    pub generation: u64,
    /// Ours: why a replica is `ERR`, a sentence.
    pub replica_errors: BTreeMap<String, String>,
    /// Ours: path of the unix socket that serves the volume as NBD export, on its node.
    pub nbd_socket: String,
    /// Ours: version of the program that the engine runs. There are no engine images: an engine is a process of the driver's binary.
    pub version: String,
    /// Ours: the `spec.upgradeRequestedAt` that condition `Upgraded` answers.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub upgrade_requested_at: String,
    pub conditions: Vec<Condition>,
    #[serde(flatten)]
    pub other: Unknown,
}

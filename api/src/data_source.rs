//! BackingImageDataSource: the preparation of an image's first file (LF 1.3).

use std::collections::BTreeMap;

use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::image::{CopyState, SourceType};
use crate::{Condition, ErrorKind, Unknown};

/// The wish for a first file.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "longhorn.io",
    version = "v1beta2",
    kind = "BackingImageDataSource",
    plural = "backingimagedatasources",
    shortname = "lhbids",
    namespaced,
    status = "BackingImageDataSourceStatus",
    derive = "PartialEq",
    derive = "Default",
    printcolumn = r#"{"name":"UUID","type":"string","jsonPath":".spec.uuid"}"#,
    printcolumn = r#"{"name":"State","type":"string","jsonPath":".status.currentState"}"#,
    printcolumn = r#"{"name":"SourceType","type":"string","jsonPath":".spec.sourceType"}"#,
    printcolumn = r#"{"name":"Size","type":"integer","jsonPath":".status.size"}"#,
    printcolumn = r#"{"name":"Node","type":"string","jsonPath":".spec.nodeID"}"#,
    printcolumn = r#"{"name":"DiskUUID","type":"string","jsonPath":".spec.diskUUID"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase", default)]
pub struct BackingImageDataSourceSpec {
    #[serde(rename = "nodeID")]
    pub node_id: String,
    pub uuid: String,
    #[serde(rename = "diskUUID")]
    pub disk_uuid: String,
    pub disk_path: String,
    pub checksum: String,
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "crate::image::some_source_type")]
    pub source_type: Option<SourceType>,
    pub parameters: BTreeMap<String, String>,
    /// The agent of the disk has taken the file over.
    pub file_transferred: bool,
    #[serde(flatten)]
    pub other: Unknown,
}

/// What is known of a first file.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct BackingImageDataSourceStatus {
    #[serde(rename = "ownerID")]
    pub owner_id: String,
    pub running_parameters: BTreeMap<String, String>,
    pub current_state: CopyState,
    pub ip: String,
    #[serde(rename = "storageIP")]
    pub storage_ip: String,
    pub size: u64,
    /// Percent.
    pub progress: u32,
    pub checksum: String,
    pub message: String,
    /// Ours: how often the preparation failed since it last succeeded or its spec changed.
    pub failures: u32,
    /// Ours: when the next attempt comes, RFC 3339; empty when none is scheduled.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub next_retry_time: String,
    /// Ours: what kind of failure `message` tells of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error_kind: Option<ErrorKind>,
    /// Ours: since when the agent of the disk says that it does not have the file that was handed over to it; empty when it does not say so.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub lost_since: String,
    /// Ours: since when the process runs and does not answer; empty when it answers.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub silent_since: String,
    /// Ours.
    pub conditions: Vec<Condition>,
    #[serde(flatten)]
    pub other: Unknown,
}

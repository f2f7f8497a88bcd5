//! Node: a machine with disks.

use std::collections::BTreeMap;

use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Condition, Unknown};

/// The wish for a node.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "longhorn.io",
    version = "v1beta2",
    kind = "Node",
    plural = "nodes",
    shortname = "lhn",
    namespaced,
    status = "NodeStatus",
    derive = "PartialEq",
    derive = "Default",
    printcolumn = r#"{"name":"Ready","type":"string","jsonPath":".status.conditions[?(@.type=='Ready')].status"}"#,
    printcolumn = r#"{"name":"AllowScheduling","type":"boolean","jsonPath":".spec.allowScheduling"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase", default)]
pub struct NodeSpec {
    pub name: String,
    /// By disk name.
    pub disks: BTreeMap<String, DiskSpec>,
    pub allow_scheduling: bool,
    pub eviction_requested: bool,
    pub tags: Vec<String>,
    #[serde(flatten)]
    pub other: Unknown,
}

impl Default for NodeSpec {
    fn default() -> Self {
        NodeSpec {
            name: String::new(),
            disks: BTreeMap::new(),
            allow_scheduling: true,
            eviction_requested: false,
            tags: vec![],
            other: Unknown::default(),
        }
    }
}

/// The wish for a disk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct DiskSpec {
    /// `filesystem`.
    pub r#type: String,
    pub path: String,
    pub allow_scheduling: bool,
    pub eviction_requested: bool,
    /// Bytes that are never promised to anybody.
    pub storage_reserved: u64,
    pub tags: Vec<String>,
    #[serde(flatten)]
    pub other: Unknown,
}

impl Default for DiskSpec {
    fn default() -> Self {
        DiskSpec {
            r#type: "filesystem".into(),
            path: String::new(),
            allow_scheduling: true,
            eviction_requested: false,
            storage_reserved: 0,
            tags: vec![],
            other: Unknown::default(),
        }
    }
}

/// What is known of a node. Written by the instance role of that node only.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct NodeStatus {
    pub conditions: Vec<Condition>,
    /// By disk name.
    pub disk_status: BTreeMap<String, DiskStatus>,
    pub region: String,
    pub zone: String,
    /// Ours: the address of its data-plane processes.
    pub ip: String,
    #[serde(flatten)]
    pub other: Unknown,
}

/// What is known of a disk.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct DiskStatus {
    pub conditions: Vec<Condition>,
    /// Free bytes.
    pub storage_available: u64,
    /// All bytes.
    pub storage_maximum: u64,
    #[serde(rename = "diskUUID")]
    pub disk_uuid: String,
    pub disk_name: String,
    pub disk_path: String,
    pub r#type: String,
    #[serde(rename = "filesystemType")]
    pub fs_type: String,
    /// Ours: files of images lie on it, whoever they belong to.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub holds_image_files: bool,
    /// Ours: `<name>-<uuid>` of each image that a directory below `replicas/` lies over; absent: that is not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub images_under_replicas: Option<Vec<String>>,
    #[serde(flatten)]
    pub other: Unknown,
}

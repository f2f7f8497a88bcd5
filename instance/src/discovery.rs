//! What a Kubernetes node says of its storage: the Node object, its default disks and tags, its zone.
//!
//! As Longhorn does it. The object is made when the role starts and is absent. Without the setting `create-default-disk-labeled-nodes`
//! a new one has a disk at `default-data-path`. With it, a node without disks waits for the label `node.longhorn.io/create-default-disk`:
//! `true` means that disk, `config` those of the annotation `node.longhorn.io/default-disks-config`. Tags come from the annotation
//! `node.longhorn.io/default-node-tags` while there are none. What is there already is never changed.

use std::collections::BTreeMap;
use std::path::Path;

use api::names::condition::DEFAULT_DISKS;
use api::node::{DiskSpec, NodeSpec};
use api::{Condition, ConditionStatus, Node, Setting, setting};
use k8s_openapi::api::core::v1::Node as Machine;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use runtime::files;
use serde::Deserialize;
use store::{Selector, StoreError};
use tracing::info;

use crate::error::InstanceError;
use crate::role::Config;

/// Label: whether and how a node gets disks, under the setting `create-default-disk-labeled-nodes`.
const CREATE_LABEL: &str = "node.longhorn.io/create-default-disk";
/// Annotation: the disks, a JSON list.
const DISKS_ANNOTATION: &str = "node.longhorn.io/default-disks-config";
/// Annotation: the node's tags, a JSON list.
const TAGS_ANNOTATION: &str = "node.longhorn.io/default-node-tags";
/// The disk at `default-data-path`.
const DEFAULT_DISK: &str = "default-disk";

/// What is known beside the Node object.
pub struct Found {
    pub region: String,
    pub zone: String,
    /// How the disks of the node came to be, or what they wait for.
    pub condition: Condition,
}

/// A disk in the annotation.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Wanted {
    #[serde(default)]
    name: String,
    path: String,
    #[serde(default = "yes")]
    allow_scheduling: bool,
    #[serde(default)]
    eviction_requested: bool,
    #[serde(default)]
    storage_reserved: u64,
    #[serde(default)]
    tags: Vec<String>,
    #[serde(default = "filesystem", alias = "diskType")]
    r#type: String,
}

fn yes() -> bool {
    true
}

fn filesystem() -> String {
    "filesystem".into()
}

/// The settings that matter here.
struct Defaults {
    labeled_only: bool,
    path: String,
    reserved_percent: u64,
}

/// Why a node has no default disk: reason, sentence, what to do.
struct NoDisk {
    reason: &'static str,
    message: String,
    hint: &'static str,
}

/// Makes the Node object unless it is there.
///
/// # Errors
/// When the cluster has no node of that name.
pub async fn create(config: &Config) -> Result<(), InstanceError> {
    let name = config.node.as_str();
    if config.store.get::<Node>(name).await?.is_some() {
        return Ok(());
    }
    let machine = machine(config).await?;
    let mut spec = NodeSpec { name: name.into(), ..NodeSpec::default() };
    // What is wrong is told by the next look at the disks.
    let _ = complete(config, &mut spec, true, &machine).await?;
    match config.store.create(&Node::new(name, spec)).await {
        Ok(node) => {
            info!(node = name, disks = node.spec.disks.len(), "node object made");
            Ok(())
        }
        Err(StoreError::AlreadyExists { .. }) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// The region and the zone that an object's labels name; empty when they do not.
pub fn place(metadata: &ObjectMeta) -> (String, String) {
    let label = |key: &str| metadata.labels.as_ref().and_then(|all| all.get(key)).cloned().unwrap_or_default();
    (label("topology.kubernetes.io/region"), label("topology.kubernetes.io/zone"))
}

/// Gives a node that has none its tags and disks; returns the node as it is then.
pub async fn complete_node(config: &Config, mut node: Node) -> Result<(Node, Found), InstanceError> {
    let machine = machine(config).await?;
    let before = node.spec.clone();
    let result = complete(config, &mut node.spec, false, &machine).await?;
    if node.spec != before {
        node = config.store.replace(&node).await?;
        info!(
            node = config.node.as_str(),
            disks = node.spec.disks.len(),
            "disks and tags taken from the node's annotations"
        );
    }
    let condition = match result {
        Ok(()) => Condition::new(DEFAULT_DISKS, ConditionStatus::True, "Complete", ""),
        Err(NoDisk { reason, message, hint }) => {
            Condition::new(DEFAULT_DISKS, ConditionStatus::False, reason, message).with_hint(hint)
        }
    };
    let (region, zone) = place(&machine.metadata);
    Ok((node, Found { region, zone, condition }))
}

async fn machine(config: &Config) -> Result<Machine, InstanceError> {
    let name = config.node.as_str();
    config.store.get::<Machine>(name).await?.ok_or_else(|| InstanceError::NoMachine { node: name.into() })
}

async fn defaults(config: &Config) -> Result<Defaults, InstanceError> {
    let stored: Vec<Setting> = config.store.list(&Selector::default()).await?;
    let text = |name: &str| setting::value(&stored, name);
    Ok(Defaults {
        labeled_only: text(setting::CREATE_DEFAULT_DISK_LABELED_NODES) == "true",
        path: text(setting::DEFAULT_DATA_PATH).to_owned(),
        reserved_percent: text(setting::DEFAULT_DISK_RESERVED).parse().unwrap_or(0),
    })
}

/// Fills in what a node without tags or without disks gets. Settings are read only for one without disks.
async fn complete(
    config: &Config,
    spec: &mut NodeSpec,
    is_new: bool,
    machine: &Machine,
) -> Result<Result<(), NoDisk>, InstanceError> {
    let tags = tags(spec, machine);
    if !spec.disks.is_empty() {
        return Ok(tags);
    }
    Ok(match disks(is_new, machine, &defaults(config).await?) {
        Ok(disks) => {
            spec.disks = disks;
            tags
        }
        // Without disks nothing goes, so that is said first.
        Err(no) => Err(no),
    })
}

fn tags(spec: &mut NodeSpec, machine: &Machine) -> Result<(), NoDisk> {
    if spec.tags.is_empty()
        && let Some(text) = annotation(machine, TAGS_ANNOTATION)
    {
        spec.tags = serde_json::from_str(text).map_err(|error| not_understood(TAGS_ANNOTATION, &error.to_string()))?;
    }
    Ok(())
}

fn annotation<'a>(machine: &'a Machine, key: &str) -> Option<&'a String> {
    machine.metadata.annotations.as_ref()?.get(key)
}

fn disks(is_new: bool, machine: &Machine, defaults: &Defaults) -> Result<BTreeMap<String, DiskSpec>, NoDisk> {
    let no = |reason, message: &str, hint| Err(NoDisk { reason, message: message.into(), hint });
    let label = machine.metadata.labels.as_ref().and_then(|all| all.get(CREATE_LABEL));
    if !defaults.labeled_only {
        if is_new {
            return default_disk(defaults);
        }
        return no("NoDisks", "the node has no disks, and only a new node gets one by itself", "add disks to its spec");
    }
    match label.map(|label| label.to_ascii_lowercase()).as_deref() {
        Some("true") => default_disk(defaults),
        Some("config") => match annotation(machine, DISKS_ANNOTATION) {
            Some(text) => configured(text),
            None => no(
                "NoAnnotation",
                "the node has the label node.longhorn.io/create-default-disk=config and no annotation node.longhorn.io/default-disks-config",
                "annotate the node with its disks, or add them to the spec of this object",
            ),
        },
        _ => no(
            "NotLabeled",
            "the node has no disks: the setting create-default-disk-labeled-nodes waits for the label node.longhorn.io/create-default-disk",
            "label the node with true or config, or add disks to the spec of this object",
        ),
    }
}

/// The directory at `default-data-path`, which is made where that makes it one of the machine.
fn default_disk(defaults: &Defaults) -> Result<BTreeMap<String, DiskSpec>, NoDisk> {
    let path = Path::new(&defaults.path);
    let cannot = |reason, message: String, hint| NoDisk { reason, message, hint };
    if is_of_container(path) {
        let message =
            format!("`{}` is not mounted into this container: what is written there is lost with it", defaults.path);
        return Err(cannot("NotMounted", message, NOT_MOUNTED_HINT));
    }
    files::create_dir_durably(path).map_err(|error| {
        cannot(
            "NoDirectory",
            format!("cannot make `{}`: {error}", defaults.path),
            "correct the setting default-data-path",
        )
    })?;
    let size = rustix::fs::statvfs(path).map(|found| found.f_blocks * found.f_frsize).map_err(|error| {
        cannot("NoStatistics", format!("cannot ask the size of `{}`: {error}", defaults.path), "check the disk")
    })?;
    let disk = DiskSpec {
        path: defaults.path.clone(),
        storage_reserved: size / 100 * defaults.reserved_percent,
        ..DiskSpec::default()
    };
    Ok(BTreeMap::from([(DEFAULT_DISK.to_owned(), disk)]))
}

/// What to do about a directory that a pod does not see.
pub const NOT_MOUNTED_HINT: &str =
    "mount the directory of the machine at the same path into the pod of the instance role";

fn configured(text: &str) -> Result<BTreeMap<String, DiskSpec>, NoDisk> {
    let wrong = |why: &str| not_understood(DISKS_ANNOTATION, why);
    let wanted: Vec<Wanted> = serde_json::from_str(text).map_err(|error| wrong(&error.to_string()))?;
    let mut disks = BTreeMap::new();
    let mut paths = std::collections::BTreeSet::new();
    for disk in wanted {
        let path = disk.path.trim_end_matches('/').to_owned();
        if !path.starts_with('/') {
            return Err(wrong(&format!("`{}` is no absolute path of a directory", disk.path)));
        }
        let name = match disk.name.as_str() {
            "" => format!("disk{}", path.replace(|c: char| !c.is_ascii_alphanumeric(), "-").to_ascii_lowercase()),
            name => name.to_owned(),
        };
        if !paths.insert(path.clone()) {
            return Err(wrong(&format!("`{path}` is there twice")));
        }
        let spec = DiskSpec {
            r#type: disk.r#type,
            path,
            allow_scheduling: disk.allow_scheduling,
            eviction_requested: disk.eviction_requested,
            storage_reserved: disk.storage_reserved,
            tags: disk.tags,
            ..DiskSpec::default()
        };
        if disks.insert(name.clone(), spec).is_some() {
            return Err(wrong(&format!("two disks are called `{name}`")));
        }
    }
    if disks.is_empty() {
        return Err(wrong("the list is empty"));
    }
    Ok(disks)
}

fn not_understood(annotation: &str, why: &str) -> NoDisk {
    NoDisk {
        reason: "BadAnnotation",
        message: format!("the annotation {annotation} of the node is not understood: {why}"),
        hint: "write a JSON list, for example [{\"path\":\"/mnt/disk1\",\"tags\":[\"ssd\"]}] for disks, [\"fast\"] for tags",
    }
}

/// Whether a path, made or not, lies in the layers of a container, which go with it.
pub fn is_of_container(path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    const OVERLAY: u64 = 0x794C_7630;
    let is_container = rustix::fs::statfs("/").is_ok_and(|root| root.f_type as u64 == OVERLAY);
    let existing = path.ancestors().find_map(|path| path.metadata().ok());
    let root = Path::new("/").metadata().map(|root| root.dev());
    is_container && existing.is_some_and(|found| root.is_ok_and(|root| root == found.dev()))
}

#[cfg(test)]
mod tests;

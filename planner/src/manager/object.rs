//! What the agent of a disk is made of: its object and its process.

use std::collections::BTreeMap;

use api::manager::BackingImageManagerSpec;
use api::names::{FINALIZER, MANAGED_BY, MANAGER_PORT, SYNC_PORT, label};
use api::{BackingImageManager, Secrets};

use super::Observed;
use crate::disk::Disk;
use crate::workload::Wish;

/// The object of an agent that is to be.
pub(super) fn object(o: &Observed, disk: &Disk, wanted: BTreeMap<String, String>) -> BackingImageManager {
    let spec = BackingImageManagerSpec {
        node_id: disk.node.clone(),
        disk_uuid: disk.id.clone(),
        disk_path: disk.path.clone(),
        backing_images: wanted,
        ..Default::default()
    };
    let mut manager = BackingImageManager::new(&o.name, spec);
    manager.metadata.finalizers = Some(vec![FINALIZER.into()]);
    let mut labels = labels(disk);
    labels.insert(label::LONGHORN_NODE.into(), disk.node.clone());
    labels.insert(label::LONGHORN_DISK_UUID.into(), disk.id.clone());
    manager.metadata.labels = Some(labels);
    manager
}

fn labels(disk: &Disk) -> BTreeMap<String, String> {
    let labels = [
        (label::COMPONENT, "backing-image-manager"),
        (label::MANAGED_BY, MANAGED_BY),
        (label::DISK_UUID, &disk.id),
        (label::NODE, &disk.node),
    ];
    labels.into_iter().map(|(k, v)| (k.to_owned(), v.to_owned())).collect()
}

/// The process of the agent.
pub(super) fn wish(name: &str, disk: &Disk) -> Wish {
    let args = [
        "backing-image-manager",
        "daemon",
        "--listen",
        &format!("$(POD_IP):{MANAGER_PORT}"),
        "--sync-listen",
        &format!("$(POD_IP):{SYNC_PORT}"),
        "--disk-uuid",
        &disk.id,
        "--disk-path",
        &disk.path,
    ];
    Wish {
        name: name.into(),
        node: disk.node.clone(),
        labels: labels(disk),
        args: args.map(str::to_owned).into(),
        disk_path: disk.path.clone(),
        ready_ports: vec![MANAGER_PORT, SYNC_PORT],
        owner: None,
        secrets: Secrets::default(),
        revision: String::new(),
    }
}

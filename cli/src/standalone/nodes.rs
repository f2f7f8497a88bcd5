//! The simulated nodes as objects: made when absent, kept as the user changed them, never fewer.

use std::collections::BTreeMap;

use anyhow::Context;
use api::node::{DiskSpec, NodeSpec};
use api::{ErrorKind, Node};
use kube::ResourceExt;
use store::{Selector, Store};

use super::Layout;
use crate::failure::failed;

/// Tag of every simulated node, so that a selector can mean all of them.
const EVERY_NODE: &str = "storage";
/// Tag of every simulated disk.
const EVERY_DISK: &str = "ssd";

/// Makes the wanted nodes and disks; returns the names of all nodes, in order.
pub async fn ensure(
    store: &Store,
    layout: &Layout,
    wanted_nodes: Option<u8>,
    wanted_disks: Option<u8>,
) -> anyhow::Result<Vec<String>> {
    let existing: Vec<Node> = store.list(&Selector::default()).await.context("cannot read the nodes")?;
    let existing: BTreeMap<String, Node> = existing.into_iter().map(|n| (n.name_any(), n)).collect();
    let had_nodes = (1..=63).take_while(|n| existing.contains_key(&node_name(*n))).count() as u8;
    let had_disks = existing.values().map(|n| n.spec.disks.len()).max().unwrap_or(0) as u8;
    let count = wanted_nodes.unwrap_or(had_nodes.max(1));
    let disks = wanted_disks.unwrap_or(had_disks.max(1));
    if count < had_nodes {
        let message = format!(
            "this instance has {had_nodes} nodes and would lose the data of {}; give --nodes {had_nodes} or more",
            node_name(had_nodes)
        );
        return failed(ErrorKind::NotReady, message);
    }
    if disks < had_disks {
        let message =
            format!("the nodes of this instance have {had_disks} disks; give --disks-per-node {had_disks} or more");
        return failed(ErrorKind::NotReady, message);
    }
    let mut names = vec![];
    for number in 1..=count {
        let name = node_name(number);
        let mut node = existing.get(&name).cloned().unwrap_or_else(|| {
            let tags = vec![name.clone(), format!("node{number}"), EVERY_NODE.into()];
            Node::new(&name, NodeSpec { name: name.clone(), tags, ..Default::default() })
        });
        let mut changed = node.metadata.uid.is_none();
        for disk in 1..=disks {
            let disk_name = format!("disk-{disk}");
            let path = layout.node(&name).join(&disk_name);
            runtime::files::create_dir_durably(&path).with_context(|| format!("cannot make `{}`", path.display()))?;
            node.spec.disks.entry(disk_name).or_insert_with_key(|disk_name| {
                changed = true;
                let tags = vec![disk_name.clone(), format!("disk{disk}"), EVERY_DISK.into()];
                DiskSpec { path: path.display().to_string(), tags, ..Default::default() }
            });
        }
        if node.metadata.uid.is_none() {
            store.create(&node).await.with_context(|| format!("cannot make node `{name}`"))?;
        } else if changed {
            store.replace(&node).await.with_context(|| format!("cannot add disks to node `{name}`"))?;
        }
        names.push(name);
    }
    Ok(names)
}

fn node_name(number: u8) -> String {
    format!("node-{number}")
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use store::embedded::Embedded;

    use super::*;
    use crate::failure::exit_code;

    #[tokio::test]
    async fn grows_and_never_shrinks() {
        let folder = tempfile::tempdir().unwrap();
        let layout = Layout::new(folder.path()).unwrap();
        let store = Store::new(Arc::new(Embedded::in_memory()), "longhorn-system");
        assert_eq!(ensure(&store, &layout, None, None).await.unwrap(), ["node-1"]);
        assert_eq!(ensure(&store, &layout, Some(3), Some(2)).await.unwrap().len(), 3);
        assert_eq!(ensure(&store, &layout, None, None).await.unwrap().len(), 3);
        let node: Node = store.get("node-1").await.unwrap().unwrap();
        assert_eq!(node.spec.tags, ["node-1", "node1", "storage"]);
        assert_eq!(node.spec.disks["disk-2"].tags, ["disk-2", "disk2", "ssd"]);
        assert!(layout.node("node-3").join("disk-2").is_dir());
        for (nodes, disks) in [(Some(2), None), (None, Some(1))] {
            assert_eq!(exit_code(&ensure(&store, &layout, nodes, disks).await.unwrap_err()), 5);
        }
    }
}

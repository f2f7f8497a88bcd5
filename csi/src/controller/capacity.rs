//! GetCapacity: how much more can be promised, by the same sums as Longhorn (LF 2.6).

use std::collections::{BTreeMap, BTreeSet};

use api::condition::{self, ConditionStatus};
use api::names::condition::{READY, SCHEDULABLE};
use api::{BackingImage, Condition, Node, Replica, setting};
use kube::ResourceExt;
use proto::csi;
use store::Selector;

use super::{Context, settings};
use crate::CsiError;
use crate::capability::Usage;
use crate::deadline::Deadline;
use crate::limits::{MAX_VOLUME_BYTES, MIN_VOLUME_BYTES};
use crate::parameters::Parameters;

/// The segment that names a node.
pub const TOPOLOGY_KEY: &str = "kubernetes.io/hostname";

/// What the sums are made of: one reading of the world.
#[derive(Debug, Default)]
struct World {
    nodes: Vec<Node>,
    replicas: Vec<Replica>,
    images: Vec<BackingImage>,
    over_provisioning_percent: u32,
    allow_untagged_nodes: bool,
    allow_untagged_disks: bool,
}

/// Where a volume may be placed.
#[derive(Debug, Default)]
struct Demand {
    node: Option<String>,
    replicas: usize,
    /// Each of these must be met: the volume's, the image's.
    node_selectors: Vec<Vec<String>>,
    disk_selectors: Vec<Vec<String>>,
}

/// Room on the disks that a volume with these parameters may use.
pub async fn get_capacity(
    context: &Context,
    request: csi::GetCapacityRequest,
    _: &Deadline,
) -> Result<csi::GetCapacityResponse, CsiError> {
    let given: BTreeMap<String, String> = request.parameters.into_iter().collect();
    let parameters = Parameters::parse(&given)?;
    let nothing =
        csi::GetCapacityResponse { available_capacity: 0, maximum_volume_size: Some(0), minimum_volume_size: None };
    if request.volume_capabilities.iter().any(|c| Usage::of(c).is_err()) {
        return Ok(nothing);
    }
    let node = match request.accessible_topology.map(|t| t.segments) {
        Some(segments) if !segments.is_empty() => match segments.get(TOPOLOGY_KEY) {
            Some(node) => Some(node.clone()),
            // A place by another key is one that none of our nodes is in.
            None => return Ok(nothing),
        },
        _ => None,
    };
    let store = &context.store;
    let replicas = match parameters.number_of_replicas {
        Some(count) => count,
        None => settings::number(store, setting::DEFAULT_REPLICA_COUNT).await?,
    };
    let mut demand = Demand {
        node,
        replicas: replicas as usize,
        node_selectors: vec![parameters.node_selector],
        disk_selectors: vec![parameters.disk_selector],
    };
    if let Some(wish) = parameters.image {
        let existing = store.get::<BackingImage>(wish.name.as_str()).await?.map(|i| i.spec);
        let (nodes, disks) = match existing {
            Some(spec) => (spec.node_selector, spec.disk_selector),
            None => (wish.node_selector.unwrap_or_default(), wish.disk_selector.unwrap_or_default()),
        };
        demand.node_selectors.push(nodes);
        demand.disk_selectors.push(disks);
    }
    let world = World {
        nodes: store.list(&Selector::default()).await?,
        replicas: store.list(&Selector::default()).await?,
        images: store.list(&Selector::default()).await?,
        over_provisioning_percent: settings::number(store, setting::OVER_PROVISIONING).await?,
        allow_untagged_nodes: settings::switch(store, setting::ALLOW_EMPTY_NODE_SELECTOR).await?,
        allow_untagged_disks: settings::switch(store, setting::ALLOW_EMPTY_DISK_SELECTOR).await?,
    };
    let (available, largest) = room(&world, &demand);
    let bytes = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    Ok(csi::GetCapacityResponse {
        available_capacity: bytes(available),
        maximum_volume_size: Some(bytes(largest.min(MAX_VOLUME_BYTES))),
        minimum_volume_size: Some(bytes(MIN_VOLUME_BYTES)),
    })
}

/// Bytes that can be promised in all, and for one volume. Of one node: its disks' room. Of all: room for volumes with all their replicas.
fn room(world: &World, demand: &Demand) -> (u64, u64) {
    let nodes = world.nodes.iter().filter(|node| demand.node.as_ref().is_none_or(|wanted| *wanted == node.name_any()));
    let mut rooms: Vec<u64> = nodes.flat_map(|node| disk_rooms(world, demand, node)).filter(|room| *room > 0).collect();
    rooms.sort_unstable_by(|a, b| b.cmp(a));
    let replicas = if demand.node.is_some() { 1 } else { demand.replicas.max(1) };
    let available = rooms.iter().copied().fold(0, u64::saturating_add) / replicas as u64;
    // Replicas go to distinct disks, so the one with the least room of the best ones decides.
    (available, rooms.get(replicas - 1).copied().unwrap_or(0))
}

fn disk_rooms(world: &World, demand: &Demand, node: &Node) -> Vec<u64> {
    let Some(status) = &node.status else { return vec![] };
    let usable = node.spec.allow_scheduling
        && !node.spec.eviction_requested
        && holds(&status.conditions)
        && fits(&node.spec.tags, &demand.node_selectors, world.allow_untagged_nodes);
    if !usable {
        return vec![];
    }
    let disks = node.spec.disks.iter().filter_map(|(name, spec)| Some((spec, status.disk_status.get(name)?)));
    disks
        .filter(|(spec, status)| {
            spec.allow_scheduling
                && !spec.eviction_requested
                && !status.disk_uuid.is_empty()
                && holds(&status.conditions)
                && fits(&spec.tags, &demand.disk_selectors, world.allow_untagged_disks)
        })
        .map(|(spec, status)| {
            let promised = status.storage_maximum.saturating_sub(spec.storage_reserved) as u128
                * u128::from(world.over_provisioning_percent)
                / 100;
            u64::try_from(promised).unwrap_or(u64::MAX).saturating_sub(scheduled(world, &status.disk_uuid))
        })
        .collect()
}

/// Bytes of a disk that are promised already.
fn scheduled(world: &World, disk: &str) -> u64 {
    let replicas = world.replicas.iter().filter(|r| r.spec.disk_id == disk).map(|r| r.spec.volume_size.0);
    let images = world.images.iter().filter(|i| i.spec.disk_file_spec_map.contains_key(disk));
    let images = images.map(|i| i.status.as_ref().map_or(0, |s| s.real_size));
    replicas.chain(images).fold(0, u64::saturating_add)
}

/// Not known to be unfit: `Ready` and `Schedulable` are not false.
fn holds(conditions: &[Condition]) -> bool {
    [READY, SCHEDULABLE]
        .into_iter()
        .all(|r#type| condition::find(conditions, r#type).is_none_or(|c| c.status != ConditionStatus::False))
}

fn fits(tags: &[String], selectors: &[Vec<String>], allow_untagged: bool) -> bool {
    let tags: BTreeSet<&String> = tags.iter().collect();
    selectors.iter().all(|selector| {
        if selector.is_empty() {
            allow_untagged || tags.is_empty()
        } else {
            selector.iter().all(|tag| tags.contains(tag))
        }
    })
}

#[cfg(test)]
mod tests {
    use api::node::{DiskSpec, DiskStatus, NodeStatus};

    use super::*;

    fn node(name: &str, gib: u64, tags: &[&str]) -> Node {
        let mut node = Node::new(name, Default::default());
        let disk = DiskSpec {
            storage_reserved: 1 << 30,
            tags: tags.iter().map(|t| t.to_string()).collect(),
            ..Default::default()
        };
        node.spec.disks.insert("disk-1".into(), disk);
        let disk = DiskStatus { disk_uuid: format!("uuid-{name}"), storage_maximum: gib << 30, ..Default::default() };
        node.status = Some(NodeStatus { disk_status: [("disk-1".to_owned(), disk)].into(), ..Default::default() });
        node
    }

    fn world() -> World {
        World {
            nodes: vec![node("n1", 11, &["ssd"]), node("n2", 6, &[]), node("n3", 3, &["ssd"])],
            over_provisioning_percent: 100,
            allow_untagged_nodes: true,
            allow_untagged_disks: true,
            ..Default::default()
        }
    }

    fn check(world: &World, node: Option<&str>, replicas: usize, disks: &[&str]) -> (u64, u64) {
        let disk_selectors = vec![disks.iter().map(|t| t.to_string()).collect()];
        let demand = Demand { node: node.map(str::to_owned), replicas, disk_selectors, ..Default::default() };
        let (available, largest) = room(world, &demand);
        (available >> 30, largest >> 30)
    }

    #[test]
    fn counts_room_for_every_replica() {
        let world = world();
        assert_eq!(check(&world, Some("n1"), 3, &[]), (10, 10));
        assert_eq!(check(&world, Some("unknown"), 1, &[]), (0, 0));
        assert_eq!(check(&world, None, 1, &[]), (17, 10));
        assert_eq!(check(&world, None, 2, &[]), (8, 5));
        assert_eq!(check(&world, None, 3, &[]), (5, 2));
        assert_eq!(check(&world, None, 4, &[]), (4, 0));
        assert_eq!(check(&world, None, 2, &["ssd"]), (6, 2));
        assert_eq!(check(&world, None, 1, &["nvme"]), (0, 0));
    }

    #[test]
    fn subtracts_what_is_promised_and_leaves_out_what_is_closed() {
        let mut world = world();
        let mut replica = Replica::new("r", Default::default());
        replica.spec.disk_id = "uuid-n1".into();
        replica.spec.volume_size.0 = 4 << 30;
        world.replicas.push(replica);
        world.nodes[1].spec.allow_scheduling = false;
        let down = Condition::new(SCHEDULABLE, ConditionStatus::False, "Full", "full");
        world.nodes[2].status.as_mut().unwrap().disk_status.get_mut("disk-1").unwrap().conditions.push(down);
        assert_eq!(check(&world, None, 1, &[]), (6, 6));
        world.over_provisioning_percent = 200;
        assert_eq!(check(&world, None, 1, &[]), (16, 16));
        world.allow_untagged_disks = false;
        assert_eq!(check(&world, None, 1, &[]), (0, 0));
    }
}

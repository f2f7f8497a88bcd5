//! GetCapacity: how much more can be promised, on the disks among which places are chosen and by the same sums (LF 2.6).

use std::collections::{BTreeMap, BTreeSet};

use api::image::BackingImageStatus;
use api::{BackingImage, Node, Replica, Setting};
use planner::disk::{Disks, Load, loads};
use planner::image::copies_held;
use planner::placement::{Base, Request, Selectors, room_for_replicas};
use planner::setting::Settings;
use proto::csi;
use store::Selector;

use super::Context;
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
    disks: Disks,
    loads: BTreeMap<String, Load>,
    settings: Settings,
}

/// Where a volume may be placed.
#[derive(Debug, Default)]
struct Demand {
    node: Option<String>,
    replicas: usize,
    /// Tags of nodes and of disks that the volume asks for.
    volume: (Vec<String>, Vec<String>),
    /// The same of its image, if it has one.
    image: Option<(Vec<String>, Vec<String>)>,
    /// Bytes of a copy of the image, and the disks that have one.
    copy_bytes: u64,
    held: BTreeSet<String>,
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
    let nodes: Vec<Node> = store.list(&Selector::default()).await?;
    let replicas: Vec<Replica> = store.list(&Selector::default()).await?;
    let images: Vec<BackingImage> = store.list(&Selector::default()).await?;
    let settings: Vec<Setting> = store.list(&Selector::default()).await?;
    let settings = Settings::of(&settings);
    let mut demand = Demand {
        node,
        replicas: parameters.number_of_replicas.unwrap_or(settings.replica_count) as usize,
        volume: (parameters.node_selector, parameters.disk_selector),
        ..Default::default()
    };
    if let Some(wish) = parameters.image {
        let existing = images.iter().find(|i| i.metadata.name.as_deref() == Some(wish.name.as_str()));
        demand.image = Some(match existing {
            Some(image) => (image.spec.node_selector.clone(), image.spec.disk_selector.clone()),
            None => (wish.node_selector.unwrap_or_default(), wish.disk_selector.unwrap_or_default()),
        });
        demand.copy_bytes = existing.and_then(|i| i.status.as_ref()).map_or(0, BackingImageStatus::copy_bytes);
        demand.held = existing.map(copies_held).unwrap_or_default();
    }
    let world = World { disks: Disks::of(&nodes), loads: loads(&replicas, &images), settings };
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
    let asked = [("the volume", Some(&demand.volume)), ("the image", demand.image.as_ref())];
    let selectors = asked.into_iter().filter_map(|(who, tags)| tags.map(|(node, disk)| Selectors { who, node, disk }));
    let selectors: Vec<Selectors<'_>> = selectors.collect();
    let none = BTreeSet::new();
    let request = Request {
        disks: &world.disks,
        loads: &world.loads,
        settings: &world.settings,
        selectors: &selectors,
        taken: &none,
        beside: &none,
        bytes: 0,
        random: 0,
    };
    let base = Base { bytes: demand.copy_bytes, held: &demand.held, preferred: &none };
    let is_wanted = |node: &str| demand.node.as_ref().is_none_or(|wanted| wanted == node);
    let rooms = room_for_replicas(&request, base).into_iter().filter(|(disk, _)| is_wanted(&disk.node));
    let mut rooms: Vec<u64> = rooms.map(|(_, room)| room).collect();
    rooms.sort_unstable_by(|a, b| b.cmp(a));
    let replicas = if demand.node.is_some() { 1 } else { demand.replicas.max(1) };
    let available = rooms.iter().copied().fold(0, u64::saturating_add) / replicas as u64;
    // Replicas go to distinct disks, so the one with the least room of the best ones decides.
    (available, rooms.get(replicas - 1).copied().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use api::Condition;
    use api::condition::{self, ConditionStatus};
    use api::names::condition::{CORDONED, READY, SCHEDULABLE};
    use api::node::{DiskSpec, DiskStatus, NodeStatus};

    use super::*;
    use crate::controller::tests::{context, soon};

    fn node(name: &str, gib: u64, tags: &[&str]) -> Node {
        let mut node = Node::new(name, Default::default());
        let disk = DiskSpec {
            storage_reserved: 1 << 30,
            tags: tags.iter().map(|t| t.to_string()).collect(),
            ..Default::default()
        };
        node.spec.disks.insert("disk-1".into(), disk);
        let size = gib << 30;
        let disk = DiskStatus {
            disk_uuid: format!("uuid-{name}"),
            storage_maximum: size,
            storage_available: size,
            ..Default::default()
        };
        node.status = Some(NodeStatus {
            disk_status: [("disk-1".to_owned(), disk)].into(),
            conditions: vec![Condition::new(READY, ConditionStatus::True, "", "")],
            ..Default::default()
        });
        node
    }

    fn world() -> World {
        let nodes = [node("n1", 11, &["ssd"]), node("n2", 6, &[]), node("n3", 3, &["ssd"])];
        World { disks: Disks::of(&nodes), ..Default::default() }
    }

    fn check(world: &World, node: Option<&str>, replicas: usize, disks: &[&str]) -> (u64, u64) {
        let volume = (vec![], disks.iter().map(|t| t.to_string()).collect());
        let demand = Demand { node: node.map(str::to_owned), replicas, volume, ..Default::default() };
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
        world.loads = loads(&[replica], &[]);
        for closed in [1, 2] {
            world.disks.list[closed].unschedulable = Some("full".into());
        }
        assert_eq!(check(&world, None, 1, &[]), (6, 6));
        world.settings.over_provisioning_percent = 200;
        assert_eq!(check(&world, None, 1, &[]), (16, 16));
        world.settings.allow_empty_disk_selector = false;
        assert_eq!(check(&world, None, 1, &[]), (0, 0));
    }

    /// What is told of the room of a node with these changes, with these settings, for an image of so many bytes.
    async fn told(change: fn(&mut Node), settings: &[(&str, &str)], image_bytes: u64, held: bool) -> i64 {
        let (context, mut wanted) = (context(), node("n1", 11, &[]));
        change(&mut wanted);
        let status = wanted.status.take();
        let mut node = context.store.create(&wanted).await.unwrap();
        node.status = status;
        context.store.replace_status(&node).await.unwrap();
        for (name, value) in settings {
            let mut setting = Setting { value: (*value).into(), ..Default::default() };
            setting.metadata.name = Some((*name).into());
            context.store.create(&setting).await.unwrap();
        }
        let mut image = BackingImage::new("ubuntu", Default::default());
        if held {
            image.spec.disk_file_spec_map.insert("uuid-n1".into(), Default::default());
        }
        let mut image = context.store.create(&image).await.unwrap();
        image.status = Some(BackingImageStatus { size: image_bytes, ..Default::default() });
        context.store.replace_status(&image).await.unwrap();
        let parameters = [("backingImage", "ubuntu"), ("numberOfReplicas", "1")];
        let parameters = parameters.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
        let request = csi::GetCapacityRequest { parameters, ..Default::default() };
        get_capacity(&context, request, &soon(20)).await.unwrap().available_capacity >> 30
    }

    #[tokio::test]
    async fn capacity_counts_only_where_a_volume_could_be_placed() {
        fn of_node(node: &mut Node, r#type: &str, status: ConditionStatus) {
            condition::set(
                &mut node.status.as_mut().unwrap().conditions,
                Condition::new(r#type, status, "", ""),
                Default::default(),
            );
        }
        fn disk(node: &mut Node) -> &mut DiskStatus {
            node.status.as_mut().unwrap().disk_status.get_mut("disk-1").unwrap()
        }
        fn of_disk(node: &mut Node, r#type: &str, status: ConditionStatus) {
            disk(node).conditions.push(Condition::new(r#type, status, "", ""));
        }
        let cordoned: fn(&mut Node) = |n| of_node(n, CORDONED, ConditionStatus::True);
        let open = ("disable-scheduling-on-cordoned-node", "false");
        let emptied = ("backing-image-cordoned-node-policy", "evict");
        assert_eq!(told(|_| (), &[], 0, false).await, 10);
        assert_eq!(told(cordoned, &[], 0, false).await, 0);
        assert_eq!(told(cordoned, &[open], 0, false).await, 10);
        assert_eq!(told(cordoned, &[open, emptied], 0, false).await, 0);
        let closed: [fn(&mut Node); 8] = [
            |n| of_disk(n, SCHEDULABLE, ConditionStatus::False),
            |n| of_disk(n, READY, ConditionStatus::False),
            |n| of_disk(n, READY, ConditionStatus::Unknown),
            |n| of_node(n, READY, ConditionStatus::False),
            |n| of_node(n, READY, ConditionStatus::Unknown),
            |n| n.spec.allow_scheduling = false,
            |n| n.spec.eviction_requested = true,
            |n| n.spec.disks.get_mut("disk-1").unwrap().eviction_requested = true,
        ];
        for (n, change) in closed.into_iter().enumerate() {
            assert_eq!(told(change, &[], 0, false).await, 0, "{n}");
        }
        // Where the image can be, or is already.
        let full: fn(&mut Node) = |n| disk(n).storage_available = 3 << 30;
        assert_eq!(told(full, &[], 4 << 30, false).await, 0);
        assert_eq!(told(full, &[], 3 << 30, false).await, 10);
        assert_eq!(told(full, &[], 4 << 30, true).await, 6);
    }
}

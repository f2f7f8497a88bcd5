//! Whether a volume can grow where its replicas are: by room, by the rule that gave them their places, and by who serves them.

use std::collections::BTreeMap;
use std::fmt;

use api::quantity::SizeBytes;
use api::{BackingImage, ErrorKind, Node, Replica, Setting};

use crate::disk::{self, Disks, Load};
use crate::placement;
use crate::setting::Settings;

/// What the answer depends on: one reading of all objects of these kinds.
#[derive(Clone, Debug, Default)]
pub struct World {
    pub nodes: Vec<Node>,
    pub replicas: Vec<Replica>,
    pub images: Vec<BackingImage>,
    pub settings: Vec<Setting>,
}

/// Why a volume does not grow, a sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Disk by disk.
    NoRoom(String),
    /// A replica that would be lost by it.
    Older(String),
}

impl Refusal {
    /// What kind of failure this is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Refusal::NoRoom(_) => ErrorKind::Exhausted,
            Refusal::Older(_) => ErrorKind::NotReady,
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refusal::NoRoom(why) | Refusal::Older(why) => f.write_str(why),
        }
    }
}

/// Why a volume cannot have that many bytes. A replica that failed needs no room, and a disk that nobody reports is not known to
/// lack it.
pub fn refusal(world: &World, volume: &str, bytes: u64) -> Option<Refusal> {
    let own = world.replicas.iter().filter(|r| r.spec.volume_name == volume && r.spec.failed_at.is_empty());
    older(own.clone()).map(Refusal::Older).or_else(|| no_room(world, own, bytes).map(Refusal::NoRoom))
}

/// An instance role that does not tell the size of what its replica holds starts processes that refuse to grow: after the growth
/// that replica would be left out of the volume.
fn older<'a>(own: impl Iterator<Item = &'a Replica>) -> Option<String> {
    let is_older = |replica: &&Replica| {
        let status = replica.status.as_ref();
        status.is_some_and(|status| status.generation > 0 && status.current_size == SizeBytes(0))
    };
    let nodes: Vec<&str> = own.filter(is_older).map(|replica| replica.spec.node_id.as_str()).collect();
    (!nodes.is_empty()).then(|| {
        let names = nodes.join(", ");
        format!(
            "replicas on {names} are served by an older program that cannot grow them; upgrade the instance there first"
        )
    })
}

fn no_room<'a>(world: &World, own: impl Iterator<Item = &'a Replica>, bytes: u64) -> Option<String> {
    let disks = Disks::of(&world.nodes);
    let loads: BTreeMap<String, Load> = disk::loads(&world.replicas, &world.images);
    let settings = Settings::of(&world.settings);
    let full = own.filter_map(|replica| {
        let disk = disks.get(&replica.spec.disk_id)?;
        let needed = bytes.saturating_sub(replica.spec.volume_size.0);
        let free = placement::replica_room(disk, loads.get(&disk.id).copied().unwrap_or_default(), &settings);
        (free < needed).then(|| format!("{}: {needed} bytes are needed, {free} can still be promised", disk.label()))
    });
    let full: Vec<String> = full.collect();
    (!full.is_empty()).then(|| format!("there is no room for replicas of {bytes} bytes on {}", full.join("; ")))
}

#[cfg(test)]
mod tests {
    use api::node::{DiskSpec, DiskStatus, NodeStatus};
    use api::replica::ReplicaStatus;
    use api::setting;
    use expect_test::{Expect, expect};

    use super::*;

    /// Two nodes with a disk of 1000 bytes, 100 of them reserved; volume `v` has 300 on each, `other` 200 on the first.
    fn world() -> World {
        let mut world = World::default();
        for n in ["n1", "n2"] {
            let mut node = Node::new(n, Default::default());
            node.spec.disks.insert("disk".into(), DiskSpec { storage_reserved: 100, ..Default::default() });
            let disk = DiskStatus { disk_uuid: n.into(), storage_maximum: 1000, ..Default::default() };
            node.status = Some(NodeStatus { disk_status: [("disk".to_owned(), disk)].into(), ..Default::default() });
            world.nodes.push(node);
        }
        for (volume, disk, bytes) in [("v", "n1", 300), ("v", "n2", 300), ("other", "n1", 200)] {
            let mut replica = Replica::new(&format!("{volume}-{disk}"), Default::default());
            replica.spec.volume_name = volume.into();
            replica.spec.disk_id = disk.into();
            replica.spec.volume_size = SizeBytes(bytes);
            world.replicas.push(replica);
        }
        world.settings.push(Setting { value: "100".into(), ..Default::default() });
        world.settings[0].metadata.name = Some(setting::OVER_PROVISIONING.into());
        world
    }

    fn check(bytes: u64, change: impl FnOnce(&mut World), expected: Expect) {
        let mut world = world();
        change(&mut world);
        let said = refusal(&world, "v", bytes).map(|refusal| refusal.to_string());
        expected.assert_eq(&said.unwrap_or_else(|| "fine".into()));
    }

    #[test]
    fn every_disk_without_room_for_the_growth_is_named() {
        // 900 of each may be promised: 400 are left on the first, 600 on the second.
        check(700, |_| (), expect!["fine"]);
        check(
            701,
            |_| (),
            expect![
                "there is no room for replicas of 701 bytes on disk of n1: 401 bytes are needed, 400 can still be promised"
            ],
        );
        check(
            1000,
            |_| (),
            expect![
                "there is no room for replicas of 1000 bytes on disk of n1: 700 bytes are needed, 400 can still be promised; disk of n2: 700 bytes are needed, 600 can still be promised"
            ],
        );
    }

    #[test]
    fn the_over_provisioning_of_places_counts_here_too() {
        check(1000, |w| w.settings[0].value = "200".into(), expect!["fine"]);
    }

    #[test]
    fn what_failed_needs_no_room_and_what_nobody_reports_is_not_known_to_lack_it() {
        check(701, |w| w.replicas[0].spec.failed_at = "2026-01-01T00:00:00Z".into(), expect!["fine"]);
        check(701, |w| drop(w.nodes.remove(0)), expect!["fine"]);
    }

    /// An instance from before volumes could grow would lose its replica; one that never held anything is made anew.
    #[test]
    fn a_volume_does_not_grow_before_all_of_its_instances_can_grow_it() {
        let tells = |w: &mut World, generation, size| {
            let current_size = SizeBytes(size);
            w.replicas[1].spec.node_id = "n2".into();
            w.replicas[1].status = Some(ReplicaStatus { generation, current_size, ..Default::default() });
        };
        let older =
            "replicas on n2 are served by an older program that cannot grow them; upgrade the instance there first";
        let mut world = world();
        tells(&mut world, 7, 0);
        // Also where there is no room.
        for bytes in [301, 1000] {
            let said = refusal(&world, "v", bytes).unwrap();
            assert_eq!((said.kind(), said.to_string()), (ErrorKind::NotReady, older.to_owned()));
        }
        world.replicas[1].spec.failed_at = "2026-01-01T00:00:00Z".into();
        assert_eq!(refusal(&world, "v", 301), None, "it is lost already");
        check(301, |w| tells(w, 7, 300), expect!["fine"]);
        check(301, |w| tells(w, 0, 0), expect!["fine"]);
    }
}

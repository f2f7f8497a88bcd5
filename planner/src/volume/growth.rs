//! Room for a volume to grow where its replicas are: by the rule that gave them their places.

use std::collections::BTreeMap;

use api::{BackingImage, Node, Replica, Setting};

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

/// Why a volume cannot have that many bytes, disk by disk. A replica that failed needs no room, and a disk that nobody reports
/// is not known to lack it.
pub fn refusal(world: &World, volume: &str, bytes: u64) -> Option<String> {
    let disks = Disks::of(&world.nodes);
    let loads: BTreeMap<String, Load> = disk::loads(&world.replicas, &world.images);
    let settings = Settings::of(&world.settings);
    let own = world.replicas.iter().filter(|r| r.spec.volume_name == volume && r.spec.failed_at.is_empty());
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
    use api::quantity::SizeBytes;
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
        expected.assert_eq(&refusal(&world, "v", bytes).unwrap_or_else(|| "fine".into()));
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
}

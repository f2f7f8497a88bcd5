//! What must hold of where further copies come: never too many at a time on a node, and as far apart as can be.

use api::BackingImage;
use api::image::{CopyState, DiskFileStatus};
use planner::disk::{Disk, Health};
use planner::image::{Decision, Observed};
use planner::retry::since;

use crate::invariants::{Copies, ineligible, is_evicting};
use crate::world::{GIB, World};

fn is_being_made(copy: Option<&DiskFileStatus>) -> bool {
    !matches!(
        copy.map(|c| c.state).unwrap_or_default(),
        CopyState::Ready | CopyState::Failed | CopyState::FailedAndCleanup | CopyState::Unknown
    )
}

impl World {
    pub fn remember_silence(&mut self, name: &str, d: &Decision) {
        let known = &d.status.disk_file_status_map;
        let is_unknown = |disk: &str| known.get(disk).is_some_and(|f| f.state == CopyState::Unknown);
        self.unknown_since.retain(|(disk, image), _| image != name || is_unknown(disk));
        for disk in known.keys().filter(|disk| is_unknown(disk)) {
            self.unknown_since.entry((disk.clone(), name.to_owned())).or_insert(self.now);
        }
    }

    /// What the image says of gone disks from now on.
    pub fn remember_gone(&mut self, name: &str, o: &Observed) {
        self.gone_since.retain(|(disk, image), _| image != name || o.disks.is_gone(disk));
        for disk in o.image.spec.disk_file_spec_map.keys().filter(|disk| o.disks.is_gone(disk)) {
            self.gone_since.entry((disk.clone(), name.to_owned())).or_insert(o.now);
        }
    }

    /// That its disk was silent before it was gone makes nothing go sooner.
    pub fn judge_gone(&self, name: &str, o: &Observed, disk: &str) {
        let gone = self.gone_since.get(&(disk.to_owned(), name.to_owned())).copied().unwrap_or(o.now);
        assert!(
            !o.disks.is_gone(disk) || since(o.now, gone) >= o.settings.recovery_wait,
            "the entry of {name} on {disk} goes, which is gone only since {gone}"
        );
    }

    /// With the copy on `added`, no more are made on its node than may be.
    pub fn judge_limit(&self, name: &str, o: &Observed, d: &Decision, after: &Copies, added: &str) {
        let Some(node) = o.disks.get(added).map(|disk| disk.node.clone()) else { return };
        let counts = |image: &str, disk: &String, copy: Option<&DiskFileStatus>| {
            let is_here = o.disks.get(disk).is_some_and(|d| d.node == node && d.health == Health::Ready);
            let is_first =
                self.sources.get(image).is_some_and(|s| !s.spec.file_transferred && s.spec.disk_uuid == *disk);
            let serves = self.replicas.values().any(|r| r.spec.disk_id == *disk && r.spec.backing_image == image);
            is_here && !is_first && !serves && is_being_made(copy)
        };
        let of = |(other, image): (&String, &BackingImage)| {
            let known = image.status.clone().unwrap_or_default().disk_file_status_map;
            let wanted = image.spec.disk_file_spec_map.keys();
            wanted.filter(|disk| counts(other, disk, known.get(*disk))).count()
        };
        let others: usize = self.images.iter().filter(|(other, _)| *other != name).map(of).sum();
        let own = after.keys().filter(|disk| counts(name, disk, d.status.disk_file_status_map.get(*disk))).count();
        let limit = o.settings.replenish_limit as usize;
        assert!(others + own <= limit, "{others} and {own} copies are made on {node} with that of {name} on {added}");
    }

    /// No other disk lies further away from the copies that stay. Judged where it is beyond doubt which these are.
    pub fn judge_spread(&self, name: &str, o: &Observed, d: &Decision, added: &str) {
        let state = |disk: &str| d.status.disk_file_status_map.get(disk).map(|f| f.state).unwrap_or_default();
        let before = &o.image.spec.disk_file_spec_map;
        if before.keys().any(|disk| state(disk) != CopyState::Ready)
            || o.replicas.iter().any(|r| !before.contains_key(&r.spec.disk_id))
        {
            return;
        }
        let staying: Vec<_> =
            before.keys().filter(|disk| !is_evicting(o, disk)).filter_map(|disk| o.disks.get(disk)).collect();
        let near = |disk: &Disk| {
            let zone = staying.iter().filter(|other| other.zone == disk.zone).count();
            (zone, staying.iter().filter(|other| other.node == disk.node).count())
        };
        let has_room = |disk: &Disk| {
            let load = o.loads.get(&disk.id).copied().unwrap_or_default();
            disk.available_bytes.saturating_sub(load.incoming_bytes) >= GIB
                && disk.maximum_bytes.saturating_sub(load.copy_bytes) >= GIB
        };
        let chosen = o.disks.get(added).expect("it was judged before");
        let better = o.disks.list.iter().find(|disk| {
            // Another one comes there once its node has a turn for it.
            let is_awaited = d.replenish.waits_for.contains(&disk.node);
            let is_free = !before.contains_key(&disk.id) && has_room(disk) && !is_awaited;
            is_free && ineligible(disk, &o.image.spec, &o.settings).is_none() && near(disk) < near(chosen)
        });
        assert!(
            better.is_none(),
            "a copy of {name} is added on {}, although {} lies further away from the others",
            chosen.label(),
            better.map(|d| d.label()).unwrap_or_default()
        );
    }
}

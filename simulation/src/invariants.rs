//! What must hold at every step: what may be removed, when, and that everything says why.

use std::collections::{BTreeMap, BTreeSet};

use api::data_source::BackingImageDataSourceSpec;
use api::image::{BackingImageSpec, CopyState, DiskFileSpec};
use api::names::condition as types;
use api::{Condition, ConditionStatus};
use planner::disk::{Disk, Health};
use planner::image::{Action, Decision, Observed};
use planner::manager::orphans::{Owner, Place, Remains, owner};
use planner::retry::since;
use planner::setting::Settings;

use crate::files::{File, Key};
use crate::world::World;

pub type Copies = BTreeMap<String, DiskFileSpec>;

/// Whether this is the user's own deletion, which nobody's use stops any more.
fn is_deletion(o: &Observed) -> bool {
    o.image.metadata.deletion_timestamp.is_some() && o.volumes.is_empty() && o.replicas.is_empty()
}

fn planned_copies(o: &Observed, d: &Decision) -> Copies {
    let set = d.actions.iter().rev().find_map(|a| match a {
        Action::SetCopies(map) => Some(map.clone()),
        _ => None,
    });
    set.unwrap_or_else(|| o.image.spec.disk_file_spec_map.clone())
}

pub fn needed(o: &Observed) -> usize {
    let asked = o.image.spec.min_number_of_copies;
    (if asked == 0 { o.settings.min_copies } else { asked }).max(1) as usize
}

/// Whether the agent of a disk says that a whole copy of the image lies there.
fn found_on(o: &Observed, disk: &str) -> bool {
    let (name, uuid) = (o.image.metadata.name.as_deref(), o.image.status.as_ref().map(|s| s.uuid.as_str()));
    let manager = o.managers.iter().find(|m| m.spec.disk_uuid == disk).and_then(|m| m.status.as_ref());
    let file = manager.and_then(|s| s.backing_image_file_map.get(name?));
    file.is_some_and(|f| f.state == CopyState::Ready && Some(f.uuid.as_str()) == uuid)
}

pub fn is_evicting(o: &Observed, disk: &str) -> bool {
    let entry = o.image.spec.disk_file_spec_map.get(disk);
    let is_leaving = |disk: &Disk| disk.evicting || disk.cordoned && o.settings.evict_cordoned;
    entry.is_some_and(|e| e.eviction_requested) || o.disks.get(disk).is_some_and(is_leaving)
}

/// Why nothing of an image may be placed on a disk by itself; judged without the planner's own rules.
pub fn ineligible(disk: &Disk, spec: &BackingImageSpec, settings: &Settings) -> Option<&'static str> {
    let lacks = |wanted: &[String], tags: &[String], allow_empty: bool| {
        wanted.iter().any(|tag| !tags.contains(tag)) || wanted.is_empty() && !tags.is_empty() && !allow_empty
    };
    match disk {
        _ if disk.health != Health::Ready => Some("it is not ready"),
        _ if disk.unschedulable.is_some() => Some("nothing may be placed there"),
        _ if disk.evicting || disk.cordoned && settings.evict_cordoned => Some("it shall be emptied"),
        _ if disk.cordoned && settings.close_cordoned => Some("its node is cordoned"),
        _ if lacks(&spec.node_selector, &disk.node_tags, settings.allow_empty_node_selector) => Some("its node's tags"),
        _ if lacks(&spec.disk_selector, &disk.tags, settings.allow_empty_disk_selector) => Some("its tags"),
        _ => None,
    }
}

impl World {
    /// None may stay without a reason.
    pub fn judge_conditions(&self, kind: &str, name: &str, conditions: &[Condition]) {
        for condition in conditions {
            let bad = match condition.r#type.as_str() {
                types::WAIT_FOR_BACKING_IMAGE | types::BACKING_IMAGE_INCOMPATIBLE => ConditionStatus::True,
                _ => ConditionStatus::False,
            };
            let is_bad = condition.status == bad || condition.status == ConditionStatus::Unknown;
            let is_told =
                !condition.reason.is_empty() && (!condition.message.is_empty() || condition.r#type == types::DETACHED);
            assert!(!is_bad || is_told, "{kind} {name} does not say why: {condition:?}");
        }
    }

    /// Every decision about an image: what it removes, and what it says.
    pub fn judge_image(&mut self, name: &str, o: &Observed, d: &Decision) {
        self.judge_conditions("image", name, &d.status.conditions);
        for (disk, file) in &d.status.disk_file_status_map {
            let needs_reason =
                matches!(file.state, CopyState::Failed | CopyState::FailedAndCleanup | CopyState::Unknown);
            assert!(
                !needs_reason || !file.message.is_empty(),
                "the copy of {name} on {disk} does not say why: {file:?}"
            );
        }
        self.remember_use(name, o);
        self.remember_silence(name, d);
        for (what, is_so) in [
            ("copies that wait for the limit of a node", !d.replenish.waits_for.is_empty()),
            ("evictions that wait", d.status.conditions.iter().any(|c| c.r#type == types::EVICTED)),
        ] {
            self.tally.add(what, u64::from(is_so));
        }
        if is_deletion(o) {
            return;
        }
        let (before, after) = (&o.image.spec.disk_file_spec_map, planned_copies(o, d));
        let removed: BTreeSet<&String> = before.keys().filter(|disk| !after.contains_key(*disk)).collect();
        let state = |disk: &str| d.status.disk_file_status_map.get(disk).map(|f| f.state).unwrap_or_default();
        let is_ready = |disk: &&String| state(disk) == CopyState::Ready;
        // What shall leave as well is no reason to let another one go.
        let left = after.keys().filter(is_ready).count();
        let staying = after.keys().filter(is_ready).filter(|disk| !is_evicting(o, disk)).count();
        let mut loses_ready = false;
        for disk in &removed {
            let user = o.replicas.iter().find(|r| r.spec.disk_id == **disk);
            assert!(
                user.is_none(),
                "the copy of {name} on {disk} is removed, which replica {:?} uses",
                user.map(|r| &r.metadata.name)
            );
            let source = o.data_source.as_ref().filter(|s| !s.spec.file_transferred && s.spec.disk_uuid == **disk);
            let moves =
                d.actions.iter().any(|a| matches!(a, Action::SetDataSourceSpec(spec) if spec.disk_uuid != **disk));
            assert!(
                source.is_none() || moves,
                "the copy of {name} on {disk} is removed before its data source has handed it over"
            );
            // A preparation leaves a disk that is known not to work, or gone.
            let silent = match source {
                Some(_) => o.disks.get(disk).is_some_and(|disk| matches!(disk.health, Health::Unknown(_))),
                None => state(disk) == CopyState::Unknown && !o.disks.is_gone(disk),
            };
            assert!(!silent, "invariant 6: the silent copy of {name} on {disk} is removed");
            if source.is_some() {
                continue;
            }
            if state(disk) == CopyState::Unknown {
                self.judge_gone(name, o, disk);
            }
            let ready = is_ready(disk);
            loses_ready |= ready;
            let unused = self.unused_since.get(&((*disk).clone(), name.to_owned())).copied();
            let is_due = unused.is_some_and(|at| since(o.now, at) >= o.settings.cleanup_wait);
            assert!(
                is_evicting(o, disk) || is_due || !ready,
                "the copy of {name} on {disk} is cleaned up before its time: unused since {unused:?}"
            );
            let floor = needed(o);
            assert!(
                if ready { staying >= floor } else { left >= 1 },
                "{staying} of {left} ready copies of {name} stay when that on {disk} goes, at least {floor} must"
            );
        }
        self.judge_additions(name, o, d, &after);
        self.judge_letting_go(name, o, d, &after);
        let had = before.keys().any(|disk| state(disk) == CopyState::Ready);
        assert!(!loses_ready || had && left > 0, "invariant 2: the last ready copy of {name} is removed");
    }

    /// What was taken out of the map, by whom ever, is removed once it has left the status too.
    fn judge_letting_go(&mut self, name: &str, o: &Observed, d: &Decision, after: &Copies) {
        let known = o.image.status.clone().unwrap_or_default();
        let goes = |disk: &&String| !after.contains_key(*disk) && !d.status.disk_file_status_map.contains_key(*disk);
        let ready =
            |disk: &String| d.status.disk_file_status_map.get(disk).is_some_and(|f| f.state == CopyState::Ready);
        let others: BTreeSet<String> = after.keys().filter(|disk| ready(disk)).cloned().collect();
        for disk in known.disk_file_status_map.keys().filter(goes) {
            let user = o.replicas.iter().find(|r| r.spec.disk_id == *disk).map(|r| &r.metadata.name);
            assert!(user.is_none(), "the copy of {name} on {disk} is let go, which replica {user:?} uses");
            let source = o.data_source.as_ref().is_some_and(|s| !s.spec.file_transferred && s.spec.disk_uuid == *disk);
            let moves =
                d.actions.iter().any(|a| matches!(a, Action::SetDataSourceSpec(spec) if spec.disk_uuid != *disk));
            assert!(
                !source || moves,
                "the copy of {name} on {disk} is let go before its data source has handed it over"
            );
            let manager = o.managers.iter().find(|m| m.spec.disk_uuid == *disk).and_then(|m| m.status.as_ref());
            let state = manager.and_then(|s| s.backing_image_file_map.get(name)).map(|f| f.state).unwrap_or_default();
            let is_silent = state == CopyState::Unknown && o.disks.get(disk).is_some() && !known.checksum.is_empty();
            assert!(!is_silent, "invariant 6: the silent copy of {name} on {disk} is let go");
            // Without a ready one, what lies there may be the last of the image.
            let floor = match state {
                CopyState::Ready => needed(o),
                _ => usize::from(!known.checksum.is_empty() && !moves),
            };
            let is_counted = |disk: &&String| state != CopyState::Ready || !is_evicting(o, disk);
            let left = others.iter().filter(is_counted).count();
            assert!(
                left >= floor,
                "{left} ready copies of {name} are left when that on {disk} is let go, {floor} are needed"
            );
            self.tally.add("copies let go", 1);
            let key = (disk.clone(), (name.to_owned(), known.uuid.clone()));
            let relies = if state == CopyState::Ready { others.clone() } else { BTreeSet::from([disk.clone()]) };
            self.licenses.insert(key, relies);
        }
    }

    /// What is added is missed, allowed, and lies where something may be placed.
    fn judge_additions(&mut self, name: &str, o: &Observed, d: &Decision, after: &Copies) {
        let before = &o.image.spec.disk_file_spec_map;
        let serves = |disk: &str| o.replicas.iter().any(|r| r.spec.disk_id == disk);
        let is_first = |disk: &str| {
            let source = o.data_source.as_ref().is_some_and(|s| !s.spec.file_transferred && s.spec.disk_uuid == disk);
            source
                || d.actions.iter().any(|a| match a {
                    Action::CreateDataSource(new) => new.spec.disk_uuid == disk,
                    Action::SetDataSourceSpec(new) => new.disk_uuid == disk,
                    _ => false,
                })
        };
        // What is put back was never gone.
        let known = o.image.status.clone().unwrap_or_default();
        let is_held = |disk: &str| known.disk_file_status_map.contains_key(disk);
        let added: Vec<&String> =
            after.keys().filter(|d| !before.contains_key(*d) && !serves(d) && !is_held(d)).collect();
        let is_found = |d: &&String| after[*d].reason.starts_with("a whole copy was found there");
        let (found, added): (Vec<&String>, Vec<&String>) = added.into_iter().partition(is_found);
        let is_named = |disk: &String| is_held(disk) || before.contains_key(disk);
        let copies = &d.status.disk_file_status_map;
        let other = copies.iter().find(|(disk, copy)| copy.state == CopyState::Ready && is_named(disk));
        for disk in &found {
            assert!(
                found_on(o, disk) && other.is_none(),
                "a copy of {name} is taken back on {disk}, while {other:?} is ready"
            );
            self.happens("whole copies taken back", format!("{name} on {disk}"));
            // It counts as unused from now on, not only once somebody looks again.
            self.unused_since.entry(((*disk).clone(), name.to_owned())).or_insert(o.now);
        }
        for disk in &added {
            let refused =
                o.disks.get(disk).map_or(Some("nobody has it"), |d| ineligible(d, &o.image.spec, &o.settings));
            assert!(refused.is_none() || is_first(disk), "a copy of {name} is added on {disk}: {refused:?}");
            assert!(
                o.settings.replenish_limit > 0 || is_first(disk),
                "a copy of {name} is added on {disk} against the limit"
            );
        }
        let is_ready =
            |disk: &&String| d.status.disk_file_status_map.get(*disk).is_some_and(|f| f.state == CopyState::Ready);
        // One that has not been silent for long counts as one that is there.
        let is_awaited = |disk: &&String| {
            let unknown = self.unknown_since.get(&((*disk).clone(), name.to_owned()));
            unknown.is_some_and(|at| !o.disks.is_gone(disk) && since(o.now, *at) < o.settings.replenish_wait)
        };
        let is_counted = |disk: &&String| is_ready(disk) || is_awaited(disk);
        let staying = before.keys().filter(|disk| !is_evicting(o, disk)).filter(is_counted).count();
        let further: Vec<&String> = added.iter().copied().filter(|disk| !is_first(disk)).collect();
        let more = further.len();
        assert!(
            more == 0 || staying + more <= needed(o),
            "{more} copies of {name} are added to {staying}, {} are needed",
            needed(o)
        );
        further.iter().for_each(|disk| self.judge_limit(name, o, d, after, disk));
        if let [disk] = further[..] {
            self.judge_spread(name, o, d, disk);
        }
        if o.settings.replenish_limit == 0 && after.keys().any(|d| !before.contains_key(d) && serves(d)) {
            self.tally.add("copies added for a replica while the limit is 0", 1);
        }
    }

    fn remember_use(&mut self, name: &str, o: &Observed) {
        let known = o.image.status.clone().unwrap_or_default();
        let used: BTreeSet<&str> = o.replicas.iter().map(|r| r.spec.disk_id.as_str()).collect();
        // What somebody took out of the map is held until it is let go.
        let held: BTreeSet<&String> =
            o.image.spec.disk_file_spec_map.keys().chain(known.disk_file_status_map.keys()).collect();
        let is_unused = |disk: &String| held.contains(disk) && !used.contains(disk.as_str());
        self.unused_since.retain(|(disk, image), _| image != name || is_unused(disk));
        for disk in held.iter().filter(|disk| is_unused(disk)) {
            self.unused_since.entry(((*disk).clone(), name.to_owned())).or_insert(o.now);
        }
    }

    /// The wanted copies become these: what is removed relies on the ready ones that stay.
    pub fn license(&mut self, name: &str, o: &Observed, map: &Copies) {
        let status = self.images[name].status.clone().unwrap_or_default();
        let state = |disk: &String| status.disk_file_status_map.get(disk).map(|f| f.state).unwrap_or_default();
        let others: BTreeSet<String> = map.keys().filter(|d| state(d) == CopyState::Ready).cloned().collect();
        let before = &o.image.spec.disk_file_spec_map;
        for disk in before.keys().filter(|d| !map.contains_key(*d)) {
            let what = match (is_deletion(o), state(disk)) {
                (true, _) => "copies deleted with their image",
                (false, CopyState::Ready) if is_evicting(o, disk) => "copies evicted",
                (false, CopyState::Ready) => "copies cleaned up",
                (false, _) => "entries without a copy removed",
            };
            self.happens(what, format!("{name} on {disk}"));
            let key = (disk.clone(), (name.to_owned(), status.uuid.clone()));
            // One that was not ready is nobody's last, and the user's own deletion asks nobody.
            let is_free = state(disk) != CopyState::Ready || is_deletion(o);
            let relies = if is_free { BTreeSet::from([disk.clone()]) } else { others.clone() };
            self.licenses.insert(key, relies);
        }
        for disk in map.keys().filter(|d| !before.contains_key(*d)) {
            let is_for_replica = o.replicas.iter().any(|r| r.spec.disk_id == *disk);
            let what = if is_for_replica { "copies added for a replica" } else { "copies added" };
            self.happens(what, format!("{name} on {disk}"));
        }
    }

    pub fn move_source(&mut self, name: &str, spec: BackingImageDataSourceSpec) {
        let disks = self.disks();
        let Some(source) = self.sources.get_mut(name) else { return };
        let old = source.spec.disk_uuid.clone();
        let (moves, was_done) = (old != spec.disk_uuid, source.spec.file_transferred);
        let is_again = was_done && !spec.file_transferred;
        source.spec = spec;
        if is_again {
            self.happens("preparations repeated", name);
        } else if moves {
            let key = (name.to_owned(), self.uuid_of(name));
            if disks.get(&old).is_none_or(|d| d.health != Health::Ready) || !self.is_remembered(&old, &key) {
                self.left_behind.insert(old);
            }
            self.happens("preparations moved", name);
        }
    }

    /// The disks on which something of a file lies.
    pub fn holders(&self, key: &Key) -> Vec<String> {
        let holds = |disk: &crate::files::Disk| {
            disk.files.contains_key(key) || disk.made.get(key).is_some_and(|r| r.state != CopyState::Ready)
        };
        self.disks.iter().filter(|(_, d)| holds(d)).map(|(id, _)| id.clone()).collect()
    }

    /// Whether the manager of a disk knows that something of a file may lie there.
    fn is_remembered(&self, id: &str, key: &Key) -> bool {
        let mut managers = self.managers.values().filter(|m| m.spec.disk_uuid == id);
        managers.any(|m| m.spec.records(&key.0, &key.1))
    }

    /// Nothing of an image is left when its object goes, except on disks that are away.
    pub fn judge_end_of_image(&mut self, name: &str) {
        let key = (name.to_owned(), self.uuid_of(name));
        let disks = self.disks();
        for id in self.holders(&key) {
            let is_away = disks.get(&id).is_none_or(|d| d.health != Health::Ready);
            assert!(is_away || self.left_behind.contains(&id), "image {name} goes and leaves files on {id}");
            self.happens("files left behind on a disk that is away", &id);
            if disks.get(&id).is_none() || !self.is_remembered(&id, &key) {
                self.left_behind.insert(id);
            }
        }
        self.happens("images deleted", name);
    }

    /// The agent of a disk removes a file. Invariant 2 holds in the end here, where bytes go.
    pub fn delete_file(&mut self, id: &str, key: &Key) -> Result<(), &'static str> {
        if !self.is_here(id) {
            return Err("the disk is away");
        }
        let object = self.images.get(&key.0).filter(|_| !key.1.is_empty() && self.uuid_of(&key.0) == key.1);
        let is_ending =
            |i: &api::BackingImage| i.metadata.deletion_timestamp.is_some() && i.spec.disk_file_spec_map.is_empty();
        if object.is_some_and(|i| !is_ending(i)) {
            self.judge_removal(id, key);
        }
        let disk = self.disks.get_mut(id).expect("disks stay");
        disk.known.remove(key);
        disk.made.remove(key);
        disk.syncs.remove(key);
        disk.readings.remove(key);
        if disk.files.remove(key).is_some() {
            self.happens("files removed", format!("{} on {id}", key.0));
            self.taken.insert((id.to_owned(), key.clone()));
        }
        Ok(())
    }

    /// Whether something that was told is still an orphan when it is to be removed, as `controller/src/manager.rs` asks. Then no image of
    /// that name and uuid may need it.
    pub fn judge_orphan(&self, id: &str, key: &Key, found: &Remains) -> bool {
        let (image, source) = (self.images.get(&key.0), self.sources.get(&key.0));
        let lies_over = |r: &api::Replica| r.spec.backing_image == key.0 && r.spec.disk_id == id;
        if owner(found, id, image, source) == Owner::Somebody
            || found.place == Place::Copies && self.replicas.values().any(lies_over)
        {
            return false;
        }
        let is_prepared =
            source.is_some_and(|s| s.spec.uuid == key.1 && s.spec.disk_uuid == id && !s.spec.file_transferred);
        let exists = image.is_some() && self.uuid_of(&key.0) == key.1;
        assert!(
            !(is_prepared || exists && found.place == Place::Copies),
            "{} on {id} is removed as an orphan, and it is none",
            found.path()
        );
        assert!(
            found.place == Place::Preparations || !self.disks[id].is_base(key),
            "{} on {id} is removed as an orphan, and a directory of a replica lies over it",
            found.path()
        );
        // The only whole file that there is of an image: it is not left for nothing.
        let is_whole = self.disks[id].made.get(key).is_some_and(|r| r.state == CopyState::ReadyForTransfer);
        let is_elsewhere = self.disks.values().any(|disk| disk.files.contains_key(key)) || source.is_some();
        assert!(
            !(exists && is_whole) || is_elsewhere,
            "the only file of image {} on {id} is removed as an orphan",
            key.0
        );
        true
    }

    fn judge_removal(&self, id: &str, key: &Key) {
        let image = &key.0;
        let is_user = |r: &&api::Replica| r.spec.backing_image == *image;
        let runs = self.replicas.iter().find(|(name, replica)| {
            is_user(replica) && replica.spec.disk_id == id && self.replica_files.get(*name).is_some_and(|f| f.is_up)
        });
        assert!(
            runs.is_none(),
            "the file of {image} on {id} is removed below replica {:?}, which runs",
            runs.map(|r| r.0)
        );
        let in_use = self.volumes.values().any(|v| v.spec.backing_image == *image)
            || self.replicas.values().any(|r| is_user(&r));
        if !in_use || !matches!(self.disks[id].files.get(key), Some(File { is_damaged: false, .. })) {
            return;
        }
        let is_good = |other: &String| other != id && self.disks[other].is_good(key);
        let is_fine = match self.licenses.get(&(id.to_owned(), key.clone())) {
            Some(_) => self.is_covered(id, key),
            None => self.disks.keys().any(is_good),
        };
        assert!(is_fine, "invariant 2: the last ready copy of image {image} was removed from {id}");
    }

    /// Whether one of the copies that the removal of one relies on was not removed itself, or relies on such a one. What a fault took
    /// since then is nobody's fault.
    fn is_covered(&self, id: &str, key: &Key) -> bool {
        let (mut seen, mut next) = (BTreeSet::from([id.to_owned()]), vec![id.to_owned()]);
        while let Some(disk) = next.pop() {
            let place = (disk.clone(), key.clone());
            // A deletion that nobody has to allow relies on nothing.
            let relies = self.licenses.get(&place).cloned().unwrap_or_default();
            if relies.contains(&disk) {
                return true;
            }
            for other in relies {
                if !self.taken.contains(&(other.clone(), key.clone())) {
                    return true;
                }
                if seen.insert(other.clone()) {
                    next.push(other);
                }
            }
        }
        false
    }
}

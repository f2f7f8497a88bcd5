//! The faults end: what was wished must come true within a bounded number of rounds, or say why it cannot, and then nothing moves.

use std::collections::BTreeSet;
use std::time::Duration;

use api::image::CopyState;
use api::names::condition::{EVICTED, READY};
use api::names::{data_source_workload_name, manager_name};
use api::volume::{Robustness, VolumeState};
use api::{BackingImage, condition};
use planner::disk::Disk;
use planner::retry::{after, since};
use rand::rngs::StdRng;

use crate::files::node_of_path;
use crate::invariants::ineligible;
use crate::world::{GIB, World, mark};

/// Rounds over all objects in which something is done, within which a world without faults settles.
const SETTLING_ROUNDS: u32 = 300;

/// Longer than any interval, back-off and step of the clock.
const LONG: Duration = Duration::from_secs(10_000);

/// Far longer: what still happens then was forgotten before.
const MUCH_LATER: Duration = Duration::from_secs(100_000);

impl World {
    /// Everything answers from here on, and what was wished must come true.
    pub fn settle(&mut self, random: &mut StdRng) {
        if self.told {
            println!("{} SETTLES", self.now);
        }
        self.end_faults(random);
        // A user who wants an image that is being deleted would wait for ever, and rightly so.
        let missing: BTreeSet<String> = self.volumes.values().map(|v| v.spec.backing_image.clone()).collect();
        let (mut rounds, mut acted, mut last) = (0, self.now, self.actions);
        // What cannot be got is tried again for ever, with a wait; nothing comes of that.
        while since(self.now, acted) < LONG {
            missing.iter().for_each(|image| self.create_image(image, random));
            let moved = self.moves(random);
            if self.told {
                println!("{} round {rounds}, moved {moved}, again in {:?}", self.now, self.recheck);
            }
            match self.recheck.take() {
                _ if moved => self.now = after(self.now, Duration::from_millis(500)),
                Some(wait) => self.now = after(self.now, wait.max(Duration::from_millis(1))),
                None => break,
            }
            if last != self.actions {
                (last, acted) = (self.actions, self.now);
                rounds += 1;
            }
            assert!(
                rounds < SETTLING_ROUNDS,
                "does not settle: {}\n{}",
                self.unmet().unwrap_or_default(),
                self.summary()
            );
        }
        self.tally.add("rounds to settle", u64::from(rounds));
        if let Some(problem) = self.unmet().or_else(|| self.leftovers()) {
            panic!("settles, but {problem}\n{}", self.summary());
        }
        self.now = after(self.now, MUCH_LATER);
        for _ in 0..3 {
            let before = self.actions;
            self.round(random);
            assert_eq!(before, self.actions, "a settled world plans further actions\n{}", self.summary());
        }
    }

    /// One round; whether anything came of it.
    fn moves(&mut self, random: &mut StdRng) -> bool {
        self.report_nodes();
        let objects = |w: &World| {
            let instances = (w.engines.clone(), w.replicas.clone(), w.nodes.clone());
            (w.images.clone(), w.sources.clone(), w.managers.clone(), w.volumes.clone(), instances)
        };
        let reality = |w: &World| {
            let known: Vec<_> = w.disks.values().map(|d| (d.known.clone(), d.made.clone(), d.readings.len())).collect();
            (w.workloads.clone(), known)
        };
        let (before, was) = (objects(self), (reality(self), self.actions));
        self.round(random);
        before != objects(self) || was != (reality(self), self.actions)
    }

    fn end_faults(&mut self, random: &mut StdRng) {
        self.faults = false;
        self.silent.clear();
        self.stopped.clear();
        self.settings.scrub_interval = Duration::ZERO;
        self.settings.removes_orphans = true;
        self.bring_disks_home();
        for disk in self.disks.values_mut() {
            (disk.is_full, disk.is_read_only, disk.capacity) = (false, false, 100 * GIB);
            // A reading finds what nobody noticed; otherwise it would look fine, and be no source.
            disk.files.values_mut().for_each(|file| file.is_touched |= file.is_damaged);
        }
        // Whoever lost a disk for good gives the volume up that had data there.
        let lost = |w: &World, name: &str| {
            let mut replicas = w.replicas.values().filter(|r| r.spec.volume_name == name);
            replicas.any(|r| {
                !w.is_mounted(&r.spec.disk_id, &r.spec.disk_path) || !w.wished_paths().contains(&r.spec.disk_path)
            })
        };
        for name in self.volumes.keys().cloned().collect::<Vec<_>>() {
            if lost(self, &name) {
                self.happens("volumes given up with their disk", &name);
                mark(self.volumes.get_mut(&name), self.now);
            }
        }
        for node in self.nodes.keys().cloned().collect::<Vec<_>>() {
            self.instance(&node, random);
        }
    }

    /// Each disk that a node reported is where it was then; otherwise it is taken off the node.
    fn bring_disks_home(&mut self) {
        for path in self.mounts.keys().cloned().collect::<Vec<_>>() {
            match self.known_at(&path) {
                Some(known) => {
                    let elsewhere = self.path_of(&known).map(str::to_owned).filter(|p| *p != path);
                    if elsewhere.as_ref().is_some_and(|p| self.known_at(p).as_ref() == Some(&known)) {
                        self.take_off(&path);
                        continue;
                    }
                    elsewhere.into_iter().for_each(|p| drop(self.mounts.insert(p, None)));
                    self.mounts.insert(path, Some(known));
                }
                None if self.mounts[&path].is_none() => self.take_off(&path),
                None => {}
            }
        }
        // What came home may have left a place empty that nobody knows any disk of.
        for path in self.mounts.keys().cloned().collect::<Vec<_>>() {
            if self.mounts[&path].is_none() {
                self.take_off(&path);
            }
        }
    }

    fn take_off(&mut self, path: &str) {
        let disk = path.rsplit('/').next().unwrap_or_default().to_owned();
        if let Some(node) = self.nodes.get_mut(node_of_path(path)) {
            node.spec.disks.remove(&disk);
        }
    }

    /// The first wish that is not fulfilled.
    fn unmet(&self) -> Option<String> {
        let images = self.images.iter().find_map(|(name, image)| self.unmet_image(name, image));
        images.or_else(|| self.volumes.keys().find_map(|name| self.unmet_volume(name)))
    }

    fn unmet_image(&self, name: &str, image: &BackingImage) -> Option<String> {
        let status = image.status.clone().unwrap_or_default();
        let said = condition::find(&status.conditions, READY).cloned().unwrap_or_default();
        let in_use = self.volumes.values().any(|v| v.spec.backing_image == *name)
            || self.replicas.values().any(|r| r.spec.backing_image == *name);
        if image.metadata.deletion_timestamp.is_some() {
            return (!in_use).then(|| format!("image {name} is not deleted: {said:?}"));
        }
        let disks = self.disks();
        let map = &image.spec.disk_file_spec_map;
        let state = |d: &String| status.disk_file_status_map.get(d).map(|f| f.state).unwrap_or_default();
        let is_leaving = |d: &Disk| d.evicting || d.cordoned && self.settings.evict_cordoned;
        let is_evicting = |d: &String| map[d].eviction_requested || disks.get(d).is_some_and(is_leaving);
        let is_used =
            |d: &String| self.replicas.values().any(|r| r.spec.disk_id == **d && r.spec.backing_image == *name);
        let further = disks.list.iter().find(|d| {
            !map.contains_key(&d.id) && ineligible(d, &image.spec, &self.settings).is_none() && d.available_bytes >= GIB
        });
        let asked = image.spec.min_number_of_copies;
        let need = (if asked == 0 { self.settings.min_copies } else { asked }) as usize;
        let ready: Vec<&String> = map.keys().filter(|d| state(d) == CopyState::Ready).collect();
        let staying = ready.iter().filter(|d| !is_evicting(d)).count();
        let is_told = !said.reason.is_empty() && !said.message.is_empty();
        let problem = |why: &str| {
            Some(format!(
                "image {name} has {staying} of {need} copies, {why}: {said:?}, {map:?}, {:?}",
                status.disk_file_status_map
            ))
        };
        if staying < need {
            if let Some(disk) = further.filter(|_| self.settings.replenish_limit > 0 || ready.is_empty()) {
                return problem(&format!("although {} is eligible", disk.label()));
            }
            if !is_told || said.is_true() && said.reason != "FewerCopies" {
                return problem("and does not say why");
            }
        }
        if let Some(disk) = map.keys().find(|d| !ready.is_empty() && state(d) != CopyState::Ready && !disks.is_gone(d))
        {
            return problem(&format!("and that on {disk} is not ready"));
        }
        if let Some(disk) = map.keys().find(|d| staying > 0 && disks.is_gone(d) && !is_used(d)) {
            return problem(&format!("and still one on {disk}, which is gone"));
        }
        if let Some(disk) = ready.iter().find(|d| staying > need && !is_used(d) && !is_evicting(d)) {
            return problem(&format!("and nobody needs that on {disk}"));
        }
        let is_free = |d: &&&String| is_evicting(d) && staying >= need && !is_used(d);
        if let Some(disk) = ready.iter().find(is_free) {
            return problem(&format!("and {disk} is not emptied"));
        }
        let told = condition::find(&status.conditions, EVICTED).map(|c| c.message.clone());
        let is_told_of =
            |d: &String| told.as_ref().is_some_and(|t| t.contains(&format!("the copy on {} stays", disks.label(d))));
        if let Some(disk) = map.keys().find(|d| is_evicting(d) && !is_told_of(d)) {
            return problem(&format!("and does not say why {disk} is not emptied: {told:?}"));
        }
        if told.is_some() && !map.keys().any(is_evicting) {
            return problem(&format!("and nothing is to leave: {told:?}"));
        }
        let is_recorded = map.keys().eq(status.disk_file_status_map.keys());
        let is_left = status.disk_last_ref_at_map.keys().any(|d| !map.contains_key(d) || is_used(d));
        (!is_recorded || is_left).then(|| format!("image {name}: its maps differ: {map:?}, {status:?}"))
    }

    fn unmet_volume(&self, name: &str) -> Option<String> {
        let volume = &self.volumes[name];
        let status = volume.status.clone().unwrap_or_default();
        let wish = &volume.spec.node_id;
        let image = self.images.get(&volume.spec.backing_image);
        let image_waits = image.and_then(|i| i.status.as_ref()).is_some_and(|s| {
            let said = condition::find(&s.conditions, READY).is_some_and(|c| !c.is_true() && !c.message.is_empty());
            said && planner::image::ready_disks(s).next().is_none()
        });
        let ready = condition::find(&status.conditions, READY).cloned().unwrap_or_default();
        let is_met = match (wish.is_empty(), status.state) {
            _ if volume.metadata.deletion_timestamp.is_some() => false,
            (_, _) if status.robustness == Robustness::Faulted => true,
            // It says so itself.
            (_, VolumeState::Creating) => ready.reason == "NoEligibleDisk",
            (true, state) => state == VolumeState::Detached,
            (false, VolumeState::Attaching) if image_waits => !ready.is_true() && !ready.message.is_empty(),
            (false, state) => state == VolumeState::Attached && status.current_node_id == *wish,
        };
        (!is_met).then(|| format!("volume {name}: wished `{wish}`, {:?}: {:?}", status.state, status.conditions))
    }

    /// What is there and belongs to nobody.
    fn leftovers(&self) -> Option<String> {
        let wants = |disk: &str| self.images.values().any(|i| i.spec.disk_file_spec_map.contains_key(disk));
        let disks = self.disks();
        for (name, manager) in &self.managers {
            // It looks after what a directory of a lost replica lies over.
            let keeps =
                self.disks.get(&manager.spec.disk_uuid).is_some_and(|d| d.files.keys().any(|key| d.is_base(key)));
            if !wants(&manager.spec.disk_uuid) && !keeps {
                return Some(format!("manager {name} is left without work: {:?}", manager.spec.backing_images));
            }
        }
        let prepares = |source: &&api::BackingImageDataSource| !source.spec.file_transferred;
        let workloads = |name: &String| {
            let source = |image: &String| data_source_workload_name(&image.parse().expect("a name")) == *name;
            self.managers.contains_key(name) || self.sources.iter().any(|(n, s)| source(n) && prepares(&s))
        };
        if let Some(name) = self.workloads.keys().find(|name| !workloads(name)) {
            return Some(format!("workload {name} is left"));
        }
        if let Some(name) = self.sources.keys().find(|name| !self.images.contains_key(*name)) {
            return Some(format!("data source {name} is left"));
        }
        for (id, disk) in self.disks.iter().filter(|(id, _)| disks.get(id).is_some()) {
            let is_wanted = |key: &(String, String)| {
                self.uuid_of(&key.0) == key.1 && self.images[&key.0].spec.disk_file_spec_map.contains_key(id)
            };
            let manager = self.managers.get(&manager_name(&id.parse().expect("a disk")));
            if let Some(key) = disk.files.keys().find(|key| !is_wanted(key) && !disk.is_base(key)) {
                let entries = manager.map(|m| &m.spec.backing_images);
                return Some(format!("file {key:?} is left on {id}, its manager has {entries:?}"));
            }
            let is_made = |key: &(String, String)| {
                self.sources
                    .get(&key.0)
                    .is_some_and(|s| prepares(&s) && s.spec.disk_uuid == *id && s.spec.uuid == key.1)
            };
            let made = disk.made.iter().find(|(key, report)| report.state != CopyState::Ready && !is_made(key));
            if let Some((key, report)) = made {
                return Some(format!("the temporary file of {key:?} is left on {id}: {report:?}"));
            }
        }
        None
    }

    /// The state of everything in few words, for who looks for the cause.
    fn summary(&self) -> String {
        let mut text = format!("{:?}\n", self.settings);
        for disk in &self.disks().list {
            text += &format!(
                "{} {}: {:?} {:?} evicting {} node tags {:?} tags {:?} free {}\n",
                disk.id,
                disk.label(),
                disk.health,
                disk.unschedulable,
                disk.evicting,
                disk.node_tags,
                disk.tags,
                disk.available_bytes
            );
        }
        for (name, image) in &self.images {
            let status = image.status.clone().unwrap_or_default();
            text += &format!(
                "image {name} {}: minimum {}, tags {:?} {:?}, deleted {}, {:?}\n",
                status.uuid,
                image.spec.min_number_of_copies,
                image.spec.node_selector,
                image.spec.disk_selector,
                image.metadata.deletion_timestamp.is_some(),
                condition::find(&status.conditions, READY).map(|c| (&c.reason, &c.message))
            );
            for (disk, copy) in &status.disk_file_status_map {
                text += &format!(
                    "  on {disk}: {:?} `{}` {:?} next {}\n",
                    copy.state, copy.message, copy.error_kind, copy.next_retry_time
                );
            }
        }
        for (name, source) in &self.sources {
            let status = source.status.clone().unwrap_or_default();
            text += &format!(
                "source {name}: transferred {}, on {}, {:?} `{}`\n",
                source.spec.file_transferred, source.spec.disk_uuid, status.current_state, status.message
            );
        }
        for (name, volume) in &self.volumes {
            let status = volume.status.clone().unwrap_or_default();
            text += &format!(
                "volume {name} of {} on `{}`: {:?}\n",
                volume.spec.backing_image, volume.spec.node_id, status.state
            );
        }
        for (name, replica) in &self.replicas {
            text += &format!("replica {name} on {}, failed at `{}`\n", replica.spec.disk_id, replica.spec.failed_at);
        }
        text
    }
}

//! What users do, and what breaks.

use std::collections::btree_map::Entry;
use std::time::Duration;

use api::image::{BackingImageSpec, SourceType};
use api::names::condition::CORDONED;
use api::node::{DiskSpec, NodeSpec};
use api::quantity::SizeBytes;
use api::volume::VolumeSpec;
use api::{BackingImage, Condition, ConditionStatus, Volume};
use planner::retry::after;
use rand::Rng;
use rand::rngs::StdRng;

use crate::any;
use crate::files::{Disk, Key, node_of_path};
use crate::world::{GIB, IMAGES, VOLUMES, World, mark};

/// Disks that are added to those that nodes begin with.
const SPARE_DISKS: usize = 3;

fn toggle(tags: &mut Vec<String>, tag: &str) {
    let had = tags.len();
    tags.retain(|t| t != tag);
    if tags.len() == had {
        tags.push(tag.into());
    }
}

impl World {
    pub fn user(&mut self, random: &mut StdRng) {
        let image = IMAGES[random.random_range(0..IMAGES.len())];
        let volume = VOLUMES[random.random_range(0..VOLUMES.len())];
        match random.random_range(0..100) {
            0..=13 => self.create_image(image, random),
            14..=17 => self.delete_image(image),
            18..=34 => self.create_volume(volume, image, random),
            35..=39 => {
                if self.volumes.contains_key(volume) {
                    self.happens("volumes deleted", volume);
                    mark(self.volumes.get_mut(volume), self.now);
                }
            }
            40..=59 => self.attach(volume, random),
            60..=66 => {
                if let Some(volume) = self.volumes.get_mut(volume) {
                    volume.spec.node_id.clear();
                }
            }
            67..=75 => self.change_image(image, random),
            76..=83 => self.change_setting(random),
            84..=96 => self.change_node(random),
            _ => self.edit_map(image, random),
        }
    }

    fn attach(&mut self, volume: &str, random: &mut StdRng) {
        let nodes: Vec<String> = self.nodes.keys().cloned().collect();
        if let (Some(volume), Some(node)) = (self.volumes.get_mut(volume), any(&nodes, random)) {
            volume.spec.node_id.clone_from(node);
        }
    }

    pub fn create_image(&mut self, name: &str, random: &mut StdRng) {
        if self.images.contains_key(name) {
            return;
        }
        let spec = BackingImageSpec {
            source_type: Some(SourceType::Download),
            source_parameters: [("url".to_owned(), "http://images.test/x".to_owned())].into(),
            min_number_of_copies: random.random_range(0..=3),
            ..Default::default()
        };
        let mut image = BackingImage::new(name, spec);
        image.metadata.creation_timestamp = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(self.now));
        self.images.insert(name.into(), image);
        self.happens("images created", name);
    }

    /// Refused while it is in use, but for who deletes without asking: then it waits.
    fn delete_image(&mut self, name: &str) {
        mark(self.images.get_mut(name), self.now);
    }

    pub fn create_volume(&mut self, name: &str, image: &str, random: &mut StdRng) {
        let spec = VolumeSpec {
            size: SizeBytes(GIB),
            backing_image: image.into(),
            number_of_replicas: random.random_range(1..=3),
            ..Default::default()
        };
        if !self.volumes.contains_key(name) {
            self.happens("volumes created", name);
        }
        self.volumes.entry(name.into()).or_insert_with(|| Volume::new(name, spec));
    }

    fn change_image(&mut self, name: &str, random: &mut StdRng) {
        let now = self.now.to_string();
        let Some(image) = self.images.get_mut(name) else { return };
        let what = match random.random_range(0..10) {
            0..=5 => {
                let (old, new) = (image.spec.min_number_of_copies, random.random_range(0..=4));
                image.spec.min_number_of_copies = new;
                if new < old { "minimum lowered" } else { "minimum raised" }
            }
            6 => {
                toggle(&mut image.spec.node_selector, "fast");
                "selectors changed"
            }
            7 => {
                toggle(&mut image.spec.disk_selector, "ssd");
                "selectors changed"
            }
            _ => {
                image.spec.verify_requested_at = now;
                "readings asked for"
            }
        };
        self.happens(what, name);
    }

    fn change_setting(&mut self, random: &mut StdRng) {
        let settings = &mut self.settings;
        let seconds = |of: &[u64], random: &mut StdRng| Duration::from_secs(any(of, random).copied().unwrap_or(0));
        let what = match random.random_range(0..14) {
            13 => {
                settings.removes_orphans ^= true;
                settings.bandwidth_limit = if settings.removes_orphans { 0 } else { 1 << 20 };
                "removal of orphans and limit of bandwidth switched"
            }
            0 => {
                settings.min_copies = random.random_range(1..=4);
                "default minimum changed"
            }
            1..=2 => {
                settings.replenish_limit = any(&[0, 1, 5, 5], random).copied().unwrap_or(5);
                "replenish limit changed"
            }
            3..=4 => {
                settings.cleanup_wait = seconds(&[0, 60, 60, 3600], random);
                "clean-up interval changed"
            }
            5 => {
                settings.recovery_wait = seconds(&[0, 10, 300], random);
                "recovery interval changed"
            }
            6 => {
                settings.allow_empty_node_selector ^= true;
                "empty selectors allowed or not"
            }
            7 => {
                settings.allow_empty_disk_selector ^= true;
                "empty selectors allowed or not"
            }
            8..=9 => {
                settings.replenish_wait = seconds(&[0, 10, 600, 600], random);
                "replenish interval changed"
            }
            10 => {
                settings.close_cordoned ^= true;
                "cordoned nodes closed or not"
            }
            11 => {
                settings.evict_cordoned ^= true;
                "cordoned nodes emptied or not"
            }
            _ => {
                settings.scrub_interval = seconds(&[0, 3600], random);
                "scrub interval changed"
            }
        };
        let told = format!("{:?}", self.settings);
        self.happens(what, told);
    }

    fn change_node(&mut self, random: &mut StdRng) {
        let names: Vec<String> = self.nodes.keys().cloned().collect();
        let Some(name) = any(&names, random) else { return };
        let node = self.nodes.get_mut(name).expect("it is there");
        let disks: Vec<String> = node.spec.disks.keys().cloned().collect();
        let disk = any(&disks, random).cloned().unwrap_or_default();
        let spec: &mut NodeSpec = &mut node.spec;
        // Cancelled more often than asked for, so that not everything is always being emptied.
        let wish = random.random_bool(0.4);
        let what = match random.random_range(0..14) {
            0 => {
                spec.allow_scheduling ^= true;
                "node schedulable or not"
            }
            1..=2 => {
                (spec.allow_scheduling, spec.eviction_requested) = (!wish, wish);
                if wish { "node evictions asked for" } else { "node evictions cancelled" }
            }
            3 => {
                toggle(&mut spec.tags, "fast");
                "node tags changed"
            }
            12.. => {
                let conditions = &mut node.status.get_or_insert_default().conditions;
                conditions.retain(|c| c.r#type != CORDONED);
                if wish {
                    conditions.push(Condition::new(CORDONED, ConditionStatus::True, "Cordoned", "it is drained"));
                }
                if wish { "nodes cordoned" } else { "nodes uncordoned" }
            }
            n => match (n, spec.disks.get_mut(&disk)) {
                (4, Some(disk)) => {
                    disk.allow_scheduling ^= true;
                    "disk schedulable or not"
                }
                (5..=6, Some(disk)) => {
                    (disk.allow_scheduling, disk.eviction_requested) = (!wish, wish);
                    if wish { "disk evictions asked for" } else { "disk evictions cancelled" }
                }
                // Without a word about scheduling.
                (7, Some(disk)) => {
                    disk.eviction_requested = wish;
                    if wish { "disk evictions asked for" } else { "disk evictions cancelled" }
                }
                (8, Some(disk)) => {
                    toggle(&mut disk.tags, "ssd");
                    "disk tags changed"
                }
                (9..=10, Some(_)) if wish => {
                    spec.disks.remove(&disk);
                    "disks taken off their node"
                }
                (9..=11, _) => return self.add_disks(&name.clone()),
                _ => return,
            },
        };
        self.happens(what, format!("{name} {disk}"));
    }

    /// What lies below a node and was taken off it is added again.
    pub fn add_disks(&mut self, name: &str) {
        for path in self.mounts.keys().filter(|p| node_of_path(p) == name).cloned().collect::<Vec<_>>() {
            let disk = path.rsplit('/').next().unwrap_or_default().to_owned();
            let node = self.nodes.get_mut(name).expect("it is there");
            if let Entry::Vacant(free) = node.spec.disks.entry(disk) {
                free.insert(DiskSpec { path: path.clone(), ..Default::default() });
                self.happens("disks added to their node again", path);
            }
        }
    }

    /// Who edits `spec.diskFileSpecMap` by hand.
    fn edit_map(&mut self, name: &str, random: &mut StdRng) {
        let Some(image) = self.images.get_mut(name) else { return };
        let disks: Vec<String> = image.spec.disk_file_spec_map.keys().cloned().collect();
        let Some(disk) = any(&disks, random) else { return };
        let what = match random.random_range(0..4) {
            0 => {
                image.spec.disk_file_spec_map.clear();
                "maps emptied"
            }
            1 => {
                image.spec.disk_file_spec_map.remove(disk);
                "keys taken out of a map"
            }
            2 => {
                image.spec.disk_file_spec_map.entry("bogus".into()).or_default();
                "keys of no disk put into a map"
            }
            _ => {
                let entry = image.spec.disk_file_spec_map.get_mut(disk).expect("it is there");
                entry.eviction_requested ^= true;
                if entry.eviction_requested { "copy evictions asked for" } else { "copy evictions cancelled" }
            }
        };
        self.happens(what, format!("{name} {disk}"));
    }

    pub fn fault(&mut self, random: &mut StdRng) {
        match random.random_range(0..28) {
            0..=3 => {
                let nodes: Vec<String> = self.nodes.keys().cloned().collect();
                let Some(node) = any(&nodes, random) else { return };
                let seconds = if random.random_bool(0.1) { 1000 } else { random.random_range(1..90) };
                self.happens("silences", node);
                self.silent.insert(node.clone(), after(self.now, Duration::from_secs(seconds)));
            }
            4..=5 => {
                let names: Vec<String> = self.workloads.keys().cloned().collect();
                let Some(name) = any(&names, random) else { return };
                self.happens("processes stopped", name);
                self.stopped.insert(name.clone(), after(self.now, Duration::from_secs(random.random_range(1..90))));
            }
            6..=8 => self.kill_workload(random),
            9..=10 => self.kill_replica(random),
            11..=12 => self.crash_engine(random),
            13 => self.crash_controller(),
            14..=17 => self.harm_file(random),
            18 => self.set_clock(random),
            _ => self.harm_disk(random),
        }
    }

    fn set_clock(&mut self, random: &mut StdRng) {
        let step = Duration::from_secs(random.random_range(60..5000));
        // Not back again and again: what was to be done later would be done never.
        if random.random_bool(0.5) || self.now < self.latest {
            self.happens("clock set forward", format!("{step:?}"));
            self.now = after(self.now, step);
        } else {
            self.happens("clock set back", format!("{step:?}"));
            let back = jiff::SignedDuration::try_from(step).expect("it is short");
            self.now = self.now.checked_sub(back).unwrap_or(self.now);
            // What happened before counts from now.
            let now = self.now;
            let times = [&mut self.unused_since, &mut self.unknown_since, &mut self.gone_since];
            times.into_iter().flat_map(|times| times.values_mut()).for_each(|at| *at = now.min(*at));
        }
    }

    fn harm_file(&mut self, random: &mut StdRng) {
        let files: Vec<(String, Key)> =
            self.disks.iter().flat_map(|(id, d)| d.files.keys().map(|k| (id.clone(), k.clone()))).collect();
        let Some((id, key)) = any(&files, random) else { return };
        let disk = self.disks.get_mut(id).expect("it is there");
        let file = disk.files.get_mut(key).expect("it is there");
        let what = match random.random_range(0..4) {
            0 => {
                file.is_damaged = true;
                "bytes flipped in silence"
            }
            1 => {
                (file.is_damaged, file.is_touched) = (true, true);
                "bytes flipped"
            }
            2 => {
                file.is_touched = true;
                "files touched"
            }
            _ => {
                disk.files.remove(key);
                "files deleted behind the agent"
            }
        };
        self.happens(what, format!("{} on {id}", key.0));
    }

    fn harm_disk(&mut self, random: &mut StdRng) {
        let paths: Vec<String> = self.mounts.keys().cloned().collect();
        let Some(path) = any(&paths, random) else { return };
        let mounted = self.mounts[path].clone();
        let about = format!("{path} {mounted:?}");
        let Some(id) = mounted else { return self.mount_something(path, random) };
        let disk = self.disks.get_mut(&id).expect("disks stay");
        let what = match random.random_range(0..10) {
            0..=1 => {
                disk.is_full ^= true;
                if disk.is_full { "disks filled" } else { "disks freed" }
            }
            2 => {
                disk.is_read_only ^= true;
                if disk.is_read_only { "disks read-only" } else { "disks writable again" }
            }
            3 => {
                disk.files.clear();
                "disk directories emptied"
            }
            4..=6 => {
                self.mounts.insert(path.clone(), None);
                self.end_replicas_on(&id, random);
                "disks pulled"
            }
            _ => return,
        };
        self.happens(what, about);
    }

    /// The disk that belongs there, another one that is nowhere, or a new one.
    fn mount_something(&mut self, path: &str, random: &mut StdRng) {
        let free: Vec<String> = self.disks.keys().filter(|id| self.path_of(id).is_none()).cloned().collect();
        let known = self.known_at(path);
        let (what, id) = match (random.random_range(0..10), known) {
            (0..=5, Some(known)) if free.contains(&known) => ("disks returned", known),
            (6..=7, _) => match any(&free, random) {
                Some(id) => ("disks returned elsewhere", id.clone()),
                None => return,
            },
            (8.., _) => {
                let number = self.disks.keys().filter(|id| id.starts_with("spare")).count();
                if number >= SPARE_DISKS {
                    return;
                }
                let id = format!("spare{number}");
                self.disks.insert(id.clone(), Disk { capacity: 100 * GIB, ..Default::default() });
                ("disks returned with another UUID", id)
            }
            _ => return,
        };
        self.happens(what, format!("{id} at {path}"));
        self.mounts.insert(path.to_owned(), Some(id));
    }

    /// The disk that a node reported at this path.
    pub fn known_at(&self, path: &str) -> Option<String> {
        let node = self.nodes.get(node_of_path(path))?;
        let disk = path.rsplit('/').next().unwrap_or_default();
        node.spec.disks.get(disk)?;
        let status = node.status.as_ref()?.disk_status.get(disk)?;
        Some(status.disk_uuid.clone()).filter(|id| !id.is_empty())
    }
}

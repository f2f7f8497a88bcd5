//! Disks, agents and data sources.

use std::collections::BTreeMap;

use api::image::CopyState;
use api::manager::FileInfo;
use planner::data_source::Report;
use planner::workload::{State, Wish, Workload};
use rand::Rng;
use rand::rngs::StdRng;

use crate::world::{GIB, World};

/// One disk: its whole files, and what its agent knows.
#[derive(Clone, Debug, Default)]
pub struct Disk {
    /// Image name → uuid of the whole copies that lie there.
    pub whole: BTreeMap<String, String>,
    /// What the present life of the agent knows.
    pub known: BTreeMap<String, FileInfo>,
    /// What data sources made, by image: handed over by rename.
    pub made: BTreeMap<String, (String, Report)>,
}

pub fn whole_file(uuid: &str) -> FileInfo {
    FileInfo {
        uuid: uuid.into(),
        size: GIB,
        virtual_size: GIB,
        real_size: GIB,
        state: CopyState::Ready,
        current_checksum: "c0ffee".into(),
        progress: 100,
        format: "raw".into(),
        ..Default::default()
    }
}

impl World {
    pub fn ensure_workload(&mut self, wish: &Wish) {
        if self.workloads.contains_key(&wish.name) {
            return;
        }
        let state = if self.answers(&wish.node) { State::Running } else { State::Starting(String::new()) };
        let workload = Workload { wish: wish.clone(), state, ip: format!("ip-{}", wish.name), is_outdated: false };
        let disk = disk_of(wish);
        if let Some(disk) = self.disks.get_mut(&disk) {
            match wish.name.strip_prefix("backing-image-ds-") {
                Some(image) => drop(disk.made.insert(
                    image.into(),
                    (uuid_of(wish), Report { state: CopyState::Starting, ..Default::default() }),
                )),
                None => disk.known.clear(),
            }
        }
        self.workloads.insert(wish.name.clone(), workload);
    }

    /// Time goes on for all processes on nodes that answer: sources and syncs end, well or not.
    pub fn work_on_files(&mut self, random: &mut StdRng) {
        let names: Vec<String> = self.workloads.keys().cloned().collect();
        for name in names {
            let workload = self.workloads[&name].clone();
            if !self.answers(&workload.wish.node) {
                continue;
            }
            if matches!(workload.state, State::Starting(_)) {
                self.workloads.get_mut(&name).expect("it is there").state = State::Running;
            }
            let fails = self.faults && random.random_bool(0.2);
            let id = disk_of(&workload.wish);
            let is_whole_elsewhere = |i: &str, u: &str| {
                self.disks.iter().any(|(d, disk)| *d != id && disk.whole.get(i).is_some_and(|w| w == u))
            };
            let can_sync: BTreeMap<String, bool> =
                self.disks[&id].known.iter().map(|(i, f)| (i.clone(), is_whole_elsewhere(i, &f.uuid))).collect();
            let disk = self.disks.get_mut(&id).expect("disks stay");
            if let Some(image) = name.strip_prefix("backing-image-ds-") {
                if let Some((_, report)) = disk.made.get_mut(image).filter(|(_, r)| r.state == CopyState::Starting) {
                    *report = if fails {
                        Report { state: CopyState::Failed, message: "connection refused".into(), ..Default::default() }
                    } else {
                        Report {
                            state: CopyState::ReadyForTransfer,
                            size: GIB,
                            progress: 100,
                            checksum: "c0ffee".into(),
                            ..Default::default()
                        }
                    };
                }
                continue;
            }
            let working: Vec<String> =
                disk.known.iter().filter(|(_, f)| f.state == CopyState::InProgress).map(|(i, _)| i.clone()).collect();
            for image in working {
                let uuid = disk.known[&image].uuid.clone();
                let file = if fails || !can_sync[&image] {
                    FileInfo {
                        uuid,
                        state: CopyState::Failed,
                        message: "the peer went away".into(),
                        ..Default::default()
                    }
                } else {
                    disk.whole.insert(image.clone(), uuid.clone());
                    whole_file(&uuid)
                };
                disk.known.insert(image, file);
            }
        }
    }

    pub fn kill_workload(&mut self, random: &mut StdRng) {
        let names: Vec<String> = self.workloads.keys().cloned().collect();
        if names.is_empty() {
            return;
        }
        let name = &names[random.random_range(0..names.len())];
        self.workloads.get_mut(name).expect("it is there").state = State::Failed("killed by signal 9".into());
    }

    /// The agent of a disk removes a file. Invariant 2 holds in the end here, where bytes go.
    pub fn delete_file(&mut self, id: &str, image: &str) {
        let disk = self.disks.get_mut(id).expect("disks stay");
        disk.known.remove(image);
        disk.made.remove(image);
        let was_whole = disk.whole.remove(image).is_some();
        let uuid = self.images.get(image).and_then(|i| i.status.as_ref()).map(|s| s.uuid.clone()).unwrap_or_default();
        let in_use = self.volumes.values().any(|v| v.spec.backing_image == image) && !uuid.is_empty();
        let deleting = self
            .images
            .get(image)
            .is_none_or(|i| i.metadata.deletion_timestamp.is_some() && i.spec.disk_file_spec_map.is_empty());
        let rest = self.disks.values().any(|d| d.whole.get(image) == Some(&uuid));
        assert!(
            !was_whole || !in_use || deleting || rest,
            "invariant 2: the last ready copy of image {image} was removed from {id}"
        );
    }

    /// The agent takes a file over, or adopts what lies there; `None`: it refuses.
    pub fn fetch_file(&mut self, id: &str, image: &str, uuid: &str, from_source: bool) -> Option<()> {
        let disk = self.disks.get_mut(id)?;
        if from_source {
            let (_, report) =
                disk.made.get_mut(image).filter(|(u, r)| u == uuid && r.state == CopyState::ReadyForTransfer)?;
            report.state = CopyState::Ready;
            disk.whole.insert(image.into(), uuid.into());
        }
        let file = if disk.whole.get(image).is_some_and(|u| u == uuid) {
            whole_file(uuid)
        } else {
            FileInfo {
                uuid: uuid.into(),
                state: CopyState::Failed,
                message: "there is no such file".into(),
                ..Default::default()
            }
        };
        disk.known.insert(image.into(), file);
        Some(())
    }
}

pub fn disk_of(wish: &Wish) -> String {
    wish.labels.get(api::names::label::DISK_UUID).cloned().unwrap_or_default()
}

fn uuid_of(wish: &Wish) -> String {
    let at = wish.args.iter().position(|a| a == "--uuid");
    at.and_then(|at| wish.args.get(at + 1)).cloned().unwrap_or_default()
}

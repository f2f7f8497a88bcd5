//! The controller: passes over objects, with a crash possible after every action.

use api::image::CopyState;
use api::names::{FINALIZER, MANAGER_PORT, data_source_workload_name, manager_name};
use planner::workload::State;
use planner::{data_source, image, manager, volume};
use rand::Rng;
use rand::rngs::StdRng;

use crate::files::disk_of;
use crate::world::{IMAGES, VOLUMES, World, delete, kube_meta::Meta, remove_finalizer};

impl World {
    pub fn any_pass(&mut self, random: &mut StdRng) {
        let disks: Vec<String> = self.disks.keys().cloned().collect();
        match random.random_range(0..4) {
            0 => self.image_pass(IMAGES[random.random_range(0..IMAGES.len())], random),
            1 => self.source_pass(IMAGES[random.random_range(0..IMAGES.len())], random),
            2 => self.manager_pass(&disks[random.random_range(0..disks.len())].clone(), random),
            _ => self.volume_pass(VOLUMES[random.random_range(0..VOLUMES.len())], random),
        }
    }

    /// Everybody once.
    pub fn round(&mut self, random: &mut StdRng) {
        for image in IMAGES {
            self.image_pass(image, random);
            self.source_pass(image, random);
        }
        for disk in self.disks.keys().cloned().collect::<Vec<_>>() {
            self.manager_pass(&disk, random);
        }
        for volume in VOLUMES {
            self.volume_pass(volume, random);
        }
        for node in self.nodes.keys().cloned().collect::<Vec<_>>() {
            self.instance(&node, random);
        }
        self.work_on_files(random);
    }

    /// Whether the controller dies right after this action.
    fn crashes(&mut self, random: &mut StdRng) -> bool {
        self.summary.actions += 1;
        let crashes = self.faults && random.random_bool(0.05);
        if crashes {
            self.crash_controller();
        }
        crashes
    }

    fn image_pass(&mut self, name: &str, random: &mut StdRng) {
        let Some(object) = self.images.get(name).cloned() else { return };
        let (replicas, images): (Vec<_>, Vec<_>) =
            (self.replicas.values().cloned().collect(), self.images.values().cloned().collect());
        let observed = image::Observed {
            now: self.now,
            random: random.random(),
            data_source: self.sources.get(name).cloned(),
            managers: self.managers.values().cloned().collect(),
            loads: planner::disk::loads(&replicas, &images),
            replicas: replicas.into_iter().filter(|r| r.spec.backing_image == name).collect(),
            volumes: self
                .volumes
                .iter()
                .filter(|(_, v)| v.spec.backing_image == name)
                .map(|(n, _)| n.clone())
                .collect(),
            disks: self.disks(),
            settings: Default::default(),
            image: object,
        };
        let decision = image::decide(&observed);
        self.images.get_mut(name).expect("it is there").status = Some(decision.status.clone());
        for action in decision.actions {
            match action {
                image::Action::AddFinalizer => add_finalizer(self.images.get_mut(name)),
                image::Action::SetCopies(map) => {
                    let image = self.images.get_mut(name).expect("it is there");
                    let states = &decision.status.disk_file_status_map;
                    let is_silent = |d: &String| states.get(d).is_some_and(|f| f.state == CopyState::Unknown);
                    let removed = image.spec.disk_file_spec_map.keys().find(|d| !map.contains_key(*d) && is_silent(d));
                    // Only the user's own deletion reaches silent disks; it waits for them.
                    let deleting = image.metadata.deletion_timestamp.is_some();
                    assert!(
                        deleting || removed.is_none(),
                        "invariant 6: a silent copy of {name} is removed: {removed:?}"
                    );
                    image.spec.disk_file_spec_map = map;
                }
                image::Action::CreateDataSource(source) => drop(self.sources.entry(name.into()).or_insert(*source)),
                image::Action::SetDataSourceSpec(spec) => {
                    if let Some(source) = self.sources.get_mut(name) {
                        source.spec = *spec;
                    }
                }
                image::Action::DeleteDataSource => delete(&mut self.sources, name, self.now),
                image::Action::RemoveFinalizer => {
                    // What lies on a disk that is away is remembered by its manager.
                    let is_remembered = |disk: &String| {
                        let mut managers = self.managers.values().filter(|m| m.spec.disk_uuid == *disk);
                        managers.any(|m| m.spec.backing_images.contains_key(name))
                    };
                    let holding = self.disks.iter().filter(|(_, d)| d.whole.contains_key(name)).map(|(d, _)| d);
                    let left: Vec<_> = holding.filter(|d| !is_remembered(d)).collect();
                    assert!(left.is_empty(), "image {name} goes and leaves files on {left:?}");
                    remove_finalizer(&mut self.images, name);
                }
            }
            if self.crashes(random) {
                return;
            }
        }
    }

    fn source_pass(&mut self, name: &str, random: &mut StdRng) {
        let Some(source) = self.sources.get(name).cloned() else { return };
        let workload_name = data_source_workload_name(&name.parse().expect("a name"));
        let mut workload = self.workloads.get(&workload_name).cloned();
        let mut report = None;
        if let Some(workload) = &mut workload {
            if !self.answers(&workload.wish.node) {
                workload.state = State::Unknown("silent".into());
            } else if workload.state == State::Running {
                let made = self.disks.get(&disk_of(&workload.wish)).and_then(|d| d.made.get(name));
                report = Some(made.map(|(_, r)| r.clone()).ok_or_else(|| "no answer".to_owned()));
            }
        }
        let manager = self.managers.get(&manager_name(&source.spec.disk_uuid.parse().expect("a disk")));
        let files = manager.and_then(|m| m.status.clone()).unwrap_or_default().backing_image_file_map;
        let taken_over = files.get(name).filter(|f| f.uuid == source.spec.uuid).map(|f| f.state);
        let observed =
            data_source::Observed { now: self.now, disks: self.disks(), workload, report, taken_over, source };
        let decision = data_source::decide(&observed);
        self.sources.get_mut(name).expect("it is there").status = Some(decision.status);
        for action in decision.actions {
            match action {
                data_source::Action::EnsureWorkload(wish) => self.ensure_workload(&wish),
                data_source::Action::RemoveWorkload(workload) => drop(self.workloads.remove(&workload)),
                data_source::Action::RemoveFinalizer => remove_finalizer(&mut self.sources, name),
            }
            if self.crashes(random) {
                return;
            }
        }
    }

    fn manager_pass(&mut self, id: &str, random: &mut StdRng) {
        let name = manager_name(&id.parse().expect("a disk"));
        let mut workload = self.workloads.get(&name).cloned();
        let mut agent = None;
        if let Some(workload) = &mut workload {
            if !self.answers(&workload.wish.node) {
                workload.state = State::Unknown("silent".into());
            } else if workload.state == State::Running {
                agent = Some(Ok(manager::Agent {
                    api_version: 3,
                    api_min_version: 3,
                    files: self.disks[id]
                        .known
                        .iter()
                        .map(|(name, file)| api::manager::FileInfo { name: name.clone(), ..file.clone() })
                        .collect(),
                }));
            }
        }
        let mut peers = std::collections::BTreeMap::<String, Vec<String>>::new();
        for other in self.managers.values().filter(|m| m.spec.disk_uuid != id) {
            let status = other.status.clone().unwrap_or_default();
            for (image, file) in status.backing_image_file_map.iter().filter(|(_, f)| f.state == CopyState::Ready) {
                let is_same =
                    self.images.get(image).and_then(|i| i.status.as_ref()).is_some_and(|s| s.uuid == file.uuid);
                if is_same {
                    peers.entry(image.clone()).or_default().push(format!("{}:{MANAGER_PORT}", other.spec.disk_uuid));
                }
            }
        }
        let observed = manager::Observed {
            now: self.now,
            name: name.clone(),
            disk_id: id.to_owned(),
            disks: self.disks(),
            manager: self.managers.get(&name).cloned(),
            workload,
            agent,
            images: self.images.values().cloned().collect(),
            data_sources: self.sources.clone(),
            peers,
            scrub_interval: std::time::Duration::ZERO,
            memory: self.manager_memory.get(&name).cloned().unwrap_or_default(),
        };
        let decision = manager::decide(&observed);
        self.manager_memory.insert(name.clone(), decision.memory);
        if let Some(manager) = self.managers.get_mut(&name) {
            manager.status = Some(decision.status);
        }
        for action in decision.actions {
            match action {
                manager::Action::Create(manager) => drop(self.managers.entry(name.clone()).or_insert(*manager)),
                manager::Action::SetSpec(spec) => self.managers.get_mut(&name).expect("it is there").spec = *spec,
                manager::Action::EnsureWorkload(wish) => self.ensure_workload(&wish),
                manager::Action::RemoveWorkload => drop(self.workloads.remove(&name)),
                manager::Action::DeleteFile { image, .. } => self.delete_file(id, &image),
                manager::Action::FetchFile { file, from } => {
                    if self.fetch_file(id, &file.image, &file.uuid, from.is_some()).is_none() {
                        let attempt =
                            self.manager_memory.entry(name.clone()).or_default().copies.entry(file.image).or_default();
                        attempt.retry = attempt.retry.failed(self.now, "refused");
                        attempt.is_running = false;
                        return;
                    }
                }
                manager::Action::SyncFile { file, .. } => {
                    let info =
                        api::manager::FileInfo { uuid: file.uuid, state: CopyState::InProgress, ..Default::default() };
                    self.disks.get_mut(id).expect("disks stay").known.insert(file.image, info);
                }
                // Reading changes nothing here.
                manager::Action::VerifyFile { .. } => {}
                manager::Action::Remove => {
                    delete(&mut self.managers, &name, self.now);
                    remove_finalizer(&mut self.managers, &name);
                }
            }
            if self.crashes(random) {
                return;
            }
        }
    }

    fn volume_pass(&mut self, name: &str, random: &mut StdRng) {
        let Some(object) = self.volumes.get(name).cloned() else { return };
        let (replicas, images): (Vec<_>, Vec<_>) =
            (self.replicas.values().cloned().collect(), self.images.values().cloned().collect());
        let silent_since = self.nodes.iter().filter_map(|(n, node)| {
            let ready = api::condition::find(&node.status.as_ref()?.conditions, "Ready").filter(|c| !c.is_true())?;
            Some((n.clone(), planner::retry::parse(&ready.last_transition_time)?))
        });
        let observed = volume::Observed {
            now: self.now,
            random: random.random(),
            engine: self.engines.get(&api::names::engine_name(name)).cloned(),
            image: self.images.get(&object.spec.backing_image).cloned(),
            loads: planner::disk::loads(&replicas, &images),
            replicas: replicas.into_iter().filter(|r| r.spec.volume_name == name).collect(),
            disks: self.disks(),
            silent_since: silent_since.collect(),
            settings: Default::default(),
            restart: self.restarts.get(name).cloned().unwrap_or_default(),
            volume: object,
        };
        let decision = volume::decide(&observed);
        self.restarts.insert(name.into(), decision.restart);
        self.volumes.get_mut(name).expect("it is there").status = Some(decision.status);
        let engine = api::names::engine_name(name);
        for action in decision.actions {
            match action {
                volume::Action::AddFinalizer => add_finalizer(self.volumes.get_mut(name)),
                volume::Action::CreateEngine(new) => drop(self.engines.entry(engine.clone()).or_insert(*new)),
                volume::Action::CreateReplica(new) => {
                    let key = new.metadata.name.clone().expect("a name");
                    self.replicas.entry(key).or_insert(*new);
                }
                volume::Action::SetReplicaSpec { name, spec } => {
                    self.replicas.get_mut(&name).expect("it is there").spec = *spec
                }
                volume::Action::SetEngineSpec(spec) => self.engines.get_mut(&engine).expect("it is there").spec = *spec,
                volume::Action::DeleteEngine => delete(&mut self.engines, &engine, self.now),
                volume::Action::DeleteReplica(replica) => delete(&mut self.replicas, &replica, self.now),
                volume::Action::ForgetEngine => remove_finalizer(&mut self.engines, &engine),
                volume::Action::ForgetReplica(replica) => remove_finalizer(&mut self.replicas, &replica),
                volume::Action::RemoveFinalizer => {
                    assert!(!self.engine_processes.contains_key(name), "volume {name} goes and leaves an engine");
                    self.acknowledged.remove(name);
                    remove_finalizer(&mut self.volumes, name);
                }
            }
            if self.crashes(random) {
                return;
            }
        }
    }
}

fn add_finalizer<T: Meta>(object: Option<&mut T>) {
    if let Some(object) = object {
        object.meta_mut().finalizers = Some(vec![FINALIZER.into()]);
    }
}

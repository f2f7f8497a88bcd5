//! The controller: passes over objects, with a crash possible before and after every action.

use std::collections::BTreeMap;
use std::time::Duration;

use api::image::CopyState;
use api::manager::ManagerState;
use api::names::{FINALIZER, MANAGER_PORT, data_source_workload_name, manager_name};
use planner::manager::orphans::Remains;
use planner::retry::sooner;
use planner::{data_source, image, manager, volume};
use rand::Rng;
use rand::rngs::StdRng;

use crate::any;
use crate::world::{IMAGES, VOLUMES, World, delete, kube_meta::Meta, remove_finalizer};

impl World {
    pub fn any_pass(&mut self, random: &mut StdRng) {
        match random.random_range(0..4) {
            0 => self.image_pass(IMAGES[random.random_range(0..IMAGES.len())], random),
            1 => self.source_pass(IMAGES[random.random_range(0..IMAGES.len())], random),
            2 => {
                let disks: Vec<String> = self.disks.keys().cloned().collect();
                any(&disks, random).into_iter().for_each(|disk| self.manager_pass(disk, random));
            }
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

    /// Whether the controller dies now, before it writes what it decided.
    fn dies(&mut self, random: &mut StdRng) -> bool {
        self.dies_at(0.005, random)
    }

    fn dies_at(&mut self, odds: f64, random: &mut StdRng) -> bool {
        let dies = self.faults && random.random_bool(odds);
        if dies {
            self.crash_controller();
        }
        dies
    }

    /// Whether the controller dies right after this action.
    fn crashes(&mut self, what: &Option<String>, random: &mut StdRng) -> bool {
        self.actions += 1;
        if let Some(what) = what {
            println!("{} ACTION {what}", self.now);
        }
        self.dies_at(0.05, random)
    }

    fn looks_again(&mut self, after: Option<Duration>) {
        self.recheck = sooner(self.recheck, after);
    }

    fn image_pass(&mut self, name: &str, random: &mut StdRng) {
        let Some(object) = self.images.get(name).cloned() else { return };
        let (replicas, images): (Vec<_>, Vec<_>) =
            (self.replicas.values().cloned().collect(), self.images.values().cloned().collect());
        let sources: Vec<_> = self.sources.values().cloned().collect();
        let observed = image::Observed {
            now: self.now,
            random: random.random(),
            data_source: self.sources.get(name).cloned(),
            managers: self.managers.values().cloned().collect(),
            loads: planner::disk::loads(&replicas, &images),
            making: image::making_of_others(name, &images, &sources, &replicas, &self.disks()),
            replicas: replicas.into_iter().filter(|r| r.spec.backing_image == name).collect(),
            volumes: self
                .volumes
                .iter()
                .filter(|(_, v)| v.spec.backing_image == name)
                .map(|(n, _)| n.clone())
                .collect(),
            disks: self.disks(),
            settings: self.settings.clone(),
            image: object,
        };
        let decision = image::decide(&observed);
        self.judge_image(name, &observed, &decision);
        if self.dies(random) {
            return;
        }
        self.looks_again(decision.recheck_after);
        self.images.get_mut(name).expect("it is there").status = Some(decision.status);
        self.remember_gone(name, &observed);
        for action in decision.actions {
            let said = self.told.then(|| match &action {
                image::Action::SetCopies(map) => format!("image {name}: SetCopies {:?}", map.keys()),
                other => format!("image {name}: {other:?}"),
            });
            match action {
                image::Action::AddFinalizer => add_finalizer(self.images.get_mut(name)),
                image::Action::SetCopies(map) => {
                    self.license(name, &observed, &map);
                    self.images.get_mut(name).expect("it is there").spec.disk_file_spec_map = map;
                }
                image::Action::CreateDataSource(source) => drop(self.sources.entry(name.into()).or_insert(*source)),
                image::Action::SetDataSourceSpec(spec) => self.move_source(name, *spec),
                image::Action::DeleteDataSource => delete(&mut self.sources, name, self.now),
                image::Action::RemoveFinalizer => {
                    self.judge_end_of_image(name);
                    remove_finalizer(&mut self.images, name);
                }
            }
            if self.crashes(&said, random) {
                return;
            }
        }
    }

    fn source_pass(&mut self, name: &str, random: &mut StdRng) {
        let Some(source) = self.sources.get(name).cloned() else { return };
        let workload_name = data_source_workload_name(&name.parse().expect("a name"));
        let workload = self.seen(&workload_name);
        let key = (name.to_owned(), source.spec.uuid.clone());
        let report = workload.as_ref().and_then(|w| self.ask_source(&key, w));
        let manager = self.managers.get(&manager_name(&source.spec.disk_uuid.parse().expect("a disk")));
        let files = manager.and_then(|m| m.status.clone()).unwrap_or_default().backing_image_file_map;
        let taken_over = files.get(name).filter(|f| f.uuid == source.spec.uuid).map(|f| f.state);
        let observed = data_source::Observed {
            now: self.now,
            disks: self.disks(),
            workload,
            report,
            met_silence_at: self.source_silence.get(name).copied(),
            taken_over,
            is_missed: self.is_missed(name, &source.spec.disk_uuid),
            allowed_sources: self.settings.allowed_sources.clone(),
            bandwidth_limit: data_source::bandwidth_limit(self.settings.bandwidth_limit, self.images.get(name)),
            source,
        };
        let decision = data_source::decide(&observed);
        self.judge_conditions("data source", name, &decision.status.conditions);
        self.source_silence.remove(name);
        if !decision.status.silent_since.is_empty() {
            self.source_silence.insert(name.to_owned(), self.now);
        }
        if self.dies(random) {
            return;
        }
        self.looks_again(decision.recheck_after);
        self.sources.get_mut(name).expect("it is there").status = Some(decision.status);
        for action in decision.actions {
            let said = self.told.then(|| format!("source {name}: {action:?}"));
            match action {
                data_source::Action::EnsureWorkload(wish) => self.ensure_workload(&wish),
                data_source::Action::RemoveWorkload(workload) => drop(self.workloads.remove(&workload)),
                // The sources of this world cannot be told.
                data_source::Action::LimitBandwidth(_) => {}
                data_source::Action::RemoveFinalizer => remove_finalizer(&mut self.sources, name),
            }
            if self.crashes(&said, random) {
                return;
            }
        }
    }

    fn is_missed(&self, image: &str, disk: &str) -> bool {
        let memory = self.manager_memory.get(&manager_name(&disk.parse().expect("a disk")));
        memory.and_then(|memory| memory.copies.get(image)).is_some_and(manager::Attempt::misses_the_prepared_file)
    }

    /// Image name → addresses of the other agents that have a ready copy of it; as in `controller/src/manager.rs`.
    fn peers(&self, id: &str) -> BTreeMap<String, Vec<String>> {
        let mut peers = BTreeMap::<String, Vec<String>>::new();
        for other in self.managers.values().filter(|m| m.spec.disk_uuid != id) {
            let Some(status) = other.status.as_ref().filter(|s| s.current_state == ManagerState::Running) else {
                continue;
            };
            for (name, image) in &self.images {
                let Some(known) = &image.status else { continue };
                let copy = known.disk_file_status_map.get(&other.spec.disk_uuid);
                let file = status.backing_image_file_map.get(name);
                if copy.is_none_or(|f| f.state == CopyState::Ready)
                    && file.is_some_and(|f| f.uuid == known.uuid && f.state == CopyState::Ready)
                {
                    peers.entry(name.clone()).or_default().push(format!("{}:{MANAGER_PORT}", other.spec.disk_uuid));
                }
            }
        }
        peers
    }

    fn manager_pass(&mut self, id: &str, random: &mut StdRng) {
        let name = manager_name(&id.parse().expect("a disk"));
        let workload = self.seen(&name);
        let observed = manager::Observed {
            now: self.now,
            name: name.clone(),
            disk_id: id.to_owned(),
            disks: self.disks(),
            manager: self.managers.get(&name).cloned(),
            agent: workload.as_ref().and_then(|w| self.ask_agent(id, w)),
            workload,
            images: self.images.values().cloned().collect(),
            data_sources: self.sources.clone(),
            replicas: self.replicas.values().filter(|r| r.spec.disk_id == id).cloned().collect(),
            peers: self.peers(id),
            scrub_interval: self.settings.scrub_interval,
            removes_orphans: self.settings.removes_orphans,
            bandwidth_limit: self.settings.bandwidth_limit,
            memory: self.manager_memory.get(&name).cloned().unwrap_or_default(),
        };
        let decision = manager::decide(&observed);
        self.judge_conditions("manager", &name, &decision.status.conditions);
        if self.dies(random) {
            return;
        }
        self.looks_again(decision.recheck_after);
        self.manager_memory.insert(name.clone(), decision.memory);
        if let Some(manager) = self.managers.get_mut(&name) {
            manager.status = Some(decision.status);
        }
        for action in decision.actions {
            if let manager::Action::VerifyFile { image, uuid, requested_at, .. } = action {
                // Reading changes nothing, so it is no step of the plan.
                self.tally.add("readings of a copy", 1);
                self.disks.get_mut(id).expect("disks stay").readings.insert((image, uuid), requested_at);
                continue;
            }
            if let manager::Action::LimitBandwidth(wish) = action {
                self.tally.add("limits of bandwidth told", 1);
                self.disks.get_mut(id).expect("disks stay").bandwidth = wish;
                continue;
            }
            let said = self.told.then(|| format!("manager {id}: {action:?}"));
            if let Err((image, why)) = self.act_on_disk(id, &name, action) {
                if self.told {
                    println!("{} REFUSED {said:?}: {why}", self.now);
                }
                // As `controller/src/manager.rs` does: the copy has failed, or the whole pass is tried again.
                if let Some(image) = image {
                    let attempt = self.manager_memory.entry(name).or_default().copies.entry(image).or_default();
                    attempt.retry = attempt.retry.failed(self.now, why);
                    attempt.is_running = false;
                    self.looks_again(Some(Duration::ZERO));
                }
                return;
            }
            if self.crashes(&said, random) {
                return;
            }
        }
    }

    fn act_on_disk(
        &mut self,
        id: &str,
        name: &str,
        action: manager::Action,
    ) -> Result<(), (Option<String>, &'static str)> {
        match action {
            manager::Action::Create(manager) => drop(self.managers.entry(name.to_owned()).or_insert(*manager)),
            manager::Action::SetSpec(spec) => self.managers.get_mut(name).expect("it is there").spec = *spec,
            manager::Action::EnsureWorkload(wish) => self.ensure_workload(&wish),
            manager::Action::RemoveWorkload => drop(self.workloads.remove(name)),
            manager::Action::DeleteFile { image, uuid } => {
                self.delete_file(id, &(image, uuid)).map_err(|why| (None, why))?;
            }
            manager::Action::ReplaceFile { image, uuid } => {
                let key = (image, uuid);
                let made = self.disks.get_mut(id).and_then(|disk| disk.made.remove(&key));
                self.delete_file(id, &key).map_err(|why| (None, why))?;
                self.disks.get_mut(id).expect("disks stay").made.extend(made.map(|made| (key, made)));
            }
            manager::Action::FetchFile { file, from } => {
                self.fetch_file(id, &file, from.is_some()).map_err(|why| (Some(file.image), why))?;
            }
            manager::Action::SyncFile { file, from } => self.sync_file(id, file, from),
            manager::Action::VerifyFile { .. } | manager::Action::LimitBandwidth(_) => {}
            manager::Action::RemoveOrphan { place, image, uuid, mark } => {
                let found = Remains { place, image, uuid, size: 0, mark, is_mixed: false };
                if let Err(why) = self.remove_orphan(id, &found) {
                    let memory = self.manager_memory.entry(name.to_owned()).or_default();
                    manager::orphans::refuse(&mut memory.orphans, &found.path(), self.now, why.to_owned());
                }
            }
            manager::Action::Remove => {
                self.tally.add("managers removed", 1);
                if self.disks().get(id).is_none() {
                    self.left_behind.insert(id.to_owned());
                }
                delete(&mut self.managers, name, self.now);
                remove_finalizer(&mut self.managers, name);
            }
        }
        Ok(())
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
            settings: self.settings.clone(),
            restart: self.restarts.get(name).cloned().unwrap_or_default(),
            volume: object,
        };
        let decision = volume::decide(&observed);
        self.judge_conditions("volume", name, &decision.status.conditions);
        if self.dies(random) {
            return;
        }
        self.looks_again(decision.recheck_after);
        self.restarts.insert(name.into(), decision.restart);
        self.volumes.get_mut(name).expect("it is there").status = Some(decision.status);
        let engine = api::names::engine_name(name);
        for action in decision.actions {
            let said = self.told.then(|| format!("volume {name}: {action:?}"));
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
            if self.crashes(&said, random) {
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

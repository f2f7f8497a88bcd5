//! The replicas of a volume get their places once, while it is blank.

use std::collections::BTreeSet;

use api::image::CopyState;
use api::names::condition::{BACKING_IMAGE_INCOMPATIBLE, READY};
use api::names::{FINALIZER, GROUP, VERSION, engine_name, label};
use api::replica::ReplicaSpec;
use api::{Condition, ConditionStatus, Engine, Replica};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};

use super::{Action, EngineSpec, Pass};
use crate::image::copies_held;
use crate::placement::{Base, Chosen, Request, Selectors, choose_for_replicas, mix};

impl Pass<'_> {
    fn volume_name(&self) -> &str {
        self.o.volume.metadata.name.as_deref().unwrap_or_default()
    }

    pub(super) fn wanted_replicas(&self) -> usize {
        let asked = self.o.volume.spec.number_of_replicas;
        (if asked == 0 { self.o.settings.replica_count } else { asked }).max(1) as usize
    }

    /// An image that does not fit can never be used; one that is missing may still come.
    pub(super) fn check_image(&mut self) {
        let name = &self.o.volume.spec.backing_image;
        if name.is_empty() {
            return;
        }
        let Some(image) = &self.o.image else {
            let wait =
                Condition::new(READY, ConditionStatus::False, "ImageNotFound", format!("there is no image {name}"));
            self.wait_for(wait.with_hint(format!("create the BackingImage {name}")));
            return;
        };
        let virtual_size = image.status.as_ref().map_or(0, |s| s.virtual_size);
        let size = self.o.volume.spec.size.0;
        if virtual_size > size {
            let message = format!("image {name} has a virtual size of {virtual_size} bytes, the volume only {size}");
            let condition = Condition::new(
                BACKING_IMAGE_INCOMPATIBLE,
                ConditionStatus::True,
                "BackingImageVirtualSizeTooLarge",
                message.clone(),
            )
            .with_hint(format!("detach it and expand it to at least {virtual_size} bytes, or create another one"));
            self.wait_for(
                Condition::new(READY, ConditionStatus::False, "BackingImageVirtualSizeTooLarge", message)
                    .with_hint(condition.hint.clone()),
            );
            self.incompatible = Some(condition);
        }
    }

    fn is_blank(&self) -> bool {
        let was_attached = self.engine.as_ref().is_some_and(|e| e.generation > 0 || !e.node_id.is_empty());
        let has_data =
            |r: &Replica| r.status.as_ref().is_some_and(|s| s.generation > 0) || !r.spec.failed_at.is_empty();
        !was_attached && !self.o.replicas.iter().any(has_data)
    }

    pub(super) fn place(&mut self) {
        let o = self.o;
        let wanted = self.wanted_replicas();
        let have = o.replicas.len();
        if o.engine.is_none() {
            let engine = self.new_engine();
            self.created.push(Action::CreateEngine(Box::new(engine)));
        }
        if have >= wanted || self.incompatible.is_some() {
            return;
        }
        if !self.is_blank() {
            let why =
                "a replica cannot be added to a volume that holds data (rebuilding is not offered by this version)";
            self.unplaced = Some(format!("{have} of {wanted} replicas have a place: {why}"));
            return;
        }
        let volume =
            Selectors { who: "the volume", node: &o.volume.spec.node_selector, disk: &o.volume.spec.disk_selector };
        let image = o.image.as_ref().map(|i| Selectors {
            who: "the image",
            node: &i.spec.node_selector,
            disk: &i.spec.disk_selector,
        });
        let selectors: Vec<Selectors<'_>> = std::iter::once(volume).chain(image).collect();
        let taken: BTreeSet<String> = o.replicas.iter().map(|r| r.spec.disk_id.clone()).collect();
        let status = o.image.as_ref().and_then(|i| i.status.clone()).unwrap_or_default();
        let preferred: BTreeSet<String> = status
            .disk_file_status_map
            .iter()
            .filter(|(_, f)| matches!(f.state, CopyState::Ready | CopyState::InProgress | CopyState::ReadyForTransfer))
            .map(|(d, _)| d.clone())
            .collect();
        let held = o.image.as_ref().map(copies_held).unwrap_or_default();
        let bytes = status.copy_bytes();
        let request = Request {
            disks: &o.disks,
            loads: &o.loads,
            settings: &o.settings,
            selectors: &selectors,
            taken: &taken,
            beside: &taken,
            bytes: o.volume.spec.size.0,
            random: o.random,
        };
        let base = Base { bytes, held: &held, preferred: &preferred };
        let choice = choose_for_replicas(&request, wanted - have, base);
        for chosen in &choice.chosen {
            let replica = self.new_replica(chosen);
            self.created.push(Action::CreateReplica(Box::new(replica)));
        }
        let placed = have + choice.chosen.len();
        if placed < wanted {
            self.unplaced = Some(format!("{placed} of {wanted} replicas have a place: {}", choice.reasons()));
            if placed == 0 {
                let why = self.unplaced.clone().unwrap_or_default();
                let wait = Condition::new(READY, ConditionStatus::False, "NoEligibleDisk", why);
                self.wait_for(wait.with_hint("add a disk, free space, or change the volume's selectors"));
            }
        }
    }

    fn metadata(&self, name: String) -> ObjectMeta {
        let owner = OwnerReference {
            api_version: format!("{GROUP}/{VERSION}"),
            kind: "Volume".into(),
            name: self.volume_name().into(),
            uid: self.o.volume.metadata.uid.clone().unwrap_or_default(),
            controller: Some(true),
            block_owner_deletion: Some(true),
        };
        ObjectMeta {
            name: Some(name),
            labels: Some([(label::LONGHORN_VOLUME.to_owned(), self.volume_name().to_owned())].into()),
            finalizers: Some(vec![FINALIZER.into()]),
            owner_references: Some(vec![owner]),
            ..Default::default()
        }
    }

    fn new_engine(&self) -> Engine {
        let spec = EngineSpec {
            volume_name: self.volume_name().into(),
            volume_size: self.o.volume.spec.size,
            frontend: self.o.volume.spec.frontend.clone(),
            data_engine: self.o.volume.spec.data_engine,
            ..Default::default()
        };
        Engine { metadata: self.metadata(engine_name(self.volume_name())), spec, status: None }
    }

    fn new_replica(&self, Chosen { disk, why }: &Chosen) -> Replica {
        let (disk_id, node) = (&disk.id, &disk.node);
        let volume = self.volume_name().to_owned();
        // The disk is part of the draw, so that two replicas of one pass differ.
        let id = format!("{:08x}", mix(self.o.random, &format!("{volume}/{disk_id}")) as u32);
        let name = format!("{volume}-r-{id}");
        let mut metadata = self.metadata(name);
        let labels = metadata.labels.get_or_insert_default();
        labels.insert(label::LONGHORN_NODE.into(), node.into());
        labels.insert(label::LONGHORN_DISK_UUID.into(), disk_id.into());
        if !self.o.volume.spec.backing_image.is_empty() {
            labels.insert(label::BACKING_IMAGE.into(), self.o.volume.spec.backing_image.clone());
        }
        let spec = ReplicaSpec {
            engine_name: engine_name(&volume),
            data_directory_name: format!("{volume}-{id}"),
            volume_name: volume,
            volume_size: self.o.volume.spec.size,
            node_id: node.into(),
            disk_id: disk_id.into(),
            disk_path: disk.path.clone(),
            place_reason: why.clone(),
            backing_image: self.o.volume.spec.backing_image.clone(),
            data_engine: self.o.volume.spec.data_engine,
            ..Default::default()
        };
        Replica { metadata, spec, status: None }
    }
}

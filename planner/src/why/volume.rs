//! Claims, volumes, engines and replicas.

use std::collections::BTreeMap;

use api::Replica;
use api::engine::{DesireState, InstanceState, ReplicaMode};
use api::names::{condition as types, engine_name};
use api::volume::{Robustness, VolumeState};
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use super::{Story, sentence_end, sentence_stop};

impl Story<'_> {
    pub(super) fn claim(&mut self, namespace: &str, name: &str) -> bool {
        let found = |c: &&PersistentVolumeClaim| {
            c.metadata.name.as_deref() == Some(name) && c.metadata.namespace.as_deref() == Some(namespace)
        };
        let Some(claim) = self.world.claims.iter().find(found) else { return false };
        let status = claim.status.clone().unwrap_or_default();
        let volume = claim.spec.as_ref().and_then(|s| s.volume_name.clone()).filter(|v| !v.is_empty());
        let phase = status.phase.as_deref().unwrap_or("Pending").to_lowercase();
        if claim.metadata.deletion_timestamp.is_some() {
            self.say(format!("Claim `{namespace}/{name}` is being deleted."));
            let pv = volume.clone().unwrap_or_default();
            let used = |a: &&k8s_openapi::api::storage::v1::VolumeAttachment| {
                a.spec.source.persistent_volume_name.as_deref() == Some(pv.as_str())
            };
            // The claim's own condition may say it already, with the next attempt.
            let is_said = status.conditions.iter().flatten().any(|c| c.status == "False");
            if let Some(attachment) = self.world.attachments.iter().find(used).filter(|_| !is_said) {
                let node = attachment.spec.node_name.clone();
                self.below(|s| {
                    s.say(format!(
                        "Its volume is attached to `{node}`. You can: `volume detach {name} -n {namespace}`."
                    ));
                });
            }
        } else {
            let to = volume.as_ref().map(|v| format!(" to `{v}`")).unwrap_or_default();
            self.say(format!("Claim `{namespace}/{name}` is {phase}{to}."));
        }
        self.below(|s| {
            for condition in status.conditions.iter().flatten().filter(|c| c.status == "False") {
                let mut text = sentence_end(condition.message.as_deref().unwrap_or_default());
                let since = condition.last_transition_time.as_ref().map(|t| t.0.to_string());
                if let Some(since) = since.and_then(|t| s.ago(&t)) {
                    text += &format!(" Since {since}.");
                }
                s.say(text);
            }
            s.growth(claim);
            match volume {
                Some(pv) => {
                    let found = s.world.persistent_volumes.iter().find(|v| v.metadata.name.as_ref() == Some(&pv));
                    let source = found.and_then(|v| v.spec.as_ref()?.csi.as_ref());
                    let handle = source.map_or(pv.as_str(), |c| c.volume_handle.as_str());
                    if !s.volume(handle) {
                        s.say(format!("Volume `{handle}` does not exist."));
                    }
                }
                None => s.unbound(claim),
            }
        });
        true
    }

    /// What a claim waits for that asks for more than it has.
    fn growth(&mut self, claim: &PersistentVolumeClaim) {
        let storage =
            |map: Option<&BTreeMap<String, Quantity>>| map.and_then(|m| m.get("storage")).map(|q| q.0.clone());
        let resources = claim.spec.as_ref().and_then(|s| s.resources.as_ref());
        let asks = storage(resources.and_then(|r| r.requests.as_ref())).unwrap_or_default();
        let has = storage(claim.status.as_ref().and_then(|s| s.capacity.as_ref())).unwrap_or_default();
        let conditions = claim.status.iter().flat_map(|s| s.conditions.iter().flatten());
        // Kubernetes' own, which are true while somebody waits.
        let waits = conditions.filter(|c| c.status == "True");
        for wait in waits.filter(|c| matches!(c.type_.as_str(), "Resizing" | "FileSystemResizePending")) {
            let why = sentence_end(wait.message.as_deref().unwrap_or_default());
            self.say(format!("It asks for {asks} and has {has}. {why}"));
        }
    }

    /// What an unbound claim waits for, as far as its class tells.
    fn unbound(&mut self, claim: &PersistentVolumeClaim) {
        let class = claim.spec.as_ref().and_then(|s| s.storage_class_name.clone()).unwrap_or_default();
        if class.is_empty() {
            return;
        }
        let found = self.world.classes.iter().find(|c| c.metadata.name.as_ref() == Some(&class));
        let Some(found) = found else {
            self.say(format!("StorageClass `{class}` does not exist. You can: apply it."));
            return;
        };
        let conditions = claim.status.as_ref().and_then(|s| s.conditions.as_ref());
        let is_said = conditions.into_iter().flatten().any(|c| c.status == "False");
        if found.volume_binding_mode.as_deref() == Some("WaitForFirstConsumer") && !is_said {
            self.say("It is bound when it is first attached (volumeBindingMode WaitForFirstConsumer).");
        }
        let parameters = found.parameters.clone().unwrap_or_default();
        let image = parameters.get("backingImage").or_else(|| parameters.get("backingImageName"));
        if let Some(image) = image.filter(|i| !i.is_empty()) {
            self.image(image);
        }
    }

    pub(super) fn volume(&mut self, name: &str) -> bool {
        let Some(volume) = self.world.volumes.iter().find(|v| v.metadata.name.as_deref() == Some(name)) else {
            return false;
        };
        let status = volume.status.clone().unwrap_or_default();
        let spec = volume.spec.clone();
        let state = match (&status.state, volume.metadata.deletion_timestamp.is_some()) {
            (_, true) => "being deleted".into(),
            (VolumeState::Attached, _) => format!("attached to `{}`", status.current_node_id),
            (VolumeState::Attaching, _) => format!("being attached to `{}`", spec.node_id),
            (VolumeState::Detaching, _) => "being detached".into(),
            (VolumeState::Detached, _) => "detached".into(),
            (VolumeState::Deleting, _) => "being deleted".into(),
            (VolumeState::NotStarted | VolumeState::Creating, _) => "being created".to_owned(),
        };
        let mut own: Vec<_> = self.world.replicas.iter().filter(|r| r.spec.volume_name == name).cloned().collect();
        own.sort_by(|a, b| a.metadata.name.cmp(&b.metadata.name));
        let good = own.iter().filter(|r| r.spec.failed_at.is_empty()).count();
        let ready = status.conditions.iter().find(|c| c.r#type == types::READY);
        let lost = ready.is_some_and(|ready| ready.reason == crate::volume::ENGINE_LOST);
        let robustness = match status.robustness {
            Robustness::Healthy => ", healthy",
            Robustness::Degraded => ", degraded",
            Robustness::Faulted if lost => ", faulted (its device fails; the data is untouched)",
            Robustness::Faulted => ", faulted (no usable replica; the data is untouched)",
            Robustness::Unknown => "",
        };
        self.say(format!(
            "Volume `{name}` is {state}{robustness}: {good} of {} replicas are good.",
            spec.number_of_replicas
        ));
        let wished = !spec.node_id.is_empty();
        self.below(|s| {
            let kept = wished && volume.metadata.deletion_timestamp.is_none();
            // Not being detached is no problem of a volume that shall be attached.
            let relevant = status.conditions.iter().filter(|c| !(kept && c.r#type == types::DETACHED));
            s.problems(&relevant.cloned().collect::<Vec<_>>());
            if wished && status.state != VolumeState::Attached || status.robustness == Robustness::Faulted {
                s.engine(&engine_name(name));
            }
            for replica in &own {
                let state = replica.status.as_ref().map(|r| r.current_state).unwrap_or_default();
                let late = replica.spec.desire_state == DesireState::Running && state != InstanceState::Running;
                if !replica.spec.failed_at.is_empty() || late {
                    s.replica(replica.metadata.name.as_deref().unwrap_or_default());
                }
            }
            own.iter().for_each(|replica| s.why_there(replica));
            if !spec.backing_image.is_empty() && status.state != VolumeState::Attached {
                let ready = s
                    .world
                    .images
                    .iter()
                    .any(|i| i.metadata.name.as_ref() == Some(&spec.backing_image) && super::image::is_ready(i));
                if (wished || !ready) && !s.image(&spec.backing_image) {
                    s.say(format!(
                        "Image `{0}` does not exist. You can: create it, e.g. `image create {0} --url …`.",
                        spec.backing_image
                    ));
                }
            }
            s.clocks();
        });
        true
    }

    pub(super) fn engine(&mut self, name: &str) -> bool {
        let Some(engine) = self.world.engines.iter().find(|e| e.metadata.name.as_deref() == Some(name)) else {
            return false;
        };
        let status = engine.status.clone().unwrap_or_default();
        let wished = if engine.spec.desire_state == DesireState::Running { "shall run" } else { "shall be stopped" };
        let place =
            if engine.spec.node_id.is_empty() { String::new() } else { format!(" on `{}`", engine.spec.node_id) };
        self.say(format!("Engine `{name}` {wished}{place} and is {}.", state_word(status.current_state)));
        self.below(|s| {
            // An engine that shall run is rightly not detached.
            let runs = engine.spec.desire_state == DesireState::Running;
            let relevant = status.conditions.iter().filter(|c| !(runs && c.r#type == types::DETACHED));
            if runs && !status.version.is_empty() {
                s.say(format!("It runs version {}.", status.version));
            }
            s.problems(&relevant.cloned().collect::<Vec<_>>());
            for (replica, mode) in &status.replica_mode_map {
                let text = status.replica_errors.get(replica).map(String::as_str).unwrap_or("no reason is known");
                match mode {
                    ReplicaMode::Err => s.say(format!("It dropped replica `{replica}`: {text}")),
                    ReplicaMode::Wo => {
                        s.say(format!("It compares replica `{replica}` with the others before it reads from it."))
                    }
                    ReplicaMode::Rw => {}
                }
            }
        });
        true
    }

    pub(super) fn replica(&mut self, name: &str) -> bool {
        let Some(replica) = self.world.replicas.iter().find(|r| r.metadata.name.as_deref() == Some(name)) else {
            return false;
        };
        let (spec, status) = (replica.spec.clone(), replica.status.clone().unwrap_or_default());
        let place = self.place_of(&spec.disk_id);
        let running = spec.desire_state == DesireState::Running;
        if spec.failed_at.is_empty() {
            self.say(format!("Replica `{name}` on {place} is {}.", state_word(status.current_state)));
        } else {
            let since = self.ago(&spec.failed_at).map(|s| format!(" {s} ago")).unwrap_or_default();
            let reason = if spec.failed_reason.is_empty() { "no reason is known" } else { &spec.failed_reason };
            self.say(format!("Replica `{name}` on {place} failed{since}: {}", sentence_end(reason)));
        }
        self.below(|s| {
            if running {
                // What it waits for is told by the copy itself.
                let relevant = status
                    .conditions
                    .iter()
                    .filter(|c| c.reason != "WaitForBackingImage" && c.r#type != types::WAIT_FOR_BACKING_IMAGE);
                s.problems(&relevant.cloned().collect::<Vec<_>>());
            }
            if running && status.current_state != InstanceState::Running && !spec.backing_image.is_empty() {
                s.copy(&spec.backing_image, &spec.disk_id);
            }
            s.disk_problems(&spec.disk_id);
            s.why_there(replica);
        });
        true
    }

    /// Why a replica lies where it does, once.
    fn why_there(&mut self, replica: &Replica) {
        let (name, place) =
            (replica.metadata.name.as_deref().unwrap_or_default(), self.place_of(&replica.spec.disk_id));
        let text = format!("{place} was chosen for replica `{name}`: {}", sentence_stop(&replica.spec.place_reason));
        if !replica.spec.place_reason.is_empty() && !self.lines.iter().any(|line| line.text == text) {
            self.say(text);
        }
    }
}

fn state_word(state: InstanceState) -> &'static str {
    match state {
        InstanceState::NotStarted => "not started yet",
        InstanceState::Stopped => "stopped",
        InstanceState::Starting => "starting",
        InstanceState::Running => "running",
        InstanceState::Stopping => "stopping",
        InstanceState::Error => "in error",
        InstanceState::Unknown => "unknown, its node does not answer",
    }
}

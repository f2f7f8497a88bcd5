//! What users read about a volume.

use api::engine::{DesireState, InstanceState};
use api::names::condition::{BACKING_IMAGE_INCOMPATIBLE, READY, SCHEDULED, WAIT_FOR_BACKING_IMAGE};
use api::volume::{Robustness, VolumeState, VolumeStatus};
use api::{Condition, ConditionStatus, condition};

use super::{Action, DETACHED_CONDITION, ENGINE_LOST, Pass, in_sync};

impl Pass<'_> {
    fn is_attached(&self) -> bool {
        let Some(engine) = &self.o.engine else { return false };
        let Some(status) = &engine.status else { return false };
        engine.spec.desire_state == DesireState::Running
            && status.current_state == InstanceState::Running
            && !status.endpoint.is_empty()
            && engine.spec.node_id == self.o.volume.spec.node_id
    }

    fn state(&self) -> VolumeState {
        let volume = &self.o.volume;
        if volume.metadata.deletion_timestamp.is_some() {
            return VolumeState::Deleting;
        }
        let places =
            self.replicas.len() + self.created.iter().filter(|a| matches!(a, Action::CreateReplica(_))).count();
        if places == 0 {
            return VolumeState::Creating;
        }
        if self.is_attached() {
            return VolumeState::Attached;
        }
        let wants = !volume.spec.node_id.is_empty();
        match (wants, &self.undetached) {
            (_, Some(_)) => VolumeState::Detaching,
            (false, None) => VolumeState::Detached,
            // Nothing is done for a volume that cannot be attached as it is.
            (true, None) if self.incompatible.is_some() => VolumeState::Detached,
            (true, None) => VolumeState::Attaching,
        }
    }

    fn robustness(&self) -> (Robustness, String) {
        let failed = self.failures();
        let good = self.good_replicas().len();
        if good == 0 && !self.replicas.is_empty() {
            return (Robustness::Faulted, failed);
        }
        if let Some(wait) =
            self.waits.as_ref().filter(|w| matches!(w.reason.as_str(), "StaleReplica" | "Faulted" | ENGINE_LOST))
        {
            return (Robustness::Faulted, wait.message.clone());
        }
        if !self.is_attached() {
            return (Robustness::Unknown, failed);
        }
        let serving = self.o.engine.as_ref().map(in_sync).unwrap_or_default();
        let serving = serving.iter().filter(|n| self.replicas.get(*n).is_some_and(|s| s.failed_at.is_empty())).count();
        match serving {
            0 => (Robustness::Faulted, if failed.is_empty() { "no replica is in sync".into() } else { failed }),
            n if n >= self.wanted_replicas() => (Robustness::Healthy, String::new()),
            n => {
                let reasons: Vec<String> =
                    self.unplaced.clone().into_iter().chain(Some(failed).filter(|f| !f.is_empty())).collect();
                (
                    Robustness::Degraded,
                    format!("{n} of {} replicas are in sync: {}", self.wanted_replicas(), reasons.join("; ")),
                )
            }
        }
    }

    pub(super) fn report(&self) -> VolumeStatus {
        let o = self.o;
        let mut status = o.volume.status.clone().unwrap_or_default();
        status.state = self.state();
        let (robustness, why) = self.robustness();
        status.robustness = robustness;
        let engine_spec = o.engine.as_ref().map(|e| &e.spec);
        let holds_node = status.state == VolumeState::Attached || self.undetached.is_some();
        status.current_node_id =
            if holds_node { engine_spec.map(|e| e.node_id.clone()).unwrap_or_default() } else { String::new() };
        let sizes = o.replicas.iter().filter_map(|r| r.status.as_ref()).map(|s| s.actual_size_bytes);
        status.actual_size = sizes.max().unwrap_or(0);
        match robustness {
            Robustness::Degraded | Robustness::Faulted if status.last_degraded_at.is_empty() => {
                status.last_degraded_at = o.now.to_string();
            }
            Robustness::Healthy => status.last_degraded_at.clear(),
            _ => {}
        }
        let deleting = o.volume.metadata.deletion_timestamp.is_some();
        let mut set = |c: Condition| condition::set(&mut status.conditions, c, o.now);
        if !deleting {
            set(match &self.unplaced {
                None => Condition::new(SCHEDULED, ConditionStatus::True, "Scheduled", "every replica has a place"),
                Some(why) => Condition::new(SCHEDULED, ConditionStatus::False, "NotAllPlaced", why.clone())
                    .with_hint("add a disk, free space, or change the volume's selectors"),
            });
        }
        if !o.volume.spec.backing_image.is_empty() && !deleting {
            set(match self.image_progress() {
                Some(wait) => wait,
                None if o.image.is_none() => {
                    let text = format!("there is no image {}", o.volume.spec.backing_image);
                    Condition::new(WAIT_FOR_BACKING_IMAGE, ConditionStatus::True, "GetBackingImageFailed", text)
                }
                None => Condition::new(WAIT_FOR_BACKING_IMAGE, ConditionStatus::False, "", ""),
            });
            set(self
                .incompatible
                .clone()
                .unwrap_or_else(|| Condition::new(BACKING_IMAGE_INCOMPATIBLE, ConditionStatus::False, "", "")));
        }
        set(match &self.undetached {
            Some(why) => Condition::new(DETACHED_CONDITION, ConditionStatus::False, "InUse", why.clone())
                .with_hint(self.engine_hint()),
            None if self.is_attached() => Condition::new(DETACHED_CONDITION, ConditionStatus::False, "Attached", ""),
            None => Condition::new(DETACHED_CONDITION, ConditionStatus::True, "Detached", ""),
        });
        set(match (&self.waits, robustness) {
            (Some(wait), _) => wait.clone(),
            (None, Robustness::Faulted) => Condition::new(READY, ConditionStatus::False, "Faulted", why)
                .with_hint("clear failedAt of the replica that you trust most, to salvage its data"),
            (None, Robustness::Degraded) => Condition::new(READY, ConditionStatus::True, "Degraded", why),
            (None, _) if status.state == VolumeState::Attached => Condition::new(
                READY,
                ConditionStatus::True,
                "Attached",
                format!("attached to node {}", status.current_node_id),
            ),
            (None, _) if why.is_empty() => {
                Condition::new(READY, ConditionStatus::True, "Detached", "it can be attached")
            }
            (None, _) => Condition::new(
                READY,
                ConditionStatus::True,
                "Degraded",
                format!("it can be attached; failed are {why}"),
            ),
        });
        status
    }
}

//! Nodes, their disks and the managers of those.

use api::manager::ManagerState;
use api::names::condition::{CLOCK_STEADY, CORDONED, EVICTED, READY};
use api::node::DiskStatus;
use api::{Condition, Node, condition};

use super::{Story, is_problem};
use crate::disk::Disks;

impl Story<'_> {
    /// `disk-1 of node-1`, or the UUID of a disk that nobody reports.
    pub(super) fn place_of(&self, disk: &str) -> String {
        match self.find_disk(disk) {
            Some((node, name, _)) => format!("`{name}` of `{}`", node.metadata.name.as_deref().unwrap_or_default()),
            None if disk.is_empty() => "no disk yet".into(),
            None => format!("disk {disk}, which no node reports"),
        }
    }

    fn find_disk(&self, uuid: &str) -> Option<(Node, String, DiskStatus)> {
        // Of two nodes that name it, after a move, the one that the decisions follow.
        let disks = Disks::of(&self.world.nodes);
        let followed = disks.get(uuid).map(|disk| (disk.node.as_str(), disk.name.as_str()));
        let mut found = self.world.nodes.iter().flat_map(|node| {
            let disks = node.status.iter().flat_map(|status| &status.disk_status);
            let named = disks.filter(|(_, d)| d.disk_uuid == uuid && !uuid.is_empty());
            named.map(|(name, status)| (node.clone(), name.clone(), status.clone()))
        });
        let is_followed = |node: &Node, name: &str| {
            followed.is_none_or(|at| at == (node.metadata.name.as_deref().unwrap_or_default(), name))
        };
        found.find(|(node, name, _)| is_followed(node, name))
    }

    /// What is wrong with a disk or its node.
    pub(super) fn disk_problems(&mut self, uuid: &str) {
        let Some((node, name, status)) = self.find_disk(uuid) else { return };
        let node_name = node.metadata.name.clone().unwrap_or_default();
        let conditions = node.status.unwrap_or_default().conditions;
        if condition::find(&conditions, READY).is_some_and(is_problem) {
            self.say(format!("Node `{node_name}` is not ready."));
            self.below(|s| s.problems(&conditions));
        }
        if status.conditions.iter().any(is_problem) {
            self.say(format!("Disk `{name}` of node `{node_name}` is not usable."));
            self.below(|s| s.problems(&status.conditions));
        }
    }

    /// Whose clock was set: what waits for a time may end earlier or later than it says.
    pub(super) fn clocks(&mut self) {
        let conditions = |node: &Node| node.status.clone().unwrap_or_default().conditions;
        let mut steps: Vec<Condition> = self.world.nodes.iter().flat_map(conditions).collect();
        steps.retain(|condition| condition.r#type == CLOCK_STEADY);
        self.problems(&steps);
    }

    /// What is wrong with the manager of a disk.
    pub(super) fn manager_problems(&mut self, disk: &str) {
        let found = self.world.managers.iter().find(|m| m.spec.disk_uuid == disk);
        let Some(manager) = found else { return };
        let state = manager.status.as_ref().map(|s| s.current_state).unwrap_or_default();
        if state != ManagerState::Running {
            let name = manager.metadata.name.clone().unwrap_or_default();
            self.manager(&name);
        }
    }

    pub(super) fn manager(&mut self, name: &str) -> bool {
        let found = self.world.managers.iter().find(|m| m.metadata.name.as_deref() == Some(name));
        let Some(manager) = found else { return false };
        let status = manager.status.clone().unwrap_or_default();
        let word = match status.current_state {
            ManagerState::Running => "running",
            ManagerState::NotStarted => "not started yet",
            ManagerState::Starting => "starting",
            ManagerState::Stopped => "stopped",
            ManagerState::Error => "in error",
            ManagerState::Unknown => "unknown, it does not answer",
        };
        let place = self.place_of(&manager.spec.disk_uuid);
        self.say(format!(
            "The manager of {place} (`{name}`) is {word}, with {}.",
            super::count(manager.spec.backing_images.len(), "image", "images")
        ));
        self.below(|s| {
            s.problems(&status.conditions);
            for (image, file) in &status.backing_image_file_map {
                if !file.message.is_empty() && file.state != api::image::CopyState::Ready {
                    let retry = s.next_attempt(&file.next_retry_time);
                    s.say(format!(
                        "Image `{image}` is {} there. {}{retry}",
                        file.state.as_str(),
                        super::sentence_end(&file.message)
                    ));
                }
            }
        });
        true
    }

    /// What still lies on a disk that shall be emptied.
    fn what_stays(&mut self, disk: &str, uuid: &str) {
        let images = self.world.images.iter().filter(|i| i.spec.disk_file_spec_map.contains_key(uuid));
        for image in images {
            let conditions = image.status.as_ref().map(|s| s.conditions.as_slice()).unwrap_or_default();
            let Some(evicted) = condition::find(conditions, EVICTED) else { continue };
            let name = image.metadata.name.as_deref().unwrap_or_default();
            self.say(format!("A copy of image `{name}` is still on `{disk}`."));
            self.below(|s| s.problems(std::slice::from_ref(evicted)));
        }
        for replica in self.world.replicas.iter().filter(|r| r.spec.disk_id == uuid && !uuid.is_empty()) {
            let (name, volume) = (replica.metadata.name.as_deref().unwrap_or_default(), &replica.spec.volume_name);
            self.say(format!(
                "Replica `{name}` of volume `{volume}` is on `{disk}`: replicas are not moved by this version."
            ));
        }
    }

    pub(super) fn node(&mut self, name: &str) -> bool {
        let Some(node) = self.world.nodes.iter().find(|n| n.metadata.name.as_deref() == Some(name)) else {
            return false;
        };
        let status = node.status.clone().unwrap_or_default();
        let ready = condition::find(&status.conditions, READY);
        let word = match ready {
            Some(ready) if ready.is_true() => "ready",
            Some(_) => "not ready",
            None => "not reported yet by its instance role",
        };
        let closed = if node.spec.allow_scheduling {
            ""
        } else {
            ", closed for new replicas and copies (allowScheduling is false)"
        };
        let disks = super::count(status.disk_status.len(), "disk", "disks");
        self.say(format!("Node `{name}` is {word}{closed}, with {disks}."));
        self.below(|s| {
            s.problems(&status.conditions);
            let cordoned = condition::find(&status.conditions, CORDONED).filter(|c| c.is_true());
            if let Some(cordoned) = cordoned {
                let text = s.sentence(cordoned);
                s.say(text);
            }
            for (disk, spec) in &node.spec.disks {
                let is_evicting = spec.eviction_requested || node.spec.eviction_requested || cordoned.is_some();
                if let Some(reported) = status.disk_status.get(disk).filter(|_| is_evicting) {
                    s.what_stays(disk, &reported.disk_uuid);
                }
                match status.disk_status.get(disk) {
                    None => s.say(format!("Disk `{disk}` at `{}` is not reported yet.", spec.path)),
                    Some(reported) if reported.conditions.iter().any(is_problem) => {
                        s.say(format!("Disk `{disk}` at `{}` is not usable.", spec.path));
                        s.below(|s| s.problems(&reported.conditions));
                    }
                    Some(_) if !spec.allow_scheduling => {
                        s.say(format!(
                            "Disk `{disk}` is closed for new replicas and copies (allowScheduling is false)."
                        ));
                    }
                    Some(_) => {}
                }
            }
        });
        true
    }
}

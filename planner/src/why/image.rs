//! Images, their copies and data sources.

use api::BackingImage;
use api::condition;
use api::image::{CopyState, DiskFileStatus};
use api::names::condition::READY;

use super::{Story, sentence_end, sentence_stop};
use crate::setting::Settings;

/// Whether an image can be used.
pub(super) fn is_ready(image: &BackingImage) -> bool {
    let Some(status) = &image.status else { return false };
    match condition::find(&status.conditions, READY) {
        Some(ready) => ready.is_true(),
        None => status.disk_file_status_map.values().any(|c| c.state == CopyState::Ready),
    }
}

impl Story<'_> {
    pub(super) fn image(&mut self, name: &str) -> bool {
        let Some(image) = self.world.images.iter().find(|i| i.metadata.name.as_deref() == Some(name)) else {
            return false;
        };
        let status = image.status.clone().unwrap_or_default();
        let mut disks: Vec<String> =
            image.spec.disk_file_spec_map.keys().chain(status.disk_file_status_map.keys()).cloned().collect();
        disks.sort();
        disks.dedup();
        let state = |disk: &String| status.disk_file_status_map.get(disk).map(|c| c.state).unwrap_or_default();
        let ready = disks.iter().filter(|d| state(d) == CopyState::Ready).count();
        let word = match (image.metadata.deletion_timestamp.is_some(), is_ready(image)) {
            (true, _) => "is being deleted",
            (false, true) => "is ready",
            (false, false) => "is not ready",
        };
        let copies = match disks.len() {
            0 => "it has no copy yet".to_owned(),
            all => format!("{ready} of {} ready", super::count(all, "copy is", "copies are")),
        };
        self.say(format!("Image `{name}` {word}: {copies}."));
        self.below(|s| {
            s.problems(&status.conditions);
            let prepared = s
                .world
                .data_sources
                .iter()
                .find(|d| d.metadata.name.as_deref() == Some(name) && !d.spec.file_transferred && ready == 0);
            if prepared.is_some() {
                s.data_source(name);
            }
            // The copy on the disk of the data source is what that prepares.
            let is_told = |disk: &String| {
                prepared.is_some_and(|d| d.spec.disk_uuid == *disk) && state(disk) != CopyState::ReadyForTransfer
            };
            for disk in disks.iter().filter(|d| state(d) != CopyState::Ready && !is_told(d)) {
                s.copy(name, disk);
            }
            for (disk, entry) in image.spec.disk_file_spec_map.iter().filter(|(_, e)| !e.reason.is_empty()) {
                let place = s.place_of(disk);
                s.say(format!("{place} was chosen: {}", sentence_stop(&entry.reason)));
            }
            for (disk, copy) in status.disk_file_status_map.iter().filter(|(_, c)| !c.damage.is_empty()) {
                let place = s.place_of(disk);
                s.say(format!(
                    "The copy on {place} was damaged once: {} You can: check that disk.",
                    sentence_end(&copy.damage)
                ));
            }
            s.clocks();
        });
        true
    }

    /// One copy of an image.
    pub(super) fn copy(&mut self, image: &str, disk: &str) {
        let Some(found) = self.world.images.iter().find(|i| i.metadata.name.as_deref() == Some(image)) else {
            self.say(format!("Image `{image}` does not exist."));
            return;
        };
        let copy = found.status.as_ref().and_then(|s| s.disk_file_status_map.get(disk)).cloned().unwrap_or_default();
        let place = self.place_of(disk);
        let text = match copy.state {
            CopyState::Ready => format!("The copy of image `{image}` on {place} is ready."),
            CopyState::NotStarted => format!("The copy of image `{image}` on {place} is not begun yet."),
            CopyState::InProgress => {
                let limits = self.limits(found, "each disk sends");
                format!("The copy of image `{image}` on {place} is at {} %{limits}.", copy.progress)
            }
            state => format!("The copy of image `{image}` on {place} is {}.", state.as_str()),
        };
        let text = text + &self.details(&copy);
        if self.is_told(&text) {
            return;
        }
        self.say(text);
        if copy.state != CopyState::Ready {
            self.below(|s| {
                s.disk_problems(disk);
                s.manager_problems(disk);
            });
        }
    }

    /// `; each disk sends at most 65536 bytes/s by setting backing-image-bandwidth-limit`, or nothing when there is no limit.
    fn limits(&self, image: &BackingImage, who: &str) -> String {
        let of_all = Settings::of(&self.world.settings).bandwidth_limit;
        let by_setting = format!("setting {}", api::setting::BANDWIDTH_LIMIT);
        let limits = [(of_all, by_setting.as_str()), (image.spec.bandwidth_limit, "the image's spec.bandwidthLimit")];
        let said: Vec<String> = limits
            .into_iter()
            .filter(|(limit, _)| *limit > 0)
            .map(|(limit, by)| format!("at most {limit} bytes/s by {by}"))
            .collect();
        if said.is_empty() { String::new() } else { format!("; {who} {}", said.join(" and ")) }
    }

    fn details(&self, copy: &DiskFileStatus) -> String {
        let has_reason = !copy.message.is_empty() && copy.state != CopyState::Ready;
        let is_told = has_reason && self.is_told(&copy.message);
        let mut text = if has_reason && !is_told { format!(" {}", sentence_end(&copy.message)) } else { String::new() };
        // For how long nobody can tell of a copy stands nowhere else, also when its reason does.
        let counts_time = copy.state == CopyState::Unknown || copy.state == CopyState::Failed && !is_told;
        if let Some(since) = self.ago(&copy.last_state_transition_time).filter(|_| counts_time) {
            text += &format!(" Since {since}.");
        }
        if !is_told {
            text += &self.next_attempt(&copy.next_retry_time);
        }
        text
    }

    pub(super) fn data_source(&mut self, name: &str) -> bool {
        let found = self.world.data_sources.iter().find(|d| d.metadata.name.as_deref() == Some(name));
        let Some(source) = found else { return false };
        let status = source.status.clone().unwrap_or_default();
        let place = self.place_of(&source.spec.disk_uuid);
        let kind = source.spec.source_type.map_or("download", |t| t.as_str());
        if source.spec.file_transferred {
            self.say(format!("The {kind} of image `{name}` is done."));
            return true;
        }
        let waits = !status.message.is_empty() && !status.next_retry_time.is_empty();
        let mut text = match status.current_state {
            CopyState::NotStarted | CopyState::Pending | CopyState::Starting if waits => {
                format!("The {kind} of image `{name}` to {place} waits for its next attempt.")
            }
            CopyState::NotStarted | CopyState::Pending => {
                format!("The {kind} of image `{name}` to {place} has not begun.")
            }
            CopyState::InProgress => {
                let image = self.world.images.iter().find(|i| i.metadata.name.as_deref() == Some(name));
                let limits = image.map(|image| self.limits(image, "it downloads")).unwrap_or_default();
                format!("The {kind} of image `{name}` to {place} is at {} %{limits}.", status.progress)
            }
            CopyState::Failed | CopyState::FailedAndCleanup => {
                let times = super::count(status.failures.max(1) as usize, "time", "times");
                format!("The {kind} of image `{name}` to {place} failed {times}.")
            }
            state => format!("The {kind} of image `{name}` to {place} is {}.", state.as_str()),
        };
        let is_told = !status.message.is_empty() && self.is_told(&status.message);
        // The condition says it below, with what can be done.
        let is_said_below = status.conditions.iter().any(|c| super::is_problem(c) && c.message == status.message);
        if !status.message.is_empty() && !is_told && !is_said_below {
            text += &format!(" {}", sentence_end(&status.message));
            text += &self.next_attempt(&status.next_retry_time);
        }
        self.say(text);
        self.below(|s| {
            s.problems(&status.conditions);
            s.disk_problems(&source.spec.disk_uuid);
        });
        true
    }
}

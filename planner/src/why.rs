//! Why something is not as it should be: the chain from a thing to what it waits for, in plain sentences.
//!
//! claim ← volume ← replicas, engine, image ← copies, data source ← disks and their managers. What is fine is said in one line;
//! below what is not stand its reasons, since when, the next attempt, and one thing that the user can do.

mod image;
mod place;
mod volume;

use api::condition::{Condition, ConditionStatus};
use api::names::condition as types;
use api::{BackingImage, BackingImageDataSource, BackingImageManager, Engine, Node, Replica, Setting, Volume};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use k8s_openapi::api::storage::v1::{StorageClass, VolumeAttachment};

/// The objects to look at: all of them, so that absence means something.
#[derive(Clone, Debug, Default)]
pub struct World {
    pub claims: Vec<PersistentVolumeClaim>,
    pub persistent_volumes: Vec<PersistentVolume>,
    pub classes: Vec<StorageClass>,
    pub attachments: Vec<VolumeAttachment>,
    pub volumes: Vec<Volume>,
    pub engines: Vec<Engine>,
    pub replicas: Vec<Replica>,
    pub images: Vec<BackingImage>,
    pub data_sources: Vec<BackingImageDataSource>,
    pub managers: Vec<BackingImageManager>,
    pub nodes: Vec<Node>,
    pub settings: Vec<Setting>,
}

/// What is asked about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subject {
    Claim { namespace: String, name: String },
    Volume(String),
    Engine(String),
    Replica(String),
    Image(String),
    DataSource(String),
    Manager(String),
    Node(String),
}

/// One sentence; deeper ones explain the one above.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    pub depth: usize,
    pub text: String,
}

/// The chain of sentences for a subject; `None` when it does not exist.
pub fn explain(world: &World, subject: &Subject, now: Timestamp) -> Option<Vec<Line>> {
    let mut story = Story { world, now, lines: vec![], depth: 0 };
    let known = match subject {
        Subject::Claim { namespace, name } => story.claim(namespace, name),
        Subject::Volume(name) => story.volume(name),
        Subject::Engine(name) => story.engine(name),
        Subject::Replica(name) => story.replica(name),
        Subject::Image(name) => story.image(name),
        Subject::DataSource(name) => story.data_source(name),
        Subject::Manager(name) => story.manager(name),
        Subject::Node(name) => story.node(name),
    };
    known.then_some(story.lines)
}

/// The sentences as text, indented by their depth.
pub fn render(lines: &[Line]) -> String {
    lines.iter().map(|line| format!("{}{}\n", "  ".repeat(line.depth), line.text)).collect()
}

/// The telling in progress.
struct Story<'a> {
    world: &'a World,
    now: Timestamp,
    lines: Vec<Line>,
    depth: usize,
}

impl Story<'_> {
    fn say(&mut self, text: impl Into<String>) {
        self.lines.push(Line { depth: self.depth, text: text.into() });
    }

    /// Tells what stands below the last sentence.
    fn below(&mut self, tell: impl FnOnce(&mut Self)) {
        self.depth += 1;
        tell(self);
        self.depth -= 1;
    }

    /// One sentence for each condition that tells of a problem.
    fn problems(&mut self, conditions: &[Condition]) {
        for condition in conditions.iter().filter(|c| is_problem(c)) {
            // Several conditions, of several objects, may have one cause.
            let text = if condition.message.is_empty() || !self.is_told(&condition.message) {
                self.sentence(condition)
            } else {
                self.what_follows(condition)
            };
            if !text.is_empty() {
                self.say(text);
            }
        }
    }

    /// When something that is told already is tried again, and what can be done, unless that is told too.
    fn what_follows(&self, condition: &Condition) -> String {
        let next = self.next_attempt(&condition.next_retry_time);
        let hint = sentence_stop(&condition.hint);
        let hint = if condition.hint.is_empty() { String::new() } else { format!("You can: {hint}") };
        let parts = [next.trim(), &hint].map(str::to_owned);
        parts.into_iter().filter(|part| !part.is_empty() && !self.is_told(part)).collect::<Vec<_>>().join(" ")
    }

    /// Whether a message stands in a sentence already, there perhaps with a small first letter.
    fn is_told(&self, message: &str) -> bool {
        let mut rest = message.trim_end().chars();
        rest.next();
        self.lines.iter().any(|line| line.text.contains(rest.as_str()))
    }

    fn sentence(&self, condition: &Condition) -> String {
        let message = if condition.message.is_empty() { &condition.reason } else { &condition.message };
        let mut text = sentence_end(message);
        if let Some(since) = self.ago(&condition.last_transition_time) {
            text += &format!(" Since {since}.");
        }
        text += &self.next_attempt(&condition.next_retry_time);
        if !condition.hint.is_empty() {
            text += &format!(" You can: {}", sentence_stop(&condition.hint));
        }
        text
    }

    /// ` Next attempt in 20s.`, or nothing when none is scheduled.
    fn next_attempt(&self, at: &str) -> String {
        match at.parse::<Timestamp>() {
            Ok(at) if at > self.now => format!(" Next attempt in {}.", span(at.as_second() - self.now.as_second())),
            Ok(_) => " The next attempt is due now.".into(),
            Err(_) => String::new(),
        }
    }

    fn ago(&self, since: &str) -> Option<String> {
        let since: Timestamp = since.parse().ok()?;
        Some(span(self.now.as_second() - since.as_second()))
    }
}

/// Whether a condition tells of something that is not as it should be.
fn is_problem(condition: &Condition) -> bool {
    let bad = match condition.r#type.as_str() {
        types::WAIT_FOR_BACKING_IMAGE | types::BACKING_IMAGE_INCOMPATIBLE => ConditionStatus::True,
        _ => ConditionStatus::False,
    };
    // What nobody can tell is a problem when somebody says why.
    let is_unknown = condition.status == ConditionStatus::Unknown && !condition.message.is_empty();
    // An image that can be used, and yet lacks copies.
    let is_meager = condition.reason == "FewerCopies" && condition.status == ConditionStatus::True;
    is_meager || is_unknown || condition.status == bad && !(condition.message.is_empty() && condition.reason.is_empty())
}

/// A text with a capital letter and a full stop, so that sentences can follow it.
fn sentence_end(text: &str) -> String {
    let text = text.trim_end();
    let mut chars = text.chars();
    let first = chars.next().map(|c| c.to_uppercase().to_string()).unwrap_or_default();
    format!("{first}{}", sentence_stop(chars.as_str()))
}

/// A text with a full stop.
fn sentence_stop(text: &str) -> String {
    let stop = if text.ends_with(['.', '!', '?']) { "" } else { "." };
    format!("{text}{stop}")
}

/// `1 disk`, `3 disks`.
fn count(number: usize, one: &str, many: &str) -> String {
    format!("{number} {}", if number == 1 { one } else { many })
}

/// A number of seconds for people.
fn span(seconds: i64) -> String {
    match seconds.max(0) {
        s @ 0..120 => format!("{s}s"),
        s @ 120..7200 => format!("{}m", s / 60),
        s @ 7200..172_800 => format!("{}h", s / 3600),
        s => format!("{}d", s / 86_400),
    }
}

#[cfg(test)]
mod tests;

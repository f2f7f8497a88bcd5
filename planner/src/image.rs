//! The copies of one image: how many, where, and where its first file comes from.
//!
//! Writes `diskFileSpecMap`, the image's status and its BackingImageDataSource. It removes nothing because of silence, and never
//! the last ready copy of an image in use, whoever takes it out of the map (`guard`).

mod copies;
mod deletion;
pub mod guard;
pub mod recovery;
mod source;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use api::data_source::BackingImageDataSourceSpec;
use api::image::{BackingImageSpec, BackingImageStatus, CopyState, DiskFileSpec, SourceType};
use api::manager::FileInfo;
use api::names::FINALIZER;
use api::names::condition::{EVICTED, READY};
use api::{BackingImage, BackingImageDataSource, BackingImageManager, Condition, ConditionStatus, Replica, condition};
use jiff::Timestamp;

pub use self::copies::limit::making_of_others;
pub use self::copies::{Cause, Leaving, Replenish, leaving};
use self::guard::Scene;
use crate::disk::{Disks, Load};
use crate::placement::{Making, Request, Selectors};
use crate::retry::sooner;
use crate::setting::Settings;

/// One reading of everything that the copies of an image depend on.
#[derive(Clone, Debug)]
pub struct Observed {
    pub now: Timestamp,
    pub random: u64,
    pub image: BackingImage,
    pub data_source: Option<BackingImageDataSource>,
    pub managers: Vec<BackingImageManager>,
    /// The replicas that use it.
    pub replicas: Vec<Replica>,
    /// The names of the volumes that use it.
    pub volumes: Vec<String>,
    pub disks: Disks,
    pub loads: BTreeMap<String, Load>,
    /// The copies of other images that are being made ([`making_of_others`]).
    pub making: Making,
    pub settings: Settings,
}

impl Observed {
    fn scene<'a>(&'a self, status: &'a BackingImageStatus) -> Scene<'a> {
        Scene {
            image: &self.image,
            status,
            data_source: self.data_source.as_ref(),
            replicas: &self.replicas,
            disks: &self.disks,
            settings: &self.settings,
        }
    }
}

/// One step; each can be repeated.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    AddFinalizer,
    /// Replaces `spec.diskFileSpecMap`, unless somebody else changed it since it was read.
    SetCopies(BTreeMap<String, DiskFileSpec>),
    CreateDataSource(Box<BackingImageDataSource>),
    SetDataSourceSpec(Box<BackingImageDataSourceSpec>),
    DeleteDataSource,
    /// Nothing is left of the image.
    RemoveFinalizer,
}

/// What to do now, what to report, and when to look again at the latest.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    pub actions: Vec<Action>,
    pub status: BackingImageStatus,
    pub replenish: Replenish,
    pub recheck_after: Option<Duration>,
}

impl Decision {
    /// Whether something goes that was there: a copy, a wish for one, the data source, the image. That is decided on a sure reading only.
    pub fn takes_away(&self, observed: &Observed) -> bool {
        let held = observed.image.status.iter().flat_map(|s| s.disk_file_status_map.keys());
        let lets_go = held.into_iter().any(|disk| !self.status.disk_file_status_map.contains_key(disk));
        lets_go
            || self.actions.iter().any(|action| match action {
                Action::SetCopies(map) => {
                    observed.image.spec.disk_file_spec_map.keys().any(|disk| !map.contains_key(disk))
                }
                Action::DeleteDataSource | Action::RemoveFinalizer => true,
                Action::AddFinalizer | Action::CreateDataSource(_) | Action::SetDataSourceSpec(_) => false,
            })
    }
}

/// Decides about one image.
pub fn decide(observed: &Observed) -> Decision {
    let o = observed;
    let mut status = o.image.status.clone().unwrap_or_default();
    let mut actions = vec![];
    let has_finalizer = o.image.metadata.finalizers.iter().flatten().any(|f| f == FINALIZER);
    let deleting = o.image.metadata.deletion_timestamp.is_some();
    if !has_finalizer && !deleting {
        actions.push(Action::AddFinalizer);
    }
    if deleting && o.volumes.is_empty() && o.replicas.is_empty() {
        return deletion::decide(o, status, actions);
    }
    if status.uuid.is_empty() {
        // Before anything else, and durable before it is used: it is part of every path. Also when a deletion waits that was asked for before.
        status.uuid = format!("{:08x}", o.random as u32);
        report(
            &mut status,
            o,
            Condition::new(READY, ConditionStatus::False, "Preparing", "the image was just created"),
        );
        return Decision { actions, status, replenish: Replenish::default(), recheck_after: Some(Duration::ZERO) };
    }

    let mut map = o.image.spec.disk_file_spec_map.clone();
    copies::observe(o, &map, &mut status);
    if copies::take_back(o, &status, &mut map) {
        copies::observe(o, &map, &mut status);
    }
    let was_ready: Vec<String> = ready_disks(&status).map(str::to_owned).collect();
    let told_until = guard::let_go(o, &mut status, &mut map);
    let (source, mut problem, mut recheck_after) = source::plan(o, &status, &mut map);
    let mut copies = copies::plan(o, &status, &mut map);
    copies.replenish.being_made = copies::limit::being_made_of(o, &status, &map);
    recheck_after = sooner(sooner(recheck_after, copies.recheck_after), told_until);
    assert_keeps_last_ready_copy(o, &was_ready, &map);
    let evicted = copies::eviction::condition(&o.scene(&status), &map, copies.shortage.as_deref());
    match evicted {
        Some(condition) => report(&mut status, o, condition),
        None => status.conditions.retain(|c| c.r#type != EVICTED),
    }
    if map != o.image.spec.disk_file_spec_map {
        actions.push(Action::SetCopies(map.clone()));
    }
    actions.extend(source);
    if deleting {
        problem = Some(in_use(o));
    }
    let ready = ready_disks(&status).filter(|d| map.contains_key(*d)).count();
    let text = progress(&status, map.keys().map(String::as_str), &o.disks);
    let mut condition = match (problem, ready) {
        (Some(problem), 0) => problem,
        (Some(problem), _) if deleting => problem,
        (None, 0) => Condition::new(READY, ConditionStatus::False, "Preparing", text),
        (_, _) => match copies.shortage {
            None => Condition::new(READY, ConditionStatus::True, "Ready", text),
            Some(why) => Condition::new(READY, ConditionStatus::True, "FewerCopies", format!("{text}; {why}")),
        },
    };
    if let Some(wrong) = other_content(&o.image.spec, &status) {
        condition.message = format!("{}; {wrong}", condition.message);
    }
    report(&mut status, o, condition);
    Decision { actions, status, replenish: copies.replenish, recheck_after }
}

fn report(status: &mut BackingImageStatus, o: &Observed, condition: Condition) {
    condition::set(&mut status.conditions, condition, o.now);
}

fn in_use(o: &Observed) -> Condition {
    let users: BTreeSet<&str> =
        o.volumes.iter().map(String::as_str).chain(o.replicas.iter().map(|r| r.spec.volume_name.as_str())).collect();
    let users = users.into_iter().collect::<Vec<_>>().join(", ");
    Condition::new(READY, ConditionStatus::False, "InUse", format!("deletion waits: in use by volume {users}"))
        .with_hint(format!("delete volume {users} first"))
}

/// Invariant 2. A bug must not cost data: stop rather than remove.
fn assert_keeps_last_ready_copy(o: &Observed, was_ready: &[String], map: &BTreeMap<String, DiskFileSpec>) {
    assert!(
        was_ready.is_empty() || was_ready.iter().any(|d| map.contains_key(d)),
        "image {}: the last ready copy would be removed",
        name_of(&o.image)
    );
}

/// The disks whose copy is ready.
pub fn ready_disks(status: &BackingImageStatus) -> impl Iterator<Item = &str> {
    status.disk_file_status_map.iter().filter(|(_, f)| f.state == CopyState::Ready).map(|(d, _)| d.as_str())
}

/// The disks that have a copy, or whose room is taken for one; not those that were found to be too small for it.
pub fn copies_held(image: &BackingImage) -> BTreeSet<String> {
    let known = image.status.as_ref().map(|s| &s.disk_file_status_map);
    let is_too_small = |disk: &str| known.and_then(|k| k.get(disk)).is_some_and(copies::has_no_room);
    image.spec.disk_file_spec_map.keys().filter(|disk| !is_too_small(disk)).cloned().collect()
}

/// "2 of 3 copies ready, disk-1 of node-3 at 61 %": the copies on `wanted`.
pub fn progress<'a>(status: &BackingImageStatus, wanted: impl Iterator<Item = &'a str>, disks: &Disks) -> String {
    let (mut all, mut ready, mut rest) = (0, 0, vec![]);
    for disk in wanted {
        all += 1;
        let file = status.disk_file_status_map.get(disk).cloned().unwrap_or_default();
        let label = disks.label(disk);
        let because = if file.message.is_empty() { String::new() } else { format!(" ({})", file.message) };
        match file.state {
            CopyState::Ready => ready += 1,
            CopyState::InProgress => rest.push(format!("{label} at {} %", file.progress)),
            CopyState::ReadyForTransfer => rest.push(format!("{label} is handed over")),
            CopyState::Failed | CopyState::FailedAndCleanup => rest.push(format!("{label} failed{because}")),
            CopyState::Unknown => rest.push(format!("{label} unknown{because}")),
            CopyState::NotStarted | CopyState::Pending | CopyState::Starting => {
                rest.push(format!("{label} pending{because}"))
            }
        }
    }
    let mut text = format!("{ready} of {all} {} ready", if all == 1 { "copy" } else { "copies" });
    if !rest.is_empty() {
        text += &format!(", {}", rest.join(", "));
    }
    text
}

/// The checksum that a copy must have, empty while it may have any: what the image is once a copy was whole, before that what is wished.
pub fn content<'a>(spec: &'a BackingImageSpec, known: &'a BackingImageStatus) -> &'a str {
    if known.checksum.is_empty() { &spec.checksum } else { &known.checksum }
}

/// What is wrong with a wish for another content than the image has, if there is one: volumes lie on what it has.
fn other_content(spec: &BackingImageSpec, known: &BackingImageStatus) -> Option<&'static str> {
    (!spec.checksum.is_empty() && spec.checksum != content(spec, known)).then_some(
        "spec.checksum is not status.checksum and counts for nothing: the image stays what it is; write status.checksum there, or create another image",
    )
}

/// Why a file cannot be a copy of the image whose properties are known, a sentence. The first file decides what they are.
pub fn difference(file: &FileInfo, spec: &BackingImageSpec, known: &BackingImageStatus) -> Option<String> {
    let number = |what: &str, got: u64, want: u64| {
        (got != 0 && want != 0 && got != want)
            .then(|| format!("its {what} is {got} bytes, that of the image is {want}"))
    };
    let text = |what: &str, got: &str, want: &str| {
        (!got.is_empty() && !want.is_empty() && got != want)
            .then(|| format!("its {what} is {got}, that of the image is {want}"))
    };
    number("size", file.size, known.size)
        .or_else(|| number("virtual size", file.virtual_size, known.virtual_size))
        .or_else(|| text("checksum", &file.current_checksum, content(spec, known)))
        .or_else(|| text("format", &file.format, &known.format))
        .map(|why| format!("the copy differs from the image: {why}"))
}

/// Why we cannot make this image at all, if so.
pub fn unsupported(spec: &BackingImageSpec) -> Option<Condition> {
    let refuse = |reason: &str, message: String, hint: &str| {
        Some(Condition::new(READY, ConditionStatus::False, reason, message).with_hint(hint))
    };
    if spec.data_engine != api::image::DataEngine::V1 {
        return refuse("Unsupported", "dataEngine v2 is not offered".into(), "create the image with dataEngine v1");
    }
    if !spec.secret.is_empty() || !spec.secret_namespace.is_empty() {
        return refuse("Unsupported", "encrypted images are not offered".into(), "create the image without a secret");
    }
    match spec.source_type {
        Some(SourceType::Download) => {}
        Some(other) => {
            return refuse(
                "Unsupported",
                format!("sourceType {} is not offered by this version", other.as_str()),
                "use sourceType download with the parameter url",
            );
        }
        None => {
            return refuse(
                "Invalid",
                "sourceType is missing".into(),
                "set sourceType: download and sourceParameters.url",
            );
        }
    }
    match spec.source_parameters.get("url") {
        Some(url) if !url.trim().is_empty() => None,
        _ => refuse(
            "Invalid",
            "sourceParameters.url is missing".into(),
            "set sourceParameters.url to an http or https address",
        ),
    }
}

pub(crate) fn name_of(image: &BackingImage) -> &str {
    image.metadata.name.as_deref().unwrap_or_default()
}

fn request<'a>(
    o: &'a Observed,
    selectors: &'a [Selectors<'a>],
    taken: &'a BTreeSet<String>,
    beside: &'a BTreeSet<String>,
    bytes: u64,
) -> Request<'a> {
    Request {
        disks: &o.disks,
        loads: &o.loads,
        settings: &o.settings,
        selectors,
        taken,
        beside,
        bytes,
        random: o.random,
    }
}

fn selectors(image: &BackingImage) -> [Selectors<'_>; 1] {
    [Selectors { who: "the image", node: &image.spec.node_selector, disk: &image.spec.disk_selector }]
}

#[cfg(test)]
mod tests;

//! The process that prepares an image's first file: started, followed, ended, tried again.

use std::collections::BTreeMap;
use std::time::Duration;

use api::data_source::{BackingImageDataSourceSpec, BackingImageDataSourceStatus};
use api::ids::ImageName;
use api::image::{CopyState, SourceType};
use api::names::condition::READY;
use api::names::{FINALIZER, MANAGED_BY, MANAGER_PORT, SOURCE_PARAMETERS, SYNC_PORT, data_source_workload_name, label};
use api::source_address::AllowedSources;
use api::{
    BackingImage, BackingImageDataSource, Condition, ConditionStatus, ErrorKind, Owner, Secrets, bandwidth, condition,
};
use jiff::Timestamp;
use serde_json::json;

use crate::disk::{Disks, Health};
use crate::image::content;
use crate::retry::{MAX, Retry, after, begun, delay, parse, pending, until};
use crate::workload::{BANDWIDTH_LIMIT_FLAG, SILENCE_LIMIT, State, Wish, Workload};

/// Keys of `runningParameters` that say what an attempt was made with, beside the source's own parameters.
const ATTEMPT_CHECKSUM: &str = "expected-checksum";
const ATTEMPT_DISK: &str = "disk-uuid";
const ATTEMPT_ALLOWED: &str = "allowed-source-addresses";

/// The process, to users.
const PROCESS: &str = "the data source process";

/// When a process that did not answer is asked again.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// Looks that are further apart say nothing of the time between them: the controller may have been away, and not the process. Many
/// times [`ASK_AGAIN`], since a look at one that is silent takes seconds.
const LOOKS_APART: Duration = Duration::from_secs(30);

/// How long the agent of the disk must say that it does not have what was handed over, or does not find what was prepared. Its word may be older than the transfer: it takes
/// a pass over its disk until it tells of that. Shorter than the ten seconds within which a fault is told.
const LOST_AFTER: Duration = Duration::from_secs(5);

/// What a data source process says of its file (`GET /v1/file`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    pub state: CopyState,
    pub size: u64,
    pub progress: u32,
    pub checksum: String,
    pub message: String,
    /// The kind of failure that `message` tells of, when it failed.
    pub kind: Option<ErrorKind>,
    /// When the process itself tries again; empty when it does not wait.
    pub next_retry_time: String,
    /// Bytes a second that it downloads at most, 0: no limit; `None`: it cannot be told.
    pub bandwidth_limit: Option<u64>,
}

/// One reading.
#[derive(Clone, Debug)]
pub struct Observed {
    pub now: Timestamp,
    pub source: BackingImageDataSource,
    pub disks: Disks,
    pub workload: Option<Workload>,
    /// `Err`: it does not answer, and why.
    pub report: Option<Result<Report, String>>,
    /// When this controller looked last, if it met silence then.
    pub met_silence_at: Option<Timestamp>,
    /// The state of the file at the manager of its disk, when that knows it.
    pub taken_over: Option<CopyState>,
    /// The agent of the disk was to take the prepared file over, and did not find it.
    pub is_missed: bool,
    /// The setting `backing-image-allowed-source-addresses`.
    pub allowed_sources: AllowedSources,
    /// Bytes a second that it may download, by [`bandwidth_limit`]; 0: no limit.
    pub bandwidth_limit: u64,
}

/// What the data source of an image may download, by the setting `backing-image-bandwidth-limit` and the image's own limit. One that
/// cannot be kept counts as none.
pub fn bandwidth_limit(setting: u64, image: Option<&BackingImage>) -> u64 {
    let own = image.map(|image| image.spec.bandwidth_limit).filter(|limit| bandwidth::is_possible(*limit));
    bandwidth::stricter(setting, own.unwrap_or(0))
}

/// One step; each can be repeated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    EnsureWorkload(Box<Wish>),
    RemoveWorkload(String),
    /// From now on so many bytes a second are downloaded at most.
    LimitBandwidth(u64),
    RemoveFinalizer,
}

/// What to do now and what to report.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    pub actions: Vec<Action>,
    pub status: BackingImageDataSourceStatus,
    pub recheck_after: Option<Duration>,
}

impl Decision {
    /// Whether the process or the object ends. That is decided on a sure reading only.
    pub fn takes_away(&self) -> bool {
        self.actions.iter().any(|action| matches!(action, Action::RemoveWorkload(_) | Action::RemoveFinalizer))
    }
}

/// Decides about the data source of one image.
pub fn decide(observed: &Observed) -> Decision {
    let mut status = observed.source.status.clone().unwrap_or_default();
    // These count anew after each look that did not meet them.
    status.lost_since.clear();
    status.silent_since.clear();
    let (actions, recheck_after) = plan(observed, &mut status);
    let condition = match status.current_state {
        CopyState::Failed | CopyState::FailedAndCleanup => {
            let mut c = Condition::new(
                READY,
                ConditionStatus::False,
                failure_reason(&observed.source.spec),
                status.message.clone(),
            );
            c.next_retry_time.clone_from(&status.next_retry_time);
            c.with_hint(hint(status.error_kind))
        }
        CopyState::Unknown => Condition::new(READY, ConditionStatus::Unknown, "Unknown", status.message.clone()),
        _ if !status.silent_since.is_empty() => {
            Condition::new(READY, ConditionStatus::Unknown, "NotAnswering", status.message.clone())
        }
        CopyState::Ready | CopyState::ReadyForTransfer => {
            Condition::new(READY, ConditionStatus::True, "Ready", "the file is whole")
        }
        // The process itself waits for its next attempt.
        CopyState::NotStarted | CopyState::Pending | CopyState::Starting | CopyState::InProgress
            if !status.next_retry_time.is_empty() && !status.message.is_empty() =>
        {
            let mut c = Condition::new(READY, ConditionStatus::False, "Retrying", status.message.clone());
            c.next_retry_time.clone_from(&status.next_retry_time);
            c.with_hint(hint(status.error_kind))
        }
        CopyState::InProgress => {
            Condition::new(READY, ConditionStatus::False, "InProgress", format!("{} % prepared", status.progress))
        }
        CopyState::NotStarted | CopyState::Pending | CopyState::Starting => {
            let state = observed.workload.as_ref().map_or(State::Running, |workload| workload.state.clone());
            Condition::new(READY, ConditionStatus::False, "Starting", state.starting(PROCESS))
        }
    };
    condition::set(&mut status.conditions, condition, observed.now);
    Decision { actions, status, recheck_after }
}

fn failure_reason(spec: &BackingImageDataSourceSpec) -> &'static str {
    if unsupported(spec).is_some() { "Unsupported" } else { "Failed" }
}

fn unsupported(spec: &BackingImageDataSourceSpec) -> Option<String> {
    match spec.source_type {
        Some(SourceType::Download) => None,
        Some(other) => Some(format!("sourceType {} is not offered by this version; use download", other.as_str())),
        None => Some("sourceType is missing; set it to download".into()),
    }
}

fn plan(o: &Observed, status: &mut BackingImageDataSourceStatus) -> (Vec<Action>, Option<Duration>) {
    let spec = &o.source.spec;
    let Ok(image) = o.source.metadata.name.clone().unwrap_or_default().parse::<ImageName>() else {
        fail_for_good(status, ErrorKind::Invalid, "its name is not a valid image name".into());
        return (vec![], None);
    };
    let name = data_source_workload_name(&image);
    let remove = || if o.workload.is_some() { vec![Action::RemoveWorkload(name.clone())] } else { vec![] };
    if o.source.metadata.deletion_timestamp.is_some() {
        let mut actions = remove();
        if o.source.metadata.finalizers.iter().flatten().any(|f| f == FINALIZER) {
            actions.push(Action::RemoveFinalizer);
        }
        return (actions, None);
    }
    if spec.file_transferred {
        finish(status);
        return (remove(), None);
    }
    if let Some(why) = unsupported(spec) {
        fail_for_good(status, ErrorKind::Unsupported, why);
        return (remove(), None);
    }

    let mut attempt = attempt_of(spec);
    if !o.allowed_sources.is_empty() {
        attempt.insert(ATTEMPT_ALLOWED.into(), o.allowed_sources.to_string());
    }
    if status.running_parameters != attempt {
        // A new wish or setting is tried at once; a mere change of the disk keeps the back-off, lest two full disks be tried in turns for ever.
        let without_disk = |p: &BTreeMap<String, String>| {
            p.iter().filter(|(k, _)| *k != ATTEMPT_DISK).map(|(k, v)| (k.clone(), v.clone())).collect::<Vec<_>>()
        };
        if without_disk(&status.running_parameters) != without_disk(&attempt) {
            *status = BackingImageDataSourceStatus {
                owner_id: status.owner_id.clone(),
                conditions: status.conditions.clone(),
                other: status.other.clone(),
                ..Default::default()
            };
        }
        status.running_parameters = attempt;
        status.current_state = CopyState::Pending;
        status.progress = 0;
        // What it was says something of the old disk; the new one is not known to be full.
        status.error_kind = None;
    }
    let wish = wish(&o.source, &image, &o.allowed_sources, o.bandwidth_limit);
    match o.disks.get(&spec.disk_uuid).map(|d| &d.health) {
        Some(Health::Ready) => {}
        Some(Health::NotReady(why) | Health::Unknown(why)) => {
            status.current_state = CopyState::Unknown;
            status.message = why.clone();
            return (vec![], None);
        }
        None => {
            status.current_state = CopyState::Unknown;
            status.message = format!("no node has reported disk {}", spec.disk_uuid);
            return (vec![], None);
        }
    }
    match &o.workload {
        Some(workload) if !workload.wish.is_same_work(&wish) => {
            status.current_state = CopyState::Pending;
            (vec![Action::RemoveWorkload(name), Action::EnsureWorkload(Box::new(wish))], None)
        }
        Some(workload) => follow(o, status, workload, &name),
        None => start(o, status, wish),
    }
}

fn start(o: &Observed, status: &mut BackingImageDataSourceStatus, wish: Wish) -> (Vec<Action>, Option<Duration>) {
    if was_handed_over(o, status) {
        return (vec![], None);
    }
    if let Some(next) = parse(&status.next_retry_time).and_then(|next| pending(o.now, next, MAX)) {
        if status.current_state != CopyState::Failed {
            status.current_state = CopyState::Failed;
        }
        return (vec![], Some(until(o.now, next)));
    }
    status.current_state = CopyState::Starting;
    status.progress = 0;
    status.ip.clear();
    status.storage_ip.clear();
    (vec![Action::EnsureWorkload(Box::new(wish))], None)
}

fn follow(
    o: &Observed,
    status: &mut BackingImageDataSourceStatus,
    workload: &Workload,
    name: &str,
) -> (Vec<Action>, Option<Duration>) {
    status.ip.clone_from(&workload.ip);
    status.storage_ip.clone_from(&workload.ip);
    let remove = vec![Action::RemoveWorkload(name.to_owned())];
    match (&workload.state, &o.report) {
        (State::Unknown(why), _) => {
            status.current_state = CopyState::Unknown;
            status.message = format!("its node does not answer: {why}");
            (vec![], None)
        }
        (State::Failed(_), _) if was_handed_over(o, status) => (remove, None),
        (State::Failed(why), _) => (remove, Some(fail(o, status, None, why.clone()))),
        (State::Starting(_), _) | (State::Running, None) => {
            status.current_state = CopyState::Starting;
            if matches!(&workload.state, State::Starting(why) if !why.is_empty()) {
                status.message = workload.state.starting(PROCESS);
            }
            (vec![], None)
        }
        (State::Running, Some(Err(why))) => {
            let goes_on = o.met_silence_at.is_some_and(|at| after(at, LOOKS_APART) >= o.now);
            let before = o.source.status.as_ref().filter(|_| goes_on);
            let since = begun(o.now, before.map_or("", |before| &before.silent_since));
            let limit = after(since, SILENCE_LIMIT);
            let said = format!("{PROCESS} does not answer, since {since}: {why}");
            let comes_again = comes_again(o.source.spec.source_type);
            if limit <= o.now && comes_again {
                return if was_handed_over(o, status) {
                    (remove, None)
                } else {
                    (remove, Some(fail(o, status, Some(ErrorKind::Unavailable), said)))
                };
            }
            // It may be busy: what was known stays, and it is asked again.
            status.silent_since = since.to_string();
            status.message = if comes_again {
                format!("{said}; it is ended and started again at {limit}")
            } else {
                format!("{said}; it is left as it is, since bytes may still come that nobody else has")
            };
            (vec![], Some(ASK_AGAIN))
        }
        (State::Running, Some(Ok(report))) => {
            if matches!(report.state, CopyState::Failed | CopyState::FailedAndCleanup) {
                status.size = report.size.max(status.size);
                return (remove, Some(fail(o, status, report.kind, report.message.clone())));
            }
            let lost = match report.state {
                CopyState::Ready if status.current_state == CopyState::Ready => {
                    Some("the file was handed over, and the agent of the disk does not have it")
                }
                CopyState::ReadyForTransfer if o.is_missed => {
                    Some("the file was prepared, and is not there any more: the agent of the disk cannot take it over")
                }
                _ => None,
            };
            let lost_in = lost.and_then(|_| missed(o, status));
            if let (Some(why), Some(Duration::ZERO)) = (lost, lost_in) {
                return (remove, Some(fail(o, status, None, why.into())));
            }
            status.current_state =
                if report.state == CopyState::NotStarted { CopyState::Starting } else { report.state };
            status.size = report.size;
            status.progress = report.progress;
            status.checksum.clone_from(&report.checksum);
            status.message.clone_from(&report.message);
            status.error_kind = None;
            status.next_retry_time.clone_from(&report.next_retry_time);
            if matches!(report.state, CopyState::ReadyForTransfer | CopyState::Ready) {
                status.failures = 0;
                status.progress = 100;
                return (vec![], lost_in);
            }
            // One that is of an older version cannot be told.
            let is_other = report.bandwidth_limit.is_some_and(|limit| limit != o.bandwidth_limit);
            (is_other.then_some(Action::LimitBandwidth(o.bandwidth_limit)).into_iter().collect(), None)
        }
    }
}

/// The process has done its part and the agent of the disk has the file, or is about to look at it.
fn was_handed_over(o: &Observed, status: &mut BackingImageDataSourceStatus) -> bool {
    let is_held = matches!(
        o.taken_over,
        Some(CopyState::Ready | CopyState::InProgress | CopyState::Pending | CopyState::Starting | CopyState::Unknown)
    );
    let is_whole = matches!(status.current_state, CopyState::ReadyForTransfer | CopyState::Ready);
    if is_whole && is_held {
        status.current_state = CopyState::Ready;
    }
    is_whole && is_held
}

/// Whether an ended preparation can be made again. What a user uploads comes once.
fn comes_again(source_type: Option<SourceType>) -> bool {
    match source_type {
        // Longhorn's default.
        None => true,
        Some(SourceType::Download | SourceType::ExportFromVolume | SourceType::Restore | SourceType::Clone) => true,
        Some(SourceType::Upload) => false,
    }
}

/// How long until what was handed over, or was to be, counts as lost, when the agent says that it does not have it.
fn missed(o: &Observed, status: &mut BackingImageDataSourceStatus) -> Option<Duration> {
    if !matches!(o.taken_over, Some(CopyState::Failed | CopyState::FailedAndCleanup)) {
        return None;
    }
    let since = begun(o.now, o.source.status.as_ref().map_or("", |before| &before.lost_since));
    status.lost_since = since.to_string();
    Some(until(o.now, after(since, LOST_AFTER)))
}

fn finish(status: &mut BackingImageDataSourceStatus) {
    status.current_state = CopyState::Ready;
    status.progress = 100;
    status.message.clear();
    status.error_kind = None;
    status.failures = 0;
    status.next_retry_time.clear();
    status.ip.clear();
    status.storage_ip.clear();
}

fn fail(o: &Observed, status: &mut BackingImageDataSourceStatus, kind: Option<ErrorKind>, message: String) -> Duration {
    status.failures = Retry { failures: status.failures, ..Default::default() }.failed(o.now, "").failures;
    // What a repetition will hardly cure is tried again slowly, since sources do change.
    let wait = if kind.is_some_and(ErrorKind::is_final) { MAX } else { delay(status.failures) };
    status.current_state = CopyState::Failed;
    status.message = message;
    status.error_kind = kind;
    status.next_retry_time = after(o.now, wait).to_string();
    status.ip.clear();
    status.storage_ip.clear();
    wait
}

fn fail_for_good(status: &mut BackingImageDataSourceStatus, kind: ErrorKind, message: String) {
    status.current_state = CopyState::Failed;
    status.message = message;
    status.error_kind = Some(kind);
    status.next_retry_time.clear();
}

/// What the user can do about a failure.
pub fn hint(kind: Option<ErrorKind>) -> String {
    match kind {
        Some(ErrorKind::Exhausted) => "free space or add a disk".into(),
        Some(kind) if kind.is_final() => "correct the image's source or checksum; a change is tried at once".into(),
        _ => "check that the address of the source can be reached from the node of the disk".into(),
    }
}

/// Whether what the status says is about what the image asks for now, and not about a former address or checksum.
pub fn answers(source: &BackingImageDataSource, image: &BackingImage) -> bool {
    let status = image.status.clone().unwrap_or_default();
    is_about_this_attempt(source)
        && source.spec.parameters == image.spec.source_parameters
        && (image.spec.checksum.is_empty() || source.spec.checksum == content(&image.spec, &status))
}

/// Whether the status speaks of the current wish, and not of a former disk or address.
pub fn is_about_this_attempt(source: &BackingImageDataSource) -> bool {
    let Some(status) = &source.status else { return false };
    let mut running = status.running_parameters.clone();
    // A setting, which is no part of the wish.
    running.remove(ATTEMPT_ALLOWED);
    running == attempt_of(&source.spec)
}

fn attempt_of(spec: &BackingImageDataSourceSpec) -> BTreeMap<String, String> {
    let mut attempt = spec.parameters.clone();
    attempt.insert(ATTEMPT_DISK.into(), spec.disk_uuid.clone());
    if !spec.checksum.is_empty() {
        attempt.insert(ATTEMPT_CHECKSUM.into(), spec.checksum.clone());
    }
    attempt
}

fn wish(source: &BackingImageDataSource, image: &ImageName, allowed: &AllowedSources, bandwidth_limit: u64) -> Wish {
    let spec = &source.spec;
    let mut args: Vec<String> = ["data-source", "--listen"].map(String::from).into();
    args.push(format!("$(POD_IP):{MANAGER_PORT}"));
    args.push("--sync-listen".into());
    args.push(format!("$(POD_IP):{SYNC_PORT}"));
    let source_type = spec.source_type.map_or("", SourceType::as_str);
    for (flag, value) in [("--name", image.as_str()), ("--uuid", &spec.uuid), ("--source-type", source_type)] {
        args.extend([flag.to_owned(), value.to_owned()]);
    }
    if !spec.checksum.is_empty() {
        args.extend(["--checksum".to_owned(), spec.checksum.clone()]);
    }
    if !allowed.is_empty() {
        args.extend(["--allowed-source-addresses".to_owned(), allowed.to_string()]);
    }
    if bandwidth_limit > 0 {
        args.push(format!("{BANDWIDTH_LIMIT_FLAG}{bandwidth_limit}"));
    }
    args.extend(["--disk-path".to_owned(), spec.disk_path.clone()]);
    let labels = [
        (label::COMPONENT, "backing-image-data-source"),
        (label::MANAGED_BY, MANAGED_BY),
        (label::DATA_SOURCE, image.as_str()),
        (label::DISK_UUID, &spec.disk_uuid),
        (label::NODE, &spec.node_id),
    ];
    Wish {
        name: data_source_workload_name(image),
        node: spec.node_id.clone(),
        labels: labels.into_iter().map(|(k, v)| (k.to_owned(), v.to_owned())).collect(),
        args,
        disk_path: spec.disk_path.clone(),
        // Nobody asks a data source on the other port, so it serves nothing there.
        ready_ports: vec![MANAGER_PORT],
        owner: Owner::of(source),
        // An address may hold a password or a signature.
        secrets: Secrets([(SOURCE_PARAMETERS.to_owned(), json!(spec.parameters).to_string())].into()),
        revision: revision(source),
    }
}

/// Which parameters of which object these are, without telling them: every change of a spec is counted.
fn revision(source: &BackingImageDataSource) -> String {
    let uid = source.metadata.uid.as_deref().unwrap_or_default();
    let uid: String = uid.chars().filter(char::is_ascii_hexdigit).take(12).collect();
    format!("{uid}-{}", source.metadata.generation.unwrap_or_default())
}

#[cfg(test)]
mod tests;

//! Where the first file of an image comes from.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use api::data_source::BackingImageDataSourceSpec;
use api::image::{BackingImageStatus, CopyState, DiskFileSpec};
use api::names::condition::READY;
use api::names::{FINALIZER, GROUP, VERSION};
use api::{BackingImageDataSource, Condition, ConditionStatus, ErrorKind};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;

use super::recovery::{self, Again, Loss, Recovery};
use super::{Action, Observed, content, copies, name_of, ready_disks, request, selectors, unsupported};
use crate::data_source::is_about_this_attempt;
use crate::disk::{Disk, Health};
use crate::placement::{Choice, Chosen, choose_for_copies, refusal};
use crate::retry::until;

type Plan = (Vec<Action>, Option<Condition>, Option<Duration>);

/// Plans the data source; adds its disk to the wanted copies. The condition says what is wrong, if anything is.
pub(super) fn plan(o: &Observed, status: &BackingImageStatus, map: &mut BTreeMap<String, DiskFileSpec>) -> Plan {
    let any_ready = ready_disks(status).next().is_some();
    match &o.data_source {
        Some(source) if any_ready && !source.spec.file_transferred => {
            let spec = BackingImageDataSourceSpec { file_transferred: true, ..source.spec.clone() };
            (vec![Action::SetDataSourceSpec(Box::new(spec))], None, None)
        }
        _ if any_ready => (vec![], None, None),
        Some(source) if source.metadata.deletion_timestamp.is_some() => {
            (vec![], waiting("DataSourceEnds", "the former data source of this image is being removed"), None)
        }
        Some(source) if source.spec.file_transferred => recover(o, status, source, map),
        _ if let Some(problem) = unsupported(&o.image.spec) => (vec![], Some(problem), None),
        None => begin(o, status, map),
        Some(source) => follow(o, status, source, map),
    }
}

fn waiting(reason: &str, message: impl Into<String>) -> Option<Condition> {
    Some(Condition::new(READY, ConditionStatus::False, reason, message))
}

fn no_place(choice: &Choice) -> Option<Condition> {
    waiting("NoEligibleDisk", format!("no disk can take the first copy: {}", choice.reasons()))
        .map(|c| c.with_hint("add a disk, free space, or change the image's selectors"))
}

/// The disk for the first file: one that is wanted already when possible, else any eligible one.
fn choose(
    o: &Observed,
    map: &BTreeMap<String, DiskFileSpec>,
    without: &BTreeSet<String>,
    bytes: u64,
) -> Result<Chosen, Choice> {
    let selectors = selectors(&o.image);
    let none = BTreeSet::new();
    let request = request(o, &selectors, without, &none, bytes);
    let wanted = |d: &&Disk| map.contains_key(&d.id) && !without.contains(&d.id);
    if let Some(disk) = o
        .disks
        .list
        .iter()
        .filter(wanted)
        .find(|d| refusal(d, &selectors, &o.settings).is_none() && d.available_bytes >= bytes.max(1))
    {
        return Ok(Chosen { disk: disk.clone(), why: "a copy is wanted there anyway".into() });
    }
    let mut choice = choose_for_copies(&request, 1, None);
    choice.chosen.pop().ok_or(choice)
}

/// Wants the first copy on that disk, and says why there.
fn want(map: &mut BTreeMap<String, DiskFileSpec>, Chosen { disk, why }: Chosen) -> Disk {
    let reason = || format!("the first file is prepared there; {why}");
    map.entry(disk.id.clone()).or_insert_with(|| DiskFileSpec { reason: reason(), ..Default::default() });
    disk
}

fn begin(o: &Observed, status: &BackingImageStatus, map: &mut BTreeMap<String, DiskFileSpec>) -> Plan {
    let mut copies = status.disk_file_status_map.iter();
    if let Some((disk, file)) = copies.find(|(d, f)| f.state == CopyState::Unknown && !o.disks.is_gone(d)) {
        let message = format!("the copy on {} cannot be asked: {}", o.disks.label(disk), file.message);
        return (vec![], waiting("Unknown", message), None);
    }
    let disk = match choose(o, map, &BTreeSet::new(), status.size) {
        Ok(chosen) => want(map, chosen),
        Err(choice) => return (vec![], no_place(&choice), None),
    };
    let mut source = BackingImageDataSource::new(name_of(&o.image), spec(o, status, &disk));
    source.metadata.finalizers = Some(vec![FINALIZER.into()]);
    source.metadata.owner_references = Some(vec![OwnerReference {
        api_version: format!("{GROUP}/{VERSION}"),
        kind: "BackingImage".into(),
        name: name_of(&o.image).into(),
        uid: o.image.metadata.uid.clone().unwrap_or_default(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    }]);
    (vec![Action::CreateDataSource(Box::new(source))], None, None)
}

fn spec(o: &Observed, status: &BackingImageStatus, disk: &Disk) -> BackingImageDataSourceSpec {
    BackingImageDataSourceSpec {
        node_id: disk.node.clone(),
        uuid: status.uuid.clone(),
        disk_uuid: disk.id.clone(),
        disk_path: disk.path.clone(),
        // Once the content is known, only the same content will do, whatever is wished since.
        checksum: content(&o.image.spec, status).to_owned(),
        source_type: o.image.spec.source_type,
        parameters: o.image.spec.source_parameters.clone(),
        file_transferred: false,
        ..Default::default()
    }
}

/// A preparation is under way: another disk when this one is gone or full, new parameters when the user changed them.
fn follow(
    o: &Observed,
    status: &BackingImageStatus,
    source: &BackingImageDataSource,
    map: &mut BTreeMap<String, DiskFileSpec>,
) -> Plan {
    let seen = source.status.clone().unwrap_or_default();
    let old = &source.spec.disk_uuid;
    let has_failed =
        is_about_this_attempt(source) && matches!(seen.current_state, CopyState::Failed | CopyState::FailedAndCleanup);
    let is_full = has_failed && seen.error_kind == Some(ErrorKind::Exhausted);
    let must_move = match o.disks.get(old) {
        None => o.disks.is_gone(old).then(|| format!("no node has disk {old} any more")),
        Some(disk) => match &disk.health {
            Health::NotReady(why) => Some(why.clone()),
            Health::Unknown(_) | Health::Ready => is_full.then(|| seen.message.clone()),
        },
    };
    let chosen = match (&must_move, o.disks.get(old)) {
        (Some(why), _) => match choose(o, map, &BTreeSet::from([old.clone()]), seen.size) {
            Ok(chosen) => {
                let is_wanted = o.replicas.iter().any(|r| r.spec.disk_id == *old);
                if !is_wanted {
                    map.remove(old);
                }
                chosen
            }
            Err(choice) => {
                let message = format!("{why}; and no other disk can take the first copy: {}", choice.reasons());
                return (
                    vec![],
                    waiting("NoEligibleDisk", message).map(|c| c.with_hint("add a disk or free space")),
                    None,
                );
            }
        },
        (None, Some(disk)) => Chosen { disk: disk.clone(), why: "its preparation is under way".into() },
        (None, None) => {
            return (
                vec![],
                waiting("Unknown", format!("no node has reported disk {old} yet; the preparation waits for it")),
                None,
            );
        }
    };
    let disk = want(map, chosen);
    let wanted = BackingImageDataSourceSpec { other: source.spec.other.clone(), ..spec(o, status, &disk) };
    // A checksum that became known on the way is the file's own, not a new wish.
    let wanted = if o.image.spec.checksum.is_empty() && disk.id == *old {
        BackingImageDataSourceSpec { checksum: source.spec.checksum.clone(), ..wanted }
    } else {
        wanted
    };
    let actions = if wanted == source.spec { vec![] } else { vec![Action::SetDataSourceSpec(Box::new(wanted))] };
    // A process that is alive may wait before its next try.
    let is_trying_again = is_about_this_attempt(source) && !seen.next_retry_time.is_empty();
    let problem = (has_failed || is_trying_again).then(|| {
        let (reason, what) = if has_failed {
            ("DataSourceFailed", "could not be prepared")
        } else {
            ("DataSourceRetries", "is not prepared yet")
        };
        let message = format!("the file {what} on {}: {}", o.disks.label(old), seen.message);
        let mut condition = Condition::new(READY, ConditionStatus::False, reason, message);
        condition.next_retry_time.clone_from(&seen.next_retry_time);
        condition.with_hint(crate::data_source::hint(seen.error_kind))
    });
    (actions, problem, None)
}

/// No copy is ready any more: the image is prepared anew when nobody can have it, from the same source, after the recovery interval.
fn recover(
    o: &Observed,
    status: &BackingImageStatus,
    source: &BackingImageDataSource,
    map: &mut BTreeMap<String, DiskFileSpec>,
) -> Plan {
    let loss = Loss {
        now: o.now,
        spec: &o.image.spec,
        status,
        disks: &o.disks,
        managers: &o.managers,
        // Nothing is exported yet.
        exported: None,
        wait: o.settings.recovery_wait,
    };
    let again = match recovery::decide(&loss) {
        Recovery::FromCopy { .. } | Recovery::UnderWay => return (vec![], None, None),
        Recovery::Unknown { disk, why } => {
            let message = format!("the copy on {} cannot be asked: {why}", o.disks.label(&disk));
            return (vec![], waiting("Unknown", message), None);
        }
        Recovery::Final => {
            let message = format!("every copy is lost, and the file is {}", Again::Never.sentence());
            let hint = "delete the image, create it again and upload the file again";
            return (vec![], waiting("Lost", message).map(|c| c.with_hint(hint)), None);
        }
        Recovery::Later { again, .. } | Recovery::Now(again) if let Some(mut problem) = unsupported(&o.image.spec) => {
            problem.message =
                format!("every copy is lost; the image would be {}, but {}", again.sentence(), problem.message);
            return (vec![], Some(problem), None);
        }
        Recovery::Later { at, again } => {
            let message = format!("every copy is lost; the image will be {}", again.sentence());
            return (vec![], waiting("Recovering", message).map(|c| c.with_next_retry(at)), Some(until(o.now, at)));
        }
        Recovery::Now(again) => again,
    };
    let full: BTreeSet<String> =
        status.disk_file_status_map.iter().filter(|(_, f)| copies::has_no_room(f)).map(|(d, _)| d.clone()).collect();
    let disk = match choose(o, map, &full, status.size) {
        Ok(chosen) => want(map, chosen),
        Err(choice) => return (vec![], no_place(&choice), None),
    };
    let wanted = BackingImageDataSourceSpec { other: source.spec.other.clone(), ..spec(o, status, &disk) };
    let message = format!("every copy is lost; the image is {}", again.sentence());
    (vec![Action::SetDataSourceSpec(Box::new(wanted))], waiting("Recovering", message), None)
}

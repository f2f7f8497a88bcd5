//! The next step of one copy that a disk shall hold.

use api::image::{BackingImageStatus, CopyState};
use api::manager::FileInfo;
use api::names::MANAGER_PORT;
use api::{BackingImage, ErrorKind};

use super::{Action, Attempt, Decision, FileWish, Observed, verification};
use crate::image::{content, difference};
use crate::retry::sooner;

/// Plans the next step of one wanted copy; returns what to report of it.
pub(super) fn one_file(
    o: &Observed,
    image: &BackingImage,
    reported: Option<FileInfo>,
    before: Option<&FileInfo>,
    decision: &mut Decision,
) -> Option<FileInfo> {
    let name = image.metadata.name.clone().unwrap_or_default();
    let known = image.status.clone().unwrap_or_default();
    let mut attempt = decision.memory.copies.get(&name).cloned().unwrap_or_default();
    let mut file = reported.clone();
    file.iter_mut().for_each(|f| judge(f, image, &known));
    let failed = match &file {
        Some(f) if f.state == CopyState::Ready => {
            decision.memory.copies.remove(&name);
            return file;
        }
        Some(f) if matches!(f.state, CopyState::Failed | CopyState::FailedAndCleanup) => Some(f.message.clone()),
        Some(_) => {
            attempt.is_running = true;
            decision.memory.copies.insert(name, attempt);
            return file;
        }
        None => None,
    };
    // What went wrong before the file is made here is history.
    let is_history = o.data_sources.get(&name).is_some_and(|source| {
        let state = source.status.as_ref().map(|s| s.current_state).unwrap_or_default();
        let is_here = !source.spec.file_transferred && source.spec.disk_uuid == o.disk_id;
        is_here && !matches!(state, CopyState::ReadyForTransfer | CopyState::Ready)
    });
    if is_history && attempt.is_hand_over {
        // It says nothing of the file that is made now.
        attempt = Attempt::default();
        decision.memory.copies.remove(&name);
    }
    if let Some(message) = &failed
        && (attempt.is_running || attempt.retry.next.is_none())
    {
        attempt.retry = attempt.retry.failed(o.now, message.clone());
        attempt.kind = file.as_ref().and_then(|f| f.error_kind);
        attempt.is_running = false;
    }
    let step = if attempt.retry.is_due(o.now) { step(o, image, &known, file.as_ref(), before, &attempt) } else { None };
    match step {
        Some(step) => {
            let is_got_anew = matches!(step, Action::SyncFile { .. } | Action::FetchFile { from: Some(_), .. });
            if failed.is_some() && is_got_anew && verification::must_go_first(reported.as_ref()) {
                decision.actions.push(Action::ReplaceFile { image: name.clone(), uuid: known.uuid.clone() });
            }
            attempt.is_hand_over = matches!(step, Action::FetchFile { from: Some(_), .. });
            decision.actions.push(step);
            attempt.is_running = true;
        }
        None => decision.recheck_after = sooner(decision.recheck_after, attempt.retry.wait(o.now)),
    }
    // A refused request left no file; its reason shall be seen all the same.
    if file.is_none() && !attempt.retry.message.is_empty() && !is_history {
        let message = attempt.retry.message.clone();
        file = Some(FileInfo { state: CopyState::Failed, message, error_kind: attempt.kind, ..Default::default() });
    }
    if file.is_none() {
        // Held before, and the agent has just been started again: it is asked to adopt it.
        file = before.filter(|b| b.state == CopyState::Unknown || b.state == CopyState::Ready).map(|b| FileInfo {
            state: CopyState::Unknown,
            message: why_unknown(b),
            ..b.clone()
        });
    }
    if let Some(f) = &mut file
        && f.state == CopyState::Failed
    {
        f.next_retry_time = attempt.retry.next_text();
    }
    if attempt != Attempt::default() {
        decision.memory.copies.insert(name, attempt);
    }
    file
}

/// A file that its agent takes for good has failed when it is no copy of the image.
pub(super) fn judge(file: &mut FileInfo, image: &BackingImage, known: &BackingImageStatus) {
    if file.state == CopyState::Ready
        && let Some(why) = difference(file, &image.spec, known)
    {
        (file.state, file.message, file.error_kind) = (CopyState::Failed, why, Some(ErrorKind::Incompatible));
    }
}

/// Why nobody can tell of a copy that was there before its agent was started again: what was said last, if anything.
fn why_unknown(before: &FileInfo) -> String {
    match before.message.as_str() {
        "" => "the agent of the disk was started again and is asked to look at it".into(),
        said => said.to_owned(),
    }
}

/// How to get a copy that the agent does not have, or that failed.
fn step(
    o: &Observed,
    image: &BackingImage,
    known: &BackingImageStatus,
    failed: Option<&FileInfo>,
    before: Option<&FileInfo>,
    attempt: &Attempt,
) -> Option<Action> {
    let name = image.metadata.name.clone().unwrap_or_default();
    let checksum = content(&image.spec, known).to_owned();
    // Before the first file is whole its length is only an announcement.
    let size = if known.checksum.is_empty() { 0 } else { known.size };
    let file = FileWish { image: name.clone(), uuid: known.uuid.clone(), size, checksum };
    let adopt = |file| Some(Action::FetchFile { file, from: None });
    let peers = o.peers.get(&name).filter(|p| !p.is_empty());
    let sync = |file| peers.map(|from| Action::SyncFile { file, from: from.clone() });
    let source = o.data_sources.get(&name).filter(|s| !s.spec.file_transferred);
    match source {
        Some(source) if source.spec.disk_uuid == o.disk_id => {
            let seen = source.status.clone().unwrap_or_default();
            match seen.current_state {
                CopyState::ReadyForTransfer if !seen.ip.is_empty() => {
                    Some(Action::FetchFile { file, from: Some(format!("{}:{MANAGER_PORT}", seen.ip)) })
                }
                // Handed over already, to an agent that died since.
                CopyState::Ready => adopt(file),
                _ => None,
            }
        }
        _ => {
            let was_held = before.is_some_and(|b| matches!(b.state, CopyState::Ready | CopyState::Unknown));
            // Damage is not cured by looking again; that would only put off the day on which the image is downloaded again.
            let is_damaged = failed.is_some_and(|f| f.error_kind == Some(ErrorKind::Corrupt));
            if failed.is_none() && was_held && attempt.retry.failures == 0 && !attempt.is_running {
                return adopt(file);
            }
            match sync(file.clone()) {
                Some(sync) => Some(sync),
                // No ready copy anywhere: what lies on the disk is the best there is. Not before the first file was whole,
                // also when its data source is still to be created.
                None if source.is_none() && !known.checksum.is_empty() && !is_damaged => adopt(file),
                None => None,
            }
        }
    }
}

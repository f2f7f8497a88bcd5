//! What to do about one replica process: an observation in, a step and a report out.

use api::engine::{DesireState, InstanceState};
use api::image::CopyState;
use api::names::condition::{READY, WAIT_FOR_BACKING_IMAGE};
use api::{BackingImage, Condition, ConditionStatus, Node, Replica};
use proto::replica::ImageFile;

use crate::endings::Work;

/// The process of a replica, as it was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Process {
    /// There is none, and its disk is away; why.
    DiskAway(String),
    /// There is none, and its disk no longer has the data that it had; why. A blank one must not take its place.
    DataGone(String),
    /// There is none.
    None,
    /// It runs and answers.
    Serving,
    /// It runs and answers, with the size that the volume had before it grew.
    Outgrown { has: u64, wanted: u64 },
    /// It runs and does not answer (yet).
    Silent,
    /// It has ended without being asked; the end of its log.
    Ended(String),
}

/// One step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Start a process; over this image file, if any.
    Start(Option<ImageFile>),
    /// End the process and forget it.
    End,
    /// End the process, remove the data, release the object.
    Remove,
    /// Its data lies on a disk that is away: wait for the disk, or for the user to take it off the node.
    AwaitDisk,
    Nothing,
}

/// What to do and what to report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    pub step: Step,
    pub state: InstanceState,
    pub conditions: Vec<Condition>,
}

/// Decides about one replica of this node. `image`: the BackingImage that it names, when there is one of that name.
pub fn decide(replica: &Replica, image: Option<&BackingImage>, process: &Process) -> Decision {
    let is_wished = replica.spec.desire_state == DesireState::Running;
    if replica.metadata.deletion_timestamp.is_some() {
        return match process {
            Process::DiskAway(why) => {
                let message = format!("its data cannot be removed: {why}");
                let hint = "bring the disk back, or remove it from the node";
                let waits = not_ready("DiskAway", &message).with_hint(hint);
                Decision { step: Step::AwaitDisk, state: InstanceState::Stopping, conditions: vec![waits] }
            }
            _ => Decision { step: Step::Remove, state: InstanceState::Stopping, conditions: vec![] },
        };
    }
    let (state, step, ready) = match (is_wished, process) {
        (true, Process::DiskAway(why)) => (InstanceState::Error, Step::Nothing, not_ready("DiskAway", why)),
        (false, Process::DiskAway(why)) => (InstanceState::Stopped, Step::Nothing, not_ready("DiskAway", why)),
        (true, Process::DataGone(why)) => (InstanceState::Error, Step::Nothing, not_ready("DataGone", why)),
        (false, Process::DataGone(why)) => (InstanceState::Stopped, Step::Nothing, not_ready("DataGone", why)),
        (false, Process::None) => (InstanceState::Stopped, Step::Nothing, not_ready("Stopped", "it is not wanted now")),
        (false, _) => (InstanceState::Stopping, Step::End, not_ready("Stopping", "it is being ended")),
        (true, Process::Serving) => {
            (InstanceState::Running, Step::Nothing, Condition::new(READY, ConditionStatus::True, "Serving", ""))
        }
        // The size changes only while no engine uses it.
        (true, Process::Outgrown { has, wanted }) => {
            let message = format!("it is started again, to grow from {has} to {wanted} bytes");
            (InstanceState::Starting, Step::End, not_ready("Growing", &message))
        }
        (true, Process::Silent) => {
            (InstanceState::Starting, Step::Nothing, not_ready("Starting", "its process does not answer yet"))
        }
        // It stays like this until it is no longer wanted: who lost its process may have missed writes.
        (true, Process::Ended(words)) => {
            let said =
                if words.is_empty() { "its log is empty".to_owned() } else { format!("its last words: {words}") };
            (
                InstanceState::Error,
                Step::Nothing,
                not_ready("ProcessEnded", &format!("the replica process ended; {said}")),
            )
        }
        (true, Process::None) => {
            let start = match copy(replica, image) {
                Ok(file) => return starting(file),
                Err(waits) => waits,
            };
            return Decision {
                step: Step::Nothing,
                state: InstanceState::Stopped,
                conditions: vec![not_ready("WaitForBackingImage", &start.message), *start],
            };
        }
    };
    Decision { step, state, conditions: vec![ready, no_wait()] }
}

/// What to take the process of a replica for while its disk does not answer: the process cannot be asked either, its socket is there.
/// `None`: what is known of it stays, since its engine knows more. `recorded`: that it lives, or the end of its log, if one was started.
pub fn behind_silence(replica: &Replica, recorded: Option<Result<(), String>>, why: String) -> Option<Process> {
    let is_wished = replica.spec.desire_state == DesireState::Running;
    let was_running = replica.status.as_ref().is_some_and(|s| s.current_state == InstanceState::Running);
    match recorded {
        _ if replica.metadata.deletion_timestamp.is_some() => Some(Process::DiskAway(why)),
        None => Some(Process::DiskAway(why)),
        Some(Err(words)) => Some(Process::Ended(words)),
        Some(Ok(())) if !is_wished => Some(Process::Silent),
        Some(Ok(())) if was_running => None,
        // No engine has it yet: the attachment goes on without it rather than wait for the disk.
        Some(Ok(())) => Some(Process::DiskAway(why)),
    }
}

/// What to report of a deleted replica on a disk that is away before its object is released: nobody can remove its data any more.
/// `None` while its disk may still come back to this node.
///
/// That is over when the user took the disk off the node, or the node has told that another one is at its place. One that is not
/// mounted there, or not the one that the node knows, is only away.
pub fn give_up(replica: &Replica, node: &Node) -> Option<Decision> {
    let spec = &replica.spec;
    let at_its_place = node.spec.disks.iter().find(|(_, disk)| disk.path == spec.disk_path);
    let now = match at_its_place {
        None => "was taken off this node".to_owned(),
        Some((name, _)) => {
            let told = node.status.as_ref()?.disk_status.get(name)?;
            let is_another = !told.disk_uuid.is_empty() && told.disk_uuid != spec.disk_id;
            is_another.then(|| format!("gave its place `{}` to disk {}", spec.disk_path, told.disk_uuid))?
        }
    };
    let message = format!(
        "it is deleted without its data: disk {} {now}; `replicas/{}` stays on it",
        spec.disk_id, spec.data_directory_name
    );
    let left = not_ready("DataLeftBehind", &message).with_hint("remove that directory when the disk is used again");
    Some(Decision { step: Step::AwaitDisk, state: InstanceState::Stopping, conditions: vec![left] })
}

/// What to report while a replica is being ended or removed; `problem`: what is in the way.
pub fn at_work(replica: &Replica, work: Work, problem: Option<String>) -> Decision {
    let doing = match work {
        Work::End => "it is being ended",
        Work::Remove => "its data is being removed",
    };
    // Who wishes for it again goes on without it: nobody knows when it can be started.
    let is_in_want = problem.is_some() && replica.spec.desire_state == DesireState::Running;
    let is_failed = is_in_want && replica.metadata.deletion_timestamp.is_none();
    let state = if is_failed { InstanceState::Error } else { InstanceState::Stopping };
    let message = problem.map_or_else(|| doing.to_owned(), |problem| format!("{doing}: {problem}"));
    Decision { step: Step::Nothing, state, conditions: vec![not_ready("Stopping", &message)] }
}

fn starting(file: Option<ImageFile>) -> Decision {
    let ready = not_ready("Starting", "its process is being started");
    Decision { step: Step::Start(file), state: InstanceState::Starting, conditions: vec![ready, no_wait()] }
}

fn not_ready(reason: &str, message: &str) -> Condition {
    Condition::new(READY, ConditionStatus::False, reason, message)
}

fn no_wait() -> Condition {
    Condition::new(WAIT_FOR_BACKING_IMAGE, ConditionStatus::False, "Ready", "")
}

/// The image's file on the disk of this replica, or what it waits for.
fn copy(replica: &Replica, image: Option<&BackingImage>) -> Result<Option<ImageFile>, Box<Condition>> {
    let name = &replica.spec.backing_image;
    if name.is_empty() {
        return Ok(None);
    }
    let wait =
        |reason: &str, message: String| Condition::new(WAIT_FOR_BACKING_IMAGE, ConditionStatus::True, reason, message);
    let Some(image) = image else {
        let message = format!("backing image {name} does not exist");
        return Err(Box::new(
            wait("GetBackingImageFailed", message).with_hint(format!("create a backing image named {name}")),
        ));
    };
    let status = image.status.clone().unwrap_or_default();
    let disk = &replica.spec.disk_id;
    let copy = status.disk_file_status_map.get(disk).cloned().unwrap_or_default();
    if copy.state != CopyState::Ready {
        let state = if copy.state == CopyState::NotStarted { "not started" } else { copy.state.as_str() };
        let why = if copy.message.is_empty() { String::new() } else { format!(": {}", copy.message) };
        let message =
            format!("waits for the copy of backing image {name} on disk {disk}: {state}, {} %{why}", copy.progress);
        let mut condition = wait("Waiting", message);
        condition.next_retry_time = copy.next_retry_time;
        return Err(Box::new(condition));
    }
    if status.uuid.is_empty() || !matches!(status.format.as_str(), "raw" | "qcow2") {
        return Err(Box::new(wait("Waiting", format!("backing image {name} does not say yet what format it has"))));
    }
    let directory =
        std::path::Path::new(&replica.spec.disk_path).join("backing-images").join(format!("{name}-{}", status.uuid));
    Ok(Some(ImageFile {
        name: name.clone(),
        uuid: status.uuid,
        path: directory.join("backing"),
        format: status.format,
    }))
}

#[cfg(test)]
mod tests {
    use api::image::{BackingImageStatus, DiskFileStatus};
    use api::node::{DiskSpec, DiskStatus, NodeStatus};
    use expect_test::{Expect, expect};

    use super::*;

    fn replica(wish: &str, image: &str) -> Replica {
        let mut replica = Replica::default();
        replica.spec.desire_state = if wish == "running" { DesireState::Running } else { DesireState::Stopped };
        if wish == "deleted" {
            replica.metadata.deletion_timestamp = Some(serde_json::from_str("\"2026-01-01T00:00:00Z\"").unwrap());
        }
        replica.spec.backing_image = image.into();
        replica.spec.disk_id = "disk-a".into();
        replica.spec.disk_path = "/disk".into();
        replica.spec.data_directory_name = "v-1".into();
        replica
    }

    fn image(state: CopyState) -> BackingImage {
        let copy = DiskFileStatus { state, progress: 61, ..Default::default() };
        let status = BackingImageStatus {
            uuid: "0123abcd".into(),
            format: "qcow2".into(),
            disk_file_status_map: [("disk-a".into(), copy)].into(),
            ..Default::default()
        };
        BackingImage { status: Some(status), ..Default::default() }
    }

    fn check(wish: &str, image: Option<BackingImage>, process: Process, expected: Expect) {
        let name = if image.is_some() { "ubuntu" } else { "" };
        let decision = decide(&replica(wish, name), image.as_ref(), &process);
        let said = decision.conditions.iter().find(|c| c.r#type == WAIT_FOR_BACKING_IMAGE && c.is_true());
        let said = said.or(decision.conditions.first()).map(|c| c.message.clone()).unwrap_or_default();
        let step = match decision.step {
            Step::Start(file) => {
                format!("Start {}", file.map_or("-".into(), |f| format!("{} {}", f.format, f.path.display())))
            }
            step => format!("{step:?}"),
        };
        expected.assert_eq(&format!("{step}; {:?}; {said}", decision.state));
    }

    #[test]
    fn starts_over_the_copy_on_its_own_disk() {
        let expected =
            expect!["Start qcow2 /disk/backing-images/ubuntu-0123abcd/backing; Starting; its process is being started"];
        check("running", Some(image(CopyState::Ready)), Process::None, expected);
        check("running", None, Process::None, expect!["Start -; Starting; its process is being started"]);
    }

    #[test]
    fn says_what_it_waits_for() {
        let expected =
            expect!["Nothing; Stopped; waits for the copy of backing image ubuntu on disk disk-a: in-progress, 61 %"];
        check("running", Some(image(CopyState::InProgress)), Process::None, expected);
    }

    #[test]
    fn never_starts_again_by_itself_what_has_ended() {
        let expected = expect!["Nothing; Error; the replica process ended; its last words: no space"];
        check("running", None, Process::Ended("no space".into()), expected);
        check("stopped", None, Process::Ended("no space".into()), expect!["End; Stopping; it is being ended"]);
    }

    #[test]
    fn a_process_from_before_the_volume_grew_is_started_again() {
        let outgrown = || Process::Outgrown { has: 1, wanted: 2 };
        let expected = expect!["End; Starting; it is started again, to grow from 1 to 2 bytes"];
        check("running", None, outgrown(), expected);
        check("stopped", None, outgrown(), expect!["End; Stopping; it is being ended"]);
        check("deleted", None, outgrown(), expect!["Remove; Stopping; "]);
    }

    #[test]
    fn keeps_a_serving_process_although_its_copy_is_gone() {
        check("running", Some(image(CopyState::Failed)), Process::Serving, expect!["Nothing; Running; "]);
    }

    #[test]
    fn data_on_a_disk_that_is_away_is_not_taken_for_removed() {
        let away = || Process::DiskAway("disk 7 is not at `/disk`".into());
        let expected = expect!["AwaitDisk; Stopping; its data cannot be removed: disk 7 is not at `/disk`"];
        check("deleted", None, away(), expected);
        check("running", None, away(), expect!["Nothing; Error; disk 7 is not at `/disk`"]);
    }

    #[test]
    fn a_process_behind_a_silent_disk_is_left_only_where_an_engine_may_use_it() {
        let check = |wish: &str, last: InstanceState, recorded: Option<Result<(), &str>>, expected: Expect| {
            let mut replica = replica(wish, "");
            replica.status = Some(api::replica::ReplicaStatus { current_state: last, ..Default::default() });
            let process = behind_silence(&replica, recorded.map(|r| r.map_err(String::from)), "silent".into());
            let said = process.map(|process| {
                let decision = decide(&replica, None, &process);
                let message = decision.conditions.first().map(|c| c.message.clone()).unwrap_or_default();
                format!("{:?}; {:?}; {message}", decision.step, decision.state)
            });
            expected.assert_eq(&said.unwrap_or_else(|| "as it was".into()));
        };
        use InstanceState::{Running, Starting, Stopped};
        check("running", Running, Some(Ok(())), expect!["as it was"]);
        for before in [Stopped, Starting] {
            check("running", before, Some(Ok(())), expect!["Nothing; Error; silent"]);
        }
        check(
            "running",
            Running,
            Some(Err("killed")),
            expect!["Nothing; Error; the replica process ended; its last words: killed"],
        );
        check("running", Stopped, None, expect!["Nothing; Error; silent"]);
        check("stopped", Running, Some(Ok(())), expect!["End; Stopping; it is being ended"]);
        check("stopped", Running, Some(Err("killed")), expect!["End; Stopping; it is being ended"]);
        check("stopped", Running, None, expect!["Nothing; Stopped; silent"]);
        for recorded in [Some(Ok(())), Some(Err("killed")), None] {
            check("deleted", Running, recorded, expect!["AwaitDisk; Stopping; its data cannot be removed: silent"]);
        }
    }

    #[test]
    fn one_that_cannot_be_ended_is_waited_for_by_nobody() {
        let check = |wish: &str, work: Work, problem: Option<&str>, expected: Expect| {
            let decision = at_work(&replica(wish, ""), work, problem.map(String::from));
            expected.assert_eq(&format!("{:?}; {}", decision.state, decision.conditions[0].message));
        };
        check("stopped", Work::End, None, expect!["Stopping; it is being ended"]);
        check("stopped", Work::End, Some("it hangs"), expect!["Stopping; it is being ended: it hangs"]);
        check("running", Work::End, None, expect!["Stopping; it is being ended"]);
        check("running", Work::End, Some("it hangs"), expect!["Error; it is being ended: it hangs"]);
        check("deleted", Work::Remove, None, expect!["Stopping; its data is being removed"]);
        check("deleted", Work::Remove, Some("it hangs"), expect!["Stopping; its data is being removed: it hangs"]);
    }

    #[test]
    fn a_disk_is_given_up_when_it_was_taken_off_or_another_one_has_its_place() {
        let check = |path: Option<&str>, told: Option<&str>| {
            let mut node = Node::new("n", Default::default());
            let disk = path.map(|path| DiskSpec { path: path.into(), ..Default::default() });
            node.spec.disks.extend(disk.map(|disk| ("d".to_owned(), disk)));
            let seen = told.map(|uuid| DiskStatus { disk_uuid: uuid.into(), ..Default::default() });
            let disk_status = seen.map(|seen| ("d".to_owned(), seen)).into_iter().collect();
            node.status = Some(NodeStatus { disk_status, ..Default::default() });
            give_up(&replica("deleted", ""), &node).map(|decision| decision.conditions[0].message.clone())
        };
        let said =
            |now: &str| Some(format!("it is deleted without its data: disk disk-a {now}; `replicas/v-1` stays on it"));
        assert_eq!(check(None, None), said("was taken off this node"));
        assert_eq!(check(Some("/other"), Some("disk-b")), said("was taken off this node"));
        assert_eq!(check(Some("/disk"), Some("disk-b")), said("gave its place `/disk` to disk disk-b"));
        // It is away: the node remembers it, or has not told yet.
        assert_eq!(check(Some("/disk"), Some("disk-a")), None);
        assert_eq!(check(Some("/disk"), Some("")), None);
        assert_eq!(check(Some("/disk"), None), None);
    }

    #[test]
    fn a_blank_replica_never_takes_the_place_of_one_whose_data_is_gone() {
        let gone = || Process::DataGone("its data is gone".into());
        check("running", None, gone(), expect!["Nothing; Error; its data is gone"]);
        check("deleted", None, gone(), expect!["Remove; Stopping; "]);
    }

    #[test]
    fn removes_what_is_deleted_whatever_runs() {
        for process in [Process::None, Process::Serving, Process::Ended(String::new())] {
            check("deleted", None, process, expect!["Remove; Stopping; "]);
        }
    }
}

//! What to do about one engine: an observation in, a step and a report out.

use std::collections::BTreeMap;

use api::engine::{DesireState, EngineSpec, InstanceState, ReplicaMode};
use api::names::condition::{DETACHED, READY};
use api::{Condition, ConditionStatus, Engine};
use jiff::Timestamp;
use proto::engine::{Config, HolderReport, ReplicaAddress, ReplicaState, Status};

use crate::engine_progress::Stall;

/// The holder and engine of a volume, as they were seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Process {
    /// There is none.
    None,
    /// The holder runs; what its engine said last, when it said anything.
    Running(Option<Status>),
    /// A holder or an engine runs that was not started for this wish; how it differs.
    Foreign(String),
    /// The holder has ended without being asked; the end of its log.
    Ended(String),
}

/// The loop device on its mount file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Device {
    None,
    /// Attached; who uses it (mount points, holders).
    Attached {
        path: String,
        users: Vec<String>,
    },
}

/// One step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Start holder and engine.
    Start,
    /// Make the block device.
    AttachDevice,
    /// Take the block device away.
    DetachDevice,
    /// Ask the engine to finish, then end the holder and forget both.
    Shutdown,
    /// Nothing runs any more: remove the mount and forget it.
    CleanUp,
    /// Release the object.
    Release,
    Nothing,
}

/// What to do and what to report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    pub step: Step,
    pub state: InstanceState,
    pub conditions: Vec<Condition>,
}

/// Whether an engine shall run.
pub fn is_wished(engine: &Engine) -> bool {
    engine.spec.desire_state == DesireState::Running && engine.metadata.deletion_timestamp.is_none()
}

/// Decides about one engine of this node. `trouble` is why requests wait although a holder or an engine is there.
pub fn decide(engine: &Engine, process: &Process, device: &Device, trouble: Option<&Condition>) -> Decision {
    if is_wished(engine) {
        return run(process, device, trouble);
    }
    let is_deleted = engine.metadata.deletion_timestamp.is_some();
    let busy = match device {
        Device::Attached { path, users } if !users.is_empty() => {
            Some(format!("{path} is in use by {}", users.join(", ")))
        }
        _ => None,
    };
    if let Some(busy) = busy {
        let hint = "unmount it, or end what uses it";
        let detached = Condition::new(DETACHED, ConditionStatus::False, "DeviceBusy", busy).with_hint(hint);
        return Decision { step: Step::Nothing, state: InstanceState::Stopping, conditions: vec![detached] };
    }
    let step = match (process, device) {
        (_, Device::Attached { .. }) => Step::DetachDevice,
        (Process::Running(_) | Process::Foreign(_), Device::None) => Step::Shutdown,
        (Process::Ended(_), Device::None) => Step::CleanUp,
        (Process::None, Device::None) if is_deleted => Step::Release,
        (Process::None, Device::None) => Step::Nothing,
    };
    let is_gone = matches!(step, Step::Nothing | Step::Release);
    let (status, reason) =
        if is_gone { (ConditionStatus::True, "Detached") } else { (ConditionStatus::False, "Stopping") };
    Decision {
        step,
        state: if is_gone { InstanceState::Stopped } else { InstanceState::Stopping },
        conditions: vec![
            Condition::new(DETACHED, status, reason, ""),
            Condition::new(READY, ConditionStatus::False, "Stopped", "it is not wanted now"),
        ],
    }
}

fn run(process: &Process, device: &Device, trouble: Option<&Condition>) -> Decision {
    let attached = Condition::new(DETACHED, ConditionStatus::False, "Attached", "");
    let decide = |step, state, status, reason: &str, message: String| Decision {
        step,
        state,
        conditions: vec![Condition::new(READY, status, reason, message), attached.clone()],
    };
    let (no, yes) = (ConditionStatus::False, ConditionStatus::True);
    match (process, device) {
        (Process::None, Device::None) => {
            decide(Step::Start, InstanceState::Starting, no, "Starting", "it is being started".into())
        }
        // A device without an engine is a leftover of a machine or process that died.
        (Process::None, Device::Attached { users, .. }) if users.is_empty() => decide(
            Step::DetachDevice,
            InstanceState::Starting,
            no,
            "Starting",
            "a device of an earlier attachment is being removed".into(),
        ),
        (Process::None, Device::Attached { path, users }) => {
            let message = format!("device {path} of an earlier attachment is still in use by {}", users.join(", "));
            decide(Step::Nothing, InstanceState::Error, no, "DeviceBusy", message)
        }
        // To serve it as what is wished could show other bytes. Its end is the same as of one that is not wished any more, which
        // the volume reconciler wishes next: it takes this one's end for an unclean one.
        (Process::Foreign(difference), _) => {
            let message = format!(
                "an engine of another attachment runs here: {difference}; it is ended when nobody uses its device, then the volume is attached anew"
            );
            decide(Step::Nothing, InstanceState::Error, no, "EngineDiffers", message)
        }
        (Process::Ended(words), _) => {
            let said =
                if words.is_empty() { "its log is empty".to_owned() } else { format!("its last words: {words}") };
            decide(Step::Nothing, InstanceState::Error, no, "EngineEnded", format!("the engine's holder ended; {said}"))
        }
        (Process::Running(Some(status)), _) if status.faulted.is_some() => {
            let message = status.faulted.clone().unwrap_or_default();
            decide(Step::Nothing, InstanceState::Running, no, "Faulted", message)
        }
        // An engine that serves may be stuck, and one that does not may have a reason.
        (Process::Running(_), device) if trouble.is_some() => {
            let state = match device {
                Device::Attached { .. } => InstanceState::Running,
                Device::None => InstanceState::Starting,
            };
            Decision { step: Step::Nothing, state, conditions: vec![trouble.cloned().unwrap_or_default(), attached] }
        }
        (Process::Running(Some(status)), Device::None) if status.serving => {
            decide(Step::AttachDevice, InstanceState::Starting, no, "Starting", "the block device is being made".into())
        }
        (Process::Running(Some(status)), Device::Attached { .. }) if status.serving => {
            decide(Step::Nothing, InstanceState::Running, yes, "Serving", String::new())
        }
        // The holder starts another engine; requests wait in the kernel meanwhile.
        (Process::Running(_), Device::Attached { .. }) => decide(
            Step::Nothing,
            InstanceState::Running,
            no,
            "EngineStarting",
            "its holder is starting a new engine; I/O waits".into(),
        ),
        (Process::Running(_), Device::None) => decide(
            Step::Nothing,
            InstanceState::Starting,
            no,
            "Starting",
            "the engine is connecting to its replicas".into(),
        ),
    }
}

/// How the engine that runs here differs from the wished one, when it was not started for this wish.
///
/// A role that was away finds engines that live, and the volume may have been attached elsewhere meanwhile: then the number of the
/// attachment differs. Within one attachment replicas that the engine dropped go from the wish; what the engine uses besides is its
/// own affair, as it may not have told yet that it dropped it.
pub fn difference(wish: &EngineSpec, runs: &Config) -> Option<String> {
    if runs.volume != wish.volume_name {
        return Some(format!("it serves volume `{}` and not `{}`", runs.volume, wish.volume_name));
    }
    if runs.size_bytes != wish.volume_size.0 {
        return Some(format!("it serves {} bytes and not {}", runs.size_bytes, wish.volume_size.0));
    }
    for (name, address) in &wish.replica_address_map {
        let used = runs.replicas.get(name);
        if used != Some(&ReplicaAddress::Tcp(address.clone())) {
            let used = match used {
                None => "does not use it".to_owned(),
                Some(ReplicaAddress::Tcp(other)) => format!("uses it at {other}"),
                Some(ReplicaAddress::Directory(other)) => format!("uses it in {}", other.display()),
            };
            return Some(format!("replica {name} is at {address}, and it {used}"));
        }
    }
    (runs.attachment != wish.attachment).then(|| {
        format!(
            "it serves attachment {}, and the volume has come to attachment {} since",
            runs.attachment, wish.attachment
        )
    })
}

/// Why requests wait although a holder or an engine is there, from what the holder says and from what this role sees itself.
pub fn trouble(
    said: Option<&HolderReport>,
    silent_since: Option<Timestamp>,
    stall: Option<&Stall>,
    has_holder: bool,
    status: Option<&Status>,
) -> Option<Condition> {
    let no = |reason: &str, message: String| Condition::new(READY, ConditionStatus::False, reason, message);
    let at = |ms: u64| Timestamp::from_millisecond(ms as i64).unwrap_or_default();
    let who = status.map_or("the engine".to_owned(), |status| format!("the engine (process {})", status.pid));
    match (said, silent_since) {
        (Some(said), _) if has_holder && said.silent => {
            let message = format!(
                "{} since {}; I/O waits; at {} {}",
                said.problem,
                at(said.since_ms),
                at(said.deadline_ms),
                said.then
            );
            Some(no("EngineSilent", message).with_next_retry(at(said.deadline_ms)))
        }
        (Some(said), _) if has_holder => {
            let tried = match said.attempts {
                0 => String::new(),
                1 => "; 1 engine was tried since".to_owned(),
                many => format!("; {many} engines were tried since"),
            };
            let message = format!(
                "its holder is starting a new engine; I/O waits since {}: {}{tried}; without one that serves {} at {}",
                at(said.since_ms),
                said.problem,
                said.then,
                at(said.deadline_ms)
            );
            let condition = no("EngineStarting", message);
            Some(match said.next_attempt_ms {
                Some(next) => condition.with_next_retry(at(next)),
                None => condition,
            })
        }
        (_, Some(since)) if has_holder => {
            let message = format!(
                "{who} does not answer since {since}; I/O waits; its holder kills and replaces it after a while"
            );
            Some(no("EngineSilent", message))
        }
        (_, Some(since)) => {
            let message = format!(
                "{who} does not answer since {since}, and its holder is gone, so that nobody replaces it; I/O waits"
            );
            Some(
                no("EngineSilent", message)
                    .with_hint("end that process by kill -9, unmount the volume and mount it again"),
            )
        }
        (_, None) => stall.map(|stall| {
            let message = format!(
                "{who} answers, but completed none of its {} requests since {}; I/O waits until its replicas answer or are given up",
                stall.requests, stall.since
            );
            no("EngineStuck", message).with_hint(
                "look at the disks and nodes of its replicas; if they are well, end the engine by kill -9: its holder replaces it, and nothing acknowledged is lost",
            )
        }),
    }
}

/// The engine's view of its replicas in Longhorn's words.
pub fn modes(status: &Status) -> BTreeMap<String, ReplicaMode> {
    let mode = |state: &ReplicaState| match state {
        ReplicaState::InSync => ReplicaMode::Rw,
        ReplicaState::Comparing => ReplicaMode::Wo,
        ReplicaState::Dropped => ReplicaMode::Err,
    };
    status.replicas.iter().map(|(name, state)| (name.clone(), mode(state))).collect()
}

#[cfg(test)]
mod tests {
    use api::quantity::SizeBytes;

    use super::*;

    fn engine(wish: DesireState) -> Engine {
        let mut engine = Engine::default();
        engine.spec.desire_state = wish;
        engine
    }

    fn attached(users: &[&str]) -> Device {
        Device::Attached { path: "/dev/loop7".into(), users: users.iter().map(|u| (*u).to_owned()).collect() }
    }

    fn serving() -> Process {
        Process::Running(Some(Status { serving: true, ..Status::default() }))
    }

    #[test]
    fn comes_up_step_by_step() {
        let wish = engine(DesireState::Running);
        let step = |process, device| {
            let decision = decide(&wish, &process, &device, None);
            (decision.step, decision.state)
        };
        assert_eq!(step(Process::None, Device::None), (Step::Start, InstanceState::Starting));
        assert_eq!(step(Process::Running(None), Device::None), (Step::Nothing, InstanceState::Starting));
        assert_eq!(step(serving(), Device::None), (Step::AttachDevice, InstanceState::Starting));
        assert_eq!(step(serving(), attached(&["/mnt"])), (Step::Nothing, InstanceState::Running));
    }

    #[test]
    fn goes_down_step_by_step() {
        let wish = engine(DesireState::Stopped);
        let step = |process, device| decide(&wish, &process, &device, None).step;
        assert_eq!(step(serving(), attached(&[])), Step::DetachDevice);
        assert_eq!(step(serving(), Device::None), Step::Shutdown);
        assert_eq!(step(Process::Ended(String::new()), Device::None), Step::CleanUp);
        assert_eq!(step(Process::None, Device::None), Step::Nothing);
    }

    #[test]
    fn a_device_in_use_is_never_taken_away() {
        let decision = decide(&engine(DesireState::Stopped), &serving(), &attached(&["/mnt/a"]), None);
        assert_eq!((decision.step, decision.state), (Step::Nothing, InstanceState::Stopping));
        assert_eq!(decision.conditions[0].message, "/dev/loop7 is in use by /mnt/a");
    }

    #[test]
    fn says_what_requests_wait_for_and_until_when() {
        let status = Status { pid: 7, ..Status::default() };
        let said = HolderReport {
            problem: "it died".into(),
            then: "its device is given up".into(),
            attempts: 3,
            since_ms: 1_000,
            next_attempt_ms: Some(2_000),
            deadline_ms: 61_000,
            ..HolderReport::default()
        };
        let check = |said: Option<&HolderReport>, since, has_holder, expected: &[&str]| {
            let found = trouble(said, since, None, has_holder, Some(&status))
                .map(|c| (c.reason, c.message, c.next_retry_time, c.hint));
            let text = format!("{found:?}");
            assert!(expected.iter().all(|part| text.contains(part)), "{text} lacks some of {expected:?}");
        };
        let since: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let words = [
            "EngineStarting",
            "it died; 3 engines",
            "since 1970-01-01T00:00:01Z",
            "1970-01-01T00:00:02Z",
            "given up at 1970-01-01T00:01:01Z",
        ];
        check(Some(&said), None, true, &words);
        let silent = HolderReport { silent: true, next_attempt_ms: None, ..said.clone() };
        check(
            Some(&silent),
            Some(since),
            true,
            &["EngineSilent", "it died since 1970", "at 1970-01-01T00:01:01Z its device"],
        );
        check(None, Some(since), true, &["EngineSilent", "process 7", "2026-01-01", "replaces it after"]);
        check(None, Some(since), false, &["its holder is gone", "kill -9"]);
        // What a holder said before it died itself is of no interest while its engine goes on.
        check(Some(&said), None, false, &["None"]);
        check(None, None, true, &["None"]);
    }

    #[test]
    fn an_engine_that_completes_nothing_is_told_unless_something_says_more() {
        let since: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let (status, stall) = (Status { pid: 7, ..Status::default() }, Stall { since, requests: 5 });
        let told = trouble(None, None, Some(&stall), true, Some(&status)).unwrap();
        assert_eq!((told.reason.as_str(), told.status), ("EngineStuck", ConditionStatus::False));
        for part in ["process 7", "none of its 5 requests", "since 2026-01-01T00:00:00Z", "I/O waits"] {
            assert!(told.message.contains(part), "{}", told.message);
        }
        let silent = trouble(None, Some(since), Some(&stall), true, Some(&status)).unwrap();
        assert_eq!(silent.reason, "EngineSilent");
        assert_eq!(
            trouble(Some(&HolderReport::default()), None, Some(&stall), true, None).unwrap().reason,
            "EngineStarting"
        );
    }

    #[test]
    fn an_engine_that_was_not_started_for_this_wish_is_found_out() {
        let tcp = |port: u16| format!("127.0.0.1:{port}");
        let wish = EngineSpec {
            volume_name: "vol".into(),
            volume_size: SizeBytes(1 << 20),
            replica_address_map: [("r1".to_owned(), tcp(1)), ("r2".to_owned(), tcp(3))].into(),
            generation: 2_000_005,
            attachment: 2,
            ..EngineSpec::default()
        };
        let runs: Config = serde_json::from_value(serde_json::json!({
            "volume": "vol", "sizeBytes": 1 << 20, "generation": 5, "attachment": 2, "readFrom": null, "compareReplicas": false,
            "replicas": {"r1": {"tcp": tcp(1)}, "r2": {"tcp": tcp(3)}},
            "mountFile": "/m", "controlSocket": "/c", "nbdSocket": "/n", "replicaTimeoutMs": 1, "noReplicaHoldMs": 1, "holderLimitMs": 1
        }))
        .unwrap();
        let differs = |change: fn(&mut EngineSpec)| {
            let mut wish = wish.clone();
            change(&mut wish);
            difference(&wish, &runs).unwrap_or_default()
        };
        // What changes within an attachment.
        assert_eq!(differs(|_| {}), "");
        assert_eq!(differs(|wish| drop(wish.replica_address_map.remove("r2"))), "");
        assert_eq!(differs(|wish| wish.generation = 2_000_007), "");
        assert_eq!(differs(|wish| wish.compare_replicas = true), "");
        // What does not.
        assert!(differs(|wish| wish.volume_name = "other".into()).contains("not `other`"));
        assert!(differs(|wish| wish.volume_size = SizeBytes(2 << 20)).contains("not 2097152"));
        let moved: fn(&mut EngineSpec) =
            |wish| drop(wish.replica_address_map.insert("r2".into(), "127.0.0.1:9".into()));
        assert!(differs(moved).contains("uses it at 127.0.0.1:3"));
        let new: fn(&mut EngineSpec) = |wish| drop(wish.replica_address_map.insert("r3".into(), "127.0.0.1:9".into()));
        assert!(differs(new).contains("does not use it"));
        assert!(differs(|wish| wish.attachment = 3).contains("attachment 2, and the volume has come to attachment 3"));
    }

    #[test]
    fn an_engine_of_another_attachment_is_never_served_as_the_wished_one() {
        for device in [Device::None, attached(&[]), attached(&["/mnt"])] {
            let foreign = Process::Foreign("it serves volume `a` and not `b`".into());
            let decision = decide(&engine(DesireState::Running), &foreign, &device, None);
            assert_eq!((decision.step, decision.state), (Step::Nothing, InstanceState::Error));
            let ready = &decision.conditions[0];
            assert_eq!(ready.reason, "EngineDiffers");
            assert!(ready.message.contains("volume `a`") && !ready.is_true(), "{}", ready.message);
        }
    }

    #[test]
    fn trouble_of_a_running_engine_is_its_condition() {
        let trouble = Condition::new(READY, ConditionStatus::False, "EngineSilent", "it does not answer");
        for process in [serving(), Process::Running(None)] {
            let decision = decide(&engine(DesireState::Running), &process, &attached(&["/mnt"]), Some(&trouble));
            assert_eq!((decision.step, decision.state), (Step::Nothing, InstanceState::Running));
            assert_eq!(decision.conditions[0], trouble);
        }
        // It does not keep one that is not wished any more.
        let decision = decide(&engine(DesireState::Stopped), &serving(), &Device::None, Some(&trouble));
        assert_eq!(decision.step, Step::Shutdown);
    }

    #[test]
    fn an_end_by_surprise_is_an_error_with_the_last_words() {
        let decision = decide(&engine(DesireState::Running), &Process::Ended("gave up".into()), &attached(&[]), None);
        assert_eq!((decision.step, decision.state), (Step::Nothing, InstanceState::Error));
        assert_eq!(decision.conditions[0].message, "the engine's holder ended; its last words: gave up");
    }
}

//! Replacing a running engine by one of the installed program, on request.
//!
//! A request is a time in the wish; its answer, the same time and the condition `Upgraded` in the status. The engine itself
//! decides whether it can make room. Nothing is disturbed before the new program has shown that it starts.

use std::os::linux::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use api::engine::InstanceState;
use api::names::condition::UPGRADED;
use api::{Condition, ConditionStatus, Engine};
use proto::engine::{Config, Reply, Request, Status};
use tracing::{info, warn};

use crate::control;
use crate::engine_decision::{Decision, Process, is_wished};
use crate::engines::{Observed, Place, read_config, write_config};
use crate::error::InstanceError;
use crate::limits::{CONNECT, PROGRAM_CHECK};
use crate::role::Role;

/// What there is to do about a request.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Due {
    Nothing,
    /// The engine is on its way or stuck; what it waits for stands in its other conditions.
    Later,
    Refuse(String),
    Now(Box<Status>),
}

fn due(engine: &Engine, decision: &Decision, process: &Process) -> Due {
    let answered = engine.status.as_ref().map_or("", |s| &s.upgrade_requested_at);
    let requested = &engine.spec.upgrade_requested_at;
    if requested.is_empty() || requested == answered {
        return Due::Nothing;
    }
    if !is_wished(engine) {
        return Due::Refuse("the volume is not attached; its next attachment starts the installed version".into());
    }
    match (decision.state, process) {
        (InstanceState::Running, Process::Running(Some(status))) if status.serving => {
            // A reason to wait is told by `Ready`; a fault is answered by the engine.
            let waits = ["EngineSilent", "EngineStarting", "EngineStuck"];
            let is_stuck = decision.conditions.iter().any(|c| waits.contains(&c.reason.as_str()));
            if is_stuck { Due::Later } else { Due::Now(Box::new(status.clone())) }
        }
        (InstanceState::Error, _) => {
            Due::Refuse("its engine has ended; its next attachment starts the installed version".into())
        }
        _ => Due::Later,
    }
}

/// Does what was requested, when it was not done yet; what came of it.
pub async fn answer(
    role: &Role,
    engine: &Engine,
    decision: &Decision,
    observed: &Observed,
    place: &Place,
) -> Result<Option<Condition>, InstanceError> {
    let name = engine.metadata.name.as_deref().unwrap_or_default();
    let (status, reason, message) = match due(engine, decision, &observed.process) {
        Due::Nothing | Due::Later => return Ok(None),
        Due::Refuse(why) => (ConditionStatus::False, "Refused", why),
        Due::Now(old) => match replace(role, &old, place).await? {
            Outcome::Done(message) => (ConditionStatus::True, "Replaced", message),
            Outcome::UpToDate(message) => (ConditionStatus::True, "UpToDate", message),
            Outcome::Refused(message) => (ConditionStatus::False, "Refused", message),
            Outcome::Failed(message) => (ConditionStatus::False, "Failed", message),
        },
    };
    if status == ConditionStatus::True {
        info!(engine = name, message, "upgrade of the engine answered");
    } else {
        warn!(engine = name, message, "engine not upgraded");
    }
    Ok(Some(Condition::new(UPGRADED, status, reason, message)))
}

enum Outcome {
    Done(String),
    UpToDate(String),
    Refused(String),
    Failed(String),
}

async fn replace(role: &Role, old: &Status, place: &Place) -> Result<Outcome, InstanceError> {
    let program = &role.config.program;
    if runs(old.pid, program) {
        let message = format!("the engine (process {}) runs the installed version {} already", old.pid, old.version);
        return Ok(Outcome::UpToDate(message));
    }
    let config = read_config(place)?;
    if let Err(why) = check(program, &place.config).await {
        let shown = program.display();
        return Ok(Outcome::Refused(format!(
            "the installed program `{shown}` cannot be used: {why}; the running engine stays"
        )));
    }
    write_config(place, &Config { program: Some(program.clone()), ..config })?;
    match control::ask::<Reply>(&place.control, &Request::HandOver).await {
        Ok(Reply::Refused { message }) => return Ok(Outcome::Refused(message)),
        Ok(Reply::Done) => {}
        // It may have died at this moment: the holder starts the next one all the same.
        Ok(Reply::Status(_)) | Err(_) => {}
    }
    let Some(new) = next_engine(place, old.pid, role.config.engines.holder_limit).await else {
        let message = format!(
            "the engine of version {} made room and no other serves yet; condition Ready says why",
            old.version
        );
        return Ok(Outcome::Failed(message));
    };
    let change =
        format!("from version {} (process {}) to version {} (process {})", old.version, old.pid, new.version, new.pid);
    Ok(if runs(new.pid, program) {
        Outcome::Done(change)
    } else {
        Outcome::Failed(format!("the installed program did not come to serve, so the holder's own goes on: {change}"))
    })
}

/// Whether a process is of the program that is installed now: the same file, not only the same name.
fn runs(pid: u32, program: &Path) -> bool {
    let file = |path: &Path| std::fs::metadata(path).ok().map(|m| (m.st_dev(), m.st_ino()));
    let running = file(Path::new(&format!("/proc/{pid}/exe")));
    running.is_some() && running == file(program)
}

/// Whether the program starts and understands the configuration of the engine.
async fn check(program: &Path, config: &Path) -> Result<(), String> {
    let mut command = tokio::process::Command::new(program);
    command.arg("engine").arg("--config").arg(config).arg("--check").kill_on_drop(true);
    let output = tokio::time::timeout(PROGRAM_CHECK, command.output()).await;
    let output = output.map_err(|_| format!("it did not answer within {} s", PROGRAM_CHECK.as_secs()))?;
    let output = output.map_err(|error| error.to_string())?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("it ended with {}: {}", output.status, runtime::words::last(&String::from_utf8_lossy(&output.stderr))))
}

async fn next_engine(place: &Place, old: u32, limit: Duration) -> Option<Status> {
    let wait = async {
        for attempt in 1.. {
            if let Ok(Reply::Status(status)) = control::ask(&place.control, &Request::Status).await
                && status.serving
                && status.pid != old
            {
                return Some(status);
            }
            tokio::time::sleep(CONNECT.delay(attempt)).await;
        }
        None
    };
    tokio::time::timeout(limit, wait).await.ok().flatten()
}

#[cfg(test)]
mod tests {
    use api::engine::{DesireState, EngineStatus};

    use super::*;
    use crate::engine_decision::{Device, decide};

    #[test]
    fn a_request_is_answered_once_and_only_when_the_engine_serves() {
        let mut engine = Engine::default();
        engine.spec.upgrade_requested_at = "t1".into();
        let serving = Process::Running(Some(Status { serving: true, pid: 7, ..Status::default() }));
        let device = Device::Attached { path: "/dev/loop7".into(), users: vec![] };
        let look = |engine: &Engine, process: &Process, trouble: Option<&Condition>| {
            due(engine, &decide(engine, process, &device, trouble), process)
        };
        assert!(matches!(look(&engine, &serving, None), Due::Refuse(why) if why.contains("not attached")));
        engine.spec.desire_state = DesireState::Running;
        assert!(matches!(look(&engine, &serving, None), Due::Now(status) if status.pid == 7));
        assert_eq!(look(&engine, &Process::Running(None), None), Due::Later);
        for reason in ["EngineSilent", "EngineStuck"] {
            let trouble = Condition::new("Ready", ConditionStatus::False, reason, "requests wait");
            assert_eq!(look(&engine, &serving, Some(&trouble)), Due::Later);
        }
        assert!(matches!(look(&engine, &Process::Ended("gone".into()), None), Due::Refuse(_)));
        engine.status = Some(EngineStatus { upgrade_requested_at: "t1".into(), ..EngineStatus::default() });
        assert_eq!(look(&engine, &serving, None), Due::Nothing);
        engine.spec.upgrade_requested_at = "t2".into();
        assert!(matches!(look(&engine, &serving, None), Due::Now(_)));
    }
}

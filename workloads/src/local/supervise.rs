//! Watches one process: ready, ended, or not ready in time.

use std::convert::Infallible;
use std::io;
use std::net::IpAddr;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::Arc;

use runtime::process::ProcessIdentity;
use tokio::process::Child;
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use super::record::Record;
use super::{Entry, Inner, blocking, limits, lock, log, marked, ready};
use crate::{Workload, WorkloadState};

/// How a process went on after its start.
enum Event {
    Ready,
    Late,
    Ended(Option<ExitStatus>),
}

impl Inner {
    /// Takes a started or adopted workload under watch. `child` when we are its parent, and so can tell how it ends.
    pub(super) fn supervise(self: &Arc<Self>, record: Record, state: WorkloadState, child: Option<Child>) -> Workload {
        let name = record.spec.name.clone();
        let running = state == WorkloadState::Running;
        let ended = matches!(state, WorkloadState::Failed { .. });
        let entry = Entry { record: record.clone(), state };
        let workload = entry.workload();
        lock(&self.entries).insert(name.clone(), entry);
        self.changes.announce(&name);
        if let Some(process) = record.process.clone().filter(|_| !ended) {
            let inner = self.clone();
            self.spawn(async move { inner.watch(record, process, child, running).await });
        }
        workload
    }

    /// Takes over a workload of a former process.
    pub(super) async fn adopt(self: &Arc<Self>, mut record: Record) -> io::Result<()> {
        let alive = record.process.as_ref().is_some_and(ProcessIdentity::is_alive);
        if !alive && record.failure.is_none() {
            record.failure = Some(self.last_words(&record, "it ended while nobody watched").await);
            let (records, saved) = (self.records.clone(), record.clone());
            blocking(move || records.save(&saved)).await?;
        }
        let state = match &record.failure {
            Some(message) => WorkloadState::Failed { message: message.clone() },
            None if ready::is_ready(IpAddr::V4(record.ip), &record.spec.ready_ports).await => WorkloadState::Running,
            None => WorkloadState::Starting { message: String::new() },
        };
        info!(workload = record.spec.name, ip = %record.ip, alive, "workload adopted");
        self.supervise(record, state, None);
        Ok(())
    }

    async fn watch(&self, record: Record, process: ProcessIdentity, mut child: Option<Child>, running: bool) {
        let reason = if running {
            describe(ended(&process, child.as_mut()).await)
        } else {
            self.watch_start(&record, &process, &mut child).await
        };
        self.fail(record, &reason).await;
    }

    async fn watch_start(&self, record: &Record, process: &ProcessIdentity, child: &mut Option<Child>) -> String {
        let spec = &record.spec;
        let limit = self.config.start_timeout;
        let ports = spec.ready_ports.iter().map(u16::to_string).collect::<Vec<_>>().join(", ");
        let tell = async {
            sleep(limits::SLOW_START.min(limit / 2)).await;
            let (ip, seconds) = (record.ip, limit.as_secs_f32());
            let message =
                format!("it accepts no connections on {ip}, port {ports}; it is ended {seconds} s after its start");
            self.set_state(record, WorkloadState::Starting { message });
            std::future::pending::<Infallible>().await
        };
        let event = tokio::select! {
            biased;
            status = ended(process, child.as_mut()) => Event::Ended(status),
            ready = timeout(limit, ready::wait_until_ready(IpAddr::V4(record.ip), &spec.ready_ports)) => {
                if ready.is_ok() { Event::Ready } else { Event::Late }
            }
            never = tell => match never {},
        };
        match event {
            Event::Ended(status) => describe(status),
            Event::Late => {
                if let Err(error) = process.terminate(limits::LATE_GRACE).await {
                    warn!(workload = spec.name, %error, "workload that is not ready in time cannot be ended");
                }
                let seconds = limit.as_secs_f32();
                format!("it was not ready after {seconds} s: it must accept connections on {}, port {ports}", record.ip)
            }
            Event::Ready => {
                self.set_state(record, WorkloadState::Running);
                describe(ended(process, child.as_mut()).await)
            }
        }
    }

    /// Notes the end of a workload.
    async fn fail(&self, mut record: Record, reason: &str) {
        let name = record.spec.name.clone();
        let message = self.last_words(&record, reason).await;
        record.failure = Some(message.clone());
        // After a removal that is going on, which may be why it ended.
        let turn = self.turn_of(&name).await;
        if lock(&self.entries).get(&name).is_some_and(|entry| entry.record.token == record.token) {
            let (records, saved) = (self.records.clone(), record.clone());
            if let Err(error) = blocking(move || records.save(&saved)).await {
                warn!(workload = name, %error, "end of a workload cannot be written down");
            }
            info!(workload = name, message, "workload ended");
            self.set_state(&record, WorkloadState::Failed { message });
        }
        self.forget_turn(&name, turn);
    }

    /// Ends what a workload left behind. Returns the reason with the end of its log.
    async fn last_words(&self, record: &Record, reason: &str) -> String {
        if let Err(error) = marked::end(&self.records, &record.token).await {
            warn!(workload = record.spec.name, %error, "what a workload left behind cannot be ended");
        }
        let log = self.records.log(&record.spec.name);
        match blocking(move || Ok(log::tail(&log))).await {
            Ok(tail) if !tail.is_empty() => format!("{reason}; its log ends with: {tail}"),
            _ => reason.to_owned(),
        }
    }

    /// Changes the state of this very start, not of a later one of the same name.
    fn set_state(&self, record: &Record, state: WorkloadState) {
        if let Some(entry) = lock(&self.entries).get_mut(&record.spec.name)
            && entry.record.token == record.token
        {
            entry.record.failure = record.failure.clone();
            entry.state = state;
        } else {
            return;
        }
        self.changes.announce(&record.spec.name);
    }
}

/// Waits for the end of a process; how it ended is known to its parent only.
async fn ended(process: &ProcessIdentity, child: Option<&mut Child>) -> Option<ExitStatus> {
    let outcome: io::Result<Option<ExitStatus>> = match child {
        Some(child) => child.wait().await.map(Some),
        None => process.wait().await.map(|()| None),
    };
    match outcome {
        Ok(status) => status,
        Err(error) => {
            warn!(pid = process.pid, %error, "process cannot be watched, taken as ended");
            None
        }
    }
}

fn describe(status: Option<ExitStatus>) -> String {
    match status {
        None => "it ended while nobody watched".to_owned(),
        Some(status) => match (status.code(), status.signal()) {
            (Some(code), _) => format!("it ended with exit code {code}"),
            (None, Some(signal)) => format!("it was killed by signal {signal}"),
            (None, None) => "it ended".to_owned(),
        },
    }
}

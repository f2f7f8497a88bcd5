//! The main process of a container whose other processes must outlive its role.
//!
//! When the first process of a pid namespace ends, the kernel kills all others: engines and replicas, and with them the I/O of pods. So
//! the first process is this one, which does next to nothing: it starts the role, starts it again after a crash, passes signals on, and
//! takes the status of processes whose parent has gone.

use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus};
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use runtime::backoff::Backoff;
use rustix::process::{Pid, Signal, WaitOptions};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, sleep_until};
use tracing::{info, warn};

/// Set for the role that a supervisor starts.
const SUPERVISED: &str = "BACKING_IMAGE_CSI_SUPERVISED";

/// Between two starts: soon at first, since volumes cannot be attached meanwhile.
const RESTART: Backoff = Backoff { initial: Duration::from_millis(500), max: Duration::from_secs(30) };

/// A role that lived this long was well: the next crash is its first.
const WELL: Duration = Duration::from_secs(60);

/// Starts a command again and again until a signal; as the main process of a container.
#[derive(Args, Debug)]
pub struct Supervise {
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

/// Whether this process is to supervise its role instead of being it.
pub fn is_wanted() -> bool {
    std::process::id() == 1 && std::env::var_os(SUPERVISED).is_none()
}

/// Runs this very command below a supervisor.
pub async fn run_self() -> anyhow::Result<()> {
    let mut command = vec!["/proc/self/exe".to_owned()];
    command.extend(std::env::args().skip(1));
    run(Supervise { command }).await
}

/// Runs until SIGTERM or SIGINT, and ends as the command does then.
pub async fn run(Supervise { command }: Supervise) -> anyhow::Result<()> {
    crate::roles::start_logs(false);
    let stream = |kind| signal(kind).context("cannot listen for signals");
    let (mut term, mut int) = (stream(SignalKind::terminate())?, stream(SignalKind::interrupt())?);
    let mut child_ended = stream(SignalKind::child())?;
    let mut failures = 0;
    let mut is_ending = false;
    loop {
        let started = Instant::now();
        let child = spawn(&command)?;
        let pid = child.id();
        info!(pid, "role started");
        let status = loop {
            if let Some(status) = reap(pid) {
                break status;
            }
            let asked = tokio::select! {
                _ = child_ended.recv() => continue,
                _ = term.recv() => Signal::TERM,
                _ = int.recv() => Signal::INT,
            };
            is_ending = true;
            pass_on(pid, asked);
        };
        let how = describe(status);
        if is_ending {
            info!(how, "role ended as it was asked to");
            std::process::exit(status.code().unwrap_or(0));
        }
        failures = if started.elapsed() >= WELL { 1 } else { failures + 1 };
        let delay = RESTART.delay(failures);
        warn!(
            how,
            restart_in_seconds = delay.as_secs_f32(),
            "role ended by itself; the processes that it started go on"
        );
        let due = Instant::now() + delay;
        loop {
            reap(0);
            tokio::select! {
                () = sleep_until(due) => break,
                _ = child_ended.recv() => {}
                _ = term.recv() => return Ok(()),
                _ = int.recv() => return Ok(()),
            }
        }
    }
}

fn spawn(command: &[String]) -> anyhow::Result<Child> {
    let (program, args) = command.split_first().context("there is no command")?;
    let child = Command::new(program).args(args).env(SUPERVISED, "true").spawn();
    child.with_context(|| format!("cannot start `{program}`"))
}

/// Takes the status of every process that has ended; returns that of `role`, once it is among them.
fn reap(role: u32) -> Option<ExitStatus> {
    let mut of_role = None;
    // Errors mean that there is no child.
    while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
        if u32::try_from(pid.as_raw_nonzero().get()) == Ok(role) {
            of_role = Some(ExitStatus::from_raw(status.as_raw() as i32));
        }
    }
    of_role
}

/// The role is our child and its status was not taken, so the pid is its own.
fn pass_on(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw)
        && let Err(error) = rustix::process::kill_process(pid, signal)
    {
        warn!(%error, "signal cannot be passed on");
    }
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "unknown".to_owned(),
    }
}

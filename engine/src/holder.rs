//! The holder: a tiny parent that keeps the FUSE connection while engines come and go.
//!
//! It mounts the volume, starts an engine with the connection's descriptor, and starts another one when that dies. Requests wait
//! in the kernel meanwhile, and those that the dead engine had not answered are repeated. When no engine comes to serve within
//! the limit, the holder aborts the connection, so that everything that waits fails instead of waiting for ever.
//!
//! SIGTERM and SIGINT ask for a clean end, which happens only when nobody uses the volume: a mounted volume is not lost because
//! somebody ends all processes.
//!
//! When the holder itself dies, the engine goes on: it has the same descriptor, serves, answers its control socket and unmounts
//! at a clean end. It is only not replaced any more when it dies; then the kernel aborts the connection. To end the engine with
//! its holder would turn the loss of a watchman into the loss of the volume.
//!
//! A lock file that both inherit tells whether either is alive, so that a volume is never mounted twice.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use proto::engine::Config;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::FdFlags;
use rustix::process::{Pid, PidfdFlags, Signal};
use tracing::{info, warn};

use crate::control_client;
use crate::error::EngineError;
use crate::fuse::mount;
use crate::limits;
use crate::process::life::LifeFiles;
use crate::process::read_config;
use crate::sys;

struct Holder {
    config: Config,
    life: LifeFiles,
    command: Vec<OsString>,
    device: OwnedFd,
    signals: OwnedFd,
}

/// How one engine ended.
struct Ended {
    /// The volume was unmounted on request while no engine served.
    unmounted: bool,
    status: ExitStatus,
    served: bool,
    lasted: Duration,
}

/// Mounts the volume and keeps an engine running until it ends cleanly.
///
/// `engine_command` is a program and its arguments; `--fuse-fd NUMBER --lives NUMBER` is added, which it passes on to
/// [`crate::process::run`].
///
/// # Errors
/// When the volume cannot be mounted, is served already, or no engine came to serve in time (the device is dead then).
pub fn run(config_path: &Path, engine_command: Vec<OsString>) -> Result<(), EngineError> {
    let config = read_config(config_path)?;
    if engine_command.is_empty() {
        return Err(EngineError::Config { problem: "the command that starts an engine is empty".to_owned() });
    }
    let signals = sys::termination_events().map_err(|source| EngineError::Events { source })?;
    // Best effort: with no holder and no engine the volume is lost, with little memory gained.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-999");
    let life = LifeFiles::of(&config.control_socket);
    let _lock = lock(&config, &life)?;
    let device = mount_fresh(&config)?;
    let mut holder = Holder { config, life, command: engine_command, device, signals };
    runtime::memory::release_startup_code();
    let result = holder.hold();
    match &result {
        Ok(()) => mount::detach(&holder.config.mount_file),
        Err(_) => mount::abort(&holder.config.mount_file),
    }
    result
}

/// Holds as long as this process or an engine that it started lives.
fn lock(config: &Config, life: &LifeFiles) -> Result<File, EngineError> {
    let path = life.lock_path();
    let failed = |source: rustix::io::Errno| EngineError::Write { path: path.to_owned(), source: source.into() };
    // Without CLOEXEC: the engine inherits it.
    let flags = OFlags::RDWR | OFlags::CREATE;
    let file = rustix::fs::open(path, flags, Mode::from_raw_mode(0o600)).map_err(failed)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(File::from(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => {
            Err(EngineError::Served { volume: config.volume.clone(), path: config.mount_file.clone() })
        }
        Err(error) => Err(failed(error)),
    }
}

fn mount_fresh(config: &Config) -> Result<OwnedFd, EngineError> {
    let failed = |source| EngineError::Mount { path: config.mount_file.clone(), source };
    // What is still mounted here belongs to engines that are dead: the lock is ours.
    mount::detach(&config.mount_file);
    std::fs::OpenOptions::new().create(true).append(true).open(&config.mount_file).map_err(failed)?;
    let device = mount::mount(&config.mount_file).map_err(failed)?;
    // The engine inherits it under the same number.
    let inherited = rustix::io::fcntl_setfd(&device, FdFlags::empty());
    inherited.map_err(|error| failed(error.into()))?;
    Ok(device)
}

impl Holder {
    fn hold(&mut self) -> Result<(), EngineError> {
        let limit = Duration::from_millis(self.config.holder_limit_ms);
        let mut lives = 0;
        let mut quick_deaths = 0;
        let mut without_engine = Instant::now();
        loop {
            let started = Instant::now();
            let child = self.start(lives)?;
            let Some(ended) = self.watch(child, without_engine + limit, started)? else {
                return Err(self.gave_up("it did not begin to serve in time"));
            };
            if ended.unmounted {
                info!(volume = %self.config.volume, "volume unmounted on request before an engine served");
                return Ok(());
            }
            if ended.status.success() {
                info!(volume = %self.config.volume, "engine ended cleanly");
                return Ok(());
            }
            if ended.served {
                without_engine = Instant::now();
            }
            let last = match self.life.take_failure() {
                Some(sentence) => sentence,
                None if ended.served => format!("it died ({})", ended.status),
                None => format!("it died before it served ({})", ended.status),
            }
            .replace('\n', " ");
            warn!(volume = %self.config.volume, lives, reason = %last, "engine ended, starting the next");
            lives += 1;
            quick_deaths = if ended.lasted < limits::HOLDER_QUICK_DEATH { quick_deaths + 1 } else { 0 };
            // The first one is replaced at once: requests are waiting.
            if quick_deaths > 1 {
                let pause = limits::HOLDER_FIRST_PAUSE * 2u32.pow((quick_deaths - 2).min(8));
                let pause = pause.min(limits::HOLDER_LONGEST_PAUSE);
                let left = (without_engine + limit).saturating_duration_since(Instant::now());
                let (_, asked_to_end) = self.wait(None, pause.min(left))?;
                if asked_to_end && self.unmount_unused() {
                    return Ok(());
                }
            }
            if without_engine.elapsed() >= limit {
                return Err(self.gave_up(&last));
            }
        }
    }

    fn gave_up(&self, last: &str) -> EngineError {
        EngineError::GaveUp {
            volume: self.config.volume.clone(),
            limit_ms: self.config.holder_limit_ms,
            last: last.to_owned(),
        }
    }

    fn start(&self, lives: u32) -> Result<Child, EngineError> {
        let mut command = Command::new(&self.command[0]);
        command.args(&self.command[1..]);
        command.arg("--fuse-fd").arg(self.device.as_raw_fd().to_string());
        command.arg("--lives").arg(lives.to_string());
        command.stdin(Stdio::null());
        command
            .spawn()
            .map_err(|source| EngineError::Spawn { command: self.command[0].to_string_lossy().into_owned(), source })
    }

    /// Waits for the end of an engine; none when it did not come to serve before the deadline and was killed.
    fn watch(&self, mut child: Child, deadline: Instant, started: Instant) -> Result<Option<Ended>, EngineError> {
        let events = |source| EngineError::Events { source };
        let pid = Pid::from_child(&child);
        let process = rustix::process::pidfd_open(pid, PidfdFlags::empty()).map_err(|error| events(error.into()))?;
        let (mut served, mut unmounted) = (false, false);
        loop {
            let pause = if served { Duration::MAX } else { limits::HOLDER_POLL };
            let (over, asked_to_end) = self.wait(Some(&process), pause)?;
            if over {
                let status = child.wait().map_err(events)?;
                return Ok(Some(Ended { unmounted, status, served, lasted: started.elapsed() }));
            }
            if asked_to_end && !served && self.unmount_unused() {
                // An engine that is about to serve notices and closes the replicas; one that cannot has nothing to close.
                unmounted = true;
            } else if asked_to_end {
                // The engine decides: it ends when nobody uses the volume.
                let _ = rustix::process::pidfd_send_signal(&process, Signal::TERM);
            }
            if !served {
                let status = control_client::status(&self.config.control_socket, limits::HOLDER_POLL);
                served = status.is_ok_and(|status| status.serving && status.pid == child.id());
                if !served && Instant::now() >= deadline {
                    let _ = child.kill();
                    let _ = child.wait();
                    return Ok(None);
                }
            }
        }
    }

    /// Unmounts when nobody uses the volume. Nothing is lost by it: what nobody has open has nothing in flight.
    fn unmount_unused(&self) -> bool {
        match mount::unmount_if_unused(&self.config.mount_file) {
            Ok(unmounted) => {
                if !unmounted {
                    warn!(volume = %self.config.volume, "signal ignored: the volume is in use");
                }
                unmounted
            }
            Err(error) => {
                warn!(volume = %self.config.volume, %error, "signal ignored: cannot unmount");
                false
            }
        }
    }

    /// Waits for a process, a signal or the time: whether the process ended, and whether a signal asked for the end.
    fn wait(&self, process: Option<&OwnedFd>, most: Duration) -> Result<(bool, bool), EngineError> {
        let mut descriptors = vec![PollFd::new(&self.signals, PollFlags::IN)];
        descriptors.extend(process.map(|process| PollFd::from_borrowed_fd(process.as_fd(), PollFlags::IN)));
        let most = (most != Duration::MAX)
            .then(|| Timespec { tv_sec: most.as_secs() as i64, tv_nsec: i64::from(most.subsec_nanos()) });
        match poll(&mut descriptors, most.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(EngineError::Events { source: error.into() }),
        }
        let ready: Vec<bool> = descriptors.iter().map(|descriptor| !descriptor.revents().is_empty()).collect();
        if ready[0] {
            let _ = rustix::io::read(&self.signals, &mut [0; 128]);
        }
        Ok((ready.get(1).copied().unwrap_or(false), ready[0]))
    }
}

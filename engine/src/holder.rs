//! The holder: a tiny parent that keeps the FUSE connection while engines come and go.
//!
//! It mounts the volume, starts an engine with the connection's descriptor, and starts another one when that dies. Requests wait
//! in the kernel meanwhile, and those that the dead engine had not answered are repeated. When no engine comes to serve within
//! the limit, the holder aborts the connection, so that everything that waits fails instead of waiting for ever. On a kernel that
//! cannot repeat requests the connection ends with its first engine that dies.
//!
//! An engine that does not answer is killed after a while and replaced like one that died. It is gone for certain before the next
//! one starts: a stopped process would go on some day. What the holder waits for stands in a file beside the control socket.
//!
//! The next engine is of the program that the configuration names at that moment. When that cannot be started or does not come to
//! serve, every other engine is of the holder's own program, which the kernel keeps although its file may be gone.
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
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use proto::engine::{Config, HolderReport};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::FdFlags;
use rustix::process::{Pid, PidfdFlags, Signal};
use tracing::{info, warn};

use crate::error::EngineError;
use crate::fuse::mount;
use crate::limits;
use crate::process::life::LifeFiles;
use crate::process::read_config;
use crate::pulse::{Beat, Pulse};
use crate::sys;

struct Holder {
    config: Config,
    config_path: PathBuf,
    life: LifeFiles,
    command: Vec<OsString>,
    device: OwnedFd,
    signals: OwnedFd,
    /// Since when no engine works, and the same for people.
    without_engine: Instant,
    waits_since: SystemTime,
    /// Engines that did not come to serve since then.
    failed_starts: u32,
}

/// How one engine ended.
struct Ended {
    /// The volume was unmounted on request while no engine served.
    unmounted: bool,
    clean: bool,
    /// It served for long enough to count as one that works.
    settled: bool,
    served: bool,
    /// How, in words.
    how: String,
}

/// Mounts the volume and keeps an engine running until it ends cleanly.
///
/// `engine_command` is the holder's own program and its arguments; the configuration may name another program.
/// `--fuse-fd NUMBER --lives NUMBER` is added, which it passes on to [`crate::process::run`].
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
    // Of an earlier attachment; no engine may take it for its own past.
    life.forget().map_err(|source| EngineError::Write { path: life.lock_path().to_owned(), source })?;
    let device = mount_fresh(&config)?;
    let mut holder = Holder {
        config,
        config_path: config_path.to_owned(),
        life,
        command: engine_command,
        device,
        signals,
        without_engine: Instant::now(),
        waits_since: SystemTime::now(),
        failed_starts: 0,
    };
    runtime::memory::release_startup_code();
    let result = holder.hold();
    match &result {
        Ok(()) => {
            mount::detach(&holder.config.mount_file);
            holder.life.set_holder_report(None);
        }
        Err(error) => {
            mount::abort(&holder.config.mount_file);
            holder.report_end(error);
        }
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
        let mut lives = 0;
        let mut quick_deaths = 0;
        loop {
            let ended = match self.start(lives) {
                Ok(child) => self.watch(child)?,
                // The file may be in the middle of being replaced.
                Err(error) => Ended::before_it_served(error.chain()),
            };
            if ended.unmounted {
                info!(volume = %self.config.volume, "volume unmounted on request before an engine served");
                return Ok(());
            }
            if ended.clean {
                info!(volume = %self.config.volume, "engine ended cleanly");
                return Ok(());
            }
            let how = ended.how.replace('\n', " ");
            if !matches!(self.life.repeats(), Ok(None | Some(true))) {
                return Err(EngineError::Lost { volume: self.config.volume.clone(), last: how });
            }
            warn!(volume = %self.config.volume, lives, reason = %how, "engine ended, starting the next");
            lives += 1;
            if ended.settled || self.failed_starts == 0 && ended.served {
                self.waits_since = SystemTime::now();
            }
            if ended.settled {
                self.without_engine = Instant::now();
            }
            quick_deaths = if ended.settled { 0 } else { quick_deaths + 1 };
            self.failed_starts = if ended.served { 0 } else { self.failed_starts + 1 };
            // The first one is replaced at once: requests are waiting.
            let pause = match quick_deaths {
                0 | 1 => Duration::ZERO,
                deaths => limits::HOLDER_FIRST_PAUSE * 2u32.pow((deaths - 2).min(8)),
            };
            let pause = pause.min(limits::HOLDER_LONGEST_PAUSE);
            self.report(&how, Some(pause));
            if !pause.is_zero() {
                let left = self.gives_up_at().saturating_duration_since(Instant::now());
                let (_, asked_to_end) = self.wait(None, pause.min(left))?;
                if asked_to_end && self.unmount_unused() {
                    return Ok(());
                }
            }
            if Instant::now() >= self.gives_up_at() {
                return Err(EngineError::GaveUp {
                    volume: self.config.volume.clone(),
                    limit_ms: self.config.holder_limit_ms,
                    last: how,
                });
            }
        }
    }

    fn limit(&self) -> Duration {
        Duration::from_millis(self.config.holder_limit_ms)
    }

    fn gives_up_at(&self) -> Instant {
        self.without_engine + self.limit()
    }

    /// Says what I/O waits for: an engine that is started again and again.
    fn report(&self, problem: &str, pause: Option<Duration>) {
        let now = SystemTime::now();
        let left = self.gives_up_at().saturating_duration_since(Instant::now());
        self.life.set_holder_report(Some(&HolderReport {
            problem: problem.to_owned(),
            silent: false,
            since_ms: milliseconds(self.waits_since),
            attempts: self.failed_starts,
            then: "its device is given up".into(),
            deadline_ms: milliseconds(now + left),
            next_attempt_ms: pause.map(|pause| milliseconds(now + pause)),
        }));
    }

    /// The last words, for whoever finds the holder gone.
    fn report_end(&self, error: &EngineError) {
        let problem = error.chain();
        let since_ms = milliseconds(self.waits_since);
        self.life.set_holder_report(Some(&HolderReport { problem, since_ms, ..HolderReport::default() }));
    }

    /// Says that an engine does not answer.
    fn report_silence(&self, pid: u32, since: SystemTime) {
        self.life.set_holder_report(Some(&HolderReport {
            problem: format!("the engine (process {pid}) does not answer"),
            silent: true,
            since_ms: milliseconds(since),
            attempts: 0,
            then: "it is killed and replaced".into(),
            deadline_ms: milliseconds(since + Duration::from_millis(self.config.silence_limit_ms)),
            next_attempt_ms: None,
        }));
    }

    fn start(&self, lives: u32) -> Result<Child, EngineError> {
        let own = &self.command[0];
        let wished = read_config(&self.config_path).ok().and_then(|config| config.program).map(OsString::from);
        let trusts_it = self.failed_starts < limits::HOLDER_FAILED_STARTS || self.failed_starts % 2 == 1;
        let program = wished.filter(|_| trusts_it).unwrap_or_else(|| own.clone());
        let mut command = Command::new(&program);
        command.args(&self.command[1..]);
        command.arg("--fuse-fd").arg(self.device.as_raw_fd().to_string());
        command.arg("--lives").arg(lives.to_string());
        command.stdin(Stdio::null());
        command.spawn().map_err(|source| EngineError::Spawn { command: program.to_string_lossy().into_owned(), source })
    }

    /// Waits for the end of an engine. One that does not come to serve, or does not answer any more, is ended.
    fn watch(&mut self, mut child: Child) -> Result<Ended, EngineError> {
        let events = |source| EngineError::Events { source };
        let pid = Pid::from_child(&child);
        let process = rustix::process::pidfd_open(pid, PidfdFlags::empty()).map_err(|error| events(error.into()))?;
        let mut pulse = Pulse::of(&self.config.control_socket);
        let silence_limit = Duration::from_millis(self.config.silence_limit_ms);
        let answer_limit = limits::HOLDER_ANSWER.min(silence_limit / 2);
        // Half of the time, so that one that hangs while it starts leaves time for another one.
        let serves_before = (Instant::now() + self.limit() / 2).min(self.gives_up_at());
        let mut served_since = None;
        let (mut unmounted, mut killed) = (false, None);
        // Only time in which this process listened counts: both may have been stopped together.
        let mut silence = Duration::ZERO;
        loop {
            let pause = match served_since {
                None => limits::HOLDER_POLL,
                Some(_) if silence.is_zero() => limits::HOLDER_HEARTBEAT,
                Some(_) => Duration::ZERO,
            };
            let (over, asked_to_end) = self.wait(Some(&process), pause)?;
            if over {
                let status = child.wait().map_err(events)?;
                let settled = served_since.is_some_and(|since: Instant| since.elapsed() >= limits::HOLDER_SETTLED);
                let how = match (killed, self.life.take_failure()) {
                    (Some(why), _) => why,
                    (None, Some(sentence)) => sentence,
                    (None, None) if served_since.is_some() => format!("it died ({status})"),
                    (None, None) => format!("it died before it served ({status})"),
                };
                let (served, clean) = (served_since.is_some(), status.success());
                return Ok(Ended { unmounted, clean, settled, served, how });
            }
            if asked_to_end && served_since.is_none() && self.unmount_unused() {
                // An engine that is about to serve notices and closes the replicas; one that cannot has nothing to close.
                unmounted = true;
            } else if asked_to_end {
                // The engine decides: it ends when nobody uses the volume.
                let _ = rustix::process::pidfd_send_signal(&process, Signal::TERM);
            }
            match pulse.beat(if served_since.is_some() { answer_limit } else { limits::HOLDER_POLL }) {
                // Nobody else can answer as long as the lock keeps other holders away and each engine is gone before the next.
                Beat::Answer(status) if status.pid == child.id() => {
                    if served_since.is_none() && status.serving {
                        info!(volume = %self.config.volume, pid = child.id(), "engine answers");
                        served_since = Some(Instant::now());
                        self.life.set_holder_report(None);
                    } else if !silence.is_zero() {
                        info!(volume = %self.config.volume, "engine answers again");
                        self.life.set_holder_report(None);
                    }
                    silence = Duration::ZERO;
                }
                Beat::Silence if served_since.is_some() => {
                    if silence.is_zero() {
                        warn!(volume = %self.config.volume, pid = child.id(), "engine does not answer");
                        self.report_silence(child.id(), SystemTime::now() - answer_limit);
                    }
                    silence += answer_limit;
                }
                Beat::Answer(_) | Beat::Nobody | Beat::Silence => {}
            }
            let sentence = if silence >= silence_limit {
                format!("it did not answer for {silence_limit:?} and was killed")
            } else if served_since.is_none() && Instant::now() >= serves_before {
                "it did not begin to serve in time and was killed".to_owned()
            } else {
                continue;
            };
            self.kill(&mut child, &process)?;
            killed = Some(sentence);
        }
    }

    /// Returns when the engine is gone. Until then nobody may take its place (invariant 4), however long a kernel keeps it.
    fn kill(&mut self, child: &mut Child, process: &OwnedFd) -> Result<(), EngineError> {
        let _ = child.kill();
        let deadline = Instant::now() + self.limit();
        // `watch` would wait for its end too; this is what gives up when a kernel never lets go of it.
        while !self.wait(Some(process), deadline.saturating_duration_since(Instant::now()))?.0 {
            if Instant::now() >= deadline {
                let (volume, limit_ms) = (self.config.volume.clone(), self.config.holder_limit_ms);
                return Err(EngineError::Undead { volume, limit_ms });
            }
        }
        Ok(())
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

impl Ended {
    fn before_it_served(how: String) -> Ended {
        Ended { unmounted: false, clean: false, settled: false, served: false, how }
    }
}

fn milliseconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

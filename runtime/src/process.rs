//! Processes that outlive their starter and are found again.
//!
//! A process is known by pid, start time and boot: a pid alone may belong to somebody else by the time it is used.

mod birth;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;

use birth::Birth;
pub use birth::started;

/// How long a process that was killed may take to end. One that waits for a disk ends only when that answers.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);

/// A process, for good: never mistaken for another one that got its pid.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProcessIdentity {
    pub pid: u32,
    /// Start time in clock ticks since boot (`/proc/<pid>/stat`, field 22).
    pub start_ticks: u64,
    pub boot_id: String,
}

impl ProcessIdentity {
    /// The identity of a running process; an error of kind `NotFound` when there is none of that pid.
    pub fn of(pid: u32) -> io::Result<ProcessIdentity> {
        let (_, start_ticks) = read_stat(pid)?;
        Ok(ProcessIdentity { pid, start_ticks, boot_id: boot_id()? })
    }

    /// Whether it still runs. A zombie does not.
    pub fn is_alive(&self) -> bool {
        boot_id().is_ok_and(|b| b == self.boot_id)
            && read_stat(self.pid).is_ok_and(|(state, start)| start == self.start_ticks && !matches!(state, 'Z' | 'X'))
    }

    /// A descriptor of the process, or `None` when it has ended.
    fn open(&self) -> io::Result<Option<OwnedFd>> {
        let Some(pid) = Pid::from_raw(self.pid as i32) else { return Ok(None) };
        // Checked before too, because the number may be that of a thread by now, for which there is no descriptor but an error.
        if !self.is_alive() {
            return Ok(None);
        }
        match pidfd_open(pid, PidfdFlags::NONBLOCK) {
            // Checked after opening: the descriptor now belongs to one process, and it is ours if it is alive.
            Ok(fd) => Ok(self.is_alive().then_some(fd)),
            Err(rustix::io::Errno::SRCH) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// Sends a signal; `false` when the process has ended.
    pub fn signal(&self, signal: Signal) -> io::Result<bool> {
        let Some(fd) = self.open()? else { return Ok(false) };
        match pidfd_send_signal(&fd, signal) {
            Ok(()) => Ok(true),
            Err(rustix::io::Errno::SRCH) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    /// Returns when the process has ended, at once when it has already.
    pub async fn wait(&self) -> io::Result<()> {
        let Some(fd) = self.open()? else { return Ok(()) };
        readable(fd)?.readable().await?.retain_ready();
        Ok(())
    }

    /// SIGTERM, then SIGKILL after `grace`; returns when the process has ended, with an error when it does not.
    pub async fn terminate(&self, grace: Duration) -> io::Result<()> {
        if !self.signal(Signal::TERM)? {
            return Ok(());
        }
        if let Ok(ended) = tokio::time::timeout(grace, self.wait()).await {
            return ended;
        }
        self.kill().await
    }

    /// SIGKILL; returns when the process has ended, with an error of kind `TimedOut` when it does not within 5 s.
    pub async fn kill(&self) -> io::Result<()> {
        self.signal(Signal::KILL)?;
        let unkillable = |_| {
            let text = format!("process {} does not end after SIGKILL; it may wait for a disk", self.pid);
            io::Error::new(io::ErrorKind::TimedOut, text)
        };
        tokio::time::timeout(KILL_TIMEOUT, self.wait()).await.map_err(unkillable)?
    }
}

/// State letter and start time of a process.
fn read_stat(pid: u32) -> io::Result<(char, u64)> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    parse_stat(&text)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("/proc/{pid}/stat is not understood")))
}

fn parse_stat(text: &str) -> Option<(char, u64)> {
    // The second field is the command in parentheses and may hold anything, so begin after the last one.
    let (_, rest) = text.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((state, fields.nth(18)?.parse().ok()?))
}

fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// A process to start.
#[derive(Clone, Debug)]
pub struct Launch {
    pub program: PathBuf,
    pub args: Vec<OsString>,
    /// Added to our own environment.
    pub env: BTreeMap<String, String>,
    pub current_dir: Option<PathBuf>,
    /// Gets standard output and error, appended; without one they go nowhere.
    pub log_file: Option<PathBuf>,
    /// Made by the start; [`started`] finds the process there, whatever becomes of us meanwhile.
    pub started_file: Option<PathBuf>,
}

impl Launch {
    /// A launch without arguments.
    pub fn new(program: impl Into<PathBuf>) -> Launch {
        Launch {
            program: program.into(),
            args: vec![],
            env: BTreeMap::new(),
            current_dir: None,
            log_file: None,
            started_file: None,
        }
    }

    /// Adds an argument.
    pub fn arg(mut self, arg: impl Into<OsString>) -> Launch {
        self.args.push(arg.into());
        self
    }

    /// Adds a flag and its value.
    pub fn flag(self, name: &str, value: impl Into<OsString>) -> Launch {
        self.arg(name).arg(value)
    }

    /// Starts it in a session of its own, so that it outlives us. tokio reaps it while we live.
    ///
    /// Must be called within a tokio runtime.
    pub fn spawn_detached(&self) -> io::Result<ProcessIdentity> {
        // The child is dropped: tokio's orphan queue reaps it.
        self.spawn_watched().map(|(process, _)| process)
    }

    /// As [`Launch::spawn_detached`], and tells how it ends for as long as we live: dropping the child leaves the process alone.
    pub fn spawn_watched(&self) -> io::Result<(ProcessIdentity, tokio::process::Child)> {
        let (stdout, stderr) = match &self.log_file {
            Some(path) => {
                let file = OpenOptions::new().create(true).append(true).open(path)?;
                (Stdio::from(file.as_fd().try_clone_to_owned()?), Stdio::from(file))
            }
            None => (Stdio::null(), Stdio::null()),
        };
        let mut command = tokio::process::Command::new(&self.program);
        command.args(&self.args).envs(&self.env).stdin(Stdio::null()).stdout(stdout).stderr(stderr).kill_on_drop(false);
        if let Some(directory) = &self.current_dir {
            command.current_dir(directory);
        }
        let birth = self.started_file.as_deref().map(Birth::prepare).transpose()?;
        detach(&mut command, birth);
        let child = command.spawn()?;
        let pid = child.id().ok_or_else(|| io::Error::other("the process ended at once"))?;
        // Not yet reaped, so its stat file exists even if it has ended already.
        Ok((ProcessIdentity::of(pid)?, child))
    }
}

#[allow(unsafe_code, reason = "tokio asks for the promise that the descriptor is not swapped")]
fn readable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd always returns the same descriptor, which stays open until the AsyncFd is dropped.
    unsafe { AsyncFd::register_with_interest(fd, tokio::io::Interest::READABLE) }.map_err(io::Error::from)
}

#[allow(unsafe_code, reason = "pre_exec is unsafe; setsid and the note of a birth are async-signal-safe")]
fn detach(command: &mut tokio::process::Command, birth: Option<Birth>) {
    // SAFETY: between fork and exec the closure only calls setsid(2), open(2), read(2), write(2) and close(2).
    unsafe {
        command.pre_exec(move || {
            rustix::process::setsid()?;
            birth.as_ref().map_or(Ok(()), Birth::write)
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn ends_a_process_that_ignores_sigterm() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let mut launch = Launch::new("/bin/sh").arg("-c").arg("trap '' TERM; echo ready; while :; do sleep 1; done");
        launch.log_file = Some(log.clone());
        let process = launch.spawn_detached().unwrap();
        while fs::read_to_string(&log).unwrap_or_default().is_empty() {
            tokio::task::yield_now().await;
        }
        assert!(process.is_alive());
        process.terminate(Duration::from_millis(50)).await.unwrap();
        assert!(!process.is_alive());
        process.terminate(Duration::from_millis(50)).await.unwrap();
    }

    #[tokio::test]
    async fn does_not_mistake_another_process_for_its_own() {
        let process = ProcessIdentity::of(std::process::id()).unwrap();
        assert!(process.is_alive());
        let other = ProcessIdentity { start_ticks: process.start_ticks + 1, ..process };
        assert!(!other.is_alive());
        assert!(!other.signal(Signal::KILL).unwrap());
        other.wait().await.unwrap();
    }

    /// Numbers are given to processes and threads alike, and after a restart of the machine they begin anew.
    #[tokio::test]
    async fn a_thread_that_got_the_number_of_an_ended_process_is_not_it() {
        let (say, said) = std::sync::mpsc::channel();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            say.send(rustix::thread::gettid()).unwrap();
            let _ = ended.recv();
        });
        let number = said.recv().unwrap().as_raw_nonzero().get() as u32;
        let process = ProcessIdentity { pid: number, start_ticks: 1, boot_id: boot_id().unwrap() };
        let outcomes = [
            process.signal(Signal::KILL).map_err(|e| e.to_string()),
            process.wait().await.map(|()| false).map_err(|e| e.to_string()),
            process.terminate(Duration::ZERO).await.map(|()| false).map_err(|e| e.to_string()),
        ];
        drop(end);
        thread.join().unwrap();
        assert_eq!(outcomes, [Ok(false), Ok(false), Ok(false)]);
    }

    #[tokio::test]
    async fn notices_the_end_of_a_process() {
        let process = Launch::new("/bin/true").spawn_detached().unwrap();
        process.wait().await.unwrap();
        assert!(!process.is_alive());
    }
}

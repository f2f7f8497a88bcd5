//! Starts `qemu-storage-daemon` so that it dies with us.
//!
//! The kernel sends the death signal when the *thread* that started the child ends, so the child gets a thread of its own that waits for it.
#![allow(unsafe_code, reason = "pre_exec is unsafe; the calls in it are async-signal-safe")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};

use rustix::io::FdFlags;
use rustix::process::{Signal, set_parent_process_death_signal};
use tokio::sync::{oneshot, watch};

/// A started child: its pid, and how it ended once it has.
pub(super) struct Child {
    pub pid: u32,
    pub ended: watch::Receiver<Option<ExitStatus>>,
}

/// Starts a program in a directory, with further variables in its environment. `inherited` are handed over under the same numbers and stay open in the child until it ends.
pub(super) async fn spawn(
    program: &str,
    args: Vec<String>,
    variables: &[(&str, String)],
    directory: &Path,
    log: File,
    inherited: Vec<OwnedFd>,
) -> io::Result<Child> {
    let mut command = Command::new(program);
    command.args(args).current_dir(directory).envs(variables.iter().map(|(name, value)| (name, value)));
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    let numbers: Vec<i32> = inherited.iter().map(AsRawFd::as_raw_fd).collect();
    // SAFETY: between fork and exec the closure only makes async-signal-safe system calls and allocates nothing;
    // the descriptors of `numbers` are open, because `inherited` lives in the thread below until after the fork.
    unsafe {
        command.pre_exec(move || {
            // SIGTERM, not SIGKILL: it then flushes what it holds.
            set_parent_process_death_signal(Some(Signal::TERM))?;
            for number in &numbers {
                rustix::io::fcntl_setfd(BorrowedFd::borrow_raw(*number), FdFlags::empty())?;
            }
            Ok(())
        });
    }
    let (started, answer) = oneshot::channel();
    let (ended_sender, ended) = watch::channel(None);
    std::thread::Builder::new().name("storage-daemon".into()).spawn(move || {
        let child = command.spawn();
        drop(inherited);
        match child {
            Err(error) => drop(started.send(Err(error))),
            Ok(mut child) => {
                let _ = started.send(Ok(child.id()));
                // An error of wait means that the child is not there any more.
                let _ = ended_sender.send(Some(child.wait().unwrap_or_default()));
            }
        }
    })?;
    let pid = answer.await.map_err(|_| io::Error::other("the starting thread ended"))??;
    Ok(Child { pid, ended })
}

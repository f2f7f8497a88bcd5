//! External programs, with a time limit or none, and their own words when they fail.
//!
//! The only place that starts programs which are not ours, apart from `storage_daemon::spawn`.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::process::Stdio;
use std::time::Duration;

use tokio::process::{Child, Command};

use crate::{DataplaneError, limits};

/// What a program said.
#[derive(Clone, Debug)]
pub struct Output {
    /// Exit status; `None` when a signal ended it.
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
    /// The command line, for messages.
    pub command: String,
}

impl Output {
    /// The error that this outcome means.
    pub fn failure(&self) -> DataplaneError {
        let outcome = match self.code {
            Some(code) => format!("exit status {code}"),
            None => "killed by a signal".into(),
        };
        let said = if self.stderr.trim().is_empty() { &self.stdout } else { &self.stderr };
        DataplaneError::Failed { command: self.command.clone(), outcome, stderr: last_bytes(said.trim()) }
    }
}

/// Runs a program to its end, whatever its exit status. It is killed when the time is over or the caller gives up.
pub async fn run<S: AsRef<OsStr>>(
    program: &str,
    args: impl IntoIterator<Item = S>,
    limit: Duration,
) -> Result<Output, DataplaneError> {
    let mut command = command(program, args);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let line = command_line(&command);
    let child = spawn(&mut command, program, &line)?;
    match tokio::time::timeout(limit, child.wait_with_output()).await {
        Err(_) => Err(DataplaneError::Slow { command: line, seconds: limit.as_secs() }),
        Ok(Err(source)) => Err(DataplaneError::io(format!("wait for `{line}`"), source)),
        Ok(Ok(output)) => Ok(Output {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
            command: line,
        }),
    }
}

/// Runs a program that must not be cut off: however long it takes, also when the caller gives up or this process ends. Only with the
/// first process of a container, as the node plugin of the chart is, the kernel ends all others.
///
/// What it says goes to files in memory, since a pipe that nobody reads any more would end it at its next word. Nor do signals of a
/// terminal reach it.
pub async fn run_to_end<S: AsRef<OsStr>>(
    program: &str,
    args: impl IntoIterator<Item = S>,
) -> Result<Output, DataplaneError> {
    let mut command = command(program, args);
    let line = command_line(&command);
    let failed = |source| DataplaneError::io(format!("read what `{line}` says"), source);
    let (mut stdout, mut stderr) = (memory().map_err(failed)?, memory().map_err(failed)?);
    command.stdout(stdout.try_clone().map_err(failed)?).stderr(stderr.try_clone().map_err(failed)?).process_group(0);
    let mut child = spawn(&mut command, program, &line)?;
    let status = child.wait().await.map_err(|source| DataplaneError::io(format!("wait for `{line}`"), source))?;
    let (stdout, stderr) = (end_of(&mut stdout).map_err(failed)?, end_of(&mut stderr).map_err(failed)?);
    Ok(Output { code: status.code(), stdout, stderr, command: line })
}

fn memory() -> io::Result<File> {
    Ok(rustix::fs::memfd_create("output", rustix::fs::MemfdFlags::CLOEXEC)?.into())
}

/// The last words of what was written.
fn end_of(file: &mut File) -> io::Result<String> {
    let length = file.seek(SeekFrom::End(0))?;
    file.seek(SeekFrom::Start(length.saturating_sub(limits::OUTPUT_BYTES)))?;
    let mut bytes = Vec::new();
    file.take(limits::OUTPUT_BYTES).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn command<S: AsRef<OsStr>>(program: &str, args: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(program);
    // Messages are parsed and shown, so they must not depend on the user's language.
    command.args(args).stdin(Stdio::null()).env("LC_ALL", "C");
    command
}

fn spawn(command: &mut Command, program: &str, line: &str) -> Result<Child, DataplaneError> {
    command.spawn().map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => {
            DataplaneError::Missing { program: program.to_owned(), package: package_of(program).to_owned() }
        }
        _ => DataplaneError::io(format!("start `{line}`"), source),
    })
}

/// Runs a program that must succeed.
pub async fn run_ok<S: AsRef<OsStr>>(
    program: &str,
    args: impl IntoIterator<Item = S>,
    limit: Duration,
) -> Result<Output, DataplaneError> {
    let output = run(program, args, limit).await?;
    if output.code == Some(0) { Ok(output) } else { Err(output.failure()) }
}

fn command_line(command: &Command) -> String {
    let command = command.as_std();
    let mut line = command.get_program().to_string_lossy().into_owned();
    for arg in command.get_args() {
        line.push(' ');
        line.push_str(&arg.to_string_lossy());
    }
    line
}

/// The Debian package that brings a program.
pub(crate) fn package_of(program: &str) -> &str {
    match program {
        "qemu-storage-daemon" => "qemu-system-common",
        "mkfs.ext4" | "e2fsck" | "resize2fs" => "e2fsprogs",
        "mkfs.xfs" | "xfs_growfs" => "xfsprogs",
        "blkid" => "util-linux",
        other => other,
    }
}

fn last_bytes(text: &str) -> String {
    let mut start = text.len().saturating_sub(limits::STDERR_BYTES);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    text[start..].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn says_what_failed_in_the_words_of_the_program() {
        let error = run_ok("sh", ["-c", "echo oh no >&2; exit 3"], Duration::from_secs(5)).await.unwrap_err();
        assert_eq!(error.to_string(), "`sh -c echo oh no >&2; exit 3` failed (exit status 3): oh no");
    }

    #[tokio::test]
    async fn kills_a_program_that_takes_too_long() {
        let error = run("sleep", ["1000"], Duration::from_millis(20)).await.unwrap_err();
        assert!(matches!(error, DataplaneError::Slow { .. }), "{error}");
    }

    /// Its own word comes after the one who waited is gone.
    #[tokio::test]
    async fn what_must_not_be_cut_off_goes_on_although_nobody_waits_and_speaks_to_nobody() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).display().to_string();
        let script = r#"mkfifo "$0"; : >"$1"; read word <"$0"; echo "$word" && echo "$word" >&2 && : >"$2""#;
        let (fifo, begun, done) = (path("fifo"), path("begun"), path("done"));
        tokio::time::pause();
        let mut running = Box::pin(run_to_end("sh", ["-c", script, &fifo, &begun, &done]));
        let early = tokio::time::timeout(Duration::from_secs(86_400), &mut running).await;
        assert!(early.is_err(), "{early:?}: it had a day and no answer");
        drop(running);
        let deadline = std::time::Instant::now() + Duration::from_secs(20);
        let until = |file: &str| {
            while !std::path::Path::new(file).exists() {
                assert!(std::time::Instant::now() < deadline, "`{file}` does not come: it was ended");
                std::thread::park_timeout(Duration::from_millis(10)); // poll
            }
        };
        until(&begun);
        std::fs::write(&fifo, "go on\n").unwrap();
        until(&done);
    }

    #[tokio::test]
    async fn what_runs_to_its_end_says_how_it_ended() {
        let output = run_to_end("sh", ["-c", "echo one; echo two >&2; exit 5"]).await.unwrap();
        assert_eq!((output.code, output.stdout.trim(), output.stderr.trim()), (Some(5), "one", "two"));
        assert!(matches!(run_to_end("no-such-program", [""; 0]).await, Err(DataplaneError::Missing { .. })));
    }

    #[tokio::test]
    async fn names_the_package_of_a_missing_program() {
        let error = run("no-such-program", [""; 0], Duration::from_secs(5)).await.unwrap_err();
        assert!(error.to_string().contains("is not installed"), "{error}");
    }
}

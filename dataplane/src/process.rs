//! External programs, with a time limit and their own words when they fail.
//!
//! The only place that starts programs which are not ours, apart from `storage_daemon::spawn`.

use std::ffi::OsStr;
use std::io;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

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
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // Messages are parsed and shown, so they must not depend on the user's language.
    command.env("LC_ALL", "C").kill_on_drop(true);
    let line = command_line(&command);
    let child = command.spawn().map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => {
            DataplaneError::Missing { program: program.to_owned(), package: package_of(program).to_owned() }
        }
        _ => DataplaneError::io(format!("start `{line}`"), source),
    })?;
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

    #[tokio::test]
    async fn names_the_package_of_a_missing_program() {
        let error = run("no-such-program", [""; 0], Duration::from_secs(5)).await.unwrap_err();
        assert!(error.to_string().contains("is not installed"), "{error}");
    }
}

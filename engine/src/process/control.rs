//! The engine's control socket: status, watching, shutdown.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use proto::engine::{Reply, Request, Status};
use rustix::io::Errno;

use crate::lines::Lines;

/// One connection.
pub struct Client {
    lines: Lines,
    /// Tells the client from an earlier one in the same place.
    pub serial: u64,
    watching: bool,
    /// What it was sent last while watching.
    seen: Option<Status>,
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.lines.as_fd()
    }
}

impl Client {
    pub fn new(socket: OwnedFd, serial: u64) -> Result<Client, Errno> {
        Ok(Client { lines: Lines::new(socket)?, serial, watching: false, seen: None })
    }

    /// Sends what is queued, takes what has come.
    ///
    /// # Errors
    /// When the client is gone.
    pub fn progress(&mut self) -> Result<Vec<Result<Request, String>>, String> {
        self.lines.flush()?;
        let parse = |line: Vec<u8>| {
            serde_json::from_slice(&line).map_err(|error| {
                format!("this is no request ({error}); `{{\"request\":\"status\"}}`, `watch`, `shutdown` and `hand_over` are known")
            })
        };
        Ok(self.lines.read()?.into_iter().map(parse).collect())
    }

    pub fn reply(&mut self, reply: &Reply) -> Result<(), String> {
        self.lines.write(reply)
    }

    pub fn begin_watch(&mut self) {
        self.watching = true;
        self.seen = None;
    }

    /// Tells a watcher what changed. Counters alone are no change.
    pub fn tell(&mut self, status: &Status) -> Result<(), String> {
        if !self.watching || self.seen.as_ref().is_some_and(|seen| same_state(seen, status)) {
            return Ok(());
        }
        self.seen = Some(status.clone());
        self.lines.write(&Reply::Status(status.clone()))
    }
}

fn same_state(a: &Status, b: &Status) -> bool {
    let state = |s: &Status| (s.generation, s.serving, s.lives, s.pid);
    state(a) == state(b) && a.replicas == b.replicas && a.replica_errors == b.replica_errors && a.faulted == b.faulted
}

//! The control connection to one replica while the engine serves.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use proto::engine::ReplicaAddress;
use proto::replica::{Reply, Request};
use runtime::transport::Security;

use crate::core::ControlReply;
use crate::lines::Lines;
use crate::stream::{Service, Stream};

/// How long a new connection may take. Requests stand still meanwhile, so it is short; it happens only before a fence when an
/// idle connection had ended.
const RECONNECT_LIMIT: Duration = Duration::from_millis(500);
/// How much more time its TLS handshake has. It takes both sides a few milliseconds of a processor, for which they may wait for a
/// second where all of them are busy, and a replica that is too late is dropped. Three that say nothing, one after the other, still
/// cost less than the silence after which an engine is replaced.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(2);

/// What a replica answered.
pub enum Answer {
    /// To a request of the core.
    Control(ControlReply),
    /// To `Status`: the generation that it has recorded.
    Generation(u64),
}

/// The connection, made again on demand: a replica may end an idle one.
pub struct ReplicaControl {
    address: ReplicaAddress,
    security: Security,
    lines: Option<Lines>,
    unanswered: usize,
}

impl ReplicaControl {
    pub fn new(
        address: ReplicaAddress,
        security: Security,
        stream: Stream,
    ) -> Result<ReplicaControl, rustix::io::Errno> {
        let lines = Some(Lines::new(stream.into_socket())?);
        Ok(ReplicaControl { address, security, lines, unanswered: 0 })
    }

    fn connect(&self) -> io::Result<Stream> {
        let deadline = Instant::now() + RECONNECT_LIMIT;
        Stream::connect_and_secure(&self.address, Service::Control, &self.security, deadline, HANDSHAKE_LIMIT)
    }

    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.lines.as_ref().map(std::os::fd::AsFd::as_fd)
    }

    /// Whether a connection had to be made, so that its events must be asked for.
    ///
    /// # Errors
    /// A sentence when the replica cannot be reached.
    pub fn ensure_connected(&mut self) -> Result<bool, String> {
        if self.lines.is_some() {
            return Ok(false);
        }
        let stream = self.connect().map_err(|error| error.to_string())?;
        self.lines = Some(Lines::new(stream.into_socket()).map_err(|error| error.to_string())?);
        Ok(true)
    }

    /// Whether an idle connection that ended was made again, so that its events must be asked for.
    ///
    /// # Errors
    /// When nobody listens: the process of the replica died. Its daemon is about to end, but one without requests may notice
    /// that only with the next one. (A process that is just dying may still listen; then the new connection ends as well.)
    pub fn restore(&mut self) -> Result<bool, String> {
        if self.lines.is_some() {
            return Ok(false);
        }
        match self.connect() {
            Ok(stream) => {
                self.lines = Lines::new(stream.into_socket()).ok();
                Ok(self.lines.is_some())
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound) => {
                Err(format!("its process is gone ({error})"))
            }
            // It is tried again when it is needed.
            Err(_) => Ok(false),
        }
    }

    pub fn send(&mut self, request: &Request) -> Result<(), String> {
        self.unanswered += 1;
        self.lines.as_mut().ok_or("it is not connected")?.write(request)
    }

    /// Sends what is queued and takes what has come.
    ///
    /// # Errors
    /// A sentence when the connection ended while answers are missing. The end of an idle connection is no error.
    pub fn progress(&mut self) -> Result<Vec<Answer>, String> {
        let Some(lines) = &mut self.lines else { return Ok(Vec::new()) };
        let read = lines.flush().and_then(|()| lines.read());
        match read {
            Ok(lines) => lines.iter().map(|line| self.parse(line)).collect(),
            Err(_) if self.unanswered == 0 => {
                self.lines = None;
                Ok(Vec::new())
            }
            Err(error) => {
                self.lines = None;
                Err(error)
            }
        }
    }

    fn parse(&mut self, line: &[u8]) -> Result<Answer, String> {
        self.unanswered = self.unanswered.checked_sub(1).ok_or("it answered a question that was not asked")?;
        match serde_json::from_slice(line) {
            Ok(Reply::Done) => Ok(Answer::Control(ControlReply::Done)),
            Ok(Reply::Refused { message }) => Ok(Answer::Control(ControlReply::Refused(message))),
            Ok(Reply::Status { record, .. }) => Ok(Answer::Generation(record.generation)),
            Ok(_) => Err("it sent a reply of another kind".into()),
            Err(error) => Err(format!("it sent something that is no reply ({error})")),
        }
    }
}

//! Talking to an engine over its control socket, blocking.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use proto::engine::{Reply, Request, Status};

use crate::error::EngineError;
use crate::stream::Stream;

/// Sends one request and returns the reply, `Refused` included.
///
/// # Errors
/// [`EngineError::Control`] when no engine answers within the limit.
pub fn ask(control_socket: &Path, request: &Request, limit: Duration) -> Result<Reply, EngineError> {
    let asked = || -> io::Result<Reply> {
        let mut stream = Stream::Unix(runtime::socket::connect_blocking(control_socket)?);
        stream.ask(request, Instant::now() + limit)
    };
    asked().map_err(|source| EngineError::Control { path: control_socket.to_owned(), source })
}

/// How the engine does.
pub fn status(control_socket: &Path, limit: Duration) -> Result<Status, EngineError> {
    match ask(control_socket, &Request::Status, limit)? {
        Reply::Status(status) => Ok(status),
        Reply::Refused { message } => Err(EngineError::Refused { message }),
        Reply::Done => Err(unexpected(control_socket)),
    }
}

/// Ends the engine cleanly; returns when the replicas are closed and the volume is unmounted.
///
/// # Errors
/// [`EngineError::Refused`] when the device is in use.
pub fn shutdown(control_socket: &Path, limit: Duration) -> Result<(), EngineError> {
    order(control_socket, &Request::Shutdown, limit)
}

/// Makes the engine end for the next one; returns when nothing is in flight any more.
///
/// # Errors
/// [`EngineError::Refused`] when the next one might not be able to go on.
pub fn hand_over(control_socket: &Path, limit: Duration) -> Result<(), EngineError> {
    order(control_socket, &Request::HandOver, limit)
}

fn order(control_socket: &Path, request: &Request, limit: Duration) -> Result<(), EngineError> {
    match ask(control_socket, request, limit)? {
        Reply::Done => Ok(()),
        Reply::Refused { message } => Err(EngineError::Refused { message }),
        Reply::Status(_) => Err(unexpected(control_socket)),
    }
}

/// The status now and after each change, until the engine ends.
pub struct Watch {
    path: PathBuf,
    stream: Stream,
}

/// Begins to watch.
pub fn watch(control_socket: &Path) -> Result<Watch, EngineError> {
    let started = || -> io::Result<Stream> {
        let mut stream = Stream::Unix(runtime::socket::connect_blocking(control_socket)?);
        let mut line = serde_json::to_vec(&Request::Watch)?;
        line.push(b'\n');
        io::Write::write_all(&mut stream, &line)?;
        Ok(stream)
    };
    let stream = started().map_err(|source| EngineError::Control { path: control_socket.to_owned(), source })?;
    Ok(Watch { path: control_socket.to_owned(), stream })
}

impl Watch {
    /// The next status.
    ///
    /// # Errors
    /// When the engine ended, or nothing changed within the limit.
    pub fn next(&mut self, limit: Duration) -> Result<Status, EngineError> {
        let line = self.stream.read_line(Instant::now() + limit);
        let reply = line.and_then(|line| Ok(serde_json::from_slice::<Reply>(&line)?));
        match reply {
            Ok(Reply::Status(status)) => Ok(status),
            Ok(_) => Err(unexpected(&self.path)),
            Err(source) => Err(EngineError::Control { path: self.path.clone(), source }),
        }
    }
}

fn unexpected(path: &Path) -> EngineError {
    let source = io::Error::new(io::ErrorKind::InvalidData, "it sent a reply of another kind");
    EngineError::Control { path: path.to_owned(), source }
}

//! Whether an engine is still there: asked over its control socket, again and again.
//!
//! A process that is stopped keeps its sockets, and connecting to them works until too many have done so, so all questions go
//! over one connection, and none is asked before the last one was answered.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use proto::engine::{Reply, Request, Status};

use crate::limits;

/// What a question led to.
#[derive(Debug)]
pub enum Beat {
    Answer(Box<Status>),
    /// Nobody listens, or whoever does closed the connection: an engine that begins or ends, but is not stuck.
    Nobody,
    /// Somebody listens and does not answer.
    Silence,
}

/// The watch over one engine.
pub struct Pulse {
    socket: PathBuf,
    connection: Option<BufReader<UnixStream>>,
    is_asked: bool,
    /// What has come of the answer that is waited for.
    line: Vec<u8>,
}

impl Pulse {
    pub fn of(control_socket: &Path) -> Pulse {
        Pulse { socket: control_socket.to_owned(), connection: None, is_asked: false, line: Vec::new() }
    }

    /// Asks, unless an answer is due already, and waits for the answer.
    pub fn beat(&mut self, limit: Duration) -> Beat {
        match self.ask(Instant::now() + limit) {
            Ok(status) => Beat::Answer(Box::new(status)),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => Beat::Silence,
            Err(_) => {
                self.connection = None;
                Beat::Nobody
            }
        }
    }

    fn ask(&mut self, deadline: Instant) -> io::Result<Status> {
        let connection = match &mut self.connection {
            Some(connection) => connection,
            none => {
                self.is_asked = false;
                self.line.clear();
                none.insert(BufReader::new(runtime::socket::connect_blocking(&self.socket)?))
            }
        };
        if !self.is_asked {
            writeln!(connection.get_mut(), "{}", serde_json::to_string(&Request::Status)?)?;
            self.is_asked = true;
        }
        while !self.line.ends_with(b"\n") {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            connection.get_ref().set_read_timeout(Some(left))?;
            let come = connection.fill_buf()?;
            if come.is_empty() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let count = come.iter().position(|byte| *byte == b'\n').map_or(come.len(), |at| at + 1);
            self.line.extend_from_slice(&come[..count]);
            connection.consume(count);
            if self.line.len() > limits::MAX_CONTROL_LINE {
                // No answer, however it ends; that its sender is silent shows when the time is over.
                self.line.clear();
            }
        }
        self.is_asked = false;
        match serde_json::from_slice(&std::mem::take(&mut self.line))? {
            Reply::Status(status) => Ok(status),
            Reply::Done | Reply::Refused { .. } => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::sync::mpsc;
    use std::thread;

    use super::*;

    /// What a beat is when an engine answers by this, again and again, until nobody listens.
    fn beat(answer: &'static [u8]) -> Beat {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("control.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        thread::spawn(move || {
            let (mut engine, _) = listener.accept().unwrap();
            while !answer.is_empty() && engine.write_all(answer).is_ok() {}
            thread::park_timeout(Duration::from_secs(30));
        });
        let (sender, receiver) = mpsc::channel();
        thread::spawn(move || sender.send(Pulse::of(&socket).beat(Duration::from_millis(200))));
        receiver.recv_timeout(Duration::from_secs(20)).expect("it listens for ever")
    }

    #[test]
    fn an_answer_that_does_not_come_or_does_not_end_is_silence() {
        assert!(matches!(beat(b""), Beat::Silence));
        assert!(matches!(beat(&[b'x'; 4096]), Beat::Silence));
    }

    #[test]
    fn what_is_no_status_is_no_answer() {
        assert!(matches!(beat(b"nonsense\n"), Beat::Nobody));
        assert!(matches!(beat(b"{\"reply\":\"done\"}\n"), Beat::Nobody));
    }

    #[test]
    fn an_answer_without_end_is_not_kept() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("control.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let talker = thread::spawn(move || {
            let (mut engine, _) = listener.accept().unwrap();
            let mut sent = 0;
            while sent < 16 * limits::MAX_CONTROL_LINE && engine.write_all(&[b'x'; 4096]).is_ok() {
                sent += 4096;
            }
            sent
        });
        let mut pulse = Pulse::of(&socket);
        let mut most = 0;
        while !talker.is_finished() {
            pulse.beat(Duration::from_millis(10));
            most = most.max(pulse.line.capacity());
        }
        assert!(talker.join().unwrap() >= 16 * limits::MAX_CONTROL_LINE);
        assert!(most < 4 * limits::MAX_CONTROL_LINE, "{most} bytes are kept");
    }

    /// A stopped engine would find one question for each second of its silence.
    #[test]
    fn who_does_not_answer_is_asked_once() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("control.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let mut pulse = Pulse::of(&socket);
        for _ in 0..3 {
            assert!(matches!(pulse.beat(Duration::from_millis(20)), Beat::Silence));
        }
        let (engine, _) = listener.accept().unwrap();
        drop(pulse);
        assert_eq!(BufReader::new(engine).lines().count(), 1);
    }

    #[test]
    fn a_connection_that_ended_is_made_again() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("control.sock");
        let mut pulse = Pulse::of(&socket);
        let long = Duration::from_secs(20);
        assert!(matches!(pulse.beat(long), Beat::Nobody), "nobody listens");
        let listener = UnixListener::bind(&socket).unwrap();
        let engine = thread::spawn(move || {
            // Half an answer is none.
            listener.accept().unwrap().0.write_all(b"{\"reply\":").unwrap();
            let (engine, _) = listener.accept().unwrap();
            let mut asked = String::new();
            BufReader::new(&engine).read_line(&mut asked).unwrap();
            let status = Reply::Status(Status { pid: 7, ..Status::default() });
            writeln!(&engine, "{}", serde_json::to_string(&status).unwrap()).unwrap();
        });
        assert!(matches!(pulse.beat(long), Beat::Nobody));
        assert!(matches!(pulse.beat(long), Beat::Answer(status) if status.pid == 7));
        engine.join().unwrap();
    }
}

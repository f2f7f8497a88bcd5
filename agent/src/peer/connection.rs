//! One connection for the bytes of a copy: HTTP/1.1, read by a thread straight into the caller's buffer.
//!
//! A general HTTP client hands a body over in many small pieces, each through two tasks and one more copy. That costs more than
//! the network on a fast one. Here one range is asked for at a time, and exactly its bytes follow.

use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::ops::Range;
use std::time::Duration;

use reqwest::StatusCode;
use runtime::transport::{BlockingStream, Security};
use tokio::time::timeout;

use super::PeerError;
use crate::layout::ImageKey;
use crate::limits::CONNECT_TIMEOUT;

/// Longest head of an answer: ours has about 200 bytes.
const MAX_HEAD_BYTES: u64 = 16 << 10;
/// More headers than any proxy adds.
const MAX_HEADERS: usize = 32;

/// A connection to the data port of a peer. Its methods block.
pub(crate) struct Connection {
    stream: BufReader<BlockingStream>,
    address: SocketAddr,
    idle_timeout: Duration,
}

impl Connection {
    /// Connects; afterwards no wait is longer than `idle_timeout`.
    pub async fn open(
        address: SocketAddr,
        idle_timeout: Duration,
        security: &Security,
    ) -> Result<Connection, PeerError> {
        let limit = CONNECT_TIMEOUT.min(idle_timeout);
        let opened = async {
            let stream = timeout(limit, tokio::net::TcpStream::connect(address)).await??.into_std()?;
            stream.set_nonblocking(false)?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(idle_timeout))?;
            stream.set_write_timeout(Some(idle_timeout))?;
            security.secure(stream)
        };
        let stream = opened.await.map_err(|e| PeerError::Transfer(format!("cannot connect to `{address}`: {e}")))?;
        Ok(Connection { stream: BufReader::new(stream), address, idle_timeout })
    }

    /// What ends all waiting on this connection when it is dropped, unless [`HangUp::keep`] is called.
    pub fn hang_up(&self) -> Result<HangUp, PeerError> {
        let stream = self.stream.get_ref().tcp().try_clone().map_err(|error| PeerError::Transfer(error.to_string()))?;
        Ok(HangUp(Some(stream)))
    }

    /// Asks for a range of a copy. Its bytes must then be read, all of them, before anything else is asked for.
    pub fn ask(&mut self, key: &ImageKey, range: &Range<u64>) -> Result<(), PeerError> {
        let request = format!(
            "GET /v1/copies/{key}/data HTTP/1.1\r\nHost: {}\r\nRange: bytes={}-{}\r\n\r\n",
            self.address,
            range.start,
            range.end - 1
        );
        let sent = self.stream.get_mut().write_all(request.as_bytes());
        sent.map_err(|error| problem(&error, self.idle_timeout))?;
        let head = self.head()?;
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut answer = httparse::Response::new(&mut headers);
        let status = match answer.parse(&head) {
            Ok(httparse::Status::Complete(_)) => answer.code.unwrap_or_default(),
            _ => return Err(PeerError::Transfer("its answer is not HTTP".into())),
        };
        match StatusCode::from_u16(status) {
            Ok(StatusCode::PARTIAL_CONTENT) => {}
            Ok(StatusCode::NOT_FOUND) => return Err(PeerError::Without),
            Ok(status) => return Err(PeerError::Status(status)),
            Err(_) => return Err(PeerError::Transfer(format!("it answered {status}"))),
        }
        let length = answer.headers.iter().find(|header| header.name.eq_ignore_ascii_case("content-length"));
        let length = length.and_then(|header| std::str::from_utf8(header.value).ok()?.trim().parse::<u64>().ok());
        if length != Some(range.end - range.start) {
            let said = length.map_or("no length".to_owned(), |length| format!("{length} bytes"));
            return Err(PeerError::Transfer(format!("it offers {said} for {} bytes", range.end - range.start)));
        }
        Ok(())
    }

    /// The next bytes of the range.
    pub fn read_exact(&mut self, bytes: &mut [u8]) -> Result<(), PeerError> {
        // A buffer that is empty is passed by: the bytes go straight from the socket to the caller.
        self.stream.read_exact(bytes).map_err(|error| problem(&error, self.idle_timeout))
    }

    fn head(&mut self) -> Result<Vec<u8>, PeerError> {
        let mut head = vec![];
        let mut lines = (&mut self.stream).take(MAX_HEAD_BYTES);
        loop {
            let line_bytes = lines.read_until(b'\n', &mut head).map_err(|e| problem(&e, self.idle_timeout))?;
            if head.ends_with(b"\r\n\r\n") {
                return Ok(head);
            }
            if line_bytes == 0 {
                let why = if lines.limit() == 0 { "its answer has no end" } else { "it ended early" };
                return Err(PeerError::Transfer(why.into()));
            }
        }
    }
}

/// See [`Connection::hang_up`].
pub(crate) struct HangUp(Option<TcpStream>);

impl HangUp {
    /// The connection stays open.
    pub fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for HangUp {
    fn drop(&mut self) {
        if let Some(stream) = &self.0 {
            // It may be closed already, which is as good.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn problem(error: &io::Error, idle_timeout: Duration) -> PeerError {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => PeerError::Silent(idle_timeout),
        ErrorKind::UnexpectedEof => PeerError::Transfer("it ended early".into()),
        _ => PeerError::Transfer(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::thread;

    use super::*;

    const LIMIT: Duration = Duration::from_millis(200);

    /// What a peer that answers so is said to have done; the first 10 bytes of the range when it did well.
    async fn check(answer: &'static [u8]) -> Result<Vec<u8>, String> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = BufReader::new(stream.try_clone().unwrap());
            let mut line = String::new();
            while request.read_line(&mut line).unwrap() > 2 {}
            // The reader may have seen enough before all of it is sent.
            let _ = stream.write_all(answer);
            (line, stream)
        });
        let mut connection = Connection::open(address, LIMIT, &Security::default()).await.unwrap();
        let read = tokio::task::spawn_blocking(move || {
            let mut bytes = vec![0; 10];
            connection.ask(&"parrot-0a1b2c3d".parse().unwrap(), &(5..15))?;
            connection.read_exact(&mut bytes)?;
            Ok::<_, PeerError>(bytes)
        });
        let read = read.await.unwrap();
        let (request, _open) = server.join().unwrap();
        assert!(request.starts_with("GET /v1/copies/parrot-0a1b2c3d/data HTTP/1.1\r\n"), "{request}");
        assert!(request.contains("\r\nRange: bytes=5-14\r\n"), "{request}");
        read.map_err(|error| error.to_string())
    }

    #[tokio::test]
    async fn reads_exactly_what_was_asked_for() {
        let read = check(b"HTTP/1.1 206 Partial Content\r\nX: y\r\nCONTENT-LENGTH: 10\r\n\r\n0123456789").await;
        assert_eq!(read.unwrap(), b"0123456789");
    }

    #[tokio::test]
    async fn every_other_answer_is_refused_with_what_it_was() {
        let short = check(b"HTTP/1.1 206 Partial Content\r\nContent-Length: 9\r\n\r\n012345678").await.unwrap_err();
        assert_eq!(short, "it offers 9 bytes for 10 bytes");
        let chunked = b"HTTP/1.1 206 Partial Content\r\nTransfer-Encoding: chunked\r\n\r\na\r\n0123456789\r\n0\r\n\r\n";
        assert_eq!(check(chunked).await.unwrap_err(), "it offers no length for 10 bytes");
        let whole = check(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n0123456789").await.unwrap_err();
        assert_eq!(whole, "it answered 200 OK");
        let without = check(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n").await.unwrap_err();
        assert_eq!(without, "it does not have the copy ready");
        assert_eq!(check(b"QFI\r\n\r\n").await.unwrap_err(), "its answer is not HTTP");
        assert_eq!(check(&[b'x'; 20_000]).await.unwrap_err(), "its answer has no end");
        let silent = check(b"HTTP/1.1 206 Partial Content\r\nContent-Length: 10\r\n\r\n01234").await.unwrap_err();
        assert_eq!(silent, "it was silent for 200ms");
    }
}

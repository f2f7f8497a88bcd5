//! One request and its reply on a control socket (JSON lines).

use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

use crate::disk_calls::{DiskCalls, Silent};
use crate::limits::{CONTROL_LINE_BYTES, CONTROL_TIMEOUT};

/// An open control connection.
pub struct Connection {
    reader: BufReader<tokio::net::unix::OwnedReadHalf>,
    /// What has come of the next reply.
    line: Vec<u8>,
    writer: tokio::net::unix::OwnedWriteHalf,
}

impl Connection {
    /// Connects to a control socket.
    pub async fn open(socket: &Path) -> io::Result<Connection> {
        Ok(Connection::over(runtime::socket::connect(socket).await?))
    }

    fn over(stream: UnixStream) -> Connection {
        let (reader, writer) = stream.into_split();
        Connection { reader: BufReader::new(reader), line: vec![], writer }
    }

    /// Sends a request.
    pub async fn send(&mut self, request: &impl Serialize) -> io::Result<()> {
        let mut line = serde_json::to_vec(request).map_err(io::Error::other)?;
        line.push(b'\n');
        self.writer.write_all(&line).await
    }

    /// The next reply, whenever it comes. Whoever gives up the wait loses nothing of it.
    pub async fn receive<R: DeserializeOwned>(&mut self) -> io::Result<R> {
        if !runtime::lines::read_line(&mut self.reader, &mut self.line, CONTROL_LINE_BYTES).await? {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the connection was closed"));
        }
        serde_json::from_slice(&std::mem::take(&mut self.line)).map_err(io::Error::other)
    }
}

/// Asks once, within [`CONTROL_TIMEOUT`].
pub async fn ask<R: DeserializeOwned>(socket: &Path, request: &impl Serialize) -> io::Result<R> {
    ask_through(Connection::open(socket), request).await
}

/// Asks once, as [`ask`], at a socket on a disk, unless that is silent.
pub async fn ask_on_disk<R: DeserializeOwned>(
    calls: &DiskCalls,
    disk: &Path,
    socket: PathBuf,
    request: &impl Serialize,
) -> Result<io::Result<R>, Silent> {
    let connected = calls.ask(disk, move || runtime::socket::connect_at_once(&socket)).await?;
    let connection = async { Ok(Connection::over(UnixStream::from_std(connected?)?)) };
    Ok(ask_through(connection, request).await)
}

async fn ask_through<R: DeserializeOwned>(
    connection: impl Future<Output = io::Result<Connection>>,
    request: &impl Serialize,
) -> io::Result<R> {
    let asked = async {
        let mut connection = connection.await?;
        connection.send(request).await?;
        connection.receive().await
    };
    tokio::time::timeout(CONTROL_TIMEOUT, asked).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proto::engine::{Reply, Request, Status};
    use tokio::net::UnixListener;

    use super::*;

    #[tokio::test]
    async fn a_reply_without_end_is_given_up_before_it_fills_the_memory() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("control.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let talker = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut sent = 0;
            while sent < 64 << 20 && stream.write_all(&[b'x'; 4096]).await.is_ok() {
                sent += 4096;
            }
            sent
        });
        let refused = ask::<Reply>(&socket, &Request::Status).await.unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::InvalidData, "{refused}");
        // What the socket held besides is no memory of ours.
        assert!(talker.await.unwrap() < 8 << 20);
    }

    #[tokio::test]
    async fn a_reply_that_comes_in_two_waits_is_one_reply() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("control.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let mut connection = Connection::open(&socket).await.unwrap();
        let (mut engine, _) = listener.accept().await.unwrap();
        let status = Reply::Status(Status { pid: 7, ..Status::default() });
        let text = serde_json::to_string(&status).unwrap() + "\n";
        engine.write_all(&text.as_bytes()[..20]).await.unwrap();
        let given_up = tokio::time::timeout(Duration::from_millis(50), connection.receive::<Reply>()).await;
        assert!(given_up.is_err());
        engine.write_all(&text.as_bytes()[20..]).await.unwrap();
        assert_eq!(connection.receive::<Reply>().await.unwrap(), status);
        drop(engine);
        assert_eq!(connection.receive::<Reply>().await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}

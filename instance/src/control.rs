//! One request and its reply on a control socket (JSON lines).

use std::io;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::UnixStream;

use crate::limits::CONTROL_TIMEOUT;

/// An open control connection.
pub struct Connection {
    lines: Lines<BufReader<tokio::net::unix::OwnedReadHalf>>,
    writer: tokio::net::unix::OwnedWriteHalf,
}

impl Connection {
    /// Connects to a control socket.
    pub async fn open(socket: &Path) -> io::Result<Connection> {
        let stream: UnixStream = runtime::socket::connect(socket).await?;
        let (reader, writer) = stream.into_split();
        Ok(Connection { lines: BufReader::new(reader).lines(), writer })
    }

    /// Sends a request.
    pub async fn send(&mut self, request: &impl Serialize) -> io::Result<()> {
        let mut line = serde_json::to_vec(request).map_err(io::Error::other)?;
        line.push(b'\n');
        self.writer.write_all(&line).await
    }

    /// The next reply, whenever it comes.
    pub async fn receive<R: DeserializeOwned>(&mut self) -> io::Result<R> {
        match self.lines.next_line().await? {
            Some(line) => serde_json::from_str(&line).map_err(io::Error::other),
            None => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the connection was closed")),
        }
    }
}

/// Asks once, within [`CONTROL_TIMEOUT`].
pub async fn ask<R: DeserializeOwned>(socket: &Path, request: &impl Serialize) -> io::Result<R> {
    let asked = async {
        let mut connection = Connection::open(socket).await?;
        connection.send(request).await?;
        connection.receive().await
    };
    tokio::time::timeout(CONTROL_TIMEOUT, asked).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

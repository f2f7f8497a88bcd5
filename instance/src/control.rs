//! Asking a process of ours over its control socket: one JSON line each way.

use std::io;
use std::path::Path;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

/// Sends one request and returns the reply.
pub async fn ask<Q: Serialize, A: DeserializeOwned>(socket: &Path, request: &Q, limit: Duration) -> io::Result<A> {
    let exchange = async {
        let stream = runtime::socket::connect(socket).await?;
        let (reader, mut writer) = stream.into_split();
        writer.write_all(&line(request)?).await?;
        let mut text = String::new();
        if BufReader::new(reader).read_line(&mut text).await? == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the process ended without an answer"));
        }
        serde_json::from_str(&text).map_err(io::Error::other)
    };
    tokio::time::timeout(limit, exchange).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// One request as a line.
pub fn line<Q: Serialize>(request: &Q) -> io::Result<Vec<u8>> {
    let mut text = serde_json::to_vec(request).map_err(io::Error::other)?;
    text.push(b'\n');
    Ok(text)
}

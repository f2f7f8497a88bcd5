//! Sends a copy to one of Longhorn's receivers, by its ssync protocol (LF 5.4).
//!
//! The receiver takes the end of its server for success, so `close` is sent only when everything before it was accepted.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::stream::{self, TryStreamExt};
use reqwest::{Client, Method};
use runtime::transport::Security;
use tokio::time::{Instant, sleep};

use crate::bandwidth::Share;
use crate::error::{AgentError, blocking, chain};
use crate::http_client;
use crate::layout::FileSet;
use crate::limits::{CHUNK_BYTES, SSYNC_BATCH_BYTES, SSYNC_OPEN_TIMEOUT, SSYNC_TRIES, SSYNC_WORKERS};
use crate::manifest::Manifest;

/// Pause between two tries.
const PAUSE: Duration = Duration::from_secs(1);

struct Receiver {
    client: Client,
    base: String,
}

/// One request's range.
enum Part {
    Hole(Range<u64>),
    Data(Range<u64>),
}

/// Sends a whole copy.
pub(crate) async fn send(
    files: &FileSet,
    to: &str,
    idle_timeout: Duration,
    security: &Security,
    share: &Share,
) -> Result<(), AgentError> {
    if !security.is_plain() {
        let message =
            format!("`{to}` is a receiver of Longhorn's, which takes no TLS; sync by a manager of ours instead");
        return Err(AgentError::Unsupported { message });
    }
    let (path, manifest_path) = (files.file.clone(), files.manifest.clone());
    let (file, manifest) = blocking(move || {
        let file = File::open(&path).map_err(AgentError::io("open", &path))?;
        let manifest = Manifest::read(&manifest_path)?
            .ok_or_else(|| AgentError::NotReady { message: format!("`{}` is missing", manifest_path.display()) })?;
        Ok((Arc::new(file), manifest))
    })
    .await?;
    let client = http_client::internal(security)
        .timeout(idle_timeout)
        .build()
        .map_err(|e| AgentError::Unavailable { message: chain(&e) })?;
    let receiver = Receiver { client, base: format!("http://{to}/v1-ssync") };

    let size = manifest.size_bytes;
    receiver.open(size).await?;
    let receiver = &receiver;
    stream::iter(parts(&manifest).into_iter().map(Ok))
        .try_for_each_concurrent(SSYNC_WORKERS, |part| {
            let (file, path) = (file.clone(), files.file.clone());
            async move {
                match part {
                    Part::Hole(range) => receiver.post("sendHole", &range, Bytes::new()).await,
                    Part::Data(mut left) => {
                        // In pieces of their own under a limit, so that no request takes long.
                        while !left.is_empty() {
                            let length = share.take(left.end - left.start).await;
                            let range = left.start..left.start + length;
                            let bytes = read(file.clone(), path.clone(), range.clone()).await?;
                            receiver.post("writeData", &range, bytes).await?;
                            left.start = range.end;
                        }
                        Ok(())
                    }
                }
            }
        })
        .await?;
    receiver.request(Method::POST, "close?checksumMethod=&checksum=".into(), Bytes::new()).await
}

async fn read(file: Arc<File>, path: PathBuf, range: Range<u64>) -> Result<Bytes, AgentError> {
    blocking(move || {
        let mut bytes = vec![0; (range.end - range.start) as usize];
        file.read_exact_at(&mut bytes, range.start).map_err(AgentError::io("read", path))?;
        Ok(Bytes::from(bytes))
    })
    .await
}

impl Receiver {
    /// Opens the file on the other side, which may still be starting.
    async fn open(&self, size: u64) -> Result<(), AgentError> {
        let deadline = Instant::now() + SSYNC_OPEN_TIMEOUT;
        loop {
            let path = format!("open?begin=0&end={size}&directIO=false");
            match self.request(Method::GET, path, Bytes::new()).await {
                Err(error) if Instant::now() + PAUSE < deadline => {
                    tracing::debug!(error = error.chain(), "receiver is not open yet");
                    sleep(PAUSE).await;
                }
                other => return other,
            }
        }
    }

    async fn post(&self, what: &str, range: &Range<u64>, body: Bytes) -> Result<(), AgentError> {
        let path = format!("{what}?begin={}&end={}", range.start, range.end);
        let mut tries = 1;
        loop {
            match self.request(Method::POST, path.clone(), body.clone()).await {
                Err(error) if tries < SSYNC_TRIES => {
                    tracing::warn!(error = error.chain(), "request will be tried again");
                    tries += 1;
                    sleep(PAUSE).await;
                }
                other => return other,
            }
        }
    }

    async fn request(&self, method: Method, path: String, body: Bytes) -> Result<(), AgentError> {
        let unavailable = |problem: String| AgentError::Unavailable {
            message: format!("the receiver at `{}` did not take `{path}`: {problem}", self.base),
        };
        let request = self.client.request(method, format!("{}/{path}", self.base)).body(body);
        let response = request
            .header("Accept", "application/json")
            .send()
            .await
            .map_err(|e| unavailable(chain(&e.without_url())))?;
        if !response.status().is_success() {
            let status = response.status();
            let text = response.text().await.unwrap_or_default();
            return Err(unavailable(format!("it answered {status} {}", text.trim())));
        }
        // Read to the end, so that the connection can be used again.
        response.bytes().await.map_err(|e| unavailable(chain(&e.without_url())))?;
        Ok(())
    }
}

/// The whole file as holes of any length and data of at most one batch.
fn parts(manifest: &Manifest) -> Vec<Part> {
    let mut parts: Vec<Part> = vec![];
    for (chunk, hash) in manifest.chunks.iter().enumerate() {
        let range = manifest.range(chunk as u64);
        match (hash, parts.last_mut()) {
            (None, Some(Part::Hole(last))) => last.end = range.end,
            (None, _) => parts.push(Part::Hole(range)),
            (Some(_), Some(Part::Data(last))) if last.end - last.start + CHUNK_BYTES <= SSYNC_BATCH_BYTES => {
                last.end = range.end;
            }
            (Some(_), _) => parts.push(Part::Data(range)),
        }
    }
    parts
}

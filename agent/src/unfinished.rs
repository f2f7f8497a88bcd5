//! What an unfinished download leaves beside its partial file, so that another process can go on after `kill -9` or a power loss.
//!
//! `<image>-<uuid>.resume` says which file of which server the part is of, and how many bytes of it are surely on the disk. It is
//! written after they were synced, never before. Nothing secret of the address is in it.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval_at};
use tokio_util::sync::CancellationToken;

use crate::durable;
use crate::error::{AgentError, blocking};
use crate::layout::FileSet;
use crate::limits::CHUNK_BYTES;
use crate::source_url::SourceUrl;

/// The content of the file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Unfinished {
    /// The address as it may be shown.
    address: String,
    /// BLAKE3 of the query, which may choose the file and may be secret.
    query_hash: String,
    /// Of the whole file, when the server said it.
    pub length: Option<u64>,
    /// The strong ETag or modification time by which the server proves that its file is the same.
    pub validator: Option<String>,
    /// So many bytes from the start are on the disk: whole chunks.
    pub durable_bytes: u64,
}

/// What an earlier process left.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Earlier {
    Nothing,
    /// A part that can be continued.
    Part(Unfinished),
    /// A part that is of no use, and why; it has been removed.
    Useless(&'static str),
}

impl Unfinished {
    /// A download of which nothing is on the disk yet.
    pub fn new(url: &SourceUrl, length: Option<u64>, validator: Option<String>) -> Unfinished {
        let query = url.expose().query().unwrap_or_default();
        Unfinished {
            address: url.to_string(),
            query_hash: blake3::hash(query.as_bytes()).to_hex().to_string(),
            length,
            validator,
            durable_bytes: 0,
        }
    }

    /// Looks for what an earlier process left of a download from this address.
    pub fn find(files: &FileSet, url: &SourceUrl) -> Result<Earlier, AgentError> {
        let found = judge(files, url)?;
        if !matches!(found, Earlier::Part(_)) {
            remove(files)?;
        }
        Ok(found)
    }

    fn write(&self, path: &Path) -> Result<(), AgentError> {
        durable::write(path, &serde_json::to_vec(self).expect("strings and numbers serialize"))
    }
}

/// Removes the part and what was known of it.
pub(crate) fn remove(files: &FileSet) -> Result<(), AgentError> {
    // In this order: a record without a file is nothing, a file without a record is begun anew.
    durable::remove_file(&files.partial)?;
    durable::remove_file(&files.unfinished)
}

fn judge(files: &FileSet, url: &SourceUrl) -> Result<Earlier, AgentError> {
    let size = match files.partial.metadata() {
        Ok(metadata) => metadata.len(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Earlier::Nothing),
        Err(source) => return Err(AgentError::Io { doing: "look at", path: files.partial.clone(), source }),
    };
    let record = std::fs::read(&files.unfinished).ok();
    let Some(record) = record.and_then(|text| serde_json::from_slice::<Unfinished>(&text).ok()) else {
        return Ok(Earlier::Useless("an earlier process ended before anything that it had was safe"));
    };
    let same = Unfinished::new(url, None, None);
    if record.address != same.address || record.query_hash != same.query_hash {
        return Ok(Earlier::Useless("an earlier process had downloaded from another address"));
    }
    if record.validator.is_none() {
        return Ok(Earlier::Useless(
            "the server gives neither ETag nor Last-Modified, by which what an earlier process had could be continued",
        ));
    }
    let fits = record.durable_bytes <= size && record.length.is_none_or(|length| record.durable_bytes <= length);
    if record.durable_bytes == 0 || !record.durable_bytes.is_multiple_of(CHUNK_BYTES) || !fits {
        return Ok(Earlier::Useless("an earlier process ended before anything that it had was safe"));
    }
    Ok(Earlier::Part(record))
}

/// Keeps the record of a download in progress up to date.
pub(crate) struct Keeper {
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Keeper {
    /// Begins to make durable what is `written` into the partial file.
    pub fn start(record: Unfinished, files: &FileSet, written: Arc<AtomicU64>, every: Duration) -> Keeper {
        let stop = CancellationToken::new();
        let (partial, path) = (files.partial.clone(), files.unfinished.clone());
        let work = keep(record, partial, path, written, every, stop.clone());
        Keeper { task: tokio::spawn(work), stop }
    }

    /// Ends it; nothing is written any more afterwards.
    pub async fn stop(self) {
        self.stop.cancel();
        // A panic of the task was its own end; what counts is that it writes no more.
        let _ = self.task.await;
    }
}

async fn keep(
    mut record: Unfinished,
    partial: PathBuf,
    path: PathBuf,
    written: Arc<AtomicU64>,
    every: Duration,
    stop: CancellationToken,
) {
    let mut ticks = interval_at(Instant::now() + every, every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        let bytes = written.load(Ordering::Acquire) / CHUNK_BYTES * CHUNK_BYTES;
        if bytes == record.durable_bytes {
            continue;
        }
        record.durable_bytes = bytes;
        let (next, partial, path) = (record.clone(), partial.clone(), path.clone());
        let kept = blocking(move || {
            let file = File::open(&partial).map_err(AgentError::io("open", &partial))?;
            file.sync_data().map_err(AgentError::io("sync", &partial))?;
            next.write(&path)
        });
        if let Err(error) = kept.await {
            // The download itself meets the same trouble, or goes on; only a restart would begin anew.
            tracing::warn!(error = error.chain(), "download has no checkpoint");
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{Disk, ImageKey};

    fn url(text: &str) -> SourceUrl {
        SourceUrl::parse(text).unwrap()
    }

    #[test]
    fn a_part_is_continued_only_when_all_of_it_is_known() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("tmp")).unwrap();
        let files = Disk::new(dir.path()).source(&ImageKey::parse("parrot", "0a1b2c3d").unwrap());
        let from = url("http://user:hunter2@h/a?token=hunter3");
        assert_eq!(Unfinished::find(&files, &from).unwrap(), Earlier::Nothing);

        let good = Unfinished { durable_bytes: CHUNK_BYTES, ..Unfinished::new(&from, None, Some("\"v1\"".into())) };
        let cases: &[(Unfinished, &SourceUrl, usize, bool)] = &[
            (good.clone(), &from, 1 << 20, true),
            (good.clone(), &url("http://h/a?token=hunter3"), 1 << 20, false),
            (good.clone(), &url("http://user:hunter2@h/b?token=hunter3"), 1 << 20, false),
            (good.clone(), &url("http://user:hunter2@h/a?token=other"), 1 << 20, false),
            (good.clone(), &from, (1 << 20) - 1, false),
            (Unfinished { validator: None, ..good.clone() }, &from, 1 << 20, false),
            (Unfinished { durable_bytes: 0, ..good.clone() }, &from, 1 << 20, false),
            (Unfinished { durable_bytes: 512, ..good.clone() }, &from, 1 << 20, false),
            (Unfinished { length: Some(512), ..good.clone() }, &from, 1 << 20, false),
        ];
        for (record, from, size, useful) in cases {
            std::fs::write(&files.partial, vec![1; *size]).unwrap();
            record.write(&files.unfinished).unwrap();
            let text = std::fs::read_to_string(&files.unfinished).unwrap();
            assert!(!text.contains("hunter"), "{text}");
            let found = Unfinished::find(&files, from).unwrap();
            assert_eq!(matches!(found, Earlier::Part(_)), *useful, "{record:?} {from} {size}");
            assert_eq!(files.partial.exists() && files.unfinished.exists(), *useful, "what is of no use is removed");
        }
        std::fs::write(&files.partial, "x").unwrap();
        std::fs::write(&files.unfinished, "{").unwrap();
        assert!(matches!(Unfinished::find(&files, &from).unwrap(), Earlier::Useless(_)));
    }
}

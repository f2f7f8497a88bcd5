//! A replica's directory: its lock and its durable record.

use std::fs::{self, File, OpenOptions};
use std::path::Path;
use std::time::Duration;

use proto::replica::{Record, file};
use rustix::fs::{FlockOperation, flock};

use super::{Config, ReplicaError};

/// Whose directory it is.
pub(crate) const LOCK: &str = "lock";
/// The daemon of a killed predecessor flushes what it holds before it lets go of the lock.
const CLAIM_TIMEOUT: Duration = Duration::from_secs(30);
/// A lock offers no event that could be waited for together with a time limit.
const CLAIM_INTERVAL: Duration = Duration::from_millis(20);

/// Takes the directory for this process and its daemon; makes it when absent.
pub(super) async fn claim(directory: &Path) -> Result<File, ReplicaError> {
    let failed = |e| ReplicaError::io(format!("use the directory `{}`", directory.display()), e);
    runtime::files::create_dir_durably(directory).map_err(failed)?;
    let lock =
        OpenOptions::new().create(true).truncate(false).write(true).open(directory.join(LOCK)).map_err(failed)?;
    let started = tokio::time::Instant::now();
    loop {
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(lock),
            Err(rustix::io::Errno::WOULDBLOCK) if started.elapsed() < CLAIM_TIMEOUT && !serves(directory).await => {
                tokio::time::sleep(CLAIM_INTERVAL).await;
            }
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(ReplicaError::InUse { directory: directory.to_owned() });
            }
            Err(e) => return Err(failed(e.into())),
        }
    }
}

/// Whether a live process answers there; then waiting for its lock is in vain.
async fn serves(directory: &Path) -> bool {
    runtime::socket::connect(&directory.join(file::CONTROL_SOCKET)).await.is_ok()
}

/// The record of the directory; a new one when there is none and no head either.
pub(super) fn open_record(config: &Config) -> Result<Record, ReplicaError> {
    let directory = &config.directory;
    if let Some(record) = read_record(directory)? {
        check(config, &record)?;
        return Ok(record);
    }
    let head = directory.join(file::HEAD);
    if fs::exists(&head).map_err(|e| ReplicaError::io(format!("look for `{}`", head.display()), e))? {
        return Err(ReplicaError::Mismatch {
            message: format!(
                "`{}` holds a head but no `{}`, so nobody knows how current it is: remove this replica. Only the very last state of that \
                 file may be put back; with an older one old data counts as current, and what lies behind an older size is cut off",
                directory.display(),
                file::RECORD
            ),
        });
    }
    let image = config.image.as_ref();
    let record = Record {
        volume: config.volume.clone(),
        replica: config.replica.clone(),
        size_bytes: config.size_bytes,
        backing_image: image.map(|i| i.name.clone()).unwrap_or_default(),
        backing_image_uuid: image.map(|i| i.uuid.clone()).unwrap_or_default(),
        generation: 0,
        members: vec![],
        clean: true,
    };
    write_record(directory, &record)?;
    Ok(record)
}

/// A replica must never be opened over another image or as another volume: its clusters would mean something else. Nor with less
/// than it has; with more it grows.
fn check(config: &Config, record: &Record) -> Result<(), ReplicaError> {
    let image = config.image.as_ref();
    let pairs = [
        ("volume", record.volume.clone(), config.volume.clone()),
        ("replica", record.replica.clone(), config.replica.clone()),
        // Equal unless it would shrink.
        ("size", record.size_bytes.to_string(), config.size_bytes.min(record.size_bytes).to_string()),
        ("image", record.backing_image.clone(), image.map(|i| i.name.clone()).unwrap_or_default()),
        ("image uuid", record.backing_image_uuid.clone(), image.map(|i| i.uuid.clone()).unwrap_or_default()),
    ];
    match pairs.into_iter().find(|(_, recorded, wanted)| recorded != wanted) {
        None => Ok(()),
        Some((what, recorded, wanted)) => Err(ReplicaError::Mismatch {
            message: format!(
                "`{}` was made for {what} `{recorded}` and is not opened for {what} `{wanted}`",
                config.directory.display()
            ),
        }),
    }
}

/// The durable record of a replica's directory; `None` when there is none.
pub fn read_record(directory: &Path) -> Result<Option<Record>, ReplicaError> {
    let path = directory.join(file::RECORD);
    match fs::read(&path) {
        Ok(text) => serde_json::from_slice(&text).map(Some).map_err(|source| ReplicaError::Config { path, source }),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(ReplicaError::io(format!("read `{}`", path.display()), e)),
    }
}

pub(super) fn write_record(directory: &Path, record: &Record) -> Result<(), ReplicaError> {
    let path = directory.join(file::RECORD);
    let text = serde_json::to_vec(record).expect("a record is plain data");
    runtime::files::write_durably(&path, &text).map_err(|e| ReplicaError::io(format!("write `{}`", path.display()), e))
}

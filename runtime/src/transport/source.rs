//! Where the certificates of a process come from: given once, or files that are read again when they were replaced.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use super::{Identity, SecurityError, Tls};

/// In a directory of certificates: whom to believe, what to show, and its key. So are they named in a Secret that Kubernetes mounts.
pub(super) const FILES: [&str; 3] = ["ca.crt", "tls.crt", "tls.key"];

/// What every new connection asks for its certificates.
#[derive(Debug)]
pub(super) enum Source {
    Given(Arc<Tls>),
    Directory { path: PathBuf, last: Mutex<Last> },
}

/// What was read last.
#[derive(Debug)]
pub(super) struct Last {
    stamps: Stamps,
    tls: Arc<Tls>,
}

/// Which files they were: another one has another inode, and one that was written again another time.
type Stamps = [(u64, u64, i64, i64); FILES.len()];

impl Source {
    /// # Errors
    /// `Invalid` when a file cannot be read or used.
    pub fn directory(path: PathBuf) -> Result<Source, SecurityError> {
        let stamps = stamps(&path)?;
        let last = Mutex::new(Last { stamps, tls: read(&path)? });
        Ok(Source::Directory { path, last })
    }

    /// What connections are made with now. Files that cannot be used are no reason to go without those before.
    pub fn tls(&self) -> Arc<Tls> {
        let (path, last) = match self {
            Source::Given(tls) => return tls.clone(),
            Source::Directory { path, last } => (path, last),
        };
        let mut last = last.lock().unwrap_or_else(|e| e.into_inner());
        // First the stamps: what is replaced while it is read is read once more.
        let news = stamps(path).and_then(|stamps| match stamps == last.stamps {
            true => Ok(None),
            false => Ok(Some((stamps, read(path)?))),
        });
        match news {
            Ok(None) => {}
            Ok(Some((stamps, tls))) => {
                tracing::info!(directory = %path.display(), "certificates read again");
                *last = Last { stamps, tls };
            }
            Err(error) => {
                let error = api::error::sentence(&error);
                tracing::warn!(directory = %path.display(), error, "certificates stay as they were");
            }
        }
        last.tls.clone()
    }
}

fn failed(path: PathBuf) -> impl FnOnce(std::io::Error) -> SecurityError {
    move |source| SecurityError::Read { path, source }
}

fn stamps(directory: &Path) -> Result<Stamps, SecurityError> {
    let mut stamps = Stamps::default();
    for (stamp, name) in stamps.iter_mut().zip(FILES) {
        let path = directory.join(name);
        let file = std::fs::metadata(&path).map_err(failed(path))?;
        *stamp = (file.dev(), file.ino(), file.ctime(), file.ctime_nsec());
    }
    Ok(stamps)
}

fn read(directory: &Path) -> Result<Arc<Tls>, SecurityError> {
    let text = |name: &str| {
        let path = directory.join(name);
        std::fs::read_to_string(&path).map_err(failed(path))
    };
    let [authorities, chain, key] = FILES;
    Ok(Arc::new(Tls::mutual(&text(authorities)?, &Identity::from_pem(&text(chain)?, &text(key)?)?)?))
}

//! One standalone process for each data directory.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::net::SocketAddr;
use std::path::Path;

use anyhow::Context;
use api::ErrorKind;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::failure::failed;

/// Its name below the data directory.
const NAME: &str = "standalone.lock";

/// Who holds the lock.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Holder {
    pub pid: u32,
    /// Where its HTTP API listens; `None` while it starts.
    pub listen: Option<SocketAddr>,
}

/// The lock; it lives as long as this value, and never longer than the process.
pub struct Lock {
    file: File,
}

impl Lock {
    /// Takes the lock of a directory, or says who has it.
    pub fn take(data: &Path) -> anyhow::Result<Lock> {
        let mut file = open(data)?;
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            let pid = holder_of(&mut file).map(|h| format!(" (pid {})", h.pid)).unwrap_or_default();
            let message = format!("another standalone process{pid} works on `{}`; stop it first", data.display());
            return failed(ErrorKind::NotReady, message);
        }
        let mut lock = Lock { file };
        lock.write(&Holder { pid: std::process::id(), listen: None })?;
        Ok(lock)
    }

    /// Says where the HTTP API listens.
    pub fn announce(&mut self, listen: SocketAddr) -> anyhow::Result<()> {
        self.write(&Holder { pid: std::process::id(), listen: Some(listen) })
    }

    fn write(&mut self, holder: &Holder) -> anyhow::Result<()> {
        let text = serde_json::to_string(holder)?;
        let file = &mut self.file;
        file.set_len(0)
            .and_then(|()| file.seek(SeekFrom::Start(0)))
            .and_then(|_| file.write_all(text.as_bytes()))
            .with_context(|| format!("cannot write `{NAME}` in the data directory; is its disk full?"))
    }
}

fn open(data: &Path) -> anyhow::Result<File> {
    let path = data.join(NAME);
    let options = File::options().read(true).write(true).create(true).truncate(false).open(&path);
    options.with_context(|| format!("cannot open `{}`", path.display()))
}

fn holder_of(file: &mut File) -> Option<Holder> {
    let mut text = String::new();
    file.seek(SeekFrom::Start(0)).ok()?;
    file.read_to_string(&mut text).ok()?;
    serde_json::from_str(&text).ok()
}

/// The process that works on a directory, if one does.
pub fn holder(data: &Path) -> anyhow::Result<Option<Holder>> {
    if !data.join(NAME).exists() {
        return Ok(None);
    }
    let mut file = open(data)?;
    if flock(&file, FlockOperation::NonBlockingLockShared).is_ok() {
        return Ok(None);
    }
    Ok(Some(holder_of(&mut file).unwrap_or_default()))
}

/// Returns when nobody works on a directory any more. Blocks its thread.
pub fn wait_until_free(data: &Path) -> anyhow::Result<()> {
    flock(open(data)?, FlockOperation::LockShared)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::exit_code;

    #[test]
    fn a_second_one_is_refused_with_the_pid_of_the_first() {
        let folder = tempfile::tempdir().unwrap();
        assert!(holder(folder.path()).unwrap().is_none());
        let mut lock = Lock::take(folder.path()).unwrap();
        lock.announce("127.0.0.1:9500".parse().unwrap()).unwrap();
        let error = Lock::take(folder.path()).err().unwrap();
        assert_eq!(exit_code(&error), 5);
        assert!(error.to_string().contains(&format!("(pid {})", std::process::id())), "{error}");
        assert_eq!(holder(folder.path()).unwrap().unwrap().listen, Some("127.0.0.1:9500".parse().unwrap()));
        drop(lock);
        wait_until_free(folder.path()).unwrap();
        assert!(holder(folder.path()).unwrap().is_none());
    }
}

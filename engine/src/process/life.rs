//! What one life of an engine leaves to the next, in small files beside its control socket.
//!
//! They need not survive the machine: a node's end ends the attachment. They need to survive the engine.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

use proto::engine::HolderReport;
use rustix::fs::FlockOperation;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The generation under which an engine acknowledged last. It is written before the first acknowledgement under it.
///
/// Without it a new engine that meets only replicas which were dropped meanwhile would take the highest of their records.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Known {
    pub generation: u64,
    pub members: Vec<String>,
}

/// What an engine notes before it asks the first replica to record anything.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// The highest generation that an engine of this attachment may have asked a replica to record; 0 before the first.
    pub highest: u64,
    /// The replicas that hold everything, as far as any engine of this attachment could tell by the records that it saw, whether
    /// they answered or not. None as long as no record said anything.
    pub holders: Option<Vec<String>>,
}

/// The files of one attachment.
#[derive(Clone, Debug)]
pub struct LifeFiles {
    known: PathBuf,
    claim: PathBuf,
    differ: PathBuf,
    failure: PathBuf,
    repeats: PathBuf,
    holder: PathBuf,
    lock: PathBuf,
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name: OsString = path.file_name().unwrap_or_default().to_owned();
    name.push(suffix);
    path.with_file_name(name)
}

fn read<T: DeserializeOwned>(path: &Path) -> io::Result<Option<T>> {
    match std::fs::read(path) {
        // Within one boot a file is always whole; after a loss of power it may be cut, and tells nothing then.
        Ok(text) => Ok(serde_json::from_slice(&text).ok()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn replace(path: &Path, content: &impl Serialize) -> io::Result<()> {
    let temporary = runtime::files::temporary_name(path);
    std::fs::write(&temporary, serde_json::to_vec(content)?)?;
    std::fs::rename(&temporary, path)
}

impl LifeFiles {
    pub fn of(control_socket: &Path) -> LifeFiles {
        LifeFiles {
            known: beside(control_socket, ".generation"),
            claim: beside(control_socket, ".claim"),
            differ: beside(control_socket, ".differ"),
            failure: beside(control_socket, ".failure"),
            repeats: beside(control_socket, ".repeats"),
            holder: beside(control_socket, ".holder"),
            lock: beside(control_socket, ".lock"),
        }
    }

    /// Forgets an earlier attachment.
    pub fn forget(&self) -> io::Result<()> {
        for path in [&self.known, &self.claim, &self.differ, &self.failure, &self.repeats, &self.holder] {
            runtime::files::remove_if_present(path)?;
        }
        Ok(())
    }

    pub fn known(&self) -> io::Result<Option<Known>> {
        read(&self.known)
    }

    pub fn set_known(&self, known: &Known) -> io::Result<()> {
        replace(&self.known, known)
    }

    /// Whether the kernel repeats what an engine took and did not answer; none before the first engine met the kernel, hence
    /// before it took anything.
    pub fn repeats(&self) -> io::Result<Option<bool>> {
        read(&self.repeats)
    }

    pub fn set_repeats(&self, repeats: bool) -> io::Result<()> {
        replace(&self.repeats, &repeats)
    }

    /// What the holder says while no engine serves.
    pub fn holder_report(&self) -> io::Result<Option<HolderReport>> {
        read(&self.holder)
    }

    /// Best effort: it is for people.
    pub fn set_holder_report(&self, report: Option<&HolderReport>) {
        let _ = match report {
            Some(report) => replace(&self.holder, report),
            None => runtime::files::remove_if_present(&self.holder),
        };
    }

    pub fn claim(&self) -> io::Result<Claim> {
        Ok(read(&self.claim)?.unwrap_or_default())
    }

    pub fn set_claim(&self, claim: &Claim) -> io::Result<()> {
        replace(&self.claim, claim)
    }

    /// Whether replicas may differ in a way that repeating unanswered requests does not heal.
    pub fn may_differ(&self) -> bool {
        self.differ.exists()
    }

    pub fn set_may_differ(&self, may_differ: bool) -> io::Result<()> {
        if may_differ { std::fs::write(&self.differ, b"") } else { runtime::files::remove_if_present(&self.differ) }
    }

    /// Why an engine ended, for the holder's own error.
    pub fn set_failure(&self, sentence: &str) {
        let _ = std::fs::write(&self.failure, sentence);
    }

    pub fn take_failure(&self) -> Option<String> {
        let sentence = std::fs::read_to_string(&self.failure).ok();
        let _ = std::fs::remove_file(&self.failure);
        sentence
    }

    pub fn lock_path(&self) -> &Path {
        &self.lock
    }

    /// Whether a holder or an engine has the lock.
    pub fn is_locked(&self) -> io::Result<bool> {
        let lock = match std::fs::File::open(&self.lock) {
            Ok(lock) => lock,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        };
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockShared) {
            Ok(()) => Ok(false),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(true),
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_life_finds_what_the_last_one_left() {
        let folder = tempfile::tempdir().unwrap();
        let files = LifeFiles::of(&folder.path().join("engine.sock"));
        assert_eq!(files.known().unwrap(), None);
        let known = Known { generation: 9, members: vec!["r1".into()] };
        files.set_known(&known).unwrap();
        files.set_may_differ(true).unwrap();
        assert_eq!((files.repeats().unwrap(), files.holder_report().unwrap()), (None, None));
        assert_eq!(files.claim().unwrap(), Claim::default());
        let claim = Claim { highest: 11, holders: Some(vec!["r1".into()]) };
        files.set_claim(&claim).unwrap();
        files.set_repeats(false).unwrap();
        files.set_holder_report(Some(&HolderReport { attempts: 2, ..HolderReport::default() }));
        let next = LifeFiles::of(&folder.path().join("engine.sock"));
        assert_eq!((next.known().unwrap(), next.may_differ()), (Some(known), true));
        assert_eq!((next.repeats().unwrap(), next.holder_report().unwrap().unwrap().attempts), (Some(false), 2));
        assert_eq!(next.claim().unwrap(), claim);
        next.forget().unwrap();
        assert_eq!((files.repeats().unwrap(), files.holder_report().unwrap()), (None, None));
        assert_eq!(files.claim().unwrap(), Claim::default());
        assert_eq!((files.known().unwrap(), files.may_differ()), (None, false));
    }

    #[test]
    fn what_a_loss_of_power_cut_tells_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let files = LifeFiles::of(&folder.path().join("engine.sock"));
        files.set_known(&Known { generation: 9, members: vec!["r1".into()] }).unwrap();
        for torn in ["", "{\"generation\":9,\"mem", "\0\0\0\0"] {
            std::fs::write(folder.path().join("engine.sock.generation"), torn).unwrap();
            assert_eq!(files.known().unwrap(), None, "{torn:?}");
        }
    }
}

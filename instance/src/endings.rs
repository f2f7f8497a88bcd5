//! What ends and removes replicas, beside their passes: a process that ends and a directory that goes may wait as long as a disk hangs.
//!
//! One work at a time for a replica. While it goes on its passes do nothing else, so nothing starts in the place of a process that may
//! still live, nor in a directory that is being removed; its end brings the next pass. The end of the role waits for none of it.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use api::error::sentence;
use tokio::sync::oneshot;
use tokio::sync::oneshot::error::TryRecvError;
use tokio::time::Instant;
use tracing::info;

use crate::error::InstanceError;
use crate::limits::{ENDING_TOLD, REPLICA_GRACE};
use crate::role::{Key, Role};

/// What is done for one replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Its process is ended and forgotten.
    End,
    /// The same, and its data is removed.
    Remove,
}

/// How far that is.
pub enum Progress {
    /// There is none.
    None,
    /// It goes on; whether for so long that it is worth telling.
    GoesOn(Work, bool),
    /// It has ended; told once.
    Over(Work, Result<(), InstanceError>),
}

/// The works of one node.
#[derive(Default)]
pub struct Endings(Mutex<State>);

#[derive(Default)]
struct State {
    running: BTreeMap<String, Running>,
    /// Why the last one of a replica failed.
    problems: BTreeMap<String, String>,
}

struct Running {
    work: Work,
    since: Instant,
    told: oneshot::Receiver<Result<(), InstanceError>>,
}

impl Endings {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How far the work for a replica is.
    pub fn progress(&self, name: &str) -> Progress {
        let mut state = self.state();
        let Some(running) = state.running.get_mut(name) else { return Progress::None };
        let work = running.work;
        let outcome = match running.told.try_recv() {
            Ok(outcome) => outcome,
            Err(TryRecvError::Empty) => return Progress::GoesOn(work, running.since.elapsed() >= ENDING_TOLD),
            Err(TryRecvError::Closed) => {
                let source = io::Error::other("the work broke off");
                Err(InstanceError::End { what: format!("replica {name}"), source })
            }
        };
        state.running.remove(name);
        match &outcome {
            Ok(()) => drop(state.problems.remove(name)),
            Err(error) => drop(state.problems.insert(name.to_owned(), sentence(error))),
        }
        Progress::Over(work, outcome)
    }

    /// Why the last work for a replica failed, if it did.
    pub fn problem(&self, name: &str) -> Option<String> {
        self.state().problems.get(name).cloned()
    }

    fn begin(
        &self,
        role: &Arc<Role>,
        name: &str,
        work: Work,
        task: impl Future<Output = Result<(), InstanceError>> + Send + 'static,
    ) {
        let (tell, told) = oneshot::channel();
        let running = Running { work, since: Instant::now(), told };
        let before = self.state().running.insert(name.to_owned(), running);
        assert!(before.is_none(), "two works for replica {name} at a time");
        let (key, role) = (Key::Replica(name.to_owned()), role.clone());
        role.tasks.clone().spawn(async move {
            // A role that ends leaves it: the next one finds what is left to do.
            if let Some(outcome) = role.cancelled.run_until_cancelled(task).await {
                let _ = tell.send(outcome);
                role.queue.add(key);
            }
        });
    }
}

/// Begins to end the process of a replica and to forget it.
pub fn begin_end(role: &Arc<Role>, name: &str) {
    role.endings.begin(role, name, Work::End, end(role.clone(), name.to_owned()));
}

/// Begins to end the process of a replica and to remove its data.
pub fn begin_removal(role: &Arc<Role>, name: &str, directory: PathBuf) {
    let (at, replica) = (role.clone(), name.to_owned());
    let task = async move {
        end(at.clone(), replica.clone()).await?;
        let path = directory.clone();
        // Durably, because nobody looks for the directory any more once the object is released.
        let removed = at.disk_calls.take_time(move || runtime::files::remove_dir_durably(&path)).await;
        removed.map_err(|source| InstanceError::File { action: "remove", path: directory, source })?;
        info!(replica, "replica data removed");
        Ok(())
    };
    role.endings.begin(role, name, Work::Remove, task);
}

async fn end(role: Arc<Role>, name: String) -> Result<(), InstanceError> {
    let path = role.replicas.directory(&name);
    let at = |action| {
        let path = path.clone();
        move |source| InstanceError::File { action, path, source }
    };
    if let Some(record) = role.replicas.record(&name).map_err(at("read"))? {
        let what = || format!("replica {name}");
        record.identity.terminate(REPLICA_GRACE).await.map_err(|source| InstanceError::End { what: what(), source })?;
        info!(replica = name, "replica process ended");
    }
    role.replicas.forget(&name).map_err(at("remove"))
}

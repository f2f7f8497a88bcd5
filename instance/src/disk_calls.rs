//! Calls on files of disks, which may hang as long as a disk does: each in a thread of its own, with a time limit.
//!
//! A disk that let one of them wait too long is asked nothing more until that one has returned, so what hangs is a few threads
//! and never the role: the other disks of the node are served on. Nothing waits for such a thread, also not the end of the process.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::oneshot;

/// Begins a thread.
type Spawn = fn(Box<dyn FnOnce() + Send>) -> io::Result<()>;

/// The calls on all disks of a node.
#[derive(Clone)]
pub struct DiskCalls {
    limit: Duration,
    spawn: Spawn,
    asked: Arc<AtomicU64>,
    overdue: Arc<Mutex<BTreeMap<PathBuf, Overdue>>>,
}

/// The calls on one disk that took too long and have not returned.
struct Overdue {
    since: Timestamp,
    calls: BTreeSet<u64>,
}

/// A disk does not answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{}` {why}", disk.display())]
pub struct Silent {
    pub disk: PathBuf,
    pub why: Why,
}

/// Why a disk says nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Why {
    /// A call on it has not returned since then.
    Since(Timestamp),
    /// It could not be asked; the disk may be well.
    NotAsked(String),
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Why::Since(time) => write!(f, "has not answered since {time}"),
            Why::NotAsked(problem) => write!(f, "could not be asked: {problem}"),
        }
    }
}

impl DiskCalls {
    /// With that much time for each.
    pub fn new(limit: Duration) -> DiskCalls {
        let spawn: Spawn = |work| std::thread::Builder::new().name("disk".into()).spawn(work).map(drop);
        DiskCalls { limit, spawn, asked: Arc::default(), overdue: Arc::default() }
    }

    fn overdue(&self) -> MutexGuard<'_, BTreeMap<PathBuf, Overdue>> {
        self.overdue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the disk at a path answers, as far as is known.
    pub fn check(&self, disk: &Path) -> Result<(), Silent> {
        match self.overdue().get(disk) {
            None => Ok(()),
            Some(overdue) => Err(Silent { disk: disk.to_owned(), why: Why::Since(overdue.since) }),
        }
    }

    /// Does this on a disk, unless that is silent. What has begun runs to its end; its outcome is lost when that is too late.
    pub async fn ask<T: Send + 'static>(
        &self,
        disk: &Path,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Silent> {
        self.check(disk)?;
        let since = Timestamp::now();
        let (tell, mut told) = oneshot::channel();
        let (calls, place, number) = (self.clone(), disk.to_owned(), self.asked.fetch_add(1, Ordering::Relaxed));
        let call = move || {
            // Also when it panics: else nothing more would ever be asked of the disk.
            let outcome = catch_unwind(AssertUnwindSafe(work));
            // Otherwise nobody takes it any more.
            if tell.send(outcome).is_err() {
                calls.returned(&place, number);
            }
        };
        let failed = |problem: String| Silent { disk: disk.to_owned(), why: Why::NotAsked(problem) };
        (self.spawn)(Box::new(call)).map_err(|e| failed(format!("no thread can be started: {e}")))?;
        let taken = |outcome: std::thread::Result<T>| outcome.map_err(|_| failed("the look at it broke off".into()));
        if let Ok(outcome) = tokio::time::timeout(self.limit, &mut told).await {
            return taken(outcome.expect("a call tells its outcome"));
        }
        let mut overdue = self.overdue();
        told.close();
        // It may have come at the last moment.
        if let Ok(outcome) = told.try_recv() {
            return taken(outcome);
        }
        let entry = overdue.entry(disk.to_owned()).or_insert(Overdue { since, calls: BTreeSet::new() });
        entry.calls.insert(number);
        Err(Silent { disk: disk.to_owned(), why: Why::Since(entry.since) })
    }

    /// Does this in a thread of its own, however long it takes. It says nothing of its disk: a disk that works may be busy with it for long.
    pub async fn take_time<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let (tell, told) = oneshot::channel();
        (self.spawn)(Box::new(move || {
            // Nobody waits for it any more.
            let _ = tell.send(work());
        }))?;
        told.await.unwrap_or_else(|_| Err(io::Error::other("it broke off")))
    }

    fn returned(&self, disk: &Path, number: u64) {
        let mut overdue = self.overdue();
        if let Some(entry) = overdue.get_mut(disk) {
            entry.calls.remove(&number);
            if entry.calls.is_empty() {
                overdue.remove(disk);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    async fn answers(calls: &DiskCalls, disk: &Path) {
        let deadline = std::time::Instant::now() + Duration::from_secs(20);
        while calls.check(disk).is_err() {
            assert!(std::time::Instant::now() < deadline, "the disk stays silent");
            std::thread::park_timeout(Duration::from_millis(5)); // poll
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_disk_that_hangs_is_silent_until_it_answers_and_holds_up_no_other() {
        let calls = DiskCalls::new(Duration::from_secs(5));
        let (one, other) = (Path::new("/disk-1"), Path::new("/disk-2"));
        let (go, wait) = mpsc::channel::<()>();
        let (again, wait_again) = mpsc::channel::<()>();
        let hanging = calls.ask(one, move || wait.recv());
        let beside = calls.ask(one, move || wait_again.recv());
        let (first, second) = tokio::join!(hanging, beside);
        let silent = first.unwrap_err();
        assert!(silent.to_string().starts_with("`/disk-1` has not answered since 20"), "{silent}");
        assert_eq!(second.unwrap_err().disk, one);
        assert_eq!(calls.ask(one, || 1).await, calls.check(one).map(|()| 1), "nothing more is asked");
        tokio::time::resume();
        assert_eq!(calls.ask(other, || 2).await, Ok(2));
        go.send(()).unwrap();
        assert!(calls.check(one).is_err(), "one call still hangs");
        again.send(()).unwrap();
        answers(&calls, one).await;
        assert_eq!(calls.ask(one, || 3).await, Ok(3));
    }

    /// At the limit of processes, for example. The disk is asked again as soon as somebody wants to know.
    #[tokio::test]
    async fn a_call_that_cannot_begin_is_a_failed_one() {
        let mut calls = DiskCalls::new(Duration::from_secs(60));
        let disk = Path::new("/disk-1");
        let works = std::mem::replace(&mut calls.spawn, |_| Err(io::ErrorKind::WouldBlock.into()));
        let failed = calls.ask(disk, || 1).await.unwrap_err().to_string();
        assert!(failed.starts_with("`/disk-1` could not be asked: no thread can be started: "), "{failed}");
        calls.spawn = works;
        assert_eq!(calls.ask(disk, || 1).await, Ok(1));
    }

    #[tokio::test]
    async fn a_call_that_panics_is_a_failed_one_however_late() {
        let calls = DiskCalls::new(Duration::from_secs(5));
        let disk = Path::new("/disk-1");
        let failed = calls.ask(disk, || panic!("broken")).await.map(|()| 0).unwrap_err().to_string();
        assert_eq!(failed, "`/disk-1` could not be asked: the look at it broke off");
        tokio::time::pause();
        let (go, wait) = mpsc::channel::<()>();
        let late = calls.ask(disk, move || {
            wait.recv().unwrap();
            panic!("broken")
        });
        let silent: Result<(), Silent> = late.await;
        assert!(matches!(silent.unwrap_err().why, Why::Since(_)));
        tokio::time::resume();
        go.send(()).unwrap();
        answers(&calls, disk).await;
        assert_eq!(calls.ask(disk, || 1).await, Ok(1));
    }

    /// Who asked is gone: the role ends, or its pass was given up.
    #[tokio::test]
    async fn a_call_whose_asker_is_gone_leaves_nothing_behind() {
        let calls = DiskCalls::new(Duration::from_secs(60));
        let disk = Path::new("/disk-1");
        let (go, wait) = mpsc::channel::<()>();
        let (done, ended) = mpsc::channel::<()>();
        let mut asked = Box::pin(calls.ask(disk, move || {
            wait.recv().unwrap();
            done.send(()).unwrap();
        }));
        assert!(futures::poll!(&mut asked).is_pending());
        drop(asked);
        go.send(()).unwrap();
        ended.recv().unwrap();
        assert_eq!(calls.ask(disk, || 1).await, Ok(1));
    }
}

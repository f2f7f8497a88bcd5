//! The one thread that writes: takes what waits, decides it, commits it, shows it, answers.

use std::sync::Arc;
use std::time::Instant;

use jiff::Timestamp;
use prometheus_client::metrics::histogram::Histogram;
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{error, info, warn};

use super::disk::Disk;
use super::feed::Feed;
use super::limits;
use super::state::{Change, Operation, State};
use crate::{Object, StoreError};

type Answer = Result<Option<Arc<Object>>, StoreError>;

/// One write and where its answer goes.
pub struct Request {
    pub operation: Operation,
    pub answer: oneshot::Sender<Answer>,
}

pub struct Writer {
    disk: Disk,
    /// The committed state and what the present commit adds.
    state: State,
    feed: Arc<Feed>,
    versions: watch::Sender<u64>,
    commits: Histogram,
}

impl Writer {
    pub fn new(disk: Disk, state: State, feed: Arc<Feed>, versions: watch::Sender<u64>, commits: Histogram) -> Writer {
        Writer { disk, state, feed, versions, commits }
    }

    /// Serves requests until nobody can send one any more.
    pub fn run(mut self, mut waiting: mpsc::Receiver<Request>) {
        self.collect_orphans();
        let mut requests = Vec::with_capacity(limits::REQUESTS_PER_COMMIT);
        while waiting.blocking_recv_many(&mut requests, limits::REQUESTS_PER_COMMIT) > 0 {
            self.serve(std::mem::take(&mut requests));
        }
    }

    /// Removes objects whose owners went while nobody was there to see it.
    fn collect_orphans(&mut self) {
        let changes = self.state.collect_all(Timestamp::now());
        if changes.is_empty() {
            return;
        }
        info!(changes = changes.len(), "objects without their owners collected");
        if let Err(error) = self.commit(changes) {
            warn!(error = &error as &dyn std::error::Error, "objects without their owners are not collected yet");
        }
    }

    fn serve(&mut self, requests: Vec<Request>) {
        if let Err(error) = self.recover() {
            let reason = api::error::sentence(&error);
            error!(reason, "store file cannot be opened again");
            for request in requests {
                let source = reason.clone().into();
                let _ = request.answer.send(Err(StoreError::Unavailable { source }));
            }
            return;
        }
        let now = Timestamp::now();
        let mut changes = vec![];
        let mut answers = Vec::with_capacity(requests.len());
        for Request { operation, answer } in requests {
            let (result, more) = self.state.apply(operation, now);
            changes.extend(more);
            answers.push((answer, result));
        }
        let committed = self.commit(changes);
        for (answer, result) in answers {
            // A refusal may rest on what another request of this commit did, so it is unsure as well when the commit failed.
            let result = match &committed {
                Ok(()) => result,
                Err(error) => Err(StoreError::Unavailable { source: api::error::sentence(error).into() }),
            };
            let _ = answer.send(result); // The caller may have gone.
        }
    }

    fn commit(&mut self, changes: Vec<Change>) -> Result<(), StoreError> {
        if changes.is_empty() {
            return Ok(());
        }
        let version = self.state.version();
        let began = Instant::now();
        self.disk.commit(version, &changes).inspect_err(|error| {
            error!(
                error = error as &dyn std::error::Error,
                "commit failed; the store file is opened again before the next write"
            );
        })?;
        self.commits.observe(began.elapsed().as_secs_f64());
        self.feed.publish(changes);
        self.versions.send_replace(version);
        Ok(())
    }

    /// After a failed commit: reads from the file what has become of it.
    fn recover(&mut self) -> Result<(), StoreError> {
        if !self.disk.is_closed() {
            return Ok(());
        }
        self.disk.reopen()?;
        let state = self.disk.load()?;
        let (shown, found) = (*self.versions.borrow(), state.version());
        assert!(found >= shown, "store file went back from version {shown} to {found}: acknowledged writes are lost");
        self.state = state.clone();
        self.feed.reset(state);
        self.versions.send_replace(found);
        info!(version = found, "store file opened again");
        Ok(())
    }
}

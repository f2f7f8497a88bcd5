//! The workers of a sync: one queue of chunk ranges, two requests per peer at a time.
//!
//! A worker that finds the queue empty takes the second half of what a worker of another peer still has to do, so that a
//! slow peer delays the end by one chunk only.
//!
//! A request is the work of one thread from its first byte to its last: read, compare, write. Handing every chunk from task to
//! task costs more than the hash.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::{Pull, Report, Step, runs};
use crate::direct::{Buffer, DirectFile};
use crate::error::{AgentError, blocking, chain};
use crate::layout::ImageKey;
use crate::limits::{CHUNK_BYTES, CHUNKS_PER_REQUEST, MAX_PEER_FAILURES, STREAMS_PER_PEER};
use crate::manifest::Manifest;
use crate::peer::{Connection, Peer, PeerError};
use crate::{metrics, sparse};

/// Pause after a failed request, times the failures in a row.
const PAUSE: Duration = Duration::from_millis(200);

/// Wrong chunks after which a peer is dropped: its disk is bad, and every wrong chunk costs a transfer.
const MAX_BAD_CHUNKS: usize = 8;

struct Fetch {
    key: ImageKey,
    partial: PathBuf,
    peers: Vec<Peer>,
    manifest: Arc<Manifest>,
    file: Arc<DirectFile>,
    report: Report,
    work: Mutex<Work>,
    wake: Notify,
}

struct Work {
    queue: VecDeque<Range<u64>>,
    /// What each worker still has to do, the chunk that it is at included.
    in_flight: BTreeMap<usize, Range<u64>>,
    /// Chunks that a peer gave wrongly, by peer.
    bad: BTreeMap<usize, BTreeSet<u64>>,
    failures: BTreeMap<usize, u32>,
    dropped: BTreeMap<usize, String>,
    done_bytes: u64,
    error: Option<AgentError>,
}

enum Next {
    Fetch(Range<u64>),
    Wait,
    End,
}

/// What a request brought: how many chunks were right; which were wrong; why it ended early.
#[derive(Default)]
struct Outcome {
    good: u64,
    bad: Vec<u64>,
    problem: Option<PeerError>,
}

/// The peer that a worker asks.
fn peer_of(worker: usize) -> usize {
    worker / STREAMS_PER_PEER
}

/// Fetches all missing chunks into the file.
pub(super) async fn all(
    what: &Pull,
    peers: Vec<Peer>,
    manifest: &Arc<Manifest>,
    file: &Arc<DirectFile>,
    missing: Vec<u64>,
    report: &Report,
    cancel: &CancellationToken,
) -> Result<(), AgentError> {
    let missing_bytes = manifest.bytes_of(missing.iter().copied());
    let work = Work {
        queue: runs(&missing, CHUNKS_PER_REQUEST).into(),
        in_flight: BTreeMap::new(),
        bad: BTreeMap::new(),
        failures: BTreeMap::new(),
        dropped: BTreeMap::new(),
        done_bytes: manifest.data_bytes() - missing_bytes,
        error: None,
    };
    let fetch = Arc::new(Fetch {
        key: what.key.clone(),
        partial: what.files.partial.clone(),
        peers,
        manifest: manifest.clone(),
        file: file.clone(),
        report: report.clone(),
        work: Mutex::new(work),
        wake: Notify::new(),
    });
    fetch.all(cancel).await
}

impl Fetch {
    fn work(&self) -> MutexGuard<'_, Work> {
        self.work.lock().expect("no worker panicked")
    }

    async fn all(self: &Arc<Self>, cancel: &CancellationToken) -> Result<(), AgentError> {
        let workers = (0..self.peers.len() * STREAMS_PER_PEER).map(|worker| self.run(worker));
        tokio::select! {
            _ = futures::future::join_all(workers) => {}
            () = cancel.cancelled() => {
                // For the threads, which may still have bytes to read.
                self.work().error = Some(AgentError::Cancelled);
                return Err(AgentError::Cancelled);
            }
        }
        let mut work = self.work();
        match work.error.take() {
            Some(error) => Err(error),
            None if work.queue.is_empty() => Ok(()),
            None => {
                let reasons = work.dropped.iter().map(|(peer, why)| format!("{}: {why}", self.peers[*peer].address()));
                Err(AgentError::NoPeer { reasons: reasons.collect::<Vec<_>>().join("; ") })
            }
        }
    }

    async fn run(self: &Arc<Self>, worker: usize) {
        let mut connection = None;
        loop {
            let notified = self.wake.notified();
            tokio::pin!(notified);
            notified.as_mut().enable();
            let next = self.work().next(worker, self.peers.len());
            let next = next.unwrap_or_else(|chunk| self.give_up(chunk));
            match next {
                Next::End => {
                    self.wake.notify_waiters();
                    return;
                }
                Next::Wait => notified.await,
                Next::Fetch(range) => {
                    let outcome = self.request(worker, range, &mut connection).await;
                    let pause = self.settle(worker, outcome);
                    self.wake.notify_waiters();
                    if let Some(pause) = pause {
                        tokio::time::sleep(pause).await;
                    }
                }
            }
        }
    }

    /// Asks for chunks over the connection of the worker, and keeps it when it can be used again.
    async fn request(
        self: &Arc<Self>,
        worker: usize,
        chunks: Range<u64>,
        kept: &mut Option<Connection>,
    ) -> Result<Outcome, AgentError> {
        let opened = match kept.take() {
            Some(connection) => Ok(connection),
            None => self.peers[peer_of(worker)].connect().await,
        };
        let watched = opened.and_then(|connection| {
            let hang_up = connection.hang_up()?;
            Ok((connection, hang_up))
        });
        let (mut connection, hang_up) = match watched {
            Ok(watched) => watched,
            Err(problem) => return Ok(Outcome { problem: Some(problem), ..Outcome::default() }),
        };
        let fetch = self.clone();
        let work = move || {
            let mut outcome = Outcome::default();
            let is_whole = match fetch.receive(worker, chunks, &mut connection, &mut outcome)? {
                Ok(is_whole) => is_whole,
                Err(problem) => {
                    outcome.problem = Some(problem);
                    false
                }
            };
            Ok((outcome, is_whole.then_some(connection)))
        };
        // When this future is dropped, so is `hang_up`, and the thread ends.
        let (outcome, connection) = blocking(work).await?;
        hang_up.keep();
        *kept = connection;
        Ok(outcome)
    }

    /// Reads chunks and writes those that are right. Tells whether all that was asked for was read, or what the peer did wrong.
    fn receive(
        &self,
        worker: usize,
        chunks: Range<u64>,
        connection: &mut Connection,
        outcome: &mut Outcome,
    ) -> Result<Result<bool, PeerError>, AgentError> {
        let bytes = self.manifest.range(chunks.start).start..self.manifest.range(chunks.end - 1).end;
        if let Err(problem) = connection.ask(&self.key, &bytes) {
            return Ok(Err(problem));
        }
        let mut buffer = Buffer::new(CHUNK_BYTES as usize);
        for chunk in chunks {
            if !self.work().begin(worker, chunk) {
                return Ok(Ok(false));
            }
            let range = self.manifest.range(chunk);
            let data = buffer.first((range.end - range.start) as usize);
            if let Err(problem) = connection.read_exact(data) {
                return Ok(Err(problem));
            }
            metrics::RECEIVED_BYTES.add(data.len() as u64);
            if self.manifest.accepts(chunk, data) {
                let written = self.file.write_at(range.start, data);
                written.map_err(AgentError::io("write", &self.partial))?;
                metrics::WRITTEN_BYTES.add(range.end - range.start);
                outcome.good += 1;
                self.count(chunk);
            } else {
                outcome.bad.push(chunk);
            }
            self.work().end(worker, chunk);
        }
        sparse::write_back(self.file.file(), bytes);
        Ok(Ok(true))
    }

    fn give_up(&self, chunk: u64) -> Next {
        let mut work = self.work();
        let live = self.peers.iter().enumerate().filter(|(peer, _)| !work.dropped.contains_key(peer));
        let peers = live.map(|(_, peer)| peer.address().to_string()).collect::<Vec<_>>().join(", ");
        work.error = Some(AgentError::ChunkBadEverywhere { chunk, peers });
        Next::End
    }

    fn count(&self, chunk: u64) {
        let mut work = self.work();
        work.done_bytes += self.manifest.bytes_of([chunk]);
        let percent = work.done_bytes * 100 / self.manifest.data_bytes().max(1);
        drop(work);
        (self.report)(Step::Progress(percent.min(99) as u32));
    }

    /// Books what a request brought; returns how long this worker shall pause.
    fn settle(&self, worker: usize, outcome: Result<Outcome, AgentError>) -> Option<Duration> {
        let peer = peer_of(worker);
        let mut work = self.work();
        let rest = work.in_flight.remove(&worker).filter(|rest| !rest.is_empty());
        let outcome = match outcome {
            Ok(outcome) => outcome,
            Err(error) => {
                work.error = Some(error);
                return None;
            }
        };
        let address = self.peers[peer].address();
        for chunk in outcome.bad {
            metrics::BAD_CHUNKS.add(1);
            tracing::warn!(image = %self.key, peer = %address, chunk, "chunk does not match the manifest");
            work.queue.push_front(chunk..chunk + 1);
            let bad = work.bad.entry(peer).or_default();
            bad.insert(chunk);
            if bad.len() >= MAX_BAD_CHUNKS {
                work.dropped.entry(peer).or_insert(format!("it gave {MAX_BAD_CHUNKS} wrong chunks"));
            }
        }
        if let Some(rest) = rest {
            work.queue.push_front(rest);
        }
        if outcome.good > 0 {
            work.failures.remove(&peer);
        }
        let problem = outcome.problem?;
        metrics::BROKEN_TRANSFERS.add(1);
        let failures = work.failures.entry(peer).or_default();
        *failures += 1;
        let failures = *failures;
        if failures >= MAX_PEER_FAILURES || matches!(problem, PeerError::Without) {
            tracing::warn!(image = %self.key, peer = %address, problem = chain(&problem), "peer dropped");
            work.dropped.entry(peer).or_insert(chain(&problem));
        }
        Some(PAUSE * failures)
    }
}

impl Work {
    /// What a worker does next; an error is a chunk that no peer has right.
    fn next(&mut self, worker: usize, peers: usize) -> Result<Next, u64> {
        let peer = peer_of(worker);
        if self.error.is_some() || self.dropped.contains_key(&peer) {
            return Ok(Next::End);
        }
        if let Some(position) = self.queue.iter().position(|range| !self.is_bad(peer, range)) {
            let range = self.queue.remove(position).expect("the position was found");
            self.in_flight.insert(worker, range.clone());
            return Ok(Next::Fetch(range));
        }
        // What is left was wrong from this peer; is there another one to ask?
        let live: Vec<usize> = (0..peers).filter(|other| !self.dropped.contains_key(other)).collect();
        let hopeless = |range: &&Range<u64>| live.iter().all(|other| self.is_bad(*other, range));
        if let Some(range) = self.queue.iter().find(hopeless) {
            return Err(range.start);
        }
        if let Some(range) = self.steal(peer) {
            self.in_flight.insert(worker, range.clone());
            return Ok(Next::Fetch(range));
        }
        Ok(if self.queue.is_empty() && self.in_flight.is_empty() { Next::End } else { Next::Wait })
    }

    /// Whether a range has a chunk that this peer gave wrongly. Such a chunk is always queued alone.
    fn is_bad(&self, peer: usize, range: &Range<u64>) -> bool {
        self.bad.get(&peer).is_some_and(|bad| bad.range(range.clone()).next().is_some())
    }

    /// The second half of the longest range that a worker of another peer has.
    fn steal(&mut self, peer: usize) -> Option<Range<u64>> {
        let others = self.in_flight.iter_mut().filter(|(worker, _)| peer_of(**worker) != peer);
        let (_, range) = others.max_by_key(|(_, range)| range.end.saturating_sub(range.start))?;
        let length = range.end.saturating_sub(range.start);
        if length < 2 {
            return None;
        }
        let middle = range.start + length.div_ceil(2);
        let stolen = middle..range.end;
        range.end = middle;
        Some(stolen)
    }

    /// Whether a chunk is still this worker's to do. Nothing is, once the sync has failed or was stopped.
    fn begin(&self, worker: usize, chunk: u64) -> bool {
        self.error.is_none() && self.in_flight.get(&worker).is_some_and(|range| range.contains(&chunk))
    }

    fn end(&mut self, worker: usize, chunk: u64) {
        if let Some(range) = self.in_flight.get_mut(&worker) {
            range.start = chunk + 1;
        }
    }
}

#[cfg(test)]
mod tests;

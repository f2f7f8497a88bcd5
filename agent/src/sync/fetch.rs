//! The workers of a sync: one queue of chunk ranges, two requests per peer at a time.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::File;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::{Pull, Report, Step, runs};
use crate::error::{AgentError, blocking, chain};
use crate::limits::{CHUNKS_PER_REQUEST, MAX_PEER_FAILURES, STREAMS_PER_PEER};
use crate::manifest::Manifest;
use crate::peer::{Peer, PeerError};
use crate::sparse;

/// Pause after a failed request, times the failures in a row.
const PAUSE: Duration = Duration::from_millis(200);

/// Wrong chunks after which a peer is dropped: its disk is bad, and every wrong chunk costs a transfer.
const MAX_BAD_CHUNKS: usize = 8;

struct Fetch<'a> {
    what: &'a Pull,
    peers: Vec<Peer>,
    manifest: &'a Arc<Manifest>,
    file: &'a Arc<File>,
    report: &'a Report,
    work: Mutex<Work>,
    wake: Notify,
}

struct Work {
    queue: VecDeque<Range<u64>>,
    in_flight: usize,
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

/// What a request brought: the first so many chunks were handled; which of them were wrong; why it ended early.
struct Outcome {
    good: u64,
    bad: Vec<u64>,
    rest: Range<u64>,
    problem: Option<PeerError>,
}

/// Fetches all missing chunks into the file.
pub(super) async fn all(
    what: &Pull,
    peers: Vec<Peer>,
    manifest: &Arc<Manifest>,
    file: &Arc<File>,
    missing: Vec<u64>,
    report: &Report,
    cancel: &CancellationToken,
) -> Result<(), AgentError> {
    let missing_bytes: u64 = missing.iter().map(|c| bytes_of(manifest, *c)).sum();
    let work = Work {
        queue: runs(&missing, CHUNKS_PER_REQUEST).into(),
        in_flight: 0,
        bad: BTreeMap::new(),
        failures: BTreeMap::new(),
        dropped: BTreeMap::new(),
        done_bytes: manifest.data_bytes() - missing_bytes,
        error: None,
    };
    let fetch = Fetch { what, peers, manifest, file, report, work: Mutex::new(work), wake: Notify::new() };
    let workers = (0..fetch.peers.len() * STREAMS_PER_PEER).map(|worker| fetch.run(worker / STREAMS_PER_PEER));
    tokio::select! {
        _ = futures::future::join_all(workers) => {}
        () = cancel.cancelled() => return Err(AgentError::Cancelled),
    }
    let work = fetch.work.into_inner().expect("no worker panicked");
    match work.error {
        Some(error) => Err(error),
        None if work.queue.is_empty() => Ok(()),
        None => {
            let reasons = work.dropped.iter().map(|(peer, why)| format!("{}: {why}", fetch.peers[*peer].address()));
            Err(AgentError::NoPeer { reasons: reasons.collect::<Vec<_>>().join("; ") })
        }
    }
}

impl Fetch<'_> {
    async fn run(&self, peer: usize) {
        loop {
            let notified = self.wake.notified();
            tokio::pin!(notified);
            notified.as_mut().enable();
            let next = self.work.lock().expect("no worker panicked").next(peer, &self.peers);
            match next {
                Next::End => {
                    self.wake.notify_waiters();
                    return;
                }
                Next::Wait => notified.await,
                Next::Fetch(range) => {
                    let outcome = self.request(peer, range).await;
                    let pause = self.settle(peer, outcome);
                    self.wake.notify_waiters();
                    if let Some(pause) = pause {
                        tokio::time::sleep(pause).await;
                    }
                }
            }
        }
    }

    async fn request(&self, peer: usize, chunks: Range<u64>) -> Result<Outcome, AgentError> {
        let mut outcome = Outcome { good: 0, bad: vec![], rest: chunks.clone(), problem: None };
        let client = &self.peers[peer];
        let bytes = self.manifest.range(chunks.start).start..self.manifest.range(chunks.end - 1).end;
        let mut response = match client.range(&self.what.key, bytes).await {
            Ok(response) => response,
            Err(problem) => {
                outcome.problem = Some(problem);
                return Ok(outcome);
            }
        };
        let mut buffer = BytesMut::new();
        while outcome.rest.start < outcome.rest.end {
            let chunk = outcome.rest.start;
            let length = bytes_of(self.manifest, chunk) as usize;
            while buffer.len() < length {
                match client.read(&mut response).await {
                    Ok(Some(part)) => buffer.extend_from_slice(&part),
                    Ok(None) => outcome.problem = Some(PeerError::Transfer("it ended early".into())),
                    Err(problem) => outcome.problem = Some(problem),
                }
                if outcome.problem.is_some() {
                    return Ok(outcome);
                }
            }
            if self.take(chunk, buffer.split_to(length).freeze()).await? {
                outcome.good += 1;
                self.count(chunk);
            } else {
                outcome.bad.push(chunk);
            }
            outcome.rest.start += 1;
        }
        Ok(outcome)
    }

    /// Writes a chunk if it is the right one.
    async fn take(&self, chunk: u64, bytes: Bytes) -> Result<bool, AgentError> {
        let (manifest, file) = (self.manifest.clone(), self.file.clone());
        let path = self.what.files.partial.clone();
        blocking(move || {
            if !manifest.accepts(chunk, &bytes) {
                return Ok(false);
            }
            let start = manifest.range(chunk).start;
            sparse::write_at(&file, start, &bytes, true).map_err(AgentError::io("write", path))?;
            Ok(true)
        })
        .await
    }

    fn count(&self, chunk: u64) {
        let mut work = self.work.lock().expect("no worker panicked");
        work.done_bytes += bytes_of(self.manifest, chunk);
        let percent = work.done_bytes * 100 / self.manifest.data_bytes().max(1);
        drop(work);
        (self.report)(Step::Progress(percent.min(99) as u32));
    }

    /// Books what a request brought; returns how long this worker shall pause.
    fn settle(&self, peer: usize, outcome: Result<Outcome, AgentError>) -> Option<Duration> {
        let mut work = self.work.lock().expect("no worker panicked");
        work.in_flight -= 1;
        let outcome = match outcome {
            Ok(outcome) => outcome,
            Err(error) => {
                work.error = Some(error);
                return None;
            }
        };
        let address = self.peers[peer].address();
        for chunk in outcome.bad {
            tracing::warn!(image = %self.what.key, peer = %address, chunk, "chunk does not match the manifest");
            work.queue.push_front(chunk..chunk + 1);
            let bad = work.bad.entry(peer).or_default();
            bad.insert(chunk);
            if bad.len() >= MAX_BAD_CHUNKS {
                work.dropped.entry(peer).or_insert(format!("it gave {MAX_BAD_CHUNKS} wrong chunks"));
            }
        }
        if !outcome.rest.is_empty() {
            work.queue.push_front(outcome.rest);
        }
        if outcome.good > 0 {
            work.failures.remove(&peer);
        }
        let problem = outcome.problem?;
        let failures = work.failures.entry(peer).or_default();
        *failures += 1;
        let failures = *failures;
        if failures >= MAX_PEER_FAILURES || matches!(problem, PeerError::Without) {
            tracing::warn!(image = %self.what.key, peer = %address, problem = chain(&problem), "peer dropped");
            work.dropped.entry(peer).or_insert(chain(&problem));
        }
        Some(PAUSE * failures)
    }
}

impl Work {
    fn next(&mut self, peer: usize, peers: &[Peer]) -> Next {
        if self.error.is_some() || self.dropped.contains_key(&peer) {
            return Next::End;
        }
        if self.queue.is_empty() {
            return if self.in_flight == 0 { Next::End } else { Next::Wait };
        }
        let bad = self.bad.get(&peer);
        let usable = |range: &Range<u64>| bad.is_none_or(|bad| bad.range(range.clone()).next().is_none());
        if let Some(position) = self.queue.iter().position(usable) {
            self.in_flight += 1;
            return Next::Fetch(self.queue.remove(position).expect("the position was found"));
        }
        // What is left was wrong from this peer; is there another one to ask?
        let live: Vec<usize> = (0..peers.len()).filter(|other| !self.dropped.contains_key(other)).collect();
        let hopeless = self.queue.iter().find(|range| {
            live.iter().all(|other| self.bad.get(other).is_some_and(|bad| bad.range((*range).clone()).next().is_some()))
        });
        if let Some(range) = hopeless {
            let peers = live.iter().map(|other| peers[*other].address().to_string()).collect::<Vec<_>>().join(", ");
            self.error = Some(AgentError::ChunkBadEverywhere { chunk: range.start, peers });
            return Next::End;
        }
        Next::Wait
    }
}

fn bytes_of(manifest: &Manifest, chunk: u64) -> u64 {
    let range = manifest.range(chunk);
    range.end - range.start
}

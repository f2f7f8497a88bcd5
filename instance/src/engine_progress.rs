//! Whether an engine that answers gets anywhere.
//!
//! Its counters say how many requests it took and how many it has not completed. When that difference stands still while requests
//! are there, they wait: for replicas that do not answer, which the engine gives up in time, or for a bug of ours. It is told and
//! not acted on: another engine would wait for the same replicas, and would have to open them first.

use std::time::{Duration, Instant};

use jiff::Timestamp;
use proto::engine::{ReplicaState, Status};

use crate::limits::{ENGINE_STALL_LIMIT, HEARTBEAT, HEARTBEAT_ANSWER};

/// What was seen of one engine.
#[derive(Clone, Debug)]
pub struct Progress {
    pid: u32,
    completed: u64,
    waiting: u64,
    /// Since when nothing was completed.
    since: Timestamp,
    /// The same, as far as this process listened: it may have been stopped itself.
    stood: Duration,
    seen: Instant,
}

/// An engine that completes nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stall {
    pub since: Timestamp,
    pub requests: u64,
}

impl Progress {
    pub fn of(status: &Status, now: Instant, time: Timestamp) -> Progress {
        let (completed, waiting) = count(status);
        Progress { pid: status.pid, completed, waiting, since: time, stood: Duration::ZERO, seen: now }
    }

    /// Takes the next status of the engine, or the first one of another.
    pub fn follow(&mut self, status: &Status, now: Instant, time: Timestamp) {
        let (completed, waiting) = count(status);
        if status.pid != self.pid || waiting == 0 || completed > self.completed {
            *self = Progress::of(status, now, time);
            return;
        }
        self.waiting = waiting;
        self.stood += now.saturating_duration_since(self.seen).min(2 * (HEARTBEAT + HEARTBEAT_ANSWER));
        self.seen = now;
    }

    pub fn stall(&self) -> Option<Stall> {
        (self.stood >= ENGINE_STALL_LIMIT).then_some(Stall { since: self.since, requests: self.waiting })
    }
}

/// Requests that were completed, and that were not.
fn count(status: &Status) -> (u64, u64) {
    let taken = status.read_ops + status.write_ops + status.flush_ops;
    // Comparing replicas is a request of the engine's own, one at a time.
    let own = u64::from(status.replicas.values().any(|state| *state == ReplicaState::Comparing));
    let waiting = u64::from(status.in_flight).saturating_sub(own);
    (taken.saturating_sub(waiting), waiting)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(taken: u64, in_flight: u32) -> Status {
        Status { pid: 7, write_ops: taken, in_flight, ..Status::default() }
    }

    /// What is seen of an engine that is asked every so many seconds.
    fn follow(every: u64, statuses: &[Status]) -> Vec<Option<Stall>> {
        let (start, time) = (Instant::now(), |n: u64| Timestamp::from_second((n * every) as i64).unwrap());
        let mut progress = Progress::of(&statuses[0], start, time(0));
        let next = statuses.iter().enumerate().skip(1).map(|(n, status)| {
            progress.follow(status, start + Duration::from_secs(n as u64 * every), time(n as u64));
            progress.stall()
        });
        next.collect()
    }

    fn stalls(every: u64, statuses: &[Status]) -> bool {
        follow(every, statuses).iter().any(Option::is_some)
    }

    #[test]
    fn requests_of_which_none_is_completed_are_told_with_their_number() {
        // More come, none goes.
        let statuses: Vec<_> = (0..9).map(|n| status(100 + n, 4 + n as u32)).collect();
        let seen = follow(2, &statuses);
        assert_eq!(seen[4], None, "ten seconds are what dropping a replica may take");
        assert_eq!(seen[5], Some(Stall { since: Timestamp::from_second(0).unwrap(), requests: 10 }));
        assert!(seen[6].is_some());
        let over: Vec<_> = statuses.iter().cloned().chain([status(109, 11)]).collect();
        assert_eq!(*follow(2, &over).last().unwrap(), None, "one was completed");
    }

    #[test]
    fn who_is_idle_slow_or_another_engine_does_not_stall() {
        assert!(!stalls(2, &vec![status(100, 0); 30]), "idle");
        assert!(!stalls(2, &(0..30).map(|n| status(100 + n, 16)).collect::<Vec<_>>()), "always as many in flight");
        let comparing = [("r2".to_owned(), ReplicaState::Comparing)];
        let compares = Status { replicas: comparing.into(), ..status(100, 1) };
        assert!(!stalls(2, &vec![compares.clone(); 30]), "its own request");
        assert!(stalls(2, &vec![Status { in_flight: 2, ..compares }; 30]), "and one that waits");
        let next = |n: u32| Status { pid: 7 + n / 5, ..status(100, 4) };
        assert!(!stalls(2, &(0..30).map(next).collect::<Vec<_>>()), "each engine begins anew");
    }

    #[test]
    fn time_in_which_nobody_listened_does_not_count() {
        assert!(!stalls(60, &vec![status(100, 4); 2]));
    }
}

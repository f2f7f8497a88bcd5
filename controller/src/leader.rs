//! One leader at a time, by a Lease in the store.
//!
//! The leader renews its lease; others take it over when they saw no renewal for its whole duration. Nobody compares wall clocks:
//! the others count from when they saw a renewal, the leader from before it asked for it. So the leader's count begins first, and with
//! its shorter deadline it has ended before another can begin, as long as clocks run at about the same speed.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use store::{Store, StoreError};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

/// The lease of the reconcilers.
pub const LEASE: &str = "backing-image-csi-controller";

/// How leadership passes on.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// How long others wait without seeing a renewal, in whole seconds.
    pub duration: Duration,
    /// After how long without a renewal the leader asks its work to end.
    pub deadline: Duration,
    /// Between two renewals, and between two looks of the others.
    pub period: Duration,
    /// How long one request may take.
    pub request: Duration,
}

impl Default for Timing {
    /// As Kubernetes' own controllers. A leader has five seconds to end what it does; what it began then is cut off.
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Timing { duration: seconds(15), deadline: seconds(10), period: seconds(2), request: seconds(5) }
    }
}

/// A candidate.
#[derive(Clone)]
pub struct Candidate {
    pub store: Store,
    /// Unlike that of any other process, also of an earlier one of the same pod.
    pub identity: String,
    pub timing: Timing,
}

/// What a leader is given.
#[derive(Clone, Debug, Default)]
pub struct Term {
    /// The work is to end.
    pub ending: CancellationToken,
    /// Another may lead from now on: whatever still runs stops at once.
    pub over: CancellationToken,
}

/// What was seen of the lease, and since when it looks like that. Without a version it is absent.
struct Seen {
    version: Option<String>,
    since: Instant,
    /// It was there before: somebody removed it, which its holder may not know yet.
    was_there: bool,
}

impl Candidate {
    /// Whenever it leads, runs `work` until its term ends; returns after `shutdown`, or with what `work` fails with.
    ///
    /// The lease is given back after an orderly end, so that another one need not wait.
    pub async fn run<E, F>(&self, shutdown: &CancellationToken, mut work: impl FnMut(Term) -> F) -> Result<(), E>
    where
        F: Future<Output = Result<(), E>>,
    {
        loop {
            let acquired = tokio::select! {
                biased;
                () = shutdown.cancelled() => return Ok(()),
                acquired = self.acquire() => acquired,
            };
            info!(identity = self.identity, "this process leads");
            let term = Term { ending: shutdown.child_token(), over: CancellationToken::new() };
            let ended = {
                let work = work(term.clone());
                let keep = self.keep(acquired, &term);
                tokio::pin!(work, keep);
                tokio::select! {
                    // It is renewed while the work ends, and cut off when that does not help.
                    ended = &mut work => Some(ended),
                    () = &mut keep => {
                        warn!(identity = self.identity, "the lease is lost; what is not done by now is given up");
                        None
                    }
                }
            };
            term.over.cancel();
            match ended {
                Some(ended) => {
                    self.give_back().await;
                    ended?;
                    if shutdown.is_cancelled() {
                        return Ok(());
                    }
                }
                None => info!(identity = self.identity, "this process does not lead any more"),
            }
        }
    }

    /// Waits until the lease is ours; returns the time before it was asked for.
    async fn acquire(&self) -> Instant {
        let mut seen = Seen { version: None, since: Instant::now(), was_there: false };
        loop {
            let asked = Instant::now();
            match timeout(self.timing.request, self.try_to_take(&mut seen)).await {
                Ok(Ok(true)) => return asked,
                Ok(Ok(false)) => {}
                Ok(Err(error)) if error.is_conflict() || is_race(&error) => debug!("another candidate was faster"),
                Ok(Err(error)) => warn!(error = crate::error::chain(&error), "the lease cannot be had"),
                Err(_) => warn!("the lease cannot be had: no answer"),
            }
            sleep(self.timing.period).await;
        }
    }

    async fn try_to_take(&self, seen: &mut Seen) -> Result<bool, StoreError> {
        let found = self.store.get::<Lease>(LEASE).await?;
        let version = found.as_ref().and_then(|lease| lease.metadata.resource_version.clone());
        if seen.version != version {
            *seen = Seen { version, since: Instant::now(), was_there: true };
        }
        let Some(mut lease) = found else {
            if seen.was_there && seen.since.elapsed() < self.timing.duration {
                return Ok(false);
            }
            let mut lease = Lease::default();
            lease.metadata.name = Some(LEASE.into());
            self.sign(&mut lease);
            self.store.create(&lease).await?;
            return Ok(true);
        };
        let spec = lease.spec.clone().unwrap_or_default();
        let is_free = spec.holder_identity.as_deref().unwrap_or_default().is_empty();
        // What its holder promised counts, also when it is configured otherwise than we are.
        let promised = Duration::from_secs(u64::try_from(spec.lease_duration_seconds.unwrap_or(0)).unwrap_or(0));
        if !is_free && seen.since.elapsed() < promised.max(self.timing.duration) {
            return Ok(false);
        }
        self.sign(&mut lease);
        self.store.replace(&lease).await?;
        Ok(true)
    }

    /// Renews the lease for as long as that works, and while the work ends; returns when another could soon take it.
    async fn keep(&self, acquired: Instant, term: &Term) {
        let mut renewed = acquired;
        loop {
            let next = (renewed + self.timing.period).max(Instant::now());
            tokio::time::sleep_until(next).await;
            let asked = Instant::now();
            let ask = tokio::time::timeout_at(renewed + self.timing.deadline, self.renew());
            match timeout(self.timing.request, ask).await {
                Ok(Ok(Ok(true))) => {
                    renewed = asked;
                    continue;
                }
                Ok(Ok(Ok(false))) => {
                    warn!("somebody else has the lease");
                    term.ending.cancel();
                    return;
                }
                Ok(Ok(Err(error))) => warn!(error = crate::error::chain(&error), "the lease cannot be renewed"),
                Ok(Err(_)) | Err(_) => warn!("the lease cannot be renewed: no answer"),
            }
            if renewed.elapsed() >= self.timing.deadline {
                term.ending.cancel();
                // A moment less than the others wait, for the way to them.
                let last = renewed + self.timing.duration - (self.timing.duration - self.timing.deadline) / 5;
                tokio::time::sleep_until(last).await;
                return;
            }
            sleep(self.timing.period.min(Duration::from_millis(500))).await;
        }
    }

    /// `false` when it is not ours.
    async fn renew(&self) -> Result<bool, StoreError> {
        let Some(mut lease) = self.store.get::<Lease>(LEASE).await? else { return Ok(false) };
        if !self.holds(&lease) {
            return Ok(false);
        }
        if let Some(spec) = &mut lease.spec {
            spec.renew_time = Some(MicroTime(Timestamp::now()));
        }
        self.store.replace(&lease).await.map(|_| true)
    }

    fn holds(&self, lease: &Lease) -> bool {
        let holder = lease.spec.as_ref().and_then(|spec| spec.holder_identity.as_deref());
        holder == Some(self.identity.as_str())
    }

    fn sign(&self, lease: &mut Lease) {
        let spec: &mut LeaseSpec = lease.spec.get_or_insert_default();
        let now = MicroTime(Timestamp::now());
        spec.holder_identity = Some(self.identity.clone());
        spec.lease_duration_seconds = Some(i32::try_from(self.timing.duration.as_secs()).unwrap_or(i32::MAX));
        spec.lease_transitions = Some(spec.lease_transitions.map_or(0, |count| count + 1));
        (spec.acquire_time, spec.renew_time) = (Some(now.clone()), Some(now));
    }

    async fn give_back(&self) {
        let free = async {
            let Some(mut lease) = self.store.get::<Lease>(LEASE).await? else { return Ok(()) };
            if !self.holds(&lease) {
                return Ok(());
            }
            if let Some(spec) = &mut lease.spec {
                spec.holder_identity = Some(String::new());
            }
            self.store.replace(&lease).await.map(drop)
        };
        match timeout(self.timing.request, free).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => warn!(error = crate::error::chain(&error), "the lease is not given back; it runs out"),
            Err(_) => warn!("the lease is not given back; it runs out"),
        }
    }
}

fn is_race(error: &StoreError) -> bool {
    matches!(error, StoreError::AlreadyExists { .. } | StoreError::NotFound { .. })
}

#[cfg(test)]
mod tests;

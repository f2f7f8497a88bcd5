//! Back-off: how often something failed, and when it is tried again.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

/// The delay after a first failure.
pub const INITIAL: Duration = Duration::from_secs(1);
/// The longest delay; also the delay after a failure that a repetition will hardly cure.
pub const MAX: Duration = Duration::from_secs(300);
/// Something that went on this long without failing counts as cured, so that its next failure is a first one.
pub const CURED_AFTER: Duration = Duration::from_secs(60);

/// The delay after `failures` failures in a row: 1 s, doubling, up to 5 minutes.
pub fn delay(failures: u32) -> Duration {
    match failures {
        0 => Duration::ZERO,
        n => INITIAL.saturating_mul(2u32.saturating_pow(n - 1)).min(MAX),
    }
}

/// `at` plus a duration, saturating at the end of time.
pub fn after(at: Timestamp, wait: Duration) -> Timestamp {
    let wait = SignedDuration::try_from(wait).unwrap_or(SignedDuration::MAX);
    at.saturating_add(wait).unwrap_or(Timestamp::MAX)
}

/// How long until `at`; zero when it has passed.
pub fn until(now: Timestamp, at: Timestamp) -> Duration {
    Duration::try_from(at.duration_since(now)).unwrap_or(Duration::ZERO)
}

/// How long ago `at` was; zero when it is yet to come.
pub fn since(now: Timestamp, at: Timestamp) -> Duration {
    until(at, now)
}

/// A time as objects carry it; `None` when the text is empty or no time.
pub fn parse(text: &str) -> Option<Timestamp> {
    text.parse().ok()
}

/// The sooner of two waits, where `None` means not at all.
pub fn sooner(a: Option<Duration>, b: Option<Duration>) -> Option<Duration> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

/// The failures of one thing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Retry {
    pub failures: u32,
    /// Not before this time; `None`: at once.
    pub next: Option<Timestamp>,
    /// Why it failed last, a sentence; empty when it did not.
    pub message: String,
}

impl Retry {
    /// Whether it may be tried now.
    pub fn is_due(&self, now: Timestamp) -> bool {
        self.next.is_none_or(|next| next <= now)
    }

    /// One more failure, seen at `now`.
    pub fn failed(&self, now: Timestamp, message: impl Into<String>) -> Retry {
        let cured = self.next.is_some_and(|next| since(now, next) >= CURED_AFTER);
        let failures = if cured { 1 } else { self.failures.saturating_add(1) };
        Retry { failures, next: Some(after(now, delay(failures))), message: message.into() }
    }

    /// The wait until the next attempt; `None` when nothing is scheduled or it is due.
    pub fn wait(&self, now: Timestamp) -> Option<Duration> {
        self.next.filter(|next| *next > now).map(|next| until(now, next))
    }

    /// The time of the next attempt as objects carry it.
    pub fn next_text(&self) -> String {
        self.next.map(|next| next.to_string()).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_up_to_five_minutes_and_starts_anew_once_cured() {
        let now: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let mut retry = Retry::default();
        let mut waits = vec![];
        for _ in 0..11 {
            retry = retry.failed(retry.next.unwrap_or(now), "no");
            waits.push(delay(retry.failures).as_secs());
        }
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]);
        assert_eq!(retry.failed(after(retry.next.unwrap(), CURED_AFTER), "no").failures, 1);
    }
}

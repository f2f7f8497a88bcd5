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

/// A time that was set `longest` ahead at most, while it is yet to come. One that lies further away comes from a clock that was set back
/// since, and to wait for it would take as long as that step. A smaller step makes the wait longer, by itself and to `longest` at most.
pub fn pending(now: Timestamp, at: Timestamp, longest: Duration) -> Option<Timestamp> {
    (at > now && at <= after(now, longest)).then_some(at)
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

/// Whether a text is the time of something that has happened. One that is yet to come was written before the clock was set back: who
/// waited from then on would wait for as long as that step.
pub fn is_past(now: Timestamp, text: &str) -> bool {
    parse(text).is_some_and(|at| at <= now)
}

/// When something began that an object has kept: now, when it kept nothing, or a time that is yet to come (see [`is_past`]).
pub fn begun(now: Timestamp, text: &str) -> Timestamp {
    parse(text).filter(|at| *at <= now).unwrap_or(now)
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
        self.pending(now).is_none()
    }

    fn pending(&self, now: Timestamp) -> Option<Timestamp> {
        pending(now, self.next?, MAX)
    }

    /// One more failure, seen at `now`.
    pub fn failed(&self, now: Timestamp, message: impl Into<String>) -> Retry {
        let cured = self.next.is_some_and(|next| since(now, next) >= CURED_AFTER);
        let failures = if cured { 1 } else { self.failures.saturating_add(1) };
        Retry { failures, next: Some(after(now, delay(failures))), message: message.into() }
    }

    /// The wait until the next attempt; `None` when nothing is scheduled or it is due.
    pub fn wait(&self, now: Timestamp) -> Option<Duration> {
        self.pending(now).map(|next| until(now, next))
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

    #[test]
    fn after_a_clock_was_set_back_no_wait_exceeds_the_longest_of_its_kind() {
        let now: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let retry = Retry::default().failed(now, "no").failed(now, "no");
        assert_eq!((retry.is_due(now), retry.wait(now)), (false, Some(2 * INITIAL)));
        for (step, wait) in [(60, Some(62)), (298, Some(300)), (299, None), (3600, None), (10_000_000, None)] {
            let back = now.checked_sub(SignedDuration::from_secs(step)).unwrap();
            assert_eq!(retry.wait(back), wait.map(Duration::from_secs), "{step}");
            assert_eq!(retry.is_due(back), wait.is_none(), "{step}");
        }
        let most = after(now, MAX);
        assert_eq!(pending(now, most, MAX), Some(most));
        assert_eq!(pending(now, after(most, Duration::from_millis(1)), MAX), None);
        assert_eq!(pending(now, now, MAX), None);
    }
}

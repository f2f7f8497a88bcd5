//! Notices that the clock of this machine was set: what waits for a time ends sooner or later then, and users shall know why.
//!
//! The clock is compared with the one that counts since the machine was started, which nobody can set. What is told stays on the Node for
//! a while; a restart of the role forgets it.

use std::sync::Arc;
use std::time::Duration;

use api::names::condition::CLOCK_STEADY;
use api::{Condition, ConditionStatus};
use jiff::{SignedDuration, Timestamp};
use rustix::time::{ClockId, clock_gettime};
use tracing::warn;

use crate::limits::{CLOCK_LOOK, CLOCK_STEP, CLOCK_TOLD};
use crate::role::{Key, Role};

/// Both clocks at one moment.
#[derive(Clone, Copy, Debug)]
struct Reading {
    wall: Timestamp,
    /// Since the machine was started, sleep included.
    passed: Duration,
}

/// The clock was set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    by: SignedDuration,
    /// By the new clock.
    at: Timestamp,
    /// By the clock that counts since the machine was started.
    told_until: Duration,
}

impl Reading {
    fn take() -> Reading {
        let passed = clock_gettime(ClockId::Boottime);
        let passed = Duration::new(passed.tv_sec.unsigned_abs(), passed.tv_nsec as u32);
        Reading { wall: Timestamp::now(), passed }
    }

    /// How far the clock was set since an earlier reading. Whoever keeps it right slews it by far less in that time.
    fn step_since(&self, before: &Reading) -> Option<Step> {
        let passed = SignedDuration::try_from(self.passed.saturating_sub(before.passed)).ok()?;
        let by = self.wall.duration_since(before.wall).checked_sub(passed)?;
        let told_until = self.passed.saturating_add(CLOCK_TOLD);
        (by.unsigned_abs() >= CLOCK_STEP).then_some(Step { by, at: self.wall, told_until })
    }
}

impl Step {
    /// For the Node object.
    pub fn condition(&self, node: &str) -> Condition {
        let seconds = self.by.unsigned_abs().as_secs_f64().round();
        let (way, waits) = if self.by.is_negative() { ("back", "later") } else { ("ahead", "sooner") };
        let message = format!(
            "the clock of node {node} was set {way} by {seconds} s at {:.0}; what waits for a time may end {waits} than it said before",
            self.at
        );
        Condition::new(CLOCK_STEADY, ConditionStatus::False, "ClockWasSet", message)
            .with_hint("check the time service of that machine if nobody set its clock on purpose")
    }
}

/// Compares the clocks until the role ends.
pub async fn run(role: Arc<Role>) {
    let mut before = Reading::take();
    while role.cancelled.run_until_cancelled(tokio::time::sleep(CLOCK_LOOK)).await.is_some() {
        let now = Reading::take();
        if let Some(step) = now.step_since(&before) {
            warn!(node = %role.config.node, seconds = step.by.as_secs_f64(), "the clock of this machine was set");
            role.state().clock_step = Some(step);
            role.queue.add(Key::Disks);
        } else if role.state().clock_step.take_if(|step| step.told_until <= now.passed).is_some() {
            role.queue.add(Key::Disks);
        }
        before = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_clock_that_was_set_is_a_step() {
        let start: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let at = |wall: i64, passed: u64| Reading {
            wall: start + SignedDuration::from_millis(wall),
            passed: Duration::from_millis(passed),
        };
        let by = |wall, passed| at(wall, passed).step_since(&at(0, 0)).map(|step| step.by.as_millis());
        let cases = [
            ("a pause", 2_000, 2_000, None),
            ("a long sleep of the machine", 86_400_000, 86_400_000, None),
            ("a correction", 2_900, 2_000, None),
            ("a little less than a step", 6_999, 2_000, None),
            ("ahead", 7_000, 2_000, Some(5_000)),
            ("a day ahead", 86_402_000, 2_000, Some(86_400_000)),
            ("back", -3_000, 2_000, Some(-5_000)),
        ];
        for (what, wall, passed, expected) in cases {
            assert_eq!(by(wall, passed), expected, "{what}");
        }
    }

    #[test]
    fn a_step_says_which_way_and_how_far() {
        let at = "2026-01-01T00:00:00.4Z".parse().unwrap();
        let step = |seconds| Step { by: SignedDuration::from_millis(seconds), at, told_until: Duration::ZERO };
        let said = |milliseconds| step(milliseconds).condition("n1").message;
        let ahead = "the clock of node n1 was set ahead by 86400 s at 2026-01-01T00:00:00Z; what waits for a time may end sooner than it said before";
        assert_eq!(said(86_400_123), ahead);
        assert!(said(-7_200_400).contains("was set back by 7200 s at"), "{}", said(-7_200_400));
    }
}

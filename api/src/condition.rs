//! Conditions: what an object waits for or why it failed, since when, and what comes next.

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Whether a condition holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ConditionStatus {
    /// It holds.
    True,
    /// It does not hold.
    False,
    /// Nobody can tell at the moment.
    #[default]
    Unknown,
}

/// One condition, in Longhorn's form, with two fields of ours (`nextRetryTime`, `hint`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Condition {
    /// `Ready`, `WaitForBackingImage`, … (constants in [`crate::names::condition`]).
    pub r#type: String,
    pub status: ConditionStatus,
    /// RFC 3339; Longhorn writes it, we keep it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub last_probe_time: String,
    /// RFC 3339; changes only when `status` changes.
    pub last_transition_time: String,
    /// PascalCase, one word for one cause.
    pub reason: String,
    /// A sentence for the user.
    pub message: String,
    /// Ours: when the next attempt comes (RFC 3339), empty when nothing is scheduled.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub next_retry_time: String,
    /// Ours: one thing that the user can do, empty when there is nothing to do but wait.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub hint: String,
}

impl Condition {
    /// A condition without times; [`set`] fills them.
    pub fn new(r#type: &str, status: ConditionStatus, reason: &str, message: impl Into<String>) -> Self {
        Condition {
            r#type: r#type.into(),
            status,
            reason: reason.into(),
            message: message.into(),
            ..Default::default()
        }
    }

    /// The same condition with what the user can do about it.
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = hint.into();
        self
    }

    /// The same condition with the time of the next attempt.
    pub fn with_next_retry(mut self, at: Timestamp) -> Self {
        self.next_retry_time = at.to_string();
        self
    }

    /// Whether its status is `True`.
    pub fn is_true(&self) -> bool {
        self.status == ConditionStatus::True
    }
}

/// Puts a condition into a list: replaces the one of its type, keeps the transition time when the status is unchanged. A transition that is
/// yet to come was written before the clock was set back; it counts as one of now.
pub fn set(conditions: &mut Vec<Condition>, mut condition: Condition, now: Timestamp) {
    condition.last_transition_time = now.to_string();
    match conditions.iter_mut().find(|c| c.r#type == condition.r#type) {
        Some(old) => {
            let is_past = old.last_transition_time.parse::<Timestamp>().is_ok_and(|at| at <= now);
            if old.status == condition.status && is_past {
                condition.last_transition_time = old.last_transition_time.clone();
            }
            *old = condition;
        }
        None => conditions.push(condition),
    }
}

/// The condition of a type, if it was ever set.
pub fn find<'a>(conditions: &'a [Condition], r#type: &str) -> Option<&'a Condition> {
    conditions.iter().find(|c| c.r#type == r#type)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_transition_time_while_the_status_stays() {
        let (early, late): (Timestamp, Timestamp) =
            ("2026-01-01T00:00:00Z".parse().unwrap(), "2026-01-01T00:01:00Z".parse().unwrap());
        let mut list = vec![];
        set(&mut list, Condition::new("Ready", ConditionStatus::False, "A", "a"), early);
        set(&mut list, Condition::new("Ready", ConditionStatus::False, "B", "b"), late);
        assert_eq!((list[0].reason.as_str(), list[0].last_transition_time.as_str()), ("B", "2026-01-01T00:00:00Z"));
        set(&mut list, Condition::new("Ready", ConditionStatus::True, "C", "c"), late);
        assert_eq!((list.len(), list[0].last_transition_time.as_str()), (1, "2026-01-01T00:01:00Z"));
        set(&mut list, Condition::new("Ready", ConditionStatus::True, "C", "c"), early);
        assert_eq!(list[0].last_transition_time, "2026-01-01T00:00:00Z", "the clock was set back");
    }
}

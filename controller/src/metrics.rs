//! What the controller counts.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use api::metrics::{
    LEADER, ORPHANS, ORPHANS_REMOVED, RECONCILE_PASS_SECONDS, RECONCILE_PASSES, RECONCILE_QUEUE, WEBHOOK_REVIEWS,
};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;
use runtime::metrics::add;

use crate::queue::Kind;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PassLabels {
    kind: &'static str,
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabel {
    kind: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReviewLabels {
    operation: &'static str,
    outcome: &'static str,
}

const OUTCOMES: [&str; 2] = ["ok", "failed"];
const REVIEWS: [&str; 2] = ["allowed", "refused"];

/// The metrics of the reconcilers and the webhook. Cheap to clone.
#[derive(Clone)]
pub struct Metrics {
    leader: Gauge,
    passes: Family<PassLabels, Counter<u64, AtomicU64>>,
    durations: Family<KindLabel, Histogram>,
    waiting: Gauge,
    orphans: Gauge,
    orphans_removed: Counter<u64, AtomicU64>,
    reviews: Family<ReviewLabels, Counter<u64, AtomicU64>>,
}

impl Default for Metrics {
    fn default() -> Self {
        Metrics {
            leader: Gauge::default(),
            passes: Family::default(),
            // 1 ms to 16 s: a pass is a few store calls, at worst a slow agent.
            durations: Family::new_with_constructor(|| Histogram::new(exponential_buckets(0.001, 2.0, 15))),
            waiting: Gauge::default(),
            orphans: Gauge::default(),
            orphans_removed: Counter::default(),
            reviews: Family::default(),
        }
    }
}

impl Metrics {
    /// Adds those of the reconcilers to a registry.
    pub fn register(&self, registry: &mut Registry) {
        for kind in Kind::ALL.map(Kind::as_str) {
            drop(self.durations.get_or_create(&KindLabel { kind }));
            for outcome in OUTCOMES {
                drop(self.passes.get_or_create(&PassLabels { kind, outcome }));
            }
        }
        add(registry, &LEADER, self.leader.clone());
        add(registry, &RECONCILE_PASSES, self.passes.clone());
        add(registry, &RECONCILE_PASS_SECONDS, self.durations.clone());
        add(registry, &RECONCILE_QUEUE, self.waiting.clone());
        add(registry, &ORPHANS, self.orphans.clone());
        add(registry, &ORPHANS_REMOVED, self.orphans_removed.clone());
    }

    /// Adds those of the webhook to a registry.
    pub fn register_webhook(&self, registry: &mut Registry) {
        for operation in ["create", "update", "delete"] {
            for outcome in REVIEWS {
                drop(self.reviews.get_or_create(&ReviewLabels { operation, outcome }));
            }
        }
        add(registry, &WEBHOOK_REVIEWS, self.reviews.clone());
    }

    /// This process reconciles until the guard is dropped.
    pub(crate) fn lead(&self) -> Leading {
        self.leader.set(1);
        Leading(self.leader.clone())
    }

    pub(crate) fn observe_pass(&self, kind: Kind, took: Duration, ok: bool) {
        let labels = PassLabels { kind: kind.as_str(), outcome: OUTCOMES[usize::from(!ok)] };
        self.passes.get_or_create(&labels).inc();
        self.durations.get_or_create(&KindLabel { kind: kind.as_str() }).observe(took.as_secs_f64());
    }

    pub(crate) fn observe_review(&self, operation: &str, allowed: bool) {
        let operation = match operation {
            "CREATE" => "create",
            "UPDATE" => "update",
            "DELETE" => "delete",
            _ => "other",
        };
        let outcome = REVIEWS[usize::from(!allowed)];
        self.reviews.get_or_create(&ReviewLabels { operation, outcome }).inc();
    }

    pub(crate) fn observe_orphans(&self, count: usize) {
        self.orphans.set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    pub(crate) fn count_removed_orphan(&self) {
        self.orphans_removed.inc();
    }

    pub(crate) fn observe_queue(&self, length: usize) {
        self.waiting.set(i64::try_from(length).unwrap_or(i64::MAX));
    }
}

pub(crate) struct Leading(Gauge);

impl Drop for Leading {
    fn drop(&mut self) {
        self.0.set(0);
    }
}

//! What the controller counts.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

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

/// The metrics of the reconcilers and the webhook. Cheap to clone.
#[derive(Clone)]
pub struct Metrics {
    passes: Family<PassLabels, Counter<u64, AtomicU64>>,
    durations: Family<KindLabel, Histogram>,
    waiting: Gauge,
    reviews: Family<ReviewLabels, Counter<u64, AtomicU64>>,
}

impl Default for Metrics {
    fn default() -> Self {
        Metrics {
            passes: Family::default(),
            // 1 ms to 16 s: a pass is a few store calls, at worst a slow agent.
            durations: Family::new_with_constructor(|| Histogram::new(exponential_buckets(0.001, 2.0, 15))),
            waiting: Gauge::default(),
            reviews: Family::default(),
        }
    }
}

impl Metrics {
    /// Adds them to a registry.
    pub fn register(&self, registry: &mut Registry) {
        registry.register("reconcile_passes", "Passes over objects by kind and outcome", self.passes.clone());
        registry.register("reconcile_pass_seconds", "Duration of passes by kind", self.durations.clone());
        registry.register("reconcile_queue_length", "Objects that wait for a pass", self.waiting.clone());
        registry.register("webhook_reviews", "Answers of the webhook by operation and outcome", self.reviews.clone());
    }

    pub(crate) fn observe_pass(&self, kind: Kind, took: Duration, ok: bool) {
        let labels = PassLabels { kind: kind.as_str(), outcome: if ok { "ok" } else { "failed" } };
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
        let outcome = if allowed { "allowed" } else { "refused" };
        self.reviews.get_or_create(&ReviewLabels { operation, outcome }).inc();
    }

    pub(crate) fn observe_queue(&self, length: usize) {
        self.waiting.set(i64::try_from(length).unwrap_or(i64::MAX));
    }
}

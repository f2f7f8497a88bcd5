//! What the CSI services count.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use api::metrics::{CSI_CALL_SECONDS, CSI_CALLS, CSI_CALLS_IN_FLIGHT};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;
use runtime::metrics::add;
use tonic::Code;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CallLabels {
    method: &'static str,
    code: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct MethodLabel {
    method: &'static str,
}

/// The calls that [`crate::serve_controller`] answers.
pub(crate) const CONTROLLER: [&str; 11] = [
    "CreateVolume",
    "DeleteVolume",
    "ControllerPublishVolume",
    "ControllerUnpublishVolume",
    "ValidateVolumeCapabilities",
    "ListVolumes",
    "ControllerGetVolume",
    "ControllerListVolumeHealth",
    "ControllerGetVolumeHealth",
    "GetCapacity",
    "ControllerExpandVolume",
];

/// The calls that [`crate::serve_node`] answers.
pub(crate) const NODE: [&str; 7] = [
    "NodeStageVolume",
    "NodeUnstageVolume",
    "NodePublishVolume",
    "NodeUnpublishVolume",
    "NodeGetVolumeStats",
    "NodeGetVolumeHealth",
    "NodeExpandVolume",
];

/// The metrics of CSI calls. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Metrics {
    calls: Family<CallLabels, Counter<u64, AtomicU64>>,
    durations: Family<MethodLabel, Histogram, fn() -> Histogram>,
    in_flight: Gauge,
}

impl Default for Metrics {
    fn default() -> Self {
        // 4 ms to 131 s: from a look at a mount to the patience of a call that waits for an image.
        let durations: fn() -> Histogram = || Histogram::new(exponential_buckets(0.004, 2.0, 16));
        Metrics {
            calls: Family::default(),
            durations: Family::new_with_constructor(durations),
            in_flight: Gauge::default(),
        }
    }
}

impl Metrics {
    /// Adds them to a registry.
    pub fn register(&self, registry: &mut Registry) {
        add(registry, &CSI_CALLS, self.calls.clone());
        add(registry, &CSI_CALL_SECONDS, self.durations.clone());
        add(registry, &CSI_CALLS_IN_FLIGHT, self.in_flight.clone());
    }

    /// Shows these calls also before the first one comes.
    pub(crate) fn offer(&self, methods: &[&'static str]) {
        for method in methods {
            drop(self.calls.get_or_create(&CallLabels { method, code: format!("{:?}", Code::Ok) }));
            drop(self.durations.get_or_create(&MethodLabel { method }));
        }
    }

    /// Counts a call until the guard is dropped.
    pub(crate) fn begin(&self) -> InFlight {
        self.in_flight.inc();
        InFlight(self.in_flight.clone())
    }

    pub(crate) fn end(&self, method: &'static str, code: Code, took: Duration) {
        self.calls.get_or_create(&CallLabels { method, code: format!("{code:?}") }).inc();
        self.durations.get_or_create(&MethodLabel { method }).observe(took.as_secs_f64());
    }
}

pub(crate) struct InFlight(Gauge);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.dec();
    }
}

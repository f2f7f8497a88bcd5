//! Metrics of local workloads.

use std::fmt;
use std::sync::{Arc, Weak};

use api::metrics::WORKLOADS;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::registry::Registry;
use runtime::metrics::collect_gauges;

use super::{Inner, lock};
use crate::WorkloadState;

pub fn register(registry: &mut Registry, inner: &Arc<Inner>) {
    registry.register_collector(Box::new(States(Arc::downgrade(inner))));
}

/// Counts workloads when somebody asks.
struct States(Weak<Inner>);

impl fmt::Debug for States {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("States")
    }
}

impl Collector for States {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let Some(inner) = self.0.upgrade() else { return Ok(()) };
        let mut counts = [("starting", 0), ("running", 0), ("failed", 0), ("unknown", 0)];
        for entry in lock(&inner.entries).values() {
            let index = match entry.state {
                WorkloadState::Starting { .. } => 0,
                WorkloadState::Running => 1,
                WorkloadState::Failed { .. } => 2,
                WorkloadState::Unknown { .. } => 3,
            };
            counts[index].1 += 1;
        }
        collect_gauges(&mut encoder, &WORKLOADS, counts.map(|(state, count)| ([state], count)))
    }
}

//! Metrics of the embedded store.

use std::fmt;
use std::sync::{Arc, Weak};

use api::metrics::{STORE_COMMIT_SECONDS, STORE_OBJECTS};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;
use runtime::metrics::{add, collect_gauges};

use super::feed::Feed;

/// How long commits take: the time of one `fsync`, mostly. 0.25 ms to 4 s.
pub fn commit_seconds() -> Histogram {
    Histogram::new(exponential_buckets(0.000_25, 2.0, 15))
}

pub fn register(registry: &mut Registry, feed: &Arc<Feed>, commits: &Histogram) {
    add(registry, &STORE_COMMIT_SECONDS, commits.clone());
    registry.register_collector(Box::new(Objects(Arc::downgrade(feed))));
}

/// Counts objects when somebody asks.
struct Objects(Weak<Feed>);

impl fmt::Debug for Objects {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Objects")
    }
}

impl Collector for Objects {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let Some(feed) = self.0.upgrade() else { return Ok(()) };
        let counts = feed.counts();
        collect_gauges(
            &mut encoder,
            &STORE_OBJECTS,
            counts.iter().map(|(kind, count)| ([kind.as_str()], *count as u64)),
        )
    }
}

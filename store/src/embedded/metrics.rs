//! Metrics of the embedded store.

use std::fmt;
use std::sync::{Arc, Weak};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use super::feed::Feed;

/// How long commits take: the time of one `fsync`, mostly. 0.25 ms to 4 s.
pub fn commit_seconds() -> Histogram {
    Histogram::new(exponential_buckets(0.000_25, 2.0, 15))
}

pub fn register(registry: &mut Registry, feed: &Arc<Feed>, commits: &Histogram) {
    let help = "Time of a durable commit of one or more writes";
    registry.register_with_unit("store_commit", help, Unit::Seconds, commits.clone());
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
        let help = "Stored objects by kind";
        let mut objects = encoder.encode_descriptor("store_objects", help, None, MetricType::Gauge)?;
        for (kind, count) in feed.counts() {
            let count = ConstGauge::new(i64::try_from(count).unwrap_or(i64::MAX));
            count.encode(objects.encode_family(&[("kind", kind)])?)?;
        }
        Ok(())
    }
}

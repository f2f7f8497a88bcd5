//! One registry of metrics per process, rendered in the OpenMetrics text format.
//!
//! What there is to register stands in [`api::metrics`]: names, units and help come from there.

use std::fmt;
use std::sync::{Arc, Mutex};

use api::metrics::{Kind, Metric, PREFIX, Unit};
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{self, Registry};

/// The content type of [`Metrics::render`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// A shared registry whose names begin with [`PREFIX`]. Cheap to clone.
#[derive(Clone)]
pub struct Metrics(Arc<Mutex<Registry>>);

impl Default for Metrics {
    fn default() -> Self {
        Metrics(Arc::new(Mutex::new(Registry::with_prefix(PREFIX))))
    }
}

impl Metrics {
    /// Registers metrics; each crate does so once, in its `metrics.rs`.
    pub fn register(&self, add: impl FnOnce(&mut Registry)) {
        add(&mut self.0.lock().unwrap_or_else(|e| e.into_inner()));
    }

    /// All metrics as text.
    pub fn render(&self) -> String {
        let mut text = String::new();
        let registry = self.0.lock().unwrap_or_else(|e| e.into_inner());
        // Writing into a String cannot fail.
        let _ = prometheus_client::encoding::text::encode(&mut text, &registry);
        text
    }
}

fn unit(metric: &Metric) -> Option<registry::Unit> {
    match metric.unit {
        Unit::Nothing => None,
        Unit::Seconds => Some(registry::Unit::Seconds),
        Unit::Bytes => Some(registry::Unit::Bytes),
    }
}

/// Adds a declared metric to a registry.
pub fn add(registry: &mut Registry, declared: &Metric, metric: impl registry::Metric) {
    match unit(declared) {
        Some(unit) => registry.register_with_unit(declared.name, declared.help, unit, metric),
        None => registry.register(declared.name, declared.help, metric),
    }
}

/// Writes the figures of a declared metric whenever somebody asks.
pub fn collect(
    encoder: &mut DescriptorEncoder<'_>,
    declared: &Metric,
    figures: impl FnOnce(MetricEncoder<'_>) -> fmt::Result,
) -> fmt::Result {
    let kind = match declared.kind {
        Kind::Counter => MetricType::Counter,
        Kind::Gauge => MetricType::Gauge,
        Kind::Histogram => MetricType::Histogram,
    };
    let (unit, help) = (unit(declared), format!("{}.", declared.help));
    figures(encoder.encode_descriptor(declared.name, &help, unit.as_ref(), kind)?)
}

/// Writes a gauge for each value of its labels.
pub fn collect_gauges<'a, const N: usize>(
    encoder: &mut DescriptorEncoder<'_>,
    declared: &Metric,
    values: impl IntoIterator<Item = ([&'a str; N], u64)>,
) -> fmt::Result {
    collect(encoder, declared, |mut family| {
        for (labels, value) in values {
            let value = i64::try_from(value).unwrap_or(i64::MAX);
            if N == 0 {
                family.encode_gauge(&value)?;
                continue;
            }
            let labels: Vec<(&str, &str)> = declared.labels.iter().copied().zip(labels).collect();
            family.encode_family(&labels)?.encode_gauge(&value)?;
        }
        Ok(())
    })
}

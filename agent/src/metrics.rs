//! What an agent counts: one manager or one data source is one process, so its counters are the process's own.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use api::image::CopyState;
use api::metrics::{COPIES, Metric, RECEIVED, RETRIES, SENDS, SENT, SYNCS, VERIFIED, WRITTEN, WRONG_CHUNKS};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use runtime::metrics::{Metrics, collect, collect_gauges};

/// Something that only grows.
pub struct Count(AtomicU64);

impl Count {
    const fn new() -> Count {
        Count(AtomicU64::new(0))
    }

    pub fn add(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }
}

pub static RECEIVED_BYTES: Count = Count::new();
pub static WRITTEN_BYTES: Count = Count::new();
pub static SENT_BYTES: Count = Count::new();
pub static VERIFIED_BYTES: Count = Count::new();
pub static BROKEN_TRANSFERS: Count = Count::new();
pub static BAD_CHUNKS: Count = Count::new();

const OF_BOTH: [(&Metric, &Count); 3] =
    [(&RECEIVED, &RECEIVED_BYTES), (&WRITTEN, &WRITTEN_BYTES), (&RETRIES, &BROKEN_TRANSFERS)];
const OF_MANAGER: [(&Metric, &Count); 3] =
    [(&SENT, &SENT_BYTES), (&VERIFIED, &VERIFIED_BYTES), (&WRONG_CHUNKS, &BAD_CHUNKS)];

/// States of copies of which a manager tells.
const STATES: [CopyState; 7] = [
    CopyState::NotStarted,
    CopyState::Pending,
    CopyState::Starting,
    CopyState::InProgress,
    CopyState::Ready,
    CopyState::Failed,
    CopyState::Unknown,
];

/// What a manager says of itself.
pub(crate) struct Look {
    /// The state of each copy, and how often it is being sent.
    pub copies: Vec<(CopyState, u32)>,
    pub syncs: usize,
}

/// How to look at a manager; `None` once it has ended.
pub(crate) type Looking = dyn Fn() -> Option<Look> + Send + Sync;

/// What a data source shows.
pub(crate) fn of_data_source() -> Metrics {
    shown(None)
}

/// What a manager shows.
pub(crate) fn of_manager(look: impl Fn() -> Option<Look> + Send + Sync + 'static) -> Metrics {
    shown(Some(Box::new(look)))
}

fn shown(manager: Option<Box<Looking>>) -> Metrics {
    let metrics = Metrics::default();
    metrics.register(|registry| registry.register_collector(Box::new(Shown { manager })));
    metrics
}

struct Shown {
    manager: Option<Box<Looking>>,
}

impl fmt::Debug for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Shown")
    }
}

impl Collector for Shown {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut count = |(metric, count): (&Metric, &Count)| {
            let value = count.0.load(Ordering::Relaxed);
            collect(&mut encoder, metric, |mut e| e.encode_counter::<NoLabelSet, _, u64>(&value, None))
        };
        OF_BOTH.into_iter().try_for_each(&mut count)?;
        let Some(look) = &self.manager else { return Ok(()) };
        OF_MANAGER.into_iter().try_for_each(&mut count)?;
        let Some(Look { copies, syncs }) = look() else { return Ok(()) };
        let mut states: BTreeMap<&str, u64> = STATES.iter().map(|state| (name_of(*state), 0)).collect();
        for (state, _) in &copies {
            *states.entry(name_of(*state)).or_default() += 1;
        }
        let sends = copies.iter().map(|(_, sends)| u64::from(*sends)).sum();
        collect_gauges(&mut encoder, &COPIES, states.into_iter().map(|(state, count)| ([state], count)))?;
        collect_gauges(&mut encoder, &SYNCS, [([], syncs as u64)])?;
        collect_gauges(&mut encoder, &SENDS, [([], sends)])
    }
}

fn name_of(state: CopyState) -> &'static str {
    match state {
        CopyState::NotStarted => "not-started",
        state => state.as_str(),
    }
}

//! What the instance roles of a process count: one node's in Kubernetes, all nodes' in standalone mode.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use api::engine::InstanceState;
use api::metrics::{
    DEVICES, DISK_AVAILABLE, DISK_CAPACITY, ENGINE_REPLACEMENTS, ENGINES_SILENT, INSTANCES, IO_IN_FLIGHT,
    PROCESS_STARTS,
};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use runtime::metrics::{add, collect_gauges};

use crate::role::{Key, Role};

const ENGINE: &str = "engine";
const REPLICA: &str = "replica";

/// One state of one kind is one line, also at zero.
const STATES: [(InstanceState, &str); 6] = [
    (InstanceState::Stopped, "stopped"),
    (InstanceState::Starting, "starting"),
    (InstanceState::Running, "running"),
    (InstanceState::Stopping, "stopping"),
    (InstanceState::Error, "error"),
    (InstanceState::Unknown, "unknown"),
];

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabel {
    kind: &'static str,
}

/// The metrics of instance roles. Cheap to clone.
#[derive(Clone, Default)]
pub struct Metrics {
    starts: Family<KindLabel, Counter>,
    replacements: Counter,
    roles: Arc<Mutex<Vec<Weak<Role>>>>,
}

impl Metrics {
    /// Adds them to a registry.
    pub fn register(&self, registry: &mut Registry) {
        for kind in [ENGINE, REPLICA] {
            drop(self.starts.get_or_create(&KindLabel { kind }));
        }
        add(registry, &PROCESS_STARTS, self.starts.clone());
        add(registry, &ENGINE_REPLACEMENTS, self.replacements.clone());
        registry.register_collector(Box::new(Nodes(self.roles.clone())));
    }

    pub(crate) fn engine_started(&self) {
        self.starts.get_or_create(&KindLabel { kind: ENGINE }).inc();
    }

    pub(crate) fn replica_started(&self) {
        self.starts.get_or_create(&KindLabel { kind: REPLICA }).inc();
    }

    pub(crate) fn engines_replaced(&self, count: u32) {
        self.replacements.inc_by(count.into());
    }

    pub(crate) fn look_at(&self, role: &Arc<Role>) {
        self.roles.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::downgrade(role));
    }
}

/// Looks at the roles when somebody asks.
struct Nodes(Arc<Mutex<Vec<Weak<Role>>>>);

impl fmt::Debug for Nodes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Nodes")
    }
}

impl Collector for Nodes {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let roles: Vec<Arc<Role>> =
            self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().filter_map(Weak::upgrade).collect();
        let mut states: BTreeMap<[&str; 2], u64> = BTreeMap::new();
        for kind in [ENGINE, REPLICA] {
            states.extend(STATES.map(|(_, name)| ([kind, name], 0)));
        }
        let (mut silent, mut in_flight, mut devices) = (0, 0, 0);
        let mut disks = vec![];
        for role in &roles {
            let state = role.state();
            for (key, shown) in &state.shown {
                let kind = if matches!(key, Key::Engine(_)) { ENGINE } else { REPLICA };
                if let Some((_, name)) = STATES.iter().find(|(state, _)| *state == shown.state) {
                    *states.entry([kind, name]).or_default() += 1;
                }
                devices += u64::from(shown.has_device);
            }
            silent += state.engine_silence.len() as u64;
            in_flight += state.engine_status.values().map(|s| u64::from(s.in_flight)).sum::<u64>();
            let node = role.config.node.as_str();
            disks.extend(state.disks.iter().map(|(name, sizes)| ([node.to_owned(), name.clone()], *sizes)));
        }
        collect_gauges(&mut encoder, &INSTANCES, states)?;
        collect_gauges(&mut encoder, &ENGINES_SILENT, [([], silent)])?;
        collect_gauges(&mut encoder, &IO_IN_FLIGHT, [([], in_flight)])?;
        collect_gauges(&mut encoder, &DEVICES, [([], devices)])?;
        let sized = |size: fn(&(u64, u64)) -> u64| {
            disks.iter().map(move |(labels, sizes)| ([labels[0].as_str(), labels[1].as_str()], size(sizes)))
        };
        collect_gauges(&mut encoder, &DISK_CAPACITY, sized(|s| s.0))?;
        collect_gauges(&mut encoder, &DISK_AVAILABLE, sized(|s| s.1))
    }
}

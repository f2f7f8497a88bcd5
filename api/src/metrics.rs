//! Every metric that our processes show, declared once: they are registered from here, and `docs/metrics.md` is made of it.
//!
//! Names follow Prometheus: one prefix, base units, `_total` for what only grows. Labels are bounded, never a volume or an image.

use Kind::{Counter, Gauge, Histogram};
use Role::{Controller, DataSource, Instance, Manager, Node, Standalone};
use Unit::{Bytes, Nothing, Seconds};

/// What all names begin with.
pub const PREFIX: &str = "backing_image_csi";

/// How a metric behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows, and begins at 0 with the process.
    Counter,
    Gauge,
    Histogram,
}

impl Kind {
    /// As scrapes name it.
    pub fn as_str(self) -> &'static str {
        match self {
            Counter => "counter",
            Gauge => "gauge",
            Histogram => "histogram",
        }
    }
}

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Things.
    Nothing,
    Seconds,
    Bytes,
}

/// A process that shows metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Controller,
    Node,
    Instance,
    Manager,
    DataSource,
    Standalone,
}

impl Role {
    pub const ALL: [Role; 6] = [Controller, Node, Instance, Manager, DataSource, Standalone];

    /// The subcommand that runs it.
    pub fn as_str(self) -> &'static str {
        match self {
            Controller => "controller",
            Node => "node",
            Instance => "instance",
            Manager => "backing-image-manager",
            DataSource => "data-source",
            Standalone => "standalone",
        }
    }
}

/// One metric.
#[derive(Clone, Copy, Debug)]
pub struct Metric {
    /// Without prefix, unit and `_total`.
    pub name: &'static str,
    pub kind: Kind,
    pub unit: Unit,
    pub labels: &'static [&'static str],
    /// A sentence without a full stop.
    pub help: &'static str,
    pub roles: &'static [Role],
}

impl Metric {
    /// The name of its family in a scrape; counters end in `_total` there besides.
    pub fn family(&self) -> String {
        let unit = match self.unit {
            Nothing => "",
            Seconds => "_seconds",
            Bytes => "_bytes",
        };
        format!("{PREFIX}_{}{unit}", self.name)
    }

    /// The name to write in queries.
    pub fn query(&self) -> String {
        self.family() + if self.kind == Counter { "_total" } else { "" }
    }
}

macro_rules! declare {
    ($($constant:ident = $name:literal, $kind:ident, $unit:ident, [$($label:literal)*], [$($role:ident)*], $help:literal;)*) => {
        $(
            #[doc = $help]
            pub const $constant: Metric = Metric {
                name: $name, kind: $kind, unit: $unit, labels: &[$($label),*], help: $help, roles: &[$($role),*],
            };
        )*
        /// All of them, in the order of the documentation.
        pub const ALL: &[Metric] = &[$($constant),*];
    };
}

declare! {
    LEADER = "leader", Gauge, Nothing, [], [Controller Standalone],
        "1 while this process reconciles, 0 while another one does";
    RECONCILE_PASSES = "reconcile_passes", Counter, Nothing, ["kind" "outcome"], [Controller Standalone],
        "Passes over objects by kind and outcome (ok, failed)";
    RECONCILE_PASS_SECONDS = "reconcile_pass", Histogram, Seconds, ["kind"], [Controller Standalone],
        "Duration of passes over objects by kind";
    RECONCILE_QUEUE = "reconcile_queue_length", Gauge, Nothing, [], [Controller Standalone],
        "Objects that wait for a pass";
    ORPHANS = "orphans", Gauge, Nothing, [], [Controller Standalone],
        "Things on disks that belong to no image that exists";
    ORPHANS_REMOVED = "orphans_removed", Counter, Nothing, [], [Controller Standalone],
        "Things that belonged to no image that exists and were removed";
    WEBHOOK_REVIEWS = "webhook_reviews", Counter, Nothing, ["operation" "outcome"], [Controller],
        "Answers of the admission webhook by operation and outcome (allowed, refused)";
    CSI_CALLS = "calls", Counter, Nothing, ["method" "code"], [Controller Node Standalone],
        "Ended CSI calls by method and gRPC code";
    CSI_CALL_SECONDS = "call", Histogram, Seconds, ["method"], [Controller Node Standalone],
        "Duration of CSI calls by method";
    CSI_CALLS_IN_FLIGHT = "calls_in_flight", Gauge, Nothing, [], [Controller Node Standalone],
        "CSI calls that are being worked on";
    INSTANCES = "instances", Gauge, Nothing, ["kind" "state"], [Instance Standalone],
        "Engines and replicas of the node by state, as their status has it";
    PROCESS_STARTS = "process_starts", Counter, Nothing, ["kind"], [Instance Standalone],
        "Started processes of replicas and of engines with their holder";
    ENGINE_REPLACEMENTS = "engine_replacements", Counter, Nothing, [], [Instance Standalone],
        "Engines that took over from one that died or was upgraded, under users of the device";
    ENGINES_SILENT = "engines_silent", Gauge, Nothing, [], [Instance Standalone],
        "Engines that should serve and do not answer: their I/O waits";
    IO_IN_FLIGHT = "io_requests_in_flight", Gauge, Nothing, [], [Instance Standalone],
        "I/O requests that the engines of the node work on";
    DEVICES = "block_devices", Gauge, Nothing, [], [Instance Standalone],
        "Block devices of attached volumes";
    DISK_CAPACITY = "disk_capacity", Gauge, Bytes, ["node" "disk"], [Instance Standalone],
        "Size of each disk of the node";
    DISK_AVAILABLE = "disk_available", Gauge, Bytes, ["node" "disk"], [Instance Standalone],
        "Free room on each disk of the node, that which is reserved included";
    COPIES = "copies", Gauge, Nothing, ["state"], [Manager],
        "Copies of images on the disk by state";
    SYNCS = "syncs_in_flight", Gauge, Nothing, [], [Manager],
        "Copies that are being received from other managers";
    SENDS = "sends_in_flight", Gauge, Nothing, [], [Manager],
        "Requests of other managers for chunks that are being answered";
    RECEIVED = "received", Counter, Bytes, [], [Manager DataSource],
        "Bytes received of files, from the source or from other managers";
    WRITTEN = "written", Counter, Bytes, [], [Manager DataSource],
        "Bytes of files that were hashed and written";
    SENT = "sent", Counter, Bytes, [], [Manager],
        "Bytes of files that were sent to other managers";
    VERIFIED = "verified", Counter, Bytes, [], [Manager],
        "Bytes of ready copies that were read and compared with their manifest";
    RETRIES = "transfer_retries", Counter, Nothing, [], [Manager DataSource],
        "Requests for bytes of a file that broke and were, or would have been, tried again";
    WRONG_CHUNKS = "wrong_chunks", Counter, Nothing, [], [Manager],
        "Chunks of copies that did not match their manifest: received wrong, or damaged on the disk";
    WORKLOADS = "workloads", Gauge, Nothing, ["state"], [Standalone],
        "Processes of managers and data sources by state";
    STORE_COMMIT_SECONDS = "store_commit", Histogram, Seconds, [], [Standalone],
        "Time of a durable commit of one or more writes";
    STORE_OBJECTS = "store_objects", Gauge, Nothing, ["kind"], [Standalone],
        "Stored objects by kind";
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_are_those_of_prometheus() {
        let mut names = BTreeSet::new();
        for metric in ALL {
            let name = metric.query();
            assert!(names.insert(name.clone()), "{name} is declared twice");
            let letters = |text: &str| text.chars().all(|c| c.is_ascii_lowercase() || c == '_');
            assert!(letters(&name) && metric.labels.iter().all(|label| letters(label)), "{name}");
            for part in ["_total", "_seconds", "_bytes"] {
                assert!(!metric.name.ends_with(part), "{name}: the declaration adds {part}");
            }
            assert!(metric.kind != Histogram || metric.unit != Nothing, "{name} measures something");
            assert!(!metric.roles.is_empty() && !metric.help.ends_with('.'), "{name}");
        }
    }
}

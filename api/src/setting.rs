//! Setting: one global value, by Longhorn's name (LF 4.1).

mod about;

use std::borrow::Cow;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::{Deserialize, Serialize};

pub use self::about::{About, about};
use crate::source_address::{self, AllowedSources};
use crate::{Unknown, bandwidth};

/// A setting: `metadata.name` says which, `value` is its text. It has no `spec`, as in Longhorn.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Setting {
    #[serde(rename = "apiVersion", default = "api_version")]
    pub api_version: String,
    #[serde(default = "kind")]
    pub kind: String,
    pub metadata: ObjectMeta,
    #[serde(default)]
    pub value: String,
    #[serde(flatten)]
    pub other: Unknown,
}

fn api_version() -> String {
    format!("{}/{}", crate::names::GROUP, crate::names::VERSION)
}

fn kind() -> String {
    "Setting".into()
}

impl kube::Resource for Setting {
    type DynamicType = ();
    type Scope = kube::core::NamespaceResourceScope;

    fn kind(_: &()) -> Cow<'_, str> {
        "Setting".into()
    }
    fn group(_: &()) -> Cow<'_, str> {
        crate::names::GROUP.into()
    }
    fn version(_: &()) -> Cow<'_, str> {
        crate::names::VERSION.into()
    }
    fn plural(_: &()) -> Cow<'_, str> {
        "settings".into()
    }
    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }
    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

/// A setting that this version knows: its name, default and range.
#[derive(Clone, Copy, Debug)]
pub struct Known {
    pub name: &'static str,
    pub default: &'static str,
    /// What its value may be, a phrase for messages.
    pub rule: &'static str,
    check: fn(&str) -> bool,
}

impl Known {
    /// Whether a text is a legal value.
    pub fn accepts(&self, value: &str) -> bool {
        (self.check)(value)
    }
}

fn at_least_one(text: &str) -> bool {
    text.parse::<u32>().is_ok_and(|n| n >= 1)
}
fn whole_number(text: &str) -> bool {
    text.parse::<u32>().is_ok()
}
fn percent(text: &str) -> bool {
    text.parse::<u8>().is_ok_and(|n| n <= 100)
}
fn absolute_path(text: &str) -> bool {
    text.len() > 1 && text.starts_with('/')
}
fn cordon_policy(text: &str) -> bool {
    matches!(text, "ignore" | "evict")
}
fn boolean(text: &str) -> bool {
    matches!(text, "true" | "false")
}
fn bytes_per_second(text: &str) -> bool {
    bandwidth::parse(text).is_some()
}
fn addresses(text: &str) -> bool {
    text.parse::<AllowedSources>().is_ok()
}

/// Replicas of a volume that does not say how many.
pub const DEFAULT_REPLICA_COUNT: &str = "default-replica-count";
/// Copies of an image that does not say how many.
pub const DEFAULT_MIN_COPIES: &str = "default-min-number-of-backing-image-copies";
/// How many copies may be made on one node at a time without a replica asking; 0: none.
pub const REPLENISH_LIMIT: &str = "concurrent-backing-image-replenish-per-node-limit";
/// Minutes that an unused copy stays.
pub const CLEANUP_WAIT_INTERVAL: &str = "backing-image-cleanup-wait-interval";
/// Seconds before an image with failed copies only is prepared again.
pub const RECOVERY_WAIT_INTERVAL: &str = "backing-image-recovery-wait-interval";
/// Ours: seconds for which a copy that cannot be asked counts as one that is there, so that no other one is made.
pub const REPLENISH_WAIT_INTERVAL: &str = "backing-image-replenish-wait-interval";
/// Whether nothing is placed on a node that Kubernetes calls unschedulable (cordoned).
pub const DISABLE_SCHEDULING_ON_CORDONED_NODE: &str = "disable-scheduling-on-cordoned-node";
/// Ours: what becomes of the copies on a cordoned node: `ignore`, or `evict` as if its eviction were requested.
pub const CORDONED_NODE_POLICY: &str = "backing-image-cordoned-node-policy";
/// Whether an image or volume without node selector may use tagged nodes.
pub const ALLOW_EMPTY_NODE_SELECTOR: &str = "allow-empty-node-selector-volume";
/// Whether an image or volume without disk selector may use tagged disks.
pub const ALLOW_EMPTY_DISK_SELECTOR: &str = "allow-empty-disk-selector-volume";
/// Percent of a disk's size that may be promised.
pub const OVER_PROVISIONING: &str = "storage-over-provisioning-percentage";

/// Whether only nodes with the label `node.longhorn.io/create-default-disk` get disks by themselves.
pub const CREATE_DEFAULT_DISK_LABELED_NODES: &str = "create-default-disk-labeled-nodes";
/// The directory of the disk that a node gets by itself.
pub const DEFAULT_DATA_PATH: &str = "default-data-path";
/// Percent of that disk that are never promised to anybody.
pub const DEFAULT_DISK_RESERVED: &str = "storage-reserved-percentage-for-default-disk";

/// Ours: hours after which a copy that nobody verified is read in the background and compared with its manifest; 0: never.
pub const SCRUB_INTERVAL: &str = "backing-image-scrub-interval";
/// Ours: special addresses from which images may be fetched all the same (see [`crate::source_address`]).
pub const ALLOWED_SOURCE_ADDRESSES: &str = "backing-image-allowed-source-addresses";

/// Ours: whether what lies in the directories of images and belongs to no image that exists is removed, or only told.
pub const REMOVE_ORPHANS: &str = "orphan-backing-image-auto-deletion";

/// Ours: bytes a second that one disk sends to others altogether, and that one data source downloads; 0: no limit.
pub const BANDWIDTH_LIMIT: &str = "backing-image-bandwidth-limit";

/// Every setting that this version reads, with Longhorn's defaults.
pub const KNOWN: [Known; 18] = [
    Known { name: DEFAULT_REPLICA_COUNT, default: "3", rule: "a whole number, at least 1", check: at_least_one },
    Known { name: DEFAULT_MIN_COPIES, default: "3", rule: "a whole number, at least 1", check: at_least_one },
    Known { name: REPLENISH_LIMIT, default: "5", rule: "a whole number, 0 or more", check: whole_number },
    Known {
        name: CLEANUP_WAIT_INTERVAL,
        default: "60",
        rule: "minutes, a whole number, 0 or more",
        check: whole_number,
    },
    Known {
        name: RECOVERY_WAIT_INTERVAL,
        default: "300",
        rule: "seconds, a whole number, 0 or more",
        check: whole_number,
    },
    Known { name: ALLOW_EMPTY_NODE_SELECTOR, default: "true", rule: "true or false", check: boolean },
    Known { name: ALLOW_EMPTY_DISK_SELECTOR, default: "true", rule: "true or false", check: boolean },
    Known { name: OVER_PROVISIONING, default: "100", rule: "percent, a whole number, 0 or more", check: whole_number },
    Known { name: CREATE_DEFAULT_DISK_LABELED_NODES, default: "false", rule: "true or false", check: boolean },
    Known { name: DEFAULT_DATA_PATH, default: "/var/lib/longhorn", rule: "an absolute path", check: absolute_path },
    Known { name: DEFAULT_DISK_RESERVED, default: "30", rule: "percent, 0 to 100", check: percent },
    Known { name: SCRUB_INTERVAL, default: "168", rule: "hours, a whole number, 0 or more", check: whole_number },
    Known { name: ALLOWED_SOURCE_ADDRESSES, default: "", rule: source_address::RULE, check: addresses },
    Known {
        name: REPLENISH_WAIT_INTERVAL,
        default: "600",
        rule: "seconds, a whole number, 0 or more",
        check: whole_number,
    },
    Known { name: DISABLE_SCHEDULING_ON_CORDONED_NODE, default: "true", rule: "true or false", check: boolean },
    Known { name: CORDONED_NODE_POLICY, default: "ignore", rule: "ignore or evict", check: cordon_policy },
    Known { name: REMOVE_ORPHANS, default: "true", rule: "true or false", check: boolean },
    Known { name: BANDWIDTH_LIMIT, default: "0", rule: bandwidth::RULE, check: bytes_per_second },
];

/// The known setting of a name.
pub fn known(name: &str) -> Option<&'static Known> {
    KNOWN.iter().find(|k| k.name == name)
}

/// The value of a known setting among those that are stored: one that is absent or not legal has its default. Empty when none is known.
pub fn value<'a>(stored: &'a [Setting], name: &str) -> &'a str {
    let Some(known) = known(name) else { return "" };
    let found = stored.iter().find(|setting| setting.metadata.name.as_deref() == Some(name));
    found.map(|setting| setting.value.as_str()).filter(|value| known.accepts(value)).unwrap_or(known.default)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_stored_or_not_legal_has_its_default() {
        let stored =
            [(DEFAULT_REPLICA_COUNT, "2"), (DEFAULT_MIN_COPIES, "-1"), ("color", "red")].map(|(name, value)| {
                let mut setting = Setting { value: value.into(), ..Default::default() };
                setting.metadata.name = Some(name.into());
                setting
            });
        let values = [DEFAULT_REPLICA_COUNT, DEFAULT_MIN_COPIES, DEFAULT_DATA_PATH, "color"];
        assert_eq!(values.map(|name| value(&stored, name)), ["2", "3", "/var/lib/longhorn", ""]);
    }

    #[test]
    fn every_default_is_a_legal_value() {
        for k in &KNOWN {
            assert!(k.accepts(k.default), "{}", k.name);
        }
    }
}

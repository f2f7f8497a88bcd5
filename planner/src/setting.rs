//! The settings that decisions depend on.

use std::time::Duration;

use api::setting as name;
use api::source_address::AllowedSources;
use api::{Setting, bandwidth};

/// Parsed values; a missing or unreadable setting has its default.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    pub replica_count: u32,
    pub min_copies: u32,
    /// Copies that may be made on one node at a time without a replica asking; 0: none.
    pub replenish_limit: u32,
    pub cleanup_wait: Duration,
    pub recovery_wait: Duration,
    /// How long a copy that cannot be asked counts as one that is there.
    pub replenish_wait: Duration,
    /// Whether nothing is placed on a cordoned node.
    pub close_cordoned: bool,
    /// Whether the disks of a cordoned node shall be emptied.
    pub evict_cordoned: bool,
    pub allow_empty_node_selector: bool,
    pub allow_empty_disk_selector: bool,
    pub over_provisioning_percent: u32,
    /// How old the last verification of a copy may become; zero: no limit.
    pub scrub_interval: Duration,
    /// From which special addresses images may be fetched.
    pub allowed_sources: AllowedSources,
    /// Bytes a second that a disk sends, and that a data source downloads; 0: no limit.
    pub bandwidth_limit: u64,
    /// Whether what belongs to no image that exists is removed from disks.
    pub removes_orphans: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Settings::of(&[])
    }
}

impl Settings {
    /// The values of stored settings.
    pub fn of(settings: &[Setting]) -> Settings {
        let text = |name: &str| name::value(settings, name);
        let number = |name: &str| text(name).parse::<u32>().unwrap_or(0);
        Settings {
            replica_count: number(name::DEFAULT_REPLICA_COUNT),
            min_copies: number(name::DEFAULT_MIN_COPIES),
            replenish_limit: number(name::REPLENISH_LIMIT),
            cleanup_wait: Duration::from_secs(60 * u64::from(number(name::CLEANUP_WAIT_INTERVAL))),
            recovery_wait: Duration::from_secs(u64::from(number(name::RECOVERY_WAIT_INTERVAL))),
            replenish_wait: Duration::from_secs(u64::from(number(name::REPLENISH_WAIT_INTERVAL))),
            close_cordoned: text(name::DISABLE_SCHEDULING_ON_CORDONED_NODE) == "true",
            evict_cordoned: text(name::CORDONED_NODE_POLICY) == "evict",
            allow_empty_node_selector: text(name::ALLOW_EMPTY_NODE_SELECTOR) == "true",
            allow_empty_disk_selector: text(name::ALLOW_EMPTY_DISK_SELECTOR) == "true",
            over_provisioning_percent: number(name::OVER_PROVISIONING),
            scrub_interval: Duration::from_secs(3600 * u64::from(number(name::SCRUB_INTERVAL))),
            allowed_sources: AllowedSources::of(settings),
            bandwidth_limit: bandwidth::parse(text(name::BANDWIDTH_LIMIT)).unwrap_or(0),
            removes_orphans: text(name::REMOVE_ORPHANS) == "true",
        }
    }

    /// The settings that are not stored yet, with their defaults.
    pub fn missing(stored: &[Setting]) -> Vec<Setting> {
        let is_stored = |n: &str| stored.iter().any(|s| s.metadata.name.as_deref() == Some(n));
        name::KNOWN
            .iter()
            .filter(|known| !is_stored(known.name))
            .map(|known| {
                let mut setting = Setting { value: known.default.into(), ..Default::default() };
                setting.metadata.name = Some(known.name.into());
                setting
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored(name: &str, value: &str) -> Setting {
        let mut setting = Setting { value: value.into(), ..Default::default() };
        setting.metadata.name = Some(name.into());
        setting
    }

    #[test]
    fn takes_the_default_where_nothing_legal_is_stored() {
        let settings =
            Settings::of(&[stored(name::DEFAULT_MIN_COPIES, "-1"), stored(name::DEFAULT_REPLICA_COUNT, "2")]);
        assert_eq!((settings.min_copies, settings.replica_count), (3, 2));
        assert_eq!(settings.cleanup_wait, Duration::from_secs(3600));
        assert_eq!(settings.bandwidth_limit, 0);
        let limit = |text| Settings::of(&[stored(name::BANDWIDTH_LIMIT, text)]).bandwidth_limit;
        assert_eq!((limit("64Ki"), limit("100000"), limit("1")), (65536, 100_000, 0));
    }

    #[test]
    fn names_what_is_not_stored() {
        assert_eq!(Settings::missing(&[]).len(), name::KNOWN.len());
        assert!(Settings::missing(&Settings::missing(&[])).is_empty());
    }
}

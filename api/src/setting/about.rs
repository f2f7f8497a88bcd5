//! What each setting is to users: its type and what it does. `docs/settings.md` and the table of `get settings` are made of it.

use super::*;

/// What a user wants to know of a setting beside its default and range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct About {
    /// Of what type its text is.
    pub value: &'static str,
    /// What it does, a sentence without a full stop.
    pub effect: &'static str,
}

/// The description of a known setting.
pub fn about(name: &str) -> Option<About> {
    let about = |value, effect| Some(About { value, effect });
    match name {
        DEFAULT_REPLICA_COUNT => about("number", "Replicas of a volume that does not say how many"),
        DEFAULT_MIN_COPIES => about("number", "Copies of an image that does not say how many"),
        REPLENISH_LIMIT => {
            about("number", "How many copies may be made on one node at a time without a replica asking; 0: none")
        }
        CLEANUP_WAIT_INTERVAL => about("minutes", "How long an unused copy stays"),
        RECOVERY_WAIT_INTERVAL => {
            about("seconds", "How long an image all of whose copies have failed waits before it is prepared again")
        }
        ALLOW_EMPTY_NODE_SELECTOR => about("boolean", "Whether what has no node selector may use nodes with tags"),
        ALLOW_EMPTY_DISK_SELECTOR => about("boolean", "Whether what has no disk selector may use disks with tags"),
        OVER_PROVISIONING => about("percent", "How much of a disk's size may be promised"),
        CREATE_DEFAULT_DISK_LABELED_NODES => about(
            "boolean",
            "Whether only nodes with the label `node.longhorn.io/create-default-disk` get disks by themselves",
        ),
        DEFAULT_DATA_PATH => about("path", "The directory of the disk that a node gets by itself"),
        DEFAULT_DISK_RESERVED => about("percent", "How much of that disk is never promised to anybody"),
        SCRUB_INTERVAL => about(
            "hours",
            "After how long a copy that nobody verified is read in the background and compared with its manifest; 0: never",
        ),
        ALLOWED_SOURCE_ADDRESSES => about(
            "addresses",
            "Loopback, link-local and metadata addresses from which images may be fetched all the same (in standalone mode it begins as `127.0.0.0/8,::1`)",
        ),
        REPLENISH_WAIT_INTERVAL => about(
            "seconds",
            "How long a copy that cannot be asked counts as one that is there before another one is made",
        ),
        DISABLE_SCHEDULING_ON_CORDONED_NODE => {
            about("boolean", "Whether nothing new is placed on a node that Kubernetes calls unschedulable")
        }
        CORDONED_NODE_POLICY => about(
            "choice",
            "What becomes of the copies on a node that Kubernetes calls unschedulable: they stay, or move as under an eviction",
        ),
        REMOVE_ORPHANS => about(
            "boolean",
            "Whether what lies in the directories of images and belongs to no image that exists is removed, or only told",
        ),
        BANDWIDTH_LIMIT => about(
            "bytes a second",
            "How much one disk sends to others altogether, and how much each data source downloads; an image may have a lower one in `spec.bandwidthLimit`",
        ),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_setting_says_what_it_does() {
        for known in &KNOWN {
            let about = about(known.name).expect(known.name);
            assert!(!about.effect.ends_with('.') && !about.effect.contains('|'), "{}", known.name);
            assert!(!known.rule.contains('|'), "{}", known.name);
        }
        assert_eq!(about("color"), None);
    }
}

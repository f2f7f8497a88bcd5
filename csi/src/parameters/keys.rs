//! The table of keys: what each one is, and the check that nothing is ignored.

use std::collections::BTreeMap;

use api::validation::nearest;

use super::ParameterError;

/// What is done with a key.
#[derive(Clone, Copy, Debug)]
enum Rule {
    /// Read by name elsewhere in this module.
    Read,
    /// Longhorn knows `known`; we offer only `offered`, which all mean the same to us.
    Only { offered: &'static [&'static str], known: &'static [&'static str], what: &'static str },
    /// A switch; we offer only this position.
    Switch { offered: &'static [bool], what: &'static str },
    /// Must be absent or empty.
    Empty { what: &'static str },
    /// Read by the CSI sidecars, not by drivers; without effect here.
    Sidecar,
}

const TRI: &[&str] = &["ignored", "enabled", "disabled"];

/// Every key that may stand in a StorageClass.
const KEYS: &[(&str, Rule)] = &[
    ("backingImage", Rule::Read),
    ("backingImageName", Rule::Read),
    ("backingImageDataSourceType", Rule::Read),
    ("backingImageDataSourceParameters", Rule::Read),
    ("backingImageChecksum", Rule::Read),
    ("backingImageMinNumberOfCopies", Rule::Read),
    ("backingImageNodeSelector", Rule::Read),
    ("backingImageDiskSelector", Rule::Read),
    ("numberOfReplicas", Rule::Read),
    ("staleReplicaTimeout", Rule::Read),
    ("exclusive", Rule::Read),
    ("diskSelector", Rule::Read),
    ("nodeSelector", Rule::Read),
    ("fsType", Rule::Read),
    ("mkfsParams", Rule::Read),
    ("csi.storage.k8s.io/fstype", Rule::Read),
    ("share", Rule::Switch { offered: &[false], what: "volumes that several nodes use at once" }),
    ("migratable", Rule::Switch { offered: &[false], what: "live migration" }),
    ("encrypted", Rule::Switch { offered: &[false], what: "encrypted volumes" }),
    // Our replicas carry generations, which tell the current one with or without a counter.
    ("disableRevisionCounter", Rule::Switch { offered: &[true, false], what: "" }),
    (
        "dataLocality",
        Rule::Only {
            offered: &["disabled"],
            known: &["disabled", "best-effort", "strict-local"],
            what: "data locality",
        },
    ),
    (
        "replicaAutoBalance",
        Rule::Only {
            offered: &["ignored", "disabled"],
            known: &["ignored", "disabled", "least-effort", "best-effort"],
            what: "moving replicas by itself",
        },
    ),
    (
        "unmapMarkSnapChainRemoved",
        Rule::Only { offered: &["ignored", "disabled"], known: TRI, what: "removing snapshots on discard" },
    ),
    (
        "replicaSoftAntiAffinity",
        Rule::Only {
            offered: &["ignored", "enabled"],
            known: TRI,
            what: "never two replicas on one node; other nodes are preferred",
        },
    ),
    (
        "replicaZoneSoftAntiAffinity",
        Rule::Only { offered: &["ignored", "enabled"], known: TRI, what: "keeping replicas in distinct zones" },
    ),
    ("replicaDiskSoftAntiAffinity", Rule::Only { offered: TRI, known: TRI, what: "" }),
    (
        "freezeFilesystemForSnapshot",
        Rule::Only { offered: &["ignored", "disabled"], known: TRI, what: "freezing the filesystem for a snapshot" },
    ),
    ("fromBackup", Rule::Empty { what: "restoring a volume from a backup" }),
    ("backupTargetName", Rule::Only { offered: &["default"], known: &[], what: "backups" }),
    (
        "backupBlockSize",
        Rule::Only { offered: &["2Mi", "2097152", "0"], known: &["16Mi", "16777216"], what: "backups" },
    ),
    ("dataSource", Rule::Empty { what: "copying a volume or snapshot" }),
    ("cloneMode", Rule::Only { offered: &["full-copy"], known: &["full-copy", "linked-clone"], what: "linked clones" }),
    ("recurringJobSelector", Rule::Only { offered: &["[]"], known: &[], what: "recurring jobs" }),
    ("dataEngine", Rule::Only { offered: &["v1"], known: &["v1", "v2"], what: "the v2 data engine" }),
    ("dataLayout.type", Rule::Empty { what: "data layouts" }),
    ("dataLayout.mode", Rule::Empty { what: "data layouts" }),
    ("dataLayout.dataChunks", Rule::Only { offered: &["0"], known: &[], what: "data layouts" }),
    ("dataLayout.parityChunks", Rule::Only { offered: &["0"], known: &[], what: "data layouts" }),
    ("dataLayout.stripSizeKB", Rule::Only { offered: &["0"], known: &[], what: "data layouts" }),
    ("ublkNumberOfQueue", Rule::Only { offered: &["0"], known: &[], what: "the v2 data engine" }),
    ("ublkQueueDepth", Rule::Only { offered: &["0"], known: &[], what: "the v2 data engine" }),
    ("nvmeTcpNrIoQueues", Rule::Only { offered: &["0"], known: &[], what: "the v2 data engine" }),
    (
        "frontend",
        Rule::Only {
            offered: &["blockdev"],
            known: &["blockdev", "iscsi", "nvmf", "ublk"],
            what: "other frontends than blockdev",
        },
    ),
    ("strictTopology", Rule::Switch { offered: &[false], what: "pinning volumes to a place" }),
    (
        "volumeTopology",
        Rule::Only { offered: &["any"], known: &["any", "zonal", "regional"], what: "pinning volumes to a place" },
    ),
    ("storageCapacityMode", Rule::Only { offered: &["node"], known: &["node", "zone"], what: "capacity by zone" }),
    ("nfsOptions", Rule::Empty { what: "volumes that several nodes use at once" }),
    ("shareManagerNodeSelector", Rule::Empty { what: "volumes that several nodes use at once" }),
    ("shareManagerTolerations", Rule::Empty { what: "volumes that several nodes use at once" }),
    ("csi.storage.k8s.io/pvc/name", Rule::Sidecar),
    ("csi.storage.k8s.io/pvc/namespace", Rule::Sidecar),
    ("csi.storage.k8s.io/pv/name", Rule::Sidecar),
    ("csi.storage.k8s.io/provisioner-secret-name", Rule::Sidecar),
    ("csi.storage.k8s.io/provisioner-secret-namespace", Rule::Sidecar),
    ("csi.storage.k8s.io/controller-publish-secret-name", Rule::Sidecar),
    ("csi.storage.k8s.io/controller-publish-secret-namespace", Rule::Sidecar),
    ("csi.storage.k8s.io/node-stage-secret-name", Rule::Sidecar),
    ("csi.storage.k8s.io/node-stage-secret-namespace", Rule::Sidecar),
    ("csi.storage.k8s.io/node-publish-secret-name", Rule::Sidecar),
    ("csi.storage.k8s.io/node-publish-secret-namespace", Rule::Sidecar),
    ("csi.storage.k8s.io/controller-expand-secret-name", Rule::Sidecar),
    ("csi.storage.k8s.io/controller-expand-secret-namespace", Rule::Sidecar),
    ("csi.storage.k8s.io/node-expand-secret-name", Rule::Sidecar),
    ("csi.storage.k8s.io/node-expand-secret-namespace", Rule::Sidecar),
];

/// Refuses unknown keys and values that are wrong or not offered. Keys with [`Rule::Read`] are judged where they are read.
pub fn check(given: &BTreeMap<String, String>) -> Result<(), ParameterError> {
    for (key, value) in given {
        let Some((_, rule)) = KEYS.iter().find(|(known, _)| known == key) else {
            let hint = match nearest(key, KEYS.iter().map(|(known, _)| *known)) {
                Some(known) => format!("did you mean `{known}`?"),
                None => "remove it; the documentation lists every parameter".to_owned(),
            };
            return Err(ParameterError::Unknown { key: key.clone(), hint });
        };
        let wrong = |right: String| Err(ParameterError::Wrong { key: key.clone(), value: value.clone(), right });
        let not_offered =
            |what, instead| Err(ParameterError::NotOffered { key: key.clone(), value: value.clone(), what, instead });
        let text = value.trim();
        match *rule {
            Rule::Read | Rule::Sidecar => {}
            Rule::Switch { offered, what } => match switch(text) {
                None => return wrong("`true` or `false`".into()),
                Some(on) if !offered.contains(&on) => {
                    return not_offered(what, format!("use `{}`, or remove the parameter", !on));
                }
                Some(_) => {}
            },
            Rule::Only { offered, .. } if text.is_empty() || offered.contains(&text) => {}
            Rule::Only { offered, known, what } => {
                if !known.is_empty() && !known.contains(&text) {
                    return wrong(alternatives(offered));
                }
                return not_offered(what, format!("use {}, or remove it", alternatives(offered)));
            }
            Rule::Empty { what } => {
                if !text.is_empty() {
                    return not_offered(what, "remove it".into());
                }
            }
        }
    }
    Ok(())
}

fn alternatives(values: &[&str]) -> String {
    values.iter().map(|v| format!("`{v}`")).collect::<Vec<_>>().join(" or ")
}

/// The position of a switch, in every form that Longhorn takes.
pub fn switch(text: &str) -> Option<bool> {
    match text.trim() {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_key_stands_twice() {
        let names: std::collections::BTreeSet<_> = KEYS.iter().map(|(k, _)| k).collect();
        assert_eq!(names.len(), KEYS.len());
    }

    #[test]
    fn every_key_is_accepted_when_it_says_nothing() {
        for (key, rule) in KEYS {
            let value = match rule {
                Rule::Switch { offered, .. } => offered[0].to_string(),
                _ => String::new(),
            };
            assert_eq!(check(&BTreeMap::from([(key.to_string(), value)])), Ok(()), "{key}");
        }
    }
}

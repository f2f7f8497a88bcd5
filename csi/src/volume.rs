//! A volume's id, and how CSI sees a Volume object.

use api::ids::VolumeName;
use api::volume::{Robustness, VolumeState};
use api::{Condition, Volume, condition};
use aws_lc_rs::digest;
use kube::ResourceExt;
use proto::csi;
use proto::csi::volume_health::VolumeHealthEntry;

use crate::CsiError;

/// Longest name that becomes an id as it is (LF 2.2).
const LONGEST_PLAIN_NAME: usize = 40;

/// The id of the volume with a name, as Longhorn makes it: lower case, and a long name is cut and ends in digits of its SHA-512.
pub fn id_of(name: &str) -> Result<VolumeName, CsiError> {
    if name.is_empty() {
        return Err(CsiError::Missing { field: "name" });
    }
    let lower = name.to_lowercase();
    let id = if lower.len() <= LONGEST_PLAIN_NAME {
        lower
    } else {
        let mut head: String = lower.chars().take(31).collect();
        head.truncate(head.trim_end_matches('-').len());
        let digest = digest::digest(&digest::SHA512, name.as_bytes());
        format!("{head}-{}", hex::encode(&digest.as_ref()[..4]))
    };
    id.parse().map_err(|_| CsiError::Field {
        field: "name",
        value: name.to_owned(),
        right: "of a-z 0-9 . -, beginning with a letter or digit",
    })
}

/// A volume in an answer.
pub fn describe(volume: &Volume) -> csi::Volume {
    csi::Volume {
        volume_id: volume.name_any(),
        capacity_bytes: i64::try_from(volume.spec.size.0).unwrap_or(i64::MAX),
        volume_context: volume.spec.parameters.clone().into_iter().collect(),
        // Every node reaches every replica, so no node is excluded.
        accessible_topology: vec![],
        content_source: None,
    }
}

/// The nodes that it is attached to.
pub fn published_nodes(volume: &Volume) -> Vec<String> {
    let attached = volume.status.as_ref().filter(|s| s.state == VolumeState::Attached);
    attached.map(|s| s.current_node_id.clone()).filter(|n| !n.is_empty()).into_iter().collect()
}

/// The condition of a type, when it is true.
pub fn true_condition<'a>(volume: &'a Volume, r#type: &str) -> Option<&'a Condition> {
    condition::find(&volume.status.as_ref()?.conditions, r#type).filter(|c| c.is_true())
}

/// What a volume says it waits for, in its own words, with what the user can do.
pub fn unmet(volume: &Volume) -> Option<String> {
    use api::names::condition::{BACKING_IMAGE_INCOMPATIBLE, DETACHED, READY, SCHEDULED, WAIT_FOR_BACKING_IMAGE};
    let conditions = &volume.status.as_ref()?.conditions;
    let ill = |r#type: &str, when: bool| {
        condition::find(conditions, r#type).filter(|c| c.is_true() == when && !c.message.is_empty())
    };
    let condition = ill(BACKING_IMAGE_INCOMPATIBLE, true)
        .or_else(|| ill(SCHEDULED, false))
        .or_else(|| ill(WAIT_FOR_BACKING_IMAGE, true))
        .or_else(|| ill(DETACHED, false).filter(|_| volume.spec.node_id.is_empty()))
        .or_else(|| ill(READY, false))?;
    Some(in_words(condition))
}

/// A condition in one line: its message, the next attempt, what the user can do.
pub fn in_words(condition: &Condition) -> String {
    let mut text = condition.message.lines().map(str::trim).collect::<Vec<_>>().join("; ");
    if !condition.next_retry_time.is_empty() {
        text += &format!(", next attempt at {}", condition.next_retry_time);
    }
    if !condition.hint.is_empty() {
        text += &format!(" ({})", condition.hint);
    }
    text
}

/// The problems of a volume, none when it is well. A volume that waits for its image is not ill.
pub fn health(volume: &Volume) -> csi::VolumeHealth {
    let mut entries = vec![];
    let mut add = |status: csi::VolumeHealthErrorType, reason: &str, message: String| {
        entries.push(VolumeHealthEntry { status: status.into(), reason: reason.to_owned(), message });
    };
    if let Some(status) = &volume.status {
        let ready = condition::find(&status.conditions, api::names::condition::READY);
        let why = |otherwise: &str| {
            ready.map(|c| c.message.clone()).filter(|m| !m.is_empty()).unwrap_or_else(|| otherwise.to_owned())
        };
        match status.robustness {
            Robustness::Degraded => add(
                csi::VolumeHealthErrorType::Degraded,
                "ReplicasMissing",
                why("some of its replicas are missing or stale; the others hold every acknowledged write"),
            ),
            Robustness::Faulted => add(
                csi::VolumeHealthErrorType::Inaccessible,
                "NoReplica",
                why("no current replica can be reached; the data is left as it is"),
            ),
            Robustness::Healthy | Robustness::Unknown => {}
        }
    }
    if let Some(condition) = true_condition(volume, api::names::condition::BACKING_IMAGE_INCOMPATIBLE) {
        add(csi::VolumeHealthErrorType::Inaccessible, "BackingImageIncompatible", condition.message.clone());
    }
    csi::VolumeHealth { volume_id: volume.name_any(), health_statuses: entries }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_names_become_short_ids_that_stay_apart() {
        assert_eq!(id_of("Sanity-1").unwrap().as_str(), "sanity-1");
        let plain = "pvc-0123456789abcdef-0123456789abcdef-01";
        assert_eq!(id_of(plain).unwrap().as_str(), plain);
        let (one, two) = ("x".repeat(30) + "-" + &"a".repeat(97), "x".repeat(30) + "-" + &"b".repeat(97));
        let (one, two) = (id_of(&one).unwrap(), id_of(&two).unwrap());
        assert!(one != two && one.as_str().starts_with(&("x".repeat(30) + "-")) && one.as_str().len() == 39);
        assert!(matches!(id_of(""), Err(CsiError::Missing { .. })));
        assert!(id_of("../etc").is_err());
        assert!(id_of(&"ä".repeat(50)).is_err());
    }

    #[test]
    fn says_what_is_wrong_with_a_volume() {
        let mut volume = Volume::new("v", Default::default());
        assert!(health(&volume).health_statuses.is_empty());
        let mut status = api::volume::VolumeStatus { robustness: Robustness::Degraded, ..Default::default() };
        volume.status = Some(status.clone());
        assert_eq!(health(&volume).health_statuses[0].status(), csi::VolumeHealthErrorType::Degraded);
        status.robustness = Robustness::Faulted;
        status.conditions =
            vec![Condition::new("Ready", api::ConditionStatus::False, "Faulted", "both disks are gone")];
        volume.status = Some(status);
        let entry = &health(&volume).health_statuses[0];
        assert_eq!(
            (entry.status(), entry.message.as_str()),
            (csi::VolumeHealthErrorType::Inaccessible, "both disks are gone")
        );
    }
}

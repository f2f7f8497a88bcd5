//! Two disks with one UUID: a disk that was copied together with its file, or a directory that two entries name. One has it, and the
//! others say so: nothing is placed on them, and what lies there belongs to nobody.
//!
//! Who had it first keeps it, so that a machine made from another one's disks takes nothing away. A disk that was moved is known where it
//! is while its former place says nothing; one that was found to be the other one of two waits until nobody else names the UUID.

use api::names::condition::READY;
use api::node::DiskStatus;
use api::{Node, condition};
use jiff::Timestamp;

/// Reason of the disk that yields.
pub const SAME_UUID: &str = "SameUUID";

/// A disk that names a UUID for its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    pub node: String,
    pub disk: String,
    uuid: String,
    standing: Standing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Standing {
    /// It works, since then.
    Works(Timestamp),
    /// It did not work when it was reported last, and does now.
    Back,
    /// It is seen for the first time.
    New,
    /// It had the UUID when it was seen last, and does not work or does not answer.
    Away,
    /// It was found to be the other one of two.
    Yielded,
}

impl Claim {
    /// That of a disk that holds `uuid` now; `before` is what was reported of it last.
    pub fn of(node: &str, disk: &str, uuid: &str, before: Option<&DiskStatus>) -> Claim {
        let standing = before.map_or(Standing::New, |before| standing(before, uuid));
        Claim { node: node.to_owned(), disk: disk.to_owned(), uuid: uuid.to_owned(), standing }
    }

    /// That of a disk that cannot be looked at, if it had a UUID.
    pub fn of_absent(node: &str, disk: &str, before: &DiskStatus) -> Option<Claim> {
        let claim = Claim::of(node, disk, &before.disk_uuid, Some(before));
        let is_held = !claim.uuid.is_empty() && claim.standing != Standing::Yielded;
        is_held.then_some(Claim { standing: Standing::Away, ..claim })
    }

    /// Those that a Node object tells of.
    pub fn of_node(node: &Node) -> Vec<Claim> {
        let name = node.metadata.name.as_deref().unwrap_or_default();
        let Some(status) = &node.status else { return vec![] };
        let answers = condition::find(&status.conditions, READY).is_some_and(|ready| ready.is_true());
        let told = |(disk, seen): (&String, &DiskStatus)| {
            let claim = Claim::of(name, disk, &seen.disk_uuid, Some(seen));
            let works = answers && matches!(claim.standing, Standing::Works(_));
            if works { Some(claim) } else { Claim::of_absent(name, disk, seen) }
        };
        let disks = status.disk_status.iter().filter(|(disk, _)| node.spec.disks.contains_key(*disk));
        disks.filter_map(told).collect()
    }

    /// Who keeps the UUID, when it is not this one.
    pub fn yields_to<'a>(&self, all: impl IntoIterator<Item = &'a Claim>) -> Option<&'a Claim> {
        let others = all.into_iter().filter(|other| other.uuid == self.uuid && other.place() != self.place());
        let keeps = |other: &&Claim| match (self.standing, other.standing) {
            (_, Standing::Yielded) => self.standing == Standing::Yielded && other.place() < self.place(),
            (Standing::Yielded, _) => true,
            (_, Standing::Away) => false,
            _ => (other.standing, other.place()) < (self.standing, self.place()),
        };
        others.filter(keeps).min_by_key(|other| (other.standing, other.place()))
    }

    fn place(&self) -> (&str, &str) {
        (&self.node, &self.disk)
    }
}

fn standing(before: &DiskStatus, uuid: &str) -> Standing {
    let ready = condition::find(&before.conditions, READY);
    if ready.is_some_and(|ready| ready.reason == SAME_UUID) {
        return Standing::Yielded;
    }
    if before.disk_uuid != uuid {
        return Standing::New;
    }
    match ready.filter(|ready| ready.is_true()) {
        Some(ready) => Standing::Works(ready.last_transition_time.parse().unwrap_or(Timestamp::MIN)),
        None => Standing::Back,
    }
}

#[cfg(test)]
mod tests {
    use api::{Condition, ConditionStatus};

    use super::*;

    const MAY: &str = "2026-05-01T00:00:00.5Z";
    const JUNE: &str = "2026-06-01T00:00:00Z";

    /// The status of a disk: `works`, `away`, or `yielded`, since then.
    fn seen(uuid: &str, how: &str, since: &str) -> DiskStatus {
        let (is_ready, reason) = match how {
            "works" => (ConditionStatus::True, "Ready"),
            "away" => (ConditionStatus::Unknown, "NotAnswering"),
            _ => (ConditionStatus::False, SAME_UUID),
        };
        let mut ready = Condition::new(READY, is_ready, reason, "");
        ready.last_transition_time = since.into();
        DiskStatus { disk_uuid: uuid.into(), conditions: vec![ready], ..DiskStatus::default() }
    }

    fn node(name: &str, answers: bool, disk: &str, seen: DiskStatus) -> Node {
        let mut node = Node::new(name, Default::default());
        let status = node.status.get_or_insert_default();
        let answers = if answers { ConditionStatus::True } else { ConditionStatus::Unknown };
        status.conditions.push(Condition::new(READY, answers, "", ""));
        status.disk_status.insert(disk.into(), seen);
        node.spec.disks.insert(disk.into(), Default::default());
        node
    }

    fn keeper(me: &Claim, all: &[Claim]) -> String {
        me.yields_to(all).map_or_else(|| "itself".to_owned(), |other| format!("{} of {}", other.disk, other.node))
    }

    /// Who keeps UUID `x` between a disk of n1 and the others.
    fn decided(before: Option<&DiskStatus>, others: &[Node]) -> String {
        let others: Vec<Claim> = others.iter().flat_map(Claim::of_node).collect();
        keeper(&Claim::of("n1", "a", "x", before), &others)
    }

    #[test]
    fn who_has_had_a_disk_for_longest_keeps_its_uuid() {
        let old = [node("n5", true, "a", seen("x", "works", MAY))];
        assert_eq!(decided(None, &old), "a of n5", "the name of a newcomer decides nothing");
        assert_eq!(decided(Some(&seen("other", "works", MAY)), &old), "a of n5", "it held another disk before");
        // Both came to have it before they saw each other.
        assert_eq!(decided(Some(&seen("x", "works", JUNE)), &old), "a of n5");
        assert_eq!(
            decided(Some(&seen("x", "works", MAY)), &[node("n5", true, "a", seen("x", "works", JUNE))]),
            "itself"
        );
        assert_eq!(decided(None, &[node("n5", true, "a", seen("y", "works", MAY))]), "itself");
        // Taken off its node.
        let [off] = old;
        assert_eq!(decided(None, &[Node { spec: Default::default(), ..off }]), "itself");
    }

    #[test]
    fn a_copy_of_a_disk_does_not_take_its_place_while_that_is_away() {
        let away = [node("n5", true, "a", seen("x", "away", MAY)), node("n5", false, "a", seen("x", "works", MAY))];
        for away in away {
            let away = [away];
            assert_eq!(decided(None, &away), "itself", "a disk that was moved");
            assert_eq!(decided(Some(&seen("", "yielded", MAY)), &away), "a of n5");
            assert_eq!(decided(Some(&seen("x", "yielded", MAY)), &away), "a of n5");
        }
        assert_eq!(decided(Some(&seen("x", "yielded", MAY)), &[]), "itself", "nobody else names it any more");
        // The one that was away is back, and its copy still waits.
        let copy = [node("n5", true, "a", seen("x", "yielded", MAY))];
        assert_eq!(decided(Some(&seen("x", "away", JUNE)), &copy), "itself");
        // It was moved meanwhile: who has it keeps it.
        let moved = [node("n5", true, "a", seen("x", "works", JUNE))];
        assert_eq!(decided(Some(&seen("x", "away", MAY)), &moved), "a of n5");
    }

    #[test]
    fn of_two_alike_the_first_name_keeps_it() {
        for before in [None, Some(seen("", "yielded", MAY)), Some(seen("x", "works", MAY))] {
            let both = ["a", "b"].map(|disk| Claim::of("n1", disk, "x", before.as_ref()));
            assert_eq!((keeper(&both[0], &both).as_str(), keeper(&both[1], &both).as_str()), ("itself", "a of n1"));
        }
        // One of them was there before.
        let both = [Claim::of("n1", "a", "x", None), Claim::of("n1", "b", "x", Some(&seen("x", "away", MAY)))];
        assert_eq!((keeper(&both[0], &both).as_str(), keeper(&both[1], &both).as_str()), ("b of n1", "itself"));
    }
}

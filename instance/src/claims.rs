//! Two disks with one UUID: a disk that was copied together with its file, or a directory that two entries name. One has it, and the
//! others say so: nothing is placed on them, and what lies there belongs to nobody.
//!
//! Who has had it for longest keeps it, so that a machine made from another one's disks takes nothing away.

use api::names::condition::READY;
use api::node::DiskStatus;
use api::{Node, condition};
use jiff::Timestamp;

/// A disk that works and has that UUID. The smaller one of two keeps it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Claim {
    /// [`Timestamp::MAX`]: it is seen for the first time.
    since: Timestamp,
    pub node: String,
    pub disk: String,
    uuid: String,
}

impl Claim {
    /// That of a disk that holds `uuid` now; `before` is what was reported of it last.
    pub fn of(node: &str, disk: &str, uuid: &str, before: Option<&DiskStatus>) -> Claim {
        let known = before.filter(|status| status.disk_uuid == uuid).and_then(since);
        let since = known.unwrap_or(Timestamp::MAX);
        Claim { since, node: node.to_owned(), disk: disk.to_owned(), uuid: uuid.to_owned() }
    }

    /// Those of a node that answers.
    pub fn of_node(node: &Node) -> Vec<Claim> {
        let name = node.metadata.name.as_deref().unwrap_or_default();
        let Some(status) = &node.status else { return vec![] };
        if !condition::find(&status.conditions, READY).is_some_and(|ready| ready.is_true()) {
            return vec![];
        }
        let disks = status.disk_status.iter().filter(|(disk, _)| node.spec.disks.contains_key(*disk));
        let claims = disks.map(|(disk, status)| Claim::of(name, disk, &status.disk_uuid, Some(status)));
        claims.filter(|claim| claim.since != Timestamp::MAX && !claim.uuid.is_empty()).collect()
    }

    /// Who keeps the UUID, when it is not this one.
    pub fn yields_to<'a>(&self, all: impl IntoIterator<Item = &'a Claim>) -> Option<&'a Claim> {
        all.into_iter().filter(|other| other.uuid == self.uuid && *other < self).min()
    }
}

/// Since when a disk works.
fn since(status: &DiskStatus) -> Option<Timestamp> {
    let ready = condition::find(&status.conditions, READY).filter(|ready| ready.is_true())?;
    Some(ready.last_transition_time.parse().unwrap_or(Timestamp::MIN))
}

#[cfg(test)]
mod tests {
    use api::{Condition, ConditionStatus};

    use super::*;

    fn node(name: &str, answers: bool, disks: &[(&str, &str, ConditionStatus, &str)]) -> Node {
        let mut node = Node::new(name, Default::default());
        let status = node.status.get_or_insert_default();
        let answers = if answers { ConditionStatus::True } else { ConditionStatus::Unknown };
        status.conditions.push(Condition::new(READY, answers, "", ""));
        for (disk, uuid, works, since) in disks {
            let mut ready = Condition::new(READY, *works, "", "");
            ready.last_transition_time = (*since).into();
            let seen = DiskStatus { disk_uuid: (*uuid).into(), conditions: vec![ready], ..DiskStatus::default() };
            status.disk_status.insert((*disk).into(), seen);
            node.spec.disks.insert((*disk).into(), Default::default());
        }
        node
    }

    fn keeps(me: &Claim, all: &[Claim]) -> String {
        me.yields_to(all).map_or_else(|| "itself".to_owned(), |other| format!("{} of {}", other.disk, other.node))
    }

    const MAY: &str = "2026-05-01T00:00:00.5Z";
    const JUNE: &str = "2026-06-01T00:00:00Z";

    #[test]
    fn who_has_had_a_disk_for_longest_keeps_its_uuid() {
        use ConditionStatus::{False, True, Unknown};
        let old = Claim::of_node(&node("n5", true, &[("a", "x", True, MAY), ("b", "y", True, MAY)]));
        assert_eq!(old.len(), 2);
        let new = Claim::of("n1", "a", "x", None);
        assert_eq!(keeps(&new, &old), "a of n5", "the name of a newcomer decides nothing");
        assert_eq!(keeps(&Claim::of("n1", "a", "z", None), &old), "itself");
        // Both came to have it at nearly the same time, before they saw each other.
        let late = Claim::of_node(&node("n1", true, &[("a", "x", True, JUNE)]));
        let both = [old.clone(), late.clone()].concat();
        assert_eq!((keeps(&late[0], &both).as_str(), keeps(&old[0], &both).as_str()), ("a of n5", "itself"));
        // What does not answer, does not work, or was taken off its node has nothing.
        for other in [
            node("n5", false, &[("a", "x", True, MAY)]),
            node("n5", true, &[("a", "x", False, MAY)]),
            node("n5", true, &[("a", "x", Unknown, MAY)]),
            Node { spec: Default::default(), ..node("n5", true, &[("a", "x", True, MAY)]) },
        ] {
            assert_eq!(keeps(&new, &Claim::of_node(&other)), "itself", "{other:?}");
        }
    }

    #[test]
    fn of_two_new_ones_the_first_name_keeps_it() {
        let both = ["a", "b"].map(|disk| Claim::of("n1", disk, "x", None));
        assert_eq!((keeps(&both[0], &both).as_str(), keeps(&both[1], &both).as_str()), ("itself", "a of n1"));
        // One that held another disk before is as new.
        let mut before = node("n1", true, &[("a", "other", ConditionStatus::True, MAY)]).status.unwrap().disk_status;
        assert_eq!(Claim::of("n1", "a", "x", before.remove("a").as_ref()), both[0]);
    }
}

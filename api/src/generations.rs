//! Whose records count: the rule of generations that the controller and engines share (`ARCHITECTURE.md`, "Generations", 1 and 3).

use std::collections::BTreeSet;

/// How many generations an attachment has for itself; far more than its engines and their fences can use up.
///
/// They begin at the attachment's number times this, so whatever a later attachment records is above all that an earlier one
/// can still come to, also when nobody knows that the earlier one lives.
pub const GENERATIONS_OF_AN_ATTACHMENT: u64 = 1_000_000;

/// The attachment that a generation belongs to; 0: before attachments were counted.
pub fn attachment_of(generation: u64) -> u64 {
    generation / GENERATIONS_OF_AN_ATTACHMENT
}

/// What a replica's record tells.
#[derive(Clone, Debug)]
pub struct Entry<'a> {
    pub name: &'a str,
    /// 0: it was never part of an attachment.
    pub generation: u64,
    /// The replicas that were in sync when that generation began.
    pub members: BTreeSet<&'a str>,
}

impl<'a> Entry<'a> {
    /// What the record of that replica tells.
    pub fn new(name: &'a str, generation: u64, members: impl IntoIterator<Item = &'a String>) -> Entry<'a> {
        Entry { name, generation, members: members.into_iter().map(String::as_str).collect() }
    }
}

/// What the highest of some records tell.
#[derive(Clone, Debug)]
pub struct Newest<'a> {
    pub generation: u64,
    /// Members agree; should they ever not, only what all of them name is safe.
    pub members: BTreeSet<&'a str>,
    /// A member that has not recorded the highest generation shows that nothing was acknowledged under it. What was acknowledged
    /// before is where that one's own record says: its engine may have gone on without others after they were asked.
    witnesses: Vec<Entry<'a>>,
}

impl<'a> Newest<'a> {
    /// `None` when there are no records.
    pub fn of(records: &[Entry<'a>]) -> Option<Newest<'a>> {
        let generation = records.iter().map(|record| record.generation).max()?;
        let newest = records.iter().filter(|record| record.generation == generation);
        let members = newest.map(|r| r.members.clone()).reduce(|all, one| &all & &one)?;
        let witnesses = records.iter().filter(|record| record.generation > 0 && members.contains(record.name));
        let witnesses = witnesses.cloned().collect();
        Some(Newest { generation, members, witnesses })
    }

    /// The generation at which others went on without this replica, before anything began at the highest one.
    pub fn left_out_at(&self, name: &str) -> Option<u64> {
        self.witnesses.iter().find(|witness| !witness.members.contains(name)).map(|witness| witness.generation)
    }

    /// Whether this replica holds everything that was acknowledged, as far as these records tell; also when it has not recorded
    /// the highest generation itself.
    pub fn holds_everything(&self, name: &str) -> bool {
        self.members.contains(name) && self.left_out_at(name).is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(records: &[(&str, u64, &str)], expected: &str) {
        let records: Vec<Entry<'_>> = records
            .iter()
            .map(|(name, generation, members)| {
                let members: BTreeSet<&str> = members.split("").filter(|m| !m.is_empty()).collect();
                Entry { name, generation: *generation, members }
            })
            .collect();
        let newest = Newest::of(&records).unwrap();
        let holders: String = ["a", "b", "c"].into_iter().filter(|name| newest.holds_everything(name)).collect();
        assert_eq!(holders, expected, "{records:?}");
    }

    #[test]
    fn whoever_all_newest_records_and_all_witnesses_name_holds_everything() {
        check(&[("a", 5, "abc"), ("b", 5, "abc")], "abc");
        check(&[("a", 5, "ab"), ("b", 5, "bc")], "b");
        // Nothing was acknowledged under 5, and under 4 without `c`.
        check(&[("a", 5, "abc"), ("b", 4, "ab")], "ab");
        // Who is no member is no witness, and a blank one witnesses nothing.
        check(&[("a", 5, "ab"), ("c", 4, "c")], "ab");
        check(&[("a", 1, "abc"), ("b", 0, "")], "abc");
        assert!(Newest::of(&[]).is_none());
    }

    #[test]
    fn it_is_told_where_the_others_went_on() {
        let members = |names: &[&'static str]| names.iter().copied().collect();
        let records = [
            Entry { name: "a", generation: 5, members: members(&["a", "b", "c"]) },
            Entry { name: "b", generation: 4, members: members(&["a", "b"]) },
        ];
        let newest = Newest::of(&records).unwrap();
        assert_eq!((newest.generation, newest.left_out_at("c"), newest.left_out_at("a")), (5, Some(4), None));
    }
}

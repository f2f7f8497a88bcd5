//! Which replicas an engine begins with, and under which generation: a pure decision.

use proto::replica::Record;

use super::life::Known;
use crate::core::Set;

/// What is known before the choice.
pub struct Situation<'a> {
    /// The highest generation that the controller ever saw.
    pub config_generation: u64,
    /// The controller says that replicas may differ.
    pub config_compare: bool,
    /// The configuration's replicas, in order, and the records of those that answered.
    pub names: &'a [String],
    pub records: &'a [Option<Record>],
    /// The first engine of this attachment.
    pub first_life: bool,
    /// What the last life acknowledged under.
    pub known: Option<&'a Known>,
    /// What the last life left about differences.
    pub known_to_differ: bool,
}

/// With whom to begin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    pub generation: u64,
    pub members: Set,
    pub compare: bool,
}

/// Chooses the members.
///
/// The configuration names the replicas that the controller takes for current. It is believed as long as no replica has a
/// record above the controller's: the attachment of a record above it went on without the controller, so its members count.
///
/// # Errors
/// A sentence when there is nobody to begin with.
pub fn choose(situation: &Situation<'_>) -> Result<Choice, String> {
    let answered: Vec<usize> = (0..situation.names.len()).filter(|r| situation.records[*r].is_some()).collect();
    if answered.is_empty() {
        return Err("none of them answers".into());
    }
    let record = |replica: usize| situation.records[replica].as_ref().expect("it answered");
    let highest = answered.iter().map(|r| record(*r)).max_by_key(|record| record.generation).expect("some answered");
    let (mut generation, mut current) = (highest.generation, &highest.members);
    if let Some(known) = situation.known.filter(|known| known.generation >= generation) {
        (generation, current) = (known.generation, &known.members);
    }
    let believe_all = generation == 0 || situation.first_life && generation <= situation.config_generation;
    let chosen: Vec<usize> =
        answered.iter().copied().filter(|r| believe_all || current.contains(&situation.names[*r])).collect();
    if chosen.is_empty() {
        return Err(format!(
            "those that answer missed writes; the replicas that hold everything (generation {generation}: {}) do not answer",
            current.join(", ")
        ));
    }
    // As long as no engine of this attachment served, nothing is known beyond what the controller and the records say.
    let compare = if situation.first_life || situation.known.is_none() {
        situation.config_compare || ended_uncleanly(&chosen, &record)
    } else {
        situation.known_to_differ
    };
    Ok(Choice {
        generation: generation.max(situation.config_generation) + 1,
        members: chosen.iter().fold(Set::EMPTY, |set, replica| set.with(Set::only(*replica))),
        compare: compare && chosen.len() > 1,
    })
}

/// One clean record of the highest generation says that all members were equal; otherwise writes may have been in flight.
fn ended_uncleanly<'a>(chosen: &[usize], record: &impl Fn(usize) -> &'a Record) -> bool {
    let highest = chosen.iter().map(|r| record(*r).generation).max().unwrap_or(0);
    let unrecorded = chosen.iter().any(|r| record(*r).generation != highest);
    let clean = chosen.iter().any(|r| record(*r).generation == highest && record(*r).clean);
    highest > 0 && (unrecorded || !clean)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(generation: u64, members: &str, clean: bool) -> Option<Record> {
        let members = members.chars().map(String::from).collect();
        Some(Record { generation, members, clean, ..Record::default() })
    }

    fn check(first_life: bool, config: u64, known: Option<(u64, &str)>, records: [Option<Record>; 3], expected: &str) {
        let names = ["a", "b", "c"].map(String::from);
        let known = known
            .map(|(generation, members)| Known { generation, members: members.chars().map(String::from).collect() });
        let situation = Situation {
            config_generation: config,
            config_compare: false,
            names: &names,
            records: &records,
            first_life,
            known: known.as_ref(),
            known_to_differ: false,
        };
        let text = match choose(&situation) {
            Ok(choice) => {
                let members: String = choice.members.iter().map(|replica| names[replica].as_str()).collect();
                format!("{members} {}{}", choice.generation, if choice.compare { " compare" } else { "" })
            }
            Err(sentence) => sentence,
        };
        assert!(text.starts_with(expected), "{text} is not {expected}");
    }

    #[test]
    fn a_first_life_believes_the_controller() {
        check(true, 0, None, [record(0, "", false), record(0, "", false), record(0, "", false)], "abc 1");
        check(true, 8, None, [record(8, "abc", true), record(8, "abc", true), record(8, "abc", true)], "abc 9");
        check(true, 8, None, [record(8, "abc", true), None, record(8, "abc", false)], "ac 9");
        check(true, 8, None, [None, record(7, "abc", false), None], "b 9");
        check(true, 8, None, [None, None, None], "none of them answers");
    }

    #[test]
    fn a_first_life_compares_after_an_unclean_end() {
        check(true, 8, None, [record(8, "abc", false), record(8, "abc", false), None], "ab 9 compare");
        check(true, 8, None, [record(8, "ab", false), record(7, "abc", false), None], "ab 9 compare");
        check(true, 8, None, [record(8, "abc", false), None, None], "a 9");
    }

    #[test]
    fn a_record_above_the_controllers_decides() {
        check(
            true,
            7,
            None,
            [record(9, "ab", false), record(9, "ab", false), record(7, "abc", false)],
            "ab 10 compare",
        );
        check(true, 7, None, [record(9, "b", false), None, record(7, "abc", false)], "those that answer missed writes");
    }

    #[test]
    fn a_later_life_takes_the_members_of_the_highest_record() {
        check(
            false,
            8,
            Some((8, "abc")),
            [record(8, "abc", false), record(9, "bc", false), record(8, "abc", false)],
            "bc 10",
        );
        check(false, 8, Some((9, "bc")), [record(8, "abc", false), record(9, "bc", false), None], "b 10");
        check(false, 8, None, [record(0, "", false), record(0, "", false), None], "ab 9");
    }

    #[test]
    fn a_later_life_never_begins_with_replicas_that_were_dropped_before() {
        // `b` and `c` went on without `a`; only `a` is left, and its record does not know.
        check(false, 8, Some((9, "bc")), [record(8, "abc", false), None, None], "those that answer missed writes");
    }
}

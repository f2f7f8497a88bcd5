//! Which replicas an engine begins with, and under which generation: a pure decision.

use proto::replica::Record;

pub use super::life::Known;
use crate::core::Set;

/// What a replica said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    pub record: Record,
    /// An export is open: its process was not started anew since an engine opened it.
    pub serves: bool,
}

/// What is known before the choice.
pub struct Situation<'a> {
    /// The highest generation that the controller ever saw.
    pub config_generation: u64,
    /// The controller says that replicas may differ.
    pub config_compare: bool,
    /// The configuration's replicas, in order, and the answers of those that gave one.
    pub names: &'a [String],
    pub answers: &'a [Option<Answer>],
    /// The first engine of this attachment.
    pub first_life: bool,
    /// What the last life acknowledged under.
    pub known: Option<&'a Known>,
    /// The highest generation that an earlier life may have asked any replica to record, whether it ever served or not.
    pub claimed: u64,
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

impl Choice {
    /// The highest generation that this engine can come to: each fence drops a member, and the last one is never fenced.
    pub fn claims(&self) -> u64 {
        self.generation + (self.members.len() as u64).saturating_sub(1)
    }
}

/// Chooses the members: those of the highest record, or of what the last life left, whichever is higher.
///
/// The configuration only names candidates. What the controller read of them may be older than what they say now.
///
/// # Errors
/// A sentence when there is nobody to begin with.
pub fn choose(situation: &Situation<'_>) -> Result<Choice, String> {
    let answered: Vec<usize> = (0..situation.names.len()).filter(|r| situation.answers[*r].is_some()).collect();
    let answer = |replica: usize| situation.answers[replica].as_ref().expect("it answered");
    let record = |replica: usize| &answer(replica).record;
    let highest = answered.iter().map(|r| record(*r).generation).max().ok_or("none of them answers")?;
    let known = situation.known.filter(|known| known.generation >= highest);
    let generation = known.map_or(highest, |known| known.generation);
    if generation < situation.config_generation {
        // Rule 4: whoever wrote newer data does not answer.
        return Err(format!(
            "the newest replica that answers is of generation {generation}, but the volume has reached generation {}: newer writes are on replicas that do not answer",
            situation.config_generation
        ));
    }
    let newest = || answered.iter().map(|r| record(*r)).filter(|record| record.generation == highest);
    let is_member = |name: &String| match known {
        Some(known) => known.members.contains(name),
        // Should records ever contradict each other, only what all of them name is safe.
        None => newest().all(|record| record.members.contains(name)),
    };
    // One without a generation is blank: it was made anew after its disk was lost, or never took part.
    let holds_all = |r: &usize| generation == 0 || record(*r).generation > 0 && is_member(&situation.names[*r]);
    let current: Vec<usize> = answered.iter().copied().filter(holds_all).collect();
    if current.is_empty() {
        let wanted = known.map(|known| &known.members).or_else(|| newest().next().map(|record| &record.members));
        let wanted = wanted.map(|names| names.join(", ")).unwrap_or_default();
        return Err(format!(
            "those that answer missed writes; the replicas that hold everything (generation {generation}: {wanted}) do not answer"
        ));
    }
    // The users of this attachment go on as if nothing had happened, so a replica must still have what was acknowledged and not
    // flushed. One whose process was started anew may have lost it.
    // What an earlier attachment left is forgotten before the first life (`holder::run`); this does not rely on it.
    let goes_on = !situation.first_life && situation.known.is_some();
    // An export tells that only if an engine of this attachment opened it: what another one opened may have been started anew
    // before. 0: nothing was noted.
    let claimed = situation.claimed.max(situation.known.map_or(0, |known| known.generation));
    let is_ours = |r: &usize| situation.claimed == 0 || record(*r).generation <= claimed;
    let kept = |r: &usize| !goes_on || is_ours(r) && (answer(*r).serves || record(*r).clean);
    let chosen: Vec<usize> = current.into_iter().filter(kept).collect();
    if chosen.is_empty() {
        return Err("those that answer were all started anew, or opened by another engine, and may have lost writes that were not flushed; detach the volume and attach it again".into());
    }
    // As long as no engine of this attachment served, nothing is known beyond what the controller and the records say.
    let compare =
        if goes_on { situation.known_to_differ } else { situation.config_compare || ended_uncleanly(&chosen, &record) };
    // A request of an earlier life may still be on its way to a replica that does not answer now. Whatever that one records then
    // must be below what is acknowledged without it.
    Ok(Choice {
        generation: generation.max(situation.claimed) + 1,
        members: chosen.iter().fold(Set::EMPTY, |set, replica| set.with(Set::only(*replica))),
        // One cannot differ from itself; the core would say so at once.
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

    fn record(generation: u64, members: &str, clean: bool) -> Option<Answer> {
        let members = members.chars().map(String::from).collect();
        Some(Answer { record: Record { generation, members, clean, ..Record::default() }, serves: !clean })
    }

    fn restarted(answer: Option<Answer>) -> Option<Answer> {
        answer.map(|answer| Answer { serves: false, ..answer })
    }

    fn check(first_life: bool, config: u64, known: Option<(u64, &str)>, answers: [Option<Answer>; 3], expected: &str) {
        let names = ["a", "b", "c"].map(String::from);
        let known = known
            .map(|(generation, members)| Known { generation, members: members.chars().map(String::from).collect() });
        let situation = Situation {
            config_generation: config,
            config_compare: false,
            names: &names,
            answers: &answers,
            first_life,
            known: known.as_ref(),
            claimed: 0,
            known_to_differ: false,
        };
        let text = match choose(&situation) {
            Ok(choice) => {
                let members: String = choice.members.iter().map(|replica| names[replica].as_str()).collect();
                format!("{members} {}{}", choice.generation, if choice.compare { " compare" } else { "" })
            }
            Err(sentence) => sentence,
        };
        let is_right =
            if text.ends_with("compare") || expected.len() < 8 { text == expected } else { text.starts_with(expected) };
        assert!(is_right, "{text} is not {expected}");
    }

    #[test]
    fn a_first_life_takes_the_members_of_the_highest_record() {
        check(true, 0, None, [record(0, "", true), record(0, "", true), record(0, "", true)], "abc 1");
        check(true, 8, None, [record(8, "abc", true), record(8, "abc", true), record(8, "abc", true)], "abc 9");
        check(true, 8, None, [record(8, "abc", true), None, record(8, "abc", false)], "ac 9");
        check(true, 8, None, [None, None, None], "none of them answers");
        check(true, 8, None, [record(8, "ac", true), record(7, "abc", true), record(8, "ac", true)], "ac 9");
        check(true, 8, None, [record(8, "ab", true), record(8, "bc", true), record(8, "bc", true)], "b 9");
    }

    #[test]
    fn a_blank_replica_beside_a_written_one_is_never_a_member() {
        check(true, 8, None, [record(8, "abc", true), record(0, "", true), record(8, "abc", true)], "ac 9");
        check(true, 0, None, [record(1, "abc", false), record(1, "abc", false), record(0, "", true)], "ab 2 compare");
        check(true, 0, None, [record(0, "", true), record(1, "c", false), None], "those that answer missed writes");
    }

    #[test]
    fn a_record_below_the_controllers_is_refused() {
        check(
            true,
            8,
            None,
            [None, record(7, "abc", false), None],
            "the newest replica that answers is of generation 7",
        );
        check(true, 8, None, [record(0, "", true), None, None], "the newest replica that answers is of generation 0");
    }

    #[test]
    fn a_first_life_compares_after_an_unclean_end() {
        check(true, 8, None, [record(8, "abc", false), record(8, "abc", false), None], "ab 9 compare");
        check(true, 8, None, [record(8, "ab", false), record(7, "abc", false), None], "ab 9 compare");
        check(true, 8, None, [record(8, "abc", false), None, None], "a 9");
        // One that did not record the highest generation was not there at its end.
        check(true, 8, None, [record(8, "ab", true), record(7, "abc", false), None], "ab 9 compare");
        let ended = restarted(record(8, "abc", false));
        check(true, 8, None, [ended.clone(), ended, record(8, "abc", false)], "abc 9 compare");
    }

    #[test]
    fn a_first_life_does_not_go_on_from_what_an_earlier_attachment_left() {
        let anew = restarted(record(8, "abc", false));
        check(true, 8, Some((8, "abc")), [anew.clone(), anew.clone(), anew], "abc 9 compare");
    }

    #[test]
    fn compares_when_the_controller_or_the_last_life_says_so() {
        let (names, clean) = (["a", "b"].map(String::from), [record(8, "ab", true), record(8, "ab", true)]);
        let known = Known { generation: 8, members: names.to_vec() };
        let first = Situation {
            config_generation: 8,
            config_compare: true,
            names: &names,
            answers: &clean,
            first_life: true,
            known: None,
            claimed: 0,
            known_to_differ: false,
        };
        assert!(choose(&first).unwrap().compare);
        assert!(!choose(&Situation { config_compare: false, ..first }).unwrap().compare);
        let unclean = [record(8, "ab", false), record(8, "ab", false)];
        let later = |known_to_differ: bool| Situation {
            config_compare: !known_to_differ,
            answers: &unclean,
            first_life: false,
            known: Some(&known),
            known_to_differ,
            names: &names,
            config_generation: 8,
            claimed: 0,
        };
        assert!(choose(&later(true)).unwrap().compare);
        assert!(!choose(&later(false)).unwrap().compare, "the kernel repeats what was in flight");
    }

    #[test]
    fn a_choice_claims_every_generation_that_its_fences_can_reach() {
        let choice = Choice { generation: 9, members: Set::first(3), compare: false };
        assert_eq!(choice.claims(), 11);
        assert_eq!(Choice { members: Set::only(1), ..choice }.claims(), 9);
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
        check(false, 0, None, [record(0, "", true), record(0, "", true), None], "ab 1");
    }

    #[test]
    fn a_later_life_begins_above_all_that_an_earlier_one_may_have_asked_for() {
        let (names, answers) = (["a", "b"].map(String::from), [record(8, "ab", false), None]);
        let situation = Situation {
            config_generation: 8,
            config_compare: false,
            names: &names,
            answers: &answers,
            first_life: false,
            known: None,
            claimed: 10,
            known_to_differ: false,
        };
        assert_eq!(choose(&situation).unwrap().generation, 11);
        assert_eq!(choose(&Situation { claimed: 5, ..situation }).unwrap().generation, 9);
    }

    #[test]
    fn a_later_life_never_begins_with_replicas_that_were_dropped_before() {
        // `b` and `c` went on without `a`; only `a` is left, and its record does not know.
        check(false, 8, Some((9, "bc")), [record(8, "abc", false), None, None], "those that answer missed writes");
    }

    #[test]
    fn a_later_life_never_begins_with_replicas_that_were_started_anew() {
        let (kept, anew) = (record(8, "abc", false), restarted(record(8, "abc", false)));
        check(false, 8, Some((8, "abc")), [kept.clone(), anew.clone(), kept], "ac 9");
        check(
            false,
            8,
            Some((8, "abc")),
            [anew.clone(), anew.clone(), anew],
            "those that answer were all started anew,",
        );
        // The last life was about to end cleanly.
        check(false, 8, Some((8, "abc")), [record(8, "abc", true), record(8, "abc", false), None], "ab 9");
    }

    #[test]
    fn a_later_life_never_begins_with_replicas_that_another_engine_opened_meanwhile() {
        let known = Known { generation: 8, members: vec!["a".into(), "b".into()] };
        let names = ["a", "b"].map(String::from);
        let (ours, theirs) = ([record(9, "a", false), None], [record(10, "a", false), None]);
        let situation = Situation {
            config_generation: 8,
            config_compare: false,
            names: &names,
            answers: &ours,
            first_life: false,
            known: Some(&known),
            claimed: 9,
            known_to_differ: false,
        };
        assert_eq!(choose(&situation).unwrap().generation, 10);
        let stolen = Situation { answers: &theirs, ..situation };
        let refused = choose(&stolen).unwrap_err();
        assert!(refused.contains("opened by another engine"), "{refused}");
        // Whoever attaches the volume anew takes it.
        let anew = Situation { first_life: true, known: None, ..stolen };
        assert_eq!(choose(&anew).unwrap().members, Set::only(0));
    }
}

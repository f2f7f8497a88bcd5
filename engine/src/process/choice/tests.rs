//! The choice of members, in tables.

use super::*;

fn record(generation: u64, members: &str, clean: bool) -> Option<Answer> {
    let members = members.chars().map(String::from).collect();
    Some(Answer { record: Record { generation, members, clean, ..Record::default() }, serves: !clean })
}

fn claimed(highest: u64) -> Claim {
    Claim { highest, holders: None }
}

fn restarted(answer: Option<Answer>) -> Option<Answer> {
    answer.map(|answer| Answer { serves: false, ..answer })
}

fn check(first_life: bool, config: u64, known: Option<(u64, &str)>, answers: [Option<Answer>; 3], expected: &str) {
    let names = ["a", "b", "c"].map(String::from);
    let known =
        known.map(|(generation, members)| Known { generation, members: members.chars().map(String::from).collect() });
    let situation = Situation {
        config_generation: config,
        attachment: 0,
        config_compare: false,
        names: &names,
        answers: &answers,
        first_life,
        known: known.as_ref(),
        claim: &Claim::default(),
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
fn records_of_two_attachments_are_never_mixed() {
    let first = |generation: u64, members| record(1_000_000 + generation, members, false);
    let second = |generation: u64, members| record(2_000_000 + generation, members, false);
    let names = ["a", "b", "c"].map(String::from);
    let choose_third = |answers: [Option<Answer>; 3]| {
        choose(&Situation {
            config_generation: 1_000_005,
            config_compare: false,
            attachment: 3,
            names: &names,
            answers: &answers,
            first_life: true,
            known: None,
            claim: &Claim::default(),
            known_to_differ: false,
        })
    };
    let members = |answers| choose_third(answers).map(|choice| choice.members);
    // The second one opened `a` while the first one dropped it and went on with `b` and `c`.
    let (b, c) = (first(6, "bc"), first(6, "bc"));
    assert_eq!(members([second(1, "abc"), b.clone(), c.clone()]), Ok(Set::only(1).with(Set::only(2))));
    assert_eq!(members([second(1, "abc"), b, second(1, "abc")]), Ok(Set::only(1).with(Set::only(2))));
    // Each went on with one of them: nobody can tell which is right, but that both hold everything is wrong.
    assert_eq!(members([second(1, "ab"), first(6, "b"), first(7, "c")]), Ok(Set::only(1)));
    assert!(members([second(2, "a"), first(6, "b"), first(7, "c")]) == Ok(Set::only(0)));
    // Nothing was done without `a`.
    let choice = choose_third([second(1, "abc"), first(5, "abc"), None]).unwrap();
    assert_eq!((choice.members, choice.compare, choice.generation), (Set::first(2), true, 3_000_001));
}

#[test]
fn an_engine_whose_volume_was_taken_over_by_a_newer_attachment_begins_no_more() {
    let (names, answers) =
        (["a", "b"].map(String::from), [record(2_000_001, "a", false), record(1_000_005, "ab", false)]);
    let situation = Situation {
        config_generation: 0,
        config_compare: false,
        attachment: 1,
        names: &names,
        answers: &answers,
        first_life: false,
        known: None,
        claim: &claimed(1_000_006),
        known_to_differ: false,
    };
    let refused = choose(&situation).unwrap_err();
    assert!(refused.contains("attachment 2 has taken the volume over from this one (1)"), "{refused}");
    // The newer one's own next engine is none.
    assert_eq!(
        choose(&Situation { attachment: 2, claim: &claimed(2_000_002), ..situation }).unwrap().generation,
        2_000_003
    );
}

#[test]
fn an_attachment_keeps_to_its_own_generations() {
    let names = ["a"].map(String::from);
    let at = |attachment, generation, highest| {
        let situation = Situation {
            config_generation: 0,
            config_compare: false,
            attachment,
            names: &names,
            answers: &[record(generation, "a", true)],
            first_life: true,
            known: None,
            claim: &claimed(highest),
            known_to_differ: false,
        };
        choose(&situation).map(|choice| choice.generation)
    };
    // Of a replica that was written before attachments were counted, of one before, and of its own.
    assert_eq!((at(4, 7, 0), at(4, 3_000_009, 0)), (Ok(4_000_001), Ok(4_000_001)));
    assert_eq!((at(4, 4_000_001, 0), at(4, 3_000_009, 4_000_005)), (Ok(4_000_002), Ok(4_000_006)));
    assert!(at(4, 4_999_999, 0).unwrap_err().contains("used up its generations"));
}

#[test]
fn a_blank_replica_beside_a_written_one_is_never_a_member() {
    check(true, 8, None, [record(8, "abc", true), record(0, "", true), record(8, "abc", true)], "ac 9");
    check(true, 0, None, [record(1, "abc", false), record(1, "abc", false), record(0, "", true)], "ab 2 compare");
    check(true, 0, None, [record(0, "", true), record(1, "c", false), None], "those that answer missed writes");
}

#[test]
fn a_record_below_the_controllers_is_refused() {
    check(true, 8, None, [None, record(7, "abc", false), None], "the newest replica that answers is of generation 7");
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
        attachment: 0,
        config_compare: true,
        names: &names,
        answers: &clean,
        first_life: true,
        known: None,
        claim: &Claim::default(),
        known_to_differ: false,
    };
    assert!(choose(&first).unwrap().compare);
    assert!(!choose(&Situation { config_compare: false, ..first }).unwrap().compare);
    let unclean = [record(8, "ab", false), record(8, "ab", false)];
    let claim = Claim::default();
    let later = |known_to_differ: bool| Situation {
        config_compare: !known_to_differ,
        answers: &unclean,
        first_life: false,
        known: Some(&known),
        known_to_differ,
        names: &names,
        config_generation: 8,
        attachment: 0,
        claim: &claim,
    };
    assert!(choose(&later(true)).unwrap().compare);
    assert!(!choose(&later(false)).unwrap().compare, "the kernel repeats what was in flight");
}

#[test]
fn a_choice_claims_every_generation_that_its_fences_can_reach() {
    let choice = Choice { generation: 9, members: Set::first(3), compare: false, holders: None };
    assert_eq!(choice.claim(), claimed(11));
    assert_eq!(Choice { members: Set::only(1), ..choice }.claim().highest, 9);
}

#[test]
fn a_record_above_the_controllers_decides() {
    check(true, 7, None, [record(9, "ab", false), record(9, "ab", false), record(7, "abc", false)], "ab 10 compare");
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
        attachment: 0,
        config_compare: false,
        names: &names,
        answers: &answers,
        first_life: false,
        known: None,
        claim: &claimed(10),
        known_to_differ: false,
    };
    assert_eq!(choose(&situation).unwrap().generation, 11);
    assert_eq!(choose(&Situation { claim: &claimed(5), ..situation }).unwrap().generation, 9);
}

#[test]
fn a_later_life_never_begins_with_what_an_earlier_one_found_to_miss_something() {
    let names = ["a", "b", "c"].map(String::from);
    let (before, middle) = (|members| record(1_000_002, members, false), record(2_000_001, "a", false));
    let choose = |claim: &Claim, answers: [Option<Answer>; 3]| {
        choose(&Situation {
            config_generation: 1_000_002,
            config_compare: false,
            attachment: 3,
            names: &names,
            answers: &answers,
            first_life: *claim == Claim::default(),
            known: None,
            claim,
            known_to_differ: false,
        })
    };
    let holders = |names: &str| Some(names.chars().map(String::from).collect::<Vec<_>>());
    // Only `a` has what the second attachment wrote; then it is away.
    let first = choose(&Claim::default(), [middle.clone(), before("ab"), None]).unwrap();
    assert_eq!(first.members, Set::only(0));
    assert_eq!(first.claim(), Claim { highest: 3_000_001, holders: holders("a") });
    for others in [before("ab"), record(3_000_001, "ab", false)] {
        // Also when a request of an earlier life of this attachment came so late.
        let refused = choose(&first.claim(), [None, others.clone(), others]).unwrap_err();
        assert!(refused.contains("missed writes") && refused.contains(": a) do not answer"), "{refused}");
    }
    // Opened or not, it is taken when it is back.
    let opened = record(3_000_001, "a", false);
    for own in [middle, opened] {
        let next = choose(&first.claim(), [own, before("ab"), None]).unwrap();
        assert_eq!((next.members, next.holders), (Set::only(0), holders("a")));
    }
    // Nothing was acknowledged under what `b` has not recorded, so each of both will do.
    let half = choose(&Claim::default(), [record(2_000_001, "ab", false), before("ab"), None]).unwrap();
    assert_eq!((half.members, half.holders.clone()), (Set::first(2), holders("ab")));
    assert_eq!(choose(&half.claim(), [None, before("ab"), None]).unwrap().members, Set::only(1));
    // So will one that did not answer then.
    let alone = choose(&Claim::default(), [record(2_000_001, "abc", false), None, None]).unwrap();
    assert_eq!(choose(&alone.claim(), [None, None, before("abc")]).unwrap().members, Set::only(2));
    // Of blank replicas nothing is known.
    let blank = choose(&Claim::default(), [None, record(1_000_002, "b", true), None]).unwrap();
    assert_eq!(blank.holders, holders("b"));
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
    check(false, 8, Some((8, "abc")), [anew.clone(), anew.clone(), anew], "those that answer were all started anew,");
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
        attachment: 0,
        config_compare: false,
        names: &names,
        answers: &ours,
        first_life: false,
        known: Some(&known),
        claim: &claimed(9),
        known_to_differ: false,
    };
    assert_eq!(choose(&situation).unwrap().generation, 10);
    let stolen = Situation { answers: &theirs, ..situation };
    let refused = choose(&stolen).unwrap_err();
    assert!(refused.contains("opened by another engine"), "{refused}");
    // So is one of another attachment, whatever was noted; its export tells nothing of this attachment's writes.
    let before = [record(2_000_001, "ab", false), record(1_000_009, "ab", false)];
    let own = Known { generation: 2_000_001, members: vec!["a".into(), "b".into()] };
    let mixed = Situation { attachment: 2, answers: &before, known: Some(&own), claim: &claimed(2_000_002), ..stolen };
    assert_eq!(choose(&mixed).unwrap().members, Set::only(0));
    // Whoever attaches the volume anew takes it.
    let anew = Situation { first_life: true, known: None, ..stolen };
    assert_eq!(choose(&anew).unwrap().members, Set::only(0));
}

//! Which replicas of a volume hold every acknowledged write (`ARCHITECTURE.md`, "Generations", rules 3 to 5).

use std::collections::{BTreeMap, BTreeSet};

use api::generations::{Entry, Newest};

/// What is known of one replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sight {
    /// Its record can be read now.
    Seen(Record),
    /// It cannot be asked; the sentence says why. Unknown is not absent.
    /// The generation that it had recorded when it was read last still counts: it can only have gone on from there.
    Unseen { why: String, generation: u64 },
}

/// A replica's durable record.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// 0: it was never part of an attachment.
    pub generation: u64,
    /// The replicas that were in sync when that generation began.
    pub members: BTreeSet<String>,
    pub clean: bool,
}

/// The outcome.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Judgement {
    /// Seen, and in possession of every acknowledged write.
    pub current: BTreeSet<String>,
    /// Seen, and they may have missed writes; with the reason.
    pub stale: BTreeMap<String, String>,
    /// Unseen, with the reason; each may be current.
    pub unknown: BTreeMap<String, String>,
    /// What is seen is older than what the controller knows to exist: nothing may be served. A sentence.
    pub refused: Option<String>,
    /// Current replicas may differ in writes that were in flight.
    pub compare: bool,
    /// The highest generation that was seen.
    pub highest: u64,
}

/// Judges the good (not failed) replicas of a volume. `recorded` is the highest generation that the controller ever saw.
pub fn judge(replicas: &BTreeMap<String, Sight>, recorded: u64) -> Judgement {
    let mut judgement = Judgement::default();
    let mut seen: BTreeMap<&str, &Record> = BTreeMap::new();
    let mut reached = recorded;
    for (name, sight) in replicas {
        match sight {
            Sight::Seen(record) => drop(seen.insert(name, record)),
            Sight::Unseen { why, generation } => {
                judgement.unknown.insert(name.clone(), why.clone());
                reached = reached.max(*generation);
            }
        }
    }
    let entries: Vec<Entry<'_>> =
        seen.iter().map(|(name, record)| Entry::new(name, record.generation, &record.members)).collect();
    let Some(newest) = Newest::of(&entries) else { return judgement };
    let highest = newest.generation;
    judgement.highest = highest;
    if highest < reached {
        // Rule 4: a lone stale replica, or several.
        judgement.refused = Some(format!(
            "the newest replica in sight is of generation {highest}, but the volume has reached generation {reached}: newer writes are on replicas that are not in sight"
        ));
        return judgement;
    }
    if highest == 0 {
        // Never attached: all are blank, hence equal.
        judgement.current = seen.keys().map(|n| (*n).to_owned()).collect();
        return judgement;
    }
    for (name, record) in &seen {
        if newest.holds_everything(name) {
            // Also one that has not recorded this generation yet (rule 3).
            judgement.current.insert((*name).to_owned());
        } else {
            let why = if let Some(went_on) = newest.left_out_at(name).filter(|_| newest.members.contains(name)) {
                format!(
                    "others went on without it at generation {went_on}, before anything began at generation {highest}"
                )
            } else if record.generation == 0 {
                format!("it took no part in the attachment of generation {highest}")
            } else {
                format!("it stopped at generation {} and the volume went on to {highest} without it", record.generation)
            };
            judgement.stale.insert((*name).to_owned(), why);
        }
    }
    if judgement.current.is_empty() {
        judgement.refused =
            Some(format!("no replica in sight was in sync at generation {highest}, the newest that was recorded"));
    }
    // Rule 5. One replica cannot differ from itself.
    let settled = |name: &String| seen.get(name.as_str()).is_some_and(|r| r.generation == highest && r.clean);
    judgement.compare = judgement.current.len() > 1 && !judgement.current.iter().all(settled);
    judgement
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};

    use super::*;

    /// `recorded=5; a=5{a,b}clean b=5{a,b} c=? d=4{a,b,c} e=?4{e}`
    fn check(world: &str, expected: Expect) {
        let (recorded, replicas) = world.split_once(';').unwrap();
        let recorded = recorded.trim().strip_prefix("recorded=").unwrap().parse().unwrap();
        let replicas = replicas
            .split_whitespace()
            .map(|text| {
                let (name, rest) = text.split_once('=').unwrap();
                let sight = match rest.split_once('{') {
                    None if rest == "?" => Sight::Unseen { why: "silent".into(), generation: 0 },
                    None => Sight::Seen(Record { generation: rest.parse().unwrap(), ..Default::default() }),
                    Some((generation, rest)) => {
                        let (members, clean) = rest.split_once('}').unwrap();
                        let (generation, is_silent) =
                            generation.strip_prefix('?').map_or((generation, false), |g| (g, true));
                        let record = Record {
                            generation: generation.parse().unwrap(),
                            members: members.split(',').map(str::to_owned).collect(),
                            clean: clean == "clean",
                        };
                        if is_silent {
                            Sight::Unseen { why: "silent".into(), generation: record.generation }
                        } else {
                            Sight::Seen(record)
                        }
                    }
                };
                (name.to_owned(), sight)
            })
            .collect();
        let j = judge(&replicas, recorded);
        let list = |names: Vec<&String>| names.into_iter().map(String::as_str).collect::<Vec<_>>().join(",");
        let mut text = format!("current={}", list(j.current.iter().collect()));
        for (what, names) in [("stale", j.stale.keys().collect::<Vec<_>>()), ("unknown", j.unknown.keys().collect())] {
            if !names.is_empty() {
                text += &format!(" {what}={}", list(names));
            }
        }
        if j.compare {
            text += " compare";
        }
        if let Some(why) = j.refused {
            text += &format!(" refused: {why}");
        }
        expected.assert_eq(&text);
    }

    #[test]
    fn blank_replicas_are_all_current() {
        check("recorded=0; a=0 b=0 c=?", expect!["current=a,b unknown=c"]);
    }

    #[test]
    fn a_clean_end_leaves_all_members_current() {
        check("recorded=3; a=3{a,b,c}clean b=3{a,b,c}clean c=3{a,b,c}clean", expect!["current=a,b,c"]);
    }

    #[test]
    fn an_unclean_end_leaves_them_current_and_to_be_compared() {
        check("recorded=3; a=3{a,b} b=3{a,b}", expect!["current=a,b compare"]);
    }

    #[test]
    fn a_half_done_open_does_not_make_anyone_stale() {
        check("recorded=3; a=4{a,b,c} b=3{a,b,c}clean c=0", expect!["current=a,b,c compare"]);
    }

    #[test]
    fn a_half_done_fence_counts_those_that_were_to_remain() {
        check("recorded=4; a=5{a,b} b=4{a,b,c} c=4{a,b,c}", expect!["current=a,b stale=c compare"]);
    }

    #[test]
    fn a_half_done_close_is_compared() {
        check("recorded=4; a=4{a,b}clean b=4{a,b}", expect!["current=a,b compare"]);
        // That `b` ended cleanly before says nothing about this one.
        check("recorded=4; a=4{a,b}clean b=3{a,b}clean", expect!["current=a,b compare"]);
    }

    #[test]
    fn a_dropped_replica_is_stale() {
        check("recorded=2; a=2{a,b}clean b=2{a,b}clean c=1{a,b,c}", expect!["current=a,b stale=c"]);
    }

    #[test]
    fn a_blank_replica_is_stale_beside_a_written_one() {
        check("recorded=2; a=2{a}clean b=0", expect!["current=a stale=b"]);
    }

    #[test]
    fn a_lone_stale_replica_is_refused() {
        check(
            "recorded=2; a=? b=? c=1{a,b,c}",
            expect![
                "current= unknown=a,b refused: the newest replica in sight is of generation 1, but the volume has reached generation 2: newer writes are on replicas that are not in sight"
            ],
        );
    }

    #[test]
    fn records_that_contradict_each_other_leave_what_all_name() {
        check("recorded=2; a=3{a,b} b=3{b,c} c=3{b,c}", expect!["current=b stale=a,c"]);
    }

    #[test]
    fn records_of_two_attachments_are_never_mixed() {
        // A second attachment opened `a` while the first one dropped it and went on with `b`: only `b` holds everything.
        check("recorded=1000005; a=2000001{a,b} b=1000006{b}", expect!["current=b stale=a"]);
        // The first one was about to drop `a`, and did nothing without it yet.
        check("recorded=1000005; a=2000001{a,b} b=1000005{a,b}", expect!["current=a,b compare"]);
        // It went on without those that the second one has, and can never come out on top again.
        check("recorded=2000001; a=2000001{a,b} b=2000001{a,b} c=1000009{c}", expect!["current=a,b stale=c compare"]);
        check(
            "recorded=2000001; a=? b=? c=1999999{c}",
            expect![
                "current= unknown=a,b refused: the newest replica in sight is of generation 1999999, but the volume has reached generation 2000001: newer writes are on replicas that are not in sight"
            ],
        );
    }

    #[test]
    fn what_was_read_of_an_unseen_replica_still_counts() {
        // `a` and `b` went on without `c`; nobody told the controller, but the record of `a` was read before it went away.
        check(
            "recorded=1; a=?2{a,b} b=? c=1{a,b,c}",
            expect![
                "current= unknown=a,b refused: the newest replica in sight is of generation 1, but the volume has reached generation 2: newer writes are on replicas that are not in sight"
            ],
        );
        check("recorded=1; a=?2{a,b} b=2{a,b} c=1{a,b,c}", expect!["current=b stale=c unknown=a"]);
        check("recorded=3; a=?1{a,b,c} b=3{b,c}clean c=3{b,c}clean", expect!["current=b,c unknown=a"]);
    }

    #[test]
    fn nobody_in_sight_is_no_reason_to_refuse_for_good() {
        check("recorded=2; a=? b=?", expect!["current= unknown=a,b"]);
    }

    #[test]
    fn no_member_in_sight_is_refused() {
        check(
            "recorded=3; a=3{b} b=?",
            expect![
                "current= stale=a unknown=b refused: no replica in sight was in sync at generation 3, the newest that was recorded"
            ],
        );
    }
}

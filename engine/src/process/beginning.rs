//! How an engine begins, as pure rounds: what to ask of which replicas until all members have recorded its generation.
//!
//! Open, connect, and fence out those that were lost on the way; nothing is served before the last fence is complete (rules 1 and 2).

use proto::replica::Record;

use super::choice::Choice;
use crate::core::Set;

/// A round: all of these replicas are asked at the same time, and those that answer as wished take part in the next one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Round {
    Open { generation: u64, members: Set },
    Connect { members: Set },
    Fence { generation: u64, members: Set },
}

/// What follows a round.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    Ask(Round),
    /// All members have recorded the generation and their exports are connected.
    Serve(Choice),
    /// Nobody is left, or nobody knows whom the others follow; a sentence.
    Fail(&'static str),
}

/// A beginning under way.
#[derive(Clone, Debug)]
pub struct Beginning {
    choice: Choice,
    round: Round,
}

impl Beginning {
    pub fn new(choice: Choice) -> Beginning {
        let round = Round::Open { generation: choice.generation, members: choice.members };
        Beginning { choice, round }
    }

    /// The round that is to be asked now.
    pub fn round(&self) -> Round {
        self.round
    }

    /// Takes who answered the round as wished, and whether a record showed a rival.
    pub fn next(&mut self, answered: Set, rival: bool) -> Next {
        if rival {
            // Nobody knows which of both engines the others follow, so this one begins anew.
            return Next::Fail("another engine raised the generation at the same time");
        }
        if answered.is_empty() {
            return Next::Fail("none of them could be opened");
        }
        let recorded = match self.round {
            Round::Open { .. } => {
                self.round = Round::Connect { members: answered };
                return Next::Ask(self.round);
            }
            Round::Connect { .. } => self.choice.members,
            Round::Fence { members, .. } => members,
        };
        self.choice.members = answered;
        if recorded == answered {
            let compare = self.choice.compare && answered.len() > 1;
            return Next::Serve(Choice { compare, ..self.choice.clone() });
        }
        // Those that are gone are fenced out before anything is acknowledged.
        self.choice.generation += 1;
        self.round = Round::Fence { generation: self.choice.generation, members: answered };
        Next::Ask(self.round)
    }
}

/// Whether a replica that refused `Open` has been opened or fenced by another engine since this one saw it at generation `seen`.
///
/// The same generation with the same members is this engine's own when nothing serves: the replica could not open an export.
/// When something does, it is somebody else's, who began at the same moment.
pub fn is_rival(record: &Record, serves: bool, generation: u64, members: &[String], seen: u64) -> bool {
    let is_own = record.generation == generation && record.members == members && !serves;
    record.generation != seen && !is_own
}

#[cfg(test)]
mod tests {
    use super::*;

    fn begin(members: usize) -> Beginning {
        Beginning::new(Choice { generation: 5, members: Set::first(members), compare: true, holders: None })
    }

    #[test]
    fn serves_when_all_members_recorded_and_connected() {
        let mut beginning = begin(2);
        assert_eq!(beginning.round(), Round::Open { generation: 5, members: Set::first(2) });
        let connect = Round::Connect { members: Set::first(2) };
        assert_eq!(beginning.next(Set::first(2), false), Next::Ask(connect));
        let choice = Choice { generation: 5, members: Set::first(2), compare: true, holders: None };
        assert_eq!(beginning.next(Set::first(2), false), Next::Serve(choice));
    }

    #[test]
    fn fences_out_until_all_that_are_left_recorded_it() {
        let mut beginning = begin(3);
        assert_eq!(beginning.next(Set::first(3), false), Next::Ask(Round::Connect { members: Set::first(3) }));
        let fence = |generation, members| Next::Ask(Round::Fence { generation, members: Set::first(members) });
        assert_eq!(beginning.next(Set::first(2), false), fence(6, 2));
        assert_eq!(beginning.next(Set::first(1), false), fence(7, 1));
        let alone = Choice { generation: 7, members: Set::first(1), compare: false, holders: None };
        assert_eq!(beginning.next(Set::first(1), false), Next::Serve(alone));
    }

    #[test]
    fn one_that_could_not_be_opened_is_fenced_out_too() {
        let mut beginning = begin(2);
        assert_eq!(beginning.next(Set::first(1), false), Next::Ask(Round::Connect { members: Set::first(1) }));
        let fence = Round::Fence { generation: 6, members: Set::first(1) };
        assert_eq!(beginning.next(Set::first(1), false), Next::Ask(fence));
    }

    #[test]
    fn ends_when_nobody_is_left_or_a_rival_began() {
        assert!(matches!(begin(2).next(Set::EMPTY, false), Next::Fail(why) if why.contains("could be opened")));
        assert!(matches!(begin(2).next(Set::first(1), true), Next::Fail(why) if why.contains("another engine")));
    }

    #[test]
    fn a_rival_is_known_by_its_record() {
        let members = vec!["a".to_owned()];
        let record =
            |generation, member: &str| Record { generation, members: vec![member.into()], ..Record::default() };
        assert!(is_rival(&record(6, "a"), false, 5, &members, 3));
        assert!(is_rival(&record(5, "b"), false, 5, &members, 3));
        assert!(is_rival(&record(5, "a"), true, 5, &members, 3));
        assert!(is_rival(&record(4, "a"), true, 5, &members, 3));
        assert!(!is_rival(&record(5, "a"), false, 5, &members, 3));
        // It refused for another reason, and stands where it stood.
        assert!(!is_rival(&record(3, "b"), true, 5, &members, 3));
    }
}

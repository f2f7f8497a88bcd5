//! Which replicas an engine begins with, and under which generation: a pure decision.

use api::generations::{Entry, GENERATIONS_OF_AN_ATTACHMENT, Newest, attachment_of};
use proto::replica::Record;

pub use super::life::{Claim, Known};
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
    /// The number of this attachment.
    pub attachment: u64,
    /// The controller says that replicas may differ.
    pub config_compare: bool,
    /// The configuration's replicas, in order, and the answers of those that gave one.
    pub names: &'a [String],
    pub answers: &'a [Option<Answer>],
    /// The first engine of this attachment.
    pub first_life: bool,
    /// What the last life acknowledged under.
    pub known: Option<&'a Known>,
    /// What earlier lives noted, whether they ever served or not.
    pub claim: &'a Claim,
    /// What the last life left about differences.
    pub known_to_differ: bool,
}

/// With whom to begin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    pub generation: u64,
    pub members: Set,
    pub compare: bool,
    /// See [`Claim::holders`].
    pub holders: Option<Vec<String>>,
}

impl Choice {
    /// To be noted before the first replica is asked.
    pub fn claim(&self) -> Claim {
        // Each fence drops a member, and the last one is never fenced.
        let fences = (self.members.len() as u64).saturating_sub(1);
        Claim { highest: self.generation + fences, holders: self.holders.clone() }
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
    let entry = |r: &usize| Entry::new(&situation.names[*r], record(*r).generation, &record(*r).members);
    let entries: Vec<Entry<'_>> = answered.iter().map(entry).collect();
    let newest = Newest::of(&entries).ok_or("none of them answers")?;
    let highest = newest.generation;
    if attachment_of(highest) > situation.attachment {
        return Err(superseded(attachment_of(highest), situation.attachment));
    }
    let known = situation.known.filter(|known| known.generation >= highest);
    let generation = known.map_or(highest, |known| known.generation);
    if generation < situation.config_generation {
        // Rule 4: whoever wrote newer data does not answer.
        return Err(format!(
            "the newest replica that answers is of generation {generation}, but the volume has reached generation {}: newer writes are on replicas that do not answer",
            situation.config_generation
        ));
    }
    let is_member = |name: &String| match known {
        Some(known) => known.members.contains(name),
        None => newest.holds_everything(name),
    };
    // A replica that was found to miss something still does, although this attachment may have raised its record before or since.
    let noted = situation.claim.holders.as_ref();
    let is_holder = |name: &&String| is_member(name) && noted.is_none_or(|noted| noted.contains(name));
    let holders: Vec<String> = situation.names.iter().filter(is_holder).cloned().collect();
    // One without a generation is blank: it was made anew after its disk was lost, or never took part.
    let holds_all = |r: &usize| generation == 0 || record(*r).generation > 0 && holders.contains(&situation.names[*r]);
    let current: Vec<usize> = answered.iter().copied().filter(holds_all).collect();
    if current.is_empty() {
        let wanted = holders.join(", ");
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
    let claimed = situation.claim.highest.max(situation.known.map_or(0, |known| known.generation));
    let is_ours = |r: &usize| {
        let generation = record(*r).generation;
        attachment_of(generation) == situation.attachment && (situation.claim.highest == 0 || generation <= claimed)
    };
    let kept = |r: &usize| !goes_on || is_ours(r) && (answer(*r).serves || record(*r).clean);
    let chosen: Vec<usize> = current.into_iter().filter(kept).collect();
    if chosen.is_empty() {
        return Err("those that answer were all started anew, or opened by another engine, and may have lost writes that were not flushed; detach the volume and attach it again".into());
    }
    // As long as no engine of this attachment served, nothing is known beyond what the controller and the records say.
    let compare =
        if goes_on { situation.known_to_differ } else { situation.config_compare || ended_uncleanly(&chosen, &record) };
    // Above all that an earlier attachment can come to whose engine still lives somewhere.
    let first = situation.attachment.saturating_mul(GENERATIONS_OF_AN_ATTACHMENT);
    // A request of an earlier life may still be on its way to a replica that does not answer now. Whatever that one records then
    // must be below what is acknowledged without it.
    let choice = Choice {
        generation: generation.max(situation.claim.highest).max(first) + 1,
        members: chosen.iter().fold(Set::EMPTY, |set, replica| set.with(Set::only(*replica))),
        // One cannot differ from itself; the core would say so at once.
        compare: compare && chosen.len() > 1,
        holders: (generation > 0).then_some(holders),
    };
    if attachment_of(choice.claim().highest) > situation.attachment {
        return Err(format!(
            "attachment {} has used up its generations; detach the volume and attach it again",
            situation.attachment
        ));
    }
    Ok(choice)
}

/// Why an engine has nothing to say any more.
pub fn superseded(newer: u64, own: u64) -> String {
    format!(
        "attachment {newer} has taken the volume over from this one ({own}), so whoever uses it here has lost it; use the volume where it is attached now"
    )
}

/// One clean record of the highest generation says that all members were equal; otherwise writes may have been in flight.
fn ended_uncleanly<'a>(chosen: &[usize], record: &impl Fn(usize) -> &'a Record) -> bool {
    let highest = chosen.iter().map(|r| record(*r).generation).max().unwrap_or(0);
    let unrecorded = chosen.iter().any(|r| record(*r).generation != highest);
    let clean = chosen.iter().any(|r| record(*r).generation == highest && record(*r).clean);
    highest > 0 && (unrecorded || !clean)
}

#[cfg(test)]
mod tests;

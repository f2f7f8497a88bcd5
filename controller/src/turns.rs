//! Who waits for the limit of a node, and whose turn it is when a copy there is finished.
//!
//! It only saves waiting: what is forgotten with this process is looked at with everything else.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use planner::image::Replenish;

/// How many images are looked at for one place that is free: all of them would be a pass over everything for each copy. Who does not
/// take it calls others.
const CALLED: usize = 4;

/// Images and nodes.
#[derive(Default)]
pub struct Turns(Mutex<State>);

/// A moment, to tell what became free after it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(u64);

#[derive(Default)]
struct State {
    now: Moment,
    /// When a place on a node became free last.
    freed: BTreeMap<String, Moment>,
    /// The nodes that an image waits for.
    waiting: BTreeMap<String, BTreeSet<String>>,
    /// The nodes on which copies of an image are being made, each with how many.
    making: BTreeMap<String, BTreeMap<String, usize>>,
}

impl Turns {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The moment before a pass observes.
    pub fn now(&self) -> Moment {
        self.state().now
    }

    /// What came of a pass over an image that observed after `began`. Returns the images whose turn it is: also that one itself, when
    /// a place became free that it could not see.
    pub fn pass(&self, image: &str, began: Moment, replenish: &Replenish) -> BTreeSet<String> {
        let mut state = self.state();
        let is_late = |node: &String| state.freed.get(node).is_some_and(|at| *at > began);
        let is_late = replenish.waits_for.iter().any(is_late);
        let mut called: BTreeSet<String> = is_late.then(|| image.to_owned()).into_iter().collect();

        let mut making = BTreeMap::<String, usize>::new();
        replenish.being_made.iter().for_each(|node| *making.entry(node.clone()).or_default() += 1);
        let made = state.making.remove(image).unwrap_or_default();
        let waited = state.waiting.remove(image).unwrap_or_default();
        let fewer = made.into_iter().filter(|(node, count)| making.get(node).copied().unwrap_or(0) < *count);
        let given_up =
            waited.into_iter().filter(|node| !making.contains_key(node) && !replenish.waits_for.contains(node));
        for node in fewer.map(|(node, _)| node).chain(given_up).collect::<BTreeSet<_>>() {
            state.now.0 += 1;
            let waiting = state.waiting.iter().filter(|(_, nodes)| nodes.contains(&node));
            called.extend(waiting.take(CALLED).map(|(image, _)| image.clone()));
            let now = state.now;
            state.freed.insert(node, now);
        }
        if !making.is_empty() {
            state.making.insert(image.to_owned(), making);
        }
        if !replenish.waits_for.is_empty() {
            state.waiting.insert(image.to_owned(), replenish.waits_for.clone());
        }
        called
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|n| (*n).to_owned()).collect()
    }

    /// A pass over an image that makes copies on nodes and waits for others.
    fn pass(turns: &Turns, image: &str, makes: &[&str], waits_for: &[&str]) -> BTreeSet<String> {
        let being_made = makes.iter().map(|n| (*n).to_owned()).collect();
        let replenish = Replenish { being_made, waits_for: set(waits_for), ..Default::default() };
        turns.pass(image, turns.now(), &replenish)
    }

    #[test]
    fn who_waits_for_a_node_is_called_when_a_copy_there_is_finished() {
        let turns = Turns::default();
        assert_eq!(pass(&turns, "a", &["n1", "n1", "n2"], &[]), set(&[]));
        pass(&turns, "b", &[], &["n1"]);
        pass(&turns, "c", &[], &["n2"]);
        assert_eq!(pass(&turns, "a", &["n1", "n1", "n2"], &[]), set(&[]), "nothing is finished");
        assert_eq!(pass(&turns, "a", &["n1", "n2"], &[]), set(&["b"]));
        assert_eq!(pass(&turns, "b", &["n1"], &[]), set(&[]), "it takes its turn");
        assert_eq!(pass(&turns, "a", &[], &[]), set(&["c"]), "nobody waits for n1 any more");
    }

    #[test]
    fn who_does_not_take_its_turn_calls_the_next() {
        let turns = Turns::default();
        let many: Vec<String> = (0..2 * CALLED).map(|n| format!("image-{n}")).collect();
        pass(&turns, "a", &["n1"], &[]);
        many.iter().for_each(|image| drop(pass(&turns, image, &[], &["n1"])));
        let mut called = pass(&turns, "a", &[], &[]);
        assert_eq!(called.len(), CALLED, "not all at once");
        let mut seen = called.clone();
        while let Some(image) = called.pop_first() {
            called.extend(pass(&turns, &image, &[], &[]));
            seen.extend(called.iter().cloned());
        }
        assert_eq!(seen.len(), many.len(), "all of them in the end");
    }

    #[test]
    fn a_place_that_became_free_during_a_pass_is_not_missed() {
        let turns = Turns::default();
        pass(&turns, "a", &["n1"], &[]);
        let began = turns.now();
        assert_eq!(pass(&turns, "a", &[], &[]), set(&[]), "nobody waits yet");
        let late = Replenish { waits_for: set(&["n1"]), ..Default::default() };
        assert_eq!(turns.pass("b", began, &late), set(&["b"]), "what it saw is over");
        assert_eq!(turns.pass("b", turns.now(), &late), set(&[]));
    }
}

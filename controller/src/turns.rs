//! Who waits for the limit of a node, and whose turn it is when a copy there is finished.
//!
//! It only saves waiting: what is forgotten with this process, or missed, is looked at with everything else.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// How many images are looked at for one copy that is finished: one may have gone elsewhere, or wait for other nodes as well. All
/// of them would be a pass over everything for each copy.
const CALLED: usize = 4;

/// Images and nodes.
#[derive(Default)]
pub struct Turns(Mutex<State>);

#[derive(Default)]
struct State {
    /// The nodes that an image waits for.
    waiting: BTreeMap<String, BTreeSet<String>>,
    /// The nodes on which copies of an image are being made, each with how many.
    making: BTreeMap<String, BTreeMap<String, usize>>,
}

impl Turns {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An image waits for these nodes, and for no others any more.
    pub fn waits(&self, image: &str, nodes: BTreeSet<String>) {
        let mut state = self.state();
        if nodes.is_empty() {
            state.waiting.remove(image);
        } else {
            state.waiting.insert(image.to_owned(), nodes);
        }
    }

    /// Copies of an image are being made on these nodes. Returns the images whose turn it is on those where they are fewer than before.
    pub fn makes(&self, image: &str, nodes: &[String]) -> BTreeSet<String> {
        let mut state = self.state();
        let mut now = BTreeMap::<String, usize>::new();
        nodes.iter().for_each(|node| *now.entry(node.clone()).or_default() += 1);
        let fewer = |node: &String, count: usize| now.get(node).copied().unwrap_or(0) < count;
        let before = state.making.remove(image).unwrap_or_default();
        let freed: Vec<&String> = before.iter().filter(|(node, count)| fewer(node, **count)).map(|(n, _)| n).collect();
        let mut called = BTreeSet::new();
        for node in freed {
            let waiting = state.waiting.iter().filter(|(_, nodes)| nodes.contains(node));
            called.extend(waiting.take(CALLED).map(|(image, _)| image.clone()));
        }
        if !now.is_empty() {
            state.making.insert(image.to_owned(), now);
        }
        called
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waits_for_a_node_is_called_when_a_copy_there_is_finished() {
        let turns = Turns::default();
        let set = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect::<BTreeSet<_>>();
        turns.waits("b", set(&["n1"]));
        turns.waits("c", set(&["n2"]));
        let makes = |nodes: &[&str]| turns.makes("a", &nodes.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>());
        assert_eq!(makes(&["n1", "n1", "n2"]), set(&[]), "nothing is finished");
        assert_eq!(makes(&["n1", "n2"]), set(&["b"]));
        turns.waits("b", set(&[]));
        assert_eq!(makes(&[]), set(&["c"]), "nobody waits for n1 any more");
        let many: Vec<String> = (0..20).map(|n| format!("image-{n}")).collect();
        many.iter().for_each(|image| turns.waits(image, set(&["n1"])));
        makes(&["n1"]);
        assert_eq!(makes(&[]).len(), CALLED);
    }
}

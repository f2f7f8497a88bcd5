//! When the role has come to everything that was there at its start.
//!
//! Its pod is ready from then on, and stays so: what goes wrong later is told of the disk, the replica or the engine that it is about,
//! while a pod that is not ready takes the whole node out of service. A failed pass over a replica counts too, for the same reason.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use crate::role::Key;

/// What is left to come to.
pub struct FirstPass {
    left: Mutex<BTreeSet<Key>>,
    done: watch::Sender<bool>,
}

impl FirstPass {
    /// `done` is told when all was come to.
    pub fn new(done: watch::Sender<bool>) -> FirstPass {
        FirstPass { left: Mutex::default(), done }
    }

    /// This is what was there.
    pub fn begin(&self, keys: BTreeSet<Key>) {
        *self.left() = keys;
    }

    fn left(&self) -> MutexGuard<'_, BTreeSet<Key>> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A pass over this ended. Disks count once they are reported: without them nothing is placed here.
    pub fn ended(&self, key: &Key, went_well: bool) {
        if went_well || *key != Key::Disks {
            self.leave(|left| *left != *key);
        }
    }

    /// The rest is not waited for: one disk that hangs must not keep the others out of service.
    pub fn give_up(&self) -> usize {
        self.leave(|left| *left == Key::Disks)
    }

    /// How many are left out.
    fn leave(&self, keep: impl Fn(&Key) -> bool) -> usize {
        let mut left = self.left();
        let before = left.len();
        left.retain(|key| keep(key));
        if left.is_empty() {
            self.done.send_replace(true);
        }
        before - left.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn begin(keys: &[Key]) -> (FirstPass, watch::Receiver<bool>) {
        let (done, is_done) = watch::channel(false);
        let first = FirstPass::new(done);
        first.begin(keys.iter().cloned().collect());
        (first, is_done)
    }

    #[test]
    fn it_is_done_when_disks_are_reported_and_replicas_were_come_to() {
        let (a, b) = (Key::Replica("a".into()), Key::Replica("b".into()));
        let (first, is_done) = begin(&[Key::Disks, a.clone(), b.clone()]);
        first.ended(&Key::Disks, false);
        first.ended(&a, true);
        first.ended(&b, false);
        assert!(!*is_done.borrow(), "its disks are not reported");
        first.ended(&Key::Disks, true);
        assert!(*is_done.borrow());
    }

    #[test]
    fn a_replica_that_hangs_is_not_waited_for_but_disks_are() {
        let (first, is_done) = begin(&[Key::Disks, Key::Replica("a".into())]);
        assert_eq!(first.give_up(), 1);
        assert!(!*is_done.borrow());
        first.ended(&Key::Disks, true);
        assert!(*is_done.borrow());
        let (first, is_done) = begin(&[Key::Disks, Key::Replica("a".into())]);
        first.ended(&Key::Disks, true);
        assert!(!*is_done.borrow());
        assert_eq!(first.give_up(), 1);
        assert!(*is_done.borrow());
    }
}

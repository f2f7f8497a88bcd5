//! Which filesystems of this node have less than their volume, and why: for whoever asks for the volume's health, or to expand it.
//!
//! Kept in memory: after a restart of this process whoever expands is told what the kernel says, and the next mount tells anew.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Reasons, sentences, by volume.
#[derive(Clone, Debug, Default)]
pub struct Ungrown(Arc<Mutex<BTreeMap<String, String>>>);

impl Ungrown {
    fn all(&self) -> MutexGuard<'_, BTreeMap<String, String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was found now.
    pub fn note(&self, volume_id: &str, reason: Option<String>) {
        match reason {
            Some(reason) => drop(self.all().insert(volume_id.to_owned(), reason)),
            None => drop(self.all().remove(volume_id)),
        }
    }

    /// Why a volume's filesystem did not grow when it was last tried.
    pub fn why(&self, volume_id: &str) -> Option<String> {
        self.all().get(volume_id).cloned()
    }
}

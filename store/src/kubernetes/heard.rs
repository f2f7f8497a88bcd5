//! When the API server last said something.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// Remembers when the API server last gave an answer that it can only give when it works: an object, an event of a watch, or a refusal
/// of its own. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Heard(Arc<Mutex<Instant>>);

impl Heard {
    /// One that begins to count now.
    pub(super) fn begin() -> Heard {
        Heard(Arc::new(Mutex::new(Instant::now())))
    }

    pub(super) fn now(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    /// How long ago that was.
    pub fn elapsed(&self) -> Duration {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).elapsed()
    }
}

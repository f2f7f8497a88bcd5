//! How long to wait after the n-th failure.

use std::time::Duration;

/// A delay that doubles from `initial` to `max`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    pub initial: Duration,
    pub max: Duration,
}

impl Backoff {
    /// The delay after `failures` failures in a row; zero after none.
    ///
    /// ```
    /// use std::time::Duration;
    /// use backing_image_runtime::backoff::Backoff;
    /// let backoff = Backoff { initial: Duration::from_secs(1), max: Duration::from_secs(300) };
    /// assert_eq!(backoff.delay(0), Duration::ZERO);
    /// assert_eq!(backoff.delay(3), Duration::from_secs(4));
    /// assert_eq!(backoff.delay(1000), Duration::from_secs(300));
    /// ```
    pub fn delay(&self, failures: u32) -> Duration {
        match failures {
            0 => Duration::ZERO,
            n => self.initial.saturating_mul(2u32.saturating_pow(n - 1)).min(self.max),
        }
    }
}

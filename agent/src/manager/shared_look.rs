//! A look at a disk that is shared by all who ask while it goes on: on a disk that hangs, one thread waits and not one for each call.

use std::sync::{Mutex, PoisonError};

use tokio::sync::watch;
use tokio_util::task::TaskTracker;

/// At most one look at a time.
pub(super) struct SharedLook<T>(Mutex<Option<watch::Receiver<Option<T>>>>);

impl<T> Default for SharedLook<T> {
    fn default() -> Self {
        SharedLook(Mutex::new(None))
    }
}

impl<T: Clone + Send + Sync + 'static> SharedLook<T> {
    /// What the look that goes on finds, or else this one, which then goes on whoever still waits for it; `None`: it broke off.
    pub async fn take(&self, tracker: &TaskTracker, look: impl Future<Output = T> + Send + 'static) -> Option<T> {
        let mut told = {
            let mut current = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            match current.as_ref().filter(|told| told.has_changed().is_ok()) {
                Some(told) => told.clone(),
                None => {
                    let (tell, told) = watch::channel(None);
                    tracker.spawn(async move { tell.send_replace(Some(look.await)) });
                    current.insert(told).clone()
                }
            }
        };
        told.wait_for(Option::is_some).await.ok().and_then(|found| found.clone())
    }
}

#[cfg(test)]
mod tests {
    use futures::poll;
    use tokio::sync::oneshot;

    use super::*;

    #[tokio::test]
    async fn who_asks_while_a_disk_is_looked_through_begins_no_other_look() {
        let (looks, tracker) = (SharedLook::default(), TaskTracker::new());
        let (answer, answered) = oneshot::channel();
        let mut given_up = Box::pin(looks.take(&tracker, async move { answered.await.unwrap() }));
        assert!(poll!(&mut given_up).is_pending());
        drop(given_up);
        let mut others: Vec<_> = (0..3).map(|n| Box::pin(looks.take(&tracker, async move { n }))).collect();
        for other in &mut others {
            assert!(poll!(other).is_pending());
        }
        assert_eq!(tracker.len(), 1);
        answer.send(7).unwrap();
        assert_eq!(futures::future::join_all(others).await, [Some(7); 3]);
        tracker.close();
        tracker.wait().await;
        assert_eq!(looks.take(&tracker, async { 8 }).await, Some(8), "what was found before is old");
        assert_eq!(looks.take(&tracker, async { panic!("broken") }).await, None);
        assert_eq!(looks.take(&tracker, async { 9 }).await, Some(9));
    }
}

//! How many bytes a second leave or come: a limit on all, and one for each image.
//!
//! Bytes go in pieces, each paid for by the time that it takes at the limit of that moment, so a change has effect within one piece,
//! also on what waits. Who waits is served in the order in which it came: nobody starves, and since pieces are small nobody waits long
//! enough to look silent.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use crate::limits::CHUNK_BYTES;

/// Pieces of a second's bytes: a change has effect within that fraction of a second.
const PIECES_PER_SECOND: u64 = 16;

/// The smallest piece, one read block, and of what others are multiples. At the lowest limit (64 KiB/s) 16 senders get one each second.
const BLOCK_BYTES: u64 = 4096;

/// What may be caught up with of a late timer.
const SLACK: Duration = Duration::from_nanos(1_000_000_000 / PIECES_PER_SECOND);

/// The books of one limit, on a clock of its own.
#[derive(Debug, Default)]
struct Bucket {
    /// Until when everything that went is paid for.
    paid_until: Duration,
}

impl Bucket {
    /// How many of so many bytes go next at that rate, and when.
    fn next(&self, rate: u64, wanted: u64, now: Duration) -> (u64, Duration) {
        let piece = wanted.min(piece(rate));
        (piece, self.paid_until.max(now.saturating_sub(SLACK)) + time(piece, rate))
    }

    /// Books what goes now.
    fn pay(&mut self, due: Duration) {
        self.paid_until = due;
    }

    /// Takes back what was booked and did not go.
    fn refund(&mut self, bytes: u64, rate: u64) {
        self.paid_until = self.paid_until.saturating_sub(time(bytes, rate));
    }
}

/// Bytes that go at once under a limit.
fn piece(rate: u64) -> u64 {
    (rate / PIECES_PER_SECOND / BLOCK_BYTES * BLOCK_BYTES).clamp(BLOCK_BYTES, CHUNK_BYTES)
}

/// How long so many bytes take, rounded up.
fn time(bytes: u64, rate: u64) -> Duration {
    let nanos = (u128::from(bytes) * 1_000_000_000).div_ceil(u128::from(rate.max(1)));
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

/// A limit that can be changed at any time.
#[derive(Debug)]
pub struct Limit {
    /// Bytes a second; 0: none.
    rate: watch::Sender<u64>,
    /// Held by who waits first; the others stand in line for it.
    turn: tokio::sync::Mutex<()>,
    bucket: Mutex<Bucket>,
    epoch: Instant,
}

impl Default for Limit {
    fn default() -> Self {
        Limit::new(0)
    }
}

impl Limit {
    /// So many bytes a second; 0: any number.
    pub fn new(rate: u64) -> Limit {
        let (turn, bucket) = (tokio::sync::Mutex::default(), Mutex::default());
        Limit { rate: watch::Sender::new(rate), turn, bucket, epoch: Instant::now() }
    }

    /// Bytes a second that hold now; 0: no limit.
    pub fn rate(&self) -> u64 {
        *self.rate.borrow()
    }

    /// Changes it, also for who waits.
    pub fn set(&self, rate: u64) {
        self.rate.send_if_modified(|now| std::mem::replace(now, rate) != rate);
    }

    /// Waits until some of so many bytes may go; returns how many, at least one.
    pub async fn take(&self, wanted: u64) -> u64 {
        let mut changes = self.rate.subscribe();
        if *changes.borrow() == 0 || wanted == 0 {
            return wanted;
        }
        let _turn = self.turn.lock().await;
        loop {
            let rate = *changes.borrow_and_update();
            if rate == 0 {
                return wanted;
            }
            let now = self.epoch.elapsed();
            let (piece, due) = self.bucket().next(rate, wanted, now);
            // Another limit counts from its change on.
            if due <= now || timeout(due - now, changes.changed()).await.is_err() {
                self.bucket().pay(due);
                return piece;
            }
        }
    }

    fn refund(&self, bytes: u64) {
        let rate = self.rate();
        if rate > 0 && bytes > 0 {
            self.bucket().refund(bytes, rate);
        }
    }

    fn bucket(&self) -> MutexGuard<'_, Bucket> {
        self.bucket.lock().expect("no holder of the lock panics")
    }
}

/// The limits of a disk by their wish: of all copies together, and by image name. 0: none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    pub total: u64,
    pub images: BTreeMap<String, u64>,
}

/// The limits of a disk.
#[derive(Debug, Default)]
pub(crate) struct Bandwidth {
    total: Arc<Limit>,
    /// Of images that have a limit, or are being sent.
    images: Mutex<BTreeMap<String, Arc<Limit>>>,
}

impl Bandwidth {
    /// Changes all limits, also for what is being sent.
    pub fn set(&self, limits: &Limits) {
        self.total.set(limits.total);
        let mut images = self.images();
        for name in limits.images.keys() {
            images.entry(name.clone()).or_default();
        }
        for (name, limit) in images.iter() {
            limit.set(limits.images.get(name).copied().unwrap_or(0));
        }
        forget_idle(&mut images);
    }

    /// What holds now.
    pub fn limits(&self) -> Limits {
        let images = self.images();
        let limited = images.iter().map(|(name, limit)| (name.clone(), limit.rate())).filter(|(_, rate)| *rate > 0);
        Limits { total: self.total.rate(), images: limited.collect() }
    }

    /// What one transfer of an image may send.
    pub fn share(&self, image: &str) -> Share {
        let mut images = self.images();
        forget_idle(&mut images);
        let image = images.entry(image.to_owned()).or_default().clone();
        Share { total: self.total.clone(), image }
    }

    fn images(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Limit>>> {
        self.images.lock().expect("no holder of the lock panics")
    }
}

/// Only the map itself knows an idle one.
fn forget_idle(images: &mut BTreeMap<String, Arc<Limit>>) {
    images.retain(|_, limit| limit.rate() > 0 || Arc::strong_count(limit) > 1);
}

/// What holds for one transfer.
#[derive(Clone, Debug)]
pub(crate) struct Share {
    total: Arc<Limit>,
    image: Arc<Limit>,
}

impl Share {
    /// Waits until some of so many bytes may go; returns how many.
    pub async fn take(&self, wanted: u64) -> u64 {
        // The image first: who waits for it must not hold up the others.
        let of_image = self.image.take(wanted).await;
        let granted = self.total.take(of_image).await;
        self.image.refund(of_image - granted);
        granted
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    const KIB: u64 = 1 << 10;

    /// When each piece of so many bytes goes, in milliseconds, the first one asked for long after the last.
    fn check(rate: u64, bytes: u64, expected: &[(u64, u128)]) {
        let start = Duration::from_secs(100);
        let (mut bucket, mut now, mut left, mut went) = (Bucket::default(), start, bytes, vec![]);
        while left > 0 {
            let (piece, due) = bucket.next(rate, left, now);
            now = now.max(due);
            bucket.pay(due);
            went.push((piece, (now - start).as_millis()));
            left -= piece;
        }
        assert_eq!(went, expected, "{bytes} bytes at {rate}");
    }

    #[test]
    fn bytes_go_in_pieces_at_the_rate() {
        check(64 * KIB, 10 * KIB, &[(4096, 0), (4096, 62), (2048, 93)]);
        check(16 << 20, 3 << 20, &[(1 << 20, 0), (1 << 20, 62), (1 << 20, 125)]);
        // Never more than a chunk at once, however fast; what is not a multiple of a block is rounded down.
        check(64 << 20, 3 << 20, &[(1 << 20, 0), (1 << 20, 0), (1 << 20, 0)]);
        check(100_000, 9000, &[(4096, 0), (4096, 19), (808, 27)]);
        check(1, 2, &[(2, 1937)]);
    }

    #[test]
    fn idle_time_is_not_saved_up() {
        let (rate, mut bucket) = (64 * KIB, Bucket::default());
        let mut went = 0;
        // Asked for without pause for a second, after an hour of nothing.
        let (start, mut now) = (Duration::from_secs(3600), Duration::from_secs(3600));
        while now <= start + Duration::from_secs(1) {
            let (piece, due) = bucket.next(rate, 1 << 20, now);
            bucket.pay(due);
            now = now.max(due);
            went += piece;
        }
        assert!((rate..=rate + 3 * piece(rate)).contains(&went), "{went}");
    }

    #[test]
    fn what_was_taken_and_not_used_is_free_again() {
        let (rate, now, mut bucket) = (64 * KIB, Duration::from_secs(9), Bucket::default());
        let (piece, due) = bucket.next(rate, 4096, now);
        bucket.pay(due);
        bucket.refund(piece, rate);
        assert_eq!(bucket.next(rate, 4096, now), (piece, due));
    }

    #[tokio::test(start_paused = true)]
    async fn a_change_counts_for_who_waits() {
        let limit = Limit::new(64 * KIB);
        assert_eq!(limit.take(1 << 30).await, 4096);
        let mut waiting = std::pin::pin!(limit.take(1 << 30));
        assert_eq!(waiting.as_mut().now_or_never(), None);
        limit.set(0);
        assert_eq!(waiting.now_or_never(), Some(1 << 30), "nothing holds it any more");
        limit.set(KIB * KIB);
        let start = Instant::now();
        let mut left: u64 = 4 << 20;
        while left > 0 {
            left -= limit.take(left).await;
        }
        let took = start.elapsed();
        assert!(took >= Duration::from_secs(4) - SLACK && took < Duration::from_secs(5), "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn who_came_first_goes_first_and_nobody_starves() {
        let limit = Arc::new(Limit::new(64 * KIB));
        let (told, mut turns) = tokio::sync::mpsc::unbounded_channel();
        for sender in 0..3 {
            let (limit, told) = (limit.clone(), told.clone());
            tokio::spawn(async move {
                for _ in 0..4 {
                    limit.take(1 << 20).await;
                    told.send(sender).unwrap();
                }
            });
        }
        drop(told);
        let mut order = vec![];
        while let Some(sender) = turns.recv().await {
            order.push(sender);
        }
        assert_eq!(order.len(), 12);
        for round in order.chunks(3) {
            let mut round = round.to_vec();
            round.sort_unstable();
            assert_eq!(round, [0, 1, 2], "{order:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_limit_of_an_image_holds_beside_that_of_all() {
        let bandwidth = Bandwidth::default();
        let wish = Limits { total: 256 * KIB, images: [("slow".to_owned(), 64 * KIB)].into() };
        // Transfers that run already.
        let (slow, fast) = (bandwidth.share("slow"), bandwidth.share("fast"));
        bandwidth.set(&wish);
        assert_eq!(bandwidth.limits(), wish);
        let start = Instant::now();
        let send = async |share: &Share, mut left: u64| {
            while left > 0 {
                left -= share.take(left).await;
            }
            start.elapsed()
        };
        let (slow, fast) = tokio::join!(send(&slow, 256 * KIB), send(&fast, 512 * KIB));
        assert!(slow >= Duration::from_secs(4) - SLACK && slow < Duration::from_millis(4700), "{slow:?}");
        // At least 192 KiB/s are left for it, and it has to share with the other one.
        assert!(fast > Duration::from_millis(2100) && fast < Duration::from_millis(2800), "{fast:?}");
    }

    #[test]
    fn what_has_no_limit_and_is_not_sent_is_forgotten() {
        let bandwidth = Bandwidth::default();
        let share = bandwidth.share("one");
        drop(bandwidth.share("two"));
        bandwidth.set(&Limits { total: 0, images: [("three".to_owned(), 64 * KIB)].into() });
        assert_eq!(bandwidth.images().keys().collect::<Vec<_>>(), ["one", "three"]);
        drop(share);
        bandwidth.set(&Limits::default());
        assert!(bandwidth.images().is_empty());
    }
}

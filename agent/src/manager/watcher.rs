//! Notices at once when a ready copy is changed or removed from outside.
//!
//! Each ready copy is watched by inotify: its file (written to, touched, unlinked), what describes it, and the directories above
//! it (renamed away).
//! Where that cannot be had, and for what inotify does not tell, the periodic look finds it.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::sync::Arc;

use futures::{FutureExt, StreamExt};
use inotify::{Event, EventMask, EventStream, Inotify, WatchDescriptor, WatchMask, Watches};

use super::registry::Registry;
use super::verification::Verification;
use crate::error::{AgentError, blocking};
use crate::layout::{COPY, DESCRIPTIONS, Disk, ImageKey};

/// Unlinking a file that is still open changes its count of links: `ATTRIB`.
const FILE: WatchMask =
    WatchMask::MODIFY.union(WatchMask::ATTRIB).union(WatchMask::MOVE_SELF).union(WatchMask::DELETE_SELF);
const DIRECTORY: WatchMask = WatchMask::MOVE_SELF.union(WatchMask::DELETE_SELF).union(WatchMask::ONLYDIR);
/// What describes a copy lies beside it. Our own writing ends with a rename to its name, which is not among these.
const DESCRIBED: WatchMask =
    DIRECTORY.union(WatchMask::DELETE).union(WatchMask::MOVED_FROM).union(WatchMask::MOVED_TO).union(WatchMask::MODIFY);
/// Another file may be in its place, perhaps of the same length and time.
const REPLACED: EventMask = EventMask::DELETE_SELF.union(EventMask::MOVE_SELF).union(EventMask::IGNORED);

/// Bytes for events. One has 16 and a name of 255 at most.
const BUFFER: usize = 4096;

/// What an event says of a copy.
#[derive(Clone, Copy, Default)]
struct Seen {
    /// Its file was written to.
    is_written: bool,
    /// What describes it was touched.
    is_undescribed: bool,
    /// Its watches are those of something else now.
    is_replaced: bool,
}

/// Watches until the registry's tasks end. Says so when it cannot.
pub(super) async fn run(registry: Arc<Registry>) {
    let watching = async {
        let events = Inotify::init()?.into_event_stream([0; BUFFER])?;
        Watcher { events, by_copy: BTreeMap::new() }.run(&registry).await
    };
    if let Some(Err(error)) = registry.tasks.run_until_cancelled(watching).await {
        tracing::warn!(%error, "files cannot be watched, changes are found by the periodic look");
    }
}

struct Watcher {
    events: EventStream<[u8; BUFFER]>,
    /// The watches of each ready copy; none where they could not be had.
    by_copy: BTreeMap<ImageKey, Vec<WatchDescriptor>>,
}

impl Watcher {
    async fn run(&mut self, registry: &Arc<Registry>) -> io::Result<()> {
        let mut version = registry.watch();
        loop {
            version.borrow_and_update();
            // What happened to a copy before it was watched was told to nobody.
            for key in self.follow(registry).await {
                registry.recheck(&key).await;
            }
            let event = tokio::select! {
                _ = version.changed() => continue,
                event = self.events.next() => event.ok_or(io::ErrorKind::UnexpectedEof)??,
            };
            for (key, seen) in self.noticed(event) {
                if seen.is_undescribed {
                    registry.adopt_again(&key).await;
                }
                registry.recheck(&key).await;
                if seen.is_replaced {
                    self.leave(std::slice::from_ref(&key));
                }
                if seen.is_written || seen.is_replaced {
                    // Perhaps with the time that it had before. Refused unless the copy is still ready.
                    let _ = registry.verify(key, Verification::FAST).await;
                }
            }
        }
    }

    /// Watches exactly the ready copies; returns those that are watched from now on.
    async fn follow(&mut self, registry: &Registry) -> Vec<ImageKey> {
        let ready = registry.ready();
        let is_ready = |key: &ImageKey| ready.binary_search(key).is_ok();
        let left: Vec<ImageKey> = self.by_copy.keys().filter(|key| !is_ready(key)).cloned().collect();
        self.leave(&left);
        let new: Vec<ImageKey> = ready.into_iter().filter(|key| !self.by_copy.contains_key(key)).collect();
        if new.is_empty() {
            return new;
        }
        let (mut watches, disk, keys) = (self.events.watches(), registry.disk.clone(), new.clone());
        let added = blocking(move || Ok(keys.iter().map(|key| add(&mut watches, &disk, key)).collect::<Vec<_>>()));
        for (key, added) in new.iter().zip(added.await.unwrap_or_default()) {
            let watches = added.unwrap_or_else(|error| {
                let error = error.chain();
                tracing::warn!(image = %key, error, "copy cannot be watched, changes are found by the periodic look");
                vec![]
            });
            self.by_copy.insert(key.clone(), watches);
        }
        new
    }

    fn leave(&mut self, copies: &[ImageKey]) {
        let left: Vec<WatchDescriptor> = copies.iter().filter_map(|key| self.by_copy.remove(key)).flatten().collect();
        for watch in left {
            // All copies have the one of the directory that they lie in.
            if !self.by_copy.values().flatten().any(|other| *other == watch) {
                // The kernel has removed it by itself where the file is gone.
                let _ = self.events.watches().remove(watch);
            }
        }
    }

    /// The copies to which something happened: an event, and what else is there already.
    fn noticed(&mut self, event: Event<OsString>) -> BTreeMap<ImageKey, Seen> {
        let mut noticed: BTreeMap<ImageKey, Seen> = BTreeMap::new();
        let mut next = Some(event);
        while let Some(event) = next {
            // When the kernel has lost some, each copy may be meant.
            let is_lost = event.mask.contains(EventMask::Q_OVERFLOW);
            let is_own = event.mask.contains(EventMask::MOVED_TO);
            let is_written = event.name.is_none() && event.mask.contains(EventMask::MODIFY);
            let is_undescribed =
                !is_own && event.name.as_ref().is_some_and(|name| DESCRIPTIONS.iter().any(|known| name == known));
            let is_replaced = match &event.name {
                None => event.mask.intersects(REPLACED),
                Some(name) => is_own && name == COPY,
            };
            for (key, _) in self.by_copy.iter().filter(|(_, watches)| is_lost || watches.contains(&event.wd)) {
                let seen = noticed.entry(key.clone()).or_default();
                seen.is_written |= is_lost || is_written;
                seen.is_undescribed |= is_lost || is_undescribed;
                seen.is_replaced |= is_replaced;
            }
            next = self.events.next().now_or_never().flatten().and_then(Result::ok);
        }
        noticed
    }
}

/// Watches one copy.
fn add(watches: &mut Watches, disk: &Disk, key: &ImageKey) -> Result<Vec<WatchDescriptor>, AgentError> {
    let paths = [(disk.copy(key).file, FILE), (disk.image_dir(key), DESCRIBED), (disk.images_dir(), DIRECTORY)];
    let add = |(path, mask)| match watches.add(&path, mask) {
        Ok(watch) => Ok(watch),
        Err(source) => Err(AgentError::Io { doing: "watch", path, source }),
    };
    paths.into_iter().map(add).collect()
}

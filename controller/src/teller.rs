//! Tells users what became of objects, as Kubernetes events: the one place that does, for all kinds.
//!
//! It compares the facts of each object ([`planner::news`]) with those of the last look, so a state that comes back is told again.
//! What it sees for the first time may have been told by the controller before; only what began lately is told then, and counts only
//! if nobody recorded it since it began.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use api::event::{Mood, News};
use api::{BackingImage, BackingImageDataSource, BackingImageManager, Engine, Node, Replica, Volume};
use jiff::Timestamp;
use kube::Resource;
use planner::disk::Disks;
use planner::news::{self, Fact};
use store::events::Recorder;

/// How long a controller may be away for what began meanwhile to be told by the next one.
const LATELY: Duration = Duration::from_secs(600);

pub struct Teller {
    recorder: Recorder,
    nodes: BTreeMap<String, Node>,
    /// Of the nodes: how users know them.
    disks: Disks,
    /// By uid, what was told last of each topic.
    told: HashMap<String, BTreeMap<String, Told>>,
}

/// What makes two facts of a topic the same.
#[derive(Clone, PartialEq)]
struct Told {
    mood: Mood,
    reason: String,
    again: String,
}

impl Teller {
    /// One that has not looked at anything.
    pub fn new(recorder: Recorder) -> Teller {
        Teller { recorder, nodes: BTreeMap::new(), disks: Disks::default(), told: HashMap::new() }
    }

    pub fn image(&mut self, image: &BackingImage, is_gone: bool) {
        let facts = news::of_image(image, &self.disks);
        self.look(image, facts, is_gone);
    }

    pub fn manager(&mut self, manager: &BackingImageManager, is_gone: bool) {
        let facts = news::of_manager(manager, &self.disks);
        self.look(manager, facts, is_gone);
    }

    pub fn data_source(&mut self, source: &BackingImageDataSource, is_gone: bool) {
        let facts = news::of_data_source(source, &self.disks);
        self.look(source, facts, is_gone);
    }

    pub fn volume(&mut self, volume: &Volume, is_gone: bool) {
        self.look(volume, news::of_volume(volume), is_gone);
    }

    pub fn engine(&mut self, engine: &Engine, is_gone: bool) {
        self.look(engine, news::of_engine(engine), is_gone);
    }

    pub fn replica(&mut self, replica: &Replica, is_gone: bool) {
        let facts = news::of_replica(replica, &self.disks);
        self.look(replica, facts, is_gone);
    }

    pub fn node(&mut self, node: &Node, is_gone: bool) {
        let name = node.metadata.name.clone().unwrap_or_default();
        if is_gone {
            self.nodes.remove(&name);
        } else {
            self.nodes.insert(name, node.clone());
        }
        let nodes: Vec<Node> = self.nodes.values().cloned().collect();
        self.disks = Disks::of(&nodes);
        self.look(node, news::of_node(node), is_gone);
    }

    fn look<T: Resource<DynamicType = ()>>(&mut self, object: &T, facts: Vec<Fact>, is_gone: bool) {
        let uid = object.meta().uid.clone().unwrap_or_default();
        let before = self.told.remove(&uid);
        if is_gone {
            return;
        }
        let mut told = BTreeMap::new();
        for Fact { topic, news, since, again } in facts {
            let last = before.as_ref().and_then(|before| before.get(&topic));
            let Some(news) = news else {
                told.extend(last.cloned().map(|last| (topic, last)));
                continue;
            };
            let now = Told { mood: news.mood, reason: news.reason.clone(), again };
            match (&before, last) {
                (None, _) => self.tell_if_lately(object, &news, &since),
                (Some(_), Some(last)) if !is_news(last, &now) => {}
                (Some(_), _) => self.recorder.record(object, &news, None),
            }
            told.insert(topic, now);
        }
        self.told.insert(uid, told);
    }

    fn tell_if_lately<T: Resource<DynamicType = ()>>(&self, object: &T, news: &News, since: &str) {
        let Ok(since) = since.parse::<Timestamp>() else { return };
        if since + LATELY > Timestamp::now() {
            self.recorder.record(object, news, Some(since));
        }
    }
}

/// An attempt that becomes known, or is over, is not one more.
fn is_news(last: &Told, now: &Told) -> bool {
    let is_another = !last.again.is_empty() && !now.again.is_empty() && last.again != now.again;
    is_another || (last.mood, &last.reason) != (now.mood, &now.reason)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use k8s_openapi::api::core::v1::Event;
    use tokio_util::sync::CancellationToken;

    use super::*;

    fn fact(topic: &str, reason: &str, since: Timestamp) -> Fact {
        let news = Some(News::warning(reason, "a sentence"));
        Fact { topic: topic.into(), news, since: since.to_string(), again: String::new() }
    }

    #[tokio::test]
    async fn what_is_seen_first_is_told_if_it_began_lately_and_each_thing_once() {
        let store = store::Store::new(Arc::new(store::embedded::Embedded::in_memory()), "longhorn-system");
        let (recorder, recording) = Recorder::new(store.clone(), "test");
        let mut teller = Teller::new(recorder);
        let mut image = BackingImage::new("ubuntu", Default::default());
        image.metadata.namespace = Some("longhorn-system".into());
        image.metadata.uid = Some("1".into());
        let (now, before) = (Timestamp::now(), Timestamp::now() - 2 * LATELY);
        let first = [fact("a", "LongAgo", before), fact("b", "Lately", now)];
        teller.look(&image, first.to_vec(), false);
        // Nobody can tell for a while, and then it is as it was.
        let unknown = Fact { news: None, ..fact("b", "", now) };
        teller.look(&image, vec![first[0].clone(), unknown], false);
        teller.look(&image, first.to_vec(), false);
        teller.look(&image, vec![fact("a", "Other", before)], false);
        teller.look(&image, vec![fact("a", "AtTheEnd", now)], true);
        let stop = CancellationToken::new();
        stop.cancel();
        recording.run(stop).await;
        let events: Vec<Event> = store.list(&Default::default()).await.unwrap();
        let mut told: Vec<_> = events.into_iter().map(|e| (e.reason.unwrap_or_default(), e.count)).collect();
        told.sort();
        assert_eq!(told, [("Lately".to_owned(), Some(1)), ("Other".to_owned(), Some(1))]);
    }

    fn told(mood: Mood, reason: &str, again: &str) -> Told {
        Told { mood, reason: reason.to_owned(), again: again.to_owned() }
    }

    #[test]
    fn another_reason_or_another_attempt_is_news() {
        let last = told(Mood::Warning, "Failed", "12:00");
        for (now, expected) in [
            (told(Mood::Warning, "Failed", "12:00"), false),
            (told(Mood::Warning, "Failed", "12:05"), true),
            (told(Mood::Warning, "Failed", ""), false),
            (told(Mood::Warning, "Gone", "12:00"), true),
            (told(Mood::Normal, "Failed", "12:00"), true),
        ] {
            assert_eq!(is_news(&last, &now), expected, "{} {}", now.reason, now.again);
        }
        let first = told(Mood::Warning, "Failed", "");
        assert!(!is_news(&first, &last), "the time of the next attempt becomes known");
    }
}

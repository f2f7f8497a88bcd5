//! `image verify`: has copies read again, and tells what was found.
//!
//! The wish goes into the image's spec and the answers come from its status, so that it is the same wherever the objects are kept.

use std::collections::BTreeMap;
use std::time::Duration;

use api::image::{CopyState, DiskFileStatus};
use api::{BackingImage, ErrorKind};
use clap::Args;
use jiff::Timestamp;
use serde_json::Value;
use store::ResourceType;
use tokio::time::{Instant, timeout_at};

use super::{Disks, was_deleted};
use crate::client::Client;
use crate::duration;
use crate::failure::failed;
use crate::progress::Progress;

/// Which copies to read.
#[derive(Args, Debug)]
pub struct Verify {
    name: String,
    /// Only the copy on this disk: NODE/DISK or the disk's UUID. Can be given several times.
    #[arg(long)]
    disk: Vec<String>,
    /// How long to wait for the result, e.g. 90s or 2h.
    #[arg(long, default_value = "1h", value_parser = duration::parse)]
    timeout: Duration,
}

/// What became of one copy.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Verdict {
    Whole,
    /// It was damaged; how much, and from where it was repaired.
    Repaired(String),
    /// It is damaged, and nobody has the right bytes.
    Lost(String),
    /// Not known yet, and why.
    Pending(String),
}

/// Runs `image verify`.
pub async fn run(client: &Client, command: Verify, namespace: &str) -> anyhow::Result<()> {
    let Verify { name, disk, timeout } = command;
    let resource = ResourceType::of::<BackingImage>();
    let disks = Disks::fetch(client, namespace).await?;
    let object = client.get(&resource, Some(namespace), &name).await?;
    let before: BackingImage = serde_json::from_value(object)?;
    let copies = chosen(&before, &disks, &disk)?;
    let requested = ask(client, &name, &disk, copies.keys(), namespace).await?;

    let deadline = Instant::now() + timeout;
    let progress = Progress::new();
    let mut verdicts = BTreeMap::new();
    let gone = was_deleted(&name);
    let judged = client.follow(namespace, &name, &gone, async |image: BackingImage| {
        verdicts = copies
            .iter()
            .map(|(uuid, copy)| (uuid.clone(), verdict(&image, uuid, copy, requested)))
            .collect::<BTreeMap<_, _>>();
        let waits = verdicts.iter().filter_map(|(uuid, verdict)| match verdict {
            Verdict::Pending(why) => Some(format!("{} {why}", disks.label(uuid))),
            _ => None,
        });
        let waits = waits.collect::<Vec<_>>().join(", ");
        if waits.is_empty() {
            return Ok(Some(()));
        }
        progress.say(&waits);
        Ok(None)
    });
    let ended = timeout_at(deadline, judged).await;
    progress.finish();
    if let Ok(ended) = ended {
        ended?;
    }
    tell(&name, &disks, verdicts)
}

/// The copies that are meant, as they are now.
fn chosen(image: &BackingImage, disks: &Disks, wanted: &[String]) -> anyhow::Result<BTreeMap<String, DiskFileStatus>> {
    let name = image.metadata.name.as_deref().unwrap_or_default();
    let all = image.status.clone().unwrap_or_default().disk_file_status_map;
    let mut chosen = BTreeMap::new();
    for text in wanted {
        let found = all.iter().find(|(uuid, _)| *uuid == text || disks.label(uuid) == text);
        let Some((uuid, copy)) = found else {
            let known = all.keys().map(|uuid| disks.label(uuid)).collect::<Vec<_>>().join(", ");
            let sentence = format!("image `{name}` has no copy on `{text}`; it has copies on {known}");
            return failed(ErrorKind::NotFound, sentence);
        };
        if copy.state != CopyState::Ready {
            let sentence = format!(
                "the copy of image `{name}` on {text} is not ready, so there is nothing to verify: `why image {name}` says more"
            );
            return failed(ErrorKind::NotReady, sentence);
        }
        chosen.insert(uuid.clone(), copy.clone());
    }
    if wanted.is_empty() {
        chosen.extend(all.into_iter().filter(|(_, copy)| copy.state == CopyState::Ready));
    }
    if chosen.is_empty() {
        let sentence = format!("image `{name}` has no ready copy to verify: `why image {name}` says more");
        return failed(ErrorKind::NotReady, sentence);
    }
    Ok(chosen)
}

/// Writes the wish; returns its time.
async fn ask(
    client: &Client,
    name: &str,
    named: &[String],
    copies: impl Iterator<Item = &String>,
    namespace: &str,
) -> anyhow::Result<Timestamp> {
    let resource = ResourceType::of::<BackingImage>();
    let disks: Vec<&String> = if named.is_empty() { vec![] } else { copies.collect() };
    let wish = |object: &mut Value| {
        let now = Timestamp::now();
        object["spec"]["verifyRequestedAt"] = now.to_string().into();
        object["spec"]["verifyDisks"] = serde_json::to_value(&disks)?;
        Ok(now)
    };
    client.modify(&resource, Some(namespace), name, wish).await
}

/// What is known of a copy since the wish.
fn verdict(image: &BackingImage, uuid: &str, before: &DiskFileStatus, requested: Timestamp) -> Verdict {
    let status = image.status.clone().unwrap_or_default();
    let Some(copy) = status.disk_file_status_map.get(uuid) else {
        return Verdict::Lost("the copy was removed meanwhile".into());
    };
    let verified: Option<Timestamp> = copy.verified_at.parse().ok();
    let is_damaged = copy.state == CopyState::Failed && copy.error_kind == Some(ErrorKind::Corrupt);
    let others = status.disk_file_status_map.iter();
    let has_peer = others.filter(|(other, _)| *other != uuid).any(|(_, c)| c.state == CopyState::Ready);
    match copy.state {
        CopyState::Ready if verified.is_some_and(|at| at >= requested) && copy.damage != before.damage => {
            Verdict::Repaired(copy.damage.clone())
        }
        CopyState::Ready if verified.is_some_and(|at| at >= requested) => Verdict::Whole,
        CopyState::Ready => Verdict::Pending("is being read".into()),
        _ if is_damaged && !has_peer => Verdict::Lost(copy.message.clone()),
        _ if is_damaged => Verdict::Pending(format!("is damaged and will be repaired: {}", copy.message)),
        state => Verdict::Pending(format!("is {}", super::state(state))),
    }
}

/// Prints what was found; fails when a copy is lost or not known.
fn tell(name: &str, disks: &Disks, verdicts: BTreeMap<String, Verdict>) -> anyhow::Result<()> {
    let (mut lost, mut pending) = (vec![], vec![]);
    for (uuid, verdict) in verdicts {
        let label = disks.label(&uuid);
        match verdict {
            Verdict::Whole => println!("{label} whole"),
            Verdict::Repaired(damage) => println!("{label} was damaged and is whole again: {damage}"),
            Verdict::Lost(why) => lost.push(format!("the copy on {label}: {why}")),
            Verdict::Pending(why) => pending.push(format!("the copy on {label} {why}")),
        }
    }
    if !lost.is_empty() {
        let sentence = format!(
            "image `{name}` is damaged, and no other copy is ready to repair it from: {}. It is downloaded again when \
             this lasts; `why image {name}` says when",
            lost.join("; ")
        );
        return failed(ErrorKind::Corrupt, sentence);
    }
    if !pending.is_empty() {
        let sentence =
            format!("not all is known yet: {}. It goes on; `why image {name}` says more", pending.join("; "));
        return failed(ErrorKind::Pending, sentence);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use api::image::BackingImageStatus;

    use super::*;
    use crate::failure::Failure;

    fn copy(state: CopyState, verified_at: &str, damage: &str) -> DiskFileStatus {
        DiskFileStatus { state, verified_at: verified_at.into(), damage: damage.into(), ..Default::default() }
    }

    fn image(copies: &[(&str, DiskFileStatus)]) -> BackingImage {
        let mut image = BackingImage::new("one", Default::default());
        let map = copies.iter().map(|(disk, copy)| ((*disk).to_owned(), copy.clone())).collect();
        image.status = Some(BackingImageStatus { disk_file_status_map: map, ..Default::default() });
        image
    }

    #[test]
    fn only_an_answer_to_this_wish_counts() {
        let requested = "2026-01-01T00:00:00Z".parse().unwrap();
        let (early, late) = ("2025-12-31T23:59:59Z", "2026-01-01T00:00:00Z");
        let (ready, failed) = (CopyState::Ready, CopyState::Failed);
        let before = copy(ready, early, "old");
        let seen = |copies: &[(&str, DiskFileStatus)]| verdict(&image(copies), "a", &before, requested);
        assert_eq!(seen(&[("a", copy(ready, early, "old"))]), Verdict::Pending("is being read".into()));
        assert_eq!(seen(&[("a", copy(ready, early, "new"))]), Verdict::Pending("is being read".into()));
        assert_eq!(seen(&[("a", copy(ready, late, "old"))]), Verdict::Whole);
        assert_eq!(seen(&[("a", copy(ready, late, "new"))]), Verdict::Repaired("new".into()));
        let mut damaged = copy(failed, early, "old");
        damaged.message = "bad".into();
        assert!(matches!(seen(&[("a", damaged.clone())]), Verdict::Pending(_)), "it failed for another reason");
        damaged.error_kind = Some(ErrorKind::Corrupt);
        assert_eq!(seen(&[("a", damaged.clone())]), Verdict::Lost("bad".into()));
        assert!(matches!(seen(&[("a", damaged), ("b", copy(ready, "", ""))]), Verdict::Pending(_)));
        assert!(matches!(seen(&[("b", copy(ready, "", ""))]), Verdict::Lost(_)));
    }

    #[test]
    fn a_copy_is_named_by_its_place_or_uuid_and_must_be_ready() {
        let disks = Disks(vec![("a".into(), "node-1/disk-1".into()), ("b".into(), "node-2/disk-1".into())]);
        let image = image(&[("a", copy(CopyState::Ready, "", "")), ("b", copy(CopyState::Failed, "", ""))]);
        let names = |wanted: &[&str]| {
            let wanted: Vec<String> = wanted.iter().map(|w| (*w).to_owned()).collect();
            chosen(&image, &disks, &wanted).map(|map| map.into_keys().collect::<Vec<_>>())
        };
        assert_eq!(names(&[]).unwrap(), ["a"]);
        assert_eq!(names(&["node-1/disk-1"]).unwrap(), ["a"]);
        assert_eq!(names(&["a"]).unwrap(), ["a"]);
        let kind = |wanted: &str| names(&[wanted]).unwrap_err().downcast_ref::<Failure>().unwrap().kind;
        assert_eq!(kind("b"), ErrorKind::NotReady);
        assert_eq!(kind("node-3/disk-1"), ErrorKind::NotFound);
    }
}

//! `image set-copies`: how many disks shall hold a copy of an image, and what comes of it.
//!
//! The number is `minNumberOfCopies` of the image's spec; the controller does the rest, whoever writes it. What goes is foretold by the
//! judge of the clean-up (`planner::image::leaving`).

use std::time::Duration;

use api::image::{BackingImageStatus, CopyState};
use api::names::condition::READY;
use api::{BackingImage, ErrorKind, condition};
use clap::Args;
use jiff::Timestamp;
use serde_json::Value;
use store::ResourceType;
use tokio::time::{Instant, timeout_at};

use super::clean_up::World;
use super::{Disks, show, was_deleted};
use crate::client::Client;
use crate::duration;
use crate::failure::failed;
use crate::progress::Progress;

/// How many copies of which image.
#[derive(Args, Debug)]
pub struct SetCopies {
    name: String,
    /// How many disks shall hold a copy, at least 1. More than that stay where replicas use them.
    copies: u32,
    /// Wait until as many are ready, and until those are gone that go at once.
    #[arg(long)]
    wait: bool,
    /// How long to wait, e.g. 90s or 5m.
    #[arg(long, default_value = "10m", value_parser = duration::parse)]
    timeout: Duration,
}

/// Runs `image set-copies`.
pub async fn run(client: &Client, command: SetCopies, namespace: &str) -> anyhow::Result<()> {
    let SetCopies { name, copies, wait, timeout } = command;
    let resource = ResourceType::of::<BackingImage>();
    let wish = |object: &mut Value| {
        object["spec"]["minNumberOfCopies"] = copies.into();
        let image: BackingImage = serde_json::from_value(object.clone())?;
        Ok(image)
    };
    let image = client.modify(&resource, Some(namespace), &name, wish).await?;
    let disks = Disks::fetch(client, namespace).await?;
    print!("{}", foretell(&World::fetch(client, image, namespace).await?, &disks, Timestamp::now()));
    if !wait {
        return Ok(());
    }
    let deadline = Instant::now() + timeout;
    let progress = Progress::new();
    let mut waits_for = "nothing is known of it yet".to_owned();
    let look = async |image: BackingImage| {
        show(&progress, &disks, &image);
        let open = is_open(&World::fetch(client, image, namespace).await?, &disks, Timestamp::now());
        Ok(match open {
            None => Some(()),
            Some(why) => {
                waits_for = why;
                None
            }
        })
    };
    let ended = timeout_at(deadline, client.follow(namespace, &name, &was_deleted(&name), look)).await;
    progress.finish();
    match ended {
        Ok(ended) => {
            ended?;
            println!("backingimage.longhorn.io/{name} has its copies");
            Ok(())
        }
        Err(_) => {
            let sentence = format!("not done yet: {waits_for}. It goes on; `why image {name}` says more");
            failed(ErrorKind::Pending, sentence)
        }
    }
}

fn status(image: &BackingImage) -> BackingImageStatus {
    image.status.clone().unwrap_or_default()
}

/// How many wanted copies are ready.
fn ready(world: &World) -> usize {
    let status = status(&world.image);
    let is_ready = |disk| status.disk_file_status_map.get(disk).is_some_and(|copy| copy.state == CopyState::Ready);
    world.image.spec.disk_file_spec_map.keys().filter(|disk| is_ready(*disk)).count()
}

/// What the controller will do about the number that the image asks for.
fn foretell(world: &World, disks: &Disks, now: Timestamp) -> String {
    let (wanted, ready) = (world.image.spec.min_number_of_copies as usize, ready(world));
    let name = world.image.metadata.name.as_deref().unwrap_or_default();
    let copies = if wanted == 1 { "1 copy".into() } else { format!("{wanted} copies") };
    let has = format!("image `{name}` shall have {copies} at least; ready: {ready}\n");
    if ready >= wanted {
        return has + &world.goes_by_itself(disks, now);
    }
    if world.settings.replenish_limit == 0 {
        let setting = api::setting::REPLENISH_LIMIT;
        return format!("{has}no copy is made by itself, since setting {setting} is 0\n");
    }
    format!("{has}{} more will be made, as far as disks are eligible\n", wanted - ready)
}

/// What is still to happen, if something is that does not wait for its time.
fn is_open(world: &World, disks: &Disks, now: Timestamp) -> Option<String> {
    let status = status(&world.image);
    if ready(world) < world.image.spec.min_number_of_copies as usize {
        let told = condition::find(&status.conditions, READY).map(|c| c.message.clone());
        return Some(told.unwrap_or_else(|| "no copy is ready".into()));
    }
    if let Some(next) = world.leaving(now).iter().find(|leaving| leaving.at <= now) {
        return Some(format!("the copy on {} goes, since {}", disks.label(&next.disk), next.cause.sentence()));
    }
    let map = &world.image.spec.disk_file_spec_map;
    let ending = status.disk_file_status_map.keys().find(|disk| !map.contains_key(*disk))?;
    Some(format!("the copy on {} is being given up", disks.label(ending)))
}

#[cfg(test)]
mod tests {
    use api::image::DiskFileStatus;
    use api::{Condition, ConditionStatus, Replica, Setting};
    use planner::setting::Settings;

    use super::*;

    const NOW: &str = "2026-01-01T01:00:00Z";

    /// An image with ready copies on `a`, unused since an hour, `b`, unused for half of one, and `c`, in use.
    fn world(wanted: u32) -> (World, Disks) {
        let mut image = BackingImage::new("one", Default::default());
        image.spec.min_number_of_copies = wanted;
        let mut status = BackingImageStatus { real_size: 3 << 20, checksum: "c".into(), ..Default::default() };
        for (disk, last_use) in [("a", "2026-01-01T00:00:00Z"), ("b", "2026-01-01T00:30:00Z"), ("c", "")] {
            image.spec.disk_file_spec_map.insert(disk.into(), Default::default());
            let copy = DiskFileStatus { state: CopyState::Ready, ..Default::default() };
            status.disk_file_status_map.insert(disk.into(), copy);
            status.disk_last_ref_at_map.insert(disk.into(), last_use.into());
        }
        status.conditions.push(Condition::new(READY, ConditionStatus::True, "FewerCopies", "there is no other disk"));
        image.status = Some(status);
        let mut replica = Replica::new("v-r-1", Default::default());
        replica.spec.disk_id = "c".into();
        let labels = [("a", "node-1/disk-1"), ("b", "node-2/disk-1"), ("c", "node-3/disk-1")];
        let labels = labels.map(|(disk, label)| (disk.to_owned(), label.to_owned())).into();
        (World::of(image, vec![replica]), Disks(labels))
    }

    #[test]
    fn says_what_comes_of_the_number() {
        let now = NOW.parse().unwrap();
        let said = |wanted| foretell(&world(wanted).0, &world(wanted).1, now);
        let goes = "node-1/disk-1 goes by itself now and frees 3.0 MiB: no replica uses it\n";
        assert_eq!(said(2), format!("image `one` shall have 2 copies at least; ready: 3\n{goes}"));
        let later = "node-2/disk-1 goes by itself in 30m and frees 3.0 MiB: no replica uses it\n";
        assert_eq!(said(1), format!("image `one` shall have 1 copy at least; ready: 3\n{goes}{later}"));
        assert_eq!(said(3), "image `one` shall have 3 copies at least; ready: 3\nnothing goes by itself\n");
        let more = "2 more will be made, as far as disks are eligible\n";
        assert_eq!(said(5), format!("image `one` shall have 5 copies at least; ready: 3\n{more}"));
        let (mut world, disks) = world(5);
        let mut none = Setting { value: "0".into(), ..Default::default() };
        none.metadata.name = Some(api::setting::REPLENISH_LIMIT.into());
        world.settings = Settings::of(&[none]);
        let told = foretell(&world, &disks, now);
        assert!(told.ends_with(
            "no copy is made by itself, since setting concurrent-backing-image-replenish-per-node-limit is 0\n"
        ));
    }

    #[test]
    fn waits_for_what_is_missing_and_for_what_goes_at_once() {
        let now = NOW.parse().unwrap();
        let (mut world, disks) = world(5);
        assert_eq!(is_open(&world, &disks, now).as_deref(), Some("there is no other disk"));
        world.image.spec.min_number_of_copies = 1;
        let goes = "the copy on node-1/disk-1 goes, since no replica uses it";
        assert_eq!(is_open(&world, &disks, now).as_deref(), Some(goes));
        world.image.spec.disk_file_spec_map.remove("a");
        let ends = "the copy on node-1/disk-1 is being given up";
        assert_eq!(is_open(&world, &disks, now).as_deref(), Some(ends));
        world.image.status.as_mut().unwrap().disk_file_status_map.remove("a");
        assert_eq!(is_open(&world, &disks, now), None, "the next one goes in half an hour");
    }
}

//! `image clean-up`: takes copies from disks, as far as nothing keeps them, and says what would go.
//!
//! The keys are taken out of the image's `diskFileSpecMap`; who stores that judges (`planner::image::guard`). A dry run asks the same
//! judge about the objects as they are.

use std::collections::BTreeSet;
use std::time::Duration;

use api::image::BackingImageStatus;
use api::names::condition::CLEANED_UP;
use api::{BackingImage, BackingImageDataSource, ErrorKind, Node, Replica, Setting, condition};
use clap::Args;
use jiff::Timestamp;
use planner::image::guard::{Scene, refusal};
use planner::image::{Leaving, leaving};
use planner::setting::Settings;
use store::ResourceType;
use tokio::time::timeout;

use super::{Disks, typed, was_deleted};
use crate::client::Client;
use crate::failure::failed;
use crate::{duration, table};

/// Which copies shall go.
#[derive(Args, Debug)]
pub struct CleanUp {
    name: String,
    /// The copy on this disk: NODE/DISK or the disk's UUID. Can be given several times.
    #[arg(long, required_unless_present = "dry_run")]
    disk: Vec<String>,
    /// Only say what would go and how much room that makes; without `--disk`: what goes by itself, and when.
    #[arg(long)]
    dry_run: bool,
    /// How long to wait until the copies are given up, e.g. 30s.
    #[arg(long, default_value = "1m", value_parser = duration::parse)]
    timeout: Duration,
}

/// Runs `image clean-up`.
pub async fn run(client: &Client, command: CleanUp, namespace: &str) -> anyhow::Result<()> {
    let CleanUp { name, disk, dry_run, timeout: patience } = command;
    let resource = ResourceType::of::<BackingImage>();
    let image: BackingImage = serde_json::from_value(client.get(&resource, Some(namespace), &name).await?)?;
    let disks = Disks::fetch(client, namespace).await?;
    let chosen = chosen(&image, &disks, &disk)?;
    let bytes = status(&image).real_size;
    if dry_run {
        let now = Timestamp::now();
        print!("{}", World::fetch(client, image, namespace).await?.dry_run(&chosen, &disks, now)?);
        return Ok(());
    }
    let take_out = |object: &mut serde_json::Value| {
        if let Some(map) = object["spec"]["diskFileSpecMap"].as_object_mut() {
            map.retain(|disk, _| !chosen.contains(disk));
        }
        Ok(())
    };
    client.modify(&resource, Some(namespace), &name, take_out).await?;
    let gone = was_deleted(&name);
    let given_up = client.follow(namespace, &name, &gone, async |image: BackingImage| {
        if chosen.iter().all(|disk| !status(&image).disk_file_status_map.contains_key(disk)) {
            return Ok(Some(()));
        }
        put_back(&image, &chosen).map_or(Ok(None), |told| failed(ErrorKind::NotReady, told))
    });
    match timeout(patience, given_up).await {
        Ok(ended) => ended?,
        Err(_) => {
            let sentence = format!("the copies of image `{name}` are not given up yet; it goes on: `why image {name}`");
            return failed(ErrorKind::Pending, sentence);
        }
    }
    for disk in &chosen {
        println!("{} removed, {} freed", disks.label(disk), table::bytes(bytes));
    }
    Ok(())
}

fn status(image: &BackingImage) -> BackingImageStatus {
    image.status.clone().unwrap_or_default()
}

/// Why a copy is in the map again, when it is.
fn put_back(image: &BackingImage, chosen: &BTreeSet<String>) -> Option<String> {
    let status = image.status.clone().unwrap_or_default();
    let is_back = chosen.iter().any(|disk| image.spec.disk_file_spec_map.contains_key(disk));
    let told = condition::find(&status.conditions, CLEANED_UP).filter(|c| !c.is_true());
    told.filter(|_| is_back).map(|c| c.message.clone())
}

/// The disks that are meant, by UUID.
fn chosen(image: &BackingImage, disks: &Disks, wanted: &[String]) -> anyhow::Result<BTreeSet<String>> {
    let held = &image.spec.disk_file_spec_map;
    let mut chosen = BTreeSet::new();
    for text in wanted {
        let Some(uuid) = held.keys().find(|uuid| *uuid == text || disks.label(uuid) == text) else {
            let name = image.metadata.name.as_deref().unwrap_or_default();
            let known = held.keys().map(|uuid| disks.label(uuid)).collect::<Vec<_>>().join(", ");
            let known = if known.is_empty() { "none at all".into() } else { format!("copies on {known}") };
            let sentence = format!("image `{name}` has no copy on `{text}`; it has {known}");
            return failed(ErrorKind::NotFound, sentence);
        };
        chosen.insert(uuid.clone());
    }
    Ok(chosen)
}

/// What the judge looks at.
pub(super) struct World {
    pub(super) image: BackingImage,
    data_source: Option<BackingImageDataSource>,
    replicas: Vec<Replica>,
    disks: planner::disk::Disks,
    pub(super) settings: Settings,
}

impl World {
    pub(super) async fn fetch(client: &Client, image: BackingImage, namespace: &str) -> anyhow::Result<World> {
        let name = image.metadata.name.clone().unwrap_or_default();
        let sources: Vec<BackingImageDataSource> =
            typed(client, &ResourceType::of::<BackingImageDataSource>(), namespace).await?;
        let replicas: Vec<Replica> = typed(client, &ResourceType::of::<Replica>(), namespace).await?;
        let nodes: Vec<Node> = typed(client, &ResourceType::of::<Node>(), namespace).await?;
        let settings: Vec<Setting> = typed(client, &ResourceType::of::<Setting>(), namespace).await?;
        Ok(World {
            data_source: sources.into_iter().find(|s| s.metadata.name.as_ref() == Some(&name)),
            replicas: replicas.into_iter().filter(|r| r.spec.backing_image == name).collect(),
            disks: planner::disk::Disks::of(&nodes),
            settings: Settings::of(&settings),
            image,
        })
    }

    /// Objects as a test wants them.
    #[cfg(test)]
    pub(super) fn of(image: BackingImage, replicas: Vec<Replica>) -> World {
        World { image, data_source: None, replicas, disks: Default::default(), settings: Settings::default() }
    }

    fn scene<'a>(&'a self, status: &'a BackingImageStatus) -> Scene<'a> {
        Scene {
            image: &self.image,
            status,
            data_source: self.data_source.as_ref(),
            replicas: &self.replicas,
            disks: &self.disks,
            settings: &self.settings,
        }
    }

    /// The copies that go by themselves, the first one first.
    pub(super) fn leaving(&self, now: Timestamp) -> Vec<Leaving> {
        leaving(&self.scene(&status(&self.image)), now, &self.image.spec.disk_file_spec_map)
    }

    /// What goes by itself, when and why, a line for each copy.
    pub(super) fn goes_by_itself(&self, disks: &Disks, now: Timestamp) -> String {
        let frees = table::bytes(status(&self.image).real_size);
        let mut text = String::new();
        for leaving in self.leaving(now) {
            let left = leaving.at.as_second() - now.as_second();
            let when = if left <= 0 { "now".to_owned() } else { format!("in {}", table::span(left)) };
            let (label, cause) = (disks.label(&leaving.disk), leaving.cause.sentence());
            text += &format!("{label} goes by itself {when} and frees {frees}: {cause}\n");
        }
        if text.is_empty() { "nothing goes by itself\n".into() } else { text }
    }

    /// What would go; without a chosen disk: what goes by itself.
    fn dry_run(&self, chosen: &BTreeSet<String>, disks: &Disks, now: Timestamp) -> anyhow::Result<String> {
        if chosen.is_empty() {
            return Ok(self.goes_by_itself(disks, now));
        }
        let status = status(&self.image);
        let staying = self.image.spec.disk_file_spec_map.keys().filter(|d| !chosen.contains(*d)).cloned().collect();
        if let Some(why) = refusal(&self.scene(&status), chosen, &staying) {
            return failed(ErrorKind::NotReady, why);
        }
        let frees = table::bytes(status.real_size);
        Ok(chosen.iter().map(|disk| format!("{} would go and free {frees}\n", disks.label(disk))).collect())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use api::image::{CopyState, DiskFileStatus};
    use api::{Condition, ConditionStatus};

    use super::*;
    use crate::failure::Failure;

    fn world() -> (World, Disks) {
        let mut image = BackingImage::new("one", Default::default());
        image.spec.min_number_of_copies = 1;
        let ready = DiskFileStatus { state: CopyState::Ready, ..Default::default() };
        let mut status = BackingImageStatus { real_size: 3 << 20, checksum: "c".into(), ..Default::default() };
        for (disk, last_use) in [("a", "2026-01-01T00:00:00Z"), ("b", "2026-01-01T00:30:00Z"), ("c", "")] {
            image.spec.disk_file_spec_map.insert(disk.into(), Default::default());
            status.disk_file_status_map.insert(disk.into(), ready.clone());
            status.disk_last_ref_at_map.insert(disk.into(), last_use.into());
        }
        image.status = Some(status);
        let mut replica = Replica::new("v-r-1", Default::default());
        (replica.spec.disk_id, replica.spec.volume_name) = ("c".into(), "v".into());
        let labels = [("a", "node-1/disk-1"), ("b", "node-2/disk-1"), ("c", "node-3/disk-1")];
        let labels = labels.map(|(disk, label)| (disk.to_owned(), label.to_owned())).into();
        (World::of(image, vec![replica]), Disks(labels))
    }

    #[test]
    fn a_dry_run_says_what_would_go() {
        let (world, disks) = world();
        let now = "2026-01-01T01:00:00Z".parse().unwrap();
        let set = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect::<BTreeSet<_>>();
        let said = |names: &[&str]| world.dry_run(&set(names), &disks, now);
        assert_eq!(
            said(&[]).unwrap(),
            "node-1/disk-1 goes by itself now and frees 3.0 MiB: no replica uses it\n\
             node-2/disk-1 goes by itself in 30m and frees 3.0 MiB: no replica uses it\n"
        );
        assert_eq!(said(&["b"]).unwrap(), "node-2/disk-1 would go and free 3.0 MiB\n");
        let error = said(&["b", "c"]).unwrap_err();
        assert_eq!(error.downcast_ref::<Failure>().unwrap().kind, ErrorKind::NotReady);
        assert!(error.to_string().contains("replica v-r-1 of volume v uses it"), "{error}");
    }

    #[test]
    fn a_copy_is_named_by_its_place_or_uuid() {
        let (world, disks) = world();
        let names = |text: &str| chosen(&world.image, &disks, &[text.to_owned()]);
        assert_eq!(names("node-1/disk-1").unwrap(), BTreeSet::from(["a".to_owned()]));
        assert_eq!(names("b").unwrap(), BTreeSet::from(["b".to_owned()]));
        let error = names("node-4/disk-1").unwrap_err();
        assert!(error.to_string().contains("it has copies on node-1/disk-1, node-2/disk-1"), "{error}");
    }

    #[test]
    fn what_was_put_back_is_told() {
        let (mut world, _) = world();
        let chosen = BTreeSet::from(["a".to_owned()]);
        assert_eq!(put_back(&world.image, &chosen), None, "nobody has looked yet");
        let why = Condition::new(CLEANED_UP, ConditionStatus::False, "CleanUpRefused", "kept");
        world.image.status.as_mut().unwrap().conditions.push(why);
        assert_eq!(put_back(&world.image, &chosen).as_deref(), Some("kept"));
        world.image.spec.disk_file_spec_map = BTreeMap::new();
        assert_eq!(put_back(&world.image, &chosen), None, "of another edit");
    }
}

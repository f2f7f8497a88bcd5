//! `image`: images for people, with their copies disk by disk.

mod clean_up;
mod hopeless;
mod set_bandwidth_limit;
mod set_copies;
mod verify;

use std::time::Duration;

use api::image::{BackingImageSpec, CopyState, DiskFileStatus, SourceType};
use api::names::condition::READY;
use api::{BackingImage, ErrorKind, Node, condition};
use clap::{Args, Subcommand};
use jiff::Timestamp;
use kube::ResourceExt;
use serde::de::DeserializeOwned;
use store::ResourceType;
use tokio::time::{Instant, timeout_at};

use crate::client::Client;
use crate::failure::failed;
use crate::progress::Progress;
use crate::{duration, table};

/// Works with images.
#[derive(Subcommand, Debug)]
pub enum Image {
    /// Makes an image from a URL.
    Create(Create),
    /// Shows every image with its copies, disk by disk.
    #[command(visible_alias = "show")]
    List {
        /// Only this one.
        name: Option<String>,
    },
    /// Waits until an image is ready.
    Wait {
        name: String,
        /// How long to wait, e.g. 90s or 5m.
        #[arg(long, default_value = "10m", value_parser = duration::parse)]
        timeout: Duration,
    },
    /// Reads copies again, compares them with what was downloaded, and repairs what is damaged from other copies.
    Verify(verify::Verify),
    /// Takes copies from disks where nothing needs them, or says what would go.
    CleanUp(clean_up::CleanUp),
    /// Changes how many disks shall hold a copy, and says what comes of it.
    SetCopies(set_copies::SetCopies),
    /// Changes how much of an image is transferred a second, also while it is.
    SetBandwidthLimit(set_bandwidth_limit::SetBandwidthLimit),
}

/// What a new image is made of.
#[derive(Args, Debug)]
pub struct Create {
    name: String,
    /// Where to download it from (http or https).
    #[arg(long)]
    url: String,
    /// SHA-512 that the file must have.
    #[arg(long, default_value = "")]
    checksum: String,
    /// How many disks shall hold a copy; 0: the setting `default-min-number-of-backing-image-copies`.
    #[arg(long, default_value_t = 0)]
    min_copies: u32,
    /// Tags that the node of a copy must all have, with commas between.
    #[arg(long, value_delimiter = ',')]
    node_selector: Vec<String>,
    /// Tags that the disk of a copy must all have, with commas between.
    #[arg(long, value_delimiter = ',')]
    disk_selector: Vec<String>,
    /// Wait until it is ready.
    #[arg(long)]
    wait: bool,
    /// How long to wait.
    #[arg(long, default_value = "10m", value_parser = duration::parse)]
    timeout: Duration,
}

/// Runs `image …`.
pub async fn run(client: &Client, image: Image, namespace: &str) -> anyhow::Result<()> {
    match image {
        Image::Create(create) => self::create(client, create, namespace).await,
        Image::List { name } => list(client, name.as_deref(), namespace).await,
        Image::Wait { name, timeout } => wait(client, &name, timeout, namespace).await,
        Image::Verify(verify) => verify::run(client, verify, namespace).await,
        Image::CleanUp(clean_up) => clean_up::run(client, clean_up, namespace).await,
        Image::SetCopies(set_copies) => set_copies::run(client, set_copies, namespace).await,
        Image::SetBandwidthLimit(limit) => set_bandwidth_limit::run(client, limit, namespace).await,
    }
}

async fn create(client: &Client, create: Create, namespace: &str) -> anyhow::Result<()> {
    let Create { name, url, checksum, min_copies, node_selector, disk_selector, wait, timeout } = create;
    let spec = BackingImageSpec {
        checksum,
        source_type: Some(SourceType::Download),
        source_parameters: [("url".to_owned(), url)].into(),
        min_number_of_copies: min_copies,
        node_selector,
        disk_selector,
        ..Default::default()
    };
    let object = serde_json::to_value(BackingImage::new(&name, spec))?;
    client.create(&ResourceType::of::<BackingImage>(), Some(namespace), &object).await?;
    println!("backingimage.longhorn.io/{name} created");
    if wait { self::wait(client, &name, timeout, namespace).await } else { Ok(()) }
}

/// Objects of one of our kinds.
pub async fn typed<T: DeserializeOwned>(
    client: &Client,
    resource: &ResourceType,
    namespace: &str,
) -> anyhow::Result<Vec<T>> {
    let items = client.items(resource, Some(namespace)).await?;
    Ok(items.into_iter().map(serde_json::from_value).collect::<Result<_, _>>()?)
}

/// `node/disk` of every disk, by UUID.
pub struct Disks(Vec<(String, String)>);

impl Disks {
    /// As the nodes report them.
    pub async fn fetch(client: &Client, namespace: &str) -> anyhow::Result<Disks> {
        let nodes: Vec<Node> = typed(client, &ResourceType::of::<Node>(), namespace).await?;
        let of = |node: Node| {
            let name = node.name_any();
            let disks = node.status.unwrap_or_default().disk_status;
            disks
                .into_iter()
                .map(move |(disk, status)| (status.disk_uuid, format!("{name}/{disk}")))
                .collect::<Vec<_>>()
        };
        Ok(Disks(nodes.into_iter().flat_map(of).collect()))
    }

    fn label<'a>(&'a self, uuid: &'a str) -> &'a str {
        self.0.iter().find(|(id, _)| id == uuid).map_or(uuid, |(_, label)| label)
    }
}

async fn list(client: &Client, name: Option<&str>, namespace: &str) -> anyhow::Result<()> {
    let resource = ResourceType::of::<BackingImage>();
    let images: Vec<BackingImage> = match name {
        Some(name) => vec![serde_json::from_value(client.get(&resource, Some(namespace), name).await?)?],
        None => typed(client, &resource, namespace).await?,
    };
    if images.is_empty() {
        eprintln!("No images found.");
        return Ok(());
    }
    let disks = Disks::fetch(client, namespace).await?;
    print!("{}", copies(&images, &disks, Timestamp::now()));
    Ok(())
}

fn copies(images: &[BackingImage], disks: &Disks, now: Timestamp) -> String {
    let header = ["IMAGE", "SIZE", "VIRTUAL", "FORMAT", "DISK", "STATE", "PROGRESS", "SHA-512 OR REASON"]
        .map(str::to_owned)
        .to_vec();
    let mut rows: Vec<Vec<String>> = vec![];
    for image in images {
        let status = image.status.clone().unwrap_or_default();
        let size = |bytes: u64| if bytes == 0 { "-".to_owned() } else { table::bytes(bytes) };
        let row = |disk: String, state: String, progress: String, digest: String| {
            vec![
                image.name_any(),
                size(status.size),
                size(status.virtual_size),
                status.format.clone(),
                disk,
                state,
                progress,
                digest,
            ]
        };
        if image.spec.disk_file_spec_map.is_empty() && status.disk_file_status_map.is_empty() {
            rows.push(row("-".into(), "waiting".into(), String::new(), reason(image)));
            continue;
        }
        let mut uuids: Vec<&String> =
            image.spec.disk_file_spec_map.keys().chain(status.disk_file_status_map.keys()).collect();
        uuids.sort_by_key(|uuid| disks.label(uuid).to_owned());
        uuids.dedup();
        for uuid in uuids {
            let copy = status.disk_file_status_map.get(uuid).cloned().unwrap_or_default();
            let ready = copy.state == CopyState::Ready;
            let progress = if ready { "100 %".to_owned() } else { format!("{} %", copy.progress) };
            let last = match (ready, copy.message.is_empty()) {
                (true, _) => status.checksum.clone(),
                (false, true) => String::new(),
                (false, false) => note(&copy, Some(now)),
            };
            rows.push(row(disks.label(uuid).to_owned(), state(copy.state).to_owned(), progress, last));
        }
    }
    table::text(header, rows.into_iter())
}

/// Why an image is not ready.
fn reason(image: &BackingImage) -> String {
    let status = image.status.clone().unwrap_or_default();
    condition::find(&status.conditions, READY).map_or("it was just created".into(), |c| c.message.clone())
}

/// The same with the next attempt and what can be done.
fn waiting_for(image: &BackingImage, now: Timestamp) -> String {
    let mut text = reason(image);
    let conditions = image.status.as_ref().map(|s| s.conditions.as_slice()).unwrap_or_default();
    if let Some(ready) = condition::find(conditions, READY) {
        let next: Option<Timestamp> = ready.next_retry_time.parse().ok().filter(|next| *next > now);
        if let Some(next) = next {
            text += &format!("; next attempt in {}", table::span(next.as_second() - now.as_second()));
        }
        if !ready.hint.is_empty() {
            text += &format!("; you can: {}", ready.hint);
        }
    }
    text
}

/// What is said of an image that ends while somebody waits for it.
fn was_deleted(name: &str) -> String {
    format!("image `{name}` was deleted")
}

/// Returns when an image is ready; fails at once when it never will be as it is written.
async fn wait(client: &Client, name: &str, timeout: Duration, namespace: &str) -> anyhow::Result<()> {
    let deadline = Instant::now() + timeout;
    let disks = Disks::fetch(client, namespace).await?;
    let progress = Progress::new();
    let mut waits_for = "nothing is known of it yet".to_owned();
    let look = async |image: BackingImage| {
        if show(&progress, &disks, &image) {
            return Ok(Some(()));
        }
        waits_for = waiting_for(&image, Timestamp::now());
        match hopeless::why(client, &image, namespace).await? {
            Some((kind, sentence)) => failed(kind, sentence),
            None => Ok(None),
        }
    };
    let result = timeout_at(deadline, client.follow(namespace, name, &was_deleted(name), look)).await;
    progress.finish();
    match result {
        Ok(Ok(())) => {
            println!("backingimage.longhorn.io/{name} ready");
            Ok(())
        }
        Ok(Err(error)) => Err(error),
        Err(_) => {
            let sentence =
                format!("image `{name}` is not ready yet: {waits_for}. It goes on; `why image {name}` says more");
            failed(ErrorKind::Pending, sentence)
        }
    }
}

/// Shows how far the copies are; whether the image is ready.
pub fn show(progress: &Progress, disks: &Disks, image: &BackingImage) -> bool {
    let status = image.status.clone().unwrap_or_default();
    for (uuid, copy) in &status.disk_file_status_map {
        let label = disks.label(uuid);
        // What was ready before anybody waited for it is no progress.
        if copy.state == CopyState::Ready && !progress.has_bar(label) {
            continue;
        }
        let percent = if copy.state == CopyState::Ready { 100 } else { copy.progress };
        progress.bar(label, u64::from(percent), &note(copy, None));
    }
    let is_known = condition::find(&status.conditions, READY).is_some();
    if status.disk_file_status_map.is_empty() && is_known {
        progress.say(&reason(image));
    }
    condition::find(&status.conditions, READY).is_some_and(|c| c.is_true())
}

/// What a copy does, or why it is not ready and when that is tried again: in so long as seen from `now`, else at what time. Of one
/// that was there and cannot be used it also says since when, as seen from `now`.
fn note(copy: &DiskFileStatus, now: Option<Timestamp>) -> String {
    if copy.state == CopyState::Ready || copy.message.is_empty() {
        return state(copy.state).to_owned();
    }
    let next: Option<Timestamp> = copy.next_retry_time.parse().ok();
    let next = match (next, now) {
        (None, _) => String::new(),
        (Some(next), None) => format!("; next attempt at {}", next.strftime("%H:%M:%SZ")),
        (Some(next), Some(now)) if next > now => {
            format!("; next attempt in {}", table::span(next.as_second() - now.as_second()))
        }
        (Some(_), Some(_)) => "; the next attempt is due now".to_owned(),
    };
    let is_lost = matches!(copy.state, CopyState::Unknown | CopyState::Failed);
    let since: Option<Timestamp> = copy.last_state_transition_time.parse().ok().filter(|_| is_lost);
    let since = match (since, now) {
        (Some(since), Some(now)) => format!("; since {}", table::span(now.as_second() - since.as_second())),
        _ => String::new(),
    };
    format!("{}{since}{next}", copy.message)
}

fn state(state: CopyState) -> &'static str {
    if state == CopyState::NotStarted { "waiting" } else { state.as_str() }
}

#[cfg(test)]
mod tests {
    use api::image::BackingImageStatus;
    use api::{Condition, ConditionStatus};
    use expect_test::expect;

    use super::*;

    pub(super) fn copy(state: CopyState, progress: u32, message: &str, next_retry_time: &str) -> DiskFileStatus {
        let (message, next_retry_time) = (message.to_owned(), next_retry_time.to_owned());
        DiskFileStatus { state, progress, message, next_retry_time, ..Default::default() }
    }

    pub(super) fn image(name: &str, copies: &[(&str, DiskFileStatus)], ready: Option<Condition>) -> BackingImage {
        let mut image = BackingImage::new(name, Default::default());
        image.status = Some(BackingImageStatus {
            size: 1 << 20,
            checksum: "30ea7c".into(),
            format: "qcow2".into(),
            disk_file_status_map: copies.iter().map(|(disk, copy)| ((*disk).to_owned(), copy.clone())).collect(),
            conditions: ready.into_iter().collect(),
            ..Default::default()
        });
        image
    }

    #[test]
    fn the_list_says_what_each_copy_is_and_why_it_is_not_ready() {
        let now = "2026-01-01T00:00:00Z".parse().unwrap();
        let later = "2026-01-01T00:00:08Z";
        let disks = Disks(vec![("a".into(), "node-1/disk-1".into()), ("b".into(), "node-2/disk-1".into())]);
        let problem = "cannot download `http://x/y`: cannot connect: Connection refused (os error 111)";
        let copies_of_one =
            [("a", copy(CopyState::Ready, 100, "", "")), ("b", copy(CopyState::Starting, 0, problem, later))];
        let no_disk =
            Condition::new(READY, ConditionStatus::False, "NoEligibleDisk", "no disk can take the first copy");
        let mut silent = copy(CopyState::Unknown, 0, "node-1 does not answer", "");
        silent.last_state_transition_time = "2025-12-31T23:59:48Z".into();
        let copies_of_three = [("a", silent)];
        let images = [
            image("one", &copies_of_one, None),
            image("two", &[], Some(no_disk)),
            image("three", &copies_of_three, None),
        ];
        expect![[r#"
            IMAGE   SIZE      VIRTUAL   FORMAT   DISK            STATE      PROGRESS   SHA-512 OR REASON
            one     1.0 MiB   -         qcow2    node-1/disk-1   ready      100 %      30ea7c
            one     1.0 MiB   -         qcow2    node-2/disk-1   starting   0 %        cannot download `http://x/y`: cannot connect: Connection refused (os error 111); next attempt in 8s
            two     1.0 MiB   -         qcow2    -               waiting               no disk can take the first copy
            three   1.0 MiB   -         qcow2    node-1/disk-1   unknown    0 %        node-1 does not answer; since 12s
        "#]].assert_eq(&copies(&images, &disks, now));
    }

    #[test]
    fn only_what_was_seen_growing_is_progress() {
        let (progress, disks) = (Progress::new(), Disks(vec![]));
        let copies = [("a", copy(CopyState::Ready, 100, "", "")), ("b", copy(CopyState::InProgress, 7, "", ""))];
        assert!(!show(&progress, &disks, &image("one", &copies, None)));
        assert!(!progress.has_bar("a") && progress.has_bar("b"));
    }

    #[test]
    fn a_wait_that_ends_early_says_what_comes_next() {
        let now = "2026-01-01T00:00:00Z".parse().unwrap();
        let mut ready = Condition::new(READY, ConditionStatus::False, "DataSourceFailed", "the server answered 404");
        ready.next_retry_time = "2026-01-01T00:05:00Z".into();
        let past = Condition { next_retry_time: "2025-12-31T23:59:00Z".into(), ..ready.clone() };
        assert_eq!(waiting_for(&image("one", &[], Some(past)), now), "the server answered 404");
        let image = image("one", &[], Some(ready.with_hint("correct the address")));
        expect!["the server answered 404; next attempt in 5m; you can: correct the address"]
            .assert_eq(&waiting_for(&image, now));
    }
}

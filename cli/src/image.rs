//! `image`: images for people, with their copies disk by disk.

use std::time::Duration;

use api::image::{BackingImageSpec, CopyState, SourceType};
use api::names::condition::READY;
use api::{BackingImage, ConditionStatus, ErrorKind, Node, condition};
use clap::{Args, Subcommand};
use futures::StreamExt;
use kube::ResourceExt;
use serde::de::DeserializeOwned;
use store::ResourceType;
use tokio::time::{Instant, timeout_at};

use crate::client::{Client, Event};
use crate::failure::failed;
use crate::progress::Progress;
use crate::{duration, table};

/// Works with images.
#[derive(Subcommand, Debug)]
pub enum Image {
    /// Makes an image from a URL.
    Create(Create),
    /// Shows every image with its copies, disk by disk.
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
    print!("{}", copies(&images, &disks));
    Ok(())
}

fn copies(images: &[BackingImage], disks: &Disks) -> String {
    let header =
        ["IMAGE", "SIZE", "VIRTUAL", "FORMAT", "DISK", "STATE", "PROGRESS", "SHA-512"].map(str::to_owned).to_vec();
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
            rows.push(row("-".into(), reason(image), String::new(), String::new()));
            continue;
        }
        let mut uuids: Vec<&String> =
            image.spec.disk_file_spec_map.keys().chain(status.disk_file_status_map.keys()).collect();
        uuids.sort_by_key(|uuid| disks.label(uuid).to_owned());
        uuids.dedup();
        for uuid in uuids {
            let copy = status.disk_file_status_map.get(uuid).cloned().unwrap_or_default();
            let ready = copy.state == CopyState::Ready;
            let state = match copy.state {
                CopyState::NotStarted => "waiting".to_owned(),
                state if copy.message.is_empty() || ready => state.as_str().to_owned(),
                state => format!("{}: {}", state.as_str(), copy.message),
            };
            let progress = if ready { "100 %".to_owned() } else { format!("{} %", copy.progress) };
            let digest = if ready { status.checksum.clone() } else { String::new() };
            rows.push(row(disks.label(uuid).to_owned(), state, progress, digest));
        }
    }
    table::text(header, rows.into_iter())
}

/// Why an image is not ready.
fn reason(image: &BackingImage) -> String {
    let status = image.status.clone().unwrap_or_default();
    condition::find(&status.conditions, READY).map_or("waiting".into(), |c| c.message.clone())
}

/// Returns when an image is ready; fails at once when it never will be as it is written.
async fn wait(client: &Client, name: &str, timeout: Duration, namespace: &str) -> anyhow::Result<()> {
    let deadline = Instant::now() + timeout;
    let disks = Disks::fetch(client, namespace).await?;
    let progress = Progress::new();
    let mut waits_for = "nothing is known of it yet".to_owned();
    let result = timeout_at(deadline, async {
        let resource = ResourceType::of::<BackingImage>();
        loop {
            let mut events = client.watch(&resource, Some(namespace), Some(name)).await?;
            client.get(&resource, Some(namespace), name).await?;
            while let Some(event) = events.next().await {
                match event? {
                    Event::Applied(object) => {
                        let image: BackingImage = serde_json::from_value(object)?;
                        if show(&progress, &disks, &image) {
                            return Ok(());
                        }
                        waits_for = reason(&image);
                        if let Some(sentence) = hopeless(&image) {
                            return failed(ErrorKind::Invalid, sentence);
                        }
                    }
                    Event::Deleted(_) => return failed(ErrorKind::NotFound, format!("image `{name}` was deleted")),
                    Event::Relist => break,
                }
            }
        }
    })
    .await;
    progress.finish();
    match result {
        Ok(Ok(())) => {
            println!("backingimage.longhorn.io/{name} ready");
            Ok(())
        }
        Ok(Err(error)) => Err(error),
        Err(_) => {
            let sentence =
                format!("image `{name}` is not ready yet: {waits_for}; it goes on, `why image {name}` says more");
            failed(ErrorKind::Pending, sentence)
        }
    }
}

/// Shows how far the copies are; whether the image is ready.
pub fn show(progress: &Progress, disks: &Disks, image: &BackingImage) -> bool {
    let status = image.status.clone().unwrap_or_default();
    for (uuid, copy) in &status.disk_file_status_map {
        let percent = if copy.state == CopyState::Ready { 100 } else { copy.progress };
        let note = if copy.message.is_empty() { copy.state.as_str() } else { &copy.message };
        progress.bar(disks.label(uuid), u64::from(percent), note);
    }
    if status.disk_file_status_map.is_empty() {
        progress.say(&reason(image));
    }
    condition::find(&status.conditions, READY).is_some_and(|c| c.is_true())
}

/// Why waiting is useless, if it is: what is written can never succeed.
fn hopeless(image: &BackingImage) -> Option<String> {
    let status = image.status.as_ref()?;
    let ready = condition::find(&status.conditions, READY)?;
    let invalid =
        ready.status == ConditionStatus::False && ready.next_retry_time.is_empty() && ready.reason == "Invalid";
    invalid.then(|| format!("image `{}` cannot become ready: {}", image.name_any(), ready.message))
}

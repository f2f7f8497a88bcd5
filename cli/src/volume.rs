//! `volume`: volumes for people; attaching and mounting goes through the standalone mode's orchestrator.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use api::{BackingImage, Engine, ErrorKind, Volume};
use clap::{Args, Subcommand};
use futures::StreamExt;
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use kube::ResourceExt;
use serde_json::Value;
use store::ResourceType;

use crate::client::{Client, Event};
use crate::failure::{Failure, failed};
use crate::orchestrator::Operation;
use crate::progress::Progress;
use crate::{duration, engine_upgrade, expand, image, table};

/// Works with volumes. NAME is a PersistentVolumeClaim of the namespace, a PersistentVolume, or a volume.
#[derive(Subcommand, Debug)]
pub enum VolumeCommand {
    /// Shows every volume: state, where it is attached, its device, its claim.
    List,
    /// Attaches a volume to a node and prints its block device.
    Attach {
        #[command(flatten)]
        which: Which,
        /// The node, e.g. node-1.
        #[arg(long)]
        node: String,
        #[arg(long)]
        read_only: bool,
    },
    /// Mounts a volume on a node at a path (attaches it first when needed). A block volume appears as a device file there.
    Mount {
        #[command(flatten)]
        which: Which,
        #[arg(long)]
        node: String,
        #[arg(long)]
        read_only: bool,
        path: PathBuf,
    },
    /// Unmounts a volume from a path.
    Unmount {
        #[command(flatten)]
        which: Which,
        #[arg(long)]
        node: String,
        path: PathBuf,
    },
    /// Replaces the running engine of an attached volume by one of the installed version; I/O waits for a moment, nothing else.
    UpgradeEngine {
        #[command(flatten)]
        which: Which,
    },
    /// Makes a volume larger. It grows once it is detached, and its filesystem when it is mounted the next time.
    Expand {
        #[command(flatten)]
        which: Which,
        /// The size that it is to have, e.g. 4Gi.
        #[arg(long)]
        size: String,
    },
    /// Unmounts a volume everywhere and detaches it.
    Detach {
        #[command(flatten)]
        which: Which,
        /// Only from this node.
        #[arg(long)]
        node: Option<String>,
    },
}

/// Which volume, and how long to wait for it.
#[derive(Args, Debug)]
pub struct Which {
    name: String,
    /// Namespace of the claim.
    #[arg(short, long, default_value = "default", env = "BACKING_IMAGE_CSI_NAMESPACE")]
    namespace: String,
    /// How long to wait, e.g. 90s or 5m.
    #[arg(long, default_value = "5m", value_parser = duration::parse)]
    timeout: Duration,
}

impl Which {
    fn operation(&self) -> Operation {
        Operation {
            namespace: self.namespace.clone(),
            name: self.name.clone(),
            timeout_seconds: self.timeout.as_secs().max(1),
            ..Default::default()
        }
    }
}

/// Runs `volume …`.
pub async fn run(client: &Client, command: VolumeCommand, namespace: &str) -> anyhow::Result<()> {
    match command {
        VolumeCommand::List => list(client, namespace).await,
        VolumeCommand::Attach { which, node, read_only } => {
            let operation = Operation { node: Some(node), read_only, ..which.operation() };
            let done = operate(client, "attach", &operation, namespace).await?;
            println!("{}", done["device"].as_str().unwrap_or_default());
            Ok(())
        }
        VolumeCommand::Mount { which, node, read_only, path } => {
            let operation =
                Operation { node: Some(node), read_only, path: Some(absolute(&path)?), ..which.operation() };
            let done = operate(client, "mount", &operation, namespace).await?;
            let word = if done["block"] == true { "published as a block device" } else { "mounted" };
            println!("{} {word} at {}", which.name, done["path"].as_str().unwrap_or_default());
            Ok(())
        }
        VolumeCommand::Unmount { which, node, path } => {
            let operation = Operation { node: Some(node), path: Some(absolute(&path)?), ..which.operation() };
            operate(client, "unmount", &operation, namespace).await?;
            println!("{} unmounted from {}", which.name, path.display());
            Ok(())
        }
        VolumeCommand::UpgradeEngine { which: Which { name, namespace: claims, timeout } } => {
            let message = engine_upgrade::run(client, &name, &claims, namespace, timeout).await?;
            println!("{message}");
            Ok(())
        }
        VolumeCommand::Expand { which: Which { name, namespace: claims, timeout }, size } => {
            println!("{}", expand::run(client, &name, &claims, namespace, &size, timeout).await?);
            Ok(())
        }
        VolumeCommand::Detach { which, node } => {
            let operation = Operation { node, ..which.operation() };
            let done = operate(client, "detach", &operation, namespace).await?;
            let nodes: Vec<&str> = done["nodes"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
            match nodes.as_slice() {
                [] => println!("{} was not attached", which.name),
                nodes => println!("{} detached from {}", which.name, nodes.join(", ")),
            }
            Ok(())
        }
    }
}

/// The persistent volume that a claim is bound to.
pub async fn of_claim(client: &Client, namespace: &str, name: &str) -> anyhow::Result<Option<String>> {
    let claim = client.find(&ResourceType::of::<PersistentVolumeClaim>(), Some(namespace), name).await?;
    let bound = claim.as_ref().and_then(|claim| claim["spec"]["volumeName"].as_str());
    Ok(bound.filter(|volume| !volume.is_empty()).map(str::to_owned))
}

/// The path as the instance has to see it.
fn absolute(path: &Path) -> anyhow::Result<PathBuf> {
    std::path::absolute(path).with_context(|| format!("cannot make `{}` absolute", path.display()))
}

/// Asks the instance for an operation and shows what it says; with the image's copies while it waits.
async fn operate(client: &Client, verb: &str, operation: &Operation, namespace: &str) -> anyhow::Result<Value> {
    let progress = Progress::new();
    let mut lines = client.operate(&format!("/standalone/v1/{verb}"), operation).await?;
    let watched = watch_image(client, operation, namespace, &progress);
    tokio::pin!(watched);
    let mut watching = matches!(verb, "attach" | "mount");
    loop {
        let line = tokio::select! {
            line = lines.next() => line,
            _ = &mut watched, if watching => { watching = false; continue; }
        };
        let Some(line) = line else {
            return failed(ErrorKind::Unavailable, "the instance ended in the middle of it; run the command again");
        };
        let mut line = line?;
        if let Some(sentence) = line["say"].as_str() {
            progress.say(sentence);
        } else if line["failed"].is_object() {
            progress.finish();
            let kind = line["failed"]["kind"].as_str().and_then(ErrorKind::from_name).unwrap_or(ErrorKind::Internal);
            return Err(Failure::new(kind, line["failed"]["message"].as_str().unwrap_or_default()).into());
        } else {
            progress.finish();
            return Ok(line["done"].take());
        }
    }
}

/// Shows the copies of the volume's image as they grow. A courtesy: whatever fails here is left out.
async fn watch_image(client: &Client, operation: &Operation, namespace: &str, progress: &Progress) -> Option<()> {
    let volumes = ResourceType::of::<Volume>();
    let images = ResourceType::of::<BackingImage>();
    let disks = image::Disks::fetch(client, namespace).await.ok()?;
    let mut events = client.watch(&volumes, Some(namespace), None).await.ok()?;
    let image = loop {
        let Event::Applied(volume) = events.next().await?.ok()? else { continue };
        let bound = of_claim(client, &operation.namespace, &operation.name).await.ok()?;
        let wanted = bound.unwrap_or_else(|| operation.name.clone());
        if volume["metadata"]["name"] == *wanted {
            break volume["spec"]["backingImage"].as_str().filter(|i| !i.is_empty())?.to_owned();
        }
    };
    let mut events = client.watch(&images, Some(namespace), Some(&image)).await.ok()?;
    while let Some(Ok(event)) = events.next().await {
        if let Event::Applied(object) = event {
            image::show(progress, &disks, &serde_json::from_value(object).ok()?);
        }
    }
    None
}

async fn list(client: &Client, namespace: &str) -> anyhow::Result<()> {
    let volumes: Vec<Volume> = image::typed(client, &ResourceType::of::<Volume>(), namespace).await?;
    let engines: Vec<Engine> = image::typed(client, &ResourceType::of::<Engine>(), namespace).await?;
    let claims = client.items(&ResourceType::of::<PersistentVolumeClaim>(), None).await?;
    let volumes: Vec<&Volume> = volumes.iter().collect();
    if volumes.is_empty() && claims.is_empty() {
        eprintln!("No volumes found.");
        return Ok(());
    }
    let header =
        ["VOLUME", "CLAIM", "SIZE", "IMAGE", "STATE", "ROBUSTNESS", "NODE", "DEVICE"].map(str::to_owned).to_vec();
    let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let claim_name =
        |claim: &Value| format!("{}/{}", word(&claim["metadata"]["namespace"]), word(&claim["metadata"]["name"]));
    let mut rows: Vec<Vec<String>> = volumes
        .iter()
        .map(|volume| {
            let name = volume.name_any();
            let status = volume.status.clone().unwrap_or_default();
            let claim = claims.iter().find(|c| c["spec"]["volumeName"] == *name).map(claim_name).unwrap_or_default();
            let device = engines.iter().find(|e| e.spec.volume_name == name).and_then(|e| e.status.clone());
            vec![
                name,
                claim,
                table::bytes(volume.spec.size.0),
                volume.spec.backing_image.clone(),
                lower(&status.state),
                lower(&status.robustness),
                status.current_node_id,
                device.map(|d| d.endpoint).unwrap_or_default(),
            ]
        })
        .collect();
    for claim in claims.iter().filter(|c| c["spec"]["volumeName"].as_str().unwrap_or_default().is_empty()) {
        let mut row = vec![String::new(), claim_name(claim), word(&claim["spec"]["resources"]["requests"]["storage"])];
        row.extend([String::new(), "not bound yet".into(), String::new(), String::new(), String::new()]);
        rows.push(row);
    }
    print!("{}", table::text(header, rows.into_iter()));
    Ok(())
}

/// The name of a state on the wire.
fn lower(state: &impl serde::Serialize) -> String {
    serde_json::to_value(state).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default()
}

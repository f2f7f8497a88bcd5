//! Staging and publishing on a node: the duty of the kubelet.
//!
//! Before each CSI call that makes something, the attachment's annotations say so; after each call that undoes it, they forget.

use std::path::{Path, PathBuf};
use std::time::Duration;

use ::api::volume::VolumeState;
use ::api::{ErrorKind, Volume};
use k8s_openapi::api::storage::v1::VolumeAttachment;
use kube::ResourceExt;
use proto::csi;
use serde::{Deserialize, Serialize};
use store::Selector;
use tokio::time::{Instant, timeout_at};

use super::objects::{self, Part};
use super::target::{self, Target};
use super::{Orchestrator, attachments, clients, expansion};
use crate::failure::Failure;

/// Where the volume is staged on its node.
const STAGED: &str = "backing-image-csi/staged-path";
/// Where it is published: a JSON list of [`Published`].
const PUBLISHED: &str = "backing-image-csi/published";
/// Between two attempts of a call that may succeed a little later.
const RETRY_DELAY: Duration = Duration::from_millis(300);
/// How long everything may take to be detached when the instance ends.
const DETACH_ALL_TIMEOUT: Duration = Duration::from_secs(120);

/// One place where a volume is published.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Published {
    pub path: PathBuf,
    /// The user's own directory: it is left behind, where CSI removes the path.
    pub existed: bool,
}

/// Where a volume is published on the node of its attachment.
pub fn published(attachment: &VolumeAttachment) -> Vec<Published> {
    attachment.annotations().get(PUBLISHED).and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default()
}

fn staged(attachment: &VolumeAttachment) -> Option<PathBuf> {
    attachment.annotations().get(STAGED).map(PathBuf::from)
}

async fn remember(
    orchestrator: &Orchestrator,
    attachment: &VolumeAttachment,
    change: impl Fn(&mut VolumeAttachment),
) -> Result<VolumeAttachment, Failure> {
    let updated = objects::update(orchestrator.store(), attachment, Part::Main, |attachment| {
        change(attachment);
        true
    })
    .await?;
    updated.ok_or_else(|| Failure::new(ErrorKind::Pending, "the volume was detached in the meantime; try again"))
}

fn set_published(attachment: &mut VolumeAttachment, list: &[Published]) {
    let annotations = attachment.annotations_mut();
    if list.is_empty() {
        annotations.remove(PUBLISHED);
    } else {
        annotations.insert(PUBLISHED.into(), serde_json::to_string(list).unwrap_or_default());
    }
}

/// Stages and publishes an attached volume at `path`.
pub async fn publish(
    orchestrator: &Orchestrator,
    target: &Target,
    attachment: &VolumeAttachment,
    path: &Path,
    read_only: bool,
    deadline: Instant,
) -> Result<(), Failure> {
    let _lock = orchestrator.lock(&target.volume_id).await;
    let node = attachment.spec.node_name.as_str();
    let staging = orchestrator.inner.staging.join(node).join(&target.volume_id);
    make_folder(&staging)?;
    if let Some(parent) = path.parent() {
        make_folder(parent)?;
    }
    let existed = path.symlink_metadata().is_ok();
    let mut list = published(attachment);
    let known = list.iter().any(|p| p.path == path);
    if !known {
        list.push(Published { path: path.to_owned(), existed });
    }
    let attachment = remember(orchestrator, attachment, |attachment| {
        attachment.annotations_mut().insert(STAGED.into(), staging.display().to_string());
        set_published(attachment, &list);
    })
    .await?;
    let capability = target.usage.attach_capability()?;
    let publish_context = attachment.status.clone().and_then(|s| s.attachment_metadata).unwrap_or_default();
    let stage = csi::NodeStageVolumeRequest {
        volume_id: target.volume_id.clone(),
        publish_context: publish_context.clone().into_iter().collect(),
        staging_target_path: text(&staging),
        volume_capability: Some(capability.clone()),
        volume_context: target.context.clone().into_iter().collect(),
        ..Default::default()
    };
    let publish = csi::NodePublishVolumeRequest {
        volume_id: target.volume_id.clone(),
        publish_context: publish_context.into_iter().collect(),
        staging_target_path: text(&staging),
        target_path: text(path),
        volume_capability: Some(capability),
        readonly: read_only,
        volume_context: target.context.clone().into_iter().collect(),
        ..Default::default()
    };
    let client = orchestrator.inner.sockets.node(node).await?;
    let result = async {
        persist(deadline, || {
            let (mut client, stage) = (client.clone(), stage.clone());
            async move { client.node_stage_volume(clients::request(stage)).await }
        })
        .await?;
        persist(deadline, || {
            let (mut client, publish) = (client.clone(), publish.clone());
            async move { client.node_publish_volume(clients::request(publish)).await }
        })
        .await
    }
    .await;
    if result.is_err() && !known {
        // Nothing half done stays behind; the error of the call is the one that matters.
        let undone = undo(orchestrator, &attachment, &|p| p.path == path).await;
        if let Err(failure) = undone {
            tracing::warn!(error = %failure, "a failed mount is not cleaned up yet");
        }
    }
    if result.is_ok() && !read_only {
        expansion::finish(orchestrator, target, node, path, &staging).await;
    }
    result.map(drop)
}

/// Undoes the octal escapes of mountinfo.
pub fn unescape(place: &str) -> String {
    let mut bytes = vec![];
    let mut rest = place.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let octal = after.get(..3).filter(|_| *first == b'\\').and_then(|d| std::str::from_utf8(d).ok());
        match octal.and_then(|d| u8::from_str_radix(d, 8).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[3..];
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Repeats a call while it may succeed a little later.
async fn persist<T, F>(deadline: Instant, call: impl Fn() -> F) -> Result<T, Failure>
where
    F: Future<Output = Result<tonic::Response<T>, tonic::Status>>,
{
    loop {
        let failure = match timeout_at(deadline, call()).await {
            Ok(Ok(response)) => return Ok(response.into_inner()),
            Ok(Err(status)) => clients::failure(status),
            Err(_) => return Err(Failure::new(ErrorKind::Pending, "the node has not answered in time; try again")),
        };
        if !clients::is_transient(failure.kind) || Instant::now() + RETRY_DELAY > deadline {
            return Err(failure);
        }
        tokio::time::sleep(RETRY_DELAY).await;
    }
}

/// Takes a volume off a path, and off its node when that was the last one.
pub async fn unpublish(
    orchestrator: &Orchestrator,
    target: &Target,
    attachment: &VolumeAttachment,
    path: &Path,
) -> Result<(), Failure> {
    let _lock = orchestrator.lock(&target.volume_id).await;
    let list = published(attachment);
    if !list.iter().any(|p| p.path == path) {
        let places: Vec<String> = list.iter().map(|p| p.path.display().to_string()).collect();
        let places = if places.is_empty() { "nowhere".into() } else { format!("at {}", places.join(", ")) };
        let message = format!(
            "{} is not mounted at `{}`; on `{}` it is mounted {places}",
            target.label,
            path.display(),
            attachment.spec.node_name
        );
        return Err(Failure::new(ErrorKind::NotFound, message));
    }
    undo(orchestrator, attachment, &|p| p.path == path).await
}

/// Takes a volume off every path and off its node. The caller holds the lock of the volume.
pub async fn withdraw(orchestrator: &Orchestrator, attachment: &VolumeAttachment) -> Result<(), Failure> {
    undo(orchestrator, attachment, &|_| true).await
}

async fn undo(
    orchestrator: &Orchestrator,
    attachment: &VolumeAttachment,
    which: &(dyn Fn(&Published) -> bool + Sync),
) -> Result<(), Failure> {
    let Some(mut attachment) = objects::read(orchestrator.store(), attachment).await? else { return Ok(()) };
    if staged(&attachment).is_none() && published(&attachment).is_empty() {
        return Ok(());
    }
    let node = attachment.spec.node_name.clone();
    let volume_id = attachments::volume_id(&attachment);
    let mut client = orchestrator.inner.sockets.node(&node).await?;
    for place in published(&attachment).into_iter().filter(|p| which(p)) {
        let request = csi::NodeUnpublishVolumeRequest { volume_id: volume_id.clone(), target_path: text(&place.path) };
        client.node_unpublish_volume(clients::request(request)).await.map_err(clients::failure)?;
        if place.existed && !place.path.exists() && target_was_folder(&attachment) {
            make_folder(&place.path)?;
        }
        let left: Vec<Published> = published(&attachment).into_iter().filter(|p| p.path != place.path).collect();
        attachment = remember(orchestrator, &attachment, |attachment| set_published(attachment, &left)).await?;
    }
    if let Some(staging) = staged(&attachment).filter(|_| published(&attachment).is_empty()) {
        let request = csi::NodeUnstageVolumeRequest { volume_id, staging_target_path: text(&staging) };
        client.node_unstage_volume(clients::request(request)).await.map_err(clients::failure)?;
        remember(orchestrator, &attachment, |attachment| drop(attachment.annotations_mut().remove(STAGED))).await?;
        // Not empty means that something is still mounted in it: leave it then.
        let _ = std::fs::remove_dir(&staging);
    }
    Ok(())
}

/// Block volumes are published on files; those are CSI's own.
fn target_was_folder(attachment: &VolumeAttachment) -> bool {
    staged(attachment).is_some_and(|s| s.is_dir())
}

/// Unmounts and detaches every volume, whoever attached it.
pub async fn detach_all(orchestrator: &Orchestrator, say: &(dyn Fn(String) + Sync)) -> Result<(), Failure> {
    let deadline = Instant::now() + DETACH_ALL_TIMEOUT;
    let store = orchestrator.store();
    let all: Vec<VolumeAttachment> = store.list(&Selector::default()).await?;
    for attachment in &all {
        let volume = attachments::volume_id(attachment);
        say(format!("detaching {volume} from {}", attachment.spec.node_name));
        attachments::wish_away(orchestrator, attachment).await?;
    }
    loop {
        let left: Vec<VolumeAttachment> = store.list(&Selector::default()).await?;
        let volumes: Vec<Volume> = store.list(&Selector::default()).await?;
        let attached: Vec<&Volume> = volumes.iter().filter(|v| !is_detached(v)).collect();
        if left.is_empty() && attached.is_empty() {
            return Ok(());
        }
        if Instant::now() > deadline {
            let reasons: Vec<String> = left.iter().filter_map(attachments::error_of).map(|f| f.message).collect();
            let names: Vec<String> = attached.iter().map(|v| v.name_any()).collect();
            let message = format!("these volumes are still attached: {}. {}", names.join(", "), reasons.join(". "));
            return Err(Failure::new(ErrorKind::Pending, message));
        }
        if left.is_empty() {
            for volume in attached.iter().filter(|v| !v.spec.node_id.is_empty()) {
                say(format!("detaching {} from {}", volume.name_any(), volume.spec.node_id));
                target::unmount_device(orchestrator, &volume.name_any()).await?;
                attachments::detach_foreign(orchestrator, volume).await?;
            }
        }
        tokio::time::sleep(RETRY_DELAY).await;
    }
}

fn is_detached(volume: &Volume) -> bool {
    let state = volume.status.as_ref().map(|s| s.state).unwrap_or_default();
    volume.spec.node_id.is_empty()
        && matches!(
            state,
            VolumeState::Detached | VolumeState::NotStarted | VolumeState::Creating | VolumeState::Deleting
        )
}

fn make_folder(path: &Path) -> Result<(), Failure> {
    std::fs::create_dir_all(path)
        .map_err(|e| Failure::new(ErrorKind::NotReady, format!("cannot make the directory `{}`: {e}", path.display())))
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_escaped_mount_points() {
        assert_eq!(unescape("/mnt/a\\040b"), "/mnt/a b");
    }
}

//! Attachments: the duty of the external attacher, and of the kubelet when one ends.
//!
//! A `VolumeAttachment` is the wish; its status says whether it came true. What is staged and published on its node stands in
//! its annotations, so that everything is undone, in order, before the volume is detached, also after a restart.

use ::api::{ErrorKind, Volume};
use futures::StreamExt;
use jiff::Timestamp;
use k8s_openapi::api::storage::v1::{
    VolumeAttachment, VolumeAttachmentSource, VolumeAttachmentSpec, VolumeAttachmentStatus, VolumeError,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::ResourceExt;
use proto::csi;
use store::{Preconditions, Selector, StoreError};

use super::objects::{self, Part, is_deleting};
use super::target::{self, Target};
use super::{Orchestrator, clients, mounts};
use crate::failure::Failure;

/// Keeps an attachment until the volume is detached.
const FINALIZER: &str = "external-attacher/backing-image-csi";
/// The CSI volume id, so that a volume is detached even when its other objects are gone.
const VOLUME_ID: &str = "backing-image-csi/volume-id";
/// Whether it is attached read-only.
const READ_ONLY: &str = "backing-image-csi/read-only";

/// Whether an attachment is not what it is wished to be.
pub fn needs_work(attachment: &VolumeAttachment) -> bool {
    if is_deleting(attachment) {
        return attachment.finalizers().iter().any(|f| f == FINALIZER);
    }
    !is_attached(attachment) && attachment.annotations().contains_key(VOLUME_ID)
}

/// Whether it came true.
pub fn is_attached(attachment: &VolumeAttachment) -> bool {
    attachment.status.as_ref().is_some_and(|s| s.attached)
}

/// The CSI volume id of an attachment.
pub fn volume_id(attachment: &VolumeAttachment) -> String {
    attachment.annotations().get(VOLUME_ID).cloned().unwrap_or_default()
}

/// Every attachment of a volume.
pub async fn of_volume(orchestrator: &Orchestrator, target: &Target) -> Result<Vec<VolumeAttachment>, Failure> {
    let all: Vec<VolumeAttachment> = orchestrator.store().list(&Selector::default()).await?;
    Ok(all.into_iter().filter(|a| volume_id(a) == target.volume_id).collect())
}

/// The wish to have a volume on a node; the existing one when there is one. Says whether it is new.
pub async fn ensure(
    orchestrator: &Orchestrator,
    target: &Target,
    node: &str,
    read_only: bool,
) -> Result<(VolumeAttachment, bool), Failure> {
    let name = format!("csi-{}-{node}", target.persistent_volume);
    let store = orchestrator.store();
    let annotations = [(VOLUME_ID.to_owned(), target.volume_id.clone()), (READ_ONLY.to_owned(), read_only.to_string())];
    let attachment = VolumeAttachment {
        metadata: ObjectMeta {
            name: Some(name.clone()),
            annotations: Some(annotations.into()),
            finalizers: Some(vec![FINALIZER.into()]),
            ..Default::default()
        },
        spec: VolumeAttachmentSpec {
            attacher: orchestrator.inner.driver.clone(),
            node_name: node.to_owned(),
            source: VolumeAttachmentSource {
                persistent_volume_name: Some(target.persistent_volume.clone()),
                ..Default::default()
            },
        },
        status: None,
    };
    match store.create(&attachment).await {
        Ok(created) => Ok((created, true)),
        Err(StoreError::AlreadyExists { .. }) => {
            let existing = store.get::<VolumeAttachment>(&name).await?;
            match existing {
                Some(existing) if is_deleting(&existing) => Err(Failure::new(
                    ErrorKind::Pending,
                    format!("{} is being detached from `{node}`; try again in a moment", target.label),
                )),
                Some(existing) => Ok((existing, false)),
                None => Err(Failure::new(
                    ErrorKind::Pending,
                    format!("{} was detached a moment ago; try again", target.label),
                )),
            }
        }
        Err(error) => Err(error.into()),
    }
}

/// Wishes an attachment away.
pub async fn wish_away(orchestrator: &Orchestrator, attachment: &VolumeAttachment) -> Result<(), Failure> {
    let preconditions = Preconditions { uid: attachment.uid(), resource_version: None };
    orchestrator.store().delete::<VolumeAttachment>(&attachment.name_any(), &preconditions).await?;
    Ok(())
}

/// One attempt to make an attachment what it is wished to be.
pub async fn reconcile(orchestrator: &Orchestrator, attachment: &VolumeAttachment) -> Result<(), Failure> {
    let _lock = orchestrator.lock(&volume_id(attachment)).await;
    // It may have changed while another operation held the lock.
    let Some(attachment) = objects::read(orchestrator.store(), attachment).await? else { return Ok(()) };
    if !needs_work(&attachment) {
        return Ok(());
    }
    let deleting = is_deleting(&attachment);
    let result =
        if deleting { detach(orchestrator, &attachment).await } else { attach(orchestrator, &attachment).await };
    if let Err(failure) = &result {
        let error = VolumeError {
            error_code: Some(kind_code(failure.kind)),
            message: Some(failure.message.clone()),
            time: Some(Time(Timestamp::now())),
        };
        objects::update(orchestrator.store(), &attachment, Part::Status, |attachment| {
            let status = attachment.status.get_or_insert_default();
            if deleting {
                status.detach_error = Some(error.clone())
            } else {
                status.attach_error = Some(error.clone())
            }
            true
        })
        .await?;
    }
    result
}

async fn attach(orchestrator: &Orchestrator, attachment: &VolumeAttachment) -> Result<(), Failure> {
    let Some(target) = target::of_attachment(orchestrator, attachment).await? else {
        return Err(Failure::new(
            ErrorKind::NotFound,
            format!("the volume of `{}` does not exist", attachment.name_any()),
        ));
    };
    let request = csi::ControllerPublishVolumeRequest {
        volume_id: target.volume_id.clone(),
        node_id: attachment.spec.node_name.clone(),
        volume_capability: Some(target.usage.attach_capability()?),
        readonly: attachment.annotations().get(READ_ONLY).is_some_and(|v| v == "true"),
        volume_context: target.context.into_iter().collect(),
        ..Default::default()
    };
    let mut controller = orchestrator.inner.sockets.controller().await?;
    let answer = tokio::select! {
        answer = controller.controller_publish_volume(clients::attach_request(request)) => answer,
        ended = wished_away(orchestrator, attachment) => {
            ended?;
            return Err(Failure::new(ErrorKind::Pending, format!("{} is being detached", target.label)));
        }
    };
    let context = answer.map_err(clients::failure)?.into_inner().publish_context;
    objects::update(orchestrator.store(), attachment, Part::Status, |attachment| {
        let metadata = context.clone().into_iter().collect();
        attachment.status =
            Some(VolumeAttachmentStatus { attached: true, attachment_metadata: Some(metadata), ..Default::default() });
        true
    })
    .await?;
    tracing::info!(volume = target.volume_id, node = attachment.spec.node_name, "volume attached");
    Ok(())
}

/// Waits until nobody wishes an attachment any more.
async fn wished_away(orchestrator: &Orchestrator, attachment: &VolumeAttachment) -> Result<(), Failure> {
    let mut events = orchestrator.store().watch::<VolumeAttachment>().await?;
    loop {
        if objects::read(orchestrator.store(), attachment).await?.is_none_or(|current| is_deleting(&current)) {
            return Ok(());
        }
        if events.next().await.is_none() {
            return Err(Failure::new(ErrorKind::Unavailable, "the store has stopped"));
        }
    }
}

async fn detach(orchestrator: &Orchestrator, attachment: &VolumeAttachment) -> Result<(), Failure> {
    mounts::withdraw(orchestrator, attachment).await?;
    let volume_id = volume_id(attachment);
    let node_id = attachment.spec.node_name.clone();
    let mut controller = orchestrator.inner.sockets.controller().await?;
    let request = csi::ControllerUnpublishVolumeRequest {
        volume_id: volume_id.clone(),
        node_id: node_id.clone(),
        ..Default::default()
    };
    controller.controller_unpublish_volume(clients::attach_request(request)).await.map_err(clients::failure)?;
    let gone = |attachment: &mut VolumeAttachment| objects::remove_finalizer(attachment, FINALIZER);
    objects::update(orchestrator.store(), attachment, Part::Main, gone).await?;
    tracing::info!(volume = volume_id, node = node_id, "volume detached");
    Ok(())
}

/// Why an attachment has not come true yet.
pub fn error_of(attachment: &VolumeAttachment) -> Option<Failure> {
    let status = attachment.status.as_ref()?;
    let error = if is_deleting(attachment) { status.detach_error.as_ref()? } else { status.attach_error.as_ref()? };
    let kind =
        ErrorKind::ALL.into_iter().find(|k| Some(kind_code(*k)) == error.error_code).unwrap_or(ErrorKind::Internal);
    Some(Failure::new(kind, error.message.clone().unwrap_or_default()))
}

/// The gRPC code that stands for a kind in `errorCode`.
fn kind_code(kind: ErrorKind) -> i32 {
    ::csi::status::code(kind) as i32
}

/// Detaches volumes that somebody else attached (a CSI client that is not this orchestrator).
pub async fn detach_foreign(orchestrator: &Orchestrator, volume: &Volume) -> Result<(), Failure> {
    let volume_id = volume.name_any();
    let _lock = orchestrator.lock(&volume_id).await;
    let mut controller = orchestrator.inner.sockets.controller().await?;
    let request = csi::ControllerUnpublishVolumeRequest { volume_id, ..Default::default() };
    controller.controller_unpublish_volume(clients::attach_request(request)).await.map_err(clients::failure)?;
    Ok(())
}

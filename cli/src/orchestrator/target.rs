//! What a person means by the name of a volume: a claim, a persistent volume, or one of our volumes.

use std::collections::BTreeMap;

use ::api::volume::AccessMode;
use ::api::{ErrorKind, Volume};
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use k8s_openapi::api::storage::v1::VolumeAttachment;
use kube::ResourceExt;

use super::capability::Usage;
use super::objects::is_deleting;
use super::{Orchestrator, work};
use crate::failure::Failure;

/// A volume that can be attached.
#[derive(Clone, Debug)]
pub struct Target {
    /// As the user called it.
    pub label: String,
    /// The name of the persistent volume, or of our volume when there is none.
    pub persistent_volume: String,
    pub volume_id: String,
    pub context: BTreeMap<String, String>,
    pub usage: Usage,
}

/// The annotation by which `WaitForFirstConsumer` learns of the consumer.
pub const SELECTED_NODE: &str = "volume.kubernetes.io/selected-node";

/// Finds a volume to be attached. `Pending` when it is a claim that is not bound yet; `NotReady` when that is being deleted.
pub async fn find_to_attach(orchestrator: &Orchestrator, namespace: &str, name: &str) -> Result<Target, Failure> {
    let claim = orchestrator.store().get_in::<PersistentVolumeClaim>(namespace, name).await?;
    if claim.is_some_and(|claim| is_deleting(&claim)) {
        return Err(Failure::new(ErrorKind::NotReady, format!("claim `{name}` is being deleted")));
    }
    find(orchestrator, namespace, name).await
}

/// Finds a volume by name. `Pending` when it is a claim that is not bound yet.
pub async fn find(orchestrator: &Orchestrator, namespace: &str, name: &str) -> Result<Target, Failure> {
    let store = orchestrator.store();
    if let Some(claim) = store.get_in::<PersistentVolumeClaim>(namespace, name).await? {
        return of_claim(orchestrator, &claim).await;
    }
    if let Some(volume) = store.get::<PersistentVolume>(name).await? {
        return of_persistent_volume(&volume, format!("persistent volume `{name}`"));
    }
    if let Some(volume) = store.get::<Volume>(name).await? {
        return Ok(of_volume(&volume));
    }
    Err(Failure::new(
        ErrorKind::NotFound,
        format!(
            "there is no claim `{name}` in namespace `{namespace}` and no volume of that name; `volume list` shows them"
        ),
    ))
}

async fn of_claim(orchestrator: &Orchestrator, claim: &PersistentVolumeClaim) -> Result<Target, Failure> {
    let name = claim.name_any();
    let bound = claim.spec.as_ref().and_then(|s| s.volume_name.clone()).filter(|v| !v.is_empty());
    let Some(bound) = bound else {
        let conditions = claim.status.as_ref().and_then(|s| s.conditions.clone()).unwrap_or_default();
        let condition = conditions.into_iter().find(|c| c.status == "False");
        let kind = condition.as_ref().and_then(|c| ErrorKind::from_name(c.reason.as_deref()?));
        let reason = condition.and_then(|c| c.message).map(|m| format!(": {m}")).unwrap_or_default();
        // What can never succeed as it is written is not waited for.
        let hopeless = [ErrorKind::Invalid, ErrorKind::Incompatible, ErrorKind::OutOfRange, ErrorKind::Unsupported];
        let kind = kind.filter(|k| hopeless.contains(k)).unwrap_or(ErrorKind::Pending);
        return Err(Failure::new(kind, format!("claim `{name}` is not bound yet{reason}")));
    };
    let volume = orchestrator.store().get::<PersistentVolume>(&bound).await?;
    let Some(volume) = volume else {
        let message = format!("claim `{name}` is bound to `{bound}`, which does not exist; delete the claim");
        return Err(Failure::new(ErrorKind::NotFound, message));
    };
    of_persistent_volume(&volume, format!("claim `{name}`"))
}

/// The target of a persistent volume.
pub fn of_persistent_volume(volume: &PersistentVolume, label: String) -> Result<Target, Failure> {
    let spec = volume.spec.clone().unwrap_or_default();
    let Some(csi) = spec.csi else {
        return Err(Failure::new(ErrorKind::Unsupported, format!("{label} is not a CSI volume")));
    };
    Ok(Target {
        label,
        persistent_volume: volume.name_any(),
        volume_id: csi.volume_handle,
        context: csi.volume_attributes.unwrap_or_default(),
        usage: Usage {
            block: spec.volume_mode.as_deref() == Some("Block"),
            fs_type: csi.fs_type.unwrap_or_default(),
            mount_flags: spec.mount_options.unwrap_or_default(),
            access_modes: spec.access_modes.unwrap_or_default(),
        },
    })
}

fn of_volume(volume: &Volume) -> Target {
    let name = volume.name_any();
    let mode = match volume.spec.access_mode {
        AccessMode::Rwo => "ReadWriteOnce",
        AccessMode::Rwop => "ReadWriteOncePod",
        AccessMode::Rwx => "ReadWriteMany",
    };
    Target {
        label: format!("volume `{name}`"),
        persistent_volume: name.clone(),
        volume_id: name,
        context: volume.spec.parameters.clone(),
        usage: Usage { fs_type: work::DEFAULT_FS_TYPE.into(), access_modes: vec![mode.into()], ..Default::default() },
    }
}

/// The target of an attachment, also when its claim is gone.
pub async fn of_attachment(
    orchestrator: &Orchestrator,
    attachment: &VolumeAttachment,
) -> Result<Option<Target>, Failure> {
    let name = attachment.spec.source.persistent_volume_name.clone().unwrap_or_default();
    if let Some(volume) = orchestrator.store().get::<PersistentVolume>(&name).await? {
        return of_persistent_volume(&volume, format!("persistent volume `{name}`")).map(Some);
    }
    Ok(orchestrator.store().get::<Volume>(&name).await?.as_ref().map(of_volume))
}

/// Unmounts whatever shows the device of a volume: of a CSI client that went away without unstaging.
pub async fn unmount_device(orchestrator: &Orchestrator, volume: &str) -> Result<(), Failure> {
    let engine: Option<::api::Engine> = orchestrator.store().get(&::api::names::engine_name(volume)).await?;
    let device = engine.and_then(|e| e.status).map(|s| s.endpoint).unwrap_or_default();
    if device.is_empty() {
        return Ok(());
    }
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let places = table.lines().filter(|line| {
        let source = line.split(" - ").nth(1).and_then(|rest| rest.split(' ').nth(1));
        source == Some(device.as_str())
    });
    for place in places.filter_map(|line| line.split(' ').nth(4)) {
        let place = super::mounts::unescape(place);
        rustix::mount::unmount(place.as_str(), rustix::mount::UnmountFlags::empty()).map_err(|e| {
            Failure::new(ErrorKind::NotReady, format!("cannot unmount `{place}`: {e}; end what uses it"))
        })?;
    }
    Ok(())
}

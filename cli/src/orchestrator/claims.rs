//! Claims become volumes, and volumes without a claim are reclaimed: the duty of the external provisioner.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use ::api::ErrorKind;
use ::api::event::News;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    CSIPersistentVolumeSource, ObjectReference, PersistentVolume, PersistentVolumeClaim, PersistentVolumeClaimStatus,
    PersistentVolumeSpec, PersistentVolumeStatus,
};
use k8s_openapi::api::storage::v1::{StorageClass, VolumeAttachment};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::ResourceExt;
use proto::csi;
use store::{Preconditions, Selector, StoreError};

use super::Orchestrator;
use super::capability::Usage;
use super::clients;
use super::expansion;
use super::objects::{self, Part, Said, is_deleting, set_condition};
use super::size;
use super::target::SELECTED_NODE;
use super::work::DEFAULT_FS_TYPE;
use crate::failure::Failure;

/// Keeps a claim while something of it exists.
const CLAIM_FINALIZER: &str = "kubernetes.io/pvc-protection";
/// Keeps a persistent volume while its CSI volume exists.
const VOLUME_FINALIZER: &str = "external-provisioner.volume.kubernetes.io/finalizer";
/// Which provisioner works on a claim.
const PROVISIONER: &str = "volume.kubernetes.io/storage-provisioner";
/// Type of the condition that says why a claim is not bound.
const PROVISIONED: &str = "Provisioned";

/// Whether a claim has to be bound, expanded or released.
pub fn needs_work(claim: &PersistentVolumeClaim) -> bool {
    if is_deleting(claim) {
        return claim.finalizers().iter().any(|f| f == CLAIM_FINALIZER);
    }
    !is_bound(claim) || expansion::needs_work(claim)
}

fn is_bound(claim: &PersistentVolumeClaim) -> bool {
    claim.status.as_ref().and_then(|s| s.phase.as_deref()) == Some("Bound")
}

/// Whether the claim of a persistent volume is gone.
pub fn needs_reclaim(volume: &PersistentVolume, claims: &[PersistentVolumeClaim]) -> bool {
    let claim = volume.spec.as_ref().and_then(|s| s.claim_ref.as_ref()?.uid.as_ref());
    let abandoned = claim.is_some_and(|uid| !claims.iter().any(|c| c.metadata.uid.as_ref() == Some(uid)));
    volume.finalizers().iter().any(|f| f == VOLUME_FINALIZER) && (abandoned || claim.is_none() && is_deleting(volume))
}

/// Brings a claim one step further: provisions its volume and binds it, expands it, or releases it.
pub async fn bind(
    orchestrator: &Orchestrator,
    claim: &PersistentVolumeClaim,
    next_delay: Duration,
) -> Result<(), Failure> {
    if !is_deleting(claim) && is_bound(claim) {
        return expansion::expand(orchestrator, claim, next_delay).await;
    }
    let result =
        if is_deleting(claim) { release(orchestrator, claim).await } else { provision(orchestrator, claim).await };
    if let Err(failure) = &result {
        let next = Timestamp::now() + next_delay;
        let message = format!("{failure} (next attempt at {})", next.strftime("%H:%M:%SZ"));
        explain(orchestrator, claim, failure.kind.as_str(), &message).await?;
        let reason = if is_deleting(claim) { "DeletionBlocked" } else { "ProvisioningFailed" };
        orchestrator.record(claim, &News::warning(reason, &failure.message));
    }
    result
}

/// Says in the status why a claim is not bound, or not gone.
async fn explain(
    orchestrator: &Orchestrator,
    claim: &PersistentVolumeClaim,
    reason: &str,
    message: &str,
) -> Result<(), Failure> {
    objects::update(orchestrator.store(), claim, Part::Status, |claim| {
        claim.status.get_or_insert_default().phase.get_or_insert_with(|| "Pending".into());
        set_condition(claim, &Said { r#type: PROVISIONED, is: false, reason, message }, &[]);
        true
    })
    .await?;
    Ok(())
}

async fn provision(orchestrator: &Orchestrator, claim: &PersistentVolumeClaim) -> Result<(), Failure> {
    let spec = claim.spec.clone().unwrap_or_default();
    if let Some(name) = spec.volume_name.filter(|v| !v.is_empty()) {
        return adopt(orchestrator, claim, &name).await;
    }
    let class = class_of(orchestrator, spec.storage_class_name.as_deref()).await?;
    let driver = orchestrator.inner.driver.as_str();
    if class.provisioner != driver {
        let message = format!(
            "StorageClass `{}` has provisioner `{}`, which is not this instance's driver `{driver}`; nobody provisions it here",
            class.name_any(),
            class.provisioner
        );
        return Err(Failure::new(ErrorKind::Unsupported, message));
    }
    if spec.data_source.is_some() || spec.data_source_ref.is_some() {
        return Err(Failure::new(
            ErrorKind::Unsupported,
            "a claim with a data source (snapshot or clone) is not offered yet",
        ));
    }
    let late = class.volume_binding_mode.as_deref() == Some("WaitForFirstConsumer");
    if late && !claim.annotations().contains_key(SELECTED_NODE) {
        return explain(orchestrator, claim, "WaitForFirstConsumer", "it is provisioned when it is first attached")
            .await;
    }
    let marked = objects::update(orchestrator.store(), claim, Part::Main, |claim| {
        let new = claim.annotations_mut().insert(PROVISIONER.into(), driver.into()).is_none();
        objects::add_finalizer(claim, CLAIM_FINALIZER) | new
    })
    .await?;
    let Some(claim) = marked.filter(|c| !is_deleting(c)) else { return Ok(()) };
    let created = create_volume(orchestrator, &claim, &class).await?;
    let volume = persistent_volume(orchestrator, &claim, &class, created)?;
    let name = volume.name_any();
    match orchestrator.store().create(&volume).await {
        Ok(_) => {
            let text = format!("Successfully provisioned volume {name}");
            orchestrator.record(&claim, &News::normal("ProvisioningSucceeded", text));
        }
        Err(StoreError::AlreadyExists { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    adopt(orchestrator, &claim, &name).await
}

async fn class_of(orchestrator: &Orchestrator, name: Option<&str>) -> Result<StorageClass, Failure> {
    if let Some(name) = name.filter(|n| !n.is_empty()) {
        let message = format!("StorageClass `{name}` does not exist; apply it");
        return orchestrator.store().get(name).await?.ok_or_else(|| Failure::new(ErrorKind::NotFound, message));
    }
    let classes: Vec<StorageClass> = orchestrator.store().list(&Selector::default()).await?;
    let default = |c: &StorageClass| {
        c.annotations().get("storageclass.kubernetes.io/is-default-class").is_some_and(|v| v == "true")
    };
    let message = "it names no StorageClass, and none is marked as default; set `spec.storageClassName`";
    classes.into_iter().find(default).ok_or_else(|| Failure::new(ErrorKind::NotFound, message))
}

fn usage_of(claim: &PersistentVolumeClaim, class: &StorageClass) -> Usage {
    let parameters = class.parameters.clone().unwrap_or_default();
    let fs_type = parameters.get("csi.storage.k8s.io/fstype").or_else(|| parameters.get("fstype"));
    let spec = claim.spec.clone().unwrap_or_default();
    Usage {
        block: spec.volume_mode.as_deref() == Some("Block"),
        fs_type: fs_type.cloned().unwrap_or_else(|| DEFAULT_FS_TYPE.into()),
        mount_flags: class.mount_options.clone().unwrap_or_default(),
        access_modes: spec.access_modes.unwrap_or_default(),
    }
}

/// The parameters that the driver sees: those of Kubernetes itself are taken out, as the provisioner does.
fn driver_parameters(class: &StorageClass) -> HashMap<String, String> {
    let all = class.parameters.clone().unwrap_or_default();
    all.into_iter().filter(|(key, _)| !key.starts_with("csi.storage.k8s.io/") && key != "fstype").collect()
}

async fn create_volume(
    orchestrator: &Orchestrator,
    claim: &PersistentVolumeClaim,
    class: &StorageClass,
) -> Result<csi::Volume, Failure> {
    let resources = claim.spec.clone().unwrap_or_default().resources.unwrap_or_default();
    let wanted = |map: Option<BTreeMap<String, Quantity>>| map.unwrap_or_default().remove("storage");
    let bytes = |quantity: Option<Quantity>| match quantity {
        Some(quantity) => size::parse(&quantity.0).and_then(|b| {
            i64::try_from(b).map_err(|_| Failure::new(ErrorKind::OutOfRange, format!("`{}` is too much", quantity.0)))
        }),
        None => Ok(0),
    };
    let (required, limit) = (bytes(wanted(resources.requests))?, bytes(wanted(resources.limits))?);
    let request = csi::CreateVolumeRequest {
        name: format!("pvc-{}", claim.uid().unwrap_or_default()),
        capacity_range: Some(csi::CapacityRange { required_bytes: required, limit_bytes: limit }),
        volume_capabilities: usage_of(claim, class).capabilities()?,
        parameters: driver_parameters(class),
        ..Default::default()
    };
    let mut controller = orchestrator.inner.sockets.controller().await?;
    let response = controller.create_volume(clients::request(request)).await.map_err(clients::failure)?;
    let none = || Failure::new(ErrorKind::Internal, "the driver answered CreateVolume without a volume");
    response.into_inner().volume.ok_or_else(none)
}

fn persistent_volume(
    orchestrator: &Orchestrator,
    claim: &PersistentVolumeClaim,
    class: &StorageClass,
    created: csi::Volume,
) -> Result<PersistentVolume, Failure> {
    let usage = usage_of(claim, class);
    let spec = claim.spec.clone().unwrap_or_default();
    let requested = spec.resources.and_then(|r| r.requests?.remove("storage"));
    let capacity = match (created.capacity_bytes, requested) {
        (0, Some(requested)) => requested,
        (bytes, requested) => {
            let same = requested.filter(|r| size::parse(&r.0).is_ok_and(|b| i64::try_from(b) == Ok(bytes)));
            same.unwrap_or_else(|| Quantity(bytes.to_string()))
        }
    };
    let driver = &orchestrator.inner.driver;
    let source = CSIPersistentVolumeSource {
        driver: driver.clone(),
        volume_handle: created.volume_id,
        volume_attributes: Some(created.volume_context.into_iter().collect()),
        fs_type: (!usage.block).then_some(usage.fs_type),
        ..Default::default()
    };
    let mut metadata =
        ObjectMeta { name: Some(format!("pvc-{}", claim.uid().unwrap_or_default())), ..Default::default() };
    metadata.annotations = Some([("pv.kubernetes.io/provisioned-by".to_owned(), driver.clone())].into());
    metadata.finalizers = Some(vec![VOLUME_FINALIZER.into()]);
    let spec = PersistentVolumeSpec {
        capacity: Some([("storage".to_owned(), capacity)].into()),
        access_modes: spec.access_modes,
        volume_mode: Some(if usage.block { "Block" } else { "Filesystem" }.into()),
        storage_class_name: Some(class.name_any()),
        persistent_volume_reclaim_policy: Some(class.reclaim_policy.clone().unwrap_or_else(|| "Delete".into())),
        mount_options: class.mount_options.clone(),
        claim_ref: Some(reference(claim)),
        csi: Some(source),
        ..Default::default()
    };
    Ok(PersistentVolume { metadata, spec: Some(spec), status: None })
}

fn reference(claim: &PersistentVolumeClaim) -> ObjectReference {
    ObjectReference {
        api_version: Some("v1".into()),
        kind: Some("PersistentVolumeClaim".into()),
        namespace: claim.namespace(),
        name: claim.metadata.name.clone(),
        uid: claim.metadata.uid.clone(),
        ..Default::default()
    }
}

/// Binds a claim and a persistent volume to each other.
async fn adopt(orchestrator: &Orchestrator, claim: &PersistentVolumeClaim, name: &str) -> Result<(), Failure> {
    let store = orchestrator.store();
    let Some(volume) = store.get::<PersistentVolume>(name).await? else {
        return Err(Failure::new(ErrorKind::NotFound, format!("persistent volume `{name}` does not exist")));
    };
    let spec = volume.spec.clone().unwrap_or_default();
    let owner = spec.claim_ref.clone().unwrap_or_default();
    let foreign = owner.uid.is_some() && owner.uid != claim.metadata.uid
        || owner.name.is_some() && (owner.name != claim.metadata.name || owner.namespace != claim.namespace());
    if foreign {
        let claim = format!("{}/{}", owner.namespace.unwrap_or_default(), owner.name.unwrap_or_default());
        return Err(Failure::new(
            ErrorKind::NotReady,
            format!("persistent volume `{name}` belongs to claim `{claim}`"),
        ));
    }
    objects::update(store, &volume, Part::Main, |volume| {
        let spec = volume.spec.get_or_insert_default();
        let changed = spec.claim_ref.as_ref().and_then(|r| r.uid.as_ref()) != claim.metadata.uid.as_ref();
        spec.claim_ref = Some(reference(claim));
        changed
    })
    .await?;
    objects::update(store, &volume, Part::Status, |volume| set_phase(volume, "Bound", None)).await?;
    objects::update(store, claim, Part::Main, |claim| {
        let annotations = claim.annotations_mut();
        annotations.insert("pv.kubernetes.io/bind-completed".into(), "yes".into());
        annotations.insert("pv.kubernetes.io/bound-by-controller".into(), "yes".into());
        claim.spec.get_or_insert_default().volume_name = Some(name.to_owned());
        objects::add_finalizer(claim, CLAIM_FINALIZER);
        true
    })
    .await?;
    objects::update(store, claim, Part::Status, |claim| {
        claim.status = Some(PersistentVolumeClaimStatus {
            phase: Some("Bound".into()),
            access_modes: spec.access_modes.clone(),
            capacity: spec.capacity.clone(),
            ..Default::default()
        });
        true
    })
    .await?;
    Ok(())
}

fn set_phase(volume: &mut PersistentVolume, phase: &str, message: Option<&str>) -> bool {
    let old = volume.status.clone();
    let status = volume.status.get_or_insert_with(PersistentVolumeStatus::default);
    if status.phase.as_deref() != Some(phase) {
        status.last_phase_transition_time = Some(Time(Timestamp::now()));
    }
    status.phase = Some(phase.to_owned());
    status.message = message.map(str::to_owned);
    volume.status != old
}

/// Lets a claim that is being deleted go, once nothing uses it and no half-made volume is left.
async fn release(orchestrator: &Orchestrator, claim: &PersistentVolumeClaim) -> Result<(), Failure> {
    let store = orchestrator.store();
    let made = format!("pvc-{}", claim.uid().unwrap_or_default());
    let bound = claim.spec.as_ref().and_then(|s| s.volume_name.clone()).filter(|v| !v.is_empty());
    let name = bound.unwrap_or_else(|| made.clone());
    let attachments: Vec<VolumeAttachment> = store.list(&Selector::default()).await?;
    let used = attachments.into_iter().find(|a| a.spec.source.persistent_volume_name.as_ref() == Some(&name));
    if let Some(attachment) = used {
        let message = format!(
            "its volume is attached to `{}`; run `volume detach {} -n {}` first",
            attachment.spec.node_name,
            claim.name_any(),
            claim.namespace().unwrap_or_default()
        );
        return Err(Failure::new(ErrorKind::NotReady, message));
    }
    if store.get::<PersistentVolume>(&name).await?.is_none() && claim.annotations().contains_key(PROVISIONER) {
        delete_volume(orchestrator, &made).await?;
    }
    objects::update(store, claim, Part::Main, |claim| objects::remove_finalizer(claim, CLAIM_FINALIZER)).await?;
    Ok(())
}

async fn delete_volume(orchestrator: &Orchestrator, volume_id: &str) -> Result<(), Failure> {
    let _lock = orchestrator.lock(volume_id).await;
    let mut controller = orchestrator.inner.sockets.controller().await?;
    let request = csi::DeleteVolumeRequest { volume_id: volume_id.to_owned(), ..Default::default() };
    controller.delete_volume(clients::request(request)).await.map_err(clients::failure)?;
    Ok(())
}

/// Deletes a persistent volume whose claim is gone, with its CSI volume, unless it is to be retained.
pub async fn reclaim(orchestrator: &Orchestrator, volume: &PersistentVolume) -> Result<(), Failure> {
    let store = orchestrator.store();
    let spec = volume.spec.clone().unwrap_or_default();
    if spec.persistent_volume_reclaim_policy.as_deref() == Some("Delete") {
        let handle = spec.csi.map(|c| c.volume_handle).unwrap_or_default();
        if let Err(failure) = delete_volume(orchestrator, &handle).await {
            objects::update(store, volume, Part::Status, |v| set_phase(v, "Failed", Some(&failure.message))).await?;
            orchestrator.record(volume, &News::warning("VolumeFailedDelete", &failure.message));
            return Err(failure);
        }
        store.delete::<PersistentVolume>(&volume.name_any(), &Preconditions::default()).await?;
    } else {
        objects::update(store, volume, Part::Status, |v| set_phase(v, "Released", None)).await?;
        if !is_deleting(volume) {
            return Ok(());
        }
    }
    objects::update(store, volume, Part::Main, |v| objects::remove_finalizer(v, VOLUME_FINALIZER)).await?;
    Ok(())
}

//! Claims that ask for more than they have: the duty of the external resizer, and of the kubelet when the volume is used again.
//!
//! The volume grows once nothing has it attached; until then the claim says what it waits for. Its capacity is what it asked for when
//! the node has seen that device and filesystem have it.

use std::path::Path;
use std::time::Duration;

use ::api::event::News;
use ::api::validation::claim::{capacity, requested};
use ::api::{ErrorKind, quantity};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::ResourceExt;
use proto::csi;

use super::objects::{self, Part, Said, is_deleting, set_condition};
use super::target::{self, Target};
use super::{Orchestrator, clients};
use crate::failure::Failure;

/// Types of Kubernetes' conditions of a claim.
pub const RESIZING: &str = "Resizing";
pub const FILESYSTEM_PENDING: &str = "FileSystemResizePending";

/// Whether a bound claim asks for more than it has, and its volume is not known to have it; or asked for it and does so no more.
pub fn needs_work(claim: &PersistentVolumeClaim) -> bool {
    let wants = requested(claim).zip(capacity(claim)).is_some_and(|(wanted, has)| wanted > has);
    let bound = claim.status.as_ref().and_then(|s| s.phase.as_deref()) == Some("Bound");
    bound && !is_deleting(claim) && if wants { !is_done(claim) } else { says(claim, RESIZING) }
}

/// Whether the volume of a claim has what the claim asks for now, and waits for its node.
pub fn is_done(claim: &PersistentVolumeClaim) -> bool {
    let allocated = claim.status.as_ref().and_then(|s| s.allocated_resources.as_ref()?.get("storage"));
    says(claim, FILESYSTEM_PENDING) && allocated.and_then(|q| quantity::bytes(&q.0)) == requested(claim)
}

fn says(claim: &PersistentVolumeClaim, r#type: &str) -> bool {
    let conditions = claim.status.as_ref().and_then(|s| s.conditions.as_deref()).unwrap_or_default();
    conditions.iter().any(|c| c.type_ == r#type && c.status == "True")
}

/// Asks for the volume of a claim to be as large as the claim says, and tells in the claim how that went.
pub async fn expand(
    orchestrator: &Orchestrator,
    claim: &PersistentVolumeClaim,
    next_delay: Duration,
) -> Result<(), Failure> {
    let result = ask(orchestrator, claim).await;
    if let Err(failure) = &result {
        let next = Timestamp::now() + next_delay;
        let message = format!("{failure} (next attempt at {})", next.strftime("%H:%M:%SZ"));
        set(orchestrator, claim, RESIZING, failure.kind.as_str(), &message).await?;
        orchestrator.record(claim, &News::warning("VolumeResizeFailed", &failure.message));
    }
    result
}

async fn ask(orchestrator: &Orchestrator, claim: &PersistentVolumeClaim) -> Result<(), Failure> {
    let store = orchestrator.store();
    let name = claim.spec.as_ref().and_then(|s| s.volume_name.clone()).unwrap_or_default();
    let Some(volume) = store.get::<PersistentVolume>(&name).await? else {
        return Err(Failure::new(ErrorKind::NotFound, format!("persistent volume `{name}` does not exist")));
    };
    let target = target::of_persistent_volume(&volume, format!("claim `{}`", claim.name_any()))?;
    let wanted = requested(claim).unwrap_or_default();
    let request = csi::ControllerExpandVolumeRequest {
        volume_id: target.volume_id.clone(),
        capacity_range: Some(csi::CapacityRange {
            required_bytes: i64::try_from(wanted).unwrap_or(i64::MAX),
            limit_bytes: 0,
        }),
        volume_capability: Some(target.usage.attach_capability()?),
        ..Default::default()
    };
    let answer = {
        let _lock = orchestrator.lock(&target.volume_id).await;
        let mut controller = orchestrator.inner.sockets.controller().await?;
        controller.controller_expand_volume(clients::request(request)).await.map_err(clients::failure)?.into_inner()
    };
    let bytes = u64::try_from(answer.capacity_bytes).unwrap_or_default();
    let given = quantity_of(claim, bytes);
    objects::update(store, &volume, Part::Main, |volume| {
        let capacity = volume.spec.get_or_insert_default().capacity.get_or_insert_default();
        let has = capacity.get("storage").and_then(|q| quantity::bytes(&q.0));
        if has.is_some_and(|has| has >= bytes) {
            return false;
        }
        capacity.insert("storage".into(), given.clone());
        true
    })
    .await?;
    if capacity(claim).is_some_and(|has| has >= wanted) {
        // Taken back before it was done.
        return clear(orchestrator, claim, None).await;
    }
    let text = "Waiting for the volume to be mounted (a block volume: attached) to finish file system resize of volume on node.";
    set(orchestrator, claim, FILESYSTEM_PENDING, "", text).await?;
    orchestrator
        .record(claim, &News::normal("FileSystemResizeRequired", "Require file system resize of volume on node"));
    Ok(())
}

/// The claim's own way to say a number of bytes, if it is that number.
fn quantity_of(claim: &PersistentVolumeClaim, bytes: u64) -> Quantity {
    let resources = claim.spec.as_ref().and_then(|s| s.resources.clone());
    let asked = resources.and_then(|r| r.requests?.remove("storage"));
    asked.filter(|q| quantity::bytes(&q.0) == Some(bytes)).unwrap_or_else(|| Quantity(bytes.to_string()))
}

/// Makes this the one condition about the size of a claim.
async fn set(
    orchestrator: &Orchestrator,
    claim: &PersistentVolumeClaim,
    r#type: &str,
    reason: &str,
    message: &str,
) -> Result<(), Failure> {
    let asked = claim.spec.as_ref().and_then(|s| s.resources.as_ref()?.requests.as_ref()?.get("storage").cloned());
    objects::update(orchestrator.store(), claim, Part::Status, |claim| {
        // As Kubernetes notes it: what the volume has come to, or is on its way to.
        if let Some(asked) = &asked {
            let allocated = claim.status.get_or_insert_default().allocated_resources.get_or_insert_default();
            allocated.insert("storage".into(), asked.clone());
        }
        set_condition(claim, &Said { r#type, is: true, reason, message }, &[RESIZING, FILESYSTEM_PENDING]);
        true
    })
    .await?;
    Ok(())
}

/// Takes the conditions about the size away; with a capacity, that is what the claim has from now on.
async fn clear(
    orchestrator: &Orchestrator,
    claim: &PersistentVolumeClaim,
    capacity: Option<Quantity>,
) -> Result<(), Failure> {
    objects::update(orchestrator.store(), claim, Part::Status, |claim| {
        let status = claim.status.get_or_insert_default();
        if let Some(list) = &mut status.conditions {
            list.retain(|c| c.type_ != RESIZING && c.type_ != FILESYSTEM_PENDING);
        }
        status.allocated_resources = None;
        if let Some(capacity) = &capacity {
            status.capacity.get_or_insert_default().insert("storage".into(), capacity.clone());
        }
        true
    })
    .await?;
    Ok(())
}

/// Finishes the growth of the claim of a volume that is used on a node again, at a path there; its claim says how that went.
///
/// The use itself does not fail by it: the volume is there, with all that it had.
pub async fn finish(orchestrator: &Orchestrator, target: &Target, node: &str, path: &Path, staging: &Path) {
    if let Err(failure) = try_finish(orchestrator, target, node, path, staging).await {
        let volume = &target.volume_id;
        tracing::warn!(volume, node, error = %failure, "whether a mounted volume has grown is not known; the next mount tells");
    }
}

async fn try_finish(
    orchestrator: &Orchestrator,
    target: &Target,
    node: &str,
    path: &Path,
    staging: &Path,
) -> Result<(), Failure> {
    let Some(volume) = orchestrator.store().get::<PersistentVolume>(&target.persistent_volume).await? else {
        return Ok(());
    };
    let spec = volume.spec.unwrap_or_default();
    let owner = spec.claim_ref.unwrap_or_default();
    let (Some(namespace), Some(name)) = (owner.namespace, owner.name) else { return Ok(()) };
    let claim = orchestrator.store().get_in::<PersistentVolumeClaim>(&namespace, &name).await?;
    let Some(claim) = claim.filter(|claim| claim.metadata.uid == owner.uid) else { return Ok(()) };
    let bytes = spec.capacity.and_then(|c| quantity::bytes(&c.get("storage")?.0)).unwrap_or_default();
    if capacity(&claim).is_none_or(|has| has >= bytes) {
        return Ok(());
    }
    let request = csi::NodeExpandVolumeRequest {
        volume_id: target.volume_id.clone(),
        volume_path: path.to_string_lossy().into_owned(),
        capacity_range: Some(csi::CapacityRange {
            required_bytes: i64::try_from(bytes).unwrap_or(i64::MAX),
            limit_bytes: 0,
        }),
        staging_target_path: staging.to_string_lossy().into_owned(),
        volume_capability: Some(target.usage.attach_capability()?),
        ..Default::default()
    };
    let mut client = orchestrator.inner.sockets.node(node).await?;
    match client.node_expand_volume(clients::request(request)).await.map_err(clients::failure) {
        Ok(_) => {
            clear(orchestrator, &claim, Some(quantity_of(&claim, bytes))).await?;
            let text = format!("{} has {bytes} bytes on node {node}", target.label);
            orchestrator.record(&claim, &News::normal("FileSystemResizeSuccessful", text));
        }
        Err(failure) => {
            // What is to be done for a claim that was edited again stays to be done.
            if is_done(&claim) {
                set(orchestrator, &claim, FILESYSTEM_PENDING, failure.kind.as_str(), &failure.message).await?;
            }
            orchestrator.record(&claim, &News::warning("FileSystemResizeFailed", &failure.message));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::json;
    use tokio_util::sync::CancellationToken;

    use super::*;

    /// Whether there is something to do for a claim that asks for this, has that, and says those.
    fn check(asks: &str, has: &str, said: &[(&str, &str)]) -> bool {
        let conditions: Vec<_> = said.iter().map(|(t, _)| json!({"type": t, "status": "True"})).collect();
        let allocated = said.iter().map(|(_, size)| json!({"storage": size})).next();
        let claim = serde_json::from_value(json!({
            "metadata": {"name": "c"},
            "spec": {"resources": {"requests": {"storage": asks}}},
            "status": {"phase": "Bound", "capacity": {"storage": has}, "conditions": conditions, "allocatedResources": allocated},
        }));
        needs_work(&claim.unwrap())
    }

    /// The volume is there, with all that it had; the next mount tells.
    #[tokio::test]
    async fn a_claim_that_cannot_be_told_what_it_has_is_no_failure_of_its_mount() {
        let store = store::Store::new(Arc::new(store::embedded::Embedded::in_memory()), "longhorn-system");
        let folder = tempfile::tempdir().unwrap();
        let orchestrator = Orchestrator::new(store.clone(), "driver", folder.path(), CancellationToken::new());
        let claim: PersistentVolumeClaim = serde_json::from_value(json!({
            "metadata": {"name": "c", "namespace": "default"},
            "spec": {"resources": {"requests": {"storage": "2Gi"}}},
        }))
        .unwrap();
        let mut claim = store.create(&claim).await.unwrap();
        claim.status = serde_json::from_value(json!({"phase": "Bound", "capacity": {"storage": "1Gi"}})).unwrap();
        let claim = store.replace_status(&claim).await.unwrap();
        let volume: PersistentVolume = serde_json::from_value(json!({
            "metadata": {"name": "pv"},
            "spec": {
                "capacity": {"storage": "2Gi"},
                "claimRef": {"namespace": "default", "name": "c", "uid": claim.metadata.uid},
            },
        }))
        .unwrap();
        store.create(&volume).await.unwrap();
        let target = Target {
            label: "c".into(),
            persistent_volume: "pv".into(),
            volume_id: "v".into(),
            context: Default::default(),
            usage: Default::default(),
        };
        // No node service answers.
        let path = Path::new("/mnt");
        let failure = try_finish(&orchestrator, &target, "node-1", path, path).await.unwrap_err();
        assert_eq!(failure.kind, ErrorKind::NotFound);
        let () = finish(&orchestrator, &target, "node-1", path, path).await;
        let after: PersistentVolumeClaim = store.get_in("default", "c").await.unwrap().unwrap();
        assert_eq!(after.status, claim.status, "nothing is said that nobody knows");
    }

    #[test]
    fn a_claim_is_worked_on_until_its_volume_has_what_it_asks_for() {
        assert!(!check("1Gi", "1Gi", &[]) && !check("65Mi", "66Mi", &[]));
        assert!(check("2Gi", "1Gi", &[]) && check("2Gi", "1Gi", &[(RESIZING, "2Gi")]));
        assert!(!check("2Gi", "1Gi", &[(FILESYSTEM_PENDING, "2Gi")]), "its node is next");
        assert!(check("3Gi", "1Gi", &[(FILESYSTEM_PENDING, "2Gi")]), "it was edited again");
        assert!(check("1Gi", "1Gi", &[(RESIZING, "2Gi")]), "it was taken back");
    }
}

//! ControllerExpandVolume: the wish for a larger volume. Nothing is moved or written by it: the replicas grow when they are started
//! for the next attachment, the filesystem before it is mounted.

use api::validation;
use kube::ResourceExt;
use planner::volume::growth::{self, Refusal};
use proto::csi;
use store::{Selector, StoreError};
use tracing::info;

use super::{Context, create};
use crate::CsiError;
use crate::capability::Usage;
use crate::deadline::Deadline;
use crate::limits::CONFLICT_RETRIES;
use crate::size::Bounds;

/// Makes sure that a volume is wished to have what is asked for, if it is detached; one that has it is left as it is.
pub async fn expand(
    context: &Context,
    request: csi::ControllerExpandVolumeRequest,
    _: &Deadline,
) -> Result<csi::ControllerExpandVolumeResponse, CsiError> {
    let csi::ControllerExpandVolumeRequest { volume_id, capacity_range, volume_capability, .. } = request;
    if volume_id.is_empty() {
        return Err(CsiError::Missing { field: "volume_id" });
    }
    let bounds = Bounds::of(capacity_range.as_ref())?;
    if bounds == Bounds::default() {
        return Err(CsiError::Missing { field: "capacity_range.required_bytes" });
    }
    if volume_capability.is_some() {
        Usage::required(volume_capability.as_ref())?;
    }
    let _flight = context.in_flight.take(&volume_id)?;
    for _ in 0..CONFLICT_RETRIES {
        let found = create::find(context, &volume_id).await?;
        if found.metadata.deletion_timestamp.is_some() {
            return Err(CsiError::VolumeDeleting { volume_id });
        }
        let size = bounds.grow(found.spec.size.0)?;
        if size != found.spec.size.0 {
            match grow(context, &found, size).await {
                Err(CsiError::Store(error)) if error.is_conflict() => continue,
                Err(CsiError::Store(StoreError::NotFound { .. })) => return Err(CsiError::NoVolume { volume_id }),
                grown => grown?,
            }
        }
        let capacity_bytes = i64::try_from(size).unwrap_or(i64::MAX);
        // For a block volume too: only its node can tell that the device has it.
        return Ok(csi::ControllerExpandVolumeResponse { capacity_bytes, node_expansion_required: true });
    }
    Err(CsiError::Contended { what: format!("volume `{volume_id}`") })
}

async fn grow(context: &Context, found: &api::Volume, size: u64) -> Result<(), CsiError> {
    let volume_id = found.name_any();
    if let Some(used) = validation::volume::use_of(found) {
        let reason = format!("{used}; it grows to {size} bytes once it is detached: end the pods that use it");
        return Err(CsiError::NotUsable { volume_id, reason });
    }
    let store = &context.store;
    let world = growth::World {
        nodes: store.list(&Selector::default()).await?,
        replicas: store.list(&Selector::default()).await?,
        images: store.list(&Selector::default()).await?,
        settings: store.list(&Selector::default()).await?,
    };
    match growth::refusal(&world, &volume_id, size) {
        None => {}
        Some(Refusal::NoRoom(reason)) => return Err(CsiError::NoRoom { volume_id, reason }),
        Some(Refusal::Older(why)) => {
            return Err(CsiError::NotUsable { volume_id, reason: format!("cannot grow now: {why}") });
        }
    }
    let mut wanted = found.clone();
    wanted.spec.size = api::quantity::SizeBytes(size);
    validation::volume::check_change(found, &wanted)
        .map_err(|source| CsiError::Refused { what: format!("volume `{volume_id}` cannot grow"), source })?;
    store.replace(&wanted).await?;
    info!(volume = volume_id, from = found.spec.size.0, to = size, "volume expanded");
    Ok(())
}

#[cfg(test)]
mod tests {
    use api::node::{DiskSpec, DiskStatus, NodeStatus};
    use api::quantity::SizeBytes;
    use api::volume::{VolumeSpec, VolumeState, VolumeStatus};
    use api::{ErrorKind, Node, Replica, Volume};

    use super::*;
    use crate::capability::tests::mount;
    use crate::controller::tests::{context, error, soon};

    const MIB: u64 = 1 << 20;

    /// `v` with 64 MiB, which is as it is said, and a replica of it on a disk where 100 MiB may be promised.
    async fn world(change: impl FnOnce(&mut Volume)) -> Context {
        let context = context();
        let store = &context.store;
        let mut volume = Volume::new("v", VolumeSpec { size: SizeBytes(64 * MIB), ..Default::default() });
        volume.spec.number_of_replicas = 1;
        change(&mut volume);
        let status = volume.status.take();
        let mut volume = store.create(&volume).await.unwrap();
        volume.status = status;
        store.replace_status(&volume).await.unwrap();
        let mut replica = Replica::new("r", Default::default());
        replica.spec.volume_name = "v".into();
        replica.spec.disk_id = "d".into();
        replica.spec.volume_size = SizeBytes(64 * MIB);
        store.create(&replica).await.unwrap();
        let mut node = Node::new("n1", Default::default());
        node.spec.disks.insert("disk-1".into(), DiskSpec::default());
        let mut node = store.create(&node).await.unwrap();
        let disk = DiskStatus { disk_uuid: "d".into(), storage_maximum: 100 * MIB, ..Default::default() };
        node.status = Some(NodeStatus { disk_status: [("disk-1".to_owned(), disk)].into(), ..Default::default() });
        store.replace_status(&node).await.unwrap();
        context
    }

    async fn ask(context: &Context, required: u64, limit: u64) -> Result<u64, CsiError> {
        let request = csi::ControllerExpandVolumeRequest {
            volume_id: "v".into(),
            capacity_range: Some(csi::CapacityRange { required_bytes: required as i64, limit_bytes: limit as i64 }),
            volume_capability: Some(mount()),
            ..Default::default()
        };
        let answer = expand(context, request, &soon(20)).await?;
        assert!(answer.node_expansion_required);
        Ok(answer.capacity_bytes as u64)
    }

    async fn size(context: &Context) -> u64 {
        context.store.get::<Volume>("v").await.unwrap().unwrap().spec.size.0
    }

    #[tokio::test]
    async fn a_detached_volume_gets_its_new_size_and_may_be_asked_again() {
        let context = world(|_| ()).await;
        for _ in 0..2 {
            assert_eq!(ask(&context, 80 * MIB, 0).await.unwrap(), 80 * MIB);
            assert_eq!(size(&context).await, 80 * MIB);
        }
        // Rounded as CreateVolume does.
        assert_eq!(ask(&context, 81 * MIB, 82 * MIB).await.unwrap(), 82 * MIB);
        // Less, or as much, is there.
        for required in [MIB, 82 * MIB] {
            assert_eq!(ask(&context, required, 0).await.unwrap(), 82 * MIB);
        }
        assert_eq!(ask(&context, 0, 90 * MIB).await.unwrap(), 82 * MIB);
        assert_eq!(size(&context).await, 82 * MIB);
    }

    #[tokio::test]
    async fn requests_to_expand_that_say_too_little_are_invalid_and_what_does_not_exist_is_not_found() {
        let context = world(|_| ()).await;
        let range = Some(csi::CapacityRange { required_bytes: 1, limit_bytes: 0 });
        for (volume_id, capacity_range, missing) in [
            ("", range, "`volume_id`"),
            ("v", None, "`capacity_range.required_bytes`"),
            ("v", Some(Default::default()), "`capacity_range.required_bytes`"),
        ] {
            let request = csi::ControllerExpandVolumeRequest {
                volume_id: volume_id.into(),
                capacity_range,
                ..Default::default()
            };
            let (kind, text) = error(expand(&context, request, &soon(20)).await);
            assert!(kind == ErrorKind::Invalid && text.contains(missing), "{text}");
        }
        let request =
            csi::ControllerExpandVolumeRequest { volume_id: "w".into(), capacity_range: range, ..Default::default() };
        assert_eq!(error(expand(&context, request, &soon(20)).await).0, ErrorKind::NotFound);
    }

    #[tokio::test]
    async fn a_size_that_no_volume_can_have_is_out_of_range() {
        let context = world(|_| ()).await;
        for (required, limit, word) in [
            (i64::MAX as u64, 0, "the largest volume has"),
            (81 * MIB, 81 * MIB, "raise the limit"),
            (32 * MIB, 33 * MIB, "cannot become smaller"),
        ] {
            let (kind, text) = error(ask(&context, required, limit).await);
            assert!(kind == ErrorKind::OutOfRange && text.contains(word), "{text}");
        }
        assert_eq!(size(&context).await, 64 * MIB);
    }

    #[tokio::test]
    async fn an_attached_volume_says_where_it_is_and_that_it_grows_once_it_is_detached() {
        let attached = |v: &mut Volume| v.spec.node_id = "node-1".into();
        let leaving = |v: &mut Volume| {
            let (state, current_node_id) = (VolumeState::Detaching, "node-1".into());
            v.status = Some(VolumeStatus { state, current_node_id, ..Default::default() });
        };
        for (context, word) in [(world(attached).await, "attached to"), (world(leaving).await, "being detached from")] {
            let (kind, text) = error(ask(&context, 80 * MIB, 0).await);
            assert_eq!(kind, ErrorKind::NotReady);
            assert!(text.contains(&format!("{word} node `node-1`")) && text.contains("once it is detached"), "{text}");
            assert_eq!(size(&context).await, 64 * MIB);
            // What it has already is no growth.
            assert_eq!(ask(&context, 64 * MIB, 0).await.unwrap(), 64 * MIB);
        }
    }

    #[tokio::test]
    async fn a_disk_without_room_is_named_with_what_is_needed_and_what_is_there() {
        let context = world(|_| ()).await;
        let (kind, text) = error(ask(&context, 128 * MIB, 0).await);
        assert_eq!(kind, ErrorKind::Exhausted);
        let words = ["disk-1 of n1", "67108864 bytes are needed", "37748736 can still be promised"];
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
        assert_eq!(size(&context).await, 64 * MIB);
    }

    #[tokio::test]
    async fn a_volume_does_not_grow_before_all_of_its_instances_can_grow_it() {
        let context = world(|_| ()).await;
        let older = |r: &mut Replica| r.status.get_or_insert_default().generation = 1_000_001;
        context.store.modify_status::<Replica>("r", older).await.unwrap();
        let (kind, text) = error(ask(&context, 80 * MIB, 0).await);
        assert!(kind == ErrorKind::NotReady && text.contains("older program"), "{text}");
        let tells = |r: &mut Replica| r.status.get_or_insert_default().current_size = SizeBytes(64 * MIB);
        context.store.modify_status::<Replica>("r", tells).await.unwrap();
        assert_eq!(ask(&context, 80 * MIB, 0).await.unwrap(), 80 * MIB);
    }
}

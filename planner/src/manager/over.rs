//! What lies over a copy whose image is gone, or another one by now.
//!
//! The end of an image waits for its replicas, so as a rule nothing does. But objects are lost, and finalizers are taken off: a replica
//! without its base is lost too. A replica names its image and not the uuid, so one of the next image of that name must not count.

use api::{BackingImage, Replica};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::Observed;
use crate::disk::Disk;

/// What lies over the copy of `image` with `uuid` on a disk, a phrase; nothing when it may go. `now` is the image of that name, of which
/// `replicas` are.
pub fn lies_over(
    (image, uuid): (&str, &str),
    disk: &Disk,
    now: Option<&BackingImage>,
    replicas: &[Replica],
) -> Option<String> {
    let over = || replicas.iter().filter(|r| r.spec.backing_image == image && r.spec.disk_id == disk.id);
    let first = over().next()?;
    let next = now.filter(|image| uuid_of(image) != uuid);
    let Some(next) = next else { return Some(named(first)) };
    // One with data that is older than the next image began on the former. Otherwise the directory says what it began on.
    over()
        .find(|r| has_data(r) && is_older(&r.metadata, &next.metadata))
        .map(named)
        .or_else(|| directory(image, uuid, disk))
}

/// What the node says of the directories of replicas over that copy, a phrase; nothing when none lies over it.
pub(super) fn directory(image: &str, uuid: &str, disk: &Disk) -> Option<String> {
    match &disk.under_replicas {
        None => Some(format!("node {} does not say what lies below `replicas/`", disk.node)),
        Some(used) => {
            used.contains(&format!("{image}-{uuid}")).then(|| "a directory below `replicas/` lies over it".to_owned())
        }
    }
}

/// Why a copy that this manager records stays although its image is gone or another one.
pub(super) fn keeps(o: &Observed, disk: &Disk, image: &str, uuid: &str) -> Option<String> {
    let now = o.image(image);
    // What its own image lets go is guarded there.
    let is_its_own = now.is_some_and(|image| uuid_of(image) == uuid);
    if is_its_own { None } else { lies_over((image, uuid), disk, now, &o.replicas) }
}

fn uuid_of(image: &BackingImage) -> &str {
    image.status.as_ref().map_or("", |status| status.uuid.as_str())
}

fn named(replica: &Replica) -> String {
    let name = replica.metadata.name.as_deref().unwrap_or_default();
    format!("replica {name} of volume {} lies over it", replica.spec.volume_name)
}

fn has_data(replica: &Replica) -> bool {
    !replica.spec.failed_at.is_empty() || replica.status.as_ref().is_some_and(|status| status.generation > 0)
}

fn is_older(a: &ObjectMeta, b: &ObjectMeta) -> bool {
    let made = |of: &ObjectMeta| of.creation_timestamp.as_ref().map(|at| at.0);
    made(a).zip(made(b)).is_some_and(|(a, b)| a < b)
}

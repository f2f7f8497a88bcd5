//! Which copies are being made although no replica asks for them: what `concurrent-backing-image-replenish-per-node-limit` is about.
//!
//! They are counted from what is wished and known of all images, entries that nobody has begun with included, and never from memory.

use std::collections::{BTreeMap, BTreeSet};

use api::image::{BackingImageStatus, CopyState, DiskFileSpec, DiskFileStatus};
use api::{BackingImage, BackingImageDataSource, Replica};

use crate::disk::{Disks, Health};
use crate::image::{Observed, name_of};
use crate::placement::Making;

/// Disks and images: on the one a replica lies over the other, or its first file is being prepared there.
type Apart<'a> = BTreeSet<(&'a str, &'a str)>;

/// The copies of all images but one that are being made without a replica.
pub fn making_of_others<'a>(
    but: &str,
    images: impl IntoIterator<Item = &'a BackingImage>,
    sources: impl IntoIterator<Item = &'a BackingImageDataSource>,
    replicas: impl IntoIterator<Item = &'a Replica>,
    disks: &Disks,
) -> Making {
    let mut making = Making::new();
    let apart = apart(sources, replicas);
    for image in images.into_iter().filter(|i| name_of(i) != but) {
        let none = BTreeMap::new();
        let known = image.status.as_ref().map_or(&none, |s| &s.disk_file_status_map);
        for node in being_made(name_of(image), &image.spec.disk_file_spec_map, known, &apart, disks) {
            making.entry(node.to_owned()).or_default().push(name_of(image).to_owned());
        }
    }
    making
}

/// The nodes on which copies of the observed image are being made, one for each copy.
pub(in crate::image) fn being_made_of(
    o: &Observed,
    status: &BackingImageStatus,
    map: &BTreeMap<String, DiskFileSpec>,
) -> Vec<String> {
    let apart = apart(&o.data_source, &o.replicas);
    let nodes = being_made(name_of(&o.image), map, &status.disk_file_status_map, &apart, &o.disks);
    nodes.into_iter().map(str::to_owned).collect()
}

fn apart<'a>(
    sources: impl IntoIterator<Item = &'a BackingImageDataSource>,
    replicas: impl IntoIterator<Item = &'a Replica>,
) -> Apart<'a> {
    let used = replicas.into_iter().map(|r| (r.spec.disk_id.as_str(), r.spec.backing_image.as_str()));
    let prepared = sources.into_iter().filter(|s| !s.spec.file_transferred);
    let prepared = prepared.map(|s| (s.spec.disk_uuid.as_str(), s.metadata.name.as_deref().unwrap_or_default()));
    used.chain(prepared).collect()
}

/// The nodes on which copies of an image are being made, one for each copy.
fn being_made<'a>(
    image: &str,
    wanted: &BTreeMap<String, DiskFileSpec>,
    known: &BTreeMap<String, DiskFileStatus>,
    apart: &Apart<'_>,
    disks: &'a Disks,
) -> Vec<&'a str> {
    let is_begun_or_due = |disk: &&String| {
        let state = known.get(*disk).map(|f| f.state).unwrap_or_default();
        // One that failed waits for its next attempt, on a disk that does not work nothing is made.
        !matches!(state, CopyState::Ready | CopyState::Failed | CopyState::FailedAndCleanup | CopyState::Unknown)
    };
    let made = wanted.keys().filter(is_begun_or_due).filter(|disk| !apart.contains(&(disk.as_str(), image)));
    made.filter_map(|disk| disks.get(disk)).filter(|d| d.health == Health::Ready).map(|d| d.node.as_str()).collect()
}

//! Whom a change concerns: what others read of an object, compared before and after.
//!
//! It is always safe to say that somebody is concerned; whoever is left out must not read what changed.

use std::collections::BTreeSet;

use api::image::{BackingImageStatus, CopyState};
use api::{BackingImage, BackingImageManager, Node, Replica, Setting};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

/// An object before and after a change; `None`: it was not there, or is gone.
pub type Change<'a, T> = (Option<&'a T>, Option<&'a T>);

/// Whether managers and the data source look at what changed of an image: its content, its wish, and the states of its copies.
pub fn image_to_managers((before, after): Change<'_, BackingImage>) -> bool {
    let essence = |image: &BackingImage| {
        let mut status = essence_of_status(image);
        status.conditions.clear();
        for file in status.disk_file_status_map.values_mut() {
            let state = file.state;
            *file = api::image::DiskFileStatus { state, ..Default::default() };
        }
        (is_deleted(&image.metadata), image.metadata.uid.clone(), image.spec.clone(), status)
    };
    differs(before, after, essence)
}

/// Whether volumes look at what changed of an image: all that it says of its copies, which they repeat while they wait for one.
pub fn image_to_volumes((before, after): Change<'_, BackingImage>) -> bool {
    let essence = |image: &BackingImage| {
        (is_deleted(&image.metadata), image.metadata.uid.clone(), image.spec.clone(), essence_of_status(image))
    };
    differs(before, after, essence)
}

/// The images that look at what changed of a manager: those whose entry or file is another one, and all that it holds or held when
/// the agent itself is.
pub fn manager_to_images((before, after): Change<'_, BackingImageManager>) -> BTreeSet<String> {
    let agent = |manager: &BackingImageManager| {
        (manager.metadata.uid.clone(), manager.spec.disk_uuid.clone(), manager.status.as_ref().map(|s| s.current_state))
    };
    let is_another = differs(before, after, agent);
    let file = |manager: Option<&BackingImageManager>, image: &str| {
        let entry = manager.and_then(|m| m.spec.backing_images.get(image)).cloned();
        (entry, manager.and_then(|m| m.status.as_ref()?.backing_image_file_map.get(image)).cloned())
    };
    let held: BTreeSet<&String> = before.into_iter().chain(after).flat_map(held).collect();
    held.into_iter().filter(|image| is_another || file(before, image) != file(after, image)).cloned().collect()
}

/// The images that a manager holds, or has a file of.
pub fn held(manager: &BackingImageManager) -> impl Iterator<Item = &String> {
    let files = manager.status.iter().flat_map(|s| s.backing_image_file_map.keys());
    manager.spec.backing_images.keys().chain(files)
}

/// Whether the image of a replica looks at what changed of it: where it is and what is wished of it, not how it fares.
pub fn replica_to_image((before, after): Change<'_, Replica>) -> bool {
    differs(before, after, |replica| replica.spec.clone())
}

/// Whether decisions depend on what changed of a node. Free bytes change all the time; only what decides about eligibility counts.
pub fn node_to_all((before, after): Change<'_, Node>) -> bool {
    let essence = |node: &Node| {
        let mut status = node.status.clone().unwrap_or_default();
        for disk in status.disk_status.values_mut() {
            // Whole GiB: more room may be what somebody waits for.
            disk.storage_available >>= 30;
            disk.conditions.iter_mut().for_each(|c| c.last_probe_time.clear());
            // It matters to who removes something, and is read afresh then.
            disk.images_under_replicas = None;
        }
        status.conditions.iter_mut().for_each(|c| c.last_probe_time.clear());
        (is_deleted(&node.metadata), node.metadata.uid.clone(), node.spec.clone(), status)
    };
    differs(before, after, essence)
}

/// Whether a setting has another value.
pub fn setting_to_all((before, after): Change<'_, Setting>) -> bool {
    differs(before, after, |setting| setting.value.clone())
}

fn differs<T, E: PartialEq>(before: Option<&T>, after: Option<&T>, essence: impl Fn(&T) -> E) -> bool {
    before.map(&essence) != after.map(&essence)
}

fn is_deleted(metadata: &ObjectMeta) -> bool {
    metadata.deletion_timestamp.is_some()
}

/// A status without what only the image itself reads.
fn essence_of_status(image: &BackingImage) -> BackingImageStatus {
    let mut status = image.status.clone().unwrap_or_default();
    status.disk_last_ref_at_map.clear();
    status.conditions.iter_mut().for_each(|c| c.last_probe_time.clear());
    for file in status.disk_file_status_map.values_mut() {
        file.last_state_transition_time.clear();
        file.verified_at.clear();
        file.damage.clear();
        if file.state == CopyState::Ready {
            file.progress = 0;
        }
    }
    status
}

#[cfg(test)]
mod tests {
    use api::image::DiskFileStatus;
    use api::manager::{FileInfo, ManagerState};
    use api::names::condition::{EVICTED, READY};
    use api::node::DiskStatus;
    use api::{Condition, ConditionStatus};
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

    use super::*;

    fn image() -> BackingImage {
        let mut image = BackingImage::new("ubuntu", Default::default());
        image.spec.disk_file_spec_map.insert("a".into(), Default::default());
        let file = DiskFileStatus { state: CopyState::Ready, ..Default::default() };
        let conditions = vec![Condition::new(EVICTED, ConditionStatus::True, "", "")];
        let files = [("a".to_owned(), file)].into();
        image.status = Some(BackingImageStatus { disk_file_status_map: files, conditions, ..Default::default() });
        image
    }

    /// What a change of an image concerns: managers, volumes.
    fn of_image(change: impl FnOnce(&mut BackingImage, &mut BackingImageStatus)) -> (bool, bool) {
        let before = image();
        let mut after = before.clone();
        let mut status = after.status.take().unwrap_or_default();
        change(&mut after, &mut status);
        after.status = Some(status);
        let change = (Some(&before), Some(&after));
        (image_to_managers(change), image_to_volumes(change))
    }

    fn file(status: &mut BackingImageStatus) -> &mut DiskFileStatus {
        status.disk_file_status_map.get_mut("a").unwrap()
    }

    #[test]
    fn a_change_of_an_image_concerns_those_who_read_it() {
        type Edit = fn(&mut BackingImage, &mut BackingImageStatus);
        let cases: [(&str, Edit, (bool, bool)); 19] = [
            ("nothing", |_, _| {}, (false, false)),
            ("a label", |i, _| drop(i.metadata.labels.replace([("a".into(), "b".into())].into())), (false, false)),
            ("a version", |i, _| i.metadata.resource_version = Some("7".into()), (false, false)),
            ("a use", |_, s| drop(s.disk_last_ref_at_map.insert("a".into(), "now".into())), (false, false)),
            ("a reading", |_, s| file(s).verified_at = "now".into(), (false, false)),
            ("damage", |_, s| file(s).damage = "chunk 3".into(), (false, false)),
            ("the time of a state", |_, s| file(s).last_state_transition_time = "now".into(), (false, false)),
            ("the progress of what is done", |_, s| file(s).progress = 100, (false, false)),
            ("a look at a condition", |_, s| s.conditions[0].last_probe_time = "now".into(), (false, false)),
            ("a sentence", |_, s| file(s).message = "why".into(), (false, true)),
            ("progress", |_, s| (file(s).progress, file(s).state) = (3, CopyState::InProgress), (true, true)),
            (
                "a condition",
                |_, s| s.conditions.push(Condition::new(READY, ConditionStatus::True, "", "")),
                (false, true),
            ),
            ("a state", |_, s| file(s).state = CopyState::Failed, (true, true)),
            ("a copy let go", |_, s| s.disk_file_status_map.clear(), (true, true)),
            (
                "a copy wished",
                |i, _| drop(i.spec.disk_file_spec_map.insert("b".into(), Default::default())),
                (true, true),
            ),
            ("a wish to verify", |i, _| i.spec.verify_requested_at = "now".into(), (true, true)),
            ("the checksum", |_, s| s.checksum = "c0ffee".into(), (true, true)),
            ("another of its name", |i, _| i.metadata.uid = Some("2".into()), (true, true)),
            ("its deletion", |i, _| i.metadata.deletion_timestamp = Some(Time(Default::default())), (true, true)),
        ];
        for (what, change, expected) in cases {
            assert_eq!(of_image(change), expected, "{what}");
        }
        let image = image();
        for change in [(None, Some(&image)), (Some(&image), None)] {
            assert!(image_to_managers(change) && image_to_volumes(change), "it comes or goes");
        }
    }

    #[test]
    fn a_change_of_a_manager_concerns_the_images_whose_file_it_is() {
        let before = |change: fn(&mut BackingImageManager)| {
            let mut manager = BackingImageManager::new("bim-a", Default::default());
            manager.spec.backing_images = ["x", "y"].map(|name| (name.to_owned(), "1".to_owned())).into();
            let status = manager.status.get_or_insert_default();
            status.current_state = ManagerState::Running;
            status.backing_image_file_map = ["x", "y"].map(|name| (name.to_owned(), FileInfo::default())).into();
            change(&mut manager);
            manager
        };
        let manager = before(|_| {});
        type Edit = fn(&mut BackingImageManager);
        let cases: [(Edit, &[&str]); 9] = [
            (|_| {}, &[]),
            (|m| m.metadata.resource_version = Some("7".into()), &[]),
            (|m| m.status.as_mut().unwrap().backing_image_file_map.get_mut("x").unwrap().progress = 7, &["x"]),
            (|m| drop(m.spec.backing_images.remove("y")), &["y"]),
            (|m| drop(m.spec.backing_images.insert("z".into(), "1".into())), &["z"]),
            (|m| m.status.as_mut().unwrap().current_state = ManagerState::Error, &["x", "y"]),
            (|m| m.status = None, &["x", "y"]),
            (|m| m.metadata.uid = Some("2".into()), &["x", "y"]),
            (|m| m.spec.disk_uuid = "b".into(), &["x", "y"]),
        ];
        for (n, (change, images)) in cases.into_iter().enumerate() {
            let changed = before(change);
            let images: BTreeSet<String> = images.iter().map(|name| (*name).to_owned()).collect();
            assert_eq!(manager_to_images((Some(&manager), Some(&changed))), images, "case {n}");
        }
        for change in [(Some(&manager), None), (None, Some(&manager))] {
            assert_eq!(manager_to_images(change).len(), 2, "it comes or goes");
        }
    }

    #[test]
    fn a_heartbeat_without_news_concerns_nobody() {
        let node = |available: u64, probed: &str, is_ready: bool| {
            let mut node = Node::new("n1", Default::default());
            let status = node.status.get_or_insert_default();
            let verdict = if is_ready { ConditionStatus::True } else { ConditionStatus::Unknown };
            let mut ready = Condition::new(READY, verdict, "", "");
            ready.last_probe_time = probed.into();
            status.conditions.push(ready);
            let mut disk = DiskStatus { storage_available: available, ..Default::default() };
            disk.conditions.push(status.conditions[0].clone());
            // Read afresh by who removes something.
            disk.images_under_replicas = Some(vec![probed.into()]);
            status.disk_status.insert("disk".into(), disk);
            node
        };
        let before = node(5 << 30, "now", true);
        let concerns = |after: &Node| node_to_all((Some(&before), Some(after)));
        assert!(!concerns(&node((5 << 30) + 1, "later", true)), "a heartbeat");
        assert!(concerns(&node(5 << 30, "now", false)), "it does not answer");
        assert!(concerns(&node(4 << 30, "now", true)), "less room");
        type Edit = fn(&mut Node);
        let edits: [(&str, Edit); 5] = [
            ("a wish", |n| n.spec.eviction_requested = true),
            ("its deletion", |n| n.metadata.deletion_timestamp = Some(Time(Default::default()))),
            ("another of its name", |n| n.metadata.uid = Some("2".into())),
            ("a zone", |n| n.status.as_mut().unwrap().zone = "b".into()),
            ("files of images on a disk", |n| {
                n.status.as_mut().unwrap().disk_status.get_mut("disk").unwrap().holds_image_files = true;
            }),
        ];
        for (what, edit) in edits {
            let mut after = before.clone();
            edit(&mut after);
            assert!(concerns(&after), "{what}");
        }
        assert!(node_to_all((None, Some(&before))) && node_to_all((Some(&before), None)), "it comes or goes");
    }

    #[test]
    fn how_a_replica_fares_is_nothing_to_its_image() {
        let before = Replica::new("r", Default::default());
        let mut after = before.clone();
        after.status.get_or_insert_default().actual_size_bytes += 1;
        assert!(!replica_to_image((Some(&before), Some(&after))));
        after.spec.failed_at = "now".into();
        assert!(replica_to_image((Some(&before), Some(&after))));
        assert!(replica_to_image((Some(&before), None)) && replica_to_image((None, Some(&before))));
    }

    #[test]
    fn a_setting_with_the_same_value_concerns_nobody() {
        let setting = |value: &str, version: &str| {
            let mut setting = Setting { value: value.into(), ..Default::default() };
            setting.metadata.resource_version = Some(version.into());
            setting
        };
        let before = setting("3", "1");
        assert!(!setting_to_all((Some(&before), Some(&setting("3", "2")))));
        assert!(setting_to_all((Some(&before), Some(&setting("4", "2")))));
        assert!(setting_to_all((Some(&before), None)) && setting_to_all((None, Some(&before))));
    }
}

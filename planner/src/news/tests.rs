//! What users read as events of each kind, and what makes none.

use api::image::BackingImageStatus;
use api::node::{DiskStatus, NodeStatus};
use api::replica::{ReplicaSpec, ReplicaStatus};
use api::volume::VolumeStatus;

use super::*;

fn disks() -> Disks {
    let disk = |id: &str| crate::disk::ready_disk(id, 1 << 30);
    Disks { list: vec![disk("a"), disk("b")], ..Default::default() }
}

fn condition(r#type: &str, status: ConditionStatus, reason: &str, message: &str) -> Condition {
    Condition { last_transition_time: "T".into(), ..Condition::new(r#type, status, reason, message) }
}

fn said(facts: &[Fact]) -> Vec<String> {
    let say = |f: &Fact| match &f.news {
        Some(n) => format!("{} {} {} {}: {}", f.topic, n.mood.as_str(), n.reason, n.part, n.message),
        None => format!("{} -", f.topic),
    };
    facts.iter().map(say).collect()
}

fn image(ready: Condition, copies: &[(&str, DiskFileStatus)]) -> BackingImage {
    let mut image = BackingImage::new("ubuntu", Default::default());
    image.status = Some(BackingImageStatus {
        conditions: vec![ready],
        disk_file_status_map: copies.iter().map(|(d, c)| ((*d).to_owned(), c.clone())).collect(),
        ..Default::default()
    });
    image
}

#[test]
fn an_image_tells_of_each_copy_by_the_name_of_its_disk() {
    let copy = |state, message: &str, error_kind| DiskFileStatus {
        state,
        message: message.into(),
        error_kind,
        next_retry_time: "N".into(),
        last_state_transition_time: "S".into(),
        ..Default::default()
    };
    let ready = condition(READY, ConditionStatus::True, "Ready", "1 of 3 copies ready");
    let full = copy(CopyState::Failed, "no space left", Some(ErrorKind::Exhausted));
    let facts = of_image(
        &image(
            ready,
            &[
                ("a", copy(CopyState::Ready, "", None)),
                ("b", full),
                ("c", copy(CopyState::Unknown, "silent", None)),
                ("d", copy(CopyState::Pending, "", None)),
            ],
        ),
        &disks(),
    );
    assert_eq!(
        said(&facts),
        [
            "Ready Normal Ready : 1 of 3 copies ready",
            "copy/a Normal CopyReady a: the copy on a of node-a is ready",
            "copy/b Warning CopyDiskFull b: the copy on b of node-b failed: no space left",
            "copy/c -",
        ]
    );
    assert_eq!(facts[2].again, "N", "each attempt counts");
    assert_eq!(facts[2].since, "S", "whether it was told before is known by that");
}

#[test]
fn an_eviction_is_a_warning_only_when_something_is_to_be_done() {
    let told = |reason: &str, message: &str| {
        let mut image = image(condition(READY, ConditionStatus::True, "Ready", "fine"), &[]);
        let evicted = condition(api::names::condition::EVICTED, ConditionStatus::False, reason, message);
        image.status.as_mut().unwrap().conditions.push(evicted);
        of_image(&image, &disks())
    };
    let (waits, blocked) = (told("EvictionWaits", "it stays"), told("EvictionBlocked", "it stays"));
    assert_eq!(said(&waits)[1], "Evicted Normal EvictionWaits : it stays");
    assert_eq!(said(&blocked)[1], "Evicted Warning EvictionBlocked : it stays");
    assert_ne!(blocked[1].again, told("EvictionBlocked", "another one stays")[1].again, "another copy is news");
}

#[test]
fn damage_of_a_copy_is_news_once_for_each_sentence() {
    let copy = DiskFileStatus { state: CopyState::Ready, damage: "chunk 7 differed".into(), ..Default::default() };
    let ready = condition(READY, ConditionStatus::True, "Ready", "");
    let facts = of_image(&image(ready, &[("a", copy)]), &disks());
    assert_eq!(said(&facts)[2], "damage/a Warning CopyDamaged a: a of node-a: chunk 7 differed");
    assert_eq!(facts[2].again, "chunk 7 differed");
}

#[test]
fn a_failure_names_what_can_be_done_and_a_beginning_is_quiet() {
    let failed = Condition::new(READY, ConditionStatus::False, "DataSourceFailed", "SHA-512 is a, not b")
        .with_hint("correct spec.checksum");
    let facts = of_image(&image(failed, &[]), &disks());
    assert_eq!(said(&facts), ["Ready Warning DataSourceFailed : SHA-512 is a, not b; correct spec.checksum"]);
    let retried = Condition { next_retry_time: "N".into(), ..condition(READY, ConditionStatus::False, "", "refused") };
    let facts = of_image(&image(retried, &[]), &disks());
    assert_eq!(said(&facts), ["Ready Warning Ready : refused"], "a condition without a reason is known by its type");
    assert_eq!(facts[0].again, "N", "each attempt counts");
    let begun = Condition::new(READY, ConditionStatus::False, "Preparing", "the image was just created");
    assert_eq!(of_image(&image(begun, &[]), &disks()), []);
    let deleted = Condition::new(READY, ConditionStatus::False, "Deleting", "deletion waits for x");
    assert_eq!(said(&of_image(&image(deleted, &[]), &disks())), ["Ready Normal Deleting : deletion waits for x"]);
}

#[test]
fn a_volume_tells_where_it_is_attached_and_what_it_lacks() {
    let check = |conditions: Vec<Condition>, expected: &[&str]| {
        let mut volume = Volume::new("v", Default::default());
        volume.status = Some(VolumeStatus { conditions, ..Default::default() });
        let facts = of_volume(&volume);
        assert_eq!(said(&facts), expected);
        facts
    };
    let (yes, no) = (ConditionStatus::True, ConditionStatus::False);
    let scheduled = condition(SCHEDULED, yes, "Scheduled", "every replica has a place");
    check(
        vec![scheduled, condition(READY, yes, "Attached", "attached to node n1")],
        &["Ready Normal Attached : attached to node n1"],
    );
    let unplaced = condition(SCHEDULED, no, "NotAllPlaced", "no room");
    let degraded = condition(READY, yes, "Degraded", "1 of 2 replicas are in sync: r1: gone");
    let facts = check(
        vec![unplaced, degraded],
        &["Ready Warning Degraded : 1 of 2 replicas are in sync: r1: gone", "Scheduled Warning NotAllPlaced : no room"],
    );
    assert_eq!(facts[0].again, "1 of 2 replicas are in sync: r1: gone", "one more that is lost is news");
    check(vec![condition(READY, no, "Creating", "the volume is being created")], &[]);
    check(vec![condition(READY, no, "Attaching", "waits")], &["Ready Normal Attaching : waits"]);
    check(vec![condition(READY, no, "EngineFailed", "why")], &["Ready Warning EngineFailed : why"]);
}

#[test]
fn a_replica_that_failed_names_reason_disk_node_and_volume() {
    let spec = ReplicaSpec {
        volume_name: "v".into(),
        disk_id: "a".into(),
        failed_at: "F".into(),
        failed_reason: "it did not answer for 8 s".into(),
        ..Default::default()
    };
    let mut replica = Replica::new("v-r-1", spec);
    let stopped = condition(READY, ConditionStatus::False, "Stopped", "it is not wanted now");
    replica.status = Some(ReplicaStatus { conditions: vec![stopped], ..Default::default() });
    let facts = of_replica(&replica, &disks());
    assert_eq!(said(&facts), ["failed Warning ReplicaFailed : it did not answer for 8 s (a of node-a, volume v)"]);
    assert_eq!((facts[0].since.as_str(), facts[0].again.as_str()), ("F", "F"));
    replica.spec.failed_reason.clear();
    let by_user = "failed Warning ReplicaFailed : it was marked as failed (a of node-a, volume v)";
    assert_eq!(said(&of_replica(&replica, &disks())), [by_user]);
    replica.spec.failed_at.clear();
    replica.status.as_mut().unwrap().conditions = vec![condition(READY, ConditionStatus::True, "Serving", "")];
    assert_eq!(said(&of_replica(&replica, &disks())), ["Ready Normal Serving : it serves from a of node-a"]);
}

#[test]
fn a_node_tells_of_its_disks() {
    let disk = |conditions| DiskStatus { conditions, ..Default::default() };
    let (yes, no) = (ConditionStatus::True, ConditionStatus::False);
    let mut node = Node::new("n", Default::default());
    node.status = Some(NodeStatus {
        conditions: vec![
            condition(READY, yes, "Ready", ""),
            condition(ENGINE_REPLACEMENT, no, "TooOld", "Linux 6.1"),
            condition(CLOCK_STEADY, no, "ClockWasSet", "ahead by 9 s"),
        ],
        disk_status: [
            (
                "d1".into(),
                disk(vec![condition(READY, yes, "Ready", ""), condition(SCHEDULABLE, yes, "Schedulable", "")]),
            ),
            (
                "d2".into(),
                disk(vec![
                    condition(READY, yes, "Ready", ""),
                    condition(SCHEDULABLE, no, "DiskPressure", "1 byte is free"),
                ]),
            ),
            (
                "d3".into(),
                disk(vec![
                    condition(READY, no, "NoDirectory", "gone"),
                    condition(SCHEDULABLE, no, "DiskNotReady", "it is not ready"),
                ]),
            ),
        ]
        .into(),
        ..Default::default()
    });
    assert_eq!(
        said(&of_node(&node)),
        [
            "Ready Normal Ready : the node reports",
            "EngineReplacement Warning TooOld : Linux 6.1",
            "ClockSteady Warning ClockWasSet : ahead by 9 s",
            "disk/d1 Normal DiskReady d1: d1: it can be used",
            "disk/d2 Warning DiskPressure d2: d2: 1 byte is free",
            "disk/d3 Warning NoDirectory d3: d3: gone",
        ]
    );
}

#[test]
fn an_image_tells_of_a_copy_that_was_put_back_and_of_one_whose_disk_is_gone() {
    let away = DiskFileStatus { state: CopyState::Unknown, message: "no node has it".into(), ..Default::default() };
    let mut image = image(condition(READY, ConditionStatus::True, "Ready", "fine"), &[("z", away)]);
    let kept = condition(CLEANED_UP, ConditionStatus::False, "CleanUpRefused", "it is kept");
    image.status.as_mut().unwrap().conditions.push(kept);
    let all = Disks { nodes: [("n".to_owned(), crate::disk::Health::Ready)].into(), ..disks() };
    let facts = of_image(&image, &all);
    assert_eq!(
        said(&facts)[1..],
        ["CleanedUp Warning CleanUpRefused : it is kept", "copy/z Warning CopyDiskGone z: no node has it"]
    );
    assert_eq!(facts[1].again, "it is kept", "another refusal is news");
    // As long as a node has not told, nobody knows.
    let some = Disks { incomplete: ["n".to_owned()].into(), ..all };
    assert_eq!(said(&of_image(&image, &some))[2], "copy/z -");
}

#[test]
fn what_belongs_to_no_image_is_news_once_for_each_path() {
    let found = |orphans: &[&str], foreign: &[&str], at: &str| {
        let mut manager = BackingImageManager::new("bim-a", Default::default());
        manager.spec.disk_uuid = "a".into();
        let status = manager.status.get_or_insert_default();
        status.orphans = orphans.iter().map(|path| ((*path).to_owned(), Default::default())).collect();
        status.foreign_files = foreign.iter().map(|path| (*path).to_owned()).collect();
        let told = |r#type, reason: &str, of: &[&str]| {
            let condition = condition(r#type, ConditionStatus::False, reason, &format!("{}: {at}", of.join(", ")));
            (!of.is_empty()).then_some(condition)
        };
        let conditions = [told(NO_ORPHANS, "OrphansFound", orphans), told(NO_FOREIGN_FILES, "ForeignFiles", foreign)];
        status.conditions = conditions.into_iter().flatten().collect();
        of_manager(&manager, &disks())
    };
    let again = |facts: &[Fact]| facts.iter().map(|fact| fact.again.clone()).collect::<Vec<_>>();
    let first = found(&["tmp/x"], &["tmp/notes"], "at noon");
    assert_eq!(
        said(&first),
        [
            "NoOrphans Warning OrphansFound : tmp/x: at noon (a of node-a)",
            "NoForeignFiles Warning ForeignFiles : tmp/notes: at noon (a of node-a)",
        ]
    );
    assert_eq!(again(&first), ["tmp/x", "tmp/notes"]);
    assert_eq!(again(&found(&["tmp/x"], &["tmp/notes"], "a minute later")), again(&first), "another time is no news");
    let more = found(&["tmp/x", "tmp/y"], &["tmp/notes", "tmp/z"], "at noon");
    assert_eq!(again(&more), ["tmp/x, tmp/y", "tmp/notes, tmp/z"], "one more is");
    assert_eq!(said(&found(&[], &[], "")), Vec::<String>::new());
}

#[test]
fn an_engine_tells_where_it_serves_and_what_became_of_an_upgrade() {
    let mut engine = Engine::new("v-e-0", Default::default());
    engine.spec.node_id = "n".into();
    let serving = condition(READY, ConditionStatus::True, "Serving", "");
    let refused = condition(UPGRADED, ConditionStatus::False, "UpgradeRefused", "a fence goes on");
    engine.status.get_or_insert_default().conditions = vec![serving, refused];
    assert_eq!(
        said(&of_engine(&engine)),
        ["Ready Normal Serving : it serves on node n", "Upgraded Warning UpgradeRefused : a fence goes on"]
    );
}

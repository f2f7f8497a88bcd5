//! Decision tables.

use std::collections::BTreeSet;

use api::image::{BackingImageSpec, BackingImageStatus, DiskFileStatus};
use api::manager::FileInfo;
use expect_test::{Expect, expect};

use super::super::{Memory, decide};
use super::*;
use crate::disk::{Disks, ready_disk};
use crate::workload::{State, Workload};

const UUID: &str = "12345678";

fn at(seconds: u64) -> Timestamp {
    after("2026-01-01T00:00:00Z".parse().unwrap(), Duration::from_secs(seconds))
}

/// `copy` or `tmp` of image `ubuntu` lie on disk `d`; `known`: its agent knows the copy. `image=UUID; ready; ending; source=DISK; done`
fn world(text: &str) -> Observed {
    let disk = Disk { node: "n".into(), holds_image_files: true, ..ready_disk("d", 1) };
    let wish = super::super::object::wish("bim-d", &disk);
    let workload = Workload { wish, state: State::Running, ip: "1.1.1.1".into(), is_outdated: false };
    let mut o = Observed {
        now: at(0),
        name: "bim-d".into(),
        disk_id: "d".into(),
        disks: Disks {
            list: vec![disk.clone()],
            nodes: [("n".to_owned(), Health::Ready)].into(),
            ..Default::default()
        },
        manager: None,
        workload: Some(workload),
        agent: None,
        images: vec![],
        data_sources: BTreeMap::new(),
        replicas: vec![],
        peers: BTreeMap::new(),
        scrub_interval: Duration::ZERO,
        removes_orphans: true,
        bandwidth_limit: 0,
        memory: Memory::default(),
    };
    o.manager = Some(super::super::object::object(&o, &disk, BTreeMap::new()));
    let mut agent = Agent { remains: Some(vec![]), ..Default::default() };
    let found = |place, mark: &str| Remains {
        place,
        image: "ubuntu".into(),
        uuid: UUID.into(),
        size: 7,
        mark: mark.into(),
        is_mixed: false,
    };
    for part in text.split(';').map(str::trim).filter(|p| !p.is_empty()) {
        let (key, value) = part.split_once('=').unwrap_or((part, ""));
        let remains = agent.remains.get_or_insert_default();
        match key {
            "copy" => remains.push(found(Place::Copies, "m1")),
            "part" => remains.push(found(Place::Parts, "m1")),
            "wanted" => drop(o.images[0].spec.disk_file_spec_map.insert("d".into(), Default::default())),
            "held" => {
                let held = &mut o.images[0].status.as_mut().unwrap().disk_file_status_map;
                held.insert("d".into(), DiskFileStatus::default());
            }
            "tmp" => remains.push(found(Place::Preparations, "m1")),
            "changed" => remains.iter_mut().for_each(|r| r.mark = "m2".into()),
            "mixed" => remains.iter_mut().for_each(|r| r.is_mixed = true),
            "known" => {
                let state = CopyState::Ready;
                let file = FileInfo { name: "ubuntu".into(), uuid: UUID.into(), size: 7, state, ..Default::default() };
                agent.files.push(file);
            }
            "foreign" => agent.foreign.push("backing-images/my-own-thing".into()),
            "away" => agent.remains = None,
            "image" => {
                let mut image = BackingImage::new("ubuntu", BackingImageSpec::default());
                image.status = Some(BackingImageStatus { uuid: value.into(), ..Default::default() });
                o.images.push(image);
            }
            "ready" => {
                let copy = DiskFileStatus { state: CopyState::Ready, ..Default::default() };
                let status = o.images[0].status.as_mut().unwrap();
                status.disk_file_status_map.insert("e".into(), copy);
            }
            "ending" => {
                let time = k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(at(0));
                o.images[0].metadata.deletion_timestamp = Some(time);
            }
            "source" | "done" => {
                let mut source = BackingImageDataSource::new("ubuntu", Default::default());
                (source.spec.uuid, source.spec.disk_uuid) = (UUID.into(), value.into());
                source.spec.file_transferred = key == "done";
                o.data_sources.insert("ubuntu".into(), source);
            }
            "entry" => {
                drop(o.manager.as_mut().unwrap().spec.backing_images.insert("ubuntu".to_owned(), UUID.to_owned()))
            }
            "off" => o.removes_orphans = false,
            "used" => o.disks.list[0].under_replicas = Some(BTreeSet::from([format!("ubuntu-{UUID}")])),
            "unsaid" => o.disks.list[0].under_replicas = None,
            other => panic!("{other}"),
        }
    }
    o.agent = Some(Ok(agent));
    o
}

/// What is told at first, and what is removed when it is the same after the wait.
fn check(text: &str, expected: Expect) {
    let mut o = world(text);
    let first = decide(&o);
    let removes = |d: &Decision| d.actions.iter().any(|a| matches!(a, Action::RemoveOrphan { .. }));
    assert!(!removes(&first), "it is told first");
    let is_deleted = first.actions.iter().any(|a| matches!(a, Action::DeleteFile { .. }));
    assert_eq!(is_deleted, text.contains("entry"), "only what was recorded goes at once: {text}");
    let told = first.status.orphans.iter().map(|(path, orphan)| format!("{path}: {}", orphan.message));
    let told = told.collect::<Vec<_>>().join("\n");
    o.memory = first.memory;
    o.now = after(o.now, WAIT);
    let then = decide(&o);
    let then = if removes(&then) { "removed" } else { "left" };
    expected.assert_eq(&format!("{told}\n{then}"));
}

#[test]
fn what_belongs_to_no_image_is_told_and_then_removed() {
    let copy = || {
        expect![[r#"
        backing-images/ubuntu-12345678: image ubuntu does not exist; it is removed at 2026-01-01T00:01:00Z
        removed"#]]
    };
    check("copy", copy());
    check("known", copy());
    check(
        "tmp",
        expect![[r#"
        tmp/ubuntu-12345678: image ubuntu does not exist; it is removed at 2026-01-01T00:01:00Z
        removed"#]],
    );
    let another = || {
        expect![[r#"
        backing-images/ubuntu-12345678: image ubuntu is another one now, with uuid 87654321; it is removed at 2026-01-01T00:01:00Z
        removed"#]]
    };
    // Also one that its agent took in as a copy when it started: objects may have been lost and made again.
    for copy in ["copy", "known"] {
        check(&format!("{copy}; image=87654321"), another());
        check(&format!("{copy}; image=87654321; ready"), another());
    }
}

#[test]
fn nothing_of_an_image_that_exists_is_an_orphan() {
    let left = || {
        expect![[r#"

        left"#]]
    };
    for image in ["image=12345678", "image=12345678; ready", "image=12345678; ending", "image=", "image=; ready"] {
        check(&format!("copy; {image}"), left());
    }
    // Its first file, which may be the only one.
    for image in ["image=12345678", "image=12345678; ending", "image=12345678; ready; ending"] {
        check(&format!("tmp; {image}"), left());
        check(&format!("tmp; {image}; source=d"), left());
    }
    // Its object is there no more, or is not read yet, and its data source is.
    check("tmp; source=d", left());
    check("copy; source=e", left());
    check("tmp; image=87654321; source=d", left());
    // What its manager remembers goes as it always did.
    check("copy; entry", left());
    check("tmp; entry; image=87654321", left());
}

#[test]
fn an_abandoned_preparation_is_removed_and_its_copies_are_not() {
    let moved = || {
        expect![[r#"
        tmp/ubuntu-12345678: the preparation of image ubuntu needs it no more; it is removed at 2026-01-01T00:01:00Z
        removed"#]]
    };
    check("tmp; copy; image=12345678; source=e", moved());
    check("tmp; image=12345678; source=e; ending", moved());
    check("tmp; image=12345678; done=d", moved());
    check(
        "tmp; copy; image=12345678; ready",
        expect![[r#"
        tmp/ubuntu-12345678: image ubuntu is ready without it; it is removed at 2026-01-01T00:01:00Z
        removed"#]],
    );
}

#[test]
fn a_part_of_a_copy_that_nobody_will_finish_is_removed() {
    let part = || {
        expect![[r#"
        backing-images/ubuntu-12345678: it is a part of a copy of image ubuntu that is not wanted here any more; it is removed at 2026-01-01T00:01:00Z
        removed"#]]
    };
    check("part; image=12345678; ready", part());
    check("part; image=12345678; ready; done=e", part());
    check("part; image=12345678; ready; source=e", part());
    let left = || {
        expect![[r#"

        left"#]]
    };
    for image in ["image=12345678", "image=; ready", "image=12345678; ready; ending", "image=12345678; ready; source=d"]
    {
        check(&format!("part; {image}"), left());
    }
    // A sync goes on with it, or its manager deletes it anyway.
    for keeps in ["wanted", "held", "entry"] {
        check(&format!("part; image=12345678; ready; {keeps}"), left());
    }
    check(
        "part; image=12345678; ready; used",
        expect![[r#"
        backing-images/ubuntu-12345678: it is a part of a copy of image ubuntu that is not wanted here any more; it is left because a directory below `replicas/` lies over it
        left"#]],
    );
    check(
        "part",
        expect![[r#"
        backing-images/ubuntu-12345678: image ubuntu does not exist; it is removed at 2026-01-01T00:01:00Z
        removed"#]],
    );
}

#[test]
fn what_a_replica_lies_over_is_no_orphan_to_remove() {
    check(
        "copy; used",
        expect![[r#"
        backing-images/ubuntu-12345678: image ubuntu does not exist; it is left because a directory below `replicas/` lies over it
        left"#]],
    );
    check(
        "known; image=87654321; ready; used",
        expect![[r#"
        backing-images/ubuntu-12345678: image ubuntu is another one now, with uuid 87654321; it is left because a directory below `replicas/` lies over it
        left"#]],
    );
    check(
        "known; unsaid",
        expect![[r#"
        backing-images/ubuntu-12345678: image ubuntu does not exist; it is left because node n does not say what lies below `replicas/`
        left"#]],
    );
}

#[test]
fn orphans_are_only_told_where_the_setting_says_so() {
    check(
        "copy; off",
        expect![[r#"
        backing-images/ubuntu-12345678: image ubuntu does not exist; setting orphan-backing-image-auto-deletion says to leave it
        left"#]],
    );
    check(
        "known; image=87654321; ready; off",
        expect![[r#"
        backing-images/ubuntu-12345678: image ubuntu is another one now, with uuid 87654321; setting orphan-backing-image-auto-deletion says to leave it
        left"#]],
    );
    check(
        "copy; mixed",
        expect![[r#"
        backing-images/ubuntu-12345678: image ubuntu does not exist; it is left because files of somebody else lie in it
        left"#]],
    );
}

#[test]
fn silence_makes_no_orphan() {
    let mut o = world("away");
    o.memory.orphans.insert("tmp/x-12345678".into(), Sighting::default());
    let decision = decide(&o);
    assert!(decision.actions.is_empty() && decision.status.orphans.is_empty());
    assert!(decision.memory.orphans.is_empty(), "the wait begins anew");
    o.agent = Some(Err("no answer".into()));
    assert_eq!(decide(&o).actions, []);
}

#[test]
fn an_orphan_that_changes_is_waited_for_anew() {
    let mut o = world("copy");
    o.memory = decide(&o).memory;
    let changed = Observed { now: after(o.now, WAIT), memory: o.memory.clone(), ..world("copy; changed") };
    let decision = decide(&changed);
    assert_eq!((&decision.actions[..], decision.recheck_after), (&[][..], Some(WAIT)));
    // So is one whose clock was set back, and one that the agent did not remove.
    o.now = after(o.now, WAIT);
    let path = format!("backing-images/ubuntu-{UUID}");
    refuse(&mut o.memory.orphans, &path, o.now, "it is being sent".into());
    let decision = decide(&o);
    assert_eq!((&decision.actions[..], decision.recheck_after), (&[][..], Some(WAIT)));
    let told = &decision.status.orphans[&path].message;
    assert!(told.ends_with("it is removed at 2026-01-01T00:02:00Z (it is being sent)"), "{told}");
    o.now = at(0);
    assert_eq!(decide(&o).memory.orphans[&path].since, at(0));
}

#[test]
fn orphans_and_foreign_files_stand_in_conditions_while_they_are_there() {
    let mut o = world("copy; foreign");
    let first = decide(&o);
    let of = |d: &Decision, r#type| condition::find(&d.status.conditions, r#type).map(|c| c.message.clone());
    assert!(of(&first, NO_ORPHANS).unwrap().contains("backing-images/ubuntu-12345678"));
    assert!(of(&first, NO_FOREIGN_FILES).unwrap().contains("`backing-images/my-own-thing`"));
    o = Observed { manager: o.manager, ..world("image=12345678") };
    o.manager.as_mut().unwrap().status = Some(first.status);
    o.images[0].spec.disk_file_spec_map = [("d".to_owned(), Default::default())].into();
    let then = decide(&o);
    assert_eq!((of(&then, NO_ORPHANS), of(&then, NO_FOREIGN_FILES)), (None, None));
    assert!(then.status.orphans.is_empty() && then.status.foreign_files.is_empty());
}

#[test]
fn an_agent_looks_after_a_disk_that_holds_files_until_none_are_left() {
    let mut o = world("copy");
    // It stays with an orphan, and while it does not say what is there.
    for text in ["copy", "known; unsaid", "away"] {
        assert!(!decide(&world(text)).actions.contains(&Action::Remove), "{text}");
    }
    let empty = decide(&world(""));
    assert_eq!(empty.actions, [Action::RemoveWorkload, Action::Remove]);
    // Its node looks later: nobody is started for a disk that was empty just now.
    (o.manager, o.workload, o.agent, o.memory) = (None, None, None, empty.memory);
    let waits = decide(&o);
    assert_eq!((&waits.actions[..], waits.recheck_after), (&[][..], Some(EMPTY_FOR)));
    o.now = after(o.now, EMPTY_FOR);
    assert!(matches!(&decide(&o).actions[..], [Action::Create(_)]));
    o.memory = Memory::default();
    assert!(matches!(&decide(&o).actions[..], [Action::Create(_)]));
    o.disks.list[0].health = Health::Unknown("silent".into());
    assert_eq!(decide(&o).actions, []);
    o.disks.list[0] = Disk { holds_image_files: false, ..ready_disk("d", 1) };
    assert_eq!(decide(&o).actions, []);
}

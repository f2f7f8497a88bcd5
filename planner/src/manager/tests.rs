//! Decision tables.

use api::image::{BackingImageSpec, BackingImageStatus, DiskFileSpec};
use expect_test::{Expect, expect};

use super::*;
use crate::disk::ready_disk;

mod bandwidth;
mod hand_over;
mod strays;

fn now() -> Timestamp {
    "2026-01-01T00:00:00Z".parse().unwrap()
}

fn disk(health: Health) -> Disk {
    Disk { name: "disk".into(), node: "n".into(), health, ..ready_disk("d", 1) }
}

/// `wanted; new; held; process=running; file=failed; peers; source=ready-for-transfer; transferred; disk=silent`
fn world(text: &str) -> Observed {
    let mut o = Observed {
        now: now(),
        name: "bim-d".into(),
        disk_id: "d".into(),
        disks: Disks {
            list: vec![disk(Health::Ready)],
            nodes: [("n".to_owned(), Health::Ready)].into(),
            ..Default::default()
        },
        manager: None,
        workload: None,
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
    let mut files: Vec<FileInfo> = vec![];
    for part in text.split(';').map(str::trim).filter(|p| !p.is_empty()) {
        let (key, value) = part.split_once('=').unwrap_or((part, ""));
        match key {
            "wanted" => {
                let spec = BackingImageSpec {
                    disk_file_spec_map: [("d".to_owned(), DiskFileSpec::default())].into(),
                    ..Default::default()
                };
                let mut image = BackingImage::new("ubuntu", spec);
                image.status = Some(BackingImageStatus {
                    uuid: "12345678".into(),
                    checksum: "c".into(),
                    size: 9,
                    ..Default::default()
                });
                o.images.push(image);
            }
            // Its first file was never whole.
            "new" => o.images[0].status.as_mut().unwrap().checksum.clear(),
            // Its key was taken out of the map, and nobody has let the copy go.
            "edited" => {
                o.images[0].spec.disk_file_spec_map.clear();
                let copies = &mut o.images[0].status.as_mut().unwrap().disk_file_status_map;
                copies.insert("d".into(), Default::default());
            }
            "image" => o.images.push(BackingImage::new("ubuntu", BackingImageSpec::default())),
            "elsewhere" => {
                let mut spec = o.manager.take().unwrap().spec;
                spec.backing_images.insert("debian".into(), "87654321".into());
                o.manager = Some(BackingImageManager::new("bim-d", spec));
                let on_disk = [("d".to_owned(), DiskFileSpec::default())].into();
                let spec = BackingImageSpec { disk_file_spec_map: on_disk, ..Default::default() };
                let mut image = BackingImage::new("debian", spec);
                let checksum = "c".repeat(128);
                image.status = Some(BackingImageStatus { uuid: "87654321".into(), checksum, ..Default::default() });
                o.images.push(image);
            }
            "object" | "held" => {
                let images: BTreeMap<String, String> =
                    if key == "held" { [("ubuntu".to_owned(), "12345678".to_owned())].into() } else { BTreeMap::new() };
                o.manager = Some(object(&o, &disk(Health::Ready), images));
                let file =
                    FileInfo { uuid: "12345678".into(), state: CopyState::from_name(value), ..Default::default() };
                if !value.is_empty() {
                    let status = o.manager.as_mut().unwrap().status.get_or_insert_default();
                    status.backing_image_file_map.insert("ubuntu".into(), file);
                }
            }
            "process" => {
                let state = match value {
                    "running" => State::Running,
                    "starting" => State::Starting(String::new()),
                    "pulling" => State::Starting("no such image".into()),
                    _ => State::Failed("killed by signal 9".into()),
                };
                let wish = wish("bim-d", &disk(Health::Ready));
                o.workload = Some(Workload { wish, state, ip: "1.1.1.1".into(), is_outdated: false });
            }
            "outdated" => o.workload.as_mut().unwrap().is_outdated = true,
            "owned" => o.manager.as_mut().unwrap().metadata.uid = Some("u".into()),
            "sending" => files.last_mut().unwrap().sending_reference = 1,
            "file" => {
                let message = if value == "failed" { "broken".into() } else { String::new() };
                let checksum = if value == "ready" { "c" } else { "" };
                let file = FileInfo {
                    name: "ubuntu".into(),
                    uuid: "12345678".into(),
                    state: CopyState::from_name(value),
                    message,
                    current_checksum: checksum.into(),
                    ..Default::default()
                };
                files.push(file);
            }
            // A file of an image that had the same name.
            "stray" => files.push(FileInfo {
                name: "ubuntu".into(),
                uuid: "87654321".into(),
                state: CopyState::Ready,
                ..Default::default()
            }),
            "kind" => files.last_mut().unwrap().error_kind = ErrorKind::from_name(value),
            "verified" => files.last_mut().unwrap().verified_at = value.into(),
            "requested" => o.images[0].spec.verify_requested_at = value.into(),
            "on" => o.images[0].spec.verify_disks = vec![value.into()],
            "scrub" => o.scrub_interval = Duration::from_secs(60 * value.parse::<u64>().unwrap()),
            "other" => {
                let file = FileInfo {
                    name: "ubuntu".into(),
                    uuid: "12345678".into(),
                    state: CopyState::Ready,
                    current_checksum: "other".into(),
                    ..Default::default()
                };
                files.push(file);
            }
            "peers" => drop(o.peers.insert("ubuntu".into(), vec!["2.2.2.2:8000".into(), "3.3.3.3:8000".into()])),
            "source" => {
                let mut source = BackingImageDataSource::new("ubuntu", Default::default());
                source.spec.disk_uuid = "d".into();
                let status = source.status.get_or_insert_default();
                (status.current_state, status.ip) = (CopyState::from_name(value), "9.9.9.9".into());
                o.data_sources.insert("ubuntu".into(), source);
            }
            "due" => {
                let retry = Retry { failures: 1, next: Some(now()), message: "broken".into() };
                o.memory.copies.insert("ubuntu".into(), Attempt { retry, ..Default::default() });
            }
            "disk" if value == "gone" => o.disks.list.clear(),
            "disk" => o.disks.list = vec![disk(Health::Unknown("node n does not answer".into()))],
            other => panic!("{other}"),
        }
    }
    if o.workload.as_ref().is_some_and(|w| w.state == State::Running) {
        o.agent = Some(Ok(Agent { files, ..Default::default() }));
    }
    o
}

fn check(text: &str, expected: Expect) {
    let decision = decide(&world(text));
    let actions: Vec<String> = decision
        .actions
        .iter()
        .map(|a| match a {
            Action::Create(m) => format!("create with {:?}", m.spec.backing_images),
            Action::SetSpec(s) => format!("set {:?}", s.backing_images),
            Action::EnsureWorkload(wish) => format!("start {}", wish.args.join(" ")),
            Action::DeleteFile { image, uuid } if uuid != "12345678" => format!("delete {image}-{uuid}"),
            Action::DeleteFile { image, .. } => format!("delete {image}"),
            Action::ReplaceFile { image, .. } => format!("replace {image}"),
            Action::VerifyFile { image, requested_at, bytes_per_second, .. } => {
                format!("verify {image} `{requested_at}` {bytes_per_second}")
            }
            Action::FetchFile { from: Some(from), .. } => format!("fetch from {from}"),
            Action::FetchFile { from: None, .. } => "adopt".into(),
            Action::SyncFile { from, .. } => format!("sync from {}", from.join(",")),
            other => format!("{other:?}"),
        })
        .collect();
    let files: Vec<String> = decision
        .status
        .backing_image_file_map
        .values()
        .map(|f| format!("{} {} {}", f.state.as_str(), f.message, f.next_retry_time).trim_end().to_owned())
        .collect();
    let actions = if actions.is_empty() { "nothing".to_owned() } else { actions.join("; ") };
    expected.assert_eq(&format!("{actions} | {:?} {}", decision.status.current_state, files.join(", ")));
}

/// Whether the agent is replaced in that world.
fn is_replaced(text: &str) -> bool {
    let actions = decide(&world(text)).actions;
    let removed = actions.contains(&Action::RemoveWorkload);
    let owner = world(text).manager.as_ref().and_then(Owner::of);
    let started = actions.iter().any(|a| matches!(a, Action::EnsureWorkload(wish) if wish.owner == owner));
    assert_eq!(removed, started, "{text}");
    removed
}

#[test]
fn one_of_another_version_is_replaced_when_it_has_nothing_in_hand() {
    for idle in ["process=running", "process=running; file=ready", "process=running; file=failed", "process=pulling"] {
        assert!(!is_replaced(&format!("wanted; held; {idle}")), "{idle}");
        assert!(is_replaced(&format!("wanted; held; {idle}; outdated")), "{idle}");
        // An agent without an owner, as former versions started them.
        assert!(is_replaced(&format!("wanted; held; {idle}; owned")), "{idle}");
    }
    for busy in ["file=pending", "file=starting", "file=in-progress", "file=ready; sending"] {
        assert!(!is_replaced(&format!("wanted; held; process=running; {busy}; outdated")), "{busy}");
    }
    check(
        "wanted; held=ready; process=running; file=ready; outdated",
        expect![
            "RemoveWorkload; start backing-image-manager daemon --listen $(POD_IP):8000 --sync-listen $(POD_IP):8001 --disk-uuid d --disk-path /d | Starting unknown the agent of the disk is replaced by one of the present version"
        ],
    );
}

/// An agent with which the present version cannot speak at all would stay for ever.
#[test]
fn one_of_another_version_that_is_silent_for_long_is_replaced() {
    let mut o = world("wanted; held; process=running; outdated");
    let begin = o.now;
    let mut look = |seconds: i64, agent: Result<Agent, String>, state: State, is_outdated: bool| -> Vec<Action> {
        o.now = begin + jiff::SignedDuration::from_secs(seconds);
        o.agent = (state == State::Running).then_some(agent);
        let workload = o.workload.as_mut().unwrap();
        (workload.state, workload.is_outdated) = (state, is_outdated);
        let decision = decide(&o);
        o.memory = decision.memory;
        decision.actions
    };
    let silent = || Err("it is silent".to_owned());
    assert_eq!(look(0, silent(), State::Running, true), [], "what it does is not known");
    assert_eq!(look(119, silent(), State::Running, true), []);
    assert_eq!(look(500, silent(), State::Unknown("its node does not answer".into()), true), []);
    assert_eq!(look(501, silent(), State::Running, true), [], "its silence begins anew");
    assert_eq!(look(620, silent(), State::Running, true), []);
    let busy = FileInfo { state: CopyState::InProgress, ..Default::default() };
    let busy = Agent { files: vec![busy], ..Default::default() };
    assert!(!look(621, Ok(busy), State::Running, true).contains(&Action::RemoveWorkload), "it answers");
    assert_eq!(look(622, silent(), State::Running, true), []);
    assert_eq!(look(800, silent(), State::Running, false), [], "one of this version may yet come to itself");
    let replaced = look(801, silent(), State::Running, true);
    assert!(matches!(&replaced[..], [Action::RemoveWorkload, Action::EnsureWorkload(_)]), "{replaced:?}");
}

#[test]
fn lives_while_there_is_work() {
    check("", expect!["nothing | NotStarted "]);
    check("wanted", expect![[r#"create with {"ubuntu": "12345678"} | NotStarted "#]]);
    check(
        "wanted; held",
        expect![
            "start backing-image-manager daemon --listen $(POD_IP):8000 --sync-listen $(POD_IP):8001 --disk-uuid d --disk-path /d | Starting "
        ],
    );
    check("object; process=running", expect!["RemoveWorkload; Remove | NotStarted "]);
}

#[test]
fn removes_files_before_it_forgets_them() {
    check("held=ready; process=running; file=ready", expect!["delete ubuntu; set {} | Running "]);
    check(
        "held=ready",
        expect![
            "start backing-image-manager daemon --listen $(POD_IP):8000 --sync-listen $(POD_IP):8001 --disk-uuid d --disk-path /d | Starting unknown the agent of the disk is starting"
        ],
    );
}

#[test]
fn an_edit_of_the_map_alone_removes_nothing() {
    check("wanted; edited; held=ready; process=running; file=ready", expect!["nothing | Running ready"]);
    check("wanted; edited; held=ready; disk=silent", expect!["nothing | Unknown unknown node n does not answer"]);
    // Let go by its image, too.
    check("image; held=ready; process=running; file=ready", expect!["delete ubuntu; set {} | Running "]);
}

#[test]
fn what_may_lie_on_a_disk_is_recorded_also_while_it_is_away() {
    check("wanted; object; disk=silent", expect![[r#"set {"ubuntu": "12345678"} | Unknown "#]]);
    check("held; disk=silent", expect!["nothing | Unknown "]);
}

#[test]
fn a_file_that_nobody_recorded_stays_while_its_image_is_not_known() {
    check("object; elsewhere; process=running; file=ready; image", expect!["adopt | Running "]);
    check("object; elsewhere; process=running; file=ready", expect!["adopt | Running "]);
}

#[test]
fn takes_the_first_file_over() {
    check("wanted; held; process=running; source=in-progress", expect!["nothing | Running "]);
    // Its data source is about to be made: there is nothing to look for on the disk yet.
    check("wanted; new; held; process=running", expect!["nothing | Running "]);
    // What went wrong before says nothing of the file that is being made now.
    check("wanted; new; held; process=running; source=starting; due", expect!["nothing | Running "]);
    check("wanted; held; process=running; source=ready-for-transfer", expect!["fetch from 9.9.9.9:8000 | Running "]);
}

#[test]
fn gets_further_copies_from_every_ready_peer() {
    check("wanted; held; process=running; peers", expect!["sync from 2.2.2.2:8000,3.3.3.3:8000 | Running "]);
    check("wanted; held; process=running; file=in-progress; peers", expect!["nothing | Running in-progress"]);
    check("wanted; held; process=running; file=ready; peers", expect!["nothing | Running ready"]);
}

#[test]
fn says_what_a_process_waits_for_that_does_not_start() {
    check(
        "wanted; held=ready; process=pulling",
        expect!["nothing | Starting unknown the agent of the disk is starting: no such image"],
    );
}

#[test]
fn adopts_what_it_held_after_a_restart() {
    check("wanted; held=ready; process=failed; peers", expect!["RemoveWorkload | Error unknown killed by signal 9"]);
    check(
        "wanted; held=unknown; process=running; peers",
        expect!["adopt | Running unknown the agent of the disk was started again and is asked to look at it"],
    );
}

#[test]
fn tries_a_failed_copy_again_after_its_back_off() {
    check(
        "wanted; held=in-progress; process=running; file=failed; peers",
        expect!["nothing | Running failed broken 2026-01-01T00:00:01Z"],
    );
    check(
        "wanted; held=failed; process=running; file=failed; peers; due",
        expect!["sync from 2.2.2.2:8000,3.3.3.3:8000 | Running failed broken 2026-01-01T00:00:00Z"],
    );
    // What its agent takes for good would not be got anew otherwise.
    check(
        "wanted; held=failed; process=running; other; peers; due",
        expect![
            "replace ubuntu; sync from 2.2.2.2:8000,3.3.3.3:8000 | Running failed the copy differs from the image: its checksum is other, that of the image is c 2026-01-01T00:00:00Z"
        ],
    );
    // Without a ready peer nothing is deleted: what lies there may be the last.
    check(
        "wanted; held=failed; process=running; file=failed; due",
        expect!["adopt | Running failed broken 2026-01-01T00:00:00Z"],
    );
    // Reading damage again does not make it better.
    check(
        "wanted; held=failed; process=running; file=failed; kind=Corrupt; due",
        expect!["nothing | Running failed broken 2026-01-01T00:00:00Z"],
    );
    check(
        "wanted; held=failed; process=running; file=failed; kind=Corrupt; due; peers",
        expect!["sync from 2.2.2.2:8000,3.3.3.3:8000 | Running failed broken 2026-01-01T00:00:00Z"],
    );
}

#[test]
fn refuses_a_copy_that_differs() {
    check(
        "wanted; held=ready; process=running; other; peers",
        expect![
            "nothing | Running failed the copy differs from the image: its checksum is other, that of the image is c 2026-01-01T00:00:01Z"
        ],
    );
}

#[test]
fn concludes_nothing_from_silence() {
    check("wanted; held=ready; disk=silent", expect!["nothing | Unknown unknown node n does not answer"]);
    check("held=ready; disk=silent", expect!["nothing | Unknown unknown node n does not answer"]);
    check("wanted; held=ready; disk=gone; process=failed", expect!["RemoveWorkload; Remove | NotStarted ready"]);
}

#[test]
fn a_file_of_another_uuid_is_not_taken_for_the_copy_of_the_image() {
    for order in ["stray; file=ready", "file=ready; stray"] {
        check(&format!("wanted; held=ready; process=running; {order}"), expect!["nothing | Running ready"]);
    }
    check(
        "wanted; held=ready; process=running; peers; stray",
        expect!["adopt | Running unknown the agent of the disk was started again and is asked to look at it"],
    );
}

#[test]
fn a_copy_is_verified_when_the_user_asks_and_it_was_not_since() {
    let ready = "wanted; held=ready; process=running; file=ready";
    let asked = "requested=2025-12-31T12:00:00Z";
    for more in ["", "; on=d", "; verified=2025-12-31T11:59:59Z"] {
        check(&format!("{ready}; {asked}{more}"), expect!["verify ubuntu `2025-12-31T12:00:00Z` 0 | Running ready"]);
    }
    check(&format!("{ready}; {asked}; verified=2025-12-31T12:00:00Z"), expect!["nothing | Running ready"]);
    check(&format!("{ready}; {asked}; on=e"), expect!["nothing | Running ready"]);
    check(&format!("{ready}; requested=soon"), expect!["nothing | Running ready"]);
    check(
        &format!("wanted; held=ready; process=running; file=in-progress; {asked}"),
        expect!["nothing | Running in-progress"],
    );
}

#[test]
fn a_copy_that_nobody_verified_for_long_is_read_slowly() {
    let ready = "wanted; held=ready; process=running; file=ready";
    check(&format!("{ready}; verified=2025-12-31T23:00:00Z"), expect!["nothing | Running ready"]);
    check(&format!("{ready}; verified=2025-12-31T23:00:00Z; scrub=61"), expect!["nothing | Running ready"]);
    let soon = decide(&world(&format!("{ready}; verified=2025-12-31T23:00:00Z; scrub=61")));
    assert_eq!(soon.recheck_after, Some(Duration::from_secs(60)));
    check(
        &format!("{ready}; verified=2025-12-31T23:00:00Z; scrub=60"),
        expect!["verify ubuntu `` 16777216 | Running ready"],
    );
    // Its image says since when it may be here.
    let mut o = world(&format!("{ready}; scrub=60"));
    assert_eq!(decide(&o).actions, []);
    let hours_ago =
        |n: i64| k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(now() - jiff::SignedDuration::from_hours(n));
    o.images[0].metadata.creation_timestamp = Some(hours_ago(2));
    assert_eq!(decide(&o).actions.len(), 1);
}

#[test]
fn an_agent_that_keeps_dying_is_started_less_and_less_often() {
    let mut o = world("wanted; held=ready; process=failed");
    let dead = decide(&o);
    assert_eq!(dead.recheck_after, Some(Duration::from_secs(1)));
    o.memory = dead.memory;
    o.workload = None;
    let waiting = decide(&o);
    assert_eq!((waiting.actions, waiting.recheck_after), (vec![], Some(Duration::from_secs(1))));
    o.now = crate::retry::after(now(), Duration::from_secs(1));
    assert!(matches!(decide(&o).actions[..], [Action::EnsureWorkload(_)]));
}

#[test]
fn an_agent_that_cannot_be_asked_is_left_alone_and_what_failed_stays_failed() {
    let mut o = world("wanted; held=ready; process=running");
    o.workload.as_mut().unwrap().state = State::Unknown("silent".into());
    assert_eq!(decide(&o).actions, []);
    check("wanted; held=failed; disk=silent", expect!["nothing | Unknown failed"]);
}

#[test]
fn an_agent_whose_disk_moved_is_started_anew_there() {
    let mut o = world("wanted; held=ready; process=running; file=ready");
    o.disks.list[0].path = "/elsewhere".into();
    let actions = decide(&o).actions;
    let anew = [Action::RemoveWorkload, Action::EnsureWorkload(wish("bim-d", &o.disks.list[0]))];
    assert_eq!(actions[1..], anew);
}

#[test]
fn an_attempt_ends_with_its_agent() {
    let mut o = world("wanted; held=unknown; process=failed");
    o.memory.copies.insert("ubuntu".into(), Attempt { is_running: true, ..Default::default() });
    assert!(!decide(&o).memory.copies["ubuntu"].is_running);
}

#[test]
fn a_new_image_of_an_old_name_waits_until_the_old_file_is_gone() {
    let mut o = world("wanted; held=ready; process=running; stray; peers");
    o.manager.as_mut().unwrap().spec.backing_images.insert("ubuntu".into(), "87654321".into());
    let decision = decide(&o);
    let old = Action::DeleteFile { image: "ubuntu".into(), uuid: "87654321".into() };
    assert_eq!(decision.actions[0], old);
    assert!(matches!(&decision.actions[1..], [Action::SetSpec(spec)] if spec.backing_images["ubuntu"] == "12345678"));
    assert!(decision.status.backing_image_file_map.is_empty(), "nothing is known of the new one yet");
    // What was held of the old one is no reason to look for the new one on the disk.
    let mut o = world("wanted; held=ready; process=running; peers");
    let held = &mut o.manager.as_mut().unwrap().status.as_mut().unwrap().backing_image_file_map;
    held.get_mut("ubuntu").unwrap().uuid = "87654321".into();
    assert!(matches!(decide(&o).actions[..], [Action::SyncFile { .. }]));
}

#[test]
fn a_failed_request_is_told_although_it_left_no_file() {
    check("wanted; held; process=running; due", expect!["adopt | Running failed broken 2026-01-01T00:00:00Z"]);
}

#[test]
fn a_preparation_on_another_disk_is_not_fetched_from_here() {
    let mut o = world("wanted; held; process=running; source=ready-for-transfer");
    o.data_sources.get_mut("ubuntu").unwrap().spec.disk_uuid = "e".into();
    assert_eq!(decide(&o).actions, []);
    let mut o = world("wanted; held; process=running; source=ready-for-transfer");
    o.data_sources.get_mut("ubuntu").unwrap().status.as_mut().unwrap().ip.clear();
    assert_eq!(decide(&o).actions, [], "it has no address yet");
}

#[test]
fn a_file_that_is_taken_for_good_is_removed_only_when_it_is_got_anew() {
    // Nobody else has it: what lies there may be the last.
    check(
        "wanted; held=failed; process=running; other; due",
        expect![
            "adopt | Running failed the copy differs from the image: its checksum is other, that of the image is c 2026-01-01T00:00:00Z"
        ],
    );
}

#[test]
fn of_two_overdue_copies_the_longest_unread_is_read() {
    let mut o = world("wanted; held=ready; process=running; file=ready; verified=2025-12-01T00:00:00Z; scrub=60");
    let mut other = o.images[0].clone();
    other.metadata.name = Some("zebra".into());
    o.images.push(other);
    o.manager.as_mut().unwrap().spec.backing_images.insert("zebra".into(), "12345678".into());
    let Some(Ok(agent)) = &mut o.agent else { unreachable!() };
    let later = FileInfo { name: "zebra".into(), verified_at: "2025-12-02T00:00:00Z".into(), ..agent.files[0].clone() };
    agent.files.push(later);
    let actions = decide(&o).actions;
    assert!(matches!(&actions[..], [Action::VerifyFile { image, .. }] if image == "ubuntu"), "{actions:?}");
}

#[test]
fn what_is_asked_for_is_what_is_known_of_the_image() {
    let mut o = world("wanted; held; process=running; peers");
    o.images[0].spec.checksum = "x".into();
    let actions = decide(&o).actions;
    let is_known = |file: &FileWish| (file.checksum.as_str(), file.size) == ("c", 9);
    assert!(matches!(&actions[..], [Action::SyncFile { file, .. }] if is_known(file)), "{actions:?}");
    // Before the first file is whole its length is an announcement.
    let actions = decide(&world("wanted; new; held; process=running; source=ready-for-transfer")).actions;
    assert!(matches!(&actions[..], [Action::FetchFile { file, .. }] if file.size == 0), "{actions:?}");
}

#[test]
fn a_copy_that_was_held_is_looked_for_on_the_disk_once() {
    check(
        "wanted; held=ready; process=running; peers; due",
        expect!["sync from 2.2.2.2:8000,3.3.3.3:8000 | Running failed broken 2026-01-01T00:00:00Z"],
    );
    let mut o = world("wanted; held=ready; process=running; peers");
    o.memory.copies.insert("ubuntu".into(), Attempt { is_running: true, ..Default::default() });
    assert!(matches!(decide(&o).actions[..], [Action::SyncFile { .. }]));
}

#[test]
fn a_data_source_that_has_done_its_part_is_not_asked_again() {
    let mut o = world("wanted; held; process=running; peers; source=ready-for-transfer");
    o.data_sources.get_mut("ubuntu").unwrap().spec.file_transferred = true;
    assert!(matches!(decide(&o).actions[..], [Action::SyncFile { .. }]));
}

//! Decision tables, and every world of up to three disks.

mod edits;
mod guards;
mod places;
mod recovery;

use std::collections::BTreeMap;

use api::data_source::BackingImageDataSourceStatus;
use api::image::{BackingImageSpec, CopyState, DiskFileSpec, SourceType};
use api::manager::{BackingImageManagerSpec, BackingImageManagerStatus, FileInfo, ManagerState};
use api::{BackingImage, BackingImageDataSource, BackingImageManager, ErrorKind, Replica};
use expect_test::{Expect, expect};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::*;
use crate::disk::{Disk, ready_disk};

const LONG_AGO: &str = "2025-01-01T00:00:00Z";

fn now() -> Timestamp {
    "2026-01-01T00:00:00Z".parse().unwrap()
}

fn disk(id: &str, health: Answer) -> Disk {
    let health = match health {
        Answer::Ready => crate::disk::Health::Ready,
        Answer::Silent => crate::disk::Health::Unknown("silent".into()),
        Answer::Down => crate::disk::Health::NotReady("down".into()),
    };
    Disk { health, ..ready_disk(id, 1 << 40) }
}

#[derive(Clone, Copy)]
enum Answer {
    Ready,
    Silent,
    Down,
}

/// `wanted=2; a=ready b=unknown:silent c=-; used=a,b; idle; deleting`. A disk: copy state (`-`: none wanted), then how the disk is.
fn world(text: &str) -> Observed {
    let mut o = Observed {
        now: now(),
        random: 7,
        image: BackingImage::new(
            "ubuntu",
            BackingImageSpec {
                source_type: Some(SourceType::Download),
                source_parameters: [("url".to_owned(), "http://x/y".to_owned())].into(),
                ..Default::default()
            },
        ),
        data_source: None,
        managers: vec![],
        replicas: vec![],
        volumes: vec![],
        disks: Disks::default(),
        loads: BTreeMap::new(),
        making: Default::default(),
        settings: Settings::default(),
    };
    o.image.metadata.finalizers = Some(vec![FINALIZER.into()]);
    let mut status = BackingImageStatus { uuid: "12345678".into(), ..Default::default() };
    for part in text.split(';').map(str::trim).filter(|p| !p.is_empty()) {
        if let Some(n) = part.strip_prefix("wanted=") {
            o.image.spec.min_number_of_copies = n.parse().unwrap();
        } else if let Some(users) = part.strip_prefix("used=") {
            for (n, disk) in users.split(',').enumerate() {
                let mut replica = Replica::new(&format!("v-r-{n}"), Default::default());
                (replica.spec.disk_id, replica.spec.volume_name) = (disk.into(), "v".into());
                replica.spec.desire_state = api::engine::DesireState::Running;
                o.replicas.push(replica);
                o.volumes = vec!["v".into()];
            }
        } else if part == "idle" {
            o.settings.cleanup_wait = Duration::ZERO;
        } else if part == "source" {
            let mut source = BackingImageDataSource::new("ubuntu", Default::default());
            source.spec.file_transferred = true;
            o.data_source = Some(source);
        } else if part == "deleting" {
            o.image.metadata.deletion_timestamp = Some(Time(now()));
        } else {
            for disk_text in part.split_whitespace() {
                add_disk(&mut o, &mut status, disk_text);
            }
        }
    }
    o.image.status = Some(status);
    o
}

fn add_disk(o: &mut Observed, status: &mut BackingImageStatus, text: &str) {
    let (id, rest) = text.split_once('=').unwrap();
    let (state, health) = rest.split_once(':').unwrap_or((rest, "ready"));
    let health = match health {
        "silent" => Some(Answer::Silent),
        "down" => Some(Answer::Down),
        "gone" => None,
        _ => Some(Answer::Ready),
    };
    if let Some(health) = health {
        let disk = disk(id, health);
        o.disks.nodes.insert(disk.node.clone(), disk.health.clone());
        o.disks.list.push(disk);
    }
    if state == "-" {
        return;
    }
    let (state, evict) = state.strip_suffix('!').map_or((state, false), |s| (s, true));
    o.image.spec.disk_file_spec_map.insert(id.into(), DiskFileSpec { eviction_requested: evict, ..Default::default() });
    // A copy that failed since its disk is full.
    let (state, error_kind) = if state == "full" { ("failed", Some(ErrorKind::Exhausted)) } else { (state, None) };
    let copy = api::image::DiskFileStatus {
        state: CopyState::from_name(state),
        last_state_transition_time: LONG_AGO.into(),
        gone_since: if o.disks.get(id).is_none() { LONG_AGO.into() } else { String::new() },
        ..Default::default()
    };
    status.disk_file_status_map.insert(id.into(), copy);
    status.disk_last_ref_at_map.insert(id.into(), LONG_AGO.into());
    let mut manager = BackingImageManager::new(
        &format!("bim-{id}"),
        BackingImageManagerSpec {
            disk_uuid: id.into(),
            backing_images: [("ubuntu".into(), "12345678".into())].into(),
            ..Default::default()
        },
    );
    let file =
        FileInfo { uuid: "12345678".into(), state: CopyState::from_name(state), error_kind, ..Default::default() };
    let files: BTreeMap<String, FileInfo> =
        if state == "pending" { BTreeMap::new() } else { [("ubuntu".into(), file)].into() };
    manager.status = Some(BackingImageManagerStatus {
        current_state: ManagerState::Running,
        backing_image_file_map: files,
        ..Default::default()
    });
    o.managers.push(manager);
}

fn describe(o: &Observed, decision: &Decision) -> String {
    let mut lines = vec![];
    for action in &decision.actions {
        lines.push(match action {
            Action::SetCopies(map) => {
                let before = &o.image.spec.disk_file_spec_map;
                let added = map.keys().filter(|d| !before.contains_key(*d)).map(|d| format!("+{d}"));
                let removed = before.keys().filter(|d| !map.contains_key(*d)).map(|d| format!("-{d}"));
                format!("copies {}", added.chain(removed).collect::<Vec<_>>().join(" "))
            }
            Action::CreateDataSource(s) => format!("create source on {}", s.spec.disk_uuid),
            Action::SetDataSourceSpec(s) => {
                format!("set source disk={} transferred={}", s.disk_uuid, s.file_transferred)
            }
            other => format!("{other:?}"),
        });
    }
    let condition = condition::find(&decision.status.conditions, READY).unwrap();
    if lines.is_empty() {
        lines.push("nothing".into());
    }
    format!("{}\n{}: {}", lines.join("; "), condition.reason, condition.message)
}

fn check(text: &str, expected: Expect) {
    let o = world(text);
    let decision = decide(&o);
    expected.assert_eq(&describe(&o, &decision));
}

#[test]
fn gives_a_uuid_before_anything_else() {
    let mut o = world("a=-");
    o.image.status = None;
    let decision = decide(&o);
    assert_eq!((decision.actions.len(), decision.status.uuid.as_str()), (0, "00000007"));
    // Also when its deletion was asked for before, and waits.
    o = world("a=-; used=a; deleting");
    o.image.status = None;
    let decision = decide(&o);
    assert_eq!((decision.actions.len(), decision.status.uuid.as_str()), (0, "00000007"));
    o = world("a=-; deleting");
    o.image.status = None;
    assert_eq!(decide(&o).status.uuid, "", "nothing is begun any more");
}

#[test]
fn begins_with_one_data_source() {
    check(
        "wanted=2; a=-:down b=-",
        expect![[r#"
            copies +b; create source on b
            Preparing: 0 of 1 copy ready, b of node-b pending"#]],
    );
}

#[test]
fn a_full_disk_makes_room_for_another_one() {
    check(
        "wanted=2; a=ready b=full c=-",
        expect![[r#"
        copies +c
        Ready: 1 of 3 copies ready, b of node-b failed, c of node-c pending"#]],
    );
    // Any other failure is tried again in place.
    check(
        "wanted=2; a=ready b=failed c=-",
        expect![[r#"
        nothing
        Ready: 1 of 2 copies ready, b of node-b failed"#]],
    );
    for (kind, moves) in [(ErrorKind::Exhausted, true), (ErrorKind::Unavailable, false)] {
        let mut o = world("wanted=1; a=pending b=-");
        let mut source = BackingImageDataSource::new("ubuntu", Default::default());
        source.spec.disk_uuid = "a".into();
        source.spec.parameters.clone_from(&o.image.spec.source_parameters);
        let mut tried = source.spec.parameters.clone();
        tried.insert("disk-uuid".into(), "a".into());
        source.status = Some(BackingImageDataSourceStatus {
            current_state: CopyState::Failed,
            running_parameters: tried,
            error_kind: Some(kind),
            ..Default::default()
        });
        o.data_source = Some(source);
        let moved = decide(&o).actions.iter().any(|a| matches!(a, Action::SetDataSourceSpec(s) if s.disk_uuid == "b"));
        assert_eq!(moved, moves, "{kind}");
    }
}

#[test]
fn says_why_no_disk_can_be_had() {
    check(
        "wanted=1; a=-:down b=-:silent",
        expect!["nothing\nNoEligibleDisk: no disk can take the first copy: a of node-a: down; b of node-b: silent"],
    );
}

#[test]
fn says_when_a_waiting_data_source_tries_again() {
    let mut o = world("wanted=1; a=-");
    let mut source = BackingImageDataSource::new("ubuntu", Default::default());
    source.spec.disk_uuid = "a".into();
    source.spec.parameters = o.image.spec.source_parameters.clone();
    source.status = Some(BackingImageDataSourceStatus {
        current_state: CopyState::Starting,
        message: "connection refused".into(),
        next_retry_time: "2026-01-01T00:00:04Z".into(),
        running_parameters: [("url", "http://x/y"), ("disk-uuid", "a")].map(|(k, v)| (k.into(), v.into())).into(),
        ..Default::default()
    });
    o.data_source = Some(source);
    let ready = decide(&o).status.conditions.iter().find(|c| c.r#type == READY).cloned().unwrap();
    assert_eq!((ready.reason.as_str(), ready.next_retry_time.as_str()), ("DataSourceRetries", "2026-01-01T00:00:04Z"));
    assert!(ready.message.contains("connection refused") && !ready.hint.is_empty(), "{ready:?}");
}

#[test]
fn adds_all_missing_copies_at_once() {
    check(
        "wanted=3; source; a=ready b=- c=-",
        expect!["copies +b +c\nReady: 1 of 3 copies ready, b of node-b pending, c of node-c pending"],
    );
}

#[test]
fn does_not_replace_a_copy_that_has_just_become_silent() {
    check(
        "wanted=2; source; a=ready b=pending:silent c=-",
        expect![[r#"
        nothing
        Ready: 1 of 2 copies ready, b of node-b pending (silent)"#]],
    );
}

#[test]
fn replaces_a_copy_that_was_silent_for_long() {
    check(
        "wanted=2; source; a=ready b=unknown:silent c=-",
        expect![[r#"
        copies +c
        Ready: 1 of 3 copies ready, b of node-b unknown, c of node-c pending"#]],
    );
}

#[test]
fn adds_the_disks_of_replicas_that_want_to_run() {
    check(
        "wanted=1; source; a=ready b=-; used=b",
        expect![[r#"
        copies +b
        Ready: 1 of 2 copies ready, b of node-b pending"#]],
    );
}

#[test]
fn removes_idle_copies_down_to_what_is_wanted() {
    check(
        "wanted=1; source; idle; a=ready b=ready c=ready; used=b",
        expect![[r#"
        copies -a -c
        Ready: 1 of 1 copy ready"#]],
    );
}

#[test]
fn keeps_the_last_ready_copy_although_evicted() {
    check(
        "wanted=1; source; idle; a=ready! b=unknown:silent",
        expect![[r#"
            nothing
            FewerCopies: 1 of 2 copies ready, b of node-b unknown; 1 more wanted, but no further disk is eligible: there is no other disk"#]],
    );
}

#[test]
fn moves_an_evicted_copy() {
    check(
        "wanted=1; source; a=ready! b=-",
        expect![[r#"
        copies +b
        Ready: 1 of 2 copies ready, b of node-b pending"#]],
    );
    check(
        "wanted=1; source; a=ready! b=ready",
        expect![[r#"
        copies -a
        Ready: 1 of 1 copy ready"#]],
    );
}

#[test]
fn waits_for_silent_copies_rather_than_download_again() {
    check(
        "wanted=1; source; a=unknown:silent b=-",
        expect![[r#"
        nothing
        Unknown: the copy on a of node-a cannot be asked: "#]],
    );
}

#[test]
fn downloads_again_when_every_copy_has_failed_for_long() {
    check(
        "wanted=1; source; a=failed b=-",
        expect![[r#"
        set source disk=a transferred=false
        Recovering: every copy is lost; the image is downloaded again"#]],
    );
}

#[test]
fn times_from_before_the_clock_was_set_back_count_from_now() {
    let mut o = world("wanted=1; a=ready b=failed");
    let mut status = o.image.status.take().unwrap();
    status.disk_last_ref_at_map = ["a", "b"].map(|disk| (disk.to_owned(), "2026-01-01T01:00:00Z".to_owned())).into();
    for file in status.disk_file_status_map.values_mut() {
        file.last_state_transition_time = "2026-01-01T01:00:00Z".into();
    }
    o.image.status = Some(status);
    let status = decide(&o).status;
    let changes = status.disk_file_status_map.values().map(|file| &file.last_state_transition_time);
    let times: Vec<&String> = changes.chain(status.disk_last_ref_at_map.values()).collect();
    assert_eq!(times, [&now().to_string(); 4]);
}

#[test]
fn deletes_copies_first_and_waits_for_users() {
    check(
        "wanted=1; source; deleting; a=ready; used=a",
        expect![[r#"
        nothing
        InUse: deletion waits: in use by volume v"#]],
    );
    check(
        "wanted=1; deleting; a=ready",
        expect![[r#"
        copies -a
        Deleting: deletion waits for its copies to be removed from a of node-a"#]],
    );
}

/// Every world of up to three disks: convergent, and never against invariants 2 and 6.
#[test]
fn every_world_of_three_disks_is_decided_well() {
    let states = ["-", "pending", "in-progress", "ready", "ready!", "failed", "unknown"];
    let healths = ["ready", "silent", "down", "gone"];
    let mut worlds = 0;
    let disk_texts: Vec<String> =
        states.iter().flat_map(|s| healths.iter().map(move |h| format!("{s}:{h}"))).filter(|t| t != "-:gone").collect();
    let extras = [
        "wanted=1; idle; source",
        "wanted=2; source; used=a",
        "wanted=2; idle; used=c",
        "wanted=3",
        "wanted=1; used=b; deleting",
    ];
    for (i, a) in disk_texts.iter().enumerate() {
        for (j, b) in disk_texts.iter().enumerate().skip(i) {
            for c in disk_texts.iter().skip(j) {
                for extra in extras {
                    worlds += 1;
                    check_world(&format!("{extra}; a={a} b={b} c={c}"));
                    edits::check_emptied(&format!("{extra}; a={a} b={b} c={c}"));
                }
            }
        }
    }
    assert!(worlds > 15_000, "{worlds}");
}

fn check_world(text: &str) {
    let mut o = world(text);
    let before = o.image.spec.disk_file_spec_map.clone();
    let first = decide(&o);
    for action in &first.actions {
        if let Action::SetCopies(map) = action {
            for disk in before.keys().filter(|d| !map.contains_key(*d)) {
                let state = o.image.status.as_ref().unwrap().disk_file_status_map[disk].state;
                let is_silent = state == CopyState::Unknown && !o.disks.is_gone(disk);
                assert!(!is_silent, "removed because of silence (invariant 6): {text}");
            }
            let ready = |m: &BTreeMap<String, DiskFileSpec>| {
                m.keys()
                    .filter(|d| first.status.disk_file_status_map.get(*d).is_some_and(|f| f.state == CopyState::Ready))
                    .count()
            };
            assert!(ready(&before) == 0 || ready(map) > 0, "the last ready copy is removed (invariant 2): {text}");
        }
    }
    apply(&mut o, &first);
    let second = decide(&o);
    apply(&mut o, &second);
    let third = decide(&o);
    assert!(third.actions.is_empty(), "does not settle: {text}: {:?}", third.actions);
    assert_eq!(second.status, third.status, "{text}");
}

fn apply(o: &mut Observed, decision: &Decision) {
    for action in &decision.actions {
        match action {
            Action::AddFinalizer => o.image.metadata.finalizers = Some(vec![FINALIZER.into()]),
            Action::SetCopies(map) => o.image.spec.disk_file_spec_map = map.clone(),
            Action::CreateDataSource(source) => o.data_source = Some(source.as_ref().clone()),
            Action::SetDataSourceSpec(spec) => o.data_source.as_mut().unwrap().spec = spec.as_ref().clone(),
            Action::DeleteDataSource => o.data_source = None,
            Action::RemoveFinalizer => {}
        }
    }
    o.image.status = Some(decision.status.clone());
}

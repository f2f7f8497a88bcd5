//! Recovery of every type of source.

use api::volume::VolumeState;

use super::super::recovery::{Again, Loss, Recovery, decide as recovery};
use super::*;

const TYPES: [SourceType; 5] =
    [SourceType::Download, SourceType::Upload, SourceType::ExportFromVolume, SourceType::Restore, SourceType::Clone];

/// A world of a source type that has all parameters.
fn made_from(text: &str, source: SourceType) -> Observed {
    let mut o = world(text);
    o.image.spec.source_type = Some(source);
    let parameters = match source {
        SourceType::Download => [("url", "http://u:secret@x/y")],
        SourceType::Upload => [("padToSector", "true")],
        SourceType::ExportFromVolume => [("volume-name", "vol")],
        SourceType::Restore => [("backup-url", "s3://u:secret@bucket@region/path")],
        SourceType::Clone => [("backing-image", "debian")],
    };
    o.image.spec.source_parameters = parameters.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
    o
}

fn decided(o: &Observed, exported: Option<VolumeState>) -> Recovery {
    let status = o.image.status.as_ref().unwrap();
    let (spec, disks, managers) = (&o.image.spec, &o.disks, &o.managers);
    recovery(&Loss { now: o.now, spec, status, disks, managers, exported, wait: o.settings.recovery_wait })
}

fn again(source: SourceType, attach: bool) -> Again {
    match source {
        SourceType::Download => Again::Download,
        SourceType::Upload => Again::Never,
        SourceType::ExportFromVolume => Again::Export { volume: "vol".into(), attach },
        SourceType::Restore => Again::Restore { backup: "s3://<redacted>@region/path".into() },
        SourceType::Clone => Again::Clone { image: "debian".into() },
    }
}

#[test]
fn failed_copies_come_from_a_ready_one_whatever_the_source() {
    for source in TYPES {
        let o = made_from("wanted=1; source; a=failed b=ready c=failed-and-cleanup d=unknown:silent", source);
        assert_eq!(decided(&o, None), Recovery::FromCopy { anew: vec!["a".into(), "c".into()] }, "{source:?}");
    }
}

#[test]
fn lost_copies_come_again_from_their_source() {
    for source in TYPES {
        let o = made_from("wanted=1; source; a=failed b=failed-and-cleanup c=unknown:gone", source);
        let expected = |attach| match again(source, attach) {
            Again::Never => Recovery::Final,
            other => Recovery::Now(other),
        };
        assert_eq!(decided(&o, Some(VolumeState::Attached)), expected(false), "{source:?}");
        for state in [None, Some(VolumeState::Detached), Some(VolumeState::Attaching)] {
            assert_eq!(decided(&o, state), expected(true), "{source:?}");
        }
    }
}

#[test]
fn recovery_waits_for_its_interval_and_says_until_when() {
    for source in TYPES {
        let mut o = made_from("wanted=1; source; a=failed b=failed", source);
        let copies = &mut o.image.status.as_mut().unwrap().disk_file_status_map;
        copies.get_mut("b").unwrap().last_state_transition_time = now().to_string();
        let at = now() + o.settings.recovery_wait;
        let expected = match again(source, true) {
            Again::Never => Recovery::Final,
            again => Recovery::Later { at, again },
        };
        assert_eq!(decided(&o, None), expected, "{source:?}");
        o.now = at;
        let now = decided(&o, None);
        assert!(matches!(now, Recovery::Now(_) | Recovery::Final), "{source:?}: {now:?}");
    }
    let mut o = made_from("wanted=1; source; a=failed", SourceType::Download);
    o.image.status.as_mut().unwrap().disk_file_status_map.get_mut("a").unwrap().last_state_transition_time =
        now().to_string();
    let decision = decide(&o);
    let ready = condition::find(&decision.status.conditions, READY).unwrap();
    assert_eq!((ready.reason.as_str(), ready.next_retry_time.as_str()), ("Recovering", "2026-01-01T00:05:00Z"));
    assert_eq!(ready.message, "every copy is lost; the image will be downloaded again");
}

#[test]
fn unknown_is_not_failed_and_removes_nothing() {
    for source in TYPES {
        let o = made_from("wanted=1; source; a=failed b=unknown:silent", source);
        assert!(matches!(decided(&o, None), Recovery::Unknown { disk, .. } if disk == "b"), "{source:?}");
        let text = describe(&o, &decide(&o));
        assert!(text.starts_with("nothing\nUnknown: the copy on b of node-b cannot be asked"), "{source:?}: {text}");
    }
    // Nor is anything begun while one may be somewhere, also behind one whose disk is gone.
    for text in ["wanted=1; a=unknown:silent b=-", "wanted=1; a=unknown:gone b=unknown:silent c=-"] {
        let o = made_from(text, SourceType::Download);
        let text = describe(&o, &decide(&o));
        assert!(text.starts_with("nothing\nUnknown: the copy on "), "{text}");
    }
}

#[test]
fn a_copy_that_is_under_way_is_waited_for() {
    for (source, state) in
        TYPES.into_iter().zip(["pending", "starting", "in-progress", "ready-for-transfer", "pending"])
    {
        let o = made_from(&format!("wanted=1; source; a=failed b={state}"), source);
        assert_eq!(decided(&o, None), Recovery::UnderWay, "{source:?} {state}");
    }
}

#[test]
fn what_was_only_wished_where_nobody_answers_is_no_copy_that_is_waited_for() {
    let is_waited_for = |copy: &str, manager: Option<ManagerState>| {
        let mut o = made_from(&format!("wanted=1; source; a=failed {copy}"), SourceType::Download);
        o.managers.retain(|m| m.spec.disk_uuid != "b" || manager.is_some());
        for known in o.managers.iter_mut().filter(|m| m.spec.disk_uuid == "b") {
            known.status.as_mut().unwrap().current_state = manager.unwrap_or_default();
        }
        match decided(&o, None) {
            Recovery::UnderWay => true,
            Recovery::Now(Again::Download) => false,
            other => panic!("{copy} {manager:?}: {other:?}"),
        }
    };
    let running = Some(ManagerState::Running);
    for state in ["pending", "starting", "-"] {
        for away in ["silent", "down"] {
            assert!(!is_waited_for(&format!("b={state}:{away}"), running), "{state} {away}");
        }
    }
    for state in ["pending", "starting"] {
        assert!(is_waited_for(&format!("b={state}"), running), "{state}");
        for manager in [ManagerState::Error, ManagerState::Starting, ManagerState::Unknown, ManagerState::Stopped] {
            assert!(!is_waited_for(&format!("b={state}"), Some(manager)), "{state} {manager:?}");
        }
        assert!(!is_waited_for(&format!("b={state}"), None), "{state}: nobody is there");
        assert!(!is_waited_for(&format!("b={state}:gone"), running), "{state}: its disk is gone");
    }
    // What is on its way says so, whoever is known to answer.
    for state in ["in-progress", "ready-for-transfer"] {
        assert!(is_waited_for(&format!("b={state}"), Some(ManagerState::Error)), "{state}");
    }
}

#[test]
fn a_wish_for_a_disk_that_is_away_does_not_hold_up_the_download() {
    for manager in [ManagerState::Running, ManagerState::Error] {
        let mut o = made_from("wanted=1; source; a=failed b=pending:silent", SourceType::Download);
        o.managers.iter_mut().for_each(|m| m.status.as_mut().unwrap().current_state = manager);
        let text = describe(&o, &decide(&o));
        let expected =
            "set source disk=a transferred=false\nRecovering: every copy is lost; the image is downloaded again";
        assert_eq!(text, expected, "{manager:?}");
    }
}

#[test]
fn a_lost_upload_is_final_and_what_is_not_offered_says_what_would_be_done() {
    let expected = [
        "Recovering: every copy is lost; the image is downloaded again",
        "Lost: every copy is lost, and the file is not to be had again, since an uploaded file is nowhere else",
        "Unsupported: every copy is lost; the image would be exported again from volume vol, which is attached for that, but sourceType export-from-volume is not offered by this version",
        "Unsupported: every copy is lost; the image would be restored again from s3://<redacted>@region/path, but sourceType restore is not offered by this version",
        "Unsupported: every copy is lost; the image would be cloned again from image debian, but sourceType clone is not offered by this version",
    ];
    for (source, expected) in TYPES.into_iter().zip(expected) {
        let o = made_from("wanted=1; source; a=failed b=-", source);
        let decision = decide(&o);
        let text = describe(&o, &decision);
        let action = if source == SourceType::Download { "set source disk=a transferred=false" } else { "nothing" };
        assert_eq!(text, format!("{action}\n{expected}"));
        if source == SourceType::Upload {
            let hint = &condition::find(&decision.status.conditions, READY).unwrap().hint;
            assert_eq!(hint, "delete the image, create it again and upload the file again");
        }
    }
}

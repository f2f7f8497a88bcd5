//! Each guard of an image's copies in the one world where it alone decides.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::*;

/// What is decided in a world that was changed.
fn said(text: &str, change: impl FnOnce(&mut Observed)) -> String {
    let mut o = world(text);
    change(&mut o);
    let decision = decide(&o);
    describe(&o, &decision)
}

fn status(o: &Observed) -> BackingImageStatus {
    decide(o).status
}

fn set(o: &mut Observed, disk: usize, change: impl FnOnce(&mut FileInfo)) {
    change(o.managers[disk].status.as_mut().unwrap().backing_image_file_map.get_mut("ubuntu").unwrap());
}

/// A preparation on disk `a`, as the data source controller reports it.
fn preparing(o: &mut Observed, state: CopyState, kind: Option<ErrorKind>) {
    let mut source = BackingImageDataSource::new(
        "ubuntu",
        BackingImageDataSourceSpec {
            node_id: "node-a".into(),
            uuid: "12345678".into(),
            disk_uuid: "a".into(),
            disk_path: "/a".into(),
            source_type: Some(SourceType::Download),
            parameters: o.image.spec.source_parameters.clone(),
            ..Default::default()
        },
    );
    let mut running_parameters = source.spec.parameters.clone();
    running_parameters.insert("disk-uuid".into(), "a".into());
    source.status = Some(BackingImageDataSourceStatus {
        current_state: state,
        error_kind: kind,
        message: "no room".into(),
        running_parameters,
        ..Default::default()
    });
    o.data_source = Some(source);
}

fn deleting(source: &mut BackingImageDataSource) {
    source.metadata.deletion_timestamp = Some(Time(now()));
}

#[test]
fn deletion_waits_for_volumes_and_for_replicas() {
    for (text, volumes) in [("wanted=1; deleting; a=ready", true), ("wanted=1; deleting; a=ready; used=a", false)] {
        let said = said(text, |o| o.volumes = if volumes { vec!["v".into()] } else { vec![] });
        assert_eq!(said, "nothing\nInUse: deletion waits: in use by volume v");
    }
}

#[test]
fn deletion_goes_from_the_data_source_to_the_copies_to_the_object() {
    let text = "wanted=1; deleting; a=ready";
    let waits = "deletion waits for its data source to end and its copies to be removed from a of node-a";
    assert_eq!(
        said(text, |o| preparing(o, CopyState::InProgress, None)),
        format!("DeleteDataSource\nDeleting: {waits}")
    );
    let ending = |o: &mut Observed| {
        preparing(o, CopyState::InProgress, None);
        deleting(o.data_source.as_mut().unwrap());
    };
    assert_eq!(said(text, ending), format!("nothing\nDeleting: {waits}"));
    let nothing_left = |o: &mut Observed| {
        o.image.spec.disk_file_spec_map.clear();
        o.managers.clear();
    };
    let only_source = |o: &mut Observed| {
        nothing_left(o);
        ending(o);
    };
    assert_eq!(said(text, only_source), "nothing\nDeleting: deletion waits for its data source to end");
    let only_file = |o: &mut Observed| o.image.spec.disk_file_spec_map.clear();
    assert_eq!(
        said(text, only_file),
        "nothing\nDeleting: deletion waits for its copies to be removed from a of node-a"
    );
    assert_eq!(said(text, |o| o.managers.clear()), "copies -a\nDeleting: deletion begins");
    let mut o = world(text);
    nothing_left(&mut o);
    assert_eq!(decide(&o).actions, [Action::RemoveFinalizer]);
}

#[test]
fn every_property_of_a_copy_is_compared() {
    let known = BackingImageStatus {
        size: 1,
        virtual_size: 2,
        checksum: "c".into(),
        format: "raw".into(),
        ..Default::default()
    };
    let spec = BackingImageSpec { checksum: "c".into(), ..Default::default() };
    let good =
        FileInfo { size: 1, virtual_size: 2, current_checksum: "c".into(), format: "raw".into(), ..Default::default() };
    assert_eq!(difference(&good, &spec, &known), None);
    let none = BackingImageStatus::default();
    assert_eq!(difference(&good, &Default::default(), &none), None, "nothing is known yet");
    let other_sum = FileInfo { current_checksum: "d".into(), ..good.clone() };
    let edited = BackingImageSpec { checksum: "d".into(), ..Default::default() };
    assert_eq!(difference(&good, &edited, &known), None, "what the image is decides, not what is wished since");
    for (file, spec, known, what) in [
        (FileInfo { size: 9, ..good.clone() }, &spec, &known, "its size is 9"),
        (FileInfo { virtual_size: 9, ..good.clone() }, &spec, &known, "its virtual size is 9"),
        (other_sum.clone(), &spec, &none, "its checksum is d"),
        (other_sum.clone(), &Default::default(), &known, "its checksum is d"),
        (other_sum, &edited, &known, "its checksum is d"),
        (FileInfo { format: "qcow2".into(), ..good.clone() }, &spec, &known, "its format is qcow2"),
    ] {
        let found = difference(&file, spec, known).unwrap();
        assert!(found.contains(what), "{found}");
    }
}

#[test]
fn what_cannot_be_made_is_refused_before_a_process_is_started() {
    type Change = fn(&mut BackingImageSpec);
    let cases: [(Change, &str); 7] = [
        (|s| s.data_engine = api::image::DataEngine::V2, "Unsupported: dataEngine v2 is not offered"),
        (|s| s.secret = "s".into(), "Unsupported: encrypted images are not offered"),
        (|s| s.secret_namespace = "s".into(), "Unsupported: encrypted images are not offered"),
        (|s| s.source_type = Some(SourceType::Upload), "Unsupported: sourceType upload is not offered by this version"),
        (|s| s.source_type = None, "Invalid: sourceType is missing"),
        (|s| s.source_parameters.clear(), "Invalid: sourceParameters.url is missing"),
        (|s| drop(s.source_parameters.insert("url".into(), " ".into())), "Invalid: sourceParameters.url is missing"),
    ];
    for (change, expected) in cases {
        assert_eq!(said("wanted=1; a=-", |o| change(&mut o.image.spec)), format!("nothing\n{expected}"));
    }
}

#[test]
fn the_first_file_that_fits_decides_what_the_image_is() {
    let mut o = world("wanted=2; a=ready b=ready");
    o.image.spec.checksum = "right".into();
    set(&mut o, 0, |f| (f.current_checksum, f.size) = ("wrong".into(), 1));
    set(&mut o, 1, |f| (f.current_checksum, f.size, f.virtual_size) = ("right".into(), 2, 3));
    let first = status(&o);
    assert_eq!((first.checksum.as_str(), first.size, first.virtual_size), ("right", 2, 3));
    let copy = &first.disk_file_status_map["a"];
    assert_eq!((copy.state, copy.error_kind), (CopyState::Failed, Some(ErrorKind::Incompatible)));
    // Later files change nothing of it.
    o.image.status = Some(first);
    set(&mut o, 0, |f| (f.current_checksum, f.size, f.virtual_size) = ("right".into(), 7, 8));
    let later = status(&o);
    assert_eq!((later.size, later.virtual_size), (2, 3));
    assert_eq!(later.disk_file_status_map["a"].state, CopyState::Failed);
    assert_eq!(later.disk_file_status_map["b"].state, CopyState::Ready);
}

#[test]
fn what_was_found_of_a_copy_is_remembered_while_it_is_silent() {
    let mut o = world("wanted=1; a=unknown:silent");
    let copy = o.image.status.as_mut().unwrap().disk_file_status_map.get_mut("a").unwrap();
    (copy.damage, copy.verified_at) = ("once".into(), LONG_AGO.into());
    let copy = &status(&o).disk_file_status_map["a"];
    assert_eq!((copy.damage.as_str(), copy.verified_at.as_str()), ("once", LONG_AGO));
}

#[test]
fn a_copy_of_which_nobody_tells_is_unknown_when_it_was_there() {
    for (before, after) in [("ready", CopyState::Unknown), ("pending", CopyState::Pending)] {
        let mut o = world(&format!("wanted=1; a={before}:silent"));
        o.managers.clear();
        assert_eq!(status(&o).disk_file_status_map["a"].state, after, "{before}");
        // A file of an image that had the same name tells nothing either.
        let mut o = world("wanted=1; a=ready");
        o.image.status.as_mut().unwrap().disk_file_status_map.get_mut("a").unwrap().state =
            CopyState::from_name(before);
        set(&mut o, 0, |f| f.uuid = "87654321".into());
        assert_ne!(status(&o).disk_file_status_map["a"].state, CopyState::Ready);
    }
}

#[test]
fn the_data_source_tells_of_its_disk_until_the_file_is_handed_over() {
    let mut o = world("wanted=1; a=pending");
    preparing(&mut o, CopyState::Ready, None);
    assert_eq!(status(&o).disk_file_status_map["a"].state, CopyState::ReadyForTransfer);
    o.data_source.as_mut().unwrap().spec.file_transferred = true;
    assert_eq!(status(&o).disk_file_status_map["a"].state, CopyState::Pending);
}

#[test]
fn replicas_bring_copies_only_to_disks_where_they_can_run() {
    let text = "wanted=1; a=ready b=-; used=b";
    assert!(said(text, |_| ()).starts_with("copies +b\n"));
    assert!(said(text, |o| o.replicas[0].spec.failed_at = LONG_AGO.into()).starts_with("nothing\n"));
    assert!(said(text, |o| o.replicas[0].spec.disk_id = "z".into()).starts_with("nothing\n"));
    let mut o = world("wanted=1; a=ready; used=a");
    o.image.status = Some(status(&o));
    assert!(o.image.status.as_ref().unwrap().disk_last_ref_at_map.is_empty(), "it is in use");
    o.replicas.clear();
    assert_eq!(status(&o).disk_last_ref_at_map["a"], now().to_string());
}

#[test]
fn a_missing_copy_is_replaced_when_it_cannot_come_back() {
    let silent = "wanted=2; a=ready b=unknown:silent c=-";
    let at = |o: &mut Observed, time: Timestamp| {
        let copies = &mut o.image.status.as_mut().unwrap().disk_file_status_map;
        let copy = copies.get_mut("b").unwrap();
        (copy.last_state_transition_time, copy.gone_since) = (time.to_string(), time.to_string());
    };
    assert!(said(silent, |o| at(o, now())).starts_with("nothing\n"), "it is most likely intact");
    assert!(said(silent, |_| ()).starts_with("copies +c\n"), "it is away for long");
    let gone = "wanted=2; a=ready b=unknown:gone c=-";
    assert!(said(gone, |o| at(o, now())).starts_with("copies +c\n"), "nobody has its disk");
    let failed = "wanted=2; a=ready b=failed c=-";
    assert!(said(failed, |_| ()).starts_with("nothing\n"), "it is tried again in place");
    let closed = |o: &mut Observed| o.disks.list[1].unschedulable = Some("closed".into());
    assert!(said(failed, closed).starts_with("copies +c\n"), "its disk takes nothing");
    let off = |o: &mut Observed| o.settings.replenish_limit = 0;
    let none = said("wanted=2; a=ready b=-", off);
    assert!(none.starts_with("nothing\n") && none.contains("replenish-per-node-limit is 0"), "{none}");
}

#[test]
fn an_unused_copy_goes_only_after_its_time_and_never_before_its_hand_over() {
    let text = "wanted=1; idle; a=ready b=ready";
    assert!(said(text, |_| ()).starts_with("copies -"));
    let just_used = |o: &mut Observed| {
        o.settings.cleanup_wait = Duration::from_secs(60);
        let uses = &mut o.image.status.as_mut().unwrap().disk_last_ref_at_map;
        uses.values_mut().for_each(|at| *at = now().to_string());
    };
    assert!(said(text, just_used).starts_with("nothing\n"));
    let mut o = world(text);
    just_used(&mut o);
    assert_eq!(decide(&o).recheck_after, Some(Duration::from_secs(60)));
    // The other one is removed instead.
    let handed_over = said(text, |o| preparing(o, CopyState::Ready, None));
    assert!(handed_over.starts_with("copies -b; set source disk=a transferred=true\n"), "{handed_over}");
}

#[test]
fn a_preparation_begins_only_when_nothing_else_can_be_waited_for() {
    let removed = |o: &mut Observed| {
        preparing(o, CopyState::InProgress, None);
        deleting(o.data_source.as_mut().unwrap());
    };
    let text = said("wanted=1; a=-", removed);
    assert_eq!(text, "nothing\nDataSourceEnds: the former data source of this image is being removed");
    let text = said("wanted=1; a=unknown:silent b=-", |_| ());
    assert!(text.starts_with("nothing\nUnknown: the copy on a of node-a cannot be asked"), "{text}");
    let full = said("wanted=1; a=pending b=-", |o| o.disks.list[0].available_bytes = 0);
    assert!(full.starts_with("copies +b; create source on b\n"), "{full}");
    // Only the same content will do once it is known.
    let mut o = world("wanted=1; a=failed; source");
    o.image.status.as_mut().unwrap().checksum = "c".into();
    let again = decide(&o).actions;
    assert!(matches!(&again[..], [Action::SetDataSourceSpec(spec)] if spec.checksum == "c"), "{again:?}");
}

#[test]
fn a_preparation_moves_only_from_a_disk_that_is_full_or_known_not_to_work() {
    let said = |disk: &str, state, kind, change: fn(&mut Observed)| {
        said(&format!("wanted=1; a=pending:{disk} b=-"), |o| {
            preparing(o, state, kind);
            change(o);
        })
    };
    let full = Some(ErrorKind::Exhausted);
    let moves = "copies +b -a; set source disk=b transferred=false\n";
    for (disk, state, kind) in [
        ("ready", CopyState::Failed, full),
        ("down", CopyState::InProgress, None),
        ("gone", CopyState::InProgress, None),
    ] {
        let text = said(disk, state, kind, |_| ());
        assert!(text.starts_with(moves), "{disk}: {text}");
    }
    for (disk, state, kind) in [
        ("ready", CopyState::Failed, Some(ErrorKind::Unavailable)),
        ("silent", CopyState::InProgress, None),
        ("ready", CopyState::InProgress, full),
    ] {
        let text = said(disk, state, kind, |_| ());
        assert!(text.starts_with("nothing\n"), "{disk}: {text}");
    }
    // What failed was another attempt.
    let earlier = said("ready", CopyState::Failed, full, |o| {
        let status = o.data_source.as_mut().unwrap().status.as_mut().unwrap();
        status.running_parameters.insert("disk-uuid".into(), "z".into());
    });
    assert!(earlier.starts_with("nothing\n"), "{earlier}");
    // A replica waits for a copy there.
    let needed = said("ready", CopyState::Failed, full, |o| {
        o.replicas.push(Replica::new("v-r-0", Default::default()));
        o.replicas[0].spec.disk_id = "a".into();
    });
    assert!(needed.starts_with("copies +b; set source disk=b"), "{needed}");
}

#[test]
fn a_new_wish_reaches_the_preparation_and_a_checksum_of_its_own_is_none() {
    let text = "wanted=1; a=in-progress";
    let learned = said(text, |o| {
        preparing(o, CopyState::InProgress, None);
        o.image.status.as_mut().unwrap().checksum = "c".into();
    });
    assert!(learned.starts_with("nothing\n"), "{learned}");
    let mut o = world(text);
    preparing(&mut o, CopyState::InProgress, None);
    o.image.spec.checksum = "d".into();
    let actions = decide(&o).actions;
    assert!(matches!(&actions[..], [Action::SetDataSourceSpec(spec)] if spec.checksum == "d"), "{actions:?}");
}

#[test]
fn an_edited_checksum_fails_no_copy_and_brings_no_other_content() {
    let edited = |text: &str| {
        let mut o = world(text);
        o.image.spec.checksum = "d".into();
        o.image.status.as_mut().unwrap().checksum = "c".into();
        o
    };
    let note = "spec.checksum is not status.checksum and counts for nothing";
    for (text, reason) in
        [("wanted=1; a=ready; source", "Ready"), ("wanted=1; a=ready; source; used=a; deleting", "InUse")]
    {
        let mut o = edited(text);
        set(&mut o, 0, |f| f.current_checksum = "c".into());
        let decision = decide(&o);
        assert_eq!(decision.actions, [], "{text}");
        assert_eq!(decision.status.disk_file_status_map["a"].state, CopyState::Ready, "{text}");
        let told = condition::find(&decision.status.conditions, READY).unwrap();
        assert!(told.reason == reason && told.message.contains(note), "{text}: {told:?}");
        o.image.spec.checksum = "c".into();
        let said = decide(&o).status.conditions;
        assert!(!condition::find(&said, READY).unwrap().message.contains(note), "{text}");
    }
    // It is lost, and comes again: what it was, also when it was begun with another wish.
    let brings = |o: &Observed| match &decide(o).actions[..] {
        [Action::SetDataSourceSpec(spec)] => spec.checksum.clone(),
        other => panic!("{other:?}"),
    };
    assert_eq!(brings(&edited("wanted=1; a=failed; source")), "c");
    let mut o = edited("wanted=1; a=in-progress");
    preparing(&mut o, CopyState::InProgress, None);
    o.data_source.as_mut().unwrap().spec.checksum = "d".into();
    assert_eq!(brings(&o), "c");
    o.data_source.as_mut().unwrap().spec.checksum = "c".into();
    assert_eq!(decide(&o).actions, []);
}

#[test]
fn lost_copies_are_downloaded_again_after_the_recovery_interval_and_not_onto_a_full_disk() {
    let text = "wanted=1; a=failed; source";
    assert!(said(text, |_| ()).starts_with("set source disk=a transferred=false\nRecovering"));
    let mut o = world(text);
    o.settings.recovery_wait = Duration::from_secs(300);
    let copies = &mut o.image.status.as_mut().unwrap().disk_file_status_map;
    copies.get_mut("a").unwrap().last_state_transition_time = now().to_string();
    let decision = decide(&o);
    assert_eq!((decision.actions.len(), decision.recheck_after), (0, Some(Duration::from_secs(300))));
    let again = said("wanted=1; a=failed b=unknown:gone; source", |_| ());
    assert!(again.starts_with("set source disk=a"), "nobody has the other disk: {again}");
    let coming = said("wanted=1; a=failed b=pending; source", |_| ());
    assert!(coming.starts_with("nothing\n"), "{coming}");
    let full = said("wanted=1; a=full b=-; source", |_| ());
    assert!(full.starts_with("copies +b; set source disk=b"), "{full}");
}

#[test]
fn a_whole_copy_that_the_image_does_not_name_is_taken_back() {
    // The agent of `b` tells of a file there, and the image knows nothing of it.
    let found = |a: &str, change: fn(&mut Observed)| {
        let mut o = made_of(&format!("wanted=2; source; {a} b=ready"));
        o.image.spec.source_type = Some(SourceType::Upload);
        o.image.spec.disk_file_spec_map.remove("b");
        o.image.status.as_mut().unwrap().disk_file_status_map.remove("b");
        o.managers.iter_mut().for_each(|m| m.spec.backing_images.clear());
        change(&mut o);
        let decision = decide(&o);
        let told = decision.actions.iter().find_map(|action| match action {
            Action::SetCopies(map) => map.get("b").map(|entry| entry.reason.clone()),
            _ => None,
        });
        (describe(&o, &decision), told.unwrap_or_default())
    };
    let reason = "a whole copy was found there when the image had no ready one";
    let (said, told) = found("a=failed", |_| {});
    assert_eq!(said, "copies +b\nReady: 1 of 2 copies ready, a of node-a failed");
    assert_eq!(told, reason);
    // Wherever it lies.
    let (_, told) = found("a=failed", |o| o.image.spec.disk_selector = vec!["fast".into()]);
    assert_eq!(told, reason);
    type Edit = fn(&mut Observed);
    let cases: [(&str, &str, Edit); 6] = [
        ("another copy is ready", "a=ready", |_| {}),
        ("it is of another image of that name", "a=failed", |o| set(o, 1, |f| f.uuid = "87654321".into())),
        ("it is not whole", "a=failed", |o| set(o, 1, |f| f.state = CopyState::InProgress)),
        ("nobody can ask", "a=failed", |o| set(o, 1, |f| f.state = CopyState::Unknown)),
        ("it is another content", "a=failed", |o| set(o, 1, |f| f.current_checksum = "d".into())),
        ("the first file is still to come", "a=failed", |o| o.image.status.as_mut().unwrap().checksum.clear()),
    ];
    for (what, a, change) in cases {
        let (said, told) = found(a, change);
        assert_ne!(told, reason, "{what}: {said}");
    }
}

/// A world whose image was whole once.
fn made_of(text: &str) -> Observed {
    let mut o = world(text);
    o.image.status.as_mut().unwrap().checksum = "c".into();
    o
}

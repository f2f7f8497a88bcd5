//! Decision tables.

use expect_test::{Expect, expect};

use super::*;
use crate::disk::{Disk, ready_disk};

mod missed;
mod silence;

fn now() -> Timestamp {
    "2026-01-01T00:00:00Z".parse().unwrap()
}

fn observed() -> Observed {
    let mut source = BackingImageDataSource::new(
        "ubuntu",
        BackingImageDataSourceSpec {
            node_id: "n".into(),
            uuid: "12345678".into(),
            disk_uuid: "d".into(),
            disk_path: "/d".into(),
            source_type: Some(SourceType::Download),
            parameters: [("url".to_owned(), "http://x/ubuntu.qcow2".to_owned())].into(),
            ..Default::default()
        },
    );
    source.metadata.finalizers = Some(vec![FINALIZER.into()]);
    let disk = Disk { name: "disk".into(), node: "n".into(), path: "/d".into(), ..ready_disk("d", 1) };
    let disks = Disks { list: vec![disk], nodes: [("n".to_owned(), Health::Ready)].into(), ..Default::default() };
    Observed {
        now: now(),
        source,
        disks,
        workload: None,
        report: None,
        met_silence_at: None,
        taken_over: None,
        is_missed: false,
        allowed_sources: AllowedSources::none(),
        bandwidth_limit: 0,
    }
}

fn running(o: &mut Observed, state: State, report: Option<Report>) {
    let image = "ubuntu".parse().unwrap();
    let wish = wish(&o.source, &image, &o.allowed_sources, o.bandwidth_limit);
    o.workload = Some(Workload { wish, state, ip: "1.2.3.4".into(), is_outdated: false });
    o.report = report.map(Ok);
}

fn check(o: &Observed, expected: Expect) -> Observed {
    let decision = decide(o);
    let actions: Vec<String> = decision
        .actions
        .iter()
        .map(|a| match a {
            Action::EnsureWorkload(wish) => format!("start {}", wish.args.join(" ")),
            other => format!("{other:?}"),
        })
        .collect();
    let s = &decision.status;
    let text = format!(
        "{}\n{} {} % {} failures, next `{}` {}",
        if actions.is_empty() { "nothing".to_owned() } else { actions.join("\n") },
        s.current_state.as_str(),
        s.progress,
        s.failures,
        s.next_retry_time,
        s.message
    );
    expected.assert_eq(&text);
    assert!(!format!("{:?}", decision.actions).contains("http://x"), "an address is a secret: {:?}", decision.actions);
    let mut next = o.clone();
    next.source.status = Some(decision.status);
    next
}

#[test]
fn other_parameters_are_another_process_although_nobody_sees_them() {
    let mut o = observed();
    o.source.metadata.generation = Some(1);
    running(&mut o, State::Running, Some(Report { state: CopyState::InProgress, ..Default::default() }));
    // What was started does not tell its secrets.
    o.workload.as_mut().unwrap().wish.secrets = Secrets::default();
    assert_eq!(actions(&o), []);
    o.source.spec.parameters.insert("url".into(), "http://other".into());
    o.source.metadata.generation = Some(2);
    let [Action::RemoveWorkload(_), Action::EnsureWorkload(wish)] = &actions(&o)[..] else {
        panic!("{:?}", actions(&o))
    };
    assert_eq!(wish.secrets.0["BACKING_IMAGE_SOURCE_PARAMETERS"], r#"{"url":"http://other"}"#);
    assert!(!wish.args.concat().contains("http://other"), "{:?}", wish.args);
}

#[test]
fn starts_follows_and_hands_over() {
    let mut o = check(
        &observed(),
        expect![[r#"
        start data-source --listen $(POD_IP):8000 --sync-listen $(POD_IP):8001 --name ubuntu --uuid 12345678 --source-type download --disk-path /d
        starting 0 % 0 failures, next `` "#]],
    );
    running(
        &mut o,
        State::Running,
        Some(Report { state: CopyState::InProgress, progress: 61, size: 100, ..Default::default() }),
    );
    let mut o = check(
        &o,
        expect![[r#"
        nothing
        in-progress 61 % 0 failures, next `` "#]],
    );
    running(
        &mut o,
        State::Running,
        Some(Report { state: CopyState::ReadyForTransfer, size: 100, ..Default::default() }),
    );
    let mut o = check(
        &o,
        expect![[r#"
        nothing
        ready-for-transfer 100 % 0 failures, next `` "#]],
    );
    // It ended by itself after the agent took the file over.
    running(&mut o, State::Failed("exit 0".into()), None);
    o.taken_over = Some(CopyState::Ready);
    let mut o = check(
        &o,
        expect![[r#"
        RemoveWorkload("backing-image-ds-ubuntu")
        ready 100 % 0 failures, next `` "#]],
    );
    o.source.spec.file_transferred = true;
    check(
        &o,
        expect![[r#"
        RemoveWorkload("backing-image-ds-ubuntu")
        ready 100 % 0 failures, next `` "#]],
    );
}

#[test]
fn backs_off_longer_with_each_failure() {
    let mut o = observed();
    running(&mut o, State::Failed("killed by signal 9".into()), None);
    let mut o = check(
        &o,
        expect![[r#"
        RemoveWorkload("backing-image-ds-ubuntu")
        failed 0 % 1 failures, next `2026-01-01T00:00:01Z` killed by signal 9"#]],
    );
    o.workload = None;
    let mut o = check(
        &o,
        expect![[r#"
        nothing
        failed 0 % 1 failures, next `2026-01-01T00:00:01Z` killed by signal 9"#]],
    );
    o.now = crate::retry::after(now(), Duration::from_secs(1));
    let mut o = check(
        &o,
        expect![[r#"
        start data-source --listen $(POD_IP):8000 --sync-listen $(POD_IP):8001 --name ubuntu --uuid 12345678 --source-type download --disk-path /d
        starting 0 % 1 failures, next `2026-01-01T00:00:01Z` killed by signal 9"#]],
    );
    let report = Report {
        state: CopyState::Failed,
        message: "cannot download `http://x/ubuntu.qcow2`: refused".into(),
        ..Default::default()
    };
    running(&mut o, State::Running, Some(report));
    check(
        &o,
        expect![[r#"
        RemoveWorkload("backing-image-ds-ubuntu")
        failed 0 % 2 failures, next `2026-01-01T00:00:03Z` cannot download `http://x/ubuntu.qcow2`: refused"#]],
    );
}

#[test]
fn waits_long_after_what_a_repetition_will_not_cure() {
    let waits = |kind| {
        let mut o = observed();
        let report = Report { state: CopyState::Failed, message: "m".into(), kind, ..Default::default() };
        running(&mut o, State::Running, Some(report));
        decide(&o).recheck_after.unwrap()
    };
    assert_eq!(waits(None), crate::retry::INITIAL);
    for kind in ErrorKind::ALL {
        let expected = if kind.is_final() { MAX } else { crate::retry::INITIAL };
        assert_eq!(waits(Some(kind)), expected, "{kind}");
    }
    assert!(hint(Some(ErrorKind::Exhausted)).contains("add a disk"));
    assert!(hint(Some(ErrorKind::NotFound)).contains("correct the image's source"));
    assert!(hint(Some(ErrorKind::Unavailable)).contains("can be reached") && hint(None).contains("can be reached"));
}

#[test]
fn what_a_status_says_is_not_taken_for_an_answer_to_a_later_wish() {
    let mut o = observed();
    let report = Report { state: CopyState::Failed, message: "m".into(), ..Default::default() };
    running(&mut o, State::Running, Some(report));
    o.source.status = Some(decide(&o).status);
    let mut image = BackingImage::new("ubuntu", Default::default());
    image.spec.source_parameters.clone_from(&o.source.spec.parameters);
    assert!(answers(&o.source, &image));
    image.spec.checksum = "c".into();
    assert!(!answers(&o.source, &image), "the checksum was changed");
    // The image is what it is: only that is prepared.
    o.source.spec.checksum = "a".into();
    o.source.status.as_mut().unwrap().running_parameters = attempt_of(&o.source.spec);
    image.status.get_or_insert_default().checksum = "a".into();
    assert!(answers(&o.source, &image), "an edited checksum is no wish once the content is known");
    image.status = None;
    o.source.spec.checksum.clear();
    o.source.status.as_mut().unwrap().running_parameters = attempt_of(&o.source.spec);
    image.spec.checksum.clear();
    image.spec.source_parameters.insert("url".into(), "http://x/other".into());
    assert!(!answers(&o.source, &image), "the address was changed");
    o.source.spec.parameters.clone_from(&image.spec.source_parameters);
    assert!(!answers(&o.source, &image), "the new address has not been tried yet");
}

#[test]
fn tries_a_new_wish_at_once() {
    let mut o = observed();
    let report = Report {
        state: CopyState::Failed,
        message: "SHA-512 is a, but b was expected".into(),
        kind: Some(ErrorKind::Corrupt),
        ..Default::default()
    };
    running(&mut o, State::Running, Some(report));
    let mut o = check(
        &o,
        expect![[r#"
        RemoveWorkload("backing-image-ds-ubuntu")
        failed 0 % 1 failures, next `2026-01-01T00:05:00Z` SHA-512 is a, but b was expected"#]],
    );
    o.workload = None;
    o.source.spec.checksum = "c".into();
    check(
        &o,
        expect![[r#"
        start data-source --listen $(POD_IP):8000 --sync-listen $(POD_IP):8001 --name ubuntu --uuid 12345678 --source-type download --checksum c --disk-path /d
        starting 0 % 0 failures, next `` "#]],
    );
}

#[test]
fn a_changed_setting_is_tried_at_once_and_is_no_new_wish() {
    let mut o = observed();
    let report = Report {
        state: CopyState::Failed,
        message: "`localhost` is a loopback address".into(),
        kind: Some(ErrorKind::Invalid),
        ..Default::default()
    };
    running(&mut o, State::Running, Some(report));
    let mut o = check(
        &o,
        expect![[r#"
        RemoveWorkload("backing-image-ds-ubuntu")
        failed 0 % 1 failures, next `2026-01-01T00:05:00Z` `localhost` is a loopback address"#]],
    );
    o.workload = None;
    o.allowed_sources = "127.0.0.0/8,::1".parse().unwrap();
    assert!(is_about_this_attempt(&o.source));
    let mut o = check(
        &o,
        expect![[r#"
        start data-source --listen $(POD_IP):8000 --sync-listen $(POD_IP):8001 --name ubuntu --uuid 12345678 --source-type download --allowed-source-addresses 127.0.0.0/8,::1/128 --disk-path /d
        starting 0 % 0 failures, next `` "#]],
    );
    assert!(is_about_this_attempt(&o.source));
    running(&mut o, State::Running, Some(Report { state: CopyState::InProgress, ..Default::default() }));
    assert_eq!(actions(&o), []);
    // What is not allowed any more is not read on.
    o.allowed_sources = AllowedSources::none();
    assert!(matches!(&actions(&o)[..], [Action::RemoveWorkload(_), Action::EnsureWorkload(_)]), "{:?}", actions(&o));
}

#[test]
fn a_download_is_told_of_its_limit_while_it_runs() {
    let image = |limit| {
        let mut image = BackingImage::new("ubuntu", Default::default());
        image.spec.bandwidth_limit = limit;
        image
    };
    assert_eq!([bandwidth_limit(0, None), bandwidth_limit(70_000, None)], [0, 70_000]);
    // One that got in although it cannot be kept counts as none.
    for (of_image, expected) in [(65_536, 65_536), (80_000, 70_000), (65_535, 70_000), (1, 70_000)] {
        assert_eq!(bandwidth_limit(70_000, Some(&image(of_image))), expected, "{of_image}");
    }
    let mut o = observed();
    o.bandwidth_limit = 65536;
    let started = actions(&o);
    let [Action::EnsureWorkload(wish)] = &started[..] else { panic!("{started:?}") };
    assert!(wish.args.contains(&"--bandwidth-limit=65536".to_owned()), "{:?}", wish.args);
    let report = |state, bandwidth_limit| Some(Report { state, bandwidth_limit, ..Default::default() });
    running(&mut o, State::Running, report(CopyState::InProgress, Some(65536)));
    assert_eq!(actions(&o), []);
    // It goes on with the new one, from where it is.
    o.bandwidth_limit = 0;
    assert_eq!(actions(&o), [Action::LimitBandwidth(0)]);
    o.bandwidth_limit = 100_000;
    assert_eq!(actions(&o), [Action::LimitBandwidth(100_000)]);
    // One that cannot be told, or has nothing to fetch any more, is not bothered.
    o.report = report(CopyState::InProgress, None).map(Ok);
    assert_eq!(actions(&o), []);
    o.report = report(CopyState::ReadyForTransfer, Some(65536)).map(Ok);
    assert_eq!(actions(&o), []);
}

#[test]
fn concludes_nothing_from_silence() {
    let mut o = observed();
    running(&mut o, State::Unknown("node n does not answer".into()), None);
    check(
        &o,
        expect![[r#"
        nothing
        unknown 0 % 0 failures, next `` its node does not answer: node n does not answer"#]],
    );
    o.disks.list[0].health = Health::Unknown("node n does not answer".into());
    check(
        &o,
        expect![[r#"
        nothing
        unknown 0 % 0 failures, next `` node n does not answer"#]],
    );
}

#[test]
fn refuses_other_source_types() {
    let mut o = observed();
    o.source.spec.source_type = Some(SourceType::Clone);
    check(
        &o,
        expect![[r#"
        nothing
        failed 0 % 0 failures, next `` sourceType clone is not offered by this version; use download"#]],
    );
}

#[test]
fn a_source_that_waits_says_why_until_when_and_what_can_be_done() {
    let mut o = observed();
    let message =
        "cannot download `http://x/ubuntu.qcow2`: cannot connect: Connection refused (os error 111)".to_owned();
    let next_retry_time = "2026-01-01T00:00:04Z".to_owned();
    for state in [CopyState::Pending, CopyState::Starting, CopyState::InProgress] {
        let report =
            Report { state, message: message.clone(), next_retry_time: next_retry_time.clone(), ..Default::default() };
        running(&mut o, State::Running, Some(report));
        let conditions = decide(&o).status.conditions;
        let ready = condition::find(&conditions, READY).unwrap();
        let said = format!("{}: {}; {}; {}", ready.reason, ready.message, ready.next_retry_time, ready.hint);
        expect!["Retrying: cannot download `http://x/ubuntu.qcow2`: cannot connect: Connection refused (os error 111); 2026-01-01T00:00:04Z; check that the address of the source can be reached from the node of the disk"].assert_eq(&said);
    }
}

fn actions(o: &Observed) -> Vec<Action> {
    decide(o).actions
}

const REMOVE: &str = "backing-image-ds-ubuntu";

#[test]
fn a_process_that_is_not_wanted_any_more_is_removed() {
    let remove = Action::RemoveWorkload(REMOVE.into());
    let report = Report { state: CopyState::InProgress, ..Default::default() };
    let mut o = observed();
    running(&mut o, State::Running, Some(report));
    let mut deleted = o.clone();
    deleted.source.metadata.deletion_timestamp = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(now()));
    assert_eq!(actions(&deleted), [remove.clone(), Action::RemoveFinalizer]);
    let mut transferred = o.clone();
    transferred.source.spec.file_transferred = true;
    assert_eq!(actions(&transferred), std::slice::from_ref(&remove));
    o.source.spec.parameters.insert("url".into(), "http://x/other".into());
    o.source.metadata.generation = Some(2);
    let changed = actions(&o);
    assert!(matches!(&changed[..], [first, Action::EnsureWorkload(_)] if *first == remove), "{changed:?}");
}

#[test]
fn another_disk_keeps_the_back_off() {
    let mut o = observed();
    let full = Report {
        state: CopyState::Failed,
        message: "no room".into(),
        kind: Some(ErrorKind::Exhausted),
        ..Default::default()
    };
    running(&mut o, State::Running, Some(full));
    let status = decide(&o).status;
    assert_eq!(status.error_kind, Some(ErrorKind::Exhausted));
    o.source.status = Some(status);
    o.workload = None;
    o.source.spec.disk_uuid = "e".into();
    o.disks.list[0].id = "e".into();
    let decision = decide(&o);
    assert_eq!((decision.actions, decision.recheck_after), (vec![], Some(crate::retry::INITIAL)));
    // Else it would be moved once more before it is tried, and so on in turns.
    assert_eq!((decision.status.current_state, decision.status.error_kind), (CopyState::Failed, None));
}

#[test]
fn nothing_is_started_on_a_disk_that_nobody_has_reported() {
    let mut o = observed();
    o.disks.list.clear();
    let decision = decide(&o);
    assert_eq!((decision.actions, decision.status.current_state), (vec![], CopyState::Unknown));
}

/// Nobody has heard of the process for so long, and it was asked all the time.
fn silent_for(o: &mut Observed, wait: Duration) -> Decision {
    o.report = Some(Err("timeout".into()));
    o.now = after(now(), wait);
    o.met_silence_at = Some(o.now);
    let decision = decide(o);
    o.source.status = Some(decision.status.clone());
    decision
}

#[test]
fn a_process_that_does_not_answer_is_asked_again_and_not_ended() {
    let mut o = observed();
    running(&mut o, State::Running, Some(Report { state: CopyState::InProgress, progress: 61, ..Default::default() }));
    o.source.status = Some(decide(&o).status);
    for wait in [Duration::ZERO, SILENCE_LIMIT / 2, SILENCE_LIMIT - Duration::from_secs(1)] {
        let decision = silent_for(&mut o, wait);
        assert_eq!((decision.actions, decision.recheck_after), (vec![], Some(Duration::from_secs(1))), "{wait:?}");
        let status = decision.status;
        assert_eq!((status.current_state, status.progress, status.failures), (CopyState::InProgress, 61, 0));
        let ready = condition::find(&status.conditions, READY).unwrap();
        expect!["NotAnswering: the data source process does not answer, since 2026-01-01T00:00:00Z: timeout; it is ended and started again at 2026-01-01T00:02:00Z"]
            .assert_eq(&format!("{}: {}", ready.reason, ready.message));
    }
}

#[test]
fn a_data_source_that_hangs_is_ended_and_started_again() {
    let mut o = observed();
    running(&mut o, State::Running, Some(Report { state: CopyState::InProgress, ..Default::default() }));
    o.source.status = Some(decide(&o).status);
    silent_for(&mut o, Duration::ZERO);
    assert_eq!(silent_for(&mut o, SILENCE_LIMIT).actions, [Action::RemoveWorkload(REMOVE.into())]);
    let mut ended = o.clone();
    (ended.workload, ended.report) = (None, None);
    let mut ended = check(
        &ended,
        expect![[r#"
        nothing
        failed 0 % 1 failures, next `2026-01-01T00:02:01Z` the data source process does not answer, since 2026-01-01T00:00:00Z: timeout"#]],
    );
    ended.now = after(ended.now, crate::retry::INITIAL);
    assert!(matches!(actions(&ended)[..], [Action::EnsureWorkload(_)]));
    // An answer in between ends the silence.
    let report = o.report.replace(Ok(Report { state: CopyState::InProgress, ..Default::default() }));
    o.source.status = Some(decide(&o).status);
    o.report = report;
    assert_eq!(silent_for(&mut o, SILENCE_LIMIT).actions, []);
    // So does the silence of its node, which says nothing of the process.
    o.workload.as_mut().unwrap().state = State::Unknown("away".into());
    silent_for(&mut o, SILENCE_LIMIT);
    o.workload.as_mut().unwrap().state = State::Running;
    assert_eq!(silent_for(&mut o, 2 * SILENCE_LIMIT).actions, []);
}

#[test]
fn a_hanging_process_whose_file_is_taken_over_is_ended_without_a_failure() {
    let mut o = observed();
    running(&mut o, State::Running, Some(Report { state: CopyState::ReadyForTransfer, ..Default::default() }));
    o.source.status = Some(decide(&o).status);
    o.taken_over = Some(CopyState::InProgress);
    silent_for(&mut o, Duration::ZERO);
    let decision = silent_for(&mut o, SILENCE_LIMIT);
    assert_eq!(decision.actions, [Action::RemoveWorkload(REMOVE.into())]);
    assert_eq!((decision.status.current_state, decision.status.failures), (CopyState::Ready, 0));
}

#[test]
fn an_upload_that_hangs_is_told_and_never_thrown_away() {
    for (source_type, is_ended) in [
        (SourceType::Download, true),
        (SourceType::ExportFromVolume, true),
        (SourceType::Restore, true),
        (SourceType::Clone, true),
        (SourceType::Upload, false),
    ] {
        let mut o = observed();
        o.source.spec.source_type = Some(source_type);
        running(&mut o, State::Running, None);
        o.report = Some(Err("timeout".into()));
        let mut status = BackingImageDataSourceStatus { silent_since: now().to_string(), ..Default::default() };
        o.source.status = Some(status.clone());
        o.now = after(now(), 10 * SILENCE_LIMIT);
        o.met_silence_at = Some(o.now);
        let workload = o.workload.clone().unwrap();
        let (actions, _) = follow(&o, &mut status, &workload, REMOVE);
        assert_eq!(!actions.is_empty(), is_ended, "{}", source_type.as_str());
        assert!(status.message.contains("does not answer, since"), "{}", status.message);
        assert_eq!(status.message.contains("bytes may still come"), !is_ended, "{}", status.message);
    }
}

#[test]
fn a_whole_file_is_prepared_again_only_when_no_agent_has_it() {
    let mut o = observed();
    let whole = Report { state: CopyState::ReadyForTransfer, ..Default::default() };
    running(&mut o, State::Running, Some(whole));
    o.source.status = Some(BackingImageDataSourceStatus { failures: 3, ..decide(&o).status });
    let status = decide(&o).status;
    assert_eq!(status.failures, 0, "it has succeeded");
    o.source.status = Some(status);
    o.workload = None;
    assert!(matches!(actions(&o)[..], [Action::EnsureWorkload(_)]));
    o.taken_over = Some(CopyState::Failed);
    assert!(matches!(actions(&o)[..], [Action::EnsureWorkload(_)]));
    o.taken_over = Some(CopyState::Ready);
    assert_eq!(actions(&o), []);
    // What an agent has is of a former preparation as long as this one is not whole.
    o.source.status.as_mut().unwrap().current_state = CopyState::Starting;
    assert!(matches!(actions(&o)[..], [Action::EnsureWorkload(_)]));
}

/// The process has let its file go; then the agent's status, which may be older than that, says that it does not have it.
fn let_go() -> Observed {
    let mut o = observed();
    running(&mut o, State::Running, Some(Report { state: CopyState::Ready, ..Default::default() }));
    o.source.status = Some(decide(&o).status);
    o.taken_over = Some(CopyState::Failed);
    o
}

#[test]
fn a_file_that_was_handed_over_counts_as_lost_on_second_sight_only() {
    let mut o = let_go();
    for at in [Duration::ZERO, LOST_AFTER / 2, LOST_AFTER - Duration::from_millis(1)] {
        o.now = after(now(), at);
        let decision = decide(&o);
        assert_eq!((decision.actions, decision.recheck_after), (vec![], Some(LOST_AFTER - at)), "after {at:?}");
        let status = decision.status;
        assert_eq!((status.current_state, status.failures, status.message.as_str()), (CopyState::Ready, 0, ""));
        assert!(condition::find(&status.conditions, READY).unwrap().is_true());
        o.source.status = Some(status);
    }
    o.now = after(now(), LOST_AFTER);
    let second = decide(&o);
    assert_eq!(second.actions, [Action::RemoveWorkload(REMOVE.into())]);
    assert_eq!((second.status.current_state, second.status.failures), (CopyState::Failed, 1));
    assert!(second.status.message.contains("does not have it"), "{}", second.status.message);
    (o.source.status, o.workload, o.report) = (Some(second.status), None, None);
    o.now = after(o.now, Duration::from_secs(1));
    assert!(matches!(actions(&o)[..], [Action::EnsureWorkload(_)]));
}

#[test]
fn a_sight_in_between_that_does_not_say_lost_begins_the_wait_anew() {
    for between in [Some(CopyState::InProgress), Some(CopyState::Unknown), None] {
        let mut o = let_go();
        o.source.status = Some(decide(&o).status);
        o.taken_over = between;
        o.now = after(now(), LOST_AFTER / 2);
        let decision = decide(&o);
        assert_eq!(decision.status.lost_since, "", "{between:?}");
        o.source.status = Some(decision.status);
        o.taken_over = Some(CopyState::Failed);
        o.now = after(now(), LOST_AFTER);
        assert_eq!(decide(&o).recheck_after, Some(LOST_AFTER), "{between:?}");
    }
    let mut o = let_go();
    o.source.status = Some(decide(&o).status);
    // The clock was set back: what was seen lies ahead.
    o.now = now().checked_sub(jiff::SignedDuration::from_hours(1)).unwrap();
    let decision = decide(&o);
    assert_eq!((decision.actions, decision.recheck_after), (vec![], Some(LOST_AFTER)));
    assert_eq!(decision.status.lost_since, o.now.to_string());
}

#[test]
fn says_what_a_process_waits_for_that_does_not_start() {
    let mut o = observed();
    running(&mut o, State::Starting("no such image".into()), None);
    let status = decide(&o).status;
    assert_eq!(status.message, "the data source process is starting: no such image");
    assert_eq!(condition::find(&status.conditions, READY).unwrap().message, status.message);
    // What was told of an earlier attempt stays until there is something new.
    o.source.status = Some(BackingImageDataSourceStatus { message: "connection refused".into(), ..status });
    running(&mut o, State::Starting(String::new()), None);
    assert_eq!(decide(&o).status.message, "connection refused");
}

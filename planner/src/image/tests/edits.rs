//! What becomes of copies that are taken out of the map: by an edit, by a user's command, by the clean-up.

use super::*;
use crate::image::guard::refusal;

/// A world whose map was edited: only these keys are left.
fn edited(text: &str, left: &[&str]) -> Observed {
    let mut o = world(text);
    o.image.status.as_mut().unwrap().checksum = "c".into();
    o.image.spec.disk_file_spec_map.retain(|disk, _| left.contains(&disk.as_str()));
    o
}

fn refused(decision: &Decision) -> Option<&Condition> {
    condition::find(&decision.status.conditions, api::names::condition::CLEANED_UP)
}

/// An emptied map: whatever a guard protects is back, and the world settles.
pub(super) fn check_emptied(text: &str) {
    let mut o = edited(text, &[]);
    let held: Vec<String> = o.image.status.as_ref().unwrap().disk_file_status_map.keys().cloned().collect();
    let used: Vec<String> = o.replicas.iter().map(|r| r.spec.disk_id.clone()).collect();
    let first = decide(&o);
    let map = |d: &Decision| {
        let set = d.actions.iter().find_map(|a| if let Action::SetCopies(map) = a { Some(map.clone()) } else { None });
        set.unwrap_or_default()
    };
    let mut seen = world(text).image.status.unwrap();
    copies::observe(&o, &o.image.spec.disk_file_spec_map, &mut seen);
    let ready: Vec<&String> = held.iter().filter(|d| seen.disk_file_status_map[*d].state == CopyState::Ready).collect();
    let kept = ready.iter().filter(|d| map(&first).contains_key(**d)).count();
    let need = o.image.spec.min_number_of_copies.max(1) as usize;
    assert!(kept >= need.min(ready.len()), "{kept} of {} ready copies stay: {text}", ready.len());
    for disk in &held {
        let is_silent = seen.disk_file_status_map[disk].state == CopyState::Unknown && !o.disks.is_gone(disk);
        if is_silent || used.contains(disk) {
            assert!(map(&first).contains_key(disk), "{disk} is let go: {text}");
            assert!(first.status.disk_file_status_map.contains_key(disk), "{disk} is let go: {text}");
        }
    }
    for _ in 0..3 {
        let decision = decide(&o);
        apply(&mut o, &decision);
    }
    let last = decide(&o);
    assert_eq!(last.actions, [], "does not settle: {text}");
    assert_eq!(Some(&last.status), o.image.status.as_ref(), "{text}");
}

#[test]
fn an_edited_map_removes_nothing_that_is_guarded() {
    let said = |text: &str, left: &[&str]| {
        let o = edited(text, left);
        let decision = decide(&o);
        let kept: Vec<&str> = decision.status.disk_file_status_map.keys().map(String::as_str).collect();
        let why = refused(&decision).map(|c| c.message.clone()).unwrap_or_default();
        (kept.join(" "), why.replace("entries were taken out of diskFileSpecMap; ", ""))
    };
    let answer = |kept: &str, why: &str| (kept.to_owned(), why.to_owned());
    let two = "wanted=1; source; a=ready b=ready";
    assert_eq!(said(two, &["a"]), answer("a", ""), "nothing keeps it");
    assert_eq!(
        said("wanted=1; source; a=ready b=ready; used=b", &["a"]),
        answer("a b", "the copy on b of node-b is kept: replica v-r-0 of volume v uses it")
    );
    let few =
        "the copy on a of node-a is kept: 0 ready copies would be left, fewer than minNumberOfCopies asks for (1)";
    assert_eq!(said(two, &[]), answer("a", few), "the last one stays");
    let (kept, why) = said("wanted=2; source; a=ready b=ready c=ready", &["a"]);
    assert_eq!(
        (kept.as_str(), why.contains("1 ready copy would be left, fewer than minNumberOfCopies asks for (2)")),
        ("a b", true),
        "{why}"
    );
    let (kept, why) = said("wanted=1; source; a=ready b=unknown:silent", &["a"]);
    assert_eq!((kept.as_str(), why.contains("it cannot be asked")), ("a b", true), "{why}");
    let (kept, why) = said("wanted=1; source; a=failed b=pending", &[]);
    assert!(kept.starts_with('a') && why.contains("may be the last of the image"), "{kept}: {why}");
    // What differs, or was never made, is nothing to keep beside a ready copy.
    assert_eq!(said("wanted=1; source; a=ready b=failed c=pending", &["a"]), answer("a", ""));
}

#[test]
fn a_copy_that_is_about_to_leave_is_no_reason_to_let_another_go() {
    let kept = |text: &str, left: &[&str], change: fn(&mut Observed)| {
        let mut o = edited(text, left);
        change(&mut o);
        let kept: Vec<String> = decide(&o).status.disk_file_status_map.into_keys().collect();
        kept.join(" ")
    };
    let nothing: fn(&mut Observed) = |_| ();
    assert_eq!(kept("wanted=1; source; a=ready! b=ready", &["a"], nothing), "a b");
    let evicting: fn(&mut Observed) = |o| o.disks.list[0].evicting = true;
    assert_eq!(kept("wanted=1; source; a=ready b=ready", &["a"], evicting), "a b");
    assert_eq!(kept("wanted=1; source; a=ready b=ready", &["a"], nothing), "a");
    // What never was whole beside a ready one is no copy, wherever that lies.
    assert_eq!(kept("wanted=1; source; a=ready! b=failed", &["a"], nothing), "a");
    let o = world("wanted=1; a=ready! b=ready");
    let status = o.image.status.clone().unwrap();
    let set = |disk: &str| BTreeSet::from([disk.to_owned()]);
    let why = refusal(&o.scene(&status), &set("b"), &set("a")).unwrap_or_default();
    assert!(why.contains("0 ready copies would be left"), "{why}");
    assert_eq!(refusal(&o.scene(&status), &set("a"), &set("b")), None);
}

#[test]
fn what_is_put_back_is_told_for_a_while() {
    let mut o = edited("wanted=1; source; a=ready; used=a", &[]);
    let first = decide(&o);
    assert_eq!(first.recheck_after, Some(Duration::from_secs(600)));
    let told = refused(&first).unwrap();
    assert_eq!((told.reason.as_str(), told.status), ("CleanUpRefused", ConditionStatus::False));
    apply(&mut o, &first);
    assert!(o.image.spec.disk_file_spec_map.contains_key("a"));
    let second = decide(&o);
    assert_eq!((second.actions.len(), &second.status), (0, &first.status));
    o.now += Duration::from_secs(600);
    let later = decide(&o);
    assert_eq!((refused(&later), later.recheck_after), (None, None));
}

#[test]
fn a_copy_goes_in_two_steps_and_stays_when_a_replica_comes_in_between() {
    let mut o = world("wanted=1; idle; source; a=ready b=ready");
    o.image.spec.min_number_of_copies = 1;
    let first = decide(&o);
    assert!(describe(&o, &first).starts_with("copies -a\n"));
    assert!(first.status.disk_file_status_map.contains_key("a"), "its manager keeps it so far");
    apply(&mut o, &first);
    let mut late = o.clone();
    let second = decide(&o);
    apply(&mut o, &second);
    assert!(!second.status.disk_file_status_map.contains_key("a") && second.actions.is_empty());
    late.replicas.push(Replica::new("v-r-0", Default::default()));
    (late.replicas[0].spec.disk_id, late.replicas[0].spec.volume_name) = ("a".into(), "v".into());
    assert!(describe(&late, &decide(&late)).starts_with("copies +a"));
}

#[test]
fn manual_clean_up_refuses_with_its_guard() {
    let asked = |text: &str, disks: &[&str], change: fn(&mut Observed)| {
        let mut o = edited(text, &["a", "b", "c"]);
        change(&mut o);
        let status = o.image.status.clone().unwrap();
        let disks: BTreeSet<String> = disks.iter().map(|d| (*d).to_owned()).collect();
        let all: BTreeSet<String> = o.image.spec.disk_file_spec_map.keys().cloned().collect();
        refusal(&o.scene(&status), &disks, &all.difference(&disks).cloned().collect()).unwrap_or_default()
    };
    let nothing: fn(&mut Observed) = |_| ();
    assert_eq!(asked("wanted=1; a=ready b=ready", &["a"], nothing), "");
    assert_eq!(
        asked("wanted=1; a=ready b=ready; used=a", &["a"], nothing),
        "the copy of image `ubuntu` on a of node-a is kept: replica v-r-0 of volume v uses it; you can: delete that \
         volume first, or leave the copy"
    );
    // Whatever the state of that replica is.
    let stopped: fn(&mut Observed) = |o| o.replicas[0].spec.failed_at = LONG_AGO.into();
    assert!(asked("wanted=1; a=ready b=ready; used=a", &["a"], stopped).contains("uses it"));
    let preparing: fn(&mut Observed) = |o| {
        let mut source = BackingImageDataSource::new("ubuntu", Default::default());
        source.spec.disk_uuid = "a".into();
        o.data_source = Some(source);
    };
    assert!(asked("wanted=1; a=ready b=ready", &["a"], preparing).contains("is not handed over yet"));
    assert!(asked("wanted=1; a=unknown:silent b=ready", &["a"], nothing).contains("it cannot be asked"));
    assert_eq!(asked("wanted=1; a=unknown:gone b=ready", &["a"], nothing), "", "everybody told that it is gone");
    let both = asked("wanted=2; a=ready b=ready c=ready", &["a", "b"], nothing);
    assert_eq!(
        both.matches("1 ready copy would be left, fewer than minNumberOfCopies asks for (2)").count(),
        2,
        "{both}"
    );
    assert!(asked("wanted=1; a=failed", &["a"], nothing).contains("may be the last of the image"));
}

#[test]
fn a_copy_under_a_replica_is_never_cleaned_up() {
    for state in ["ready", "failed", "pending", "ready!"] {
        let o = world(&format!("wanted=1; idle; source; a={state} b=ready c=ready; used=a"));
        assert!(
            leaving(&o.scene(o.image.status.as_ref().unwrap()), o.now, &o.image.spec.disk_file_spec_map)
                .iter()
                .all(|leaving| leaving.disk != "a")
        );
    }
}

#[test]
fn a_copy_is_never_cleaned_up_below_the_minimum() {
    let goes = |text: &str| {
        let o = world(text);
        let status = o.image.status.clone().unwrap();
        let leaving = leaving(&o.scene(&status), o.now, &o.image.spec.disk_file_spec_map);
        leaving.into_iter().map(|l| l.disk).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(goes("wanted=1; idle; a=ready b=ready c=ready"), "a b");
    assert_eq!(goes("wanted=2; idle; a=ready b=ready c=ready"), "a");
    assert_eq!(goes("wanted=3; idle; a=ready b=ready c=ready"), "");
    assert_eq!(goes("wanted=2; idle; a=ready b=failed c=ready"), "b");
    assert_eq!(goes("wanted=2; idle; a=ready b=failed"), "");
    assert_eq!(goes("wanted=2; idle; a=ready! b=ready c=ready"), "a");
    assert_eq!(goes("wanted=3; idle; a=ready! b=ready c=ready:down"), "", "also not because of an eviction");
}

#[test]
fn an_entry_of_a_disk_that_is_gone_goes_too() {
    let text = "wanted=1; source; a=ready b=unknown:gone";
    let changed = |change: fn(&mut Observed)| {
        let mut o = world(text);
        change(&mut o);
        describe(&o, &decide(&o))
    };
    assert!(changed(|_| ()).starts_with("copies -b\n"), "{}", changed(|_| ()));
    assert!(
        changed(|o| o.disks.incomplete.extend(["node-b".to_owned()])).starts_with("nothing\n"),
        "not all have told"
    );
    let just_gone: fn(&mut Observed) = |o| {
        let copies = &mut o.image.status.as_mut().unwrap().disk_file_status_map;
        copies.get_mut("b").unwrap().gone_since = now().to_string();
    };
    assert!(changed(just_gone).starts_with("nothing\n"), "it may be on its way to another node");
    let mut o = world(text);
    just_gone(&mut o);
    assert_eq!(decide(&o).recheck_after, Some(o.settings.recovery_wait));
    let hope = decide(&world("wanted=1; source; a=failed b=unknown:gone"));
    let copies = hope.actions.iter().filter(|a| matches!(a, Action::SetCopies(_))).count();
    assert_eq!(copies, 0, "the last hope stays until another copy is ready");
    let mut o = world("wanted=1; a=- b=unknown:gone");
    o.managers.clear();
    let said = &decide(&o).status.disk_file_status_map["b"].message;
    assert_eq!(said, "no node has a disk b any more; its entry goes by itself once another copy is ready");
}

#[test]
fn deletion_does_not_wait_for_a_disk_that_is_away() {
    for away in ["silent", "down", "gone"] {
        let text = format!("wanted=1; deleting; a=ready b=ready:{away}");
        let mut o = world(&text);
        let first = decide(&o);
        assert_eq!(first.actions, [Action::SetCopies(BTreeMap::new())], "{away}");
        assert!(first.status.disk_file_status_map.is_empty(), "no manager keeps anything");
        apply(&mut o, &first);
        assert!(describe(&o, &decide(&o)).contains("to be removed from a of node-a"), "{away}");
        o.managers[0].spec.backing_images.clear();
        let last = decide(&o);
        assert_eq!(last.actions, [Action::RemoveFinalizer], "{away}");
        let said = condition::find(&last.status.conditions, READY).unwrap();
        if away != "gone" {
            let sentence =
                format!("the image is deleted; its files are removed from b of node-b ({away}) when it is back");
            assert_eq!((said.reason.as_str(), said.message.as_str()), ("CopyLeftBehind", sentence.as_str()));
        }
    }
}

#[test]
fn what_is_being_prepared_is_recorded_before_it_is_given_up() {
    let mut o = world("wanted=1; deleting; a=in-progress:silent");
    let mut source = BackingImageDataSource::new("ubuntu", Default::default());
    source.spec.disk_uuid = "a".into();
    o.data_source = Some(source);
    o.managers[0].spec.backing_images.clear();
    let said = describe(&o, &decide(&o));
    assert!(said.contains("waits for a of node-a to be recorded as the place of its first file"), "{said}");
    o.managers[0].spec.backing_images.insert("ubuntu".into(), "12345678".into());
    assert_eq!(decide(&o).actions, [Action::DeleteDataSource]);
}

#[test]
fn a_deletion_does_not_wait_for_a_record_that_nobody_writes() {
    let mut o = world("wanted=1; deleting; a=in-progress:silent");
    let mut source = BackingImageDataSource::new("ubuntu", Default::default());
    source.spec.disk_uuid = "a".into();
    o.data_source = Some(source);
    o.managers[0].spec.backing_images.clear();
    // Its status was lost, and managers record what has a uuid.
    o.image.status.as_mut().unwrap().uuid.clear();
    assert_eq!(decide(&o).actions, [Action::DeleteDataSource]);
}

//! Where further copies come, how many at a time, and when not.

use super::*;
use crate::image::making_of_others;

/// A world with disks in these zones and on these nodes, in the order of the disks; an empty name leaves what is.
fn placed(text: &str, places: &[(&str, &str)]) -> Observed {
    let mut o = world(text);
    for (disk, (zone, node)) in o.disks.list.iter_mut().zip(places) {
        disk.zone = (*zone).into();
        if !node.is_empty() {
            disk.node = (*node).into();
        }
    }
    o
}

fn map(decision: &Decision) -> BTreeMap<String, DiskFileSpec> {
    let set =
        decision.actions.iter().find_map(|a| if let Action::SetCopies(map) = a { Some(map.clone()) } else { None });
    set.unwrap_or_default()
}

/// Another image with copies in these states on these disks.
fn other(name: &str, copies: &[(&str, CopyState)]) -> BackingImage {
    let mut image = BackingImage::new(name, Default::default());
    let known = &mut image.status.get_or_insert_default().disk_file_status_map;
    for (disk, state) in copies {
        image.spec.disk_file_spec_map.insert((*disk).into(), Default::default());
        // What nobody has seen yet has no status at all.
        if *state != CopyState::NotStarted {
            known.insert((*disk).into(), api::image::DiskFileStatus { state: *state, ..Default::default() });
        }
    }
    image
}

/// What the others make, and the limit.
fn limited(o: &mut Observed, limit: u32, others: &[BackingImage]) {
    o.settings.replenish_limit = limit;
    o.making = making_of_others("ubuntu", others, &[], &o.replicas, &o.disks);
}

#[test]
fn copies_lie_in_distinct_zones_then_on_distinct_nodes() {
    let added = |text: &str, places: &[(&str, &str)], change: fn(&mut Observed)| {
        let mut o = placed(text, places);
        change(&mut o);
        let decision = decide(&o);
        describe(&o, &decision).lines().next().unwrap().to_owned()
    };
    let nothing: fn(&mut Observed) = |_| ();
    let three = "wanted=2; a=ready b=- c=-";
    assert_eq!(added(three, &[("x", ""), ("x", ""), ("y", "")], nothing), "copies +c", "another zone");
    assert_eq!(added(three, &[("x", "n"), ("x", "n"), ("x", "m")], nothing), "copies +c", "another node");
    assert_eq!(added(three, &[("x", "n"), ("x", "n"), ("y", "m")], nothing), "copies +c");
    assert_eq!(added(three, &[("x", "n"), ("y", "n"), ("x", "m")], nothing), "copies +b", "zones before nodes");
    // Most room, when nothing else tells them apart.
    let fuller: fn(&mut Observed) = |o| o.disks.list[1].available_bytes = 1 << 30;
    assert_eq!(added(three, &[("x", ""), ("y", ""), ("y", "")], fuller), "copies +c");
    // What leaves takes no zone.
    let four = "wanted=2; a=ready! b=ready c=- d=-";
    assert_eq!(added(four, &[("x", ""), ("y", ""), ("y", ""), ("x", "")], nothing), "copies +d");
    // Two at once lie apart from each other, too.
    let five = "wanted=3; a=ready b=- c=- d=- e=-";
    let places = [("x", ""), ("x", ""), ("y", ""), ("y", ""), ("z", "")];
    let decision = decide(&placed(five, &places));
    let added: Vec<&str> = decision.replenish.added.iter().map(String::as_str).collect();
    assert!(added.len() == 2 && added.contains(&"e") && !added.contains(&"b"), "{added:?}");
}

#[test]
fn the_copies_that_stay_lie_as_far_apart_as_they_can() {
    let goes = |text: &str, places: &[(&str, &str)], last_uses: &[(&str, &str)]| {
        let mut o = placed(text, places);
        o.settings.cleanup_wait = Duration::from_secs(3600);
        let mut status = o.image.status.clone().unwrap();
        for (disk, at) in last_uses {
            status.disk_last_ref_at_map.insert((*disk).into(), (*at).into());
        }
        let leaving = copies::leaving(&o.scene(&status), o.now, &o.image.spec.disk_file_spec_map);
        leaving.into_iter().map(|l| l.disk).collect::<Vec<_>>().join(" ")
    };
    let three = "wanted=2; a=ready b=ready c=ready";
    assert_eq!(goes(three, &[("x", ""), ("y", ""), ("y", "")], &[]), "b", "a is alone in its zone");
    assert_eq!(goes(three, &[("x", ""), ("x", ""), ("y", "")], &[]), "a");
    assert_eq!(goes(three, &[("x", "n"), ("x", "m"), ("x", "m")], &[]), "b", "a is alone on its node");
    assert_eq!(goes(three, &[("x", "n"), ("y", "n"), ("y", "m")], &[]), "b", "zones before nodes");
    assert_eq!(goes(three, &[("x", "n"), ("x", "m"), ("y", "n")], &[]), "a");
    assert_eq!(goes(three, &[("", ""), ("", ""), ("", "")], &[]), "a", "by name when nothing tells them apart");
    let four = "wanted=2; a=ready b=ready c=ready d=ready";
    assert_eq!(goes(four, &[("x", ""), ("y", ""), ("y", ""), ("y", "")], &[]), "b c", "given those before it");
    // What leaves or is not there keeps nobody company.
    assert_eq!(goes("wanted=1; a=ready b=ready c=ready!", &[("x", ""), ("y", ""), ("y", "")], &[]), "a c");
    assert_eq!(goes("wanted=1; a=ready b=ready c=pending", &[("x", ""), ("y", ""), ("y", "")], &[]), "a c");
    // Those that were used until a moment ago are no reason for those that are due to stay.
    let places = [("x", ""), ("y", ""), ("y", "")];
    assert_eq!(goes(three, &places, &[("b", "2025-12-31T23:30:00Z"), ("c", "2025-12-31T23:30:00Z")]), "a");
    // The replicas of a volume go one after the other.
    let one_by_one = [("a", "2025-12-31T23:30:00Z"), ("b", "2025-12-31T23:30:04Z"), ("c", "2025-12-31T23:30:08Z")];
    assert_eq!(goes(three, &places, &one_by_one), "b");
    assert_eq!(goes("wanted=1; a=ready b=ready c=ready", &places, &one_by_one), "a b", "the first one first");
}

#[test]
fn the_reason_for_each_place_is_kept() {
    let mut o = placed("wanted=2; a=ready b=- c=-", &[("x", ""), ("x", ""), ("y", "")]);
    o.disks.list[2].available_bytes = 7000;
    let first = decide(&o);
    assert_eq!(
        map(&first)["c"].reason,
        "copy 2 of the 2 that are wanted; one of 2 eligible disks: 0 others in zone `y`, 0 others on node node-c, 7000 bytes free"
    );
    // It is not written anew each time.
    apply(&mut o, &first);
    o.disks.list[2].available_bytes = 5000;
    assert_eq!(decide(&o).actions, []);
    let used = decide(&world("wanted=1; a=ready b=-; used=b"));
    assert_eq!(map(&used)["b"].reason, "replica v-r-0 of volume v lies there");
    let begun = decide(&world("wanted=1; a=-"));
    let why =
        "the first file is prepared there; the only eligible disk: 0 others on node node-a, 1099511627776 bytes free";
    assert_eq!(map(&begun)["a"].reason, why);
}

#[test]
fn never_makes_more_copies_on_a_node_than_its_limit() {
    let ready = "wanted=2; a=ready b=-";
    let said = |limit: u32, others: &[BackingImage], text: &str| {
        let mut o = world(text);
        limited(&mut o, limit, others);
        let decision = decide(&o);
        let said = describe(&o, &decision);
        (said.lines().next().unwrap().to_owned(), said, decision.replenish)
    };
    let one = [other("alpine", &[("b", CopyState::InProgress)])];
    let (what, said_why, replenish) = said(1, &one, ready);
    assert_eq!(what, "nothing");
    let why = "on node node-b as many copies are being made (of alpine) as setting \
               concurrent-backing-image-replenish-per-node-limit allows (1)";
    assert!(said_why.contains("FewerCopies") && said_why.contains(why), "{said_why}");
    assert_eq!(replenish.waits_for, BTreeSet::from(["node-b".to_owned()]));
    assert_eq!(said(2, &one, ready).0, "copies +b", "one more is allowed");
    assert!(said(0, &[], ready).1.contains("replenish-per-node-limit is 0"));
    // What counts: what is wanted and not there, also when nobody has begun with it.
    for (state, counts) in [
        (CopyState::NotStarted, true),
        (CopyState::Pending, true),
        (CopyState::Starting, true),
        (CopyState::InProgress, true),
        (CopyState::ReadyForTransfer, true),
        (CopyState::Ready, false),
        (CopyState::Failed, false),
        (CopyState::FailedAndCleanup, false),
        (CopyState::Unknown, false),
    ] {
        let waits = said(1, &[other("alpine", &[("b", state)])], ready).0 == "nothing";
        assert_eq!(waits, counts, "{state:?}");
    }
    // Its own ones count as well, and what it adds in the same pass.
    let both = |text: &str, limit| {
        let mut o = placed(text, &[("", "n"), ("", "m"), ("", "m")]);
        limited(&mut o, limit, &[]);
        decide(&o).replenish.added.len()
    };
    assert_eq!((both("wanted=3; a=ready b=- c=-", 1), both("wanted=3; a=ready b=- c=-", 2)), (1, 2));
    assert_eq!(both("wanted=3; a=ready b=pending c=-", 1), 0);
    // What replicas ask for neither counts nor waits.
    let mut o = world("wanted=1; a=ready b=-; used=b");
    limited(&mut o, 1, &one);
    assert!(describe(&o, &decide(&o)).starts_with("copies +b"));
    let mut used = world(ready);
    let mut replica = Replica::new("w-r-0", Default::default());
    (replica.spec.disk_id, replica.spec.backing_image) = ("b".into(), "alpine".into());
    used.settings.replenish_limit = 1;
    used.making = making_of_others("ubuntu", &one, &[], &[replica], &used.disks);
    assert!(describe(&used, &decide(&used)).starts_with("copies +b"));
    // Nor does the first file of an image.
    let mut source = BackingImageDataSource::new("alpine", Default::default());
    source.spec.disk_uuid = "b".into();
    used.making = making_of_others("ubuntu", &one, &[source], &[], &used.disks);
    assert!(describe(&used, &decide(&used)).starts_with("copies +b"));
}

#[test]
fn a_node_at_its_limit_is_waited_for_rather_than_lie_close_together() {
    let places = [("x", "n"), ("x", "n"), ("y", "m"), ("y", "l")];
    let busy = [other("alpine", &[("c", CopyState::InProgress)])];
    let mut o = placed("wanted=2; a=ready b=- c=- d=-", &places);
    limited(&mut o, 1, &busy);
    assert!(describe(&o, &decide(&o)).starts_with("copies +d"), "{}", describe(&o, &decide(&o)));
    let mut o = placed("wanted=2; a=ready b=- c=-", &places);
    limited(&mut o, 1, &busy);
    let said = describe(&o, &decide(&o));
    assert!(said.starts_with("nothing\n") && said.contains("on node m as many copies are being made"), "{said}");
}

#[test]
fn a_short_silence_makes_no_further_copies() {
    let said = |state: &str, silent_s: i64| {
        let mut o = world(&format!("wanted=2; source; a=ready b={state}:silent c=-"));
        let since = now() - jiff::SignedDuration::from_secs(silent_s);
        let copies = &mut o.image.status.as_mut().unwrap().disk_file_status_map;
        copies.get_mut("b").unwrap().last_state_transition_time = since.to_string();
        o.disks.list[1].away_since = Some(since);
        let decision = decide(&o);
        (describe(&o, &decision).lines().next().unwrap().to_owned(), decision.recheck_after)
    };
    let again = |s| Some(Duration::from_secs(s));
    for state in ["unknown", "pending"] {
        let (what, recheck) = said(state, 0);
        assert_eq!((what.as_str(), recheck), ("nothing", again(600)), "{state}");
        assert_eq!(said(state, 599), ("nothing".into(), again(1)), "{state}");
        assert_eq!(said(state, 600).0, "copies +c", "{state}");
    }
    // Back again, there is one too many: it goes like any other that nobody uses.
    check(
        "wanted=2; source; idle; a=ready b=ready c=ready",
        expect![[r#"
            copies -a
            Ready: 2 of 2 copies ready"#]],
    );
}

#[test]
fn an_entry_of_a_gone_disk_waits_from_when_the_disk_was_gone() {
    let mut o = world("wanted=1; source; a=ready b=unknown:silent");
    assert_eq!(decide(&o).status.disk_file_status_map["b"].gone_since, "", "silent for long, and not gone");
    o.disks.list.remove(1);
    let first = decide(&o);
    assert_eq!(first.status.disk_file_status_map["b"].gone_since, now().to_string());
    assert_eq!((first.actions.len(), first.recheck_after), (0, Some(o.settings.recovery_wait)));
    apply(&mut o, &first);
    o.now += o.settings.recovery_wait;
    assert!(describe(&o, &decide(&o)).starts_with("copies -b"));
    // Not every node has told: it may be on its way.
    o.disks.incomplete.insert("node-c".into());
    assert_eq!(decide(&o).status.disk_file_status_map["b"].gone_since, "");
}

#[test]
fn an_eviction_that_waits_says_why() {
    let evicted = |text: &str, change: fn(&mut Observed)| {
        let mut o = world(text);
        change(&mut o);
        let first = decide(&o);
        apply(&mut o, &first);
        let found = condition::find(&decide(&o).status.conditions, EVICTED).cloned();
        found.map(|c| (c.reason, c.message))
    };
    let nothing: fn(&mut Observed) = |_| ();
    let said = |reason: &str, message: &str| Some((reason.to_owned(), message.to_owned()));
    let stays = "the copy on a of node-a stays, although eviction is requested there: ";
    let used = said("EvictionBlocked", &format!("{stays}replica v-r-0 of volume v uses it"));
    assert_eq!(evicted("wanted=1; a=ready! b=ready; used=a", nothing), used, "also while there are enough elsewhere");
    let few = "0 ready copies would be left, fewer than minNumberOfCopies asks for (1)";
    let nowhere = "1 more wanted, but no further disk is eligible: there is no other disk";
    assert_eq!(evicted("wanted=1; a=ready!", nothing), said("EvictionBlocked", &format!("{stays}{few}; {nowhere}")));
    assert_eq!(evicted("wanted=1; a=ready! b=-", nothing), said("EvictionWaits", &format!("{stays}{few}")));
    let silent = evicted("wanted=1; a=unknown!:silent b=ready", nothing).unwrap().1;
    assert!(silent.contains("it cannot be asked"), "{silent}");
    let disk: fn(&mut Observed) = |o| o.disks.list[0].evicting = true;
    assert_eq!(evicted("wanted=1; a=ready b=ready; used=a", disk), used);
    assert_eq!(evicted("wanted=1; a=ready! b=ready", nothing), None, "it is gone");
}

#[test]
fn a_cancelled_eviction_leaves_nothing_flagged() {
    let mut o = world("wanted=1; a=ready b=-");
    let before = decide(&o);
    o.disks.list[0].evicting = true;
    let asked = decide(&o);
    apply(&mut o, &asked);
    assert!(condition::find(&decide(&o).status.conditions, EVICTED).is_some());
    o.disks.list[0].evicting = false;
    let cancelled = decide(&o);
    assert_eq!(condition::find(&cancelled.status.conditions, EVICTED), None);
    apply(&mut o, &cancelled);
    assert!(o.image.spec.disk_file_spec_map.values().all(|entry| !entry.eviction_requested));
    let ready = |d: &Decision| condition::find(&d.status.conditions, READY).map(|c| c.reason.clone());
    assert_eq!(ready(&decide(&o)), ready(&before));
}

#[test]
fn a_cordoned_node_is_closed_or_emptied_by_settings() {
    let said = |text: &str, close: bool, evict: bool| {
        let mut o = world(text);
        (o.settings.close_cordoned, o.settings.evict_cordoned) = (close, evict);
        o.disks.list[0].cordoned = true;
        let decision = decide(&o);
        let evicted = condition::find(&decision.status.conditions, EVICTED).map(|c| c.message.clone());
        (describe(&o, &decision), evicted.unwrap_or_default())
    };
    let missing = "wanted=2; a=- b=ready";
    let (closed, _) = said(missing, true, false);
    assert!(closed.starts_with("nothing\n") && closed.contains("disable-scheduling-on-cordoned-node"), "{closed}");
    assert!(said(missing, false, false).0.starts_with("copies +a"));
    assert!(said(missing, false, true).0.contains("backing-image-cordoned-node-policy is evict"));
    let there = "wanted=1; a=ready b=-";
    assert!(said(there, true, false).0.starts_with("nothing\n"), "what is there stays");
    let (moves, why) = said(there, true, true);
    assert!(moves.starts_with("copies +b") && why.contains("its node is cordoned"), "{moves} {why}");
    assert!(said("wanted=1; a=ready b=ready", true, true).0.starts_with("copies -a"));
}

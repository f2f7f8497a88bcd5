//! Copies that are nobody's by the maps, and what lies over them.

use std::collections::BTreeSet;

use api::Replica;
use api::image::DiskFileStatus;
use api::replica::ReplicaSpec;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::*;

/// A replica of image `ubuntu` that was made so many seconds after the beginning, with data or without.
fn replica(disk: &str, seconds: u64, has_data: bool) -> Replica {
    let spec = ReplicaSpec {
        volume_name: "v".into(),
        backing_image: "ubuntu".into(),
        disk_id: disk.into(),
        ..Default::default()
    };
    let mut replica = Replica::new("r", spec);
    replica.metadata.creation_timestamp = Some(Time(at(seconds)));
    replica.status.get_or_insert_default().generation = u64::from(has_data);
    replica
}

fn at(seconds: u64) -> Timestamp {
    after(now(), Duration::from_secs(seconds))
}

#[test]
fn a_stray_copy_of_an_image_without_a_ready_one_is_kept_and_told() {
    let strays = |file: &str, is_ready: bool, over: Option<&str>| {
        let mut o = world(&format!("wanted; object; process=running; {file}"));
        o.images[0].spec.disk_file_spec_map.clear();
        if is_ready {
            let copy = DiskFileStatus { state: CopyState::Ready, ..Default::default() };
            o.images[0].status.as_mut().unwrap().disk_file_status_map.insert("e".into(), copy);
        }
        o.replicas = over.into_iter().map(|disk| replica(disk, 0, true)).collect();
        let Some(Ok(agent)) = &mut o.agent else { unreachable!() };
        agent.remains = Some(vec![]);
        let decision = decide(&o);
        let told = decision.status.backing_image_file_map.get("ubuntu");
        (decision.actions, told.map_or(String::new(), |f| format!("{} {}", f.state.as_str(), f.message)))
    };
    let removed = [Action::DeleteFile { image: "ubuntu".into(), uuid: "12345678".into() }];
    assert_eq!(strays("file=ready", false, None), (vec![], "ready ".into()));
    assert_eq!(strays("file=ready", true, None), (removed.to_vec(), String::new()));
    assert_eq!(strays("file=ready", true, Some("d")), (vec![], "ready ".into()), "a replica lies over it");
    assert_eq!(strays("file=ready", true, Some("e")), (removed.to_vec(), String::new()), "it lies elsewhere");
    let differs = "failed the copy differs from the image: its checksum is other, that of the image is c";
    assert_eq!(strays("other", false, None), (vec![], differs.into()));
    assert_eq!(strays("other", true, None), (removed.to_vec(), String::new()));
}

/// The manager remembers a copy of uuid 87654321. `gone`: its image is; otherwise another one has the name, since second 10.
fn former(is_gone: bool, replica: Option<Replica>, under: Option<&[&str]>) -> Decision {
    let mut o = world("wanted; held=ready; process=running; stray; peers");
    o.manager.as_mut().unwrap().spec.backing_images.insert("ubuntu".into(), "87654321".into());
    o.images[0].metadata.creation_timestamp = Some(Time(at(10)));
    if is_gone {
        o.images.clear();
    }
    o.replicas.extend(replica);
    o.disks.list[0].under_replicas =
        under.map(|keys| keys.iter().map(|key| (*key).to_owned()).collect::<BTreeSet<_>>());
    let Some(Ok(agent)) = &mut o.agent else { unreachable!() };
    agent.remains = Some(vec![]);
    // A memory as after the wait: what is an orphan to remove would go.
    let sighting = orphans::Sighting { since: now().checked_sub(orphans::WAIT).unwrap(), ..Default::default() };
    o.memory.orphans.insert("backing-images/ubuntu-87654321".into(), sighting);
    decide(&o)
}

#[test]
fn a_copy_of_a_former_image_stays_while_a_replica_lies_over_it() {
    let old = Action::DeleteFile { image: "ubuntu".into(), uuid: "87654321".into() };
    let check = |is_gone: bool, replica: Option<Replica>, under: Option<&[&str]>, expected: Result<(), &str>| {
        let decision = former(is_gone, replica.clone(), under);
        let told = decision.status.orphans.get("backing-images/ubuntu-87654321").map(|o| o.message.clone());
        let what = format!("{is_gone} {replica:?} {under:?}");
        match expected {
            Ok(()) => assert_eq!((decision.actions.first(), told), (Some(&old), None), "{what}"),
            Err(why) => {
                assert_eq!(decision.actions, [], "{what}");
                assert!(told.as_ref().is_some_and(|told| told.ends_with(why)), "{told:?} {what}");
                assert_eq!(decision.recheck_after, Some(Duration::from_secs(5)), "{what}");
            }
        }
    };
    let key = "ubuntu-87654321";
    let none: Option<&[&str]> = Some(&[]);
    let named = "it is left because replica r of volume v lies over it";
    let said = "it is left because a directory below `replicas/` lies over it";
    let unsaid = "it is left because node n does not say what lies below `replicas/`";
    // As it is meant to be: the end of an image waited for its replicas.
    for is_gone in [true, false] {
        for under in [none, None, Some(&[key][..])] {
            check(is_gone, None, under, Ok(()));
            check(is_gone, Some(replica("e", 0, true)), under, Ok(()));
        }
    }
    // Its finalizer was taken off, or its object was lost.
    for has_data in [true, false] {
        for under in [none, None] {
            check(true, Some(replica("d", 0, has_data)), under, Err(named));
        }
    }
    // The name is another image's: what is older than that and has data is not of it, the rest is what its directory says.
    check(false, Some(replica("d", 0, true)), none, Err(named));
    for of_the_next in [replica("d", 0, false), replica("d", 10, true), replica("d", 11, true), replica("d", 11, false)]
    {
        check(false, Some(of_the_next.clone()), none, Ok(()));
        check(false, Some(of_the_next.clone()), Some(&[key]), Err(said));
        check(false, Some(of_the_next.clone()), Some(&["ubuntu-12345678"]), Ok(()));
        check(false, Some(of_the_next), None, Err(unsaid));
    }
    let mut failed = replica("d", 0, false);
    failed.spec.failed_at = now().to_string();
    check(false, Some(failed), none, Err(named));
}

#[test]
fn an_image_that_waits_for_the_end_of_a_former_copy_says_so() {
    let decision = former(false, Some(replica("d", 0, true)), Some(&[]));
    let file = &decision.status.backing_image_file_map["ubuntu"];
    assert_eq!((file.uuid.as_str(), file.state), ("12345678", CopyState::Failed));
    let why = "the disk still holds the copy of a former image of this name, with uuid 87654321: replica r of volume v lies \
               over it";
    assert_eq!(file.message, why);
    assert!(former(true, Some(replica("d", 0, true)), Some(&[])).status.backing_image_file_map.is_empty());
}

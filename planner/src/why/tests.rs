//! Chains as people read them.

use api::Condition;
use api::engine::InstanceState;
use api::image::{CopyState, DiskFileSpec, DiskFileStatus};
use api::node::DiskStatus;
use expect_test::{Expect, expect};
use k8s_openapi::api::core::v1::{PersistentVolumeClaimSpec, PersistentVolumeClaimStatus};

use super::*;

fn now() -> Timestamp {
    "2026-01-01T00:10:00Z".parse().unwrap()
}

fn check(world: &World, subject: Subject, expected: Expect) {
    expected.assert_eq(&render(&explain(world, &subject, now()).unwrap()));
}

fn node(name: &str, disk: &str) -> Node {
    let mut node = Node::new(name, Default::default());
    let ready = Condition::new(types::READY, ConditionStatus::True, "Ready", "");
    let disk = DiskStatus { disk_uuid: disk.into(), disk_name: "disk-1".into(), ..Default::default() };
    let disk_status = [("disk-1".to_owned(), disk)].into();
    node.status = Some(api::node::NodeStatus { conditions: vec![ready], disk_status, ..Default::default() });
    node
}

fn image(name: &str, copies: &[(&str, CopyState, &str)]) -> BackingImage {
    let mut image = BackingImage::new(name, Default::default());
    let mut status = api::image::BackingImageStatus::default();
    for (disk, state, message) in copies {
        image.spec.disk_file_spec_map.insert((*disk).into(), DiskFileSpec::default());
        let copy = DiskFileStatus { state: *state, progress: 61, message: (*message).into(), ..Default::default() };
        status.disk_file_status_map.insert((*disk).into(), copy);
    }
    image.status = Some(status);
    image
}

fn volume(name: &str, state: VolumeState, robustness: Robustness) -> Volume {
    let spec = api::volume::VolumeSpec {
        node_id: "node-1".into(),
        backing_image: "ubuntu".into(),
        number_of_replicas: 2,
        ..Default::default()
    };
    let mut volume = Volume::new(name, spec);
    let current_node_id = "node-1".into();
    volume.status = Some(api::volume::VolumeStatus { state, robustness, current_node_id, ..Default::default() });
    volume
}

use api::volume::{Robustness, VolumeState};

#[test]
fn what_is_healthy_is_said_in_one_line() {
    let mut world =
        World { volumes: vec![volume("v", VolumeState::Attached, Robustness::Healthy)], ..Default::default() };
    for name in ["v-r-1", "v-r-2"] {
        let mut replica = Replica::new(name, Default::default());
        replica.spec.volume_name = "v".into();
        replica.status =
            Some(api::replica::ReplicaStatus { current_state: InstanceState::Running, ..Default::default() });
        world.replicas.push(replica);
    }
    world.images.push(image("ubuntu", &[("d1", CopyState::Ready, "")]));
    world.nodes.push(node("node-1", "d1"));
    check(
        &world,
        Subject::Volume("v".into()),
        expect![[r#"
        Volume `v` is attached to `node-1`, healthy: 2 of 2 replicas are good.
    "#]],
    );
    check(
        &world,
        Subject::Image("ubuntu".into()),
        expect![[r#"
            Image `ubuntu` is ready: 1 of 1 copy is ready.
        "#]],
    );
    check(
        &world,
        Subject::Node("node-1".into()),
        expect![[r#"
            Node `node-1` is ready, with 1 disk.
        "#]],
    );
}

#[test]
fn a_clock_that_was_set_is_told_of_what_waits() {
    let message = "the clock of node node-1 was set ahead by 60 s at 2026-01-01T00:00:00Z; what waits may end sooner";
    let set = Condition::new(types::CLOCK_STEADY, ConditionStatus::False, "ClockWasSet", message);
    let mut world = World {
        volumes: vec![volume("v", VolumeState::Detached, Robustness::Unknown)],
        images: vec![image("ubuntu", &[("d1", CopyState::Ready, "")])],
        nodes: vec![node("node-1", "d1"), node("node-2", "d2")],
        ..Default::default()
    };
    world.nodes[0].status.as_mut().unwrap().conditions.push(set);
    for (subject, is_told) in [
        (Subject::Volume("v".into()), true),
        (Subject::Image("ubuntu".into()), true),
        (Subject::Node("node-1".into()), true),
        (Subject::Node("node-2".into()), false),
    ] {
        let text = render(&explain(&world, &subject, now()).unwrap());
        assert_eq!(text.matches("was set ahead by 60 s").count(), usize::from(is_told), "{subject:?}: {text}");
    }
}

#[test]
fn a_transfer_under_a_limit_says_which() {
    let mut slow = image("ubuntu", &[("d1", CopyState::InProgress, "")]);
    slow.spec.bandwidth_limit = 70_000;
    let mut world = World { images: vec![slow], nodes: vec![node("node-1", "d1")], ..Default::default() };
    check(
        &world,
        Subject::Image("ubuntu".into()),
        expect![[r#"
            Image `ubuntu` is not ready: 0 of 1 copy is ready.
              The copy of image `ubuntu` on `disk-1` of `node-1` is at 61 %; each disk sends at most 70000 bytes/s by the image's spec.bandwidthLimit.
        "#]],
    );
    let mut setting = Setting { value: "64Ki".into(), ..Default::default() };
    setting.metadata.name = Some(api::setting::BANDWIDTH_LIMIT.into());
    world.settings.push(setting);
    world.images[0].spec.bandwidth_limit = 0;
    let mut source = BackingImageDataSource::new("ubuntu", Default::default());
    source.spec.disk_uuid = "d1".into();
    source.status.get_or_insert_default().current_state = CopyState::InProgress;
    world.data_sources.push(source);
    check(
        &world,
        Subject::DataSource("ubuntu".into()),
        expect![[r#"
            The download of image `ubuntu` to `disk-1` of `node-1` is at 0 %; it downloads at most 65536 bytes/s by setting backing-image-bandwidth-limit.
        "#]],
    );
}

#[test]
fn a_claim_leads_to_the_copy_that_is_missing() {
    let mut world =
        World { volumes: vec![volume("pvc-1", VolumeState::Attaching, Robustness::Unknown)], ..Default::default() };
    let mut wait = Condition::new(
        types::WAIT_FOR_BACKING_IMAGE,
        ConditionStatus::True,
        "Waiting",
        "waits for copies of image ubuntu",
    );
    wait.last_transition_time = "2026-01-01T00:09:30Z".into();
    world.volumes[0].status.as_mut().unwrap().conditions.push(wait);
    let mut claim = PersistentVolumeClaim::default();
    claim.metadata.name = Some("data".into());
    claim.metadata.namespace = Some("default".into());
    claim.spec = Some(PersistentVolumeClaimSpec { volume_name: Some("pvc-1".into()), ..Default::default() });
    claim.status = Some(PersistentVolumeClaimStatus { phase: Some("Bound".into()), ..Default::default() });
    world.claims.push(claim);
    let mut replica = Replica::new("pvc-1-r-1", Default::default());
    replica.spec.volume_name = "pvc-1".into();
    replica.spec.desire_state = api::engine::DesireState::Running;
    replica.spec.disk_id = "d2".into();
    replica.spec.backing_image = "ubuntu".into();
    world.replicas.push(replica);
    world
        .images
        .push(image("ubuntu", &[("d1", CopyState::Ready, ""), ("d2", CopyState::Failed, "no space left on the disk")]));
    let copies = &mut world.images[0].status.as_mut().unwrap().disk_file_status_map;
    copies.get_mut("d2").unwrap().next_retry_time = "2026-01-01T00:10:20Z".into();
    world.nodes = vec![node("node-1", "d1"), node("node-2", "d2")];
    let subject = Subject::Claim { namespace: "default".into(), name: "data".into() };
    check(
        &world,
        subject,
        expect![[r#"
            Claim `default/data` is bound to `pvc-1`.
              Volume `pvc-1` is being attached to `node-1`: 1 of 2 replicas are good.
                Waits for copies of image ubuntu. Since 30s.
                Replica `pvc-1-r-1` on `disk-1` of `node-2` is not started yet.
                  The copy of image `ubuntu` on `disk-1` of `node-2` is failed. No space left on the disk. Next attempt in 20s.
                Image `ubuntu` is ready: 1 of 2 copies are ready.
        "#]],
    );
}

#[test]
fn a_silent_node_is_told_with_its_time_and_what_can_be_done() {
    let mut world =
        World { volumes: vec![volume("v", VolumeState::Attached, Robustness::Healthy)], ..Default::default() };
    let mut wait =
        Condition::new(types::READY, ConditionStatus::Unknown, "NodeNotReady", "node node-1 does not answer")
            .with_hint("bring the node back");
    wait.last_transition_time = "2026-01-01T00:08:30Z".into();
    world.volumes[0].status.as_mut().unwrap().conditions.push(wait);
    check(
        &world,
        Subject::Volume("v".into()),
        expect![[r#"
            Volume `v` is attached to `node-1`, healthy: 0 of 2 replicas are good.
              Node node-1 does not answer. Since 90s. You can: bring the node back.
        "#]],
    );
}

#[test]
fn says_what_the_user_can_do() {
    let mut world = World::default();
    let mut broken = image("ubuntu", &[]);
    let mut ready = Condition::new(types::READY, ConditionStatus::False, "Invalid", "the URL answered 404")
        .with_hint("correct `spec.sourceParameters.url`");
    ready.last_transition_time = "2026-01-01T00:00:00Z".into();
    ready.next_retry_time = "2026-01-01T00:09:00Z".into();
    broken.status.as_mut().unwrap().conditions.push(ready);
    world.images.push(broken);
    check(
        &world,
        Subject::Image("ubuntu".into()),
        expect![[r#"
            Image `ubuntu` is not ready: it has no copy yet.
              The URL answered 404. Since 10m. The next attempt is due now. You can: correct `spec.sourceParameters.url`.
        "#]],
    );
    assert_eq!(explain(&world, &Subject::Image("other".into()), now()), None);
}

#[test]
fn a_hint_is_told_although_its_reason_was() {
    let mut world =
        World { volumes: vec![volume("v", VolumeState::Detaching, Robustness::Unknown)], ..Default::default() };
    let busy = "/dev/loop0 is in use by the mount on `/m`";
    let waits = Condition::new(types::READY, ConditionStatus::False, "Detaching", format!("the engine stops: {busy}"));
    world.volumes[0].status.as_mut().unwrap().conditions.push(waits);
    let mut engine = Engine::new("v-e-0", Default::default());
    let status = engine.status.get_or_insert_default();
    status.current_state = InstanceState::Stopping;
    let detached = Condition::new(types::DETACHED, ConditionStatus::False, "DeviceBusy", busy);
    status.conditions.push(detached.with_hint("unmount it, or end what uses it"));
    world.engines.push(engine);
    let story = render(&explain(&world, &Subject::Volume("v".into()), now()).unwrap());
    assert_eq!(story.matches(busy).count(), 1, "{story}");
    assert!(story.contains("You can: unmount it, or end what uses it."), "{story}");
}

#[test]
fn the_next_attempt_is_told_although_its_reason_was() {
    let killed = "it was killed by signal 9";
    let mut image = BackingImage::new("ubuntu", Default::default());
    let copy = DiskFileStatus { state: CopyState::Unknown, message: killed.into(), ..Default::default() };
    image.status.get_or_insert_default().disk_file_status_map.insert("d1".into(), copy);
    let mut manager = BackingImageManager::new("bim-d1", Default::default());
    manager.spec.disk_uuid = "d1".into();
    let status = manager.status.get_or_insert_default();
    status.current_state = api::manager::ManagerState::Error;
    let mut condition = Condition::new(types::READY, ConditionStatus::False, "Ended", killed);
    condition.next_retry_time = "2026-01-01T00:10:08Z".into();
    status.conditions.push(condition);
    let world = World { images: vec![image], managers: vec![manager], ..Default::default() };
    let story = render(&explain(&world, &Subject::Image("ubuntu".into()), now()).unwrap());
    assert_eq!(story.to_lowercase().matches(killed).count(), 1, "{story}");
    assert!(story.contains("Next attempt in 8s."), "{story}");
}

#[test]
fn a_download_between_two_attempts_is_told_once() {
    let problem = "cannot download `http://x/y`: cannot connect: Connection refused (os error 111)";
    let next = "2026-01-01T00:10:08Z";
    let condition = |message: String| {
        let mut condition = Condition::new(types::READY, ConditionStatus::False, "Retrying", message);
        condition.next_retry_time = next.into();
        condition.with_hint("check that the address can be reached")
    };
    let mut source = BackingImageDataSource::new("ubuntu", Default::default());
    source.spec.disk_uuid = "d1".into();
    let status = source.status.get_or_insert_default();
    (status.current_state, status.message) = (CopyState::Starting, problem.into());
    status.next_retry_time = next.into();
    status.conditions.push(condition(problem.into()));
    let mut waiting = image("ubuntu", &[("d1", CopyState::Starting, problem)]);
    let text = format!("the file could not be prepared on disk-1 of node-1: {problem}");
    waiting.status.as_mut().unwrap().conditions.push(condition(text));
    let world = World {
        images: vec![waiting],
        data_sources: vec![source],
        nodes: vec![node("node-1", "d1")],
        ..Default::default()
    };
    check(
        &world,
        Subject::Image("ubuntu".into()),
        expect![[r#"
        Image `ubuntu` is not ready: 0 of 1 copy is ready.
          The file could not be prepared on disk-1 of node-1: cannot download `http://x/y`: cannot connect: Connection refused (os error 111). Next attempt in 8s. You can: check that the address can be reached.
          The download of image `ubuntu` to `disk-1` of `node-1` waits for its next attempt.
    "#]],
    );
    check(
        &world,
        Subject::DataSource("ubuntu".into()),
        expect![[r#"
        The download of image `ubuntu` to `disk-1` of `node-1` waits for its next attempt.
          Cannot download `http://x/y`: cannot connect: Connection refused (os error 111). Next attempt in 8s. You can: check that the address can be reached.
    "#]],
    );
}

/// The former node is silent, and names the disk for as long as it is.
#[test]
fn a_disk_that_was_moved_is_told_where_it_answers() {
    let held = |name: &str, verdict| {
        let mut node = node(name, "d1");
        node.spec.disks.insert("disk-1".into(), Default::default());
        let conditions = &mut node.status.as_mut().unwrap().conditions;
        conditions.clear();
        conditions.push(Condition::new(types::READY, verdict, "Ready", "it is cut off"));
        node
    };
    let failed = image("ubuntu", &[("d1", CopyState::Failed, "broken")]);
    for (former, present) in [("node-1", "node-2"), ("node-2", "node-1")] {
        let nodes = vec![held(former, ConditionStatus::Unknown), held(present, ConditionStatus::True)];
        let world = World { images: vec![failed.clone()], nodes, ..Default::default() };
        let told = render(&explain(&world, &Subject::Image("ubuntu".into()), now()).unwrap());
        assert!(told.contains(present) && !told.contains(former), "{told}");
    }
}

#[test]
fn a_claim_says_what_its_growth_waits_for() {
    let claim = serde_json::from_value(serde_json::json!({
        "metadata": {"name": "c", "namespace": "default"},
        "spec": {"volumeName": "v", "resources": {"requests": {"storage": "4Gi"}}},
        "status": {"phase": "Bound", "capacity": {"storage": "1Gi"}, "conditions": [
            {"type": "Resizing", "status": "True", "message": "volume `v` is attached to node `n1`"},
        ]},
    }));
    let world = World {
        claims: vec![claim.unwrap()],
        volumes: vec![volume("v", VolumeState::Detached, Robustness::Unknown)],
        ..Default::default()
    };
    check(
        &world,
        Subject::Claim { namespace: "default".into(), name: "c".into() },
        expect![[r#"
            Claim `default/c` is bound to `v`.
              It asks for 4Gi and has 1Gi. Volume `v` is attached to node `n1`.
              Volume `v` is detached: 0 of 2 replicas are good.
                Image `ubuntu` does not exist. You can: create it, e.g. `image create ubuntu --url …`.
        "#]],
    );
}

#[test]
fn an_image_that_can_be_used_says_what_it_lacks() {
    let mut ubuntu = image("ubuntu", &[("d1", CopyState::Ready, "")]);
    let why = "1 of 1 copy ready; 1 more wanted, but no further disk is eligible: there is no other disk";
    let ready = Condition::new(types::READY, ConditionStatus::True, "FewerCopies", why);
    ubuntu.status.as_mut().unwrap().conditions.push(ready);
    let world = World { images: vec![ubuntu], nodes: vec![node("node-1", "d1")], ..Default::default() };
    check(
        &world,
        Subject::Image("ubuntu".into()),
        expect![[r#"
            Image `ubuntu` is ready: 1 of 1 copy is ready.
              1 of 1 copy ready; 1 more wanted, but no further disk is eligible: there is no other disk.
        "#]],
    );
}

#[test]
fn an_unknown_copy_says_since_when_and_why() {
    let why = "node node-2 does not answer";
    let mut ubuntu = image("ubuntu", &[("d1", CopyState::Ready, ""), ("d2", CopyState::Unknown, why)]);
    let status = ubuntu.status.as_mut().unwrap();
    let silent = status.disk_file_status_map.get_mut("d2").unwrap();
    silent.last_state_transition_time = "2026-01-01T00:09:15Z".into();
    let nodes = vec![node("node-1", "d1"), node("node-2", "d2")];
    let mut world = World { images: vec![ubuntu], nodes, ..Default::default() };
    check(
        &world,
        Subject::Image("ubuntu".into()),
        expect![[r#"
            Image `ubuntu` is ready: 1 of 2 copies are ready.
              The copy of image `ubuntu` on `disk-1` of `node-2` is unknown. Node node-2 does not answer. Since 45s.
        "#]],
    );
    // The reason stands in the condition; how long this copy has been silent does not.
    let text = format!("0 of 1 copy ready, disk-1 of node-2 unknown ({why})");
    let status = world.images[0].status.as_mut().unwrap();
    status.disk_file_status_map.remove("d1");
    world.images[0].spec.disk_file_spec_map.remove("d1");
    let status = world.images[0].status.as_mut().unwrap();
    status.conditions.push(Condition::new(types::READY, ConditionStatus::False, "Preparing", text));
    check(
        &world,
        Subject::Image("ubuntu".into()),
        expect![[r#"
            Image `ubuntu` is not ready: 0 of 1 copy is ready.
              0 of 1 copy ready, disk-1 of node-2 unknown (node node-2 does not answer).
              The copy of image `ubuntu` on `disk-1` of `node-2` is unknown. Since 45s.
        "#]],
    );
}

#[test]
fn a_volume_and_a_replica_tell_why_that_lies_where_it_does() {
    let mut world =
        World { volumes: vec![volume("v", VolumeState::Detached, Robustness::Unknown)], ..Default::default() };
    world.volumes[0].spec.backing_image.clear();
    world.nodes.push(node("node-1", "d1"));
    let mut replica = Replica::new("v-r-1", Default::default());
    (replica.spec.disk_id, replica.spec.volume_name) = ("d1".into(), "v".into());
    replica.spec.place_reason = "the only eligible disk".into();
    world.replicas.push(replica);
    check(
        &world,
        Subject::Volume("v".into()),
        expect![[r#"
            Volume `v` is detached: 1 of 2 replicas are good.
              `disk-1` of `node-1` was chosen for replica `v-r-1`: the only eligible disk.
        "#]],
    );
    // Told once, also when the replica is told itself.
    let reason = "its directory is gone";
    (world.replicas[0].spec.failed_at, world.replicas[0].spec.failed_reason) = (now().to_string(), reason.into());
    check(
        &world,
        Subject::Volume("v".into()),
        expect![[r#"
            Volume `v` is detached: 0 of 2 replicas are good.
              Replica `v-r-1` on `disk-1` of `node-1` failed 0s ago: Its directory is gone.
                `disk-1` of `node-1` was chosen for replica `v-r-1`: the only eligible disk.
        "#]],
    );
    world.replicas[0].spec.failed_at.clear();
    check(
        &world,
        Subject::Replica("v-r-1".into()),
        expect![[r#"
            Replica `v-r-1` on `disk-1` of `node-1` is not started yet.
              `disk-1` of `node-1` was chosen for replica `v-r-1`: the only eligible disk.
        "#]],
    );
}

#[test]
fn an_image_tells_why_its_copies_lie_where_they_do_and_a_node_what_stays_there() {
    let mut world = World { images: vec![image("ubuntu", &[("d1", CopyState::Ready, "")])], ..Default::default() };
    world.images[0].spec.disk_file_spec_map.get_mut("d1").unwrap().reason = "copy 1 of the 1 that are wanted".into();
    world.nodes.push(node("node-1", "d1"));
    check(
        &world,
        Subject::Image("ubuntu".into()),
        expect![[r#"
            Image `ubuntu` is ready: 1 of 1 copy is ready.
              `disk-1` of `node-1` was chosen: copy 1 of the 1 that are wanted.
        "#]],
    );
    let stays = Condition::new(types::EVICTED, ConditionStatus::False, "EvictionBlocked", "the copy stays");
    world.images[0].status.as_mut().unwrap().conditions.push(stays.with_hint("wait"));
    let disk = api::node::DiskSpec { eviction_requested: true, ..Default::default() };
    world.nodes[0].spec.disks.insert("disk-1".into(), disk);
    let mut replica = Replica::new("v-r-1", Default::default());
    (replica.spec.disk_id, replica.spec.volume_name) = ("d1".into(), "v".into());
    world.replicas.push(replica);
    let blocked = expect![[r#"
        Node `node-1` is ready, with 1 disk.
          A copy of image `ubuntu` is still on `disk-1`.
            The copy stays. You can: wait.
          Replica `v-r-1` of volume `v` is on `disk-1`: replicas are not moved by this version.
    "#]];
    check(&world, Subject::Node("node-1".into()), blocked);
    world.nodes[0].spec.disks.clear();
    world.nodes[0].status.as_mut().unwrap().conditions.push(
        Condition::new(types::CORDONED, ConditionStatus::True, "Cordoned", "it is cordoned").with_hint("uncordon it"),
    );
    check(
        &world,
        Subject::Node("node-1".into()),
        expect![[r#"
            Node `node-1` is ready, with 1 disk.
              It is cordoned. You can: uncordon it.
        "#]],
    );
}

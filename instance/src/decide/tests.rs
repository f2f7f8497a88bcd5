//! Tables of decisions.

use super::*;

fn stopped() -> ObservedReplica {
    ObservedReplica {
        name: "v-r-1".into(),
        image_name: "ubuntu".into(),
        deleted: false,
        desire: DesireState::Stopped,
        process: Process::None,
        disk: Disk::Available,
        image: Image::Ready,
        record: None,
        live: None,
        data_exists: false,
        failure: None,
    }
}

fn check_replica(seen: ObservedReplica, action: Action, state: InstanceState) -> (ReplicaStatus, Vec<Condition>) {
    let mut status = ReplicaStatus { generation: 7, ..Default::default() };
    let (decided, conditions) = replica(&seen, &mut status);
    assert_eq!((decided, status.current_state), (action, state), "{seen:?}");
    (status, conditions)
}

#[test]
fn a_replica_starts_only_over_a_ready_copy() {
    let wish = ObservedReplica { desire: DesireState::Running, ..stopped() };
    check_replica(wish.clone(), Action::Start, InstanceState::Starting);
    let copy =
        Image::Copy { state: CopyState::InProgress, progress: 61, message: String::new(), next_retry: String::new() };
    let (_, conditions) =
        check_replica(ObservedReplica { image: copy, ..wish.clone() }, Action::Rest, InstanceState::Stopped);
    assert!(conditions[0].is_true() && conditions[0].message.contains("61 %"), "{conditions:?}");
    check_replica(ObservedReplica { image: Image::Absent, ..wish.clone() }, Action::Rest, InstanceState::Stopped);
    let gone = Disk::Unavailable("gone".into());
    check_replica(ObservedReplica { disk: gone, ..wish }, Action::Rest, InstanceState::Error);
}

#[test]
fn a_dead_replica_is_reported_and_never_restarted_within_the_attachment() {
    let died = ObservedReplica { process: Process::Died("killed".into()), ..stopped() };
    check_replica(ObservedReplica { desire: DesireState::Running, ..died.clone() }, Action::Rest, InstanceState::Error);
    check_replica(died, Action::Stop, InstanceState::Stopping);
}

#[test]
fn an_absent_disk_keeps_the_last_known_generation_and_the_finalizer() {
    let gone = ObservedReplica { disk: Disk::Unavailable("gone".into()), ..stopped() };
    let (status, _) = check_replica(gone.clone(), Action::Rest, InstanceState::Stopped);
    assert_eq!(status.generation, 7);
    check_replica(ObservedReplica { deleted: true, ..gone.clone() }, Action::Rest, InstanceState::Stopped);
    let given_up = ObservedReplica { disk: Disk::GivenUp, deleted: true, ..gone };
    check_replica(given_up, Action::Release, InstanceState::Stopped);
}

#[test]
fn a_deleted_replica_ends_then_loses_its_data_then_its_finalizer() {
    let deleted = ObservedReplica { deleted: true, desire: DesireState::Running, data_exists: true, ..stopped() };
    let alive = ObservedReplica { process: Process::Alive, ..deleted.clone() };
    check_replica(alive, Action::Stop, InstanceState::Stopping);
    check_replica(deleted.clone(), Action::Remove, InstanceState::Stopped);
    check_replica(ObservedReplica { data_exists: false, ..deleted }, Action::Release, InstanceState::Stopped);
}

fn no_engine() -> ObservedEngine {
    ObservedEngine {
        deleted: false,
        desire: DesireState::Running,
        process: Process::None,
        live: None,
        device: None,
        files_exist: false,
        failure: None,
    }
}

fn check_engine(seen: ObservedEngine, action: Action, state: InstanceState) -> EngineStatus {
    let mut status = EngineStatus::default();
    let (decided, _) = engine(&seen, &mut status);
    assert_eq!((decided, status.current_state), (action, state), "{seen:?}");
    status
}

#[test]
fn an_engine_starts_serves_gets_its_device_and_ends() {
    let wish = no_engine();
    check_engine(wish.clone(), Action::Start, InstanceState::Starting);
    let alive = ObservedEngine { process: Process::Alive, ..wish.clone() };
    check_engine(alive.clone(), Action::Rest, InstanceState::Starting);
    let live = LiveEngine { serving: true, generation: 4, ..Default::default() };
    let serving = ObservedEngine { live: Some(live), ..alive.clone() };
    check_engine(serving.clone(), Action::AttachDevice, InstanceState::Starting);
    let whole = ObservedEngine { device: Some("/dev/loop7".into()), ..serving };
    let status = check_engine(whole.clone(), Action::Rest, InstanceState::Running);
    assert_eq!((status.endpoint.as_str(), status.generation), ("/dev/loop7", 4));
    // Its engine is being replaced under the holder.
    check_engine(ObservedEngine { live: None, ..whole.clone() }, Action::Rest, InstanceState::Running);
    let stop = ObservedEngine { desire: DesireState::Stopped, ..whole };
    let status = check_engine(stop.clone(), Action::Stop, InstanceState::Stopping);
    assert_eq!(status.endpoint, "");
    let stopped = ObservedEngine { process: Process::None, live: None, device: None, ..stop };
    check_engine(ObservedEngine { files_exist: true, ..stopped.clone() }, Action::Stop, InstanceState::Stopping);
    check_engine(stopped.clone(), Action::Rest, InstanceState::Stopped);
    check_engine(ObservedEngine { deleted: true, ..stopped }, Action::Release, InstanceState::Stopped);
}

#[test]
fn a_dead_engine_is_an_error_until_it_is_detached() {
    let died = ObservedEngine { process: Process::Died("killed".into()), ..no_engine() };
    check_engine(died.clone(), Action::Rest, InstanceState::Error);
    check_engine(ObservedEngine { desire: DesireState::Stopped, ..died }, Action::Stop, InstanceState::Stopping);
}

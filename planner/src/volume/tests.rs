//! Decision tables.

use api::condition;
use api::engine::{EngineStatus, InstanceState, ReplicaMode};
use api::names::condition::READY;
use api::quantity::SizeBytes;
use api::replica::ReplicaStatus;
use api::volume::{Robustness, VolumeSpec};
use expect_test::{Expect, expect};

use super::*;
use crate::disk::{Disk, ready_disk};

mod growth;
mod places;

fn now() -> Timestamp {
    "2026-01-01T00:00:00Z".parse().unwrap()
}

fn disk(n: u32, health: Health) -> Disk {
    Disk { name: "disk".into(), node: format!("n{n}"), health, ..ready_disk(&format!("d{n}"), 100) }
}

/// `on=n1; engine=running:3@n1; r1=running:3{r1,r2} r2=failed r3=stopped:2; silent=n2; recorded=3; map=r1,r2`
fn world(text: &str) -> Observed {
    let mut o = Observed {
        now: now(),
        random: 7,
        volume: Volume::new("v", VolumeSpec { size: SizeBytes(10), number_of_replicas: 3, ..Default::default() }),
        engine: None,
        replicas: vec![],
        image: None,
        disks: Disks::default(),
        silent_since: BTreeMap::new(),
        loads: BTreeMap::new(),
        settings: Settings::default(),
        restart: Retry::default(),
    };
    o.volume.metadata.finalizers = Some(vec![FINALIZER.into()]);
    for n in 1..=3 {
        o.disks.list.push(disk(n, Health::Ready));
        o.disks.nodes.insert(format!("n{n}"), Health::Ready);
    }
    let mut engine = Engine::new("v-e-0", EngineSpec { volume_size: SizeBytes(10), ..Default::default() });
    let mut has_engine = false;
    for part in text.split(';').map(str::trim).filter(|p| !p.is_empty()) {
        let (key, value) = part.split_once('=').unwrap();
        match key {
            "on" => o.volume.spec.node_id = value.into(),
            "nodes" => o.disks.list.truncate(value.parse().unwrap()),
            "silent" => {
                let health = Health::Unknown(format!("node {value} does not answer"));
                o.disks.nodes.insert(value.into(), health.clone());
                o.disks.list.iter_mut().filter(|d| d.node == value).for_each(|d| d.health = health.clone());
            }
            "gone" => drop(o.disks.nodes.remove(value)),
            "off" => drop(o.disks.out_of_service.insert(value.into())),
            "since" => drop(o.silent_since.insert(value.into(), "2025-12-31T23:00:00Z".parse().unwrap())),
            "just" => drop(o.silent_since.insert(value.into(), "2025-12-31T23:59:50Z".parse().unwrap())),
            "said" => {
                let condition = Condition::new(READY, ConditionStatus::False, value, "it said why");
                engine.status.get_or_insert_default().conditions.push(condition);
            }
            "recorded" => engine.spec.generation = value.parse().unwrap(),
            "dropped" => {
                engine.status.get_or_insert_default().replica_mode_map.insert(value.into(), ReplicaMode::Err);
            }
            "engine" => {
                has_engine = true;
                let (state, rest) = value.split_once(':').unwrap();
                let (generation, node) = rest.split_once('@').unwrap();
                engine.spec.node_id = node.into();
                let status = engine.status.get_or_insert_default();
                status.generation = generation.parse().unwrap();
                status.current_state = state_of(state);
                if state == "running" {
                    status.endpoint = "/dev/loop0".into();
                }
            }
            "wish" => engine.spec.desire_state = DesireState::Running,
            "map" => {
                for name in value.split(',') {
                    engine.spec.replica_address_map.insert(name.into(), "ip:1".into());
                    engine
                        .status
                        .get_or_insert_default()
                        .replica_mode_map
                        .entry(name.into())
                        .or_insert(ReplicaMode::Rw);
                }
            }
            _ => part.split_whitespace().for_each(|text| add_replica(&mut o, text)),
        }
    }
    if has_engine {
        engine.status.get_or_insert_with(EngineStatus::default);
        o.engine = Some(engine);
    }
    o
}

fn state_of(text: &str) -> InstanceState {
    match text {
        "running" => InstanceState::Running,
        "starting" => InstanceState::Starting,
        "stopping" => InstanceState::Stopping,
        "error" => InstanceState::Error,
        "stopped" => InstanceState::Stopped,
        _ => InstanceState::NotStarted,
    }
}

fn add_replica(o: &mut Observed, text: &str) {
    let (name, rest) = text.split_once('=').unwrap();
    let n = &name[1..];
    let mut replica = Replica::new(name, ReplicaSpec { volume_size: SizeBytes(10), ..Default::default() });
    replica.spec.node_id = format!("n{n}");
    replica.spec.disk_id = format!("d{n}");
    if let Some(generation) = rest.strip_prefix("failed") {
        replica.spec.failed_at = "2025-01-01T00:00:00Z".into();
        replica.spec.failed_reason = "gone".into();
        let generation = generation.strip_prefix(':').map_or(0, |g| g.parse().unwrap());
        replica.status =
            Some(ReplicaStatus { current_state: InstanceState::Stopped, generation, ..Default::default() });
    } else {
        let (state, record) = rest.split_once(':').unwrap();
        let (generation, members) = record.split_once('{').unwrap_or((record, "}clean"));
        let (members, clean) = members.split_once('}').unwrap();
        let state = state_of(state);
        if state != InstanceState::Stopped {
            replica.spec.desire_state = DesireState::Running;
            replica.spec.active = true;
        }
        replica.status = Some(ReplicaStatus {
            current_state: state,
            ip: "ip".into(),
            port: 1,
            generation: generation.parse().unwrap(),
            generation_members: members.split(',').filter(|m| !m.is_empty()).map(str::to_owned).collect(),
            clean: clean == "clean",
            ..Default::default()
        });
    }
    o.replicas.push(replica);
}

fn check(text: &str, expected: Expect) {
    let decision = decide(&world(text));
    let mut lines: Vec<String> = decision
        .actions
        .iter()
        .map(|action| match action {
            Action::CreateReplica(r) => format!("create replica on {}", r.spec.disk_id),
            Action::CreateEngine(_) => "create engine".into(),
            Action::SetReplicaSpec { name, spec } if !spec.failed_at.is_empty() => {
                format!("fail {name}: {}", spec.failed_reason)
            }
            Action::SetReplicaSpec { name, spec } => format!("{name} {:?}", spec.desire_state),
            Action::SetEngineSpec(spec) => {
                let map = spec.replica_address_map.keys().cloned().collect::<Vec<_>>().join(",");
                let compare = if spec.compare_replicas { " compare" } else { "" };
                format!(
                    "engine {:?} at {} with {map} above {}{compare}",
                    spec.desire_state, spec.node_id, spec.generation
                )
            }
            other => format!("{other:?}"),
        })
        .collect();
    let status = &decision.status;
    let ready = condition::find(&status.conditions, READY).unwrap();
    lines.push(format!("{:?} {:?} {}: {}", status.state, status.robustness, ready.reason, ready.message));
    expected.assert_eq(&lines.join("\n"));
}

#[test]
fn places_replicas_on_distinct_disks() {
    check(
        "",
        expect![[r#"
        create engine
        create replica on d2
        create replica on d3
        create replica on d1
        Detached Unknown Detached: it can be attached"#]],
    );
}

#[test]
fn says_what_has_no_place() {
    check(
        "nodes=1",
        expect![[r#"
        create engine
        create replica on d1
        Detached Unknown Detached: it can be attached"#]],
    );
    check(
        "nodes=0",
        expect![[r#"
        create engine
        Creating Unknown NoEligibleDisk: 0 of 3 replicas have a place: there is no other disk"#]],
    );
}

#[test]
fn starts_replicas_then_the_engine() {
    check(
        "on=n1; engine=stopped:0@; r1=stopped:0 r2=stopped:0 r3=stopped:0",
        expect![[r#"
        r1 Running
        r2 Running
        r3 Running
        Attaching Unknown Attaching: waits for replica r1 on node n1: it is starting; r2 on node n2: it is starting; r3 on node n3: it is starting"#]],
    );
    check(
        "on=n1; engine=stopped:0@; r1=running:0 r2=running:0 r3=starting:0",
        expect!["Attaching Unknown Attaching: waits for replica r3 on node n3: it is starting"],
    );
    check(
        "on=n1; engine=stopped:0@; r1=running:0 r2=running:0 r3=running:0",
        expect![[r#"
        engine Running at n1 with r1,r2,r3 above 0
        Attaching Unknown Attaching: the engine on node n1 is starting"#]],
    );
}

#[test]
fn each_attachment_has_a_number_above_all_before() {
    let next = |text: &str, former: u64| {
        let mut observed = world(text);
        observed.engine.as_mut().unwrap().spec.attachment = former;
        decide(&observed).actions.into_iter().find_map(|action| match action {
            Action::SetEngineSpec(spec) => Some(spec.attachment),
            _ => None,
        })
    };
    assert_eq!(next("on=n1; engine=stopped:0@; r1=running:0 r2=running:0 r3=running:0", 0), Some(1));
    let written = "on=n1; engine=stopped:7@n2; r1=running:7{r1,r2} r2=running:7{r1,r2} r3=failed";
    assert_eq!((next(written, 0), next(written, 4)), (Some(1), Some(5)));
    // Of an Engine object that was made anew.
    assert_eq!(next("on=n1; engine=stopped:0@; r1=running:6000003{r1} r2=failed r3=failed", 0), Some(7));
    // Nothing is started, so nothing is counted.
    assert_eq!(next("on=n1; wish=; engine=running:7@n1; map=r1; r1=running:7{r1} r2=failed r3=failed", 4), Some(4));
}

#[test]
fn leaves_stale_and_silent_replicas_out_and_marks_them() {
    check(
        "on=n1; engine=stopped:3@n2; r1=running:3{r1,r2} r2=running:3{r1,r2} r3=running:2{r1,r2,r3}",
        expect![[r#"
        fail r3: stale: it stopped at generation 2 and the volume went on to 3 without it
        engine Running at n1 with r1,r2 above 3 compare
        Attaching Unknown Attaching: the engine on node n1 is starting"#]],
    );
    check(
        "on=n1; silent=n3; engine=stopped:3@n2; r1=running:3{r1,r2,r3}clean r2=running:3{r1,r2,r3}clean r3=running:3{r1,r2,r3}clean",
        expect![[r#"
        fail r3: the volume was attached without it: node n3 does not answer
        engine Running at n1 with r1,r2 above 3
        Attaching Unknown Attaching: the engine on node n1 is starting"#]],
    );
}

#[test]
fn refuses_a_lone_stale_replica() {
    check(
        "on=n1; recorded=5; engine=stopped:5@n1; r1=running:4{r1,r2,r3} r2=failed r3=failed",
        expect![
            "Attaching Faulted StaleReplica: the newest replica in sight is of generation 4, but the volume has reached generation 5: newer writes are on replicas that are not in sight"
        ],
    );
}

#[test]
fn what_a_failed_replica_reached_counts_until_the_user_says_that_it_is_lost() {
    // It went on alone, and failed before anybody heard how far it had come.
    let text = "on=n1; recorded=4; engine=stopped:4@n1; r1=running:4{r1,r2}clean r2=failed:5 r3=failed";
    check(
        text,
        expect![[r#"
            engine Stopped at n1 with  above 5
            Attaching Faulted StaleReplica: the newest replica in sight is of generation 4, but the volume has reached generation 5: newer writes are on replicas that are not in sight"#]],
    );
    let mut salvaged = world(text);
    salvaged.replicas[1].spec.failed_reason.clear();
    let starts = |a: &Action| matches!(a, Action::SetEngineSpec(s) if s.desire_state == DesireState::Running);
    assert!(decide(&salvaged).actions.iter().any(starts));
}

#[test]
fn takes_over_what_the_engine_dropped() {
    check(
        "on=n1; wish=; engine=running:4@n1; map=r1,r2,r3; dropped=r2; recorded=3; r1=running:4{r1,r3} r2=running:3{r1,r2,r3} r3=running:4{r1,r3}",
        expect![[r#"
        fail r2: the engine dropped it
        engine Running at n1 with r1,r3 above 4
        Attached Degraded Degraded: 2 of 3 replicas are in sync: r2 on node n2: the engine dropped it"#]],
    );
}

#[test]
fn is_faulted_when_every_replica_has_failed() {
    check(
        "on=n1; engine=stopped:4@n1; r1=failed r2=failed r3=failed",
        expect![[r#"
        engine Stopped at n1 with  above 4
        Attaching Faulted Faulted: every replica has failed; their data is untouched: r1 on node n1: gone; r2 on node n2: gone; r3 on node n3: gone"#]],
    );
}

#[test]
fn never_attaches_elsewhere_while_an_engine_may_still_write() {
    check(
        "on=n2; wish=; silent=n1; since=n1; engine=running:4@n1; map=r1,r2,r3; r1=running:4{r1,r2,r3} r2=running:4{r1,r2,r3} r3=running:4{r1,r2,r3}",
        expect![[r#"
            r1 Running
            r2 Running
            r3 Running
            engine Stopped at n1 with r1,r2,r3 above 4
            Detaching Unknown Detaching: it must be detached from node n1 first: node n1 does not answer since 2025-12-31T23:00:00Z; the engine there may still write, so it is waited for until the node returns, is declared out of service, or its Node object is deleted"#]],
    );
    check(
        "on=n2; engine=stopping:4@n1; map=r1,r2,r3; recorded=4; r1=running:4{r1,r2,r3} r2=running:4{r1,r2,r3} r3=running:4{r1,r2,r3}",
        expect![
            "Detaching Unknown Detaching: it must be detached from node n1 first: the engine on node n1 is stopping"
        ],
    );
}

#[test]
fn says_who_uses_the_device_of_an_engine_that_died() {
    let mut o = world("on=n1; engine=stopping:4@n1; map=r1,r2; recorded=4; r1=running:4{r1,r2} r2=running:4{r1,r2}");
    let status = o.engine.as_mut().unwrap().status.as_mut().unwrap();
    let died = Condition::new(READY, ConditionStatus::False, "EngineEnded", "the engine's holder ended");
    let busy =
        Condition::new(DETACHED, ConditionStatus::False, "DeviceBusy", "/dev/loop0 is in use by the mount on /m");
    status.conditions.extend([died, busy]);
    let waits = condition::find(&decide(&o).status.conditions, DETACHED).unwrap().message.clone();
    assert_eq!(waits, "the engine on node n1 is stopping: /dev/loop0 is in use by the mount on /m");
}

#[test]
fn an_engine_on_a_silent_node_is_waited_for_and_the_volume_says_so() {
    let text = "on=n1; wish=; silent=n1; since=n1; engine=running:4@n1; recorded=4; map=r1,r2,r3; r1=running:4 r2=running:4 r3=running:4";
    check(
        text,
        expect![
            "Attached Healthy NodeNotReady: node n1 does not answer since 2025-12-31T23:00:00Z; the volume stays attached to node n1, whose engine is waited for until the node returns, is declared out of service, or its Node object is deleted"
        ],
    );
    let hint = |text: &str, r#type: &str| {
        condition::find(&decide(&world(text)).status.conditions, r#type).unwrap().hint.clone()
    };
    assert!(hint(text, READY).contains("delete its Node object"));
    let detaching = text.replace("on=n1; ", "");
    assert!(hint(&detaching, READY).contains("delete its Node object"));
    assert!(hint(&detaching, DETACHED).contains("delete its Node object"));
}

#[test]
fn a_node_that_is_declared_out_of_service_keeps_no_volume() {
    // What stands there of its engine holds nobody up, and that of a silent node does.
    let all = "{r1,r2,r3}";
    let replicas =
        format!("silent=n1; recorded=4; map=r1,r2,r3; r1=running:4{all} r2=running:4{all} r3=running:4{all}");
    let engine = format!("since=n1; engine=running:4@n1; {replicas}");
    let undetached =
        |text: &str| condition::find(&decide(&world(text)).status.conditions, DETACHED).is_some_and(|c| !c.is_true());
    assert!(undetached(&engine) && !undetached(&format!("off=n1; {engine}")));
    check(
        &format!("off=n1; on=n2; {engine}"),
        expect![[r#"
        fail r1: the volume was attached without it: node n1 does not answer
        engine Running at n2 with r2,r3 above 4 compare
        Attaching Unknown Attaching: the engine on node n2 is starting"#]],
    );
    // It may live: the replicas stay for the next attachment, and what it says of them now fails none.
    check(
        &format!("off=n1; dropped=r2; {engine}"),
        expect![[r#"
        r1 Running
        r2 Running
        r3 Running
        Detached Unknown Detached: it can be attached"#]],
    );
    check(
        &format!("off=n1; on=n2; dropped=r2; {engine}"),
        expect![[r#"
        fail r1: the volume was attached without it: node n1 does not answer
        engine Running at n2 with r2,r3 above 4 compare
        Attaching Unknown Attaching: the engine on node n2 is starting"#]],
    );
    check(
        &format!("off=n1; {}", engine.replace("running:4@", "stopped:4@")),
        expect![[r#"
        r1 Stopped
        r2 Stopped
        r3 Stopped
        Detached Unknown Detached: it can be attached"#]],
    );
    // To take its Node object away says the same.
    check(
        &format!("dropped=r2; {engine}; gone=n1"),
        expect![[r#"
        r1 Running
        r2 Running
        r3 Running
        Detached Unknown Detached: it can be attached"#]],
    );
    // Nor is its replica waited for, however short it is away.
    let stopped = format!("on=n2; just=n1; engine=stopped:4@n2; {replicas}");
    check(
        &stopped,
        expect![
            "Attaching Unknown Attaching: waits for replica r1 on node n1: node n1 does not answer; the attachment goes on without it at 2026-01-01T00:00:20Z"
        ],
    );
    check(
        &format!("off=n1; {stopped}"),
        expect![[r#"
        fail r1: the volume was attached without it: node n1 does not answer
        engine Running at n2 with r2,r3 above 4 compare
        Attaching Unknown Attaching: the engine on node n2 is starting"#]],
    );
}

#[test]
fn an_engine_that_ended_under_its_users_faults_the_volume_until_they_are_gone() {
    let replicas = "recorded=4; map=r1,r2,r3; r1=running:4 r2=running:4 r3=running:4";
    check(
        &format!("on=n1; engine=stopping:4@n1; said=EngineEnded; {replicas}"),
        expect![
            "Detaching Faulted EngineLost: it said why; requests on its device fail; it is attached again when nobody uses that any more: the engine on node n1 is stopping: it said why"
        ],
    );
    check(
        &format!("on=n1; engine=stopping:4@n1; said=Stopped; {replicas}"),
        expect!["Detaching Unknown Detaching: the engine on node n1 is stopping: it said why"],
    );
}

#[test]
fn requests_that_wait_for_an_engine_are_told_by_the_volume() {
    let replicas = "recorded=4; map=r1,r2,r3; r1=running:4 r2=running:4 r3=running:4";
    for reason in ["EngineSilent", "EngineStarting", "EngineStuck"] {
        let decision = decide(&world(&format!("on=n1; wish=; engine=running:4@n1; said={reason}; {replicas}")));
        let ready = condition::find(&decision.status.conditions, READY).unwrap();
        assert_eq!((ready.reason.as_str(), ready.message.as_str()), (reason, "on node n1 it said why"));
        assert_eq!(decision.status.robustness, Robustness::Healthy);
    }
}

#[test]
fn a_request_to_upgrade_reaches_the_engine() {
    let mut o =
        world("on=n1; wish=; engine=running:4@n1; recorded=4; map=r1,r2,r3; r1=running:4 r2=running:4 r3=running:4");
    assert_eq!(decide(&o).actions, []);
    o.volume.spec.engine_upgrade_requested_at = "2026-01-01T00:00:00Z".into();
    let spec =
        EngineSpec { upgrade_requested_at: "2026-01-01T00:00:00Z".into(), ..o.engine.as_ref().unwrap().spec.clone() };
    assert_eq!(decide(&o).actions, [Action::SetEngineSpec(Box::new(spec))]);
}

#[test]
fn detaches_the_engine_before_the_replicas() {
    check(
        "wish=; engine=running:4@n1; map=r1,r2,r3; recorded=4; r1=running:4 r2=running:4 r3=running:4",
        expect![[r#"
        engine Stopped at n1 with r1,r2,r3 above 4
        Detaching Unknown Detaching: detachment waits: the engine on node n1 is being stopped"#]],
    );
    check(
        "engine=stopped:4@n1; map=r1,r2,r3; recorded=4; r1=running:4 r2=running:4 r3=running:4",
        expect![[r#"
        r1 Stopped
        r2 Stopped
        r3 Stopped
        Detached Unknown Detached: it can be attached"#]],
    );
}

#[test]
fn starts_replicas_again_whose_process_ended() {
    check(
        "on=n1; engine=stopped:4@n1; recorded=4; r1=error:4{r1,r2,r3} r2=error:4{r1,r2,r3} r3=error:4{r1,r2,r3}",
        expect![[r#"
            r1 Stopped
            r2 Stopped
            r3 Stopped
            Attaching Unknown Attaching: waits for replica r1 on node n1: its process ended; it is started again, not before 2026-01-01T00:00:01Z; r2 on node n2: its process ended; it is started again, not before 2026-01-01T00:00:01Z; r3 on node n3: its process ended; it is started again, not before 2026-01-01T00:00:01Z"#]],
    );
}

#[test]
fn an_engine_whose_replicas_all_ended_before_it_served_begins_anew() {
    check(
        "on=n1; wish=; engine=starting:4@n1; recorded=4; map=r1,r2; r1=error:4{r1,r2} r2=error:4{r1,r2}",
        expect![[r#"
            r1 Running
            r2 Running
            engine Stopped at n1 with r1,r2 above 4
            Detaching Unknown Detaching: the engine on node n1 is being stopped"#]],
    );
    // One that serves keeps its requests waiting, and one that has a replica left serves with that.
    for goes_on in [
        "on=n1; wish=; engine=running:4@n1; recorded=4; map=r1,r2; r1=error:4{r1,r2} r2=error:4{r1,r2}",
        "on=n1; wish=; engine=starting:4@n1; recorded=4; map=r1,r2; r1=error:4{r1,r2} r2=running:4{r1,r2}",
    ] {
        let stops = |a: &Action| matches!(a, Action::SetEngineSpec(s) if s.desire_state == DesireState::Stopped);
        assert!(!decide(&world(goes_on)).actions.iter().any(stops), "{goes_on}");
    }
}

#[test]
fn replicas_are_looked_at_anew_when_an_engine_ended_by_surprise() {
    let o = world("on=n1; wish=; engine=error:3@n1; recorded=3; map=r1,r2; r1=running:0 r2=running:0");
    let told: Vec<bool> = decide(&o)
        .actions
        .iter()
        .filter_map(|a| if let Action::SetReplicaSpec { spec, .. } = a { Some(spec.active) } else { None })
        .collect();
    assert_eq!(told, [false, false]);
}

#[test]
fn a_silent_replica_is_waited_for_and_what_was_read_of_it_counts() {
    let replicas = "r1=running:3{r1,r2,r3}clean r2=running:3{r1,r2,r3}clean";
    check(
        &format!("on=n1; silent=n3; just=n3; engine=stopped:3@n2; {replicas} r3=running:3{{r1,r2,r3}}clean"),
        expect![[r#"
            engine Stopped at n2 with  above 3
            Attaching Unknown Attaching: waits for replica r3 on node n3: node n3 does not answer; the attachment goes on without it at 2026-01-01T00:00:20Z"#]],
    );
    // It went on without the others, which the engine could not tell.
    check(
        &format!("on=n1; silent=n3; since=n3; engine=stopped:3@n2; {replicas} r3=running:4{{r3}}"),
        expect![[r#"
            engine Stopped at n2 with  above 4
            Attaching Faulted StaleReplica: the newest replica in sight is of generation 3, but the volume has reached generation 4: newer writes are on replicas that are not in sight (r3: node n3 does not answer)"#]],
    );
}

#[test]
fn the_engine_begins_above_what_the_records_say() {
    check(
        "on=n1; engine=stopped:3@n2; recorded=3; r1=running:4{r1,r2}clean r2=running:4{r1,r2}clean",
        expect![[r#"
        engine Running at n1 with r1,r2 above 4
        Attaching Unknown Attaching: the engine on node n1 is starting"#]],
    );
}

#[test]
fn an_engine_that_is_to_run_on_a_silent_node_may_run_whatever_it_said_last() {
    check(
        "on=n2; wish=; silent=n1; since=n1; engine=stopped:4@n1; recorded=4; map=r2; r1=failed r2=running:4{r2} r3=failed",
        expect![[r#"
            r2 Running
            engine Stopped at n1 with r2 above 4
            Detaching Unknown Detaching: it must be detached from node n1 first: node n1 does not answer since 2025-12-31T23:00:00Z; the engine there may still write, so it is waited for until the node returns, is declared out of service, or its Node object is deleted"#]],
    );
    // Its end was reported before the node fell silent.
    check(
        "silent=n1; engine=stopped:4@n1; recorded=4; map=r2; r1=failed r2=stopped:4{r2} r3=failed",
        expect!["Detached Unknown Degraded: it can be attached; failed are r1 on node n1: gone; r3 on node n3: gone"],
    );
}

#[test]
fn what_an_engine_dropped_before_it_ended_by_surprise_has_failed() {
    check(
        "on=n1; wish=; engine=error:4@n1; map=r1,r2; dropped=r2; recorded=4; r1=running:4{r1} r2=running:3{r1,r2}",
        expect![[r#"
            r1 Running
            fail r2: the engine dropped it
            engine Stopped at n1 with r1 above 4
            Detaching Unknown Detaching: the engine on node n1 is being stopped"#]],
    );
}

#[test]
fn what_an_engine_said_of_another_attachment_fails_nobody() {
    let replicas = "recorded=4; r1=running:4{r1,r2} r2=running:4{r1,r2}";
    // Its report is of the attachment before, in which `r2` may have been dropped and salvaged since.
    check(
        &format!("on=n1; wish=; engine=starting:4@n1; map=r1,r2; dropped=r2; {replicas}"),
        expect!["Attaching Unknown Attaching: the engine on node n1 is starting"],
    );
    check(
        &format!("on=n1; wish=; engine=running:4@n1; map=r1; dropped=r2; {replicas}"),
        expect![
            "Attached Degraded Degraded: 1 of 3 replicas are in sync: 2 of 3 replicas have a place: a replica cannot be added to a volume that holds data (rebuilding is not offered by this version)"
        ],
    );
}

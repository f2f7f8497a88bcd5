//! A volume that is to be larger than its replicas.

use super::*;

/// A world whose volume shall have 20 bytes, where its replicas have 10; each says so.
fn grown(text: &str) -> Observed {
    let mut o = world(text);
    o.volume.spec.size = SizeBytes(20);
    for replica in &mut o.replicas {
        replica.status.get_or_insert_default().current_size = SizeBytes(10);
    }
    o
}

/// The sizes that replicas and engine are given, and how the volume is.
fn told(o: &Observed) -> (Vec<String>, String) {
    let decision = decide(o);
    let sizes = decision.actions.iter().filter_map(|action| match action {
        Action::SetReplicaSpec { name, spec } => Some(format!("{name} {} {:?}", spec.volume_size, spec.desire_state)),
        Action::SetEngineSpec(spec) if spec.desire_state == DesireState::Running => {
            Some(format!("engine {}", spec.volume_size))
        }
        _ => None,
    });
    let ready = condition::find(&decision.status.conditions, READY).unwrap();
    (sizes.collect(), ready.message.clone())
}

/// As if what was decided were stored, and the replicas had started with it.
fn carried(mut o: Observed, started: &[&str]) -> Observed {
    let actions = decide(&o).actions;
    for replica in &mut o.replicas {
        let name = name_of_replica(replica).to_owned();
        let wished = actions.iter().find_map(|action| match action {
            Action::SetReplicaSpec { name: n, spec } if *n == name => Some(spec.as_ref().clone()),
            _ => None,
        });
        replica.spec = wished.unwrap_or_else(|| replica.spec.clone());
        if started.contains(&name.as_str()) {
            let status = replica.status.get_or_insert_default();
            (status.current_state, status.current_size) = (InstanceState::Running, replica.spec.volume_size);
        }
    }
    o
}

#[test]
fn every_replica_of_a_detached_volume_gets_its_size() {
    let (sizes, _) = told(&grown("engine=stopped:3@; r1=stopped:3{r1,r2} r2=failed:3 r3=stopped:2"));
    assert_eq!(sizes, ["r1 20 Stopped", "r2 20 Stopped", "r3 20 Stopped"]);
    // One whose node is away gets it too, for when it is back.
    let (sizes, _) = told(&grown("silent=n1; engine=stopped:3@; r1=stopped:3{r1,r2} r2=stopped:3{r1,r2}"));
    assert_eq!(sizes, ["r1 20 Stopped", "r2 20 Stopped"]);
}

#[test]
fn no_replica_gets_another_size_while_an_engine_may_use_it() {
    let replicas = "r1=running:3{r1,r2} r2=running:3{r1,r2}; map=r1,r2";
    for world in ["engine=running:3@n1; wish=1", "on=n1; engine=running:3@n1; wish=1", "engine=stopping:3@n1"] {
        let (sizes, _) = told(&grown(&format!("{world}; {replicas}")));
        assert!(sizes.iter().all(|size| !size.contains("20")), "{world}: {sizes:?}");
    }
    // The user's word that it is off does not end it; it would drop each replica that is started again.
    let off = grown(&format!("off=n1; silent=n1; on=n2; engine=running:3@n1; wish=1; {replicas}"));
    assert!(told(&off).0.iter().all(|size| !size.contains("20")), "{:?}", told(&off));
}

#[test]
fn a_replica_that_has_less_is_waited_for() {
    let running = "on=n1; engine=stopped:3@; r1=running:3{r1,r2} r2=running:3{r1,r2}";
    let (sizes, why) = told(&grown(running));
    assert_eq!(sizes, ["r1 20 Running", "r2 20 Running"]);
    assert!(why.contains("r1 on node n1: it is started again, to grow from 10 to 20 bytes"), "{why}");
    let (sizes, why) = told(&carried(grown(running), &["r1"]));
    assert!(sizes.is_empty() && !why.contains("r1") && why.contains("r2 on node n2: it is started again"), "{why}");
}

#[test]
fn the_engine_has_the_size_of_its_replicas() {
    let running = "on=n1; engine=stopped:3@; r1=running:3{r1,r2} r2=running:3{r1,r2}";
    let (sizes, _) = told(&carried(grown(running), &["r1", "r2"]));
    assert_eq!(sizes.last().unwrap(), "engine 20");
}

/// It stays out like any other that cannot be started, with its reason; the others go on with one size.
#[test]
fn a_replica_that_cannot_grow_is_left_out_with_its_reason() {
    let mut o = grown("on=n1; engine=stopped:3@; r1=running:3{r1,r2} r2=error:3{r1,r2}");
    o = carried(o, &["r1"]);
    let why = Condition::new(READY, ConditionStatus::False, "ProcessEnded", "no space left on the disk");
    o.replicas[1].status.as_mut().unwrap().conditions.push(why);
    o.restart = (0..3).fold(Retry::default(), |retry, _| retry.failed(now(), "no space"));
    o.restart.next = Some("2025-12-31T23:59:00Z".parse().unwrap());
    let decision = decide(&o);
    let failed = decision.actions.iter().find_map(|action| match action {
        Action::SetReplicaSpec { name, spec } if !spec.failed_at.is_empty() => {
            Some(format!("{name}: {}", spec.failed_reason))
        }
        _ => None,
    });
    assert_eq!(failed.unwrap(), "r2: the volume was attached without it: no space left on the disk");
    let engine = decision.actions.iter().find_map(|action| match action {
        Action::SetEngineSpec(spec) => Some((spec.volume_size, spec.replica_address_map.len())),
        _ => None,
    });
    assert_eq!(engine, Some((SizeBytes(20), 1)));
}

#[test]
fn a_replica_is_never_told_to_shrink() {
    let mut o = grown("engine=stopped:3@; r1=stopped:3");
    o.volume.spec.size = SizeBytes(5);
    assert_eq!(told(&o).0, Vec::<String>::new());
}

//! Whether Kubernetes runs a node.
//!
//! A node that is cut off says nothing itself, so the controller says it: the condition `InService`, and with it `Ready`, which
//! belongs to the node again when it is back. Silence is `Unknown`: its engines may still write and are waited for. Only a user can
//! say that they do not, with the taint [`OUT_OF_SERVICE`] (Kubernetes: non-graceful node shutdown).

use api::names::condition::{CORDONED, IN_SERVICE, READY};
use api::{Condition, ConditionStatus, condition};
use jiff::Timestamp;

/// The taint by which a user declares that nothing of a node runs any more.
pub const OUT_OF_SERVICE: &str = "node.kubernetes.io/out-of-service";

/// What Kubernetes knows of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    /// It has the taint [`OUT_OF_SERVICE`].
    pub out_of_service: bool,
    /// It is cordoned, as by `kubectl drain`.
    pub unschedulable: bool,
    /// What its condition `Ready` says otherwise.
    pub ready: Result<(), String>,
    /// Why the pod of the instance role is not ready there, to be read after `the instance pod of node n1`.
    pub instance: Result<(), String>,
}

/// The conditions of a node as they are to be; `None` when they are so already.
pub fn decide(name: &str, machine: Option<&Machine>, old: &[Condition], now: Timestamp) -> Option<Vec<Condition>> {
    let in_service = in_service(name, machine);
    let mut conditions = old.to_vec();
    if !in_service.is_true() {
        condition::set(&mut conditions, Condition { r#type: READY.into(), ..in_service.clone() }, now);
    }
    condition::set(&mut conditions, in_service, now);
    match machine {
        Some(Machine { unschedulable: true, .. }) => condition::set(&mut conditions, cordoned(name), now),
        Some(_) => conditions.retain(|c| c.r#type != CORDONED),
        // It was told last what it was.
        None => {}
    }
    (conditions != old).then_some(conditions)
}

fn cordoned(name: &str) -> Condition {
    let message = format!("Kubernetes calls node {name} unschedulable (it is cordoned)");
    let hint = format!(
        "`kubectl uncordon {name}` when it is to be used again; settings disable-scheduling-on-cordoned-node and backing-image-cordoned-node-policy say what it means"
    );
    Condition::new(CORDONED, ConditionStatus::True, "Cordoned", message).with_hint(hint)
}

fn in_service(name: &str, machine: Option<&Machine>) -> Condition {
    let told = |status, reason, message| Condition::new(IN_SERVICE, status, reason, message);
    let silent = |reason, message| told(ConditionStatus::Unknown, reason, message);
    let Some(machine) = machine else {
        let hint = "bring it back under this name; when its disks will not return, delete the Node object";
        return silent("KubernetesNodeGone", format!("Kubernetes has no node {name} any more")).with_hint(hint);
    };
    match machine {
        Machine { out_of_service: true, .. } => {
            let message =
                format!("node {name} has the taint {OUT_OF_SERVICE}, by which a user declared that it is off");
            told(ConditionStatus::False, "OutOfService", message).with_hint("remove the taint when the node is back")
        }
        Machine { ready: Err(why), .. } => {
            let hint = format!(
                "bring the node back; when it is certain that it is off, `kubectl taint nodes {name} {OUT_OF_SERVICE}=nodeshutdown:NoExecute` lets its volumes go elsewhere"
            );
            silent("KubernetesNodeNotReady", format!("Kubernetes says of node {name}: {why}")).with_hint(hint)
        }
        Machine { instance: Err(why), .. } => {
            let hint = "see `kubectl describe` and `kubectl logs` of that pod";
            silent("InstanceNotReady", format!("the instance pod of node {name} {why}")).with_hint(hint)
        }
        Machine { ready: Ok(()), instance: Ok(()), .. } => told(ConditionStatus::True, "InService", String::new()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::{Disks, Health};
    use api::Node;

    fn machine(out_of_service: bool, ready: &str, instance: &str) -> Machine {
        let said = |text: &str| if text.is_empty() { Ok(()) } else { Err(text.to_owned()) };
        Machine { out_of_service, unschedulable: false, ready: said(ready), instance: said(instance) }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_767_225_600 + second).unwrap()
    }

    /// A node with these conditions, as the decisions see it: its health, and whether it is declared to be off.
    fn seen(conditions: &[Condition]) -> (Health, bool) {
        let mut node = Node::new("n1", Default::default());
        node.status.get_or_insert_default().conditions = conditions.to_vec();
        let disks = Disks::of(&[node]);
        (disks.nodes["n1"].clone(), disks.out_of_service.contains("n1"))
    }

    #[test]
    fn a_node_is_as_well_as_kubernetes_says_and_only_a_taint_says_that_it_is_off() {
        let ready = Condition::new(READY, ConditionStatus::True, "Ready", "");
        let off = "node n1 is not ready: node n1 has the taint node.kubernetes.io/out-of-service, by which a user declared that it is off";
        let silent = |why: &str| (Health::Unknown(format!("node n1 does not answer: {why}")), false);
        let cases = [
            (Some(machine(true, "", "")), (Health::NotReady(off.into()), true)),
            (Some(machine(true, "it is silent", "is not there")), (Health::NotReady(off.into()), true)),
            (Some(machine(false, "it is silent", "is not there")), silent("Kubernetes says of node n1: it is silent")),
            (Some(machine(false, "", "is not there")), silent("the instance pod of node n1 is not there")),
            (None, silent("Kubernetes has no node n1 any more")),
            (Some(machine(false, "", "")), (Health::Ready, false)),
        ];
        for (machine, expected) in cases {
            let conditions =
                decide("n1", machine.as_ref(), std::slice::from_ref(&ready), at(0)).expect("InService is new");
            assert_eq!(seen(&conditions), expected, "{machine:?}");
            assert_eq!(decide("n1", machine.as_ref(), &conditions, at(9)), None, "it converges: {machine:?}");
        }
    }

    #[test]
    fn a_cordoned_node_says_so_until_it_is_uncordoned() {
        let cordoned = Machine { unschedulable: true, ..machine(false, "", "") };
        let is_cordoned = |conditions: &[Condition]| {
            let mut node = Node::new("n1", Default::default());
            node.spec.disks.insert("disk-1".into(), Default::default());
            let status = node.status.get_or_insert_default();
            status.conditions = conditions.to_vec();
            let disk = api::node::DiskStatus { disk_uuid: "d".into(), ..Default::default() };
            status.disk_status.insert("disk-1".into(), disk);
            Disks::of(&[node]).list[0].cordoned
        };
        let told = decide("n1", Some(&cordoned), &[], at(0)).unwrap();
        assert!(is_cordoned(&told));
        assert_eq!(decide("n1", Some(&cordoned), &told, at(9)), None, "it converges");
        let gone = decide("n1", None, &told, at(10)).unwrap();
        assert!(is_cordoned(&gone), "nobody said otherwise");
        let open = decide("n1", Some(&machine(false, "", "")), &gone, at(20)).unwrap();
        assert!(!is_cordoned(&open));
    }

    #[test]
    fn a_node_that_is_back_says_itself_that_it_is_ready() {
        let away = decide("n1", None, &[], at(0)).unwrap();
        let back = decide("n1", Some(&machine(false, "", "")), &away, at(5)).unwrap();
        let of = |r#type| condition::find(&back, r#type).unwrap();
        assert!(of(IN_SERVICE).is_true());
        assert_eq!(
            (of(READY).status, of(READY).last_transition_time.as_str()),
            (ConditionStatus::Unknown, "2026-01-01T00:00:00Z")
        );
    }
}

//! Nodes report themselves; what they cannot say, because they are away or since Kubernetes knows it, is said here. And the settings that everybody reads.

use std::time::Duration;

use api::Node;
use api::names::condition::READY;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node as KubernetesNode, Pod};
use planner::node::{Machine, OUT_OF_SERVICE, decide};
use planner::setting::Settings;
use store::{Selector, Store, StoreError};

use crate::error::{Doing, ReconcileError};
use crate::{ControllerError, Shared};

/// Which pods run the instance role.
const COMPONENT: (&str, &str) = ("app.kubernetes.io/component", "instance");

/// Stores each known setting that is missing, with its default, so that users find what there is to set.
pub async fn create_default_settings(store: &Store) -> Result<(), ControllerError> {
    let stored = store.list(&Selector::default()).await.map_err(|source| ControllerError::Settings { source })?;
    for setting in Settings::missing(&stored) {
        match store.create(&setting).await {
            // Another controller was faster.
            Ok(_) | Err(StoreError::AlreadyExists { .. }) => {}
            Err(source) => return Err(ControllerError::Settings { source }),
        }
    }
    Ok(())
}

/// Says of one node whether Kubernetes runs it. Without Kubernetes there is nothing to say.
pub async fn reconcile(name: &str, shared: &Shared) -> Result<Option<Duration>, ReconcileError> {
    if !shared.kubernetes {
        return Ok(None);
    }
    let store = &shared.store;
    let Some(node) = store.get::<Node>(name).await.doing("read the node")? else { return Ok(None) };
    let machine = store.get::<KubernetesNode>(name).await.doing("read the Kubernetes node")?;
    let pods: Vec<Pod> = store.list(&Selector::label(COMPONENT.0, COMPONENT.1)).await.doing("list instance pods")?;
    let machine = machine.map(|machine| Machine {
        out_of_service: is_out_of_service(&machine),
        unschedulable: machine.spec.as_ref().and_then(|s| s.unschedulable).unwrap_or_default(),
        ready: readiness(&machine),
        instance: instance(name, &pods),
    });
    let old = node.status.clone().unwrap_or_default();
    let now = Timestamp::now();
    let Some(conditions) = decide(name, machine.as_ref(), &old.conditions, now) else { return Ok(None) };
    let mut changed = node;
    changed.status.get_or_insert_default().conditions = conditions;
    // Of this version only: the node writes there too.
    store.replace_status(&changed).await.doing("report the node's conditions")?;
    Ok(None)
}

/// The node of a pod of the instance role.
pub fn of_instance(pod: &Pod) -> Option<String> {
    is_instance(pod).then(|| pod.spec.as_ref()?.node_name.clone()).flatten()
}

fn is_instance(pod: &Pod) -> bool {
    pod.metadata.labels.as_ref().and_then(|all| all.get(COMPONENT.0)).is_some_and(|c| c == COMPONENT.1)
}

fn is_out_of_service(machine: &KubernetesNode) -> bool {
    let spec = machine.spec.as_ref();
    spec.and_then(|s| s.taints.as_ref()).into_iter().flatten().any(|taint| taint.key == OUT_OF_SERVICE)
}

fn readiness(machine: &KubernetesNode) -> Result<(), String> {
    let conditions = machine.status.as_ref().and_then(|s| s.conditions.as_ref());
    match conditions.into_iter().flatten().find(|c| c.type_ == READY) {
        Some(ready) if ready.status == "True" => Ok(()),
        Some(ready) => {
            let said = ready.message.as_deref().map(|m| m.trim_end_matches('.')).filter(|m| !m.is_empty());
            Err(said.unwrap_or("it is not ready").to_owned())
        }
        None => Err("its kubelet has not reported yet".into()),
    }
}

/// A pod that is replaced overlaps with its successor: one that is ready is enough.
fn instance(node: &str, pods: &[Pod]) -> Result<(), String> {
    let here = pods.iter().filter(|pod| of_instance(pod).as_deref() == Some(node));
    let mut why = "is not there".to_owned();
    for pod in here {
        let conditions = pod.status.as_ref().and_then(|s| s.conditions.as_ref());
        let ready = conditions.into_iter().flatten().find(|c| c.type_ == READY);
        if ready.is_some_and(|c| c.status == "True") {
            return Ok(());
        }
        let said = ready.and_then(|c| c.message.clone()).map(|m| format!(": {m}")).unwrap_or_default();
        why = format!("is not ready{said}");
    }
    Err(why)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, from_value, json};

    use super::*;

    fn pod(component: &str, node: &str, conditions: Value) -> Pod {
        let metadata = json!({"labels": {(COMPONENT.0): component}});
        from_value(json!({"metadata": metadata, "spec": {"nodeName": node, "containers": []}, "status": {"conditions": conditions}}))
            .unwrap()
    }

    fn ready(status: &str, message: &str) -> Value {
        json!([{"type": "Ready", "status": status, "message": message}])
    }

    #[test]
    fn only_a_ready_instance_pod_of_the_node_itself_puts_it_into_service() {
        let well = pod("instance", "n1", ready("True", ""));
        let starting = pod("instance", "n1", ready("False", "containers are not ready"));
        assert_eq!(instance("n1", &[starting.clone(), well.clone()]), Ok(()), "one of two is enough");
        assert_eq!(instance("n1", &[starting]), Err("is not ready: containers are not ready".into()));
        assert_eq!(instance("n1", &[pod("instance", "n1", json!([]))]), Err("is not ready".into()));
        assert_eq!(instance("n2", &[well]), Err("is not there".into()), "it is another node's");
        assert_eq!(instance("n1", &[pod("node", "n1", ready("True", ""))]), Err("is not there".into()));
    }

    #[test]
    fn a_node_is_ready_when_its_kubelet_says_so_and_off_by_that_taint_only() {
        let node = |spec: Value, conditions: Value| -> KubernetesNode {
            from_value(json!({"metadata": {}, "spec": spec, "status": {"conditions": conditions}})).unwrap()
        };
        let readiness = |conditions: Value| super::readiness(&node(json!({}), conditions));
        assert_eq!(readiness(ready("True", "")), Ok(()));
        assert_eq!(readiness(ready("Unknown", "Kubelet stopped posting.")), Err("Kubelet stopped posting".into()));
        assert_eq!(readiness(ready("False", "")), Err("it is not ready".into()));
        assert_eq!(readiness(json!([])), Err("its kubelet has not reported yet".into()));
        let is_off =
            |key: &str| is_out_of_service(&node(json!({"taints": [{"key": key, "effect": "NoExecute"}]}), json!([])));
        assert!(is_off(OUT_OF_SERVICE) && !is_off("node.kubernetes.io/unreachable"));
    }
}

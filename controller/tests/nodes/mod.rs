//! What the controller says of a node that is away from Kubernetes, on the in-memory store.

use crate::world::{eventually, world_of};
use api::condition::find;
use api::names::condition::{CORDONED, IN_SERVICE, READY};
use api::{ConditionStatus, Node};
use k8s_openapi::api::core::v1::{
    Node as KubernetesNode, NodeCondition, NodeSpec, NodeStatus, Pod, PodCondition, PodSpec, PodStatus, Taint,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use store::Store;

fn meta(name: &str) -> ObjectMeta {
    let labels = [("app.kubernetes.io/component".to_owned(), "instance".to_owned())];
    ObjectMeta { name: Some(name.into()), labels: Some(labels.into()), ..Default::default() }
}

/// A Kubernetes node with this status of `Ready`.
fn kubernetes_node(ready: &str) -> KubernetesNode {
    let condition = NodeCondition {
        type_: "Ready".into(),
        status: ready.into(),
        message: Some("Kubelet stopped posting node status.".into()),
        ..Default::default()
    };
    let status = NodeStatus { conditions: Some(vec![condition]), ..Default::default() };
    KubernetesNode { metadata: meta("node-1"), status: Some(status), ..Default::default() }
}

async fn put_instance_pod(store: &Store) {
    let condition = PodCondition { type_: "Ready".into(), status: "True".into(), ..Default::default() };
    let status = PodStatus { conditions: Some(vec![condition]), ..Default::default() };
    let spec = PodSpec { node_name: Some("node-1".into()), ..Default::default() };
    let pod = Pod { metadata: meta("instance-1"), spec: Some(spec), ..Default::default() };
    let mut pod = store.create(&pod).await.unwrap();
    pod.status = Some(status);
    store.replace_status(&pod).await.unwrap();
}

/// Changes the Kubernetes node, and waits until our Node has this `InService` and this `Ready`.
async fn expect(store: &Store, change: impl Fn(&mut KubernetesNode) + Sync, in_service: &str, ready: ConditionStatus) {
    store.modify::<KubernetesNode>("node-1", &change).await.unwrap();
    store.modify_status::<KubernetesNode>("node-1", &change).await.unwrap();
    wait_for_node(store, in_service, ready).await;
}

async fn wait_for_node(store: &Store, in_service: &str, ready: ConditionStatus) {
    eventually(&format!("{in_service} and Ready {ready:?}"), async || {
        let status = store.get::<Node>("node-1").await.unwrap().and_then(|node| node.status).unwrap_or_default();
        let of = |r#type| find(&status.conditions, r#type).cloned().unwrap_or_default();
        of(IN_SERVICE).reason == in_service && of(READY).status == ready
    })
    .await;
}

#[tokio::test]
async fn kubernetes_says_whether_a_node_is_in_service() {
    let world = world_of(true).await;
    let store = &world.store;
    wait_for_node(store, "KubernetesNodeGone", ConditionStatus::Unknown).await;
    store.create(&kubernetes_node("True")).await.unwrap();
    store.modify_status::<KubernetesNode>("node-1", |n| n.status = kubernetes_node("True").status).await.unwrap();
    wait_for_node(store, "InstanceNotReady", ConditionStatus::Unknown).await;
    put_instance_pod(store).await;
    // The node itself says that it is ready.
    wait_for_node(store, "InService", ConditionStatus::Unknown).await;
    let silent = |node: &mut KubernetesNode| node.status = kubernetes_node("Unknown").status;
    expect(store, silent, "KubernetesNodeNotReady", ConditionStatus::Unknown).await;
    let taint =
        Taint { key: "node.kubernetes.io/out-of-service".into(), effect: "NoExecute".into(), ..Default::default() };
    let off = |node: &mut KubernetesNode| {
        node.spec = Some(NodeSpec { taints: Some(vec![taint.clone()]), ..Default::default() });
    };
    expect(store, off, "OutOfService", ConditionStatus::False).await;
}

#[tokio::test]
async fn a_cordon_reaches_our_node_and_leaves_it() {
    let world = world_of(true).await;
    let store = &world.store;
    store.create(&kubernetes_node("True")).await.unwrap();
    let cordon = async |wish: bool| {
        let change = |node: &mut KubernetesNode| {
            node.spec = Some(NodeSpec { unschedulable: Some(wish), ..Default::default() });
        };
        store.modify::<KubernetesNode>("node-1", &change).await.unwrap();
        eventually(&format!("cordoned: {wish}"), async || {
            let status = store.get::<Node>("node-1").await.unwrap().and_then(|node| node.status).unwrap_or_default();
            find(&status.conditions, CORDONED).is_some_and(|c| c.is_true()) == wish
        })
        .await;
    };
    cordon(true).await;
    cordon(false).await;
}

#[tokio::test]
async fn without_kubernetes_nothing_is_said_of_a_node() {
    let world = world_of(false).await;
    world.create_volume("v", "").await;
    eventually("the volume is looked at", async || !world.volume("v").await.conditions.is_empty()).await;
    let node: Node = world.store.get("node-1").await.unwrap().unwrap();
    assert_eq!(find(&node.status.unwrap().conditions, IN_SERVICE), None);
}

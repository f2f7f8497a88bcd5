//! How a workload does, told from its pod and its node.
//!
//! A node that does not answer leaves its pods as they were seen last, so what they say of themselves counts only while it answers.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::{ContainerState, ContainerStateTerminated, ContainerStatus, Node, Pod, PodStatus};

use crate::WorkloadState;

/// What is known of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NodeView {
    Answers,
    /// It is there and does not answer; the sentence says so.
    Silent(String),
}

impl NodeView {
    /// The view of a node, `None` being one that the cluster does not have.
    pub fn of(node: Option<&Node>) -> NodeView {
        let Some(node) = node else { return NodeView::Silent("the cluster does not have this node".into()) };
        let conditions = node.status.as_ref().and_then(|status| status.conditions.as_ref());
        match conditions.into_iter().flatten().find(|condition| condition.type_ == "Ready") {
            Some(ready) if ready.status == "True" => NodeView::Answers,
            Some(ready) => NodeView::Silent(match ready.message.as_deref().filter(|text| !text.is_empty()) {
                Some(message) => format!("its node is not ready: {message}"),
                None => "its node is not ready".into(),
            }),
            None => NodeView::Silent("its node has not reported yet".into()),
        }
    }
}

/// Whether the state of the node tells more than the pod.
pub fn depends_on_node(pod: &Pod) -> bool {
    !has_ended(status(pod)) && !is(pod, "Ready")
}

/// The address of a pod.
pub fn ip(pod: &Pod) -> Option<IpAddr> {
    status(pod)?.pod_ip.as_ref()?.parse().ok()
}

/// How it does. Without a view of its node the pod alone decides.
pub fn of(pod: &Pod, node: Option<&NodeView>) -> WorkloadState {
    let is_deleted = pod.metadata.deletion_timestamp.is_some();
    if has_ended(status(pod)) {
        return WorkloadState::Failed { message: end_of(pod) };
    }
    if let Some(NodeView::Silent(message)) = node {
        return WorkloadState::Unknown { message: message.clone() };
    }
    if is_deleted {
        return WorkloadState::Failed { message: "its pod is being deleted".into() };
    }
    if is(pod, "Ready") {
        return WorkloadState::Running;
    }
    // Only who has lost sight of the node writes this: the kubelet derives the one from the other.
    if is(pod, "ContainersReady") {
        return WorkloadState::Unknown { message: "its node does not answer".into() };
    }
    WorkloadState::Starting { message: waits_for(pod) }
}

/// Why a pod is not gone, in the words of its state.
pub fn why_it_stays(state: &WorkloadState, pod: &Pod) -> String {
    let finalizers = pod.metadata.finalizers.as_ref().filter(|all| !all.is_empty());
    match (state, finalizers) {
        (WorkloadState::Unknown { message }, _) => {
            format!("{message}; its pod goes when the node answers again or is removed from the cluster")
        }
        (_, Some(finalizers)) => format!("finalizers keep its pod: {}", finalizers.join(", ")),
        _ => "its pod is still being ended; look at `kubectl describe pod`".into(),
    }
}

fn status(pod: &Pod) -> Option<&PodStatus> {
    pod.status.as_ref()
}

fn is(pod: &Pod, condition: &str) -> bool {
    let conditions = status(pod).and_then(|status| status.conditions.as_ref());
    conditions.into_iter().flatten().any(|c| c.type_ == condition && c.status == "True")
}

fn containers(status: Option<&PodStatus>) -> impl Iterator<Item = &ContainerStatus> {
    status.and_then(|status| status.container_statuses.as_ref()).into_iter().flatten()
}

fn terminated(status: Option<&PodStatus>) -> Option<&ContainerStateTerminated> {
    containers(status).find_map(|container| container.state.as_ref()?.terminated.as_ref())
}

/// Its only container is never started again.
fn has_ended(status: Option<&PodStatus>) -> bool {
    let phase = status.and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Failed" | "Succeeded")) || terminated(status).is_some()
}

fn end_of(pod: &Pod) -> String {
    let status = status(pod);
    let Some(end) = terminated(status) else {
        let reason = status.and_then(|status| status.reason.as_deref()).unwrap_or_default();
        let message = status.and_then(|status| status.message.as_deref()).unwrap_or_default();
        let why = [reason, message].into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(": ");
        return if why.is_empty() { "its pod ended".into() } else { format!("its node ended or refused it: {why}") };
    };
    let never_ready = containers(status).any(|container| container.started == Some(false));
    let how = match (end.reason.as_deref().unwrap_or_default(), end.signal) {
        ("OOMKilled", _) => "it was killed because it took more memory than its limit (OOMKilled)".to_owned(),
        (_, Some(signal)) if signal != 0 => format!("it was killed by signal {signal}"),
        ("" | "Error" | "Completed", _) => format!("it ended with exit code {}", end.exit_code),
        // 137 is 128 + 9: how a shell tells of a signal, and how runtimes do.
        (reason, _) => format!("it ended with exit code {} ({reason})", end.exit_code),
    };
    let how = if never_ready && end.exit_code == 137 { format!("{how} before it was ready") } else { how };
    match runtime::words::last(end.message.as_deref().unwrap_or_default()) {
        tail if tail.is_empty() => how,
        tail => format!("{how}; its log ends with: {tail}"),
    }
}

/// Why it does not run yet; empty when that takes its course.
fn waits_for(pod: &Pod) -> String {
    let waiting = containers(status(pod)).find_map(|container| match &container.state {
        Some(ContainerState { waiting: Some(waiting), .. }) => Some(waiting),
        _ => None,
    });
    let text = |reason: &Option<String>, message: &Option<String>| {
        let parts = [reason, message].map(|part| part.clone().unwrap_or_default());
        parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(": ")
    };
    if let Some(waiting) = waiting {
        let takes_its_course =
            matches!(waiting.reason.as_deref(), None | Some("ContainerCreating" | "PodInitializing"));
        return if takes_its_course { String::new() } else { text(&waiting.reason, &waiting.message) };
    }
    let running = containers(status(pod)).find_map(|container| container.state.as_ref()?.running.as_ref());
    if let Some(running) = running {
        let since = running.started_at.as_ref().map(|at| format!(" since {}", at.0)).unwrap_or_default();
        return format!("its container runs{since} and accepts no connections");
    }
    let conditions = status(pod).and_then(|status| status.conditions.as_ref());
    let unscheduled = conditions.into_iter().flatten().find(|c| c.type_ == "PodScheduled" && c.status != "True");
    unscheduled.map(|condition| text(&condition.reason, &condition.message)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(status: Value) -> Pod {
        serde_json::from_value(json!({"metadata": {"name": "bim"}, "status": status})).unwrap()
    }

    fn conditions(all: &[(&str, &str)]) -> Value {
        all.iter().map(|(r#type, status)| json!({"type": r#type, "status": status})).collect()
    }

    fn container(state: Value) -> Value {
        json!([{"name": "workload", "image": "i", "imageID": "", "ready": false, "restartCount": 0, "state": state}])
    }

    fn said(state: WorkloadState) -> String {
        match state {
            WorkloadState::Starting { message } => format!("starting {message}"),
            WorkloadState::Running => "running".into(),
            WorkloadState::Failed { message } => format!("failed {message}"),
            WorkloadState::Unknown { message } => format!("unknown {message}"),
        }
    }

    #[test]
    fn each_state_is_told_with_its_reason() {
        let waits = |reason: &str, message: &str| json!({"phase": "Pending", "containerStatuses": container(json!({"waiting": {"reason": reason, "message": message}}))});
        let ended =
            |state: Value| json!({"phase": "Failed", "containerStatuses": container(json!({"terminated": state}))});
        let ready = json!({"phase": "Running", "conditions": conditions(&[("Ready", "True")])});
        let unseen =
            json!({"phase": "Running", "conditions": conditions(&[("Ready", "False"), ("ContainersReady", "True")])});
        let busy =
            json!({"phase": "Running", "conditions": conditions(&[("Ready", "False"), ("ContainersReady", "False")])});
        let homeless = json!({"phase": "Pending", "conditions":
            [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no room"}]});
        for (status, expected) in [
            (json!({}), "starting "),
            (waits("ContainerCreating", ""), "starting "),
            (waits("ImagePullBackOff", "no such image"), "starting ImagePullBackOff: no such image"),
            (homeless, "starting Unschedulable: no room"),
            (busy, "starting "),
            (
                json!({"phase": "Running", "containerStatuses": container(json!({"running": {"startedAt": "2026-01-01T00:00:00Z"}}))}),
                "starting its container runs since 2026-01-01T00:00:00Z and accepts no connections",
            ),
            (ready, "running"),
            (unseen, "unknown its node does not answer"),
            (
                ended(json!({"exitCode": 3, "reason": "Error", "message": "cannot open the disk\nbye"})),
                "failed it ended with exit code 3; its log ends with: cannot open the disk | bye",
            ),
            (ended(json!({"exitCode": 0, "reason": "Completed"})), "failed it ended with exit code 0"),
            (ended(json!({"exitCode": 137, "signal": 9})), "failed it was killed by signal 9"),
            (
                ended(json!({"exitCode": 137, "reason": "OOMKilled"})),
                "failed it was killed because it took more memory than its limit (OOMKilled)",
            ),
            (
                json!({"phase": "Failed", "reason": "Evicted", "message": "low on disk"}),
                "failed its node ended or refused it: Evicted: low on disk",
            ),
        ] {
            assert_eq!(said(of(&pod(status.clone()), None)), expected, "{status}");
        }
        let mut late = ended(json!({"exitCode": 137, "reason": "Error"}));
        late["containerStatuses"][0]["started"] = false.into();
        assert_eq!(said(of(&pod(late), None)), "failed it ended with exit code 137 before it was ready");
    }

    #[test]
    fn what_a_pod_says_counts_only_while_its_node_answers() {
        let node = |conditions: Value| -> Node {
            serde_json::from_value(json!({"status": {"conditions": conditions}})).unwrap()
        };
        let silent = node(json!([{"type": "Ready", "status": "Unknown", "message": "kubelet stopped posting"}]));
        let silent = NodeView::of(Some(&silent));
        let waits = pod(json!({"phase": "Pending"}));
        assert_eq!(said(of(&waits, Some(&silent))), "unknown its node is not ready: kubelet stopped posting");
        assert_eq!(said(of(&waits, Some(&NodeView::of(None)))), "unknown the cluster does not have this node");
        assert_eq!(NodeView::of(Some(&node(conditions(&[("Ready", "True")])))), NodeView::Answers);
        // Its end was reported while the node still answered.
        let ended = pod(json!({"phase": "Failed"}));
        assert_eq!(said(of(&ended, Some(&silent))), "failed its pod ended");
        assert!(depends_on_node(&waits) && !depends_on_node(&ended));
    }

    #[test]
    fn a_pod_that_somebody_deletes_does_not_run_any_more() {
        let mut pod = pod(json!({"phase": "Running", "conditions": conditions(&[("Ready", "True")])}));
        pod.metadata.deletion_timestamp = Some(serde_json::from_value(json!("2026-01-01T00:00:00Z")).unwrap());
        assert_eq!(said(of(&pod, None)), "failed its pod is being deleted");
        assert!(why_it_stays(&of(&pod, None), &pod).contains("still being ended"));
        pod.metadata.finalizers = Some(vec!["example.org/keep".into()]);
        assert!(why_it_stays(&of(&pod, None), &pod).contains("example.org/keep"));
    }
}

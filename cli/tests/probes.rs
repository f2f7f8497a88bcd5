//! `/readyz` of every role says whether it does what it promises now; `/healthz` only that it answers.

mod roles;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use roles::{Cluster, ask, get, wait, wait_for};

fn becomes_ready(what: &str, address: SocketAddr) {
    wait(what, || get(address, "/readyz"));
}

/// Waits until it is not ready, and why.
fn becomes_unready(what: &str, address: SocketAddr, limit: Duration) -> String {
    wait_for(limit, what, || match ask(address, "GET", "/readyz", "")? {
        (503, missing) => Ok(missing),
        (code, text) => Err(format!("{code} {text}")),
    })
}

#[test]
#[ignore = "needs a kube-apiserver: make cluster-test"]
fn a_role_is_ready_while_it_does_what_it_promises() {
    let Some(mut cluster) = Cluster::begin() else { return };
    let (_node, node) = cluster.node();
    let (_one, one) = cluster.controller("one", &cluster.admin());
    let (_two, two) = cluster.controller("two", &cluster.admin());
    let (_instance, instance) = cluster.instance(&cluster.admin());
    let all = [("node", node), ("one", one), ("two", two), ("instance", instance)];
    all.iter().for_each(|(name, address)| becomes_ready(name, *address));

    for (name, address) in [("node", node), ("one", one)] {
        let (socket, away) = (cluster.path(&format!("{name}.sock")), cluster.path("away"));
        std::fs::rename(&socket, &away).unwrap();
        let missing = becomes_unready("its socket is away", address, Duration::from_secs(20));
        assert_eq!(missing, format!("the CSI socket `{socket}` does not answer"));
        assert_eq!(get(address, "/healthz").as_deref(), Ok("ok"));
        std::fs::rename(&away, &socket).unwrap();
        becomes_ready("its socket is back", address);
    }

    cluster.server.ask("stop");
    let stopped = Instant::now();
    for (name, address) in [("one", one), ("two", two)] {
        let missing = becomes_unready(name, address, Duration::from_secs(90));
        // An API server that starts anew is back by then.
        assert!(stopped.elapsed() > Duration::from_secs(50), "{:?}: {missing}", stopped.elapsed());
        assert!(missing.starts_with("the Kubernetes API has not answered for 6"), "{missing}");
        assert_eq!(get(address, "/healthz").as_deref(), Ok("ok"), "nobody is to kill it for that");
    }
    // Its node would be out of service.
    assert_eq!(get(instance, "/readyz").as_deref(), Ok("ok"));
    cluster.server.ask("start");
    all.iter().for_each(|(name, address)| becomes_ready(name, *address));
}

/// Everything but Secrets, where the webhook's certificate lies.
const WITHOUT_SECRETS: &str = r#"{"apiVersion":"rbac.authorization.k8s.io/v1","kind":"ClusterRole","metadata":{"name":"some"},"rules":[
    {"apiGroups":["longhorn.io","coordination.k8s.io","admissionregistration.k8s.io"],"resources":["*"],"verbs":["*"]},
    {"apiGroups":[""],"resources":["pods","nodes","events"],"verbs":["*"]}]}"#;

#[test]
#[ignore = "needs a kube-apiserver: make cluster-test"]
fn a_controller_is_not_ready_before_its_webhook_has_a_certificate() {
    let Some(cluster) = Cluster::begin() else { return };
    cluster.kubectl(&["create", "-f", "-"], WITHOUT_SECRETS);
    cluster.kubectl(&["create", "clusterrolebinding", "some", "--clusterrole=some", "--user=some"], "");
    let (_controller, address) = cluster.controller("c", somebody(&cluster).as_ref());
    lacks_only(address, "the admission webhook does not listen yet: it has no certificate, the log says why");
    let create = ["create", "clusterrole", "secrets", "--verb=*", "--resource=secrets"];
    cluster.kubectl(&create, "");
    cluster.kubectl(&["create", "clusterrolebinding", "secrets", "--clusterrole=secrets", "--user=some"], "");
    becomes_ready("it has a certificate", address);
}

/// Reads everything, and may not say what it saw.
const MUTE: &str = r#"{"apiVersion":"rbac.authorization.k8s.io/v1","kind":"ClusterRole","metadata":{"name":"mute"},"rules":[
    {"apiGroups":["longhorn.io"],"resources":["*"],"verbs":["get","list","watch","create"]},
    {"apiGroups":[""],"resources":["nodes"],"verbs":["get","list","watch"]}]}"#;

#[test]
#[ignore = "needs a kube-apiserver: make cluster-test"]
fn an_instance_is_not_ready_before_it_has_reported_its_disks() {
    let Some(cluster) = Cluster::begin() else { return };
    cluster.kubectl(&["create", "-f", "-"], MUTE);
    cluster.kubectl(&["create", "clusterrolebinding", "mute", "--clusterrole=mute", "--user=some"], "");
    let (_instance, address) = cluster.instance(somebody(&cluster).as_ref());
    let missing = "the first look at the disks and replicas of this node is not over; the log says what it meets";
    lacks_only(address, missing);
    let may = ["create", "clusterrole", "report", "--verb=*", "--resource=nodes.longhorn.io/status"];
    cluster.kubectl(&may, "");
    cluster.kubectl(&["create", "clusterrolebinding", "report", "--clusterrole=report", "--user=some"], "");
    becomes_ready("it reports", address);
}

/// Waits until nothing but this is missing.
fn lacks_only(address: SocketAddr, what: &str) {
    wait(what, || match ask(address, "GET", "/readyz", "")? {
        (503, missing) if missing == what => Ok(()),
        (code, text) => Err(format!("{code} {text}")),
    });
}

/// The credentials of the user `some`.
fn somebody(cluster: &Cluster) -> String {
    let text = std::fs::read_to_string(cluster.admin()).unwrap();
    let mut file: serde_json::Value = serde_yaml_ng::from_str(&text).unwrap();
    file["users"][0]["user"]["as"] = "some".into();
    let path = cluster.path("some.kubeconfig");
    std::fs::write(&path, file.to_string()).unwrap();
    path
}

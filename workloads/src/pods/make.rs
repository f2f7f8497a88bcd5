//! The pod of a workload: what it runs, and how little it may do.

use std::collections::BTreeMap;

use api::Owner;
use api::names::{AGENT_UID, DISK_MOUNT, GROUP, MANAGED_BY, VERSION, label};
use k8s_openapi::api::core::v1::{
    Capabilities, Container, ContainerPort, EnvVar, EnvVarSource, HostPathVolumeSource, LocalObjectReference,
    ObjectFieldSelector, Pod, PodSecurityContext, PodSpec, Probe, ResourceRequirements, SeccompProfile, Secret,
    SecretKeySelector, SecurityContext, TCPSocketAction, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::{PodsConfig, limits};
use crate::{WorkloadError, WorkloadSpec};

/// What the workload was started as (JSON).
const SPEC: &str = "longhorn.io/workload";
/// The image as it was asked for. What stands in the pod may be another name of it: clusters rewrite images to their own registry.
const IMAGE: &str = "longhorn.io/workload-image";
/// The name of the one container: a role of the workload in Longhorn's words, where it says one.
const CONTAINER: &str = "workload";
/// The name of the volume that is the disk.
const DISK: &str = "disk";

/// What the scheduler counts with, and what the kernel enforces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resources {
    pub cpu_request: String,
    pub memory_request: String,
    pub cpu_limit: String,
    pub memory_limit: String,
}

impl Default for Resources {
    /// Files go through the page cache, which is given back under pressure: the limit of memory is for what the process itself needs.
    fn default() -> Self {
        let text = str::to_owned;
        Resources {
            cpu_request: text("20m"),
            memory_request: text("64Mi"),
            cpu_limit: text("4"),
            memory_limit: text("1Gi"),
        }
    }
}

/// Selects the pods that may be ours.
pub fn selector() -> String {
    format!("{}={MANAGED_BY}", label::MANAGED_BY)
}

/// What a pod of ours was started as. A copy of one under another name is none of ours (`kubectl debug --copy-to`).
pub fn spec_of(pod: &Pod) -> Option<WorkloadSpec> {
    let spec: WorkloadSpec = serde_json::from_str(pod.metadata.annotations.as_ref()?.get(SPEC)?).ok()?;
    Some(spec).filter(|spec| Some(&spec.name) == pod.metadata.name.as_ref())
}

/// Whether a pod was made for another image than pods are now.
pub fn is_outdated(pod: &Pod, config: &PodsConfig) -> bool {
    pod.metadata.annotations.as_ref().and_then(|all| all.get(IMAGE)) != Some(&config.image)
}

/// The object with which a pod goes, also when it is removed by force while we are away. It never waits for the pod, so nobody needs
/// a right to say so.
fn owner(owner: &Owner) -> OwnerReference {
    OwnerReference {
        api_version: format!("{GROUP}/{VERSION}"),
        kind: owner.kind.clone(),
        name: owner.name.clone(),
        uid: owner.uid.clone(),
        controller: Some(true),
        block_owner_deletion: None,
    }
}

/// The pod of a workload.
pub fn pod(spec: &WorkloadSpec, config: &PodsConfig) -> Result<Pod, WorkloadError> {
    let invalid = |reason: String| WorkloadError::Invalid { name: spec.name.clone(), reason };
    let Some(disk) = spec.disk_path.to_str().filter(|path| path.starts_with('/')) else {
        return Err(invalid(format!("its disk `{}` is no absolute path", spec.disk_path.display())));
    };
    let written = serde_json::to_string(spec).map_err(|error| invalid(error.to_string()))?;
    let mut labels = spec.labels.clone();
    labels.insert(label::MANAGED_BY.into(), MANAGED_BY.into());
    let pull_secrets = config.pull_secrets.iter().map(|name| LocalObjectReference { name: name.clone() });
    let uid = i64::from(AGENT_UID);
    Ok(Pod {
        metadata: ObjectMeta {
            name: Some(spec.name.clone()),
            namespace: Some(config.namespace.clone()),
            labels: Some(labels),
            annotations: Some(BTreeMap::from([(SPEC.to_owned(), written), (IMAGE.to_owned(), config.image.clone())])),
            owner_references: spec.owner.as_ref().map(|of| vec![owner(of)]),
            ..ObjectMeta::default()
        },
        spec: Some(PodSpec {
            // Past the scheduler: it must run where its disk is, also when nothing else may be placed there.
            node_name: Some(spec.node.to_string()),
            restart_policy: Some("Never".into()),
            service_account_name: Some(config.service_account.clone()),
            automount_service_account_token: Some(false),
            enable_service_links: Some(false),
            termination_grace_period_seconds: Some(i64::from(limits::STOP_GRACE_SECONDS)),
            priority_class_name: config.priority_class.clone(),
            tolerations: Some(config.tolerations.clone()).filter(|all| !all.is_empty()),
            image_pull_secrets: Some(pull_secrets.collect::<Vec<_>>()).filter(|all| !all.is_empty()),
            security_context: Some(PodSecurityContext {
                run_as_non_root: Some(true),
                run_as_user: Some(uid),
                run_as_group: Some(uid),
                seccomp_profile: Some(SeccompProfile { type_: "RuntimeDefault".into(), localhost_profile: None }),
                ..PodSecurityContext::default()
            }),
            volumes: Some(vec![Volume {
                name: DISK.into(),
                // It must be there: an empty directory must not take the place of a disk that is not mounted.
                host_path: Some(HostPathVolumeSource { path: disk.into(), type_: Some("Directory".into()) }),
                ..Volume::default()
            }]),
            containers: vec![container(spec, disk, config)],
            ..PodSpec::default()
        }),
        status: None,
    })
}

/// What holds the secrets of a workload, where it has any. It is never changed, and goes with the owner; nobody needs a right but to
/// make it.
pub fn secret(spec: &WorkloadSpec, config: &PodsConfig) -> Option<Secret> {
    (!spec.secrets.0.is_empty()).then(|| Secret {
        metadata: ObjectMeta {
            name: Some(secret_name(spec)),
            namespace: Some(config.namespace.clone()),
            labels: Some(BTreeMap::from([(label::MANAGED_BY.to_owned(), MANAGED_BY.to_owned())])),
            owner_references: spec.owner.as_ref().map(|of| vec![owner(of)]),
            ..ObjectMeta::default()
        },
        immutable: Some(true),
        string_data: Some(spec.secrets.0.clone()),
        ..Secret::default()
    })
}

fn secret_name(spec: &WorkloadSpec) -> String {
    format!("{}-{}", spec.name, spec.revision)
}

fn container(spec: &WorkloadSpec, disk: &str, config: &PodsConfig) -> Container {
    let startup = limits::STARTUP_PERIOD_SECONDS;
    Container {
        name: CONTAINER.into(),
        image: Some(config.image.clone()),
        image_pull_policy: config.pull_policy.clone(),
        args: Some(spec.args.iter().map(|arg| inside(arg, disk)).collect()),
        env: Some(environment(spec)),
        ports: Some(spec.ready_ports.iter().map(|port| port_of(*port)).collect()),
        resources: Some(requirements(&config.resources)),
        volume_mounts: Some(vec![VolumeMount {
            name: DISK.into(),
            mount_path: DISK_MOUNT.into(),
            ..VolumeMount::default()
        }]),
        // Why it ended is found in the pod itself, which needs no right to read logs.
        termination_message_policy: Some("FallbackToLogsOnError".into()),
        startup_probe: probe(spec, startup, limits::STARTUP_FAILURES),
        readiness_probe: probe(spec, limits::READINESS_PERIOD_SECONDS, 3),
        security_context: Some(SecurityContext {
            allow_privilege_escalation: Some(false),
            privileged: Some(false),
            read_only_root_filesystem: Some(true),
            capabilities: Some(Capabilities { add: None, drop: Some(vec!["ALL".into()]) }),
            ..SecurityContext::default()
        }),
        ..Container::default()
    }
}

/// An argument as the container must see it: the disk lies elsewhere there.
fn inside(arg: &str, disk: &str) -> String {
    let disk = disk.trim_end_matches('/');
    match arg.strip_prefix(disk) {
        Some(rest) if !disk.is_empty() && (rest.is_empty() || rest.starts_with('/')) => {
            format!("{DISK_MOUNT}{}", rest.trim_end_matches('/'))
        }
        _ => arg.to_owned(),
    }
}

/// POD_IP first: Kubernetes replaces `$(POD_IP)` in arguments by it.
fn environment(spec: &WorkloadSpec) -> Vec<EnvVar> {
    let field = ObjectFieldSelector { api_version: None, field_path: "status.podIP".into() };
    let source = EnvVarSource { field_ref: Some(field), ..EnvVarSource::default() };
    let ip = EnvVar { name: "POD_IP".into(), value: None, value_from: Some(source) };
    let more = spec.env.iter().filter(|(name, _)| *name != "POD_IP");
    let more = more.map(|(name, value)| EnvVar { name: name.clone(), value: Some(value.clone()), value_from: None });
    let secret = |name: &String| {
        let key = SecretKeySelector { name: secret_name(spec), key: name.clone(), optional: None };
        let source = EnvVarSource { secret_key_ref: Some(key), ..EnvVarSource::default() };
        EnvVar { name: name.clone(), value: None, value_from: Some(source) }
    };
    std::iter::once(ip).chain(more).chain(spec.secrets.0.keys().map(secret)).collect()
}

fn port_of(port: u16) -> ContainerPort {
    ContainerPort { container_port: port.into(), protocol: Some("TCP".into()), ..ContainerPort::default() }
}

/// Roles listen on all of their ports before they accept on one, so the first one tells.
fn probe(spec: &WorkloadSpec, period_seconds: i32, failures: i32) -> Option<Probe> {
    let port = IntOrString::Int((*spec.ready_ports.first()?).into());
    Some(Probe {
        tcp_socket: Some(TCPSocketAction { host: None, port }),
        period_seconds: Some(period_seconds),
        timeout_seconds: Some(limits::PROBE_TIMEOUT_SECONDS),
        failure_threshold: Some(failures),
        ..Probe::default()
    })
}

fn requirements(resources: &Resources) -> ResourceRequirements {
    let of = |cpu: &str, memory: &str| {
        let given = [("cpu", cpu), ("memory", memory)].into_iter().filter(|(_, quantity)| !quantity.is_empty());
        Some(given.map(|(name, quantity)| (name.to_owned(), Quantity(quantity.to_owned()))).collect())
    };
    ResourceRequirements {
        requests: of(&resources.cpu_request, &resources.memory_request),
        limits: of(&resources.cpu_limit, &resources.memory_limit),
        claims: None,
    }
}

#[cfg(test)]
mod tests {
    use api::Secrets;
    use serde_json::{Value, json};

    use super::*;

    fn spec() -> WorkloadSpec {
        let args =
            ["backing-image-manager", "daemon", "--listen", "$(POD_IP):8000", "--disk-path", "/var/lib/longhorn"];
        WorkloadSpec {
            name: "bim-1".into(),
            node: "n1".parse().unwrap(),
            labels: [(label::COMPONENT.to_owned(), "backing-image-manager".to_owned())].into(),
            args: args.map(str::to_owned).into(),
            env: [("POD_IP".to_owned(), "10.0.0.1".to_owned()), ("RUST_LOG".to_owned(), "debug".to_owned())].into(),
            disk_path: "/var/lib/longhorn".into(),
            ready_ports: vec![8000, 8001],
            owner: None,
            secrets: Secrets::default(),
            revision: String::new(),
        }
    }

    #[test]
    fn no_secret_stands_in_a_pod() {
        let config = PodsConfig::new("longhorn-system", "i", "a");
        let secrets = Secrets([("ADDRESS".to_owned(), "http://user:word@host".to_owned())].into());
        let spec = WorkloadSpec { secrets, revision: "abc-1".into(), ..spec() };
        let (pod, secret) = (pod(&spec, &config).unwrap(), secret(&spec, &config).unwrap());
        assert!(spec_of(&pod).unwrap().is_same(&spec));
        assert!(!serde_json::to_string(&pod).unwrap().contains("word"));
        let container = json!(pod.spec.unwrap().containers[0]);
        let name = secret.metadata.name.clone().unwrap();
        let referred = json!({"name": "ADDRESS", "valueFrom": {"secretKeyRef": {"name": name, "key": "ADDRESS"}}});
        assert!(container["env"].as_array().unwrap().contains(&referred), "{container}");
        assert_eq!(json!(secret)["stringData"], json!({"ADDRESS": "http://user:word@host"}));
        assert_eq!(json!(secret)["immutable"], true, "a revision never changes");
        let [kind, owner, uid] = ["BackingImageDataSource", "a", "u"].map(str::to_owned);
        let owned = WorkloadSpec { owner: Some(Owner { kind, name: owner, uid }), ..spec.clone() };
        let owners = |secret: Option<Secret>| secret.unwrap().metadata.owner_references.map(|all| all[0].uid.clone());
        assert_eq!(owners(super::secret(&owned, &config)).as_deref(), Some("u"), "it goes with its object");
        let other = WorkloadSpec { revision: "abc-2".into(), ..spec.clone() };
        assert_ne!(super::secret(&other, &config).unwrap().metadata.name, Some(name));
        let none = WorkloadSpec { secrets: Secrets::default(), ..spec };
        assert_eq!(super::secret(&none, &config), None);
    }

    fn made(config: &PodsConfig) -> Value {
        serde_json::to_value(pod(&spec(), config).unwrap()).unwrap()
    }

    #[test]
    fn a_pod_may_do_nothing_but_work_on_its_disk() {
        let pod = made(&PodsConfig::new("longhorn-system", "example.org/driver:1", "agent"));
        let (of_pod, container) = (&pod["spec"], &pod["spec"]["containers"][0]);
        assert_eq!(pod["metadata"]["namespace"], "longhorn-system");
        assert_eq!((&of_pod["nodeName"], &of_pod["restartPolicy"]), (&json!("n1"), &json!("Never")));
        assert_eq!(of_pod["automountServiceAccountToken"], false);
        assert_eq!(of_pod["enableServiceLinks"], false, "nothing is told of the other services of the namespace");
        // Also when somebody else removes it, such as a drain.
        assert_eq!(of_pod["terminationGracePeriodSeconds"], limits::STOP_GRACE_SECONDS);
        assert_eq!(of_pod["serviceAccountName"], "agent");
        assert_eq!(
            of_pod["securityContext"],
            json!({"runAsNonRoot": true, "runAsUser": AGENT_UID, "runAsGroup": AGENT_UID,
                "seccompProfile": {"type": "RuntimeDefault"}})
        );
        assert_eq!(
            container["securityContext"],
            json!({"allowPrivilegeEscalation": false, "privileged": false, "readOnlyRootFilesystem": true,
                "capabilities": {"drop": ["ALL"]}})
        );
        // Why it ended is told by that.
        assert_eq!(container["terminationMessagePolicy"], "FallbackToLogsOnError");
        for shared in ["hostNetwork", "hostPID", "hostIPC"] {
            assert!(of_pod[shared].is_null(), "{shared}");
        }
        let disk = json!([{"name": "disk", "hostPath": {"path": "/var/lib/longhorn", "type": "Directory"}}]);
        assert_eq!(of_pod["volumes"], disk);
        assert_eq!(container["volumeMounts"], json!([{"name": "disk", "mountPath": "/data"}]));
        let resources = &container["resources"];
        assert_eq!(resources["requests"], json!({"cpu": "20m", "memory": "64Mi"}));
        assert_eq!(resources["limits"], json!({"cpu": "4", "memory": "1Gi"}));
        for probe in ["startupProbe", "readinessProbe"] {
            assert_eq!(container[probe]["tcpSocket"]["port"], 8000, "{probe}");
        }
    }

    #[test]
    fn a_pod_sees_its_disk_at_its_own_place_and_its_own_address() {
        let pod = made(&PodsConfig::new("longhorn-system", "example.org/driver:1", "agent"));
        let container = &pod["spec"]["containers"][0];
        assert_eq!(
            container["args"],
            json!(["backing-image-manager", "daemon", "--listen", "$(POD_IP):8000", "--disk-path", "/data"])
        );
        assert!(container["command"].is_null(), "the image knows where our binary is");
        let ip = json!({"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}});
        assert_eq!(container["env"], json!([ip, {"name": "RUST_LOG", "value": "debug"}]));
        for (arg, expected) in [
            ("/disk", "/data"),
            ("/disk/", "/data"),
            ("/disk/tmp", "/data/tmp"),
            ("/disk-2", "/disk-2"),
            ("url=http://x/disk", "url=http://x/disk"),
        ] {
            assert_eq!(inside(arg, "/disk"), expected);
            assert_eq!(inside(arg, "/disk/"), expected);
        }
        assert_eq!(inside("/anything", "/"), "/anything");
    }

    #[test]
    fn a_pod_is_found_again_and_known_by_what_it_was_made_from() {
        let pod = pod(&spec(), &PodsConfig::new("longhorn-system", "i", "a")).unwrap();
        assert_eq!(spec_of(&pod), Some(spec()));
        let mut copy = pod.clone();
        copy.metadata.name = Some("bim-1-debug".into());
        assert_eq!(spec_of(&copy), None);
        let labels = pod.metadata.labels.unwrap();
        assert_eq!(labels[label::COMPONENT], "backing-image-manager");
        assert_eq!(format!("{}={}", label::MANAGED_BY, labels[label::MANAGED_BY]), selector());
    }

    #[test]
    fn a_pod_has_what_the_administrator_asked_for() {
        let usual = PodsConfig::new("longhorn-system", "i", "a");
        let bare = made(&usual);
        assert!(bare["spec"]["tolerations"].is_null() && bare["spec"]["imagePullSecrets"].is_null());
        let pod = made(&PodsConfig {
            pull_policy: Some("Never".into()),
            pull_secrets: vec!["registry".into()],
            priority_class: Some("high".into()),
            tolerations: super::super::tolerations("a=b:NoExecute").unwrap(),
            resources: Resources { cpu_limit: String::new(), ..Resources::default() },
            ..usual
        });
        let (of_pod, container) = (&pod["spec"], &pod["spec"]["containers"][0]);
        assert_eq!(container["imagePullPolicy"], "Never");
        assert_eq!(of_pod["imagePullSecrets"], json!([{"name": "registry"}]));
        assert_eq!(of_pod["priorityClassName"], "high");
        assert_eq!(
            of_pod["tolerations"],
            json!([{"key": "a", "operator": "Equal", "value": "b", "effect": "NoExecute"}])
        );
        assert_eq!(container["resources"]["limits"], json!({"memory": "1Gi"}));
    }

    #[test]
    fn a_pod_goes_with_its_object_and_knows_its_image() {
        let config = PodsConfig::new("longhorn-system", "example.org/driver:1", "agent");
        assert!(made(&config)["metadata"]["ownerReferences"].is_null());
        let [kind, name, uid] = ["BackingImageManager", "bim-1", "u"].map(str::to_owned);
        let owned = WorkloadSpec { owner: Some(Owner { kind, name, uid }), ..spec() };
        let mut pod = pod(&owned, &config).unwrap();
        assert_eq!(
            serde_json::to_value(&pod).unwrap()["metadata"]["ownerReferences"],
            json!([{"apiVersion": "longhorn.io/v1beta2", "kind": "BackingImageManager", "name": "bim-1", "uid": "u",
                "controller": true}])
        );
        assert_eq!(spec_of(&pod), Some(owned));
        // As a cluster with a registry of its own writes it.
        pod.spec.as_mut().unwrap().containers[0].image = Some("mirror.local/driver:1".into());
        assert!(!is_outdated(&pod, &config));
        assert!(is_outdated(&pod, &PodsConfig { image: "example.org/driver:2".into(), ..config }));
    }

    #[test]
    fn a_disk_must_be_an_absolute_path() {
        let spec = WorkloadSpec { disk_path: "disk".into(), ..spec() };
        let error = pod(&spec, &PodsConfig::new("n", "i", "a")).unwrap_err();
        assert_eq!(error.kind(), api::ErrorKind::Invalid);
    }
}

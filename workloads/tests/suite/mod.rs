//! What every place for workloads promises. Each function takes an empty one.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use backing_image_workloads::{Workload, WorkloadSpec, WorkloadState, Workloads};
use futures::StreamExt;

/// All promises, for a macro that makes a test of each.
macro_rules! promises {
    ($with:ident) => {
        $with! {
            runs_once_its_ports_accept_connections
            starts_a_name_once
            gives_each_an_address_of_its_own
            notices_the_end_of_a_process_and_says_why
            notices_a_process_that_never_gets_ready
            removes_without_a_trace
            removes_one_that_just_starts
            tells_listeners_of_every_change
            refuses_a_name_that_is_no_name
            hands_secrets_to_the_process_alone
        }
    };
}
pub(crate) use promises;

pub type Any = Arc<dyn Workloads>;

/// The port on which the program of the tests listens.
pub const PORT: u16 = 8000;

/// A workload that runs the program of the tests in one of its roles.
pub fn spec(name: &str, role: &str) -> WorkloadSpec {
    WorkloadSpec {
        name: name.into(),
        node: "node-1".parse().unwrap(),
        labels: BTreeMap::from([("role".to_owned(), role.to_owned())]),
        args: ["program::plays_a_role", "--exact", "--nocapture", "listen=$(POD_IP)"].map(str::to_owned).to_vec(),
        env: BTreeMap::from([("WORKLOADS_TEST_ROLE".to_owned(), role.to_owned())]),
        disk_path: PathBuf::from("/"),
        ready_ports: vec![PORT],
        owner: None,
        secrets: Default::default(),
        revision: String::new(),
    }
}

/// Waits until the workload is in a state; fails after a while.
pub async fn wait_for(workloads: &Any, name: &str, wanted: impl Fn(&WorkloadState) -> bool) -> Workload {
    let mut changes = workloads.changes();
    let waiting = async {
        loop {
            if let Some(workload) = workloads.get(name).await.unwrap()
                && wanted(&workload.state)
            {
                return workload;
            }
            changes.next().await.expect("changes never end");
        }
    };
    match tokio::time::timeout(Duration::from_secs(30), waiting).await {
        Ok(workload) => workload,
        Err(_) => panic!("{name} is {:?}", workloads.get(name).await),
    }
}

pub async fn wait_until_running(workloads: &Any, name: &str) -> Workload {
    wait_for(workloads, name, |state| *state == WorkloadState::Running).await
}

pub async fn wait_until_failed(workloads: &Any, name: &str) -> String {
    let failed = wait_for(workloads, name, |state| matches!(state, WorkloadState::Failed { .. })).await;
    let WorkloadState::Failed { message } = failed.state else { unreachable!() };
    message
}

/// Asks a running program one of its questions.
pub async fn ask(workload: &Workload, question: &str) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::TcpStream::connect((workload.ip.unwrap(), PORT)).await.unwrap();
    stream.write_all(format!("{question}\n").as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

pub async fn runs_once_its_ports_accept_connections(workloads: Any) {
    let started = workloads.ensure(&spec("a", "serve")).await.unwrap();
    assert_eq!(started.spec, spec("a", "serve"));
    assert!(matches!(started.state, WorkloadState::Starting { .. }), "{:?}", started.state);
    let running = wait_until_running(&workloads, "a").await;
    assert!(started.ip.is_none_or(|ip| running.ip == Some(ip)));
    assert_eq!(ask(&running, "ip").await, running.ip.unwrap().to_string(), "POD_IP is its address");
    let listed: Vec<_> = workloads.list().await.unwrap().into_iter().map(|w| (w.spec.name, w.state)).collect();
    assert_eq!(listed, [("a".to_owned(), WorkloadState::Running)]);
    assert!(workloads.get("b").await.unwrap().is_none());
}

pub async fn starts_a_name_once(workloads: Any) {
    let all = futures::future::join_all((0..8).map(|_| async { workloads.ensure(&spec("a", "serve")).await })).await;
    assert!(all.iter().all(Result::is_ok));
    let running = wait_until_running(&workloads, "a").await;
    let first = ask(&running, "pid").await;
    workloads.ensure(&spec("a", "serve")).await.unwrap();
    assert_eq!(ask(&running, "pid").await, first);
    let error = workloads.ensure(&spec("a", "late")).await.unwrap_err();
    assert_eq!(error.to_string(), "workload `a` runs with another specification");
    assert_eq!(error.kind(), api::ErrorKind::Incompatible);
}

pub async fn gives_each_an_address_of_its_own(workloads: Any) {
    for name in ["a", "b", "c"] {
        workloads.ensure(&spec(name, "serve")).await.unwrap();
    }
    let mut addresses = std::collections::BTreeSet::new();
    for name in ["a", "b", "c"] {
        let running = wait_until_running(&workloads, name).await;
        assert_eq!(ask(&running, "ip").await, running.ip.unwrap().to_string());
        addresses.insert(running.ip);
    }
    assert_eq!(addresses.len(), 3, "all listen on one port");
}

pub async fn notices_the_end_of_a_process_and_says_why(workloads: Any) {
    workloads.ensure(&spec("a", "serve")).await.unwrap();
    let running = wait_until_running(&workloads, "a").await;
    ask(&running, "exit").await;
    let message = wait_until_failed(&workloads, "a").await;
    assert!(message.starts_with("it ended with exit code 7; its log ends with: "), "{message}");
    assert!(message.contains("as I was told"), "{message}");
    // It stays failed until somebody removes it.
    let again = workloads.ensure(&spec("a", "serve")).await.unwrap();
    assert!(matches!(again.state, WorkloadState::Failed { .. }));
    workloads.remove("a").await.unwrap();
    workloads.ensure(&spec("a", "serve")).await.unwrap();
    wait_until_running(&workloads, "a").await;
}

pub async fn notices_a_process_that_never_gets_ready(workloads: Any) {
    workloads.ensure(&spec("broken", "broken")).await.unwrap();
    let message = wait_until_failed(&workloads, "broken").await;
    assert!(message.contains("exit code 3") && message.contains("cannot open the disk"), "{message}");
}

pub async fn removes_without_a_trace(workloads: Any) {
    workloads.ensure(&spec("a", "serve")).await.unwrap();
    let running = wait_until_running(&workloads, "a").await;
    let mut changes = workloads.changes();
    workloads.remove("a").await.unwrap();
    assert!(workloads.get("a").await.unwrap().is_none());
    assert!(tokio::net::TcpStream::connect((running.ip.unwrap(), PORT)).await.is_err());
    assert_eq!(changes.next().await.unwrap(), "a");
    workloads.remove("a").await.unwrap();
    workloads.remove("never-was").await.unwrap();
}

pub async fn removes_one_that_just_starts(workloads: Any) {
    for _ in 0..5 {
        workloads.ensure(&spec("a", "late")).await.unwrap();
        workloads.remove("a").await.unwrap();
        assert!(workloads.get("a").await.unwrap().is_none());
    }
}

pub async fn tells_listeners_of_every_change(workloads: Any) {
    let mut changes = workloads.changes();
    workloads.ensure(&spec("a", "serve")).await.unwrap();
    // Each state comes with a change after which it is seen; more changes than states do no harm.
    for wanted in ["starting", "running", "failed"] {
        let heard = async {
            loop {
                assert_eq!(changes.next().await.unwrap(), "a");
                let workload = workloads.get("a").await.unwrap().unwrap();
                let is_seen = match workload.state {
                    // It may be ready before somebody looks.
                    WorkloadState::Starting { .. } | WorkloadState::Running if wanted == "starting" => true,
                    WorkloadState::Running => wanted == "running",
                    WorkloadState::Failed { .. } => wanted == "failed",
                    _ => false,
                };
                if is_seen {
                    return workload;
                }
            }
        };
        let seen = tokio::time::timeout(Duration::from_secs(30), heard).await.expect(wanted);
        if wanted == "running" {
            ask(&seen, "exit").await;
        }
    }
}

pub async fn hands_secrets_to_the_process_alone(workloads: Any) {
    let mut spec = spec("a", "");
    spec.secrets.0 = std::mem::take(&mut spec.env);
    spec.secrets.0.insert("WORKLOADS_TEST_ROLE".into(), "serve".into());
    spec.revision = "u-1".into();
    workloads.ensure(&spec).await.unwrap();
    // The program does nothing without its role.
    let running = wait_until_running(&workloads, "a").await;
    assert!(!format!("{running:?}").contains("serve"), "{running:?}");
    workloads.ensure(&spec).await.unwrap();
    let other = WorkloadSpec { revision: "u-2".into(), ..spec };
    let refused = workloads.ensure(&other).await.unwrap_err();
    assert!(matches!(refused, backing_image_workloads::WorkloadError::Different { .. }), "{refused}");
    workloads.remove("a").await.unwrap();
}

pub async fn refuses_a_name_that_is_no_name(workloads: Any) {
    for name in ["", "../a", "A", "-a", "a/b"] {
        let error = workloads.ensure(&spec(name, "serve")).await.unwrap_err();
        assert_eq!(error.kind(), api::ErrorKind::Invalid);
        assert!(error.to_string().contains("its name must be"), "{error}");
    }
}

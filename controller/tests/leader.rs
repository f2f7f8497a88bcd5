//! The lease of the reconcilers on a real API server: who leads, who follows, and that no two ever do at the same time.
//!
//! `make cluster-test` runs it; it needs the programs that `sanity-tests/cluster/build.sh` builds.

#[path = "../../sanity-tests/cluster/apiserver.rs"]
mod apiserver;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use apiserver::ApiServer;
use axum::http::Request;
use backing_image_controller::ControllerError;
use backing_image_controller::leader::{Candidate, LEASE, Term, Timing};
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Namespace;
use kube::Client;
use kube::api::{Api, PostParams};
use store::Store;
use store::kubernetes::Kubernetes;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

const LIMIT: Duration = Duration::from_secs(60);

static SERVER: tokio::sync::Mutex<Option<ApiServer>> = tokio::sync::Mutex::const_new(None);

/// A namespace with a lease of its own.
struct World {
    namespace: &'static str,
    timing: Timing,
    /// What happened, and when.
    story: Arc<Mutex<Vec<(Instant, Timestamp, String)>>>,
    working: Arc<AtomicUsize>,
}

struct Running {
    /// Its requests arrive nowhere.
    is_cut_off: Arc<AtomicBool>,
    shutdown: CancellationToken,
    task: JoinHandle<Result<(), ControllerError>>,
}

/// Tells of the work, also of its end, however it ends.
struct Work {
    story: Arc<Mutex<Vec<(Instant, Timestamp, String)>>>,
    working: Arc<AtomicUsize>,
    name: &'static str,
}

impl Work {
    fn say(&self, what: &str) {
        self.story.lock().unwrap().push((Instant::now(), Timestamp::now(), format!("{} {what}", self.name)));
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        self.working.fetch_sub(1, Ordering::SeqCst);
        self.say("stopped");
    }
}

impl World {
    async fn begin(namespace: &'static str, timing: Timing) -> Option<World> {
        let mut server = SERVER.lock().await;
        if server.is_none() {
            *server = Some(ApiServer::begin()?);
        }
        let namespaces = Api::<Namespace>::all(server.as_ref()?.client("admin").await);
        let mut new = Namespace::default();
        new.metadata.name = Some(namespace.into());
        namespaces.create(&PostParams::default(), &new).await.unwrap();
        Some(World { namespace, timing, story: Arc::default(), working: Arc::default() })
    }

    async fn client(&self) -> Client {
        SERVER.lock().await.as_ref().unwrap().client("admin").await
    }

    async fn candidate(&self, name: &'static str) -> Running {
        let is_cut_off = Arc::new(AtomicBool::new(false));
        let (client, is_silent) = (self.client().await, is_cut_off.clone());
        let service = tower::service_fn(move |request: Request<kube::client::Body>| {
            let (client, is_silent) = (client.clone(), is_silent.clone());
            async move {
                if is_silent.load(Ordering::SeqCst) {
                    std::future::pending::<()>().await;
                }
                client.send(request).await
            }
        });
        let kubernetes = Kubernetes::new(Client::new(service, self.namespace));
        let store = Store::new(Arc::new(kubernetes), self.namespace);
        let candidate = Candidate { store, identity: name.into(), timing: self.timing };
        let (shutdown, story, working) = (CancellationToken::new(), self.story.clone(), self.working.clone());
        let stop = shutdown.clone();
        let task = tokio::spawn(async move {
            let work = |term: Term| {
                let others = working.fetch_add(1, Ordering::SeqCst);
                let work = Work { story: story.clone(), working: working.clone(), name };
                async move {
                    work.say(if others == 0 { "leads" } else { "leads beside another one" });
                    term.ending.cancelled().await;
                    drop(work);
                    Ok(())
                }
            };
            candidate.run(&stop, work).await
        });
        Running { is_cut_off, shutdown, task }
    }

    /// Waits until the story says so; returns when that was.
    async fn when(&self, text: &str) -> (Instant, Timestamp) {
        let begun = Instant::now();
        loop {
            if let Some((at, time, _)) = self.story.lock().unwrap().iter().find(|(_, _, said)| said == text) {
                return (*at, *time);
            }
            assert!(begun.elapsed() < LIMIT, "not `{text}` but {:?}", self.told());
            tokio::time::sleep(Duration::from_millis(20)).await; // poll
        }
    }

    fn told(&self) -> Vec<String> {
        self.story.lock().unwrap().iter().map(|(_, _, said)| said.clone()).collect()
    }

    async fn lease(&self) -> k8s_openapi::api::coordination::v1::LeaseSpec {
        let leases = Api::<Lease>::namespaced(self.client().await, self.namespace);
        leases.get(LEASE).await.unwrap().spec.unwrap()
    }

    /// Waits until somebody who follows has seen the leader renew its lease.
    async fn renewed(&self) {
        let (before, begun) = (self.lease().await.renew_time, Instant::now());
        while self.lease().await.renew_time == before {
            assert!(begun.elapsed() < LIMIT, "it is not renewed");
            tokio::time::sleep(Duration::from_millis(50)).await; // poll
        }
    }
}

fn timing(duration: u64, deadline: u64, request: u64) -> Timing {
    let seconds = Duration::from_secs;
    Timing {
        duration: seconds(duration),
        deadline: seconds(deadline),
        period: Duration::from_millis(300),
        request: seconds(request),
    }
}

#[tokio::test]
#[ignore = "needs a kube-apiserver: make cluster-test"]
async fn one_that_is_killed_is_replaced_when_its_lease_has_run_out() {
    let Some(world) = World::begin("killed", timing(4, 3, 2)).await else { return };
    let first = world.candidate("a").await;
    world.when("a leads").await;
    let second = world.candidate("b").await;
    world.renewed().await;
    // As by SIGKILL: nothing is given back.
    first.task.abort();
    first.task.await.unwrap_err();
    let last = world.lease().await;
    assert_eq!(last.holder_identity.as_deref(), Some("a"));
    let (_, taken) = world.when("b leads").await;
    let waited = taken.duration_since(last.renew_time.unwrap().0);
    assert!(waited.as_millis() >= 4_000, "{waited}");
    let lease = world.lease().await;
    assert_eq!((lease.holder_identity.as_deref(), lease.lease_transitions), (Some("b"), Some(1)));
    assert_eq!(world.told(), ["a leads", "a stopped", "b leads"]);
    second.shutdown.cancel();
    second.task.await.unwrap().unwrap();
}

#[tokio::test]
#[ignore = "needs a kube-apiserver: make cluster-test"]
async fn one_that_cannot_renew_has_stopped_before_another_begins() {
    let Some(world) = World::begin("cut-off", timing(6, 3, 2)).await else { return };
    let first = world.candidate("a").await;
    world.when("a leads").await;
    let second = world.candidate("b").await;
    world.renewed().await;
    first.is_cut_off.store(true, Ordering::SeqCst);
    let (stopped, _) = world.when("a stopped").await;
    let (taken, _) = world.when("b leads").await;
    assert!(stopped < taken);
    // It comes back as one of the others.
    first.is_cut_off.store(false, Ordering::SeqCst);
    world.renewed().await;
    world.renewed().await;
    assert_eq!(world.told(), ["a leads", "a stopped", "b leads"]);
    for candidate in [first, second] {
        candidate.shutdown.cancel();
        candidate.task.await.unwrap().unwrap();
    }
}

#[tokio::test]
#[ignore = "needs a kube-apiserver: make cluster-test"]
async fn an_orderly_end_hands_over_at_once() {
    // So long that nobody waits for it here.
    let Some(world) = World::begin("orderly", timing(600, 500, 2)).await else { return };
    let first = world.candidate("a").await;
    world.when("a leads").await;
    let second = world.candidate("b").await;
    world.renewed().await;
    first.shutdown.cancel();
    first.task.await.unwrap().unwrap();
    world.when("b leads").await;
    assert_eq!(world.told(), ["a leads", "a stopped", "b leads"]);
    second.shutdown.cancel();
    second.task.await.unwrap().unwrap();
    assert_eq!(world.lease().await.holder_identity.as_deref(), Some(""), "it is given back");
}

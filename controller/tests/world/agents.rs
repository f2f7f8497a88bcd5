//! Fake agents and data sources: real sockets on loopback addresses, files in memory.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use api::ErrorKind;
use async_trait::async_trait;
use axum::extract::Query;
use axum::response::IntoResponse;
use futures::StreamExt;
use futures::stream::BoxStream;
use proto::bimrpc::backing_image_manager_service_server::{
    BackingImageManagerService, BackingImageManagerServiceServer,
};
use proto::bimrpc::*;
use tokio::sync::broadcast;
use tokio_stream::wrappers::{BroadcastStream, TcpListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use workloads::{Workload, WorkloadError, WorkloadSpec, WorkloadState, Workloads};

/// What the next data sources and syncs do.
#[derive(Default)]
pub struct Script {
    /// Failures of data sources to come, the first one first.
    pub source_failures: Vec<(ErrorKind, String)>,
    /// Failures of syncs to come.
    pub sync_failures: Vec<String>,
    /// The image whose copies and remains cannot be removed.
    pub undeletable: String,
    /// What agents find that is of no copy; `None`: they cannot look.
    pub remains: Option<Vec<Remains>>,
    /// What of that was removed.
    pub removed: Vec<RemoveRemainsRequest>,
    /// An agent that starts knows what lies on its disk, as if it had never ended.
    pub remembers: bool,
    /// How often each kind of request came.
    pub counts: BTreeMap<String, u32>,
}

type Disk = Arc<Mutex<BTreeMap<String, BackingImageResponse>>>;

struct Running {
    workload: Workload,
    stop: CancellationToken,
    /// Data sources are none.
    agent: Option<FakeAgent>,
}

#[derive(Clone)]
pub struct FakeWorkloads {
    running: Arc<Mutex<BTreeMap<String, Running>>>,
    /// What lies on each disk, whoever runs there.
    disks: Arc<Mutex<BTreeMap<String, Disk>>>,
    pub script: Arc<Mutex<Script>>,
    changed: broadcast::Sender<String>,
}

static NEXT_ADDRESS: AtomicU32 = AtomicU32::new(1);

fn next_ip() -> Ipv4Addr {
    let n = NEXT_ADDRESS.fetch_add(1, Ordering::Relaxed);
    Ipv4Addr::new(127, 64 + (std::process::id() % 128) as u8, (n / 250) as u8, (n % 250 + 1) as u8)
}

impl FakeWorkloads {
    pub fn new() -> FakeWorkloads {
        FakeWorkloads {
            running: Arc::default(),
            disks: Arc::default(),
            script: Arc::default(),
            changed: broadcast::channel(100).0,
        }
    }

    /// A file lies on a disk.
    pub fn put(&self, disk: &str, spec: BackingImageSpec) {
        let mut disks = self.disks.lock().unwrap();
        disks.entry(disk.to_owned()).or_default().lock().unwrap().insert(spec.name.clone(), file(spec, None));
    }

    /// An agent finds that one of its copies failed.
    pub fn fail(&self, manager: &str, image: &str) {
        let running = self.running.lock().unwrap();
        let agent = running[manager].agent.clone().unwrap();
        let spec = agent.known.lock().unwrap()[image].spec.clone().unwrap();
        agent.put(spec, Some("its bytes are not those of the image".into()));
    }

    /// An agent takes something else for a copy of the image.
    pub fn mistake(&self, manager: &str, image: &str) {
        let running = self.running.lock().unwrap();
        let agent = running[manager].agent.clone().unwrap();
        let mut known = agent.known.lock().unwrap();
        known.get_mut(image).unwrap().status.as_mut().unwrap().checksum = "another".into();
        let _ = agent.news.send(());
    }

    pub fn names(&self) -> Vec<String> {
        self.running.lock().unwrap().keys().cloned().collect()
    }

    pub fn files(&self, disk: &str) -> Vec<String> {
        let disks = self.disks.lock().unwrap();
        disks.get(disk).map(|d| d.lock().unwrap().keys().cloned().collect()).unwrap_or_default()
    }

    /// As if all had been started by another version.
    pub fn outdate(&self) {
        for (name, running) in self.running.lock().unwrap().iter_mut() {
            running.workload.is_outdated = true;
            let _ = self.changed.send(name.clone());
        }
    }

    pub fn all(&self) -> Vec<Workload> {
        self.running.lock().unwrap().values().map(|running| running.workload.clone()).collect()
    }

    /// As kill -9 does.
    pub fn kill(&self, name: &str) {
        if let Some(running) = self.running.lock().unwrap().get_mut(name) {
            running.stop.cancel();
            running.workload.state = WorkloadState::Failed { message: "killed by signal 9".into() };
        }
        let _ = self.changed.send(name.to_owned());
    }
}

#[async_trait]
impl Workloads for FakeWorkloads {
    async fn ensure(&self, spec: &WorkloadSpec) -> Result<Workload, WorkloadError> {
        if let Some(running) = self.running.lock().unwrap().get(&spec.name) {
            return Ok(running.workload.clone());
        }
        let ip = next_ip();
        let stop = CancellationToken::new();
        let mut known_agent = None;
        let listener = tokio::net::TcpListener::bind(SocketAddr::from((ip, 8000))).await.unwrap();
        if spec.args[0] == "data-source" {
            let failure = {
                let mut script = self.script.lock().unwrap();
                *script.counts.entry("source".into()).or_default() += 1;
                if script.source_failures.is_empty() { None } else { Some(script.source_failures.remove(0)) }
            };
            tokio::spawn(serve_source(listener, failure, stop.clone()));
        } else {
            let at = spec.args.iter().position(|a| a == "--disk-uuid").unwrap();
            let disk = self.disks.lock().unwrap().entry(spec.args[at + 1].clone()).or_default().clone();
            let known: Disk = Arc::default();
            if self.script.lock().unwrap().remembers {
                known.lock().unwrap().clone_from(&disk.lock().unwrap());
            }
            let agent = FakeAgent { disk, known, script: self.script.clone(), news: broadcast::channel(100).0 };
            known_agent = Some(agent.clone());
            let stopped = stop.clone();
            tokio::spawn(
                tonic::transport::Server::builder()
                    .add_service(BackingImageManagerServiceServer::new(agent))
                    .serve_with_incoming_shutdown(TcpListenerStream::new(listener), async move {
                        stopped.cancelled().await
                    }),
            );
        }
        let workload = Workload {
            spec: spec.clone(),
            state: WorkloadState::Running,
            ip: Some(IpAddr::V4(ip)),
            is_outdated: false,
        };
        let running = Running { workload: workload.clone(), stop, agent: known_agent };
        self.running.lock().unwrap().insert(spec.name.clone(), running);
        let _ = self.changed.send(spec.name.clone());
        Ok(workload)
    }

    async fn get(&self, name: &str) -> Result<Option<Workload>, WorkloadError> {
        Ok(self.running.lock().unwrap().get(name).map(|r| r.workload.clone()))
    }

    async fn list(&self) -> Result<Vec<Workload>, WorkloadError> {
        Ok(self.running.lock().unwrap().values().map(|r| r.workload.clone()).collect())
    }

    async fn remove(&self, name: &str) -> Result<(), WorkloadError> {
        if let Some(running) = self.running.lock().unwrap().remove(name) {
            running.stop.cancel();
        }
        Ok(())
    }

    fn changes(&self) -> BoxStream<'static, String> {
        BroadcastStream::new(self.changed.subscribe()).filter_map(|name| async move { name.ok() }).boxed()
    }
}

async fn serve_source(
    listener: tokio::net::TcpListener,
    failure: Option<(ErrorKind, String)>,
    stop: CancellationToken,
) {
    let status = match failure {
        None => {
            serde_json::json!({"state": "ready-for-transfer", "size": 1048576, "progress": 100, "currentChecksum": "c0ffee"})
        }
        Some((kind, message)) => serde_json::json!({"state": "failed", "message": message, "errorKind": kind}),
    };
    let stopped = stop.clone();
    let read = move |Query(query): Query<BTreeMap<String, String>>| {
        let (line, stopped) = (format!("{status}\n"), stopped.clone());
        async move {
            if !query.contains_key("watch") {
                return line.into_response();
            }
            let first = futures::stream::once(async move { Ok::<_, std::convert::Infallible>(line) });
            let rest = futures::stream::pending().take_until(stopped.cancelled_owned());
            axum::body::Body::from_stream(first.chain(rest)).into_response()
        }
    };
    let app = axum::Router::new().route("/v1/file", axum::routing::get(read));
    axum::serve(listener, app).with_graceful_shutdown(stop.cancelled_owned()).await.unwrap();
}

fn file(spec: BackingImageSpec, failure: Option<String>) -> BackingImageResponse {
    BackingImageResponse {
        status: Some(BackingImageStatus {
            state: if failure.is_some() { "failed" } else { "ready" }.into(),
            progress: 100,
            checksum: if failure.is_some() { String::new() } else { "c0ffee".into() },
            error_msg: failure.unwrap_or_default(),
            ..Default::default()
        }),
        spec: Some(BackingImageSpec { size: 1048576, virtual_size: 1048576, real_size: 1048576, ..spec }),
        format: "raw".into(),
        ..Default::default()
    }
}

fn is_ready(file: &BackingImageResponse) -> bool {
    file.status.as_ref().is_some_and(|status| status.state == "ready")
}

#[derive(Clone)]
struct FakeAgent {
    disk: Disk,
    /// Files that this life of the agent knows.
    known: Disk,
    script: Arc<Mutex<Script>>,
    news: broadcast::Sender<()>,
}

impl FakeAgent {
    fn count(&self, what: &str) {
        *self.script.lock().unwrap().counts.entry(what.into()).or_default() += 1;
    }

    fn put(&self, spec: BackingImageSpec, failure: Option<String>) -> BackingImageResponse {
        let file = file(spec.clone(), failure.clone());
        self.known.lock().unwrap().insert(spec.name.clone(), file.clone());
        if failure.is_none() {
            self.disk.lock().unwrap().insert(spec.name, file.clone());
        }
        let _ = self.news.send(());
        file
    }
}

#[tonic::async_trait]
impl BackingImageManagerService for FakeAgent {
    async fn delete(&self, request: Request<DeleteRequest>) -> Result<Response<()>, Status> {
        self.count("delete");
        let name = request.into_inner().name;
        if self.script.lock().unwrap().undeletable == name {
            return Err(Status::internal("cannot remove its directory: Operation not permitted"));
        }
        self.disk.lock().unwrap().remove(&name);
        self.known.lock().unwrap().remove(&name);
        let _ = self.news.send(());
        Ok(Response::new(()))
    }

    async fn get(&self, _: Request<GetRequest>) -> Result<Response<BackingImageResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn list(&self, _: Request<()>) -> Result<Response<ListResponse>, Status> {
        let backing_images = self.known.lock().unwrap().clone().into_iter().collect();
        let remains = self.script.lock().unwrap().remains.clone();
        let surveyed = remains.is_some();
        let remains = remains.unwrap_or_default();
        Ok(Response::new(ListResponse { backing_images, remains, surveyed, ..Default::default() }))
    }

    async fn version_get(&self, _: Request<()>) -> Result<Response<VersionResponse>, Status> {
        let version = VersionResponse {
            backing_image_manager_api_version: 3,
            backing_image_manager_api_min_version: 3,
            ..Default::default()
        };
        Ok(Response::new(version))
    }

    async fn sync(&self, request: Request<SyncRequest>) -> Result<Response<BackingImageResponse>, Status> {
        self.count("sync");
        let request = request.into_inner();
        if request.from_address.is_empty() {
            return Err(Status::invalid_argument("no peer"));
        }
        // What it takes for good it does not get anew.
        let spec = request.spec.unwrap();
        let good = self.known.lock().unwrap().get(&spec.name).filter(|file| is_ready(file)).cloned();
        if let Some(file) = good {
            return Ok(Response::new(file));
        }
        let failure = {
            let mut script = self.script.lock().unwrap();
            if script.sync_failures.is_empty() { None } else { Some(script.sync_failures.remove(0)) }
        };
        Ok(Response::new(self.put(spec, failure)))
    }

    async fn send(&self, _: Request<SendRequest>) -> Result<Response<()>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn fetch(&self, request: Request<FetchRequest>) -> Result<Response<BackingImageResponse>, Status> {
        let request = request.into_inner();
        let spec = request.spec.unwrap();
        if request.data_source_address.is_empty() {
            self.count("adopt");
            let is_there = self.disk.lock().unwrap().contains_key(&spec.name);
            let failure = (!is_there).then(|| "there is no such file on this disk".to_owned());
            return Ok(Response::new(self.put(spec, failure)));
        }
        self.count("fetch");
        Ok(Response::new(self.put(spec, None)))
    }

    async fn verify(&self, request: Request<VerifyRequest>) -> Result<Response<BackingImageResponse>, Status> {
        self.count("verify");
        let request = request.into_inner();
        let mut known = self.known.lock().unwrap();
        let file = known.get_mut(&request.name).ok_or_else(|| Status::not_found("no such copy"))?;
        file.verified_at = request.requested_at;
        let file = file.clone();
        let _ = self.news.send(());
        Ok(Response::new(file))
    }

    async fn limit_bandwidth(&self, _: Request<Bandwidth>) -> Result<Response<()>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn remove_remains(&self, request: Request<RemoveRemainsRequest>) -> Result<Response<()>, Status> {
        let request = request.into_inner();
        let mut script = self.script.lock().unwrap();
        if script.undeletable == request.name {
            return Err(Status::internal("cannot remove its directory: Operation not permitted"));
        }
        let is_it = |r: &Remains| {
            (&r.name, &r.uuid, r.is_preparation) == (&request.name, &request.uuid, request.is_preparation)
        };
        script.remains.iter_mut().for_each(|remains| remains.retain(|r| !is_it(r)));
        *script.counts.entry("remove".into()).or_default() += 1;
        if !request.is_preparation {
            for files in [&self.disk, &self.known] {
                let is_it = |file: &BackingImageResponse| file.spec.as_ref().is_some_and(|s| s.uuid == request.uuid);
                let mut files = files.lock().unwrap();
                if files.get(&request.name).is_some_and(is_it) {
                    files.remove(&request.name);
                }
            }
        }
        script.removed.push(request);
        Ok(Response::new(()))
    }

    async fn prepare_download(
        &self,
        _: Request<PrepareDownloadRequest>,
    ) -> Result<Response<PrepareDownloadResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn backup_create(&self, _: Request<BackupCreateRequest>) -> Result<Response<()>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn backup_status(&self, _: Request<BackupStatusRequest>) -> Result<Response<BackupStatusResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    type WatchStream = BoxStream<'static, Result<(), Status>>;

    async fn watch(&self, _: Request<()>) -> Result<Response<Self::WatchStream>, Status> {
        let news = BroadcastStream::new(self.news.subscribe()).map(|_| Ok(()));
        Ok(Response::new(news.boxed()))
    }
}

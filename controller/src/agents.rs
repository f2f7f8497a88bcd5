//! The agents of disks (gRPC) and data sources (HTTP): asked when a pass needs to know, followed so that a pass comes when something changed.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use api::ErrorKind;
use api::image::CopyState;
use api::manager::FileInfo;
use api::names::MANAGER_PORT;
use futures::StreamExt;
use planner::data_source::Report;
use planner::manager::orphans::{Place, Remains};
use planner::manager::{Agent, Bandwidth, FileWish};
use proto::bimrpc;
use proto::bimrpc::backing_image_manager_service_client::BackingImageManagerServiceClient;
use proto::bimrpc::{
    BackingImageResponse, BackingImageSpec, DeleteRequest, FetchRequest, RemoveRemainsRequest, SyncRequest,
    VerifyRequest,
};
use runtime::transport::Security;
use serde::Deserialize;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

use crate::error::{ReconcileError, chain};
use crate::limits::{
    CHANGE_TIMEOUT, CONNECT_TIMEOUT, KEEP_ALIVE, KEEP_ALIVE_TIMEOUT, MAX_LINE_BYTES, READ_TIMEOUT, SOURCE_SILENCE,
};
use crate::queue::{Key, Kind, Queue};

type Client = BackingImageManagerServiceClient<Channel>;

/// Connections and followers.
pub struct Agents {
    queue: Arc<Queue>,
    tracker: TaskTracker,
    shutdown: CancellationToken,
    channels: Mutex<HashMap<String, Channel>>,
    /// Who is followed at which address.
    followed: Arc<Mutex<HashMap<Key, (String, CancellationToken)>>>,
    http: reqwest::Client,
    security: Security,
}

/// `GET /v1/file` of a data source, the part that matters here.
#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct FileStatus {
    state: CopyState,
    size: u64,
    progress: u32,
    current_checksum: String,
    message: String,
    error_kind: Option<ErrorKind>,
    next_retry_time: String,
    bandwidth_limit: Option<u64>,
}

impl Agents {
    pub fn new(queue: Arc<Queue>, tracker: TaskTracker, shutdown: CancellationToken, security: Security) -> Agents {
        // Agents are addressed directly, whatever proxy the environment names for downloads. Without the empty list of
        // certificates no plain client can be built on a machine that has none.
        let builder = reqwest::Client::builder().no_proxy();
        let builder = match security.client_config() {
            Some(config) => builder.tls_backend_preconfigured(config),
            None => builder.tls_certs_only([]),
        };
        let http = builder.connect_timeout(CONNECT_TIMEOUT).build().unwrap_or_default();
        Agents { queue, tracker, shutdown, channels: Mutex::default(), followed: Arc::default(), http, security }
    }

    fn client(&self, ip: &str) -> Result<Client, ReconcileError> {
        let mut channels = self.channels.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(channel) = channels.get(ip) {
            return Ok(Client::new(channel.clone()));
        }
        let channel = self.security.connect_lazily(&endpoint(ip)?);
        channels.insert(ip.to_owned(), channel.clone());
        Ok(Client::new(channel))
    }

    /// What an agent knows; `Err` with the reason when it does not answer.
    pub async fn list(&self, ip: &str) -> Result<Agent, String> {
        let mut client = self.client(ip).map_err(|e| e.chain())?;
        let ask = async {
            let version = client.version_get(()).await?.into_inner();
            let listed = client.list(()).await?.into_inner();
            Ok::<_, Status>(Agent {
                api_version: version.backing_image_manager_api_version,
                api_min_version: version.backing_image_manager_api_min_version,
                files: listed.backing_images.into_values().map(file_info).collect(),
                remains: listed.surveyed.then(|| listed.remains.into_iter().map(remains).collect()),
                foreign: listed.foreign,
                bandwidth: listed.bandwidth.map(bandwidth),
            })
        };
        match tokio::time::timeout(READ_TIMEOUT, ask).await {
            Ok(Ok(agent)) => Ok(agent),
            Ok(Err(status)) => Err(status.message().to_owned()),
            Err(_) => Err(format!("no answer within {} s", READ_TIMEOUT.as_secs())),
        }
    }

    /// Removes a file and everything temporary of it.
    pub async fn delete_file(&self, ip: &str, image: &str, uuid: &str) -> Result<(), ReconcileError> {
        let request = DeleteRequest { name: image.into(), uuid: uuid.into() };
        let done = self.client(ip)?.delete(timed(request)).await;
        done.map(drop).map_err(failed("delete a copy", ip))
    }

    /// Removes what belongs to no image, if it still has that mark.
    pub async fn remove_remains(&self, ip: &str, request: RemoveRemainsRequest) -> Result<(), ReconcileError> {
        let done = self.client(ip)?.remove_remains(timed(request)).await;
        done.map(drop).map_err(failed("remove what lies there", ip))
    }

    /// Takes a file over from a data source, or adopts what is on the disk.
    pub async fn fetch_file(&self, ip: &str, file: &FileWish, from: Option<&str>) -> Result<(), ReconcileError> {
        let request =
            FetchRequest { spec: Some(wire_spec(file)), data_source_address: from.unwrap_or_default().to_owned() };
        let done = self.client(ip)?.fetch(timed(request)).await;
        done.map(drop).map_err(failed("fetch a copy", ip))
    }

    /// Begins to receive a file from peers.
    pub async fn sync_file(&self, ip: &str, file: &FileWish, from: &[String]) -> Result<(), ReconcileError> {
        let request = SyncRequest { spec: Some(wire_spec(file)), from_address: from.join(",") };
        let done = self.client(ip)?.sync(timed(request)).await;
        done.map(drop).map_err(failed("sync a copy", ip))
    }

    /// From now on so much is sent at most.
    pub async fn limit_bandwidth(&self, ip: &str, wish: Bandwidth) -> Result<(), ReconcileError> {
        let bytes = |limit| i64::try_from(limit).unwrap_or(i64::MAX);
        let images = wish.images.into_iter().map(|(name, limit)| (name, bytes(limit))).collect();
        let request = bimrpc::Bandwidth { total: bytes(wish.total), images };
        let done = self.client(ip)?.limit_bandwidth(timed(request)).await;
        done.map(drop).map_err(failed("limit the bandwidth of an agent", ip))
    }

    /// Begins to read a ready copy again, or lets it go on.
    pub async fn verify_file(&self, ip: &str, request: VerifyRequest) -> Result<(), ReconcileError> {
        let done = self.client(ip)?.verify(timed(request)).await;
        done.map(drop).map_err(failed("verify a copy", ip))
    }

    /// What a data source says of its file; `Err` with the reason when it does not answer.
    pub async fn report(&self, ip: &str) -> Result<Report, String> {
        let ask = self.http.get(file_url(&self.security, ip)).timeout(READ_TIMEOUT).send();
        let status = match ask.await.and_then(reqwest::Response::error_for_status) {
            Ok(response) => response.json::<FileStatus>().await,
            Err(error) => Err(error),
        };
        let status = status.map_err(|error| chain(&error))?;
        Ok(Report {
            state: status.state,
            size: status.size,
            progress: status.progress,
            checksum: status.current_checksum,
            message: status.message,
            kind: status.error_kind,
            next_retry_time: status.next_retry_time,
            bandwidth_limit: status.bandwidth_limit,
        })
    }

    /// From now on a data source downloads so many bytes a second at most; `Err` with the reason when it was not told.
    pub async fn limit_source(&self, ip: &str, bytes_per_second: u64) -> Result<(), String> {
        let query = [("action", "limit".to_owned()), ("bytesPerSecond", bytes_per_second.to_string())];
        let ask = self.http.post(file_url(&self.security, ip)).query(&query).timeout(READ_TIMEOUT).send();
        let done = ask.await.and_then(reqwest::Response::error_for_status);
        done.map(drop).map_err(|error| chain(&error))
    }

    /// Asks for a pass over `name` whenever the agent at `ip` has news, and when it goes away. May be called in every pass.
    pub fn follow(&self, kind: Kind, name: &str, ip: &str) {
        let key = Key { kind, name: name.to_owned() };
        let token = self.shutdown.child_token();
        {
            let mut followed = self.followed.lock().unwrap_or_else(|e| e.into_inner());
            match followed.get(&key) {
                Some((address, _)) if address == ip => return,
                Some((_, former)) => former.cancel(),
                None => {}
            }
            followed.insert(key.clone(), (ip.to_owned(), token.clone()));
        }
        let (queue, followed, ip, http) = (self.queue.clone(), self.followed.clone(), ip.to_owned(), self.http.clone());
        let security = self.security.clone();
        self.tracker.spawn(async move {
            let news = async {
                match kind {
                    Kind::Manager => follow_agent(&security, &ip, &queue, &key).await,
                    _ => follow_source(&http, &file_url(&security, &ip), &queue, &key).await,
                }
            };
            let ended = token.run_until_cancelled(news).await;
            let mut followed = followed.lock().unwrap_or_else(|e| e.into_inner());
            if followed.get(&key).is_some_and(|(address, _)| *address == ip) && !token.is_cancelled() {
                followed.remove(&key);
            }
            drop(followed);
            if ended.is_some() {
                tracing::debug!(name = key.name, address = ip, "agent is not followed any more");
                // The next pass finds out what happened, and follows it again if it is still there.
                queue.add(key.kind, key.name);
            }
        });
    }

    /// Ends [`Agents::follow`] and forgets the connection.
    pub fn forget(&self, kind: Kind, name: &str) {
        let key = Key { kind, name: name.to_owned() };
        let former = self.followed.lock().unwrap_or_else(|e| e.into_inner()).remove(&key);
        if let Some((ip, token)) = former {
            token.cancel();
            self.channels.lock().unwrap_or_else(|e| e.into_inner()).remove(&ip);
        }
    }
}

fn endpoint(ip: &str) -> Result<Endpoint, ReconcileError> {
    let endpoint = Endpoint::from_shared(format!("http://{ip}:{MANAGER_PORT}"))
        .map_err(|_| ReconcileError::Name { what: "address", text: ip.to_owned() })?;
    Ok(endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
        .keep_alive_while_idle(true))
}

fn timed<T>(request: T) -> Request<T> {
    let mut request = Request::new(request);
    request.set_timeout(CHANGE_TIMEOUT);
    request
}

fn failed(doing: &'static str, ip: &str) -> impl FnOnce(Status) -> ReconcileError {
    let address = format!("{ip}:{MANAGER_PORT}");
    move |source| ReconcileError::Agent { doing, address, source: Box::new(source) }
}

fn wire_spec(file: &FileWish) -> BackingImageSpec {
    BackingImageSpec {
        name: file.image.clone(),
        uuid: file.uuid.clone(),
        size: i64::try_from(file.size).unwrap_or(i64::MAX),
        checksum: file.checksum.clone(),
        ..Default::default()
    }
}

fn bandwidth(holds: bimrpc::Bandwidth) -> Bandwidth {
    let bytes = |limit| u64::try_from(limit).unwrap_or(0);
    let images = holds.images.into_iter().map(|(name, limit)| (name, bytes(limit))).collect();
    Bandwidth { total: bytes(holds.total), images }
}

fn remains(found: bimrpc::Remains) -> Remains {
    Remains {
        place: match found {
            bimrpc::Remains { is_preparation: true, .. } => Place::Preparations,
            bimrpc::Remains { is_partial: true, .. } => Place::Parts,
            _ => Place::Copies,
        },
        image: found.name,
        uuid: found.uuid,
        size: u64::try_from(found.size).unwrap_or(0),
        mark: found.mark,
        is_mixed: found.is_mixed,
    }
}

fn file_info(file: BackingImageResponse) -> FileInfo {
    let (spec, status) = (file.spec.unwrap_or_default(), file.status.unwrap_or_default());
    let bytes = |n: i64| u64::try_from(n).unwrap_or(0);
    let count = |n: i32| u32::try_from(n).unwrap_or(0);
    FileInfo {
        name: spec.name,
        uuid: spec.uuid,
        size: bytes(spec.size),
        virtual_size: bytes(spec.virtual_size),
        real_size: bytes(spec.real_size),
        state: CopyState::from_name(&status.state),
        current_checksum: status.checksum,
        message: status.error_msg,
        sending_reference: count(status.sending_reference),
        sender_manager_address: status.sender_manager_address,
        progress: count(status.progress),
        format: file.format,
        next_retry_time: String::new(),
        error_kind: Some(file.error_kind)
            .filter(|name| !name.is_empty())
            .map(|name| ErrorKind::from_name(&name).unwrap_or(ErrorKind::Internal)),
        verified_at: file.verified_at,
        damage: file.damage,
    }
}

fn file_url(security: &Security, ip: &str) -> String {
    format!("{}://{ip}:{MANAGER_PORT}/v1/file", security.scheme())
}

/// Each message means that something changed. Ends when the agent does.
async fn follow_agent(security: &Security, ip: &str, queue: &Queue, key: &Key) {
    let Ok(endpoint) = endpoint(ip) else { return };
    let Ok(channel) = security.connect(&endpoint).await else { return };
    let Ok(stream) = Client::new(channel).watch(()).await else { return };
    let mut stream = stream.into_inner();
    // What changed between the last pass and now.
    queue.add(key.kind, &key.name);
    while let Ok(Some(())) = stream.message().await {
        queue.add(key.kind, &key.name);
    }
}

/// Each line is a new status; its content is read afresh by the pass.
async fn follow_source(http: &reqwest::Client, url: &str, queue: &Queue, key: &Key) {
    let Ok(response) = http.get(url).query(&[("watch", "true")]).send().await else { return };
    if !response.status().is_success() {
        return;
    }
    let mut stream = response.bytes_stream();
    let mut line_bytes = 0;
    loop {
        let bytes = match tokio::time::timeout(SOURCE_SILENCE, stream.next()).await {
            Ok(Some(Ok(bytes))) => bytes,
            Ok(_) => return,
            Err(_) => {
                queue.add(key.kind, &key.name);
                continue;
            }
        };
        line_bytes = if bytes.contains(&b'\n') { 0 } else { line_bytes + bytes.len() };
        if line_bytes > MAX_LINE_BYTES {
            return;
        }
        if line_bytes == 0 {
            queue.add(key.kind, &key.name);
        }
    }
}

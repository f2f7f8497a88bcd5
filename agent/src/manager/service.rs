//! `bimrpc.BackingImageManagerService` (LF 5.1).

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;

use api::ErrorKind;
use futures::stream::{Stream, StreamExt};
use proto::bimrpc::backing_image_manager_service_server::BackingImageManagerService;
use proto::bimrpc::{
    BackingImageResponse, BackupCreateRequest, BackupStatusRequest, BackupStatusResponse, Bandwidth, DeleteRequest,
    FetchRequest, GetRequest, ListResponse, PrepareDownloadRequest, PrepareDownloadResponse, RemoveRemainsRequest,
    SendRequest, SyncRequest, VerifyRequest, VersionResponse,
};
use tokio_stream::wrappers::WatchStream;
use tonic::metadata::MetadataValue;
use tonic::{Code, Request, Response, Status};
use tracing::instrument;

use super::operations::Wanted;
use super::registry::Registry;
use super::verification::Verification;
use crate::bandwidth::Limits;
use crate::error::AgentError;
use crate::layout::ImageKey;
use crate::survey::{Place, Remains, Survey};

/// Longhorn's API version of the manager, both the newest and the oldest that is spoken.
pub const API_VERSION: i64 = 3;

pub(super) struct Service {
    registry: Arc<Registry>,
}

impl Service {
    pub fn new(registry: Arc<Registry>) -> Service {
        Service { registry }
    }
}

fn status(error: AgentError) -> Status {
    let code = match error.kind() {
        ErrorKind::Invalid => Code::InvalidArgument,
        ErrorKind::NotFound => Code::NotFound,
        ErrorKind::Incompatible | ErrorKind::NotReady => Code::FailedPrecondition,
        ErrorKind::OutOfRange => Code::OutOfRange,
        ErrorKind::Exhausted => Code::ResourceExhausted,
        ErrorKind::Pending => Code::Aborted,
        ErrorKind::Unavailable => Code::Unavailable,
        ErrorKind::Unsupported => Code::Unimplemented,
        ErrorKind::Corrupt => Code::DataLoss,
        ErrorKind::Internal => Code::Internal,
    };
    if code == Code::Internal {
        tracing::error!(error = error.chain(), "call failed");
    }
    let mut status = Status::new(code, error.chain());
    status.metadata_mut().insert(proto::ERROR_KIND_KEY, MetadataValue::from_static(error.kind().as_str()));
    status
}

fn wire(found: Remains) -> proto::bimrpc::Remains {
    proto::bimrpc::Remains {
        name: found.key.name.to_string(),
        uuid: found.key.uuid.to_string(),
        is_preparation: found.place == Place::Preparations,
        size: i64::try_from(found.size_bytes).unwrap_or(i64::MAX),
        mark: found.mark,
        is_mixed: found.is_mixed,
        is_partial: found.is_partial,
    }
}

fn told(limits: Limits) -> Bandwidth {
    let bytes = |limit| i64::try_from(limit).unwrap_or(i64::MAX);
    let images = limits.images.into_iter().map(|(name, limit)| (name, bytes(limit)));
    Bandwidth { total: bytes(limits.total), images: images.collect() }
}

fn limits(wish: Bandwidth) -> Result<Limits, AgentError> {
    let limit = |of: &str, limit: i64| {
        u64::try_from(limit).ok().filter(|limit| api::bandwidth::is_possible(*limit)).ok_or_else(|| {
            let message = format!("the limit of {of} is {limit}: give {}", api::bandwidth::RULE);
            AgentError::Invalid { message }
        })
    };
    let total = limit("all copies", wish.total)?;
    let of_images = wish.images.into_iter().map(|(name, bytes)| {
        let bytes = limit(&format!("image `{name}`"), bytes)?;
        Ok((name, bytes))
    });
    Ok(Limits { total, images: of_images.collect::<Result<_, AgentError>>()? })
}

fn unsupported<T>(what: &str, instead: &str) -> Result<Response<T>, Status> {
    Err(status(AgentError::Unsupported { message: format!("{what} is not supported yet: {instead}") }))
}

#[tonic::async_trait]
impl BackingImageManagerService for Service {
    #[instrument(name = "rpc", skip_all, fields(call = "delete", image = %request.get_ref().name))]
    async fn delete(&self, request: Request<DeleteRequest>) -> Result<Response<()>, Status> {
        let request = request.into_inner();
        let key = ImageKey::parse(&request.name, &request.uuid).map_err(status)?;
        self.registry.delete(key).await.map_err(status)?;
        Ok(Response::new(()))
    }

    #[instrument(name = "rpc", skip_all, fields(call = "get", image = %request.get_ref().name))]
    async fn get(&self, request: Request<GetRequest>) -> Result<Response<BackingImageResponse>, Status> {
        let request = request.into_inner();
        let key = ImageKey::parse(&request.name, &request.uuid).map_err(status)?;
        self.registry.recheck(&key).await;
        let copy = self.registry.known(&key).map_err(status)?;
        Ok(Response::new(copy.response(&key)))
    }

    async fn list(&self, _: Request<()>) -> Result<Response<ListResponse>, Status> {
        let mut backing_images = HashMap::new();
        for (key, copy) in self.registry.all() {
            let mut name = key.name.to_string();
            // Two images of one name, one after the other: the map would hide one of them.
            if backing_images.contains_key(&name) {
                name = key.to_string();
            }
            backing_images.insert(name, copy.response(&key));
        }
        let survey = self.registry.survey().await;
        let surveyed = survey.is_some();
        let Survey { remains, foreign } = survey.unwrap_or_default();
        let remains = remains.into_iter().map(wire).collect();
        let bandwidth = Some(told(self.registry.bandwidth.limits()));
        Ok(Response::new(ListResponse { backing_images, remains, foreign, surveyed, bandwidth }))
    }

    async fn version_get(&self, _: Request<()>) -> Result<Response<VersionResponse>, Status> {
        Ok(Response::new(VersionResponse {
            version: concat!("v", env!("CARGO_PKG_VERSION")).into(),
            git_commit: option_env!("GIT_COMMIT").unwrap_or_default().into(),
            build_date: option_env!("BUILD_DATE").unwrap_or_default().into(),
            backing_image_manager_api_version: API_VERSION,
            backing_image_manager_api_min_version: API_VERSION,
        }))
    }

    #[instrument(name = "rpc", skip_all, fields(call = "sync", image = request.get_ref().spec.as_ref().map(|spec| &*spec.name)))]
    async fn sync(&self, request: Request<SyncRequest>) -> Result<Response<BackingImageResponse>, Status> {
        let request = request.into_inner();
        let wanted = Wanted::parse(request.spec).map_err(status)?;
        let key = wanted.key.clone();
        let copy = self.registry.sync(wanted, &request.from_address).await.map_err(status)?;
        Ok(Response::new(copy.response(&key)))
    }

    #[instrument(name = "rpc", skip_all, fields(call = "send", image = %request.get_ref().name))]
    async fn send(&self, request: Request<SendRequest>) -> Result<Response<()>, Status> {
        let request = request.into_inner();
        let key = ImageKey::parse(&request.name, &request.uuid).map_err(status)?;
        self.registry.send(key, &request.to_address).await.map_err(status)?;
        Ok(Response::new(()))
    }

    #[instrument(name = "rpc", skip_all, fields(call = "fetch", image = request.get_ref().spec.as_ref().map(|spec| &*spec.name)))]
    async fn fetch(&self, request: Request<FetchRequest>) -> Result<Response<BackingImageResponse>, Status> {
        let request = request.into_inner();
        let wanted = Wanted::parse(request.spec).map_err(status)?;
        let key = wanted.key.clone();
        let copy = self.registry.fetch(wanted, &request.data_source_address).await.map_err(status)?;
        Ok(Response::new(copy.response(&key)))
    }

    #[instrument(name = "rpc", skip_all, fields(call = "verify", image = %request.get_ref().name))]
    async fn verify(&self, request: Request<VerifyRequest>) -> Result<Response<BackingImageResponse>, Status> {
        let request = request.into_inner();
        let key = ImageKey::parse(&request.name, &request.uuid).map_err(status)?;
        let wish = Verification::parse(&request.requested_at, request.bytes_per_second).map_err(status)?;
        let copy = self.registry.verify(key.clone(), wish).await.map_err(status)?;
        Ok(Response::new(copy.response(&key)))
    }

    #[instrument(name = "rpc", skip_all, fields(call = "remove_remains", image = %request.get_ref().name))]
    async fn remove_remains(&self, request: Request<RemoveRemainsRequest>) -> Result<Response<()>, Status> {
        let request = request.into_inner();
        let key = ImageKey::parse(&request.name, &request.uuid).map_err(status)?;
        let place = if request.is_preparation { Place::Preparations } else { Place::Copies };
        self.registry.remove_remains(key, place, &request.mark).await.map_err(status)?;
        Ok(Response::new(()))
    }

    #[instrument(name = "rpc", skip_all, fields(call = "limit_bandwidth"))]
    async fn limit_bandwidth(&self, request: Request<Bandwidth>) -> Result<Response<()>, Status> {
        let limits = limits(request.into_inner()).map_err(status)?;
        tracing::info!(total = limits.total, images = ?limits.images, "bandwidth limited");
        self.registry.bandwidth.set(&limits);
        Ok(Response::new(()))
    }

    async fn prepare_download(
        &self,
        _: Request<PrepareDownloadRequest>,
    ) -> Result<Response<PrepareDownloadResponse>, Status> {
        unsupported("PrepareDownload", "copy the file `backing` from the directory of the image")
    }

    async fn backup_create(&self, _: Request<BackupCreateRequest>) -> Result<Response<()>, Status> {
        unsupported("BackupCreate", "keep the source of the image, from which it can be made again")
    }

    async fn backup_status(&self, _: Request<BackupStatusRequest>) -> Result<Response<BackupStatusResponse>, Status> {
        unsupported("BackupStatus", "no backup can be running")
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<(), Status>> + Send>>;

    /// One tick at once, so that nobody misses what happened before the call, then one for each change.
    async fn watch(&self, _: Request<()>) -> Result<Response<Self::WatchStream>, Status> {
        let stop = self.registry.tasks.clone();
        let ticks = WatchStream::new(self.registry.watch()).map(|_| Ok(()));
        Ok(Response::new(Box::pin(ticks.take_until(stop.cancelled_owned()))))
    }
}

//! The Node service: volumes on one node, from the engine's block device to a path of a pod.

mod device;
mod expand;
mod mounts;
mod publish;
mod stage;
mod stats;
#[cfg(test)]
mod tests;
mod unfinished;
mod ungrown;

use std::path::{Path, PathBuf};
use std::time::Duration;

use proto::csi;
use proto::csi::identity_server::IdentityServer;
use proto::csi::node_server::{Node, NodeServer};
use proto::csi::node_service_capability::{self, rpc};
use store::Store;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::{Request, Response, Status};

use crate::controller::TOPOLOGY_KEY;
use crate::flight::InFlight;
use crate::identity::IdentityService;
use crate::metrics::{self, Metrics};
use crate::rpc::{Calls, call};
use crate::{CsiError, limits, server, status};
use ungrown::Ungrown;

/// What the node service needs.
#[derive(Clone)]
pub struct NodeConfig {
    pub store: Store,
    pub driver_name: String,
    pub node_name: String,
    pub socket: PathBuf,
    /// How long a call waits whose caller sets no deadline.
    pub wait: Duration,
    /// See [`Metrics::register`].
    pub metrics: Metrics,
}

impl NodeConfig {
    /// With the usual patience.
    pub fn new(store: Store, driver_name: &str, node_name: &str, socket: impl Into<PathBuf>) -> NodeConfig {
        NodeConfig {
            store,
            driver_name: driver_name.to_owned(),
            node_name: node_name.to_owned(),
            socket: socket.into(),
            wait: limits::WAIT_WITHOUT_DEADLINE,
            metrics: Metrics::default(),
        }
    }
}

/// Serves Identity and Node on a unix socket until the shutdown request, then lets calls in progress end. Mounts stay.
pub async fn serve_node(config: NodeConfig, shutdown: CancellationToken) -> Result<(), CsiError> {
    let NodeConfig { store, driver_name, node_name, socket, wait, metrics } = config;
    metrics.offer(&metrics::NODE);
    let calls = Calls::new(wait, metrics, &shutdown);
    let context = Context { store, node_name, in_flight: InFlight::default(), ungrown: Ungrown::default() };
    let service = NodeService { context, calls: calls.clone() };
    let routes =
        Routes::new(IdentityServer::new(IdentityService::new(&driver_name))).add_service(NodeServer::new(service));
    server::serve(&socket, routes, calls).await
}

/// What every call works with.
#[derive(Clone)]
struct Context {
    store: Store,
    node_name: String,
    in_flight: InFlight,
    ungrown: Ungrown,
}

struct NodeService {
    context: Context,
    calls: Calls,
}

/// What this service can do; each has its tests.
const CAPABILITIES: [rpc::Type; 5] = [
    rpc::Type::StageUnstageVolume,
    rpc::Type::GetVolumeStats,
    rpc::Type::GetVolumeHealth,
    rpc::Type::SingleNodeMultiWriter,
    rpc::Type::ExpandVolume,
];

/// A path that the caller must have sent: whole, and not one that no volume can be at.
fn path<'a>(field: &'static str, value: &'a str) -> Result<&'a Path, CsiError> {
    let path = Path::new(value);
    if value.is_empty() {
        return Err(CsiError::Missing { field });
    }
    let plain = path.components().all(|part| !matches!(part, std::path::Component::ParentDir));
    if !path.is_absolute() || !plain || path.parent().is_none() {
        return Err(CsiError::Field { field, value: value.to_owned(), right: "an absolute path without `..`" });
    }
    Ok(path)
}

#[tonic::async_trait]
impl Node for NodeService {
    async fn node_stage_volume(
        &self,
        request: Request<csi::NodeStageVolumeRequest>,
    ) -> Result<Response<csi::NodeStageVolumeResponse>, Status> {
        call!(self, "NodeStageVolume", request, (volume_id), stage::stage)
    }

    async fn node_unstage_volume(
        &self,
        request: Request<csi::NodeUnstageVolumeRequest>,
    ) -> Result<Response<csi::NodeUnstageVolumeResponse>, Status> {
        call!(self, "NodeUnstageVolume", request, (volume_id), stage::unstage)
    }

    async fn node_publish_volume(
        &self,
        request: Request<csi::NodePublishVolumeRequest>,
    ) -> Result<Response<csi::NodePublishVolumeResponse>, Status> {
        call!(self, "NodePublishVolume", request, (volume_id), publish::publish)
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<csi::NodeUnpublishVolumeRequest>,
    ) -> Result<Response<csi::NodeUnpublishVolumeResponse>, Status> {
        call!(self, "NodeUnpublishVolume", request, (volume_id), publish::unpublish)
    }

    async fn node_get_volume_stats(
        &self,
        request: Request<csi::NodeGetVolumeStatsRequest>,
    ) -> Result<Response<csi::NodeGetVolumeStatsResponse>, Status> {
        call!(self, "NodeGetVolumeStats", request, (volume_id), stats::get_stats)
    }

    async fn node_get_volume_health(
        &self,
        request: Request<csi::NodeGetVolumeHealthRequest>,
    ) -> Result<Response<csi::NodeGetVolumeHealthResponse>, Status> {
        call!(self, "NodeGetVolumeHealth", request, (volume_id), stats::get_health)
    }

    async fn node_get_storage_health(
        &self,
        _: Request<csi::NodeGetStorageHealthRequest>,
    ) -> Result<Response<csi::NodeGetStorageHealthResponse>, Status> {
        Err(status::not_offered("NodeGetStorageHealth"))
    }

    async fn node_expand_volume(
        &self,
        request: Request<csi::NodeExpandVolumeRequest>,
    ) -> Result<Response<csi::NodeExpandVolumeResponse>, Status> {
        call!(self, "NodeExpandVolume", request, (volume_id), expand::expand)
    }

    async fn node_get_capabilities(
        &self,
        _: Request<csi::NodeGetCapabilitiesRequest>,
    ) -> Result<Response<csi::NodeGetCapabilitiesResponse>, Status> {
        let capabilities = CAPABILITIES
            .into_iter()
            .map(|capability| csi::NodeServiceCapability {
                r#type: Some(node_service_capability::Type::Rpc(node_service_capability::Rpc {
                    r#type: capability.into(),
                })),
            })
            .collect();
        Ok(Response::new(csi::NodeGetCapabilitiesResponse { capabilities }))
    }

    async fn node_get_info(
        &self,
        _: Request<csi::NodeGetInfoRequest>,
    ) -> Result<Response<csi::NodeGetInfoResponse>, Status> {
        let name = self.context.node_name.clone();
        Ok(Response::new(csi::NodeGetInfoResponse {
            node_id: name.clone(),
            max_volumes_per_node: 0,
            accessible_topology: Some(csi::Topology { segments: [(TOPOLOGY_KEY.to_owned(), name)].into() }),
        }))
    }
}

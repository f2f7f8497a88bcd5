//! The Controller service: volumes as a whole, by way of objects in the store.

mod capacity;
mod create;
mod delete;
mod expand;
mod image;
mod list;
mod publish;
mod settings;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::time::Duration;

pub use capacity::TOPOLOGY_KEY;
use proto::csi;
use proto::csi::controller_server::{Controller, ControllerServer};
use proto::csi::controller_service_capability::{self, rpc};
use proto::csi::identity_server::IdentityServer;
use store::Store;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::{Request, Response, Status};

use crate::flight::InFlight;
use crate::identity::IdentityService;
use crate::metrics::{self, Metrics};
use crate::rpc::{Calls, call};
use crate::{CsiError, limits, server, status};

/// What the controller service needs.
#[derive(Clone)]
pub struct ControllerConfig {
    pub store: Store,
    pub driver_name: String,
    pub socket: PathBuf,
    /// How long a call waits whose caller sets no deadline.
    pub wait: Duration,
    /// See [`Metrics::register`].
    pub metrics: Metrics,
}

impl ControllerConfig {
    /// With the usual patience.
    pub fn new(store: Store, driver_name: &str, socket: impl Into<PathBuf>) -> ControllerConfig {
        ControllerConfig {
            store,
            driver_name: driver_name.to_owned(),
            socket: socket.into(),
            wait: limits::WAIT_WITHOUT_DEADLINE,
            metrics: Metrics::default(),
        }
    }
}

/// Serves Identity and Controller on a unix socket until the shutdown request, then lets calls in progress end.
pub async fn serve_controller(config: ControllerConfig, shutdown: CancellationToken) -> Result<(), CsiError> {
    let ControllerConfig { store, driver_name, socket, wait, metrics } = config;
    metrics.offer(&metrics::CONTROLLER);
    let calls = Calls::new(wait, metrics, &shutdown);
    let context = Context { store, in_flight: InFlight::default() };
    let service = ControllerService { context, calls: calls.clone() };
    let routes = Routes::new(IdentityServer::new(IdentityService::new(&driver_name)))
        .add_service(ControllerServer::new(service));
    server::serve(&socket, routes, calls).await
}

/// What every call works with.
#[derive(Clone)]
struct Context {
    store: Store,
    in_flight: InFlight,
}

struct ControllerService {
    context: Context,
    calls: Calls,
}

/// What this service can do; each has its tests.
const CAPABILITIES: [rpc::Type; 10] = [
    rpc::Type::CreateDeleteVolume,
    rpc::Type::PublishUnpublishVolume,
    rpc::Type::ListVolumes,
    rpc::Type::ListVolumesPublishedNodes,
    rpc::Type::GetCapacity,
    rpc::Type::GetVolume,
    rpc::Type::GetVolumeHealth,
    rpc::Type::ListVolumeHealth,
    rpc::Type::SingleNodeMultiWriter,
    rpc::Type::ExpandVolume,
];

#[tonic::async_trait]
impl Controller for ControllerService {
    async fn create_volume(
        &self,
        request: Request<csi::CreateVolumeRequest>,
    ) -> Result<Response<csi::CreateVolumeResponse>, Status> {
        call!(self, "CreateVolume", request, (name), create::create_volume)
    }

    async fn delete_volume(
        &self,
        request: Request<csi::DeleteVolumeRequest>,
    ) -> Result<Response<csi::DeleteVolumeResponse>, Status> {
        call!(self, "DeleteVolume", request, (volume_id), delete::delete_volume)
    }

    async fn controller_publish_volume(
        &self,
        request: Request<csi::ControllerPublishVolumeRequest>,
    ) -> Result<Response<csi::ControllerPublishVolumeResponse>, Status> {
        call!(self, "ControllerPublishVolume", request, (volume_id, node_id), publish::publish)
    }

    async fn controller_unpublish_volume(
        &self,
        request: Request<csi::ControllerUnpublishVolumeRequest>,
    ) -> Result<Response<csi::ControllerUnpublishVolumeResponse>, Status> {
        call!(self, "ControllerUnpublishVolume", request, (volume_id, node_id), publish::unpublish)
    }

    async fn validate_volume_capabilities(
        &self,
        request: Request<csi::ValidateVolumeCapabilitiesRequest>,
    ) -> Result<Response<csi::ValidateVolumeCapabilitiesResponse>, Status> {
        call!(self, "ValidateVolumeCapabilities", request, (volume_id), create::validate)
    }

    async fn list_volumes(
        &self,
        request: Request<csi::ListVolumesRequest>,
    ) -> Result<Response<csi::ListVolumesResponse>, Status> {
        call!(self, "ListVolumes", request, (), list::list_volumes)
    }

    async fn controller_get_volume(
        &self,
        request: Request<csi::ControllerGetVolumeRequest>,
    ) -> Result<Response<csi::ControllerGetVolumeResponse>, Status> {
        call!(self, "ControllerGetVolume", request, (volume_id), list::get_volume)
    }

    async fn controller_list_volume_health(
        &self,
        request: Request<csi::ControllerListVolumeHealthRequest>,
    ) -> Result<Response<csi::ControllerListVolumeHealthResponse>, Status> {
        call!(self, "ControllerListVolumeHealth", request, (), list::list_health)
    }

    async fn controller_get_volume_health(
        &self,
        request: Request<csi::ControllerGetVolumeHealthRequest>,
    ) -> Result<Response<csi::ControllerGetVolumeHealthResponse>, Status> {
        call!(self, "ControllerGetVolumeHealth", request, (volume_id), list::get_health)
    }

    async fn get_capacity(
        &self,
        request: Request<csi::GetCapacityRequest>,
    ) -> Result<Response<csi::GetCapacityResponse>, Status> {
        call!(self, "GetCapacity", request, (), capacity::get_capacity)
    }

    async fn controller_get_capabilities(
        &self,
        _: Request<csi::ControllerGetCapabilitiesRequest>,
    ) -> Result<Response<csi::ControllerGetCapabilitiesResponse>, Status> {
        let capabilities = CAPABILITIES
            .into_iter()
            .map(|capability| csi::ControllerServiceCapability {
                r#type: Some(controller_service_capability::Type::Rpc(controller_service_capability::Rpc {
                    r#type: capability.into(),
                })),
            })
            .collect();
        Ok(Response::new(csi::ControllerGetCapabilitiesResponse { capabilities }))
    }

    async fn create_snapshot(
        &self,
        _: Request<csi::CreateSnapshotRequest>,
    ) -> Result<Response<csi::CreateSnapshotResponse>, Status> {
        Err(status::not_offered("CreateSnapshot"))
    }

    async fn delete_snapshot(
        &self,
        _: Request<csi::DeleteSnapshotRequest>,
    ) -> Result<Response<csi::DeleteSnapshotResponse>, Status> {
        Err(status::not_offered("DeleteSnapshot"))
    }

    async fn list_snapshots(
        &self,
        _: Request<csi::ListSnapshotsRequest>,
    ) -> Result<Response<csi::ListSnapshotsResponse>, Status> {
        Err(status::not_offered("ListSnapshots"))
    }

    async fn get_snapshot(
        &self,
        _: Request<csi::GetSnapshotRequest>,
    ) -> Result<Response<csi::GetSnapshotResponse>, Status> {
        Err(status::not_offered("GetSnapshot"))
    }

    async fn controller_expand_volume(
        &self,
        request: Request<csi::ControllerExpandVolumeRequest>,
    ) -> Result<Response<csi::ControllerExpandVolumeResponse>, Status> {
        call!(self, "ControllerExpandVolume", request, (volume_id), expand::expand)
    }

    async fn controller_modify_volume(
        &self,
        _: Request<csi::ControllerModifyVolumeRequest>,
    ) -> Result<Response<csi::ControllerModifyVolumeResponse>, Status> {
        Err(status::not_offered("ControllerModifyVolume"))
    }
}

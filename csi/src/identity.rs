//! The Identity service: who we are. Served on every socket.

use proto::csi;
use proto::csi::plugin_capability::{self, service, volume_expansion};
use tonic::{Request, Response, Status};

/// Name and version of the driver.
#[derive(Clone, Debug)]
pub struct IdentityService {
    driver_name: String,
}

impl IdentityService {
    /// A service that answers with this driver name.
    pub fn new(driver_name: &str) -> IdentityService {
        IdentityService { driver_name: driver_name.to_owned() }
    }
}

#[tonic::async_trait]
impl csi::identity_server::Identity for IdentityService {
    async fn get_plugin_info(
        &self,
        _: Request<csi::GetPluginInfoRequest>,
    ) -> Result<Response<csi::GetPluginInfoResponse>, Status> {
        Ok(Response::new(csi::GetPluginInfoResponse {
            name: self.driver_name.clone(),
            vendor_version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        }))
    }

    async fn get_plugin_capabilities(
        &self,
        _: Request<csi::GetPluginCapabilitiesRequest>,
    ) -> Result<Response<csi::GetPluginCapabilitiesResponse>, Status> {
        // Nodes have a topology, for GetCapacity; volumes are reachable from every node all the same.
        let capabilities = [service::Type::ControllerService, service::Type::VolumeAccessibilityConstraints]
            .into_iter()
            .map(|service| csi::PluginCapability {
                r#type: Some(plugin_capability::Type::Service(plugin_capability::Service { r#type: service.into() })),
            })
            .chain([csi::PluginCapability {
                // A volume grows while it is detached.
                r#type: Some(plugin_capability::Type::VolumeExpansion(plugin_capability::VolumeExpansion {
                    r#type: volume_expansion::Type::Offline.into(),
                })),
            }])
            .collect();
        Ok(Response::new(csi::GetPluginCapabilitiesResponse { capabilities }))
    }

    async fn probe(&self, _: Request<csi::ProbeRequest>) -> Result<Response<csi::ProbeResponse>, Status> {
        Ok(Response::new(csi::ProbeResponse { ready: Some(true) }))
    }
}

//! Both servers on their sockets, asked by a client.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use api::Volume;
use hyper_util::rt::TokioIo;
use proto::csi;
use proto::csi::controller_client::ControllerClient;
use proto::csi::identity_client::IdentityClient;
use proto::csi::node_client::NodeClient;
use store::Store;
use store::embedded::Embedded;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request};

use crate::capability::tests::mount;
use crate::{ControllerConfig, CsiError, NodeConfig, serve_controller, serve_node};

struct World {
    folder: tempfile::TempDir,
    store: Store,
    shutdown: CancellationToken,
    servers: Vec<JoinHandle<Result<(), CsiError>>>,
}

impl World {
    fn new() -> World {
        World {
            folder: tempfile::tempdir().unwrap(),
            store: Store::new(Arc::new(Embedded::in_memory()), "longhorn-system"),
            shutdown: CancellationToken::new(),
            servers: vec![],
        }
    }

    async fn controller(&mut self) -> Channel {
        // Longer than the kernel takes, and there was an earlier process.
        let socket = self.folder.path().join("d".repeat(120)).join("controller.sock");
        std::fs::create_dir_all(socket.parent().unwrap()).unwrap();
        drop(runtime::socket::bind_blocking(&socket).unwrap());
        let config = ControllerConfig::new(self.store.clone(), "driver.longhorn.io", &socket);
        self.servers.push(tokio::spawn(serve_controller(config, self.shutdown.clone())));
        let channel = connect(&socket).await;
        assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
        channel
    }

    async fn node(&mut self) -> Channel {
        let socket = self.folder.path().join("node-1.sock");
        let config = NodeConfig::new(self.store.clone(), "driver.longhorn.io", "node-1", &socket);
        self.servers.push(tokio::spawn(serve_node(config, self.shutdown.clone())));
        connect(&socket).await
    }

    async fn end(self) {
        self.shutdown.cancel();
        for server in self.servers {
            server.await.unwrap().unwrap();
        }
        assert_eq!(
            std::fs::read_dir(self.folder.path())
                .unwrap()
                .filter(|e| e.as_ref().unwrap().path().extension().is_some())
                .count(),
            0
        );
    }
}

async fn connect(socket: &Path) -> Channel {
    let give_up = tokio::time::Instant::now() + Duration::from_secs(10);
    loop {
        let path = socket.to_owned();
        let connector = tower::service_fn(move |_| {
            let path = path.clone();
            async move { runtime::socket::connect(&path).await.map(TokioIo::new) }
        });
        match Endpoint::from_static("http://localhost").connect_with_connector(connector).await {
            Ok(channel) => return channel,
            Err(error) => assert!(tokio::time::Instant::now() < give_up, "{error}"),
        }
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn both_sockets_say_who_they_are() {
    let mut world = World::new();
    for channel in [world.controller().await, world.node().await] {
        let mut identity = IdentityClient::new(channel);
        let answer = identity.get_plugin_info(csi::GetPluginInfoRequest {}).await.unwrap().into_inner();
        assert_eq!((answer.name.as_str(), answer.vendor_version.is_empty()), ("driver.longhorn.io", false));
        let answer = identity.probe(csi::ProbeRequest {}).await.unwrap().into_inner();
        assert_eq!(answer.ready, Some(true));
        assert_eq!(
            identity
                .get_plugin_capabilities(csi::GetPluginCapabilitiesRequest {})
                .await
                .unwrap()
                .into_inner()
                .capabilities
                .len(),
            3
        );
    }
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_have_their_codes_and_sentences_on_the_wire() {
    let mut world = World::new();
    let mut controller = ControllerClient::new(world.controller().await);
    let create = |key: &str, value: &str| csi::CreateVolumeRequest {
        name: "v".into(),
        volume_capabilities: vec![mount()],
        parameters: [(key.to_owned(), value.to_owned())].into(),
        ..Default::default()
    };
    let error = controller.create_volume(create("numberOfReplicas", "-1")).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    assert!(error.message().contains("`numberOfReplicas` is `-1`"), "{error}");
    assert_eq!(controller.create_volume(create("backingImage", "nowhere")).await.unwrap_err().code(), Code::NotFound);
    controller.create_volume(create("numberOfReplicas", "1")).await.unwrap();
    let error = controller.create_volume(create("numberOfReplicas", "2")).await.unwrap_err();
    assert_eq!(error.code(), Code::AlreadyExists);
    let list = csi::ListVolumesRequest { starting_token: "invalid-token".into(), ..Default::default() };
    assert_eq!(controller.list_volumes(list).await.unwrap_err().code(), Code::Aborted);
    let snapshot = csi::CreateSnapshotRequest::default();
    assert_eq!(controller.create_snapshot(snapshot).await.unwrap_err().code(), Code::Unimplemented);
    assert_eq!(
        controller.get_capacity(csi::GetCapacityRequest::default()).await.unwrap().into_inner().available_capacity,
        0
    );
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_waiting_call_answers_before_its_caller_gives_up_and_at_shutdown() {
    let mut world = World::new();
    let mut controller = ControllerClient::new(world.controller().await);
    let mut volume = Volume::new("v", Default::default());
    volume.metadata.finalizers = Some(vec!["longhorn.io".into()]);
    world.store.create(&volume).await.unwrap();
    let delete = || csi::DeleteVolumeRequest { volume_id: "v".into(), ..Default::default() };
    let mut request = Request::new(delete());
    request.set_timeout(Duration::from_millis(500));
    let error = controller.delete_volume(request).await.unwrap_err();
    assert!(error.code() == Code::Aborted && error.message().contains("being deleted"), "{error}");
    let shutdown = world.shutdown.clone();
    let waiting = tokio::spawn(async move { controller.delete_volume(delete()).await });
    shutdown.cancel();
    assert!(waiting.await.unwrap().is_err());
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_names_itself_and_its_place() {
    let mut world = World::new();
    let mut node = NodeClient::new(world.node().await);
    let answer = node.node_get_info(csi::NodeGetInfoRequest {}).await.unwrap().into_inner();
    assert_eq!(answer.node_id, "node-1");
    assert_eq!(answer.accessible_topology.unwrap().segments["kubernetes.io/hostname"], "node-1");
    let stage = csi::NodeStageVolumeRequest {
        volume_id: "v".into(),
        staging_target_path: "/staging".into(),
        volume_capability: Some(mount()),
        ..Default::default()
    };
    assert_eq!(node.node_stage_volume(stage).await.unwrap_err().code(), Code::NotFound);
    let expand = csi::NodeExpandVolumeRequest::default();
    assert_eq!(node.node_expand_volume(expand).await.unwrap_err().code(), Code::InvalidArgument);
    world.end().await;
}

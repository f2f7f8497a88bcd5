//! Mutual TLS from end to end: a data source, a manager that takes its file over, one that syncs it; and who is let in nowhere.

#[path = "../../runtime/tests/authority/mod.rs"]
mod authority;
mod support;

use authority::Authority;
use backing_image_agent::{client, data_source, manager};
use proto::bimrpc::backing_image_manager_service_client::BackingImageManagerServiceClient;
use proto::bimrpc::{FetchRequest, SyncRequest};
use runtime::transport::{Identity, PEER_NAME, Security};
use std::net::SocketAddr;
use support::*;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};

struct Manager {
    address: SocketAddr,
    security: Security,
    stop: CancellationToken,
}

impl Drop for Manager {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Manager {
    async fn start(disk: &TestDisk, security: Security) -> Manager {
        let (address, stop) = (address(8000), CancellationToken::new());
        let config = manager::Config { security: security.clone(), ..manager::Config::new(address, disk.path()) };
        tokio::spawn(manager::run(config, stop.clone()));
        wait_for_port(address).await;
        Manager { address, security, stop }
    }

    async fn client(&self) -> BackingImageManagerServiceClient<Channel> {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.address)).unwrap();
        BackingImageManagerServiceClient::new(self.security.connect(&endpoint).await.unwrap())
    }

    async fn state(&self) -> (String, String) {
        let copy = client::get(&self.address.to_string(), key().name.as_ref(), UUID, &self.security).await.unwrap();
        (copy.status.state, copy.status.error_msg)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_prepared_taken_over_and_synced_over_mutual_tls() {
    let (authority, bytes) = (Authority::new(), image());
    let (disk, other_disk) = (TestDisk::new(), TestDisk::new());
    let first = Manager::start(&disk, authority.member()).await;
    let second = Manager::start(&other_disk, authority.member()).await;
    let outside = Source::of(&bytes).await;
    let config = source_config(&disk, &[("url", &outside.url())], None);
    let source = RunningSource::start(data_source::Config { security: authority.member(), ..config }).await;

    let fetch = FetchRequest { spec: Some(spec()), data_source_address: source.address.to_string() };
    let taken_over = async || first.client().await.fetch(fetch.clone()).await.is_ok();
    wait_until("the file is prepared and taken over", taken_over).await;
    let sync = SyncRequest { spec: Some(spec()), from_address: first.address.to_string() };
    second.client().await.sync(sync).await.unwrap();
    wait_until("the copy is ready", async || second.state().await.0 == "ready").await;
    assert!(std::fs::read(other_disk.copy_file()).unwrap() == bytes, "the copy has the same bytes");
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_get_nothing_from_a_manager_and_a_data_source() {
    let (authority, stranger) = (Authority::new(), Authority::new());
    let disk = TestDisk::new();
    let manager = Manager::start(&disk, authority.member()).await;
    let outside = Source::of(&image()).await;
    let config = source_config(&disk, &[("url", &outside.url())], None);
    let source = RunningSource::start(data_source::Config { security: authority.member(), ..config }).await;
    let fetch = FetchRequest { spec: Some(spec()), data_source_address: source.address.to_string() };
    let taken_over = async || manager.client().await.fetch(fetch.clone()).await.is_ok();
    wait_until("the file is prepared and taken over", taken_over).await;

    // The second believes the manager, and shows a certificate of another authority.
    let strange = Security::mutual(&authority.pem(), &stranger.identity(PEER_NAME)).unwrap();
    let other_disk = TestDisk::new();
    let url = manager.address.to_string();
    for security in [Security::default(), strange, stranger.member()] {
        client::list(&url, &security).await.unwrap_err();
    }
    for security in [Security::default(), stranger.member()] {
        // Chunk data: a manager that is not of this authority asks for a copy.
        let outsider = Manager::start(&other_disk, security).await;
        let sync = SyncRequest { spec: Some(spec()), from_address: url.clone() };
        outsider.client().await.sync(sync).await.unwrap();
        wait_until("the sync fails", async || outsider.state().await.0 == "failed").await;
        let fetched = outsider.client().await.fetch(fetch.clone()).await.unwrap_err();
        assert!(fetched.message().contains("cannot be asked"), "{}", fetched.message());
        let copy = other_disk.copy_file();
        assert!(!copy.exists());
    }
    assert_eq!(client::list(&manager.address.to_string(), &manager.security).await.unwrap().len(), 1);
}

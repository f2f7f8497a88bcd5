//! How managers read each other's copies: HTTP on the port after the gRPC one.
//!
//! `GET /v1/copies/<name>-<uuid>/manifest` is the chunk manifest, `GET /v1/copies/<name>-<uuid>/data` with `Range` the bytes
//! of the file. Nothing here changes anything. The reader believes only what matches the manifest.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::BytesMut;
use reqwest::{Client, Response, StatusCode};
use tokio::time::timeout;

use crate::error::{AgentError, chain};
use crate::http_client;
use crate::layout::ImageKey;
use crate::limits::CONNECT_TIMEOUT;
use crate::manifest::{MAX_MANIFEST_BYTES, Manifest};

mod connection;

pub(crate) use connection::Connection;

/// A manager that may have a copy.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Its gRPC address, by which it is known.
    address: SocketAddr,
    client: Client,
    idle_timeout: Duration,
}

/// Why a peer did not give what was asked for.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// Asking again is of no use.
    #[error("it does not have the copy ready")]
    Without,
    #[error("it answered {0}")]
    Status(StatusCode),
    #[error("it was silent for {0:?}")]
    Silent(Duration),
    #[error("{0}")]
    Transfer(String),
    #[error("its manifest cannot be used")]
    Manifest(#[from] crate::manifest::ManifestError),
}

impl Peer {
    /// The peers of a list like `10.0.0.1:8000,10.0.0.2:8000`, each once.
    pub fn parse_list(list: &str, idle_timeout: Duration) -> Result<Vec<Peer>, AgentError> {
        let client = http_client::internal()
            .connect_timeout(CONNECT_TIMEOUT.min(idle_timeout))
            .build()
            .map_err(|e| AgentError::Unavailable { message: chain(&e) })?;
        let mut peers: Vec<Peer> = vec![];
        for text in list.split(',').map(str::trim).filter(|text| !text.is_empty()) {
            let address: SocketAddr = text.parse().map_err(|_| AgentError::Invalid {
                message: format!(
                    "`{text}` is not the address of a manager: give `ip:8000`, several separated by commas"
                ),
            })?;
            if address.port() == u16::MAX {
                return Err(AgentError::Invalid { message: format!("`{text}` has no port after it for data") });
            }
            if peers.iter().all(|peer| peer.address != address) {
                peers.push(Peer { address, client: client.clone(), idle_timeout });
            }
        }
        if peers.is_empty() {
            return Err(AgentError::Invalid {
                message: "no peer is given to sync from: give `ip:8000` of a manager".into(),
            });
        }
        Ok(peers)
    }

    /// The gRPC address of this peer.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where it gives its copies.
    fn data_address(&self) -> SocketAddr {
        SocketAddr::new(self.address.ip(), self.address.port() + 1)
    }

    /// The manifest of a copy.
    pub async fn manifest(&self, key: &ImageKey) -> Result<Manifest, PeerError> {
        let url = format!("http://{}/v1/copies/{key}/manifest", self.data_address());
        let mut response = self.send(self.client.get(url)).await?;
        let mut bytes = BytesMut::new();
        while let Some(part) = self.read(&mut response).await? {
            bytes.extend_from_slice(&part);
            if bytes.len() as u64 > MAX_MANIFEST_BYTES {
                return Err(PeerError::Transfer("its manifest is too large".into()));
            }
        }
        Ok(Manifest::decode(&bytes)?)
    }

    /// A connection for the bytes of copies.
    pub(crate) async fn connect(&self) -> Result<Connection, PeerError> {
        Connection::open(self.data_address(), self.idle_timeout).await
    }

    async fn read(&self, response: &mut Response) -> Result<Option<bytes::Bytes>, PeerError> {
        match timeout(self.idle_timeout, response.chunk()).await {
            Err(_) => Err(PeerError::Silent(self.idle_timeout)),
            Ok(part) => part.map_err(|e| PeerError::Transfer(chain(&e.without_url()))),
        }
    }

    async fn send(&self, request: reqwest::RequestBuilder) -> Result<Response, PeerError> {
        let response = match timeout(self.idle_timeout, request.send()).await {
            Err(_) => return Err(PeerError::Silent(self.idle_timeout)),
            Ok(response) => response.map_err(|e| PeerError::Transfer(chain(&e.without_url())))?,
        };
        match response.status() {
            StatusCode::OK => Ok(response),
            StatusCode::NOT_FOUND => Err(PeerError::Without),
            status => Err(PeerError::Status(status)),
        }
    }
}

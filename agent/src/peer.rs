//! How managers read each other's copies: HTTP on the port after the gRPC one.
//!
//! `GET /v1/copies/<name>-<uuid>/manifest` is the chunk manifest, `GET /v1/copies/<name>-<uuid>/data` with `Range` the bytes
//! of the file. Nothing here changes anything. The reader believes only what matches the manifest.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::BytesMut;
use reqwest::{Client, Response, StatusCode};
use runtime::transport::Security;
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
    security: Security,
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
    pub fn parse_list(list: &str, idle_timeout: Duration, security: &Security) -> Result<Vec<Peer>, AgentError> {
        let client = http_client::internal(security)
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
                peers.push(Peer { address, client: client.clone(), security: security.clone(), idle_timeout });
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
        let url = format!("{}://{}/v1/copies/{key}/manifest", self.security.scheme(), self.data_address());
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
        Connection::open(self.data_address(), self.idle_timeout, &self.security).await
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

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    #[test]
    fn a_list_of_peers_names_each_once_and_at_least_one() {
        let limit = Duration::from_secs(9);
        let parse = |list: &str| Peer::parse_list(list, limit, &Security::default()).map_err(|error| error.to_string());
        let peers = parse("127.0.0.1:8000, 127.0.0.2:8000,127.0.0.1:8000,").unwrap();
        let addresses: Vec<String> = peers.iter().map(|peer| peer.address().to_string()).collect();
        assert_eq!(addresses, ["127.0.0.1:8000", "127.0.0.2:8000"]);
        assert!(parse(" ,").unwrap_err().contains("no peer is given"));
        assert!(parse("127.0.0.1:65535").unwrap_err().contains("has no port after it"));
        assert!(parse("somewhere").unwrap_err().contains("is not the address of a manager"));
    }

    /// What is said of a peer that answers so to the question for its manifest, and is silent then.
    async fn check(head: &str, body_bytes: u64) -> String {
        // The port after that of a manager.
        let (listener, address) = loop {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            if let Some(port) = address.port().checked_sub(1) {
                break (listener, SocketAddr::new(address.ip(), port));
            }
        };
        let head = head.to_owned();
        let serving = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 4096];
            assert!(stream.read(&mut request).await.unwrap() > 0);
            stream.write_all(head.as_bytes()).await.unwrap();
            let part = vec![7; 1 << 20];
            for _ in 0..body_bytes.div_ceil(part.len() as u64) {
                if stream.write_all(&part).await.is_err() {
                    break;
                }
            }
            std::future::pending::<()>().await;
        });
        let peer =
            &Peer::parse_list(&address.to_string(), Duration::from_millis(500), &Security::default()).unwrap()[0];
        let key = "parrot-0a1b2c3d".parse().unwrap();
        let asked = timeout(Duration::from_secs(60), peer.manifest(&key));
        let error = asked.await.expect("it is not waited for ever").unwrap_err();
        serving.abort();
        error.to_string()
    }

    #[tokio::test]
    async fn a_manifest_that_does_not_come_or_does_not_end_is_refused() {
        assert_eq!(check("", 0).await, "it was silent for 500ms");
        let head = "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n";
        assert_eq!(check(head, 0).await, "it was silent for 500ms");
        let endless = "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n";
        assert_eq!(check(endless, MAX_MANIFEST_BYTES + 1).await, "its manifest is too large");
        assert_eq!(
            check("HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", 0).await,
            "it does not have the copy ready"
        );
        assert_eq!(
            check("HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n", 0).await,
            "it answered 500 Internal Server Error"
        );
    }
}

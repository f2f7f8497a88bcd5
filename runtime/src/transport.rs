//! How processes reach each other over TCP: in plain, or with mutual TLS. One value decides it for a whole process.
//!
//! Every listener and every client of ours takes a [`Security`], so that TLS is a matter of certificates and not of code paths.
//! Plain is the default, and its bytes pass nothing but a `match`.
//! With TLS both sides show a certificate of an authority that signs for nobody but us, made out to [`PEER_NAME`]: peers are reached
//! by addresses that a pod has for its life only, so an address says nothing about who answers.

mod blocking;
mod identity;
mod listener;
mod peers;
mod relay;
mod source;
mod stream;

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use api::ErrorKind;
use hyper_util::rt::TokioIo;
use rustls::client::danger::ServerCertVerifier;
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint};

pub use blocking::BlockingStream;
pub use identity::Identity;
pub use listener::Listener;
use peers::{NamedClients, OneName};
pub use relay::{Tunnel, relay};
use source::Source;
pub use stream::Stream;

/// The DNS name in the certificate of every process of ours.
pub const PEER_NAME: &str = "backing-image-csi";

/// What is spoken inside of the connections of a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    Http1,
    Grpc,
    /// Our own: JSON lines.
    Lines,
    /// The data of a replica.
    Nbd,
}

impl Protocol {
    /// What clients that ask for a protocol by name (ALPN) are told; gRPC clients insist on it.
    fn names(self) -> Vec<Vec<u8>> {
        match self {
            Protocol::Http1 => vec![b"http/1.1".to_vec()],
            Protocol::Grpc => vec![b"h2".to_vec()],
            Protocol::Lines | Protocol::Nbd => vec![],
        }
    }
}

/// Certificates that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SecurityError {
    #[error(
        "cannot read `{}`; a directory of certificates holds `ca.crt`, `tls.crt` and `tls.key`, as cert-manager writes them",
        path.display()
    )]
    Read { path: PathBuf, source: io::Error },
    #[error("{what} cannot be read: PEM is expected, `-----BEGIN {what}-----`")]
    Pem { what: &'static str },
    #[error("the certificate and its key cannot be used together; give both from one issue")]
    Identity(#[source] rustls::Error),
    #[error("the certificates of the authority cannot be used")]
    Authority(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl SecurityError {
    /// What kind of failure this is.
    pub fn kind(&self) -> ErrorKind {
        ErrorKind::Invalid
    }
}

/// How this process listens and connects. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Security(Option<Arc<Source>>);

#[derive(Debug)]
struct Tls {
    server: ServerConfig,
    client: Arc<ClientConfig>,
}

impl Tls {
    fn mutual(authorities: &str, identity: &Identity) -> Result<Tls, SecurityError> {
        let roots = Arc::new(roots(authorities)?);
        let unusable = |error: Box<dyn std::error::Error + Send + Sync>| SecurityError::Authority(error);
        let clients = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider()).build();
        let servers = WebPkiServerVerifier::builder_with_provider(roots, provider()).build();
        let servers = OneName { inner: servers.map_err(|e| unusable(e.into()))?, name: peer_name() };
        let clients = NamedClients { inner: clients.map_err(|e| unusable(e.into()))?, name: peer_name() };
        let server = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| unusable(e.into()))?
            .with_client_cert_verifier(Arc::new(clients))
            .with_cert_resolver(Arc::new(identity.clone()));
        let mut client = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| unusable(e.into()))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(servers))
            .with_client_cert_resolver(Arc::new(identity.clone()));
        client.resumption = Resumption::disabled();
        Ok(Tls { server, client: Arc::new(client) })
    }
}

impl Security {
    /// Mutual TLS: `identity` is shown to everybody, and who has nothing that one of `authorities` (PEM) signed is refused.
    ///
    /// # Errors
    /// `Invalid` when there is no usable certificate in `authorities`.
    pub fn mutual(authorities: &str, identity: &Identity) -> Result<Security, SecurityError> {
        Ok(Security::given(Tls::mutual(authorities, identity)?))
    }

    fn given(tls: Tls) -> Security {
        Security(Some(Arc::new(Source::Given(Arc::new(tls)))))
    }

    /// The same with the files of a directory: `ca.crt`, `tls.crt` and `tls.key`, PEM. When they are replaced, new connections go by
    /// the new ones; those that are open stay as they are. Plain without a directory.
    ///
    /// # Errors
    /// `Invalid` when a file cannot be read or used.
    pub fn from_directory(directory: Option<&Path>) -> Result<Security, SecurityError> {
        let Some(directory) = directory else { return Ok(Security::default()) };
        // Other processes are told of it, and they may work elsewhere.
        let path = std::path::absolute(directory);
        let path = path.map_err(|source| SecurityError::Read { path: directory.to_owned(), source })?;
        Ok(Security(Some(Arc::new(Source::directory(path)?))))
    }

    /// Where its certificates come from, for a process that shall have the same.
    pub fn directory(&self) -> Option<&Path> {
        match self.0.as_deref() {
            Some(Source::Directory { path, .. }) => Some(path),
            Some(Source::Given(_)) | None => None,
        }
    }

    fn tls(&self) -> Option<Arc<Tls>> {
        self.0.as_ref().map(|source| source.tls())
    }

    /// Whether connections are plain TCP.
    pub fn is_plain(&self) -> bool {
        self.0.is_none()
    }

    /// How addresses of our HTTP services begin.
    pub fn scheme(&self) -> &'static str {
        if self.is_plain() { "http" } else { "https" }
    }

    /// Listens.
    pub async fn listen(&self, address: SocketAddr, protocol: Protocol) -> io::Result<Listener> {
        self.accept(TcpListener::bind(address).await?, protocol)
    }

    /// Takes over a TCP socket that listens already, with options of its own, and does not block.
    pub fn listen_on(&self, socket: OwnedFd, protocol: Protocol) -> io::Result<Listener> {
        self.accept(TcpListener::from_std(socket.into())?, protocol)
    }

    fn accept(&self, listener: TcpListener, protocol: Protocol) -> io::Result<Listener> {
        let source = self.0.clone();
        let tls = source.map(|source| listener::each_time(move || source.tls().server.clone(), protocol));
        Listener::over(listener, tls)
    }

    /// A gRPC channel that connects when it is first used. The endpoint's address begins with `http://` also for TLS.
    pub fn connect_lazily(&self, endpoint: &Endpoint) -> Channel {
        match &self.0 {
            None => endpoint.connect_lazy(),
            Some(source) => endpoint.connect_with_connector_lazy(connector(source)),
        }
    }

    /// A connected gRPC channel, under the same rule.
    pub async fn connect(&self, endpoint: &Endpoint) -> Result<Channel, tonic::transport::Error> {
        match &self.0 {
            None => endpoint.connect().await,
            Some(source) => endpoint.connect_with_connector(connector(source)).await,
        }
    }

    /// For HTTP clients that make their connections themselves, with the certificates of this moment; none when they are plain.
    pub fn client_config(&self) -> Option<ClientConfig> {
        self.tls().map(|tls| ClientConfig::clone(&tls.client))
    }

    /// For code that reads and writes sockets itself; none when they are plain anyway.
    pub fn tunnel(&self) -> Option<Tunnel> {
        self.tls().map(|tls| Tunnel(tls.client.clone()))
    }

    /// A connection for blocking reads and writes; with TLS the handshake comes with the first of them.
    pub fn secure(&self, stream: std::net::TcpStream) -> io::Result<BlockingStream> {
        match self.tls() {
            None => Ok(BlockingStream::Plain(stream)),
            Some(tls) => {
                let session = rustls::ClientConnection::new(tls.client.clone(), peer_name());
                let session = session.map_err(io::Error::other)?;
                Ok(BlockingStream::Tls(Box::new(rustls::StreamOwned::new(session, stream))))
            }
        }
    }
}

/// Connects to the address of a `http://` URI.
fn connector(
    source: &Arc<Source>,
) -> impl tower::Service<
    http::Uri,
    Response = TokioIo<Stream>,
    Error = io::Error,
    Future = futures::future::BoxFuture<'static, io::Result<TokioIo<Stream>>>,
> + Send
+ 'static {
    let source = source.clone();
    tower::service_fn(move |uri: http::Uri| {
        let tls = TlsConnector::from(source.tls().client.clone());
        let connected = async move {
            let address = (uri.host().unwrap_or_default().trim_matches(['[', ']']), uri.port_u16().unwrap_or(80));
            let stream = TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            Ok(TokioIo::new(Stream::from(tls.connect(peer_name(), stream).await?)))
        };
        Box::pin(connected) as futures::future::BoxFuture<'static, io::Result<TokioIo<Stream>>>
    })
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

fn peer_name() -> ServerName<'static> {
    ServerName::try_from(PEER_NAME).expect("a DNS name")
}

fn certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>, SecurityError> {
    let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    read.ok().filter(|list| !list.is_empty()).ok_or(SecurityError::Pem { what: "CERTIFICATE" })
}

fn roots(pem: &str) -> Result<RootCertStore, SecurityError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(pem)? {
        roots.add(certificate).map_err(|error| SecurityError::Authority(error.into()))?;
    }
    Ok(roots)
}

/// Whether a client that trusts `authorities` accepts `chain` (both PEM) as `name` at that time; no when anything is unreadable.
pub fn is_accepted(authorities: &str, chain: &str, name: &str, seconds_since_epoch: u64) -> bool {
    let (Ok(roots), Ok(chain), Ok(name)) = (roots(authorities), certificates(chain), ServerName::try_from(name)) else {
        return false;
    };
    let now = UnixTime::since_unix_epoch(std::time::Duration::from_secs(seconds_since_epoch));
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider()).build();
    verifier.is_ok_and(|verifier| verifier.verify_server_cert(&chain[0], &chain[1..], &name, &[], now).is_ok())
}

#[cfg(test)]
mod tests;

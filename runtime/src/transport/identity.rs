//! The certificate that a process shows, with its key; it may be replaced while connections are made.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, RwLock};

use rustls::client::ResolvesClientCert;
use rustls::pki_types::PrivateKeyDer;
use rustls::pki_types::pem::PemObject;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{ServerConfig, SignatureScheme};
use tokio::net::TcpListener;

use super::listener::each_time;
use super::{Listener, Protocol, SecurityError, certificates, provider};

/// A certificate with its key. Clones share it: what one replaces, all show from then on.
#[derive(Clone)]
pub struct Identity(Arc<RwLock<Arc<CertifiedKey>>>);

impl Identity {
    /// From a chain that begins with the own certificate, and its key, both PEM.
    ///
    /// # Errors
    /// `Invalid` when they cannot be read, or are not of one pair.
    pub fn from_pem(chain: &str, key: &str) -> Result<Identity, SecurityError> {
        Ok(Identity(Arc::new(RwLock::new(Arc::new(read(chain, key)?)))))
    }

    /// Shows another certificate in handshakes from now on. Connections that are open stay as they are.
    ///
    /// # Errors
    /// As [`Identity::from_pem`]; what was shown before stays then.
    pub fn replace(&self, chain: &str, key: &str) -> Result<(), SecurityError> {
        let new = Arc::new(read(chain, key)?);
        *self.0.write().unwrap_or_else(|e| e.into_inner()) = new;
        Ok(())
    }

    /// Listens with TLS for callers that show no certificate, such as an API server that calls a webhook.
    pub async fn listen(&self, address: SocketAddr, protocol: Protocol) -> io::Result<Listener> {
        let config = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(io::Error::other)?
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(self.clone()));
        let listener = TcpListener::bind(address).await?;
        Listener::over(listener, Some(each_time(move || config.clone(), protocol)))
    }

    fn current(&self) -> Arc<CertifiedKey> {
        self.0.read().unwrap_or_else(|e| e.into_inner()).clone()
    }
}

fn read(chain: &str, key: &str) -> Result<CertifiedKey, SecurityError> {
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(|_| SecurityError::Pem { what: "PRIVATE KEY" })?;
    CertifiedKey::from_der(certificates(chain)?, key, &provider()).map_err(SecurityError::Identity)
}

/// Without the key.
impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Identity")
    }
}

impl ResolvesServerCert for Identity {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current())
    }
}

impl ResolvesClientCert for Identity {
    fn resolve(&self, _authorities: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.current())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

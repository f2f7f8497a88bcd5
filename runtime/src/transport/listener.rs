//! A listener that hands out connections that are ready for use.
//!
//! Handshakes run beside each other, a bounded number and each within a time limit: who connects and says nothing keeps nobody else
//! waiting.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::stream::{self, Stream as Items};
use rustls::ServerConfig;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;

use super::{Protocol, Stream};

/// Handshakes at a time. Each costs about a millisecond of a processor; the backlog of the listener keeps the others.
const MAX_HANDSHAKES: usize = 64;
/// A peer answers in milliseconds; a busy one in seconds.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// After a failure that is ours (no descriptors are left): time for connections to end.
const ACCEPT_PAUSE: Duration = Duration::from_millis(500);

/// What each handshake goes by: that of this moment.
pub(super) type EachTime = Arc<dyn Fn() -> Arc<ServerConfig> + Send + Sync>;

pub(super) fn each_time(config: impl Fn() -> ServerConfig + Send + Sync + 'static, protocol: Protocol) -> EachTime {
    Arc::new(move || {
        let mut config = config();
        config.alpn_protocols = protocol.names();
        // Each connection shows and checks the certificates of today; ours last long, so that costs little.
        config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Arc::new(config)
    })
}

/// Accepts connections, of one kind only.
pub struct Listener {
    address: SocketAddr,
    source: Source,
}

enum Source {
    Plain(TcpListener),
    /// Connections whose handshake is done.
    Tls(mpsc::Receiver<(Stream, SocketAddr)>, AbortHandle),
}

impl Listener {
    pub(super) fn over(listener: TcpListener, tls: Option<EachTime>) -> io::Result<Listener> {
        let address = listener.local_addr()?;
        let source = match tls {
            None => Source::Plain(listener),
            Some(tls) => {
                let (sender, ready) = mpsc::channel(1);
                let task = tokio::spawn(shake_hands(listener, tls, sender));
                Source::Tls(ready, task.abort_handle())
            }
        };
        Ok(Listener { address, source })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The next connection. May be given up at any time.
    pub async fn next(&mut self) -> (Stream, SocketAddr) {
        match &mut self.source {
            Source::Plain(listener) => {
                let (stream, peer) = accept(listener).await;
                (Stream::Plain(stream), peer)
            }
            Source::Tls(ready, _) => match ready.recv().await {
                Some(connection) => connection,
                // Its task ends with this value only.
                None => std::future::pending().await,
            },
        }
    }

    /// All connections, for a gRPC server.
    pub fn into_stream(self) -> impl Items<Item = io::Result<Stream>> + Send {
        stream::unfold(self, |mut listener| async move {
            let (stream, _) = listener.next().await;
            Some((Ok(stream), listener))
        })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Source::Tls(_, task) = &self.source {
            task.abort();
        }
    }
}

/// For `axum::serve`.
impl axum::serve::Listener for Listener {
    type Io = Stream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Stream, SocketAddr) {
        self.next().await
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.address)
    }
}

async fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    loop {
        match listener.accept().await {
            Ok(accepted) => return accepted,
            // That peer is gone.
            Err(error) if matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset) => {}
            Err(error) => {
                tracing::warn!(%error, "connection not accepted");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn shake_hands(listener: TcpListener, tls: EachTime, ready: mpsc::Sender<(Stream, SocketAddr)>) {
    let slots = Arc::new(Semaphore::new(MAX_HANDSHAKES));
    loop {
        let slot = slots.clone().acquire_owned().await.expect("the semaphore is never closed");
        let (stream, peer) = accept(&listener).await;
        tokio::spawn(shake(stream, peer, tls.clone(), ready.clone(), slot));
    }
}

async fn shake(
    stream: TcpStream,
    peer: SocketAddr,
    tls: EachTime,
    ready: mpsc::Sender<(Stream, SocketAddr)>,
    slot: OwnedSemaphorePermit,
) {
    let shaken = async {
        stream.set_nodelay(true)?;
        TlsAcceptor::from(tls()).accept(stream).await
    };
    let problem = match timeout(HANDSHAKE_TIMEOUT, shaken).await {
        Ok(Ok(stream)) => {
            drop(slot);
            // Nobody listens any more.
            let _ = ready.send((Stream::from(stream), peer)).await;
            return;
        }
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("no handshake within {} s", HANDSHAKE_TIMEOUT.as_secs()),
    };
    tracing::info!(%peer, problem, "connection refused");
}

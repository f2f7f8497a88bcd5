//! A listener that hands out connections that are ready for use.
//!
//! Handshakes run beside each other, a bounded number and each within a time limit. A further one takes the place of another, of the
//! address that has the most: who connects and says nothing keeps nobody else waiting, however many there are.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::stream::{self, Stream as Items};
use rustls::ServerConfig;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;

use super::{Protocol, Stream};

/// Handshakes at a time. Each costs about a millisecond of a processor, so one that is meant gets through before 64 others come.
pub(super) const MAX_HANDSHAKES: usize = 64;
/// A peer answers in milliseconds; a busy one in seconds.
pub(super) const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
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
    let handshakes = Handshakes::default();
    loop {
        let (stream, peer) = accept(&listener).await;
        handshakes.begin(peer, |place| shake(stream, peer, tls.clone(), ready.clone(), place));
    }
}

/// The handshakes that run, in the order in which they began.
#[derive(Clone, Default)]
struct Handshakes(Arc<Mutex<Running>>);

#[derive(Default)]
struct Running {
    begun: u64,
    /// Without a handle until its task is begun.
    all: BTreeMap<u64, (IpAddr, Option<AbortHandle>)>,
}

/// One of them, until it is dropped.
struct Place {
    handshakes: Handshakes,
    number: u64,
}

impl Handshakes {
    fn running(&self) -> MutexGuard<'_, Running> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs one more; when there are too many, another one ends.
    fn begin<F: Future<Output = ()> + Send + 'static>(&self, peer: SocketAddr, shake: impl FnOnce(Place) -> F) {
        let (number, dispensed) = self.running().give_number(peer.ip());
        if let Some((address, task)) = dispensed {
            task.iter().for_each(AbortHandle::abort);
            tracing::info!(peer = %address, problem = "too many handshakes at a time", "connection refused");
        }
        // Not under the lock: a runtime that ends drops the handshake here, and with it its place, which locks too.
        let task = tokio::spawn(shake(Place { handshakes: self.clone(), number }));
        // Unless it has left its place already.
        if let Some((_, handle)) = self.running().all.get_mut(&number) {
            *handle = Some(task.abort_handle());
        }
    }
}

impl Running {
    /// The number of one more, and the one that ends for it, if any.
    fn give_number(&mut self, peer: IpAddr) -> (u64, Option<(IpAddr, Option<AbortHandle>)>) {
        let is_full = self.all.len() >= MAX_HANDSHAKES;
        let number = is_full.then(|| dispensable(self.all.iter().map(|(number, (address, _))| (*number, *address))));
        let dispensed = number.flatten().and_then(|number| self.all.remove(&number));
        self.begun += 1;
        self.all.insert(self.begun, (peer, None));
        (self.begun, dispensed)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.handshakes.running().all.remove(&self.number);
    }
}

/// Which handshake ends when there are too many: the oldest of the address that has the most, so that strangers at one address
/// never end those of others.
fn dispensable(running: impl Iterator<Item = (u64, IpAddr)> + Clone) -> Option<u64> {
    let mut counts: BTreeMap<IpAddr, usize> = BTreeMap::new();
    running.clone().for_each(|(_, address)| *counts.entry(address).or_default() += 1);
    let most = counts.values().copied().max()?;
    running.filter(|(_, address)| counts[address] == most).map(|(number, _)| number).min()
}

async fn shake(
    stream: TcpStream,
    peer: SocketAddr,
    tls: EachTime,
    ready: mpsc::Sender<(Stream, SocketAddr)>,
    place: Place,
) {
    let shaken = async {
        stream.set_nodelay(true)?;
        TlsAcceptor::from(tls()).accept(stream).await
    };
    let problem = match timeout(HANDSHAKE_TIMEOUT, shaken).await {
        Ok(Ok(stream)) => {
            drop(place);
            // Nobody listens any more.
            let _ = ready.send((Stream::from(stream), peer)).await;
            return;
        }
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("no handshake within {} s", HANDSHAKE_TIMEOUT.as_secs()),
    };
    tracing::info!(%peer, problem, "connection refused");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_runtime_that_ends_waits_for_no_handshake() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let handle = runtime.handle().clone();
        drop(runtime);
        let (handshakes, (tell, told)) = (Handshakes::default(), std::sync::mpsc::channel());
        let own = handshakes.clone();
        let begins = std::thread::spawn(move || {
            let _within = handle.enter();
            own.begin(([10, 0, 0, 7], 1).into(), |place| async move { drop(place) });
            tell.send(()).unwrap();
        });
        told.recv_timeout(HANDSHAKE_TIMEOUT).expect("it begins and is dropped at once");
        begins.join().unwrap();
        assert!(handshakes.running().all.is_empty());
    }

    #[test]
    fn strangers_at_one_address_end_their_own_handshakes_only() {
        let check = |addresses: &[u8]| {
            let running = addresses.iter().map(|last| IpAddr::from([10, 0, 0, *last]));
            dispensable((0..).zip(running.collect::<Vec<_>>()))
        };
        assert_eq!(check(&[]), None);
        assert_eq!(check(&[7]), Some(0));
        assert_eq!(check(&[7, 9, 9]), Some(1), "the oldest of those that have the most");
        assert_eq!(check(&[7, 9, 9, 7]), Some(0), "as many each");
        assert_eq!(check(&[7, 8, 9, 9, 7, 9]), Some(2));
    }
}

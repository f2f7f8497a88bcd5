//! NBD over TCP, handed on to the daemon's unix socket.
//!
//! QEMU's own TCP server before 8.1 leaves Nagle's algorithm on, which costs 44 ms per batch of requests.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::BufReader;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// One request of 1 MiB and its header pass in a few pieces.
const BUFFER_BYTES: usize = 256 << 10;
/// Connections at a time. An export serves one; the rest is room for an old one that is about to end.
const MAX_CONNECTIONS: usize = 8;
/// After an error of accept (out of descriptors), so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Relays until `stop`.
pub(super) async fn serve(listener: TcpListener, socket: PathBuf, stop: CancellationToken) {
    let (tasks, slots, socket) = (TaskTracker::new(), Arc::new(Semaphore::new(MAX_CONNECTIONS)), Arc::new(socket));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.cancelled() => break,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "nbd connection not accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(slot) = slots.clone().try_acquire_owned() else {
            tracing::warn!(%peer, "nbd connection refused, too many at a time");
            continue;
        };
        let (socket, stop) = (socket.clone(), stop.clone());
        tasks.spawn(async move {
            tokio::select! {
                outcome = relay(stream, &socket) => {
                    if let Err(error) = outcome {
                        tracing::debug!(%peer, %error, "nbd connection ended");
                    }
                }
                () = stop.cancelled() => {}
            }
            drop(slot);
        });
    }
    tasks.close();
    tasks.wait().await;
}

/// Either end closes both: a half-open NBD connection is of no use, and an ended export must be noticed at once.
async fn relay(mut tcp: TcpStream, socket: &std::path::Path) -> io::Result<()> {
    tcp.set_nodelay(true)?;
    let mut unix = runtime::socket::connect(socket).await?;
    let (tcp_reader, mut tcp_writer) = tcp.split();
    let (unix_reader, mut unix_writer) = unix.split();
    let mut requests = BufReader::with_capacity(BUFFER_BYTES, tcp_reader);
    let mut replies = BufReader::with_capacity(BUFFER_BYTES, unix_reader);
    tokio::select! {
        ended = tokio::io::copy_buf(&mut requests, &mut unix_writer) => ended.map(drop),
        ended = tokio::io::copy_buf(&mut replies, &mut tcp_writer) => ended.map(drop),
    }
}

//! The data of a replica for a network that is not trusted: each connection with TLS is relayed to one of its daemon's.
//!
//! A connection to the daemon belongs to one connection of an engine and ends with it, so an export is left, and ended, as in
//! plain: what the daemon has not read when it closes its side is dropped. The daemon bounds how many there are: it takes so many,
//! some more wait at its socket, and the next are refused by that.

use std::path::{Path, PathBuf};

use runtime::transport::{Listener, Stream, relay};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Relays until it is stopped. `socket` is where the daemon serves.
pub(super) async fn serve(mut listener: Listener, socket: PathBuf, stop: CancellationToken, tasks: TaskTracker) {
    loop {
        let (stream, peer) = tokio::select! {
            next = listener.next() => next,
            () = stop.cancelled() => return,
        };
        let (socket, stop) = (socket.clone(), stop.clone());
        tasks.spawn(async move {
            let relayed = tokio::select! {
                relayed = connect(stream, &socket) => relayed,
                () = stop.cancelled() => Ok(()),
            };
            if let Err(error) = relayed {
                tracing::info!(%peer, %error, "connection broke");
            }
        });
    }
}

async fn connect(stream: Stream, socket: &Path) -> std::io::Result<()> {
    relay(stream, runtime::socket::connect(socket).await?).await
}

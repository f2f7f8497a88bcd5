//! Stands between a connection with TLS and who speaks in plain text only: QEMU's NBD server, the event loop of an engine.
//!
//! It keeps one buffer for each direction; what does not fit waits in the socket of the sender. An end is passed on behind all that
//! came before it. A connection that breaks takes the other one with it at once, and what was on its way between them is gone: no
//! byte ever goes on by another connection.

use std::io;
use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustls::ClientConfig;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::peer_name;

/// Four records of TLS: as much as rustls takes at once.
const BUFFER_BYTES: usize = 64 << 10;
/// How often a relay is looked at that has no two ends any more. Nobody of ours has more than the answers to a few requests to say
/// then; a peer that stands still would keep the rest, and the relay, for ever.
const LINGER: Duration = Duration::from_secs(30);

/// Passes on what either says to the other, until both have ended or one connection broke.
///
/// # Errors
/// How it broke, or that the rest could not be passed on within a minute after an end.
pub async fn relay(secure: impl AsyncRead + AsyncWrite, plain: tokio::net::UnixStream) -> io::Result<()> {
    let socket = plain.as_fd().try_clone_to_owned()?;
    let (from_secure, to_secure) = tokio::io::split(secure);
    let (from_plain, to_plain) = plain.into_split();
    let has_ended = AtomicBool::new(false);
    let passed = async {
        let ends = |result: io::Result<()>| {
            has_ended.store(true, Ordering::Relaxed);
            result
        };
        let inwards = async { ends(pass_on(from_secure, to_plain).await) };
        let outwards = async { ends(pass_on(from_plain, to_secure).await) };
        tokio::try_join!(inwards, outwards).map(drop)
    };
    tokio::select! {
        passed = passed => passed,
        error = stuck(&socket, &has_ended) => Err(error),
    }
}

/// Returns when an end could not be passed on, or was not answered by the other one, for at least [`LINGER`].
async fn stuck(plain: &OwnedFd, has_ended: &AtomicBool) -> io::Error {
    let mut before = false;
    loop {
        tokio::time::sleep(LINGER).await;
        // Behind bytes that nobody takes an end is not seen by reading.
        let now = has_ended.load(Ordering::Relaxed) || is_closed(plain);
        if before && now {
            return io::Error::new(io::ErrorKind::TimedOut, "one side ended, and the other one takes no notice");
        }
        before = now;
    }
}

/// Whether the other end of a unix socket is closed, in both directions.
fn is_closed(socket: &OwnedFd) -> bool {
    let mut asked = [PollFd::new(socket, PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut asked, Some(&now)).is_ok() && asked[0].revents().contains(PollFlags::HUP)
}

async fn pass_on(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let count = from.read(&mut buffer).await?;
        if count == 0 {
            return to.shutdown().await;
        }
        to.write_all(&buffer[..count]).await?;
        // Nothing may be held back: the next bytes may be the answer to these.
        to.flush().await?;
    }
}

/// Makes plain ends for connections with TLS, for code that has an event loop of its own.
pub struct Tunnel(pub(super) Arc<ClientConfig>);

impl Tunnel {
    /// Shakes hands within a time; a thread relays between the connection and the plain end until either ends.
    ///
    /// The peer may still refuse our certificate: then the plain end ends, and the log says why.
    ///
    /// # Errors
    /// When the peer is not to be believed, or takes too long (`TimedOut`).
    pub fn open(&self, stream: TcpStream, limit: Duration) -> io::Result<UnixStream> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let peer = stream.peer_addr()?;
        let (near, far) = UnixStream::pair()?;
        stream.set_nonblocking(true)?;
        far.set_nonblocking(true)?;
        let silent = || io::Error::new(io::ErrorKind::TimedOut, "it did not answer a TLS handshake");
        let shaken = async {
            let stream = tokio::net::TcpStream::from_std(stream)?;
            let shaken = TlsConnector::from(self.0.clone()).connect(peer_name(), stream);
            let stream = timeout(limit, shaken).await.unwrap_or_else(|_| Err(silent()))?;
            Ok::<_, io::Error>((stream, tokio::net::UnixStream::from_std(far)?))
        };
        let (stream, far) = runtime.block_on(shaken)?;
        std::thread::Builder::new().name("relay".into()).spawn(move || {
            if let Err(error) = runtime.block_on(relay(stream, far)) {
                tracing::info!(%peer, %error, "connection broke");
            }
        })?;
        Ok(near)
    }
}

#[cfg(test)]
mod tests;

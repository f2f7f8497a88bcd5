//! A gRPC server on a unix socket.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use tokio_stream::wrappers::UnixListenerStream;
use tonic::service::Routes;
use tonic::transport::Server;
use tracing::{info, warn};

use crate::rpc::Calls;
use crate::{CsiError, limits};

/// Serves until the shutdown request of `calls`, then lets calls in progress end. A stale socket of an earlier process is replaced.
pub async fn serve(socket: &Path, routes: Routes, calls: Calls) -> Result<(), CsiError> {
    let listen = |source| CsiError::Listen { socket: socket.to_owned(), source };
    if let Some(folder) = socket.parent() {
        std::fs::create_dir_all(folder).map_err(listen)?;
    }
    let listener = runtime::socket::bind(socket).map_err(listen)?;
    // Whoever reaches this socket can attach and mount: its owner only.
    std::fs::set_permissions(socket, Permissions::from_mode(0o600)).map_err(listen)?;
    info!(socket = %socket.display(), "csi socket open");
    let shutdown = calls.shutdown.clone();
    let server = Server::builder()
        .add_routes(routes)
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), shutdown.clone().cancelled_owned());
    // A connection that stays open after the request to end must not keep us.
    let late = async {
        shutdown.cancelled().await;
        tokio::time::sleep(limits::DRAIN).await;
    };
    let outcome = tokio::select! {
        outcome = server => outcome.map_err(|source| CsiError::Serve { socket: socket.to_owned(), source }),
        () = late => {
            warn!(socket = %socket.display(), "connections were still open at the end");
            Ok(())
        }
    };
    calls.tracker.close();
    if tokio::time::timeout(limits::DRAIN, calls.tracker.wait()).await.is_err() {
        warn!(calls = calls.tracker.len(), "calls were still running at the end");
    }
    if let Err(error) = runtime::files::remove_if_present(socket) {
        warn!(socket = %socket.display(), %error, "socket not removed");
    }
    outcome
}

//! HTTP listeners of roles.

use std::net::SocketAddr;

use api::ErrorKind;
use runtime::transport::{Listener, Protocol};
use tokio_util::sync::CancellationToken;

use crate::failure::{Failure, failed};
use crate::roles::security;

/// Listens there.
pub async fn bind(listen: &str) -> anyhow::Result<Listener> {
    let address: SocketAddr = match listen.parse() {
        Ok(address) => address,
        Err(_) => {
            return failed(
                ErrorKind::Invalid,
                format!("`{listen}` is not an address to listen on; write for example 127.0.0.1:9500"),
            );
        }
    };
    match security().listen(address, Protocol::Http1).await {
        Ok(listener) => Ok(listener),
        Err(error) => {
            let message = format!("cannot listen on {address}: {error}; choose another one with --listen");
            Err(Failure::new(ErrorKind::NotReady, message).into())
        }
    }
}

/// Serves until the request to end.
pub async fn serve(listener: Listener, router: axum::Router, shutdown: CancellationToken) -> anyhow::Result<()> {
    axum::serve(listener, router).with_graceful_shutdown(shutdown.cancelled_owned()).await?;
    Ok(())
}

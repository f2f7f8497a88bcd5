//! HTTP clients: for what is inside of the cluster, and for image sources outside of it.

use api::source_address::AllowedSources;
use reqwest::{Client, ClientBuilder, redirect};
use runtime::transport::Security;

use crate::error::{AgentError, chain};
use crate::limits;
use crate::source_guard::{self, Guard};
use crate::source_url::SourceUrl;

/// A client for our own roles: straight, whatever proxy or certificates the environment has.
pub(crate) fn internal(security: &Security) -> ClientBuilder {
    let builder = Client::builder().no_proxy().redirect(redirect::Policy::none());
    match security.client_config() {
        Some(config) => builder.tls_backend_preconfigured(config),
        // Without the empty list no client can be built on a machine that has no certificates.
        None => builder.tls_certs_only([]),
    }
}

/// A client for an image source: no limit in time, a bounded number of redirects, only to http and https, and only to allowed addresses.
///
/// # Errors
/// `Invalid` when the address is not allowed; or when it is https and this machine trusts nobody. For http that does not matter.
pub(crate) fn external(url: &SourceUrl, allowed: &AllowedSources) -> Result<Client, AgentError> {
    let failed = |problem: String| AgentError::Download { url: url.to_string(), problem };
    let guard = Guard::new(allowed.clone(), url.expose(), source_guard::proxies_of_environment());
    guard.check(url.expose()).map_err(|forbidden| failed(forbidden.to_string()))?;
    match builder(url, &guard).build() {
        Ok(client) => Ok(client),
        Err(error) if url.expose().scheme() == "https" => Err(failed(format!(
            "{}: install the package `ca-certificates` where the data source runs",
            chain(&error.without_url())
        ))),
        Err(_) => builder(url, &guard).tls_certs_only([]).build().map_err(|error| failed(chain(&error.without_url()))),
    }
}

/// Why a request found no answer, in few words: the innermost cause says what happened, the layers around it only how we are built.
pub fn unsent(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    let what = if error.is_timeout() {
        "the server did not answer in time"
    } else if error.is_connect() {
        "cannot connect"
    } else {
        "the request broke"
    };
    format!("{what}: {cause}")
}

fn builder(url: &SourceUrl, guard: &Guard) -> ClientBuilder {
    let redirects = guard.clone();
    let policy = redirect::Policy::custom(move |attempt| {
        if attempt.previous().len() > limits::MAX_REDIRECTS {
            return attempt.error(format!("more than {} redirects", limits::MAX_REDIRECTS));
        }
        if !matches!(attempt.url().scheme(), "http" | "https") {
            return attempt.error("a redirect to something else than http or https");
        }
        match redirects.check_redirect(attempt.url()) {
            Ok(()) => attempt.follow(),
            Err(why) => attempt.error(why),
        }
    });
    let builder = Client::builder()
        .redirect(policy)
        .dns_resolver(guard.clone())
        .connect_timeout(limits::CONNECT_TIMEOUT)
        .user_agent(concat!("backing-image-csi/", env!("CARGO_PKG_VERSION")));
    // A proxy of the environment cannot reach what listens on this machine only.
    if url.is_loopback() { builder.no_proxy() } else { builder }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;
    use tokio::sync::oneshot;

    use super::*;

    /// A server on this machine only; says who came.
    async fn server() -> (SocketAddr, oneshot::Receiver<SocketAddr>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (seen, visitor) = oneshot::channel();
        tokio::spawn(async move {
            let (mut stream, peer) = listener.accept().await.unwrap();
            let _ = seen.send(peer);
            let _ = stream.read(&mut [0; 4096]).await;
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx").await;
        });
        (address, visitor)
    }

    /// Past the look at the text, so that only the one at the connection is left, as for a name that nobody knows.
    async fn ask(address: SocketAddr, allowed: &str) -> Result<u16, String> {
        let url = SourceUrl::parse(&format!("http://localhost:{}/x", address.port())).unwrap();
        let guard = Guard::new(allowed.parse().unwrap(), url.expose(), vec![]);
        let client = builder(&url, &guard).tls_certs_only([]).build().unwrap();
        match client.get(url.expose().clone()).send().await {
            Ok(response) => Ok(response.status().as_u16()),
            Err(error) => Err(source_guard::forbidden(&error).expect("that is why").to_string()),
        }
    }

    #[tokio::test]
    async fn a_name_that_resolves_to_this_machine_is_refused_at_the_connection() {
        let (address, mut visitor) = server().await;
        let why = ask(address, "").await.unwrap_err();
        assert!(why.starts_with("`localhost` resolves to ") && why.contains("is a loopback address"), "{why}");
        assert!(visitor.try_recv().is_err(), "nobody came");
        assert_eq!(ask(address, "127.0.0.0/8").await, Ok(200));
        assert!(visitor.await.unwrap().ip().is_loopback());
    }
}

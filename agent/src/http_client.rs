//! HTTP clients: for what is inside of the cluster, and for image sources outside of it.

use reqwest::{Client, ClientBuilder, redirect};

use runtime::transport::Security;

use crate::error::{AgentError, chain};
use crate::limits;
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

/// A client for an image source: no limit in time, a bounded number of redirects, only to http and https.
///
/// # Errors
/// `Invalid` when the address is https and this machine trusts nobody. For http that does not matter.
pub(crate) fn external(url: &SourceUrl) -> Result<Client, AgentError> {
    let failed = |problem: String| AgentError::Download { url: url.to_string(), problem };
    match builder(url).build() {
        Ok(client) => Ok(client),
        Err(error) if url.expose().scheme() == "https" => Err(failed(format!(
            "{}: install the package `ca-certificates` where the data source runs",
            chain(&error.without_url())
        ))),
        Err(_) => builder(url).tls_certs_only([]).build().map_err(|error| failed(chain(&error.without_url()))),
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

fn builder(url: &SourceUrl) -> ClientBuilder {
    let policy = redirect::Policy::custom(|attempt| {
        if attempt.previous().len() > limits::MAX_REDIRECTS {
            return attempt.error(format!("more than {} redirects", limits::MAX_REDIRECTS));
        }
        if !matches!(attempt.url().scheme(), "http" | "https") {
            return attempt.error("a redirect to something else than http or https");
        }
        attempt.follow()
    });
    let builder = Client::builder()
        .redirect(policy)
        .connect_timeout(limits::CONNECT_TIMEOUT)
        .user_agent(concat!("backing-image-csi/", env!("CARGO_PKG_VERSION")));
    // A proxy of the environment cannot reach what listens on this machine only.
    if url.is_loopback() { builder.no_proxy() } else { builder }
}

//! An image comes from nowhere where it must not come from: looked at in the address, at each redirect, and in what a name resolves to.
//!
//! The resolver of the client hands out allowed addresses only, and the client connects to nothing else. So a name that means another
//! address a moment later (DNS rebinding) gains nothing. A proxy of the environment is no source: it may be anywhere, and what it
//! resolves is its own business.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use api::setting::ALLOWED_SOURCE_ADDRESSES;
use api::source_address::{AllowedSources, Special};
use reqwest::Url;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};

/// Why a source is not asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} is {}: setting `{ALLOWED_SOURCE_ADDRESSES}` says from which of them images may be fetched", special.as_str())]
pub struct Forbidden {
    /// `` `host` ``, or `` `name` resolves to 127.0.0.1, which ``.
    what: String,
    special: Special,
}

/// What looks at addresses.
#[derive(Clone, Debug)]
pub struct Guard {
    allowed: Arc<AllowedSources>,
    /// Names of proxies, which are not looked at.
    proxies: Arc<Vec<String>>,
}

impl Guard {
    /// For a download from `url` through these proxies. One that has the name of the source is looked at like any source.
    pub fn new(allowed: AllowedSources, url: &Url, mut proxies: Vec<String>) -> Guard {
        proxies.retain(|name| url.host_str() != Some(name));
        Guard { allowed: Arc::new(allowed), proxies: Arc::new(proxies) }
    }

    /// Looks at the text of an address.
    pub fn check(&self, url: &Url) -> Result<(), Forbidden> {
        let host = url.host_str().unwrap_or_default();
        match self.allowed.refusal_of_host(host) {
            Some(special) => Err(Forbidden { what: format!("`{host}`"), special }),
            None => Ok(()),
        }
    }

    /// Looks at an address that is about to be followed. A proxy's name would not be looked at once more when it is resolved.
    pub fn check_redirect(&self, url: &Url) -> Result<(), String> {
        self.check(url).map_err(|forbidden| forbidden.to_string())?;
        match url.host_str().filter(|host| self.is_proxy(host)) {
            Some(host) => Err(format!("a redirect to the proxy `{host}`")),
            None => Ok(()),
        }
    }

    fn is_proxy(&self, name: &str) -> bool {
        self.proxies.iter().any(|proxy| proxy == name)
    }

    /// What is left of the addresses of a name.
    fn pick(&self, name: &str, found: Vec<SocketAddr>) -> Result<Vec<SocketAddr>, Forbidden> {
        if self.is_proxy(name) {
            return Ok(found);
        }
        let refusal = |address: &SocketAddr| Some((address.ip(), self.allowed.refusal(address.ip())?));
        let refused: Option<(IpAddr, Special)> = found.iter().find_map(refusal);
        let good: Vec<SocketAddr> = found.into_iter().filter(|address| refusal(address).is_none()).collect();
        match refused {
            Some((address, special)) if good.is_empty() => {
                Err(Forbidden { what: format!("`{name}` resolves to {address}, which"), special })
            }
            _ => Ok(good),
        }
    }
}

impl Resolve for Guard {
    fn resolve(&self, name: Name) -> Resolving {
        let guard = self.clone();
        Box::pin(async move {
            // The client puts the port in.
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?.collect();
            let good = guard.pick(name.as_str(), found)?;
            Ok(Box::new(good.into_iter()) as Addrs)
        })
    }
}

/// The names of the proxies that the environment asks for.
pub fn proxies_of_environment() -> Vec<String> {
    let variables = ["HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"];
    variables.into_iter().filter_map(|name| proxy_name(&std::env::var(name).ok()?)).collect()
}

/// The host of a proxy; its address may lack the scheme.
fn proxy_name(text: &str) -> Option<String> {
    let whole = if text.contains("://") { text.to_owned() } else { format!("http://{text}") };
    Url::parse(&whole).ok()?.host_str().map(str::to_owned)
}

/// What forbade a request, if that is why it failed.
pub fn forbidden(error: &reqwest::Error) -> Option<&Forbidden> {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(forbidden) = error.downcast_ref() {
            return Some(forbidden);
        }
        cause = error.source();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(host: &str) -> Url {
        Url::parse(&format!("http://{host}/x")).unwrap()
    }

    fn guard(allowed: &str, proxies: &[&str]) -> Guard {
        let proxies = proxies.iter().map(|name| (*name).to_owned()).collect();
        Guard::new(allowed.parse().unwrap(), &url("source.example"), proxies)
    }

    fn addresses(texts: &[&str]) -> Vec<SocketAddr> {
        texts.iter().map(|text| SocketAddr::new(text.parse().unwrap(), 0)).collect()
    }

    #[test]
    fn spellings_are_judged_as_the_client_reads_them() {
        let guard = guard("", &[]);
        for host in
            ["127.1", "0x7f.1", "2130706433", "0177.0.0.1", "0x", "127.0.0.%31", "１２７.0.0.1", "[::ffff:7f00:1]"]
        {
            assert!(guard.check(&url(host)).is_err(), "{host}");
        }
        assert_eq!(guard.check(&url("example.com")), Ok(()));
    }

    #[test]
    fn of_what_a_name_resolves_to_only_the_allowed_is_connected_to() {
        let guard = guard("127.0.0.1", &["proxy.example"]);
        let mixed = addresses(&["127.0.0.2", "10.0.0.1", "169.254.169.254", "::1"]);
        assert_eq!(guard.pick("a.example", mixed), Ok(addresses(&["10.0.0.1"])));
        let local = addresses(&["127.0.0.1"]);
        assert_eq!(guard.pick("a.example", local.clone()), Ok(local));
        let said = guard.pick("a.example", addresses(&["127.0.0.2", "fe80::1"])).unwrap_err().to_string();
        assert_eq!(
            said,
            "`a.example` resolves to 127.0.0.2, which is a loopback address: setting `backing-image-allowed-source-addresses` says from which of them images may be fetched"
        );
        assert_eq!(guard.pick("nowhere.example", vec![]), Ok(vec![]));
    }

    #[test]
    fn a_proxy_may_be_anywhere_and_is_no_back_door() {
        let near = addresses(&["127.0.0.2"]);
        let proxied = guard("", &["proxy.example"]);
        assert_eq!(proxied.pick("proxy.example", near.clone()), Ok(near.clone()));
        assert!(proxied.pick("source.example", near.clone()).is_err());
        assert!(proxied.check_redirect(&url("proxy.example")).unwrap_err().contains("a redirect to the proxy"));
        assert!(guard("", &["source.example"]).pick("source.example", near).is_err(), "it is the source as well");
        let names = ["http://u:p@Proxy.example:3128", "proxy.example:3128", "socks5://proxy.example"].map(proxy_name);
        assert_eq!(names, [const { Some("proxy.example") }; 3].map(|name| name.map(str::to_owned)));
    }
}

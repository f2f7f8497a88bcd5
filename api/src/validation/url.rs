//! The address of a download, as far as it can be judged without asking the network.

use std::net::Ipv6Addr;

use crate::setting::ALLOWED_SOURCE_ADDRESSES;
use crate::source_address::{AllowedSources, Special};

/// What is wrong with a download address. The texts are Longhorn's, where Longhorn has one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mistake {
    Empty,
    Syntax,
    Scheme,
    Address(Special),
}

impl Mistake {
    pub fn message(self) -> String {
        match self {
            Mistake::Empty => {
                "download URL is not provided: give the http or https address of a qcow2 or raw file".into()
            }
            Mistake::Syntax => "invalid URI for request: an address looks like https://example.com/image.qcow2".into(),
            Mistake::Scheme => "invalid download URL scheme: only http and https are offered".into(),
            Mistake::Address(special) => format!(
                "must not target {}: the file is fetched from within the cluster, so give an address that every node reaches, or allow this one by setting `{ALLOWED_SOURCE_ADDRESSES}`",
                special.as_str()
            ),
        }
    }
}

/// Looks at the text of an address.
///
/// Names pass that only resolve to an address that is not allowed: whoever connects must look at what it connects to.
pub fn check(url: &str, allowed: &AllowedSources) -> Result<(), Mistake> {
    if url.is_empty() {
        return Err(Mistake::Empty);
    }
    if url.chars().any(|c| c.is_whitespace() || c.is_control()) {
        return Err(Mistake::Syntax);
    }
    if url.starts_with('/') {
        return Err(Mistake::Scheme);
    }
    let (scheme, rest) = url.split_once(':').filter(|(scheme, _)| is_scheme(scheme)).ok_or(Mistake::Syntax)?;
    if !matches!(scheme.to_ascii_lowercase().as_str(), "http" | "https") {
        return Err(Mistake::Scheme);
    }
    let after = rest.strip_prefix("//").ok_or(Mistake::Syntax)?;
    let authority = after.split(['/', '?', '#', '\\']).next().unwrap_or_default();
    let address = authority.rsplit_once('@').map_or(authority, |(_, address)| address);
    let host = split_port(address).ok_or(Mistake::Syntax)?;
    // An encoded host would have to be decoded to be judged; nobody needs one.
    if host.contains('%') {
        return Err(Mistake::Syntax);
    }
    match allowed.refusal_of_host(host) {
        Some(special) => Err(Mistake::Address(special)),
        None if host.is_empty() => Err(Mistake::Syntax),
        None => Ok(()),
    }
}

/// The address without what may be secret in it: user, password, query and fragment.
///
/// Readers of addresses forgive much (`http:user:pw@host`, backslashes, tabs within), and so must this. Other text stays.
pub fn redact(text: &str) -> String {
    let plain: String = text.chars().filter(|c| !c.is_control()).collect();
    let plain = plain.trim();
    let is_web = |scheme: &str| scheme.eq_ignore_ascii_case("http") || scheme.eq_ignore_ascii_case("https");
    let (scheme, after) = match plain.split_once(':') {
        Some((scheme, rest)) if is_web(scheme) => (scheme, rest.trim_start_matches(['/', '\\'])),
        Some((scheme, rest)) if rest.starts_with("//") => (scheme, &rest[2..]),
        _ => return text.to_owned(),
    };
    let (authority, rest) = after.split_at(after.find(['/', '\\', '?', '#']).unwrap_or(after.len()));
    let (user, host) = authority.rsplit_once('@').map_or(("", authority), |(_, host)| ("<redacted>@", host));
    let path = rest.split(['?', '#']).next().unwrap_or_default();
    let query = if rest.contains('?') { "?<redacted>" } else { "" };
    format!("{scheme}://{user}{host}{path}{query}")
}

fn is_scheme(text: &str) -> bool {
    text.bytes().next().is_some_and(|b| b.is_ascii_alphabetic())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'-' | b'.'))
}

/// The host of `host`, `host:port` or `[v6]:port`; `None` when it is none of them.
fn split_port(address: &str) -> Option<&str> {
    let (host, port) = match address.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']')?;
            host.parse::<Ipv6Addr>().ok()?;
            (host, port)
        }
        None => address.find(':').map_or((address, ""), |colon| address.split_at(colon)),
    };
    let port_is_right = match port.strip_prefix(':') {
        Some(digits) => {
            digits.is_empty() || (digits.bytes().all(|b| b.is_ascii_digit()) && digits.parse::<u16>().is_ok())
        }
        None => port.is_empty(),
    };
    port_is_right.then_some(host)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn judges_addresses_as_longhorn_does() {
        use Mistake::*;
        const LOCAL: Option<Mistake> = Some(Address(Special::Loopback));
        let cases = [
            ("https://example.com/image.qcow2", None),
            ("HTTP://example.com", None),
            ("http://user:secret@example.com:8080/a?b#c", None),
            ("http://10.0.0.7/raw", None),
            ("http://169.254.169.254/", Some(Address(Special::Metadata))),
            ("http://user@169.254.1.2:80/", Some(Address(Special::LinkLocal))),
            ("http://127.0.0.%31/", Some(Syntax)),
            ("http://[2001:db8::1]:80/x", None),
            ("http://1.2.3.4.5/x", None),
            ("", Some(Empty)),
            ("example.com/image", Some(Syntax)),
            ("http//example.com", Some(Syntax)),
            ("http://exa mple.com", Some(Syntax)),
            ("http://example.com/\n", Some(Syntax)),
            ("http:example.com", Some(Syntax)),
            ("http://example.com:port/", Some(Syntax)),
            ("http://example.com:70000/", Some(Syntax)),
            ("http://[::1/", Some(Syntax)),
            ("http://[example.com]/", Some(Syntax)),
            ("://example.com", Some(Syntax)),
            ("ftp://example.com/image", Some(Scheme)),
            ("file:///etc/passwd", Some(Scheme)),
            ("/etc/passwd", Some(Scheme)),
            ("http://localhost/image", LOCAL),
            ("http://LOCALHOST.:80/image", LOCAL),
            ("http://a.localhost/", LOCAL),
            ("http://example.com@127.0.0.1/", LOCAL),
            ("http://127.8.9.1/", LOCAL),
            ("http://127.1/", LOCAL),
            ("http://0x7f000001/", LOCAL),
            ("http://2130706433/", LOCAL),
            ("http://0177.0.0.1/", LOCAL),
            ("http://0.0.0.0/", LOCAL),
            ("http://0/", LOCAL),
            ("http://[::1]/", LOCAL),
            ("http://[::]/", LOCAL),
            ("http://[::ffff:127.0.0.1]/", LOCAL),
            ("http://", LOCAL),
            ("http:///image", LOCAL),
        ];
        let local: AllowedSources = "0.0.0.0/7,127.0.0.0/8,::/127".parse().unwrap();
        for (url, expected) in cases {
            assert_eq!(check(url, &AllowedSources::none()).err(), expected, "{url}");
            let allowed = match expected {
                LOCAL if url == "http://" || url == "http:///image" => Some(Syntax),
                LOCAL => None,
                other => other,
            };
            assert_eq!(check(url, &local).err(), allowed, "{url} where loopback is allowed");
        }
    }

    #[test]
    fn shows_no_password() {
        for (text, shown) in [
            ("http://user:p@ss@example.com/a@b", "http://<redacted>@example.com/a@b"),
            ("http://example.com/a@b", "http://example.com/a@b"),
            ("https://example.com/a?token=x#part", "https://example.com/a?<redacted>"),
            ("https://example.com?u:p@ss", "https://example.com?<redacted>"),
            ("HTTP:user:pw@example.com/a", "HTTP://<redacted>@example.com/a"),
            ("http:/\\user:pw@example.com\\a", "http://<redacted>@example.com\\a"),
            ("http:/\t/user:pw@example.com", "http://<redacted>@example.com"),
            ("\0 http://user:pw@example.com", "http://<redacted>@example.com"),
            ("s3://user:pw@host/b", "s3://<redacted>@host/b"),
            ("no address", "no address"),
        ] {
            assert_eq!(redact(text), shown, "{text}");
        }
    }
}

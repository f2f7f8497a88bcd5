//! Addresses of image sources: http or https only, and never shown with what may be secret in them.

use std::fmt;
use std::net::IpAddr;

use reqwest::Url;

use crate::error::AgentError;

/// The address of an image source. Its text form leaves out user, password, query and fragment, which may hold secrets.
///
/// ```
/// use backing_image_agent::source_url::SourceUrl;
/// let url = SourceUrl::parse("https://user:pw@host.example/a/b.qcow2?token=x").unwrap();
/// assert_eq!(url.to_string(), "https://<redacted>@host.example/a/b.qcow2?<redacted>");
/// assert!(SourceUrl::parse("file:///etc/passwd").is_err());
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct SourceUrl(Url);

impl SourceUrl {
    /// Checks an address.
    ///
    /// # Errors
    /// `Invalid` when it is no address, or not of http or https.
    pub fn parse(text: &str) -> Result<SourceUrl, AgentError> {
        let invalid = |problem: String| AgentError::Invalid {
            message: format!("the source parameter `url` {problem}: give an address like `https://host/image.qcow2`"),
        };
        if text.trim().is_empty() {
            return Err(invalid("is missing".into()));
        }
        let url = Url::parse(text.trim()).map_err(|e| invalid(format!("is not an address ({e})")))?;
        if !matches!(url.scheme(), "http" | "https") {
            return Err(invalid(format!("has the scheme `{}`, only http and https are supported", url.scheme())));
        }
        Ok(SourceUrl(url))
    }

    /// The whole address, to connect to.
    pub fn expose(&self) -> &Url {
        &self.0
    }

    /// Whether it names this machine.
    pub fn is_loopback(&self) -> bool {
        let host = self.0.host_str().unwrap_or_default().trim_matches(['[', ']']);
        host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
    }
}

impl fmt::Display for SourceUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let url = &self.0;
        write!(f, "{}://", url.scheme())?;
        if !url.username().is_empty() || url.password().is_some() {
            f.write_str("<redacted>@")?;
        }
        f.write_str(url.host_str().unwrap_or_default())?;
        if let Some(port) = url.port() {
            write!(f, ":{port}")?;
        }
        f.write_str(url.path())?;
        if url.query().is_some() {
            f.write_str("?<redacted>")?;
        }
        Ok(())
    }
}

impl fmt::Debug for SourceUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_this_machine() {
        for (text, expected) in [
            ("http://localhost:80/x", true),
            ("http://127.3.4.5/x", true),
            ("http://[::1]/x", true),
            ("http://10.0.0.1/x", false),
            ("https://example.org/localhost", false),
        ] {
            assert_eq!(SourceUrl::parse(text).unwrap().is_loopback(), expected, "{text}");
        }
    }
}

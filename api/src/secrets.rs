//! Values that a process gets and nobody else may read.

use std::collections::BTreeMap;
use std::fmt;

/// Environment variables by name. Neither shown nor stored with anything that shows or stores them.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Secrets(pub BTreeMap<String, String>);

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.0.keys().map(|name| (name, format_args!("<redacted>")))).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shows_names_and_no_value() {
        let secrets = Secrets([("URL".to_owned(), "http://user:word@host".to_owned())].into());
        assert_eq!(format!("{secrets:?}"), "{\"URL\": <redacted>}");
    }
}

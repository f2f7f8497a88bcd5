//! Typed names and digests: parsed at the edge, trusted inside.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Text that is not a valid id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a valid {what}: {rule}")]
pub struct InvalidId {
    pub what: &'static str,
    pub text: String,
    pub rule: &'static str,
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $what:literal, $rule:literal, $check:expr) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The text of this id.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;
            fn from_str(text: &str) -> Result<Self, InvalidId> {
                let check: fn(&str) -> bool = $check;
                if check(text) {
                    Ok($name(text.to_owned()))
                } else {
                    Err(InvalidId { what: $what, text: text.to_owned(), rule: $rule })
                }
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidId;
            fn try_from(text: String) -> Result<Self, InvalidId> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

id!(
    /// The name of an image. Longhorn's rule `^[a-z0-9][a-z0-9_.-]+$` (LF 3.2), bounded by what a Kubernetes name may be.
    ///
    /// ```
    /// use backing_image_api::ids::ImageName;
    /// assert!("ubuntu-24.04".parse::<ImageName>().is_ok());
    /// assert!("../etc".parse::<ImageName>().is_err());
    /// ```
    ImageName,
    "image name",
    "2 to 253 characters of a-z 0-9 _ . -, beginning with a letter or digit",
    |t| (2..=253).contains(&t.len())
        && t.as_bytes()[0].is_ascii_alphanumeric()
        && t.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'_' | b'.' | b'-'))
);

id!(
    /// The first eight characters of a version 4 UUID, given to an image once; part of every path of it.
    ImageUuid,
    "image uuid",
    "eight characters of 0-9 a-f",
    |t| t.len() == 8 && t.bytes().all(|b| b.is_ascii_digit() || matches!(b, b'a'..=b'f'))
);

id!(
    /// A disk's UUID, from its `longhorn-disk.cfg`.
    DiskId,
    "disk uuid",
    "1 to 64 characters of a-z A-Z 0-9 -",
    |t| (1..=64).contains(&t.len()) && t.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
);

id!(
    /// The name of a node.
    NodeName,
    "node name",
    "1 to 253 characters of a-z 0-9 . -, beginning with a letter or digit",
    |t| (1..=253).contains(&t.len())
        && t.as_bytes()[0].is_ascii_alphanumeric()
        && t.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-'))
);

id!(
    /// The name of a volume: what CSI calls `volume_id`.
    VolumeName,
    "volume name",
    "1 to 63 characters of a-z 0-9 . -, beginning with a letter or digit",
    |t| (1..=63).contains(&t.len())
        && t.as_bytes()[0].is_ascii_alphanumeric()
        && t.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-'))
);

id!(
    /// A SHA-512 digest of a whole file as it lies on disk: 128 lower-case hexadecimal digits.
    Sha512Digest,
    "SHA-512 checksum",
    "128 lower-case hexadecimal digits",
    |t| t.len() == 128 && t.bytes().all(|b| b.is_ascii_digit() || matches!(b, b'a'..=b'f'))
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_names_that_would_leave_their_directory() {
        for bad in ["", "a", "-a", ".hidden", "a/b", "A-b", "a b", "../x"] {
            assert!(bad.parse::<ImageName>().is_err(), "{bad}");
        }
        assert!("a".repeat(254).parse::<ImageName>().is_err());
    }

    #[test]
    fn says_what_is_wrong_and_what_would_be_right() {
        let error = "abc".parse::<Sha512Digest>().unwrap_err();
        assert_eq!(error.to_string(), "`abc` is not a valid SHA-512 checksum: 128 lower-case hexadecimal digits");
    }
}

//! The closed set of ways in which something can fail.

use std::borrow::Cow;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// What kind of failure this is, for every audience: gRPC codes, reconcilers, the exit code of the CLI.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// Can never succeed as written.
    Invalid,
    /// The named thing does not exist.
    NotFound,
    /// The thing exists, with other parameters.
    Incompatible,
    /// In use, or a precondition is missing.
    NotReady,
    /// The size cannot be served.
    OutOfRange,
    /// No eligible disk has room.
    Exhausted,
    /// An operation on this object is running.
    Pending,
    /// A peer did not answer; the outcome is unknown.
    Unavailable,
    /// We do not offer this.
    Unsupported,
    /// Stored bytes do not match their digest.
    Corrupt,
    /// A bug of ours, safe to survive.
    Internal,
}

impl ErrorKind {
    /// Every kind, in the order of the table in `docs/semantics.md`.
    pub const ALL: [ErrorKind; 11] = [
        ErrorKind::Invalid,
        ErrorKind::NotFound,
        ErrorKind::Incompatible,
        ErrorKind::NotReady,
        ErrorKind::OutOfRange,
        ErrorKind::Exhausted,
        ErrorKind::Pending,
        ErrorKind::Unavailable,
        ErrorKind::Unsupported,
        ErrorKind::Corrupt,
        ErrorKind::Internal,
    ];

    /// The PascalCase name, as used in Kubernetes reasons.
    pub fn as_str(self) -> &'static str {
        match self {
            ErrorKind::Invalid => "Invalid",
            ErrorKind::NotFound => "NotFound",
            ErrorKind::Incompatible => "Incompatible",
            ErrorKind::NotReady => "NotReady",
            ErrorKind::OutOfRange => "OutOfRange",
            ErrorKind::Exhausted => "Exhausted",
            ErrorKind::Pending => "Pending",
            ErrorKind::Unavailable => "Unavailable",
            ErrorKind::Unsupported => "Unsupported",
            ErrorKind::Corrupt => "Corrupt",
            ErrorKind::Internal => "Internal",
        }
    }

    /// Whether a repetition will hardly help, since what is written or the thing itself is wrong.
    pub fn is_final(self) -> bool {
        match self {
            ErrorKind::Invalid
            | ErrorKind::NotFound
            | ErrorKind::Incompatible
            | ErrorKind::OutOfRange
            | ErrorKind::Unsupported
            | ErrorKind::Corrupt => true,
            ErrorKind::NotReady
            | ErrorKind::Exhausted
            | ErrorKind::Pending
            | ErrorKind::Unavailable
            | ErrorKind::Internal => false,
        }
    }

    /// The kind of that name, the inverse of [`ErrorKind::as_str`].
    pub fn from_name(name: &str) -> Option<ErrorKind> {
        ErrorKind::ALL.into_iter().find(|kind| kind.as_str() == name)
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Serialize for ErrorKind {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl<'de> Deserialize<'de> for ErrorKind {
    /// A kind that is not known here, from a newer program, says only that something failed.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        Ok(ErrorKind::from_name(&name).unwrap_or(ErrorKind::Internal))
    }
}

impl JsonSchema for ErrorKind {
    fn schema_name() -> Cow<'static, str> {
        "ErrorKind".into()
    }
    fn inline_schema() -> bool {
        true
    }
    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        String::json_schema(generator)
    }
}

/// An error and all its causes in one sentence, for statuses, replies and logs.
pub fn sentence(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text += ": ";
        text += &cause.to_string();
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_is_written_by_its_name_and_an_unknown_one_is_read_as_a_failure() {
        for kind in ErrorKind::ALL {
            let text = serde_json::to_string(&kind).unwrap();
            assert_eq!(text, format!("\"{kind}\""));
            assert_eq!(serde_json::from_str::<ErrorKind>(&text).unwrap(), kind);
        }
        assert_eq!(serde_json::from_str::<ErrorKind>("\"Newer\"").unwrap(), ErrorKind::Internal);
    }
}

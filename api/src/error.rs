//! The closed set of ways in which something can fail.

use std::fmt;

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

//! What the command line says when something fails, and with which exit code.

use api::ErrorKind;

/// A failure with a kind; the exit code comes from it.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    pub kind: ErrorKind,
    pub message: String,
}

impl Failure {
    /// A failure of that kind; the sentence is for the user.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Failure {
        Failure { kind, message: message.into() }
    }
}

/// A failure of that kind as an error to return.
pub fn failed<T>(kind: ErrorKind, message: impl Into<String>) -> anyhow::Result<T> {
    Err(Failure::new(kind, message).into())
}

/// Whether an error is a failure of that kind.
pub fn is_of_kind(error: &anyhow::Error, kind: ErrorKind) -> bool {
    error.downcast_ref::<Failure>().is_some_and(|failure| failure.kind == kind)
}

/// The exit code for an error: by the kind of the first [`Failure`] in its chain, 1 when there is none.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    // As the context of another error it is no link of the chain.
    let failure = error.downcast_ref().or_else(|| error.chain().find_map(|cause| cause.downcast_ref::<Failure>()));
    match failure {
        Some(failure) => code_of(failure.kind),
        None => 1,
    }
}

fn code_of(kind: ErrorKind) -> u8 {
    match kind {
        ErrorKind::Invalid | ErrorKind::OutOfRange | ErrorKind::Unsupported => 2,
        ErrorKind::NotFound => 3,
        ErrorKind::Incompatible => 4,
        ErrorKind::NotReady => 5,
        ErrorKind::Exhausted => 6,
        ErrorKind::Pending | ErrorKind::Unavailable => 7,
        ErrorKind::Corrupt => 8,
        ErrorKind::Internal => 70,
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn the_exit_code_follows_the_kind_through_any_context() {
        let error = failed::<()>(ErrorKind::NotFound, "no such thing").context("cannot show it").unwrap_err();
        assert_eq!(exit_code(&error), 3);
        let lost = anyhow::anyhow!("refused").context(Failure::new(ErrorKind::Unavailable, "no answer"));
        assert_eq!(exit_code(&lost.context("cannot show it")), 7);
        assert_eq!(exit_code(&anyhow::anyhow!("anything else")), 1);
        let codes: Vec<u8> = ErrorKind::ALL.into_iter().map(code_of).collect();
        assert_eq!(codes, [2, 3, 4, 5, 2, 6, 7, 7, 2, 8, 70]);
    }
}

//! The only place that knows gRPC codes.

use api::ErrorKind;
pub use api::error::sentence;
use tonic::{Code, Status};

use crate::CsiError;

/// The gRPC code of a kind of failure.
pub fn code(kind: ErrorKind) -> Code {
    match kind {
        ErrorKind::Invalid => Code::InvalidArgument,
        ErrorKind::NotFound => Code::NotFound,
        ErrorKind::Incompatible => Code::AlreadyExists,
        ErrorKind::NotReady => Code::FailedPrecondition,
        ErrorKind::OutOfRange => Code::OutOfRange,
        ErrorKind::Exhausted => Code::ResourceExhausted,
        ErrorKind::Pending => Code::Aborted,
        ErrorKind::Unavailable => Code::Unavailable,
        ErrorKind::Unsupported => Code::Unimplemented,
        ErrorKind::Corrupt => Code::DataLoss,
        ErrorKind::Internal => Code::Internal,
    }
}

/// A failure as the caller sees it: its sentence and the chain of causes, no details.
pub fn of(error: &CsiError) -> Status {
    Status::new(code(error.kind()), sentence(error))
}

/// The answer of a call that we do not offer.
pub fn not_offered(call: &str) -> Status {
    Status::new(code(ErrorKind::Unsupported), format!("{call} is not offered, see the advertised capabilities"))
}

/// The answer after a bug of ours.
pub fn bug(call: &str) -> Status {
    Status::new(
        code(ErrorKind::Internal),
        format!("{call} failed by a bug of ours; see the log of the driver, then repeat the call"),
    )
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_kind_has_a_code_of_its_own_and_none_is_ok() {
        let codes: BTreeSet<i32> = ErrorKind::ALL.into_iter().map(|kind| code(kind) as i32).collect();
        assert_eq!(codes.len(), ErrorKind::ALL.len());
        assert!(!codes.contains(&(Code::Ok as i32)) && !codes.contains(&(Code::Unknown as i32)));
    }

    #[test]
    fn the_codes_that_the_provisioner_reads_as_still_running_are_ours_for_that() {
        let running = [Code::Aborted, Code::Unavailable];
        let kinds: Vec<_> = ErrorKind::ALL.into_iter().filter(|kind| running.contains(&code(*kind))).collect();
        assert_eq!(kinds, [ErrorKind::Pending, ErrorKind::Unavailable]);
    }

    #[test]
    fn tells_the_chain_of_causes() {
        let error = CsiError::Store(store::StoreError::Unavailable { source: "disk gone".into() });
        let status = of(&error);
        assert_eq!((status.code(), status.message()), (Code::Unavailable, "the store does not answer: disk gone"));
        assert!(status.details().is_empty());
    }
}

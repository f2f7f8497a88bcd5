//! Errors as Kubernetes says them: a `Status` object with an HTTP code.

use api::ErrorKind;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use store::StoreError;

/// A failed request.
#[derive(Clone, Debug)]
pub struct Failure {
    pub code: StatusCode,
    /// Kubernetes' word for it, e.g. `NotFound`.
    pub reason: &'static str,
    /// Ours, exact; clients read it from `details.causes`.
    pub kind: ErrorKind,
    pub message: String,
}

impl Failure {
    /// A failure of a kind, with the usual code and reason.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Failure {
        let (code, reason) = code_and_reason(kind);
        Failure { code, reason, kind, message: message.into() }
    }

    /// The request itself cannot be understood.
    pub fn bad_request(message: impl Into<String>) -> Failure {
        let message = message.into();
        Failure { code: StatusCode::BAD_REQUEST, reason: "BadRequest", kind: ErrorKind::Invalid, message }
    }

    /// There is nothing at this path.
    pub fn no_such_path(path: &str) -> Failure {
        Failure::new(ErrorKind::NotFound, format!("there is nothing at `{path}`"))
    }

    /// The verb is not offered here.
    pub fn method(message: impl Into<String>) -> Failure {
        Failure {
            code: StatusCode::METHOD_NOT_ALLOWED,
            reason: "MethodNotAllowed",
            kind: ErrorKind::Unsupported,
            message: message.into(),
        }
    }

    /// Admission says no, for now.
    pub fn forbidden(message: impl Into<String>) -> Failure {
        Failure { code: StatusCode::FORBIDDEN, reason: "Forbidden", kind: ErrorKind::NotReady, message: message.into() }
    }

    /// The changes since the version that was asked for are no longer known.
    pub fn expired() -> Failure {
        Failure {
            code: StatusCode::GONE,
            reason: "Expired",
            kind: ErrorKind::Pending,
            message: "changes were missed; list again and watch from there".into(),
        }
    }

    /// As a `Status` object.
    pub fn to_status(&self) -> Value {
        json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": self.message, "reason": self.reason, "code": self.code.as_u16(),
            "details": { "causes": [{ "reason": self.kind.as_str(), "message": self.message }] },
        })
    }
}

fn code_and_reason(kind: ErrorKind) -> (StatusCode, &'static str) {
    match kind {
        ErrorKind::Invalid | ErrorKind::OutOfRange => (StatusCode::UNPROCESSABLE_ENTITY, "Invalid"),
        ErrorKind::NotFound => (StatusCode::NOT_FOUND, "NotFound"),
        ErrorKind::Incompatible => (StatusCode::CONFLICT, "AlreadyExists"),
        ErrorKind::NotReady | ErrorKind::Pending => (StatusCode::CONFLICT, "Conflict"),
        ErrorKind::Exhausted => (StatusCode::INSUFFICIENT_STORAGE, "InsufficientStorage"),
        ErrorKind::Unavailable => (StatusCode::SERVICE_UNAVAILABLE, "ServiceUnavailable"),
        ErrorKind::Unsupported => (StatusCode::NOT_IMPLEMENTED, "NotImplemented"),
        ErrorKind::Corrupt | ErrorKind::Internal => (StatusCode::INTERNAL_SERVER_ERROR, "InternalError"),
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Failure {
        let kind = error.kind();
        if kind == ErrorKind::Internal || kind == ErrorKind::Unavailable {
            tracing::error!(error = &error as &dyn std::error::Error, "the store failed");
        }
        Failure::new(kind, error.to_string())
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        (self.code, [(header::CONTENT_TYPE, "application/json")], self.to_status().to_string()).into_response()
    }
}

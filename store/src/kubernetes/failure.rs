//! What a refused or failed request to the Kubernetes API means.
//!
//! Unknown is not absent: an object is absent only when the answer names it. Other answers 404 come from an API server that does not
//! know the kind, or from something else in front of it.

use kube::core::Status;

use super::limits;
use crate::{ResourceType, StoreError};

/// A request that failed.
#[derive(Debug, thiserror::Error)]
pub enum Failed {
    #[error("the Kubernetes API refused or did not answer")]
    Api(#[from] kube::Error),
    #[error("the Kubernetes API did not answer within {} s", limits::REQUEST.as_secs())]
    Silent,
}

impl Failed {
    fn status(&self) -> Option<&Status> {
        match self {
            Failed::Api(kube::Error::Api(status)) => Some(status),
            _ => None,
        }
    }

    /// The API server looked at the request and refused it; without its own store, or without knowing us, it could not.
    pub fn is_judgment(&self) -> bool {
        self.status().is_some_and(|status| (400..500).contains(&status.code) && !matches!(status.code, 401 | 429))
    }

    /// The object of that name does not exist.
    pub fn is_absence(&self, name: &str) -> bool {
        self.status().is_some_and(|status| status.code == 404 && named(status) == name && !name.is_empty())
    }

    /// The object is another one, or was changed meanwhile.
    pub fn is_conflict(&self) -> bool {
        self.status().is_some_and(|status| status.code == 409)
    }

    /// The version of a list or a watch is not known any more, or not yet.
    pub fn is_unknown_version(&self) -> bool {
        self.status().is_some_and(is_unknown_version)
    }

    /// As an error of the store about one object (or a kind, when `name` is empty).
    pub fn about(self, resource: &ResourceType, name: &str) -> StoreError {
        let (resource, name) = (resource.kind.clone(), name.to_owned());
        let Some(status) = self.status() else { return StoreError::Unavailable { source: Box::new(self) } };
        let reason = status.message.clone();
        match (status.code, status.reason.as_str()) {
            (404, _) if self.is_absence(&name) => StoreError::NotFound { resource, name },
            (404, _) if !named(status).is_empty() => {
                StoreError::NotFound { resource: "Namespace".into(), name: named(status).to_owned() }
            }
            (404, _) => StoreError::UnknownKind { resource, reason },
            (409, "AlreadyExists") => StoreError::AlreadyExists { resource, name },
            (409, _) => StoreError::Conflict { resource, name },
            (400 | 405 | 413 | 415 | 422, _) => StoreError::Invalid { resource, name, reason },
            // Also what an admission webhook refuses: it says why.
            (403, _) => StoreError::Forbidden { resource, name, reason },
            _ => StoreError::Unavailable { source: Box::new(self) },
        }
    }
}

/// Whether an answer, or the last event of a watch, says that its version cannot be served.
pub fn is_unknown_version(status: &Status) -> bool {
    let causes = status.details.iter().flat_map(|details| &details.causes);
    status.code == 410 || causes.into_iter().any(|cause| cause.reason == "ResourceVersionTooLarge")
}

/// The object that an answer is about, when it says so.
fn named(status: &Status) -> &str {
    status.details.as_ref().map_or("", |details| details.name.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn about(code: u16, more: Value) -> StoreError {
        let mut status = json!({"status": "Failure", "code": code, "message": "why", "reason": ""});
        status.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let widgets = ResourceType {
            group: "example.org".into(),
            version: "v1".into(),
            kind: "Widget".into(),
            plural: "widgets".into(),
            namespaced: true,
        };
        let status: Status = serde_json::from_value(status).unwrap();
        Failed::Api(kube::Error::Api(Box::new(status))).about(&widgets, "a")
    }

    #[test]
    fn absent_is_only_what_the_answer_names() {
        let error = about(404, json!({"details": {"name": "a", "kind": "widgets"}}));
        assert!(matches!(error, StoreError::NotFound { .. }), "{error}");
        let error = about(404, json!({"details": {"name": "shop", "kind": "namespaces"}}));
        assert_eq!(error.to_string(), "Namespace `shop` does not exist");
        for unknown in [json!({}), json!({"details": {}}), json!({"reason": "NotFound"})] {
            let error = about(404, unknown);
            assert!(matches!(error, StoreError::UnknownKind { .. }), "{error}");
            assert!(error.to_string().contains("deploy/crds"), "{error}");
        }
    }

    #[test]
    fn each_refusal_has_its_kind() {
        use api::ErrorKind::*;
        for (code, reason, kind) in [
            (409, "AlreadyExists", Incompatible),
            (409, "Conflict", Pending),
            (422, "Invalid", Invalid),
            (400, "BadRequest", Invalid),
            (413, "RequestEntityTooLarge", Invalid),
            (403, "Forbidden", NotReady),
            (401, "Unauthorized", Unavailable),
            (410, "Expired", Unavailable),
            (429, "TooManyRequests", Unavailable),
            (500, "InternalError", Unavailable),
            (503, "ServiceUnavailable", Unavailable),
            (504, "Timeout", Unavailable),
        ] {
            assert_eq!(about(code, json!({"reason": reason})).kind(), kind, "{code} {reason}");
        }
    }

    #[test]
    fn a_version_that_is_not_there_yet_is_unknown_too() {
        let status = |value: Value| serde_json::from_value::<Status>(value).unwrap();
        let too_large = json!({"reason": "ResourceVersionTooLarge", "message": "Too large resource version"});
        assert!(is_unknown_version(&status(json!({"code": 504, "details": {"causes": [too_large]}}))));
        assert!(is_unknown_version(&status(json!({"code": 410, "reason": "Expired"}))));
        assert!(!is_unknown_version(&status(json!({"code": 504, "reason": "Timeout"}))));
    }
}

//! REST paths: `/apis/{group}/{version}/[namespaces/{ns}/]{plural}[/{name}[/status]]`, `/api/v1/…` for the core group.

use store::ObjectKey;

use super::failure::Failure;
use super::registry::{self, Served};

/// What a path names.
#[derive(Clone, Debug)]
pub enum Route {
    /// `/api`, `/apis`, `/apis/{group}`, `/apis/{group}/{version}`, `/version`: which kinds there are.
    Discovery(Vec<String>),
    Objects(Target),
}

/// Objects of one kind, or one of them.
#[derive(Clone, Debug)]
pub struct Target {
    pub served: &'static Served,
    /// `None`: all namespaces, or a cluster-scoped kind.
    pub namespace: Option<String>,
    pub name: Option<String>,
    /// The `status` subresource.
    pub status: bool,
}

impl Target {
    /// The key of the one object.
    pub fn key(&self) -> Option<ObjectKey> {
        Some(ObjectKey { namespace: self.namespace.clone(), name: self.name.clone()? })
    }
}

/// Reads a path.
pub fn parse(path: &str) -> Result<Route, Failure> {
    let nothing = || Failure::no_such_path(path);
    let segments: Vec<String> =
        path.split('/').filter(|s| !s.is_empty()).map(decode).collect::<Option<_>>().ok_or_else(nothing)?;
    let words: Vec<&str> = segments.iter().map(String::as_str).collect();
    let (group, version, rest) = match words.as_slice() {
        ["version"] | ["api"] | ["apis"] | ["api", _] | ["apis", _] | ["apis", _, _] => {
            return Ok(Route::Discovery(segments));
        }
        ["api", version, rest @ ..] => ("", *version, rest),
        ["apis", group, version, rest @ ..] => (*group, *version, rest),
        _ => return Err(nothing()),
    };
    let (namespace, rest) = match rest {
        ["namespaces", namespace, rest @ ..] if !rest.is_empty() => (Some((*namespace).to_owned()), rest),
        _ => (None, rest),
    };
    let (plural, name, status) = match rest {
        [plural] => (plural, None, false),
        [plural, name] => (plural, Some((*name).to_owned()), false),
        [plural, name, "status"] => (plural, Some((*name).to_owned()), true),
        _ => return Err(nothing()),
    };
    let served = registry::by_path(group, version, plural).ok_or_else(nothing)?;
    let namespaced = served.resource.namespaced;
    if namespace.is_some() && !namespaced {
        return Err(nothing());
    }
    if name.is_some() && namespaced && namespace.is_none() {
        return Err(Failure::bad_request(format!(
            "{} live in a namespace; the path names none",
            served.resource.plural
        )));
    }
    Ok(Route::Objects(Target { served, namespace, name, status }))
}

/// Undoes percent encoding; `None` when it is broken.
fn decode(segment: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(segment.len());
    let mut rest = segment.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let (high, low) = (char::from(rest.next()?).to_digit(16)?, char::from(rest.next()?).to_digit(16)?);
        bytes.push((high * 16 + low) as u8);
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn objects(path: &str) -> Target {
        match parse(path).unwrap() {
            Route::Objects(target) => target,
            Route::Discovery(words) => panic!("{words:?}"),
        }
    }

    #[test]
    fn reads_namespaced_and_cluster_scoped_paths() {
        let one = objects("/apis/longhorn.io/v1beta2/namespaces/longhorn-system/backingimages/a%2Eb/status");
        assert_eq!(
            (one.namespace.as_deref(), one.name.as_deref(), one.status),
            (Some("longhorn-system"), Some("a.b"), true)
        );
        assert!(objects("/api/v1/persistentvolumes/x").namespace.is_none());
        assert!(objects("/api/v1/persistentvolumeclaims").name.is_none());
        assert!(matches!(parse("/apis/longhorn.io/v1beta2"), Ok(Route::Discovery(_))));
    }

    #[test]
    fn refuses_what_is_not_there() {
        assert_eq!(parse("/api/v1/pods").unwrap_err().code, 404);
        assert_eq!(parse("/api/v1/namespaces/x/persistentvolumes").unwrap_err().code, 404);
        assert_eq!(parse("/api/v1/persistentvolumeclaims/x").unwrap_err().code, 400);
        assert_eq!(parse("/elsewhere").unwrap_err().code, 404);
    }
}

//! Paths of the Kubernetes API: `/apis/GROUP/VERSION/namespaces/NAMESPACE/PLURAL/NAME`, each part as far as there is one.

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

use crate::{ObjectKey, ResourceType, Selector, StoreError, rules};

/// What stands in a path segment or a query value as something else than itself.
const ESCAPED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// All objects of a kind, of one namespace or of all.
pub fn of_kind(resource: &ResourceType, namespace: Option<&str>) -> String {
    let ResourceType { group, version, plural, .. } = resource;
    let root = if group.is_empty() { format!("/api/{version}") } else { format!("/apis/{group}/{version}") };
    match namespace {
        Some(namespace) => format!("{root}/namespaces/{}/{plural}", escape(namespace)),
        None => format!("{root}/{plural}"),
    }
}

/// Where objects like this one are created.
///
/// # Errors
/// `Invalid` when the key does not fit the kind's scope: its path would be that of something else.
pub fn of_creation(resource: &ResourceType, key: &ObjectKey) -> Result<String, StoreError> {
    rules::check_scope(resource, key)?;
    Ok(of_kind(resource, key.namespace.as_deref().filter(|namespace| !namespace.is_empty())))
}

/// One object.
///
/// # Errors
/// `Invalid` as [`of_creation`], and for a name whose path would be that of something else.
pub fn of_object(resource: &ResourceType, key: &ObjectKey) -> Result<String, StoreError> {
    if matches!(key.name.as_str(), "" | "." | "..") {
        return Err(rules::invalid(resource, &key.name, format!("`{}` is no name of an object", key.name)));
    }
    Ok(format!("{}/{}", of_creation(resource, key)?, escape(&key.name)))
}

/// The value of a label selector.
pub fn selection(selector: &Selector) -> String {
    let labels: Vec<String> = selector.0.iter().map(|(key, value)| format!("{key}={value}")).collect();
    escape(&labels.join(","))
}

/// A part of a path or a query.
pub fn escape(text: &str) -> String {
    utf8_percent_encode(text, ESCAPED).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(group: &str, namespaced: bool) -> ResourceType {
        let (version, kind, plural) = ("v1".into(), "Thing".into(), "things".into());
        ResourceType { group: group.into(), version, kind, plural, namespaced }
    }

    fn key(namespace: Option<&str>, name: &str) -> ObjectKey {
        ObjectKey { namespace: namespace.map(str::to_owned), name: name.into() }
    }

    #[test]
    fn names_each_thing_by_its_path() {
        let (namespaced, cluster) = (kind("example.org", true), kind("", false));
        assert_eq!(of_kind(&namespaced, None), "/apis/example.org/v1/things");
        assert_eq!(of_kind(&namespaced, Some("shop")), "/apis/example.org/v1/namespaces/shop/things");
        assert_eq!(
            of_object(&namespaced, &key(Some("shop"), "a.b")).unwrap(),
            "/apis/example.org/v1/namespaces/shop/things/a.b"
        );
        assert_eq!(of_object(&cluster, &key(None, "a")).unwrap(), "/api/v1/things/a");
    }

    #[test]
    fn refuses_what_would_name_something_else() {
        let (namespaced, cluster) = (kind("example.org", true), kind("", false));
        for (resource, key) in [
            (&namespaced, key(None, "a")),
            (&namespaced, key(Some(""), "a")),
            (&namespaced, key(Some("shop"), "")),
            (&namespaced, key(Some("shop"), "..")),
            (&cluster, key(Some("shop"), "a")),
        ] {
            assert_eq!(of_object(resource, &key).unwrap_err().kind(), api::ErrorKind::Invalid, "{key:?}");
        }
        let odd = key(Some("shop"), "../secrets?x");
        assert!(of_object(&namespaced, &odd).unwrap().ends_with("/things/..%2Fsecrets%3Fx"));
    }

    #[test]
    fn selects_by_labels() {
        let selector = Selector([("a/b", "1"), ("c", "2")].map(|(k, v)| (k.to_owned(), v.to_owned())).into());
        assert_eq!(selection(&selector), "a%2Fb%3D1%2Cc%3D2");
    }
}

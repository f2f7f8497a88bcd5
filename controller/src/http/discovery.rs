//! Which groups and kinds there are, in the form that `kubectl` asks for.

use serde_json::{Value, json};

use super::failure::Failure;
use super::registry;

const VERBS: [&str; 7] = ["create", "delete", "get", "list", "patch", "update", "watch"];

/// The answer to a discovery path.
pub fn describe(words: &[String]) -> Result<Value, Failure> {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["version"] => Ok(json!({
            "major": "1", "minor": "34", "gitVersion": format!("v1.34.0+backing-image-csi.{}", env!("CARGO_PKG_VERSION")),
        })),
        ["api"] => Ok(json!({ "kind": "APIVersions", "versions": ["v1"] })),
        ["apis"] => Ok(json!({ "kind": "APIGroupList", "apiVersion": "v1", "groups": groups() })),
        ["apis", name] => groups()
            .into_iter()
            .find(|g| g["name"] == *name)
            .ok_or_else(|| Failure::no_such_path(&format!("/apis/{name}"))),
        ["api", version] => resources("", version),
        ["apis", group, version] => resources(group, version),
        _ => Err(Failure::no_such_path(&words.join("/"))),
    }
}

fn groups() -> Vec<Value> {
    let mut groups: Vec<Value> = vec![];
    for served in registry::all() {
        let (group, version) = (&served.resource.group, &served.resource.version);
        if group.is_empty() || groups.iter().any(|g| g["name"] == **group) {
            continue;
        }
        let version = json!({ "groupVersion": format!("{group}/{version}"), "version": version });
        groups.push(json!({
            "kind": "APIGroup", "apiVersion": "v1", "name": group, "versions": [version.clone()], "preferredVersion": version,
        }));
    }
    groups
}

fn resources(group: &str, version: &str) -> Result<Value, Failure> {
    let mut list = vec![];
    for served in registry::all().iter().filter(|s| s.resource.group == group && s.resource.version == version) {
        let r = &served.resource;
        list.push(json!({
            "name": r.plural, "singularName": served.singular, "namespaced": r.namespaced, "kind": r.kind,
            "verbs": VERBS, "shortNames": served.short_names,
        }));
        list.push(json!({
            "name": format!("{}/status", r.plural), "singularName": "", "namespaced": r.namespaced, "kind": r.kind,
            "verbs": ["get", "update"],
        }));
    }
    if list.is_empty() {
        return Err(Failure::no_such_path(&format!("/apis/{group}/{version}")));
    }
    let name = if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") };
    Ok(json!({ "kind": "APIResourceList", "apiVersion": "v1", "groupVersion": name, "resources": list }))
}

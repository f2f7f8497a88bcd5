//! Node: rules for what a user says about a machine and its disks.

use std::path::{Component, Path};

use crate::Node;
use crate::ids::NodeName;

use super::{FieldErrors, Mistakes};

/// Whether a node may be stored.
pub fn check(node: &Node) -> Result<(), FieldErrors> {
    let mut mistakes = Mistakes::default();
    let name = node.metadata.name.as_deref().unwrap_or_default();
    if let Err(error) = name.parse::<NodeName>() {
        mistakes.add("metadata.name", name, format!("invalid name: {}", error.rule));
    }
    if !node.spec.name.is_empty() && node.spec.name != name {
        mistakes.add("spec.name", &node.spec.name, format!("it must be empty or `{name}`, the name of the object"));
    }
    mistakes.check_tags("spec.tags", &node.spec.tags);
    let mut paths: Vec<(&Path, &str)> = vec![];
    for (disk_name, disk) in &node.spec.disks {
        let field = |name: &str| format!("spec.disks[{disk_name}].{name}");
        if disk_name.is_empty() || disk_name.chars().any(|c| c.is_whitespace() || c == '/') {
            mistakes.add("spec.disks", disk_name, "the name of a disk is a word without blanks and slashes");
        }
        if disk.r#type != "filesystem" {
            mistakes.add(field("type"), &disk.r#type, "only `filesystem` is supported: a directory of a mounted disk");
        }
        mistakes.check_tags(&field("tags"), &disk.tags);
        let path = Path::new(&disk.path);
        let is_plain = path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
        if !path.is_absolute() || !is_plain || path.parent().is_none() {
            let rule = "it must be an absolute path without `..` of a directory that is not the root";
            mistakes.add(field("path"), &disk.path, rule);
        } else if let Some((_, other)) =
            paths.iter().find(|(taken, _)| path.starts_with(taken) || taken.starts_with(path))
        {
            let rule =
                format!("disk `{other}` has the same directory, one in it or one around it; each disk needs its own");
            mistakes.add(field("path"), &disk.path, rule);
        } else {
            paths.push((path, disk_name));
        }
    }
    mistakes.result()
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};

    use super::*;

    fn check(json: serde_json::Value, expected: Expect) {
        let metadata = serde_json::json!({"name": "node-1"});
        let node: Node = serde_json::from_value(
            serde_json::json!({"apiVersion": "longhorn.io/v1beta2", "kind": "Node", "metadata": metadata, "spec": json}),
        )
        .unwrap();
        expected.assert_eq(&super::check(&node).map_or_else(|e| e.to_string(), |()| "fine".into()));
    }

    #[test]
    fn wants_disks_with_directories_of_their_own() {
        let two = |a: &str, b: &str| serde_json::json!({"disks": {"a": {"path": a}, "b": {"path": b}}});
        check(two("/data/a", "/data/b"), expect!["fine"]);
        check(two("/data/a", "/data/ab"), expect!["fine"]);
        check(
            two("/data", "/data/"),
            expect![
                "spec.disks[b].path is `/data/`: disk `a` has the same directory, one in it or one around it; each disk needs its own"
            ],
        );
        check(
            two("/data/x", "/data"),
            expect![
                "spec.disks[b].path is `/data`: disk `a` has the same directory, one in it or one around it; each disk needs its own"
            ],
        );
        check(
            two("data", "/a/../b"),
            expect![
                "spec.disks[a].path is `data`: it must be an absolute path without `..` of a directory that is not the root; spec.disks[b].path is `/a/../b`: it must be an absolute path without `..` of a directory that is not the root"
            ],
        );
        check(
            two("", "/"),
            expect![
                "spec.disks[a].path: it must be an absolute path without `..` of a directory that is not the root; spec.disks[b].path is `/`: it must be an absolute path without `..` of a directory that is not the root"
            ],
        );
    }

    #[test]
    fn refuses_what_it_would_have_to_ignore() {
        check(
            serde_json::json!({"name": "other", "tags": ["a b"], "disks": {"x/y": {"path": "/x", "type": "block"}}}),
            expect![
                "spec.name is `other`: it must be empty or `node-1`, the name of the object; spec.tags is `a b`: a tag is a word without blanks, commas and semicolons; spec.disks is `x/y`: the name of a disk is a word without blanks and slashes; spec.disks[x/y].type is `block`: only `filesystem` is supported: a directory of a mounted disk"
            ],
        );
    }
}

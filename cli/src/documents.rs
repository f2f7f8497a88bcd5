//! Manifests: one or more YAML or JSON documents from a file or standard input.

use std::io::Read;
use std::path::Path;

use anyhow::Context;
use api::ErrorKind;
use controller::http::registry::{self, Served};
use serde::Deserialize;
use serde_json::Value;

use crate::client::namespace_of;
use crate::failure::failed;

/// One object of a manifest.
#[derive(Clone, Debug)]
pub struct Document {
    pub served: &'static Served,
    pub namespace: Option<String>,
    pub name: String,
    pub object: Value,
}

impl Document {
    /// `backingimage.longhorn.io/name`, as `kubectl` prints it.
    pub fn label(&self) -> String {
        label(self.served, &self.name)
    }
}

/// `backingimage.longhorn.io/name`, as `kubectl` prints it.
pub fn label(served: &Served, name: &str) -> String {
    let group = &served.resource.group;
    if group.is_empty() { format!("{}/{name}", served.singular) } else { format!("{}.{group}/{name}", served.singular) }
}

/// The documents of a file, or of standard input when it is `-`.
pub fn read(file: &Path, namespace: Option<&str>) -> anyhow::Result<Vec<Document>> {
    let mut text = String::new();
    if file == Path::new("-") {
        std::io::stdin().read_to_string(&mut text).context("cannot read standard input")?;
    } else {
        text = std::fs::read_to_string(file).with_context(|| format!("cannot read `{}`", file.display()))?;
    }
    let documents = parse(&text, namespace).with_context(|| format!("`{}`", file.display()))?;
    if documents.is_empty() {
        return failed(ErrorKind::Invalid, format!("`{}` holds no object", file.display()));
    }
    Ok(documents)
}

/// The documents of a text. Lists are taken apart; empty documents are skipped.
pub fn parse(text: &str, namespace: Option<&str>) -> anyhow::Result<Vec<Document>> {
    let mut documents = vec![];
    for (index, part) in serde_yaml_ng::Deserializer::from_str(text).enumerate() {
        let value = match Value::deserialize(part) {
            Ok(value) => value,
            Err(error) => return failed(ErrorKind::Invalid, format!("document {} is not YAML: {error}", index + 1)),
        };
        match value {
            Value::Null => {}
            Value::Object(ref map) if map.get("kind").and_then(Value::as_str).is_some_and(|k| k.ends_with("List")) => {
                for item in value["items"].as_array().into_iter().flatten() {
                    documents.push(document(item.clone(), index, namespace)?);
                }
            }
            value => documents.push(document(value, index, namespace)?),
        }
    }
    Ok(documents)
}

fn document(mut object: Value, index: usize, namespace: Option<&str>) -> anyhow::Result<Document> {
    let number = index + 1;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let (api_version, kind) = (text(&object["apiVersion"]), text(&object["kind"]));
    if kind.is_empty() || api_version.is_empty() {
        return failed(ErrorKind::Invalid, format!("document {number} needs `apiVersion` and `kind`"));
    }
    let Some(served) = registry::by_manifest(&api_version, &kind) else {
        let known = registry::all().iter().find(|s| s.resource.kind == kind);
        let right = match known {
            Some(served) => format!("; `{kind}` is `apiVersion: {}`", served.resource.api_version()),
            None => {
                let kinds: Vec<&str> = registry::all().iter().map(|s| s.resource.kind.as_str()).collect();
                format!("; offered are {}", kinds.join(", "))
            }
        };
        return failed(
            ErrorKind::Unsupported,
            format!("document {number}: `{kind}` of `{api_version}` is not offered{right}"),
        );
    };
    let name = text(&object["metadata"]["name"]);
    if name.is_empty() {
        return failed(ErrorKind::Invalid, format!("document {number} ({kind}) needs `metadata.name`"));
    }
    let given = text(&object["metadata"]["namespace"]);
    let namespace = namespace_of(served, Some(given.as_str()).filter(|g| !g.is_empty()).or(namespace));
    if let Some(namespace) = &namespace {
        object["metadata"]["namespace"] = namespace.as_str().into();
    }
    Ok(Document { served, namespace, name, object })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::exit_code;

    const TWO: &str = "---\nkind: StorageClass\napiVersion: storage.k8s.io/v1\nmetadata:\n  name: a\nparameters:\n  \
        numberOfReplicas: \"3\"\n---\n# nothing\n---\napiVersion: v1\nkind: PersistentVolumeClaim\nmetadata: {name: b}\n";

    #[test]
    fn splits_documents_and_gives_them_their_namespace() {
        let documents = parse(TWO, None).unwrap();
        let labels: Vec<String> = documents.iter().map(Document::label).collect();
        assert_eq!(labels, ["storageclass.storage.k8s.io/a", "persistentvolumeclaim/b"]);
        assert_eq!(documents[0].namespace, None);
        assert_eq!(documents[1].namespace.as_deref(), Some("default"));
        assert_eq!(documents[0].object["parameters"]["numberOfReplicas"], "3");
        assert_eq!(parse(TWO, Some("other")).unwrap()[1].namespace.as_deref(), Some("other"));
    }

    #[test]
    fn says_which_document_is_wrong_and_what_would_be_right() {
        let check = |text: &str| {
            let error = parse(text, None).unwrap_err();
            assert_eq!(exit_code(&error), 2);
            error.to_string()
        };
        assert_eq!(check("kind: X"), "document 1 needs `apiVersion` and `kind`");
        assert_eq!(
            check("kind: BackingImage\napiVersion: longhorn.io/v1beta1\nmetadata: {name: x}"),
            "document 1: `BackingImage` of `longhorn.io/v1beta1` is not offered; `BackingImage` is `apiVersion: longhorn.io/v1beta2`"
        );
        assert!(check("a: [").starts_with("document 1 is not YAML"));
    }

    #[test]
    fn takes_lists_apart() {
        let list = r#"{"kind":"List","apiVersion":"v1","items":[{"kind":"BackingImage","apiVersion":"longhorn.io/v1beta2","metadata":{"name":"x"}}]}"#;
        assert_eq!(parse(list, None).unwrap()[0].namespace.as_deref(), Some("longhorn-system"));
    }
}

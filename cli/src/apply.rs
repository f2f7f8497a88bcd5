//! `apply`: creates what is absent, changes what differs, leaves the rest.

use std::path::PathBuf;

use api::ErrorKind;
use clap::Args;
use serde_json::{Map, Value};

use crate::client::{Client, again};
use crate::documents::{self, Document};

/// Creates or changes objects from YAML or JSON files.
#[derive(Args, Debug)]
pub struct Apply {
    /// Files with one or more documents each; `-` is standard input.
    #[arg(short = 'f', long = "filename", required = true)]
    files: Vec<PathBuf>,
    /// Namespace of documents that name none.
    #[arg(short, long, env = "BACKING_IMAGE_CSI_NAMESPACE")]
    namespace: Option<String>,
}

/// Runs `apply`. All files are read before anything is changed.
pub async fn run(client: &Client, Apply { files, namespace }: Apply) -> anyhow::Result<()> {
    let mut all = vec![];
    for file in &files {
        all.extend(documents::read(file, namespace.as_deref())?);
    }
    for document in &all {
        let outcome = apply(client, document).await.map_err(|e| e.context(document.label()))?;
        println!("{} {outcome}", document.label());
    }
    Ok(())
}

async fn apply(client: &Client, document: &Document) -> anyhow::Result<&'static str> {
    let (resource, namespace) = (&document.served.resource, document.namespace.as_deref());
    // Somebody else may also have made or removed it meanwhile.
    again(&[ErrorKind::Pending, ErrorKind::Incompatible, ErrorKind::NotFound], async || {
        Ok(match client.find(resource, namespace, &document.name).await? {
            None => client.create(resource, namespace, &document.object).await.map(|_| "created"),
            Some(current) => {
                let wanted = merged(&current, &document.object);
                if wanted == current {
                    return Ok(Ok("unchanged"));
                }
                client.replace(resource, namespace, &document.name, &wanted).await.map(|_| "configured")
            }
        })
    })
    .await
}

/// The current object with what the document says on top: labels and annotations are added to, maps of the spec are merged
/// (fields that others fill, such as `diskFileSpecMap`, stay), everything else is replaced.
fn merged(current: &Value, document: &Value) -> Value {
    let mut object = current.clone();
    let empty = Map::new();
    for (key, value) in document.as_object().unwrap_or(&empty) {
        match key.as_str() {
            "status" | "apiVersion" | "kind" => {}
            "metadata" => {
                for field in ["labels", "annotations"] {
                    if let Some(wanted) = value.get(field) {
                        overlay(&mut object["metadata"][field], wanted);
                    }
                }
            }
            // A StorageClass has its fields beside the metadata, and `parameters` means exactly those.
            "spec" => {
                for (field, wanted) in value.as_object().unwrap_or(&empty) {
                    let exact = matches!(field.as_str(), "sourceParameters");
                    let place = &mut object["spec"][field.as_str()];
                    if exact { *place = wanted.clone() } else { overlay(place, wanted) }
                }
            }
            _ => object[key.as_str()] = value.clone(),
        }
    }
    object
}

fn overlay(place: &mut Value, wanted: &Value) {
    let Value::Object(fields) = wanted else {
        *place = wanted.clone();
        return;
    };
    if !place.is_object() {
        *place = Value::Object(Map::new());
    }
    for (key, value) in fields {
        overlay(&mut place[key.as_str()], value);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn keeps_what_others_filled_in() {
        let current = json!({
            "metadata": { "name": "a", "resourceVersion": "7", "labels": { "x": "1" } },
            "spec": { "checksum": "", "diskFileSpecMap": { "d": {} }, "sourceParameters": { "url": "a", "old": "b" } },
            "status": { "uuid": "12345678" },
        });
        let same = json!({ "metadata": { "name": "a" }, "spec": { "sourceParameters": { "url": "a", "old": "b" } } });
        assert_eq!(merged(&current, &same), current);
        let other = json!({ "metadata": { "labels": { "y": "2" } }, "spec": { "sourceParameters": { "url": "c" } } });
        let result = merged(&current, &other);
        assert_eq!(result["metadata"]["labels"], json!({ "x": "1", "y": "2" }));
        assert_eq!(result["spec"]["sourceParameters"], json!({ "url": "c" }));
        assert_eq!(result["spec"]["diskFileSpecMap"], json!({ "d": {} }));
        assert_eq!(result["metadata"]["resourceVersion"], "7");
    }
}

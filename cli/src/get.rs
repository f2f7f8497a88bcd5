//! `get`: objects as tables, JSON, YAML or names.

use api::ErrorKind;
use clap::{Args, ValueEnum};
use controller::http::registry::{self, Served};
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::client::{Client, namespace_of};
use crate::failure::{Failure, failed};
use crate::{documents, table};

/// Shows objects.
#[derive(Args, Debug)]
pub struct Get {
    /// Plural, singular or short name of a kind, or several with commas between: backingimages, lhbi, volumes, pvc, nodes, events.
    kind: String,
    /// Only these.
    names: Vec<String>,
    /// Namespace; default `longhorn-system` for kinds of ours, else `default`.
    #[arg(short, long, env = "BACKING_IMAGE_CSI_NAMESPACE")]
    namespace: Option<String>,
    /// All namespaces.
    #[arg(short = 'A', long)]
    all_namespaces: bool,
    /// Only objects with these labels: `key=value`, several with commas between.
    #[arg(short = 'l', long)]
    selector: Option<String>,
    /// Form of the output; a table when absent.
    #[arg(short, long, value_enum)]
    output: Option<Output>,
}

/// Form of the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    Json,
    Yaml,
    Wide,
    Name,
}

/// The kind that a word means.
pub fn kind(word: &str) -> anyhow::Result<&'static Served> {
    match registry::by_word(word) {
        Some(served) => Ok(served),
        None => {
            let known: Vec<&str> = registry::all().iter().map(|s| s.resource.plural.as_str()).collect();
            failed(
                ErrorKind::Invalid,
                format!("`{word}` is not a kind that is offered; offered are {}", known.join(", ")),
            )
        }
    }
}

/// Runs `get`.
pub async fn run(client: &Client, get: Get) -> anyhow::Result<()> {
    let Get { kind: word, names, namespace, all_namespaces, selector, output } = get;
    if all_namespaces && !names.is_empty() {
        return failed(ErrorKind::Invalid, "an object cannot be named across all namespaces; use -n NAMESPACE");
    }
    let kinds = word.split(',').map(kind).collect::<anyhow::Result<Vec<_>>>()?;
    let mut found: Vec<(&Served, Vec<Value>)> = vec![];
    for served in kinds {
        let place = if all_namespaces { None } else { namespace_of(served, namespace.as_deref()) };
        found.push((served, fetch(client, served, place.as_deref(), &names, selector.as_deref()).await?));
    }
    let single = names.len() == 1 && found.len() == 1;
    match output {
        Some(Output::Json) => println!("{}", serde_json::to_string_pretty(&combined(found, single))?),
        Some(Output::Yaml) => print!("{}", serde_yaml_ng::to_string(&combined(found, single))?),
        Some(Output::Name) => {
            for (served, items) in &found {
                for item in items {
                    println!("{}", documents::label(served, item["metadata"]["name"].as_str().unwrap_or_default()));
                }
            }
        }
        wide @ (None | Some(Output::Wide)) => {
            let mut empty = true;
            for (served, items) in found.iter().filter(|(_, items)| !items.is_empty()) {
                if !empty {
                    println!();
                }
                empty = false;
                let namespaces = all_namespaces && served.resource.namespaced;
                print!("{}", table::objects(&served.resource, items, namespaces, wide.is_some(), Timestamp::now()));
            }
            if empty {
                eprintln!("No resources found.");
            }
        }
    }
    Ok(())
}

async fn fetch(
    client: &Client,
    served: &Served,
    namespace: Option<&str>,
    names: &[String],
    selector: Option<&str>,
) -> anyhow::Result<Vec<Value>> {
    let resource = &served.resource;
    if names.is_empty() {
        let mut list = client.list(resource, namespace, selector).await?;
        return match list["items"].take() {
            Value::Array(items) => Ok(items),
            _ => Err(Failure::new(ErrorKind::Internal, "the instance gave a list without items").into()),
        };
    }
    let mut items = vec![];
    for name in names {
        items.push(client.get(resource, namespace, name).await?);
    }
    Ok(items)
}

/// One object as it is, anything else as a `List`.
fn combined(found: Vec<(&Served, Vec<Value>)>, single: bool) -> Value {
    let mut items: Vec<Value> = found.into_iter().flat_map(|(_, items)| items).collect();
    if single && items.len() == 1 {
        return items.remove(0);
    }
    json!({ "apiVersion": "v1", "items": items, "kind": "List", "metadata": { "resourceVersion": "" } })
}

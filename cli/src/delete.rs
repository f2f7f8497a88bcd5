//! `delete`: removes objects and waits until they are gone.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use api::ErrorKind;
use clap::Args;
use controller::http::registry::Served;
use futures::StreamExt;
use serde_json::Value;
use tokio::time::{Instant, timeout_at};

use crate::client::{Client, Event, namespace_of};
use crate::failure::failed;
use crate::progress::Progress;
use crate::{documents, duration, get, volume};

/// Deletes objects by name or by the files that describe them.
#[derive(Args, Debug)]
pub struct Delete {
    /// A kind and the names of objects of it: `pvc my-claim`, or `pvc/my-claim`.
    #[arg(required_unless_present = "files")]
    objects: Vec<String>,
    /// Files whose objects to delete, in reverse order; `-` is standard input.
    #[arg(short = 'f', long = "filename")]
    files: Vec<PathBuf>,
    #[arg(short, long, env = "BACKING_IMAGE_CSI_NAMESPACE")]
    namespace: Option<String>,
    /// Wait until the objects are gone.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    wait: bool,
    /// How long to wait, e.g. 90s or 5m.
    #[arg(long, default_value = "2m", value_parser = duration::parse)]
    timeout: Duration,
    /// An object that does not exist is no failure.
    #[arg(long)]
    ignore_not_found: bool,
}

struct Victim {
    served: &'static Served,
    namespace: Option<String>,
    name: String,
}

/// Runs `delete`.
pub async fn run(client: &Client, delete: Delete) -> anyhow::Result<()> {
    let Delete { objects, files, namespace, wait, timeout, ignore_not_found } = delete;
    let mut victims = vec![];
    for file in &files {
        for document in documents::read(file, namespace.as_deref())?.into_iter().rev() {
            victims.push(Victim { served: document.served, namespace: document.namespace, name: document.name });
        }
    }
    victims.extend(named(&objects, namespace.as_deref())?);
    let deadline = Instant::now() + timeout;
    for victim in &victims {
        let label = documents::label(victim.served, &victim.name);
        let (resource, place) = (&victim.served.resource, victim.namespace.as_deref());
        let volume = if wait { volume_of(client, victim).await? } else { None };
        match client.delete(resource, place, &victim.name).await.with_context(|| label.clone())? {
            Some(last) => {
                println!("{label} deleted");
                if wait {
                    wait_until_gone(client, victim, &last, deadline).await.with_context(|| label.clone())?;
                    if let Some((volume, last)) = volume {
                        let what = format!("its volume {}", volume.name);
                        wait_until_gone(client, &volume, &last, deadline).await.context(what)?;
                    }
                }
            }
            None if ignore_not_found || !files.is_empty() => println!("{label} does not exist"),
            None => return failed(ErrorKind::NotFound, format!("{label} does not exist")),
        }
    }
    Ok(())
}

/// The persistent volume that goes with a claim.
async fn volume_of(client: &Client, victim: &Victim) -> anyhow::Result<Option<(Victim, Value)>> {
    let claims = victim.namespace.as_deref().filter(|_| victim.served.resource.kind == "PersistentVolumeClaim");
    let Some(namespace) = claims else { return Ok(None) };
    let Some(name) = volume::of_claim(client, namespace, &victim.name).await? else { return Ok(None) };
    let served = get::kind("persistentvolumes")?;
    let volume = client.find(&served.resource, None, &name).await?;
    let volume = volume.filter(|v| v["spec"]["persistentVolumeReclaimPolicy"] == "Delete");
    Ok(volume.map(|v| (Victim { served, namespace: None, name }, v)))
}

fn named(words: &[String], namespace: Option<&str>) -> anyhow::Result<Vec<Victim>> {
    let Some(first) = words.first() else { return Ok(vec![]) };
    let victim = |served: &'static Served, name: &str| Victim {
        served,
        namespace: namespace_of(served, namespace),
        name: name.to_owned(),
    };
    if first.contains('/') {
        return words
            .iter()
            .map(|word| match word.split_once('/') {
                Some((kind, name)) => Ok(victim(get::kind(kind)?, name)),
                None => failed(ErrorKind::Invalid, format!("`{word}` is not of the form KIND/NAME")),
            })
            .collect();
    }
    let served = get::kind(first)?;
    if words.len() == 1 {
        return failed(ErrorKind::Invalid, format!("which {}? write: delete {first} NAME", served.resource.plural));
    }
    Ok(words[1..].iter().map(|name| victim(served, name)).collect())
}

/// Returns when the object (this one, not a later one of its name) no longer exists.
async fn wait_until_gone(client: &Client, victim: &Victim, last: &Value, deadline: Instant) -> anyhow::Result<()> {
    let uid = last["metadata"]["uid"].clone();
    let mut waits_for = reason(last);
    let progress = Progress::new();
    let result = timeout_at(deadline, async {
        loop {
            let (resource, place) = (&victim.served.resource, victim.namespace.as_deref());
            let mut events = client.watch(resource, place, Some(&victim.name)).await?;
            // The watch says what exists first; nothing there is seen only by asking.
            match client.find(resource, place, &victim.name).await? {
                Some(current) if current["metadata"]["uid"] == uid => {}
                _ => return Ok(()),
            }
            while let Some(event) = events.next().await {
                match event? {
                    Event::Deleted(object) if object["metadata"]["uid"] == uid => return Ok(()),
                    Event::Applied(object) if object["metadata"]["uid"] == uid => {
                        waits_for = reason(&object);
                        progress.say(&format!("waiting: {waits_for}"));
                    }
                    Event::Applied(_) => return Ok(()),
                    Event::Deleted(_) => {}
                    Event::Relist => break,
                }
            }
        }
    })
    .await;
    progress.finish();
    match result {
        Ok(result) => result,
        Err(_) => failed(
            ErrorKind::Pending,
            format!("it is being deleted, but still there: {waits_for}; it goes on by itself, `why` says more"),
        ),
    }
}

/// What an object that is being deleted waits for.
fn reason(object: &Value) -> String {
    let conditions = object["status"]["conditions"].as_array().map(Vec::as_slice).unwrap_or_default();
    let waiting =
        conditions.iter().find(|c| c["status"] != "True" && c["message"].as_str().is_some_and(|m| !m.is_empty()));
    if let Some(condition) = waiting {
        return condition["message"].as_str().unwrap_or_default().to_owned();
    }
    let finalizers = object["metadata"]["finalizers"].as_array().map(Vec::as_slice).unwrap_or_default();
    let names: Vec<&str> = finalizers.iter().filter_map(Value::as_str).collect();
    format!("the owner of finalizer {} has to clean up", names.join(", "))
}

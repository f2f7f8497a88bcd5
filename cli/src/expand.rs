//! `volume expand`: writes the wish for more into the claim, or a volume without one, and waits for what comes of it.

use std::time::Duration;

use api::validation::claim::{capacity, requested};
use api::{ErrorKind, Volume, quantity};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use store::ResourceType;

use crate::client::Client;
use crate::failure::{failed, is_of_kind};
use crate::orchestrator::expansion::{self, RESIZING};
use crate::orchestrator::is_transient;

/// Asks for a claim or volume to have that size; returns what was done.
pub async fn run(
    client: &Client,
    name: &str,
    claims: &str,
    namespace: &str,
    size: &str,
    timeout: Duration,
) -> anyhow::Result<String> {
    if quantity::bytes(size).is_none() {
        return failed(
            ErrorKind::Invalid,
            format!("`{size}` is not a size; write for example 10Gi, 500Mi or 1073741824"),
        );
    }
    let claim = ResourceType::of::<PersistentVolumeClaim>();
    if client.find(&claim, Some(claims), name).await?.is_some() {
        return of_claim(client, claims, name, size, timeout).await;
    }
    let volume = client.find(&ResourceType::of::<PersistentVolume>(), None, name).await?;
    match volume.as_ref().map(|v| &v["spec"]["claimRef"]) {
        Some(owner) if owner["name"].is_string() => {
            let word = |key: &str| owner[key].as_str().unwrap_or_default().to_owned();
            of_claim(client, &word("namespace"), &word("name"), size, timeout).await
        }
        _ => of_volume(client, namespace, name, size).await,
    }
}

/// A volume without a claim has nobody who does more for it than to keep the wish.
async fn of_volume(client: &Client, namespace: &str, name: &str, size: &str) -> anyhow::Result<String> {
    let bytes = quantity::bytes(size).unwrap_or_default();
    let resource = ResourceType::of::<Volume>();
    let wished = client.modify(&resource, Some(namespace), name, |object| {
        object["spec"]["size"] = bytes.to_string().into();
        Ok(())
    });
    match wished.await {
        Err(error) if is_of_kind(&error, ErrorKind::NotFound) => failed(
            ErrorKind::NotFound,
            format!("there is no claim or volume `{name}`; `volume list` shows what there is"),
        ),
        Err(error) => Err(error),
        Ok(()) => Ok(format!("volume `{name}` has {size} from its next attachment on")),
    }
}

async fn of_claim(
    client: &Client,
    namespace: &str,
    name: &str,
    size: &str,
    timeout: Duration,
) -> anyhow::Result<String> {
    let resource = ResourceType::of::<PersistentVolumeClaim>();
    let asked_at = Timestamp::now().as_second();
    let ask = client.modify(&resource, Some(namespace), name, |object| {
        object["spec"]["resources"]["requests"]["storage"] = size.into();
        Ok(())
    });
    ask.await?;
    let mut last = None;
    match tokio::time::timeout(timeout, answer(client, namespace, name, size, asked_at, &mut last)).await {
        Ok(answered) => answered,
        Err(_) => {
            let why = last.unwrap_or_else(|| "nothing has answered yet".into());
            let hint = format!("the wish stays, see `why pvc {name} -n {namespace}`");
            failed(
                ErrorKind::Pending,
                format!("claim `{name}` asks for {size} and does not have it yet: {why}; {hint}"),
            )
        }
    }
}

/// Waits until the claim says what came of the wish.
async fn answer(
    client: &Client,
    namespace: &str,
    name: &str,
    size: &str,
    asked_at: i64,
    last: &mut Option<String>,
) -> anyhow::Result<String> {
    let gone = format!("claim `{name}` was deleted meanwhile");
    let look = async |claim: PersistentVolumeClaim| {
        if capacity(&claim) >= requested(&claim) {
            return Ok(Some(format!("claim `{name}` has {size}")));
        }
        if expansion::is_done(&claim) {
            let used = "its filesystem grows when it is mounted the next time";
            return Ok(Some(format!("claim `{name}` is expanded to {size}; {used}")));
        }
        let conditions = claim.status.and_then(|s| s.conditions).unwrap_or_default();
        // What was said before was about another wish.
        let is_new = |at: i64| at >= asked_at;
        let said = conditions
            .into_iter()
            .find(|c| c.type_ == RESIZING && c.last_probe_time.as_ref().is_some_and(|time| is_new(time.0.as_second())));
        let Some(said) = said else { return Ok(None) };
        let kind = said.reason.as_deref().and_then(ErrorKind::from_name).unwrap_or(ErrorKind::Internal);
        let message = said.message.unwrap_or_default();
        if !is_transient(kind) || kind == ErrorKind::Exhausted {
            return failed(kind, format!("claim `{name}` asks for {size} and waits: {message}; the wish stays"));
        }
        *last = Some(message);
        Ok(None)
    };
    client.follow(namespace, name, &gone, look).await
}

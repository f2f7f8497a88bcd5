//! `volume upgrade-engine`: writes the request into the volume and waits for its answer in the engine.

use std::time::Duration;

use api::names::condition::{READY, UPGRADED};
use api::names::engine_name;
use api::volume::VolumeState;
use api::{Engine, ErrorKind, Volume, condition};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::PersistentVolume;
use serde_json::Value;
use store::ResourceType;

use crate::client::Client;
use crate::failure::{failed, is_of_kind};
use crate::volume;

/// Requests the replacement of an engine; returns what was done.
pub async fn run(
    client: &Client,
    name: &str,
    claims: &str,
    namespace: &str,
    timeout: Duration,
) -> anyhow::Result<String> {
    let volume = volume_of(client, name, claims).await?;
    let request = request(client, &volume, namespace).await?;
    let mut last = None;
    match tokio::time::timeout(timeout, answer(client, &volume, namespace, &request, &mut last)).await {
        Ok(answered) => answered,
        Err(_) => {
            let conditions = last.and_then(|e| e.status).map(|s| s.conditions).unwrap_or_default();
            let why = condition::find(&conditions, READY).filter(|c| !c.is_true() && !c.message.is_empty());
            let why = why.map_or_else(|| "its node has not answered yet".to_owned(), |c| c.message.clone());
            let message = format!(
                "the engine of volume `{volume}` is not replaced yet: {why}; the request stays, see `why volume {volume}`"
            );
            failed(ErrorKind::Pending, message)
        }
    }
}

/// The volume behind a claim, a persistent volume, or of that name.
async fn volume_of(client: &Client, name: &str, claims: &str) -> anyhow::Result<String> {
    let bound = volume::of_claim(client, claims, name).await?;
    let name = bound.unwrap_or_else(|| name.to_owned());
    let found = client.find(&ResourceType::of::<PersistentVolume>(), None, &name).await?;
    let handle = found.and_then(|v| v["spec"]["csi"]["volumeHandle"].as_str().map(str::to_owned));
    Ok(handle.unwrap_or(name))
}

/// Writes the request; returns its time, which its answer names.
async fn request(client: &Client, name: &str, namespace: &str) -> anyhow::Result<String> {
    let request = |object: &mut Value| {
        let volume: Volume = serde_json::from_value(object.clone())?;
        let state = volume.status.map(|s| s.state).unwrap_or_default();
        if state != VolumeState::Attached {
            let message = format!(
                "volume `{name}` is not attached, so it has no engine to replace; its next attachment starts the installed version"
            );
            return failed(ErrorKind::NotReady, message);
        }
        let now = Timestamp::now().to_string();
        object["spec"]["engineUpgradeRequestedAt"] = now.clone().into();
        Ok(now)
    };
    let requested = client.modify(&ResourceType::of::<Volume>(), Some(namespace), name, request).await;
    match requested {
        Err(error) if is_of_kind(&error, ErrorKind::NotFound) => {
            let message = format!("there is no claim or volume `{name}`; `volume list` shows what there is");
            failed(ErrorKind::NotFound, message)
        }
        requested => requested,
    }
}

async fn answer(
    client: &Client,
    volume: &str,
    namespace: &str,
    request: &str,
    last: &mut Option<Engine>,
) -> anyhow::Result<String> {
    let gone = format!("volume `{volume}` was deleted meanwhile");
    let look = async |engine: Engine| {
        let status = engine.status.clone().unwrap_or_default();
        let node = engine.spec.node_id.clone();
        *last = Some(engine);
        if status.upgrade_requested_at != request {
            return Ok(None);
        }
        let Some(upgraded) = condition::find(&status.conditions, UPGRADED) else { return Ok(None) };
        let sentence = format!("engine of volume `{volume}` on {node}: {}", upgraded.message);
        match upgraded.reason.as_str() {
            _ if upgraded.is_true() => Ok(Some(sentence)),
            "Failed" => failed(ErrorKind::Unavailable, sentence),
            _ => failed(ErrorKind::NotReady, format!("not upgraded, the {sentence}")),
        }
    };
    client.follow(namespace, &engine_name(volume), &gone, look).await
}

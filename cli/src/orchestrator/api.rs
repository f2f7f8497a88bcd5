//! The operations on volumes that the command line asks for, below `/standalone/v1/`.
//!
//! Each answers with JSON lines: `{"say": …}` while it works, then `{"done": …}` or `{"failed": {"kind", "message"}}`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use ::api::names::condition::{READY, WAIT_FOR_BACKING_IMAGE};
use ::api::{Engine, ErrorKind, Volume, names};
use axum::Json;
use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use bytes::Bytes;
use futures::StreamExt;
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use k8s_openapi::api::storage::v1::VolumeAttachment;
use kube::ResourceExt;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};
use tokio_stream::wrappers::ReceiverStream;

use super::objects::{self, Part, is_deleting};
use super::target::{self, SELECTED_NODE, Target};
use super::{Orchestrator, attachments, clients, expansion, mounts};
use crate::failure::Failure;

/// An operation on a volume. Fields that it does not need are left out.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Operation {
    pub namespace: String,
    /// A claim of that namespace, a persistent volume, or a volume.
    pub name: String,
    pub node: Option<String>,
    pub path: Option<PathBuf>,
    pub read_only: bool,
    pub timeout_seconds: u64,
}

/// The operations as routes.
pub fn router(orchestrator: Orchestrator) -> Router {
    Router::new()
        .route("/standalone/v1/attach", post(attach))
        .route("/standalone/v1/detach", post(detach))
        .route("/standalone/v1/mount", post(mount))
        .route("/standalone/v1/unmount", post(unmount))
        .with_state(orchestrator)
}

/// Where an operation says what it does.
#[derive(Clone)]
pub struct Voice(mpsc::Sender<String>);

impl Voice {
    /// Tells the user what happens. Nobody listening is no failure.
    pub fn say(&self, sentence: impl Into<String>) {
        let _ = self.0.try_send(format!("{}\n", json!({ "say": sentence.into() })));
    }
}

/// Runs an operation and streams what it says. It goes on when the client goes away.
pub fn streamed<F>(operation: impl FnOnce(Voice) -> F + Send + 'static) -> Response
where
    F: Future<Output = Result<Value, Failure>> + Send,
{
    let (sender, receiver) = mpsc::channel(256);
    tokio::spawn(async move {
        let last = match operation(Voice(sender.clone())).await {
            Ok(done) => json!({ "done": done }),
            Err(failure) => json!({ "failed": { "kind": failure.kind.as_str(), "message": failure.message } }),
        };
        let _ = sender.send(format!("{last}\n")).await;
    });
    let lines = ReceiverStream::new(receiver).map(|line| Ok::<_, std::convert::Infallible>(Bytes::from(line)));
    ([(header::CONTENT_TYPE, "application/json")], Body::from_stream(lines)).into_response()
}

fn deadline(operation: &Operation) -> Instant {
    Instant::now() + Duration::from_secs(operation.timeout_seconds.clamp(1, 86_400))
}

fn required<T: Clone>(value: &Option<T>, what: &str) -> Result<T, Failure> {
    value.clone().ok_or_else(|| Failure::new(ErrorKind::Invalid, format!("{what} is missing")))
}

async fn attach(State(orchestrator): State<Orchestrator>, Json(operation): Json<Operation>) -> Response {
    streamed(async move |voice| {
        let (target, attachment) = attached(&orchestrator, &operation, deadline(&operation), &voice).await?;
        let (node, device) = (attachment.spec.node_name, device(&orchestrator, &target).await?);
        if target.usage.block && !operation.read_only {
            // Its device is all that there is to look at.
            expansion::finish(&orchestrator, &target, &node, Path::new(&device), Path::new("")).await;
        }
        Ok(json!({ "volume": target.volume_id, "node": node, "device": device }))
    })
}

/// The block device of an attached volume.
async fn device(orchestrator: &Orchestrator, target: &Target) -> Result<String, Failure> {
    let engine: Option<Engine> = orchestrator.store().get(&names::engine_name(&target.volume_id)).await?;
    Ok(engine.and_then(|e| e.status).map(|s| s.endpoint).unwrap_or_default())
}

/// Waits until the volume exists and is attached to the node of the operation.
async fn attached(
    orchestrator: &Orchestrator,
    operation: &Operation,
    deadline: Instant,
    voice: &Voice,
) -> Result<(Target, VolumeAttachment), Failure> {
    let node = required(&operation.node, "the node")?;
    // An unknown node is said at once.
    orchestrator.inner.sockets.node(&node).await?;
    let target = bound(orchestrator, operation, &node, deadline, voice).await?;
    let (attachment, new) = attachments::ensure(orchestrator, &target, &node, operation.read_only).await?;
    match attachment_done(orchestrator, &attachment, deadline, voice).await {
        Ok(Some(attachment)) => Ok((target, attachment)),
        Ok(None) => Err(Failure::new(ErrorKind::Pending, format!("{} was detached in the meantime", target.label))),
        Err(failure) if clients::is_transient(failure.kind) => {
            let hint = format!(
                "it goes on; wait again with the same command, or give up with `volume detach {}`",
                operation.name
            );
            Err(Failure::new(failure.kind, format!("{}; {hint}", failure.message)))
        }
        Err(failure) => {
            // It can not come true: a wish that was made for this call goes with it.
            if new {
                attachments::wish_away(orchestrator, &attachment).await?;
            }
            Err(failure)
        }
    }
}

/// Waits until a claim is bound.
async fn bound(
    orchestrator: &Orchestrator,
    operation: &Operation,
    node: &str,
    deadline: Instant,
    voice: &Voice,
) -> Result<Target, Failure> {
    let mut events = orchestrator.store().watch_everywhere::<PersistentVolumeClaim>().await?;
    loop {
        let failure = match target::find_to_attach(orchestrator, &operation.namespace, &operation.name).await {
            Err(failure) if failure.kind == ErrorKind::Pending => failure,
            result => return result,
        };
        voice.say(&failure.message);
        let claim: Option<PersistentVolumeClaim> =
            orchestrator.store().get_in(&operation.namespace, &operation.name).await?;
        if let Some(claim) = claim {
            objects::update(orchestrator.store(), &claim, Part::Main, |claim| {
                claim.annotations_mut().insert(SELECTED_NODE.into(), node.to_owned()).as_deref() != Some(node)
            })
            .await?;
        }
        if timeout_at(deadline, events.next()).await.is_err() {
            return Err(failure);
        }
    }
}

/// Waits until an attachment came true (or is gone, when it is being deleted: then `None`).
async fn attachment_done(
    orchestrator: &Orchestrator,
    attachment: &VolumeAttachment,
    deadline: Instant,
    voice: &Voice,
) -> Result<Option<VolumeAttachment>, Failure> {
    let mut events = orchestrator.store().watch::<VolumeAttachment>().await?;
    let mut last = None;
    // An error from before this call must not end it: it is judged when it was seen to change.
    let stale = attachments::error_of(attachment);
    let stale_time = error_time(attachment);
    loop {
        let Some(current) = objects::read(orchestrator.store(), attachment).await? else { return Ok(None) };
        if current.uid() != attachment.uid() {
            return Ok(None);
        }
        if !is_deleting(&current) && attachments::is_attached(&current) {
            return Ok(Some(current));
        }
        if let Some(failure) = attachments::error_of(&current)
            && (stale.is_none() || error_time(&current) != stale_time)
        {
            if !clients::is_transient(failure.kind) {
                return Err(failure);
            }
            voice.say(&failure.message);
            last = Some(failure);
        }
        if timeout_at(deadline, events.next()).await.is_err() {
            return Err(match last {
                Some(failure) => failure,
                None => unanswered(orchestrator, &current).await?,
            });
        }
    }
}

/// What a volume waits for whose call has not been answered yet.
async fn unanswered(orchestrator: &Orchestrator, attachment: &VolumeAttachment) -> Result<Failure, Failure> {
    let name = attachments::volume_id(attachment);
    let volume: Option<Volume> = orchestrator.store().get(&name).await?;
    let conditions = volume.and_then(|v| v.status).unwrap_or_default().conditions;
    let waits = conditions.iter().find(|c| c.r#type == WAIT_FOR_BACKING_IMAGE && c.is_true());
    let waits = waits.or_else(|| conditions.iter().find(|c| c.r#type == READY && !c.is_true()));
    let sentence = match waits.filter(|c| !c.message.is_empty()) {
        None => "nothing has answered yet".to_owned(),
        Some(c) if c.hint.is_empty() => format!("volume `{name}` waits: {}", c.message),
        Some(c) => format!("volume `{name}` waits: {} (you can: {})", c.message, c.hint),
    };
    Ok(Failure::new(ErrorKind::Pending, sentence))
}

fn error_time(attachment: &VolumeAttachment) -> Option<String> {
    let status = attachment.status.as_ref()?;
    let error = if is_deleting(attachment) { status.detach_error.as_ref()? } else { status.attach_error.as_ref()? };
    error.time.as_ref().map(|t| t.0.to_string())
}

async fn mount(State(orchestrator): State<Orchestrator>, Json(operation): Json<Operation>) -> Response {
    streamed(async move |voice| {
        let path = required(&operation.path, "the path")?;
        if !path.is_absolute() {
            return Err(Failure::new(ErrorKind::Invalid, format!("`{}` is not an absolute path", path.display())));
        }
        let deadline = deadline(&operation);
        let (target, attachment) = attached(&orchestrator, &operation, deadline, &voice).await?;
        mounts::publish(&orchestrator, &target, &attachment, &path, operation.read_only, deadline).await?;
        Ok(
            json!({ "volume": target.volume_id, "node": attachment.spec.node_name, "path": path, "block": target.usage.block }),
        )
    })
}

async fn unmount(State(orchestrator): State<Orchestrator>, Json(operation): Json<Operation>) -> Response {
    streamed(async move |_| {
        let (node, path) = (required(&operation.node, "the node")?, required(&operation.path, "the path")?);
        let target = target::find(&orchestrator, &operation.namespace, &operation.name).await?;
        let all = attachments::of_volume(&orchestrator, &target).await?;
        let Some(attachment) = all.into_iter().find(|a| a.spec.node_name == node) else {
            return Err(Failure::new(ErrorKind::NotFound, format!("{} is not attached to `{node}`", target.label)));
        };
        mounts::unpublish(&orchestrator, &target, &attachment, &path).await?;
        Ok(json!({ "volume": target.volume_id, "node": node, "path": path }))
    })
}

async fn detach(State(orchestrator): State<Orchestrator>, Json(operation): Json<Operation>) -> Response {
    streamed(async move |voice| {
        let target = target::find(&orchestrator, &operation.namespace, &operation.name).await?;
        let all = attachments::of_volume(&orchestrator, &target).await?;
        let meant: Vec<VolumeAttachment> =
            all.into_iter().filter(|a| operation.node.as_ref().is_none_or(|n| *n == a.spec.node_name)).collect();
        if meant.is_empty() {
            voice.say(format!("{} is not attached", target.label));
        }
        let mut nodes = vec![];
        for attachment in meant {
            for place in mounts::published(&attachment) {
                voice.say(format!("unmounting {}", place.path.display()));
            }
            attachments::wish_away(&orchestrator, &attachment).await?;
            let attachment = objects::read(orchestrator.store(), &attachment).await?.unwrap_or(attachment);
            attachment_done(&orchestrator, &attachment, deadline(&operation), &voice).await?;
            nodes.push(attachment.spec.node_name);
        }
        Ok(json!({ "volume": target.volume_id, "nodes": nodes }))
    })
}

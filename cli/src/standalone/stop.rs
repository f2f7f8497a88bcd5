//! `standalone stop`: ends the process, with `--all` also everything that outlives it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use api::ErrorKind;
use axum::Router;
use axum::extract::State;
use axum::response::Response;
use axum::routing::post;
use clap::Args;
use futures::StreamExt;
use rustix::process::Signal;
use serde_json::json;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use workloads::Workloads;

use super::{Start, instance, leftovers, lock};
use crate::client::Client;
use crate::failure::{Failure, failed};
use crate::orchestrator::{Orchestrator, streamed};

/// How long the process may take to end once it was asked.
const END_TIMEOUT: Duration = Duration::from_secs(60);
/// How long devices may take to vanish after their processes have ended.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(10);
const SETTLE_STEP: Duration = Duration::from_millis(100);

/// Ends a standalone instance. Volumes stay attached and their processes run on, unless --all is given.
#[derive(Args, Debug)]
pub struct Stop {
    /// The directory of the instance.
    #[arg(long, env = "BACKING_IMAGE_CSI_DATA")]
    data: PathBuf,
    /// Unmount and detach every volume and end every process; works also when the standalone process is dead.
    #[arg(long)]
    all: bool,
    #[arg(long, env = "BACKING_IMAGE_CSI_DRIVER_NAME", default_value = api::names::DEFAULT_DRIVER_NAME)]
    driver_name: String,
    #[arg(long, env = "BACKING_IMAGE_CSI_SYSTEM_NAMESPACE", default_value = api::names::DEFAULT_NAMESPACE)]
    namespace: String,
}

/// Runs `standalone stop`.
pub async fn run(Stop { data, all, driver_name, namespace }: Stop) -> anyhow::Result<()> {
    if !data.exists() {
        println!("there is no instance at {}", data.display());
        return Ok(());
    }
    let data = data.canonicalize()?;
    match lock::holder(&data)? {
        Some(holder) if all && holder.listen.is_some() => {
            let listen = holder.listen.context("an address")?;
            detach_all(&format!("http://{listen}")).await?;
            wait_until_free(&data).await?;
        }
        Some(holder) => {
            if let Ok(process) = runtime::process::ProcessIdentity::of(holder.pid) {
                process.signal(Signal::TERM)?;
            }
            wait_until_free(&data).await?;
            if all {
                Box::pin(run_to_the_end(&data, driver_name, namespace)).await?;
            }
        }
        None if all => Box::pin(run_to_the_end(&data, driver_name, namespace)).await?,
        None => {
            println!("no standalone process works on {}", data.display());
            return Ok(());
        }
    }
    if all {
        verify(&data).await?;
        println!("stopped, everything is detached and ended");
    } else {
        println!("stopped; attached volumes stay attached");
    }
    Ok(())
}

/// Starts an instance on what a dead one left, only to end everything.
async fn run_to_the_end(data: &Path, driver_name: String, namespace: String) -> anyhow::Result<()> {
    if !data.join("store.redb").exists() {
        return Ok(());
    }
    let start = Start {
        data: Some(data.to_owned()),
        listen: "127.0.0.1:0".into(),
        driver_name,
        namespace,
        ..Default::default()
    };
    instance(start, CancellationToken::new(), true).await
}

async fn detach_all(url: &str) -> anyhow::Result<()> {
    let client = Client::new(url)?;
    let mut lines = client.operate("/standalone/v1/stop", &json!({})).await?;
    while let Some(line) = lines.next().await {
        let line = line?;
        if let Some(sentence) = line["say"].as_str() {
            eprintln!("{sentence}");
        } else if line["failed"].is_object() {
            let kind = line["failed"]["kind"].as_str().and_then(ErrorKind::from_name).unwrap_or(ErrorKind::Internal);
            return Err(Failure::new(kind, line["failed"]["message"].as_str().unwrap_or_default()).into());
        }
    }
    Ok(())
}

async fn wait_until_free(data: &Path) -> anyhow::Result<()> {
    let path = data.to_owned();
    let free = tokio::task::spawn_blocking(move || lock::wait_until_free(&path));
    match tokio::time::timeout(END_TIMEOUT, free).await {
        Ok(result) => result?,
        Err(_) => failed(ErrorKind::Pending, "the standalone process has not ended yet; look at its log"),
    }
}

/// Makes sure that nothing is left on the machine.
async fn verify(data: &Path) -> anyhow::Result<()> {
    leftovers::end_processes(data).await;
    let settled = async {
        while !leftovers::list(data).is_empty() {
            tokio::time::sleep(SETTLE_STEP).await;
        }
    };
    if tokio::time::timeout(SETTLE_TIMEOUT, settled).await.is_ok() {
        return Ok(());
    }
    let left = leftovers::list(data);
    failed(ErrorKind::NotReady, format!("this is left, end it by hand: {}", left.join("; ")))
}

/// The operation that a running instance offers for `stop --all`.
pub fn router(orchestrator: Orchestrator, stop: watch::Sender<bool>) -> Router {
    Router::new().route("/standalone/v1/stop", post(stop_all)).with_state((orchestrator, Arc::new(stop)))
}

async fn stop_all(State((orchestrator, stop)): State<(Orchestrator, Arc<watch::Sender<bool>>)>) -> Response {
    streamed(async move |voice| {
        let say = |sentence: String| voice.say(sentence);
        orchestrator.detach_all(&say).await?;
        stop.send_replace(true);
        Ok(json!({}))
    })
}

/// Ends every manager and data source.
pub async fn end_workloads(workloads: &Arc<dyn Workloads>) -> anyhow::Result<()> {
    for workload in workloads.list().await.context("cannot list the workloads")? {
        let name = workload.spec.name;
        workloads.remove(&name).await.with_context(|| format!("cannot end workload `{name}`"))?;
    }
    Ok(())
}

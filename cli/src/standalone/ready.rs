//! `DIR/ready`: there while every socket answers.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use proto::csi::ProbeRequest;
use proto::csi::identity_client::IdentityClient;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::orchestrator::connect;

/// Between two looks at sockets that do not answer yet.
const RETRY_DELAY: Duration = Duration::from_millis(50);
/// A probe that takes longer counts as no answer.
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);

/// Waits until every CSI socket answers a probe, then says so in the file, on the channel and on standard output.
pub async fn announce(
    csi: PathBuf,
    file: PathBuf,
    nodes: Vec<String>,
    url: String,
    ready: watch::Sender<bool>,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let sockets = std::iter::once("controller".to_owned()).chain(nodes).map(|name| csi.join(format!("{name}.sock")));
    for socket in sockets {
        while !answers(&socket).await {
            tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                () = tokio::time::sleep(RETRY_DELAY) => {}
            }
        }
    }
    if shutdown.is_cancelled() {
        return Ok(());
    }
    runtime::files::write_durably(&file, format!("{url}\n").as_bytes())
        .with_context(|| format!("cannot write `{}`", file.display()))?;
    ready.send_replace(true);
    info!(url, "ready");
    shutdown.cancelled().await;
    Ok(())
}

async fn answers(socket: &Path) -> bool {
    let probe = async {
        let channel = connect(socket).await.ok()?;
        let response = IdentityClient::new(channel).probe(ProbeRequest::default()).await.ok()?;
        Some(response.into_inner().ready.unwrap_or(true))
    };
    tokio::time::timeout(PROBE_TIMEOUT, probe).await.is_ok_and(|ready| ready == Some(true))
}

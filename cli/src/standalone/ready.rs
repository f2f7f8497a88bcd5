//! `DIR/ready`: there while every socket answers.

use std::path::PathBuf;

use anyhow::Context;
use runtime::probes::Readiness;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::probe;

/// Waits until every CSI socket answers a probe, then says so in the file, on the channel and on standard output.
pub async fn announce(
    csi: PathBuf,
    file: PathBuf,
    nodes: Vec<String>,
    url: String,
    ready: watch::Sender<Readiness>,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let sockets = std::iter::once("controller".to_owned()).chain(nodes).map(|name| csi.join(format!("{name}.sock")));
    for socket in sockets {
        if !probe::until_answered(&socket, &shutdown).await {
            return Ok(());
        }
    }
    runtime::files::write_durably(&file, format!("{url}\n").as_bytes())
        .with_context(|| format!("cannot write `{}`", file.display()))?;
    drop(ready.send_replace(Ok(())));
    info!(url, "ready");
    shutdown.cancelled().await;
    Ok(())
}

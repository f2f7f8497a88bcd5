//! Whether a CSI socket answers.

use std::path::Path;
use std::time::Duration;

use proto::csi::ProbeRequest;
use proto::csi::identity_client::IdentityClient;
use tokio_util::sync::CancellationToken;

use crate::orchestrator::connect;

/// Between two looks at sockets that do not answer yet.
const RETRY_DELAY: Duration = Duration::from_millis(50);
/// A probe that takes longer counts as no answer.
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);

/// Waits until a socket answers a probe; `false` when it is to end before.
pub async fn until_answered(socket: &Path, shutdown: &CancellationToken) -> bool {
    while !answers(socket).await {
        tokio::select! {
            () = shutdown.cancelled() => return false,
            () = tokio::time::sleep(RETRY_DELAY) => {}
        }
    }
    !shutdown.is_cancelled()
}

/// Whether it answers now.
pub async fn answers(socket: &Path) -> bool {
    let probe = async {
        let channel = connect(socket).await.ok()?;
        let response = IdentityClient::new(channel).probe(ProbeRequest::default()).await.ok()?;
        Some(response.into_inner().ready.unwrap_or(true))
    };
    tokio::time::timeout(PROBE_TIMEOUT, probe).await.is_ok_and(|ready| ready == Some(true))
}

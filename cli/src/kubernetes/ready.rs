//! What a role promises in a cluster, looked at again and again: `/readyz` says what is missing now.
//!
//! The kubelet asks every few seconds. A pod that is not ready gets no reviews of the webhook; nothing else of ours hangs on it, but for
//! the instance role, whose node is out of service meanwhile (`planner::node`): so that one stays ready once it is.

use std::path::PathBuf;
use std::time::Duration;

use runtime::probes::Readiness;
use store::kubernetes::Heard;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::probe;

/// How long the Kubernetes API may be silent. The controller asks it every two seconds for the lease.
///
/// A webhook that does not reach it can only refuse, so reviews are to go to another replica. But when the API server itself is away,
/// both replicas would lose their place behind the webhook's Service as soon as it is back and hears it from the kubelets, and people's
/// changes be refused for the seconds until the next probe. (While it is away nobody takes them out, nor asks them.) So it is longer
/// than an API server takes to start anew, as it does at each upgrade of a cluster: what is over by then costs nothing.
/// A node that is cut off as a whole is noticed by Kubernetes after 40 s, without us.
pub const SILENCE: Duration = Duration::from_secs(60);

/// Between two looks while nothing is missing: what the kubelet is told is never older than its own period.
const PERIOD: Duration = Duration::from_secs(2);
/// Between two looks while something is.
const RETRY: Duration = Duration::from_millis(100);

/// One thing that must be so.
pub enum Promise {
    /// The CSI socket answers a probe.
    Socket(PathBuf),
    /// The Kubernetes API was heard less than [`SILENCE`] ago.
    Heard(Heard),
    /// What a part of the role tells of itself, and what is to be said while it tells `false`.
    Told(watch::Receiver<bool>, &'static str),
}

impl Promise {
    async fn look(&self) -> Readiness {
        match self {
            Promise::Socket(socket) if probe::answers(socket).await => Ok(()),
            Promise::Socket(socket) => Err(format!("the CSI socket `{}` does not answer", socket.display())),
            Promise::Heard(heard) => match heard.elapsed() {
                silence if silence < SILENCE => Ok(()),
                silence => Err(format!(
                    "the Kubernetes API has not answered for {} s; look at the API server, and at the network of this node",
                    silence.as_secs()
                )),
            },
            Promise::Told(told, _) if *told.borrow() => Ok(()),
            Promise::Told(_, missing) => Err((*missing).to_owned()),
        }
    }
}

/// Says on the channel what is missing, until the end.
pub async fn report(
    promises: Vec<Promise>,
    ready: watch::Sender<Readiness>,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let work = async {
        loop {
            let mut missing = vec![];
            for promise in &promises {
                missing.extend(promise.look().await.err());
            }
            let found = if missing.is_empty() { Ok(()) } else { Err(missing.join("; ")) };
            let (was_ready, is_ready) = (ready.borrow().is_ok(), found.is_ok());
            match &found {
                Ok(()) if !was_ready => info!("ready"),
                Err(missing) if was_ready => warn!(missing, "not ready any more"),
                _ => {}
            }
            drop(ready.send_replace(found));
            tokio::time::sleep(if is_ready { PERIOD } else { RETRY }).await;
        }
    };
    shutdown.run_until_cancelled(work).await.unwrap_or(Ok(()))
}

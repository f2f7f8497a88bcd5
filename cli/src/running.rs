//! Roles as tasks of one process: started together, and one that ends by surprise ends the process.

use std::time::Duration;

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

/// How long roles may take to finish what they have begun.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(25);

/// The running roles.
pub struct Roles {
    tasks: JoinSet<(String, anyhow::Result<()>)>,
    shutdown: CancellationToken,
}

impl Roles {
    pub fn new(shutdown: CancellationToken) -> Roles {
        Roles { tasks: JoinSet::new(), shutdown }
    }

    /// Asks roles to end.
    pub fn shutdown(&self) -> CancellationToken {
        self.shutdown.clone()
    }

    /// Runs a role until it ends.
    pub fn spawn(&mut self, name: &str, role: impl Future<Output = anyhow::Result<()>> + Send + 'static) {
        let name = name.to_owned();
        self.tasks.spawn(async move { (name, role.await) });
    }

    /// Returns when a role ends that should not have; says why.
    pub async fn unexpected_end(&mut self) -> anyhow::Result<()> {
        match self.tasks.join_next().await {
            Some(Ok((name, Ok(())))) => Err(anyhow::anyhow!("role {name} ended by itself")),
            Some(Ok((name, Err(error)))) => Err(error.context(format!("role {name} failed"))),
            Some(Err(panic)) => Err(anyhow::Error::new(panic).context("a role panicked")),
            None => Err(anyhow::anyhow!("no role runs")),
        }
    }

    /// Waits until every role has ended; gives up on those that take too long.
    pub async fn drain(&mut self) {
        let all = async {
            while let Some(ended) = self.tasks.join_next().await {
                match ended {
                    Ok((name, Ok(()))) => info!(role = name, "role ended"),
                    Ok((name, Err(failure))) => {
                        error!(role = name, error = format!("{failure:#}"), "role ended with an error")
                    }
                    Err(panic) => error!(error = %panic, "a role panicked"),
                }
            }
        };
        if tokio::time::timeout(DRAIN_TIMEOUT, all).await.is_err() {
            warn!("roles did not end in time and are dropped");
            self.tasks.abort_all();
        }
    }
}

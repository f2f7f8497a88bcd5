//! What every call has around it: a span with its ids, a log line for its end, a fence against panics.
//!
//! The work runs as a task of its own. A caller that hangs up does not stop it in the middle of a mount, and a bug ends the call
//! and not the process. Requests are never logged, so neither are secrets.

use std::future::Future;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::metadata::MetadataMap;
use tonic::{Code, Response, Status};
use tracing::{Instrument, debug, error, info};

use crate::deadline::Deadline;
use crate::metrics::Metrics;
use crate::{CsiError, status};

/// The calls of one server.
#[derive(Clone, Debug)]
pub struct Calls {
    pub tracker: TaskTracker,
    pub shutdown: CancellationToken,
    /// Patience of a call whose caller sets no deadline.
    pub wait: Duration,
    metrics: Metrics,
}

/// The names in a call, for its span. Empty ones are left out.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ids<'a> {
    pub volume: &'a str,
    pub node: &'a str,
}

impl Calls {
    /// Calls that end with `shutdown`.
    pub fn new(wait: Duration, metrics: Metrics, shutdown: &CancellationToken) -> Calls {
        Calls { tracker: TaskTracker::new(), shutdown: shutdown.clone(), wait, metrics }
    }

    /// The deadline of a call.
    pub fn deadline(&self, metadata: &MetadataMap) -> Deadline {
        Deadline::of(metadata, self.wait, &self.shutdown)
    }

    /// Runs one call to its end.
    pub async fn run<T, W>(&self, call: &'static str, ids: Ids<'_>, work: W) -> Result<Response<T>, Status>
    where
        T: Send + 'static,
        W: Future<Output = Result<T, CsiError>> + Send + 'static,
    {
        let field = |name: &str| Some(name.to_owned()).filter(|n| !n.is_empty());
        let span = tracing::info_span!("csi", call, volume = field(ids.volume), node = field(ids.node));
        let metrics = self.metrics.clone();
        let started = Instant::now();
        let task = async move {
            let _in_flight = metrics.begin();
            let result = work.await;
            let seconds = started.elapsed().as_secs_f64();
            match &result {
                Ok(_) => debug!(seconds, "call done"),
                Err(error) => info!(seconds, kind = %error.kind(), reason = status::sentence(error), "call refused"),
            }
            let result = result.map(Response::new).map_err(|error| status::of(&error));
            metrics.end(call, result.as_ref().err().map_or(Code::Ok, Status::code), started.elapsed());
            result
        };
        match self.tracker.spawn(task.instrument(span.clone())).await {
            Ok(answer) => answer,
            Err(failed) => {
                let _entered = span.enter();
                error!(reason = %failed, "call panicked");
                let answer = status::bug(call);
                self.metrics.end(call, answer.code(), started.elapsed());
                Err(answer)
            }
        }
    }
}

/// Runs a call in a task of its own with everything it needs; in parentheses the request's fields with volume and node.
macro_rules! call {
    ($self:ident, $name:literal, $request:ident, ($($volume:ident $(, $node:ident)?)?), $work:path) => {{
        let deadline = $self.calls.deadline($request.metadata());
        let request = $request.into_inner();
        let volume = String::new() $(+ &request.$volume)?;
        let node = String::new() $($(+ &request.$node)?)?;
        let context = $self.context.clone();
        let work = async move { $work(&context, request, &deadline).await };
        $self.calls.run($name, $crate::rpc::Ids { volume: &volume, node: &node }, work).await
    }};
}
pub(crate) use call;

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_ends_the_call_and_not_the_process() {
        let calls = Calls::new(Duration::from_secs(1), Metrics::default(), &CancellationToken::new());
        let answer: Result<Response<()>, Status> =
            calls.run("Probe", Ids::default(), async { panic!("a bug, made for this test") }).await;
        assert_eq!(answer.unwrap_err().code(), tonic::Code::Internal);
        assert!(calls.run("Probe", Ids::default(), async { Ok(()) }).await.is_ok());
    }

    #[tokio::test]
    async fn work_goes_on_when_its_caller_hangs_up() {
        let calls = Calls::new(Duration::from_secs(1), Metrics::default(), &CancellationToken::new());
        let (go, wait) = tokio::sync::oneshot::channel::<()>();
        let (done, finished) = tokio::sync::oneshot::channel();
        let call = {
            let calls = calls.clone();
            tokio::spawn(async move {
                let work = async move {
                    wait.await.unwrap();
                    done.send(()).unwrap();
                    Ok(())
                };
                calls.run("NodeStageVolume", Ids::default(), work).await
            })
        };
        while calls.tracker.is_empty() {
            tokio::task::yield_now().await;
        }
        call.abort();
        assert!(call.await.unwrap_err().is_cancelled());
        go.send(()).unwrap();
        finished.await.unwrap();
    }
}

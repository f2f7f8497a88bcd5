//! Tells listeners which workloads changed.

use futures::StreamExt;
use futures::stream::{self, BoxStream};
use tokio::sync::broadcast;
use tokio_stream::wrappers::BroadcastStream;

/// State changes that a slow listener may be behind; beyond that it is told the name of every workload.
const BEHIND: usize = 256;

/// A loudspeaker for names.
pub struct Changes(broadcast::Sender<String>);

impl Default for Changes {
    fn default() -> Self {
        Changes(broadcast::channel(BEHIND).0)
    }
}

impl Changes {
    /// Tells listeners that a workload changed.
    pub fn announce(&self, name: &str) {
        let _ = self.0.send(name.to_owned()); // Nobody may be listening.
    }

    /// The names from now on; `all` has those of every workload.
    pub fn listen(&self, all: impl Fn() -> Vec<String> + Send + Sync + 'static) -> BoxStream<'static, String> {
        let names = BroadcastStream::new(self.0.subscribe()).flat_map(move |change| {
            stream::iter(match change {
                Ok(name) => vec![name],
                // Some names are lost, so any workload may have changed.
                Err(_) => all(),
            })
        });
        names.boxed()
    }
}

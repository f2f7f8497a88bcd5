//! Flags that say how engines of attached volumes are kept alive.

use std::time::Duration;

use clap::Args;

use crate::duration;

/// How engines of attached volumes are kept alive.
#[derive(Args, Clone, Debug, Default)]
pub struct Engines {
    /// How long I/O waits for a working engine before it fails, e.g. 60s. Applies to volumes that are attached from then on.
    #[arg(long, env = "BACKING_IMAGE_CSI_ENGINE_LIMIT", value_parser = duration::parse)]
    engine_limit: Option<Duration>,
    /// After how long without an answer an engine is killed and replaced, e.g. 10s.
    #[arg(long, env = "BACKING_IMAGE_CSI_ENGINE_SILENCE_LIMIT", value_parser = duration::parse)]
    engine_silence_limit: Option<Duration>,
    /// An engine that dies is not replaced under the users of its volume, as on a kernel before 6.9: their I/O fails at once.
    #[arg(long, env = "BACKING_IMAGE_CSI_NO_ENGINE_REPLACEMENT")]
    no_engine_replacement: bool,
}

impl Engines {
    /// As the instance role wants them.
    pub fn options(&self) -> instance::EngineOptions {
        let usual = instance::EngineOptions::default();
        // Below a second nothing could be told from a busy machine.
        let least = Duration::from_secs(1);
        instance::EngineOptions {
            replace: !self.no_engine_replacement,
            holder_limit: self.engine_limit.unwrap_or(usual.holder_limit).max(least),
            silence_limit: self.engine_silence_limit.unwrap_or(usual.silence_limit).max(least),
        }
    }
}

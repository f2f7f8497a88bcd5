//! The engine process: one thread with one epoll around the core, FUSE, the replicas, NBD clients and the control socket.
//!
//! One thread was measured to be the fastest layout: it needs the fewest wake-ups, and there is no lock order to think about.

pub mod beginning;
pub mod choice;
mod control;
mod ending;
mod engine;
mod frontends;
pub(crate) mod life;
mod lost;
pub mod nbd_frontend;
mod replica_control;
mod start;

use std::io;
use std::os::fd::RawFd;
use std::path::Path;

use proto::engine::{Config, HolderReport};
use runtime::transport::Security;
use tracing::{info, warn};

use crate::error::EngineError;
use crate::fuse;
use crate::limits;
use crate::sys;
use engine::Engine;
use life::LifeFiles;

/// Reads and checks a configuration file.
///
/// # Errors
/// When it cannot be read, is no JSON of that form, or describes nothing that can be served.
pub fn read_config(path: &Path) -> Result<Config, EngineError> {
    let text = std::fs::read(path).map_err(|source| EngineError::ReadConfig { path: path.to_owned(), source })?;
    let config: Config =
        serde_json::from_slice(&text).map_err(|source| EngineError::ParseConfig { path: path.to_owned(), source })?;
    let problem = if config.volume.is_empty() {
        "`volume` is empty; it must name the volume"
    } else if config.size_bytes == 0 || !config.size_bytes.is_multiple_of(512) {
        "`sizeBytes` must be a positive multiple of 512"
    } else if config.size_bytes > i64::MAX as u64 {
        "`sizeBytes` is beyond what a file can have"
    } else if config.replicas.is_empty() {
        "`replicas` is empty; at least one current replica is needed"
    } else if config.replicas.len() > limits::MAX_REPLICAS {
        "`replicas` has more entries than an engine can serve (16)"
    } else if config.replica_timeout_ms == 0 {
        "`replicaTimeoutMs` must be positive"
    } else if config.silence_limit_ms == 0 {
        "`silenceLimitMs` must be positive"
    } else {
        return Ok(config);
    };
    Err(EngineError::Config { problem: problem.to_owned() })
}

/// The generation under which the last engine acknowledged, from what it left beside its control socket; none after a clean end.
///
/// Whoever finds an engine dead learns from it which generation nobody may fall behind, also when that engine told nobody.
/// # Errors
/// When it cannot be read.
pub fn last_generation(control_socket: &Path) -> io::Result<Option<u64>> {
    Ok(LifeFiles::of(control_socket).known()?.map(|known| known.generation))
}

/// What the holder of that control socket says; none while an engine serves.
/// # Errors
/// When it cannot be read.
pub fn holder_report(control_socket: &Path) -> io::Result<Option<HolderReport>> {
    LifeFiles::of(control_socket).holder_report()
}

/// Whether a holder or an engine of that control socket lives: an engine may outlive its holder, and be too busy to answer.
/// # Errors
/// When its lock cannot be tried.
pub fn is_served(control_socket: &Path) -> io::Result<bool> {
    LifeFiles::of(control_socket).is_locked()
}

/// Serves a volume on a FUSE connection until it is shut down or unmounted.
///
/// `fuse_fd` is the number of an inherited descriptor of `/dev/fuse` on which the volume is mounted; `lives` counts the engines
/// that served this mount before. Returns when the volume is unmounted and the replicas are closed.
///
/// # Errors
/// When the configuration is wrong, no replica can be used, or the kernel's side fails. The holder starts the next engine then.
pub fn run(config_path: &Path, fuse_fd: RawFd, lives: u32) -> Result<(), EngineError> {
    let config = read_config(config_path)?;
    let life = LifeFiles::of(&config.control_socket);
    let result = serve(config, &life, fuse_fd, lives);
    if let Err(error) = &result {
        life.set_failure(&error.chain());
    }
    result
}

fn serve(config: Config, life: &LifeFiles, fuse_fd: RawFd, lives: u32) -> Result<(), EngineError> {
    sys::map_large_allocations();
    let fuse_device = sys::inherit(fuse_fd).map_err(|source| EngineError::Fuse { source })?;
    let signals = sys::termination_events().map_err(|source| EngineError::Events { source })?;
    // Memory that this process needs must not wait for writes that need this process. Best effort: it takes a capability.
    if let Err(error) = rustix::process::configure_io_flusher_behavior(true) {
        warn!(%error, "cannot become an I/O flusher; reclaim of memory may wait for this volume");
    }
    let security = Security::from_directory(config.certificates.as_deref());
    let security = security.map_err(|source| EngineError::Certificates { volume: config.volume.clone(), source })?;
    let names: Vec<String> = config.replicas.keys().cloned().collect();
    let started = start::start(&config, security, &names, life, lives)?;
    info!(volume = %config.volume, generation = started.generation, lives, "engine serves");
    let mount_file = config.mount_file.clone();
    let mut engine = Engine::new(config, names, life.clone(), lives, started, fuse_device, signals)?;
    runtime::memory::release_startup_code();
    let clean = engine.run()?;
    drop(engine);
    fuse::mount::detach(&mount_file);
    // What it noted stays: a generation that nobody was told yet is read from there. The next holder forgets it.
    info!(clean, "engine ended");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_what_is_wrong_with_a_configuration() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("engine.json");
        assert_eq!(read_config(&path).unwrap_err().kind(), api::ErrorKind::NotFound);
        std::fs::write(&path, "{").unwrap();
        assert_eq!(read_config(&path).unwrap_err().kind(), api::ErrorKind::Invalid);
        let good = serde_json::json!({
            "volume": "v", "sizeBytes": 1048576, "generation": 0, "replicas": {"r": {"directory": "/r"}}, "readFrom": null,
            "compareReplicas": false, "mountFile": "/m", "controlSocket": "/c", "nbdSocket": "/n", "replicaTimeoutMs": 1,
            "noReplicaHoldMs": 0, "holderLimitMs": 1
        });
        std::fs::write(&path, good.to_string()).unwrap();
        assert_eq!(read_config(&path).unwrap().volume, "v");
        for (key, value, word) in
            [("sizeBytes", serde_json::json!(513), "512"), ("replicas", serde_json::json!({}), "replica")]
        {
            let mut bad = good.clone();
            bad[key] = value;
            std::fs::write(&path, bad.to_string()).unwrap();
            assert!(read_config(&path).unwrap_err().to_string().contains(word));
        }
    }
}

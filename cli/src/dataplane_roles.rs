//! Roles of the data plane: a replica, an engine, an engine's holder. They outlive whoever started them.

use std::os::fd::RawFd;
use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use instance::replica_process;

use crate::failure::Failure;
use crate::roles::start_logs;

/// Serves one replica of a volume.
#[derive(Args, Debug)]
pub struct Replica {
    /// Its configuration (JSON).
    #[arg(long)]
    config: PathBuf,
}

/// Joins the replicas of one attached volume; started by its holder.
#[derive(Args, Debug)]
pub struct Engine {
    /// Its configuration (JSON).
    #[arg(long)]
    config: PathBuf,
    /// Number of the inherited descriptor of /dev/fuse.
    #[arg(long, required_unless_present = "check")]
    fuse_fd: Option<RawFd>,
    /// Only read the configuration and print the version: whether an engine of this program could take over.
    #[arg(long)]
    check: bool,
    /// How many engines served this mount before.
    #[arg(long, default_value_t = 0)]
    lives: u32,
}

/// Keeps the mount of one attached volume while its engine is replaced.
#[derive(Args, Debug)]
pub struct EngineHolder {
    /// The engine's configuration (JSON).
    #[arg(long)]
    config: PathBuf,
}

/// Runs `replica`.
pub async fn replica(Replica { config }: Replica) -> anyhow::Result<()> {
    start_logs(false);
    let fail = |error: replica_process::ReplicaError| {
        let failure = Failure::new(error.kind(), error.to_string());
        anyhow::Error::new(error).context(failure)
    };
    let config = replica_process::Config::read(&config).map_err(fail)?;
    let shutdown = runtime::shutdown::on_signal().context("cannot listen for signals")?;
    replica_process::run(config, shutdown).await.map_err(fail)
}

/// Runs `engine`. It has an event loop of its own.
pub fn engine(Engine { config, fuse_fd, check, lives }: Engine) -> anyhow::Result<()> {
    start_logs(false);
    let Some(fuse_fd) = fuse_fd.filter(|_| !check) else {
        ::engine::process::read_config(&config).map_err(|e| engine_failure(&e))?;
        println!("{}", env!("CARGO_PKG_VERSION"));
        return Ok(());
    };
    ::engine::process::run(&config, fuse_fd, lives).map_err(|e| engine_failure(&e))
}

/// Runs `engine-holder`. It has an event loop of its own.
pub fn engine_holder(EngineHolder { config }: EngineHolder) -> anyhow::Result<()> {
    start_logs(false);
    // This program itself, also when its file is gone; the configuration names the one that is installed.
    let command = vec!["/proc/self/exe".into(), "engine".into(), "--config".into(), config.clone().into_os_string()];
    ::engine::holder::run(&config, command).map_err(|e| engine_failure(&e))
}

fn engine_failure(error: &::engine::EngineError) -> anyhow::Error {
    Failure::new(error.kind(), error.chain()).into()
}

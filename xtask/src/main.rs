//! Every developer task: `cargo xtask <task>`.

mod bench;
mod ci;
mod e2e;
mod fuzz;
mod generate;
mod metadata;
mod simulate;
mod supply;
mod tidy;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(about = "Developer tasks of backing-image-csi")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Writes generated files: proto/src/generated and deploy/crds.
    Generate {
        /// Change nothing; fail when a file is not fresh.
        #[arg(long)]
        check: bool,
    },
    /// Checks house rules: file headers, lengths, unfinished marks, foreign paths, sleeps in tests, arrows between rooms.
    Tidy,
    /// Checks licenses, bans, sources and duplicates of dependencies by deny.toml.
    Supply,
    /// Runs the fuzz targets of fuzz/, a bounded time each.
    Fuzz(fuzz::Fuzz),
    /// Measures the released binary and prints the table of docs/performance.md.
    Bench(bench::Bench),
    /// Runs the simulations, with faults everywhere: 100,000 seeded runs of the data plane and 220 worlds of the control plane, more
    /// or one.
    Simulate(simulate::Simulate),
    /// Runs all that CI runs, or the named steps.
    Ci {
        /// Steps to run; all when none is named.
        steps: Vec<String>,
        /// The long form of what searches at random, for hours, instead of all that CI runs.
        #[arg(long)]
        long: bool,
    },
}

fn main() -> ExitCode {
    if let Some(code) = fuzz::wrap_compiler() {
        return code;
    }
    match run(Arguments::parse().task) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("Error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> anyhow::Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the workspace root")?;
    match task {
        Task::Generate { check } => generate::run(check),
        Task::Tidy => tidy::run(root),
        Task::Supply => supply::run(root),
        Task::Fuzz(options) => fuzz::run(root, &options),
        Task::Bench(options) => bench::run(root, options),
        Task::Simulate(options) => simulate::run(root, &options),
        Task::Ci { steps, long } => ci::run(root, &steps, long),
    }
}

/// The program that `cargo build --release` makes.
fn release_binary(root: &Path) -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    target.join("release/backing-image-csi")
}

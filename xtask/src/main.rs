//! Every developer task: `cargo xtask <task>`.

mod generate;

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
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().task {
        Task::Generate { check } => generate::run(check),
    }
}

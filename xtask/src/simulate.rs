//! The simulation of the data plane: many seeded runs, or one that is to be looked at.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, bail};
use clap::Args;

/// What CI runs.
const RUNS: u64 = 100_000;
/// What `--long` runs; about ten minutes on two cores.
const LONG_RUNS: u64 = 1_000_000;

/// How many runs.
#[derive(Args, Clone, Debug, Default)]
pub struct Simulate {
    /// A million runs instead of a hundred thousand.
    #[arg(long)]
    long: bool,
    /// So many runs.
    #[arg(long, conflicts_with = "long")]
    runs: Option<u64>,
    /// Only the run of this seed, to repeat what failed.
    #[arg(long, conflicts_with_all = ["long", "runs"])]
    seed: Option<u64>,
}

impl Simulate {
    fn variable(&self) -> (&'static str, u64) {
        match (self.seed, self.runs) {
            (Some(seed), _) => ("SIMULATION_SEED", seed),
            (None, Some(runs)) => ("SIMULATION_RUNS", runs),
            (None, None) => ("SIMULATION_RUNS", if self.long { LONG_RUNS } else { RUNS }),
        }
    }
}

/// Runs the test of the data plane. As part of the workspace, so that it shares the artifacts of all other tests.
pub fn run(root: &Path, options: &Simulate) -> anyhow::Result<()> {
    let (name, value) = options.variable();
    let status = Command::new("cargo")
        .args(["test", "--workspace", "--locked", "--test", "data_plane", "--", "--nocapture"])
        .env(name, value.to_string())
        .current_dir(root)
        .status()
        .context("cannot start cargo")?;
    if !status.success() {
        bail!("the simulation of the data plane ended with {status}; it names the seeds that failed");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ci_runs_a_hundred_thousand_and_long_runs_more() {
        assert_eq!(Simulate::default().variable(), ("SIMULATION_RUNS", 100_000));
        assert_eq!(Simulate { long: true, ..Simulate::default() }.variable(), ("SIMULATION_RUNS", 1_000_000));
        assert_eq!(Simulate { runs: Some(7), ..Simulate::default() }.variable(), ("SIMULATION_RUNS", 7));
        assert_eq!(Simulate { seed: Some(9), ..Simulate::default() }.variable(), ("SIMULATION_SEED", 9));
    }
}

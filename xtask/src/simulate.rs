//! The simulations: many seeded runs of one volume's data plane and of the control plane's worlds, or one that is to be looked at.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, bail};
use clap::Args;

/// One simulation: its test, and what that is told by.
struct Simulation {
    test: &'static str,
    seed: &'static str,
    runs: &'static str,
    /// What CI runs.
    in_ci: u64,
    /// What `--long` runs: about ten minutes on two cores.
    long: u64,
}

const DATA_PLANE: Simulation = Simulation {
    test: "data_plane",
    seed: "SIMULATION_SEED",
    runs: "SIMULATION_RUNS",
    in_ci: 100_000,
    long: 1_000_000,
};

/// Each run is a thousand ticks.
const CONTROL: Simulation =
    Simulation { test: "seeds", seed: "CONTROL_SEED", runs: "CONTROL_RUNS", in_ci: 220, long: 6_000 };

/// How many runs, and of what.
#[derive(Args, Clone, Debug, Default)]
pub struct Simulate {
    /// Ten minutes of each simulation instead of half a minute.
    #[arg(long)]
    long: bool,
    /// So many runs; of the data plane, or with `--control`.
    #[arg(long, conflicts_with = "long")]
    runs: Option<u64>,
    /// Only the run of this seed, to repeat what failed; of the data plane, or with `--control`.
    #[arg(long, conflicts_with_all = ["long", "runs"])]
    seed: Option<u64>,
    /// Only the worlds of the control plane.
    #[arg(long)]
    control: bool,
}

impl Simulate {
    /// The tests to run, each with its variable and the value of that.
    fn plan(&self) -> Vec<(&'static str, &'static str, u64)> {
        let of_one = self.runs.is_some() || self.seed.is_some();
        let which = match (self.control, of_one) {
            (true, _) => vec![CONTROL],
            (false, true) => vec![DATA_PLANE],
            (false, false) => vec![DATA_PLANE, CONTROL],
        };
        let how_many = |s: &Simulation| self.runs.unwrap_or(if self.long { s.long } else { s.in_ci });
        which
            .iter()
            .map(|s| match self.seed {
                Some(seed) => (s.test, s.seed, seed),
                None => (s.test, s.runs, how_many(s)),
            })
            .collect()
    }
}

/// Runs the tests of the simulations. As part of the workspace, so that they share the artifacts of all other tests.
pub fn run(root: &Path, options: &Simulate) -> anyhow::Result<()> {
    let plan = options.plan();
    let status = Command::new("cargo")
        .args(["test", "--workspace", "--locked"])
        .args(plan.iter().flat_map(|(test, ..)| ["--test", test]))
        .args(["--", "--nocapture"])
        .envs(plan.iter().map(|(_, variable, value)| (variable, value.to_string())))
        .current_dir(root)
        .status()
        .context("cannot start cargo")?;
    if !status.success() {
        bail!("the simulation ended with {status}; it names the seeds that failed");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ci_runs_both_simulations_and_long_runs_more() {
        let plan = |options: Simulate| options.plan();
        let both = |data_plane, control| {
            vec![("data_plane", "SIMULATION_RUNS", data_plane), ("seeds", "CONTROL_RUNS", control)]
        };
        assert_eq!(plan(Simulate::default()), both(100_000, 220));
        assert_eq!(plan(Simulate { long: true, ..Simulate::default() }), both(1_000_000, 6_000));
    }

    #[test]
    fn a_number_or_a_seed_is_of_one_simulation() {
        let data_plane = |seed, runs| Simulate { seed, runs, ..Simulate::default() }.plan();
        assert_eq!(data_plane(None, Some(7)), [("data_plane", "SIMULATION_RUNS", 7)]);
        assert_eq!(data_plane(Some(9), None), [("data_plane", "SIMULATION_SEED", 9)]);
        let control = |seed, runs, long| Simulate { seed, runs, long, control: true }.plan();
        assert_eq!(control(None, Some(7), false), [("seeds", "CONTROL_RUNS", 7)]);
        assert_eq!(control(Some(9), None, false), [("seeds", "CONTROL_SEED", 9)]);
        assert_eq!(control(None, None, true), [("seeds", "CONTROL_RUNS", 6_000)]);
    }
}

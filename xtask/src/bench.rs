//! Measures the released binary and prints the table of `docs/performance.md`.
//!
//! Every row is a ratio of two things of the same run: the machine cancels out. Nothing here passes or fails.

mod alone;
mod csi;
mod fio;
mod images;
mod kills;
mod kubernetes;
mod reaction;
mod scale;
mod server;
mod table;
mod volume;
mod volumes;
mod world;

use std::path::{Path, PathBuf};

use anyhow::bail;
use clap::Args;
use table::Table;

const PARTS: [&str; 7] = ["images", "volumes", "csi", "idle", "reaction", "scale", "kubernetes"];

/// Options of `cargo xtask bench`.
#[derive(Args, Debug)]
pub struct Bench {
    /// How often everything is measured.
    #[arg(long, default_value_t = 3)]
    runs: u32,
    /// Size of the image that is imported and synced: half random bytes, half zeroes.
    #[arg(long, default_value_t = 512)]
    size_mib: u64,
    /// Seconds of each fio job.
    #[arg(long, default_value_t = 4)]
    seconds: u32,
    /// Parts to measure: images, volumes, csi, idle, reaction, scale, kubernetes. When none is named, all but kubernetes, which builds a
    /// cluster first.
    parts: Vec<String>,
    /// The program to measure; the released one when absent.
    #[arg(long, env = "BACKING_IMAGE_CSI_BINARY")]
    binary: Option<PathBuf>,
}

/// Measures and prints.
pub fn run(root: &Path, bench: Bench) -> anyhow::Result<()> {
    let Bench { runs, size_mib, seconds, parts, binary } = bench;
    if let Some(part) = parts.iter().find(|p| !PARTS.contains(&p.as_str())) {
        bail!("there is no part `{part}`; there are {}", PARTS.join(", "));
    }
    // It counts what the controller does in a world of its own.
    let needs_binary = parts.is_empty() || parts.iter().any(|p| p != "scale");
    let binary = std::path::absolute(binary.unwrap_or_else(|| crate::release_binary(root)))?;
    if needs_binary && !binary.exists() {
        bail!("{} does not exist: build it with `cargo build --release`", binary.display());
    }
    let wanted = |part: &str| parts.is_empty() || parts.iter().any(|p| p == part);
    let mut table = Table::default();
    for run in 1..=runs {
        eprintln!("run {run} of {runs}");
        if wanted("images") {
            images::measure(&binary, size_mib, &mut table)?;
        }
        if wanted("volumes") {
            volumes::measure(&binary, seconds, &mut table)?;
        }
        if wanted("csi") {
            csi::measure(&binary, &mut table)?;
        }
        if wanted("idle") {
            volumes::measure_idle(&binary, &mut table)?;
        }
        if wanted("reaction") {
            reaction::measure(&binary, &mut table)?;
        }
        if wanted("scale") {
            scale::measure(root, &mut table)?;
        }
        if parts.iter().any(|p| p == "kubernetes") {
            kubernetes::measure(root, &binary, &mut table)?;
        }
    }
    println!("{}", heading(runs, size_mib));
    print!("{}", table.markdown());
    Ok(())
}

/// What the figures were made with.
fn heading(runs: u32, size_mib: u64) -> String {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu
        .lines()
        .find_map(|l| l.strip_prefix("model name"))
        .map_or("unknown CPU", |l| l.trim_start_matches([' ', '\t', ':']));
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    format!("{cores} cores of {model}, kernel {}, {runs} runs, image of {size_mib} MiB.\n", kernel.trim())
}

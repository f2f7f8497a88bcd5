//! `cargo xtask fuzz`: coverage-guided fuzzing with the pinned stable compiler, a bounded time for each target.
//!
//! Code generation flags make the compiler count edges; libFuzzer, linked by `libfuzzer-sys`, follows the counts. Only our crates
//! get the flags: this program stands between cargo and the compiler as `RUSTC_WORKSPACE_WRAPPER`, so that what tests have
//! built of our dependencies is used again.
//!
//! What is found goes to `target/fuzz/<target>`, which the next run begins with. An input that breaks a promise goes to
//! `fuzz/regressions/<target>`, which `cargo test` replays.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

/// Set for the compiler's wrapper, which is this program again.
const WRAPPER: &str = "XTASK_FUZZ_WRAPPER";

/// Edge counters, comparisons as hints, checks of arithmetic, and some speed.
const FLAGS: [&str; 8] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Copt-level=1",
    "-Coverflow-checks=on",
    "-Cdebug-assertions=on",
];

/// Longest input. The tables of a qcow2 file with the smallest clusters of extended entries fill it, all else far less.
const MAX_INPUT_BYTES: u64 = 64 << 10;
/// No parser needs a hundredth of it.
const MAX_MEMORY_MIB: u64 = 512;
/// One input; a hang, in terms of a parser.
const MAX_SECONDS_OF_INPUT: u64 = 5;

/// In CI. It always begins with the same random numbers, so that a change is judged by what it changed.
const SHORT: Duration = Duration::from_secs(6);
const LONG: Duration = Duration::from_secs(600);

#[derive(clap::Args)]
pub struct Fuzz {
    /// Targets to run, by the names of the folders in fuzz/corpus; all when none is named.
    targets: Vec<String>,
    /// Ten minutes for each target instead of six seconds.
    #[arg(long, conflicts_with = "seconds")]
    long: bool,
    /// Seconds for each target.
    #[arg(long)]
    seconds: Option<u64>,
    /// Take over into fuzz/corpus what reaches code that nothing in it reaches.
    #[arg(long)]
    keep: bool,
}

/// Whether cargo called this program in place of the compiler; if so, it becomes the compiler.
pub fn wrap_compiler() -> Option<ExitCode> {
    std::env::var_os(WRAPPER)?;
    let mut arguments = std::env::args_os().skip(1);
    let mut compiler = Command::new(arguments.next()?);
    let arguments: Vec<OsString> = arguments.collect();
    let asks = arguments.iter().any(|argument| argument == "-vV" || argument.to_string_lossy().starts_with("--print"));
    compiler.args(&arguments);
    if !asks {
        compiler.args(FLAGS);
    }
    eprintln!("Error: cannot start the compiler: {}", compiler.exec());
    Some(ExitCode::FAILURE)
}

/// What CI runs.
pub fn run_short(root: &Path) -> anyhow::Result<()> {
    run(root, &Fuzz { targets: vec![], long: false, seconds: None, keep: false })
}

pub fn run(root: &Path, options: &Fuzz) -> anyhow::Result<()> {
    let known = targets(root)?;
    if let Some(name) = options.targets.iter().find(|name| !known.contains(name)) {
        bail!("there is no target `{name}`; there are {}", known.join(", "));
    }
    let wanted = if options.targets.is_empty() { &known } else { &options.targets };
    let time = match (options.seconds, options.long) {
        (Some(seconds), _) => Duration::from_secs(seconds),
        (None, true) => LONG,
        (None, false) => SHORT,
    };
    let program = build(root)?;
    if options.keep {
        return wanted.iter().try_for_each(|target| keep(root, &program, target));
    }
    let waiting = Mutex::new(wanted.iter());
    let failed = Mutex::new(vec![]);
    let next = || waiting.lock().expect("no worker panics").next();
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while let Some(target) = next() {
                    if let Err(error) = run_target(root, &program, target, time) {
                        eprintln!("fuzz: {target}: {error:#}");
                        failed.lock().expect("no worker panics").push(target.as_str());
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().expect("no worker panics");
    if !failed.is_empty() {
        bail!(
            "{} broke a promise. The input is in fuzz/regressions; see it fail again: cargo test -p backing-image-fuzz",
            failed.join(", ")
        );
    }
    Ok(())
}

/// The folders of fuzz/corpus name them; a test of that crate compares.
fn targets(root: &Path) -> anyhow::Result<Vec<String>> {
    let folder = std::fs::read_dir(root.join("fuzz/corpus")).context("cannot read fuzz/corpus")?;
    let mut names: Vec<String> =
        folder.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect::<std::io::Result<_>>()?;
    names.sort();
    Ok(names)
}

fn target_folder(root: &Path) -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from)
}

fn build(root: &Path) -> anyhow::Result<PathBuf> {
    let wrapper = std::env::current_exe().context("where am I?")?;
    let status = Command::new("cargo")
        .args([
            "build",
            "--quiet",
            "--locked",
            "--workspace",
            "--example",
            "fuzz",
            "--features",
            "backing-image-fuzz/libfuzzer",
        ])
        .current_dir(root)
        .env("RUSTC_WORKSPACE_WRAPPER", wrapper)
        .env(WRAPPER, "1")
        .status()
        .context("cannot start cargo")?;
    if !status.success() {
        bail!("the fuzz targets cannot be built");
    }
    Ok(target_folder(root).join("debug/examples/fuzz"))
}

struct Folders {
    corpus: PathBuf,
    regressions: PathBuf,
    work: PathBuf,
}

fn folders(root: &Path, target: &str) -> anyhow::Result<Folders> {
    let folders = Folders {
        corpus: root.join("fuzz/corpus").join(target),
        regressions: root.join("fuzz/regressions").join(target),
        work: target_folder(root).join("fuzz").join(target),
    };
    for folder in [&folders.regressions, &folders.work] {
        std::fs::create_dir_all(folder).with_context(|| format!("cannot make `{}`", folder.display()))?;
    }
    Ok(folders)
}

fn command(program: &Path, target: &str) -> Command {
    let mut command = Command::new(program);
    command.env("FUZZ_TARGET", target).stdin(Stdio::null());
    command.arg(format!("-max_len={MAX_INPUT_BYTES}"));
    command.arg(format!("-rss_limit_mb={MAX_MEMORY_MIB}")).arg(format!("-malloc_limit_mb={MAX_MEMORY_MIB}"));
    command.arg(format!("-timeout={MAX_SECONDS_OF_INPUT}"));
    command
}

fn run_target(root: &Path, program: &Path, target: &str, time: Duration) -> anyhow::Result<()> {
    let folders = folders(root, target)?;
    let began = Instant::now();
    let output = command(program, target)
        .arg(format!("-max_total_time={}", time.as_secs()))
        .arg(format!("-artifact_prefix={}/", folders.regressions.display()))
        .arg("-print_final_stats=1")
        .args((time == SHORT).then_some("-seed=1"))
        .args([&folders.work, &folders.corpus, &folders.regressions])
        .output()
        .with_context(|| format!("cannot start `{}`", program.display()))?;
    // Empty unless something was found.
    let _ = std::fs::remove_dir(&folders.regressions);
    let _ = std::fs::remove_dir(root.join("fuzz/regressions"));
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        eprintln!("{said}");
        bail!("libFuzzer ended with {}", output.status);
    }
    let figures = Figures::parse(&said);
    if figures.runs == 0 || figures.edges == 0 {
        eprintln!("{said}");
        bail!("nothing was run or counted");
    }
    let Figures { runs, edges, .. } = figures;
    eprintln!("fuzz: {target}: {runs} runs in {:.1} s, {edges} edges", began.elapsed().as_secs_f64());
    Ok(())
}

/// What libFuzzer says at its end.
#[derive(Debug, Default, PartialEq, Eq)]
struct Figures {
    runs: u64,
    edges: u64,
}

impl Figures {
    fn parse(said: &str) -> Figures {
        let mut figures = Figures::default();
        for line in said.lines() {
            if let Some(runs) = line.strip_prefix("stat::number_of_executed_units:") {
                figures.runs = runs.trim().parse().unwrap_or(0);
            }
            if let Some(edges) = line.split(" cov: ").nth(1).and_then(|rest| rest.split(' ').next()) {
                figures.edges = edges.parse().unwrap_or(figures.edges);
            }
        }
        figures
    }
}

fn keep(root: &Path, program: &Path, target: &str) -> anyhow::Result<()> {
    let folders = folders(root, target)?;
    let status = command(program, target)
        .arg("-merge=1")
        .args([&folders.corpus, &folders.work])
        .stderr(Stdio::null())
        .status()
        .with_context(|| format!("cannot start `{}`", program.display()))?;
    if !status.success() {
        bail!("libFuzzer ended with {status}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_libfuzzer_says() {
        let said = "#2\tINITED cov: 36 ft: 37 corp: 1/1b exec/s: 0 rss: 26Mb\n#90\tDONE   cov: 512 ft: 37 corp: 1/1b\nDone 90 runs in 1 second(s)\nstat::number_of_executed_units: 90\n";
        assert_eq!(Figures::parse(said), Figures { runs: 90, edges: 512 });
        assert_eq!(Figures::parse("ERROR: no interesting inputs were found"), Figures::default());
    }

    #[test]
    fn refuses_a_target_that_does_not_exist() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let options = Fuzz { targets: vec!["qcow".into()], long: false, seconds: None, keep: false };
        let error = run(root, &options).unwrap_err().to_string();
        assert!(error.contains("no target `qcow`") && error.contains("qcow2_header"), "{error}");
    }
}

//! What CI runs: one list of steps, a time for each, a table at the end.

use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

/// One check.
struct Step {
    name: &'static str,
    what: Work,
}

enum Work {
    /// In this process.
    Call(fn(&Path) -> anyhow::Result<()>),
    /// In this process, if the time that is left is enough for it: this long ago the first step began.
    IfTimeIsLeft(fn(&Path, Duration) -> anyhow::Result<Outcome>),
    /// A program, its arguments, and the directory below the workspace root.
    Run(&'static [&'static str], &'static str),
}

/// What came of a step that did not fail.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    Passed,
    /// Why it was not done, to be shown in the table.
    LeftOut(String),
}

/// When the first step began.
static BEGAN: OnceLock<Instant> = OnceLock::new();

/// Cheap ones first; each build's artifacts serve as many steps as possible: clippy and tests share the dev profile, the sanity tests run the release binary.
const STEPS: [Step; 13] = [
    Step { name: "fmt", what: Work::Run(&["cargo", "fmt", "--all", "--check"], "") },
    Step { name: "tidy", what: Work::Call(crate::tidy::run) },
    Step { name: "generated", what: Work::Call(|_| crate::generate::run(true)) },
    Step { name: "supply", what: Work::Call(crate::supply::run) },
    Step { name: "vet", what: Work::Run(&["go", "vet", "./..."], "sanity-tests") },
    Step { name: "vet-e2e", what: Work::Run(&["go", "vet", "./..."], "sanity-tests/e2e") },
    Step {
        name: "clippy",
        what: Work::Run(&["cargo", "clippy", "--workspace", "--tests", "--locked", "--", "-D", "warnings"], ""),
    },
    Step { name: "test", what: Work::Run(&["cargo", "test", "--workspace", "--locked"], "") },
    Step { name: "simulate", what: Work::Call(|root| crate::simulate::run(root, &Default::default())) },
    Step { name: "fuzz", what: Work::Call(crate::fuzz::run_short) },
    Step { name: "release", what: Work::Run(&["cargo", "build", "--release", "--locked"], "") },
    Step {
        name: "sanity",
        what: Work::Run(&["go", "test", "-count=1", "-timeout=25m", "-v", "./..."], "sanity-tests"),
    },
    Step { name: "e2e", what: Work::IfTimeIsLeft(crate::e2e::run) },
];

/// The long form of what searches at random: hours instead of seconds.
const LONG_STEPS: [Step; 5] = [
    Step { name: "simulate", what: Work::Run(&["cargo", "xtask", "simulate", "--long"], "") },
    Step { name: "fuzz", what: Work::Run(&["cargo", "xtask", "fuzz", "--long"], "") },
    Step { name: "release", what: Work::Run(&["cargo", "build", "--release", "--locked"], "") },
    Step {
        name: "rounds",
        what: Work::Run(
            &["go", "test", "-count=1", "-timeout=6h", "-v", "-run=TestKillsAtRandom", ".", "-long"],
            "sanity-tests",
        ),
    },
    Step {
        name: "power",
        what: Work::Run(
            &["env", "POWER_CUTS=400", "go", "test", "-count=1", "-timeout=6h", "-v", "-run=LossOfPower", "."],
            "sanity-tests",
        ),
    },
];

/// Runs the steps of these names (all when none is named), in order, until the first that fails.
pub fn run(root: &Path, only: &[String], long: bool) -> anyhow::Result<()> {
    let steps: &[Step] = if long { &LONG_STEPS } else { &STEPS };
    if let Some(name) = only.iter().find(|name| !steps.iter().any(|s| s.name == name.as_str())) {
        let names: Vec<&str> = steps.iter().map(|s| s.name).collect();
        bail!("there is no step `{name}`; there are {}", names.join(", "));
    }
    BEGAN.get_or_init(Instant::now);
    let mut done: Vec<(&str, Duration, String)> = vec![];
    let mut failure = None;
    for step in steps.iter().filter(|s| only.is_empty() || only.iter().any(|name| name == s.name)) {
        eprintln!("== {}", step.name);
        let began = Instant::now();
        let result = step.run(root);
        let said = match &result {
            Ok(Outcome::Passed) => "ok".to_owned(),
            Ok(Outcome::LeftOut(why)) => format!("LEFT OUT: {why}"),
            Err(_) => "FAILED".to_owned(),
        };
        done.push((step.name, began.elapsed(), said));
        if let Err(error) = result {
            failure = Some(error.context(format!(
                "step `{}` failed (alone: cargo xtask ci {}{})",
                step.name,
                if long { "--long " } else { "" },
                step.name
            )));
            break;
        }
    }
    eprint!("{}", table(&done));
    match failure {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

impl Step {
    fn run(&self, root: &Path) -> anyhow::Result<Outcome> {
        match self.what {
            Work::Call(call) => call(root).map(|()| Outcome::Passed),
            Work::IfTimeIsLeft(call) => call(root, BEGAN.get_or_init(Instant::now).elapsed()),
            Work::Run(command, directory) => {
                let status = Command::new(command[0])
                    .args(&command[1..])
                    .current_dir(root.join(directory))
                    .env("REQUIRE_REAL", "1")
                    .env("BACKING_IMAGE_CSI_BINARY", crate::release_binary(root))
                    .status()
                    .with_context(|| format!("cannot start `{}`: is it installed?", command[0]))?;
                if !status.success() {
                    bail!("`{}` ended with {status}", command.join(" "));
                }
                Ok(Outcome::Passed)
            }
        }
    }
}

fn table(done: &[(&str, Duration, String)]) -> String {
    let mut text = String::from("== summary\n");
    for (name, took, said) in done {
        text += &format!("{:>8.1} s  {name:<10} {said}\n", took.as_secs_f64());
    }
    let total: Duration = done.iter().map(|(_, took, _)| took).sum();
    text + &format!("{:>8.1} s  total\n", total.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_a_step_that_does_not_exist() {
        let error = run(Path::new("/"), &["tests".into()], false).unwrap_err().to_string();
        assert!(error.contains("no step `tests`") && error.contains("sanity"), "{error}");
        let error = run(Path::new("/"), &["sanity".into()], true).unwrap_err().to_string();
        assert!(error.contains("no step `sanity`") && error.contains("rounds"), "{error}");
    }

    #[test]
    fn the_table_names_every_step_and_the_one_that_failed() {
        let seconds = Duration::from_secs;
        let text = table(&[("fmt", seconds(1), "ok".into()), ("test", seconds(60), "FAILED".into())]);
        assert_eq!(text, "== summary\n     1.0 s  fmt        ok\n    60.0 s  test       FAILED\n    61.0 s  total\n");
    }

    #[test]
    fn a_step_that_fails_fails_the_run() {
        let step = Step { name: "false", what: Work::Run(&["false"], "") };
        assert!(step.run(Path::new("/")).is_err());
        let missing = Step { name: "missing", what: Work::Run(&["/no/such/program"], "") };
        assert!(missing.run(Path::new("/")).unwrap_err().to_string().contains("is it installed"));
    }
}

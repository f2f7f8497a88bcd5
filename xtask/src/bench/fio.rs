//! One fio job and what it reports.

use std::process::{Command, Output};

use anyhow::{Context, bail};
use serde_json::{Value, json};

/// A workload on the first [`Job::size_mib`] of a target.
#[derive(Clone, Copy)]
pub struct Job {
    pub mode: &'static str,
    pub block: &'static str,
    pub depth: u32,
    pub size_mib: u64,
    /// None: once over the whole size.
    pub seconds: Option<u32>,
}

/// What a job did.
pub struct Report {
    pub bytes_per_second: f64,
    pub requests: f64,
    /// From the submission to the completion of the slowest request.
    pub longest_ms: f64,
}

/// Where a job works: a block device, or an NBD server that is spoken to without any kernel.
pub enum Target {
    Device(String),
    Nbd(String),
}

impl Job {
    /// Runs it; fails when fio reports any error.
    pub fn run(&self, target: &Target) -> anyhow::Result<Report> {
        let target = match target {
            Target::Device(path) => ["--ioengine=libaio".to_owned(), "--direct=1".into(), format!("--filename={path}")],
            Target::Nbd(uri) => ["--ioengine=nbd".to_owned(), "--direct=0".into(), format!("--uri={uri}")],
        };
        let mut command = Command::new("fio");
        command.args(["--name=bench", "--output-format=json", "--randseed=1"]).args(target);
        command.args([format!("--rw={}", self.mode), format!("--bs={}", self.block)]);
        command.args([format!("--iodepth={}", self.depth), format!("--size={}M", self.size_mib)]);
        if let Some(seconds) = self.seconds {
            command.args([format!("--runtime={seconds}"), "--time_based".into()]);
        }
        let output = command.output().context("cannot start fio: is it installed?")?;
        self.report(&output).with_context(|| format!("fio {} {}", self.mode, self.block))
    }

    fn report(&self, output: &Output) -> anyhow::Result<Report> {
        let text = String::from_utf8_lossy(&output.stdout);
        // fio prints notes before its JSON.
        let report: Value = serde_json::from_str(&text[text.find('{').context("it printed no report")?..])?;
        let job = &report["jobs"][0];
        if !output.status.success() || job["error"] != json!(0) {
            bail!("{} {}", String::from_utf8_lossy(&output.stderr), job["error"]);
        }
        let side = &job[if self.mode.ends_with("write") { "write" } else { "read" }];
        let figure = |value: &Value| value.as_f64().context("it left out a figure");
        Ok(Report {
            bytes_per_second: figure(&side["bw_bytes"])?,
            requests: figure(&side["total_ios"])?,
            longest_ms: figure(&side["lat_ns"]["max"])? / 1e6,
        })
    }
}

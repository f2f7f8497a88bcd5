//! What one change costs the controller among few images and among many, as passes and as bytes from and to the store.
//!
//! The controller's example `scale` runs the reconcilers over a store in memory and fake agents, and prints a line for each change.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use serde::Deserialize;

use super::table::Table;

const FEW: u32 = 50;
const MANY: u32 = 500;

/// One line of the example.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Line {
    images: u32,
    what: String,
    passes: u64,
    bytes: u64,
    manager_bytes: u64,
    seconds: f64,
}

/// Measures one run.
pub fn measure(root: &Path, table: &mut Table) -> anyhow::Result<()> {
    let args = ["run", "--locked", "--quiet", "-p", "backing-image-controller", "--example", "scale", "--"];
    let output = Command::new(env!("CARGO"))
        .args(args)
        .args([FEW.to_string(), MANY.to_string()])
        .current_dir(root)
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run the controller's example `scale`")?;
    ensure!(output.status.success(), "the controller's example `scale` failed: {}", output.status);
    let text = String::from_utf8(output.stdout)?;
    let lines: Vec<Line> = text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let lines: BTreeMap<(&str, u32), &Line> = lines.iter().map(|l| ((l.what.as_str(), l.images), l)).collect();
    let of = |what, images| lines.get(&(what, images)).copied().with_context(|| format!("nothing is said of {what}"));
    for (what, passes, others, managers) in ROWS {
        let (few, many) = (of(what, FEW)?, of(what, MANY)?);
        let own = |line: &Line| line.bytes - line.manager_bytes;
        table.add(passes, "", "", many.passes as f64);
        table.add(others, "≤ 2", "", ratio(own(many), own(few)));
        if few.manager_bytes > 0 {
            table.add(managers, "", "", ratio(many.manager_bytes, few.manager_bytes));
        }
    }
    let (few, many) = (of("restart", FEW)?, of("restart", MANY)?);
    let each = |line: &Line| line.seconds / f64::from(line.images);
    table.add(
        "restarted controller, 500 images / 50: time of its first look, by image",
        "",
        "",
        each(many) / each(few),
    );
    let each = |line: &Line| line.bytes as f64 / f64::from(line.images);
    table.add("the same: bytes by image", "≤ 2", "", each(many) / each(few));
    Ok(())
}

fn ratio(many: u64, few: u64) -> f64 {
    many as f64 / few.max(1) as f64
}

/// What changed; the rows of passes among many, of bytes beside managers many / few, and of bytes of managers many / few.
const ROWS: [(&str, &str, &str, &str); 5] = [
    ("touched", "annotation of one of 500 images: passes", "bytes, 500 images / 50", "bytes of managers, 500 / 50"),
    ("verified", "one of 500 images verified: passes", "its bytes, 500 images / 50", "its bytes of managers, 500 / 50"),
    (
        "failed",
        "one copy of 1500 failed and was made anew: passes",
        "its bytes beside managers, 500 images / 50",
        "its bytes in managers, 500 / 50",
    ),
    (
        "heartbeat",
        "a node's heartbeat without news, 500 images: passes",
        "a heartbeat's bytes, 500 images / 50",
        "a heartbeat's bytes of managers, 500 / 50",
    ),
    (
        "setting",
        "a setting, which is about all of 500 images: passes",
        "a setting's bytes, 500 images / 50",
        "a setting's bytes of managers, 500 / 50",
    ),
];

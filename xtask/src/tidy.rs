//! House rules that the compiler does not know: file headers, file lengths, unfinished marks, foreign paths, sleeps in tests, arrows between rooms, promises and faults without a test.
//!
//! Every rule is a pure function over text, so that its test can break it.

mod arrows;
mod faults;
mod files;
mod promises;

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, bail};

/// What the product promises.
const SEMANTICS: &str = "docs/semantics.md";

/// Every fault, and what shows that it is survived.
const FAULTS: &str = "docs/faults.md";

/// What Longhorn's own tests assert, and what asserts it here.
const FLOWS: &str = "docs/longhorn-flows.md";

/// Checks every tracked or new file of the workspace; fails with the list of what is wrong.
pub fn run(root: &Path) -> anyhow::Result<()> {
    let (mut problems, mut tests) = (vec![], BTreeSet::new());
    for path in tracked_files(root)? {
        // A file that is deleted but not yet committed, a link to nowhere, or bytes that are no text.
        let Ok(text) = std::fs::read_to_string(root.join(&path)) else { continue };
        problems.extend(files::check(&path, &text));
        tests.extend(promises::tests_in(&path, &text));
    }
    let architecture = std::fs::read_to_string(root.join("ARCHITECTURE.md")).context("cannot read ARCHITECTURE.md")?;
    problems.extend(arrows::check(&architecture, &crate::metadata::load(root)?)?);
    let semantics =
        std::fs::read_to_string(root.join(SEMANTICS)).with_context(|| format!("cannot read {SEMANTICS}"))?;
    problems.extend(promises::check(SEMANTICS, &semantics, &tests));
    for path in [FAULTS, FLOWS] {
        let rows = std::fs::read_to_string(root.join(path)).with_context(|| format!("cannot read {path}"))?;
        problems.extend(faults::check(path, &rows, &tests));
    }
    if !problems.is_empty() {
        for problem in &problems {
            eprintln!("tidy: {problem}");
        }
        bail!("{} things are not tidy", problems.len());
    }
    Ok(())
}

fn tracked_files(root: &Path) -> anyhow::Result<Vec<String>> {
    let output = Command::new("git")
        .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        .current_dir(root)
        .output()
        .context("cannot start git")?;
    if !output.status.success() {
        bail!("git ls-files failed: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8(output.stdout)?.split('\0').filter(|p| !p.is_empty()).map(str::to_owned).collect())
}

//! The part of `cargo metadata` that the checks read.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, bail};
use serde::Deserialize;

/// All packages of the lock file.
#[derive(Debug, Deserialize)]
pub struct Metadata {
    pub packages: Vec<Package>,
    pub workspace_members: Vec<String>,
}

/// One package.
#[derive(Debug, Deserialize)]
pub struct Package {
    pub id: String,
    pub name: String,
    pub version: String,
    pub license: Option<String>,
    /// `None` for a package of the workspace.
    pub source: Option<String>,
    pub manifest_path: String,
    pub dependencies: Vec<Dependency>,
}

/// A dependency as a manifest declares it.
#[derive(Debug, Deserialize)]
pub struct Dependency {
    pub name: String,
    /// `None` for a normal one, else `dev` or `build`.
    pub kind: Option<String>,
    /// Its directory, when it belongs to the workspace.
    pub path: Option<String>,
}

impl Package {
    /// `name@version`.
    pub fn at_version(&self) -> String {
        format!("{}@{}", self.name, self.version)
    }

    /// The room of a workspace package: the name of its directory.
    pub fn room(&self) -> &str {
        Path::new(&self.manifest_path).parent().and_then(Path::file_name).and_then(|n| n.to_str()).unwrap_or("")
    }
}

/// Asks cargo for all packages.
pub fn load(root: &Path) -> anyhow::Result<Metadata> {
    let output = cargo(root, &["metadata", "--format-version", "1", "--locked"])?;
    serde_json::from_slice(&output).context("cannot read the output of cargo metadata")
}

/// Asks cargo what is really built on this platform with the features in use, as `name@version`: `cargo metadata` lists more.
pub fn built(root: &Path) -> anyhow::Result<BTreeSet<String>> {
    let output =
        cargo(root, &["tree", "--workspace", "--locked", "--no-dedupe", "--prefix", "none", "--format", "{p}"])?;
    parse_tree(&String::from_utf8(output)?)
}

/// Lines like `syn v2.0.119` or `serde_derive v1.0.0 (proc-macro)`.
fn parse_tree(text: &str) -> anyhow::Result<BTreeSet<String>> {
    text.lines()
        .filter(|line| !line.is_empty())
        .map(|line| {
            let mut words = line.split(' ');
            let (name, version) = (words.next(), words.next().and_then(|v| v.strip_prefix('v')));
            Ok(format!("{}@{}", name.context("a name")?, version.with_context(|| format!("no version in `{line}`"))?))
        })
        .collect()
}

fn cargo(root: &Path, arguments: &[&str]) -> anyhow::Result<Vec<u8>> {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(program).args(arguments).current_dir(root).output().context("cannot start cargo")?;
    if !output.status.success() {
        bail!("cargo {} failed: {}", arguments[0], String::from_utf8_lossy(&output.stderr));
    }
    Ok(output.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_names_and_versions_of_the_tree() {
        let tree = "xtask v0.1.0 (/x/xtask)\nserde_derive v1.0.2 (proc-macro)\nsyn v3.0.9\nsyn v3.0.9\n\n";
        let expected = ["xtask@0.1.0", "serde_derive@1.0.2", "syn@3.0.9"].map(String::from);
        assert_eq!(parse_tree(tree).unwrap(), expected.into());
        assert!(parse_tree("syn\n").is_err());
    }
}

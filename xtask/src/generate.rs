//! Generated files: gRPC code from `.proto` files, CRD manifests from the Rust types, `deploy/manifests` from the chart.
//!
//! The chart is rendered by helm, which CI does not build: there the sums tell that `deploy/render.sh` ran after the last change.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{fs, process};

use anyhow::{Context, bail};
use api::metrics::{ALL, Role};
use api::setting::{About, KNOWN, Known, about};

/// Writes every generated file, or with `check` only compares.
pub fn run(check: bool) -> anyhow::Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the workspace root")?;
    let mut files = protos(root)?;
    files.extend(crds(root)?);
    files.insert(root.join("docs/metrics.md"), metrics());
    files.insert(root.join("docs/settings.md"), settings());
    let mut stale = vec![];
    for (path, content) in files {
        if fs::read_to_string(&path).is_ok_and(|old| old == content) {
            continue;
        }
        if check {
            stale.push(path.display().to_string());
        } else {
            fs::create_dir_all(path.parent().context("a parent folder")?)?;
            fs::write(&path, content).with_context(|| format!("cannot write {}", path.display()))?;
        }
    }
    if let Some(reason) = stale_manifests(root)? {
        if check {
            stale.push(format!("deploy/manifests ({reason})"));
        } else {
            let status =
                Command::new("deploy/render.sh").current_dir(root).status().context("cannot start render.sh")?;
            if !status.success() {
                bail!("deploy/render.sh ended with {status}");
            }
        }
    }
    if !stale.is_empty() {
        bail!("not fresh, run `cargo xtask generate`: {}", stale.join(", "));
    }
    Ok(())
}

/// What `deploy/manifests` is rendered from, folder by folder; whole files beside them stand in the sums, too.
const CHART: [&str; 2] = ["deploy/chart", "deploy/crds"];

/// Why `deploy/manifests` is not what the chart renders to, if it is not.
fn stale_manifests(root: &Path) -> anyhow::Result<Option<String>> {
    let sums = "deploy/manifests/SHA256SUMS";
    let listed = fs::read_to_string(root.join(sums)).unwrap_or_default();
    let listed: Vec<&str> = listed.lines().filter_map(|line| Some(line.split_once("  ")?.1)).collect();
    let mut sources = vec![];
    for folder in CHART {
        files_below(root, Path::new(folder), &mut sources)?;
    }
    if let Some(new) = sources.iter().find(|source| !listed.contains(&source.as_str())) {
        return Ok(Some(format!("rendered without {new}")));
    }
    let output = Command::new("sha256sum")
        .args(["--check", "--strict", "--quiet", sums])
        .current_dir(root)
        .output()
        .context("cannot start sha256sum")?;
    let problems = String::from_utf8_lossy(&output.stdout);
    Ok((!output.status.success()).then(|| problems.lines().collect::<Vec<_>>().join("; ")))
}

/// Files, not followed through links (the chart's definitions are those of `deploy/crds`).
fn files_below(root: &Path, folder: &Path, found: &mut Vec<String>) -> anyhow::Result<()> {
    let path = root.join(folder);
    for entry in fs::read_dir(&path).with_context(|| format!("cannot read {}", path.display()))? {
        let entry = entry?;
        let relative = folder.join(entry.file_name());
        match entry.file_type()? {
            kind if kind.is_dir() => files_below(root, &relative, found)?,
            kind if kind.is_file() => found.push(relative.to_string_lossy().into_owned()),
            _ => {}
        }
    }
    Ok(())
}

fn protos(root: &Path) -> anyhow::Result<BTreeMap<PathBuf, String>> {
    let mut sources = vec!["proto/bimrpc/bimrpc.proto"];
    if root.join("proto/csi/csi.proto").exists() {
        sources.push("proto/csi/csi.proto");
    }
    let descriptors =
        protox::compile(sources.iter().map(|s| root.join(s)), [root.join("proto/bimrpc"), root.join("proto/csi")])?;
    let out = std::env::temp_dir().join(format!("backing-image-generate-{}", process::id()));
    fs::create_dir_all(&out)?;
    tonic_prost_build::configure().out_dir(&out).compile_fds(descriptors)?;
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(&out)? {
        let entry = entry?;
        files.insert(root.join("proto/src/generated").join(entry.file_name()), fs::read_to_string(entry.path())?);
    }
    fs::remove_dir_all(&out)?;
    Ok(files)
}

fn crds(root: &Path) -> anyhow::Result<BTreeMap<PathBuf, String>> {
    let mut files = BTreeMap::new();
    for crd in api::crd::all() {
        let name = format!("deploy/crds/{}.yaml", crd.spec.names.plural);
        files.insert(root.join(name), serde_yaml_ng::to_string(&crd)?);
    }
    Ok(files)
}

/// The page of all metrics, made of their declarations.
fn metrics() -> String {
    let mut text = String::from(
        "# Metrics\n\nMade by `cargo xtask generate` from `api/src/metrics.rs`; change it there. Format: OpenMetrics text at `/metrics`.\n\n\
         | role | where |\n| --- | --- |\n",
    );
    for role in Role::ALL {
        let place = match role {
            Role::Controller => "port 9500 of its pods",
            Role::Node => "port 9501 of its pods",
            Role::Instance => "port 9502 of its pods",
            Role::Manager => {
                "the port of chunk data: 8001 of its pod, one above the port in its address in standalone mode"
            }
            Role::DataSource => "the port of its HTTP face: 8000 of its pod",
            Role::Standalone => {
                "`--listen`, 127.0.0.1:9500 when not given; its managers and data sources have their own"
            }
        };
        text += &format!("| `{}` | {place} |\n", role.as_str());
    }
    text += "\n| metric | kind | labels | role | meaning |\n| --- | --- | --- | --- | --- |\n";
    for metric in ALL {
        let quoted = |names: &mut dyn Iterator<Item = &str>| {
            names.map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
        };
        let labels = quoted(&mut metric.labels.iter().copied());
        let roles = quoted(&mut metric.roles.iter().map(|role| role.as_str()));
        text +=
            &format!("| `{}` | {} | {labels} | {roles} | {} |\n", metric.query(), metric.kind.as_str(), metric.help);
    }
    text
}

/// The page of all settings, made of their declarations.
fn settings() -> String {
    let mut text = String::from(
        "# Settings\n\nMade by `cargo xtask generate` from `api/src/setting.rs` and `api/src/setting/about.rs`; change it there.\n\n\
         A setting is an object of kind Setting: `get settings` lists them with default and range, `kubectl -n longhorn-system edit settings.longhorn.io NAME` or `apply -f` changes one. \
         A change takes effect without a restart. What is out of range is refused, and so is a name that nobody knows; a value that got in all the same counts as the default.\n\n\
         | setting | type | default | range | effect |\n| --- | --- | --- | --- | --- |\n",
    );
    for Known { name, default, rule, .. } in &KNOWN {
        let About { value, effect } = about(name).unwrap_or(About { value: "", effect: "" });
        let default = if default.is_empty() { "empty".to_owned() } else { format!("`{default}`") };
        text += &format!("| `{name}` | {value} | {default} | {rule} | {effect} |\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tree like ours, as rendered.
    fn rendered() -> tempfile::TempDir {
        let tree = tempfile::tempdir().unwrap();
        for (path, text) in [
            ("deploy/chart/templates/node.yaml", "chart"),
            ("deploy/crds/nodes.yaml", "definition"),
            ("deploy/manifests/2-driver.yaml", "rendered"),
        ] {
            fs::create_dir_all(tree.path().join(path).parent().unwrap()).unwrap();
            fs::write(tree.path().join(path), text).unwrap();
        }
        let files = ["deploy/chart/templates/node.yaml", "deploy/crds/nodes.yaml", "deploy/manifests/2-driver.yaml"];
        let sums = Command::new("sha256sum").args(files).current_dir(tree.path()).output().unwrap();
        fs::write(tree.path().join("deploy/manifests/SHA256SUMS"), sums.stdout).unwrap();
        tree
    }

    #[test]
    fn rendered_manifests_are_fresh_until_chart_definitions_or_they_themselves_change() {
        let tree = rendered();
        assert_eq!(stale_manifests(tree.path()).unwrap(), None);
        for path in ["deploy/chart/templates/node.yaml", "deploy/crds/nodes.yaml", "deploy/manifests/2-driver.yaml"] {
            let tree = rendered();
            fs::write(tree.path().join(path), "other").unwrap();
            let reason = stale_manifests(tree.path()).unwrap().unwrap_or_default();
            assert!(reason.contains(path), "{path}: {reason}");
        }
        fs::write(tree.path().join("deploy/chart/values.yaml"), "").unwrap();
        let reason = stale_manifests(tree.path()).unwrap().unwrap_or_default();
        assert!(reason.contains("without deploy/chart/values.yaml"), "{reason}");
    }

    #[test]
    fn manifests_that_nobody_rendered_are_not_fresh() {
        let tree = rendered();
        fs::remove_file(tree.path().join("deploy/manifests/SHA256SUMS")).unwrap();
        assert!(stale_manifests(tree.path()).unwrap().is_some());
    }
}

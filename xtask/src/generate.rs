//! Generated files: gRPC code from `.proto` files, CRD manifests from the Rust types.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::{fs, process};

use anyhow::{Context, bail};

/// Writes every generated file, or with `check` only compares.
pub fn run(check: bool) -> anyhow::Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the workspace root")?;
    let mut files = protos(root)?;
    files.extend(crds(root)?);
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
    if !stale.is_empty() {
        bail!("not fresh, run `cargo xtask generate`: {}", stale.join(", "));
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

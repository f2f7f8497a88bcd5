//! How long a user of Kubernetes waits for a pod, from the claim on: with an image that is ready, with one that must be downloaded
//! first, and next to them the same pod with an emptyDir.
//!
//! The flow `TestTimeFromTheClaimToTheRunningPod` (sanity-tests/e2e) does the work on a cluster of its own; its figures are read here.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, bail, ensure};

use super::table::Table;

/// What a pod gets → seconds of each round, as the flow writes them into the file that `FIGURES` names.
type Rounds = BTreeMap<String, Vec<f64>>;

/// Measures one run: several rounds on one cluster.
pub fn measure(root: &Path, binary: &Path, table: &mut Table) -> anyhow::Result<()> {
    let built = Command::new("sanity-tests/cluster/build.sh").args(crate::e2e::GROUPS).current_dir(root).status();
    ensure!(built.context("cannot start sanity-tests/cluster/build.sh")?.success(), "the cluster cannot be built");
    let figures = tempfile::NamedTempFile::new()?;
    let flow = Command::new("go")
        .args(["test", "-count=1", "-timeout=30m", "-run", "^TestTimeFromTheClaimToTheRunningPod$", "."])
        .current_dir(root.join("sanity-tests/e2e"))
        .env("BACKING_IMAGE_CSI_BINARY", binary)
        .env("FIGURES", figures.path())
        .output()
        .context("cannot start `go`: is it installed?")?;
    if !flow.status.success() {
        bail!("the flow failed:\n{}", String::from_utf8_lossy(&flow.stdout));
    }
    let rounds: Rounds = serde_json::from_str(&fs::read_to_string(figures.path())?).context("what the flow wrote")?;
    add(&rounds, table)
}

fn add(rounds: &Rounds, table: &mut Table) -> anyhow::Result<()> {
    let of = |what: &str| rounds.get(what).with_context(|| format!("the flow tells nothing of `{what}`"));
    let (base, ready, download) = (of("emptyDir")?, of("image that is ready")?, of("image to be downloaded")?);
    ensure!(
        base.len() == ready.len() && base.len() == download.len(),
        "the flow has rounds of different kinds: {rounds:?}"
    );
    for ((base, ready), download) in base.iter().zip(ready).zip(download) {
        table.add("Kubernetes, pod with an emptyDir: created to ready", "", " s", *base);
        table.add("Kubernetes, claim of a ready image of 64 MiB, 2 replicas: created to pod ready", "", " s", *ready);
        table.add("the same / the pod with an emptyDir", "", "", ready / base);
        table.add("Kubernetes, the same with the image to be downloaded first, 2 copies", "", " s", *download);
        table.add("the same with a download / the pod with an emptyDir", "", "", download / base);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_round_is_compared_with_the_emptydir_of_that_round() {
        let rounds = serde_json::json!({"emptyDir": [1.0, 2.0], "image that is ready": [2.0, 6.0], "image to be downloaded": [8.0, 8.0]});
        let mut rounds: Rounds = serde_json::from_value(rounds).unwrap();
        let mut table = Table::default();
        add(&rounds, &mut table).unwrap();
        let text = table.markdown();
        assert!(text.contains("| the same / the pod with an emptyDir | 2.00 | 2.50 |  |"), "{text}");
        assert!(text.contains("| the same with a download / the pod with an emptyDir | 4.00 | 6.00 |  |"), "{text}");
        rounds.get_mut("emptyDir").unwrap().pop();
        assert!(add(&rounds, &mut table).is_err());
        rounds.remove("emptyDir");
        assert!(add(&rounds, &mut table).unwrap_err().to_string().contains("tells nothing of `emptyDir`"));
    }
}

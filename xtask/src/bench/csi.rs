//! How long the driver takes for CSI calls, as its own spans tell it, over many volumes of one small image.
//!
//! The standalone orchestrator makes the calls over the real sockets, as the sidecars of Kubernetes would. Calls that are answered
//! with "not yet" and repeated count too.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::json;

use super::server;
use super::table::Table;
use super::world::{World, timed, wait};

const VOLUMES: usize = 50;
const IMAGE_MIB: u64 = 32;
/// Larger than the image, so that the filesystem is grown as usual.
const VOLUME_MIB: u64 = 64;

/// The calls that make a volume usable on a node.
const TO_MOUNT: [(&str, &str); 3] = [
    ("ControllerPublishVolume", "CSI ControllerPublishVolume: median"),
    ("NodeStageVolume", "CSI NodeStageVolume: median"),
    ("NodePublishVolume", "CSI NodePublishVolume: median"),
];

/// Call → volume → seconds that the driver has spent on it.
type Seconds = BTreeMap<String, BTreeMap<String, f64>>;

/// Measures one run.
pub fn measure(binary: &Path, table: &mut Table) -> anyhow::Result<()> {
    let world = World::start(binary, 1)?;
    let image = world.scratch("ext4.raw");
    fs::File::create(&image)?.set_len(IMAGE_MIB << 20)?;
    timed("mkfs.ext4", &["-q", "-F", &image.to_string_lossy()])?;
    let url = server::serve(&image)?;
    world.cli(&["image", "create", "base", "--url", &url, "--min-copies", "1", "--wait"])?;
    let class = json!({
        "apiVersion": "storage.k8s.io/v1", "kind": "StorageClass", "metadata": {"name": "bench"}, "provisioner": "driver.longhorn.io",
        "parameters": {"numberOfReplicas": "1", "backingImage": "base"},
    });
    world.apply(&serde_yaml_ng::to_string(&class)?)?;
    for n in 0..VOLUMES {
        one_volume(&world, &format!("bench-{n}"))?;
    }

    let seconds = seconds(&world)?;
    let create = of(&seconds, &["CreateVolume"]);
    let mount = of(&seconds, &TO_MOUNT.map(|(call, _)| call));
    let milliseconds = |seconds: f64| seconds * 1000.0;
    table.add(
        "CSI CreateVolume with a ready image: p99 over 50 volumes",
        "≤ 100 ms",
        " ms",
        milliseconds(percentile(&create, 99)),
    );
    table.add(
        "CSI ControllerPublish + NodeStage + NodePublish with a local copy: p99 over 50 volumes",
        "≤ 1000 ms",
        " ms",
        milliseconds(percentile(&mount, 99)),
    );
    for (call, row) in TO_MOUNT {
        table.add(row, "", " ms", milliseconds(percentile(&of(&seconds, &[call]), 50)));
    }
    let detach = of(&seconds, &["NodeUnpublishVolume", "NodeUnstageVolume", "ControllerUnpublishVolume"]);
    table.add(
        "CSI NodeUnpublish + NodeUnstage + ControllerUnpublish: p99 over 50 volumes",
        "",
        " ms",
        milliseconds(percentile(&detach, 99)),
    );
    Ok(())
}

/// From a claim to a mounted filesystem and back to nothing.
fn one_volume(world: &World, name: &str) -> anyhow::Result<()> {
    let claim = json!({
        "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name, "namespace": "default"},
        "spec": {"accessModes": ["ReadWriteOnce"], "storageClassName": "bench", "resources": {"requests": {"storage": format!("{VOLUME_MIB}Mi")}}},
    });
    world.apply(&serde_yaml_ng::to_string(&claim)?)?;
    let path = world.scratch("mount").to_string_lossy().into_owned();
    world.cli(&["volume", "mount", name, "--node", "node-1", "--path", &path])?;
    world.cli(&["volume", "detach", name])?;
    let volume = world.get(&["pvc", name])?["spec"]["volumeName"].as_str().unwrap_or_default().to_owned();
    world.cli(&["delete", "pvc", name])?;
    wait(|| Ok(world.cli(&["get", "pv", &volume]).is_err().then_some(())))
}

/// What the log says of all calls.
fn seconds(world: &World) -> anyhow::Result<Seconds> {
    let mut all = Seconds::new();
    for line in world.log()?.iter().filter(|line| line["target"] == "csi::rpc") {
        let (call, volume) = (line["span"]["call"].as_str(), line["span"]["volume"].as_str());
        if let (Some(call), Some(volume), Some(spent)) = (call, volume, line["seconds"].as_f64()) {
            *all.entry(call.to_owned()).or_default().entry(volume.to_owned()).or_default() += spent;
        }
    }
    Ok(all)
}

/// What the calls took together, for each volume that had all of them.
fn of(seconds: &Seconds, calls: &[&str]) -> Vec<f64> {
    let empty = BTreeMap::new();
    let by_volume: Vec<_> = calls.iter().map(|call| seconds.get(*call).unwrap_or(&empty)).collect();
    let volumes = by_volume[0].keys();
    volumes.filter_map(|volume| by_volume.iter().map(|of| of.get(volume)).sum::<Option<f64>>()).collect()
}

/// By the nearest rank; 0 of nothing.
fn percentile(figures: &[f64], percent: usize) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (sorted.len() * percent).div_ceil(100);
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_nearest_rank() {
        let figures: Vec<f64> = (1..=50).rev().map(f64::from).collect();
        assert_eq!([50, 98, 99].map(|p| percentile(&figures, p)), [25.0, 49.0, 50.0]);
        assert_eq!(percentile(&[], 99), 0.0);
    }

    #[test]
    fn only_volumes_that_had_all_calls_count() {
        let times = |list: &[(&str, f64)]| list.iter().map(|(v, s)| (v.to_string(), *s)).collect();
        let seconds =
            Seconds::from([("a".to_owned(), times(&[("v", 1.0), ("w", 5.0)])), ("b".to_owned(), times(&[("v", 2.0)]))]);
        assert_eq!(of(&seconds, &["a", "b"]), [3.0]);
        assert_eq!(of(&seconds, &["c"]), Vec::<f64>::new());
    }
}

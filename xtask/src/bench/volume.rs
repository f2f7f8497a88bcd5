//! One attached volume of a measurement, and the processes that carry its data.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, bail};
use serde_json::{Value, json};

use super::fio::Target;
use super::world::World;

/// Attached on node-1.
pub struct Volume<'a> {
    world: &'a World,
    claim: String,
    device: String,
    engine: PathBuf,
    replicas: Vec<PathBuf>,
}

impl<'a> Volume<'a> {
    /// Makes a claim over the image `base` and attaches its volume.
    pub fn attach(world: &'a World, claim: &str, replicas: u32, size_mib: u64) -> anyhow::Result<Volume<'a>> {
        let class = json!({
            "apiVersion": "storage.k8s.io/v1", "kind": "StorageClass", "metadata": {"name": claim}, "provisioner": "driver.longhorn.io",
            "parameters": {"numberOfReplicas": replicas.to_string(), "backingImage": "base"},
        });
        let object = json!({
            "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": claim, "namespace": "default"},
            "spec": {"accessModes": ["ReadWriteOnce"], "volumeMode": "Block", "storageClassName": claim, "resources": {"requests": {"storage": format!("{size_mib}Mi")}}},
        });
        world.apply(&format!("{}---\n{}", serde_yaml_ng::to_string(&class)?, serde_yaml_ng::to_string(&object)?))?;
        let device = world.cli(&["volume", "attach", claim, "--node", "node-1"])?.trim().to_owned();
        let object = world.get(&["pvc", claim])?;
        let name = object["spec"]["volumeName"].as_str().context("the claim has no volume")?.to_owned();
        let of_volume = |kind: &str| -> anyhow::Result<Vec<Value>> {
            let list = world.get(&[kind])?;
            let all = list["items"].as_array().context("a list has no items")?;
            Ok(all.iter().filter(|o| o["spec"]["volumeName"] == json!(name)).cloned().collect())
        };
        let text = |value: &Value| value.as_str().map(PathBuf::from).context("an object has no such text");
        let engines = of_volume("engines")?;
        let engine = engines.first().context("the volume has no engine")?;
        let engine = world.data().join("nodes/node-1/instance/engines").join(text(&engine["metadata"]["name"])?);
        let directory = |replica: &Value| {
            let spec = &replica["spec"];
            Ok(text(&spec["diskPath"])?.join("replicas").join(text(&spec["dataDirectoryName"])?))
        };
        let replicas = of_volume("replicas")?.iter().map(directory).collect::<anyhow::Result<_>>()?;
        Ok(Volume { world, claim: claim.to_owned(), device, engine, replicas })
    }

    pub fn target(&self) -> Target {
        Target::Device(self.device.clone())
    }

    /// Holder and engine.
    pub fn engine_processes(&self) -> Vec<u32> {
        self.world.processes_of(&self.engine)
    }

    /// Replica processes and their storage daemons.
    pub fn replica_processes(&self) -> Vec<u32> {
        self.replicas.iter().flat_map(|directory| self.world.processes_of(directory)).collect()
    }

    /// The process of one program among these: the second word of its command line, or the first one.
    pub fn find(pids: &[u32], program: &str) -> anyhow::Result<u32> {
        let is_it = |pid: &&u32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.split(|byte| *byte == 0).take(2).any(|word| word == program.as_bytes())
        };
        match pids.iter().find(is_it) {
            Some(pid) => Ok(*pid),
            None => bail!("no process `{program}` among {pids:?}"),
        }
    }

    /// Detaches and deletes it.
    pub fn remove(self) -> anyhow::Result<()> {
        self.world.cli(&["volume", "detach", &self.claim])?;
        self.world.cli(&["delete", "pvc", &self.claim])?;
        Ok(())
    }
}

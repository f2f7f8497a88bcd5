//! A `qemu-storage-daemon` with one head like that of a replica, and nothing else: what a volume is compared with.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, bail};
use serde_json::json;

use super::fio::Target;
use super::world::{World, timed, wait};

/// It ends when it is dropped.
pub struct StorageDaemon {
    process: Child,
    socket: PathBuf,
}

impl StorageDaemon {
    pub fn start(world: &World, base: &Path, size_mib: u64) -> anyhow::Result<StorageDaemon> {
        let (head, socket) = (world.scratch("alone.qcow2"), world.scratch("alone.sock"));
        let (head_text, size) = (head.to_string_lossy().into_owned(), format!("{size_mib}M"));
        let options = "extended_l2=on,cluster_size=128k";
        timed("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, &head_text, &size])?;
        let file = |name: &str, path: &Path| {
            json!({"driver": "file", "node-name": name, "filename": path, "cache": {"direct": true}, "aio": "io_uring", "discard": "unmap"}).to_string()
        };
        let base_node =
            json!({"driver": "raw", "node-name": "base", "file": "base-file", "read-only": true}).to_string();
        let head_node =
            json!({"driver": "qcow2", "node-name": "head", "file": "head-file", "backing": "base", "discard": "unmap"})
                .to_string();
        let process = Command::new("qemu-storage-daemon")
            .args(["--blockdev", &file("base-file", base), "--blockdev", &base_node])
            .args(["--blockdev", &file("head-file", &head), "--blockdev", &head_node])
            .args(["--nbd-server", &format!("addr.type=unix,addr.path={}", socket.display())])
            .args(["--export", "type=nbd,id=e,node-name=head,name=head,writable=on"])
            .stdin(Stdio::null())
            .spawn()
            .context("cannot start qemu-storage-daemon")?;
        let mut daemon = StorageDaemon { process, socket };
        wait(|| {
            if let Some(status) = daemon.process.try_wait()? {
                bail!("qemu-storage-daemon ended with {status}");
            }
            Ok(daemon.socket.exists().then_some(()))
        })?;
        Ok(daemon)
    }

    pub fn target(&self) -> Target {
        Target::Nbd(format!("nbd+unix:///head?socket={}", self.socket.display()))
    }
}

impl Drop for StorageDaemon {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

//! One `qemu-storage-daemon` per replica: head qcow2 over the image file, one NBD export at a time.
//!
//! The daemon works in the replica's directory and serves NBD on a socket that it inherits (see [`listener`]). The block graph
//! is given node by node: the base with its *recorded* format and without a backing file, the head with its backing by node name.
//! No header field ever makes QEMU open another file.

pub mod listener;
mod spawn;
#[cfg(test)]
mod tests;

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;

use serde_json::{Value, json};
use tokio::sync::watch;

use crate::qmp::Qmp;
use crate::{DataplaneError, limits, process};

const PROGRAM: &str = "qemu-storage-daemon";
const NODE_BASE: &str = "base";
const NODE_FILE: &str = "file";
const NODE_HEAD: &str = "head";
/// 128 KiB with 32 subclusters: 4 KiB copy-on-write and small tables.
const CLUSTER_BYTES: u64 = 128 << 10;
/// Standard output and error of the daemon, in the replica's directory.
pub const LOG: &str = "qemu-storage-daemon.log";
/// qcow2: "incompatible feature" bit of an external data file.
const QCOW2_EXTERNAL_DATA: u64 = 1 << 2;

/// The format that was recorded for a base when it came in; never probed again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BaseFormat {
    Raw,
    Qcow2,
}

impl BaseFormat {
    /// The name that QEMU and the image's status use.
    pub fn as_str(self) -> &'static str {
        match self {
            BaseFormat::Raw => "raw",
            BaseFormat::Qcow2 => "qcow2",
        }
    }

    /// The format of a name.
    pub fn from_name(name: &str) -> Option<BaseFormat> {
        [BaseFormat::Raw, BaseFormat::Qcow2].into_iter().find(|f| f.as_str() == name)
    }
}

/// The image file below a head.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Base {
    pub path: PathBuf,
    pub format: BaseFormat,
}

/// What to serve.
#[derive(Debug)]
pub struct Config {
    /// Where the head is; the daemon's working directory.
    pub directory: PathBuf,
    /// File name of the head in it.
    pub head: String,
    /// Where it serves NBD: from [`listener::listen`], or a unix socket that does not block. It is closed here, so that nobody can connect once the daemon has ended.
    pub listener: OwnedFd,
    /// `None`: a volume without image.
    pub base: Option<Base>,
    pub size_bytes: u64,
    /// What the head has as far as is recorded. One that has this or more, and no more than `size_bytes`, is grown from this on; other
    /// sizes are refused. What is new reads as zeroes, also where the base is longer than the head was.
    pub recorded_bytes: u64,
    /// Make the head when it is absent. Without this an absent head is an error: it held data.
    pub create_head: bool,
    /// A lock that the daemon shall hold as long as it lives.
    pub lock: Option<OwnedFd>,
}

/// The files to open.
struct Chain {
    head: String,
    base: Option<Base>,
    size_bytes: u64,
    recorded_bytes: u64,
}

/// A running daemon with its head open. Dropping it does not end it; our own end does, and [`StorageDaemon::quit`].
pub struct StorageDaemon {
    qmp: Qmp,
    pid: u32,
    ended: watch::Receiver<Option<ExitStatus>>,
    directory: PathBuf,
    head_options: Value,
}

impl StorageDaemon {
    /// Starts the daemon, makes the head when wished, opens the chain. Nothing is exported yet.
    pub async fn start(config: Config) -> Result<StorageDaemon, DataplaneError> {
        StorageDaemon::start_program(PROGRAM, config).await
    }

    async fn start_program(program: &str, config: Config) -> Result<StorageDaemon, DataplaneError> {
        if let Some(base) = &config.base {
            check_base(base)?;
        }
        let head_exists = fs::exists(config.directory.join(&config.head))
            .map_err(|e| DataplaneError::io(format!("look for the head in `{}`", config.directory.display()), e))?;
        if !head_exists && !config.create_head {
            return Err(DataplaneError::Unusable {
                message: format!(
                    "`{}` is missing in `{}` although the replica held data; it is not made anew, so that nobody takes an empty one for it. Remove this replica; only the very last state of the file may be put back",
                    config.head,
                    config.directory.display()
                ),
            });
        }
        // One that nobody has used begins as its image does, however long it is to be now.
        let head_exists = head_exists && !(config.create_head && config.recorded_bytes < config.size_bytes);
        let Config { directory, head, base, size_bytes, recorded_bytes, listener, lock, .. } = config;
        let daemon = launch(program, directory, listener, lock).await?;
        // A new one has nothing behind its end.
        let recorded_bytes = if head_exists { recorded_bytes } else { size_bytes };
        match daemon.open(&Chain { head, base, size_bytes, recorded_bytes }, head_exists).await {
            Ok(daemon) => Ok(daemon),
            Err((daemon, error)) => {
                let error = daemon.explain(error);
                daemon.kill().await;
                Err(error)
            }
        }
    }

    async fn open(
        mut self,
        chain: &Chain,
        head_exists: bool,
    ) -> Result<StorageDaemon, (StorageDaemon, DataplaneError)> {
        let outcome = async {
            if !head_exists {
                create_head(&self.qmp, &self.directory, chain).await?;
            }
            if let Some(base) = &chain.base {
                self.qmp.execute("blockdev-add", base_options(base)).await?;
            }
            let direct = add_file(&self.qmp, &chain.head).await?;
            let head_options = head_options(chain.base.is_some(), direct);
            self.qmp.execute("blockdev-add", head_options.clone()).await?;
            fit_size(&self.qmp, &self.directory, &head_options, chain).await?;
            Ok(head_options)
        }
        .await;
        match outcome {
            Ok(head_options) => {
                self.head_options = head_options;
                Ok(self)
            }
            Err(error) => Err((self, error)),
        }
    }

    /// Process id of the daemon.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Offers the head for reading and writing under a name.
    pub async fn add_export(&self, name: &str) -> Result<(), DataplaneError> {
        let export = json!({ "type": "nbd", "id": name, "node-name": NODE_HEAD, "name": name, "writable": true });
        self.qmp.execute("block-export-add", export).await.map(drop).map_err(|e| self.explain(e))
    }

    /// Drops the connections of an export and waits until none of its requests is in flight.
    pub async fn delete_export(&self, name: &str) -> Result<(), DataplaneError> {
        self.qmp
            .execute_until("block-export-del", json!({ "id": name, "mode": "hard" }), |event| {
                event.event == "BLOCK_EXPORT_DELETED" && event.data["id"] == name
            })
            .await
            .map(drop)
            .map_err(|e| self.explain(e))
    }

    /// Writes everything that QEMU holds to the disk, metadata included.
    pub async fn flush(&self) -> Result<(), DataplaneError> {
        flush(&self.qmp, &self.head_options).await.map_err(|e| self.explain(e))
    }

    /// Returns when the daemon has ended, with a sentence about how.
    pub async fn ended(&self) -> String {
        let mut ended = self.ended.clone();
        // The sender lives in the thread that waits for the child, so an error also means the end.
        let status = ended.wait_for(Option::is_some).await.ok().and_then(|s| *s);
        let status = status.map_or_else(|| "unknown status".into(), |s| s.to_string());
        format!("qemu-storage-daemon ended ({status}){}", self.log_tail())
    }

    /// Ends the daemon in order: everything is flushed. Killed when it takes too long.
    pub async fn quit(&self) -> Result<(), DataplaneError> {
        match self.qmp.execute("quit", json!({})).await {
            // It may end before the reply is read.
            Ok(_) | Err(DataplaneError::Ended { .. }) => {}
            Err(error) => {
                self.kill().await;
                return Err(error);
            }
        }
        if tokio::time::timeout(limits::DAEMON_QUIT_TIMEOUT, self.ended()).await.is_err() {
            self.kill().await;
            return Err(DataplaneError::Slow {
                command: format!("{PROGRAM} (quit)"),
                seconds: limits::DAEMON_QUIT_TIMEOUT.as_secs(),
            });
        }
        Ok(())
    }

    async fn kill(&self) {
        // Our own child, not yet waited for unless `ended` says so: the pid is still its own.
        if self.ended.borrow().is_none()
            && let Some(pid) = rustix::process::Pid::from_raw(self.pid as i32)
        {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            self.ended().await;
        }
    }

    fn explain(&self, error: DataplaneError) -> DataplaneError {
        match error {
            DataplaneError::Ended { .. } => DataplaneError::Ended { detail: self.log_tail() },
            other => other,
        }
    }

    /// The daemon's last words, as the end of a sentence.
    fn log_tail(&self) -> String {
        let text = fs::read_to_string(self.directory.join(LOG)).unwrap_or_default();
        let tail = runtime::words::last(&text);
        if tail.is_empty() { String::new() } else { format!(": {tail}") }
    }
}

async fn launch(
    program: &str,
    directory: PathBuf,
    listener: OwnedFd,
    lock: Option<OwnedFd>,
) -> Result<StorageDaemon, DataplaneError> {
    let (ours, theirs) =
        UnixStream::pair().map_err(|e| DataplaneError::io("make a socket for qemu-storage-daemon", e))?;
    let theirs = OwnedFd::from(theirs);
    let log = OpenOptions::new()
        .create(true)
        .write(true)
        .truncate(true)
        .open(directory.join(LOG))
        .map_err(|e| DataplaneError::io(format!("open `{LOG}` in `{}`", directory.display()), e))?;
    let args = vec![
        "--chardev".into(),
        format!("socket,id=monitor,fd={},server=off", theirs.as_raw_fd()),
        "--monitor".into(),
        "chardev=monitor".into(),
        // Only here: QMP takes a descriptor by a name that `getfd` gave it, which this program does not have.
        "--nbd-server".into(),
        format!("addr.type=fd,addr.str={},max-connections={}", listener.as_raw_fd(), limits::NBD_CONNECTIONS),
    ];
    let inherited = [theirs, listener].into_iter().chain(lock).collect();
    let child =
        spawn::spawn(program, args, &memory(), &directory, log, inherited).await.map_err(|source| {
            match source.kind() {
                std::io::ErrorKind::NotFound => {
                    DataplaneError::Missing { program: PROGRAM.into(), package: process::package_of(PROGRAM).into() }
                }
                _ => DataplaneError::io("start qemu-storage-daemon", source),
            }
        })?;
    ours.set_nonblocking(true).map_err(|e| DataplaneError::io("use the socket of qemu-storage-daemon", e))?;
    let stream = tokio::net::UnixStream::from_std(ours)
        .map_err(|e| DataplaneError::io("use the socket of qemu-storage-daemon", e))?;
    let qmp = Qmp::connect(stream, limits::DAEMON_START_TIMEOUT).await;
    match qmp {
        Ok(qmp) => Ok(StorageDaemon { qmp, pid: child.pid, ended: child.ended, directory, head_options: Value::Null }),
        Err(error) => {
            if child.ended.borrow().is_none()
                && let Some(pid) = rustix::process::Pid::from_raw(child.pid as i32)
            {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
            let said = fs::read_to_string(directory.join(LOG)).unwrap_or_default();
            Err(match error {
                DataplaneError::Ended { .. } => DataplaneError::Ended { detail: format!(": {}", said.trim()) },
                other => other,
            })
        }
    }
}

/// How the daemon's memory is managed: by jemalloc, which keeps the buffers of large requests for a while.
///
/// glibc gives each of them back to the kernel, and their pages are cleared for the next request: that takes more time than all
/// else that QEMU does for it (docs/decisions/0006). Where the library is not installed, that is how it is: the loader ignores it.
fn memory() -> [(&'static str, String); 2] {
    let spare = limits::DAEMON_SPARE_MEMORY_MS;
    let options = format!("narenas:1,background_thread:true,dirty_decay_ms:{spare},muzzy_decay_ms:0");
    [("LD_PRELOAD", "libjemalloc.so.2".to_owned()), ("MALLOC_CONF", options)]
}

fn base_options(base: &Base) -> Value {
    // Through the page cache, unlike the head: many volumes read the same image.
    let file = json!({ "driver": "file", "filename": base.path, "read-only": true });
    match base.format {
        BaseFormat::Raw => json!({ "driver": "raw", "node-name": NODE_BASE, "read-only": true, "file": file }),
        BaseFormat::Qcow2 => {
            json!({ "driver": "qcow2", "node-name": NODE_BASE, "read-only": true, "backing": null, "file": file })
        }
    }
}

fn head_options(has_base: bool, direct: bool) -> Value {
    json!({
        "driver": "qcow2",
        "node-name": NODE_HEAD,
        "file": NODE_FILE,
        "backing": if has_base { Value::from(NODE_BASE) } else { Value::Null },
        "cache": { "direct": direct },
        "l2-cache-size": limits::HEAD_TABLE_CACHE,
        "discard": "unmap",
    })
}

/// Opens the head's file in the best way that works here; says whether it is past the page cache.
async fn add_file(qmp: &Qmp, name: &str) -> Result<bool, DataplaneError> {
    // io_uring may be forbidden (containers), O_DIRECT may be unknown to the filesystem. Flushes keep their meaning in each case.
    let mut first_error = None;
    for (direct, aio) in [(true, "io_uring"), (true, "threads"), (false, "threads")] {
        let options = json!({
            "driver": "file", "node-name": NODE_FILE, "filename": name,
            "cache": { "direct": direct }, "aio": aio, "discard": "unmap",
        });
        match qmp.execute("blockdev-add", options).await {
            Ok(_) => {
                if let Some(error) = first_error {
                    tracing::warn!(direct, aio, %error, "head opened in a slower way");
                }
                return Ok(direct);
            }
            Err(error @ DataplaneError::Refused { .. }) => drop(first_error.get_or_insert(error)),
            Err(error) => return Err(error),
        }
    }
    Err(first_error.expect("every way was tried and failed"))
}

/// Makes the head under a temporary name; a name without the suffix is always whole.
async fn create_head(qmp: &Qmp, directory: &Path, chain: &Chain) -> Result<(), DataplaneError> {
    let temporary = format!("{}.tmp", chain.head);
    let path = directory.join(&temporary);
    let failed = |e| DataplaneError::io(format!("create the head `{}`", path.display()), e);
    File::create(&path).map_err(failed)?;
    qmp.execute("blockdev-add", json!({ "driver": "file", "node-name": "new", "filename": temporary })).await?;
    let options = json!({
        "driver": "qcow2", "file": "new", "size": chain.size_bytes,
        "cluster-size": CLUSTER_BYTES, "extended-l2": true,
    });
    let created = run_job(qmp, "create-head", options).await;
    qmp.execute("blockdev-del", json!({ "node-name": "new" })).await?;
    created?;
    File::open(&path).and_then(|f| f.sync_all()).map_err(failed)?;
    let head = directory.join(&chain.head);
    fs::rename(&path, &head).and_then(|()| runtime::files::sync_parent(&head)).map_err(failed)
}

async fn run_job(qmp: &Qmp, id: &str, options: Value) -> Result<(), DataplaneError> {
    qmp.execute_until("blockdev-create", json!({ "job-id": id, "options": options }), |event| {
        event.event == "JOB_STATUS_CHANGE" && event.data["id"] == id && event.data["status"] == "concluded"
    })
    .await?;
    let jobs = qmp.execute("query-jobs", json!({})).await?;
    let job = jobs.as_array().into_iter().flatten().find(|job| job["id"] == id).cloned().unwrap_or_default();
    qmp.execute("job-dismiss", json!({ "id": id })).await?;
    match job["error"].as_str() {
        Some(message) => {
            Err(DataplaneError::Refused { command: "blockdev-create".into(), message: message.to_owned() })
        }
        None => Ok(()),
    }
}

/// There is no command to flush; reopening a node with unchanged options flushes it first and reports a failure.
async fn flush(qmp: &Qmp, head_options: &Value) -> Result<(), DataplaneError> {
    qmp.execute("blockdev-reopen", json!({ "options": [head_options] })).await.map(drop)
}

/// A head of another size belongs to another volume, or to this one before it grew; then it is grown, durably.
///
/// QEMU sees the base here, so it puts zeroes where that would show in what is new. After a loss of power the size may be there and
/// the zeroes not, so a head counts as grown only when that is recorded. Until then nobody was served what is behind the recorded
/// end: it is cut off and grown anew.
async fn fit_size(qmp: &Qmp, directory: &Path, options: &Value, chain: &Chain) -> Result<(), DataplaneError> {
    let nodes = qmp.execute("query-named-block-nodes", json!({ "flat": true })).await?;
    let head = nodes.as_array().into_iter().flatten().find(|node| node["node-name"] == NODE_HEAD).cloned();
    let found = head.and_then(|h| h["image"]["virtual-size"].as_u64());
    match found {
        Some(bytes) if bytes == chain.size_bytes && bytes == chain.recorded_bytes => Ok(()),
        Some(bytes) if (chain.recorded_bytes..=chain.size_bytes).contains(&bytes) => {
            let resize = async |size: u64| {
                qmp.execute("block_resize", json!({ "node-name": NODE_HEAD, "size": size })).await?;
                flush(qmp, options).await
            };
            if bytes > chain.recorded_bytes {
                resize(chain.recorded_bytes).await?;
            }
            resize(chain.size_bytes).await?;
            tracing::info!(directory = %directory.display(), from = bytes, to = chain.size_bytes, "head grown");
            Ok(())
        }
        _ => Err(DataplaneError::Unusable {
            message: format!(
                "`{}` in `{}` has {} bytes, the volume has {}; it belongs to another volume or a resize was cut short",
                chain.head,
                directory.display(),
                found.map_or_else(|| "an unknown number of".into(), |n| n.to_string()),
                chain.size_bytes
            ),
        }),
    }
}

/// A second wall: ingest refuses such images, but QEMU offers no option against an external data file of a qcow2.
fn check_base(base: &Base) -> Result<(), DataplaneError> {
    let failed = |e| DataplaneError::io(format!("open the image file `{}`", base.path.display()), e);
    let mut header = Vec::new();
    File::open(&base.path).map_err(failed)?.take(104).read_to_end(&mut header).map_err(failed)?;
    if base.format == BaseFormat::Raw {
        return Ok(());
    }
    match qcow2_problem(&header) {
        None => Ok(()),
        Some(problem) => Err(DataplaneError::Unusable {
            message: format!("the image file `{}` is recorded as qcow2 but {problem}", base.path.display()),
        }),
    }
}

fn qcow2_problem(header: &[u8]) -> Option<&'static str> {
    let word = |at: usize| header.get(at..at + 4).map(|b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]));
    if header.get(..4) != Some(b"QFI\xfb") {
        return Some("does not begin like one; it was changed or damaged");
    }
    let incompatible = match word(4) {
        Some(2) => 0,
        Some(3) => u64::from(word(72).unwrap_or(0)) << 32 | u64::from(word(76).unwrap_or(0)),
        _ => return Some("has an unknown version"),
    };
    (incompatible & QCOW2_EXTERNAL_DATA != 0).then_some("keeps its data in another file, which is not allowed")
}

/// Bytes that the files of a directory take on disk.
pub fn allocated_bytes(directory: &Path) -> std::io::Result<u64> {
    use std::os::unix::fs::MetadataExt;
    let mut total = 0;
    for entry in fs::read_dir(directory)? {
        total += entry?.metadata().map(|m| m.blocks() * 512).unwrap_or(0);
    }
    Ok(total)
}

//! A volume with real replica processes, holder, engine and loop device. Dropping it takes all of them away.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::time::{Duration, Instant};

use backing_image_instance::replica_process::{Config as ReplicaConfig, Image, read_record};
use dataplane::storage_daemon::BaseFormat;
use engine::{control_client, process};
use proto::engine::{Config, ReplicaAddress, ReplicaState, Status};
use proto::replica::{Record, Reply, Request};
use rustix::process::{Pid, Signal, kill_process};

use crate::array::fill;
use crate::authority::Authority;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    Raw,
    Qcow2,
    Zlib,
    Zstd,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Length {
    Shorter,
    Equal,
    Longer,
}

#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub image: Option<(Form, Length)>,
    pub replicas: usize,
    pub tls: bool,
}

pub struct World {
    pub volume_bytes: u64,
    pub image_bytes: u64,
    /// Numbers of the replicas that hold everything.
    pub current: BTreeSet<usize>,
    pub device: PathBuf,
    pub config: Config,
    replicas: Vec<Replica>,
    holder: Option<Child>,
    attachments: usize,
    folder: tempfile::TempDir,
}

struct Replica {
    config: ReplicaConfig,
    file: PathBuf,
    child: Option<Child>,
}

/// Waits for a condition; fails when it does not come.
fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        std::thread::park_timeout(Duration::from_millis(5)); // poll
    }
}

pub fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?} cannot be started: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// Two neighboring ports on an address that no other test process uses.
fn free_address() -> SocketAddr {
    static NEXT: AtomicU16 = AtomicU16::new(20_000);
    let [high, low] = (std::process::id() as u16).to_be_bytes();
    loop {
        let port = NEXT.fetch_add(2, Ordering::Relaxed);
        let at = |port: u16| SocketAddr::from(([127, 77, high, low], port));
        if TcpListener::bind(at(port)).is_ok() && TcpListener::bind(at(port + 1)).is_ok() {
            return at(port);
        }
    }
}

/// The bytes of an image: data, holes and zeroes in turn.
pub fn image_content(length: u64) -> Vec<u8> {
    let mut bytes = vec![0; length as usize];
    for (index, part) in bytes.chunks_mut(24 << 10).enumerate().filter(|(index, _)| index % 3 != 1) {
        let repeat = if index.is_multiple_of(2) { part.len() } else { 512 };
        // Some of it compresses.
        for (at, part) in part.chunks_mut(repeat).enumerate() {
            fill(0x1_0000 + index as u64, if repeat == 512 { 0 } else { at as u64 }, part);
        }
    }
    bytes
}

fn make_image(folder: &Path, form: Form, length: u64) -> Image {
    let (raw, path) = (folder.join("raw"), folder.join("backing"));
    std::fs::write(&raw, image_content(length)).unwrap();
    let options: &[&str] = match form {
        Form::Raw => {
            std::fs::rename(&raw, &path).unwrap();
            return Image { name: "image".into(), uuid: "0123abcd".into(), path, format: BaseFormat::Raw };
        }
        Form::Qcow2 => &["-o", "cluster_size=4k"],
        Form::Zlib => &["-c", "-o", "compression_type=zlib"],
        Form::Zstd => &["-c", "-o", "compression_type=zstd,cluster_size=16k"],
    };
    run(Command::new("qemu-img")
        .args(["convert", "-q", "-f", "raw", "-O", "qcow2"])
        .args(options)
        .arg(&raw)
        .arg(&path));
    std::fs::remove_file(raw).unwrap();
    Image { name: "image".into(), uuid: "0123abcd".into(), path, format: BaseFormat::Qcow2 }
}

impl World {
    /// `size` chooses the lengths: neither is a multiple of a cluster.
    pub fn new(shape: &Shape, size: u16) -> World {
        let folder = tempfile::tempdir().unwrap();
        let volume_bytes = (1 << 20) + u64::from(size % 4096) * 512;
        let odd = u64::from(size / 4096 + 1) * 512;
        let image_bytes = match shape.image {
            None => 0,
            Some((_, Length::Shorter)) => volume_bytes / 2 / 512 * 512 + odd,
            Some((_, Length::Equal)) => volume_bytes,
            Some((_, Length::Longer)) => volume_bytes + 300 * 512 + odd,
        };
        let image = shape.image.map(|(form, _)| make_image(folder.path(), form, image_bytes));
        let certificates = shape.tls.then(|| folder.path().join("certificates"));
        if let Some(directory) = &certificates {
            std::fs::create_dir(directory).unwrap();
            Authority::new().issue(directory);
        }
        let replica = |number: usize| {
            let config = ReplicaConfig {
                directory: folder.path().join(format!("r{number}")),
                volume: "vol".into(),
                replica: format!("r{number}"),
                size_bytes: volume_bytes,
                image: image.clone(),
                listen: free_address(),
                certificates: certificates.clone(),
            };
            Replica { file: folder.path().join(format!("r{number}.json")), config, child: None }
        };
        let config = Config {
            volume: "vol".into(),
            size_bytes: volume_bytes,
            generation: 0,
            attachment: 0,
            replicas: Default::default(),
            read_from: None,
            compare_replicas: false,
            mount_file: folder.path().join("volume"),
            control_socket: folder.path().join("engine.sock"),
            nbd_socket: folder.path().join("nbd.sock"),
            replica_timeout_ms: 30_000,
            no_replica_hold_ms: 2_000,
            holder_limit_ms: 60_000,
            silence_limit_ms: 10_000,
            replace_engine: true,
            program: None,
            certificates: certificates.clone(),
        };
        World {
            volume_bytes,
            image_bytes,
            current: (0..shape.replicas).collect(),
            device: PathBuf::new(),
            replicas: (0..shape.replicas).map(replica).collect(),
            config,
            holder: None,
            attachments: 0,
            folder,
        }
    }

    /// Starts all replicas, those that are stale as well.
    pub fn start_replicas(&mut self) {
        self.replicas.iter_mut().for_each(Replica::launch);
        self.replicas.iter_mut().for_each(Replica::wait);
    }

    /// Starts all replicas and serves the volume.
    pub fn attach(&mut self) {
        self.start_replicas();
        let records: Vec<_> = self.current.iter().map(|r| self.replicas[*r].record()).collect();
        // As the controller decides it.
        let highest = records.iter().map(|record| record.generation).max().unwrap();
        self.config.compare_replicas = records.iter().any(|record| !record.clean || record.generation != highest);
        self.config.replicas = self.replicas.iter().map(|replica| replica.address()).collect();
        let source = self.current.iter().nth(self.attachments % self.current.len()).unwrap();
        self.config.read_from = Some(format!("r{source}"));
        self.attachments += 1;
        let path = self.folder.path().join("engine.json");
        std::fs::write(&path, serde_json::to_vec(&self.config).unwrap()).unwrap();
        let exe = std::env::current_exe().unwrap();
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.log_path()).unwrap();
        let mut command = Command::new(&exe);
        command.args(["--exact", "role_process", "--ignored", "--nocapture"]);
        command.env("ENGINE_TEST_EXE", &exe).env("ENGINE_TEST_CONFIG", &path);
        self.holder = Some(command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap());
        self.wait_serving(1);
        let file = &self.config.mount_file;
        self.device = run(Command::new("losetup").args(["--direct-io=on", "--show", "-f"]).arg(file)).into();
        let status = self.status();
        for number in 0..self.replicas.len() {
            let dropped = status.replicas[&format!("r{number}")] == ReplicaState::Dropped;
            assert_eq!(dropped, !self.current.contains(&number), "replica r{number}: {status:?}");
        }
    }

    fn wait_serving(&self, lives: u32) {
        let serves = |status: Status| status.serving && status.lives == lives;
        wait_until("an engine serves", || self.try_status().is_some_and(serves));
    }

    fn try_status(&self) -> Option<Status> {
        control_client::status(&self.config.control_socket, Duration::from_secs(5)).ok()
    }

    pub fn status(&self) -> Status {
        self.try_status().expect("the engine answers")
    }

    /// Ends everything in order: each replica has recorded that it is whole.
    pub fn detach(&mut self) {
        run(Command::new("losetup").arg("-d").arg(std::mem::take(&mut self.device)));
        // The loop driver lets go of the file a moment later.
        wait_until("the engine ends", || {
            control_client::shutdown(&self.config.control_socket, Duration::from_secs(60)).is_ok()
        });
        let mut holder = self.holder.take().unwrap();
        let mut ended = None;
        wait_until("the holder ends", || {
            ended = holder.try_wait().unwrap();
            ended.is_some()
        });
        assert!(ended.unwrap().success());
        self.replicas.iter_mut().for_each(|replica| replica.end(Signal::TERM));
    }

    /// After it, the current replicas hold the same.
    pub fn wait_compared(&self) {
        let same =
            |status: &Status| self.current.iter().all(|r| status.replicas[&format!("r{r}")] == ReplicaState::InSync);
        wait_until("the replicas are compared", || same(&self.status()));
    }

    pub fn engine(&self) -> (Pid, u32) {
        let status = self.status();
        (Pid::from_raw(status.pid as i32).unwrap(), status.lives)
    }

    /// Waits for the engine after a killed one.
    pub fn wait_replaced(&self, lives: u32) {
        self.wait_serving(lives + 1);
    }

    pub fn holder(&self) -> Pid {
        Pid::from_child(self.holder.as_ref().unwrap())
    }

    /// After holder and engine were killed: what they leave is taken away, and the volume is attached again.
    pub fn recover(&mut self) {
        self.holder.take().unwrap().wait().unwrap();
        let generation = process::last_generation(&self.config.control_socket).unwrap();
        run(Command::new("losetup").arg("-d").arg(std::mem::take(&mut self.device)));
        wait_until("nobody serves the volume", || !process::is_served(&self.config.control_socket).unwrap());
        let _ = Command::new("umount").arg("-l").arg(&self.config.mount_file).stderr(Stdio::null()).status();
        self.config.generation = generation.unwrap_or(0).max(self.config.generation);
        self.attach();
    }

    /// Stops the daemon of a replica where it stands. It is killed when the result is dropped.
    pub fn freeze_daemon(&self, number: usize) -> Frozen {
        let process = self.replicas[number].child.as_ref().unwrap().id();
        let tasks = std::fs::read_dir(format!("/proc/{process}/task")).unwrap();
        let children = tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("children")).unwrap());
        let daemon = children.collect::<String>().trim().parse().expect("it has one child");
        let daemon = Pid::from_raw(daemon).unwrap();
        kill_process(daemon, Signal::STOP).unwrap();
        Frozen(daemon)
    }

    pub fn kill_replica(&mut self, number: usize) {
        self.replicas[number].end(Signal::KILL);
    }

    pub fn wait_dropped(&mut self, number: usize) {
        let mut status = self.status();
        let deadline = Instant::now() + Duration::from_secs(60);
        while status.replicas[&format!("r{number}")] != ReplicaState::Dropped {
            assert!(Instant::now() < deadline, "r{number} is not dropped: {status:?}");
            std::thread::park_timeout(Duration::from_millis(5)); // poll
            status = self.status();
        }
        self.current.remove(&number);
    }

    pub fn record(&self, number: usize) -> Record {
        self.replicas[number].record()
    }

    pub fn replica_address(&self, number: usize) -> SocketAddr {
        self.replicas[number].config.listen
    }

    pub fn ask_replica(&self, number: usize, request: &Request) -> Reply {
        let control = self.replicas[number].config.directory.join("control.sock");
        let mut stream = runtime::socket::connect_blocking(&control).unwrap();
        stream.write_all(format!("{}\n", serde_json::to_string(request).unwrap()).as_bytes()).unwrap();
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn wait_generation(&self, generation: u64) {
        wait_until("the others recorded it", || self.status().generation == generation);
    }

    /// The chain of a replica as QEMU opens it by hand, when its processes have ended.
    pub fn chain(&self, number: usize) -> String {
        let replica = &self.replicas[number].config;
        let file = |path: &Path| serde_json::json!({"driver": "file", "filename": path});
        let mut chain =
            serde_json::json!({"driver": "qcow2", "file": file(&replica.directory.join("volume-head.qcow2"))});
        if let Some(image) = &replica.image {
            chain["backing"] = match image.format {
                BaseFormat::Raw => serde_json::json!({"driver": "raw", "file": file(&image.path)}),
                BaseFormat::Qcow2 => serde_json::json!({"driver": "qcow2", "file": file(&image.path), "backing": null}),
            };
        }
        format!("json:{chain}")
    }

    /// Every current replica has exactly these bytes, and so has every other.
    pub fn assert_replicas_hold(&self, bytes: &[u8]) {
        let model = self.folder.path().join("model");
        std::fs::write(&model, bytes).unwrap();
        let same = |other: &str| {
            let mut compare = Command::new("qemu-img");
            let output = compare.args(["compare", "-f", "raw"]).arg(&model).arg(other).output().unwrap();
            let said = [output.stdout, output.stderr].concat();
            assert!(output.status.success(), "{other}: {}", String::from_utf8_lossy(&said));
        };
        self.current.iter().for_each(|number| same(&self.chain(*number)));
    }

    fn log_path(&self) -> PathBuf {
        self.folder.path().join("log")
    }
}

/// A daemon that does nothing any more.
pub struct Frozen(Pid);

impl Drop for Frozen {
    fn drop(&mut self) {
        let _ = kill_process(self.0, Signal::KILL);
    }
}

impl Replica {
    fn launch(&mut self) {
        if self.child.is_some() {
            return;
        }
        std::fs::write(&self.file, serde_json::to_vec(&self.config).unwrap()).unwrap();
        let test = std::env::current_exe().unwrap();
        let program = test.parent().unwrap().parent().unwrap().join("examples/replica");
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.file.with_extension("log")).unwrap();
        let mut command = Command::new(program);
        command.args(["replica", "--config"]).arg(&self.file).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        self.child = Some(command.spawn().unwrap());
    }

    fn wait(&mut self) {
        wait_until("the replica answers", || {
            assert!(self.child.as_mut().unwrap().try_wait().unwrap().is_none(), "{}", self.log());
            runtime::socket::connect_blocking(&self.config.directory.join("control.sock")).is_ok()
        });
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.file.with_extension("log")).unwrap_or_default()
    }

    fn record(&self) -> Record {
        read_record(&self.config.directory).unwrap().unwrap()
    }

    fn address(&self) -> (String, ReplicaAddress) {
        (self.config.replica.clone(), ReplicaAddress::Tcp(self.config.listen.to_string()))
    }

    /// Its daemon ends with it, at once or in order.
    fn end(&mut self, signal: Signal) {
        if let Some(mut child) = self.child.take() {
            let _ = kill_process(Pid::from_child(&child), signal);
            child.wait().unwrap();
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        static SHOWN: AtomicBool = AtomicBool::new(false);
        if std::thread::panicking() && !SHOWN.swap(true, Ordering::Relaxed) {
            eprintln!(
                "--- log of holder and engine ---\n{}",
                std::fs::read_to_string(self.log_path()).unwrap_or_default()
            );
        }
        // The abort first: whoever waits for the volume gets an error instead of waiting for ever.
        let engine = self.try_status().map(|status| status.pid);
        if let Some(mut holder) = self.holder.take() {
            let _ = holder.kill();
            let _ = holder.wait();
            if let Some(engine) = engine.and_then(|pid| Pid::from_raw(pid as i32)) {
                let _ = kill_process(engine, Signal::KILL);
            }
            let _ = Command::new("umount").arg("-f").arg(&self.config.mount_file).stderr(Stdio::null()).status();
        }
        if !self.device.as_os_str().is_empty() {
            let _ = Command::new("losetup").arg("-d").arg(&self.device).status();
        }
        let _ = Command::new("umount").arg("-l").arg(&self.config.mount_file).stderr(Stdio::null()).status();
        self.replicas.iter_mut().for_each(|replica| replica.end(Signal::KILL));
    }
}

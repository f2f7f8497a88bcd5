//! A volume on real `qemu-storage-daemon` processes behind a small double of the replica control protocol.
//!
//! Dropping the volume takes away loop device, mount and processes, also when a test fails.

#![allow(dead_code, unused_imports, reason = "each file of tests uses its part")]

mod replica;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use backing_image_engine::control_client;
use proto::engine::{Config, ReplicaAddress, ReplicaState, Status};
pub use replica::{Moment, Replica};

pub const MIB: u64 = 1 << 20;

/// Waits for a condition; fails when it does not come.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

pub fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?} cannot be started: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output
}

pub fn sh(script: &str) -> Output {
    Command::new("sh").arg("-c").arg(script).output().unwrap()
}

/// What holder and engine processes of the tests run. An engine is broken while there is a file beside its configuration.
pub fn role() -> ! {
    runtime::log::init(runtime::log::Format::Text, "info");
    let config = PathBuf::from(std::env::var("ENGINE_TEST_CONFIG").unwrap());
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<i32>().unwrap());
    let result = match (number("ENGINE_TEST_FD"), number("ENGINE_TEST_LIVES")) {
        (Some(device), Some(lives)) => backing_image_engine::process::run(&config, device, lives as u32),
        _ => {
            let script = "broken=$ENGINE_TEST_CONFIG.broken; [ ! -e $broken ] || { echo tried >> $broken; exit 3; }; \
                ENGINE_TEST_FD=$2 ENGINE_TEST_LIVES=$4 exec \"$ENGINE_TEST_EXE\" --exact role_process --ignored --nocapture";
            backing_image_engine::holder::run(&config, ["sh", "-c", script, "engine"].map(Into::into).to_vec())
        }
    };
    if let Err(error) = result {
        eprintln!("{}", error.chain());
        std::process::exit(1);
    }
    std::process::exit(0);
}

pub fn fio(volume: &Volume, options: &[&str]) -> Command {
    fio_on(volume, volume.loop_device.as_ref().unwrap(), options)
}

pub fn fio_on(volume: &Volume, file: &Path, options: &[&str]) -> Command {
    let mut command = Command::new("fio");
    command.args(["--name=load", "--direct=1", "--ioengine=libaio", "--bs=4k", "--iodepth=16", "--randrepeat=0"]);
    command.arg(format!("--filename={}", file.display()));
    command.args(options).current_dir(volume.folder()).stdin(Stdio::null());
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

pub const VERIFY: [&str; 5] = ["--rw=randwrite", "--size=24M", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1"];

pub struct Volume {
    pub config: Config,
    pub replicas: Vec<Replica>,
    pub holder: Option<Child>,
    pub loop_device: Option<PathBuf>,
    config_path: PathBuf,
    folder: tempfile::TempDir,
}

impl Volume {
    /// Replicas are there, nothing serves yet.
    pub fn new(replicas: usize, size_bytes: u64) -> Volume {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        let replicas: Vec<_> =
            (1..=replicas).map(|number| Replica::create(path, &format!("r{number}"), "vol-1", size_bytes)).collect();
        let address = |replica: &Replica| ReplicaAddress::Directory(replica.directory.clone());
        let config = Config {
            volume: "vol-1".into(),
            size_bytes,
            generation: 0,
            attachment: 0,
            replicas: replicas.iter().map(|r| (r.name.clone(), address(r))).collect::<BTreeMap<_, _>>(),
            read_from: Some("r1".into()),
            compare_replicas: false,
            mount_file: path.join("volume"),
            control_socket: path.join("engine.sock"),
            nbd_socket: path.join("nbd.sock"),
            replica_timeout_ms: 8_000,
            no_replica_hold_ms: 2_000,
            holder_limit_ms: 30_000,
            silence_limit_ms: 10_000,
            replace_engine: true,
            program: None,
            certificates: None,
        };
        let config_path = path.join("engine.json");
        Volume { config, replicas, holder: None, loop_device: None, config_path, folder }
    }

    /// What an engine that starts from now on reads.
    pub fn write_config(&self) {
        std::fs::write(&self.config_path, serde_json::to_vec(&self.config).unwrap()).unwrap();
    }

    /// While this file is there, engines die at once; each leaves a line in it.
    pub fn broken(&self) -> PathBuf {
        self.config_path.with_extension("json.broken")
    }

    pub fn start_holder(&mut self) {
        self.write_config();
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.log_path()).unwrap();
        let exe = std::env::current_exe().unwrap();
        let mut command = Command::new(&exe);
        command.args(["--exact", "role_process", "--ignored", "--nocapture"]);
        command.env("ENGINE_TEST_EXE", &exe).env("ENGINE_TEST_CONFIG", &self.config_path);
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        self.holder = Some(command.spawn().unwrap());
    }

    /// The whole way: holder, engine, loop device.
    pub fn attach(&mut self) -> PathBuf {
        self.start_holder();
        self.wait_serving();
        self.attach_loop()
    }

    pub fn wait_serving(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.try_status().is_none_or(|status| !status.serving) {
            assert!(Instant::now() < deadline, "no engine serves:\n{}", self.log());
            let ended = self.holder.as_mut().unwrap().try_wait().unwrap();
            assert!(ended.is_none(), "the holder ended ({ended:?}):\n{}", self.log());
            std::thread::park_timeout(Duration::from_millis(20));
        }
    }

    pub fn attach_loop(&mut self) -> PathBuf {
        let output = run(Command::new("losetup").args(["--direct-io=on", "--show", "-f"]).arg(&self.config.mount_file));
        let device = PathBuf::from(String::from_utf8(output.stdout).unwrap().trim());
        self.loop_device = Some(device.clone());
        device
    }

    pub fn detach_loop(&mut self) {
        let device = self.loop_device.take().unwrap();
        run(Command::new("losetup").arg("-d").arg(device));
    }

    pub fn try_status(&self) -> Option<Status> {
        control_client::status(&self.config.control_socket, Duration::from_secs(5)).ok()
    }

    pub fn status(&self) -> Status {
        self.try_status().expect("the engine answers")
    }

    pub fn state(&self, replica: &str) -> ReplicaState {
        self.status().replicas[replica]
    }

    /// Ends the engine and waits for the holder; whether that ended well.
    pub fn shutdown(&mut self) -> bool {
        // The loop driver lets go of the file a moment after `losetup -d`.
        let deadline = Instant::now() + Duration::from_secs(60);
        while let Err(error) = control_client::shutdown(&self.config.control_socket, Duration::from_secs(30)) {
            assert!(Instant::now() < deadline, "the engine does not end: {}", error.chain());
            std::thread::park_timeout(Duration::from_millis(20));
        }
        self.wait_holder()
    }

    pub fn wait_holder(&mut self) -> bool {
        let mut holder = self.holder.take().unwrap();
        let mut status = None;
        wait_until("the holder ends", || {
            status = holder.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap().success()
    }

    pub fn is_mounted(&self) -> bool {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        mounts.contains(self.config.mount_file.to_str().unwrap())
    }

    /// Whether the contents of two replicas are the same. Their daemons must have ended.
    pub fn assert_equal(&mut self, a: usize, b: usize) {
        self.replicas[a].kill();
        self.replicas[b].kill();
        let mut compare = Command::new("qemu-img");
        compare.args(["compare", "-f", "qcow2", "-F", "qcow2"]);
        let output = compare.arg(self.replicas[a].head()).arg(self.replicas[b].head()).output().unwrap();
        assert!(output.status.success(), "{}\n{}", String::from_utf8_lossy(&output.stdout), self.log());
    }

    fn log_path(&self) -> PathBuf {
        self.folder.path().join("log")
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The engine process under the holder.
    pub fn engine_pid(&self) -> u32 {
        self.status().pid
    }

    /// Sends it SIGTERM. The test harness runs the role in a second thread, whose signals alone are turned into events.
    pub fn signal_holder(&self) {
        let pid = self.holder.as_ref().unwrap().id();
        let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
        let thread =
            threads.filter_map(|thread| thread.file_name().into_string().ok()?.parse::<u32>().ok()).max().unwrap();
        let kill = format!("python3 -c 'import ctypes; ctypes.CDLL(None).syscall(234, {pid}, {thread}, 15)'");
        assert!(sh(&kill).status.success());
    }

    /// The processes that the holder started, also while none of them serves.
    pub fn engines(&self) -> Vec<u32> {
        children(self.holder.as_ref().unwrap().id())
    }
}

/// Whether a process can still do something.
pub fn is_alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
    stat.is_ok_and(|stat| !matches!(stat.rsplit(") ").next().and_then(|rest| rest.chars().next()), Some('Z' | 'X')))
}

pub fn signal(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

pub fn kill(pid: u32) {
    signal(pid, rustix::process::Signal::KILL);
}

pub fn children(pid: u32) -> Vec<u32> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    lists.flat_map(|list| list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>()).collect()
}

impl Drop for Volume {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- log of holder and engine ---\n{}", self.log());
        }
        // The abort first: whoever waits for the volume gets an error instead of waiting for ever.
        if let Some(mut holder) = self.holder.take() {
            let engines = children(holder.id());
            let _ = holder.kill();
            let _ = holder.wait();
            engines.into_iter().for_each(kill);
        }
        let file = &self.config.mount_file;
        let _ = Command::new("umount").arg("-f").arg(file).stderr(Stdio::null()).status();
        if let Some(device) = self.loop_device.take() {
            let _ = Command::new("losetup").arg("-d").arg(device).status();
        }
        while self.is_mounted() {
            if !Command::new("umount").arg("-l").arg(&self.config.mount_file).status().is_ok_and(|s| s.success()) {
                break;
            }
        }
    }
}

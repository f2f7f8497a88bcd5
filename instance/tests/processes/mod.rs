//! Real replica, holder and engine processes for tests that look at the whole of a volume. Dropping them takes them away.

#![allow(dead_code, reason = "each file of tests uses its part")]

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use backing_image_instance::replica_process::Config as ReplicaConfig;
use proto::engine::{Config, ReplicaAddress, Status};
use proto::replica::{Record, Reply, Request};
use rustix::process::{Pid, Signal, kill_process};

pub const SIZE: u64 = 16 << 20;

pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        std::thread::park_timeout(Duration::from_millis(20)); // poll
    }
}

/// Two neighboring ports that nobody listens on.
pub fn listeners() -> (TcpListener, TcpListener) {
    // Each pair is tried once, so that tests that run at the same time never meet on one.
    static TRIED: AtomicUsize = AtomicUsize::new(0);
    let start = 31_000 + (std::process::id() % 1000) as u16 * 20;
    (0..1000)
        .map(|_| start + TRIED.fetch_add(2, Ordering::SeqCst) as u16)
        .find_map(|port| {
            let pair = (TcpListener::bind(("127.0.0.1", port)), TcpListener::bind(("127.0.0.1", port + 1)));
            if let (Ok(data), Ok(control)) = pair { Some((data, control)) } else { None }
        })
        .expect("two neighboring ports are free")
}

/// The processes that any thread of a process started.
fn children(pid: u32) -> Vec<Pid> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lists = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok());
    let pids: Vec<String> =
        lists.flat_map(|list| list.split_whitespace().map(str::to_owned).collect::<Vec<_>>()).collect();
    pids.iter().filter_map(|pid| Pid::from_raw(pid.parse().ok()?)).collect()
}

pub struct Replica {
    pub listen: SocketAddr,
    pub directory: PathBuf,
    pub process: Child,
}

impl Replica {
    pub fn start(folder: &Path, name: &str, certificates: Option<&Path>) -> Replica {
        let (data, control) = listeners();
        let listen = data.local_addr().unwrap();
        drop((data, control));
        let directory = folder.join(name);
        let config = ReplicaConfig {
            directory: directory.clone(),
            volume: "vol".into(),
            replica: name.into(),
            size_bytes: SIZE,
            image: None,
            listen,
            certificates: certificates.map(Path::to_owned),
        };
        let file = folder.join(format!("{name}.json"));
        std::fs::write(&file, serde_json::to_vec(&config).unwrap()).unwrap();
        let test = std::env::current_exe().unwrap();
        let program = test.parent().unwrap().parent().unwrap().join("examples/replica");
        let process = Command::new(program).args(["replica", "--config"]).arg(&file).spawn().unwrap();
        let replica = Replica { listen, directory, process };
        wait_until("the replica answers", || replica.status().is_some());
        replica
    }

    /// The address of its control protocol.
    pub fn control(&self) -> SocketAddr {
        SocketAddr::new(self.listen.ip(), self.listen.port() + 1)
    }

    /// Asks as the instance role does.
    pub fn ask(&self, request: &Request) -> Option<Reply> {
        let mut stream = runtime::socket::connect_blocking(&self.directory.join("control.sock")).ok()?;
        writeln!(stream, "{}", serde_json::to_string(request).unwrap()).ok()?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).ok()?;
        serde_json::from_str(&line).ok()
    }

    pub fn status(&self) -> Option<(Record, Option<String>)> {
        match self.ask(&Request::Status)? {
            Reply::Status { record, export, .. } => Some((record, export)),
            _ => None,
        }
    }

    /// Its `qemu-storage-daemon`.
    pub fn daemon(&self) -> Pid {
        children(self.process.id())[0]
    }
}

pub struct Engine {
    pub config: Config,
    holder: Child,
    log: PathBuf,
}

impl Engine {
    /// What an engine works on; its folder is made.
    pub fn config<const N: usize>(folder: &Path, name: &str, attachment: u64, replicas: [(&str, String); N]) -> Config {
        let folder = folder.join(name);
        std::fs::create_dir(&folder).unwrap();
        Config {
            volume: "vol".into(),
            size_bytes: SIZE,
            generation: 0,
            attachment,
            replicas: replicas.map(|(name, address)| (name.to_owned(), ReplicaAddress::Tcp(address))).into(),
            read_from: None,
            compare_replicas: false,
            mount_file: folder.join("volume"),
            control_socket: folder.join("control.sock"),
            nbd_socket: folder.join("nbd.sock"),
            replica_timeout_ms: 20_000,
            no_replica_hold_ms: 1_000,
            holder_limit_ms: 4_000,
            silence_limit_ms: 60_000,
            replace_engine: true,
            program: None,
            certificates: None,
        }
    }

    pub fn start<const N: usize>(folder: &Path, name: &str, attachment: u64, replicas: [(&str, String); N]) -> Engine {
        Engine::launch(Engine::config(folder, name, attachment, replicas))
    }

    pub fn launch(config: Config) -> Engine {
        let folder = config.mount_file.parent().unwrap();
        let (file, log) = (folder.join("config.json"), folder.join("log"));
        std::fs::write(&file, serde_json::to_vec(&config).unwrap()).unwrap();
        let output = std::fs::File::create(&log).unwrap();
        let exe = std::env::current_exe().unwrap();
        let mut command = Command::new(&exe);
        command.args(["--exact", "role_process", "--ignored", "--nocapture"]);
        command.env("ENGINE_TEST_EXE", &exe).env("ENGINE_TEST_CONFIG", &file).stdin(Stdio::null());
        let holder = command.stdout(output.try_clone().unwrap()).stderr(output).spawn().unwrap();
        Engine { config, holder, log }
    }

    pub fn status(&self) -> Option<Status> {
        engine::control_client::status(&self.config.control_socket, Duration::from_secs(5)).ok()
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    pub fn wait_until_it_serves(&self, lives: u32) -> Status {
        wait_until("the engine serves", || self.status().is_some_and(|status| status.serving && status.lives == lives));
        self.status().unwrap()
    }

    /// Ends it in order; its holder too.
    pub fn shut_down(&mut self) {
        wait_until("the engine takes its end", || {
            engine::control_client::shutdown(&self.config.control_socket, Duration::from_secs(30)).is_ok()
        });
        assert!(self.holder.wait().unwrap().success());
    }

    /// Holder and engine, at once.
    pub fn kill(&mut self) {
        let children = children(self.holder.id());
        let _ = self.holder.kill();
        let _ = self.holder.wait();
        for pid in children {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- log of an engine ---\n{}", self.log());
        }
        self.kill();
        let _ = Command::new("umount").arg("-l").arg(&self.config.mount_file).stderr(Stdio::null()).status();
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

//! A replica process that tests start, ask and kill.

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use backing_image_instance::replica_process::{Config, Image};
use dataplane::storage_daemon::BaseFormat;
use proto::replica::{Record, Reply, Request};
use std::io::{BufRead, BufReader, Write};
use tempfile::TempDir;

pub const SIZE: u64 = 32 << 20;

pub struct Replica {
    pub config: Config,
    file: PathBuf,
    pub child: Option<Child>,
    _folder: TempDir,
}

fn program() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    test.parent().unwrap().parent().unwrap().join("examples/replica")
}

/// Two free neighbors; others may take them meanwhile, but the range of other tests' listeners is elsewhere.
fn free_address() -> SocketAddr {
    let pair = |port: u16| {
        let (a, b) = (TcpListener::bind(("127.0.0.1", port)), TcpListener::bind(("127.0.0.1", port + 1)));
        a.is_ok() && b.is_ok()
    };
    let start = 20000 + (std::process::id() % 1000) as u16 * 10;
    static NEXT: std::sync::atomic::AtomicU16 = std::sync::atomic::AtomicU16::new(0);
    loop {
        let port = start + 2 * NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        if pair(port) {
            return ([127, 0, 0, 1], port).into();
        }
    }
}

impl Replica {
    pub fn new(base: impl FnOnce(&Path) -> Option<BaseFormat>) -> Replica {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("backing");
        let image = base(&path).map(|format| Image { name: "image".into(), uuid: "0123abcd".into(), path, format });
        // Longer than a socket path may be.
        let directory = folder.path().join("d".repeat(120)).join("replica");
        std::fs::create_dir_all(directory.parent().unwrap()).unwrap();
        let config = Config {
            directory,
            volume: "vol".into(),
            replica: "r1".into(),
            size_bytes: SIZE,
            image,
            listen: free_address(),
            certificates: None,
        };
        let file = folder.path().join("config.json");
        Replica { config, file, child: None, _folder: folder }
    }

    pub fn launch(&mut self) -> Child {
        std::fs::write(&self.file, serde_json::to_vec(&self.config).unwrap()).unwrap();
        let mut command = Command::new(program());
        command.args(["replica", "--config"]).arg(&self.file).stderr(Stdio::piped());
        command.spawn().unwrap()
    }

    pub fn start(&mut self) {
        let mut child = self.launch();
        let deadline = Instant::now() + Duration::from_secs(30);
        while self.try_ask(&Request::Status).is_none() {
            if child.try_wait().unwrap().is_some() {
                panic!("{}", std::io::read_to_string(child.stderr.take().unwrap()).unwrap());
            }
            assert!(Instant::now() < deadline, "the replica does not answer");
            std::thread::yield_now();
        }
        self.child = Some(child);
    }

    /// Starts what must fail and returns what it says.
    pub fn start_fails(&mut self) -> String {
        let mut child = self.launch();
        let deadline = Instant::now() + Duration::from_secs(30);
        while child.try_wait().unwrap().is_none() {
            if Instant::now() > deadline {
                child.kill().unwrap();
            }
            std::thread::park_timeout(Duration::from_millis(20)); // poll
        }
        let output = child.wait_with_output().unwrap();
        assert!(output.status.code().is_some_and(|code| code != 0), "it does not end by itself: {}", output.status);
        String::from_utf8(output.stderr).unwrap()
    }

    pub fn signal(&mut self, signal: rustix::process::Signal) {
        let child = self.child.as_mut().unwrap();
        rustix::process::kill_process(rustix::process::Pid::from_child(child), signal).unwrap();
    }

    pub fn stop(&mut self) {
        self.signal(rustix::process::Signal::TERM);
        assert!(self.child.take().unwrap().wait().unwrap().success());
    }

    pub fn try_ask(&self, request: &Request) -> Option<Reply> {
        let socket = self.config.directory.join("control.sock");
        let mut stream = runtime::socket::connect_blocking(&socket).ok()?;
        stream.write_all(format!("{}\n", serde_json::to_string(request).unwrap()).as_bytes()).ok()?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).ok()?;
        serde_json::from_str(&line).ok()
    }

    pub fn ask(&self, request: Request) -> Reply {
        self.try_ask(&request).unwrap()
    }

    pub fn open(&self, generation: u64) -> String {
        match self.ask(Request::Open { generation, members: vec!["r1".into(), "r2".into()], seen: None }) {
            Reply::Opened { export } => export,
            other => panic!("{other:?}"),
        }
    }

    pub fn refused(&self, request: Request) -> String {
        match self.ask(request) {
            Reply::Refused { message } => message,
            other => panic!("{other:?}"),
        }
    }

    pub fn record(&self) -> Record {
        match self.ask(Request::Status) {
            Reply::Status { record, .. } => record,
            other => panic!("{other:?}"),
        }
    }

    /// Runs commands of qemu-io on an export.
    pub fn io(&self, export: &str, commands: &[&str]) -> (bool, String) {
        let mut command = Command::new("timeout");
        command.args(["20", "qemu-io", "-f", "raw"]);
        for c in commands {
            command.args(["-c", c]);
        }
        let output = command.arg(format!("nbd://{}/{export}", self.config.listen)).output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said).into_owned();
        (output.status.success() && !said.contains("failed"), said)
    }

    pub fn io_ok(&self, export: &str, commands: &[&str]) {
        let (ok, said) = self.io(export, commands);
        assert!(ok, "{said}");
    }

    pub fn daemon(&self) -> rustix::process::Pid {
        let parent = self.child.as_ref().unwrap().id();
        for task in std::fs::read_dir(format!("/proc/{parent}/task")).unwrap() {
            let text = std::fs::read_to_string(task.unwrap().path().join("children")).unwrap();
            if let Some(pid) = text.split_whitespace().next() {
                return rustix::process::Pid::from_raw(pid.parse().unwrap()).unwrap();
            }
        }
        panic!("no daemon")
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// 8 MiB, shorter than the volume; byte 0x11 everywhere.
pub fn raw_base(path: &Path) -> Option<BaseFormat> {
    std::fs::write(path, vec![0x11; 8 << 20]).unwrap();
    Some(BaseFormat::Raw)
}

pub fn qemu_img(args: &[&str]) {
    assert!(Command::new("qemu-img").args(args).stdout(Stdio::null()).status().unwrap().success());
}

//! Roles as processes of their own, on this machine or beside a real API server.
#![allow(dead_code, reason = "each test program uses its part")]

#[path = "../../../sanity-tests/cluster/apiserver.rs"]
mod program;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use program::ApiServer;

pub const PROGRAM: &str = env!("CARGO_BIN_EXE_backing-image-csi");
const LIMIT: Duration = Duration::from_secs(60);

/// A process that ends with the test.
pub struct Process(Child);

impl Process {
    pub fn start(args: &[&str], env: &[(&str, &Path)], log: PathBuf) -> Process {
        let log = std::fs::File::create(log).unwrap();
        let mut command = Command::new(PROGRAM);
        command.args(args).envs(env.iter().copied()).env_remove("KUBERNETES_SERVICE_HOST");
        Process(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub fn wait<T>(what: &str, look: impl FnMut() -> Result<T, String>) -> T {
    wait_for(LIMIT, what, look)
}

pub fn wait_for<T>(limit: Duration, what: &str, mut look: impl FnMut() -> Result<T, String>) -> T {
    let deadline = Instant::now() + limit;
    loop {
        match look() {
            Ok(found) => return found,
            Err(why) => assert!(Instant::now() < deadline, "{what}: {why}"),
        }
        std::thread::sleep(Duration::from_millis(50)); // poll
    }
}

/// An address where nobody listens; the port after it is free, too.
pub fn free_address() -> SocketAddr {
    loop {
        let one = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        if one.port() < 65000 && TcpListener::bind((one.ip(), one.port() + 1)).is_ok() {
            return one;
        }
    }
}

/// Status and body of a request.
pub fn ask(address: SocketAddr, method: &str, path: &str, body: &str) -> Result<(u16, String), String> {
    let mut stream = TcpStream::connect(address).map_err(|e| e.to_string())?;
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let length = body.len();
    let request = format!(
        "{method} {path} HTTP/1.0\r\nHost: test\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
    );
    stream.write_all(request.as_bytes()).map_err(|e| e.to_string())?;
    let mut text = String::new();
    stream.read_to_string(&mut text).map_err(|e| e.to_string())?;
    let (head, body) = text.split_once("\r\n\r\n").ok_or("no head")?;
    let code = head.split(' ').nth(1).and_then(|code| code.parse().ok()).ok_or("no status")?;
    Ok((code, body.to_owned()))
}

pub fn get(address: SocketAddr, path: &str) -> Result<String, String> {
    match ask(address, "GET", path, "")? {
        (200, body) => Ok(body),
        (code, body) => Err(format!("{path}: {code} {body}")),
    }
}

/// An API server that knows our kinds and one node, `machine-1`.
pub struct Cluster {
    pub server: ApiServer,
    folder: tempfile::TempDir,
}

impl Cluster {
    pub fn begin() -> Option<Cluster> {
        let cluster = Cluster { server: ApiServer::begin()?, folder: tempfile::tempdir().unwrap() };
        cluster.kubectl(&["apply", "-f", program::root().join("deploy/crds").to_str().unwrap()], "");
        cluster.kubectl(&["wait", "--for=condition=Established", "crd", "--all"], "");
        cluster.kubectl(&["create", "namespace", "longhorn-system"], "");
        let machine = r#"{"apiVersion":"v1","kind":"Node","metadata":{"name":"machine-1"}}"#;
        cluster.kubectl(&["create", "-f", "-"], machine);
        Some(cluster)
    }

    pub fn path(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    /// The credentials of somebody who may do everything.
    pub fn admin(&self) -> PathBuf {
        self.server.kubeconfig("admin")
    }

    /// What it prints.
    pub fn kubectl(&self, args: &[&str], input: &str) -> String {
        let cache =
            std::env::var_os("CLUSTER_CACHE").map_or_else(|| program::root().join("target/cluster"), PathBuf::from);
        let mut command = Command::new(cache.join("bin/kubectl"));
        command.arg("--kubeconfig").arg(self.admin()).args(args).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "kubectl {args:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn start(&self, name: &str, kubeconfig: &Path, args: &[&str]) -> (Process, SocketAddr) {
        let address = free_address();
        let listen = format!("--listen={address}");
        let args: Vec<&str> = args.iter().copied().chain([listen.as_str()]).collect();
        let log = self.folder.path().join(format!("{name}.log"));
        (Process::start(&args, &[("KUBECONFIG", kubeconfig)], log), address)
    }

    /// The role with these credentials, and where it answers probes.
    pub fn instance(&self, kubeconfig: &Path) -> (Process, SocketAddr) {
        let directory = format!("--directory={}", self.path("instance"));
        self.start("instance", kubeconfig, &["instance", "--node=machine-1", "--ip=127.0.0.1", &directory])
    }

    /// The same of a node plugin of an administrator; its CSI socket is `node.sock`.
    pub fn node(&self) -> (Process, SocketAddr) {
        let socket = format!("--csi-socket={}", self.path("node.sock"));
        self.start("node", &self.admin(), &["node", "--node=machine-1", &socket])
    }

    /// The same of a controller; its CSI socket is `NAME.sock`.
    pub fn controller(&self, name: &str, kubeconfig: &Path) -> (Process, SocketAddr) {
        let webhook = format!("--webhook-listen={}", free_address());
        let socket = format!("--csi-socket={}", self.path(&format!("{name}.sock")));
        let pod = format!("--pod-name={name}");
        self.start(name, kubeconfig, &["controller", &pod, &webhook, &socket, "--image=none"])
    }
}

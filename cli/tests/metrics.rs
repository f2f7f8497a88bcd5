//! Every role, as a process of its own, shows exactly the metrics that are declared for it, and they move.

#[path = "../../sanity-tests/cluster/apiserver.rs"]
mod program;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use api::metrics::{ALL, Kind, Metric, Role};

const PROGRAM: &str = env!("CARGO_BIN_EXE_backing-image-csi");
const LIMIT: Duration = Duration::from_secs(60);
const MIB: usize = 1 << 20;

/// A process that ends with the test.
struct Process(Child);

impl Process {
    fn start(args: &[&str], env: &[(&str, &Path)], log: PathBuf) -> Process {
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

fn wait<T>(what: &str, mut look: impl FnMut() -> Result<T, String>) -> T {
    let deadline = Instant::now() + LIMIT;
    loop {
        match look() {
            Ok(found) => return found,
            Err(why) => assert!(Instant::now() < deadline, "{what}: {why}"),
        }
        std::thread::sleep(Duration::from_millis(50)); // poll
    }
}

/// An address where nobody listens; the port after it is free, too.
fn free_address() -> SocketAddr {
    loop {
        let one = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        if one.port() < 65000 && TcpListener::bind((one.ip(), one.port() + 1)).is_ok() {
            return one;
        }
    }
}

/// Status and body of a request.
fn ask(address: SocketAddr, method: &str, path: &str, body: &str) -> Result<(u16, String), String> {
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

fn get(address: SocketAddr, path: &str) -> Result<String, String> {
    match ask(address, "GET", path, "")? {
        (200, body) => Ok(body),
        (code, body) => Err(format!("{path}: {code} {body}")),
    }
}

/// The figures by name and labels.
fn figures(address: SocketAddr) -> Result<BTreeMap<String, f64>, String> {
    let text = get(address, "/metrics")?;
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    Ok(lines.filter_map(|line| line.rsplit_once(' ')).map(|(name, n)| (name.to_owned(), n.parse().unwrap())).collect())
}

fn figure(address: SocketAddr, name: &str) -> f64 {
    figures(address).unwrap().get(&format!("backing_image_csi_{name}")).copied().unwrap_or(f64::NAN)
}

/// Waits until the sum of the figures whose names begin so is above a number.
fn exceeds(address: SocketAddr, name: &str, least: f64) {
    wait(name, || {
        let figures = figures(address)?;
        let name = format!("backing_image_csi_{name}");
        let sum: f64 = figures.iter().filter(|(n, _)| n.starts_with(&name)).map(|(_, n)| n).sum();
        if sum > least { Ok(()) } else { Err(format!("{sum}, not above {least}")) }
    });
}

/// What a scrape says of itself, in the words of the declarations: kind, labels.
fn shown(text: &str) -> BTreeMap<String, (String, BTreeSet<String>)> {
    let mut families: BTreeMap<String, (String, BTreeSet<String>)> = BTreeMap::new();
    for line in text.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
        let (name, kind) = line.split_once(' ').unwrap();
        families.insert(name.to_owned(), (kind.to_owned(), BTreeSet::new()));
    }
    let mut seen = BTreeSet::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let end = line.find(['{', ' ']).unwrap();
        let sample = &line[..end];
        let suffixes = ["", "_total", "_bucket", "_sum", "_count"];
        let of = suffixes.iter().find_map(|s| sample.strip_suffix(s).filter(|name| families.contains_key(*name)));
        let family = families.get_mut(of.unwrap_or_else(|| panic!("{line} belongs to nothing"))).unwrap();
        seen.insert(of.unwrap().to_owned());
        if let Some((labels, _)) = line[end..].strip_prefix('{').and_then(|rest| rest.split_once('}')) {
            let names = labels.split(',').filter_map(|pair| pair.split_once('=')).map(|(name, _)| name.to_owned());
            family.1.extend(names.filter(|name| name != "le"));
        }
    }
    families.retain(|name, _| seen.contains(name));
    families
}

fn declared(role: Role) -> BTreeMap<String, (String, BTreeSet<String>)> {
    let of = |m: &&Metric| m.roles.contains(&role);
    let say = |m: &Metric| {
        (m.family(), (m.kind.as_str().to_owned(), m.labels.iter().map(|label| (*label).to_owned()).collect()))
    };
    ALL.iter().filter(of).map(say).collect()
}

/// The role lives, is ready, and shows what is declared for it, also before anything happened.
fn check(role: Role, address: SocketAddr) {
    wait("/readyz", || get(address, "/readyz"));
    assert_eq!(get(address, "/healthz").as_deref(), Ok("ok"));
    wait(role.as_str(), || {
        let text = get(address, "/metrics")?;
        let (shown, declared) = (shown(&text), declared(role));
        if shown == declared { Ok(()) } else { Err(format!("shown {shown:#?}, declared {declared:#?}")) }
    });
    let text = get(address, "/metrics").unwrap();
    for metric in ALL.iter().filter(|m| m.roles.contains(&role)) {
        let help = format!("# HELP {} {}.", metric.family(), metric.help);
        assert!(text.lines().any(|line| line == help), "{help} in {text}");
        assert!(metric.kind != Kind::Counter || text.contains(&format!("{}_total", metric.family())), "{text}");
    }
}

/// A standalone instance, which is stopped with everything it started.
struct Standalone(Option<Process>, PathBuf);

impl Drop for Standalone {
    fn drop(&mut self) {
        let stopped = Command::new(PROGRAM).args(["standalone", "stop", "--all", "--data"]).arg(&self.1).output();
        drop(self.0.take());
        assert!(std::thread::panicking() || stopped.unwrap().status.success());
    }
}

#[test]
fn a_standalone_instance_shows_what_is_declared_and_counts() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let address = free_address();
    let listen = format!("--listen={address}");
    let args = ["standalone", &listen, "--nodes=2", "--data", data.to_str().unwrap()];
    let process = Process::start(&args, &[], folder.path().join("log"));
    let _standalone = Standalone(Some(process), data);
    check(Role::Standalone, address);
    assert_eq!(figure(address, "leader"), 1.0);
    assert!(figure(address, r#"disk_capacity_bytes{node="node-2",disk="disk-1"}"#) > 0.0);

    let class = r#"{"apiVersion":"storage.k8s.io/v1","kind":"StorageClass","metadata":{"name":"c"},
        "provisioner":"driver.longhorn.io","parameters":{"backingImage":"nobody"}}"#;
    let claim = r#"{"apiVersion":"v1","kind":"PersistentVolumeClaim","metadata":{"name":"p","namespace":"default"},
        "spec":{"storageClassName":"c","accessModes":["ReadWriteOnce"],"resources":{"requests":{"storage":"1Gi"}}}}"#;
    // Nobody listens there.
    let image = r#"{"apiVersion":"longhorn.io/v1beta2","kind":"BackingImage","metadata":{"name":"img","namespace":"longhorn-system"},
        "spec":{"sourceType":"download","sourceParameters":{"url":"http://127.0.0.1:9/i.raw"}}}"#;
    for (path, body) in [
        ("/apis/storage.k8s.io/v1/storageclasses", class),
        ("/api/v1/namespaces/default/persistentvolumeclaims", claim),
        ("/apis/longhorn.io/v1beta2/namespaces/longhorn-system/backingimages", image),
    ] {
        let (code, answer) = ask(address, "POST", path, body).unwrap();
        assert_eq!(code, 201, "{answer}");
    }
    exceeds(address, r#"calls_total{method="CreateVolume",code="#, 0.0);
    exceeds(address, r#"call_seconds_count{method="CreateVolume"}"#, 0.0);
    exceeds(address, r#"reconcile_passes_total{kind="image",outcome="ok"}"#, 0.0);
    exceeds(address, r#"workloads{state="running"}"#, 0.0);
    exceeds(address, r#"store_objects{kind="events"}"#, 0.0);
    assert_eq!(figure(address, r#"store_objects{kind="storageclasses.storage.k8s.io"}"#), 1.0);
    // No label has a value that only one volume, image or claim has.
    let text = get(address, "/metrics").unwrap();
    assert!(!text.contains("=\"img\"") && !text.contains("=\"p\"") && !text.contains("pvc-"), "{text}");
}

/// Serves a file of a MiB to whoever asks, again and again.
fn serve_file() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut head = vec![];
            while !head.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                if !stream.read(&mut byte).is_ok_and(|n| n == 1) {
                    break;
                }
                head.push(byte[0]);
            }
            let _ = write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {MIB}\r\nConnection: close\r\n\r\n");
            let _ = stream.write_all(&vec![7; MIB]);
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread")]
async fn agents_show_what_is_declared_and_count_bytes_and_copies() {
    use proto::bimrpc::backing_image_manager_service_client::BackingImageManagerServiceClient;
    use proto::bimrpc::{BackingImageSpec, FetchRequest};
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    std::fs::create_dir(&disk).unwrap();
    let config = r#"{"diskName":"disk-1","diskUUID":"disk-uuid","diskDriver":"","state":"ready"}"#;
    std::fs::write(disk.join("longhorn-disk.cfg"), config).unwrap();
    let (manager, source) = (free_address(), free_address());
    let disk = disk.to_str().unwrap();
    let listen = format!("--listen={manager}");
    let args = ["backing-image-manager", "daemon", &listen, "--disk-path", disk];
    let _manager = Process::start(&args, &[], folder.path().join("manager.log"));
    let metrics = SocketAddr::new(manager.ip(), manager.port() + 1);
    check(Role::Manager, metrics);
    assert_eq!(figure(metrics, r#"copies{state="ready"}"#), 0.0);

    let (listen, url) = (format!("--listen={source}"), format!("--parameters=url=http://{}/i.raw", serve_file()));
    let args =
        ["data-source", &listen, "--name=img", "--uuid=0a1b2c3d", "--source-type=download", &url, "--disk-path", disk];
    let _source = Process::start(&args, &[], folder.path().join("source.log"));
    check(Role::DataSource, source);
    wait("prepared", || {
        let status = get(source, "/v1/file")?;
        if status.contains("ready-for-transfer") { Ok(()) } else { Err(status) }
    });
    assert_eq!(figure(source, "received_bytes_total"), MIB as f64);
    assert_eq!(figure(source, "written_bytes_total"), MIB as f64);
    assert_eq!(figure(source, "transfer_retries_total"), 0.0);

    let mut client = BackingImageManagerServiceClient::connect(format!("http://{manager}")).await.unwrap();
    let spec = BackingImageSpec { name: "img".into(), uuid: "0a1b2c3d".into(), size: MIB as i64, ..Default::default() };
    client.fetch(FetchRequest { spec: Some(spec), data_source_address: source.to_string() }).await.unwrap();
    exceeds(metrics, r#"copies{state="ready"}"#, 0.0);
}

#[test]
#[ignore = "needs a kube-apiserver: make cluster-test"]
fn the_roles_of_a_cluster_show_what_is_declared_once_they_are_ready() {
    let Some(server) = program::ApiServer::begin() else { return };
    let cache = std::env::var_os("CLUSTER_CACHE").map_or_else(|| program::root().join("target/cluster"), PathBuf::from);
    let kubeconfig = server.kubeconfig("admin");
    let kubectl = |args: &[&str], input: &str| {
        let mut command = Command::new(cache.join("bin/kubectl"));
        let mut child = command.arg("--kubeconfig").arg(&kubeconfig).args(args).stdin(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        assert!(child.wait().unwrap().success(), "kubectl {args:?}");
    };
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let log = |name: &str| folder.path().join(name);
    let env = [("KUBECONFIG", kubeconfig.as_path())];
    let [controller, node, instance, webhook] = [(); 4].map(|()| free_address());
    kubectl(&["apply", "-f", program::root().join("deploy/crds").to_str().unwrap()], "");
    kubectl(&["wait", "--for=condition=Established", "crd", "--all"], "");
    kubectl(&["create", "namespace", "longhorn-system"], "");
    kubectl(&["create", "-f", "-"], r#"{"apiVersion":"v1","kind":"Node","metadata":{"name":"machine-1"}}"#);

    let listen = format!("--listen={instance}");
    let directory = format!("--directory={}", path("instance"));
    let args = ["instance", "--node=machine-1", "--ip=127.0.0.1", &listen, &directory];
    let _instance = Process::start(&args, &env, log("instance.log"));
    // A disk, so that there is something to show.
    let disk = path("disk");
    std::fs::create_dir(&disk).unwrap();
    let patch = format!(r#"{{"spec":{{"disks":{{"disk-1":{{"path":"{disk}","allowScheduling":true}}}}}}}}"#);
    wait("/readyz", || get(instance, "/readyz"));
    let args = ["-n", "longhorn-system", "patch", "nodes.longhorn.io", "machine-1", "--type=merge", "-p", &patch];
    kubectl(&args, "");

    let listen = format!("--listen={node}");
    let socket = format!("--csi-socket={}", path("node.sock"));
    let _node = Process::start(&["node", "--node=machine-1", &listen, &socket], &env, log("node.log"));
    let (listen, webhook) = (format!("--listen={controller}"), format!("--webhook-listen={webhook}"));
    let socket = format!("--csi-socket={}", path("controller.sock"));
    let args = ["controller", "--pod-name=c", &listen, &webhook, &socket, "--image=none"];
    let _controller = Process::start(&args, &env, log("controller.log"));
    let shown = |name: &str| std::fs::read_to_string(log(name)).unwrap_or_default();
    for (role, address, name) in [
        (Role::Node, node, "node.log"),
        (Role::Controller, controller, "controller.log"),
        (Role::Instance, instance, "instance.log"),
    ] {
        eprintln!("{}: {}", role.as_str(), shown(name));
        check(role, address);
    }
    exceeds(controller, "leader", 0.0);
    // It is the one that tells: of the node, here.
    wait("an event", || {
        let mut command = Command::new(cache.join("bin/kubectl"));
        let args = ["-n", "longhorn-system", "describe", "nodes.longhorn.io", "machine-1"];
        let text = command.arg("--kubeconfig").arg(&kubeconfig).args(args).output().unwrap().stdout;
        let text = String::from_utf8_lossy(&text).into_owned();
        if text.contains("backing-image-csi-controller") { Ok(()) } else { Err(text) }
    });
}

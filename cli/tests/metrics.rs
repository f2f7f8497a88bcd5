//! Every role, as a process of its own, shows exactly the metrics that are declared for it, and they move.

mod roles;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::Command;

use api::metrics::{ALL, Kind, Metric, Role};
use roles::{Cluster, PROGRAM, Process, ask, free_address, get, wait};

const MIB: usize = 1 << 20;

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
    let (name, own) = (["--name=img", "--uuid=0a1b2c3d"], "--allowed-source-addresses=127.0.0.1");
    let args = ["data-source", &listen, name[0], name[1], "--source-type=download", &url, own, "--disk-path", disk];
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
    let Some(cluster) = Cluster::begin() else { return };
    let (_instance, instance) = cluster.instance(&cluster.admin());
    // A disk, so that there is something to show.
    let disk = cluster.path("disk");
    std::fs::create_dir(&disk).unwrap();
    let patch = format!(r#"{{"spec":{{"disks":{{"disk-1":{{"path":"{disk}","allowScheduling":true}}}}}}}}"#);
    wait("/readyz", || get(instance, "/readyz"));
    let args = ["-n", "longhorn-system", "patch", "nodes.longhorn.io", "machine-1", "--type=merge", "-p", &patch];
    cluster.kubectl(&args, "");

    let (_node, node) = cluster.node();
    let (_controller, controller) = cluster.controller("c", &cluster.admin());
    for (role, address) in [(Role::Node, node), (Role::Controller, controller), (Role::Instance, instance)] {
        check(role, address);
    }
    exceeds(controller, "leader", 0.0);
    // It is the one that tells: of the node, here.
    wait("an event", || {
        let text = cluster.kubectl(&["-n", "longhorn-system", "describe", "nodes.longhorn.io", "machine-1"], "");
        if text.contains("backing-image-csi-controller") { Ok(()) } else { Err(text) }
    });
}

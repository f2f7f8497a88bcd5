//! Several engines on the same real replica processes: never does each go on with a part of them.

mod engine_role;

use std::io::{BufRead, BufReader, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use backing_image_instance::replica_process::Config as ReplicaConfig;
use proto::engine::{Config, ReplicaAddress, Status};
use proto::replica::{Record, Reply, Request};

const SIZE: u64 = 16 << 20;

/// Not a test: what the holder and engine processes of the test run.
#[test]
#[ignore = "a role for the processes that the test starts"]
fn role_process() {
    runtime::log::init(runtime::log::Format::Text, "info");
    engine_role::run();
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

/// Two neighboring ports that nobody listens on.
fn listeners() -> (TcpListener, TcpListener) {
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

struct Replica {
    listen: SocketAddr,
    process: Child,
}

impl Replica {
    fn start(folder: &Path, name: &str) -> Replica {
        let (data, control) = listeners();
        let listen = data.local_addr().unwrap();
        drop((data, control));
        let config = ReplicaConfig {
            directory: folder.join(name),
            volume: "vol".into(),
            replica: name.into(),
            size_bytes: SIZE,
            image: None,
            listen,
        };
        let file = folder.join(format!("{name}.json"));
        std::fs::write(&file, serde_json::to_vec(&config).unwrap()).unwrap();
        let test = std::env::current_exe().unwrap();
        let program = test.parent().unwrap().parent().unwrap().join("examples/replica");
        let process = Command::new(program).args(["replica", "--config"]).arg(&file).spawn().unwrap();
        let replica = Replica { listen, process };
        wait_until("the replica answers", || replica.status().is_some());
        replica
    }

    fn status(&self) -> Option<(Record, Option<String>)> {
        let mut stream = TcpStream::connect((self.listen.ip(), self.listen.port() + 1)).ok()?;
        writeln!(stream, "{}", serde_json::to_string(&Request::Status).unwrap()).ok()?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).ok()?;
        match serde_json::from_str(&line).ok()? {
            Reply::Status { record, export, .. } => Some((record, export)),
            _ => None,
        }
    }

    /// Another way to it, on which `Open` waits for the gate.
    fn behind(&self, gate: &Arc<Gate>) -> String {
        let (data, control) = listeners();
        let address = data.local_addr().unwrap().to_string();
        let (far, gate) = (self.listen, gate.clone());
        std::thread::spawn(move || {
            for near in data.incoming().flatten() {
                relay(near, far, None);
            }
        });
        std::thread::spawn(move || {
            for near in control.incoming().flatten() {
                relay(near, SocketAddr::new(far.ip(), far.port() + 1), Some(gate.clone()));
            }
        });
        address
    }
}

/// Where engines wait before they open a replica.
#[derive(Default)]
struct Gate {
    waiting: AtomicUsize,
    is_open: AtomicBool,
}

fn relay(near: TcpStream, far: SocketAddr, gate: Option<Arc<Gate>>) {
    let Ok(far) = TcpStream::connect(far) else { return };
    let (mut answers, mut back) = (far.try_clone().unwrap(), near.try_clone().unwrap());
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut answers, &mut back);
        let _ = back.shutdown(Shutdown::Both);
    });
    std::thread::spawn(move || {
        let (mut near, mut far) = (near, far);
        let Some(gate) = gate else {
            let _ = std::io::copy(&mut near, &mut far);
            let _ = far.shutdown(Shutdown::Both);
            return;
        };
        for line in BufReader::new(near).lines().map_while(Result::ok) {
            if line.contains("\"open\"") {
                gate.waiting.fetch_add(1, Ordering::SeqCst);
                wait_until("the gate opens", || gate.is_open.load(Ordering::SeqCst));
            }
            if writeln!(far, "{line}").is_err() {
                break;
            }
        }
        let _ = far.shutdown(Shutdown::Both);
    });
}

struct Engine {
    config: Config,
    holder: Child,
    log: PathBuf,
}

impl Engine {
    fn start<const N: usize>(folder: &Path, name: &str, attachment: u64, replicas: [(&str, String); N]) -> Engine {
        let folder = folder.join(name);
        std::fs::create_dir(&folder).unwrap();
        let config = Config {
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
        };
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

    fn status(&self) -> Option<Status> {
        engine::control_client::status(&self.config.control_socket, Duration::from_secs(5)).ok()
    }

    fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    fn wait_until_it_serves(&self, lives: u32) -> Status {
        wait_until("the engine serves", || self.status().is_some_and(|status| status.serving && status.lives == lives));
        self.status().unwrap()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- log of an engine ---\n{}", self.log());
        }
        let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", self.holder.id()));
        let threads = std::fs::read_dir(format!("/proc/{}/task", self.holder.id())).into_iter().flatten().flatten();
        let lists = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok());
        let children = lists.fold(children.unwrap_or_default(), |all, list| all + " " + &list);
        let _ = self.holder.kill();
        let _ = self.holder.wait();
        for pid in children.split_whitespace().filter_map(|pid| rustix::process::Pid::from_raw(pid.parse().ok()?)) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
        let _ = Command::new("umount").arg("-l").arg(&self.config.mount_file).stderr(Stdio::null()).status();
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn two_engines_that_start_at_once_never_share_the_replicas_out() {
    let folder = tempfile::tempdir().unwrap();
    let replicas = ["r1", "r2"].map(|name| Replica::start(folder.path(), name));
    let (own, other) = (Arc::new(Gate::default()), Arc::new(Gate::default()));
    // Each comes to its own replica first, with the same generation and the same members.
    let first = [("r1", replicas[0].behind(&own)), ("r2", replicas[1].behind(&other))];
    let second = [("r1", replicas[0].behind(&other)), ("r2", replicas[1].behind(&own))];
    let (first, second) = (Engine::start(folder.path(), "a", 0, first), Engine::start(folder.path(), "b", 0, second));
    wait_until("both have chosen", || [&own, &other].iter().all(|gate| gate.waiting.load(Ordering::SeqCst) == 2));
    own.is_open.store(true, Ordering::SeqCst);
    wait_until("each has opened one", || {
        replicas.iter().all(|r| r.status().is_some_and(|(record, export)| record.generation == 1 && export.is_some()))
    });
    other.is_open.store(true, Ordering::SeqCst);
    let words = "another engine raised the generation at the same time";
    wait_until("each has met the other", || first.log().contains(words) && second.log().contains(words));
    // One of them gets both in the end; the other one has none.
    let engines = [&first, &second];
    let serves = |engine: &&Engine| engine.status().is_some_and(|status| status.serving && status.faulted.is_none());
    wait_until("one engine has all replicas", || {
        assert!(
            replicas.iter().filter_map(Replica::status).all(|(record, _)| record.members == ["r1", "r2"]),
            "an engine went on with a part:\n{}\n{}",
            first.log(),
            second.log()
        );
        let lost = |engine: &&Engine| engine.status().is_some_and(|status| status.faulted.is_some());
        engines.iter().filter(|e| serves(e)).count() == 1 && engines.iter().filter(|e| lost(e)).count() == 1
    });
    let records = replicas.iter().filter_map(Replica::status).map(|(record, _)| record.generation);
    let records: Vec<u64> = records.collect();
    let winner = engines.into_iter().find(|e| serves(e)).unwrap().status().unwrap();
    assert_eq!(records, [winner.generation, winner.generation]);
}

#[test]
fn the_next_engine_of_an_attachment_is_no_rival_and_one_of_a_newer_attachment_is() {
    let folder = tempfile::tempdir().unwrap();
    let replicas = ["r1", "r2"].map(|name| Replica::start(folder.path(), name));
    let address = |replica: usize| replicas[replica].listen.to_string();
    let recorded = |replica: usize| replicas[replica].status().unwrap().0;
    let first = Engine::start(folder.path(), "a", 1, [("r1", address(0)), ("r2", address(1))]);
    let status = first.wait_until_it_serves(1);
    assert_eq!(status.generation, 1_000_001);
    let pid = rustix::process::Pid::from_raw(status.pid as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let status = first.wait_until_it_serves(2);
    let left = [recorded(0), recorded(1)];
    assert!(left.iter().all(|record| record.generation == status.generation && record.members == ["r1", "r2"]));
    assert_eq!(status.generation / 1_000_000, 1, "an attachment keeps to its own generations");

    let file = std::fs::OpenOptions::new().write(true).open(&first.config.mount_file).unwrap();
    // The node of the first one is said to be gone, and its replica with it; it lives, and reaches both.
    let second = Engine::start(folder.path(), "b", 2, [("r2", address(1))]);
    assert_eq!(second.wait_until_it_serves(1).generation, 2_000_001);
    let written = std::os::unix::fs::FileExt::write_at(&file, &[7; 4096], 0);
    assert!(written.is_err(), "it was acknowledged although another attachment has the volume");
    assert!(first.log().contains("attachment 2 has taken the volume over from this one (1)"), "{}", first.log());
    // It never went on with the one that was left to it.
    assert_eq!((recorded(0).generation, recorded(0).members), (left[0].generation, left[0].members.clone()));
    // Nor does it come out on top again.
    assert!(second.status().is_some_and(|status| status.serving && status.faulted.is_none()));
    assert_eq!(recorded(1).generation, 2_000_001);
}

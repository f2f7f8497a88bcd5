//! Mutual TLS between real engines and real replicas: bytes, broken connections, and who gets nothing.

#[path = "../../runtime/tests/authority/mod.rs"]
mod authority;
mod engine_role;
mod processes;

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ::engine::nbd::client::open_export;
use ::engine::nbd::wire;
use ::engine::stream::{Service, Stream};
use authority::Authority;
use processes::{Engine, Replica, SIZE, wait_until};
use proto::engine::{ReplicaAddress, ReplicaState};
use proto::replica::{Reply, Request};
use runtime::transport::{Identity, PEER_NAME, Protocol, Security};
use rustix::process::{Pid, Signal, kill_process};
use rustls::pki_types::pem::PemObject;

const LIMIT: Duration = Duration::from_secs(30);
const STEP: usize = 256 << 10;

/// Not a test: what the holder and engine processes of the test run.
#[test]
#[ignore = "a role for the processes that the test starts"]
fn role_process() {
    runtime::log::init(runtime::log::Format::Text, "info");
    engine_role::run();
}

/// Certificates in a directory of their own.
fn issue(authority: &Authority, folder: &Path, name: &str) -> PathBuf {
    let directory = folder.join(name);
    std::fs::create_dir(&directory).unwrap();
    authority.issue(&directory);
    directory
}

fn engine<const N: usize>(folder: &Path, name: &str, certificates: &Path, replicas: [(&str, String); N]) -> Engine {
    let attachment = 1;
    let config = Engine::config(folder, name, attachment, replicas);
    Engine::launch(proto::engine::Config { certificates: Some(certificates.to_owned()), ..config })
}

fn open(engine: &Engine) -> File {
    OpenOptions::new().read(true).write(true).open(&engine.config.mount_file).unwrap()
}

fn pattern(seed: u32) -> Vec<u8> {
    (0..SIZE as u32).map(|at| ((at ^ seed).wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

fn write(file: &File, bytes: &[u8]) {
    file.write_all_at(bytes, 0).unwrap();
    file.sync_all().unwrap();
    assert!(read(file) == bytes, "it reads something else than was written");
}

fn read(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; SIZE as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// Numbers of the sockets of a process.
fn sockets(pid: Pid) -> BTreeSet<String> {
    let open = std::fs::read_dir(format!("/proc/{}/fd", pid.as_raw_nonzero())).into_iter().flatten().flatten();
    let names = open.filter_map(|file| std::fs::read_link(file.path()).ok()?.into_os_string().into_string().ok());
    names.filter_map(|name| Some(name.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned())).collect()
}

fn has_tcp(pid: Pid) -> bool {
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"].map(|table| std::fs::read_to_string(table).unwrap_or_default());
    let own = sockets(pid);
    assert!(!own.is_empty());
    tables
        .iter()
        .flat_map(|table| table.lines())
        .any(|line| line.split_whitespace().nth(9).is_some_and(|n| own.contains(n)))
}

#[test]
fn a_volume_over_mutual_tls_keeps_its_bytes_while_replicas_are_killed() {
    let folder = tempfile::tempdir().unwrap();
    let certificates = issue(&Authority::new(), folder.path(), "certificates");
    let names = ["r1", "r2", "r3"];
    let mut replicas = names.map(|name| Replica::start(folder.path(), name, Some(&certificates)));
    let ways = [0, 1, 2].map(|index: usize| (names[index], replicas[index].listen.to_string()));
    let mut engine = engine(folder.path(), "engine", &certificates, ways);
    let status = engine.wait_until_it_serves(1);
    assert!(status.replicas.values().all(|state| *state == ReplicaState::InSync), "{status:?}");
    let file = open(&engine);
    write(&file, &pattern(1));

    // Nothing is under way when they go, so no deadline passes: the end of a connection is what tells.
    let is_dropped = |name: &str| engine.status().is_some_and(|s| s.replicas[name] == ReplicaState::Dropped);
    kill_process(replicas[0].daemon(), Signal::KILL).unwrap();
    wait_until("the lost daemon is noticed", || is_dropped("r1"));
    write(&file, &pattern(2));
    replicas[1].process.kill().unwrap();
    wait_until("the lost process is noticed", || is_dropped("r2"));
    assert!(read(&file) == pattern(2));
    write(&file, &pattern(3));
    drop(file);

    engine.shut_down();
    let (record, export) = replicas[2].status().unwrap();
    assert!(record.clean && record.members == ["r3"] && export.is_none(), "{record:?}");
    let [.., last] = replicas;
    let (head, raw) = (last.directory.join("volume-head.qcow2"), folder.path().join("raw"));
    drop(last);
    let lock = File::open(folder.path().join("r3/lock")).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let convert = ["convert", "-f", "qcow2", "-O", "raw"];
    assert!(Command::new("qemu-img").args(convert).args([&head, &raw]).status().unwrap().success());
    assert!(std::fs::read(raw).unwrap() == pattern(3));
}

#[test]
fn the_connection_of_a_killed_engine_ends_and_the_next_one_finds_its_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let certificates = issue(&Authority::new(), folder.path(), "certificates");
    let replica = Replica::start(folder.path(), "r1", Some(&certificates));
    let way = || [("r1", replica.listen.to_string())];
    let idle = sockets(replica.daemon());
    let mut first = engine(folder.path(), "first", &certificates, way());
    first.wait_until_it_serves(1);
    let file = open(&first);
    write(&file, &pattern(1));
    assert_eq!(sockets(replica.daemon()).len(), idle.len() + 1, "one connection");
    first.kill();
    wait_until("the daemon has lost its engine", || sockets(replica.daemon()) == idle);
    drop(file);

    let config = Engine::config(folder.path(), "second", 2, way());
    let second = Engine::launch(proto::engine::Config { certificates: Some(certificates.clone()), ..config });
    second.wait_until_it_serves(1);
    assert!(read(&open(&second)) == pattern(1));
    // What it left does not come later either: its export is gone.
    let (_, export) = replica.status().unwrap();
    assert_eq!(export.as_deref(), Some("vol-2000001"));
}

/// A connection to an export through both relays.
struct Export(UnixStream);

impl Export {
    fn open(replica: &Replica, certificates: &Path, name: &str) -> Export {
        let security = Security::from_directory(Some(certificates)).unwrap();
        let mut stream = security.tunnel().unwrap().open(connect(replica.listen), LIMIT).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        assert_eq!(open_export(&mut stream, name).unwrap(), SIZE);
        Export(stream)
    }

    fn write_request(offset: u64, bytes: &[u8]) -> Vec<u8> {
        let length = bytes.len() as u32;
        let request = wire::Request { flags: 0, command: wire::CMD_WRITE, cookie: offset, offset, length };
        [&request.encode()[..], bytes].concat()
    }

    fn ask(&mut self, request: &[u8], answer: &mut [u8]) {
        self.0.write_all(request).unwrap();
        let mut reply = [0; wire::REPLY_LENGTH];
        self.0.read_exact(&mut reply).unwrap();
        assert_eq!(wire::parse_reply(&reply).unwrap().0, 0);
        self.0.read_exact(answer).unwrap();
    }

    fn fill(&mut self, byte: u8) {
        (0..SIZE).step_by(STEP).for_each(|at| self.ask(&Export::write_request(at, &[byte; STEP]), &mut []));
    }

    fn holds_only(&mut self, byte: u8) -> bool {
        (0..SIZE).step_by(STEP).all(|at| {
            let (length, cookie) = (STEP as u32, at);
            let request = wire::Request { flags: 0, command: wire::CMD_READ, cookie, offset: at, length };
            let mut bytes = vec![0; STEP];
            self.ask(&request.encode(), &mut bytes);
            bytes.iter().all(|b| *b == byte)
        })
    }
}

/// What an engine had sent waits in both relays when another one opens the replica.
#[test]
fn what_an_ended_export_did_not_take_is_never_written() {
    let folder = tempfile::tempdir().unwrap();
    let certificates = issue(&Authority::new(), folder.path(), "certificates");
    let replica = Replica::start(folder.path(), "r1", Some(&certificates));
    let open = |generation| {
        let members = vec!["r1".to_owned()];
        match replica.ask(&Request::Open { generation, members, seen: None }) {
            Some(Reply::Opened { export }) => Export::open(&replica, &certificates, &export),
            other => panic!("{other:?}"),
        }
    };
    let mut old = open(1);
    kill_process(replica.daemon(), Signal::STOP).unwrap();
    // Until nothing more is taken for a while: relays and sockets have their bounds.
    old.0.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
    let mut sent = 0;
    while old.0.write_all(&Export::write_request(sent % SIZE, &[7; STEP])).is_ok() {
        sent += STEP as u64;
        assert!(sent < 64 << 20, "{sent} bytes were taken although nobody reads");
    }
    assert!(sent > STEP as u64, "something is on its way");
    let mut new = std::thread::scope(|scope| {
        let new = scope.spawn(|| open(2));
        kill_process(replica.daemon(), Signal::CONT).unwrap();
        new.join().unwrap()
    });
    new.fill(9);
    let ended = io::copy(&mut old.0, &mut io::sink());
    assert!(!ended.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock), "it was not told");
    // The two directions of a relay end one after the other.
    wait_until("nothing more is taken", || old.0.write_all(&[0; 1]).is_err());
    assert!(new.holds_only(9), "the old engine wrote after the new one had begun");
}

/// What a caller gets for `request`, which is sent at once.
fn get(mut stream: impl Read + Write, request: &[u8]) -> io::Result<Vec<u8>> {
    stream.write_all(request)?;
    stream.flush()?;
    let mut said = vec![0; 4096];
    let count = stream.read(&mut said)?;
    said.truncate(count);
    Ok(said)
}

fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream
}

/// Believes the authority and shows nothing.
fn anonymous(authority: &Authority, stream: TcpStream) -> impl Read + Write {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(rustls::pki_types::CertificateDer::from_pem_slice(authority.pem().as_bytes()).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let config = config.with_root_certificates(roots).with_no_client_auth();
    let session = rustls::ClientConnection::new(Arc::new(config), PEER_NAME.try_into().unwrap()).unwrap();
    rustls::StreamOwned::new(session, stream)
}

/// A busy replica takes the connection at once, and its turn to answer comes later.
#[test]
fn a_handshake_may_take_longer_than_a_connection() {
    let member = Authority::new().member();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    // Its control service is at the next port.
    let address = ReplicaAddress::Tcp(format!("127.0.0.1:{}", port - 1));
    let deadline = Instant::now() + Duration::from_millis(200);
    let security = member.clone();
    let connected = std::thread::spawn(move || {
        Stream::connect_and_secure(&address, Service::Control, &security, deadline, LIMIT).map(drop)
    });
    while Instant::now() < deadline {
        std::thread::park_timeout(Duration::from_millis(10)); // poll
    }
    listener.set_nonblocking(true).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut listener = member.listen_on(listener.into(), Protocol::Lines).unwrap();
        tokio::time::timeout(LIMIT, listener.next()).await.expect("it is still there");
    });
    connected.join().unwrap().unwrap();
}

#[test]
fn strangers_get_nothing_from_the_ports_of_a_replica() {
    let folder = tempfile::tempdir().unwrap();
    let (authority, stranger) = (Authority::new(), Authority::new());
    let certificates = issue(&authority, folder.path(), "certificates");
    let replica = Replica::start(folder.path(), "r1", Some(&certificates));
    let way = || [("r1", replica.listen.to_string())];
    let ports =
        [(replica.listen, &b"IHAVEOPT"[..], "NBDMAGIC"), (replica.control(), b"{\"request\":\"status\"}\n", "record")];
    let silent = ports.map(|(address, ..)| connect(address));

    // Engines that do not belong here do not begin.
    let strange = issue(&stranger, folder.path(), "strange");
    let strange = engine(folder.path(), "of-another-authority", &strange, way());
    let plain = Engine::start(folder.path(), "plain", 1, way());
    for outsider in [&strange, &plain] {
        wait_until("it has no replica", || outsider.log().contains("no replica to start with"));
    }
    assert!(strange.log().contains("invalid peer certificate"), "{}", strange.log());
    let (record, export) = replica.status().unwrap();
    assert_eq!((record.generation, export), (0, None));

    let own = engine(folder.path(), "own", &certificates, way());
    own.wait_until_it_serves(1);
    let file = open(&own);
    write(&file, &pattern(1));
    let half = Security::mutual(&authority.pem(), &stranger.identity(PEER_NAME)).unwrap();
    for (address, request, greeting) in ports {
        let member = authority.member().secure(connect(address)).unwrap();
        let said = get(member, request).unwrap();
        assert!(String::from_utf8_lossy(&said).contains(greeting), "the question is right: {said:?}");
        let plain = get(connect(address), request).unwrap_or_default();
        assert!(!String::from_utf8_lossy(&plain).contains(greeting), "{plain:?}");
        let shown = [
            get(anonymous(&authority, connect(address)), request),
            get(half.secure(connect(address)).unwrap(), request),
            get(stranger.member().secure(connect(address)).unwrap(), request),
        ];
        for said in shown {
            assert!(said.as_ref().is_err_and(|error| error.kind() != io::ErrorKind::WouldBlock), "{said:?}");
        }
    }
    // Nor is there another way to the data: the daemon has no port, and its socket is for this user.
    assert!(!has_tcp(replica.daemon()));
    let socket = std::fs::metadata(replica.directory.join("nbd.sock")).unwrap();
    assert_eq!(socket.permissions().mode() & 0o7777, 0o600);
    for mut stream in silent {
        let said = stream.read(&mut [0; 16]);
        let ended = matches!(said, Ok(0)) || said.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::ConnectionReset);
        assert!(ended, "who says nothing keeps its place: {said:?}");
    }
    write(&file, &pattern(2));
}

#[test]
fn a_replica_that_does_not_shake_hands_is_left_in_time() {
    let folder = tempfile::tempdir().unwrap();
    let certificates = issue(&Authority::new(), folder.path(), "certificates");
    let replica = Replica::start(folder.path(), "r1", Some(&certificates));
    // The kernel accepts, and nobody says anything.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let silent = [silent, silent + 1].map(|port| TcpListener::bind(("127.0.0.1", port)).unwrap());
    let address = silent[0].local_addr().unwrap();
    let ways = [("r1", replica.listen.to_string()), ("r2", address.to_string())];
    let config = Engine::config(folder.path(), "engine", 1, ways);
    let certificates = Some(certificates);
    let engine = Engine::launch(proto::engine::Config { certificates, replica_timeout_ms: 1_000, ..config });
    let status = engine.wait_until_it_serves(1);
    assert_eq!(status.replicas["r2"], ReplicaState::Dropped);
    assert!(status.replica_errors["r2"].contains("TLS handshake"), "{status:?}");
}

#[test]
fn who_has_no_usable_certificates_says_which_file_is_missing() {
    let folder = tempfile::tempdir().unwrap();
    let certificates = issue(&Authority::new(), folder.path(), "certificates");
    let key = certificates.join("tls.key");
    std::fs::remove_file(&key).unwrap();
    let engine = engine(folder.path(), "engine", &certificates, [("r1", "127.0.0.1:1".into())]);
    wait_until("the engine says why", || engine.log().contains(key.to_str().unwrap()));
    assert!(engine.log().contains("the certificates of the engine of volume `vol` cannot be used"), "{}", engine.log());
}

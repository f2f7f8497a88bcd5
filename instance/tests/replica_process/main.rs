//! A replica process with a real `qemu-storage-daemon`: bytes, generations, hostile bases, faults.

mod growth;
mod replica;

use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use dataplane::storage_daemon::BaseFormat;
use proto::replica::{Record, Reply, Request};
use replica::{Replica, qemu_img, raw_base};

#[test]
fn bytes_survive_detach_restart_and_attach() {
    let mut replica = Replica::new(raw_base);
    replica.start();
    assert_eq!((replica.record().generation, replica.record().clean), (0, true));
    let export = replica.open(3);
    assert_eq!(export, "vol-3");
    replica.io_ok(&export, &["read -P 0x11 0 8M", "read -P 0 8M 24M", "write -P 0x22 4k 64k", "flush"]);
    assert_eq!(replica.ask(Request::Close { generation: 3 }), Reply::Done);
    assert_eq!(replica.ask(Request::Close { generation: 3 }), Reply::Done);
    replica.stop();
    replica.start();
    let record = replica.record();
    assert_eq!((record.generation, record.clean, record.members), (3, true, vec!["r1".into(), "r2".into()]));
    let export = replica.open(4);
    replica.io_ok(&export, &["read -P 0x11 0 4k", "read -P 0x22 4k 64k", "read -P 0x11 68k 1M"]);
    let (ok, _) = replica.io("vol-3", &["read 0 4k"]);
    assert!(!ok, "an old export must not serve");
}

#[test]
fn generations_only_rise_and_are_durable() {
    let mut replica = Replica::new(|_| None);
    replica.start();
    let members = vec!["r1".to_owned()];
    let fence = |generation, members: &[String], export: &str| Request::Fence {
        generation,
        members: members.to_vec(),
        export: export.to_owned(),
    };
    assert!(replica.refused(fence(1, &members, "")).contains("no open export"));
    let export = replica.open(5);
    assert!(
        replica.refused(Request::Open { generation: 5, members: members.clone(), seen: None }).contains("not above")
    );
    assert!(replica.refused(fence(4, &members, &export)).contains("not above"));
    assert!(replica.refused(fence(6, &["r2".to_owned()], &export)).contains("not a member"));
    assert!(replica.refused(Request::Close { generation: 4 }).contains("cannot end generation 4"));
    assert_eq!(replica.ask(fence(6, &members, &export)), Reply::Done);
    replica.signal(rustix::process::Signal::KILL);
    replica.child.take().unwrap().wait().unwrap();
    // The daemon ends by its death signal; the next process waits for its lock.
    replica.start();
    let record = replica.record();
    assert_eq!((record.generation, record.clean, record.members), (6, false, members.clone()));
    assert!(replica.refused(Request::Close { generation: 6 }).contains("did not end cleanly"));
    replica.open(7);
}

#[test]
fn an_engine_that_chose_by_an_outdated_record_changes_nothing() {
    let mut replica = Replica::new(|_| None);
    replica.start();
    let export = replica.open(5);
    let open = |seen| Request::Open { generation: 9, members: vec!["r1".into()], seen: Some(seen) };
    let refused = replica.refused(open(4));
    assert!(refused.contains("at generation 5 now and not at 4"), "{refused}");
    assert!(refused.contains("must choose anew"), "{refused}");
    // Whoever has it goes on.
    let record = replica.record();
    assert_eq!((record.generation, record.members), (5, vec!["r1".to_owned(), "r2".to_owned()]));
    replica.io_ok(&export, &["write -P 0x11 0 4k", "flush", "read -P 0x11 0 4k"]);
    assert_eq!(replica.ask(open(5)), Reply::Opened { export: "vol-9".into() });
    assert_eq!(replica.record().generation, 9);
}

#[test]
fn open_ends_the_old_export_and_its_connection() {
    let mut replica = Replica::new(|_| None);
    replica.start();
    let first = replica.open(1);
    // Line by line, although its output is a pipe.
    let mut command = Command::new("stdbuf");
    let uri = format!("nbd://{}/{first}", replica.config.listen);
    let mut client = command
        .args(["-oL", "timeout", "30", "qemu-io", "-f", "raw", &uri])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = BufReader::new(client.stdout.take().unwrap());
    let mut input = client.stdin.take().unwrap();
    input.write_all(b"write -P 1 0 4k\n").unwrap();
    let mut line = String::new();
    while !line.contains("wrote") {
        assert!(output.read_line(&mut line).unwrap() > 0);
    }
    let second = replica.open(2);
    input.write_all(b"write -P 2 0 4k\nquit\n").unwrap();
    // Its end makes qemu-io look at what it has buffered.
    drop(input);
    client.wait().unwrap();
    replica.io_ok(&second, &["read -P 1 0 4k"]);
}

/// A client that neither flushed nor closed, and a daemon that is killed at once: only what the close flushed is there.
#[test]
fn a_clean_end_means_that_everything_is_on_disk() {
    let mut replica = Replica::new(|_| None);
    replica.start();
    let export = replica.open(1);
    let uri = format!("nbd://{}/{export}", replica.config.listen);
    let mut client = Command::new("stdbuf")
        .args(["-oL", "qemu-io", "-t", "none", "-f", "raw", &uri])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = BufReader::new(client.stdout.take().unwrap());
    client.stdin.as_mut().unwrap().write_all(b"write -P 0x5a 3M 1M\n").unwrap();
    let mut line = String::new();
    while !line.contains("wrote") {
        assert!(output.read_line(&mut line).unwrap() > 0);
    }
    client.kill().unwrap();
    client.wait().unwrap();
    assert_eq!(replica.ask(Request::Close { generation: 1 }), Reply::Done);
    rustix::process::kill_process(replica.daemon(), rustix::process::Signal::KILL).unwrap();
    replica.child.take().unwrap().wait().unwrap();
    replica.start();
    assert!(replica.record().clean);
    let export = replica.open(2);
    replica.io_ok(&export, &["read -P 0x5a 3M 1M"]);
}

/// Whoever reads the record while it changes, or after a loss of power, has the old one or the new one.
#[test]
fn a_record_is_replaced_and_never_written_in_place() {
    let mut replica = Replica::new(|_| None);
    replica.start();
    replica.open(1);
    let path = replica.config.directory.join("replica.json");
    let mut old = std::fs::File::open(&path).unwrap();
    replica.open(2);
    let old: Record = serde_json::from_str(&std::io::read_to_string(&mut old).unwrap()).unwrap();
    let new: Record = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    assert_eq!((old.generation, new.generation), (1, 2));
}

/// QEMU before 8.1 forgets to ask for that itself, and would hold back every reply behind one that is not acknowledged yet.
#[test]
fn replies_are_not_held_back_over_tcp() {
    use rustix::net::sockopt;
    let mut replica = Replica::new(|_| None);
    replica.start();
    let client = std::net::TcpStream::connect(replica.config.listen).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    // The greeting: the daemon has taken the connection.
    std::io::Read::read_exact(&mut &client, &mut [0; 18]).unwrap();
    let near = client.local_addr().unwrap();
    let daemon = rustix::process::pidfd_open(replica.daemon(), rustix::process::PidfdFlags::empty()).unwrap();
    let accepted = (0..256).find_map(|number| {
        let flags = rustix::process::PidfdGetfdFlags::empty();
        let socket = rustix::process::pidfd_getfd(&daemon, number, flags).ok()?;
        let peer = rustix::net::getpeername(&socket).ok()??;
        (SocketAddr::try_from(peer).ok()? == near).then_some(socket)
    });
    let accepted = accepted.expect("the daemon has the other end of the connection");
    assert!(sockopt::tcp_nodelay(&accepted).unwrap());
    assert!(sockopt::socket_keepalive(&accepted).unwrap(), "a peer that vanished is noticed");
}

/// Otherwise the kernel clears 256 pages for each request of 1 MiB, which takes longer than the request itself.
#[test]
fn large_requests_use_the_memory_of_the_last_ones() {
    let mut replica = Replica::new(|_| None);
    replica.start();
    let export = replica.open(1);
    let faults = || -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", replica.daemon().as_raw_nonzero())).unwrap();
        stat.rsplit_once(')').unwrap().1.split_whitespace().nth(7).unwrap().parse().unwrap()
    };
    replica.io_ok(&export, &["write 0 1M"]);
    let before = faults();
    replica.io_ok(&export, &["write 0 1M"; 32]);
    let pages = faults() - before;
    assert!(pages < 32 * 256 / 2, "{pages} new pages");
}

#[test]
fn nobody_can_connect_once_the_daemon_has_ended() {
    let mut replica = Replica::new(|_| None);
    replica.start();
    assert!(std::net::TcpStream::connect(replica.config.listen).is_ok());
    let process = replica.child.as_ref().unwrap().id();
    let descriptors = std::fs::read_dir(format!("/proc/{process}/fd")).unwrap();
    let listening = listening_sockets(replica.config.listen.port());
    assert_eq!(listening.len(), 1);
    for descriptor in descriptors {
        let target = std::fs::read_link(descriptor.unwrap().path()).unwrap_or_default();
        assert!(!listening.contains(&target.to_string_lossy().into_owned()), "the replica process keeps it open");
    }
}

/// Names as in `/proc/PID/fd` of the sockets that listen on a port of IPv4.
fn listening_sockets(port: u16) -> Vec<String> {
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let rows = table.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    let listening = rows.filter(|row| row[3] == "0A" && row[1].ends_with(&format!(":{port:04X}")));
    listening.map(|row| format!("socket:[{}]", row[9])).collect()
}

#[test]
fn an_engine_that_lost_the_replica_to_another_one_cannot_fence_it() {
    let mut replica = Replica::new(|_| None);
    replica.start();
    let old = replica.open(1);
    let new = replica.open(2);
    let fence =
        |generation, export: &str| Request::Fence { generation, members: vec!["r1".into()], export: export.to_owned() };
    assert!(replica.refused(fence(3, &old)).contains("for another engine"));
    assert_eq!(replica.record().generation, 2);
    assert_eq!(replica.ask(fence(3, &new)), Reply::Done);
}

#[test]
fn a_raw_base_stays_raw_whatever_it_begins_with() {
    let folder = tempfile::tempdir().unwrap();
    let secret = folder.path().join("secret");
    std::fs::write(&secret, vec![0x99; 1 << 20]).unwrap();
    let mut replica = Replica::new(|path| {
        let (path, secret) = (path.to_str().unwrap(), secret.to_str().unwrap());
        qemu_img(&["create", "-q", "-f", "qcow2", "-F", "raw", "-b", secret, path, "32M"]);
        Some(BaseFormat::Raw)
    });
    replica.start();
    let export = replica.open(1);
    replica.io_ok(&export, &["read -P 0x51 0 1", "read -P 0x46 1 1"]);
}

#[test]
fn a_backing_file_in_a_qcow2_base_is_not_followed() {
    let folder = tempfile::tempdir().unwrap();
    let secret = folder.path().join("secret");
    std::fs::write(&secret, vec![0x99; 1 << 20]).unwrap();
    let mut replica = Replica::new(|path| {
        let (path, secret) = (path.to_str().unwrap(), secret.to_str().unwrap());
        qemu_img(&["create", "-q", "-f", "qcow2", "-F", "raw", "-b", secret, path, "32M"]);
        Some(BaseFormat::Qcow2)
    });
    replica.start();
    let export = replica.open(1);
    replica.io_ok(&export, &["read -P 0 0 1M"]);
}

#[test]
fn a_qcow2_base_with_an_external_data_file_is_refused() {
    let mut replica = Replica::new(|path| {
        let data = format!("data_file={}.data", path.display());
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", &data, path.to_str().unwrap(), "32M"]);
        Some(BaseFormat::Qcow2)
    });
    let said = replica.start_fails();
    assert!(said.contains("keeps its data in another file"), "{said}");
}

#[test]
fn a_qcow2_base_is_read_and_never_written() {
    let mut replica = Replica::new(|path| {
        let raw = path.with_extension("raw");
        std::fs::write(&raw, vec![0x33; 4 << 20]).unwrap();
        qemu_img(&["convert", "-q", "-c", "-O", "qcow2", raw.to_str().unwrap(), path.to_str().unwrap()]);
        Some(BaseFormat::Qcow2)
    });
    let base = replica.config.image.as_ref().unwrap().path.clone();
    let before = std::fs::read(&base).unwrap();
    replica.start();
    let export = replica.open(1);
    replica.io_ok(&export, &["read -P 0x33 0 4M", "write -P 0x44 0 1M", "discard 1M 1M", "write -z 2M 1M", "flush"]);
    replica.io_ok(&export, &["read -P 0x44 0 1M", "read -P 0 2M 1M", "read -P 0x33 3M 1M"]);
    assert!(before == std::fs::read(&base).unwrap());
    let head = replica.config.directory.join("volume-head.qcow2");
    let output = Command::new("qemu-img").args(["info", "-U"]).arg(&head).output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(!said.contains("backing file:"), "{said}");
    assert!(said.contains("extended l2: true") && said.contains("cluster_size: 131072"), "{said}");
}

/// What a process that was killed while it made the head left is no head.
#[test]
fn an_unfinished_head_is_made_anew() {
    let mut replica = Replica::new(raw_base);
    std::fs::create_dir(&replica.config.directory).unwrap();
    let left = replica.config.directory.join("volume-head.qcow2.tmp");
    std::fs::write(&left, vec![0x77; 1 << 20]).unwrap();
    replica.start();
    assert!(!left.exists());
    let export = replica.open(1);
    replica.io_ok(&export, &["read -P 0x11 0 8M", "read -P 0 8M 24M", "write -P 1 0 4k"]);
}

#[test]
fn a_head_of_another_size_is_refused() {
    let mut replica = Replica::new(|_| None);
    replica.start();
    replica.stop();
    let head = replica.config.directory.join("volume-head.qcow2");
    qemu_img(&["resize", "-q", "-f", "qcow2", head.to_str().unwrap(), "64M"]);
    let said = replica.start_fails();
    assert!(said.contains("has 67108864 bytes, the volume has 33554432"), "{said}");
}

/// A daemon that outlives its process, here a stopped one, still has the files open.
#[test]
fn nobody_takes_the_directory_while_a_daemon_lives() {
    let mut replica = Replica::new(|_| None);
    replica.start();
    let export = replica.open(1);
    let daemon = replica.daemon();
    rustix::process::kill_process(daemon, rustix::process::Signal::STOP).unwrap();
    replica.signal(rustix::process::Signal::KILL);
    replica.child.take().unwrap().wait().unwrap();
    let mut next = replica.launch();
    let deadline = Instant::now() + Duration::from_secs(2);
    while Instant::now() < deadline {
        assert!(replica.try_ask(&Request::Status).is_none(), "two daemons have the head of {export} open");
        assert!(next.try_wait().unwrap().is_none(), "it waits for the daemon to end");
        std::thread::park_timeout(Duration::from_millis(20)); // poll
    }
    rustix::process::kill_process(daemon, rustix::process::Signal::CONT).unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    while replica.try_ask(&Request::Status).is_none() {
        assert!(Instant::now() < deadline, "the next process never got the directory");
        std::thread::park_timeout(Duration::from_millis(20)); // poll
    }
    replica.child = Some(next);
    assert_eq!(replica.record().generation, 1);
}

#[test]
fn a_request_without_end_or_sense_changes_nothing() {
    let mut replica = Replica::new(|_| None);
    replica.start();
    let connect = || runtime::socket::connect_blocking(&replica.config.directory.join("control.sock")).unwrap();
    let mut talker = connect();
    talker.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut sent = 0;
    while sent < 8 << 20 && talker.write_all(&[b'x'; 4096]).is_ok() {
        sent += 4096;
    }
    assert!(sent < 4 << 20, "{sent} bytes of one request were taken");
    // Half a request that is whole by itself, at the end of a connection.
    let mut half = connect();
    half.write_all(b"nonsense\n{\"request\":\"open\",\"generation\":5").unwrap();
    half.shutdown(std::net::Shutdown::Write).unwrap();
    let said = std::io::read_to_string(half).unwrap();
    assert_eq!(said.matches("is not understood").count(), 2, "{said}");
    assert_eq!(replica.record().generation, 0);
}

#[test]
fn two_processes_never_share_a_directory() {
    let mut replica = Replica::new(|_| None);
    replica.start();
    let said = replica.start_fails();
    assert!(said.contains("in use by another replica process"), "{said}");
}

#[test]
fn the_process_ends_with_an_error_when_its_daemon_dies() {
    let mut replica = Replica::new(|_| None);
    replica.start();
    replica.open(1);
    rustix::process::kill_process(replica.daemon(), rustix::process::Signal::KILL).unwrap();
    let output = replica.child.take().unwrap().wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && said.contains("qemu-storage-daemon ended"), "{said}");
    replica.start();
    assert_eq!((replica.record().generation, replica.record().clean), (1, false));
}

#[test]
fn a_lost_head_or_a_foreign_directory_is_refused() {
    let mut replica = Replica::new(raw_base);
    replica.start();
    let export = replica.open(1);
    replica.io_ok(&export, &["write -P 1 0 4k"]);
    replica.stop();
    let image = replica.config.image.as_mut().unwrap();
    image.uuid = "ffffffff".into();
    let said = replica.start_fails();
    assert!(said.contains("was made for image uuid `0123abcd`"), "{said}");
    replica.config.image.as_mut().unwrap().uuid = "0123abcd".into();
    let head = replica.config.directory.join("volume-head.qcow2");
    let kept = head.with_extension("kept");
    std::fs::rename(&head, &kept).unwrap();
    let said = replica.start_fails();
    assert!(said.contains("is missing") && !head.exists(), "{said}");
    assert!(said.contains("only the very last state of the file may be put back"), "{said}");
    std::fs::rename(&kept, &head).unwrap();
    std::fs::remove_file(replica.config.directory.join("replica.json")).unwrap();
    let said = replica.start_fails();
    assert!(said.contains("holds a head but no `replica.json`"), "{said}");
    // An older record than the last is worse than none: the head is cut to its size, and its generation counts.
    assert!(said.contains("remove this replica. Only the very last state of that file may be put back"), "{said}");
}

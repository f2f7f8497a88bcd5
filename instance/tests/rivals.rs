//! Several engines on the same real replica processes: never does each go on with a part of them.

mod engine_role;
mod processes;

use std::io::{BufRead, BufReader, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use processes::{Engine, Replica, listeners, wait_until};

/// Not a test: what the holder and engine processes of the test run.
#[test]
#[ignore = "a role for the processes that the test starts"]
fn role_process() {
    runtime::log::init(runtime::log::Format::Text, "info");
    engine_role::run();
}

/// Another way to a replica, on which `Open` waits for the gate.
fn behind(replica: &Replica, gate: &Arc<Gate>) -> String {
    let (data, control) = listeners();
    let address = data.local_addr().unwrap().to_string();
    let (far, gate) = (replica.listen, gate.clone());
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

#[test]
fn two_engines_that_start_at_once_never_share_the_replicas_out() {
    let folder = tempfile::tempdir().unwrap();
    let replicas = ["r1", "r2"].map(|name| Replica::start(folder.path(), name, None));
    let (own, other) = (Arc::new(Gate::default()), Arc::new(Gate::default()));
    // Each comes to its own replica first, with the same generation and the same members.
    let first = [("r1", behind(&replicas[0], &own)), ("r2", behind(&replicas[1], &other))];
    let second = [("r1", behind(&replicas[0], &other)), ("r2", behind(&replicas[1], &own))];
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
    let replicas = ["r1", "r2"].map(|name| Replica::start(folder.path(), name, None));
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

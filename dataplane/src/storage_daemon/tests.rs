//! The daemon's side of the bargain kept badly: a double that greets, answers, drains or ends as a test wishes.

use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use super::*;

const SIZE: u64 = 1 << 20;

/// Speaks QMP as far as [`StorageDaemon`] needs it. Files in its directory tell what it does wrong.
const DOUBLE: &str = r#"#!/usr/bin/python3
import json, os, socket, sys, time
argument = sys.argv[sys.argv.index("--chardev") + 1]
number = int(dict(part.split("=") for part in argument.split(",") if "=" in part)["fd"])
monitor = socket.socket(fileno=number)
wish = os.path.exists
def say(what):
    monitor.sendall((json.dumps(what) + "\n").encode())
def until(file):
    while not wish(file):
        time.sleep(0.01)
if wish("ends"):
    sys.exit("bad luck")
if wish("mute"):
    until("never")
say({"QMP": {}})
for line in monitor.makefile():
    request = json.loads(line)
    command, arguments = request["execute"], request.get("arguments", {})
    answer = {"return": {}}
    if wish("deaf-to-" + command):
        continue
    if wish("refuses-" + command):
        answer = {"error": {"class": "GenericError", "desc": "No space left on device"}}
    elif command == "query-named-block-nodes":
        answer = {"return": [{"node-name": "head", "image": {"virtual-size": 1 << 20}}]}
    elif command == "query-jobs":
        job = {"id": "create-head"}
        answer = {"return": [dict(job, error="No space left on device") if wish("job-fails") else job]}
    say(dict(answer, id=request["id"]))
    open("answered-" + command, "w").close()
    if command == "blockdev-create":
        say({"event": "JOB_STATUS_CHANGE", "data": {"id": "create-head", "status": "concluded"}})
    if command == "block-export-del" and "return" in answer:
        say({"event": "BLOCK_EXPORT_DELETED", "data": {"id": "another"}})
        until("drained")
        say({"event": "BLOCK_EXPORT_DELETED", "data": {"id": arguments["id"]}})
    if command == "quit" and not wish("stays"):
        break
until("never") if wish("stays") else None
"#;

struct World {
    folder: tempfile::TempDir,
}

impl World {
    fn new(faults: &[&str]) -> World {
        let world = World { folder: tempfile::tempdir().unwrap() };
        fs::write(world.file("double"), DOUBLE).unwrap();
        fs::set_permissions(world.file("double"), fs::Permissions::from_mode(0o755)).unwrap();
        faults.iter().for_each(|fault| world.set(fault));
        world
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn set(&self, fault: &str) {
        fs::write(self.file(fault), "").unwrap();
    }

    async fn start(&self) -> Result<StorageDaemon, DataplaneError> {
        let config = Config {
            directory: self.folder.path().to_owned(),
            head: "head.qcow2".into(),
            listener: listener::listen(([127, 0, 0, 1], 0).into()).unwrap(),
            base: None,
            size_bytes: SIZE,
            recorded_bytes: SIZE,
            create_head: true,
            lock: None,
        };
        StorageDaemon::start_program(self.file("double").to_str().unwrap(), config).await
    }

    /// Processes that work in the directory.
    fn daemons(&self) -> usize {
        let here = self.folder.path().canonicalize().unwrap();
        let processes = fs::read_dir("/proc").unwrap().flatten();
        processes.filter(|p| fs::read_link(p.path().join("cwd")).is_ok_and(|cwd| cwd == here)).count()
    }

    fn wait_until_gone(&self, why: &str) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while self.daemons() > 0 {
            assert!(Instant::now() < deadline, "the daemon stays: {why}");
            std::thread::park_timeout(Duration::from_millis(10)); // poll
        }
    }
}

#[test]
fn sees_an_external_data_file() {
    let mut header = vec![0u8; 104];
    header[..4].copy_from_slice(b"QFI\xfb");
    header[7] = 3;
    assert_eq!(qcow2_problem(&header), None);
    header[79] = 4;
    assert!(qcow2_problem(&header).unwrap().contains("another file"));
    assert!(qcow2_problem(b"plain").unwrap().contains("does not begin"));
}

/// Whoever opens the next export before the last request of the old one is over may see it come after its own.
#[tokio::test]
async fn an_export_is_gone_when_it_is_drained_and_not_before() {
    let world = World::new(&[]);
    let daemon = world.start().await.unwrap();
    daemon.add_export("old").await.unwrap();
    let mut deleted = std::pin::pin!(daemon.delete_export("old"));
    let early = tokio::time::timeout(Duration::from_millis(300), &mut deleted).await;
    assert!(early.is_err(), "{early:?} while a request is in flight");
    world.set("drained");
    deleted.await.unwrap();
    daemon.quit().await.unwrap();
}

#[tokio::test]
async fn what_the_daemon_refuses_is_no_success() {
    let world = World::new(&["refuses-block-export-del", "refuses-blockdev-reopen", "refuses-block-export-add"]);
    let daemon = world.start().await.unwrap();
    for refused in [daemon.add_export("e").await, daemon.delete_export("e").await, daemon.flush().await] {
        let refused = refused.unwrap_err();
        assert!(matches!(refused, DataplaneError::Refused { .. }), "{refused}");
        assert!(refused.to_string().contains("No space left"), "{refused}");
    }
    daemon.quit().await.unwrap();
}

#[tokio::test]
async fn a_head_that_could_not_be_made_leaves_neither_a_head_nor_a_daemon() {
    for fault in ["job-fails", "refuses-blockdev-create", "refuses-blockdev-add"] {
        let world = World::new(&[fault]);
        let refused = world.start().await.err().unwrap();
        assert!(refused.to_string().contains("No space left"), "{fault}: {refused}");
        assert!(!world.file("head.qcow2").exists(), "{fault}: whoever comes next would take it for whole");
        world.wait_until_gone(fault);
    }
}

/// The clock stands still while the daemon is busy and jumps to the limit when it is not.
#[tokio::test]
async fn a_daemon_that_does_not_greet_is_ended_after_its_time() {
    let world = World::new(&["mute"]);
    tokio::time::pause();
    let silent = world.start().await.err().unwrap();
    assert!(matches!(&silent, DataplaneError::Silent { command, .. } if command == "greeting"), "{silent}");
    world.wait_until_gone("it did not greet");
    let world = World::new(&["ends"]);
    tokio::time::resume();
    let ended = world.start().await.err().unwrap().to_string();
    assert!(ended.contains("has ended: bad luck"), "{ended}");
}

#[tokio::test]
async fn a_daemon_that_does_not_answer_its_end_is_killed() {
    let world = World::new(&["deaf-to-quit"]);
    let daemon = world.start().await.unwrap();
    tokio::time::pause();
    let killed = daemon.quit().await.unwrap_err();
    assert!(matches!(killed, DataplaneError::Silent { .. }), "{killed}");
    world.wait_until_gone("it did not answer");
    assert!(daemon.ended().await.contains("signal: 9"));
    assert!(matches!(daemon.flush().await, Err(DataplaneError::Ended { .. })));
}

#[tokio::test]
async fn a_daemon_that_does_not_end_is_killed() {
    let world = World::new(&["stays"]);
    let daemon = world.start().await.unwrap();
    let mut quit = std::pin::pin!(daemon.quit());
    while !world.file("answered-quit").exists() {
        let early = tokio::time::timeout(Duration::from_millis(10), &mut quit).await;
        assert!(early.is_err(), "{early:?} although it is there");
    }
    tokio::time::pause();
    let killed = quit.await.unwrap_err();
    assert!(matches!(killed, DataplaneError::Slow { .. }), "{killed}");
    world.wait_until_gone("it did not end");
    assert!(daemon.ended().await.contains("signal: 9"));
}

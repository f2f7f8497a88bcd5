//! The contract of workloads, run against local processes (`pods.rs` runs it against pods); and what only local processes promise.

mod program;
mod suite;

use std::io::{BufRead, BufReader};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use backing_image_workloads::local::{Local, LocalConfig};
use backing_image_workloads::{WorkloadState, Workloads};
use runtime::process::ProcessIdentity;
use suite::{Any, ask, spec, wait_for, wait_until_failed, wait_until_running};

/// Local workloads in a directory of their own, ended with the test, however it ends.
struct Fixture {
    directory: tempfile::TempDir,
    addresses: Vec<Ipv4Addr>,
}

impl Fixture {
    fn new() -> Fixture {
        // 127.200.0.0/16 is not given to any instance by accident: tests take parts of it by their own process and count.
        static NEXT: std::sync::atomic::AtomicU8 = std::sync::atomic::AtomicU8::new(0);
        let part = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed) % 25;
        let third = (std::process::id() % 256) as u8;
        let addresses = (0..10).map(|n| Ipv4Addr::new(127, 200, third, part * 10 + n + 1)).collect();
        Fixture { directory: tempfile::tempdir().unwrap(), addresses }
    }

    fn config(&self) -> LocalConfig {
        LocalConfig {
            directory: self.directory.path().join("workloads"),
            program: std::env::current_exe().unwrap(),
            addresses: self.addresses.clone(),
            start_timeout: Duration::from_secs(20),
        }
    }

    async fn open(&self) -> Any {
        Arc::new(Local::open(self.config()).await.unwrap())
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("workloads")
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        for pid in marked(&self.path()) {
            let _ = Command::new("kill").args(["-9", &pid.to_string()]).status();
        }
    }
}

/// Processes with the marker of this directory, the way a person would look for them.
fn marked(directory: &Path) -> Vec<u32> {
    let text = format!("BACKING_IMAGE_WORKLOAD={}", directory.display());
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid: &u32| {
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.windows(text.len()).any(|window| window == text.as_bytes())
    })
    .collect()
}

macro_rules! contract {
    ($($promise:ident)*) => {
        mod local {
            $(#[tokio::test]
            async fn $promise() {
                let fixture = super::Fixture::new();
                super::suite::$promise(fixture.open().await).await;
            })*
        }
    };
}

suite::promises!(contract);

#[tokio::test]
async fn adopts_what_runs_and_tells_what_ended_meanwhile() {
    let fixture = Fixture::new();
    let first = fixture.open().await;
    for name in ["stays", "dies"] {
        first.ensure(&spec(name, "serve")).await.unwrap();
    }
    let stays = wait_until_running(&first, "stays").await;
    let dies = wait_until_running(&first, "dies").await;
    let (stays_pid, dies_pid) = (ask(&stays, "pid").await, ask(&dies, "pid").await);
    drop(first);
    let dead = ProcessIdentity::of(dies_pid.parse().unwrap()).unwrap();
    ask(&dies, "exit").await;
    dead.wait().await.unwrap();
    let second = fixture.open().await;
    let adopted = second.get("stays").await.unwrap().unwrap();
    assert_eq!((&adopted.state, adopted.ip, &adopted.spec), (&WorkloadState::Running, stays.ip, &stays.spec));
    assert_eq!(ask(&adopted, "pid").await, stays_pid, "undisturbed");
    let WorkloadState::Failed { message } = second.get("dies").await.unwrap().unwrap().state else {
        panic!("it is dead")
    };
    assert!(message.contains("ended while nobody watched") && message.contains("as I was told"), "{message}");
    // Its end is noticed as well, though it is not our child any more.
    ask(&adopted, "exit").await;
    wait_until_failed(&second, "stays").await;
    drop(second);
    let third = fixture.open().await;
    assert_eq!(third.get("dies").await.unwrap().unwrap().state, WorkloadState::Failed { message });
    for name in ["stays", "dies"] {
        third.remove(name).await.unwrap();
    }
    assert_eq!(std::fs::read_dir(fixture.path()).unwrap().count(), 0, "no files stay");
    assert_eq!(marked(&fixture.path()), [0; 0], "no processes stay");
}

#[tokio::test]
async fn finds_a_process_whose_start_was_not_written_down() {
    let fixture = Fixture::new();
    let first = fixture.open().await;
    first.ensure(&spec("a", "serve")).await.unwrap();
    first.ensure(&spec("lost", "serve")).await.unwrap();
    let running = wait_until_running(&first, "a").await;
    let pid = ask(&running, "pid").await;
    let lost = wait_until_running(&first, "lost").await;
    let lost = ProcessIdentity::of(ask(&lost, "pid").await.parse().unwrap()).unwrap();
    drop(first);
    // As if a crash had come between the start and the second writing of the record, or had eaten the record.
    let path = fixture.path().join("a/workload.json");
    let mut record: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    record["process"] = serde_json::Value::Null;
    std::fs::write(&path, record.to_string()).unwrap();
    std::fs::remove_dir_all(fixture.path().join("lost")).unwrap();
    let mut never = record.clone();
    never["spec"]["name"] = "never-started".into();
    never["token"] = "of-no-process".into();
    std::fs::create_dir(fixture.path().join("never-started")).unwrap();
    std::fs::write(fixture.path().join("never-started/workload.json"), never.to_string()).unwrap();
    let second = fixture.open().await;
    let adopted = second.get("a").await.unwrap().unwrap();
    assert_eq!(adopted.state, WorkloadState::Running);
    assert_eq!(ask(&adopted, "pid").await, pid);
    assert!(!lost.is_alive(), "what no record asks for is ended");
    assert!(second.get("never-started").await.unwrap().is_none());
    assert!(!fixture.path().join("never-started").exists());
}

#[tokio::test]
async fn leaves_processes_of_other_instances_alone() {
    let fixture = Fixture::new();
    drop(fixture.open().await);
    let path = fixture.path().canonicalize().unwrap();
    // The same path, but not the same directory: an instance in a container, for example.
    let token = "b58b5a4e-6a43-4e0c-9d9a-0d2b0f0d3b9e";
    let marker = format!("{}:0-0:{token}", path.display());
    let mut other = Command::new("sleep").arg("1000").env("BACKING_IMAGE_WORKLOAD", marker).spawn().unwrap();
    let identity = ProcessIdentity::of(other.id()).unwrap();
    drop(fixture.open().await);
    let alive = identity.is_alive();
    other.kill().unwrap();
    other.wait().unwrap();
    assert!(alive);
}

#[tokio::test]
async fn ends_what_a_workload_has_started() {
    let fixture = Fixture::new();
    let workloads = fixture.open().await;
    for end in ["removed", "failed"] {
        workloads.ensure(&spec(end, "serve")).await.unwrap();
        let running = wait_until_running(&workloads, end).await;
        let child = ProcessIdentity::of(ask(&running, "child").await.parse().unwrap()).unwrap();
        assert!(child.is_alive());
        if end == "failed" {
            ask(&running, "exit").await;
            wait_until_failed(&workloads, end).await;
        } else {
            workloads.remove(end).await.unwrap();
        }
        assert!(!child.is_alive(), "{end}");
    }
}

#[tokio::test]
async fn ends_one_that_is_not_ready_in_time() {
    let fixture = Fixture::new();
    let config = LocalConfig { start_timeout: Duration::from_secs(1), ..fixture.config() };
    let workloads: Any = Arc::new(Local::open(config).await.unwrap());
    workloads.ensure(&spec("late", "late")).await.unwrap();
    wait_for(&workloads, "late", |state| match state {
        WorkloadState::Starting { message } => message.contains("no connections on") && message.contains("port 8000"),
        _ => false,
    })
    .await;
    let message = wait_until_failed(&workloads, "late").await;
    assert!(message.contains("not ready after 1 s") && message.contains("port 8000"), "{message}");
    assert_eq!(marked(&fixture.path()), [0; 0]);
}

#[tokio::test]
async fn goes_on_when_the_caller_gives_up() {
    let fixture = Fixture::new();
    let workloads = fixture.open().await;
    for wait_micros in [0, 100, 1000, 3000, 8000] {
        let wanted = spec("a", "serve");
        let _ = tokio::time::timeout(Duration::from_micros(wait_micros), workloads.ensure(&wanted)).await;
        workloads.ensure(&wanted).await.unwrap();
        wait_until_running(&workloads, "a").await;
        assert_eq!(marked(&fixture.path()).len(), 1, "started once");
        let _ = tokio::time::timeout(Duration::from_micros(wait_micros), workloads.remove("a")).await;
        workloads.remove("a").await.unwrap();
        assert_eq!(marked(&fixture.path()).len(), 0);
    }
}

#[tokio::test]
async fn shows_how_many_workloads_there_are() {
    let fixture = Fixture::new();
    let local = Local::open(fixture.config()).await.unwrap();
    let metrics = runtime::metrics::Metrics::default();
    local.register_metrics(&metrics);
    let workloads: Any = Arc::new(local);
    workloads.ensure(&spec("a", "serve")).await.unwrap();
    workloads.ensure(&spec("b", "broken")).await.unwrap();
    wait_until_running(&workloads, "a").await;
    wait_until_failed(&workloads, "b").await;
    let text = metrics.render();
    assert!(text.contains("backing_image_csi_workloads{state=\"running\"} 1"), "{text}");
    assert!(text.contains("backing_image_csi_workloads{state=\"failed\"} 1"), "{text}");
}

#[tokio::test]
async fn says_why_it_cannot_start() {
    let fixture = Fixture::new();
    let config = LocalConfig { program: "/nowhere/program".into(), ..fixture.config() };
    let workloads = Local::open(config).await.unwrap();
    let error = workloads.ensure(&spec("a", "serve")).await.unwrap_err();
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert!(error.to_string() == "cannot start workload `a`" && cause.contains("/nowhere/program"), "{error}: {cause}");
    assert!(workloads.get("a").await.unwrap().is_none());
    assert_eq!(std::fs::read_dir(fixture.path()).unwrap().count(), 0);
    drop(workloads);
    let config = LocalConfig { addresses: fixture.addresses[..1].to_vec(), ..fixture.config() };
    let workloads = Local::open(config).await.unwrap();
    workloads.ensure(&spec("a", "serve")).await.unwrap();
    let error = workloads.ensure(&spec("b", "serve")).await.unwrap_err();
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert!(cause.contains("all 1 addresses for workloads are in use"), "{cause}");
    workloads.remove("a").await.unwrap();
    workloads.ensure(&spec("b", "serve")).await.unwrap();
}

/// Not a test of its own: the process that gets killed while it starts and removes workloads.
#[tokio::test]
async fn starts_workloads_until_it_is_killed() {
    let Ok(directory) = std::env::var("WORKLOADS_TEST_CHILD") else { return };
    let config: Vec<_> = directory.split('|').collect();
    let workloads = Local::open(LocalConfig {
        directory: config[0].into(),
        program: std::env::current_exe().unwrap(),
        addresses: config[1].split(' ').map(|address| address.parse().unwrap()).collect(),
        start_timeout: Duration::from_secs(20),
    })
    .await
    .unwrap();
    for step in 0.. {
        let name = format!("w-{}", step % 5);
        workloads.remove(&name).await.unwrap();
        workloads.ensure(&spec(&name, "serve")).await.unwrap();
        println!("step {step}");
    }
}

#[tokio::test]
async fn loses_no_process_through_kill_9() {
    let fixture = Fixture::new();
    let addresses: Vec<_> = fixture.addresses.iter().map(Ipv4Addr::to_string).collect();
    for round in 0..8 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["starts_workloads_until_it_is_killed", "--exact", "--nocapture"])
            .env("WORKLOADS_TEST_CHILD", format!("{}|{}", fixture.path().display(), addresses.join(" ")))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // Kept until the kill: a child that cannot print would end by itself.
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut steps = lines.map(Result::unwrap).filter(|line| line.starts_with("step"));
        steps.nth(round * 2).unwrap();
        // Not a wait for anything: it puts the kill somewhere in the next start or removal, a little later in each round.
        tokio::time::sleep(Duration::from_micros(700 * round as u64)).await;
        child.kill().unwrap();
        child.wait().unwrap();
        let workloads = fixture.open().await;
        let listed = workloads.list().await.unwrap();
        assert!(!listed.is_empty());
        for workload in &listed {
            workloads.remove(&workload.spec.name).await.unwrap();
        }
        assert_eq!(marked(&fixture.path()), [0; 0], "round {round}: {listed:?}");
        assert_eq!(std::fs::read_dir(fixture.path()).unwrap().count(), 0);
    }
}

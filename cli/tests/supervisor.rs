//! The main process of a container, in a real pid namespace.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

const PROGRAM: &str = env!("CARGO_BIN_EXE_backing-image-csi");

/// A pid namespace with our program as its first process; it ends with the test.
struct Container {
    unshare: Child,
    folder: tempfile::TempDir,
}

impl Container {
    /// `None` where no namespace can be made and nobody demands it.
    fn start(args: &[&str]) -> Option<Container> {
        let can =
            Command::new("unshare").args(["--pid", "--fork", "--mount-proc", "true"]).stderr(Stdio::null()).status();
        if !can.is_ok_and(|status| status.success()) {
            assert!(std::env::var_os("REQUIRE_REAL").is_none(), "run as root, where unshare can make namespaces");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let log = std::fs::File::create(folder.path().join("log")).unwrap();
        let unshare = Command::new("unshare")
            .args(["--pid", "--fork", "--mount-proc", "--kill-child", PROGRAM])
            .args(args)
            .current_dir(folder.path())
            .env("KUBECONFIG", folder.path().join("none"))
            .env_remove("KUBERNETES_SERVICE_HOST")
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        Some(Container { unshare, folder })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Waits until a file has content.
    fn read(&self, name: &str) -> String {
        let path = self.path(name);
        wait(
            || std::fs::read_to_string(&path).ok().filter(|text| !text.is_empty()),
            || format!("{name}: {}", self.log()),
        )
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// Sends SIGTERM to the first process of the namespace, as a kubelet does.
    fn terminate(&mut self) -> ExitStatus {
        let pid = self.unshare.id();
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        let first = children.split_whitespace().next().expect("it runs").to_owned();
        assert!(Command::new("kill").args(["-TERM", &first]).status().unwrap().success());
        wait(|| self.unshare.try_wait().unwrap(), || "it does not end".into())
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        // The namespace goes with it (--kill-child).
        let _ = self.unshare.kill();
        let _ = self.unshare.wait();
    }
}

fn wait<T>(mut probe: impl FnMut() -> Option<T>, what: impl Fn() -> String) -> T {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(found) = probe() {
            return found;
        }
        assert!(Instant::now() < deadline, "{}", what());
        std::thread::sleep(Duration::from_millis(20)); // poll
    }
}

/// A process with a pid as seen in the namespace, which writes its own outside pid nowhere: it is found by its argument.
fn runs(mark: &str) -> bool {
    let has_mark = |path: &Path| {
        let line = std::fs::read(path.join("cmdline")).unwrap_or_default();
        line.windows(mark.len()).any(|part| part == mark.as_bytes()) && line.starts_with(b"sleep")
    };
    std::fs::read_dir("/proc").unwrap().flatten().any(|entry| has_mark(&entry.path()))
}

#[test]
fn what_a_role_started_outlives_its_crash_and_the_role_comes_back() {
    let mark = format!("1000.{}", std::process::id());
    let script = format!(
        "if [ ! -e engine ]; then setsid sleep {mark} & echo $! >engine; kill -9 $$; fi
         kill -0 $(cat engine) && echo alive >again
         trap 'exit 3' TERM; while :; do sleep 0.1; done"
    );
    let Some(mut container) = Container::start(&["supervise", "sh", "-c", &script]) else { return };
    assert_eq!(container.read("again"), "alive\n");
    assert!(runs(&mark));
    assert!(container.log().contains("signal 9"), "{}", container.log());
    // It ends as its role does, and the namespace with it.
    assert_eq!(container.terminate().code(), Some(3));
    wait(|| (!runs(&mark)).then_some(()), || "it outlives its container".into());
}

#[test]
fn the_status_of_processes_without_a_parent_is_taken() {
    // A process whose status nobody took still has its pid.
    let script = "sh -c 'sleep 0.2 & echo $! >orphan'
        while kill -0 $(cat orphan) 2>/dev/null; do sleep 0.05; done
        echo gone >reaped; exec sleep 1000";
    let Some(mut container) = Container::start(&["supervise", "sh", "-c", script]) else { return };
    assert_eq!(container.read("reaped"), "gone\n");
    assert_eq!(container.terminate().code(), Some(0), "ended by the signal that it was sent");
}

#[test]
fn the_instance_role_supervises_itself_as_the_main_process() {
    let args = ["instance", "--node", "n1", "--ip", "127.0.0.1", "--listen", "127.0.0.1:0"];
    let Some(mut container) = Container::start(&args) else { return };
    // Without credentials it ends, says why, and is started again.
    let tries = || container.log().matches("there are no credentials for a Kubernetes cluster").count();
    wait(|| (tries() >= 2).then_some(()), || container.log());
    assert!(container.log().contains("role ended by itself"), "{}", container.log());
    assert!(container.terminate().success());
}

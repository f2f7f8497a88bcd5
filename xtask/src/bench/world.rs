//! One standalone instance to measure: start, command line, processes, end.

use std::fs;
use std::io::{BufRead, BufReader, Lines};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde_json::{Map, Value};
use tempfile::TempDir;

/// How often a condition is looked at: well below what is measured.
const PROBE_EVERY: Duration = Duration::from_millis(5);
const DEADLINE: Duration = Duration::from_secs(300);
/// Ticks of `/proc/PID/stat` per second (`USER_HZ` on every architecture that we build for).
const TICKS: f64 = 100.0;

/// An instance on a temporary directory; dropping it ends everything.
pub struct World {
    binary: PathBuf,
    server: String,
    daemon: Child,
    dir: TempDir,
}

impl World {
    /// Starts an instance and waits until it is ready.
    pub fn start(binary: &Path, nodes: u32) -> anyhow::Result<World> {
        let dir = TempDir::with_prefix("backing-image-bench-")?;
        let listen = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string();
        let log = fs::File::create(dir.path().join("daemon.log"))?;
        let daemon = Command::new(binary)
            .args(["standalone", "--nodes", &nodes.to_string(), "--listen", &listen, "--data"])
            .arg(dir.path().join("data"))
            // Each CSI call tells how long it took.
            .env("RUST_LOG", "info,csi::rpc=debug")
            .env("BACKING_IMAGE_CSI_LOG_FORMAT", "json")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("cannot start {}", binary.display()))?;
        let world = World { binary: binary.to_owned(), server: format!("http://{listen}"), daemon, dir };
        wait(|| Ok(world.data().join("ready").exists().then_some(()))).context("the instance did not become ready")?;
        Ok(world)
    }

    /// `DIR` of the instance.
    pub fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// What the instance has logged, line by line.
    pub fn log(&self) -> anyhow::Result<Vec<Value>> {
        let text = fs::read_to_string(self.scratch("daemon.log"))?;
        Ok(text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
    }

    /// A place for files of the measurement, on the same filesystem.
    pub fn scratch(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Calls the command line; fails with what it said.
    pub fn cli(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let output =
            Command::new(&self.binary).args(arguments).env("BACKING_IMAGE_CSI_SERVER", &self.server).output()?;
        if !output.status.success() {
            bail!("{}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8(output.stdout)?)
    }

    /// One object, or a list.
    pub fn get(&self, arguments: &[&str]) -> anyhow::Result<Value> {
        let text = self.cli(&[&["get"], arguments, &["-o", "json"]].concat())?;
        Ok(serde_json::from_str(&text)?)
    }

    /// Applies YAML.
    pub fn apply(&self, yaml: &str) -> anyhow::Result<()> {
        let file = self.scratch("apply.yaml");
        fs::write(&file, yaml)?;
        self.cli(&["apply", "-f", &file.to_string_lossy()]).map(drop)
    }

    /// Waits until so many copies of an image are ready.
    pub fn wait_for_copies(&self, image: &str, copies: usize) -> anyhow::Result<()> {
        self.follow(image)?.until(|files| ready(files) >= copies).map(drop)
    }

    /// The states of an image's copies as they change: by a watch, since looking again and again takes the machine's time.
    pub fn follow(&self, image: &str) -> anyhow::Result<Following> {
        let images = format!("{}/apis/longhorn.io/v1beta2/backingimages?watch=true", self.server);
        let mut watch = Command::new("curl")
            .args(["-sN", "--max-time", &DEADLINE.as_secs().to_string(), &images])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start curl")?;
        let lines = BufReader::new(watch.stdout.take().context("curl has no output")?).lines();
        Ok(Following { image: image.to_owned(), watch, lines })
    }

    /// Pids of the instance's processes whose command line contains a word; an empty one finds all.
    pub fn processes(&self, word: &str) -> Vec<u32> {
        let mut pids = self.processes_of(&self.data());
        pids.retain(|pid| command_line(*pid).contains(word));
        pids
    }

    /// Pids of the processes that name a directory in their command line or have something in it open, the instance apart.
    pub fn processes_of(&self, directory: &Path) -> Vec<u32> {
        let Ok(entries) = fs::read_dir("/proc") else { return vec![] };
        let text = directory.to_string_lossy();
        let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        let is_whole = directory == self.data();
        pids.filter(|pid| is_whole || *pid != self.daemon.id())
            .filter(|pid| command_line(*pid).contains(&*text) || has_open(*pid, directory))
            .collect()
    }
}

/// How many copies are ready.
pub fn ready(files: &Map<String, Value>) -> usize {
    files.values().filter(|file| file["state"] == "ready").count()
}

/// A watch of one image; it ends when it is dropped.
pub struct Following {
    image: String,
    watch: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Following {
    /// Waits for a state of the copies (`diskFileStatusMap`); returns when it was seen.
    pub fn until(&mut self, is_it: impl Fn(&Map<String, Value>) -> bool) -> anyhow::Result<Instant> {
        for line in self.lines.by_ref().map_while(Result::ok) {
            let change: Value = serde_json::from_str(&line).unwrap_or_default();
            let object = &change["object"];
            let files = object["status"]["diskFileStatusMap"].as_object().cloned().unwrap_or_default();
            if object["metadata"]["name"] == *self.image && is_it(&files) {
                return Ok(Instant::now());
            }
        }
        bail!("the copies of image {} do not come to what is waited for", self.image)
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        let _ = self.watch.kill();
        let _ = self.watch.wait();
    }
}

fn command_line(pid: u32) -> String {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&line).replace('\0', " ")
}

fn has_open(pid: u32, directory: &Path) -> bool {
    let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    descriptors.flatten().any(|d| fs::read_link(d.path()).is_ok_and(|target| target.starts_with(directory)))
}

impl Drop for World {
    fn drop(&mut self) {
        let stopped =
            Command::new(&self.binary).args(["standalone", "stop", "--all", "--data"]).arg(self.data()).output();
        if !stopped.is_ok_and(|o| o.status.success()) {
            eprintln!("standalone stop --all failed; the daemon is killed");
            let _ = self.daemon.kill();
        }
        let _ = self.daemon.wait();
    }
}

/// A line of `/proc/PID/status` in MiB (`VmHWM`, `VmRSS`); 0 for a process that is gone.
pub fn memory_mib(pid: u32, line: &str) -> f64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let kib = status
        .lines()
        .find_map(|l| l.strip_prefix(line)?.strip_prefix(':')?.trim().strip_suffix(" kB")?.parse::<f64>().ok());
    kib.unwrap_or(0.0) / 1024.0
}

/// CPU time of a process and its threads; 0 for one that is gone.
pub fn cpu_seconds(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let Some((_, fields)) = stat.rsplit_once(')') else { return 0.0 };
    fields.split_whitespace().skip(11).take(2).filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / TICKS
}

/// Context switches of the threads that a process has now.
pub fn context_switches(pid: u32) -> f64 {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return 0.0 };
    let of = |status: String| -> f64 {
        let lines = status.lines().filter_map(|line| line.split_once("ctxt_switches:"));
        lines.filter_map(|(_, count)| count.trim().parse::<f64>().ok()).sum()
    };
    threads.flatten().map(|thread| of(fs::read_to_string(thread.path().join("status")).unwrap_or_default())).sum()
}

/// Probes until there is a value.
pub fn wait<T>(mut probe: impl FnMut() -> anyhow::Result<Option<T>>) -> anyhow::Result<T> {
    let began = Instant::now();
    while began.elapsed() < DEADLINE {
        if let Some(value) = probe()? {
            return Ok(value);
        }
        thread::sleep(PROBE_EVERY);
    }
    bail!("not within {} s", DEADLINE.as_secs())
}

/// Runs a program that must succeed; returns how long it took.
pub fn timed(program: &str, arguments: &[&str]) -> anyhow::Result<Duration> {
    let began = Instant::now();
    let output = Command::new(program).args(arguments).output().with_context(|| format!("cannot start {program}"))?;
    if !output.status.success() {
        bail!("{program} {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr));
    }
    Ok(began.elapsed())
}

//! A double of a replica process: the real daemon, and the control protocol in a thread.

use std::io::{BufRead, BufReader, Write};
use std::net::{Shutdown, TcpListener};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use proto::replica::{Record, Reply, Request, file};
use serde_json::{Value, json};

use super::{run, wait_until};

pub struct Replica {
    pub name: String,
    pub directory: PathBuf,
    daemon: Option<Child>,
    state: Arc<State>,
}

/// When a hook is called: before a request is obeyed, or before its reply is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    Before,
    After,
}

type Hook = Arc<dyn Fn(&Request, Moment) + Send + Sync>;

struct State {
    hook: Mutex<Option<Hook>>,
    record: Mutex<Record>,
    monitor: Mutex<Monitor>,
    /// It answers no control request any more.
    dead: AtomicBool,
}

struct Monitor {
    reader: BufReader<UnixStream>,
    export: Option<String>,
}

impl Monitor {
    fn connect(path: &Path) -> Monitor {
        wait_until("the daemon listens", || UnixStream::connect(path).is_ok());
        let mut monitor = Monitor { reader: BufReader::new(UnixStream::connect(path).unwrap()), export: None };
        let mut greeting = String::new();
        monitor.reader.read_line(&mut greeting).unwrap();
        monitor.ask(json!({"execute": "qmp_capabilities"})).unwrap();
        monitor
    }

    fn ask(&mut self, command: Value) -> Result<Value, String> {
        writeln!(self.reader.get_mut(), "{command}").map_err(|error| error.to_string())?;
        loop {
            let mut line = String::new();
            if self.reader.read_line(&mut line).map_err(|error| error.to_string())? == 0 {
                return Err("the daemon is gone".into());
            }
            let mut reply: Value = serde_json::from_str(&line).unwrap();
            if let Some(error) = reply.get("error") {
                return Err(error.to_string());
            }
            if reply.get("return").is_some() {
                return Ok(reply["return"].take());
            }
        }
    }

    fn end_export(&mut self) -> Result<(), String> {
        if self.export.take().is_some() {
            // It may have ended with its connection.
            let _ = self.ask(json!({"execute": "block-export-del", "arguments": {"id": "head", "mode": "hard"}}));
            while self.ask(json!({"execute": "query-block-exports"}))?.as_array().is_some_and(|list| !list.is_empty()) {
                std::thread::yield_now();
            }
        }
        Ok(())
    }
}

impl Replica {
    pub fn create(parent: &Path, name: &str, volume: &str, size_bytes: u64) -> Replica {
        let directory = parent.join(name);
        std::fs::create_dir(&directory).unwrap();
        let head = directory.join(file::HEAD);
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", "qcow2", "-o", "extended_l2=on,cluster_size=128k"]);
        run(create.arg(&head).arg(size_bytes.to_string()));
        let mut daemon = Command::new("qemu-storage-daemon");
        let path = |name: &str| directory.join(name).display().to_string();
        daemon.arg("--chardev").arg(format!("socket,id=m,path={},server=on,wait=off", path("qmp.sock")));
        daemon.args(["--monitor", "chardev=m", "--blockdev"]);
        daemon.arg(format!("driver=file,node-name=file,filename={},discard=unmap", head.display()));
        daemon.args(["--blockdev", "driver=qcow2,node-name=disk,file=file,discard=unmap", "--nbd-server"]);
        daemon.arg(format!("addr.type=unix,addr.path={}", path(file::NBD_SOCKET)));
        let daemon = daemon.stdin(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let record = Record { volume: volume.into(), replica: name.into(), size_bytes, ..Record::default() };
        let monitor = Mutex::new(Monitor::connect(&directory.join("qmp.sock")));
        let state = Arc::new(State {
            hook: Mutex::default(),
            record: Mutex::new(record),
            monitor,
            dead: AtomicBool::new(false),
        });
        let listener = UnixListener::bind(directory.join(file::CONTROL_SOCKET)).unwrap();
        let served = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let served = served.clone();
                std::thread::spawn(move || served.serve(stream));
            }
        });
        Replica { name: name.into(), directory, daemon: Some(daemon), state }
    }

    pub fn head(&self) -> PathBuf {
        self.directory.join(file::HEAD)
    }

    pub fn record(&self) -> Record {
        self.state.record.lock().unwrap().clone()
    }

    pub fn set_record(&self, change: impl FnOnce(&mut Record)) {
        change(&mut self.state.record.lock().unwrap());
    }

    /// What happens around each request from now on.
    pub fn set_hook(&self, hook: impl Fn(&Request, Moment) + Send + Sync + 'static) {
        *self.state.hook.lock().unwrap() = Some(Arc::new(hook));
    }

    /// Relays both services over TCP; the address of the data service.
    pub fn relay(&self) -> String {
        let ports = (20_000..60_000).step_by(2).find_map(|port| {
            let data = TcpListener::bind(("127.0.0.1", port)).ok()?;
            Some((port, data, TcpListener::bind(("127.0.0.1", port + 1)).ok()?))
        });
        let (port, data, control) = ports.expect("two neighboring ports are free");
        for (listener, name) in [(data, file::NBD_SOCKET), (control, file::CONTROL_SOCKET)] {
            let path = self.directory.join(name);
            std::thread::spawn(move || {
                for near in listener.incoming().flatten() {
                    let Ok(far) = UnixStream::connect(&path) else { continue };
                    near.set_nodelay(true).unwrap();
                    let (mut from, mut to) = (near.try_clone().unwrap(), far.try_clone().unwrap());
                    std::thread::spawn(move || {
                        let _ = std::io::copy(&mut from, &mut to);
                        let _ = to.shutdown(Shutdown::Both);
                    });
                    let (mut from, mut to) = (far, near);
                    std::thread::spawn(move || {
                        let _ = std::io::copy(&mut from, &mut to);
                        let _ = to.shutdown(Shutdown::Both);
                    });
                }
            });
        }
        format!("127.0.0.1:{port}")
    }

    pub fn daemon_pid(&self) -> u32 {
        self.daemon.as_ref().unwrap().id()
    }

    /// Ends daemon and control at once. Repeatable.
    pub fn kill(&mut self) {
        self.state.dead.store(true, Ordering::SeqCst);
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }

    /// Changes the head behind the daemon's back: through an export of its own.
    pub fn write_pattern(&self, pattern: u8, offset: u64, length: u64) {
        let mut monitor = self.state.monitor.lock().unwrap();
        let add = json!({"type": "nbd", "id": "test", "node-name": "disk", "name": "test", "writable": true});
        monitor.ask(json!({"execute": "block-export-add", "arguments": add})).unwrap();
        let socket = self.directory.join(file::NBD_SOCKET);
        let uri = format!("nbd+unix:///test?socket={}", socket.display());
        run(Command::new("qemu-io").args(["-f", "raw", "-c", &format!("write -P {pattern} {offset} {length}"), &uri]));
        let arguments = json!({"id": "test", "mode": "hard"});
        monitor.ask(json!({"execute": "block-export-del", "arguments": arguments})).unwrap();
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        self.kill();
    }
}

impl State {
    fn serve(&self, stream: UnixStream) {
        let mut answers = stream.try_clone().unwrap();
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            if self.dead.load(Ordering::SeqCst) {
                return;
            }
            let request: Request = serde_json::from_str(&line).unwrap();
            self.call_hook(&request, Moment::Before);
            let reply = self.answer(request.clone());
            self.call_hook(&request, Moment::After);
            if writeln!(answers, "{}", serde_json::to_string(&reply).unwrap()).is_err() {
                return;
            }
        }
    }

    fn call_hook(&self, request: &Request, moment: Moment) {
        let hook = self.hook.lock().unwrap().clone();
        if let Some(hook) = hook {
            hook(request, moment);
        }
    }

    fn answer(&self, request: Request) -> Reply {
        let mut record = self.record.lock().unwrap();
        let refuse = |message: String| Reply::Refused { message };
        match request {
            Request::Status => {
                let export = self.monitor.lock().unwrap().export.clone();
                Reply::Status { record: record.clone(), export, actual_size_bytes: 0 }
            }
            Request::Open { generation, .. } | Request::Fence { generation, .. } if generation <= record.generation => {
                refuse(format!("generation {generation} is not above {}", record.generation))
            }
            Request::Open { seen: Some(seen), .. } if seen != record.generation => {
                refuse(format!("it is at generation {} and not at {seen}", record.generation))
            }
            Request::Open { generation, members, .. } => {
                let mut monitor = self.monitor.lock().unwrap();
                let export = format!("generation-{generation}");
                let add = json!({"type": "nbd", "id": "head", "node-name": "disk", "name": export, "writable": true});
                if let Err(error) = monitor.end_export() {
                    return refuse(error);
                }
                (record.generation, record.members, record.clean) = (generation, members, false);
                match monitor.ask(json!({"execute": "block-export-add", "arguments": add})) {
                    Ok(_) => {
                        monitor.export = Some(export.clone());
                        Reply::Opened { export }
                    }
                    Err(error) => refuse(error),
                }
            }
            Request::Fence { export, .. } if self.monitor.lock().unwrap().export.as_ref() != Some(&export) => {
                refuse(format!("`{export}` is not the export that serves"))
            }
            Request::Fence { generation, members, .. } => {
                (record.generation, record.members, record.clean) = (generation, members, false);
                Reply::Done
            }
            Request::Close { generation } if generation == record.generation => {
                match self.monitor.lock().unwrap().end_export() {
                    Ok(()) => {
                        record.clean = true;
                        Reply::Done
                    }
                    Err(error) => refuse(error),
                }
            }
            Request::Close { generation } => refuse(format!("{generation} is not the generation")),
        }
    }
}

//! What the tests of both roles share: disks, scripted HTTP servers, running roles.
#![allow(dead_code, reason = "each test file uses a part of this")]

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, LazyLock, Mutex};
use std::time::{Duration, Instant, SystemTime};

use api::image::{CopyState, SourceType};
use backing_image_agent::config_file::FileConfig;
use backing_image_agent::data_source::{self, FileStatus};
use backing_image_agent::download::Patience;
use backing_image_agent::layout::{Disk, FileSet, ImageKey};
use backing_image_agent::manager;
use backing_image_agent::manifest::Manifest;
use proto::bimrpc::backing_image_manager_service_client::BackingImageManagerServiceClient;
use proto::bimrpc::{BackingImageResponse, BackingImageSpec, FetchRequest, GetRequest, SyncRequest};
use runtime::backoff::Backoff;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

pub const MIB: usize = 1 << 20;
pub const UUID: &str = "0a1b2c3d";
const DEADLINE: Duration = Duration::from_secs(60);
/// Long enough for a busy machine; tests of silence take a shorter one.
const IDLE_TIMEOUT: Duration = Duration::from_secs(20);

/// An address that no other test uses.
pub fn address(port: u16) -> SocketAddr {
    let [a, b, c, ..] = uuid::Uuid::new_v4().into_bytes();
    SocketAddr::new(IpAddr::V4(Ipv4Addr::new(127, a.max(2), b, c.clamp(1, 254))), port)
}

/// A client that needs no certificates, as a fresh machine has none.
pub fn http() -> reqwest::Client {
    reqwest::Client::builder().no_proxy().tls_certs_only([]).build().unwrap()
}

pub fn key() -> ImageKey {
    ImageKey::parse("parrot", UUID).unwrap()
}

/// An image with random data, zeros, and a last chunk that is not full.
pub fn image() -> Vec<u8> {
    static IMAGE: LazyLock<Vec<u8>> = LazyLock::new(|| {
        let mut bytes = vec![0u8; 12 * MIB + 3 * 512];
        let mut state = 7u32;
        for (index, byte) in bytes.iter_mut().enumerate() {
            if !(3 * MIB..6 * MIB).contains(&index) {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                *byte = (state >> 24) as u8;
            }
        }
        bytes
    });
    IMAGE.clone()
}

pub fn sha512(bytes: &[u8]) -> String {
    hex::encode(openssl::sha::sha512(bytes))
}

pub fn run_program(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().expect("the program is installed");
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A disk in a temporary folder.
pub struct TestDisk {
    folder: tempfile::TempDir,
    mounted: bool,
}

impl TestDisk {
    pub fn new() -> TestDisk {
        let disk = TestDisk { folder: tempfile::tempdir().unwrap(), mounted: false };
        disk.prepare();
        disk
    }

    /// What lies in a folder already.
    pub fn found(folder: tempfile::TempDir) -> TestDisk {
        TestDisk { folder, mounted: false }
    }

    /// A disk of 8 MiB.
    pub fn small() -> TestDisk {
        TestDisk::with_room(8 * MIB)
    }

    /// A disk with room for so many bytes, whole pages, its own file among them.
    pub fn with_room(bytes: usize) -> TestDisk {
        let folder = tempfile::tempdir().unwrap();
        let size = format!("size={bytes}");
        run_program("mount", &["-t", "tmpfs", "-o", &size, "tmpfs", folder.path().to_str().unwrap()]);
        let disk = TestDisk { folder, mounted: true };
        disk.prepare();
        disk
    }

    /// A disk whose filesystem cannot reserve room, filled so that not many more than so many bytes are free.
    pub fn that_cannot_reserve(free_bytes: u64) -> TestDisk {
        let folder = tempfile::tempdir().unwrap();
        let (image, place) = (tempfile::NamedTempFile::new().unwrap(), folder.path().to_str().unwrap().to_owned());
        image.as_file().set_len(32 * MIB as u64).unwrap();
        let path = image.path().to_str().unwrap();
        run_program("mkfs.ext2", &["-q", "-F", "-b", "1024", "-m", "0", path]);
        // The loop device goes with the mount, and keeps the file, which has no name any more.
        run_program("mount", &["-o", "loop", path, &place]);
        let disk = TestDisk { folder, mounted: true };
        disk.prepare();
        let mut filler = File::create(disk.path().join("filler")).unwrap();
        let free = || rustix::fs::statvfs(disk.path()).map(|stat| stat.f_bavail * stat.f_frsize).unwrap();
        while free() > free_bytes + 4096 {
            filler.write_all(&[1; 1024]).unwrap();
        }
        disk
    }

    fn prepare(&self) {
        let config = r#"{"diskName":"disk-1","diskUUID":"disk-uuid","diskDriver":"","state":"ready"}"#;
        std::fs::write(self.path().join("longhorn-disk.cfg"), config).unwrap();
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    pub fn disk(&self) -> Disk {
        Disk::new(self.path())
    }

    pub fn copy_file(&self) -> PathBuf {
        self.disk().copy(&key()).file
    }

    /// The names in `tmp/`.
    pub fn temporary_files(&self) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.path().join("tmp")) else { return vec![] };
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

impl Drop for TestDisk {
    fn drop(&mut self) {
        if self.mounted {
            let _ = Command::new("umount").arg("-l").arg(self.folder.path()).status();
        }
    }
}

/// Changes what `backing.cfg` says.
pub fn change_config(files: &FileSet, change: impl FnOnce(&mut FileConfig)) {
    let mut config = FileConfig::read(&files.config).unwrap();
    change(&mut config);
    config.write(&files.config).unwrap();
}

/// Changes what the manifest says.
pub fn change_manifest(files: &FileSet, change: impl FnOnce(&mut Manifest)) {
    let mut manifest = Manifest::read(&files.manifest).unwrap().unwrap();
    change(&mut manifest);
    manifest.write(&files.manifest).unwrap();
}

/// Changes a sealed file and leaves its time as it was, as silent damage does. Put in its place at once: a manager that looks at
/// it meanwhile must not see another time.
pub fn rewrite(files: &FileSet, change: impl FnOnce(&File)) {
    let (path, changed) = (&files.file, files.file.with_extension("changed"));
    run_program("cp", &["-a", "--sparse=always", path.to_str().unwrap(), changed.to_str().unwrap()]);
    std::fs::set_permissions(&changed, PermissionsExt::from_mode(0o644)).unwrap();
    let file = File::options().read(true).write(true).open(&changed).unwrap();
    change(&file);
    file.set_modified(path.metadata().unwrap().modified().unwrap()).unwrap();
    std::fs::rename(changed, path).unwrap();
}

/// Flips a bit of a chunk of the copy, as [`rewrite`] does.
pub fn damage(disk: &TestDisk, chunk: usize) {
    rewrite(&disk.disk().copy(&key()), |file| {
        let (mut byte, offset) = ([0], (chunk * MIB) as u64 + 99);
        file.read_exact_at(&mut byte, offset).unwrap();
        file.write_all_at(&[byte[0] ^ 4], offset).unwrap();
    });
}

/// Changes the time of the copy.
pub fn touch(disk: &TestDisk, time: SystemTime) {
    File::open(disk.copy_file()).unwrap().set_modified(time).unwrap();
}

/// What a scripted server answers to one request.
pub struct Reply {
    pub head: String,
    pub body: Vec<u8>,
    /// Keeps the connection open and silent instead of closing it.
    pub stall: bool,
}

impl Reply {
    pub fn status(line: &str) -> Reply {
        Reply { head: format!("HTTP/1.1 {line}\r\nContent-Length: 0\r\n"), body: vec![], stall: false }
    }

    pub fn whole(body: &[u8]) -> Reply {
        Reply {
            head: format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n", body.len()),
            body: body.to_vec(),
            stall: false,
        }
    }

    pub fn with(mut self, header: &str) -> Reply {
        self.head += &format!("{header}\r\n");
        self
    }

    /// Sends only so many bytes of the body.
    pub fn cut(mut self, length: usize) -> Reply {
        self.body.truncate(length);
        self
    }

    /// Claims another length than that of the body.
    pub fn announcing(mut self, length: usize) -> Reply {
        let from = self.head.find("Content-Length: ").unwrap();
        let to = from + self.head[from..].find("\r\n").unwrap();
        self.head.replace_range(from..to, &format!("Content-Length: {length}"));
        self
    }

    /// Calls itself a part of the file.
    pub fn called_a_part(mut self) -> Reply {
        self.head = self.head.replace("200 OK", "206 Partial Content");
        self
    }

    pub fn stalled(mut self) -> Reply {
        self.stall = true;
        self
    }
}

/// The start of the range that a request asks for.
pub fn range_start(head: &str) -> Option<usize> {
    let line = head.lines().find(|line| line.to_ascii_lowercase().starts_with("range: "))?;
    line.split_once('=')?.1.split_once('-')?.0.parse().ok()
}

/// The rest of a file from there on.
pub fn partial(bytes: &[u8], start: usize) -> Reply {
    let length = bytes.len();
    Reply {
        head: format!(
            "HTTP/1.1 206 Partial Content\r\nContent-Length: {}\r\nContent-Range: bytes {start}-{}/{length}\r\n",
            length - start,
            length - 1
        ),
        body: bytes[start..].to_vec(),
        stall: false,
    }
}

/// An HTTP server that answers as a test wants.
pub struct Source {
    pub address: SocketAddr,
    requests: Arc<Mutex<Vec<String>>>,
}

impl Source {
    /// `script` gets the number of the request and its head.
    pub async fn new(script: impl Fn(usize, &str) -> Reply + Send + Sync + 'static) -> Source {
        Source::at(IpAddr::V4(Ipv4Addr::LOCALHOST), script).await
    }

    /// The same at another address.
    pub async fn at(ip: IpAddr, script: impl Fn(usize, &str) -> Reply + Send + Sync + 'static) -> Source {
        let listener = TcpListener::bind((ip, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let requests = Arc::new(Mutex::new(vec![]));
        let (seen, script) = (requests.clone(), Arc::new(script));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(answer(stream, seen.clone(), script.clone()));
            }
        });
        Source { address, requests }
    }

    pub async fn of(bytes: &[u8]) -> Source {
        let bytes = bytes.to_vec();
        Source::new(move |_, _| Reply::whole(&bytes)).await
    }

    pub fn url(&self) -> String {
        format!("http://{}/image", self.address)
    }

    pub fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }
}

async fn answer(
    mut stream: TcpStream,
    seen: Arc<Mutex<Vec<String>>>,
    script: Arc<impl Fn(usize, &str) -> Reply + Send + Sync>,
) {
    let mut head = vec![];
    while !head.ends_with(b"\r\n\r\n") {
        let Ok(byte) = stream.read_u8().await else { return };
        head.push(byte);
    }
    let head = String::from_utf8(head).unwrap();
    let number = {
        let mut seen = seen.lock().unwrap();
        seen.push(head.clone());
        seen.len()
    };
    let reply = script(number, &head);
    let _ = stream.write_all(format!("{}Connection: close\r\n\r\n", reply.head).as_bytes()).await;
    let _ = stream.write_all(&reply.body).await;
    let _ = stream.flush().await;
    if reply.stall {
        std::future::pending::<()>().await;
    }
}

/// A data source that runs in this process.
pub struct RunningSource {
    pub address: SocketAddr,
    shutdown: CancellationToken,
}

impl Drop for RunningSource {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

pub fn impatient() -> Patience {
    Patience {
        idle_timeout: IDLE_TIMEOUT,
        told_after: Duration::from_millis(100),
        backoff: Backoff { initial: Duration::from_millis(10), max: Duration::from_millis(20) },
        tries_without_progress: 4,
        checkpoint_interval: Duration::from_millis(20),
    }
}

pub fn source_config(disk: &TestDisk, parameters: &[(&str, &str)], checksum: Option<&str>) -> data_source::Config {
    data_source::Config {
        listen: address(8000),
        disk_path: disk.path().into(),
        name: key().name,
        uuid: key().uuid,
        source_type: SourceType::Download,
        parameters: parameters.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect::<BTreeMap<_, _>>(),
        checksum: checksum.map(|text| text.parse().unwrap()),
        // The servers of the tests are on this machine.
        allowed_sources: "127.0.0.0/8".parse().unwrap(),
        bandwidth_limit: 0,
        patience: impatient(),
        security: Default::default(),
    }
}

impl RunningSource {
    pub async fn start(config: data_source::Config) -> RunningSource {
        let shutdown = CancellationToken::new();
        let address = config.listen;
        tokio::spawn(data_source::run(config, shutdown.clone()));
        wait_for_port(address).await;
        RunningSource { address, shutdown }
    }

    pub async fn get(&self) -> FileStatus {
        http().get(format!("http://{}/v1/file", self.address)).send().await.unwrap().json().await.unwrap()
    }

    pub async fn post(&self, query: &str) -> (u16, String) {
        let url = format!("http://{}/v1/file?{query}", self.address);
        let response = http().post(url).send().await.unwrap();
        (response.status().as_u16(), response.text().await.unwrap())
    }

    /// Every reported status until the preparation ended.
    pub async fn history(&self) -> Vec<FileStatus> {
        let mut response = http().get(format!("http://{}/v1/file?watch=true", self.address)).send().await.unwrap();
        let mut text = String::new();
        let mut history: Vec<FileStatus> = vec![];
        loop {
            let part = tokio::time::timeout(DEADLINE, response.chunk()).await.expect("a report in time").unwrap();
            text += std::str::from_utf8(&part.expect("the stream goes on")).unwrap();
            while let Some((line, rest)) = text.split_once('\n') {
                history.push(serde_json::from_str(line).unwrap());
                text = rest.to_owned();
            }
            if history.last().is_some_and(|s| matches!(s.state, CopyState::ReadyForTransfer | CopyState::Failed)) {
                return history;
            }
        }
    }

    pub async fn end(&self) -> FileStatus {
        self.history().await.pop().unwrap()
    }
}

/// A manager with a runtime of its own, so that it can be killed with all that it was doing.
pub struct RunningManager {
    pub address: SocketAddr,
    runtime: Option<tokio::runtime::Runtime>,
}

impl RunningManager {
    pub async fn start(disk: &TestDisk) -> RunningManager {
        RunningManager::start_with(disk, address(8000), IDLE_TIMEOUT).await
    }

    pub async fn start_with(disk: &TestDisk, address: SocketAddr, idle_timeout: Duration) -> RunningManager {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let mut config = manager::Config::new(address, disk.path());
        config.idle_timeout = idle_timeout;
        config.recheck_interval = Duration::from_millis(100);
        // Damage that a test does is that of a disk, which nobody tells of.
        config.watch_files = false;
        runtime.spawn(async move {
            if let Err(error) = manager::run(config, CancellationToken::new()).await {
                panic!("manager: {}", error.chain());
            }
        });
        wait_for_port(address).await;
        let manager = RunningManager { address, runtime: Some(runtime) };
        // It answers once it has looked at the whole disk: what a test puts there from now on is not met by that look.
        manager.client().await.version_get(()).await.unwrap();
        manager
    }

    /// Ends it without warning.
    pub fn kill(mut self) {
        self.runtime.take().unwrap().shutdown_background();
    }

    pub async fn client(&self) -> BackingImageManagerServiceClient<Channel> {
        BackingImageManagerServiceClient::connect(format!("http://{}", self.address)).await.unwrap()
    }

    pub async fn get(&self) -> BackingImageResponse {
        let request = GetRequest { name: key().name.to_string(), uuid: UUID.into() };
        self.client().await.get(request).await.unwrap().into_inner()
    }

    pub async fn sync(
        &self,
        spec: BackingImageSpec,
        from: &[SocketAddr],
    ) -> Result<BackingImageResponse, tonic::Status> {
        let from_address = from.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
        let request = SyncRequest { spec: Some(spec), from_address };
        Ok(self.client().await.sync(request).await?.into_inner())
    }

    pub async fn fetch(&self, spec: BackingImageSpec, from: &str) -> Result<BackingImageResponse, tonic::Status> {
        let request = FetchRequest { spec: Some(spec), data_source_address: from.into() };
        Ok(self.client().await.fetch(request).await?.into_inner())
    }

    /// Waits until the copy is in a state.
    pub async fn reaches(&self, state: &str) -> BackingImageResponse {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let copy = self.get().await;
            let status = copy.status.clone().unwrap();
            if status.state == state {
                return copy;
            }
            assert!(Instant::now() < deadline, "wanted {state}, is {status:?}");
            tokio::time::sleep(Duration::from_millis(20)).await; // poll
        }
    }
}

impl Drop for RunningManager {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

pub fn spec() -> BackingImageSpec {
    BackingImageSpec { name: key().name.to_string(), uuid: UUID.into(), ..Default::default() }
}

pub async fn wait_for_port(address: SocketAddr) {
    let deadline = Instant::now() + DEADLINE;
    while TcpStream::connect(address).await.is_err() {
        assert!(Instant::now() < deadline, "nothing listens on {address}");
        tokio::time::sleep(Duration::from_millis(10)).await; // poll
    }
}

pub async fn wait_until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !condition().await {
        assert!(Instant::now() < deadline, "never happened: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await; // poll
    }
}

/// A disk with a ready copy of [`image`], and its manager.
pub async fn first() -> (TestDisk, RunningManager) {
    let disk = TestDisk::new();
    let manager = RunningManager::start(&disk).await;
    prepare(&disk, &manager, &image()).await;
    (disk, manager)
}

/// A second disk with the copy, made by a sync from the first, and its manager.
pub async fn second(first: &RunningManager) -> (TestDisk, RunningManager) {
    let disk = TestDisk::new();
    let manager = RunningManager::start(&disk).await;
    manager.sync(spec(), &[first.address]).await.unwrap();
    manager.reaches("ready").await;
    (disk, manager)
}

/// Two disks with the same copy.
pub async fn two() -> (TestDisk, RunningManager, TestDisk, RunningManager) {
    let (disk, manager) = first().await;
    let (other_disk, other) = second(&manager).await;
    (disk, manager, other_disk, other)
}

/// Prepares an image on a disk and hands it over to the manager of the disk.
pub async fn prepare(disk: &TestDisk, manager: &RunningManager, bytes: &[u8]) {
    let source = Source::of(bytes).await;
    let running = RunningSource::start(source_config(disk, &[("url", &source.url())], None)).await;
    let status = running.end().await;
    assert_eq!(status.state, CopyState::ReadyForTransfer, "{}", status.message);
    let copy = manager.fetch(spec(), &running.address.to_string()).await.unwrap();
    assert_eq!(copy.status.unwrap().state, "ready");
}

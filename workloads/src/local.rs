//! Local processes as workloads.
//!
//! Each workload is a detached process of our binary with a loopback address of its own. It outlives us: a new [`Local`] over the same
//! directory finds it by its record, or, after a crash in the middle of a start, by the file into which it wrote itself.
//! What a workload has started itself is known by a marker in its environment and ends with it, as in a pod.

mod limits;
mod log;
mod marked;
mod metrics;
mod ready;
mod record;
mod supervise;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use futures::stream::BoxStream;
use runtime::process::{Launch, ProcessIdentity};
use tokio::task::spawn_blocking;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use crate::changes::Changes;
use crate::{Workload, WorkloadError, WorkloadSpec, WorkloadState, Workloads, check_spec};
use marked::Marked;
use record::{Record, Records};

/// How local workloads run.
#[derive(Clone, Debug)]
pub struct LocalConfig {
    /// Holds the record and the log of each workload.
    pub directory: PathBuf,
    /// Our binary.
    pub program: PathBuf,
    /// Loopback addresses that nobody else uses; each workload has one.
    pub addresses: Vec<Ipv4Addr>,
    /// How long a workload may take until its ports accept connections.
    pub start_timeout: Duration,
}

/// Workloads as local processes. Dropping it leaves them running.
pub struct Local {
    inner: Arc<Inner>,
}

struct Inner {
    config: LocalConfig,
    records: Records,
    entries: Mutex<BTreeMap<String, Entry>>,
    /// One start or removal of a name at a time.
    names: Mutex<BTreeMap<String, Arc<tokio::sync::Mutex<()>>>>,
    /// The address after the last one given, so that a freed address rests before it is given again.
    next_address: Mutex<usize>,
    changes: Changes,
    tasks: TaskTracker,
    stop: CancellationToken,
}

struct Entry {
    record: Record,
    state: WorkloadState,
}

impl Local {
    /// Opens the directory and adopts what runs. Must be called within a tokio runtime, by one process at a time.
    pub async fn open(config: LocalConfig) -> Result<Local, WorkloadError> {
        let directory = config.directory.clone();
        let error = &io_error(format!("open the workloads in {}", directory.display()));
        let opened = blocking(move || {
            let records = Records::open(&directory)?;
            let (adopted, strangers) = match_processes(&records)?;
            Ok((records, adopted, strangers))
        });
        let (records, adopted, strangers) = opened.await.map_err(error)?;
        let inner = Arc::new(Inner {
            config,
            records,
            entries: Mutex::default(),
            names: Mutex::default(),
            next_address: Mutex::default(),
            changes: Changes::default(),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        });
        for token in strangers {
            warn!(token, "processes without a workload are ended");
            if let Err(error) = marked::end(&inner.records, &token).await {
                warn!(token, %error, "processes without a workload cannot be ended");
            }
        }
        for record in adopted {
            inner.adopt(record).await.map_err(error)?;
        }
        let logs = inner.clone();
        inner.spawn(async move { logs.bound_logs().await });
        Ok(Local { inner })
    }

    /// Shows its metrics: workloads by state.
    pub fn register_metrics(&self, metrics: &runtime::metrics::Metrics) {
        metrics.register(|registry| metrics::register(registry, &self.inner));
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        self.inner.stop.cancel();
    }
}

/// Matches records with processes: what to adopt, and the tokens of processes that no record asks for.
fn match_processes(records: &Records) -> io::Result<(Vec<Record>, Vec<String>)> {
    let mut adopted = vec![];
    let mut alive = BTreeSet::new();
    for mut record in records.load()? {
        if record.process.is_none() {
            let Some(process) = runtime::process::started(&records.started(&record.spec.name))? else {
                // A start that nobody was told of and that left nothing.
                records.remove(&record.spec.name)?;
                continue;
            };
            record.process = Some(process);
            records.save(&record)?;
        }
        if record.process.as_ref().is_some_and(ProcessIdentity::is_alive) {
            alive.insert(record.token.clone());
        }
        adopted.push(record);
    }
    let marked = Marked::scan(records)?;
    let strangers = marked.tokens().filter(|token| !alive.contains(*token)).map(str::to_owned).collect();
    Ok((adopted, strangers))
}

fn io_error(action: String) -> impl Fn(io::Error) -> WorkloadError {
    move |source| WorkloadError::Io { action: action.clone(), source }
}

/// File work off the async threads.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    spawn_blocking(work).await.map_err(io::Error::other)?
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Entry {
    fn workload(&self) -> Workload {
        let ip = Some(IpAddr::V4(self.record.ip));
        Workload { spec: self.record.spec.clone(), state: self.state.clone(), ip, is_outdated: false }
    }
}

impl Inner {
    fn spawn(self: &Arc<Self>, task: impl Future<Output = ()> + Send + 'static) {
        let stop = self.stop.clone();
        self.tasks.spawn(async move { stop.run_until_cancelled(task).await });
    }

    fn observed(&self, name: &str) -> Option<Workload> {
        lock(&self.entries).get(name).map(Entry::workload)
    }

    async fn turn_of(&self, name: &str) -> tokio::sync::OwnedMutexGuard<()> {
        let turn = lock(&self.names).entry(name.to_owned()).or_default().clone();
        turn.lock_owned().await
    }

    /// Forgets the turn of a name unless somebody waits for it.
    fn forget_turn(&self, name: &str, turn: tokio::sync::OwnedMutexGuard<()>) {
        let mut names = lock(&self.names);
        drop(turn);
        if names.get(name).is_some_and(|turn| Arc::strong_count(turn) == 1) {
            names.remove(name);
        }
    }

    async fn ensure(self: Arc<Self>, spec: WorkloadSpec) -> Result<Workload, WorkloadError> {
        check_spec(&spec)?;
        let turn = self.turn_of(&spec.name).await;
        let result = self.ensure_alone(&spec).await;
        self.forget_turn(&spec.name, turn);
        result
    }

    async fn ensure_alone(self: &Arc<Self>, spec: &WorkloadSpec) -> Result<Workload, WorkloadError> {
        if let Some(found) = self.observed(&spec.name) {
            return if found.spec.is_same(spec) {
                Ok(found)
            } else {
                Err(WorkloadError::Different { name: spec.name.clone() })
            };
        }
        let start_error = |source| WorkloadError::Start { name: spec.name.clone(), source };
        let ip = self.free_address().map_err(start_error)?;
        let token = uuid::Uuid::new_v4().to_string();
        let record = Record { spec: spec.clone(), ip, token, process: None, failure: None };
        let (record, child) = match self.start(record).await {
            Ok(started) => started,
            Err(error) => {
                let (records, name) = (self.records.clone(), spec.name.clone());
                if let Err(error) = blocking(move || records.remove(&name)).await {
                    warn!(workload = spec.name, %error, "remains of a failed start cannot be removed");
                }
                return Err(start_error(error));
            }
        };
        info!(workload = spec.name, %ip, "workload started");
        Ok(self.supervise(record, WorkloadState::Starting { message: String::new() }, Some(child)))
    }

    /// Writes down that it is to start, starts it, writes down what was started.
    async fn start(&self, mut record: Record) -> io::Result<(Record, tokio::process::Child)> {
        let (records, intent) = (self.records.clone(), record.clone());
        blocking(move || records.save(&intent)).await?;
        let program = self.config.program.display();
        let named = |error: io::Error| io::Error::new(error.kind(), format!("program `{program}`: {error}"));
        let (process, child) = self.launch(&record).spawn_watched().map_err(named)?;
        record.process = Some(process.clone());
        let (records, started) = (self.records.clone(), record.clone());
        if let Err(error) = blocking(move || records.save(&started)).await {
            // Nobody would know it: its record goes with this failure.
            if process.terminate(Duration::ZERO).await.is_err() {
                process.wait().await?;
            }
            return Err(error);
        }
        Ok((record, child))
    }

    fn launch(&self, record: &Record) -> Launch {
        let ip = record.ip.to_string();
        let mut launch = Launch::new(&self.config.program);
        launch.args = record.spec.args.iter().map(|arg| arg.replace("$(POD_IP)", &ip).into()).collect();
        launch.env = record.spec.env.clone();
        launch.env.extend(record.spec.secrets.0.clone());
        launch.env.insert("POD_IP".into(), ip);
        launch.env.extend([self.records.marker(&record.token)]);
        launch.log_file = Some(self.records.log(&record.spec.name));
        launch.started_file = Some(self.records.started(&record.spec.name));
        launch
    }

    fn free_address(&self) -> io::Result<Ipv4Addr> {
        let entries = lock(&self.entries);
        let taken: BTreeSet<_> = entries.values().map(|entry| entry.record.ip).collect();
        let addresses = &self.config.addresses;
        let mut next = lock(&self.next_address);
        let candidates = (0..addresses.len()).map(|offset| (*next + offset) % addresses.len());
        let free = candidates.into_iter().find(|index| !taken.contains(&addresses[*index]));
        let Some(index) = free else {
            let count = addresses.len();
            return Err(io::Error::other(format!(
                "all {count} addresses for workloads are in use; use fewer nodes or disks"
            )));
        };
        *next = index + 1;
        Ok(addresses[index])
    }

    async fn remove(self: Arc<Self>, name: String) -> Result<(), WorkloadError> {
        let turn = self.turn_of(&name).await;
        let result = self.remove_alone(&name).await;
        self.forget_turn(&name, turn);
        result
    }

    async fn remove_alone(&self, name: &str) -> Result<(), WorkloadError> {
        let Some(record) = lock(&self.entries).get(name).map(|entry| entry.record.clone()) else { return Ok(()) };
        if let Some(process) = &record.process {
            process.terminate(limits::STOP_GRACE).await.map_err(io_error(format!("end workload `{name}`")))?;
        }
        let leftovers = io_error(format!("end what workload `{name}` left behind"));
        marked::end(&self.records, &record.token).await.map_err(leftovers)?;
        let (records, forgotten) = (self.records.clone(), name.to_owned());
        let removal = blocking(move || records.remove(&forgotten));
        removal.await.map_err(io_error(format!("remove the record of workload `{name}`")))?;
        lock(&self.entries).remove(name);
        info!(workload = name, "workload removed");
        self.changes.announce(name);
        Ok(())
    }

    async fn bound_logs(&self) {
        loop {
            let names: Vec<_> = lock(&self.entries).keys().cloned().collect();
            for name in names {
                let log = self.records.log(&name);
                if let Err(error) = blocking(move || log::shorten(&log)).await {
                    warn!(workload = name, %error, "log cannot be shortened");
                }
            }
            tokio::time::sleep(limits::LOG_CHECK_INTERVAL).await;
        }
    }
}

#[async_trait]
impl Workloads for Local {
    async fn ensure(&self, spec: &WorkloadSpec) -> Result<Workload, WorkloadError> {
        // In a task of its own: a caller that gives up in the middle must not leave a process that nobody knows.
        let name = spec.name.clone();
        let task = self.inner.tasks.spawn(self.inner.clone().ensure(spec.clone()));
        task.await.map_err(|source| WorkloadError::Start { name, source: io::Error::other(source) })?
    }

    async fn get(&self, name: &str) -> Result<Option<Workload>, WorkloadError> {
        Ok(self.inner.observed(name))
    }

    async fn list(&self) -> Result<Vec<Workload>, WorkloadError> {
        Ok(lock(&self.inner.entries).values().map(Entry::workload).collect())
    }

    async fn remove(&self, name: &str) -> Result<(), WorkloadError> {
        let task = self.inner.tasks.spawn(self.inner.clone().remove(name.to_owned()));
        let error = io_error(format!("remove workload `{name}`"));
        task.await.map_err(|source| error(io::Error::other(source)))?
    }

    fn changes(&self) -> BoxStream<'static, String> {
        let inner = Arc::downgrade(&self.inner);
        self.inner
            .changes
            .listen(move || inner.upgrade().map_or(vec![], |inner| lock(&inner.entries).keys().cloned().collect()))
    }
}

//! Replica objects of this node: observe, decide, act, report.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use api::engine::InstanceState;
use api::names::FINALIZER;
use api::quantity::SizeBytes;
use api::replica::ReplicaStatus;
use api::{BackingImage, Node, Replica, condition};
use dataplane::storage_daemon::allocated_bytes;
use jiff::Timestamp;
use proto::replica::{Config, ImageFile, Record, Reply, Request, file};
use runtime::process::{Launch, ProcessIdentity};
use tokio::time::Instant;
use tracing::info;

use crate::control;
use crate::disk_calls::Silent;
use crate::disks;
use crate::endings::{self, Progress, Work};
use crate::error::InstanceError;
use crate::limits::{CONNECT, CONTROL_TIMEOUT, ENDING_TOLD, FIRST_PORT, LAST_PORT};
use crate::replica_decision::{Decision, Process, Step, at_work, behind_silence, decide, give_up};
use crate::role::{Key, Role};

/// What was seen of a replica.
struct Observed {
    process: Process,
    /// `None`: it cannot be read now, so what was known of it stays.
    record: Option<Record>,
    port: u16,
    actual_size_bytes: u64,
}

/// Brings the process of one replica in line with its object.
pub async fn reconcile(role: &Arc<Role>, name: &str) -> Result<Option<Duration>, InstanceError> {
    let replica = role.config.store.get::<Replica>(name).await?;
    let replica = replica.filter(|r| r.spec.node_id == role.config.node.as_str());
    match (role.endings.progress(name), &replica) {
        (Progress::None, _) | (Progress::Over(Work::End, Ok(())), _) | (Progress::Over(Work::Remove, Ok(())), None) => {
        }
        (Progress::GoesOn(work, true), Some(replica)) => {
            return report_work(role, name, replica, work).await.map(|()| None);
        }
        (Progress::GoesOn(..), _) => return Ok(Some(ENDING_TOLD)),
        (Progress::Over(Work::Remove, Ok(())), Some(replica)) if !is_wanted(replica) => {
            return release(role, name, replica).await.map(|()| None);
        }
        // Of a replica with data nobody wished to remove any: this is another one of the name.
        (Progress::Over(Work::Remove, Ok(())), Some(_)) => {}
        (Progress::Over(_, Err(error)), _) => return Err(error),
    }
    let Some(replica) = replica else {
        // Nobody wishes for it any more. Its data stays: silence about it is no order to remove it.
        if role.replicas.is_known(name) {
            endings::begin_end(role, name);
        }
        return Ok(None);
    };
    let observed = observe(role, name, &replica).await?;
    if matches!(observed.process, Process::None | Process::Ended(_)) {
        let directory = directory(&replica)?;
        match role.disk_calls.ask(Path::new(&replica.spec.disk_path), move || forget_unfinished(&directory)).await {
            Ok(forgotten) => forgotten?,
            // That a process has ended is told and dealt with whatever its disk does; none is started there.
            Err(silent) if observed.process == Process::None => return Err(silent.into()),
            Err(_) => {}
        }
    }
    let image = match replica.spec.backing_image.as_str() {
        "" => None,
        image => role.config.store.get::<BackingImage>(image).await?,
    };
    let decision = decide(&replica, image.as_ref(), &observed.process);
    match &decision.step {
        Step::Start(image) => {
            start(role, name, &replica, image.clone()).await?;
            let observed = observe(role, name, &replica).await?;
            let decision = decide(&replica, None, &observed.process);
            report(role, &replica, &decision, &observed).await?;
            Ok(retry_of(&observed))
        }
        Step::End => {
            match role.endings.problem(name) {
                None => drop(report(role, &replica, &decision, &observed).await?),
                Some(_) => report_work(role, name, &replica, Work::End).await?,
            }
            endings::begin_end(role, name);
            Ok(None)
        }
        Step::Remove => {
            role.disk_calls.check(Path::new(&replica.spec.disk_path))?;
            if role.endings.problem(name).is_some() {
                report_work(role, name, &replica, Work::Remove).await?;
            }
            endings::begin_removal(role, name, directory(&replica)?);
            Ok(Some(ENDING_TOLD))
        }
        Step::AwaitDisk => {
            let node = role.config.store.get::<Node>(role.config.node.as_str()).await?;
            let Some(decision) = node.and_then(|node| give_up(&replica, &node)) else {
                return report(role, &replica, &decision, &observed).await.map(|_| None);
            };
            // The report brings the next pass. Once the object is gone nobody can be told any more.
            if report(role, &replica, &decision, &observed).await? {
                return Ok(None);
            }
            release(role, name, &replica).await.map(|()| None)
        }
        Step::Nothing => {
            report(role, &replica, &decision, &observed).await?;
            Ok(retry_of(&observed))
        }
    }
}

/// A silent process is asked again soon; everything else comes with an event.
fn retry_of(observed: &Observed) -> Option<Duration> {
    (observed.process == Process::Silent).then_some(CONNECT.max)
}

fn directory(replica: &Replica) -> Result<PathBuf, InstanceError> {
    let name = &replica.spec.data_directory_name;
    let is_plain = !name.is_empty() && !name.starts_with('.') && !name.contains('/');
    if !is_plain || replica.spec.disk_path.is_empty() {
        let reason = format!(
            "its data directory `{name}` on disk path `{}` is not a plain name on a disk",
            replica.spec.disk_path
        );
        return Err(InstanceError::Replica { replica: replica.metadata.name.clone().unwrap_or_default(), reason });
    }
    Ok(Path::new(&replica.spec.disk_path).join("replicas").join(name))
}

async fn observe(role: &Arc<Role>, name: &str, replica: &Replica) -> Result<Observed, InstanceError> {
    let directory = directory(replica)?;
    let path = role.replicas.directory(name);
    let record = role.replicas.record(name).map_err(|source| InstanceError::File { action: "read", path, source })?;
    let port = record.as_ref().and_then(|r| r.port).unwrap_or(0);
    let alive = record.as_ref().filter(|r| r.identity.is_alive());
    let behind = |silent: Silent| {
        let ended = || role.replicas.last_words(name);
        let recorded = record.as_ref().map(|_| alive.map(drop).ok_or_else(ended));
        let process = behind_silence(replica, recorded, silent.to_string()).ok_or(silent)?;
        let actual_size_bytes = replica.status.as_ref().map_or(0, |s| s.actual_size_bytes);
        Ok(Observed { process, record: None, port, actual_size_bytes })
    };
    let stored = match look(role, replica, &directory).await {
        Ok(stored) => stored,
        Err(silent) => return behind(silent),
    };
    let seen = |process, record| Observed { process, record, port, actual_size_bytes: stored.bytes };
    let Some(process) = alive else {
        if let Err(why) = stored.disk
            && (record.is_none() || !is_wanted(replica))
        {
            return Ok(seen(Process::DiskAway(why), None));
        }
        let stored = stored.record?;
        let known = replica.status.as_ref().map_or(0, |s| s.generation);
        let process = match record {
            Some(_) => Process::Ended(role.replicas.last_words(name)),
            None if stored.is_none() && known > 0 => Process::DataGone(format!(
                "`{}` holds no {} any more, though the replica had reached generation {known}; delete the replica",
                directory.display(),
                file::RECORD
            )),
            None => Process::None,
        };
        // A replica that never had data has nothing to differ in.
        let stored = stored.or((known == 0).then(|| Record { clean: true, ..Record::default() }));
        return Ok(seen(process, stored));
    };
    role.watch_end(&process.identity, Key::Replica(name.to_owned()));
    let socket = directory.join(file::CONTROL_SOCKET);
    let disk = Path::new(&replica.spec.disk_path);
    match control::ask_on_disk::<Reply>(&role.disk_calls, disk, socket, &Request::Status).await {
        // It fell silent after the look.
        Err(silent) => behind(silent),
        Ok(Ok(Reply::Status { record, actual_size_bytes, .. })) => {
            let process = match (record.size_bytes, replica.spec.volume_size.0) {
                (has, wanted) if has < wanted => Process::Outgrown { has, wanted },
                _ => Process::Serving,
            };
            Ok(Observed { process, record: Some(record), port, actual_size_bytes })
        }
        _ => Ok(seen(Process::Silent, stored.record?)),
    }
}

fn is_wanted(replica: &Replica) -> bool {
    replica.metadata.deletion_timestamp.is_none()
}

/// What the disk of a replica tells of it.
struct Stored {
    /// Why it is not the replica's disk, if so.
    disk: Result<(), String>,
    record: Result<Option<Record>, InstanceError>,
    bytes: u64,
}

async fn look(role: &Role, replica: &Replica, directory: &Path) -> Result<Stored, Silent> {
    let (disk, uuid) = (PathBuf::from(&replica.spec.disk_path), replica.spec.disk_id.clone());
    let (place, directory) = (disk.clone(), directory.to_owned());
    let look = move || Stored {
        disk: disks::is_there(&place, &uuid),
        record: read_record(&directory),
        bytes: allocated_bytes(&directory).unwrap_or(0),
    };
    role.disk_calls.ask(&disk, look).await
}

/// `None`: it never had data, or has it no more.
fn read_record(directory: &Path) -> Result<Option<Record>, InstanceError> {
    let path = directory.join(file::RECORD);
    match fs::read(&path) {
        Ok(text) => serde_json::from_slice(&text).map(Some).map_err(|source| InstanceError::Parse { path, source }),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(InstanceError::File { action: "read", path, source }),
    }
}

/// Removes what a loss of power cut off in the middle of a write; nobody writes there now.
fn forget_unfinished(directory: &Path) -> Result<(), InstanceError> {
    let path = runtime::files::temporary_name(&directory.join(file::RECORD));
    runtime::files::remove_if_present(&path).map_err(|source| InstanceError::File { action: "remove", path, source })
}

async fn start(role: &Arc<Role>, name: &str, replica: &Replica, image: Option<ImageFile>) -> Result<(), InstanceError> {
    let path = role.replicas.directory(name);
    let at = |action| {
        let path = path.clone();
        move |source| InstanceError::File { action, path, source }
    };
    let port = {
        let _one = role.ports.lock().await;
        role.replicas.allocate_port(name, FIRST_PORT, LAST_PORT).map_err(at("give a port to"))?
    };
    let Some(port) = port else {
        let limit = usize::from(LAST_PORT - FIRST_PORT).div_ceil(2);
        return Err(InstanceError::NoPort { node: role.config.node.to_string(), limit });
    };
    let config = Config {
        volume: replica.spec.volume_name.clone(),
        replica: name.to_owned(),
        directory: directory(replica)?,
        size_bytes: replica.spec.volume_size.0,
        image,
        listen: SocketAddr::new(role.config.ip, port),
        certificates: role.config.security.directory().map(Path::to_owned),
    };
    let file = path.join("config.json");
    let text =
        serde_json::to_vec_pretty(&config).map_err(|source| InstanceError::Parse { path: file.clone(), source })?;
    fs::write(&file, text).map_err(at("write"))?;
    let launch = Launch::new(&role.config.program).arg("replica").flag("--config", &file);
    let what = || format!("replica {name}");
    let record = role
        .replicas
        .start(name, launch, Some(port))
        .map_err(|source| InstanceError::Start { what: what(), source })?;
    role.config.metrics.replica_started();
    info!(replica = name, pid = record.identity.pid, "replica process started");
    let disk = Path::new(&replica.spec.disk_path);
    await_answer(role, disk, &config.directory.join(file::CONTROL_SOCKET), &record.identity).await;
    Ok(())
}

/// Waits until a new process answers or has ended, within a time; the next observation tells which.
async fn await_answer(role: &Role, disk: &Path, socket: &Path, process: &ProcessIdentity) {
    let deadline = Instant::now() + CONTROL_TIMEOUT;
    let mut attempt = 0;
    while Instant::now() < deadline && process.is_alive() && role.disk_calls.check(disk).is_ok() {
        let asked = control::ask_on_disk::<Reply>(&role.disk_calls, disk, socket.to_owned(), &Request::Status);
        if matches!(asked.await, Ok(Ok(Reply::Status { .. }))) {
            return;
        }
        attempt += 1;
        tokio::select! { () = tokio::time::sleep(CONNECT.delay(attempt)) => {}, _ = process.wait() => {} }
    }
}

/// Releases an object whose data is gone or given up, once nothing of its process is left.
async fn release(role: &Arc<Role>, name: &str, replica: &Replica) -> Result<(), InstanceError> {
    if role.replicas.is_known(name) {
        endings::begin_end(role, name);
        return Ok(());
    }
    let mut released = replica.clone();
    released.metadata.finalizers.get_or_insert_default().retain(|f| f != FINALIZER);
    match role.config.store.replace(&released).await {
        Err(store::StoreError::NotFound { .. }) => Ok(()),
        other => other.map(drop).map_err(InstanceError::from),
    }
}

/// Tells that a replica is still being ended or removed, and what is in the way, as far as that is known.
async fn report_work(role: &Role, name: &str, replica: &Replica, work: Work) -> Result<(), InstanceError> {
    let silent = || role.disk_calls.check(Path::new(&replica.spec.disk_path)).err().map(|silent| silent.to_string());
    let problem = role.endings.problem(name).or_else(silent);
    if work == Work::End && problem.is_none() {
        // Why it is ended was told when that began.
        return Ok(());
    }
    let decision = at_work(replica, work, problem);
    let actual_size_bytes = replica.status.as_ref().map_or(0, |s| s.actual_size_bytes);
    let observed = Observed { process: Process::Silent, record: None, port: 0, actual_size_bytes };
    report(role, replica, &decision, &observed).await.map(drop)
}

/// Whether there was news.
async fn report(
    role: &Role,
    replica: &Replica,
    decision: &Decision,
    observed: &Observed,
) -> Result<bool, InstanceError> {
    let now = Timestamp::now();
    let mut status = replica.status.clone().unwrap_or_default();
    let is_up = decision.state == InstanceState::Running;
    let conditions = decision.conditions.iter().cloned();
    status = ReplicaStatus {
        owner_id: role.config.node.to_string(),
        current_state: decision.state,
        ip: if is_up { role.config.ip.to_string() } else { String::new() },
        port: if is_up { observed.port } else { 0 },
        started: is_up,
        generation: observed.record.as_ref().map_or(status.generation, |r| r.generation),
        generation_members: observed.record.as_ref().map_or(status.generation_members, |r| r.members.clone()),
        clean: observed.record.as_ref().map_or(status.clean, |r| r.clean),
        current_size: observed.record.as_ref().map_or(status.current_size, |r| SizeBytes(r.size_bytes)),
        actual_size_bytes: observed.actual_size_bytes,
        conditions: conditions.fold(status.conditions, |mut list, c| {
            condition::set(&mut list, c, now);
            list
        }),
        other: status.other,
    };
    if replica.status.as_ref().is_some_and(|old| is_same(old, &status)) {
        return Ok(false);
    }
    let mut changed = replica.clone();
    changed.status = Some(status);
    role.config.store.replace_status(&changed).await?;
    Ok(true)
}

/// Whether two reports say the same. A size that moves a little is no news: every report is an event and leads to another look.
fn is_same(old: &ReplicaStatus, new: &ReplicaStatus) -> bool {
    let sizes_differ = old.actual_size_bytes.abs_diff(new.actual_size_bytes) > (16 << 20) + old.actual_size_bytes / 10;
    !sizes_differ && *old == ReplicaStatus { actual_size_bytes: old.actual_size_bytes, ..new.clone() }
}

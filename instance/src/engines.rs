//! Engine objects of this node: observe, decide, act, report.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use api::engine::{EngineStatus, InstanceState};
use api::names::{ENGINE_VOLUME_FILE, FINALIZER};
use api::quantity::SizeBytes;
use api::{Condition, Engine, Replica, condition};
use dataplane::loop_device::{self, LoopDevice};
use dataplane::{DataplaneError, mount};
use jiff::Timestamp;
use proto::engine::{Config, ReplicaAddress, Reply, Request};
use runtime::process::{Launch, ProcessIdentity};
use tracing::{debug, info};

use crate::control::{self, Connection};
use crate::engine_decision::{self, Decision, Device, Process, Step, decide, is_wished, modes};
use crate::engine_progress::Progress;
use crate::engine_upgrade;
use crate::error::InstanceError;
use crate::limits::{CONNECT, HEARTBEAT, HEARTBEAT_ANSWER, HOLDER_GRACE, NO_REPLICA_HOLD, REPLICA_TIMEOUT};
use crate::role::{Key, Role};

/// How soon to look again while something is on its way that makes no event (a device that is being released).
const SOON: Duration = Duration::from_millis(500);

/// Where the parts of one engine are.
pub struct Place {
    pub directory: PathBuf,
    pub config: PathBuf,
    mount_file: PathBuf,
    pub control: PathBuf,
    nbd: PathBuf,
}

impl Place {
    fn of(role: &Role, name: &str) -> Place {
        let directory = role.engines.directory(name);
        Place {
            config: directory.join("config.json"),
            mount_file: directory.join(ENGINE_VOLUME_FILE),
            control: directory.join("control.sock"),
            nbd: directory.join("nbd.sock"),
            directory,
        }
    }
}

pub struct Observed {
    pub process: Process,
    /// Why requests wait although a holder or an engine is there.
    trouble: Option<Condition>,
    device: Device,
    loop_device: Option<LoopDevice>,
}

/// Brings holder, engine and block device of one volume in line with its object.
pub async fn reconcile(role: &Arc<Role>, name: &str) -> Result<Option<Duration>, InstanceError> {
    let engine = role.config.store.get::<Engine>(name).await?.filter(|e| e.spec.node_id == role.config.node.as_str());
    // An engine that nobody wishes for is ended like one that is wished stopped.
    let wished = engine.clone().unwrap_or_default();
    let place = Place::of(role, name);
    let observed = observe(role, name, &wished, &place).await?;
    let decision = decide(&wished, &observed.process, &observed.device, observed.trouble.as_ref());
    if let Some(engine) = &engine {
        let upgraded = engine_upgrade::answer(role, engine, &decision, &observed, &place).await?;
        report(role, engine, &decision, &observed, &place, upgraded).await?;
    }
    // The holder's report is a file: nobody says that it has changed, or that it ended a moment after the engine began to serve.
    let looks_again = decision.state == InstanceState::Stopping || observed.trouble.is_some();
    match decision.step {
        Step::Nothing => return Ok(looks_again.then_some(SOON)),
        Step::Start => start(role, name, &wished, &place).await?,
        Step::AttachDevice => {
            let device = loop_device::attach(&place.mount_file, &role.loops).await;
            let device = device.map_err(device_error("attach a block device"))?;
            info!(engine = name, device = %device.path.display(), "block device attached");
        }
        Step::DetachDevice => {
            if let Some(device) = &observed.loop_device {
                loop_device::detach(device).await.map_err(device_error("detach the block device"))?;
                info!(engine = name, device = %device.path.display(), "block device detached");
            }
        }
        Step::Shutdown => shutdown(role, name, &place).await?,
        Step::CleanUp => clean_up(role, name, &place).await?,
        Step::Release => return release(role, wished).await.map(|()| None),
    }
    role.queue.add(Key::Engine(name.to_owned()));
    Ok(None)
}

fn device_error(action: &str) -> impl FnOnce(DataplaneError) -> InstanceError {
    move |source| InstanceError::Device { action: action.to_owned(), source }
}

async fn observe(role: &Arc<Role>, name: &str, wished: &Engine, place: &Place) -> Result<Observed, InstanceError> {
    let read = |source| InstanceError::File { action: "read", path: place.directory.clone(), source };
    let mut has_holder = false;
    let said = engine::process::holder_report(&place.control).map_err(read)?;
    let process = match role.engines.record(name).map_err(read)? {
        None => Process::None,
        Some(record) if record.identity.is_alive() => {
            has_holder = true;
            role.watch_end(&record.identity, Key::Engine(name.to_owned()));
            follow(role, name, &place.control, &record.identity);
            Process::Running(role.state().engine_status.get(name).cloned())
        }
        // An engine goes on without its holder; it only cannot be replaced any more.
        Some(record) => match control::ask::<Reply>(&place.control, &Request::Status).await {
            Ok(Reply::Status(status)) => {
                follow(role, name, &place.control, &record.identity);
                Process::Running(Some(status))
            }
            _ if is_served(place)? => {
                role.state().engine_silence.entry(name.to_owned()).or_insert_with(Timestamp::now);
                Process::Running(None)
            }
            _ => Process::Ended(match &said {
                Some(said) => said.problem.clone(),
                None => role.engines.last_words(name),
            }),
        },
    };
    let process = match process {
        Process::Running(status) if is_wished(wished) => {
            match engine_decision::difference(&wished.spec, &read_config(place)?) {
                Some(difference) => Process::Foreign(difference),
                None => Process::Running(status),
            }
        }
        other => other,
    };
    let trouble = match &process {
        Process::Running(status) => {
            let (silent_since, stall) = {
                let state = role.state();
                (state.engine_silence.get(name).copied(), state.engine_progress.get(name).and_then(Progress::stall))
            };
            engine_decision::trouble(said.as_ref(), silent_since, stall.as_ref(), has_holder, status.as_ref())
        }
        Process::None | Process::Foreign(_) | Process::Ended(_) => None,
    };
    let (file, owner) = (place.mount_file.clone(), role.loops.clone());
    // Looking for users goes through every process, so only where the decision asks for them.
    let needs_users = !matches!(process, Process::Running(_)) || !is_wished(wished);
    let looked = tokio::task::spawn_blocking(move || -> Result<_, DataplaneError> {
        let Some(device) = loop_device::find(&file, &owner)? else { return Ok(None) };
        let users = if needs_users { loop_device::users(&device)? } else { vec![] };
        Ok(Some((device, users)))
    });
    let looked = looked.await.unwrap_or_else(|e| std::panic::resume_unwind(e.into_panic()));
    let found = looked.map_err(device_error("look for the block device"))?;
    let (loop_device, device) = match found {
        None => (None, Device::None),
        Some((device, users)) => {
            let path = device.path.display().to_string();
            (Some(device), Device::Attached { path, users })
        }
    };
    Ok(Observed { process, trouble, device, loop_device })
}

/// Keeps the last status of an engine, from its own words, for as long as its holder lives.
fn follow(role: &Arc<Role>, name: &str, socket: &Path, holder: &ProcessIdentity) {
    if !role.state().followed.insert(name.to_owned()) {
        return;
    }
    let (role, name, socket, holder) = (role.clone(), name.to_owned(), socket.to_owned(), holder.clone());
    role.tasks.clone().spawn(async move {
        let followed = async {
            let mut attempt = 0;
            loop {
                let had_holder = holder.is_alive();
                let listened = listen(&role, &name, &socket, &mut attempt).await;
                if let Err(error) = &listened {
                    debug!(engine = name, %error, "engine does not answer");
                }
                if !had_holder {
                    return;
                }
                // Between two engines of one holder there is nobody to ask.
                {
                    let mut state = role.state();
                    state.engine_silence.remove(&name);
                    state.engine_progress.remove(&name);
                    if let Some(status) = state.engine_status.get_mut(&name) {
                        status.serving = false;
                    }
                }
                role.queue.add(Key::Engine(name.clone()));
                attempt += 1;
                tokio::select! { () = tokio::time::sleep(CONNECT.delay(attempt)) => {}, _ = holder.wait() => {} }
            }
        };
        tokio::select! { () = role.cancelled.cancelled() => {}, () = followed => {} }
        let mut state = role.state();
        state.followed.remove(&name);
        state.engine_status.remove(&name);
        state.engine_silence.remove(&name);
        state.engine_progress.remove(&name);
        drop(state);
        role.queue.add(Key::Engine(name));
    });
}

async fn listen(role: &Role, name: &str, socket: &Path, attempt: &mut u32) -> std::io::Result<()> {
    let mut connection = Connection::open(socket).await?;
    connection.send(&Request::Watch).await?;
    let mut asked = false;
    loop {
        let most = if asked { HEARTBEAT_ANSWER } else { HEARTBEAT };
        let Ok(reply) = tokio::time::timeout(most, connection.receive()).await else {
            if asked {
                // The holder replaces it after a while; without a holder nobody does. The pass says which.
                role.state().engine_silence.entry(name.to_owned()).or_insert_with(Timestamp::now);
                role.queue.add(Key::Engine(name.to_owned()));
            } else {
                connection.send(&Request::Status).await?;
                asked = true;
            }
            continue;
        };
        let Reply::Status(status) = reply? else { continue };
        (*attempt, asked) = (0, false);
        let is_news = {
            let mut state = role.state();
            let was_silent = state.engine_silence.remove(name).is_some();
            let (now, time) = (Instant::now(), Timestamp::now());
            let entry = state.engine_progress.entry(name.to_owned());
            let progress = entry.or_insert_with(|| Progress::of(&status, now, time));
            let was_stuck = progress.stall().is_some();
            progress.follow(&status, now, time);
            let is_news = was_silent || was_stuck != progress.stall().is_some();
            let is_news = is_news || state.engine_status.get(name).is_none_or(|old| !is_same(old, &status));
            if let Some(old) = state.engine_status.get(name) {
                role.config.metrics.engines_replaced(status.lives.saturating_sub(old.lives));
            }
            state.engine_status.insert(name.to_owned(), status);
            is_news
        };
        if is_news {
            role.queue.add(Key::Engine(name.to_owned()));
        }
    }
}

/// Whether two states of an engine lead to the same report. Counters of I/O do not matter.
fn is_same(old: &proto::engine::Status, new: &proto::engine::Status) -> bool {
    old.generation == new.generation
        && old.serving == new.serving
        && old.replicas == new.replicas
        && old.replica_errors == new.replica_errors
        && old.faulted == new.faulted
        && old.pid == new.pid
        && old.version == new.version
}

async fn start(role: &Arc<Role>, name: &str, engine: &Engine, place: &Place) -> Result<(), InstanceError> {
    let at = |action| move |source| InstanceError::File { action, path: place.directory.clone(), source };
    let told = engine.status.as_ref().map_or(0, |status| status.generation);
    let mut replicas = BTreeMap::new();
    let mut read_from = None;
    for (replica, address) in &engine.spec.replica_address_map {
        let local = role.config.store.get::<Replica>(replica).await?;
        if local.is_some_and(|r| r.spec.node_id == role.config.node.as_str()) {
            read_from = Some(replica.clone());
        }
        replicas.insert(replica.clone(), ReplicaAddress::Tcp(address.clone()));
    }
    let config = Config {
        volume: engine.spec.volume_name.clone(),
        size_bytes: engine.spec.volume_size.0,
        // What is told and left here becomes the wish's own in a moment.
        generation: engine.spec.generation.max(told).max(last_generation(place)?.unwrap_or(0)),
        attachment: engine.spec.attachment,
        replicas,
        read_from,
        compare_replicas: engine.spec.compare_replicas,
        mount_file: place.mount_file.clone(),
        control_socket: place.control.clone(),
        nbd_socket: place.nbd.clone(),
        replica_timeout_ms: REPLICA_TIMEOUT.as_millis() as u64,
        no_replica_hold_ms: NO_REPLICA_HOLD.as_millis() as u64,
        holder_limit_ms: role.config.engines.holder_limit.as_millis() as u64,
        silence_limit_ms: role.config.engines.silence_limit.as_millis() as u64,
        replace_engine: role.config.engines.replace,
        program: Some(role.config.program.clone()),
        certificates: role.config.security.directory().map(Path::to_owned),
    };
    fs::create_dir_all(&place.directory).map_err(at("make"))?;
    unmount(place).await?;
    File::create(&place.mount_file).map_err(at("write in"))?;
    write_config(place, &config)?;
    let launch = Launch::new(&role.config.program).arg("engine-holder").flag("--config", &place.config);
    let record = role.engines.start(name, launch, None);
    let record = record.map_err(|source| InstanceError::Start { what: format!("engine {name}"), source })?;
    role.config.metrics.engine_started();
    info!(engine = name, pid = record.identity.pid, "engine started");
    Ok(())
}

/// The holder and its engines read it at any time, so it is always whole.
pub fn write_config(place: &Place, config: &Config) -> Result<(), InstanceError> {
    let parse = |source| InstanceError::Parse { path: place.config.clone(), source };
    let text = serde_json::to_vec_pretty(config).map_err(parse)?;
    let write = |source| InstanceError::File { action: "write", path: place.config.clone(), source };
    runtime::files::write_durably(&place.config, &text).map_err(write)
}

/// What the engine that was started last works on.
pub fn read_config(place: &Place) -> Result<Config, InstanceError> {
    let read = |source| InstanceError::File { action: "read", path: place.config.clone(), source };
    let text = fs::read(&place.config).map_err(read)?;
    let parse = |source| InstanceError::Parse { path: place.config.clone(), source };
    serde_json::from_slice(&text).map_err(parse)
}

/// Takes away what a holder that died left on the mount file.
async fn unmount(place: &Place) -> Result<(), InstanceError> {
    while mount::is_mounted(&place.mount_file).map_err(device_error("read the mounts"))? {
        mount::unmount_lazily(&place.mount_file).map_err(device_error("unmount what a dead engine left"))?;
    }
    Ok(())
}

async fn shutdown(role: &Arc<Role>, name: &str, place: &Place) -> Result<(), InstanceError> {
    let what = || format!("engine {name}");
    match control::ask::<Reply>(&place.control, &Request::Shutdown).await {
        Ok(Reply::Refused { message }) => {
            let source = std::io::Error::other(format!("it refuses to end: {message}"));
            return Err(InstanceError::End { what: what(), source });
        }
        Ok(_) => {}
        // It may be between two engines, or already gone; a holder without an engine ends at SIGTERM.
        Err(error) => debug!(engine = name, %error, "engine does not answer a shutdown"),
    }
    let path = place.directory.clone();
    let record = role.engines.record(name).map_err(|source| InstanceError::File { action: "read", path, source })?;
    if let Some(record) = record {
        let waited = tokio::time::timeout(HOLDER_GRACE, record.identity.wait()).await;
        if waited.is_err() {
            record
                .identity
                .terminate(HOLDER_GRACE)
                .await
                .map_err(|source| InstanceError::End { what: what(), source })?;
        }
    }
    // The next pass reports the generation that it left, which it may have raised just before its end, and cleans up.
    Ok(())
}

/// Whether a holder or an engine lives, whoever started it: both inherit a lock beside the control socket.
fn is_served(place: &Place) -> Result<bool, InstanceError> {
    let unknown = |source| InstanceError::File { action: "try the lock in", path: place.directory.clone(), source };
    engine::process::is_served(&place.control).map_err(unknown)
}

/// The generation under which an engine acknowledged here last, told or not.
fn last_generation(place: &Place) -> Result<Option<u64>, InstanceError> {
    let unknown =
        |source| InstanceError::File { action: "read the generation in", path: place.directory.clone(), source };
    engine::process::last_generation(&place.control).map_err(unknown)
}

async fn clean_up(role: &Arc<Role>, name: &str, place: &Place) -> Result<(), InstanceError> {
    // An engine without its holder notices this, and ends when it has finished. Until then the volume may not go elsewhere (invariant 4).
    unmount(place).await?;
    if is_served(place)? {
        let source = std::io::Error::other("it still runs without its holder; it ends when it has finished");
        return Err(InstanceError::End { what: format!("engine {name}"), source });
    }
    info!(engine = name, "engine ended");
    role.engines.forget(name).map_err(|source| InstanceError::File {
        action: "remove",
        path: place.directory.clone(),
        source,
    })
}

async fn release(role: &Role, mut engine: Engine) -> Result<(), InstanceError> {
    engine.metadata.finalizers.get_or_insert_default().retain(|f| f != FINALIZER);
    match role.config.store.replace(&engine).await {
        Err(store::StoreError::NotFound { .. }) => Ok(()),
        other => other.map(drop).map_err(InstanceError::from),
    }
}

async fn report(
    role: &Role,
    engine: &Engine,
    decision: &Decision,
    observed: &Observed,
    place: &Place,
    upgraded: Option<Condition>,
) -> Result<(), InstanceError> {
    let now = Timestamp::now();
    let old = engine.status.clone().unwrap_or_default();
    let seen = match &observed.process {
        Process::Running(Some(status)) if status.generation > 0 => Some(status),
        _ => None,
    };
    let is_up = decision.state == InstanceState::Running;
    let endpoint = match &observed.device {
        Device::Attached { path, .. } if is_up => path.clone(),
        _ => String::new(),
    };
    let is_gone = decision.state == InstanceState::Stopped;
    // A fence that a dead engine could not report stands beside its socket, written before anything was acknowledged under it.
    let left = last_generation(place)?;
    let status = EngineStatus {
        owner_id: role.config.node.to_string(),
        current_state: decision.state,
        ip: if is_up { role.config.ip.to_string() } else { String::new() },
        port: 0,
        current_size: if is_up { engine.spec.volume_size } else { SizeBytes(0) },
        current_replica_address_map: if is_up { engine.spec.replica_address_map.clone() } else { BTreeMap::new() },
        replica_mode_map: match seen {
            Some(status) => modes(status),
            None if is_gone => BTreeMap::new(),
            None => old.replica_mode_map,
        },
        endpoint,
        started: is_up,
        // It is never lowered: the controller learns from it what a stale replica is.
        generation: seen.map_or(0, |s| s.generation).max(left.unwrap_or(0)).max(old.generation),
        replica_errors: match seen {
            Some(status) => status.replica_errors.clone(),
            None if is_gone => BTreeMap::new(),
            None => old.replica_errors,
        },
        nbd_socket: if is_up { place.nbd.display().to_string() } else { String::new() },
        version: match seen {
            Some(status) => status.version.clone(),
            None if is_gone => String::new(),
            None => old.version,
        },
        upgrade_requested_at: match &upgraded {
            Some(_) => engine.spec.upgrade_requested_at.clone(),
            None => old.upgrade_requested_at,
        },
        conditions: decision.conditions.iter().cloned().chain(upgraded).fold(old.conditions, |mut list, c| {
            condition::set(&mut list, c, now);
            list
        }),
        other: old.other,
    };
    if engine.status.as_ref() == Some(&status) {
        return Ok(());
    }
    let mut changed = engine.clone();
    changed.status = Some(status);
    role.config.store.replace_status(&changed).await?;
    Ok(())
}

//! One engine of this node: holder process, block device, what it reports.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use api::condition;
use api::names::FINALIZER;
use api::{Engine, Replica};
use dataplane::DataplaneError;
use dataplane::loop_device::{self, LoopDevice};
use dataplane::mount;
use jiff::Timestamp;
use proto::engine::{Config, ReplicaAddress, Reply, Request, Status};
use runtime::process::ProcessIdentity;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::sync::{Notify, watch};
use tokio_util::task::AbortOnDropHandle;

use crate::decide::{self, Action, ObservedEngine, Process};
use crate::processes::{Place, ProcessRecord};
use crate::{InstanceError, Next, Shared, control, limits, notify_at_end, replica, sentence};

/// Looks after one engine.
pub(crate) struct Supervisor {
    shared: Arc<Shared>,
    name: String,
    notify: Arc<Notify>,
    place: Place,
    followed: Option<Followed>,
    failure: Option<String>,
}

/// A process that we follow: told of its end, and of each status of its engine.
struct Followed {
    identity: ProcessIdentity,
    live: watch::Receiver<Option<Status>>,
    _task: AbortOnDropHandle<()>,
}

impl Supervisor {
    pub fn new(shared: Arc<Shared>, name: &str, notify: Arc<Notify>) -> Supervisor {
        let place = Place { directory: shared.config.state_directory.join("engines").join(name) };
        Supervisor { shared, name: name.to_owned(), notify, place, followed: None, failure: None }
    }

    fn control_socket(&self) -> PathBuf {
        self.place.directory.join("control.sock")
    }

    fn mount_file(&self) -> PathBuf {
        self.place.directory.join("volume")
    }

    fn nbd_socket(&self) -> PathBuf {
        self.place.directory.join("nbd.sock")
    }

    /// One pass: at most one action, then another look.
    pub async fn pass(&mut self) -> Result<Next, InstanceError> {
        let store = self.shared.config.store.clone();
        let Some(mut engine) = store.get::<Engine>(&self.name).await? else { return Ok(Next::Gone) };
        if engine.spec.node_id != self.shared.config.node.as_str() {
            return Ok(Next::Gone);
        }
        let device = loop_device::find(&self.mount_file())?;
        let seen = self.observe(&engine, device.as_ref())?;
        let old = engine.status.clone().unwrap_or_default();
        let mut status = old.clone();
        let (action, conditions) = decide::engine(&seen, &mut status);
        let now = Timestamp::now();
        conditions.into_iter().for_each(|c| condition::set(&mut status.conditions, c, now));
        status.owner_id = self.shared.config.node.to_string();
        status.ip = self.shared.config.ip.to_string();
        if seen.process != Process::None {
            status.current_size = engine.spec.volume_size;
            status.current_replica_address_map = engine.spec.replica_address_map.clone();
            status.nbd_socket = self.nbd_socket().display().to_string();
        }
        if status != old {
            engine.status = Some(status);
            engine = store.replace_status(&engine).await?;
        }
        self.act(action, engine, device).await
    }

    fn observe(&mut self, engine: &Engine, device: Option<&LoopDevice>) -> Result<ObservedEngine, InstanceError> {
        let record = self.place.read().map_err(|e| InstanceError::io("read the record of a process", e))?;
        let process = match record {
            None => Process::None,
            Some(ProcessRecord { identity: Some(identity), .. }) if identity.is_alive() => {
                if self.followed.as_ref().is_none_or(|f| f.identity != identity) {
                    self.followed = Some(self.follow(identity));
                }
                Process::Alive
            }
            Some(ProcessRecord { identity: Some(_), .. }) => {
                Process::Died(format!("the engine process ended by itself{}", self.place.log_tail()))
            }
            Some(ProcessRecord { identity: None, .. }) => Process::Died("the start of the engine was cut short".into()),
        };
        let live = match process {
            Process::Alive => self.followed.as_ref().and_then(|f| f.live.borrow().clone()),
            _ => None,
        };
        Ok(ObservedEngine {
            deleted: engine.metadata.deletion_timestamp.is_some(),
            desire: engine.spec.desire_state,
            process,
            live,
            device: device.map(|d| d.path.display().to_string()),
            files_exist: self.place.directory.exists() || mount::is_mounted(&self.mount_file())?,
            failure: self.failure.clone(),
        })
    }

    fn follow(&self, identity: ProcessIdentity) -> Followed {
        notify_at_end(identity.clone(), self.notify.clone(), self.shared.shutdown.clone());
        let (sender, live) = watch::channel(None);
        let task = tokio::spawn(follow(self.control_socket(), sender, self.notify.clone()));
        Followed { identity, live, _task: AbortOnDropHandle::new(task) }
    }

    async fn act(
        &mut self,
        action: Action,
        mut engine: Engine,
        device: Option<LoopDevice>,
    ) -> Result<Next, InstanceError> {
        let outcome = match action {
            Action::Start => self.start(&engine).await.map(|()| Next::Again),
            Action::AttachDevice => match loop_device::attach(&self.mount_file()).await {
                Ok(device) => {
                    tracing::info!(engine = %self.name, device = %device.path.display(), "block device attached");
                    Ok(Next::Again)
                }
                Err(error) => Err(error.into()),
            },
            Action::Stop | Action::Remove => match self.stop(&engine, device).await {
                Ok(()) => Ok(Next::Again),
                Err(error @ InstanceError::Dataplane { source: DataplaneError::Busy { .. } })
                | Err(error @ InstanceError::Engine { .. }) => {
                    // Not a fault: somebody uses the volume. Said in the status, tried again.
                    let said = sentence(&error);
                    let news = self.failure.as_ref() != Some(&said);
                    self.failure = Some(said);
                    return Ok(if news { Next::Again } else { Next::After(Some(limits::BUSY_RECHECK)) });
                }
                Err(error) => Err(error),
            },
            Action::Release => {
                if let Some(finalizers) = &mut engine.metadata.finalizers {
                    finalizers.retain(|f| f != FINALIZER);
                }
                self.shared.config.store.replace(&engine).await?;
                Ok(Next::After(None))
            }
            Action::Rest => Ok(Next::After(None)),
        };
        match &outcome {
            Ok(_) => self.failure = None,
            Err(error) if error.is_conflict() => {}
            Err(error) => self.failure = Some(sentence(error)),
        }
        outcome
    }

    async fn start(&mut self, engine: &Engine) -> Result<(), InstanceError> {
        let failed = |e| InstanceError::io(format!("start engine `{}`", self.name), e);
        let (replicas, read_from) = self.addresses(engine).await?;
        let config = Config {
            volume: engine.spec.volume_name.clone(),
            size_bytes: engine.spec.volume_size.0,
            generation: engine.spec.generation,
            replicas,
            read_from,
            compare_replicas: engine.spec.compare_replicas,
            mount_file: self.mount_file(),
            control_socket: self.control_socket(),
            nbd_socket: self.nbd_socket(),
            replica_timeout_ms: limits::REPLICA_TIMEOUT.as_millis() as u64,
            no_replica_hold_ms: limits::NO_REPLICA_HOLD.as_millis() as u64,
            holder_limit_ms: limits::HOLDER_LIMIT.as_millis() as u64,
        };
        std::fs::create_dir_all(&self.place.directory).map_err(failed)?;
        std::fs::File::create(self.mount_file()).map_err(failed)?;
        let identity = self.place.start(&self.shared.config.program, "engine-holder", &config, 0).map_err(failed)?;
        tracing::info!(engine = %self.name, pid = identity.pid, "engine holder started");
        Ok(())
    }

    /// Replicas on this node by their directory, others by TCP; reads go to the local one.
    async fn addresses(
        &self,
        engine: &Engine,
    ) -> Result<(BTreeMap<String, ReplicaAddress>, Option<String>), InstanceError> {
        let (mut addresses, mut read_from) = (BTreeMap::new(), None);
        for (name, address) in &engine.spec.replica_address_map {
            let object = self.shared.config.store.get::<Replica>(name).await?;
            let local = object.filter(|r| r.spec.node_id == self.shared.config.node.as_str());
            let address = match local {
                Some(object) => {
                    read_from.get_or_insert_with(|| name.clone());
                    ReplicaAddress::Directory(replica::local_directory(&object)?)
                }
                None => ReplicaAddress::Tcp(address.clone()),
            };
            addresses.insert(name.clone(), address);
        }
        Ok((addresses, read_from))
    }

    /// Device first, then an orderly end of the engine, then what is left of it.
    async fn stop(&mut self, engine: &Engine, device: Option<LoopDevice>) -> Result<(), InstanceError> {
        if let Some(device) = device {
            loop_device::detach(&device).await?;
            tracing::info!(engine = %self.name, device = %device.path.display(), "block device detached");
        }
        let failed = |e| InstanceError::io("end an engine", e);
        let record = self.place.read().map_err(failed)?;
        let identity = record.and_then(|r| r.identity).filter(ProcessIdentity::is_alive);
        match control::ask(&self.control_socket(), &Request::Shutdown, limits::ENGINE_STOP_TIMEOUT).await {
            Ok(Reply::Refused { message }) => {
                return Err(InstanceError::Engine { volume: engine.spec.volume_name.clone(), message });
            }
            Ok(_) => {}
            Err(error) if identity.is_some() => {
                tracing::warn!(engine = %self.name, %error, "engine does not answer, its holder is ended");
            }
            Err(_) => {}
        }
        if let Some(identity) = identity {
            if tokio::time::timeout(limits::HOLDER_STOP_GRACE, identity.wait()).await.is_err() {
                identity.terminate(limits::HOLDER_STOP_GRACE).await.map_err(failed)?;
            }
            tracing::info!(engine = %self.name, "engine ended");
        }
        // After an orderly end there is none; after a death it is a dead connection.
        mount::unmount(&self.mount_file(), mount::Unmount::ThenLazy).await?;
        self.followed = None;
        self.place.forget().map_err(failed)
    }
}

/// Keeps the newest status of an engine, through the lives of engines under one holder.
async fn follow(socket: PathBuf, live: watch::Sender<Option<Status>>, notify: Arc<Notify>) {
    loop {
        if let Ok(stream) = runtime::socket::connect(&socket).await {
            let (reader, mut writer) = stream.into_split();
            let asked = match control::line(&Request::Watch) {
                Ok(line) => writer.write_all(&line).await,
                Err(error) => Err(error),
            };
            let mut lines = BufReader::new(reader).lines();
            while asked.is_ok()
                && let Ok(Some(line)) = lines.next_line().await
            {
                match serde_json::from_str(&line) {
                    Ok(Reply::Status(status)) => {
                        let news = live.borrow().as_ref().is_none_or(|old| shown(old) != shown(&status));
                        live.send_replace(Some(status));
                        if news {
                            notify.notify_one();
                        }
                    }
                    Ok(_) => {}
                    Err(error) => tracing::warn!(%error, "status of an engine not understood"),
                }
            }
            if live.borrow().is_some() {
                live.send_replace(None);
                notify.notify_one();
            }
        }
        // The socket appears with the next engine; there is no event for that.
        tokio::time::sleep(limits::START_RECHECK).await;
    }
}

/// The part of a status that ends up in the object: counters change all the time.
fn shown(status: &Status) -> Status {
    Status { read_ops: 0, read_bytes: 0, write_ops: 0, write_bytes: 0, flush_ops: 0, in_flight: 0, ..status.clone() }
}

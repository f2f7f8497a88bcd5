//! One replica of this node: observe, decide, act.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use api::condition;
use api::image::CopyState;
use api::names::FINALIZER;
use api::{BackingImage, Node, Replica};
use dataplane::storage_daemon::BaseFormat;
use jiff::Timestamp;
use proto::replica::{Reply, Request, file};
use runtime::process::ProcessIdentity;
use tokio::sync::Notify;

use crate::decide::{self, Action, Disk, Image, ObservedReplica, Process};
use crate::processes::{Place, ProcessRecord, free_ports, taken_ports};
use crate::{InstanceError, Next, Shared, control, disks, limits, notify_at_end, replica_process, sentence};

/// Looks after one replica.
pub(crate) struct Supervisor {
    shared: Arc<Shared>,
    name: String,
    notify: Arc<Notify>,
    place: Place,
    /// The process whose end we are told of.
    watched: Option<ProcessIdentity>,
    failure: Option<String>,
}

impl Supervisor {
    pub fn new(shared: Arc<Shared>, name: &str, notify: Arc<Notify>) -> Supervisor {
        let place = Place { directory: shared.config.state_directory.join("replicas").join(name) };
        Supervisor { shared, name: name.to_owned(), notify, place, watched: None, failure: None }
    }

    /// One pass: at most one action, then another look.
    pub async fn pass(&mut self) -> Result<Next, InstanceError> {
        let store = self.shared.config.store.clone();
        let Some(mut replica) = store.get::<Replica>(&self.name).await? else { return Ok(Next::Gone) };
        if replica.spec.node_id != self.shared.config.node.as_str() {
            return Ok(Next::Gone);
        }
        let directory = data_directory(&replica)?;
        let record = self.place.read().map_err(|e| InstanceError::io("read the record of a process", e))?;
        let image = match replica.spec.backing_image.as_str() {
            "" => None,
            name => store.get::<BackingImage>(name).await?,
        };
        let seen = self.observe(&replica, record.as_ref(), image.as_ref(), &directory).await?;
        let old = replica.status.clone().unwrap_or_default();
        let mut status = old.clone();
        let (action, conditions) = decide::replica(&seen, &mut status);
        let now = Timestamp::now();
        conditions.into_iter().for_each(|c| condition::set(&mut status.conditions, c, now));
        status.owner_id = self.shared.config.node.to_string();
        status.ip = self.shared.config.ip.to_string();
        status.port = record.map_or(0, |r| r.port);
        if status != old {
            replica.status = Some(status.clone());
            replica = store.replace_status(&replica).await?;
        }
        self.act(action, replica, image, &directory, &seen).await
    }

    async fn observe(
        &mut self,
        replica: &Replica,
        record: Option<&ProcessRecord>,
        image: Option<&BackingImage>,
        directory: &Path,
    ) -> Result<ObservedReplica, InstanceError> {
        let socket = directory.join(file::CONTROL_SOCKET);
        let process = match record {
            None => Process::None,
            Some(ProcessRecord { identity: Some(identity), .. }) if identity.is_alive() => {
                if self.watched.as_ref() != Some(identity) {
                    self.watched = Some(identity.clone());
                    notify_at_end(identity.clone(), self.notify.clone(), self.shared.shutdown.clone());
                }
                Process::Alive
            }
            Some(ProcessRecord { identity: Some(_), .. }) => {
                Process::Died(format!("the replica process ended by itself{}", self.place.log_tail()))
            }
            // The start was cut short between the two writes of the record; who answers tells who it is.
            Some(ProcessRecord { identity: None, .. }) => match runtime::socket::connect(&socket).await {
                Ok(_) => Process::Alive,
                Err(_) => Process::Died("the start of the replica process was cut short".into()),
            },
        };
        let live = match &process {
            Process::Alive => match control::ask(&socket, &Request::Status, limits::CONTROL_TIMEOUT).await {
                Ok(Reply::Status { record, actual_size_bytes, .. }) => Some((record, actual_size_bytes)),
                _ => None,
            },
            _ => None,
        };
        let node = self.shared.config.store.get::<Node>(self.shared.config.node.as_str()).await?;
        let disk = disks::of_replica(node.as_ref(), &replica.spec.disk_id, &replica.spec.disk_path);
        let record = match disk {
            Disk::Available => replica_process::read_record(directory)?,
            _ => None,
        };
        Ok(ObservedReplica {
            name: self.name.clone(),
            image_name: replica.spec.backing_image.clone(),
            deleted: replica.metadata.deletion_timestamp.is_some(),
            desire: replica.spec.desire_state,
            process,
            image: observe_image(replica, image),
            data_exists: disk == Disk::Available && directory.exists(),
            disk,
            record,
            live,
            failure: self.failure.clone(),
        })
    }

    async fn act(
        &mut self,
        action: Action,
        mut replica: Replica,
        image: Option<BackingImage>,
        directory: &Path,
        seen: &ObservedReplica,
    ) -> Result<Next, InstanceError> {
        match action {
            Action::Start => {
                self.failure = None;
                match self.start(&replica, image.as_ref(), directory).await {
                    Ok(()) => Ok(Next::Again),
                    Err(error) => {
                        self.failure = Some(sentence(&error));
                        Err(error)
                    }
                }
            }
            Action::Stop => {
                self.stop(directory).await?;
                Ok(Next::Again)
            }
            Action::Remove => {
                std::fs::remove_dir_all(directory)
                    .and_then(|()| runtime::files::sync_parent(directory))
                    .map_err(|e| InstanceError::io(format!("remove `{}`", directory.display()), e))?;
                tracing::info!(replica = %self.name, "replica data removed");
                Ok(Next::Again)
            }
            Action::Release => {
                if let Some(finalizers) = &mut replica.metadata.finalizers {
                    finalizers.retain(|f| f != FINALIZER);
                }
                self.shared.config.store.replace(&replica).await?;
                Ok(Next::After(None))
            }
            Action::Rest | Action::AttachDevice => {
                let starting = seen.process == Process::Alive && seen.live.is_none();
                Ok(Next::After(starting.then_some(limits::START_RECHECK)))
            }
        }
    }

    async fn start(
        &self,
        replica: &Replica,
        image: Option<&BackingImage>,
        directory: &Path,
    ) -> Result<(), InstanceError> {
        let config = &self.shared.config;
        let _one_at_a_time = self.shared.ports.lock().await;
        let taken = taken_ports(&config.state_directory.join("replicas"));
        let port = free_ports(config.ip, &config.ports, &taken).map_err(|e| InstanceError::io("choose ports", e))?;
        let process = replica_process::Config {
            directory: directory.to_owned(),
            volume: replica.spec.volume_name.clone(),
            replica: self.name.clone(),
            size_bytes: replica.spec.volume_size.0,
            image: image.map(|i| image_of(replica, i)).transpose()?,
            listen: (config.ip, port).into(),
        };
        self.place
            .start(&config.program, "replica", &process, port)
            .map_err(|e| InstanceError::io(format!("start replica `{}`", self.name), e))?;
        tracing::info!(replica = %self.name, port, "replica process started");
        Ok(())
    }

    async fn stop(&mut self, directory: &Path) -> Result<(), InstanceError> {
        let failed = |e| InstanceError::io("end a replica process", e);
        let record = self.place.read().map_err(failed)?;
        let identity = match record.and_then(|r| r.identity) {
            Some(identity) => Some(identity),
            // Cut short at its start: the one that answers on its socket.
            None => match runtime::socket::connect(&directory.join(file::CONTROL_SOCKET)).await {
                Ok(stream) => {
                    stream.peer_cred().ok().and_then(|c| c.pid()).and_then(|pid| ProcessIdentity::of(pid as u32).ok())
                }
                Err(_) => None,
            },
        };
        if let Some(identity) = identity {
            identity.terminate(limits::REPLICA_STOP_GRACE).await.map_err(failed)?;
        }
        (self.watched, self.failure) = (None, None);
        self.place.forget().map_err(failed)?;
        tracing::info!(replica = %self.name, "replica process ended");
        Ok(())
    }
}

/// `<disk>/replicas/<name>`; a name that would leave that directory is refused.
fn data_directory(replica: &Replica) -> Result<PathBuf, InstanceError> {
    let (disk, name) = (Path::new(&replica.spec.disk_path), replica.spec.data_directory_name.as_str());
    if !disk.is_absolute() || name.is_empty() || name.contains('/') || name.starts_with('.') {
        let source = std::io::Error::new(std::io::ErrorKind::InvalidInput, "not an absolute path and a plain name");
        return Err(InstanceError::io(format!("use `{}` and `{name}` as directory", disk.display()), source));
    }
    Ok(disk.join("replicas").join(name))
}

/// The directory of a replica, for its engine on the same node.
pub(crate) fn local_directory(replica: &Replica) -> Result<PathBuf, InstanceError> {
    data_directory(replica)
}

fn observe_image(replica: &Replica, image: Option<&BackingImage>) -> Image {
    if replica.spec.backing_image.is_empty() {
        return Image::NotNeeded;
    }
    let status = image.and_then(|i| i.status.as_ref());
    let Some(copy) = status.and_then(|s| s.disk_file_status_map.get(&replica.spec.disk_id)) else {
        return Image::Absent;
    };
    if copy.state == CopyState::Ready && status.is_some_and(|s| BaseFormat::from_name(&s.format).is_some()) {
        return Image::Ready;
    }
    Image::Copy {
        state: copy.state,
        progress: copy.progress,
        message: copy.message.clone(),
        next_retry: copy.next_retry_time.clone(),
    }
}

fn image_of(replica: &Replica, image: &BackingImage) -> Result<replica_process::Image, InstanceError> {
    let status = image.status.clone().unwrap_or_default();
    let name = replica.spec.backing_image.clone();
    let format = BaseFormat::from_name(&status.format).ok_or_else(|| {
        let source = std::io::Error::new(std::io::ErrorKind::InvalidData, "its format is not recorded");
        InstanceError::io(format!("use image `{name}`"), source)
    })?;
    let directory = format!("{name}-{}", status.uuid);
    let path = Path::new(&replica.spec.disk_path).join("backing-images").join(directory).join("backing");
    Ok(replica_process::Image { name, uuid: status.uuid, path, format })
}

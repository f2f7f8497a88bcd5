//! The event loop: turns what the descriptors say into events of the core, and does what the core wants done.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use proto::engine::{Config, ReplicaState, Status};
use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};
use rustix::io::Errno;
use tracing::{error, info, warn};

use super::control::Client;
use super::life::{Known, LifeFiles};
use super::lost::Lost;
use super::nbd_frontend::{Arrived, Session};
use super::replica_control::ReplicaControl;
use super::start::Started;
use crate::buffers::Buffers;
use crate::core::{self, ControlRequest, Core, Event, Options, Output};
use crate::error::EngineError;
use crate::limits;
use crate::link::Link;

/// Where a descriptor's events go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    Fuse,
    Signal,
    Unmounted,
    ControlListener,
    NbdListener,
    Link(usize),
    ReplicaControl(usize),
    ControlClient(usize),
    NbdClient(usize),
}

impl Source {
    fn encode(self) -> u64 {
        let (kind, index) = match self {
            Source::Fuse => (0, 0),
            Source::Signal => (1, 0),
            Source::Unmounted => (2, 0),
            Source::ControlListener => (3, 0),
            Source::NbdListener => (4, 0),
            Source::Link(index) => (5, index),
            Source::ReplicaControl(index) => (6, index),
            Source::ControlClient(index) => (7, index),
            Source::NbdClient(index) => (8, index),
        };
        kind << 32 | index as u64
    }

    fn decode(code: u64) -> Option<Source> {
        let index = code as u32 as usize;
        Some(match code >> 32 {
            0 => Source::Fuse,
            1 => Source::Signal,
            2 => Source::Unmounted,
            3 => Source::ControlListener,
            4 => Source::NbdListener,
            5 => Source::Link(index),
            6 => Source::ReplicaControl(index),
            7 => Source::ControlClient(index),
            8 => Source::NbdClient(index),
            _ => return None,
        })
    }
}

/// Whose request a tag of the core is.
pub(super) enum Origin {
    Fuse { unique: u64, operation: core::Operation, length: u32, buffer: Option<core::BufferId> },
    Nbd { session: usize, serial: u64, request: Arrived },
}

/// Who waits for the end.
pub(super) enum Asker {
    Client { index: usize, serial: u64 },
    Signal,
}

/// An attempt to unmount, made in a thread of its own: the kernel may want this thread to answer meanwhile.
pub(super) struct Unmounting {
    pub(super) result: mpsc::Receiver<std::io::Result<bool>>,
    pub(super) askers: Vec<Asker>,
}

/// Everything of one engine process.
pub(super) struct Engine {
    pub(super) config: Config,
    pub(super) names: Vec<String>,
    pub(super) life: LifeFiles,
    lives: u32,
    started: Instant,
    start_errors: Vec<Option<String>>,
    pub(super) epoll: OwnedFd,
    pub(super) core: Core,
    pub(super) buffers: Buffers,
    /// What the kernel's next request is read into.
    pub(super) intake: core::BufferId,
    /// None once the volume is unmounted.
    pub(super) fuse: Option<OwnedFd>,
    pub(super) links: Vec<Option<Link>>,
    pub(super) controls: Vec<Option<ReplicaControl>>,
    /// Replicas that are asked who has them now, before they are dropped.
    pub(super) lost: Vec<Option<Lost>>,
    /// What each replica opened for this engine; empty for one that was no member at the start.
    exports: Vec<String>,
    pub(super) origins: Vec<Option<Origin>>,
    pub(super) free_tags: Vec<usize>,
    pub(super) control_listener: UnixListener,
    pub(super) control_clients: Vec<Option<Client>>,
    pub(super) nbd_listener: UnixListener,
    pub(super) nbd_clients: Vec<Option<Session>>,
    pub(super) next_serial: u64,
    pub(super) signals: OwnedFd,
    pub(super) unmounted: OwnedFd,
    pub(super) unmounting: Option<Unmounting>,
    /// Who is told when the end has come.
    pub(super) askers: Vec<Asker>,
    /// The next engine is waited for by this client; nothing is taken from the kernel any more.
    pub(super) handing_over: Option<Asker>,
    /// An NBD client changed something, so that a next life cannot rely on repeated requests alone.
    pub(super) nbd_changed: bool,
    status_changed: bool,
    outputs: Vec<Output>,
    ended: Option<bool>,
}

impl Engine {
    pub(super) fn new(
        config: Config,
        names: Vec<String>,
        life: LifeFiles,
        lives: u32,
        started: Started,
        fuse: OwnedFd,
        signals: OwnedFd,
    ) -> Result<Engine, EngineError> {
        let events = |source: Errno| EngineError::Events { source: source.into() };
        let members = started.set();
        let Started { security, generation, members: connections, errors: start_errors, compare } = started;
        let mut buffers = Buffers::default();
        let core = Core::new(Options {
            size_bytes: config.size_bytes,
            generation,
            replicas: names.len(),
            members,
            read_from: config.read_from.as_ref().and_then(|name| names.iter().position(|other| other == name)),
            compare,
            replica_timeout: Duration::from_millis(config.replica_timeout_ms),
            no_replica_hold: Duration::from_millis(config.no_replica_hold_ms),
            scratch: names.iter().map(|_| buffers.get(limits::COMPARE_STEP_BYTES as usize)).collect(),
            compare_step_bytes: limits::COMPARE_STEP_BYTES,
            zero_piece_bytes: limits::ZERO_PIECE_BYTES,
        });
        let listen = |path: &Path| {
            let listener = runtime::socket::bind_blocking(path);
            let listener = listener.and_then(|listener| listener.set_nonblocking(true).map(|()| listener));
            listener.map_err(|source| EngineError::Listen { path: path.to_owned(), source })
        };
        let (mut links, mut controls, mut exports) = (Vec::new(), Vec::new(), Vec::new());
        for (name, connection) in names.iter().zip(connections) {
            let (link, control, export) = match connection {
                Some(member) => {
                    let address = config.replicas[name].clone();
                    let control = ReplicaControl::new(address, security.clone(), member.control).map_err(events)?;
                    (Some(Link::new(member.data.into_socket()).map_err(events)?), Some(control), member.export)
                }
                None => (None, None, String::new()),
            };
            exports.push(export);
            links.push(link);
            controls.push(control);
        }
        let mut engine = Engine {
            control_listener: listen(&config.control_socket)?,
            nbd_listener: listen(&config.nbd_socket)?,
            config,
            lost: names.iter().map(|_| None).collect(),
            names,
            life,
            lives,
            started: Instant::now(),
            start_errors,
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC).map_err(events)?,
            core,
            intake: buffers.get_resident(),
            buffers,
            fuse: Some(fuse),
            links,
            controls,
            exports,
            origins: Vec::new(),
            free_tags: Vec::new(),
            control_clients: Vec::new(),
            nbd_clients: Vec::new(),
            next_serial: 0,
            signals,
            unmounted: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(events)?,
            unmounting: None,
            askers: Vec::new(),
            handing_over: None,
            nbd_changed: false,
            status_changed: false,
            outputs: Vec::new(),
            ended: None,
        };
        engine.remember(generation, members);
        engine.register_all().map_err(events)?;
        if lives > 0 {
            engine.resend();
        }
        Ok(engine)
    }

    fn register_all(&self) -> Result<(), Errno> {
        let level = epoll::EventFlags::IN;
        if let Some(fuse) = &self.fuse {
            epoll::add(&self.epoll, fuse, data(Source::Fuse), level)?;
        }
        epoll::add(&self.epoll, &self.signals, data(Source::Signal), level)?;
        epoll::add(&self.epoll, &self.unmounted, data(Source::Unmounted), level)?;
        epoll::add(&self.epoll, &self.control_listener, data(Source::ControlListener), level)?;
        epoll::add(&self.epoll, &self.nbd_listener, data(Source::NbdListener), level)?;
        for (replica, link) in self.links.iter().enumerate() {
            if let Some(link) = link {
                self.register(link, Source::Link(replica))?;
            }
        }
        for (replica, control) in self.controls.iter().enumerate() {
            if let Some(descriptor) = control.as_ref().and_then(ReplicaControl::descriptor) {
                self.register(descriptor, Source::ReplicaControl(replica))?;
            }
        }
        Ok(())
    }

    /// Edge-triggered: whoever handles the events reads and writes until the socket has no more.
    pub(super) fn register(&self, descriptor: impl AsFd, source: Source) -> Result<(), Errno> {
        let flags = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::RDHUP | epoll::EventFlags::ET;
        epoll::add(&self.epoll, descriptor.as_fd(), data(source), flags)
    }

    pub(super) fn unregister(&self, descriptor: impl AsFd) {
        let _ = epoll::delete(&self.epoll, descriptor.as_fd());
    }

    pub(super) fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// Works until the end; tells whether it was clean.
    pub(super) fn run(&mut self) -> Result<bool, EngineError> {
        let mut events = Vec::with_capacity(32);
        let mut ticked = Instant::now();
        let mut trimmed = Instant::now();
        loop {
            self.obey();
            self.send_all();
            if let Some(clean) = self.ended {
                self.say_good_bye();
                return Ok(clean);
            }
            if self.core.has_outputs() {
                continue;
            }
            if self.handing_over.is_some() && self.core.in_flight() == 0 {
                return Err(self.hand_over());
            }
            let tick = self.core.next_tick().into_iter();
            let due = tick.chain(self.buffers.has_unused().then_some(limits::TRIM_INTERVAL));
            let due = due.chain(self.lost.iter().any(Option::is_some).then_some(limits::TICK)).min();
            let timeout =
                due.map(|due| Timespec { tv_sec: due.as_secs() as i64, tv_nsec: i64::from(due.subsec_nanos()) });
            events.clear();
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), timeout.as_ref()) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(source) => return Err(EngineError::Events { source: source.into() }),
            }
            for event in &events {
                if let Some(source) = Source::decode(event.data.u64()) {
                    self.dispatch(source)?;
                    self.obey();
                }
            }
            // After the events, so that answers which are there count before deadlines do.
            if events.is_empty() || ticked.elapsed() >= limits::TICK {
                ticked = Instant::now();
                self.end_overdue_questions();
                self.core.handle(self.started.elapsed(), Event::Tick);
                if trimmed.elapsed() >= limits::TRIM_INTERVAL {
                    trimmed = ticked;
                    self.buffers.trim();
                }
            }
        }
    }

    fn dispatch(&mut self, source: Source) -> Result<(), EngineError> {
        match source {
            Source::Fuse => self.take_fuse_requests()?,
            Source::Signal => self.take_signal(),
            Source::Unmounted => self.take_unmount_result(),
            Source::ControlListener => self.accept_control_clients(),
            Source::NbdListener => self.accept_nbd_clients(),
            Source::Link(replica) => self.take_replies(replica),
            Source::ReplicaControl(replica) => self.take_control_replies(replica)?,
            Source::ControlClient(index) => self.take_control_requests(index),
            Source::NbdClient(index) => self.take_nbd_requests(index),
        }
        Ok(())
    }

    fn take_replies(&mut self, replica: usize) {
        let now = self.now();
        let Some(link) = &mut self.links[replica] else { return };
        if let Err(reason) = link.receive(replica, &mut self.core, &mut self.buffers, now) {
            self.lose(replica, Event::ConnectionLost { replica, reason });
        }
    }

    /// Does what the core wants done, in its order.
    fn obey(&mut self) {
        let mut outputs = std::mem::take(&mut self.outputs);
        loop {
            self.core.take_outputs(&mut outputs);
            if outputs.is_empty() {
                break;
            }
            for output in outputs.drain(..) {
                self.obey_one(output);
            }
        }
        self.outputs = outputs;
        if std::mem::take(&mut self.status_changed) {
            self.tell_watchers();
        }
    }

    fn obey_one(&mut self, output: Output) {
        match output {
            Output::Send(transfer) => {
                if let Some(link) = &mut self.links[transfer.replica] {
                    link.push(&transfer);
                }
            }
            Output::Control { replica, request } => self.send_control(replica, request),
            Output::Drop { replica, reason } => {
                warn!(volume = %self.config.volume, replica = %self.names[replica], reason, "replica dropped");
                self.links[replica] = None;
                self.controls[replica] = None;
                self.lost[replica] = None;
            }
            Output::Record { generation, members } => {
                info!(volume = %self.config.volume, generation, "fence complete");
                self.remember(generation, members);
            }
            Output::MayDiffer => self.set_may_differ(true),
            Output::Equal => {
                info!(volume = %self.config.volume, repaired_bytes = self.core.counters().repaired_bytes, "replicas are equal");
                if !self.nbd_changed {
                    self.set_may_differ(false);
                }
            }
            Output::Compare { token, length, pinned, others } => {
                let reference = &self.buffers.bytes(pinned)[..length];
                let differing = others.iter().filter(|(_, buffer)| self.buffers.bytes(*buffer)[..length] != *reference);
                let differing =
                    differing.fold(core::Set::EMPTY, |set, (replica, _)| set.with(core::Set::only(*replica)));
                self.core.handle(self.started.elapsed(), Event::Compared { token, differing });
            }
            Output::Complete { tag, result } => self.complete(tag, result),
            Output::Paused { .. } => {}
            Output::Ended { clean } => self.ended = Some(clean),
            Output::StatusChanged => self.status_changed = true,
        }
    }

    fn send_control(&mut self, replica: usize, request: ControlRequest) {
        use proto::replica::Request;
        let request = match request {
            ControlRequest::Fence { generation, members } => {
                let members = members.iter().map(|member| self.names[member].clone()).collect();
                Request::Fence { generation, members, export: self.exports[replica].clone() }
            }
            ControlRequest::Close { generation } => Request::Close { generation },
        };
        let Some(control) = &mut self.controls[replica] else { return };
        let connected = control.ensure_connected().and_then(|new| watch(&self.epoll, replica, control, new));
        let sent = connected.and_then(|()| control.send(&request));
        if let Err(reason) = sent {
            self.core.handle(self.started.elapsed(), Event::ControlLost { replica, reason });
        }
    }

    fn send_all(&mut self) {
        for replica in 0..self.links.len() {
            let Some(link) = &mut self.links[replica] else { continue };
            if let Err(error) = link.send(&self.buffers) {
                let reason = format!("the connection broke ({error})");
                self.lose(replica, Event::ConnectionLost { replica, reason });
            }
        }
        self.send_nbd_replies();
    }

    /// A next life must begin with these members, whoever of them answers then.
    fn remember(&mut self, generation: u64, members: core::Set) {
        let members = members.iter().map(|member| self.names[member].clone()).collect();
        if let Err(error) = self.life.set_known(&Known { generation, members }) {
            // Going on is right: it matters only if this engine and all of these replicas are lost together.
            error!(volume = %self.config.volume, %error, "cannot note the generation for a next engine");
        }
    }

    pub(super) fn set_may_differ(&mut self, may_differ: bool) {
        if let Err(error) = self.life.set_may_differ(may_differ) {
            error!(volume = %self.config.volume, %error, "cannot note for a next engine whether replicas may differ");
        }
    }

    pub(super) fn status(&self) -> Status {
        let counters = self.core.counters();
        let state = |replica| match self.core.replica_state(replica) {
            core::ReplicaState::InSync => ReplicaState::InSync,
            core::ReplicaState::Comparing => ReplicaState::Comparing,
            core::ReplicaState::Dropped => ReplicaState::Dropped,
        };
        let error = |replica: usize| {
            let error = self.core.replica_error(replica).or(self.start_errors[replica].as_deref());
            error.map(|error| (self.names[replica].clone(), error.to_owned()))
        };
        Status {
            volume: self.config.volume.clone(),
            pid: std::process::id(),
            generation: self.core.recorded_generation(),
            serving: self.ended.is_none(),
            replicas: self.names.iter().enumerate().map(|(replica, name)| (name.clone(), state(replica))).collect(),
            replica_errors: (0..self.names.len()).filter_map(error).collect::<BTreeMap<_, _>>(),
            faulted: self.core.faulted().map(str::to_owned),
            read_ops: counters.read_ops,
            read_bytes: counters.read_bytes,
            write_ops: counters.write_ops,
            write_bytes: counters.write_bytes,
            flush_ops: counters.flush_ops,
            in_flight: self.core.in_flight() as u32,
            lives: self.lives + 1,
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }
}

pub(super) fn data(source: Source) -> epoll::EventData {
    epoll::EventData::new_u64(source.encode())
}

/// Asks for the events of a control connection that is new.
pub(super) fn watch(epoll: &OwnedFd, replica: usize, control: &ReplicaControl, new: bool) -> Result<(), String> {
    let Some(descriptor) = control.descriptor().filter(|_| new) else { return Ok(()) };
    let flags = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
    epoll::add(epoll, descriptor, data(Source::ReplicaControl(replica)), flags).map_err(|error| error.to_string())
}

//! The start of an engine: ask every replica, choose the members, raise the generation, open the exports. It blocks.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use proto::engine::{Config, ReplicaAddress};
use proto::replica::{Reply, Request};
use runtime::transport::Security;
use tracing::{info, warn};

use super::beginning::{Beginning, Next, Round, is_rival};
use super::choice::{Answer, Choice, Situation, choose};
use super::life::LifeFiles;
use crate::core::Set;
use crate::error::EngineError;
use crate::nbd;
use crate::stream::{Service, Stream};

/// A member's connections.
pub struct Member {
    pub control: Stream,
    pub data: Stream,
    /// What the replica opened for this engine.
    pub export: String,
}

/// All members have recorded `generation` and their exports are open.
pub struct Started {
    /// How to connect anew.
    pub security: Security,
    pub generation: u64,
    pub members: Vec<Option<Member>>,
    /// Why a replica of the configuration is no member.
    pub errors: Vec<Option<String>>,
    pub compare: bool,
}

impl Started {
    pub fn set(&self) -> Set {
        let here = (0..self.members.len()).filter(|replica| self.members[*replica].is_some());
        here.fold(Set::EMPTY, |set, replica| set.with(Set::only(replica)))
    }
}

struct Starting<'a> {
    config: &'a Config,
    security: &'a Security,
    names: &'a [String],
    addresses: Vec<&'a ReplicaAddress>,
    limit: Duration,
    controls: Vec<Option<Stream>>,
    errors: Vec<Option<String>>,
}

/// Brings an engine to the point where it can serve.
///
/// # Errors
/// [`EngineError::NoReplica`] when nobody is left to begin with.
pub fn start(
    config: &Config,
    security: Security,
    names: &[String],
    life: &LifeFiles,
    lives: u32,
) -> Result<Started, EngineError> {
    let nobody = |reason: String| EngineError::NoReplica { volume: config.volume.clone(), reason };
    let mut starting = Starting {
        config,
        security: &security,
        names,
        addresses: names.iter().map(|name| &config.replicas[name]).collect(),
        limit: Duration::from_millis(config.replica_timeout_ms),
        controls: names.iter().map(|_| None).collect(),
        errors: vec![None; names.len()],
    };
    let answers = starting.ask_status();
    let known = life.known().map_err(|error| nobody(format!("what the last engine left cannot be read: {error}")))?;
    let claim =
        life.claim().map_err(|error| nobody(format!("what the last engine asked for cannot be read: {error}")))?;
    let situation = Situation {
        config_generation: config.generation,
        attachment: config.attachment,
        config_compare: config.compare_replicas,
        names,
        answers: &answers,
        first_life: lives == 0,
        known: known.as_ref(),
        claim: &claim,
        known_to_differ: life.may_differ(),
    };
    let seen: Vec<u64> = answers.iter().map(|a| a.as_ref().map_or(0, |answer| answer.record.generation)).collect();
    let choice = choose(&situation).map_err(|reason| nobody(starting.with_errors(&reason)))?;
    for replica in (0..names.len()).filter(|replica| !choice.members.contains(*replica)) {
        starting.errors[replica].get_or_insert("it is not a member of the latest generation; it missed writes".into());
    }
    let Choice { generation, members, compare, .. } = choice;
    info!(volume = %config.volume, generation, members = ?starting.named(members), compare, "members chosen");
    // Before anything that a next life would see of this one: what it does not find noted here it takes for equal, or for free.
    let noted = life.set_claim(&choice.claim());
    let noted = noted.and_then(|()| if compare { life.set_may_differ(true) } else { Ok(()) });
    noted.map_err(|error| nobody(format!("what a next engine has to know cannot be noted: {error}")))?;
    let mut beginning = Beginning::new(choice);
    let (mut exports, mut data) = (Vec::new(), Vec::new());
    let Choice { generation, members: remaining, compare, .. } = loop {
        let mut rival = false;
        let answered = match beginning.round() {
            Round::Open { generation, members } => {
                (exports, rival) = starting.open(generation, members, &seen);
                starting.answered(&exports)
            }
            Round::Connect { .. } => {
                data = starting.connect(&exports);
                starting.answered(&data)
            }
            Round::Fence { generation, members } => {
                warn!(generation, remaining = ?starting.named(members), "going on without some replicas");
                starting.fence(generation, members, &exports)
            }
        };
        match beginning.next(answered, rival) {
            Next::Ask(_) => {}
            Next::Serve(choice) => break choice,
            Next::Fail(reason) => return Err(nobody(starting.with_errors(reason))),
        }
    };
    let mut members = Vec::new();
    for (replica, (data, export)) in data.into_iter().zip(exports).enumerate() {
        let control = starting.controls[replica].take();
        members.push(match (control, data, export) {
            (Some(control), Some(data), Some(export)) if remaining.contains(replica) => {
                Some(Member { control, data, export })
            }
            _ => None,
        });
    }
    let errors = starting.errors;
    Ok(Started { security, generation, members, errors, compare })
}

impl Starting<'_> {
    fn named(&self, set: Set) -> Vec<&str> {
        set.iter().map(|replica| self.names[replica].as_str()).collect()
    }

    fn with_errors(&self, reason: &str) -> String {
        let errors = self.names.iter().zip(&self.errors);
        let errors = errors.filter_map(|(name, error)| error.as_ref().map(|error| format!("; {name}: {error}")));
        errors.fold(reason.to_owned(), |text, error| text + &error)
    }

    fn answered<T>(&self, results: &[Option<T>]) -> Set {
        let here = (0..results.len()).filter(|replica| results[*replica].is_some());
        here.fold(Set::EMPTY, |set, replica| set.with(Set::only(replica)))
    }

    /// Does something with several replicas at the same time; an error is noted and takes the replica out.
    fn each<T: Send>(
        &mut self,
        replicas: Set,
        work: impl Fn(usize, &mut Option<Stream>, Instant) -> io::Result<T> + Sync,
    ) -> Vec<Option<T>> {
        let deadline = Instant::now() + self.limit;
        let work = &work;
        let results: Vec<Option<io::Result<T>>> = thread::scope(|scope| {
            let threads = self.controls.iter_mut().enumerate().map(|(replica, control)| {
                replicas.contains(replica).then(|| scope.spawn(move || work(replica, control, deadline)))
            });
            let threads: Vec<_> = threads.collect();
            threads.into_iter().map(|thread| thread.map(|t| t.join().expect("no panic in a start thread"))).collect()
        });
        let keep = |(replica, result): (usize, Option<io::Result<T>>)| match result? {
            Ok(value) => Some(value),
            Err(error) => {
                warn!(replica = %self.names[replica], %error, "replica left out");
                self.errors[replica] = Some(error.to_string());
                None
            }
        };
        results.into_iter().enumerate().map(keep).collect()
    }

    fn ask_status(&mut self) -> Vec<Option<Answer>> {
        let (config, security, addresses) = (self.config, self.security, self.addresses.clone());
        self.each(Set::first(self.names.len()), move |replica, control, deadline| {
            let mut stream = Stream::connect(addresses[replica], Service::Control, security, deadline)?;
            let (record, serves) = match stream.ask(&Request::Status, deadline)? {
                Reply::Status { record, export, .. } => (record, export.is_some()),
                other => return Err(unexpected(&other)),
            };
            if !record.volume.is_empty() && record.volume != config.volume {
                return Err(io::Error::other(format!("it belongs to volume `{}`", record.volume)));
            }
            if record.size_bytes != 0 && record.size_bytes != config.size_bytes {
                return Err(io::Error::other(format!(
                    "it has {} bytes, the volume has {}",
                    record.size_bytes, config.size_bytes
                )));
            }
            *control = Some(stream);
            Ok(Answer { record, serves })
        })
    }

    /// Opens the exports; tells too whether somebody else raised the generation since the replicas were asked for it. Then
    /// nobody knows which of both engines the others follow, so this one begins anew rather than goes on without that replica.
    fn open(&mut self, generation: u64, members: Set, seen: &[u64]) -> (Vec<Option<String>>, bool) {
        let names: Vec<String> = self.named(members).into_iter().map(String::from).collect();
        let rival = AtomicBool::new(false);
        let exports = self.each(members, |replica, control, deadline| {
            let control = control.as_mut().ok_or_else(|| io::Error::other("it is not connected"))?;
            let seen = seen[replica];
            match control.ask(&Request::Open { generation, members: names.clone(), seen: Some(seen) }, deadline)? {
                Reply::Opened { export } => Ok(export),
                other => {
                    if let Reply::Status { record, export, .. } = control.ask(&Request::Status, deadline)?
                        && is_rival(&record, export.is_some(), generation, &names, seen)
                    {
                        rival.store(true, Ordering::Relaxed);
                    }
                    Err(unexpected(&other))
                }
            }
        });
        (exports, rival.into_inner())
    }

    fn connect(&mut self, exports: &[Option<String>]) -> Vec<Option<Stream>> {
        let opened = self.answered(exports);
        let (addresses, security, size_bytes) = (self.addresses.clone(), self.security, self.config.size_bytes);
        self.each(opened, move |replica, _, deadline| {
            let export = exports[replica].as_ref().expect("it was opened");
            let mut stream = Stream::connect(addresses[replica], Service::Data, security, deadline)?;
            stream.set_deadline(deadline)?;
            let size = nbd::client::open_export(&mut stream, export)?;
            if size != size_bytes {
                return Err(io::Error::other(format!("its export has {size} bytes, the volume has {size_bytes}")));
            }
            Ok(stream)
        })
    }

    fn fence(&mut self, generation: u64, members: Set, exports: &[Option<String>]) -> Set {
        let names: Vec<String> = self.named(members).into_iter().map(String::from).collect();
        let done = self.each(members, move |replica, control, deadline| {
            let export = exports[replica].clone().unwrap_or_default();
            let control = control.as_mut().ok_or_else(|| io::Error::other("it is not connected"))?;
            match control.ask(&Request::Fence { generation, members: names.clone(), export }, deadline)? {
                Reply::Done => Ok(()),
                other => Err(unexpected(&other)),
            }
        });
        self.answered(&done)
    }
}

fn unexpected(reply: &Reply) -> io::Error {
    io::Error::other(match reply {
        Reply::Refused { message } => format!("it refused: {message}"),
        _ => "it sent a reply of another kind".to_owned(),
    })
}

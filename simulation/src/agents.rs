//! Agents and data sources: what their processes do to the files of their disk, and how they answer.

use api::ErrorKind;
use api::image::CopyState;
use api::manager::FileInfo;
use jiff::Timestamp;
use planner::data_source::Report;
use planner::manager::orphans::{Place, Remains};
use planner::manager::{Agent, Bandwidth, FileWish};
use planner::retry::parse;
use planner::workload::{State, Wish, Workload};
use rand::Rng;
use rand::rngs::StdRng;

use crate::any;
use crate::files::{File, Key, whole_file};
use crate::world::{GIB, World};

const SOURCE: &str = "backing-image-ds-";

pub fn disk_of(wish: &Wish) -> String {
    wish.labels.get(api::names::label::DISK_UUID).cloned().unwrap_or_default()
}

fn uuid_of(wish: &Wish) -> String {
    let at = wish.args.iter().position(|a| a == "--uuid");
    at.and_then(|at| wish.args.get(at + 1)).cloned().unwrap_or_default()
}

fn failed(key: &Key, kind: ErrorKind, message: &str) -> FileInfo {
    FileInfo {
        name: key.0.clone(),
        uuid: key.1.clone(),
        state: CopyState::Failed,
        message: message.into(),
        error_kind: Some(kind),
        ..Default::default()
    }
}

/// The whole file, as long as it is being read to know whether it is that.
fn doubtful(key: &Key) -> FileInfo {
    let message = "the file was changed; it is being verified".into();
    FileInfo { state: CopyState::Unknown, message, progress: 0, ..whole_file(key) }
}

impl World {
    pub fn ensure_workload(&mut self, wish: &Wish) {
        if self.workloads.contains_key(&wish.name) {
            return;
        }
        let state = State::Starting(String::new());
        let workload = Workload { wish: wish.clone(), state, ip: format!("ip-{}", wish.name), is_outdated: false };
        self.workloads.insert(wish.name.clone(), workload);
    }

    /// Whether a process gets a request and answers it.
    pub fn lives(&self, workload: &Workload) -> bool {
        self.answers(&workload.wish.node) && !self.stopped.contains_key(&workload.wish.name)
    }

    /// A workload as the controller sees it.
    pub fn seen(&self, name: &str) -> Option<Workload> {
        let mut workload = self.workloads.get(name).cloned()?;
        if !self.answers(&workload.wish.node) {
            workload.state = State::Unknown("silent".into());
        }
        Some(workload)
    }

    pub fn ask_agent(&self, id: &str, workload: &Workload) -> Option<Result<Agent, String>> {
        let is_running = workload.state == State::Running;
        let silence = || Err("no answer within 5 s".to_owned());
        is_running.then(|| match (self.lives(workload), self.disks.get(id)) {
            (true, Some(disk)) => Ok(Agent {
                api_version: 3,
                api_min_version: 3,
                files: disk.known.values().cloned().collect(),
                remains: self.is_here(id).then(|| disk.remains()),
                foreign: vec![],
                bandwidth: Some(disk.bandwidth.clone()),
            }),
            _ => silence(),
        })
    }

    pub fn ask_source(&self, key: &Key, workload: &Workload) -> Option<Result<Report, String>> {
        let made =
            self.disks.get(&disk_of(&workload.wish)).and_then(|d| d.made.get(key)).filter(|_| self.lives(workload));
        (workload.state == State::Running).then(|| made.cloned().ok_or_else(|| "no answer".to_owned()))
    }

    /// Time goes on for all processes that live: sources and syncs end, well or not.
    pub fn work_on_files(&mut self, random: &mut StdRng) {
        for name in self.workloads.keys().cloned().collect::<Vec<_>>() {
            let workload = self.workloads[&name].clone();
            let id = disk_of(&workload.wish);
            if !self.lives(&workload) || !self.disks.contains_key(&id) {
                continue;
            }
            let fails = self.faults && random.random_bool(0.15);
            match workload.state {
                State::Starting(_) => self.begin(&name, &id),
                State::Running if name.starts_with(SOURCE) => self.source_works(&workload, &id, fails, random),
                State::Running => self.agent_works(&workload, &id, fails),
                State::Failed(_) | State::Unknown(_) => {}
            }
        }
    }

    fn begin(&mut self, name: &str, id: &str) {
        let workload = self.workloads.get_mut(name).expect("it is there");
        let is_there = self.mounts.get(&workload.wish.disk_path).and_then(|m| m.as_deref()) == Some(id);
        if !is_there {
            workload.state = State::Failed("`longhorn-disk.cfg` is missing".into());
            return;
        }
        workload.state = State::Running;
        let wish = workload.wish.clone();
        let disk = self.disks.get_mut(id).expect("disks stay");
        match name.strip_prefix(SOURCE) {
            // It finds what it had finished before, also when that is taken over already.
            Some(image) => {
                let key = (image.to_owned(), uuid_of(&wish));
                let whole = Report { size: GIB, progress: 100, checksum: "c0ffee".into(), ..Default::default() };
                let state = match (disk.made.get(&key).map(|r| r.state), disk.files.get(&key)) {
                    (Some(CopyState::ReadyForTransfer), _) => CopyState::ReadyForTransfer,
                    (_, Some(file)) if !file.is_touched => CopyState::Ready,
                    _ => CopyState::Starting,
                };
                let begun = Report { state, ..Default::default() };
                disk.made.insert(key, if state == CopyState::Starting { begun } else { Report { state, ..whole } });
            }
            // It adopts what lies there.
            None => {
                let judged = |(key, file): (&Key, &File)| {
                    (key.clone(), if file.is_touched { doubtful(key) } else { whole_file(key) })
                };
                disk.known = disk.files.iter().map(judged).collect();
                disk.syncs.clear();
                disk.bandwidth = Bandwidth::default();
                disk.readings.clear();
            }
        }
    }

    fn source_works(&mut self, workload: &Workload, id: &str, fails: bool, random: &mut StdRng) {
        let image = workload.wish.name.strip_prefix(SOURCE).unwrap_or_default();
        let key = (image.to_owned(), uuid_of(&workload.wish));
        let is_there = self.is_mounted(id, &workload.wish.disk_path);
        let disk = self.disks.get_mut(id).expect("disks stay");
        let has_room = disk.free() > 0;
        let is_writable = is_there && !disk.is_read_only;
        let Some(report) = disk.made.get_mut(&key) else { return };
        let failure = |kind, message: &str| Report {
            state: CopyState::Failed,
            kind: Some(kind),
            message: message.into(),
            ..Default::default()
        };
        *report = match report.state {
            CopyState::Starting => Report { state: CopyState::InProgress, size: GIB, ..Default::default() },
            CopyState::InProgress if !is_writable => failure(ErrorKind::Internal, "input/output error"),
            CopyState::InProgress if !has_room => failure(ErrorKind::Exhausted, "no space left on the disk"),
            CopyState::InProgress if fails => match random.random_range(0..4) {
                0 => failure(ErrorKind::NotFound, "the source answered 404"),
                1 => failure(ErrorKind::Corrupt, "the file does not have the SHA-512 that is wanted"),
                _ => failure(ErrorKind::Unavailable, "connection refused"),
            },
            CopyState::InProgress => Report {
                state: CopyState::ReadyForTransfer,
                size: GIB,
                progress: 100,
                checksum: "c0ffee".into(),
                ..Default::default()
            },
            _ => return,
        };
    }

    fn agent_works(&mut self, workload: &Workload, id: &str, fails: bool) {
        let is_there = self.is_mounted(id, &workload.wish.disk_path);
        let now = self.now;
        for key in self.disks[id].known.keys().cloned().collect::<Vec<_>>() {
            let sender = self.sender(id, &key);
            let disk = self.disks.get_mut(id).expect("disks stay");
            let info = disk.known[&key].clone();
            let file = disk.files.get(&key).copied().filter(|_| is_there);
            let is_writable = is_there && !disk.is_read_only;
            let next = match (info.state, file) {
                (CopyState::Ready, None) => failed(&key, ErrorKind::NotFound, "the file is gone from the disk"),
                (CopyState::Ready, Some(file)) if file.is_touched => doubtful(&key),
                (CopyState::Ready, Some(file)) if let Some(asked) = disk.readings.remove(&key) => match file.is_damaged
                {
                    true => failed(&key, ErrorKind::Corrupt, "1 of 9 chunks is damaged"),
                    // Who set the clock back may have asked in the future.
                    false => FileInfo {
                        verified_at: parse(&asked).into_iter().fold(now, Timestamp::max).to_string(),
                        ..info
                    },
                },
                (CopyState::Unknown, Some(File { is_damaged: true, .. })) => {
                    failed(&key, ErrorKind::Corrupt, "1 of 9 chunks is damaged")
                }
                (CopyState::Unknown, Some(_)) => {
                    disk.files.insert(key.clone(), File::default());
                    whole_file(&key)
                }
                (CopyState::Unknown, None) => failed(&key, ErrorKind::NotFound, "the file is gone from the disk"),
                (CopyState::InProgress, _) => {
                    disk.syncs.remove(&key);
                    match sender {
                        _ if !is_writable => failed(&key, ErrorKind::Internal, "input/output error"),
                        _ if file.is_none() && disk.free() < GIB => {
                            failed(&key, ErrorKind::Exhausted, "no space left on the disk")
                        }
                        None => failed(&key, ErrorKind::Unavailable, "no peer answers"),
                        Some(_) if fails => failed(&key, ErrorKind::Unavailable, "the peer went away"),
                        Some(true) => failed(&key, ErrorKind::Corrupt, "a chunk does not match the manifest"),
                        Some(false) => {
                            disk.files.insert(key.clone(), File::default());
                            self.taken.remove(&(id.to_owned(), key.clone()));
                            self.tally.add("syncs", 1);
                            whole_file(&key)
                        }
                    }
                }
                _ => continue,
            };
            self.disks.get_mut(id).expect("disks stay").known.insert(key, next);
        }
    }

    /// Whether the best peer of a sync has a damaged file; `None`: no peer can send.
    fn sender(&self, id: &str, key: &Key) -> Option<bool> {
        let peers = self.disks[id].syncs.get(key)?;
        let can_send = |peer: &&String| {
            let workload =
                self.workloads.values().find(|w| !w.wish.name.starts_with(SOURCE) && disk_of(&w.wish) == **peer);
            workload
                .is_some_and(|w| w.state == State::Running && self.lives(w) && self.is_mounted(peer, &w.wish.disk_path))
        };
        let files = peers.iter().filter(can_send).filter_map(|peer| self.disks.get(peer)?.files.get(key));
        files.map(|file| file.is_damaged).min()
    }

    pub fn kill_workload(&mut self, random: &mut StdRng) {
        let names: Vec<String> = self.workloads.keys().cloned().collect();
        let Some(name) = any(&names, random) else { return };
        let what = if name.starts_with(SOURCE) { "data sources killed" } else { "agents killed" };
        self.happens(what, name);
        self.workloads.get_mut(name).expect("it is there").state = State::Failed("killed by signal 9".into());
    }

    /// The agent of a disk takes a file over, or adopts what lies there; an error: it refuses.
    pub fn fetch_file(&mut self, id: &str, wish: &FileWish, from_source: bool) -> Result<(), &'static str> {
        let key = (wish.image.clone(), wish.uuid.clone());
        let source = format!("{SOURCE}{}", wish.image);
        let source_lives = self.workloads.get(&source).is_some_and(|w| w.state == State::Running && self.lives(w));
        let is_there = self.is_here(id);
        let disk = self.disks.get_mut(id).expect("disks stay");
        if disk.known.get(&key).is_some_and(|f| f.state == CopyState::Ready) {
            return Ok(());
        }
        if disk.known.get(&key).is_some_and(|f| matches!(f.state, CopyState::InProgress | CopyState::Unknown)) {
            return Err("it is being received or verified");
        }
        if from_source && !source_lives {
            return Err("the data source cannot be asked");
        }
        if !is_there {
            return Err("there is no such file");
        }
        if from_source && let Some(report) = disk.made.get_mut(&key) {
            match report.state {
                CopyState::ReadyForTransfer => {
                    report.state = CopyState::Ready;
                    disk.files.insert(key.clone(), File::default());
                    disk.known.insert(key.clone(), whole_file(&key));
                    self.taken.remove(&(id.to_owned(), key.clone()));
                    self.happens("files taken over", format!("{} on {id}", wish.image));
                    return Ok(());
                }
                CopyState::Ready => {}
                _ => return Err("the data source is not ready for the transfer"),
            }
        }
        let Some(file) = disk.files.get(&key) else { return Err("there is no such file") };
        let found = if file.is_touched { doubtful(&key) } else { whole_file(&key) };
        disk.known.insert(key, found);
        self.tally.add("files adopted", 1);
        Ok(())
    }

    pub fn sync_file(&mut self, id: &str, wish: FileWish, from: Vec<String>) {
        let key = (wish.image, wish.uuid);
        let peers = from.iter().filter_map(|address| address.split(':').next().map(str::to_owned)).collect();
        let disk = self.disks.get_mut(id).expect("disks stay");
        if disk.known.get(&key).is_some_and(|f| matches!(f.state, CopyState::Ready | CopyState::InProgress)) {
            return;
        }
        disk.syncs.insert(key.clone(), peers);
        let (name, uuid) = key.clone();
        disk.known.insert(key, FileInfo { name, uuid, state: CopyState::InProgress, ..Default::default() });
    }

    /// The agent removes an orphan; an error: it refuses. The scan must never touch anything of an image that exists.
    pub fn remove_orphan(&mut self, id: &str, found: &Remains) -> Result<(), &'static str> {
        if !self.is_here(id) {
            return Err("the disk is away");
        }
        let key = (found.image.clone(), found.uuid.clone());
        if !self.judge_orphan(id, &key, found) {
            return Ok(());
        }
        let disk = self.disks.get_mut(id).expect("disks stay");
        if !found.mark.is_empty() && !disk.remains().contains(&Remains { size: GIB, ..found.clone() }) {
            return Err("it changed since it was looked at");
        }
        match found.place {
            Place::Preparations => {
                disk.made.remove(&key);
                self.happens("orphans of preparations removed", format!("{} on {id}", found.path()));
            }
            Place::Copies | Place::Parts => {
                disk.known.remove(&key);
                disk.files.remove(&key);
                self.happens("orphans of copies removed", format!("{} on {id}", found.path()));
            }
        }
        Ok(())
    }

    /// Whether the disk is where its agent looks for it.
    pub fn is_here(&self, id: &str) -> bool {
        let name = api::names::manager_name(&id.parse().expect("a disk"));
        self.workloads.get(&name).is_some_and(|w| self.is_mounted(id, &w.wish.disk_path))
    }
}

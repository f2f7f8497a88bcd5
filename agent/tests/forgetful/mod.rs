//! A disk that forgets whatever it may when power goes: a file has what it held at its last `fsync`, a directory the names that it
//! had at its own last one. Only times and modes survive by themselves, ahead of the bytes they belong to, as a journal keeps them.
//!
//! `fsync` and `fdatasync` of a test program that has this module are those below: they take down what is safe from here on.
#![allow(unsafe_code, reason = "the C library's fsync is replaced by one that is told of")]

use std::collections::BTreeMap;
use std::ffi::{OsString, c_int};
use std::fs::{File, Metadata, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

static JOURNALS: Mutex<Vec<Arc<Journal>>> = Mutex::new(vec![]);

/// A file or directory, whatever its name: the number of an inode is used again, but not with the same time of birth.
type Id = (u64, SystemTime);

/// What a moment made safe, and the time and mode of every file by then.
struct Event {
    what: Safe,
    files: BTreeMap<Id, (SystemTime, u32)>,
}

enum Safe {
    File(Id, Vec<u8>),
    Directory(Id, BTreeMap<OsString, (Id, bool)>),
}

/// What became safe below a directory, in order.
pub struct Journal {
    root: PathBuf,
    events: Mutex<Vec<Event>>,
}

/// Takes down what becomes safe below a directory; what is there already is safe.
pub fn watch(root: &Path) -> Arc<Journal> {
    let journal = Arc::new(Journal { root: root.canonicalize().unwrap(), events: Mutex::default() });
    journal.settle();
    JOURNALS.lock().unwrap().push(journal.clone());
    journal
}

impl Journal {
    /// How many moments there were until now: a promise that was given by now holds behind them.
    pub fn now(&self) -> usize {
        self.events.lock().unwrap().len()
    }

    /// Makes everything safe, as time does.
    pub fn settle(&self) {
        self.below(&self.root, &mut |path, metadata| self.add(path, metadata));
    }

    /// What is left in `into` when power went behind so many moments.
    pub fn cut(&self, moments: usize, into: &Path) {
        let events = self.events.lock().unwrap();
        let (mut contents, mut names, mut files) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        for event in &events[..moments] {
            match &event.what {
                Safe::File(id, bytes) => drop(contents.insert(*id, bytes)),
                Safe::Directory(id, entries) => drop(names.insert(*id, entries)),
            }
            files.extend(event.files.iter());
        }
        let mut directories = vec![(id(&self.root.metadata().unwrap()), into.to_owned())];
        while let Some((directory, path)) = directories.pop() {
            for (name, (id, is_directory)) in names.get(&directory).copied().into_iter().flatten() {
                let path = path.join(name);
                if *is_directory {
                    std::fs::create_dir(&path).unwrap();
                    directories.push((*id, path));
                    continue;
                }
                std::fs::write(&path, contents.get(id).map_or(&[][..], |bytes| bytes)).unwrap();
                if let Some((time, mode)) = files.get(id) {
                    File::open(&path).unwrap().set_modified(*time).unwrap();
                    std::fs::set_permissions(&path, Permissions::from_mode(*mode)).unwrap();
                }
            }
        }
    }

    fn add(&self, path: &Path, metadata: &Metadata) {
        let what = if metadata.is_dir() {
            let entries = std::fs::read_dir(path).unwrap().filter_map(|entry| {
                let entry = entry.unwrap();
                // What goes at this very moment may be gone.
                let metadata = entry.metadata().ok()?;
                Some((entry.file_name(), (id(&metadata), metadata.is_dir())))
            });
            Safe::Directory(id(metadata), entries.collect())
        } else {
            Safe::File(id(metadata), std::fs::read(path).unwrap())
        };
        let mut files = BTreeMap::new();
        self.below(&self.root, &mut |_, metadata| {
            files.insert(id(metadata), (metadata.modified().unwrap(), metadata.mode()));
        });
        self.events.lock().unwrap().push(Event { what, files });
    }

    fn below(&self, path: &Path, each: &mut dyn FnMut(&Path, &Metadata)) {
        let Ok(metadata) = path.symlink_metadata() else { return };
        each(path, &metadata);
        let Ok(entries) = std::fs::read_dir(path) else { return };
        for entry in entries {
            self.below(&entry.unwrap().path(), each);
        }
    }
}

fn id(metadata: &Metadata) -> Id {
    (metadata.ino(), metadata.created().unwrap_or(SystemTime::UNIX_EPOCH))
}

fn tell(descriptor: c_int) {
    let opened = PathBuf::from(format!("/proc/self/fd/{descriptor}"));
    let (Ok(path), Ok(metadata)) = (opened.read_link(), opened.metadata()) else { return };
    let journals = JOURNALS.lock().unwrap().clone();
    if let Some(journal) = journals.iter().find(|journal| path.starts_with(&journal.root)) {
        journal.add(&opened, &metadata);
    }
}

/// The C library's, told of before it is done.
#[unsafe(no_mangle)]
pub extern "C" fn fsync(descriptor: c_int) -> c_int {
    tell(descriptor);
    // SAFETY: the system call takes any number, and touches no memory.
    unsafe { libc::syscall(libc::SYS_fsync, descriptor) as c_int }
}

/// The C library's, told of before it is done.
#[unsafe(no_mangle)]
pub extern "C" fn fdatasync(descriptor: c_int) -> c_int {
    tell(descriptor);
    // SAFETY: as above.
    unsafe { libc::syscall(libc::SYS_fdatasync, descriptor) as c_int }
}

//! What lies in the two directories of images on a disk, whoever it belongs to, and how that of one image is removed.
//!
//! Only what has the names of our layout counts as something of an image, and only files of these names are ever removed, one by one:
//! links, directories and files that somebody else put there are told and never touched. A mark tells whether something changed between
//! the telling and the removal.

use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use api::names::without_image_suffix;

use crate::durable;
use crate::error::AgentError;
use crate::layout::{COPY, Disk, ImageKey};
use crate::limits::{MAX_FOREIGN, MAX_REMAINS};

/// What a block of `st_blocks` has.
const BLOCK_BYTES: u64 = 512;

/// What was found.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Survey {
    pub remains: Vec<Remains>,
    /// Paths below the disk.
    pub foreign: Vec<String>,
}

/// Something of one image in one of the two directories.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Remains {
    pub place: Place,
    pub key: ImageKey,
    /// What it takes on the disk.
    pub size_bytes: u64,
    pub mark: String,
    /// It holds something that is not of an image.
    pub is_mixed: bool,
    /// A copy without its file.
    pub is_partial: bool,
}

/// One of the directories.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Place {
    Copies,
    Preparations,
}

/// Looks through a disk, but not into the directories of copies that are `known`.
pub(crate) fn survey(disk: &Disk, known: &dyn Fn(&ImageKey) -> bool) -> Result<Survey, AgentError> {
    let mut found = Survey::default();
    for (name, metadata) in entries(&disk.images_dir())? {
        match name.parse::<ImageKey>() {
            Ok(key) if metadata.is_dir() && known(&key) => {}
            Ok(key) if metadata.is_dir() => found.remains.extend(copy(disk, &key)),
            _ => found.foreign.push(format!("backing-images/{}", name.escape_debug())),
        }
    }
    let mut keys: Vec<ImageKey> = vec![];
    for (name, metadata) in entries(&disk.tmp_dir())? {
        match without_image_suffix(&name).parse() {
            Ok(key) if metadata.is_file() => keys.push(key),
            _ => found.foreign.push(format!("tmp/{}", name.escape_debug())),
        }
    }
    keys.sort();
    keys.dedup();
    found.remains.extend(keys.iter().filter_map(|key| preparation(disk, key)));
    found.remains.sort_by(|a, b| (a.place, &a.key).cmp(&(b.place, &b.key)));
    found.remains.truncate(MAX_REMAINS);
    found.foreign.sort();
    found.foreign.truncate(MAX_FOREIGN);
    Ok(found)
}

/// Removes the files of an image in one directory, durably, if they still have this mark (`None`: whatever they are).
///
/// # Errors
/// `NotReady` when something changed since, or lies there that is not of an image.
pub(crate) fn remove(disk: &Disk, place: Place, key: &ImageKey, mark: Option<&str>) -> Result<(), AgentError> {
    let found = match place {
        Place::Copies => copy(disk, key),
        Place::Preparations => preparation(disk, key),
    };
    let Some(found) = found else { return Ok(()) };
    if found.is_mixed {
        let message = format!("the directory of `{key}` holds something that is not of an image: move that away");
        return Err(AgentError::NotReady { message });
    }
    if mark.is_some_and(|mark| mark != found.mark) {
        return Err(AgentError::NotReady {
            message: format!("the files of `{key}` changed since they were looked at"),
        });
    }
    for path in paths(disk, place, key) {
        if path.symlink_metadata().is_ok_and(|metadata| metadata.is_file()) {
            durable::remove_file(&path)?;
        }
    }
    if place == Place::Preparations {
        return durable::sync_parent(&disk.source(key).file);
    }
    let directory = disk.image_dir(key);
    // Refused by the kernel when something has come into it meanwhile.
    match fs::remove_dir(&directory) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(AgentError::io("remove", &directory)(e)),
        _ => {}
    }
    durable::sync_parent(&directory)
}

/// What lies in the directory of a copy; `None`: there is none.
fn copy(disk: &Disk, key: &ImageKey) -> Option<Remains> {
    let directory = disk.image_dir(key);
    let metadata = directory.symlink_metadata().ok().filter(Metadata::is_dir)?;
    let mut remains = Remains::new(Place::Copies, key);
    remains.count("", &metadata);
    // One that cannot be looked through may hold anything.
    let Ok(entries) = entries(&directory) else {
        remains.is_mixed = true;
        return Some(remains);
    };
    remains.is_partial = entries.iter().all(|(name, _)| name != COPY);
    for (name, metadata) in entries {
        let is_ours = without_image_suffix(&name) == COPY && metadata.is_file();
        remains.is_mixed |= !is_ours;
        remains.count(&name, &metadata);
    }
    Some(remains)
}

/// What lies in `tmp/` of an image; `None`: nothing.
fn preparation(disk: &Disk, key: &ImageKey) -> Option<Remains> {
    let mut remains = Remains::new(Place::Preparations, key);
    for path in paths(disk, Place::Preparations, key) {
        if let Some(metadata) = path.symlink_metadata().ok().filter(Metadata::is_file) {
            remains.count(&path.file_name().unwrap_or_default().to_string_lossy(), &metadata);
        }
    }
    (!remains.mark.is_empty()).then_some(remains)
}

impl Remains {
    fn new(place: Place, key: &ImageKey) -> Remains {
        Remains { place, key: key.clone(), size_bytes: 0, mark: String::new(), is_mixed: false, is_partial: false }
    }

    /// Adds a file. Of its times the kernel's own one counts, which nobody can put back.
    fn count(&mut self, name: &str, metadata: &Metadata) {
        self.size_bytes += metadata.blocks() * BLOCK_BYTES;
        let (inode, size) = (metadata.ino(), metadata.len());
        let (seconds, nanoseconds) = (metadata.ctime(), metadata.ctime_nsec());
        let text = format!("{} {name} {inode} {size} {seconds} {nanoseconds}", self.mark);
        self.mark = blake3::hash(text.as_bytes()).to_hex()[..16].to_owned();
    }
}

/// The names that an image may have in a directory; temporary ones go by themselves with theirs.
fn paths(disk: &Disk, place: Place, key: &ImageKey) -> Vec<PathBuf> {
    let files = match place {
        Place::Copies => disk.copy(key),
        Place::Preparations => disk.source(key),
    };
    let all = [files.file, files.partial, files.config, files.manifest, files.unfinished];
    all.into_iter().flat_map(|path| [runtime::files::temporary_name(&path), path]).collect()
}

/// What lies in a directory, in order, links not followed; nothing when it is not there.
fn entries(directory: &Path) -> Result<Vec<(String, Metadata)>, AgentError> {
    let list = match fs::read_dir(directory) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
        list => list.map_err(AgentError::io("list", directory))?,
    };
    let mut entries = vec![];
    for entry in list {
        let entry = entry.map_err(AgentError::io("list", directory))?;
        match entry.metadata() {
            Ok(metadata) => entries.push((entry.file_name().to_string_lossy().into_owned(), metadata)),
            // It went meanwhile.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(AgentError::io("look at", entry.path())(e)),
        }
    }
    entries.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use api::names::IMAGE_FILE_SUFFIXES;

    use super::*;

    const KEY: &str = "ubuntu-24.04-0a1b2c3d";

    fn key() -> ImageKey {
        KEY.parse().unwrap()
    }

    /// A disk with these files, below directories that are made; a name that ends with `/` is a directory, one with `@` a link to it.
    fn disk(files: &[&str]) -> (tempfile::TempDir, Disk) {
        let folder = tempfile::tempdir().unwrap();
        for file in files {
            let path = folder.path().join(file.trim_end_matches(['/', '@']));
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            match file.chars().last() {
                Some('/') => fs::create_dir_all(&path).unwrap(),
                Some('@') => symlink("/etc", &path).unwrap(),
                _ => fs::write(&path, "content").unwrap(),
            }
        }
        let disk = Disk::new(folder.path());
        (folder, disk)
    }

    fn found(files: &[&str]) -> String {
        let (_folder, disk) = disk(files);
        let survey = survey(&disk, &|_| false).unwrap();
        let remains = survey.remains.iter().map(|r| {
            let place = if r.place == Place::Copies { "copy" } else { "preparation" };
            let part = if r.is_partial { "part of a " } else { "" };
            format!("{}{part}{place} {}", if r.is_mixed { "mixed " } else { "" }, r.key)
        });
        remains.chain(survey.foreign).collect::<Vec<_>>().join("; ")
    }

    #[test]
    fn only_names_of_the_layout_count_as_something_of_an_image() {
        assert_eq!(found(&[]), "");
        for suffix in IMAGE_FILE_SUFFIXES.into_iter().chain([".cfg.writing"]) {
            assert_eq!(found(&[&format!("tmp/{KEY}{suffix}")]), format!("preparation {KEY}"), "{suffix}");
            let part = if suffix.is_empty() { "" } else { "part of a " };
            let copy = format!("{part}copy {KEY}");
            assert_eq!(found(&[&format!("backing-images/{KEY}/backing{suffix}")]), copy, "{suffix}");
        }
        let whole = [".tmp", ".cfg", ""].map(|suffix| format!("backing-images/{KEY}/backing{suffix}"));
        assert_eq!(found(&whole.each_ref().map(String::as_str)), format!("copy {KEY}"));
        assert_eq!(found(&[&format!("backing-images/{KEY}/")]), format!("part of a copy {KEY}"));
        assert_eq!(found(&[&format!("backing-images/{KEY}/notes")]), format!("mixed part of a copy {KEY}"));
        assert_eq!(found(&[&format!("backing-images/{KEY}/backing@")]), format!("mixed copy {KEY}"));
        for (path, told) in [
            ("backing-images/my-own-thing/", "my-own-thing"),
            ("backing-images/ubuntu-0A1B2C3D/", "ubuntu-0A1B2C3D"),
            ("backing-images/ubuntu-0a1b2c3d@", "ubuntu-0a1b2c3d"),
            ("backing-images/ubuntu-0a1b2c3d", "ubuntu-0a1b2c3d"),
        ] {
            assert_eq!(found(&[path]), format!("backing-images/{told}"));
        }
        for name in ["ubuntu-0a1b2c3d.bak", "notes.tmp", "ubuntu-0a1b2c3d/", "ubuntu-0a1b2c3d.tmp@"] {
            let told = name.trim_end_matches(['/', '@']);
            assert_eq!(found(&[&format!("tmp/{name}")]), format!("tmp/{told}"));
        }
    }

    #[test]
    fn what_is_known_is_not_looked_into() {
        let (_folder, disk) = disk(&[&format!("backing-images/{KEY}/backing"), &format!("tmp/{KEY}.tmp")]);
        let survey = survey(&disk, &|other| *other == key()).unwrap();
        assert_eq!(survey.remains.iter().map(|r| r.place).collect::<Vec<_>>(), [Place::Preparations]);
    }

    #[test]
    fn a_removal_takes_what_was_told_and_nothing_else() {
        let copy = format!("backing-images/{KEY}/backing");
        let files = [&copy, &format!("{copy}.cfg"), &format!("{copy}.chunks.writing"), &format!("tmp/{KEY}.tmp")];
        let others = ["backing-images/my-own-thing/x", "backing-images/ubuntu-24.04-ffffffff/backing", "tmp/notes"];
        let all: Vec<&str> = files.iter().map(|f| f.as_str()).chain(others).collect();
        let (folder, disk) = disk(&all);
        let marks = |place| {
            let survey = survey(&disk, &|_| false).unwrap();
            survey.remains.into_iter().find(|r| r.place == place && r.key == key()).map(|r| r.mark).unwrap_or_default()
        };
        for place in [Place::Copies, Place::Preparations] {
            let mark = marks(place);
            let error = remove(&disk, place, &key(), Some("another")).unwrap_err();
            assert!(error.to_string().contains("changed since they were looked at"), "{error}");
            assert_eq!(marks(place), mark);
            remove(&disk, place, &key(), Some(&mark)).unwrap();
            assert_eq!(marks(place), "");
            remove(&disk, place, &key(), Some(&mark)).unwrap();
        }
        for other in others {
            assert!(folder.path().join(other).exists(), "{other}");
        }
        assert!(!folder.path().join("backing-images").join(KEY).exists());
    }

    #[test]
    fn a_mark_changes_with_each_file() {
        let (folder, disk) = disk(&[&format!("tmp/{KEY}.tmp"), &format!("backing-images/{KEY}/backing.tmp")]);
        let marks = || survey(&disk, &|_| false).unwrap().remains.into_iter().map(|r| r.mark).collect::<Vec<_>>();
        let before = marks();
        assert_eq!(marks(), before);
        for path in [format!("tmp/{KEY}.tmp"), format!("backing-images/{KEY}/backing.tmp")] {
            fs::write(folder.path().join(path), "other content").unwrap();
        }
        let after = marks();
        assert!(before.len() == 2 && before[0] != after[0] && before[1] != after[1]);
    }

    /// As when it took the place of what was told.
    #[test]
    fn a_link_is_never_followed() {
        let prepared = format!("tmp/{KEY}.cfg");
        let (folder, disk) = disk(&["elsewhere/backing", "elsewhere/backing.cfg", "backing-images/", &prepared]);
        symlink(folder.path().join("elsewhere"), disk.image_dir(&key())).unwrap();
        symlink(folder.path().join("elsewhere/backing"), disk.source(&key()).partial).unwrap();
        for place in [Place::Copies, Place::Preparations] {
            remove(&disk, place, &key(), None).unwrap();
        }
        for path in ["elsewhere/backing", "elsewhere/backing.cfg", &format!("tmp/{KEY}.tmp")] {
            assert!(folder.path().join(path).symlink_metadata().is_ok(), "{path}");
        }
    }

    #[test]
    fn what_holds_something_else_is_never_removed() {
        for more in [format!("backing-images/{KEY}/notes"), format!("backing-images/{KEY}/backing.cfg@")] {
            let (folder, disk) = disk(&[&format!("backing-images/{KEY}/backing"), &more]);
            let error = remove(&disk, Place::Copies, &key(), None).unwrap_err();
            assert!(error.to_string().contains("is not of an image"), "{error}");
            assert!(folder.path().join(format!("backing-images/{KEY}/backing")).exists());
        }
    }
}

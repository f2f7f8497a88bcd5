//! What a disk holds of images, whoever it belongs to: whether files of any lie there, and which ones replicas lie over.
//!
//! The controller starts an agent on a disk that holds files although nobody wants any there, and removes nothing below a replica,
//! also when the objects of both are lost.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, DirEntry, FileType};
use std::io;
use std::path::Path;

use api::ids::{ImageName, ImageUuid};
use api::names::without_image_suffix;
use dataplane::storage_daemon::LOG;
use proto::replica::{Record, file};
use runtime::files::temporary_name;
use tracing::warn;

use crate::replica_process::LOCK;

/// Where copies lie, each in a directory.
const COPIES: &str = "backing-images";
/// Where they are made, each a file with some beside it.
const PREPARATIONS: &str = "tmp";
/// Where replicas lie.
const REPLICAS: &str = "replicas";

/// Whether something that could be of an image lies on a disk.
pub fn are_there(disk: &Path) -> bool {
    let any = |folder: &str, is_of_an_image: &dyn Fn(&str, FileType) -> bool| {
        entries(&disk.join(folder)).is_ok_and(|found| found.iter().any(|entry| says(entry, is_of_an_image)))
    };
    any(COPIES, &|name, kind| kind.is_dir() && is_key(name))
        || any(PREPARATIONS, &|name, kind| kind.is_file() && is_key(without_image_suffix(name)))
}

/// `<name>-<uuid>` of all images below replicas; `None` when one of these does not say what it lies over.
pub fn under_replicas(disk: &Path) -> Option<Vec<String>> {
    let mut images = BTreeSet::new();
    for replica in entries(&disk.join(REPLICAS)).ok()? {
        match under_replica(&replica) {
            Ok(image) => images.extend(image),
            Err(error) => {
                let directory = replica.path();
                warn!(directory = %directory.display(), %error, "no image is removed below a replica that does not say what it lies over");
                return None;
            }
        }
    }
    Some(images.into_iter().collect())
}

/// The image below one replica, if any. One of somebody else, such as Longhorn's own, may lie over any.
fn under_replica(replica: &DirEntry) -> io::Result<Option<String>> {
    let path = replica.path();
    let record: Record = match fs::read(path.join(file::RECORD)) {
        Ok(text) => serde_json::from_slice(&text)?,
        Err(e) if !is_absent(&e) => return Err(e),
        Err(e) if replica.file_type()?.is_symlink() && !fs::exists(&path)? => return Err(e),
        // It has no data yet, or none any more.
        Err(_) => match entries(&path)?.iter().map(DirEntry::file_name).find(|name| !is_without_data(name)) {
            None => return Ok(None),
            Some(other) => {
                let text = format!("it holds `{}` and no `{}`", other.display(), file::RECORD);
                return Err(io::Error::new(io::ErrorKind::InvalidData, text));
            }
        },
    };
    let is_over_one = !record.backing_image.is_empty();
    Ok(is_over_one.then(|| format!("{}-{}", record.backing_image, record.backing_image_uuid)))
}

/// Whether a file of this name is one that a replica of ours makes before it has data, and after.
fn is_without_data(name: &OsStr) -> bool {
    let record = temporary_name(Path::new(file::RECORD));
    [LOCK, file::NBD_SOCKET, file::CONTROL_SOCKET, LOG].iter().any(|ours| name == *ours) || name == record
}

fn says(entry: &DirEntry, is_of_an_image: &dyn Fn(&str, FileType) -> bool) -> bool {
    let (name, kind) = (entry.file_name(), entry.file_type());
    kind.is_ok_and(|kind| is_of_an_image(&name.to_string_lossy(), kind))
}

/// Whether a text is `<name>-<uuid>`.
fn is_key(text: &str) -> bool {
    let parts = text.rsplit_once('-');
    parts.is_some_and(|(name, uuid)| name.parse::<ImageName>().is_ok() && uuid.parse::<ImageUuid>().is_ok())
}

fn entries(directory: &Path) -> io::Result<Vec<DirEntry>> {
    match fs::read_dir(directory) {
        Err(e) if is_absent(&e) => Ok(vec![]),
        list => list?.collect(),
    }
}

/// Nothing is there; a file in the place of a replica holds none either.
fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (file, content) in files {
            let path = folder.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        folder
    }

    #[test]
    fn a_disk_says_whether_it_holds_files_of_images() {
        let holds = |file: &str| are_there(disk(&[(file, "")]).path());
        for file in ["backing-images/ubuntu-24.04-0a1b2c3d/backing", "tmp/ubuntu-24.04-0a1b2c3d.cfg.writing"] {
            assert!(holds(file), "{file}");
        }
        for file in [
            "longhorn-disk.cfg",
            "backing-images/my-own-thing/x",
            "tmp/notes.txt",
            "tmp/ubuntu-0a1b2c3d.bak",
            "replicas/r-0a1b2c3d/x",
        ] {
            assert!(!holds(file), "{file}");
        }
    }

    #[test]
    fn a_disk_says_which_images_replicas_lie_over_or_that_it_does_not_know() {
        let record = r#"{"volume":"v","replica":"v-r-1","backingImage":"ubuntu","backingImageUuid":"0a1b2c3d"}"#;
        let said = |files: &[(&str, &str)]| under_replicas(disk(files).path());
        assert_eq!(said(&[]), Some(vec![]));
        let two = [("replicas/a/replica.json", record), ("replicas/b/replica.json", record), ("replicas/c/lock", "")];
        assert_eq!(said(&two), Some(vec!["ubuntu-0a1b2c3d".to_owned()]));
        assert_eq!(said(&[("replicas/a/replica.json", r#"{"volume":"v"}"#)]), Some(vec![]));
        assert_eq!(said(&[("replicas/a/replica.json", "{")]), None);
    }

    #[test]
    fn a_replica_that_does_not_say_what_it_lies_over_may_lie_over_any_image() {
        let says = |file: &str| under_replicas(disk(&[(file, "")]).path()) == Some(vec![]);
        for file in ["volume-head.qcow2", "volume-head-000.img", "volume.meta", "volume-snap-1.img.meta", "notes/x"] {
            assert!(!says(&format!("replicas/a/{file}")), "{file}");
        }
        for file in ["lock", "replica.json.writing", "control.sock", "nbd.sock", "qemu-storage-daemon.log"] {
            assert!(says(&format!("replicas/a/{file}")), "{file}");
        }
        let folder = disk(&[("replicas/no-directory", "")]);
        fs::create_dir(folder.path().join("replicas/empty")).unwrap();
        assert_eq!(under_replicas(folder.path()), Some(vec![]));
        std::os::unix::fs::symlink("/nowhere", folder.path().join("replicas/elsewhere")).unwrap();
        assert_eq!(under_replicas(folder.path()), None);
    }
}

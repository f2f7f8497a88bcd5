//! Where the files of a disk lie: Longhorn's layout (LF 1.7) plus a chunk manifest beside each image file.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use api::ids::{DiskId, ImageName, ImageUuid, InvalidId};
use serde::Deserialize;

use crate::durable;
use crate::error::AgentError;

/// The file that says which disk a directory is.
pub const DISK_CONFIG: &str = "longhorn-disk.cfg";

/// The file of a copy.
pub(crate) const COPY: &str = "backing";

/// The files beside a copy that say what it is.
pub(crate) const DESCRIPTIONS: [&str; 2] = ["backing.cfg", "backing.chunks"];

/// One image on one disk: the name of its directory is `<name>-<uuid>`.
///
/// ```
/// use backing_image_agent::layout::ImageKey;
/// let key: ImageKey = "ubuntu-24.04-0a1b2c3d".parse().unwrap();
/// assert_eq!((key.name.as_str(), key.uuid.as_str()), ("ubuntu-24.04", "0a1b2c3d"));
/// assert!("../etc-0a1b2c3d".parse::<ImageKey>().is_err());
/// ```
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ImageKey {
    pub name: ImageName,
    pub uuid: ImageUuid,
}

impl fmt::Display for ImageKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.name, self.uuid)
    }
}

impl FromStr for ImageKey {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let (name, uuid) = text.rsplit_once('-').ok_or_else(|| InvalidId {
            what: "image directory",
            text: text.to_owned(),
            rule: "the image's name, a `-` and its uuid",
        })?;
        Ok(ImageKey { name: name.parse()?, uuid: uuid.parse()? })
    }
}

impl ImageKey {
    /// The key of a name and a uuid that came from outside.
    pub fn parse(name: &str, uuid: &str) -> Result<Self, AgentError> {
        let invalid = |e: InvalidId| AgentError::Invalid { message: e.to_string() };
        Ok(ImageKey { name: name.parse().map_err(invalid)?, uuid: uuid.parse().map_err(invalid)? })
    }
}

/// The root directory of a disk.
#[derive(Clone, Debug)]
pub struct Disk {
    root: PathBuf,
}

#[derive(Deserialize)]
struct DiskConfig {
    #[serde(rename = "diskUUID", default)]
    disk_uuid: String,
}

impl Disk {
    /// The disk below a directory; nothing is looked at yet.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Disk { root: root.into() }
    }

    /// The root directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The uuid in `longhorn-disk.cfg`. Without it the directory may be an empty mount point, where nothing must be written.
    pub fn read_uuid(&self) -> Result<DiskId, AgentError> {
        let path = self.root.join(DISK_CONFIG);
        let problem = |problem: String| AgentError::DiskConfig { path: self.root.clone(), problem };
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Err(problem(format!("`{DISK_CONFIG}` is missing; is the disk mounted, and is this its path?")));
            }
            Err(source) => return Err(AgentError::Io { doing: "read", path, source }),
        };
        let config: DiskConfig =
            serde_json::from_str(&text).map_err(|e| problem(format!("`{DISK_CONFIG}` is not valid JSON: {e}")))?;
        config.disk_uuid.parse().map_err(|e: InvalidId| problem(format!("`diskUUID` in `{DISK_CONFIG}`: {e}")))
    }

    /// Where data sources work.
    pub fn tmp_dir(&self) -> PathBuf {
        self.root.join("tmp")
    }

    /// The files that a data source makes.
    pub fn source(&self, key: &ImageKey) -> FileSet {
        let base = self.tmp_dir().join(key.to_string());
        FileSet {
            partial: with_suffix(&base, ".tmp"),
            config: with_suffix(&base, ".cfg"),
            manifest: with_suffix(&base, ".chunks"),
            unfinished: with_suffix(&base, ".resume"),
            file: base,
        }
    }

    /// Where copies lie.
    pub fn images_dir(&self) -> PathBuf {
        self.root.join("backing-images")
    }

    /// The directory of one copy.
    pub fn image_dir(&self, key: &ImageKey) -> PathBuf {
        self.images_dir().join(key.to_string())
    }

    /// The files of one copy.
    pub fn copy(&self, key: &ImageKey) -> FileSet {
        let base = self.image_dir(key).join(COPY);
        FileSet {
            partial: with_suffix(&base, ".tmp"),
            config: with_suffix(&base, ".cfg"),
            manifest: with_suffix(&base, ".chunks"),
            unfinished: with_suffix(&base, ".resume"),
            file: base,
        }
    }

    /// The images that have a directory here.
    pub fn list_images(&self) -> Result<Vec<ImageKey>, AgentError> {
        let dir = self.images_dir();
        let entries = match std::fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
            Err(source) => return Err(AgentError::Io { doing: "list", path: dir, source }),
        };
        let mut keys: Vec<ImageKey> = vec![];
        for entry in entries {
            let entry = entry.map_err(AgentError::io("list", &dir))?;
            // Others are told by `survey`.
            keys.extend(entry.file_name().to_string_lossy().parse().ok());
        }
        keys.sort();
        Ok(keys)
    }

    /// Removes the directory of an image and everything temporary of it, durably: whoever hears of it may forget the image.
    pub fn remove_image(&self, key: &ImageKey) -> Result<(), AgentError> {
        let source = self.source(key);
        source.remove()?;
        if self.tmp_dir().is_dir() {
            durable::sync_parent(&source.file)?;
        }
        durable::remove_dir(&self.image_dir(key))
    }
}

/// The names of one image file and of what belongs to it.
#[derive(Clone, Debug)]
pub struct FileSet {
    /// The whole file; exists only when it is complete.
    pub file: PathBuf,
    /// The file while it is being made.
    pub partial: PathBuf,
    /// Longhorn's description of it.
    pub config: PathBuf,
    /// The chunk manifest.
    pub manifest: PathBuf,
    /// What the partial file is a part of, so that another process can go on with it.
    pub unfinished: PathBuf,
}

impl FileSet {
    /// Removes all of them; when one cannot be removed, still the others.
    pub fn remove(&self) -> Result<(), AgentError> {
        let all = [&self.file, &self.partial, &self.config, &self.manifest, &self.unfinished];
        all.map(|path| durable::remove_file(path)).into_iter().collect()
    }
}

fn with_suffix(base: &Path, suffix: &str) -> PathBuf {
    let mut name = base.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_a_directory_that_is_no_disk_and_says_why() {
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk::new(dir.path());
        let error = disk.read_uuid().unwrap_err().to_string();
        assert!(error.contains("longhorn-disk.cfg` is missing"), "{error}");
        std::fs::write(dir.path().join(DISK_CONFIG), "{").unwrap();
        assert!(disk.read_uuid().unwrap_err().to_string().contains("not valid JSON"));
        std::fs::write(dir.path().join(DISK_CONFIG), "{}").unwrap();
        assert!(disk.read_uuid().unwrap_err().to_string().contains("diskUUID"));
        std::fs::write(dir.path().join(DISK_CONFIG), r#"{"diskName":"d","diskUUID":"u-1","state":"ready"}"#).unwrap();
        assert_eq!(disk.read_uuid().unwrap().as_str(), "u-1");
    }

    #[test]
    fn uses_longhorns_names() {
        let disk = Disk::new("/data");
        let key = ImageKey::parse("ubuntu", "0a1b2c3d").unwrap();
        assert_eq!(disk.source(&key).partial, Path::new("/data/tmp/ubuntu-0a1b2c3d.tmp"));
        assert_eq!(disk.copy(&key).file, Path::new("/data/backing-images/ubuntu-0a1b2c3d/backing"));
        assert_eq!(disk.copy(&key).config, Path::new("/data/backing-images/ubuntu-0a1b2c3d/backing.cfg"));
    }
}

//! `backing.cfg`: Longhorn's description of an image file (LF 1.7), with our `format` at the end.
//!
//! A file whose size and modification time are those in its config is taken as unchanged without being read.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::durable;
use crate::error::AgentError;

/// How the bytes of an image file are to be read. Decided once, when the first file is made, and never probed again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Raw,
    Qcow2,
}

impl Format {
    /// The name on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        }
    }

    /// The format of that name.
    pub fn from_name(name: &str) -> Option<Format> {
        match name {
            "raw" => Some(Format::Raw),
            "qcow2" => Some(Format::Qcow2),
            _ => None,
        }
    }
}

/// The content of a `backing.cfg`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct FileConfig {
    /// The path of the file (not the image's name), as Longhorn writes it.
    pub name: String,
    pub uuid: String,
    pub size: u64,
    pub virtual_size: u64,
    pub real_size: u64,
    pub expected_checksum: String,
    pub current_checksum: String,
    /// Go's text form, see [`go_time`].
    pub modification_time: String,
    /// Ours: `raw` or `qcow2`; empty in a file of Longhorn's.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub format: String,
    /// Ours: when the whole file was last read and found right, RFC 3339; empty: not since it was made.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub verified_at: String,
    /// Ours: the last damage that was found and repaired, a sentence.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub damage: String,
}

impl FileConfig {
    /// Reads a config; `None` when there is none or it is not one.
    pub fn read(path: &Path) -> Option<FileConfig> {
        FileConfig::parse(&std::fs::read(path).ok()?)
    }

    /// Reads the text of a config; `None` when it is not one.
    pub fn parse(text: &[u8]) -> Option<FileConfig> {
        serde_json::from_slice(text).ok()
    }

    /// Writes it durably, on one line.
    pub fn write(&self, path: &Path) -> Result<(), AgentError> {
        durable::write(path, &serde_json::to_vec(self).expect("strings and numbers serialize"))
    }

    /// Whether a file still is the one that was described.
    pub fn matches(&self, metadata: &Metadata) -> bool {
        self.size == metadata.len() && self.modification_time == modification_time(metadata)
    }
}

/// The modification time of a file in Go's text form.
pub fn modification_time(metadata: &Metadata) -> String {
    go_time(metadata.mtime(), metadata.mtime_nsec() as i32)
}

/// Bytes that a file takes on disk.
pub fn real_size(metadata: &Metadata) -> u64 {
    metadata.blocks() * 512
}

/// A time as Go's `Time.UTC().String()` writes it: no trailing zeros in the fraction, and no fraction when it is zero.
///
/// ```
/// use backing_image_agent::config_file::go_time;
/// assert_eq!(go_time(1_767_323_045, 123_456_789), "2026-01-02 03:04:05.123456789 +0000 UTC");
/// assert_eq!(go_time(1_767_323_045, 120_000_000), "2026-01-02 03:04:05.12 +0000 UTC");
/// assert_eq!(go_time(1_767_323_045, 0), "2026-01-02 03:04:05 +0000 UTC");
/// ```
pub fn go_time(seconds: i64, nanoseconds: i32) -> String {
    let Ok(time) = Timestamp::new(seconds, 0) else {
        // Outside of the years that anybody writes; still stable for one file, which is all that matters.
        return format!("{seconds}.{nanoseconds:09} seconds");
    };
    let mut fraction = String::new();
    if nanoseconds != 0 {
        fraction = format!(".{nanoseconds:09}");
        fraction.truncate(fraction.trim_end_matches('0').len());
    }
    format!("{}{fraction} +0000 UTC", time.strftime("%Y-%m-%d %H:%M:%S"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_longhorns_keys_in_longhorns_order() {
        let config = FileConfig {
            name: "/data/backing-images/a-01234567/backing".into(),
            uuid: "01234567".into(),
            size: 1024,
            virtual_size: 1024,
            real_size: 512,
            expected_checksum: String::new(),
            current_checksum: "c".into(),
            modification_time: go_time(0, 0),
            format: "raw".into(),
            ..Default::default()
        };
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(
            text,
            r#"{"name":"/data/backing-images/a-01234567/backing","uuid":"01234567","size":1024,"virtualSize":1024,"realSize":512,"expectedChecksum":"","currentChecksum":"c","modificationTime":"1970-01-01 00:00:00 +0000 UTC","format":"raw"}"#
        );
    }

    #[test]
    fn a_touched_file_no_longer_matches() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, "abc").unwrap();
        let metadata = path.metadata().unwrap();
        let config = FileConfig { size: 3, modification_time: modification_time(&metadata), ..Default::default() };
        assert!(config.matches(&metadata));
        assert!(!FileConfig { size: 4, ..config.clone() }.matches(&metadata));
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        file.set_modified(std::time::UNIX_EPOCH).unwrap();
        assert!(!config.matches(&path.metadata().unwrap()));
    }
}

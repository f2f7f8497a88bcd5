//! What a data source says about its file: Longhorn's JSON (LF 5.2) with `format`, `nextRetryTime` and `errorKind` of ours.

use std::collections::BTreeMap;
use std::path::Path;

use api::ErrorKind;
use api::ids::DiskId;
use api::image::CopyState;
use serde::{Deserialize, Serialize};

use super::{Config, PARAMETER_URL};
use crate::config_file::FileConfig;
use crate::download::Event;
use crate::error::AgentError;
use crate::source_url::SourceUrl;

/// The answer to `GET /v1/file`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct FileStatus {
    pub source_type: String,
    /// What may be secret in the address is left out.
    pub parameters: BTreeMap<String, String>,
    pub name: String,
    #[serde(rename = "diskUUID")]
    pub disk_uuid: String,
    pub expected_checksum: String,
    pub file_path: String,
    pub uuid: String,
    /// 0 until known.
    pub size: u64,
    pub virtual_size: u64,
    pub real_size: u64,
    pub state: CopyState,
    /// Percent; 0 while the size is unknown.
    pub progress: u32,
    pub processed_size: u64,
    pub modification_time: String,
    pub current_checksum: String,
    pub message: String,
    pub sending_reference: u32,
    /// Ours: `raw` or `qcow2`, empty until known.
    pub format: String,
    /// Ours: when the next try comes, RFC 3339; empty when none is scheduled.
    pub next_retry_time: String,
    /// Ours: bytes a second that are downloaded at most; 0: no limit.
    pub bandwidth_limit: u64,
    /// Ours: the kind of failure that `message` tells of, once the preparation has failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error_kind: Option<ErrorKind>,
    /// Stays in `message` while nothing more urgent is there.
    #[serde(skip)]
    note: String,
}

impl FileStatus {
    pub(super) fn new(config: &Config, disk: &DiskId, file: &Path) -> FileStatus {
        let mut parameters = config.parameters.clone();
        if let Some(url) = parameters.get_mut(PARAMETER_URL) {
            *url = SourceUrl::parse(url).map_or_else(|_| "<invalid>".to_owned(), |url| url.to_string());
        }
        FileStatus {
            source_type: config.source_type.as_str().to_owned(),
            parameters,
            name: config.name.to_string(),
            disk_uuid: disk.to_string(),
            expected_checksum: config.checksum.as_ref().map(ToString::to_string).unwrap_or_default(),
            file_path: file.display().to_string(),
            uuid: config.uuid.to_string(),
            state: CopyState::Pending,
            bandwidth_limit: config.bandwidth_limit,
            ..Default::default()
        }
    }

    pub(super) fn apply(&mut self, event: Event) {
        match event {
            Event::Started { length } => {
                self.size = length.unwrap_or(0);
            }
            Event::Received { bytes } => {
                self.state = CopyState::InProgress;
                self.processed_size = bytes;
                // 100 is said by `finish` only.
                self.progress = (bytes * 100).checked_div(self.size).map_or(0, |percent| percent.min(99) as u32);
                self.next_retry_time.clear();
                self.message.clone_from(&self.note);
            }
            Event::Silent { problem, until: time } | Event::Waiting { problem, next_retry: time } => {
                self.message = problem;
                self.next_retry_time = format!("{time:.0}");
            }
            Event::Resumed { bytes } => {
                self.note = format!("went on after the first {bytes} bytes, which an earlier process had received");
                self.message.clone_from(&self.note);
            }
            Event::Restarted { reason } => {
                self.processed_size = 0;
                self.progress = 0;
                self.note = format!("began again from the first byte: {reason}");
                self.message.clone_from(&self.note);
            }
        }
    }

    pub(super) fn finish(&mut self, file: &FileConfig) {
        self.state = CopyState::ReadyForTransfer;
        self.size = file.size;
        self.virtual_size = file.virtual_size;
        self.real_size = file.real_size;
        self.processed_size = file.size;
        self.progress = 100;
        self.modification_time = file.modification_time.clone();
        self.current_checksum = file.current_checksum.clone();
        self.format = file.format.clone();
        self.message.clear();
        self.next_retry_time.clear();
    }

    pub(super) fn fail(&mut self, error: &AgentError) {
        self.state = CopyState::Failed;
        self.message = error.chain();
        self.error_kind = Some(error.kind());
        self.next_retry_time.clear();
    }

    /// Whether another status tells nothing new but progress.
    pub(super) fn differs_in_progress_only(&self, other: &FileStatus) -> bool {
        let mut same = other.clone();
        same.progress = self.progress;
        same.processed_size = self.processed_size;
        *self == same
    }
}

//! Where role processes run: one trait, two implementations (pods, or local processes).
//!
//! A workload is one process of a role (a disk's manager, an image's data source) with an address of its own and fixed ports.
//! It is never restarted by itself: who wants it alive observes and starts it again, with a back-off of its own.

mod changes;
pub mod local;
pub mod pods;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use api::ids::NodeName;
use api::{ErrorKind, Owner, Secrets};
use async_trait::async_trait;
use futures::stream::BoxStream;

/// What shall run.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct WorkloadSpec {
    /// Unique within the cluster, a DNS label: the pod's name.
    pub name: String,
    pub node: NodeName,
    pub labels: BTreeMap<String, String>,
    /// Arguments of our binary: the role's subcommand and its flags. `$(POD_IP)` is replaced by the address of the workload.
    pub args: Vec<String>,
    /// Beside `POD_IP`, which is always set. As arguments, these are for everybody to read who may see a pod.
    pub env: BTreeMap<String, String>,
    /// The directory of its disk; the only host directory that it sees.
    pub disk_path: PathBuf,
    /// TCP ports on its address that accept connections once it is ready.
    pub ready_ports: Vec<u16>,
    /// The object with which it goes; local processes go with their starter's word only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<Owner>,
    /// Environment that nobody sees who sees the workload: a Secret of its own for a pod. What was started does not tell it any more.
    #[serde(skip)]
    pub secrets: Secrets,
    /// Another one with other secrets; with the name it names the Secret, so a DNS label's characters.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub revision: String,
}

impl WorkloadSpec {
    /// Whether what was started as `self` is what `wish` asks for. The revision speaks for the secrets.
    fn is_same(&self, wish: &WorkloadSpec) -> bool {
        WorkloadSpec { secrets: wish.secrets.clone(), ..self.clone() } == *wish
    }
}

/// How a workload does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WorkloadState {
    /// Started, not ready yet; the sentence says what it waits for, where that is known.
    Starting { message: String },
    /// Its ports accept connections.
    Running,
    /// It ended, however; the sentence says how, with the last lines of its log.
    Failed { message: String },
    /// Its node does not answer.
    Unknown { message: String },
}

/// One observed workload.
#[derive(Clone, Debug)]
pub struct Workload {
    pub spec: WorkloadSpec,
    pub state: WorkloadState,
    pub ip: Option<IpAddr>,
    /// It would be started otherwise now: it is of another version of our program.
    pub is_outdated: bool,
}

/// A failed call.
#[derive(Debug, thiserror::Error)]
pub enum WorkloadError {
    #[error("workload `{name}` runs with another specification")]
    Different { name: String },
    #[error("workload `{name}` is invalid: {reason}")]
    Invalid { name: String, reason: String },
    #[error("the Kubernetes API does not allow to {action} workload `{name}`: {reason}")]
    Forbidden { action: &'static str, name: String, reason: String },
    #[error("workload `{name}` has not ended after {seconds} s: {reason}")]
    Stays { name: String, seconds: u64, reason: String },
    #[error("cannot start workload `{name}`")]
    Start { name: String, source: std::io::Error },
    #[error("cannot {action}")]
    Io { action: String, source: std::io::Error },
    #[error("the workload service does not answer")]
    Unavailable { source: Box<dyn std::error::Error + Send + Sync> },
}

impl WorkloadError {
    /// What kind of failure this is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            WorkloadError::Different { .. } => ErrorKind::Incompatible,
            WorkloadError::Invalid { .. } => ErrorKind::Invalid,
            WorkloadError::Forbidden { .. } | WorkloadError::Stays { .. } => ErrorKind::NotReady,
            WorkloadError::Start { .. } | WorkloadError::Io { .. } => ErrorKind::Internal,
            WorkloadError::Unavailable { .. } => ErrorKind::Unavailable,
        }
    }
}

/// A place where role processes run.
///
/// A call whose future is dropped may go on in the background; all calls can be repeated.
#[async_trait]
pub trait Workloads: Send + Sync + 'static {
    /// Starts a workload unless one of that name exists (in whatever state). Same name with another spec: `Incompatible`.
    async fn ensure(&self, spec: &WorkloadSpec) -> Result<Workload, WorkloadError>;

    /// The workload of that name, or `None`.
    async fn get(&self, name: &str) -> Result<Option<Workload>, WorkloadError>;

    /// All workloads.
    async fn list(&self) -> Result<Vec<Workload>, WorkloadError>;

    /// Ends a workload (SIGTERM, then SIGKILL after a grace time) and forgets it; returns when it is gone. OK when there is none.
    async fn remove(&self, name: &str) -> Result<(), WorkloadError>;

    /// The name of each workload whose state changed, from now on.
    fn changes(&self) -> BoxStream<'static, String>;
}

/// The name becomes the name of a directory, or of a pod.
fn check_spec(spec: &WorkloadSpec) -> Result<(), WorkloadError> {
    let legal = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'_' | b'.');
    let name = &spec.name;
    let first = name.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
    if name.len() <= 253 && first && name.bytes().all(legal) {
        return Ok(());
    }
    let reason = "its name must be 1 to 253 characters of a-z 0-9 - _ . that begin with a letter or digit".to_owned();
    Err(WorkloadError::Invalid { name: name.clone(), reason })
}

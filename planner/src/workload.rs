//! Role processes as decisions see them.

use std::collections::BTreeMap;
use std::time::Duration;

use api::{Owner, Secrets};

/// How long a process may run without an answer until another one may take its place: longer than one that is busy, or whose network is
/// set up anew, takes.
pub const SILENCE_LIMIT: Duration = Duration::from_secs(120);

/// How an argument begins that says what limit of bandwidth a process begins with. It is told of another one while it works.
pub const BANDWIDTH_LIMIT_FLAG: &str = "--bandwidth-limit=";

/// What shall run; the adapter turns it into a specification of the `workloads` room.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wish {
    pub name: String,
    pub node: String,
    pub labels: BTreeMap<String, String>,
    pub args: Vec<String>,
    pub disk_path: String,
    pub ready_ports: Vec<u16>,
    /// With which it goes.
    pub owner: Option<Owner>,
    /// Environment that must not be seen. What was started does not tell it any more.
    pub secrets: Secrets,
    /// Another one with other secrets.
    pub revision: String,
}

impl Wish {
    /// Whether the other one does the same, whoever it belongs to. The revision speaks for the secrets.
    pub fn is_same_work(&self, other: &Wish) -> bool {
        let work = |wish: &Wish| {
            let mut work = Wish { owner: None, secrets: Secrets::default(), ..wish.clone() };
            work.args.retain(|arg| !arg.starts_with(BANDWIDTH_LIMIT_FLAG));
            work
        };
        work(self) == work(other)
    }
}

/// How it does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// The sentence says what it waits for, where that is known.
    Starting(String),
    Running,
    /// It ended; the sentence says how.
    Failed(String),
    /// Its node does not answer.
    Unknown(String),
}

impl State {
    /// What to say of a process that is not ready, `what` being its name for users.
    pub fn starting(&self, what: &str) -> String {
        match self {
            State::Starting(waits_for) if !waits_for.is_empty() => format!("{what} is starting: {waits_for}"),
            _ => format!("{what} is starting"),
        }
    }
}

/// A workload that exists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// What it was started as.
    pub wish: Wish,
    pub state: State,
    /// Empty until it has one.
    pub ip: String,
    /// It would be started otherwise now: it is of another version of this program.
    pub is_outdated: bool,
}

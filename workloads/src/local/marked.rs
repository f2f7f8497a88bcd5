//! Processes found by the marker in their environment: what workloads started themselves and left behind.

use std::collections::BTreeMap;
use std::fs;
use std::io;

use runtime::process::ProcessIdentity;
use rustix::process::Signal;

use super::blocking;
use super::record::{MARKER, Records};

/// Our marked processes, by the token of their start.
#[derive(Debug, Default)]
pub struct Marked(BTreeMap<String, Vec<ProcessIdentity>>);

impl Marked {
    /// Looks at every process of the machine that we may look at.
    pub fn scan(records: &Records) -> io::Result<Marked> {
        let (_, prefix) = records.marker("");
        let prefix = format!("{MARKER}={prefix}");
        let mut found = Marked::default();
        for entry in fs::read_dir("/proc")? {
            let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
            // Processes come and go, and some belong to others.
            let Ok(environment) = fs::read(format!("/proc/{pid}/environ")) else { continue };
            let token = environment
                .split(|byte| *byte == 0)
                .find_map(|variable| std::str::from_utf8(variable).ok()?.strip_prefix(&prefix));
            let Some(token) = token.filter(|token| uuid::Uuid::try_parse(token).is_ok()) else { continue };
            let Ok(process) = ProcessIdentity::of(pid) else { continue };
            found.0.entry(token.to_owned()).or_default().push(process);
        }
        Ok(found)
    }

    /// All tokens.
    pub fn tokens(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }
}

/// Kills everything that was started with a token and what came from it, also what it starts meanwhile; returns when all of it is gone.
pub async fn end(records: &Records, token: &str) -> io::Result<()> {
    loop {
        let records = records.clone();
        let marked = blocking(move || Marked::scan(&records)).await?;
        let found: Vec<_> = marked.0.get(token).into_iter().flatten().filter(|process| process.is_alive()).collect();
        if found.is_empty() {
            return Ok(());
        }
        for process in &found {
            process.signal(Signal::KILL)?;
        }
        for process in found {
            process.kill().await?;
        }
    }
}

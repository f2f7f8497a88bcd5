//! The control protocol: generations are raised here, one request at a time.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use api::error::sentence;
use dataplane::DataplaneError;
use dataplane::storage_daemon::{StorageDaemon, allocated_bytes};
use proto::replica::{Record, Reply, Request};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::directory::write_record;

/// The longest request names a few hundred members.
const MAX_LINE_BYTES: u64 = 64 << 10;
/// After an error of accept (out of descriptors), so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A replica that is being served. Cheap to clone.
#[derive(Clone)]
pub(super) struct Replica {
    directory: Arc<PathBuf>,
    daemon: Arc<StorageDaemon>,
    state: Arc<Mutex<State>>,
}

struct State {
    record: Record,
    /// The name of the export that serves now.
    export: Option<String>,
}

/// Why a request changed nothing.
type Refusal = String;

impl Replica {
    pub fn new(directory: PathBuf, record: Record, daemon: StorageDaemon) -> Replica {
        Replica {
            directory: Arc::new(directory),
            daemon: Arc::new(daemon),
            state: Arc::new(Mutex::new(State { record, export: None })),
        }
    }

    pub async fn daemon_ended(&self) -> String {
        self.daemon.ended().await
    }

    pub async fn quit(&self) -> Result<(), DataplaneError> {
        let mut state = self.state.lock().await;
        state.export = None;
        self.daemon.quit().await
    }

    /// Answers one request. Runs to its end once begun, also when the asker goes away.
    pub async fn answer(&self, request: Request) -> Reply {
        let (replica, name) = (self.clone(), format!("{request:?}"));
        let answered = tokio::spawn(async move {
            let mut state = replica.state.lock().await;
            match request {
                Request::Status => Ok(replica.status(&state)),
                Request::Open { generation, members } => replica.open(&mut state, generation, members).await,
                Request::Fence { generation, members, export } => {
                    replica.fence(&mut state, generation, members, &export)
                }
                Request::Close { generation } => replica.close(&mut state, generation).await,
            }
        })
        .await;
        match answered {
            Ok(Ok(reply)) => reply,
            Ok(Err(message)) => {
                tracing::warn!(request = %name, %message, "request refused");
                Reply::Refused { message }
            }
            Err(error) => Reply::Refused { message: format!("the request failed by a bug: {error}") },
        }
    }

    fn status(&self, state: &State) -> Reply {
        Reply::Status {
            record: state.record.clone(),
            export: state.export.clone(),
            actual_size_bytes: allocated_bytes(&self.directory).unwrap_or(0),
        }
    }

    async fn open(&self, state: &mut State, generation: u64, members: Vec<String>) -> Result<Reply, Refusal> {
        check_raise(&state.record, generation, &members)?;
        // Invariant 4: the old export is ended, its requests included, before a new writer is let in.
        self.end_export(state).await?;
        self.raise(state, generation, members)?;
        let export = format!("{}-{generation}", state.record.volume);
        self.daemon.add_export(&export).await.map_err(|e| sentence(&e))?;
        state.export = Some(export.clone());
        tracing::info!(replica = %state.record.replica, generation, "export opened");
        Ok(Reply::Opened { export })
    }

    fn fence(&self, state: &mut State, generation: u64, members: Vec<String>, export: &str) -> Result<Reply, Refusal> {
        check_raise(&state.record, generation, &members)?;
        let replica = &state.record.replica;
        match &state.export {
            // It missed writes since its export ended, so it must not count as a member.
            None => return Err(format!("replica `{replica}` has no open export and cannot stay in sync")),
            // An engine that lost this replica to another one knows nothing of the writes since.
            Some(open) if open != export => {
                return Err(format!(
                    "replica `{replica}` serves export `{open}` now, for another engine than that of `{export}`"
                ));
            }
            Some(_) => {}
        }
        self.raise(state, generation, members)?;
        tracing::info!(replica = %state.record.replica, generation, "generation raised by a fence");
        Ok(Reply::Done)
    }

    async fn close(&self, state: &mut State, generation: u64) -> Result<Reply, Refusal> {
        let record = &state.record;
        if generation != record.generation {
            return Err(format!(
                "replica `{}` is at generation {} and cannot end generation {generation}",
                record.replica, record.generation
            ));
        }
        // Repeated after a lost answer.
        if record.clean && state.export.is_none() {
            return Ok(Reply::Done);
        }
        if state.export.is_none() {
            return Err(format!(
                "replica `{}` was restarted within generation {generation} and may miss writes; it did not end cleanly",
                record.replica
            ));
        }
        self.end_export(state).await?;
        self.daemon.flush().await.map_err(|e| sentence(&e))?;
        let record = Record { clean: true, ..state.record.clone() };
        write_record(&self.directory, &record).map_err(|e| sentence(&e))?;
        state.record = record;
        tracing::info!(replica = %state.record.replica, generation, "generation ended cleanly");
        Ok(Reply::Done)
    }

    async fn end_export(&self, state: &mut State) -> Result<(), Refusal> {
        if let Some(export) = &state.export {
            self.daemon.delete_export(export).await.map_err(|e| sentence(&e))?;
            state.export = None;
        }
        Ok(())
    }

    fn raise(&self, state: &mut State, generation: u64, members: Vec<String>) -> Result<(), Refusal> {
        let record = Record { generation, members, clean: false, ..state.record.clone() };
        // Invariant 5 rests on this: durable before the answer.
        write_record(&self.directory, &record).map_err(|e| sentence(&e))?;
        state.record = record;
        Ok(())
    }
}

/// A generation only rises, and a replica takes part only in one that names it.
fn check_raise(record: &Record, generation: u64, members: &[String]) -> Result<(), Refusal> {
    if generation <= record.generation {
        return Err(format!(
            "replica `{}` has recorded generation {}; generation {generation} is not above it",
            record.replica, record.generation
        ));
    }
    if !members.contains(&record.replica) {
        return Err(format!("replica `{}` is not a member of generation {generation}", record.replica));
    }
    Ok(())
}

pub(super) async fn serve_tcp(
    listener: tokio::net::TcpListener,
    replica: Replica,
    stop: CancellationToken,
    tasks: TaskTracker,
) {
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    let _ = stream.set_nodelay(true);
                    tasks.spawn(converse(stream, replica.clone(), stop.clone()));
                }
                Err(error) => pause(&error).await,
            },
            () = stop.cancelled() => return,
        }
    }
}

pub(super) async fn serve_unix(
    listener: tokio::net::UnixListener,
    replica: Replica,
    stop: CancellationToken,
    tasks: TaskTracker,
) {
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => drop(tasks.spawn(converse(stream, replica.clone(), stop.clone()))),
                Err(error) => pause(&error).await,
            },
            () = stop.cancelled() => return,
        }
    }
}

async fn pause(error: &io::Error) {
    tracing::warn!(%error, "control connection not accepted");
    tokio::time::sleep(ACCEPT_PAUSE).await;
}

async fn converse<S: AsyncRead + AsyncWrite>(stream: S, replica: Replica, stop: CancellationToken) {
    let (reader, mut writer) = tokio::io::split(stream);
    let mut reader = BufReader::new(reader);
    loop {
        let mut line = vec![];
        let mut limited = (&mut reader).take(MAX_LINE_BYTES);
        let read = tokio::select! {
            read = limited.read_until(b'\n', &mut line) => read,
            () = stop.cancelled() => return,
        };
        if !matches!(read, Ok(n) if n > 0) {
            return;
        }
        let whole = line.ends_with(b"\n");
        let reply = match serde_json::from_slice::<Request>(&line) {
            Ok(request) => replica.answer(request).await,
            Err(error) => Reply::Refused { message: format!("the request is not understood: {error}") },
        };
        let mut text = serde_json::to_vec(&reply).expect("a reply is plain data");
        text.push(b'\n');
        if writer.write_all(&text).await.is_err() || writer.flush().await.is_err() || !whole {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_generation_only_rises_and_names_its_members() {
        let record = Record { replica: "r1".into(), generation: 5, ..Default::default() };
        let members = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>();
        assert!(check_raise(&record, 6, &members(&["r1", "r2"])).is_ok());
        assert!(check_raise(&record, 5, &members(&["r1"])).unwrap_err().contains("generation 5 is not above"));
        assert!(check_raise(&record, 4, &members(&["r1"])).is_err());
        assert!(check_raise(&record, 6, &members(&["r2"])).unwrap_err().contains("not a member"));
    }
}

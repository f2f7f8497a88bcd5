//! The control protocol: generations are raised here, one request at a time.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use api::error::sentence;
use dataplane::DataplaneError;
use dataplane::storage_daemon::{StorageDaemon, allocated_bytes};
use proto::generation::{Step, plan};
use proto::replica::{Record, Reply, Request};
use runtime::transport::Listener;
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
            replica.carry_out(&mut state, &request).await.map(|()| match request {
                Request::Status => replica.status(&state),
                Request::Open { .. } => Reply::Opened { export: state.export.clone().unwrap_or_default() },
                Request::Fence { .. } | Request::Close { .. } => Reply::Done,
            })
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

    /// Does what the rules say, until a step fails.
    async fn carry_out(&self, state: &mut State, request: &Request) -> Result<(), Refusal> {
        for step in plan(&state.record, state.export.as_deref(), request)? {
            match step {
                Step::EndExport => {
                    let export = state.export.clone().unwrap_or_default();
                    self.daemon.delete_export(&export).await.map_err(|e| sentence(&e))?;
                    state.export = None;
                }
                Step::Flush => self.daemon.flush().await.map_err(|e| sentence(&e))?,
                Step::Record(record) => {
                    write_record(&self.directory, &record).map_err(|e| sentence(&e))?;
                    let Record { replica, generation, clean, .. } = &record;
                    tracing::info!(replica, generation, clean, "generation recorded");
                    state.record = record;
                }
                Step::AddExport(export) => {
                    self.daemon.add_export(&export).await.map_err(|e| sentence(&e))?;
                    tracing::info!(replica = %state.record.replica, export, "export opened");
                    state.export = Some(export);
                }
            }
        }
        Ok(())
    }
}

pub(super) async fn serve_tcp(mut listener: Listener, replica: Replica, stop: CancellationToken, tasks: TaskTracker) {
    loop {
        tokio::select! {
            (stream, _) = listener.next() => {
                let _ = stream.set_nodelay();
                tasks.spawn(converse(stream, replica.clone(), stop.clone()));
            }
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
        let request = serde_json::from_slice::<Request>(&line);
        let is_rare = matches!(request, Ok(Request::Open { .. }));
        let reply = match request {
            Ok(request) => replica.answer(request).await,
            Err(error) => Reply::Refused { message: format!("the request is not understood: {error}") },
        };
        let mut text = serde_json::to_vec(&reply).expect("a reply is plain data");
        text.push(b'\n');
        let written = writer.write_all(&text).await.is_ok() && writer.flush().await.is_ok();
        if is_rare {
            runtime::memory::release_startup_code();
        }
        if !written || !whole {
            return;
        }
    }
}

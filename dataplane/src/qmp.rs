//! QEMU's control protocol: one JSON object a line, replies matched by id, events apart.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use runtime::lines::read_line;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::sync::{broadcast, oneshot};
use tokio_util::task::AbortOnDropHandle;

use crate::{DataplaneError, limits};

/// Something that happened in QEMU.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Event {
    pub event: String,
    #[serde(default)]
    pub data: Value,
}

#[derive(Deserialize)]
struct QmpError {
    desc: String,
}

#[derive(Deserialize)]
struct Line {
    #[serde(rename = "QMP")]
    greeting: Option<Value>,
    id: Option<u64>,
    r#return: Option<Value>,
    error: Option<QmpError>,
    event: Option<String>,
    #[serde(default)]
    data: Value,
}

type Answer = Result<Value, String>;

#[derive(Default)]
struct Waiting {
    next_id: u64,
    /// Dropped senders tell the callers that the connection has ended.
    by_id: HashMap<u64, oneshot::Sender<Answer>>,
    ended: bool,
}

/// A connection to a QMP monitor. Commands may be sent from several tasks; they are executed one after the other.
pub struct Qmp {
    writer: tokio::sync::Mutex<Box<dyn AsyncWrite + Send + Unpin>>,
    waiting: Arc<Mutex<Waiting>>,
    events: broadcast::Sender<Event>,
    _reader: AbortOnDropHandle<()>,
}

impl Qmp {
    /// Waits for the greeting and negotiates.
    pub async fn connect<S>(stream: S, limit: Duration) -> Result<Qmp, DataplaneError>
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let (reader, writer) = tokio::io::split(stream);
        let mut reader = BufReader::new(reader);
        let mut greeting = vec![];
        match tokio::time::timeout(limit, read_line(&mut reader, &mut greeting, limits::QMP_LINE_BYTES)).await {
            Err(_) => return Err(DataplaneError::Silent { command: "greeting".into(), seconds: limit.as_secs() }),
            Ok(Err(source)) => return Err(DataplaneError::io("read the greeting of qemu-storage-daemon", source)),
            Ok(Ok(false)) => return Err(DataplaneError::Ended { detail: String::new() }),
            Ok(Ok(true)) => {}
        }
        if !serde_json::from_slice::<Line>(&greeting).is_ok_and(|l| l.greeting.is_some()) {
            let said = String::from_utf8_lossy(&greeting).trim().to_owned();
            let source = io::Error::new(io::ErrorKind::InvalidData, said);
            return Err(DataplaneError::io("understand the greeting of qemu-storage-daemon", source));
        }
        let waiting = Arc::new(Mutex::new(Waiting::default()));
        let (events, _) = broadcast::channel(limits::QMP_EVENT_QUEUE);
        let task = tokio::spawn(read_lines(reader, waiting.clone(), events.clone()));
        let writer: Box<dyn AsyncWrite + Send + Unpin> = Box::new(writer);
        let qmp =
            Qmp { writer: tokio::sync::Mutex::new(writer), waiting, events, _reader: AbortOnDropHandle::new(task) };
        qmp.execute("qmp_capabilities", json!({})).await?;
        Ok(qmp)
    }

    /// Events from now on.
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    /// Executes a command and returns what it returns.
    pub async fn execute(&self, command: &str, arguments: Value) -> Result<Value, DataplaneError> {
        let (sender, answer) = oneshot::channel();
        let id = {
            let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            if waiting.ended {
                return Err(DataplaneError::Ended { detail: String::new() });
            }
            waiting.next_id += 1;
            let id = waiting.next_id;
            waiting.by_id.insert(id, sender);
            id
        };
        let mut line = json!({ "execute": command, "arguments": arguments, "id": id }).to_string();
        tracing::trace!(%line, "qmp");
        line.push('\n');
        let exchange = async {
            let mut writer = self.writer.lock().await;
            if writer.write_all(line.as_bytes()).await.is_err() || writer.flush().await.is_err() {
                return Err(DataplaneError::Ended { detail: String::new() });
            }
            drop(writer);
            match answer.await {
                Ok(Ok(value)) => Ok(value),
                Ok(Err(message)) => Err(DataplaneError::Refused { command: command.to_owned(), message }),
                Err(_) => Err(DataplaneError::Ended { detail: String::new() }),
            }
        };
        let limit = limits::QMP_TIMEOUT;
        tokio::time::timeout(limit, exchange)
            .await
            .unwrap_or_else(|_| Err(DataplaneError::Silent { command: command.to_owned(), seconds: limit.as_secs() }))
    }

    /// Executes a command, then waits until `is_it` accepts an event. Events that came before the reply count.
    pub async fn execute_until(
        &self,
        command: &str,
        arguments: Value,
        is_it: impl Fn(&Event) -> bool,
    ) -> Result<Event, DataplaneError> {
        let mut events = self.events();
        self.execute(command, arguments).await?;
        let wait = async {
            loop {
                match events.recv().await {
                    Ok(event) if is_it(&event) => return Ok(event),
                    Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => {
                        return Err(DataplaneError::Ended { detail: String::new() });
                    }
                }
                if self.waiting.lock().unwrap_or_else(PoisonError::into_inner).ended {
                    return Err(DataplaneError::Ended { detail: String::new() });
                }
            }
        };
        let limit = limits::QMP_TIMEOUT;
        tokio::time::timeout(limit, wait)
            .await
            .unwrap_or_else(|_| Err(DataplaneError::Silent { command: command.to_owned(), seconds: limit.as_secs() }))
    }
}

/// Name of the event that we make ourselves when the connection ends, so that nobody waits for one that never comes.
const ENDED: &str = "X_CONNECTION_ENDED";

async fn read_lines<R: AsyncRead + Unpin>(
    mut reader: BufReader<R>,
    waiting: Arc<Mutex<Waiting>>,
    events: broadcast::Sender<Event>,
) {
    let mut text = vec![];
    loop {
        text.clear();
        match read_line(&mut reader, &mut text, limits::QMP_LINE_BYTES).await {
            Ok(true) => {}
            Ok(false) => break,
            Err(error) => {
                tracing::warn!(%error, "qmp connection given up");
                break;
            }
        }
        let line: Line = match serde_json::from_slice(&text) {
            Ok(line) => line,
            Err(error) => {
                tracing::warn!(%error, line = %String::from_utf8_lossy(&text).trim(), "qmp line not understood");
                continue;
            }
        };
        if let Some(event) = line.event {
            // Nobody listens: fine.
            let _ = events.send(Event { event, data: line.data });
            continue;
        }
        let answer = match line.error {
            Some(error) => Err(error.desc),
            None => Ok(line.r#return.unwrap_or(Value::Null)),
        };
        let sender = line.id.and_then(|id| waiting.lock().unwrap_or_else(PoisonError::into_inner).by_id.remove(&id));
        if let Some(sender) = sender {
            let _ = sender.send(answer);
        }
    }
    {
        let mut waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.ended = true;
        waiting.by_id.clear();
    }
    let _ = events.send(Event { event: ENDED.into(), data: Value::Null });
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncBufReadExt, DuplexStream};

    use super::*;

    const GREETING: &[u8] = b"{\"QMP\":{}}\n";
    const LIMIT: Duration = Duration::from_secs(5);
    const SILENCE: &str = "";

    /// A daemon that says these bytes and then nothing more.
    async fn connect_to(bytes: &[u8]) -> (Result<Qmp, DataplaneError>, DuplexStream) {
        let (ours, mut theirs) = tokio::io::duplex(1 << 16);
        theirs.write_all(bytes).await.unwrap();
        (Qmp::connect(ours, LIMIT).await, theirs)
    }

    /// A daemon that says these lines when so many commands have come, and ends then. At `SILENCE` it stays and says nothing more.
    async fn daemon(commands: usize, lines: &'static [&'static str]) -> (Qmp, tokio::task::JoinHandle<()>) {
        let (ours, theirs) = tokio::io::duplex(4096);
        let server = tokio::spawn(async move {
            let (reader, mut writer) = tokio::io::split(theirs);
            let (mut reader, mut text) = (BufReader::new(reader), String::new());
            writer.write_all(GREETING).await.unwrap();
            reader.read_line(&mut text).await.unwrap();
            writer.write_all(b"{\"return\":{},\"id\":1}\n").await.unwrap();
            for _ in 0..commands {
                reader.read_line(&mut text).await.unwrap();
            }
            for line in lines {
                if *line == SILENCE {
                    std::future::pending().await
                }
                writer.write_all(format!("{line}\n").as_bytes()).await.unwrap();
            }
        });
        (Qmp::connect(ours, LIMIT).await.unwrap(), server)
    }

    async fn fake(lines: &'static [&'static str]) -> (Qmp, tokio::task::JoinHandle<()>) {
        daemon(1, lines).await
    }

    #[tokio::test]
    async fn an_event_before_the_reply_is_not_missed() {
        let (qmp, _server) = fake(&[r#"{"event":"DONE","data":{"id":"e"}}"#, r#"{"return":{},"id":2}"#]).await;
        let event = qmp.execute_until("x", json!({}), |e| e.event == "DONE").await.unwrap();
        assert_eq!(event.data, json!({ "id": "e" }));
    }

    #[tokio::test]
    async fn a_refusal_carries_qemus_sentence() {
        let (qmp, _server) = fake(&[r#"{"error":{"class":"GenericError","desc":"no such node"},"id":2}"#]).await;
        let error = qmp.execute("blockdev-del", json!({})).await.unwrap_err();
        assert_eq!(error.to_string(), "qemu-storage-daemon refused `blockdev-del`: no such node");
    }

    #[tokio::test]
    async fn the_end_of_the_connection_ends_every_wait() {
        let (qmp, server) = fake(&[r#"{"return":{},"id":2}"#]).await;
        let error = qmp.execute_until("x", json!({}), |_| false).await.unwrap_err();
        assert!(matches!(error, DataplaneError::Ended { .. }), "{error}");
        server.await.unwrap();
        assert!(matches!(qmp.execute("y", json!({})).await, Err(DataplaneError::Ended { .. })));
    }

    #[tokio::test(start_paused = true)]
    async fn a_daemon_that_does_not_greet_is_none() {
        let started = tokio::time::Instant::now();
        let (silent, _open) = connect_to(b"{\"QMP\":").await;
        let silent = silent.err().unwrap().to_string();
        assert!(silent.contains("did not answer `greeting` within 5 s"), "{silent}");
        assert!(started.elapsed() < 2 * LIMIT, "given up after {:?}", started.elapsed());
        let (other, _open) = connect_to(b"{\"return\":{},\"id\":1}\n{\"return\":{},\"id\":1}\n").await;
        let other = other.err().unwrap().to_string();
        assert!(other.contains("understand the greeting"), "{other}");
        let (ours, theirs) = tokio::io::duplex(64);
        drop(theirs);
        assert!(matches!(Qmp::connect(ours, LIMIT).await, Err(DataplaneError::Ended { .. })));
        // The negotiation is part of it.
        let (mute, _open) = connect_to(GREETING).await;
        let mute = mute.err().unwrap().to_string();
        assert!(mute.contains("did not answer `qmp_capabilities`"), "{mute}");
    }

    #[tokio::test]
    async fn answers_out_of_order_reach_those_who_asked() {
        let lines = &[
            r#"{"return":"nobody asked","id":77}"#,
            r#"{"return":"second","id":3}"#,
            r#"{"error":{"class":"GenericError","desc":"no"},"id":2}"#,
        ];
        let (qmp, _server) = daemon(2, lines).await;
        let (first, second) = tokio::join!(qmp.execute("one", json!({})), qmp.execute("two", json!({})));
        assert!(matches!(first, Err(DataplaneError::Refused { command, .. }) if command == "one"));
        assert_eq!(second.unwrap(), json!("second"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_daemon_that_does_not_answer_is_not_waited_for_without_end() {
        let started = tokio::time::Instant::now();
        let (qmp, _server) = fake(&[SILENCE]).await;
        let silent = qmp.execute("x", json!({})).await.unwrap_err();
        assert!(matches!(&silent, DataplaneError::Silent { command, .. } if command == "x"), "{silent}");
        let (qmp, _server) = fake(&[r#"{"return":{},"id":2}"#, r#"{"event":"OTHER"}"#, SILENCE]).await;
        let silent = qmp.execute_until("y", json!({}), |e| e.event == "DONE").await.unwrap_err();
        assert!(matches!(&silent, DataplaneError::Silent { command, .. } if command == "y"), "{silent}");
        assert!(started.elapsed() < 3 * limits::QMP_TIMEOUT, "given up after {:?}", started.elapsed());
    }

    #[tokio::test]
    async fn what_is_not_understood_is_passed_over() {
        let lines = &["nonsense", "[]", r#"{"return":{},"id":"2"}"#, r#"{"return":1,"id":2}"#];
        let (qmp, _server) = fake(lines).await;
        assert_eq!(qmp.execute("x", json!({})).await.unwrap(), json!(1));
    }

    #[tokio::test(start_paused = true)]
    async fn a_line_without_end_ends_the_connection() {
        let (ours, theirs) = tokio::io::duplex(1 << 16);
        let sent = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let so_far = sent.clone();
        let server = tokio::spawn(async move {
            let (_reader, mut writer) = tokio::io::split(theirs);
            writer.write_all(GREETING).await.unwrap();
            writer.write_all(b"{\"return\":{},\"id\":1}\n").await.unwrap();
            while so_far.fetch_add(4096, std::sync::atomic::Ordering::SeqCst) < 64 << 20 {
                writer.write_all(&[b'x'; 4096]).await.unwrap();
            }
        });
        let started = tokio::time::Instant::now();
        let qmp = Qmp::connect(ours, LIMIT).await.unwrap();
        for command in ["x", "y"] {
            let ended = qmp.execute(command, json!({})).await.unwrap_err();
            assert!(matches!(ended, DataplaneError::Ended { .. }), "{ended}");
        }
        assert_eq!(started.elapsed(), Duration::ZERO, "nobody waits for what is not read any more");
        assert!(sent.load(std::sync::atomic::Ordering::SeqCst) < 2 * limits::QMP_LINE_BYTES);
        server.abort();
    }
}

//! A file from an HTTP server, in one pass, through every interruption.
//!
//! Only GET is needed. A broken transfer goes on where it stopped when the server supports ranges and proves by a validator
//! (ETag or Last-Modified in `If-Range`) that the file is the same; else it begins again and says so. So does the next process
//! after a kill, with what [`crate::unfinished`] says. There is no limit in time, only one for silence. A transfer counts as whole when the server's length was reached, or its framing said so, or
//! the expected checksum matches.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use api::ErrorKind;
use api::ids::Sha512Digest;
use api::source_address::AllowedSources;
use jiff::Timestamp;
use reqwest::header::{ACCEPT_ENCODING, CONTENT_ENCODING, HeaderValue, IF_RANGE, RANGE};
use reqwest::{Client, StatusCode};
use runtime::backoff::Backoff;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::bandwidth::Limit;
use crate::error::{AgentError, chain};
use crate::http_client;
use crate::ingest::{Ingest, Ingested};
use crate::layout::FileSet;
use crate::limits;
use crate::source_guard;
use crate::source_url::SourceUrl;
use crate::unfinished::{self, Earlier, Keeper, Unfinished};

mod headers;

pub use headers::parse_content_range;
use headers::{continues, is_framed, length, validator};

/// What to download.
#[derive(Clone, Debug)]
pub struct Download {
    pub url: SourceUrl,
    pub expected: Option<Sha512Digest>,
    pub pad_to_sector: bool,
    /// From which special addresses it may come.
    pub allowed: AllowedSources,
    /// How fast it may come.
    pub limit: Arc<Limit>,
}

/// How patient to be. The default is for production.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// How long the source may stay silent.
    pub idle_timeout: Duration,
    /// After how much of that it is told.
    pub told_after: Duration,
    /// Pauses between tries.
    pub backoff: Backoff,
    /// Tries in a row that bring no byte.
    pub tries_without_progress: u32,
    /// How often what is here is made durable.
    pub checkpoint_interval: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Patience {
            idle_timeout: limits::IDLE_TIMEOUT,
            told_after: limits::SILENCE_TOLD_AFTER,
            backoff: Backoff { initial: limits::RETRY_INITIAL, max: limits::RETRY_MAX },
            tries_without_progress: limits::MAX_TRIES_WITHOUT_PROGRESS,
            checkpoint_interval: limits::CHECKPOINT_INTERVAL,
        }
    }
}

/// What happens during a download.
#[derive(Clone, Debug)]
pub enum Event {
    /// The server answered; the length when it said one.
    Started { length: Option<u64> },
    /// So many bytes are here.
    Received { bytes: u64 },
    /// The server has said nothing for a while; it is left at that time.
    Silent { problem: String, until: Timestamp },
    /// It broke; the next try comes at that time.
    Waiting { problem: String, next_retry: Timestamp },
    /// An earlier process had received so many bytes, which are kept.
    Resumed { bytes: u64 },
    /// What was here is of no use any more.
    Restarted { reason: &'static str },
}

/// One try's end that is not the end of all.
enum Broken {
    /// Worth another try.
    Retry(String),
    /// For good.
    Failed(AgentError),
}

impl From<AgentError> for Broken {
    fn from(error: AgentError) -> Self {
        Broken::Failed(error)
    }
}

/// Why a part is given up that could be read and continued.
const NOT_AN_IMAGE: &str = "with what an earlier process had it is not a valid image";

/// What the source is known to be.
#[derive(Default)]
struct Known {
    length: Option<u64>,
    validator: Option<HeaderValue>,
}

/// A file that is being received.
struct Receiving {
    ingest: Ingest,
    keeper: Keeper,
    /// A part of it was received by an earlier process.
    is_resumed: bool,
}

impl Receiving {
    fn start(ingest: Ingest, record: Unfinished, place: &Place<'_>, is_resumed: bool) -> Receiving {
        let keeper = Keeper::start(record, place.files, ingest.written(), place.patience.checkpoint_interval);
        Receiving { ingest, keeper, is_resumed }
    }

    /// Ends the work and removes everything of it.
    async fn abandon(self, files: &FileSet) -> Result<(), AgentError> {
        self.keeper.stop().await;
        self.ingest.stop().await;
        unfinished::remove(files)
    }
}

/// Where from and to, how, and who is told.
struct Place<'a> {
    url: &'a SourceUrl,
    files: &'a FileSet,
    patience: &'a Patience,
    report: &'a (dyn Fn(Event) + Send + Sync),
}

impl Place<'_> {
    /// Says that what is here, if anything, is of no use any more.
    fn begin_again(&self, reason: &'static str, error: Option<&AgentError>) {
        tracing::warn!(url = %self.url, reason, error = error.map(AgentError::chain), "download begins again");
        (self.report)(Event::Restarted { reason });
    }

    /// Waits for the server; says so when that takes long. `Err`: it has taken too long.
    async fn wait<T>(&self, answer: impl Future<Output = T>) -> Result<T, Broken> {
        let Patience { idle_timeout, told_after, .. } = *self.patience;
        let (began, mut answer) = (Timestamp::now(), pin!(answer));
        if let Ok(answer) = timeout(told_after.min(idle_timeout), &mut answer).await {
            return Ok(answer);
        }
        let rest = idle_timeout.saturating_sub(told_after);
        let until = Timestamp::now().checked_add(rest).unwrap_or(Timestamp::MAX);
        let problem = format!("the server of `{}` says nothing since {began:.0}", self.url);
        (self.report)(Event::Silent { problem, until });
        let silence = |_| Broken::Retry(format!("the server was silent for {idle_timeout:?}"));
        timeout(rest, answer).await.map_err(silence)
    }
}

/// Downloads into the partial file and judges the result. On failure no file is left.
pub async fn download(
    what: &Download,
    files: &FileSet,
    patience: &Patience,
    report: &(dyn Fn(Event) + Send + Sync),
    cancel: &CancellationToken,
) -> Result<Ingested, AgentError> {
    let place = Place { url: &what.url, files, patience, report };
    let (mut result, is_resumed) = once(what, &place, cancel).await;
    if is_resumed
        && let Err(error) = &result
        && is_wrong_content(error)
    {
        // It may be the earlier part that is wrong. What is received in one go tells.
        place.begin_again(NOT_AN_IMAGE, Some(error));
        (result, _) = once(what, &place, cancel).await;
    }
    result
}

fn is_wrong_content(error: &AgentError) -> bool {
    matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Invalid)
}

/// One download, from where an earlier process was; and whether that was anywhere.
async fn once(what: &Download, place: &Place<'_>, cancel: &CancellationToken) -> (Result<Ingested, AgentError>, bool) {
    let mut slot = None;
    let received = tokio::select! {
        result = transfer(what, place, &mut slot) => result,
        () = cancel.cancelled() => Err(AgentError::Cancelled),
    };
    let is_resumed = slot.as_ref().is_some_and(|receiving: &Receiving| receiving.is_resumed);
    let result = match (received, slot.take()) {
        (Ok(framed), Some(receiving)) => {
            receiving.keeper.stop().await;
            judge(what, receiving.ingest, framed).await
        }
        (Ok(_), None) => Err(AgentError::Empty),
        (Err(error), Some(receiving)) => receiving.abandon(place.files).await.and(Err(error)),
        (Err(error), None) => Err(error),
    };
    let result = match result {
        Err(error) => unfinished::remove(place.files).and(Err(error)),
        whole => whole,
    };
    (result, is_resumed)
}

/// Whether a body without length ended by its framing, or may have been cut.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Framed {
    Yes,
    ByClose,
}

async fn judge(what: &Download, ingest: Ingest, framed: Framed) -> Result<Ingested, AgentError> {
    if framed == Framed::ByClose && what.expected.is_none() {
        let received_bytes = ingest.received_bytes();
        ingest.stop().await;
        return Err(AgentError::UnknownLength { received_bytes });
    }
    let ingested = ingest.finish(what.pad_to_sector).await?;
    if let Some(expected) = &what.expected
        && *expected != ingested.sha512
    {
        let note = match &ingested.unpadded_sha512 {
            Some(unpadded) if unpadded == expected => {
                ", which is that of the file before it was padded: expect the one of the padded file"
            }
            _ => ": either the checksum or the file behind the address is wrong",
        };
        return Err(AgentError::Checksum {
            expected: expected.to_string(),
            actual: ingested.sha512.to_string(),
            note: note.into(),
        });
    }
    Ok(ingested)
}

async fn transfer(what: &Download, place: &Place<'_>, slot: &mut Option<Receiving>) -> Result<Framed, AgentError> {
    let (patience, report) = (place.patience, place.report);
    let client = http_client::external(&what.url, &what.allowed)?;
    let mut known = Known::default();
    if resume(what, place, slot, &mut known).await? {
        return Ok(Framed::Yes);
    }
    let mut tries = 0;
    loop {
        let before = received(slot);
        let problem = match attempt(&client, what, place, slot, &mut known).await {
            Ok(framed) => return Ok(framed),
            Err(Broken::Failed(error)) => return Err(error),
            Err(Broken::Retry(problem)) => problem,
        };
        let after = received(slot);
        tries = if after > before { 1 } else { tries + 1 };
        if tries >= patience.tries_without_progress {
            return Err(AgentError::Exhausted { url: what.url.to_string(), problem, tries });
        }
        let pause = patience.backoff.delay(tries);
        let next_retry = Timestamp::now().checked_add(pause).unwrap_or(Timestamp::MAX);
        crate::metrics::BROKEN_TRANSFERS.add(1);
        tracing::warn!(url = %what.url, problem, received_bytes = after, "download broke, will be tried again");
        report(Event::Waiting { problem: format!("cannot download `{}`: {problem}", what.url), next_retry });
        sleep(pause).await;
    }
}

fn received(slot: &Option<Receiving>) -> u64 {
    slot.as_ref().map_or(0, |receiving| receiving.ingest.received_bytes())
}

/// Takes over what an earlier process had; returns whether that was everything.
async fn resume(
    what: &Download,
    place: &Place<'_>,
    slot: &mut Option<Receiving>,
    known: &mut Known,
) -> Result<bool, AgentError> {
    let (files, url) = (place.files.clone(), what.url.clone());
    let record = match crate::error::blocking(move || Unfinished::find(&files, &url)).await? {
        Earlier::Nothing => return Ok(false),
        Earlier::Useless(reason) => {
            place.begin_again(reason, None);
            return Ok(false);
        }
        Earlier::Part(record) => record,
    };
    let bytes = record.durable_bytes;
    let validator = record.validator.as_deref().and_then(|text| HeaderValue::from_str(text).ok());
    *known = Known { length: record.length, validator };
    tracing::info!(url = %what.url, bytes, "download goes on with what an earlier process had");
    (place.report)(Event::Started { length: known.length });
    let ingest = match Ingest::resume(&place.files.partial, known.length, bytes).await {
        Err(error) if is_wrong_content(&error) => {
            unfinished::remove(place.files)?;
            *known = Known::default();
            place.begin_again(NOT_AN_IMAGE, Some(&error));
            return Ok(false);
        }
        other => other?,
    };
    *slot = Some(Receiving::start(ingest, record, place, true));
    (place.report)(Event::Resumed { bytes });
    (place.report)(Event::Received { bytes });
    Ok(known.length == Some(bytes))
}

async fn attempt(
    client: &Client,
    what: &Download,
    place: &Place<'_>,
    slot: &mut Option<Receiving>,
    known: &mut Known,
) -> Result<Framed, Broken> {
    let report = place.report;
    let have = received(slot);
    let mut request = client.get(what.url.expose().clone()).header(ACCEPT_ENCODING, "identity");
    if have > 0
        && let Some(validator) = &known.validator
    {
        request = request.header(RANGE, format!("bytes={have}-")).header(IF_RANGE, validator);
    }
    let mut response = match place.wait(request.send()).await? {
        Err(error) if error.is_redirect() || error.is_builder() => {
            return Err(failed(what, chain(&error.without_url())));
        }
        Err(error) => {
            return Err(match source_guard::forbidden(&error) {
                Some(forbidden) => failed(what, forbidden.to_string()),
                None => Broken::Retry(http_client::unsent(&error)),
            });
        }
        Ok(response) => response,
    };
    check_status(what, response.status())?;
    if let Some(encoding) = response.headers().get(CONTENT_ENCODING)
        && encoding != "identity"
    {
        let problem = format!(
            "the server compresses the transfer ({}), although it was asked not to: serve the file as it is",
            encoding.to_str().unwrap_or("unreadable")
        );
        return Err(failed(what, problem));
    }

    let continued = (response.status() == StatusCode::PARTIAL_CONTENT)
        .then(|| continues(response.headers(), have, known.length))
        .flatten();
    match continued {
        Some(total) => known.length = known.length.or(total),
        None if response.status() != StatusCode::OK => {
            // An unusable range: drop what is here, the next try asks for all of it.
            restart(slot, place, "the server sent a range that does not fit").await?;
            return Err(Broken::Retry(format!("the server answered {} to a range request", response.status())));
        }
        None => {
            restart(slot, place, "the server does not support ranges, or its file has changed").await?;
            *known = Known { length: length(response.headers()), validator: validator(response.headers()) };
            let ingest = Ingest::begin(&place.files.partial, known.length).await?;
            let validator = known.validator.as_ref().and_then(|value| value.to_str().ok()).map(str::to_owned);
            let record = Unfinished::new(&what.url, known.length, validator);
            *slot = Some(Receiving::start(ingest, record, place, false));
            report(Event::Started { length: known.length });
        }
    }
    let framed = if known.length.is_some() || is_framed(&response) { Framed::Yes } else { Framed::ByClose };
    let ingest = &mut slot.as_mut().expect("begun above or in an earlier try").ingest;
    loop {
        let mut bytes = match place.wait(response.chunk()).await? {
            Err(error) => return Err(Broken::Retry(cut(ingest, known, &chain(&error.without_url())))),
            Ok(None) => break,
            Ok(Some(bytes)) => bytes,
        };
        // What waits here under the limit is no silence of the server.
        while !bytes.is_empty() {
            let granted = what.limit.take(bytes.len() as u64).await;
            ingest.push(bytes.split_to(granted as usize)).await?;
            report(Event::Received { bytes: ingest.received_bytes() });
        }
        if known.length.is_some_and(|length| ingest.received_bytes() > length) {
            return Err(failed(what, "the server sent more bytes than it announced".into()));
        }
    }
    match known.length {
        Some(length) if ingest.received_bytes() < length => Err(Broken::Retry(cut(ingest, known, "it ended early"))),
        _ => Ok(framed),
    }
}

async fn restart(slot: &mut Option<Receiving>, place: &Place<'_>, reason: &'static str) -> Result<(), AgentError> {
    if let Some(old) = slot.take() {
        old.abandon(place.files).await?;
        place.begin_again(reason, None);
    }
    Ok(())
}

fn check_status(what: &Download, status: StatusCode) -> Result<(), Broken> {
    match status {
        StatusCode::OK | StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE => Ok(()),
        StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_EARLY | StatusCode::TOO_MANY_REQUESTS => {
            Err(Broken::Retry(format!("the server answered {status}")))
        }
        _ if status.is_server_error() => Err(Broken::Retry(format!("the server answered {status}"))),
        _ => Err(Broken::Failed(AgentError::HttpStatus { url: what.url.to_string(), status: status.as_u16() })),
    }
}

fn failed(what: &Download, problem: String) -> Broken {
    Broken::Failed(AgentError::Download { url: what.url.to_string(), problem })
}

fn cut(ingest: &Ingest, known: &Known, problem: &str) -> String {
    match known.length {
        Some(length) => format!("the transfer was cut after {} of {length} bytes: {problem}", ingest.received_bytes()),
        None => format!("the transfer was cut after {} bytes: {problem}", ingest.received_bytes()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_pass_is_tried_again_and_the_rest_is_not() {
        let url = SourceUrl::parse("http://h/x").unwrap();
        let (allowed, limit) = (AllowedSources::none(), Arc::default());
        let what = Download { url, expected: None, pad_to_sector: false, allowed, limit };
        let judge = |code| check_status(&what, StatusCode::from_u16(code).unwrap());
        for code in [200, 206, 416] {
            assert!(judge(code).is_ok(), "{code}");
        }
        for code in [408, 425, 429, 500, 502, 503, 504] {
            assert!(matches!(judge(code), Err(Broken::Retry(_))), "{code}");
        }
        for code in [204, 304, 400, 401, 403, 404, 410] {
            assert!(matches!(judge(code), Err(Broken::Failed(_))), "{code}");
        }
    }
}

//! Who is asked for which chunk, and when to give a peer or all of it up.

use super::*;
use crate::config_file::Format;
use crate::manifest::hash_chunk;

/// One range waits.
fn work(range: Range<u64>) -> Work {
    Work {
        queue: VecDeque::from([range]),
        in_flight: BTreeMap::new(),
        bad: BTreeMap::new(),
        failures: BTreeMap::new(),
        dropped: BTreeMap::new(),
        done_bytes: 0,
        error: None,
    }
}

fn fetch(work: &mut Work, worker: usize) -> Option<Range<u64>> {
    match work.next(worker, 2).expect("no hopeless chunk") {
        Next::Fetch(range) => Some(range),
        Next::Wait | Next::End => None,
    }
}

const OTHER: usize = STREAMS_PER_PEER;

#[test]
fn an_idle_worker_takes_half_of_what_another_peer_has_left() {
    let mut work = work(0..8);
    assert_eq!(fetch(&mut work, 0), Some(0..8));
    assert!(work.begin(0, 0));
    work.end(0, 0);
    assert_eq!(fetch(&mut work, 1), None, "its own peer would not be faster");
    assert_eq!(fetch(&mut work, OTHER), Some(5..8));
    assert!(work.begin(0, 4) && !work.begin(0, 5), "the first worker stops before the stolen half");
    assert!(matches!(work.next(OTHER + 1, 2), Ok(Next::Fetch(range)) if range == (3..5)));
}

#[test]
fn a_chunk_in_progress_is_not_stolen() {
    let mut work = work(3..4);
    assert_eq!(fetch(&mut work, 0), Some(3..4));
    assert!(matches!(work.next(OTHER, 2), Ok(Next::Wait)));
}

#[test]
fn a_chunk_that_was_bad_goes_to_another_peer_or_nowhere() {
    let mut work = work(3..4);
    work.bad.insert(0, BTreeSet::from([3]));
    assert_eq!(fetch(&mut work, 0), None);
    work.dropped.insert(1, "dead".into());
    assert!(matches!(work.next(0, 2), Err(3)));
}

/// A fetch of so many chunks from two peers, which are never asked.
fn fetch_of(chunks: u64) -> Arc<Fetch> {
    fetch_from(chunks, "127.0.0.1:1,127.0.0.1:2")
}

fn fetch_from(chunks: u64, peers: &str) -> Arc<Fetch> {
    let file = tempfile::NamedTempFile::new().unwrap();
    let bytes = vec![1; CHUNK_BYTES as usize];
    let manifest = Manifest {
        uuid: "0a1b2c3d".parse().unwrap(),
        sha512: "a".repeat(128).parse().unwrap(),
        format: Format::Raw,
        size_bytes: chunks * CHUNK_BYTES,
        virtual_size_bytes: chunks * CHUNK_BYTES,
        chunks: vec![hash_chunk(&bytes); chunks as usize],
    };
    Arc::new(Fetch {
        key: "parrot-0a1b2c3d".parse().unwrap(),
        partial: file.path().into(),
        peers: Peer::parse_list(peers, Duration::from_secs(9), &Default::default()).unwrap(),
        manifest: Arc::new(manifest),
        file: Arc::new(DirectFile::new(file.reopen().unwrap(), file.path())),
        report: Arc::new(|_| ()),
        work: Mutex::new(work(0..chunks)),
        wake: Notify::new(),
    })
}

#[tokio::test]
async fn a_peer_that_is_of_no_use_is_dropped_and_one_that_gets_on_is_not() {
    let without = || Outcome { problem: Some(PeerError::Without), ..Outcome::default() };
    let broken = |good| Outcome { good, problem: Some(PeerError::Transfer("broken".into())), ..Outcome::default() };
    let fetch = fetch_of(9);
    fetch.settle(0, Ok(without()));
    assert_eq!(fetch.work().dropped[&0], "it does not have the copy ready", "at once: asking again is of no use");
    for round in 0..2 * MAX_PEER_FAILURES {
        assert_eq!(fetch.settle(OTHER, Ok(broken(1))), Some(PAUSE), "round {round}: it gave something");
    }
    assert!(!fetch.work().dropped.contains_key(&1));
    for failures in 2..=MAX_PEER_FAILURES {
        assert_eq!(fetch.settle(OTHER, Ok(broken(0))), Some(PAUSE * failures));
    }
    assert_eq!(fetch.work().dropped[&1], "broken");

    let fetch = fetch_of(9);
    let wrong = |bad: Range<u64>| Outcome { bad: bad.collect(), good: 1, ..Outcome::default() };
    fetch.settle(0, Ok(wrong(0..7)));
    fetch.settle(1, Ok(wrong(6..7)));
    assert!(fetch.work().dropped.is_empty(), "the same chunk twice is one chunk");
    fetch.settle(1, Ok(wrong(7..8)));
    assert_eq!(fetch.work().dropped[&0], "it gave 8 wrong chunks");
}

#[tokio::test]
async fn nothing_is_begun_any_more_after_a_failure_or_when_it_is_stopped() {
    let fetch = fetch_of(9);
    assert_eq!(self::fetch(&mut fetch.work(), 0), Some(0..9));
    assert!(fetch.work().begin(0, 0));
    fetch.settle(1, Err(AgentError::Empty));
    assert!(!fetch.work().begin(0, 1));
    assert!(matches!(fetch.work().next(OTHER, 2), Ok(Next::End)));

    let fetch = fetch_of(9);
    // One chunk, which no other worker can take a half of.
    fetch.work().in_flight.insert(OTHER, 0..1);
    fetch.work().queue.clear();
    let cancel = CancellationToken::new();
    let ended = tokio::join!(fetch.all(&cancel), async { cancel.cancel() }).0;
    assert!(matches!(ended, Err(AgentError::Cancelled)));
    assert!(!fetch.work().begin(OTHER, 0), "a thread that has bytes left to read stops as well");
}

/// The address of a manager that answers every question with a chunk of such bytes.
async fn peer_with(byte: u8) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut request = [0; 4096];
                while stream.read(&mut request).await.is_ok_and(|read| read > 0) {
                    let head = format!("HTTP/1.1 206 Partial Content\r\nContent-Length: {CHUNK_BYTES}\r\n\r\n");
                    stream.write_all(head.as_bytes()).await.unwrap();
                    stream.write_all(&vec![byte; CHUNK_BYTES as usize]).await.unwrap();
                }
            });
        }
    });
    format!("127.0.0.1:{}", port - 1)
}

#[tokio::test]
async fn who_waits_takes_what_another_peer_gave_wrongly() {
    let fetch = fetch_from(1, &format!("{},{}", peer_with(9).await, peer_with(1).await));
    let cancel = CancellationToken::new();
    let done = tokio::time::timeout(Duration::from_secs(60), fetch.all(&cancel)).await;
    done.expect("nobody waits for ever").unwrap();
    assert_eq!(fetch.work().bad[&0], BTreeSet::from([0]));
    // Nobody has it right: who waits meanwhile ends as well.
    let fetch = fetch_from(1, &format!("{},{}", peer_with(9).await, peer_with(8).await));
    let done = tokio::time::timeout(Duration::from_secs(60), fetch.all(&cancel)).await;
    let error = done.expect("nobody waits for ever").unwrap_err();
    assert!(matches!(error, AgentError::ChunkBadEverywhere { chunk: 0, .. }), "{error}");
}

#[tokio::test]
async fn a_file_of_which_chunks_are_missing_is_not_taken_for_whole() {
    let fetch = fetch_of(9);
    for peer in 0..2 {
        fetch.work().dropped.insert(peer, "dead".into());
    }
    let error = fetch.all(&CancellationToken::new()).await.unwrap_err();
    assert_eq!(error.to_string(), "no peer can give the copy: 127.0.0.1:1: dead; 127.0.0.1:2: dead");
}

#[tokio::test]
async fn who_waits_ends_when_another_one_gives_up() {
    let fetch = fetch_of(1);
    fetch.work().queue.clear();
    fetch.work().in_flight.insert(0, 0..1);
    let mut waiting = std::pin::pin!(fetch.run(OTHER));
    assert!(futures::poll!(&mut waiting).is_pending());
    {
        let mut work = fetch.work();
        work.in_flight.clear();
        work.queue.push_back(0..1);
        work.bad = BTreeMap::from([(0, BTreeSet::from([0])), (1, BTreeSet::from([0]))]);
    }
    fetch.run(0).await;
    tokio::time::timeout(Duration::from_secs(60), waiting).await.expect("nobody waits for ever");
    assert!(matches!(fetch.work().error, Some(AgentError::ChunkBadEverywhere { .. })));
}

//! Limits of bandwidth, over real sockets: what is sent and downloaded keeps to them, and follows their changes while it runs.
//!
//! Times are compared with lower bounds only: a busy machine may take longer for anything.

mod support;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use api::bandwidth::LOWEST;
use api::image::CopyState;
use backing_image_agent::limits::MAX_PEER_READS;
use proto::bimrpc::Bandwidth;
use support::*;
use tonic::Code;

/// Bytes of the image that are data.
const DATA_BYTES: u64 = 9 * MIB as u64 + 3 * 512;

/// What a limit does not count: one piece, and what may be caught up with.
const ALLOWANCE: Duration = Duration::from_millis(125);

fn limits(total: u64, of_image: u64) -> Bandwidth {
    let images = if of_image == 0 { [].into() } else { [("parrot".to_owned(), of_image as i64)].into() };
    Bandwidth { total: total as i64, images }
}

async fn limit(manager: &RunningManager, limits: Bandwidth) {
    manager.client().await.limit_bandwidth(limits.clone()).await.unwrap();
    let listed = manager.client().await.list(()).await.unwrap().into_inner();
    assert_eq!(listed.bandwidth, Some(limits), "it tells what holds");
}

/// The least time that the data takes at that rate.
fn least(bytes_per_second: u64) -> Duration {
    Duration::from_secs_f64(DATA_BYTES as f64 / bytes_per_second as f64) - ALLOWANCE
}

/// A receiver that gives up a peer that is silent for so long, and is receiving the copy.
async fn receiver(from: SocketAddr, patience: Duration) -> (TestDisk, RunningManager) {
    let disk = TestDisk::new();
    let manager = RunningManager::start_with(&disk, address(8000), patience).await;
    manager.sync(spec(), &[from]).await.unwrap();
    (disk, manager)
}

#[tokio::test]
async fn a_copy_is_sent_no_faster_than_the_limit_of_all_and_that_of_its_image() {
    let (_disk, manager) = first().await;
    const RATE: u64 = 6 << 20;
    for wish in [limits(RATE, 0), limits(0, RATE), limits(2 * RATE, RATE), limits(RATE, 2 * RATE)] {
        limit(&manager, wish.clone()).await;
        let begun = Instant::now();
        let (disk, receiver) = receiver(manager.address, Duration::from_secs(20)).await;
        receiver.reaches("ready").await;
        assert!(begun.elapsed() >= least(RATE), "{:?} under {wish:?}", begun.elapsed());
        assert!(std::fs::read(disk.copy_file()).unwrap() == image());
    }
}

/// At that rate the copy would take more than two minutes, and each connection gets its bytes in small pieces.
#[tokio::test]
async fn waiting_under_a_limit_is_no_silence_and_a_lifted_limit_ends_it() {
    let (_disk, manager) = first().await;
    limit(&manager, limits(LOWEST, 0)).await;
    let patience = Duration::from_secs(1);
    let mut receivers = vec![];
    for _ in 0..3 {
        receivers.push(receiver(manager.address, patience).await);
    }
    let begun = Instant::now();
    wait_until("everybody has waited for longer than for a silent peer", async || {
        for (_, receiver) in &receivers {
            let status = receiver.get().await.status.unwrap();
            assert!(["pending", "starting", "in-progress"].contains(&status.state.as_str()), "{status:?}");
            assert_eq!(status.error_msg, "");
        }
        begun.elapsed() > 4 * patience
    })
    .await;
    assert!(manager.get().await.status.unwrap().sending_reference > 0);
    limit(&manager, limits(0, 0)).await;
    for (disk, receiver) in &receivers {
        receiver.reaches("ready").await;
        assert!(std::fs::read(disk.copy_file()).unwrap() == image());
    }
}

/// None of these ends while the test lasts, and there are more than are read for at a time.
#[tokio::test]
async fn each_of_many_gets_its_bytes_under_a_limit() {
    let (_disk, manager) = first().await;
    limit(&manager, limits(LOWEST, 0)).await;
    let url = format!("http://{}:8001/v1/copies/{}/data", manager.address.ip(), key());
    let range = format!("bytes=0-{}", 3 * MIB - 1);
    let begin = async || {
        let mut response = http().get(&url).header("Range", &range).send().await.unwrap();
        let first = response.chunk().await.unwrap().expect("it has bytes");
        assert!(first[..] == image()[..first.len()]);
        response
    };
    let many = futures::future::join_all((0..2 * MAX_PEER_READS).map(|_| begin()));
    let begun = tokio::time::timeout(Duration::from_secs(30), many).await.expect("everybody gets bytes");
    assert_eq!(manager.get().await.status.unwrap().sending_reference as usize, begun.len());
}

#[tokio::test]
async fn a_limit_that_cannot_be_kept_is_refused_and_changes_nothing() {
    let (_disk, manager) = first().await;
    limit(&manager, limits(LOWEST, 0)).await;
    for (wish, of) in [(limits(LOWEST - 1, 0), "all copies"), (limits(0, 1), "image `parrot`")] {
        let error = manager.client().await.limit_bandwidth(wish).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument);
        assert!(error.message().contains(of) && error.message().contains("at least 64Ki"), "{}", error.message());
    }
    let negative = Bandwidth { total: -1, ..Default::default() };
    assert!(manager.client().await.limit_bandwidth(negative).await.unwrap_err().message().contains("is -1"));
    let listed = manager.client().await.list(()).await.unwrap().into_inner();
    assert_eq!(listed.bandwidth, Some(limits(LOWEST, 0)));
}

#[tokio::test]
async fn a_download_keeps_to_its_limit() {
    const RATE: u64 = 8 << 20;
    let (disk, bytes) = (TestDisk::new(), image());
    let source = Source::of(&bytes).await;
    let mut config = source_config(&disk, &[("url", &source.url())], None);
    config.bandwidth_limit = RATE;
    let begun = Instant::now();
    let status = RunningSource::start(config).await.end().await;
    let least = Duration::from_secs_f64(bytes.len() as f64 / RATE as f64) - ALLOWANCE;
    assert!(begun.elapsed() >= least, "{:?}", begun.elapsed());
    assert_eq!((status.state, status.bandwidth_limit), (CopyState::ReadyForTransfer, RATE), "{}", status.message);
    assert_eq!(status.current_checksum, sha512(&bytes));
}

#[tokio::test]
async fn a_download_that_waits_under_its_limit_is_not_silent_and_goes_on_when_it_is_lifted() {
    let (disk, bytes) = (TestDisk::new(), image());
    let source = Source::of(&bytes).await;
    let mut config = source_config(&disk, &[("url", &source.url())], None);
    config.bandwidth_limit = LOWEST;
    config.patience.idle_timeout = Duration::from_secs(1);
    let running = RunningSource::start(config).await;
    let mut seen = 0;
    let begun = Instant::now();
    wait_until("some of it is here, after longer than a server may be silent", async || {
        let status = running.get().await;
        assert_eq!((status.message.as_str(), status.next_retry_time.as_str()), ("", ""));
        assert_ne!(status.state, CopyState::Failed);
        assert!(status.processed_size >= seen, "it never begins again");
        seen = status.processed_size;
        seen > 0 && begun.elapsed() > Duration::from_secs(3)
    })
    .await;
    assert!(seen < bytes.len() as u64 / 2, "{seen} bytes are too many");
    for bad in ["action=limit", "action=limit&bytesPerSecond=1"] {
        let (code, text) = running.post(bad).await;
        assert!(code == 400 && text.contains("at least 64Ki"), "{code} {text}");
    }
    let (code, text) = running.post("action=limit&bytesPerSecond=0").await;
    assert!(code == 200 && text.contains(r#""bandwidthLimit":0"#), "{code} {text}");
    let status = running.end().await;
    assert_eq!(status.current_checksum, sha512(&bytes));
    assert_eq!(source.requests().len(), 1, "in one request");
}

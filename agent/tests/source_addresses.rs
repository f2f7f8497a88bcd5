//! Where an image must not come from: real servers that nobody may ask, and redirects to them.

mod support;

use std::net::{IpAddr, Ipv4Addr};

use api::ErrorKind;
use api::image::CopyState;
use backing_image_agent::data_source::FileStatus;
use support::*;

async fn outcome(url: &str, allowed: &str) -> FileStatus {
    let disk = TestDisk::new();
    let mut config = source_config(&disk, &[("url", url)], None);
    config.allowed_sources = allowed.parse().unwrap();
    let status = RunningSource::start(config).await.end().await;
    if status.state == CopyState::Failed {
        assert_eq!(disk.temporary_files(), Vec::<String>::new());
    }
    status
}

/// The same, refused for good.
async fn refusal(url: &str, allowed: &str) -> String {
    let status = outcome(url, allowed).await;
    assert_eq!((status.state, status.error_kind), (CopyState::Failed, Some(ErrorKind::Invalid)), "{url}");
    status.message
}

async fn redirecting(to: &str) -> Source {
    let location = format!("Location: {to}");
    Source::new(move |_, _| Reply::status("302 Found").with(&location)).await
}

/// Another address of this machine.
async fn neighbor() -> Source {
    let bytes = image();
    Source::at(IpAddr::V4(Ipv4Addr::new(127, 0, 0, 2)), move |_, _| Reply::whole(&bytes)).await
}

#[tokio::test]
async fn a_source_on_this_machine_or_its_link_is_refused_unless_a_setting_allows_it() {
    let neighbor = neighbor().await;
    for (url, allowed, what) in [
        (neighbor.url(), "", "a loopback address"),
        (neighbor.url(), "127.0.0.1", "a loopback address"),
        (neighbor.url().replace("127.0.0.2", "0x7f000002"), "127.0.0.1", "a loopback address"),
        (neighbor.url().replace("127.0.0.2", "[::ffff:127.0.0.2]"), "127.0.0.1", "a loopback address"),
        ("http://localhost/x".into(), "", "a loopback address"),
        ("http://169.254.1.2/x".into(), "127.0.0.0/8", "a link-local address"),
        ("http://[fe80::1]/x".into(), "127.0.0.0/8", "a link-local address"),
        ("http://169.254.169.254/latest".into(), "127.0.0.0/8", "the address of a cloud's metadata service"),
        ("http://metadata.google.internal/x".into(), "127.0.0.0/8", "the address of a cloud's metadata service"),
    ] {
        let why = refusal(&url, allowed).await;
        assert!(why.contains(&format!("is {what}: setting `backing-image-allowed-source-addresses`")), "{url}: {why}");
    }
    assert_eq!(neighbor.requests(), Vec::<String>::new());
    let status = outcome(&neighbor.url(), "127.0.0.0/8").await;
    assert_eq!(status.state, CopyState::ReadyForTransfer, "{}", status.message);
}

#[tokio::test]
async fn a_redirect_to_an_address_that_is_not_allowed_is_not_followed() {
    let neighbor = neighbor().await;
    for (to, what) in [
        (neighbor.url(), "a loopback address"),
        (neighbor.url().replace("127.0.0.2", "2130706434"), "a loopback address"),
        ("http://169.254.169.254/latest".into(), "the address of a cloud's metadata service"),
        ("http://[fe80::1]/x".into(), "a link-local address"),
        ("http://[::1]:1/x".into(), "a loopback address"),
    ] {
        // By way of a redirect that is allowed.
        let last = redirecting(&to).await;
        let first = redirecting(&last.url()).await;
        let why = refusal(&first.url(), "127.0.0.1").await;
        assert!(why.contains(&format!("is {what}: setting")), "{to}: {why}");
        assert_eq!((first.requests().len(), last.requests().len()), (1, 1));
    }
    assert_eq!(neighbor.requests(), Vec::<String>::new());
    let allowed = redirecting(&neighbor.url()).await;
    let status = outcome(&allowed.url(), "127.0.0.0/8").await;
    assert_eq!(status.state, CopyState::ReadyForTransfer, "{}", status.message);
}

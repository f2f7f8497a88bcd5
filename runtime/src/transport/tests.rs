//! Who is let in, who is believed, and what a replaced certificate does.

#[path = "../../tests/authority/mod.rs"]
pub(super) mod authority;

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::time::Duration;

use rustls::pki_types::PrivateKeyDer;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use super::*;
use authority::Authority;

const LIMIT: Duration = Duration::from_secs(30);

async fn listen(security: &Security) -> (Listener, SocketAddr) {
    let listener = security.listen("127.0.0.1:0".parse().unwrap(), Protocol::Lines).await.unwrap();
    let address = listener.address();
    (listener, address)
}

/// Answers each connection with the first four bytes of it.
fn echo(mut listener: Listener) -> tokio::task::JoinHandle<()> {
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.next().await;
            tokio::spawn(async move {
                let mut bytes = [0; 4];
                if stream.read_exact(&mut bytes).await.is_ok() {
                    let _ = stream.write_all(&bytes).await;
                    let _ = stream.shutdown().await;
                }
            });
        }
    })
}

/// What comes back for `ping`.
async fn ask(client: &Security, address: SocketAddr) -> io::Result<[u8; 4]> {
    let client = client.clone();
    let asked = tokio::task::spawn_blocking(move || {
        let stream = std::net::TcpStream::connect(address)?;
        stream.set_read_timeout(Some(LIMIT))?;
        let mut stream = client.secure(stream)?;
        stream.write_all(b"ping")?;
        let mut bytes = [0; 4];
        stream.read_exact(&mut bytes)?;
        Ok(bytes)
    });
    timeout(LIMIT, asked).await.expect("it is not waited for ever").unwrap()
}

#[tokio::test]
async fn members_of_one_authority_talk_and_plain_talks_to_plain() {
    for security in [Security::default(), Authority::new().member()] {
        let (listener, address) = listen(&security).await;
        let serving = echo(listener);
        assert_eq!(&ask(&security, address).await.unwrap(), b"ping", "{}", security.scheme());
        serving.abort();
    }
}

#[tokio::test]
async fn who_has_no_certificate_of_the_authority_is_refused() {
    let authority = Authority::new();
    let (listener, address) = listen(&authority.member()).await;
    let serving = echo(listener);
    let stranger = Authority::new();
    // It believes the server, and is not believed.
    let strange = Security::mutual(&authority.pem(), &stranger.identity(PEER_NAME)).unwrap();
    assert!(ask(&strange, address).await.is_err());
    assert!(ask(&Security::default(), address).await.ok() != Some(*b"ping"), "plain");
    let believing = OneName {
        inner: WebPkiServerVerifier::builder_with_provider(Arc::new(roots(&authority.pem()).unwrap()), provider())
            .build()
            .unwrap(),
        name: peer_name(),
    };
    let client = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(believing))
        .with_no_client_auth();
    let server = authority.member().tls().unwrap().server.clone();
    let nobody = Security::given(Tls { server, client: Arc::new(client) });
    assert!(ask(&nobody, address).await.is_err(), "no certificate");
    assert_eq!(&ask(&authority.member(), address).await.unwrap(), b"ping", "others are served on");
    serving.abort();
}

/// Of an authority that signs for others too.
#[tokio::test]
async fn a_client_with_another_name_is_refused() {
    let authority = Authority::new();
    let (listener, address) = listen(&authority.member()).await;
    let serving = echo(listener);
    let other = Security::mutual(&authority.pem(), &authority.identity("somebody-else")).unwrap();
    assert!(ask(&other, address).await.is_err());
    assert_eq!(&ask(&authority.member(), address).await.unwrap(), b"ping", "others are served on");
    serving.abort();
}

/// Certificates are public, keys are not.
#[tokio::test]
async fn who_shows_the_certificate_of_another_without_its_key_is_not_believed() {
    let authority = Authority::new();
    let (chain, own) = (authority.pair(PEER_NAME).0, authority.pair(PEER_NAME).1);
    let key = PrivateKeyDer::from_pem_slice(own.as_bytes()).unwrap();
    let key = provider().key_provider.load_private_key(key).unwrap();
    let forged = Arc::new(rustls::sign::CertifiedKey::new(certificates(&chain).unwrap(), key));
    let member = authority.member();
    let mut server = member.tls().unwrap().server.clone();
    server.cert_resolver = Arc::new(rustls::sign::SingleCertAndKey::from(forged.clone()));
    let mut client = ClientConfig::clone(&member.tls().unwrap().client);
    client.client_auth_cert_resolver = Arc::new(rustls::sign::SingleCertAndKey::from(forged));
    let forger = Security::given(Tls { server, client: Arc::new(client) });
    for (server, client) in [(&forger, &member), (&member, &forger)] {
        let (listener, address) = listen(server).await;
        let serving = echo(listener);
        assert!(ask(client, address).await.is_err());
        serving.abort();
    }
}

#[tokio::test]
async fn a_server_of_another_authority_or_name_is_not_believed() {
    let authority = Authority::new();
    let other = Authority::new();
    // Each lets our client in.
    let trusting = format!("{}{}", authority.pem(), other.pem());
    for wrong in [other.identity(PEER_NAME), authority.identity("somebody-else")] {
        let (listener, address) = listen(&Security::mutual(&trusting, &wrong).unwrap()).await;
        let serving = echo(listener);
        assert!(ask(&authority.member(), address).await.is_err());
        serving.abort();
    }
}

#[tokio::test]
async fn a_silent_peer_keeps_nobody_waiting() {
    let member = Authority::new().member();
    let (listener, address) = listen(&member).await;
    let serving = echo(listener);
    let _silent: Vec<_> =
        (0..8).map(|_| std::net::TcpStream::connect(address).expect("the listener has a backlog")).collect();
    assert_eq!(&ask(&member, address).await.unwrap(), b"ping");
    serving.abort();
}

/// As many as fill all places, several times over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_who_say_nothing_never_fill_the_place_of_a_client() {
    let member = Authority::new().member();
    let (listener, address) = listen(&member).await;
    let serving = echo(listener);
    let silent = || std::net::TcpStream::connect(address).expect("the listener has a backlog");
    let mut silent: Vec<_> = (0..4 * listener::MAX_HANDSHAKES).map(|_| silent()).collect();
    let soon = listener::HANDSHAKE_TIMEOUT / 2;
    let asked = timeout(soon, ask(&member, address)).await;
    assert_eq!(&asked.expect("it need not wait until they are given up").unwrap(), b"ping");
    silent[0].set_read_timeout(Some(soon)).unwrap();
    let waits = |error: &io::Error| matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut);
    assert!(!silent[0].read(&mut [0]).is_err_and(|error| waits(&error)), "there are no more of them than places");
    serving.abort();
}

#[tokio::test]
async fn a_replaced_certificate_is_shown_in_the_next_handshake() {
    let (old, new) = (Authority::new(), Authority::new());
    let identity = old.identity(PEER_NAME);
    let listener = identity.listen("127.0.0.1:0".parse().unwrap(), Protocol::Lines).await.unwrap();
    let address = listener.address();
    let serving = echo(listener);
    let (of_old, of_new) = (old.member(), new.member());
    assert!(ask(&of_old, address).await.is_ok() && ask(&of_new, address).await.is_err());
    let (chain, key) = new.pair(PEER_NAME);
    assert!(identity.replace(&chain, &old.pair(PEER_NAME).1).is_err(), "the key of another certificate");
    assert!(ask(&of_old, address).await.is_ok(), "the one before stays");
    identity.replace(&chain, &key).unwrap();
    assert!(ask(&of_old, address).await.is_err() && ask(&of_new, address).await.is_ok());
    serving.abort();
}

#[test]
fn what_cannot_be_used_is_said() {
    let authority = Authority::new();
    let (chain, key) = authority.pair(PEER_NAME);
    let said = |result: Result<Identity, SecurityError>| api::error::sentence(&result.unwrap_err());
    assert!(said(Identity::from_pem("", &key)).contains("-----BEGIN CERTIFICATE-----"));
    assert!(said(Identity::from_pem(&chain, "")).contains("-----BEGIN PRIVATE KEY-----"));
    assert!(said(Identity::from_pem(&chain, &authority.pair("b").1)).contains("give both from one issue"));
    let error = Security::mutual("", &authority.identity(PEER_NAME)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
}

#[test]
fn a_certificate_is_accepted_for_its_name_and_time_and_by_its_authority() {
    let authority = Authority::new();
    let now = 1_790_000_000;
    let (chain, _) = authority.pair("webhook.example");
    let trusted = authority.pem();
    assert!(is_accepted(&trusted, &chain, "webhook.example", now));
    assert!(!is_accepted(&trusted, &chain, "other.example", now));
    assert!(!is_accepted(&Authority::new().pem(), &chain, "webhook.example", now));
    // rcgen's certificates end in the year 4096.
    assert!(!is_accepted(&trusted, &chain, "webhook.example", 80_000_000_000));
    assert!(!is_accepted("", &chain, "webhook.example", now) && !is_accepted(&trusted, "", "webhook.example", now));
}

#[tokio::test]
async fn replaced_files_are_read_for_the_next_connection() {
    let (old, new) = (Authority::new(), Authority::new());
    let folder = tempfile::tempdir().unwrap();
    let missing = Security::from_directory(Some(folder.path())).unwrap_err();
    assert!(missing.to_string().contains("ca.crt") && missing.kind() == ErrorKind::Invalid, "{missing}");
    old.issue(folder.path());
    let security = Security::from_directory(Some(folder.path())).unwrap();
    assert_eq!(security.directory(), Some(folder.path()));
    let (listener, address) = listen(&security).await;
    let serving = echo(listener);
    let (of_old, of_new) = (old.member(), new.member());
    assert!(ask(&of_old, address).await.is_ok() && ask(&of_new, address).await.is_err());
    // In the middle of being replaced: they stay as they were.
    let key = std::fs::read(folder.path().join("tls.key")).unwrap();
    std::fs::write(folder.path().join("tls.key"), "half").unwrap();
    assert!(ask(&of_old, address).await.is_ok());
    std::fs::write(folder.path().join("tls.key"), key).unwrap();
    new.issue(folder.path());
    // Certificate and authority, of a server and of a client.
    assert!(ask(&of_new, address).await.is_ok() && ask(&of_old, address).await.is_err());
    assert!(ask(&security, address).await.is_ok());
    serving.abort();
    assert!(Security::from_directory(None).unwrap().is_plain());
}

//! What a relay passes on, what it keeps, and when it ends.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::thread;

use tokio::io::duplex;
use tokio::net::TcpListener;
use tokio_rustls::server::TlsStream;

use super::super::tests::authority::Authority;
use super::super::{Protocol, Security, Stream};
use super::*;

const LIMIT: Duration = Duration::from_secs(30);

type Relaying = tokio::task::JoinHandle<io::Result<()>>;

/// Two sides that talk through a relay; the secure one is a pipe that holds that much, the plain one a socket.
fn between(held: usize) -> (tokio::io::DuplexStream, tokio::net::UnixStream, Relaying) {
    let (secure, near_secure) = duplex(held);
    let (plain, near_plain) = tokio::net::UnixStream::pair().unwrap();
    (secure, plain, tokio::spawn(relay(near_secure, near_plain)))
}

#[tokio::test]
async fn half_a_connection_may_end_and_the_other_half_goes_on() {
    let (mut secure, mut plain, relaying) = between(16);
    secure.write_all(b"question").await.unwrap();
    secure.shutdown().await.unwrap();
    let mut asked = String::new();
    plain.read_to_string(&mut asked).await.unwrap();
    assert_eq!(asked, "question");
    let answer = tokio::spawn(async move {
        let mut answer = vec![];
        secure.read_to_end(&mut answer).await.unwrap();
        answer
    });
    plain.write_all(&[7; 1000]).await.unwrap();
    drop(plain);
    assert_eq!(answer.await.unwrap(), [7; 1000]);
    relaying.await.unwrap().unwrap();
}

/// As with TLS, which keeps what the network did not take.
#[tokio::test(start_paused = true)]
async fn nothing_is_held_back_for_the_next_bytes() {
    let (mut secure, near_secure) = duplex(16);
    let (mut plain, near_plain) = tokio::net::UnixStream::pair().unwrap();
    let _relaying = tokio::spawn(relay(tokio::io::BufStream::new(near_secure), near_plain));
    plain.write_all(b"question").await.unwrap();
    let mut asked = [0; 8];
    timeout(LIMIT, secure.read_exact(&mut asked)).await.expect("it is passed on").unwrap();
    assert_eq!(&asked, b"question");
}

#[tokio::test(start_paused = true)]
async fn a_break_of_one_direction_ends_both_at_once() {
    let broken = futures::stream::iter([Err::<&[u8], _>(io::Error::from(io::ErrorKind::UnexpectedEof))]);
    let secure = tokio::io::join(tokio_util::io::StreamReader::new(broken), tokio::io::sink());
    let (mut plain, near_plain) = tokio::net::UnixStream::pair().unwrap();
    let error = timeout(LINGER / 2, relay(secure, near_plain)).await.expect("nothing is waited for").unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    assert!(plain.write_all(b"more").await.is_err());
}

/// It waits for the answers to what was asked before, but not for ever.
#[tokio::test(start_paused = true)]
async fn who_never_ends_is_left_after_a_while() {
    let (mut secure, plain, relaying) = between(16);
    secure.shutdown().await.unwrap();
    let started = tokio::time::Instant::now();
    let error = timeout(LINGER * 100, relaying).await.expect("it ends").unwrap().unwrap_err();
    assert_eq!((error.kind(), started.elapsed().as_secs()), (io::ErrorKind::TimedOut, 2 * LINGER.as_secs()));
    let mut rest = vec![];
    assert_eq!(secure.read_to_end(&mut rest).await.unwrap(), 0, "both are closed");
    drop(plain);
}

#[tokio::test(start_paused = true)]
async fn an_end_behind_bytes_that_nobody_takes_is_seen() {
    let (secure, mut plain, relaying) = between(16);
    plain.write_all(&[7; 1000]).await.unwrap();
    // Not a wait: the clock is paused.
    tokio::time::advance(LINGER * 10).await;
    assert!(!relaying.is_finished(), "both are there");
    drop(plain);
    let error = timeout(LINGER * 100, relaying).await.expect("it ends").unwrap().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    drop(secure);
}

#[tokio::test(start_paused = true)]
async fn no_more_is_taken_than_one_buffer_holds() {
    let (mut secure, mut plain, relaying) = between(1000);
    let (mut taken, most) = (0, BUFFER_BYTES + 1000 + (1 << 20));
    // The clock moves when nothing else can. What the plain socket holds is the kernel's, and bounded.
    while let Ok(count) = timeout(Duration::from_secs(1), secure.write(&[7; 1000])).await {
        taken += count.unwrap();
        assert!(taken <= most, "{taken} bytes were taken although nobody reads");
    }
    drop(secure);
    let mut passed = vec![];
    plain.read_to_end(&mut passed).await.unwrap();
    assert_eq!(passed.len(), taken, "what was taken comes before the end");
    drop(plain);
    relaying.await.unwrap().unwrap();
}

/// Both directions at once, more than any buffer holds; all of it comes before the end.
fn exchange(stream: &UnixStream, bytes: &[u8]) -> Vec<u8> {
    thread::scope(|scope| {
        let writing = scope.spawn(|| (&*stream).write_all(bytes).unwrap());
        let mut back = vec![0; bytes.len()];
        (&*stream).read_exact(&mut back).unwrap();
        writing.join().unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        assert_eq!((&*stream).read(&mut [0]).unwrap(), 0);
        back
    })
}

/// A service that speaks in plain text, behind a relay: each connection is given to `serve`. Lives as long as the test.
async fn behind(security: &Security, serve: fn(UnixStream)) -> SocketAddr {
    let mut listener = security.listen("127.0.0.1:0".parse().unwrap(), Protocol::Nbd).await.unwrap();
    let address = listener.address();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.next().await;
            let (near, far) = UnixStream::pair().unwrap();
            thread::spawn(move || serve(near));
            far.set_nonblocking(true).unwrap();
            tokio::spawn(relay(stream, tokio::net::UnixStream::from_std(far).unwrap()));
        }
    });
    address
}

/// A client's plain end.
async fn open(security: &Security, address: SocketAddr) -> io::Result<UnixStream> {
    let tunnel = security.tunnel().unwrap();
    let opened = tokio::task::spawn_blocking(move || {
        let stream = tunnel.open(TcpStream::connect(address)?, LIMIT)?;
        stream.set_read_timeout(Some(LIMIT))?;
        Ok(stream)
    });
    opened.await.unwrap()
}

fn bytes() -> Vec<u8> {
    (0..24u32 << 20).map(|at| (at ^ (at >> 11)) as u8).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_come_through_two_relays_as_they_are() {
    let security = Authority::new().member();
    let address = behind(&security, |mut stream| {
        let mut reader = stream.try_clone().unwrap();
        let _ = io::copy(&mut reader, &mut stream);
        let _ = stream.shutdown(Shutdown::Write);
    })
    .await;
    let stream = open(&security, address).await.unwrap();
    let (sent, back) = tokio::task::spawn_blocking(move || {
        let bytes = bytes();
        let back = exchange(&stream, &bytes);
        (bytes, back)
    })
    .await
    .unwrap();
    assert!(sent == back, "{} bytes came back of {}", back.len(), sent.len());
}

/// Both plain ends of a connection through two relays.
async fn both_ends() -> (UnixStream, UnixStream) {
    static SERVED: std::sync::Mutex<Option<std::sync::mpsc::Sender<UnixStream>>> = std::sync::Mutex::new(None);
    static ONE_AT_A_TIME: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
    let _one = ONE_AT_A_TIME.lock().await;
    let security = Authority::new().member();
    let (sender, served) = std::sync::mpsc::channel();
    *SERVED.lock().unwrap() = Some(sender);
    let address = behind(&security, |stream| SERVED.lock().unwrap().take().unwrap().send(stream).unwrap()).await;
    let near = open(&security, address).await.unwrap();
    let far = tokio::task::spawn_blocking(move || served.recv_timeout(LIMIT).unwrap()).await.unwrap();
    far.set_read_timeout(Some(LIMIT)).unwrap();
    (near, far)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_either_side_is_the_end_of_the_other() {
    for near_ends in [true, false] {
        let (near, far) = both_ends().await;
        let (mut ends, mut stays) = if near_ends { (near, far) } else { (far, near) };
        let read = tokio::task::spawn_blocking(move || {
            ends.write_all(b"last words").unwrap();
            drop(ends);
            let mut last = String::new();
            stays.read_to_string(&mut last).map(|_| last)
        });
        assert_eq!(read.await.unwrap().unwrap(), "last words");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_dies_in_the_middle_ends_the_plain_side_at_once() {
    let security = Authority::new().member();
    let mut listener = security.listen("127.0.0.1:0".parse().unwrap(), Protocol::Nbd).await.unwrap();
    let mut stream = open(&security, listener.address()).await.unwrap();
    let Stream::Tls(peer) = listener.next().await.0 else { panic!("plain") };
    let tokio_rustls::TlsStream::Server(mut peer) = *peer else { panic!("a client") };
    peer.write_all(b"half").await.unwrap();
    peer.flush().await.unwrap();
    let peer = cut(peer);
    let read = tokio::task::spawn_blocking(move || {
        let mut said = vec![];
        let ended = stream.read_to_end(&mut said).is_ok();
        let started = std::time::Instant::now();
        while stream.write_all(b"more").is_ok() {
            assert!(started.elapsed() < LIMIT, "it still takes what nobody will get");
            thread::park_timeout(Duration::from_millis(1)); // poll
        }
        (ended, said)
    });
    let (ended, said) = read.await.unwrap();
    assert!(ended && b"half".starts_with(&said), "{said:?}");
    drop(peer);
}

/// The connection below ends without a word of TLS, as when the process is killed.
fn cut(stream: TlsStream<tokio::net::TcpStream>) -> std::net::TcpStream {
    let stream = stream.into_inner().0.into_std().unwrap();
    stream.shutdown(Shutdown::Both).unwrap();
    stream
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_peer_is_left_in_time_and_a_stranger_is_not_believed() {
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = silent.local_addr().unwrap();
    let (member, stranger) = (Authority::new().member(), Authority::new().member());
    let tunnel = member.tunnel().unwrap();
    let opened = tokio::task::spawn_blocking(move || {
        let started = std::time::Instant::now();
        let opened = tunnel.open(TcpStream::connect(address).unwrap(), Duration::from_millis(200));
        (opened.map(drop).map_err(|error| error.kind()), started.elapsed())
    });
    let (opened, took) = timeout(LIMIT, opened).await.expect("it ends by itself").unwrap();
    assert!(opened == Err(io::ErrorKind::TimedOut) && took >= Duration::from_millis(200), "{opened:?}, {took:?}");
    let address = behind(&member, |_| {}).await;
    assert!(open(&stranger, address).await.is_err(), "it believed a server of another authority");
    // The other way round the handshake is over when it is refused.
    let strange = behind(&stranger, |_| {}).await;
    assert!(open(&member, strange).await.is_err());
}

//! Blocking connections to replicas with deadlines, for the start of an engine and for clients of its control socket.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use proto::engine::ReplicaAddress;
use proto::replica::file;
use runtime::transport::Security;
use rustix::net::RecvFlags;
use serde::{Serialize, de::DeserializeOwned};

use crate::limits;

/// Which of a replica's two services.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    Data,
    Control,
}

/// A connection of either kind.
pub enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Stream {
    /// Connects to a service of a replica. With TLS the stream is the plain end of a relay.
    pub fn connect(
        address: &ReplicaAddress,
        service: Service,
        security: &Security,
        deadline: Instant,
    ) -> io::Result<Stream> {
        Stream::connect_and_secure(address, service, security, deadline, Duration::ZERO)
    }

    /// The same, with so much more time for the handshake where there is one.
    pub fn connect_and_secure(
        address: &ReplicaAddress,
        service: Service,
        security: &Security,
        deadline: Instant,
        handshake: Duration,
    ) -> io::Result<Stream> {
        match address {
            ReplicaAddress::Directory(directory) => {
                let name = match service {
                    Service::Data => file::NBD_SOCKET,
                    Service::Control => file::CONTROL_SOCKET,
                };
                Ok(Stream::Unix(runtime::socket::connect_blocking(&directory.join(name))?))
            }
            ReplicaAddress::Tcp(address) => {
                let mut address = parse_address(address)?;
                if service == Service::Control {
                    let port = address.port().checked_add(1);
                    address.set_port(port.ok_or_else(|| invalid("the control port would be above 65535"))?);
                }
                let stream = TcpStream::connect_timeout(&address, left(deadline)?)?;
                stream.set_nodelay(true)?;
                match security.tunnel() {
                    None => Ok(Stream::Tcp(stream)),
                    Some(tunnel) => Ok(Stream::Unix(tunnel.open(stream, left(deadline + handshake)?)?)),
                }
            }
        }
    }

    /// What is read or written next must be done by then.
    pub fn set_deadline(&self, deadline: Instant) -> io::Result<()> {
        let left = Some(left(deadline)?);
        match self {
            Stream::Unix(stream) => stream.set_read_timeout(left).and_then(|()| stream.set_write_timeout(left)),
            Stream::Tcp(stream) => stream.set_read_timeout(left).and_then(|()| stream.set_write_timeout(left)),
        }
    }

    /// Sends one request and waits for its reply.
    pub fn ask<Reply: DeserializeOwned>(&mut self, request: &impl Serialize, deadline: Instant) -> io::Result<Reply> {
        self.set_deadline(deadline)?;
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        self.write_all(&line)?;
        let line = self.read_line(deadline)?;
        Ok(serde_json::from_slice(&line)?)
    }

    /// One line. What stands behind it is left for the next one.
    pub fn read_line(&mut self, deadline: Instant) -> io::Result<Vec<u8>> {
        let mut line = Vec::new();
        let mut piece = [0; 1024];
        while line.last() != Some(&b'\n') {
            self.set_deadline(deadline)?;
            let (_, seen) = rustix::net::recv(self.as_fd(), &mut piece[..], RecvFlags::PEEK)?;
            let seen = &mut piece[..seen];
            if seen.is_empty() {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the connection ended before the reply"));
            }
            let end = seen.iter().position(|byte| *byte == b'\n').map_or(seen.len(), |at| at + 1);
            self.read_exact(&mut seen[..end])?;
            line.extend_from_slice(&seen[..end]);
            if line.len() > limits::MAX_CONTROL_LINE {
                return Err(invalid("the reply is too long"));
            }
        }
        Ok(line)
    }

    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Stream::Unix(stream) => stream.as_fd(),
            Stream::Tcp(stream) => stream.as_fd(),
        }
    }

    pub fn into_socket(self) -> OwnedFd {
        match self {
            Stream::Unix(stream) => stream.into(),
            Stream::Tcp(stream) => stream.into(),
        }
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Unix(stream) => stream.read(buffer),
            Stream::Tcp(stream) => stream.read(buffer),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Unix(stream) => stream.write(buffer),
            Stream::Tcp(stream) => stream.write(buffer),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn invalid(problem: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, problem.to_owned())
}

/// Parses `ip:port`.
pub fn parse_address(address: &str) -> io::Result<SocketAddr> {
    address.parse().map_err(|_| invalid(&format!("`{address}` is not an address; `ip:port` is expected")))
}

fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::Error::from(io::ErrorKind::TimedOut)) } else { Ok(left) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_line_after_line_whatever_comes_at_once() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let mut stream = Stream::Unix(near);
        let long = "x".repeat(5000);
        far.write_all(format!("first\n{long}\nlast\nhalf").as_bytes()).unwrap();
        drop(far);
        let deadline = Instant::now() + Duration::from_secs(20);
        for expected in ["first", &long, "last"] {
            assert_eq!(stream.read_line(deadline).unwrap(), format!("{expected}\n").as_bytes());
        }
        assert_eq!(stream.read_line(deadline).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn half_a_reply_is_waited_for_until_the_deadline() {
        let (near, mut far) = UnixStream::pair().unwrap();
        far.write_all(b"half").unwrap();
        let (told, waits) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let deadline = Instant::now() + Duration::from_millis(100);
            told.send(Stream::Unix(near).read_line(deadline).map_err(|error| error.kind()))
        });
        let read = waits.recv_timeout(Duration::from_secs(20)).expect("it ends by itself");
        assert!(matches!(read, Err(io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock)), "{read:?}");
    }
}

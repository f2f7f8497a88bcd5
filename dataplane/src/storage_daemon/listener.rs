//! The socket on which a `qemu-storage-daemon` serves NBD over TCP.
//!
//! QEMU before 8.1 does not turn Nagle's algorithm off on the connections that it accepts, which holds every batch of replies
//! back for 40 ms. But Linux gives an accepted connection the options of its listening socket, so the socket is made here.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with, sockopt};

use crate::limits;

/// Listens on an address; connections wait until the daemon takes them.
pub fn listen(address: SocketAddr) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    // Not blocking: a connection may be gone again before it is accepted, and the daemon has one thread for everything.
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, SocketType::STREAM, flags, None)?;
    // The connections of the last process linger for a while.
    sockopt::set_socket_reuseaddr(&socket, true)?;
    sockopt::set_tcp_nodelay(&socket, true)?;
    // A peer that vanished without a word does not keep its place for ever. A stopped one does: its kernel still answers.
    sockopt::set_socket_keepalive(&socket, true)?;
    sockopt::set_tcp_keepidle(&socket, limits::NBD_KEEPALIVE)?;
    sockopt::set_tcp_keepintvl(&socket, limits::NBD_KEEPALIVE)?;
    sockopt::set_tcp_keepcnt(&socket, limits::NBD_KEEPALIVE_PROBES)?;
    bind(&socket, &address)?;
    // Here too and not only by the daemon: two sockets may be bound to one address, but not listen on it.
    rustix::net::listen(&socket, limits::NBD_CONNECTIONS as i32)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn a_second_listener_is_refused_and_connections_wait() {
        let listener = TcpListener::from(listen(([127, 0, 0, 1], 0).into()).unwrap());
        let address = listener.local_addr().unwrap();
        assert_eq!(listen(address).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        assert!(TcpStream::connect(address).is_ok(), "nobody accepts it yet");
    }
}

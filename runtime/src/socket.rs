//! Unix sockets below paths of any length.
//!
//! The kernel takes at most 107 bytes of path for a unix socket. A longer one is reached through a descriptor of its
//! directory: `/proc/self/fd/N/name`.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::files;

/// Longest path that the kernel takes (`sun_path` less its zero byte).
const MAX_PATH: usize = 107;
/// As the standard library has it; the kernel cuts it to its own limit.
const BACKLOG: i32 = 128;

/// A path to a socket that the kernel takes; it works as long as this value lives.
struct Reachable {
    path: PathBuf,
    _directory: Option<File>,
}

fn reachable(path: &Path) -> io::Result<Reachable> {
    if path.as_os_str().len() <= MAX_PATH {
        return Ok(Reachable { path: path.to_owned(), _directory: None });
    }
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("`{}` names no socket", path.display())));
    };
    let directory =
        std::fs::OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY | libc::O_CLOEXEC).open(parent)?;
    let path = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd())).join(name);
    Ok(Reachable { path, _directory: Some(directory) })
}

/// Connects, blocking.
pub fn connect_blocking(path: &Path) -> io::Result<UnixStream> {
    UnixStream::connect(reachable(path)?.path)
}

/// Listens; a stale socket file of an earlier process is replaced. The caller makes sure that no other process serves it.
pub fn bind_blocking(path: &Path) -> io::Result<UnixListener> {
    files::remove_if_present(path)?;
    UnixListener::bind(reachable(path)?.path)
}

/// Listens without blocking, for this user alone from the first moment; a stale socket file is replaced.
pub fn bind_private(path: &Path) -> io::Result<OwnedFd> {
    files::remove_if_present(path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // Linux gives the file the mode of the socket.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    let target = reachable(path)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(&target.path)?)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// Connects, without waiting for the listener: `WouldBlock` when too many others wait for it. The path may be on a disk that hangs.
/// Neither does the stream block.
pub fn connect_at_once(path: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    let target = reachable(path)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(&target.path)?)?;
    Ok(UnixStream::from(socket))
}

/// Connects within a tokio runtime.
pub async fn connect(path: &Path) -> io::Result<tokio::net::UnixStream> {
    let target = reachable(path)?;
    tokio::net::UnixStream::connect(&target.path).await
}

/// Listens within a tokio runtime; a stale socket file is replaced.
pub fn bind(path: &Path) -> io::Result<tokio::net::UnixListener> {
    let listener = bind_blocking(path)?;
    listener.set_nonblocking(true)?;
    tokio::net::UnixListener::from_std(listener)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn reaches_a_socket_below_a_long_path() {
        let folder = tempfile::tempdir().unwrap();
        let deep = folder.path().join("a".repeat(100)).join("b".repeat(100));
        std::fs::create_dir_all(&deep).unwrap();
        let path = deep.join("control.sock");
        let private = bind_private(&path).unwrap();
        assert!(connect_blocking(&path).is_ok());
        let waiting: Vec<_> = std::iter::from_fn(|| connect_at_once(&path).ok()).take(2 * BACKLOG as usize).collect();
        assert!(!waiting.is_empty());
        assert_eq!(connect_at_once(&path).unwrap_err().kind(), io::ErrorKind::WouldBlock, "the queue is full");
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
        drop(private);
        for _ in 0..2 {
            let listener = bind_blocking(&path).unwrap();
            let mut client = connect_blocking(&path).unwrap();
            client.write_all(b"hello").unwrap();
            drop(client);
            let mut text = String::new();
            listener.accept().unwrap().0.read_to_string(&mut text).unwrap();
            assert_eq!(text, "hello");
        }
    }
}

//! A non-blocking socket that carries lines in both directions, bounded.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use crate::limits;

/// One connection of a JSON-line protocol.
pub struct Lines {
    socket: OwnedFd,
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
}

impl AsFd for Lines {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Lines {
    pub fn new(socket: OwnedFd) -> Result<Lines, Errno> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(Lines { socket, incoming: Vec::new(), outgoing: Vec::new() })
    }

    /// Queues one line and sends what the socket takes.
    ///
    /// # Errors
    /// When the connection is broken, or the other side does not read.
    pub fn write(&mut self, value: &impl serde::Serialize) -> Result<(), String> {
        serde_json::to_writer(&mut self.outgoing, value).map_err(|error| error.to_string())?;
        self.outgoing.push(b'\n');
        if self.outgoing.len() > limits::MAX_CONTROL_BACKLOG {
            return Err("the other side does not read".into());
        }
        self.flush()
    }

    /// Sends what is queued, as much as the socket takes.
    pub fn flush(&mut self) -> Result<(), String> {
        while !self.outgoing.is_empty() {
            match send(&self.socket, &self.outgoing, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(count) => drop(self.outgoing.drain(..count)),
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.to_string()),
            }
        }
        Ok(())
    }

    /// Takes what has come; the lines that are whole.
    ///
    /// # Errors
    /// When the connection ended or broke, or a line is too long. What came before is lost then.
    pub fn read(&mut self) -> Result<Vec<Vec<u8>>, String> {
        let mut chunk = [0; 4096];
        loop {
            match recv(&self.socket, &mut chunk[..], RecvFlags::DONTWAIT) {
                Ok((_, 0)) => return Err("the connection ended".into()),
                Ok((_, count)) => self.incoming.extend_from_slice(&chunk[..count.min(4096)]),
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.to_string()),
            }
            if self.incoming.len() > limits::MAX_CONTROL_LINE {
                return Err("a line is too long".into());
            }
        }
        let mut lines = Vec::new();
        while let Some(end) = self.incoming.iter().position(|byte| *byte == b'\n') {
            let rest = self.incoming.split_off(end + 1);
            lines.push(std::mem::replace(&mut self.incoming, rest));
        }
        Ok(lines)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn takes_lines_as_they_become_whole_and_none_without_measure() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let mut lines = Lines::new(OwnedFd::from(near)).unwrap();
        far.write_all(b"one\ntw").unwrap();
        assert_eq!(lines.read().unwrap(), [b"one\n"]);
        far.write_all(b"o\n").unwrap();
        assert_eq!(lines.read().unwrap(), [b"two\n"]);
        far.set_nonblocking(true).unwrap();
        let mut sent = 0;
        let refused = loop {
            sent += far.write(&[b'x'; 4096]).unwrap();
            assert!(sent <= limits::MAX_CONTROL_LINE + 4096, "{sent} bytes were taken");
            match lines.read() {
                Ok(whole) => assert!(whole.is_empty()),
                Err(refused) => break refused,
            }
        };
        assert!(refused.contains("too long"), "{refused}");
    }

    #[test]
    fn queues_only_so_much_for_who_does_not_read() {
        let (near, _far) = UnixStream::pair().unwrap();
        let mut lines = Lines::new(OwnedFd::from(near)).unwrap();
        let line = "x".repeat(1 << 20);
        let most = limits::MAX_CONTROL_BACKLOG / line.len() + 2;
        let refused = (0..most).find_map(|_| lines.write(&line).err()).expect("it queues without end");
        assert!(refused.contains("does not read"), "{refused}");
    }
}

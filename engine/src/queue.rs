//! What waits to be sent on one socket: headers with payload in [`Buffers`], many in one `sendmsg`.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::os::fd::AsFd;

use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg};

use crate::buffers::Buffers;
use crate::core::Payload;
use crate::limits;

/// Longest header: an NBD request.
pub const HEADER: usize = 28;

struct Entry {
    /// What the sender knows it by.
    tag: u64,
    header: [u8; HEADER],
    header_length: usize,
    payload: Option<(Payload, usize)>,
}

impl Entry {
    fn len(&self) -> usize {
        self.header_length + self.payload.map_or(0, |(_, length)| length)
    }
}

/// The queue of one socket.
#[derive(Default)]
pub struct SendQueue {
    entries: VecDeque<Entry>,
    /// Bytes of the first entry that are sent.
    sent: usize,
}

impl SendQueue {
    pub fn push(&mut self, tag: u64, header: &[u8], payload: Option<(Payload, usize)>) {
        let mut entry = Entry { tag, header: [0; HEADER], header_length: header.len(), payload };
        entry.header[..header.len()].copy_from_slice(header);
        self.entries.push_back(entry);
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Whether this is not sent entirely.
    pub fn holds(&self, tag: u64) -> bool {
        self.entries.iter().any(|entry| entry.tag == tag)
    }

    /// Forgets everything; the tags of what was not sent entirely.
    pub fn clear(&mut self) -> Vec<u64> {
        self.sent = 0;
        self.entries.drain(..).map(|entry| entry.tag).collect()
    }

    /// Sends as much as the socket takes; `gone` learns the tag of each entry that is sent entirely.
    ///
    /// # Errors
    /// When the connection is broken. A full socket is no error.
    pub fn send(&mut self, socket: impl AsFd, buffers: &Buffers, mut gone: impl FnMut(u64)) -> Result<(), Errno> {
        while !self.entries.is_empty() {
            let mut parts: Vec<IoSlice<'_>> = Vec::with_capacity(2 * limits::SEND_BATCH);
            let mut skip = self.sent;
            for entry in self.entries.iter().take(limits::SEND_BATCH) {
                let payload = entry.payload.map_or(&[][..], |(payload, length)| buffers.part(payload, length));
                for part in [&entry.header[..entry.header_length], payload] {
                    let before = skip.min(part.len());
                    skip -= before;
                    if part.len() > before {
                        parts.push(IoSlice::new(&part[before..]));
                    }
                }
            }
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match sendmsg(&socket, &parts, &mut SendAncillaryBuffer::default(), flags) {
                Ok(count) => self.sent += count,
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error),
            }
            while let Some(entry) = self.entries.front() {
                if self.sent < entry.len() {
                    break;
                }
                self.sent -= entry.len();
                gone(entry.tag);
                self.entries.pop_front();
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn sends_everything_in_order_through_a_socket_that_takes_little() {
        let (near, mut far) = UnixStream::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        let mut buffers = Buffers::default();
        let mut queue = SendQueue::default();
        let mut expected = Vec::new();
        for tag in 0..100u8 {
            let buffer = buffers.get(1 << 20);
            let length = usize::from(tag) * 1000;
            let payload = Payload { buffer, start: 7 };
            buffers.part_mut(payload, length).fill(tag);
            queue.push(u64::from(tag), &[tag; 28], Some((payload, length)));
            expected.extend(std::iter::repeat_n(tag, 28 + length));
        }
        let total = expected.len();
        let reader = std::thread::spawn(move || {
            let mut received = vec![0; total];
            far.read_exact(&mut received).unwrap();
            received
        });
        let mut gone = Vec::new();
        while !queue.is_empty() {
            queue.send(&near, &buffers, |tag| gone.push(tag)).unwrap();
        }
        assert_eq!(gone, (0..100).collect::<Vec<_>>());
        assert!(reader.join().unwrap() == expected);
    }
}

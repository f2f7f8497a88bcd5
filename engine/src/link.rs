//! The data connection to one replica: requests out in batches, replies in without copying large payloads.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};

use crate::buffers::Buffers;
use crate::core::{Core, Event, Payload, Transfer};
use crate::limits;
use crate::nbd::wire;
use crate::queue::SendQueue;

/// A read reply whose bytes are still coming.
struct Receiving {
    cookie: u64,
    payload: Payload,
    length: usize,
    done: usize,
}

/// One connection in transmission phase.
pub struct Link {
    socket: OwnedFd,
    queue: SendQueue,
    inbox: Box<[u8]>,
    have: usize,
    receiving: Option<Receiving>,
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Link {
    /// Takes over a socket on which an export was opened.
    pub fn new(socket: OwnedFd) -> Result<Link, Errno> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        // Best effort: it saves wake-ups for large writes.
        let _ = rustix::net::sockopt::set_socket_send_buffer_size_force(&socket, limits::SEND_BUFFER_BYTES);
        let inbox = vec![0; limits::RECEIVE_BYTES].into_boxed_slice();
        Ok(Link { socket, queue: SendQueue::default(), inbox, have: 0, receiving: None })
    }

    pub fn push(&mut self, transfer: &Transfer) {
        let (command, flags) = wire::command(transfer.operation);
        let Transfer { cookie, offset, length, payload, .. } = *transfer;
        let header = wire::Request { flags, command, cookie, offset, length }.encode();
        self.queue.push(cookie, &header, payload.map(|payload| (payload, length as usize)));
    }

    /// Sends what is queued, as much as the socket takes.
    pub fn send(&mut self, buffers: &Buffers) -> Result<(), Errno> {
        if self.queue.is_empty() {
            return Ok(());
        }
        self.queue.send(&self.socket, buffers, |_| {})
    }

    /// Takes what has come and passes each reply to the core.
    ///
    /// # Errors
    /// A sentence when the connection ended or the replica breaks the protocol.
    pub fn receive(
        &mut self,
        replica: usize,
        core: &mut Core,
        buffers: &mut Buffers,
        now: Duration,
    ) -> Result<(), String> {
        loop {
            let room = match &self.receiving {
                Some(r) => &mut buffers.part_mut(r.payload, r.length)[r.done..],
                None => &mut self.inbox[self.have..],
            };
            let offered = room.len();
            let count = match recv(&self.socket, room, RecvFlags::DONTWAIT) {
                Ok((_, 0)) => return Err("it ended the connection".into()),
                Ok((_, count)) => count.min(offered),
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => continue,
                Err(error) => return Err(format!("the connection broke ({error})")),
            };
            if let Some(receiving) = &mut self.receiving {
                receiving.done += count;
                if receiving.done == receiving.length {
                    let cookie = receiving.cookie;
                    self.receiving = None;
                    core.handle(now, Event::Reply { replica, cookie, failure: None });
                }
            } else {
                self.have += count;
                self.take_replies(replica, core, buffers, now)?;
            }
            if !core.members().contains(replica) {
                return Ok(());
            }
            if count < offered && self.receiving.is_none() {
                // The socket is empty, or a new event will come.
                return Ok(());
            }
        }
    }

    fn take_replies(
        &mut self,
        replica: usize,
        core: &mut Core,
        buffers: &mut Buffers,
        now: Duration,
    ) -> Result<(), String> {
        let mut at = 0;
        while self.receiving.is_none() && self.have - at >= wire::REPLY_LENGTH {
            let (error, cookie) =
                wire::parse_reply(&self.inbox[at..self.have]).ok_or("it sent something that is no NBD reply")?;
            at += wire::REPLY_LENGTH;
            // The buffer of a request that is not sent entirely must not be given away.
            if self.queue.holds(cookie) {
                return Err("it answered a request before it had received it".into());
            }
            let place = core.expected(replica, cookie);
            let place = place.map_err(|_| "it answered a request that it was not asked")?;
            let failure = wire::failure(error);
            match place {
                Some((payload, length)) if failure.is_none() => {
                    let here = length.min(self.have - at);
                    buffers.part_mut(payload, length)[..here].copy_from_slice(&self.inbox[at..at + here]);
                    at += here;
                    if here < length {
                        self.receiving = Some(Receiving { cookie, payload, length, done: here });
                        break;
                    }
                }
                _ => {}
            }
            core.handle(now, Event::Reply { replica, cookie, failure });
            if !core.members().contains(replica) {
                return Ok(());
            }
        }
        self.inbox.copy_within(at..self.have, 0);
        self.have -= at;
        Ok(())
    }
}

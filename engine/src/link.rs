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

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::core::{Failure, Operation, Options, Output, Set, Submission};

    const BYTES: usize = 512;

    /// A request's tag and how it ended.
    type Completed = (u64, Result<(), Failure>);

    /// One replica that was asked for a read, a write and a flush, and what it says.
    struct World {
        link: Link,
        core: Core,
        buffers: Buffers,
        far: UnixStream,
        cookies: Vec<u64>,
        read: Payload,
    }

    impl World {
        fn new(sent: bool) -> World {
            let mut buffers = Buffers::default();
            let mut core = Core::new(Options {
                size_bytes: 1 << 20,
                generation: 1,
                replicas: 1,
                members: Set::first(1),
                read_from: None,
                compare: false,
                replica_timeout: Duration::from_secs(8),
                no_replica_hold: Duration::from_secs(8),
                scratch: vec![buffers.get(1)],
                compare_step_bytes: 1 << 20,
                zero_piece_bytes: 1 << 20,
            });
            let mut payload = || Some(Payload { buffer: buffers.get(BYTES), start: 0 });
            let (read, write) = (payload(), payload());
            for (tag, operation, payload) in
                [(0, Operation::Read, read), (1, Operation::Write, write), (2, Operation::Flush, None)]
            {
                let length = if payload.is_some() { BYTES as u64 } else { 0 };
                let submission = Submission { tag, operation, offset: tag * BYTES as u64, length, payload };
                core.handle(Duration::ZERO, Event::Submit(submission));
            }
            let (near, far) = UnixStream::pair().unwrap();
            let mut link = Link::new(OwnedFd::from(near)).unwrap();
            let (mut outputs, mut cookies) = (vec![], vec![]);
            core.take_outputs(&mut outputs);
            for output in outputs {
                if let Output::Send(transfer) = output {
                    cookies.push(transfer.cookie);
                    link.push(&transfer);
                }
            }
            assert_eq!(cookies.len(), 3);
            if sent {
                link.send(&buffers).unwrap();
            }
            World { link, core, buffers, far, cookies, read: read.unwrap() }
        }

        /// Which requests ended by what the replica says.
        fn says(&mut self, bytes: &[u8]) -> Result<Vec<Completed>, String> {
            self.far.write_all(bytes).unwrap();
            self.link.receive(0, &mut self.core, &mut self.buffers, Duration::ZERO)?;
            let mut outputs = vec![];
            self.core.take_outputs(&mut outputs);
            let completed = outputs.into_iter().filter_map(|output| match output {
                Output::Complete { tag, result } => Some((tag, result)),
                _ => None,
            });
            Ok(completed.collect())
        }
    }

    #[test]
    fn a_read_ends_when_all_of_its_bytes_are_there() {
        let mut world = World::new(true);
        let header = wire::encode_reply(world.cookies[0], 0);
        for part in [&header[..7], &header[7..], &[7; 500]] {
            assert_eq!(world.says(part), Ok(vec![]));
        }
        let rest = [&[7; 12][..], &wire::encode_reply(world.cookies[1], 0)].concat();
        assert_eq!(world.says(&rest), Ok(vec![(0, Ok(())), (1, Ok(()))]));
        assert_eq!(world.buffers.part_mut(world.read, BYTES), [7; BYTES]);
    }

    #[test]
    fn an_error_carries_no_bytes_and_is_no_success() {
        let mut world = World::new(true);
        let replies = [wire::encode_reply(world.cookies[0], 5), wire::encode_reply(world.cookies[2], 0)].concat();
        assert_eq!(world.says(&replies), Ok(vec![(0, Err(Failure::Io)), (2, Ok(()))]));
    }

    #[test]
    fn a_replica_that_breaks_the_protocol_is_left() {
        let whole = |world: &World| [&wire::encode_reply(world.cookies[0], 0)[..], &[7; BYTES]].concat();
        type Says = fn(&World) -> Vec<u8>;
        let cases: [(&str, Says); 5] = [
            ("no NBD reply", |_| vec![0; 16]),
            ("not asked", |world| wire::encode_reply(world.cookies[2] ^ 1 << 40, 0).to_vec()),
            ("not asked", |world| wire::encode_reply(world.cookies[2], 0).repeat(2)),
            ("not asked", |_| wire::encode_reply(u64::MAX, 0).to_vec()),
            // More bytes than were asked for.
            ("no NBD reply", |world| [&wire::encode_reply(world.cookies[0], 0)[..], &[7; BYTES + 16]].concat()),
        ];
        for (why, says) in cases {
            let mut world = World::new(true);
            let bytes = says(&world);
            let said = world.says(&bytes).unwrap_err();
            assert!(said.contains(why), "{said} should contain {why}");
        }
        let mut world = World::new(false);
        let bytes = whole(&world);
        let said = world.says(&bytes).unwrap_err();
        assert!(said.contains("before it had received it"), "{said}: its buffer would be given away while it is sent");
        let mut world = World::new(true);
        world.far.shutdown(std::net::Shutdown::Write).unwrap();
        let said = world.link.receive(0, &mut world.core, &mut world.buffers, Duration::ZERO).unwrap_err();
        assert!(said.contains("ended the connection"), "{said}");
    }
}

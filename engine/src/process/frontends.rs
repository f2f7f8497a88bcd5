//! What clients want: requests from the kernel and from NBD clients, and the answers to them.

use std::os::fd::OwnedFd;

use rustix::io::Errno;
use tracing::{info, warn};

use super::engine::{Engine, Origin, Source};
use super::nbd_frontend::{Arrived, Session};
use crate::buffers::POOLED_BYTES;
use crate::core::{BufferId, Event, Failure, Operation, Payload, Submission};
use crate::error::EngineError;
use crate::fuse::wire;
use crate::limits;
use crate::nbd::server::Handshake;

fn errno(failure: Failure) -> i32 {
    match failure {
        Failure::Io => libc::EIO,
        Failure::NoSpace => libc::ENOSPC,
        Failure::Invalid => libc::EINVAL,
    }
}

impl Engine {
    fn submit(&mut self, origin: Origin, operation: Operation, offset: u64, length: u64, payload: Option<Payload>) {
        let tag = self.free_tags.pop().unwrap_or(self.origins.len());
        if tag == self.origins.len() {
            self.origins.push(Some(origin));
        } else {
            self.origins[tag] = Some(origin);
        }
        let submission = Submission { tag: tag as u64, operation, offset, length, payload };
        self.core.handle(self.now(), Event::Submit(submission));
    }

    /// Reads what the kernel wants, up to a batch.
    pub(super) fn take_fuse_requests(&mut self) -> Result<(), EngineError> {
        for _ in 0..limits::FUSE_BATCH {
            let Some(fuse) = &self.fuse else { return Ok(()) };
            match rustix::io::read(fuse, self.buffers.bytes_mut(self.intake)) {
                Ok(count) => self.take_fuse_request(count),
                Err(Errno::AGAIN) => return Ok(()),
                // The request was taken back meanwhile.
                Err(Errno::NOENT | Errno::INTR) => {}
                Err(Errno::NODEV | Errno::CONNABORTED) => {
                    self.volume_unmounted();
                    return Ok(());
                }
                Err(error) => return Err(EngineError::Fuse { source: error.into() }),
            }
        }
        Ok(())
    }

    fn take_fuse_request(&mut self, count: usize) {
        let message = &self.buffers.bytes(self.intake)[..count];
        let Some((unique, request)) = wire::parse(message) else {
            return warn!(count, "the kernel sent a request that is cut short");
        };
        let size = self.config.size_bytes;
        let fuse_origin = |operation, length, buffer| Origin::Fuse { unique, operation, length, buffer };
        match request {
            wire::Request::Read { offset, length } => {
                // A read across the end is cut; one behind it gives nothing.
                let length = u64::from(length).min(size.saturating_sub(offset)).min(limits::FUSE_MAX_IO as u64);
                let buffer = self.buffers.get(POOLED_BYTES);
                let payload = Some(Payload { buffer, start: wire::OUT_HEADER });
                let origin = fuse_origin(Operation::Read, length as u32, Some(buffer));
                self.submit(origin, Operation::Read, offset.min(size), length, payload);
            }
            wire::Request::Write { offset, length } => {
                let buffer = self.take_written(count);
                let payload = Some(Payload { buffer, start: wire::WRITE_DATA });
                let origin = fuse_origin(Operation::Write, length, Some(buffer));
                self.submit(origin, Operation::Write, offset, u64::from(length), payload);
            }
            wire::Request::Flush => {
                self.submit(fuse_origin(Operation::Flush, 0, None), Operation::Flush, 0, 0, None);
            }
            wire::Request::Zero { offset, length, allocate } => {
                let operation = Operation::Zero { allocate };
                self.submit(fuse_origin(operation, 0, None), operation, offset, length, None);
            }
            wire::Request::Other { opcode } => {
                let repeats = wire::offers_resend(message);
                let reply = wire::answer(message, unique, opcode, size);
                if opcode == wire::INIT {
                    // Before the answer: the kernel sends nothing that could be lost until it has that.
                    self.note_repeats(repeats && self.config.replace_engine);
                }
                if let Some(reply) = reply {
                    self.reply_fuse(&reply);
                }
            }
        }
    }

    /// The request that was just read, in a buffer of its own. A short one is copied: that costs less than another buffer of the
    /// longest request's size in memory.
    fn take_written(&mut self, count: usize) -> BufferId {
        if count <= limits::COPIED_REQUEST_BYTES {
            let buffer = self.buffers.get(POOLED_BYTES);
            self.buffers.copy(self.intake, buffer, count);
            buffer
        } else {
            let next = self.buffers.get_resident();
            std::mem::replace(&mut self.intake, next)
        }
    }

    /// The kernel's refusal (the request was interrupted, the volume unmounted) is of no interest.
    fn reply_fuse(&self, reply: &[u8]) {
        if let Some(fuse) = &self.fuse {
            let _ = rustix::io::write(fuse, reply);
        }
    }

    /// Asks for what the last engine had taken and not answered.
    pub(super) fn resend(&mut self) {
        let Some(fuse) = &self.fuse else { return };
        match rustix::io::write(fuse, &wire::resend_notification()) {
            Ok(_) => info!(volume = %self.config.volume, "unanswered requests of the last engine are repeated"),
            // Kernels before 6.9: those requests wait until the connection is aborted.
            Err(error) => warn!(volume = %self.config.volume, %error, "the kernel cannot repeat unanswered requests"),
        }
    }

    pub(super) fn complete(&mut self, tag: u64, result: Result<(), Failure>) {
        let origin = self.origins[tag as usize].take().expect("the core completes each request once");
        self.free_tags.push(tag as usize);
        match origin {
            Origin::Fuse { unique, operation, length, buffer } => {
                match (result, operation, buffer) {
                    (Ok(()), Operation::Read, Some(id)) => {
                        let reply = &mut self.buffers.bytes_mut(id)[..wire::OUT_HEADER + length as usize];
                        wire::finish_reply(reply, unique);
                        let reply = &self.buffers.bytes(id)[..wire::OUT_HEADER + length as usize];
                        self.reply_fuse(reply);
                    }
                    (Ok(()), Operation::Write, _) => self.reply_fuse(&wire::write_reply(unique, length)),
                    (Ok(()), ..) => self.reply_fuse(&wire::error_reply(unique, 0)),
                    (Err(failure), ..) => self.reply_fuse(&wire::error_reply(unique, errno(failure))),
                }
                if let Some(buffer) = buffer {
                    self.buffers.put(buffer);
                }
            }
            Origin::Nbd { session, serial, request } => {
                let client = self.nbd_clients[session].as_mut().filter(|client| client.serial == serial);
                let unused = match client {
                    Some(client) => client.answer(&request, result),
                    None => request.buffer,
                };
                if let Some(buffer) = unused {
                    self.buffers.put(buffer);
                }
            }
        }
    }

    pub(super) fn accept_nbd_clients(&mut self) {
        while let Ok((stream, _)) = self.nbd_listener.accept() {
            let place = self.nbd_clients.iter().position(Option::is_none).unwrap_or(self.nbd_clients.len());
            if place >= limits::MAX_NBD_CLIENTS {
                warn!(volume = %self.config.volume, "too many NBD clients; one was turned away");
                continue;
            }
            self.next_serial += 1;
            let Ok(session) = Session::new(OwnedFd::from(stream), self.next_serial) else { continue };
            if self.register(&session, Source::NbdClient(place)).is_err() {
                continue;
            }
            if place == self.nbd_clients.len() {
                self.nbd_clients.push(None);
            }
            self.nbd_clients[place] = Some(session);
        }
    }

    pub(super) fn take_nbd_requests(&mut self, index: usize) {
        let Some(session) = self.nbd_clients.get_mut(index).and_then(Option::as_mut) else { return };
        let mut arrived = Vec::new();
        let handshake = Handshake { export: &self.config.volume, size_bytes: self.config.size_bytes };
        let alive = session.receive(&handshake, &mut self.buffers, &mut arrived);
        let serial = session.serial;
        for request in arrived {
            self.submit_nbd(index, serial, request);
        }
        if alive.is_err() {
            self.close_nbd(index);
        }
    }

    fn submit_nbd(&mut self, session: usize, serial: u64, request: Arrived) {
        let Arrived { operation, offset, length, buffer, .. } = request;
        if matches!(operation, Operation::Write | Operation::Zero { .. }) && !self.nbd_changed {
            // The kernel repeats its unanswered requests for a next engine, an NBD client does not.
            self.nbd_changed = true;
            self.set_may_differ(true);
        }
        let payload = buffer.map(|buffer| Payload { buffer, start: 0 });
        self.submit(Origin::Nbd { session, serial, request }, operation, offset, length, payload);
    }

    /// Sends replies; a client that had reached its limit may go on.
    pub(super) fn send_nbd_replies(&mut self) {
        for index in 0..self.nbd_clients.len() {
            let Some(session) = &mut self.nbd_clients[index] else { continue };
            let alive = session.send(&mut self.buffers);
            if alive.is_err() || session.is_over() {
                self.close_nbd(index);
            } else {
                self.take_nbd_requests(index);
            }
        }
    }

    fn close_nbd(&mut self, index: usize) {
        if let Some(session) = self.nbd_clients[index].take() {
            session.close(&mut self.buffers);
        }
    }
}

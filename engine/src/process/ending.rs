//! The control socket and the ways to the end: a request, a signal, an unmount by somebody else.

use std::os::fd::OwnedFd;
use std::sync::mpsc;
use std::thread;

use proto::engine::{Reply, Request};
use tracing::{error, info, warn};

use super::control::Client;
use super::engine::{Asker, Engine, Source, Unmounting};
use crate::core::Event;
use crate::error::{EngineError, NOT_REPLACEABLE};
use crate::fuse;
use crate::limits;

impl Engine {
    pub(super) fn accept_control_clients(&mut self) {
        while let Ok((stream, _)) = self.control_listener.accept() {
            let place = self.control_clients.iter().position(Option::is_none).unwrap_or(self.control_clients.len());
            if place >= limits::MAX_CONTROL_CLIENTS {
                warn!(volume = %self.config.volume, "too many control clients; one was turned away");
                continue;
            }
            self.next_serial += 1;
            let Ok(client) = Client::new(OwnedFd::from(stream), self.next_serial) else { continue };
            if self.register(&client, Source::ControlClient(place)).is_err() {
                continue;
            }
            if place == self.control_clients.len() {
                self.control_clients.push(None);
            }
            self.control_clients[place] = Some(client);
        }
    }

    pub(super) fn take_control_requests(&mut self, index: usize) {
        let Some(client) = self.control_clients.get_mut(index).and_then(Option::as_mut) else { return };
        let serial = client.serial;
        let requests = match client.progress() {
            Ok(requests) => requests,
            Err(_) => return self.control_clients[index] = None,
        };
        for request in requests {
            match request {
                Ok(Request::Status) => {
                    let status = self.status();
                    self.reply_to(index, serial, &Reply::Status(status));
                }
                Ok(Request::Watch) => {
                    let status = self.status();
                    if let Some(client) = &mut self.control_clients[index] {
                        client.begin_watch();
                        if client.tell(&status).is_err() {
                            self.control_clients[index] = None;
                        }
                    }
                }
                Ok(Request::Shutdown) => self.begin_shutdown(Asker::Client { index, serial }),
                Ok(Request::HandOver) => self.begin_hand_over(Asker::Client { index, serial }),
                Err(message) => self.reply_to(index, serial, &Reply::Refused { message }),
            }
        }
    }

    fn reply_to(&mut self, index: usize, serial: u64, reply: &Reply) {
        let Some(place) = self.control_clients.get_mut(index) else { return };
        if let Some(client) = place.as_mut().filter(|client| client.serial == serial)
            && client.reply(reply).is_err()
        {
            *place = None;
        }
    }

    fn answer_asker(&mut self, asker: &Asker, reply: &Reply) {
        match (asker, reply) {
            (Asker::Client { index, serial }, reply) => self.reply_to(*index, *serial, reply),
            (Asker::Signal, Reply::Refused { message }) => {
                warn!(volume = %self.config.volume, message, "signal ignored")
            }
            (Asker::Signal, _) => {}
        }
    }

    pub(super) fn tell_watchers(&mut self) {
        let status = self.status();
        for place in &mut self.control_clients {
            if let Some(client) = place
                && client.tell(&status).is_err()
            {
                *place = None;
            }
        }
    }

    pub(super) fn take_signal(&mut self) {
        let mut information = [0; 128];
        if rustix::io::read(&self.signals, &mut information).is_ok() {
            self.begin_shutdown(Asker::Signal);
        }
    }

    /// Unmounting is the question whether the volume is in use: the kernel refuses it while anybody has the file open.
    fn begin_shutdown(&mut self, asker: Asker) {
        if self.nbd_clients.iter().flatten().any(|session| session.uses_export()) {
            let message = format!(
                "volume `{}` is in use by an NBD client on `{}`; end that first",
                self.config.volume,
                self.config.nbd_socket.display()
            );
            return self.answer_asker(&asker, &Reply::Refused { message });
        }
        if self.fuse.is_none() {
            return self.askers.push(asker);
        }
        if let Some(unmounting) = &mut self.unmounting {
            return unmounting.askers.push(asker);
        }
        let (sender, result) = mpsc::channel();
        let file = self.config.mount_file.clone();
        let done = self.unmounted.try_clone();
        self.unmounting = Some(Unmounting { result, askers: vec![asker] });
        let work = move || {
            let _ = sender.send(fuse::mount::unmount_if_unused(&file));
            if let Ok(done) = done {
                let _ = rustix::io::write(&done, &1u64.to_ne_bytes());
            }
        };
        if let Err(error) = thread::Builder::new().name("unmount".into()).spawn(work) {
            let message = format!("cannot start a thread to unmount: {error}; try again");
            if let Some(unmounting) = self.unmounting.take() {
                unmounting.askers.iter().for_each(|asker| {
                    self.answer_asker(asker, &Reply::Refused { message: message.clone() });
                });
            }
        }
    }

    pub(super) fn take_unmount_result(&mut self) {
        let _ = rustix::io::read(&self.unmounted, &mut [0; 8]);
        let Some(Unmounting { result, askers }) = self.unmounting.take() else { return };
        let message = match result.recv() {
            Ok(Ok(true)) => {
                self.askers.extend(askers);
                return self.volume_unmounted();
            }
            Ok(Ok(false)) => format!(
                "volume `{}` is in use: something has `{}` open, such as a loop device; detach that first",
                self.config.volume,
                self.config.mount_file.display()
            ),
            Ok(Err(error)) => format!("cannot unmount `{}`: {error}", self.config.mount_file.display()),
            Err(_) => "the attempt to unmount ended without a result; try again".to_owned(),
        };
        for asker in &askers {
            self.answer_asker(asker, &Reply::Refused { message: message.clone() });
        }
    }

    pub(super) fn note_repeats(&mut self, repeats: bool) {
        if let Err(error) = self.life.set_repeats(repeats) {
            // The holder then tries a next engine, as on a new kernel: requests wait rather than fail.
            error!(volume = %self.config.volume, %error, "cannot note for the holder whether the kernel repeats requests");
        }
    }

    /// Why the next engine might not be able to go on.
    fn refuse_hand_over(&self) -> Option<String> {
        let volume = &self.config.volume;
        if self.fuse.is_none() || self.unmounting.is_some() || !self.askers.is_empty() {
            Some(format!("volume `{volume}` is being detached; its next attachment starts the installed version"))
        } else if self.handing_over.is_some() {
            Some(format!("the engine of volume `{volume}` is being replaced already"))
        } else if let Some(faulted) = self.core.faulted() {
            Some(format!("volume `{volume}` is faulted ({faulted}); a new engine would not find a replica either"))
        } else if self.core.is_fencing() {
            Some(format!("volume `{volume}` is dropping a replica at this moment; ask again when that is done"))
        } else if !matches!(self.life.repeats(), Ok(Some(true))) {
            Some(format!(
                "the engine of volume `{volume}` cannot be replaced while it is attached: {NOT_REPLACEABLE}; detach the volume and attach it again"
            ))
        } else if self.nbd_clients.iter().flatten().any(|session| session.uses_export()) {
            let socket = self.config.nbd_socket.display();
            Some(format!(
                "volume `{volume}` is in use by an NBD client on `{socket}`, which would be cut off; end that first"
            ))
        } else {
            None
        }
    }

    /// Takes nothing from the kernel any more; when what is in flight is answered, the next engine goes on.
    fn begin_hand_over(&mut self, asker: Asker) {
        if let Some(message) = self.refuse_hand_over() {
            return self.answer_asker(&asker, &Reply::Refused { message });
        }
        if let Some(device) = &self.fuse {
            self.unregister(device);
        }
        self.handing_over = Some(asker);
    }

    /// Nothing is in flight: the end of this engine, which is not the end of the volume.
    pub(super) fn hand_over(&mut self) -> EngineError {
        if let Some(asker) = self.handing_over.take() {
            self.answer_asker(&asker, &Reply::Done);
        }
        EngineError::HandedOver { volume: self.config.volume.clone() }
    }

    /// Nothing can come from the kernel any more: finish.
    pub(super) fn volume_unmounted(&mut self) {
        if let Some(device) = self.fuse.take() {
            // The holder has the connection as well, so closing it here does not end its events.
            self.unregister(&device);
            info!(volume = %self.config.volume, "volume unmounted, ending");
            self.core.handle(self.now(), Event::Shutdown);
        }
    }

    /// Tells those who asked, and takes the sockets away.
    pub(super) fn say_good_bye(&mut self) {
        let _ = runtime::files::remove_if_present(&self.config.control_socket);
        let _ = runtime::files::remove_if_present(&self.config.nbd_socket);
        // The kernel may tell about the unmount before the thread does that asked for it.
        let unmounting = self.unmounting.take().map(|unmounting| unmounting.askers).unwrap_or_default();
        for asker in std::mem::take(&mut self.askers).into_iter().chain(unmounting) {
            self.answer_asker(&asker, &Reply::Done);
        }
    }
}

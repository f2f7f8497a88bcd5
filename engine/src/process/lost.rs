//! A replica is lost: before the engine goes on without it, it asks whether a newer attachment has taken it.
//!
//! Then this engine must not acknowledge anything more: nobody would look for it on the replicas that are left here. Until the
//! answer has come the replica counts as a member, so no change is acknowledged, and no fence completes, without it.

use std::time::Instant;

use api::generations::attachment_of;
use proto::replica::Request;

use super::choice::superseded;
use super::engine::{Engine, watch};
use super::replica_control::Answer;
use crate::core::{ControlReply, Event};
use crate::error::EngineError;
use crate::limits;

/// What the core is told unless a newer attachment has the replica.
pub(super) struct Lost {
    events: Vec<Event>,
    since: Instant,
}

impl Engine {
    /// A replica broke its connection, or refused something.
    pub(super) fn lose(&mut self, replica: usize, event: Event) {
        if matches!(event, Event::ConnectionLost { .. }) {
            // Nothing comes over it any more; what is to be sent waits for the drop.
            self.links[replica] = None;
        }
        if let Some(lost) = &mut self.lost[replica] {
            return lost.events.push(event);
        }
        // When its process is gone, its control connection is too; a new one is not waited for.
        let control = self.controls[replica].as_mut().filter(|control| control.descriptor().is_some());
        match control.map(|control| control.send(&Request::Status)) {
            Some(Ok(())) => self.lost[replica] = Some(Lost { events: vec![event], since: Instant::now() }),
            _ => self.core.handle(self.now(), event),
        }
    }

    /// The replica is not taken, or does not tell.
    fn give_up(&mut self, replica: usize) {
        let now = self.now();
        for event in self.lost[replica].take().map(|lost| lost.events).unwrap_or_default() {
            self.core.handle(now, event);
        }
    }

    /// How long a replica that is asked may keep the others waiting.
    pub(super) fn end_overdue_questions(&mut self) {
        for replica in 0..self.lost.len() {
            if self.lost[replica].as_ref().is_some_and(|lost| lost.since.elapsed() >= limits::ASK_LIMIT) {
                self.give_up(replica);
            }
        }
    }

    pub(super) fn take_control_replies(&mut self, replica: usize) -> Result<(), EngineError> {
        let Some(control) = &mut self.controls[replica] else { return Ok(()) };
        let answers = match control.progress() {
            Ok(answers) => answers,
            Err(reason) => {
                self.give_up(replica);
                self.core.handle(self.now(), Event::ControlLost { replica, reason });
                return Ok(());
            }
        };
        for answer in answers {
            match answer {
                Answer::Control(reply @ ControlReply::Refused(_)) => {
                    self.lose(replica, Event::ControlReply { replica, reply });
                }
                Answer::Control(reply) => self.core.handle(self.now(), Event::ControlReply { replica, reply }),
                Answer::Generation(generation) => {
                    let (newer, own) = (attachment_of(generation), self.config.attachment);
                    if newer > own {
                        let reason = superseded(newer, own);
                        return Err(EngineError::Superseded { volume: self.config.volume.clone(), reason });
                    }
                    self.give_up(replica);
                }
            }
        }
        let Some(control) = &mut self.controls[replica] else { return Ok(()) };
        let restored = control.restore();
        if let Err(reason) = restored.and_then(|new| watch(&self.epoll, replica, control, new)) {
            self.give_up(replica);
            self.core.handle(self.now(), Event::ConnectionLost { replica, reason });
        }
        Ok(())
    }
}

//! How an engine notices that replicas are lost, and what it asks before it goes on without them.

use api::generations::attachment_of;
use engine::core::{Event, Set};
use engine::process::choice::superseded;
use proto::replica::Request;

use super::begin::Stage;
use super::{Happening, World, is_up};

const ASK_LIMIT: u64 = engine::limits::ASK_LIMIT.as_micros() as u64;

impl World {
    /// Engines notice the end of a replica process, over both connections.
    pub(super) fn tell_lost(&mut self, replica: usize, incarnation: u32) {
        for a in 0..self.attachments.len() {
            let Some(life) = self.attachments[a].life.as_ref().map(|life| life.id) else { continue };
            let (from, to) = (self.node_of(replica), self.attachments[a].node);
            let at = self.arrival(from, to, 0);
            self.at(at, Happening::DataLost { life, replica, incarnation });
            let at = self.arrival(from, to, 0);
            self.at(at, Happening::ControlLost { life, replica, incarnation });
        }
    }

    pub(super) fn tell_data_lost(&mut self, life: u32, replica: usize) {
        let Some(a) = self.of_life(life) else { return };
        let at = self.arrival(self.node_of(replica), self.attachments[a].node, 0);
        let incarnation = self.replicas[replica].incarnation;
        self.at(at, Happening::DataLost { life, replica, incarnation });
    }

    /// What ended between the connection and the beginning of service is noticed now.
    pub(super) fn notice_losses(&mut self, a: usize) {
        let id = self.attachments[a].life.as_ref().expect("it serves").id;
        for place in 0..self.attachments[a].config.replicas.len() {
            let replica = self.attachments[a].config.replicas[place];
            let Some(incarnation) = self.attachments[a].serving().and_then(|s| s.links[place]) else { continue };
            if self.replicas[replica].client != Some(id) {
                self.after(1, Happening::DataLost { life: id, replica, incarnation });
            }
        }
    }

    pub(super) fn data_lost(&mut self, life: u32, replica: usize, incarnation: u32) {
        let Some(place) = self.of_life(life).and_then(|a| self.place(a, replica)) else { return };
        let Some((_, serving)) = self.serving(life) else { return };
        if serving.links[place] == Some(incarnation) {
            self.lose(life, place, Event::ConnectionLost { replica: place, reason: "it ended the connection".into() });
        }
    }

    pub(super) fn control_lost(&mut self, life: u32, replica: usize, incarnation: u32) {
        let Some(a) = self.of_life(life) else { return };
        let Some(place) = self.place(a, replica) else { return };
        let engine = self.attachments[a].life.as_mut().expect("it is there");
        if engine.controls[place] != Some(incarnation) {
            return;
        }
        match &mut engine.stage {
            Stage::Beginning(_) => {
                // Whatever it was asked in this round is not answered.
                self.lose_answer(a, place);
            }
            Stage::Serving(serving) => {
                engine.controls[place] = None;
                // The end of an idle connection is no error.
                if std::mem::take(&mut serving.unanswered[place]) > 0 {
                    let reason = "it ended the connection".to_owned();
                    self.give_up(life, place);
                    self.tell(life, Event::ControlLost { replica: place, reason });
                }
            }
        }
    }

    /// A replica broke its connection or refused something: as `engine::process::lost` does, it is asked before it is dropped.
    pub(super) fn lose(&mut self, life: u32, place: usize, event: Event) {
        let now = self.now;
        let Some((a, serving)) = self.serving(life) else { return };
        serving.lost[place].push(event);
        if serving.lost[place].len() > 1 {
            return;
        }
        if self.attachments[a].life.as_ref().is_none_or(|life| life.controls[place].is_none()) {
            return self.give_up(life, place);
        }
        let Some((_, serving)) = self.serving(life) else { return };
        serving.unanswered[place] += 1;
        serving.asked_at[place] = now;
        self.send_control(a, 0, place, Request::Status);
        self.after(ASK_LIMIT, Happening::AskOver { life, place });
    }

    /// The replica is not taken by a newer attachment, or does not tell.
    pub(super) fn give_up(&mut self, life: u32, place: usize) {
        let Some((_, serving)) = self.serving(life) else { return };
        for event in std::mem::take(&mut serving.lost[place]) {
            self.tell(life, event);
        }
    }

    /// Nobody goes on without a replica that a newer attachment has taken, when that one can say so.
    pub(super) fn check_drop(&mut self, a: usize, place: usize, reason: &str) {
        let attachment = &self.attachments[a];
        let replica = &self.replicas[attachment.config.replicas[place]];
        let Some((life, serving)) = attachment.life.as_ref().zip(attachment.serving()) else { return };
        let is_taken = attachment_of(replica.record.generation) > attachment.config.attachment;
        let can_say = life.controls[place] == Some(replica.incarnation)
            && is_up(replica)
            && replica.stopped_until <= self.now
            && self.cuts[attachment.node][self.node_of(attachment.config.replicas[place])] <= self.now;
        let was_asked = serving.told.contains(place)
            || self.now >= serving.asked_at[place] + ASK_LIMIT && serving.asked_at[place] > 0;
        // What it did not answer in time, and what it answered with an error before it was taken, drops it without a question.
        let is_asked = reason == "it ended the connection";
        assert!(
            !(is_asked && is_taken && can_say && !was_asked),
            "an engine goes on without r{place}, which a newer attachment has: {}",
            self.state()
        );
    }

    pub(super) fn take_record(&mut self, a: usize, place: usize, generation: u64) {
        let life = self.attachments[a].life.as_ref().expect("it serves").id;
        let (newer, own) = (attachment_of(generation), self.attachments[a].config.attachment);
        if newer > own {
            assert!(self.attachments[a].disowned, "{}: {}", superseded(newer, own), self.state());
            self.tally.add("rivals that gave way", 1);
            return self.end_life(a, false);
        }
        if let Some((_, serving)) = self.serving(life) {
            serving.told = serving.told.with(Set::only(place));
        }
        self.give_up(life, place);
    }
}

//! Single decisions of the core, each as a short story.

use std::time::Duration;

use super::*;

mod compare;

const MIB: u64 = 1 << 20;

struct Story {
    core: Core,
    now: Duration,
}

fn story(replicas: usize, compare: bool) -> Story {
    story_that_reads_from(None, replicas, compare)
}

fn story_that_reads_from(read_from: Option<usize>, replicas: usize, compare: bool) -> Story {
    let core = Core::new(Options {
        size_bytes: 1024 * MIB,
        generation: 10,
        replicas,
        members: Set::first(replicas),
        read_from,
        compare,
        replica_timeout: Duration::from_secs(8),
        no_replica_hold: Duration::from_secs(5),
        scratch: (0..replicas as u32).map(BufferId).collect(),
        compare_step_bytes: MIB,
        zero_piece_bytes: 256 * MIB,
    });
    Story { core, now: Duration::ZERO }
}

impl Story {
    fn tell(&mut self, event: Event) -> Vec<Output> {
        self.core.handle(self.now, event);
        let mut outputs = Vec::new();
        self.core.take_outputs(&mut outputs);
        outputs.retain(|output| *output != Output::StatusChanged);
        outputs
    }

    /// Lets time pass in ticks.
    fn wait(&mut self, duration: Duration) -> Vec<Output> {
        let mut outputs = Vec::new();
        for _ in 0..duration.as_millis() / 250 {
            self.now += Duration::from_millis(250);
            outputs.extend(self.tell(Event::Tick));
        }
        outputs
    }

    fn reply(&mut self, transfer: Transfer, failure: Option<Failure>) -> Vec<Output> {
        self.tell(Event::Reply { replica: transfer.replica, cookie: transfer.cookie, failure })
    }

    fn done(&mut self, replica: usize) -> Vec<Output> {
        self.tell(Event::ControlReply { replica, reply: ControlReply::Done })
    }
}

fn sent(outputs: &[Output]) -> Vec<Transfer> {
    outputs.iter().filter_map(|o| if let Output::Send(transfer) = o { Some(*transfer) } else { None }).collect()
}

fn completed(outputs: &[Output]) -> Vec<(u64, Result<(), Failure>)> {
    let pick = |o: &Output| if let Output::Complete { tag, result } = o { Some((*tag, *result)) } else { None };
    outputs.iter().filter_map(pick).collect()
}

fn zero(tag: u64, offset: u64, length: u64) -> Event {
    Event::Submit(Submission { tag, operation: Operation::Zero { allocate: false }, offset, length, payload: None })
}

#[test]
fn acknowledges_a_write_when_every_replica_has_it() {
    let mut story = story(3, false);
    let transfers = sent(&story.tell(Event::write(1, 0, 4096, 9)));
    assert_eq!(transfers.iter().map(|t| t.replica).collect::<Vec<_>>(), [0, 1, 2]);
    assert_eq!(completed(&story.reply(transfers[0], None)), []);
    assert_eq!(completed(&story.reply(transfers[2], None)), []);
    assert_eq!(completed(&story.reply(transfers[1], None)), [(1, Ok(()))]);
}

#[test]
fn asks_nobody_for_what_reaches_beyond_the_end() {
    let size = 1024 * MIB;
    for (offset, length) in [(size - 512, 1024), (size, 512), (u64::MAX - 100, 512), (u64::MAX, 1)] {
        for event in [Event::read(1, offset, length, 9), Event::write(1, offset, length, 9), zero(1, offset, length)] {
            let outputs = story(2, false).tell(event);
            assert_eq!(sent(&outputs), [], "{offset} {length}");
            assert_eq!(completed(&outputs), [(1, Err(Failure::Invalid))], "{offset} {length}");
        }
    }
    assert_eq!(sent(&story(2, false).tell(Event::write(1, size - 512, 512, 9))).len(), 2);
}

#[test]
fn acknowledges_nothing_before_the_survivors_recorded_the_fence() {
    let mut story = story(3, false);
    let transfers = sent(&story.tell(Event::write(1, 0, 4096, 9)));
    story.reply(transfers[0], None);
    story.reply(transfers[1], None);
    let outputs = story.tell(Event::ConnectionLost { replica: 2, reason: "gone".into() });
    assert_eq!(outputs[0], Output::Drop { replica: 2, reason: "gone".into() });
    let members = Set::first(2);
    let request = ControlRequest::Fence { generation: 11, members };
    assert_eq!(outputs[1..], [0, 1].map(|replica| Output::Control { replica, request }));
    assert_eq!(story.done(0), []);
    assert_eq!(story.core.recorded_generation(), 10, "a fence that ends here is none that anybody must have");
    let outputs = story.done(1);
    assert_eq!(story.core.recorded_generation(), 11);
    assert_eq!(outputs[0], Output::Record { generation: 11, members });
    assert_eq!(completed(&outputs), [(1, Ok(()))]);
}

#[test]
fn drops_a_survivor_that_refuses_the_fence() {
    let mut story = story(3, false);
    let transfers = sent(&story.tell(Event::write(1, 0, 4096, 9)));
    story.tell(Event::ConnectionLost { replica: 2, reason: "gone".into() });
    story.reply(transfers[0], None);
    story.reply(transfers[1], None);
    let refused = ControlReply::Refused("somebody else's".into());
    let outputs = story.tell(Event::ControlReply { replica: 0, reply: refused });
    let request = ControlRequest::Fence { generation: 12, members: Set::only(1) };
    assert!(outputs.contains(&Output::Control { replica: 1, request }));
    assert_eq!(completed(&story.done(1)), [], "that was the answer to the first fence");
    assert_eq!(completed(&story.done(1)), [(1, Ok(()))]);
    assert!(story.core.replica_error(0).unwrap().contains("somebody else's"));
}

#[test]
fn drops_a_survivor_that_does_not_answer_the_fence() {
    let mut story = story(2, false);
    story.tell(Event::ConnectionLost { replica: 0, reason: "gone".into() });
    story.wait(Duration::from_secs(8));
    assert_eq!(story.core.members(), Set::only(1));
    story.wait(Duration::from_secs(1));
    assert_eq!(story.core.members(), Set::EMPTY);
}

#[test]
fn gives_an_error_of_all_replicas_to_the_caller() {
    let mut story = story(3, false);
    let transfers = sent(&story.tell(Event::write(1, MIB, 4096, 9)));
    story.reply(transfers[0], Some(Failure::NoSpace));
    story.reply(transfers[1], Some(Failure::NoSpace));
    let outputs = story.reply(transfers[2], Some(Failure::NoSpace));
    assert_eq!(completed(&outputs), [(1, Err(Failure::NoSpace))]);
    assert_eq!(outputs[0], Output::MayDiffer, "remembered before the caller knows");
    assert_eq!(story.core.members(), Set::first(3));
    assert_eq!(story.core.replica_state(1), ReplicaState::Comparing);
    let steps = sent(&outputs);
    assert_eq!(
        steps.iter().map(|t| (t.replica, t.offset, t.length)).collect::<Vec<_>>(),
        [0, 1, 2].map(|r| (r, MIB, 4096))
    );
}

#[test]
fn drops_those_that_err_when_others_do_not() {
    let mut story = story(3, false);
    let transfers = sent(&story.tell(Event::write(1, 0, 4096, 9)));
    story.reply(transfers[0], None);
    story.reply(transfers[1], Some(Failure::Io));
    let outputs = story.reply(transfers[2], None);
    assert_eq!(completed(&outputs), []);
    assert_eq!(story.core.members(), Set::only(0).with(Set::only(2)));
    story.done(0);
    assert_eq!(completed(&story.done(2)), [(1, Ok(()))]);
}

#[test]
fn reads_from_the_next_replica_when_one_errs() {
    let mut story = story(2, false);
    let first = sent(&story.tell(Event::read(1, 0, 4096, 9)));
    assert_eq!(first.len(), 1);
    let second = sent(&story.reply(first[0], Some(Failure::Io)));
    assert_eq!(second[0].replica, 1);
    assert_eq!(completed(&story.reply(second[0], None)), [(1, Ok(()))]);
    assert_eq!(story.core.members(), Set::only(1));
}

#[test]
fn a_read_that_fails_everywhere_costs_no_replica() {
    let mut story = story(2, false);
    let first = sent(&story.tell(Event::read(1, 0, 4096, 9)));
    let second = sent(&story.reply(first[0], Some(Failure::Io)));
    assert_eq!(completed(&story.reply(second[0], Some(Failure::Io))), [(1, Err(Failure::Io))]);
    assert_eq!(story.core.members(), Set::first(2));
}

#[test]
fn serializes_what_overlaps_and_lets_reads_share() {
    let mut story = story(1, false);
    let write = sent(&story.tell(Event::write(1, 0, 8192, 9)));
    assert_eq!(sent(&story.tell(Event::read(2, 4096, 4096, 10))), []);
    assert_eq!(sent(&story.tell(Event::read(3, 4096, 8192, 11))), []);
    assert_eq!(sent(&story.tell(Event::write(4, 12288, 4096, 12))).len(), 1);
    assert_eq!(sent(&story.reply(write[0], None)).len(), 2, "both reads start");
}

#[test]
fn cuts_long_zeroes_under_one_lock() {
    let mut story = story(1, false);
    let first = sent(&story.tell(zero(1, 0, 600 * MIB)));
    assert_eq!((first[0].offset, u64::from(first[0].length)), (0, 256 * MIB));
    assert_eq!(sent(&story.tell(Event::write(2, 599 * MIB, 4096, 9))), []);
    let second = sent(&story.reply(first[0], None));
    assert_eq!(second[0].offset, 256 * MIB);
    let third = sent(&story.reply(second[0], None));
    assert_eq!((third[0].offset, u64::from(third[0].length)), (512 * MIB, 88 * MIB));
    let outputs = story.reply(third[0], None);
    assert_eq!(completed(&outputs), [(1, Ok(()))]);
    assert_eq!(sent(&outputs).len(), 1, "the write starts");
}

#[test]
fn drops_a_replica_that_is_silent_for_too_long() {
    let mut story = story(2, false);
    let transfers = sent(&story.tell(Event::write(1, 0, 4096, 9)));
    story.reply(transfers[0], None);
    story.wait(Duration::from_secs(8));
    assert_eq!(story.core.members(), Set::first(2));
    story.wait(Duration::from_millis(250));
    assert_eq!(story.core.members(), Set::only(0));
    assert_eq!(completed(&story.done(0)), [(1, Ok(()))]);
}

#[test]
fn blames_nobody_for_its_own_standstill() {
    let mut story = story(2, false);
    let transfers = sent(&story.tell(Event::write(1, 0, 4096, 9)));
    story.reply(transfers[0], None);
    story.now += Duration::from_secs(60);
    assert_eq!(story.tell(Event::Tick), []);
    assert_eq!(completed(&story.reply(transfers[1], None)), [(1, Ok(()))]);
}

#[test]
fn holds_requests_for_a_while_when_no_replica_is_left() {
    let mut story = story(1, false);
    story.tell(Event::write(1, 0, 4096, 9));
    story.tell(Event::ConnectionLost { replica: 0, reason: "gone".into() });
    assert!(story.core.faulted().unwrap().contains("held"));
    assert_eq!(story.tell(Event::read(2, 0, 4096, 10)), []);
    let outputs = story.wait(Duration::from_secs(5));
    assert_eq!(completed(&outputs), [(1, Err(Failure::Io)), (2, Err(Failure::Io))]);
    assert_eq!(completed(&story.tell(Event::read(3, 0, 4096, 10))), [(3, Err(Failure::Io))]);
}

#[test]
fn a_barrier_drains_and_flushes() {
    let mut story = story(2, false);
    let write = sent(&story.tell(Event::write(1, 0, 4096, 9)));
    assert_eq!(story.tell(Event::Pause), []);
    assert_eq!(story.tell(Event::write(2, 4096, 4096, 10)), [], "new requests wait");
    story.reply(write[0], None);
    let flush = sent(&story.reply(write[1], None));
    assert_eq!(flush.iter().map(|t| t.operation).collect::<Vec<_>>(), [Operation::Flush; 2]);
    story.reply(flush[0], None);
    assert_eq!(story.reply(flush[1], None), [Output::Paused { flushed: true }]);
    assert_eq!(sent(&story.tell(Event::Resume)).len(), 2);
}

#[test]
fn a_barrier_whose_flush_failed_says_so_and_flushes_when_it_is_asked_again() {
    let mut story = story(2, false);
    let flush = sent(&story.tell(Event::Pause));
    story.reply(flush[0], Some(Failure::NoSpace));
    assert_eq!(story.reply(flush[1], Some(Failure::NoSpace)), [Output::Paused { flushed: false }]);
    let flush = sent(&story.tell(Event::Pause));
    assert_eq!(flush.iter().map(|t| t.operation).collect::<Vec<_>>(), [Operation::Flush; 2]);
    story.reply(flush[0], None);
    assert_eq!(story.reply(flush[1], None), [Output::Paused { flushed: true }]);
    assert_eq!(story.tell(Event::Pause), [Output::Paused { flushed: true }]);
}

#[test]
fn a_clean_end_is_recorded_by_every_member() {
    let mut story = story(2, false);
    let flush = sent(&story.tell(Event::Shutdown));
    story.reply(flush[0], None);
    let request = ControlRequest::Close { generation: 10 };
    assert_eq!(story.reply(flush[1], None), [0, 1].map(|replica| Output::Control { replica, request }));
    assert_eq!(story.tell(Event::ConnectionLost { replica: 0, reason: "its export ended".into() }), []);
    assert_eq!(story.done(0), []);
    assert_eq!(story.done(1), [Output::Ended { clean: true }]);
}

fn lost(replica: usize) -> Event {
    Event::ConnectionLost { replica, reason: "gone".into() }
}

fn control_lost(replica: usize) -> Event {
    Event::ControlLost { replica, reason: "gone".into() }
}

/// A write of one page that fails on both replicas: its range is to be compared.
fn fail_write(story: &mut Story, tag: u64, offset: u64) -> Vec<Output> {
    let transfers = sent(&story.tell(Event::write(tag, offset, 4096, 9)));
    story.reply(transfers[0], Some(Failure::NoSpace));
    story.reply(transfers[1], Some(Failure::NoSpace))
}

#[test]
fn what_is_heard_of_a_dropped_replica_changes_nothing() {
    let mut story = story(3, false);
    let transfers = sent(&story.tell(Event::write(1, 0, 4096, 9)));
    story.tell(lost(2));
    assert_eq!(story.tell(lost(2)), []);
    assert_eq!(story.tell(control_lost(2)), []);
    assert_eq!(story.reply(transfers[2], None), []);
    let reply = ControlReply::Refused("late".into());
    assert_eq!(story.tell(Event::ControlReply { replica: 2, reply }), []);
    assert_eq!(story.core.members(), Set::first(2));
}

#[test]
fn drops_a_survivor_that_cannot_be_told_about_the_fence() {
    let mut story = story(3, false);
    story.tell(lost(2));
    let outputs = story.tell(control_lost(0));
    let request = ControlRequest::Fence { generation: 12, members: Set::only(1) };
    assert!(outputs.contains(&Output::Control { replica: 1, request }), "{outputs:?}");
}

#[test]
fn a_read_whose_replica_is_lost_is_asked_of_the_next() {
    let mut story = story(2, false);
    assert_eq!(sent(&story.tell(Event::read(1, 0, 4096, 9)))[0].replica, 0);
    let outputs = story.tell(lost(0));
    assert_eq!(completed(&outputs), []);
    let again = sent(&outputs);
    assert_eq!(again.iter().map(|t| t.replica).collect::<Vec<_>>(), [1]);
    assert_eq!(completed(&story.reply(again[0], None)), [(1, Ok(()))]);
}

#[test]
fn a_write_waits_for_a_read_and_nothing_overtakes_what_overlaps_it() {
    let mut story = story(1, false);
    let read = sent(&story.tell(Event::read(1, 0, 8192, 9)));
    assert_eq!(sent(&story.tell(Event::write(2, 4096, 8192, 10))), []);
    assert_eq!(sent(&story.tell(Event::write(3, 8192, 4096, 11))), [], "the second one waits before it");
    let second = sent(&story.reply(read[0], None));
    assert_eq!(second.iter().map(|t| t.offset).collect::<Vec<_>>(), [4096]);
    assert_eq!(sent(&story.reply(second[0], None)).len(), 1);
}

#[test]
fn a_request_that_does_not_fit_is_refused() {
    let mut story = story(1, false);
    let invalid =
        |outputs: Vec<Output>| assert_eq!(outputs, [Output::Complete { tag: 1, result: Err(Failure::Invalid) }]);
    invalid(story.tell(Event::write(1, 1024 * MIB - 512, 1024, 9)));
    invalid(story.tell(Event::read(1, u64::MAX, 512, 9)));
    invalid(story.tell(zero(1, 1024 * MIB, 512)));
    for operation in [Operation::Read, Operation::Write] {
        invalid(story.tell(Event::Submit(Submission { tag: 1, operation, offset: 0, length: 512, payload: None })));
    }
}

#[test]
fn drops_a_replica_that_answers_what_it_was_not_asked() {
    let mut twice = story(2, false);
    let write = sent(&twice.tell(Event::write(1, 0, 4096, 9)));
    twice.reply(write[0], None);
    twice.reply(write[0], None);
    assert_eq!(twice.core.members(), Set::only(1));

    let mut late = story(2, false);
    let first = sent(&late.tell(Event::write(1, 0, 4096, 9)));
    late.reply(first[0], None);
    late.reply(first[1], None);
    let second = sent(&late.tell(Event::write(2, 0, 4096, 9)));
    assert_ne!(first[0].cookie, second[0].cookie);
    late.reply(first[1], None);
    assert_eq!(late.core.members(), Set::only(0), "that was the answer to the first write");
}

#[test]
fn silence_of_all_is_borne_as_long_as_a_loss_of_all() {
    let mut story = story(2, false);
    story.tell(Event::write(1, 0, 4096, 9));
    assert_eq!(story.wait(Duration::from_secs(12)), []);
    assert_eq!(story.core.members(), Set::first(2));
    let outputs = story.wait(Duration::from_millis(1250));
    assert_eq!(story.core.members(), Set::EMPTY);
    assert_eq!(completed(&outputs), [(1, Err(Failure::Io))], "it has waited long enough");
}

#[test]
fn what_failed_for_want_of_replicas_may_be_on_some_of_them() {
    for (event, differs) in
        [(Event::write(1, 0, 4096, 9), true), (zero(1, 0, 4096), true), (Event::read(1, 0, 4096, 9), false)]
    {
        let mut story = story(2, false);
        story.tell(event);
        let outputs = story.wait(Duration::from_secs(30));
        let place = |wanted: fn(&Output) -> bool| outputs.iter().position(wanted);
        let noted = place(|output| *output == Output::MayDiffer);
        assert_eq!(noted.is_some(), differs);
        assert!(noted < place(|output| matches!(output, Output::Complete { .. })), "noted before anybody knows");
    }
}

#[test]
fn what_waited_or_came_when_no_replica_was_left_may_be_on_some_of_them() {
    // An earlier engine may have sent it.
    let mut story = story(2, false);
    story.tell(Event::Pause);
    story.tell(Event::write(1, 0, 4096, 9));
    story.tell(lost(0));
    story.tell(lost(1));
    let outputs = story.wait(Duration::from_secs(30));
    assert_eq!(completed(&outputs), [(1, Err(Failure::Io))]);
    assert!(outputs.contains(&Output::MayDiffer));
    story.tell(Event::Resume);
    assert!(story.tell(Event::write(2, 0, 4096, 9)).contains(&Output::MayDiffer));
    assert!(!story.tell(Event::read(3, 0, 4096, 9)).contains(&Output::MayDiffer));
}

#[test]
fn a_fence_is_over_with_its_last_member() {
    let mut story = story(2, false);
    let write = sent(&story.tell(Event::write(1, 0, 4096, 9)));
    story.tell(lost(0));
    assert_eq!(story.reply(write[1], None), [], "it is held until the fence is over");
    assert_eq!(completed(&story.tell(lost(1))), []);
    assert!(!story.core.is_fencing());
    assert_eq!(completed(&story.wait(Duration::from_secs(5))), [(1, Err(Failure::Io))]);
    assert_eq!(completed(&story.tell(Event::write(2, 0, 4096, 9))), [(2, Err(Failure::Io))]);
}

#[test]
fn an_end_does_not_wait_for_replicas_that_are_gone() {
    let ended = Output::Ended { clean: false };
    let mut lost_at_the_end = story(1, false);
    lost_at_the_end.tell(Event::write(1, 0, 4096, 9));
    lost_at_the_end.tell(Event::Shutdown);
    let outputs = lost_at_the_end.tell(lost(0));
    assert_eq!((completed(&outputs), outputs.contains(&ended)), (vec![(1, Err(Failure::Io))], true));

    let mut lost_before = story(1, false);
    lost_before.tell(lost(0));
    assert_eq!(lost_before.tell(Event::write(1, 0, 4096, 9)), []);
    let outputs = lost_before.tell(Event::Shutdown);
    assert_eq!((completed(&outputs), outputs.contains(&ended)), (vec![(1, Err(Failure::Io))], true));
}

#[test]
fn a_barrier_without_a_replica_is_not_flushed() {
    let mut story = story(1, false);
    story.tell(lost(0));
    assert_eq!(story.tell(Event::Pause), [Output::Paused { flushed: false }]);
}

#[test]
fn an_end_that_is_not_flushed_or_not_recorded_by_all_is_not_clean() {
    let closing = || {
        let mut story = story(2, false);
        let flush = sent(&story.tell(Event::Shutdown));
        story.reply(flush[0], None);
        story.reply(flush[1], None);
        assert_eq!(story.done(0), []);
        story
    };
    let unclean = [Output::Ended { clean: false }];
    let reply = ControlReply::Refused("its disk is full".into());
    assert_eq!(closing().tell(Event::ControlReply { replica: 1, reply }), unclean);
    assert_eq!(closing().tell(control_lost(1)), unclean);
    assert_eq!(closing().wait(Duration::from_millis(8250)), unclean);
    // One that has recorded it may go.
    let mut story = closing();
    assert_eq!(story.tell(control_lost(0)), []);
    assert_eq!(story.done(1), [Output::Ended { clean: true }]);

    let mut story = self::story(2, false);
    let flush = sent(&story.tell(Event::Shutdown));
    story.reply(flush[0], Some(Failure::NoSpace));
    assert_eq!(story.reply(flush[1], Some(Failure::NoSpace)), unclean);
}

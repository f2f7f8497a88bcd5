//! Stories of replicas that may differ.

use super::*;

#[test]
fn an_end_while_comparing_is_not_clean() {
    let mut story = story(2, true);
    let step = sent(&story.tell(Event::Tick));
    assert_eq!(story.tell(Event::Shutdown), []);
    story.reply(step[0], None);
    let outputs = story.reply(step[1], None);
    let Some(Output::Compare { token, .. }) = outputs.first() else { panic!("{outputs:?}") };
    let flush = sent(&story.tell(Event::Compared { token: *token, differing: Set::EMPTY }));
    story.reply(flush[0], None);
    assert_eq!(story.reply(flush[1], None), [Output::Ended { clean: false }]);
}

#[test]
fn rewrites_only_what_differs_and_reads_from_the_pinned_one_meanwhile() {
    let mut story = story(3, true);
    let step = sent(&story.tell(Event::Tick));
    assert_eq!(step.len(), 3);
    assert_eq!(
        story.core.expected(2, step[2].cookie),
        Ok(Some((Payload { buffer: BufferId(2), start: 0 }, MIB as usize)))
    );
    assert_eq!(sent(&story.tell(Event::read(1, 512 * MIB, 4096, 9)))[0].replica, 0);
    assert_eq!(sent(&story.tell(Event::read(3, MIB / 2, 4096, 11))), [], "the step excludes reads of its range");
    assert_eq!(sent(&story.tell(Event::write(2, 0, 4096, 10))), [], "the step excludes writes to its range");
    story.reply(step[0], None);
    story.reply(step[1], None);
    let outputs = story.reply(step[2], None);
    let Some(Output::Compare { token, pinned, others, .. }) = outputs.first() else { panic!("{outputs:?}") };
    assert_eq!((pinned, others.len()), (&BufferId(0), 2));
    let rewrite = sent(&story.tell(Event::Compared { token: *token, differing: Set::only(2) }));
    assert_eq!(rewrite.len(), 1);
    assert_eq!((rewrite[0].replica, rewrite[0].operation), (2, Operation::Write));
    assert_eq!(rewrite[0].payload, Some(Payload { buffer: BufferId(0), start: 0 }));
    let follows = sent(&story.reply(rewrite[0], None));
    let writes = follows.iter().filter(|transfer| transfer.operation == Operation::Write);
    assert_eq!(writes.count(), 3, "the write that waited follows");
    assert_eq!(story.core.counters().repaired_bytes, MIB);
}

#[test]
fn what_was_read_while_comparing_is_read_again_after_another_crash() {
    // Two engines one after the other, on different nodes: the first one ends before everything is compared.
    for read_from in [Some(2), Some(1), None] {
        let mut story = story_that_reads_from(read_from, 3, true);
        assert_eq!((0..3).map(|r| story.core.replica_state(r)).position(|s| s == ReplicaState::InSync), Some(0));
        let sent = sent(&story.tell(Event::read(1, MIB * 500, 512, 9)));
        let of_it = sent.iter().filter(|t| t.offset == MIB * 500);
        assert_eq!(of_it.map(|t| t.replica).collect::<Vec<_>>(), [0], "{sent:?}");
    }
}

/// Answers everything that comparing asks for; the ranges that were read.
fn compare_to_the_end(story: &mut Story, outputs: Vec<Output>) -> Vec<(u64, u64)> {
    let mut queue = VecDeque::from(outputs);
    let mut compared = vec![];
    while let Some(output) = queue.pop_front() {
        let follows = match output {
            Output::Send(transfer) => {
                if transfer.operation == Operation::Read && transfer.replica == 0 {
                    compared.push((transfer.offset, transfer.offset + u64::from(transfer.length)));
                }
                story.reply(transfer, None)
            }
            Output::Compare { token, .. } => story.tell(Event::Compared { token, differing: Set::EMPTY }),
            _ => continue,
        };
        queue.extend(follows);
    }
    compared
}

#[test]
fn the_rest_of_a_zero_that_failed_is_compared_too() {
    let mut story = story(2, false);
    let pieces = sent(&story.tell(zero(1, 0, 512 * MIB)));
    assert_eq!(pieces[0].length as u64, 256 * MIB);
    story.reply(pieces[0], Some(Failure::NoSpace));
    let outputs = story.reply(pieces[1], Some(Failure::NoSpace));
    let compared = compare_to_the_end(&mut story, outputs);
    // The caller repeated it, and an earlier engine had got further.
    assert_eq!(compared.last().map(|range| range.1), Some(512 * MIB));
}

#[test]
fn another_one_is_pinned_only_when_the_pinned_one_is_lost() {
    let mut story = story_that_reads_from(Some(2), 3, true);
    let read = sent(&story.tell(Event::read(1, 500 * MIB, 4096, 9)));
    let read = read.iter().find(|t| t.offset == 500 * MIB).unwrap();
    let again = sent(&story.reply(*read, Some(Failure::Io)));
    let outputs = story.reply(again[0], None);
    assert_eq!(completed(&outputs), [(1, Ok(()))]);
    assert_eq!(again[0].replica, 2);
    // What was read of it is read of it again, also when a further range is to be compared, and when another one is lost.
    assert_eq!(sent(&story.tell(Event::read(2, 500 * MIB, 4096, 10)))[0].replica, 2);
    story.done(1);
    story.done(2);
    fail_write(&mut story, 3, 600 * MIB);
    assert_eq!((1..3).map(|r| story.core.replica_state(r)).position(|s| s == ReplicaState::InSync), Some(1));
    story.tell(lost(1));
    assert_eq!(sent(&story.tell(Event::read(4, 700 * MIB, 4096, 11)))[0].replica, 2);
}

#[test]
fn what_no_replica_can_read_is_skipped_while_comparing() {
    let mut story = story(2, true);
    let step = sent(&story.tell(Event::Tick));
    story.reply(step[0], Some(Failure::Io));
    let next = sent(&story.reply(step[1], Some(Failure::Io)));
    assert_eq!(next.iter().map(|t| (t.replica, t.offset)).collect::<Vec<_>>(), [(0, MIB), (1, MIB)]);
}

#[test]
fn an_outdated_answer_of_a_compare_rewrites_nothing() {
    let mut story = story(3, true);
    let step = sent(&story.tell(Event::Tick));
    story.reply(step[0], None);
    story.reply(step[1], None);
    let outputs = story.reply(step[2], None);
    let Some(Output::Compare { token, .. }) = outputs.first() else { panic!("{outputs:?}") };
    let differing = Set::only(1).with(Set::only(2));
    assert_eq!(story.tell(Event::Compared { token: token + 1, differing }), [], "nobody asked for that");
    story.tell(lost(0));
    let again = sent(&story.tell(Event::Compared { token: *token, differing }));
    let again: Vec<_> = again.iter().map(|t| (t.replica, t.operation, t.offset)).collect();
    assert_eq!(again, [1, 2].map(|replica| (replica, Operation::Read, 0)));
}

#[test]
fn replicas_are_in_sync_when_their_repairs_are_flushed() {
    let mut story = story(2, false);
    let step = sent(&fail_write(&mut story, 1, 0));
    story.reply(step[0], None);
    let outputs = story.reply(step[1], None);
    let Some(Output::Compare { token, .. }) = outputs.first() else { panic!("{outputs:?}") };
    let flush = sent(&story.tell(Event::Compared { token: *token, differing: Set::EMPTY }));
    assert_eq!(flush.iter().map(|t| t.operation).collect::<Vec<_>>(), [Operation::Flush; 2]);
    // A change that fails on all now is compared before the end.
    let second = fail_write(&mut story, 2, 8 * MIB);
    assert_eq!(sent(&second), []);
    story.reply(flush[0], None);
    let step = story.reply(flush[1], None);
    assert_eq!(sent(&step).iter().map(|t| t.offset).collect::<Vec<_>>(), [8 * MIB; 2]);
    assert_eq!(story.core.replica_state(1), ReplicaState::Comparing);
    story.reply(sent(&step)[0], None);
    let outputs = story.reply(sent(&step)[1], None);
    let Some(Output::Compare { token, .. }) = outputs.first() else { panic!("{outputs:?}") };
    let flush = sent(&story.tell(Event::Compared { token: *token, differing: Set::EMPTY }));
    story.reply(flush[0], Some(Failure::NoSpace));
    assert_eq!(story.reply(flush[1], Some(Failure::NoSpace)), []);
    assert_eq!(story.core.replica_state(1), ReplicaState::Comparing);
    let flush = sent(&story.wait(Duration::from_secs(1)));
    story.reply(flush[0], None);
    assert_eq!(story.reply(flush[1], None), [Output::Equal]);
    assert_eq!(story.core.replica_state(1), ReplicaState::InSync);
}

#[test]
fn places_that_may_differ_are_merged_and_all_compared() {
    let mut story = story(2, false);
    let mut first = vec![];
    let places: Vec<u64> = (0..2 + limits::MAX_COMPARE_RANGES as u64).map(|n| n * 4 * MIB).collect();
    for place in &places {
        first.extend(fail_write(&mut story, 1, *place));
    }
    let compared = compare_to_the_end(&mut story, first);
    for place in places {
        assert!(compared.iter().any(|(start, end)| *start <= place && place + 4096 <= *end), "{place}: {compared:?}");
    }
    assert_eq!(story.core.replica_state(1), ReplicaState::InSync);
}

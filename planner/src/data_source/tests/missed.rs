//! What was prepared, and is not there when it is to be taken over.

use super::*;

/// The process offers its file; what the manager says of it, and whether its agent did not find it.
fn offered(taken_over: Option<CopyState>, is_missed: bool) -> Observed {
    let mut o = observed();
    running(&mut o, State::Running, Some(Report { state: CopyState::ReadyForTransfer, ..Default::default() }));
    o.source.status = Some(decide(&o).status);
    (o.taken_over, o.is_missed) = (taken_over, is_missed);
    o
}

#[test]
fn a_prepared_file_that_is_gone_is_prepared_again() {
    let mut o = offered(Some(CopyState::Failed), true);
    for at in [Duration::ZERO, LOST_AFTER - Duration::from_millis(1)] {
        o.now = after(now(), at);
        let decision = decide(&o);
        assert_eq!((decision.actions, decision.recheck_after), (vec![], Some(LOST_AFTER - at)), "after {at:?}");
        assert_eq!(decision.status.current_state, CopyState::ReadyForTransfer);
        o.source.status = Some(decision.status);
    }
    o.now = after(now(), LOST_AFTER);
    let ended = decide(&o);
    assert_eq!(ended.actions, [Action::RemoveWorkload(data_source_workload_name(&"ubuntu".parse().unwrap()))]);
    assert_eq!((ended.status.current_state, ended.status.failures), (CopyState::Failed, 1));
    assert!(ended.status.message.contains("is not there any more"), "{}", ended.status.message);
    (o.source.status, o.workload, o.report, o.taken_over) = (Some(ended.status), None, None, None);
    o.now = after(o.now, crate::retry::INITIAL);
    assert!(matches!(decide(&o).actions[..], [Action::EnsureWorkload(_)]), "it begins again");
}

#[test]
fn another_refusal_of_a_prepared_file_ends_nothing() {
    let others = [
        (Some(CopyState::Failed), false),
        (Some(CopyState::InProgress), true),
        (Some(CopyState::Ready), true),
        (None, true),
    ];
    for (taken_over, is_missed) in others {
        let mut o = offered(taken_over, is_missed);
        o.source.status = Some(decide(&o).status);
        o.now = after(now(), LOST_AFTER * 2);
        let decision = decide(&o);
        assert_eq!((decision.actions, decision.recheck_after), (vec![], None), "{taken_over:?} {is_missed}");
        assert_eq!(decision.status.lost_since, "");
    }
}

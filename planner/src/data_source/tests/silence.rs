//! Silence that counts: seen again and again by one life of the controller.

use super::*;

/// Looks at a silent process, at these seconds; whether the last one ends it. `RESTART` is none: the controller is started anew there.
fn is_ended(looks: &[u64]) -> bool {
    let mut o = observed();
    running(&mut o, State::Running, Some(Report { state: CopyState::InProgress, ..Default::default() }));
    o.source.status = Some(decide(&o).status);
    o.report = Some(Err("timeout".into()));
    let mut is_ended = false;
    for second in looks {
        if *second == RESTART {
            o.met_silence_at = None;
            continue;
        }
        assert!(!is_ended, "it is ended before {second}: {looks:?}");
        o.now = after(now(), Duration::from_secs(*second));
        let decision = decide(&o);
        is_ended = !decision.actions.is_empty();
        // As the controller remembers it.
        o.met_silence_at = (!decision.status.silent_since.is_empty()).then_some(o.now);
        o.source.status = Some(decision.status);
    }
    is_ended
}

const RESTART: u64 = u64::MAX;

#[test]
fn two_looks_with_nobody_between_end_no_process() {
    let every = |step: usize, from: u64, to: u64| (from..=to).step_by(step).collect::<Vec<u64>>();
    let limit = SILENCE_LIMIT.as_secs();
    let apart = LOOKS_APART.as_secs();
    for step in [1, 30] {
        assert!(is_ended(&every(step, 0, limit)), "asked all the time, every {step} s");
    }
    assert!(!is_ended(&every(1, 0, limit - 1)));
    assert!(!is_ended(&[0, limit]), "nobody looked between");
    assert!(!is_ended(&[0, 10 * limit]));
    // The controller was away for a while: it begins anew, and goes on to the end.
    let away = [every(1, 0, 100), every(1, 101 + apart, 100 + apart + limit)].concat();
    assert!(!is_ended(&away));
    assert!(is_ended(&[away, vec![101 + apart + limit]].concat()));
    // So it does when another one takes over, however soon.
    let restarted = [every(1, 0, 100), vec![RESTART], every(1, 101, 100 + limit)].concat();
    assert!(!is_ended(&restarted));
    assert!(is_ended(&[restarted, vec![101 + limit]].concat()));
}

//! What a data source prepared, and an agent is to take over.

use super::*;

fn remembered(is_hand_over: bool, kind: ErrorKind) -> Attempt {
    let retry =
        Retry { failures: 3, next: Some(after(now(), Duration::from_secs(60))), message: "it is missing".into() };
    Attempt { retry, kind: Some(kind), is_running: false, is_hand_over }
}

#[test]
fn who_misses_what_was_prepared_is_known_by_the_attempt() {
    let mut o = world("wanted; held; process=running; source=ready-for-transfer");
    let taken_over = decide(&o);
    assert!(taken_over.memory.copies["ubuntu"].is_hand_over);
    o = world("wanted; held; process=running; peers");
    o.memory.copies.insert("ubuntu".into(), Attempt { is_hand_over: true, ..Default::default() });
    assert!(!decide(&o).memory.copies["ubuntu"].is_hand_over, "what is synced is no hand-over");
    for (is_hand_over, kind, expected) in [
        (true, ErrorKind::NotFound, true),
        (true, ErrorKind::NotReady, false),
        // There was nothing to adopt.
        (false, ErrorKind::NotFound, false),
    ] {
        assert_eq!(remembered(is_hand_over, kind).misses_the_prepared_file(), expected, "{is_hand_over} {kind:?}");
    }
}

#[test]
fn a_refused_hand_over_says_nothing_of_the_file_that_is_prepared_after_it() {
    let after = |source: &str, file: &str| {
        let mut o = world(&format!("wanted; held; process=running; source={source}{file}"));
        o.memory.copies.insert("ubuntu".into(), remembered(true, ErrorKind::NotFound));
        decide(&o).memory.copies.get("ubuntu").cloned()
    };
    for file in ["", "; file=failed"] {
        for preparing in ["starting", "in-progress", "failed"] {
            let attempt = after(preparing, file).unwrap_or_default();
            assert!(
                !attempt.misses_the_prepared_file() && attempt.retry.failures <= 1,
                "{preparing}{file}: {attempt:?}"
            );
        }
        // It is offered still: the refusal stands until its next attempt.
        assert_eq!(after("ready-for-transfer", file), Some(remembered(true, ErrorKind::NotFound)), "{file}");
    }
}

#[test]
fn a_copy_that_is_none_goes_before_what_was_prepared_is_taken_over() {
    check(
        "wanted; held=failed; process=running; other; due; source=ready-for-transfer",
        expect![
            "replace ubuntu; fetch from 9.9.9.9:8000 | Running failed the copy differs from the image: its checksum is other, that of the image is c 2026-01-01T00:00:00Z"
        ],
    );
}

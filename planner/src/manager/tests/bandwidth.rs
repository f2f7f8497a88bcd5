//! What an agent is told of limits of bandwidth, and when.

use super::*;

/// What the agent is told when these limits hold and are wished: of all, of `ubuntu`.
fn told(holds: Option<(u64, u64)>, wished: (u64, u64)) -> (Vec<Action>, String) {
    let mut o = world("wanted; held=ready; process=running; file=ready");
    (o.bandwidth_limit, o.images[0].spec.bandwidth_limit) = wished;
    let limits = |(total, of_image): (u64, u64)| {
        let images = [("ubuntu".to_owned(), of_image)].into_iter().filter(|(_, limit)| *limit > 0);
        Bandwidth { total, images: images.collect() }
    };
    o.agent = o.agent.map(|agent| agent.map(|agent| Agent { bandwidth: holds.map(limits), ..agent }));
    let decision = decide(&o);
    (decision.actions, condition::find(&decision.status.conditions, READY).unwrap().message.clone())
}

#[test]
fn an_agent_is_told_of_limits_until_they_hold() {
    let limit = |total, images: &[(&str, u64)]| {
        let images = images.iter().map(|(name, limit)| ((*name).to_owned(), *limit)).collect();
        vec![Action::LimitBandwidth(Bandwidth { total, images })]
    };
    let cases = [
        ((0, 0), (0, 0), vec![]),
        ((0, 0), (70_000, 0), limit(70_000, &[])),
        ((70_000, 0), (70_000, 0), vec![]),
        ((70_000, 0), (0, 0), limit(0, &[])),
        ((70_000, 0), (70_000, 80_000), limit(70_000, &[("ubuntu", 80_000)])),
        ((70_000, 80_000), (70_000, 90_000), limit(70_000, &[("ubuntu", 90_000)])),
        ((70_000, 80_000), (70_000, 0), limit(70_000, &[])),
        ((0, 80_000), (0, 80_000), vec![]),
        // One that got in although it cannot be kept: its agent would refuse all others together with it.
        ((70_000, 0), (70_000, 1), vec![]),
        ((0, 0), (70_000, 65_535), limit(70_000, &[])),
        ((70_000, 80_000), (70_000, 65_535), limit(70_000, &[])),
    ];
    for (holds, wished, expected) in cases {
        assert_eq!(told(Some(holds), wished).0, expected, "{holds:?} {wished:?}");
    }
}

#[test]
fn an_agent_that_takes_no_limits_is_not_asked_and_says_so() {
    let (actions, says) = told(None, (70_000, 0));
    assert_eq!(actions, []);
    assert_eq!(says, "the agent of the disk answers; it is of an older version, which takes no limit of bandwidth");
    assert_eq!(told(None, (0, 0)), (vec![], "the agent of the disk answers".into()));
}

/// What is told to begin must not run without its limit.
#[test]
fn limits_are_told_before_anything_is_begun() {
    let mut o = world("wanted; held; process=running; peers");
    o.bandwidth_limit = 70_000;
    let Some(Ok(agent)) = &mut o.agent else { panic!("it runs") };
    agent.bandwidth = Some(Bandwidth::default());
    let actions = decide(&o).actions;
    assert!(matches!(&actions[..], [Action::LimitBandwidth(_), Action::SyncFile { .. }]), "{actions:?}");
}

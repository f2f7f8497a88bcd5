//! How many bytes a second the agent of a disk may send: told whenever what it says to hold is not what is wished.
//!
//! An agent that was started again knows no limits, and says so; nothing is remembered of what was told to it.

use std::collections::BTreeMap;

use api::ConditionStatus;
use api::bandwidth::is_possible;
use api::names::condition::READY;

use super::{Action, Agent, Decision, Observed};

/// Bytes a second; 0: no limit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bandwidth {
    /// Of all copies together.
    pub total: u64,
    /// Of the copies of one image, by its name; only those that have a limit.
    pub images: BTreeMap<String, u64>,
}

/// What is wished for the images that a disk is about. A limit that cannot be kept counts as none: an agent would refuse all others with it.
fn wish(o: &Observed) -> Bandwidth {
    let is_limit = |limit| limit > 0 && is_possible(limit);
    let limited = o.images.iter().filter(|image| is_limit(image.spec.bandwidth_limit));
    let images = limited.filter_map(|image| Some((image.metadata.name.clone()?, image.spec.bandwidth_limit)));
    Bandwidth { total: o.bandwidth_limit, images: images.collect() }
}

/// Tells the limits where others hold.
pub(super) fn plan(o: &Observed, agent: &Agent, decision: &mut Decision) {
    let wish = wish(o);
    match &agent.bandwidth {
        Some(holds) if *holds == wish => {}
        // Before everything else, since what follows may begin a transfer.
        Some(_) => decision.actions.insert(0, Action::LimitBandwidth(wish)),
        None if wish == Bandwidth::default() => {}
        None => {
            let ready = decision.status.conditions.iter_mut().find(|c| c.r#type == READY);
            if let Some(ready) = ready.filter(|c| c.status == ConditionStatus::True) {
                ready.message += "; it is of an older version, which takes no limit of bandwidth";
            }
        }
    }
}

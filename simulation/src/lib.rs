//! The control plane in a seeded fake world.
//!
//! [`run`] lets the planner's decisions act on fake nodes, disks, agents, data sources, replicas and engines, while users do all that
//! they can do and everything breaks that can break; the controller dies after any action. The invariants of `ARCHITECTURE.md` are
//! asserted all the while: 2 (the last ready copy of an image in use stays), 4 (one engine per volume), 5 (who serves holds every
//! acknowledged write), 6 (nothing is removed because of silence), and the rules of clean-up, eviction and deletion. Then the
//! faults end, and the world must reach what was wished within a bounded number of rounds and stay there, or say why it cannot.

mod agents;
mod control;
mod data;
pub mod data_plane;
mod files;
mod invariants;
mod operations;
mod places;
mod settle;
mod world;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

pub use data_plane::Tally;
use world::World;

/// One run of `ticks` steps with faults, then settling; returns what it went through, to see that it was worth something. Panics
/// with the seed in the message when a promise is broken. A run that is `told` prints every step.
pub fn run(seed: u64, ticks: u32, told: bool) -> Tally {
    let outcome = std::panic::catch_unwind(|| {
        let mut random = StdRng::seed_from_u64(seed);
        let mut world = World::new(&mut random);
        world.told = told;
        for _ in 0..ticks {
            world.tick(&mut random);
        }
        world.settle(&mut random);
        world.tally.add("runs", 1);
        world.tally.add("ticks", u64::from(ticks));
        world.tally
    });
    match outcome {
        Ok(tally) => tally,
        Err(cause) => {
            let text = cause.downcast_ref::<String>().cloned();
            let text = text.or_else(|| cause.downcast_ref::<&str>().map(|t| (*t).to_owned()));
            panic!("seed {seed}, {ticks} ticks: {}", text.unwrap_or_default());
        }
    }
}

/// One of several, by lot.
fn any<'a, T>(of: &'a [T], random: &mut StdRng) -> Option<&'a T> {
    (!of.is_empty()).then(|| &of[random.random_range(0..of.len())])
}

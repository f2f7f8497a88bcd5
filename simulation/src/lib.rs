//! The control plane in a seeded fake world.
//!
//! [`run`] lets the planner's decisions act on fake agents, disks, replicas and engines, with a crash possible after every action,
//! silent nodes and dying processes, and asserts the invariants of `ARCHITECTURE.md` all the while: 2 (the last ready copy of an
//! image in use stays), 4 (one engine per volume), 5 (who serves holds every acknowledged write), 6 (nothing is removed because
//! of silence). Then the faults end, and the world must reach what was wished within a bounded number of rounds and stay there.

mod control;
mod data;
pub mod data_plane;
mod files;
mod world;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

pub use world::World;

/// Rounds over all objects within which a world without faults settles.
const SETTLING_ROUNDS: u32 = 300;

/// What a run went through, to see that it was worth something.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    pub crashes: u32,
    pub attachments: u32,
    pub acknowledged_writes: u64,
    pub fences: u32,
    pub silences: u32,
    pub actions: u64,
}

/// One run of `ticks` steps with faults, then settling. Panics with the seed in the message when a promise is broken.
pub fn run(seed: u64, ticks: u32) -> Summary {
    let outcome = std::panic::catch_unwind(|| {
        let mut random = StdRng::seed_from_u64(seed);
        let mut world = World::new(random.random_range(2..=4));
        for _ in 0..ticks {
            world.tick(&mut random);
        }
        world.settle(&mut random, SETTLING_ROUNDS);
        world.summary
    });
    match outcome {
        Ok(summary) => summary,
        Err(cause) => {
            let text = cause.downcast_ref::<String>().cloned();
            let text = text.or_else(|| cause.downcast_ref::<&str>().map(|t| (*t).to_owned()));
            panic!("seed {seed}, {ticks} ticks: {}", text.unwrap_or_default());
        }
    }
}

//! Many seeds: the invariants hold, and every world settles.

use backing_image_simulation::{Summary, run};

const TICKS: u32 = 1000;

#[test]
fn worlds_with_faults_keep_the_invariants_and_settle() {
    // One seed alone: SIMULATION_SEED=… cargo test -p backing-image-simulation
    let chosen = std::env::var("SIMULATION_SEED").ok().and_then(|s| s.parse::<u64>().ok());
    let seeds = chosen.map_or(0..24, |seed| seed..seed + 1);
    let mut all = Summary::default();
    for seed in seeds {
        let one = run(seed, TICKS);
        all.crashes += one.crashes;
        all.attachments += one.attachments;
        all.acknowledged_writes += one.acknowledged_writes;
        all.fences += one.fences;
        all.silences += one.silences;
    }
    println!("{all:?}");
    if chosen.is_none() {
        assert!(
            all.attachments > 50 && all.fences > 10 && all.crashes > 50 && all.acknowledged_writes > 500,
            "{all:?}"
        );
    }
}

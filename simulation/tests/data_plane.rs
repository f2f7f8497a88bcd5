//! Many seeded runs of one volume's data plane, from the user's requests to the disks, with faults everywhere.
//!
//! `cargo xtask simulate` runs 100,000 of them, `--long` a million, `--seed N` one.

use std::panic::catch_unwind;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use backing_image_simulation::data_plane::{Tally, run};

/// Enough to notice a coarse mistake while developing; CI asks for more.
const DEFAULT_RUNS: u64 = 2_000;
/// Seeds that found something once: they are always run.
const KEPT: &str = include_str!("../seeds.txt");

fn number(name: &str) -> Option<u64> {
    std::env::var(name)
        .ok()
        .map(|text| text.parse().unwrap_or_else(|_| panic!("{name} must be a number, not `{text}`")))
}

#[test]
fn acknowledged_writes_survive_every_seeded_course_of_faults() {
    let kept: Vec<u64> =
        KEPT.lines().filter_map(|line| line.split('#').next().unwrap_or_default().trim().parse().ok()).collect();
    let seeds = match number("SIMULATION_SEED") {
        Some(seed) => vec![seed],
        None => kept.into_iter().chain(0..number("SIMULATION_RUNS").unwrap_or(DEFAULT_RUNS)).collect(),
    };
    let (next, all, failed) = (AtomicU64::new(0), Mutex::new(Tally::default()), Mutex::new(Vec::new()));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let mut tally = Tally::default();
                while let Some(seed) = seeds.get(next.fetch_add(1, Ordering::Relaxed) as usize) {
                    if failed.lock().unwrap().len() >= 3 {
                        break;
                    }
                    match catch_unwind(|| run(*seed)) {
                        Ok(one) => tally.join(&one),
                        Err(_) => {
                            println!("seed {seed} failed");
                            failed.lock().unwrap().push(*seed);
                        }
                    }
                }
                all.lock().unwrap().join(&tally);
            });
        }
    });
    let (all, failed) = (all.into_inner().unwrap(), failed.into_inner().unwrap());
    for (what, count) in all.iter() {
        println!("{count:>10} {what}");
    }
    let repeat: Vec<String> = failed.iter().map(|seed| format!("cargo xtask simulate --seed {seed}")).collect();
    assert!(
        failed.is_empty(),
        "promises were broken, see above; after {} runs; again:\n{}",
        all.of("runs"),
        repeat.join("\n")
    );
}

//! Many seeded worlds: the invariants hold, and every world settles.
//!
//! `cargo xtask simulate --control` runs them alone, `--long` more of them, `--seed N` one, and tells its course.

use std::panic::catch_unwind;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use backing_image_simulation::{Tally, run};

const TICKS: u32 = 1000;
/// 200,000 ticks and those of the kept seeds.
const DEFAULT_RUNS: u64 = 200;
/// Seeds that found something once: they are always run.
const KEPT: &str = include_str!("../control_seeds.txt");

fn number(name: &str) -> Option<u64> {
    std::env::var(name)
        .ok()
        .map(|text| text.parse().unwrap_or_else(|_| panic!("{name} must be a number, not `{text}`")))
}

#[test]
fn worlds_with_faults_keep_the_invariants_and_settle() {
    let kept = KEPT.lines().filter_map(|line| line.split('#').next().unwrap_or_default().trim().parse().ok());
    let chosen = number("CONTROL_SEED");
    let seeds: Vec<u64> = match chosen {
        Some(seed) => vec![seed],
        None => kept.chain(0..number("CONTROL_RUNS").unwrap_or(DEFAULT_RUNS)).collect(),
    };
    let (next, all, failed) = (AtomicU64::new(0), Mutex::new(Tally::default()), Mutex::new(Vec::new()));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(seed) = seeds.get(next.fetch_add(1, Ordering::Relaxed) as usize) {
                    if failed.lock().unwrap().len() >= 3 {
                        break;
                    }
                    match catch_unwind(|| run(*seed, TICKS, chosen.is_some())) {
                        Ok(one) => all.lock().unwrap().join(&one),
                        Err(_) => failed.lock().unwrap().push(*seed),
                    }
                }
            });
        }
    });
    let (all, failed) = (all.into_inner().unwrap(), failed.into_inner().unwrap());
    for (what, count) in all.iter() {
        println!("{count:>10} {what}");
    }
    let repeat: Vec<String> =
        failed.iter().map(|seed| format!("cargo xtask simulate --control --seed {seed}")).collect();
    assert!(
        failed.is_empty(),
        "promises were broken, see above; after {} runs; again:\n{}",
        all.of("runs"),
        repeat.join("\n")
    );
}

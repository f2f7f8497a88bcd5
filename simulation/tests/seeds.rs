//! Many seeded worlds: the invariants hold, and every world settles.
//!
//! `cargo xtask simulate --control` runs 220 of them (220,000 ticks, as in CI), `--long` ten thousand, `--seed N` one, and tells its
//! course.

use std::panic::catch_unwind;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use backing_image_simulation::{Tally, run};

const TICKS: u32 = 1000;
/// Enough to notice a coarse mistake while developing; CI asks for more.
const DEFAULT_RUNS: u64 = 40;
/// From here on, everything that can happen has happened.
const MANY_RUNS: u64 = 200;
/// Seeds that found something once: they are always run.
const KEPT: &str = include_str!("../control_seeds.txt");

/// What many runs must have gone through, to be worth something: every operation, every fault, every way in which a copy goes.
const COVERED: [&str; 76] = [
    "attachments",
    "acknowledged writes",
    "fences",
    "volumes created",
    "volumes deleted",
    "volumes given up with their disk",
    "images created",
    "images deleted",
    "minimum lowered",
    "minimum raised",
    "default minimum changed",
    "replenish limit changed",
    "clean-up interval changed",
    "recovery interval changed",
    "scrub interval changed",
    "replenish interval changed",
    "cordoned nodes closed or not",
    "cordoned nodes emptied or not",
    "nodes cordoned",
    "nodes uncordoned",
    "empty selectors allowed or not",
    "selectors changed",
    "node tags changed",
    "disk tags changed",
    "node schedulable or not",
    "disk schedulable or not",
    "node evictions asked for",
    "node evictions cancelled",
    "disk evictions asked for",
    "disk evictions cancelled",
    "copy evictions asked for",
    "copy evictions cancelled",
    "disks taken off their node",
    "disks added to their node again",
    "keys of no disk put into a map",
    "readings asked for",
    "readings of a copy",
    "copies added",
    "copies added for a replica",
    "copies added for a replica while the limit is 0",
    "copies that wait for the limit of a node",
    "evictions that wait",
    "copies cleaned up",
    "copies evicted",
    "copies deleted with their image",
    "entries without a copy removed",
    "preparations moved",
    "preparations repeated",
    "files taken over",
    "files adopted",
    "whole copies taken back",
    "files removed",
    "files left behind on a disk that is away",
    "orphans of preparations removed",
    "managers removed",
    "syncs",
    "crashes of the controller",
    "silences",
    "processes stopped",
    "agents killed",
    "data sources killed",
    "clock set forward",
    "clock set back",
    "bytes flipped",
    "bytes flipped in silence",
    "files touched",
    "files deleted behind the agent",
    "disk directories emptied",
    "disks filled",
    "disks freed",
    "disks read-only",
    "disks writable again",
    "disks pulled",
    "disks returned",
    "disks returned elsewhere",
    "disks returned with another UUID",
];

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
    if all.of("runs") >= MANY_RUNS {
        let missed: Vec<&str> = COVERED.into_iter().filter(|what| all.of(what) == 0).collect();
        assert!(missed.is_empty(), "in {} runs there never were: {}", all.of("runs"), missed.join(", "));
    }
}

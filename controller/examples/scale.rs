//! Measures what one change costs the controller, with few images and with many: one line of JSON for each.
//!
//! `cargo xtask bench scale` runs it. Everything is in memory but the agents, which are fakes on real sockets.

#[path = "../tests/fleet/mod.rs"]
mod fleet;
#[path = "../tests/world/mod.rs"]
mod world;

use std::time::Instant;

use fleet::{CHANGES, Cost, Fleet};
use serde_json::json;

#[tokio::main]
async fn main() {
    for images in std::env::args().skip(1) {
        measure(images.parse().expect("arguments are numbers of images")).await;
    }
}

async fn measure(images: u32) {
    let say = |what: &str, cost: &Cost, seconds: f64| {
        let Cost { passes, bytes, by_kind, traffic } = cost;
        let line = json!({"images": images, "what": what, "passes": passes, "bytes": bytes, "seconds": seconds,
            "byKind": by_kind, "lists": traffic.lists, "reads": traffic.reads, "readBytes": traffic.read_bytes,
            "writes": traffic.writes, "writtenBytes": traffic.written_bytes, "events": traffic.events,
            "eventBytes": traffic.event_bytes,
            "managerBytes": traffic.manager_bytes});
        println!("{line}");
    };
    let mut fleet = Fleet::of(images).await;
    fleet.start().await;
    assert!(fleet.is_whole().await, "every copy is ready");
    let (mut cost, mut seconds) = (Cost::default(), f64::MAX);
    for _ in 0..3 {
        let began = Instant::now();
        cost = fleet.start().await;
        seconds = seconds.min(began.elapsed().as_secs_f64() - fleet::QUIET.as_secs_f64());
    }
    say("restart", &cost, seconds);
    for change in CHANGES {
        say(change, &fleet.cost_of(change).await, 0.0);
    }
}

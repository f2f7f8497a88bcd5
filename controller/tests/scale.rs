//! What one change costs the controller does not depend on how many images there are.

mod fleet;
mod world;

use fleet::{Cost, Fleet};

const FEW: u32 = 50;
const MANY: u32 = 500;

/// For each kind of change: passes, and bytes beside those of managers. Bounds, since passes that wait for the same thing may be one.
const LIMITS: [(&str, u64, u64); 4] =
    [("touched", 1, 4 << 10), ("heartbeat", 0, 4 << 10), ("verified", 40, 32 << 10), ("failed", 40, 32 << 10)];

fn check(change: &str, images: u32, cost: &Cost, passes: u64, bytes: u64) {
    let others = cost.bytes - cost.traffic.manager_bytes;
    let is_cheap = cost.passes <= passes && others <= bytes && cost.traffic.lists == 0;
    assert!(is_cheap, "{change} among {images} images: at most {passes} passes, {bytes} bytes and no list: {cost:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_change_costs_the_same_among_few_images_and_among_many() {
    let mut managers = vec![];
    for images in [FEW, MANY] {
        let mut fleet = Fleet::of(images).await;
        fleet.start().await;
        assert!(fleet.is_whole().await, "every copy is ready");
        for (change, passes, bytes) in LIMITS {
            let cost = fleet.cost_of(change).await;
            check(change, images, &cost, passes, bytes);
            if change == "touched" {
                assert_eq!(cost.traffic.manager_bytes, 0, "no disk is asked about an annotation");
            }
            if change == "failed" {
                managers.push(cost.by_kind.get("manager").copied().unwrap_or_default());
            }
        }
        // A setting is about everything, and costs a look at what is known.
        let cost = fleet.cost_of("setting").await;
        assert_eq!((cost.traffic.reads, cost.traffic.writes), (0, 0), "{cost:?}");
        assert!(cost.by_kind["image"] == u64::from(images), "{cost:?}");
    }
    assert!(managers.iter().all(|passes| *passes > 0), "a failed copy is looked at: {managers:?}");
}

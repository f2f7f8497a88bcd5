//! What becomes of copies that somebody takes out of the map, and of those on a disk that is away when their image is deleted.

mod world;

use std::collections::BTreeSet;
use std::time::Duration;

use api::names::condition::{CLEANED_UP, READY};
use api::{BackingImage, BackingImageManager, ConditionStatus, Node, Setting, condition};
use backing_image_controller::http::{ApiState, router};
use futures::StreamExt;
use runtime::metrics::Metrics;
use serde_json::{Value, json};
use store::{Preconditions, Selector};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;
use world::{World, eventually, world};

const IMAGE: &str = "/apis/longhorn.io/v1beta2/namespaces/longhorn-system/backingimages/ubuntu";

async fn three_copies(world: &World) {
    world.create_image("ubuntu").await;
    eventually("three copies", async || world.ready_copies("ubuntu").await == 3).await;
}

async fn spec(world: &World) -> api::image::BackingImageSpec {
    world.store.get::<BackingImage>("ubuntu").await.unwrap().unwrap().spec
}

async fn wanted(world: &World) -> Vec<String> {
    spec(world).await.disk_file_spec_map.into_keys().collect()
}

fn transfers(world: &World) -> Vec<u32> {
    let counts = world.workloads.script.lock().unwrap().counts.clone();
    ["source", "fetch", "sync", "adopt"].iter().map(|what| counts.get(*what).copied().unwrap_or(0)).collect()
}

async fn set(world: &World, name: &str, value: &str) {
    let change = |s: &mut Setting| s.value = value.into();
    world.store.modify::<Setting>(name, change).await.unwrap();
}

async fn set_ready(world: &World, node: &str, status: ConditionStatus) {
    let change = |n: &mut Node| {
        let conditions = &mut n.status.as_mut().unwrap().conditions;
        *conditions = vec![api::Condition::new(READY, status, "Test", "somebody pulled its plug")];
    };
    world.store.modify_status::<Node>(node, change).await.unwrap();
}

#[tokio::test]
async fn an_emptied_map_is_filled_again_and_no_copy_is_made_anew() {
    let world = world().await;
    three_copies(&world).await;
    let before = (wanted(&world).await, transfers(&world));
    world.store.modify::<BackingImage>("ubuntu", |i| i.spec.disk_file_spec_map.clear()).await.unwrap();
    eventually("the map is filled again", async || wanted(&world).await == before.0).await;
    let status = world.image("ubuntu").await;
    let told = condition::find(&status.conditions, CLEANED_UP).unwrap();
    assert_eq!(told.reason, "CleanUpRefused");
    assert!(told.message.contains("fewer than minNumberOfCopies asks for (3)"), "{}", told.message);
    eventually("three copies", async || world.ready_copies("ubuntu").await == 3).await;
    for disk in ["uuid-1", "uuid-2", "uuid-3"] {
        assert_eq!(world.workloads.files(disk).len(), 1, "{disk}");
    }
    assert_eq!(transfers(&world), before.1);
}

#[tokio::test]
async fn what_no_guard_keeps_goes_when_its_key_is_taken_out() {
    let world = world().await;
    three_copies(&world).await;
    let change = |i: &mut BackingImage| {
        i.spec.min_number_of_copies = 1;
        i.spec.disk_file_spec_map.retain(|disk, _| disk == "uuid-2");
    };
    world.store.modify::<BackingImage>("ubuntu", change).await.unwrap();
    eventually("two files are gone", async || {
        world.workloads.files("uuid-1").is_empty() && world.workloads.files("uuid-3").is_empty()
    })
    .await;
    assert_eq!(world.workloads.files("uuid-2").len(), 1);
    assert_eq!((world.ready_copies("ubuntu").await, wanted(&world).await), (1, vec!["uuid-2".to_owned()]));
    assert!(condition::find(&world.image("ubuntu").await.conditions, CLEANED_UP).is_none());
}

#[tokio::test]
async fn the_http_api_says_which_guard_keeps_a_copy() {
    let world = world().await;
    three_copies(&world).await;
    let (sender, ready) = tokio::sync::watch::channel(Ok(()));
    std::mem::forget(sender);
    let api = router(ApiState {
        store: world.store.clone(),
        metrics: Metrics::default(),
        ready,
        shutdown: CancellationToken::new(),
    });
    let call = async |method: &str, body: Value| {
        let body = if body.is_null() { axum::body::Body::empty() } else { body.to_string().into() };
        let request = axum::http::Request::builder().method(method).uri(IMAGE).body(body).unwrap();
        let response = api.clone().oneshot(request).await.unwrap();
        let status = response.status().as_u16();
        let bytes = axum::body::to_bytes(response.into_body(), 1 << 20).await.unwrap();
        (status, serde_json::from_slice::<Value>(&bytes).unwrap_or(Value::Null))
    };
    // What changes all the time is not what this is about.
    let put = async |change: &dyn Fn(&mut Value)| {
        let (_, mut object) = call("GET", Value::Null).await;
        object["spec"]["minNumberOfCopies"] = 3.into();
        object["metadata"].as_object_mut().unwrap().shift_remove("resourceVersion");
        change(&mut object["spec"]);
        call("PUT", object).await
    };
    let (status, answer) = put(&|spec| spec["diskFileSpecMap"] = json!({})).await;
    assert_eq!((status, answer["reason"].as_str()), (403, Some("Forbidden")), "{answer}");
    let why = answer["message"].as_str().unwrap();
    assert!(why.contains("on disk-1 of node-1 is kept: 0 ready copies would be left"), "{why}");
    // An object that says nothing of the map leaves it alone.
    let (status, answer) = put(&|spec| drop(spec.as_object_mut().unwrap().shift_remove("diskFileSpecMap"))).await;
    assert_eq!((status, answer["spec"]["diskFileSpecMap"].as_object().map(|m| m.len())), (200, Some(3)), "{answer}");

    world.create_volume("v", "ubuntu").await;
    eventually("replicas", async || world.store.list::<api::Replica>(&Selector::default()).await.unwrap().len() == 3)
        .await;
    let (status, answer) = put(&|spec| {
        spec["minNumberOfCopies"] = 1.into();
        drop(spec["diskFileSpecMap"].as_object_mut().unwrap().shift_remove("uuid-1"));
    })
    .await;
    let why = answer["message"].as_str().unwrap_or_default();
    assert!(status == 403 && why.contains("of volume v uses it") && why.contains("replica v-r-"), "{answer}");
    assert_eq!(wanted(&world).await.len(), 3);
}

#[tokio::test]
async fn an_edit_is_never_overwritten_by_what_was_decided_before_it() {
    let world = world().await;
    three_copies(&world).await;
    set(&world, "backing-image-cleanup-wait-interval", "0").await;
    let others = async {
        for n in 0..20 {
            // Copies come and go meanwhile.
            let change = |i: &mut BackingImage| i.spec.min_number_of_copies = 1 + 2 * (n % 2);
            world.store.modify::<BackingImage>("ubuntu", change).await.unwrap();
            tokio::time::sleep(std::time::Duration::from_millis(3)).await; // poll
        }
    };
    let edits = async {
        for n in 0..25 {
            let add =
                |i: &mut BackingImage| drop(i.spec.disk_file_spec_map.insert(format!("own-{n}"), Default::default()));
            world.store.modify::<BackingImage>("ubuntu", add).await.unwrap();
            tokio::task::yield_now().await;
        }
    };
    tokio::join!(others, edits);
    let keys = wanted(&world).await;
    let lost: Vec<String> = (0..25).map(|n| format!("own-{n}")).filter(|own| !keys.contains(own)).collect();
    assert!(lost.is_empty(), "{lost:?}");
}

#[tokio::test]
async fn what_was_left_on_a_disk_goes_when_it_is_back() {
    let world = world().await;
    three_copies(&world).await;
    set_ready(&world, "node-2", ConditionStatus::Unknown).await;
    eventually("the copy is unknown", async || world.ready_copies("ubuntu").await == 2).await;
    world.store.delete::<BackingImage>("ubuntu", &Preconditions::default()).await.unwrap();
    eventually("image gone", async || world.store.get::<BackingImage>("ubuntu").await.unwrap().is_none()).await;
    assert!(world.workloads.files("uuid-1").is_empty() && world.workloads.files("uuid-3").is_empty());
    assert_eq!(world.workloads.files("uuid-2").len(), 1);
    let manager: BackingImageManager = world.store.get("bim-uuid-2").await.unwrap().unwrap();
    assert_eq!(manager.spec.backing_images.keys().collect::<Vec<_>>(), ["ubuntu"], "it remembers the file");
    set_ready(&world, "node-2", ConditionStatus::True).await;
    eventually("its file is gone", async || world.workloads.files("uuid-2").is_empty()).await;
    eventually("managers gone", async || {
        world.store.list::<BackingImageManager>(&Selector::default()).await.unwrap().is_empty()
    })
    .await;
}

#[tokio::test]
async fn a_copy_that_cannot_be_removed_holds_up_no_other_image() {
    let world = world().await;
    three_copies(&world).await;
    world.workloads.script.lock().unwrap().undeletable = "ubuntu".into();
    world.store.delete::<BackingImage>("ubuntu", &Preconditions::default()).await.unwrap();
    world.create_image("debian").await;
    eventually("the other one has three copies", async || world.ready_copies("debian").await == 3).await;
    assert!(world.store.get::<BackingImage>("ubuntu").await.unwrap().is_some());
    world.workloads.script.lock().unwrap().undeletable.clear();
    eventually("it is gone", async || world.store.get::<BackingImage>("ubuntu").await.unwrap().is_none()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn images_that_come_at_once_keep_the_limit_of_each_node() {
    const NAMES: [&str; 8] = ["image-a", "image-b", "image-c", "image-d", "image-e", "image-f", "image-g", "image-h"];
    let world = world().await;
    let limit = "concurrent-backing-image-replenish-per-node-limit";
    eventually("settings", async || world.store.get::<Setting>(limit).await.unwrap().is_some()).await;
    set(&world, limit, "1").await;
    let mut changes = world.store.watch::<BackingImage>().await.unwrap();
    for name in NAMES {
        world.create_image(name).await;
    }
    let judge = async {
        while changes.next().await.is_some() {
            let images: Vec<BackingImage> = world.store.list(&Selector::default()).await.unwrap();
            let ready: Vec<BTreeSet<String>> = images
                .iter()
                .map(|image| {
                    let status = image.status.clone().unwrap_or_default();
                    planner::image::ready_disks(&status).map(str::to_owned).collect()
                })
                .collect();
            for disk in ["uuid-1", "uuid-2", "uuid-3"] {
                // The first file of an image is not limited.
                let is_made = |image: &BackingImage, ready: &BTreeSet<String>| {
                    !ready.is_empty() && !ready.contains(disk) && image.spec.disk_file_spec_map.contains_key(disk)
                };
                let made = images.iter().zip(&ready).filter(|(image, ready)| is_made(image, ready)).count();
                assert!(made <= 1, "{made} copies are being made on {disk}");
            }
            if ready.iter().filter(|ready| ready.len() == 3).count() == NAMES.len() {
                return;
            }
        }
    };
    // Less than the interval after which everything is looked at anyway: who waits is called.
    if tokio::time::timeout(Duration::from_secs(20), judge).await.is_err() {
        let images: Vec<BackingImage> = world.store.list(&Selector::default()).await.unwrap();
        let says = |image: &BackingImage| {
            let conditions = image.status.clone().unwrap_or_default().conditions;
            condition::find(&conditions, READY).map(|c| c.message.clone()).unwrap_or_default()
        };
        panic!("not every image has three copies: {:#?}", images.iter().map(says).collect::<Vec<_>>());
    }
}

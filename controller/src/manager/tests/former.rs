//! Copies of images that are gone or lost their name to another one, and files that are no copy of theirs.

use proto::bimrpc::BackingImageSpec;

use super::*;

const PATH: &str = "backing-images/ubuntu-0a1b2c3d";

impl World {
    /// A whole copy lies on the disk, whose agent knows it, and which its manager records or not.
    async fn with_copy(is_recorded: bool) -> World {
        let world = World::begin(vec![]).await;
        world.workloads.script.lock().unwrap().remembers = true;
        let spec = BackingImageSpec { name: "ubuntu".into(), uuid: UUID.into(), ..Default::default() };
        world.workloads.put("uuid-1", spec);
        let mut manager = BackingImageManager::new(MANAGER, Default::default());
        manager.spec.disk_uuid = "uuid-1".into();
        if is_recorded {
            manager.spec.backing_images.insert("ubuntu".into(), UUID.into());
        }
        world.store.create(&manager).await.unwrap();
        world.hear().await;
        // It starts the agent.
        world.pass().await;
        world
    }

    /// The requests to remove files that the agent got, orphans not counted.
    fn deletions(&self) -> u32 {
        self.workloads.script.lock().unwrap().counts.get("delete").copied().unwrap_or_default()
    }

    async fn manager(&self) -> BackingImageManager {
        self.store.get(MANAGER).await.unwrap().unwrap()
    }

    async fn told(&self) -> Option<String> {
        self.manager().await.status?.orphans.get(PATH).map(|orphan| orphan.message.clone())
    }
}

/// The store was lost, and the user applied the image again: what lies on the disk has its former uuid.
#[tokio::test]
async fn a_copy_of_a_former_uuid_is_told_and_removed_a_minute_later() {
    let world = World::with_copy(false).await;
    let mut next = image("ubuntu", "ffffffff");
    let elsewhere = api::image::DiskFileStatus { state: CopyState::Ready, ..Default::default() };
    next.status.as_mut().unwrap().disk_file_status_map.insert("uuid-2".into(), elsewhere);
    world.create_image(next).await;
    world.hear().await;
    world.pass().await;
    assert_eq!((world.deletions(), world.removed().len()), (0, 0), "it is told first");
    let told = world.told().await.unwrap_or_default();
    assert!(told.contains("image ubuntu is another one now, with uuid ffffffff; it is removed at"), "{told}");
    world.wait();
    world.hear().await;
    world.pass().await;
    let removed: Vec<String> = world.removed().into_iter().map(|request| request.uuid).collect();
    assert_eq!((world.deletions(), removed), (0, vec![UUID.to_owned()]));
}

/// Its finalizer was taken off, and the controller has not heard of the replica yet.
#[tokio::test]
async fn what_the_manager_records_stays_while_a_replica_lies_over_it() {
    let world = World::with_copy(true).await;
    let over = world.store.create(&replica("uuid-1")).await.unwrap();
    let recheck = reconcile(MANAGER, &world.shared).await.unwrap();
    assert_eq!((world.deletions(), recheck), (0, Some(REFUSED_RETRY)), "the store was asked");
    assert_eq!(world.manager().await.spec.backing_images["ubuntu"], UUID, "nothing is forgotten");
    world.hear().await;
    world.pass().await;
    let told = world.told().await.unwrap_or_default();
    assert!(
        told.ends_with("image ubuntu does not exist; it is left because replica r of volume v lies over it"),
        "{told}"
    );
    world.store.delete::<Replica>(&over.name_any(), &Default::default()).await.unwrap();
    world.hear().await;
    world.pass().await;
    assert_eq!(world.deletions(), 1);
    assert!(world.manager().await.spec.backing_images.is_empty());
}

#[tokio::test]
async fn a_stray_copy_goes_only_while_the_store_says_that_another_one_is_ready() {
    let check = async |change: fn(&mut BackingImage), over: Option<Replica>, expected: u32, what: &str| {
        let world = World::with_copy(false).await;
        let mut of = image("ubuntu", UUID);
        let elsewhere = api::image::DiskFileStatus { state: CopyState::Ready, ..Default::default() };
        of.status.as_mut().unwrap().disk_file_status_map.insert("uuid-2".into(), elsewhere);
        world.create_image(of).await;
        world.hear().await;
        // What the cache does not show.
        world.store.modify_status::<BackingImage>("ubuntu", change).await.unwrap();
        if let Some(replica) = over {
            world.store.create(&replica).await.unwrap();
        }
        world.pass().await;
        assert_eq!(world.deletions(), expected, "{what}");
    };
    check(|_| {}, None, 1, "another one is ready").await;
    check(|_| {}, Some(replica("uuid-2")), 1, "a replica lies elsewhere").await;
    check(|_| {}, Some(replica("uuid-1")), 0, "a replica lies over it").await;
    let lost = |image: &mut BackingImage| image.status.as_mut().unwrap().disk_file_status_map.clear();
    check(lost, None, 0, "it may be the last").await;
    let another = |image: &mut BackingImage| image.status.as_mut().unwrap().uuid = "ffffffff".into();
    check(another, None, 0, "it is of no image now, which is told first").await;
}

#[tokio::test]
async fn an_orphan_over_which_a_replica_lies_after_all_is_told_so_and_tried_again_later() {
    let world = World::of(vec![remains("ubuntu", false)]).await;
    world.store.create(&replica("uuid-1")).await.unwrap();
    let before = Timestamp::now();
    world.pass().await;
    let seen = world.sightings().remove(PATH).unwrap();
    assert_eq!((world.removed(), seen.refused.as_str()), (vec![], "replica r of volume v lies over it"));
    assert!(seen.since >= before, "its wait begins anew");
    world.hear().await;
    world.pass().await;
    let told = world.told().await.unwrap_or_default();
    assert!(told.ends_with("(replica r of volume v lies over it)"), "{told}");
}

#[tokio::test]
async fn a_file_is_replaced_only_when_the_store_says_that_it_is_no_copy_of_its_image() {
    let check = async |change: fn(&mut BackingImage), expected: bool, what: &str| {
        let world = World::with_copy(true).await;
        let mut of = image("ubuntu", UUID);
        of.spec.disk_file_spec_map.insert("uuid-1".into(), Default::default());
        of.status.as_mut().unwrap().checksum = "another".into();
        world.create_image(of).await;
        world.hear().await;
        let observed = observe(MANAGER, &world.shared).await.unwrap();
        // What the cache does not show.
        world.store.modify_status::<BackingImage>("ubuntu", change).await.unwrap();
        world.store.modify::<BackingImage>("ubuntu", change).await.unwrap();
        assert_eq!(is_to_be_replaced("ubuntu", UUID, &observed, &world.shared).await.unwrap(), expected, "{what}");
    };
    check(|_| {}, true, "it differs").await;
    check(|image| image.status.as_mut().unwrap().checksum = "c0ffee".into(), false, "it does not differ").await;
    check(|image| image.status.as_mut().unwrap().uuid = "ffffffff".into(), false, "it is of no image now").await;
    check(|image| image.spec.disk_file_spec_map.clear(), false, "it is not wanted there").await;
}

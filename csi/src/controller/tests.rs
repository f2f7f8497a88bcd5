//! The controller service over an in-memory store, with reconcilers that do as they are told.

use std::sync::Arc;

use api::image::{BackingImageStatus, CopyState, DiskFileSpec, DiskFileStatus, SourceType};
use api::volume::{Robustness, VolumeState, VolumeStatus};
use api::{BackingImage, Condition, ConditionStatus, ErrorKind, Node, Volume, names};
use futures::StreamExt;
use kube::ResourceExt;
use proto::csi::volume_capability::AccessType;
use proto::csi::volume_capability::access_mode::Mode;
use store::TypedEvent;
use store::embedded::Embedded;
use tokio::task::JoinHandle;

use super::*;
use crate::capability::tests::{capability, mount};
use crate::deadline::Deadline;

const GIB: i64 = 1 << 30;

pub fn context() -> Context {
    let objects = Arc::new(Embedded::in_memory());
    Context { store: Store::new(objects, "longhorn-system"), in_flight: InFlight::default() }
}

pub fn soon(milliseconds: u64) -> Deadline {
    Deadline::after(Duration::from_millis(milliseconds), &CancellationToken::new())
}

fn request(name: &str, parameters: &[(&str, &str)]) -> csi::CreateVolumeRequest {
    csi::CreateVolumeRequest {
        name: name.into(),
        capacity_range: Some(csi::CapacityRange { required_bytes: GIB, limit_bytes: 0 }),
        volume_capabilities: vec![mount()],
        parameters: parameters.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect(),
        ..Default::default()
    }
}

async fn create(context: &Context, name: &str, parameters: &[(&str, &str)]) -> Result<csi::Volume, CsiError> {
    let answer = create::create_volume(context, request(name, parameters), &soon(20)).await?;
    Ok(answer.volume.unwrap())
}

pub fn error<T: std::fmt::Debug>(result: Result<T, CsiError>) -> (ErrorKind, String) {
    let error = result.unwrap_err();
    (error.kind(), error.to_string())
}

async fn image(context: &Context, change: impl FnOnce(&mut BackingImage)) -> BackingImage {
    let mut image = BackingImage::new("ubuntu", Default::default());
    image.spec.source_type = Some(SourceType::Download);
    image.spec.source_parameters = [("url".to_owned(), "http://example.com/u.qcow2".to_owned())].into();
    image.status = Some(BackingImageStatus::default());
    change(&mut image);
    let status = image.status.clone();
    let mut stored = context.store.create(&image).await.unwrap();
    stored.status = status;
    context.store.replace_status(&stored).await.unwrap()
}

async fn node(context: &Context, name: &str) {
    context.store.create(&Node::new(name, Default::default())).await.unwrap();
}

async fn set_status(context: &Context, name: &str, change: impl Fn(&mut VolumeStatus)) {
    loop {
        let mut volume = context.store.get::<Volume>(name).await.unwrap().unwrap();
        change(volume.status.get_or_insert_default());
        match context.store.replace_status(&volume).await {
            Err(error) if error.is_conflict() => continue,
            done => return drop(done.unwrap()),
        }
    }
}

/// Attaches and detaches as the volume reconciler would, and lets deleted volumes go.
fn reconciler(context: &Context) -> JoinHandle<()> {
    let store = context.store.clone();
    tokio::spawn(async move {
        let mut events = store.watch::<Volume>().await.unwrap();
        while let Some(event) = events.next().await {
            let TypedEvent::Applied(mut volume) = event.unwrap() else { continue };
            let wished = volume.spec.node_id.clone();
            let result = if volume.metadata.deletion_timestamp.is_some() {
                volume.metadata.finalizers = None;
                store.replace(&volume).await.map(drop)
            } else if volume
                .status
                .as_ref()
                .is_none_or(|s| s.current_node_id != wished || s.state == VolumeState::NotStarted)
            {
                let status = volume.status.get_or_insert_default();
                status.state = if wished.is_empty() { VolumeState::Detached } else { VolumeState::Attached };
                status.robustness = Robustness::Healthy;
                status.current_node_id = wished;
                store.replace_status(&volume).await.map(drop)
            } else {
                Ok(())
            };
            if let Err(error) = result {
                assert!(error.is_conflict() || error.kind() == ErrorKind::NotFound, "{error}");
            }
        }
    })
}

fn publish_request(volume: &str, node: &str) -> csi::ControllerPublishVolumeRequest {
    csi::ControllerPublishVolumeRequest {
        volume_id: volume.into(),
        node_id: node.into(),
        volume_capability: Some(mount()),
        ..Default::default()
    }
}

async fn publish(context: &Context, volume: &str, node: &str, patience: u64) -> Result<(), CsiError> {
    publish::publish(context, publish_request(volume, node), &soon(patience)).await.map(drop)
}

async fn unpublish(context: &Context, volume: &str, node: &str, patience: u64) -> Result<(), CsiError> {
    let request =
        csi::ControllerUnpublishVolumeRequest { volume_id: volume.into(), node_id: node.into(), ..Default::default() };
    publish::unpublish(context, request, &soon(patience)).await.map(drop)
}

async fn delete(context: &Context, volume: &str, patience: u64) -> Result<(), CsiError> {
    let request = csi::DeleteVolumeRequest { volume_id: volume.into(), ..Default::default() };
    delete::delete_volume(context, request, &soon(patience)).await.map(drop)
}

#[tokio::test]
async fn a_repeated_request_gets_the_same_volume() {
    let context = context();
    let parameters = [("numberOfReplicas", "2"), ("diskSelector", "ssd, fast")];
    let first = create(&context, "PVC-1", &parameters).await.unwrap();
    assert_eq!((first.volume_id.as_str(), first.capacity_bytes), ("pvc-1", GIB));
    assert_eq!(first.volume_context["numberOfReplicas"], "2");
    assert!(first.accessible_topology.is_empty());
    assert_eq!(create(&context, "PVC-1", &parameters).await.unwrap(), first);
    let volume = context.store.get::<Volume>("pvc-1").await.unwrap().unwrap();
    assert_eq!(
        (volume.spec.number_of_replicas, volume.spec.disk_selector.clone()),
        (2, vec!["ssd".to_owned(), "fast".into()])
    );
    assert_eq!(volume.finalizers(), [names::FINALIZER]);
}

#[tokio::test]
async fn a_different_request_for_the_same_name_lists_every_difference() {
    let context = context();
    create(&context, "v", &[("numberOfReplicas", "2")]).await.unwrap();
    let mut other = request("v", &[("numberOfReplicas", "3"), ("staleReplicaTimeout", "30")]);
    other.capacity_range = Some(csi::CapacityRange { required_bytes: 2 * GIB, limit_bytes: 2 * GIB });
    let (kind, text) = error(create::create_volume(&context, other, &soon(20)).await);
    assert_eq!(kind, ErrorKind::Incompatible);
    for part in
        ["numberOfReplicas: wanted 3, has 2", "staleReplicaTimeout: wanted 30, has 2880", "size: wanted 2147483648"]
    {
        assert!(text.contains(part), "{text}");
    }
}

#[tokio::test]
async fn requests_that_can_never_succeed_are_invalid_and_leave_nothing() {
    let context = context();
    let download = |parameters| {
        let source = [("backingImageDataSourceType", "download"), ("backingImageDataSourceParameters", parameters)];
        request("v", &[("backingImage", "u1"), source[0], source[1]])
    };
    let content = csi::VolumeContentSource { r#type: None };
    let rwx = capability(AccessType::Block(Default::default()), Mode::MultiNodeMultiWriter);
    for bad in [
        request("", &[]),
        csi::CreateVolumeRequest { volume_capabilities: vec![], ..request("v", &[]) },
        csi::CreateVolumeRequest { volume_capabilities: vec![rwx], ..request("v", &[]) },
        csi::CreateVolumeRequest { volume_content_source: Some(content), ..request("v", &[]) },
        csi::CreateVolumeRequest { mutable_parameters: [("a".into(), "b".into())].into(), ..request("v", &[]) },
        request("v", &[("numberOfReplicas", "-1")]),
        request("v", &[("backingImage", "u1"), ("backingImageDataSourceType", "download")]),
        request("v", &[("backingImage", "u1"), ("backingImageDataSourceType", "export-from-volume")]),
        download(r#"{"url":"ftp://example.com/u.qcow2"}"#),
        download(r#"{"url":"http://127.0.0.1/u.qcow2"}"#),
        download(r#"{"url":"http://example.com/u.qcow2","uri":"x"}"#),
    ] {
        let (kind, text) = error(create::create_volume(&context, bad, &soon(20)).await);
        assert_eq!(kind, ErrorKind::Invalid, "{text}");
    }
    assert!(context.store.list::<Volume>(&Default::default()).await.unwrap().is_empty());
    assert!(context.store.list::<BackingImage>(&Default::default()).await.unwrap().is_empty());
}

#[tokio::test]
async fn xfs_on_a_small_blank_volume_is_out_of_range() {
    let context = context();
    let mut small = request("v", &[("fsType", "xfs")]);
    small.capacity_range = Some(csi::CapacityRange { required_bytes: 64 << 20, limit_bytes: 0 });
    assert_eq!(error(create::create_volume(&context, small.clone(), &soon(20)).await).0, ErrorKind::OutOfRange);
    small.volume_capabilities = vec![capability(AccessType::Block(Default::default()), Mode::SingleNodeWriter)];
    assert!(create::create_volume(&context, small, &soon(20)).await.is_ok());
}

#[tokio::test]
async fn an_absent_image_is_made_when_the_class_says_how() {
    let context = context();
    let class = [
        ("backingImage", "ubuntu"),
        ("backingImageDataSourceType", "download"),
        ("backingImageDataSourceParameters", r#"{"url":"http://example.com/u.qcow2"}"#),
        ("backingImageMinNumberOfCopies", "2"),
        ("backingImageDiskSelector", "ssd"),
    ];
    let (one, two) = tokio::join!(create(&context, "one", &class), create(&context, "two", &class));
    assert!(one.is_ok() && two.is_ok());
    let image = context.store.get::<BackingImage>("ubuntu").await.unwrap().unwrap();
    assert_eq!(image.spec.source_parameters["url"], "http://example.com/u.qcow2");
    assert_eq!((image.spec.min_number_of_copies, image.spec.disk_selector.clone()), (2, vec!["ssd".to_owned()]));
    assert_eq!(image.finalizers(), [names::FINALIZER]);
    let volume = context.store.get::<Volume>("one").await.unwrap().unwrap();
    assert_eq!(volume.spec.backing_image, "ubuntu");
}

#[tokio::test]
async fn an_absent_image_that_a_volume_cannot_make_is_refused() {
    let context = context();
    for (source, wanted) in [
        ("", ErrorKind::NotFound),
        ("upload", ErrorKind::Invalid),
        ("clone", ErrorKind::Invalid),
        ("restore", ErrorKind::Invalid),
    ] {
        let given = [("backingImage", "nowhere"), ("backingImageDataSourceType", source)];
        let (kind, text) = error(create(&context, "v", &given).await);
        assert_eq!(kind, wanted, "{text}");
        assert!(text.contains("`nowhere`") && text.contains(source) && text.contains("first"), "{text}");
    }
}

#[tokio::test]
async fn an_image_that_exists_must_be_the_one_that_is_described() {
    let context = context();
    image(&context, |_| ()).await;
    let given = [("backingImage", "ubuntu"), ("backingImageDataSourceParameters", r#"{"url":"http://other/u.qcow2"}"#)];
    let (kind, text) = error(create(&context, "v", &given).await);
    assert_eq!(kind, ErrorKind::Incompatible);
    assert!(
        text.contains("sourceParameters.url: wanted http://other/u.qcow2, has http://example.com/u.qcow2"),
        "{text}"
    );
    assert!(create(&context, "v", &[("backingImageName", "ubuntu")]).await.is_ok());
}

#[tokio::test]
async fn a_pinned_checksum_is_compared_before_a_volume_is_made() {
    let context = context();
    let mut found = image(&context, |_| ()).await;
    let wanted = "a".repeat(128);
    let given = [("backingImage", "ubuntu"), ("backingImageChecksum", wanted.as_str())];
    assert_eq!(error(create(&context, "v", &given).await).0, ErrorKind::Pending);
    found.status.as_mut().unwrap().checksum = "b".repeat(128);
    let mut found = context.store.replace_status(&found).await.unwrap();
    assert_eq!(error(create(&context, "v", &given).await).0, ErrorKind::Incompatible);
    found.status.as_mut().unwrap().checksum = wanted.clone();
    context.store.replace_status(&found).await.unwrap();
    assert!(create(&context, "v", &given).await.is_ok());
}

#[tokio::test]
async fn an_image_that_is_being_deleted_is_not_used() {
    let context = context();
    image(&context, |image| image.metadata.finalizers = Some(vec!["longhorn.io".into()])).await;
    context.store.delete::<BackingImage>("ubuntu", &Default::default()).await.unwrap();
    assert_eq!(error(create(&context, "v", &[("backingImage", "ubuntu")]).await).0, ErrorKind::NotReady);
}

#[tokio::test]
async fn the_virtual_size_of_the_image_is_the_least_and_the_default() {
    let context = context();
    let mut found = image(&context, |_| ()).await;
    let given = [("backingImage", "ubuntu")];
    let sizeless = |name| csi::CreateVolumeRequest { capacity_range: None, ..request(name, &given) };
    let (kind, text) = error(create::create_volume(&context, sizeless("a"), &soon(20)).await);
    assert_eq!(kind, ErrorKind::Pending, "{text}");
    found.status.as_mut().unwrap().virtual_size = 2 * GIB as u64;
    context.store.replace_status(&found).await.unwrap();
    let made = create::create_volume(&context, sizeless("a"), &soon(2000)).await.unwrap();
    assert_eq!(made.volume.unwrap().capacity_bytes, 2 * GIB);
    let (kind, text) = error(create(&context, "b", &given).await);
    assert!(kind == ErrorKind::OutOfRange && text.contains("2147483648"), "{text}");
}

#[tokio::test]
async fn one_call_per_volume_at_a_time() {
    let context = context();
    let _flight = context.in_flight.take("v").unwrap();
    assert_eq!(error(create(&context, "v", &[]).await).0, ErrorKind::Pending);
    assert_eq!(error(publish(&context, "v", "n", 20).await).0, ErrorKind::Pending);
    assert_eq!(error(unpublish(&context, "v", "n", 20).await).0, ErrorKind::Pending);
    assert_eq!(error(delete(&context, "v", 20).await).0, ErrorKind::Pending);
}

#[tokio::test]
async fn attaches_detaches_and_deletes_and_may_be_asked_again() {
    let context = context();
    let reconciler = reconciler(&context);
    node(&context, "node-1").await;
    node(&context, "node-2").await;
    create(&context, "v", &[]).await.unwrap();
    for _ in 0..2 {
        publish(&context, "v", "node-1", 5000).await.unwrap();
    }
    let listed = list::list_volumes(&context, Default::default(), &soon(20)).await.unwrap();
    assert_eq!(listed.entries[0].status.as_ref().unwrap().published_node_ids, ["node-1"]);
    let (kind, text) = error(publish(&context, "v", "node-2", 5000).await);
    assert!(kind == ErrorKind::NotReady && text.contains("`node-1`"), "{text}");
    assert_eq!(error(delete(&context, "v", 5000).await).0, ErrorKind::NotReady);
    unpublish(&context, "v", "node-2", 5000).await.unwrap();
    assert_eq!(context.store.get::<Volume>("v").await.unwrap().unwrap().spec.node_id, "node-1");
    for node in ["node-1", "node-1", ""] {
        unpublish(&context, "v", node, 5000).await.unwrap();
    }
    publish(&context, "v", "node-2", 5000).await.unwrap();
    unpublish(&context, "v", "", 5000).await.unwrap();
    for _ in 0..2 {
        delete(&context, "v", 5000).await.unwrap();
    }
    assert!(context.store.get::<Volume>("v").await.unwrap().is_none());
    unpublish(&context, "v", "node-2", 20).await.unwrap();
    reconciler.abort();
}

/// The patience of the attachment is far beyond that of the test.
#[tokio::test]
async fn a_detachment_ends_a_pending_attachment() {
    let context = context();
    node(&context, "node-1").await;
    create(&context, "v", &[]).await.unwrap();
    let mut events = context.store.watch::<Volume>().await.unwrap();
    let pending = {
        let context = context.clone();
        tokio::spawn(async move { publish(&context, "v", "node-1", 3_600_000).await })
    };
    while context.store.get::<Volume>("v").await.unwrap().unwrap().spec.node_id.is_empty() {
        events.next().await.unwrap().unwrap();
    }
    // The wish is there a moment before the attachment begins to wait; until then callers are asked to repeat.
    let detached = async {
        loop {
            match unpublish(&context, "v", "node-1", 5000).await {
                Err(CsiError::InFlight { .. }) => tokio::task::yield_now().await,
                outcome => break outcome,
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(20), detached).await.expect("the attachment lets go").unwrap();
    let (kind, text) = error(pending.await.unwrap());
    assert!(kind == ErrorKind::NotReady && text.contains("was told to leave node `node-1`"), "{text}");
}

#[tokio::test]
async fn what_does_not_exist_cannot_be_attached() {
    let context = context();
    assert_eq!(error(publish(&context, "v", "node-1", 20).await).0, ErrorKind::NotFound);
    create(&context, "v", &[]).await.unwrap();
    let (kind, text) = error(publish(&context, "v", "node-1", 20).await);
    assert!(kind == ErrorKind::NotFound && text.contains("`node-1`"), "{text}");
    assert_eq!(context.store.get::<Volume>("v").await.unwrap().unwrap().spec.node_id, "");
    for bad in [
        publish_request("", "n"),
        publish_request("v", ""),
        csi::ControllerPublishVolumeRequest { volume_capability: None, ..publish_request("v", "n") },
        csi::ControllerPublishVolumeRequest { readonly: true, ..publish_request("v", "n") },
    ] {
        assert_eq!(error(publish::publish(&context, bad, &soon(20)).await).0, ErrorKind::Invalid);
    }
}

#[tokio::test]
async fn a_slow_attachment_answers_before_the_deadline_with_its_progress() {
    let context = context();
    node(&context, "node-1").await;
    image(&context, |image| {
        image.spec.disk_file_spec_map =
            [("d1", DiskFileSpec::default()), ("d3", DiskFileSpec::default())].map(|(k, v)| (k.to_owned(), v)).into();
        let copy = |state, progress| DiskFileStatus { state, progress, ..Default::default() };
        let status = image.status.as_mut().unwrap();
        status.disk_file_status_map = [("d1", copy(CopyState::Ready, 100)), ("d3", copy(CopyState::InProgress, 61))]
            .map(|(k, v)| (k.to_owned(), v))
            .into();
        let text = "1 of 2 copies ready, disk-1 of node-3 at 61 %";
        status.conditions = vec![Condition::new(names::condition::READY, ConditionStatus::True, "Ready", text)];
    })
    .await;
    create(&context, "v", &[("backingImage", "ubuntu")]).await.unwrap();
    let (kind, text) = error(publish(&context, "v", "node-1", 50).await);
    assert_eq!(kind, ErrorKind::Pending);
    assert!(text.contains("image ubuntu: 1 of 2 copies ready, disk-1 of node-3 at 61 %"), "{text}");
    // The wish stays: the work goes on while the caller waits to ask again.
    assert_eq!(context.store.get::<Volume>("v").await.unwrap().unwrap().spec.node_id, "node-1");
}

#[tokio::test]
async fn a_pending_attachment_tells_each_fact_once_in_one_line() {
    let context = context();
    node(&context, "node-1").await;
    let problem = |r#type: &str, status, message: &str| {
        let mut condition = Condition::new(r#type, status, "Failed", message).with_hint("correct the address");
        condition.next_retry_time = "2026-01-01T00:00:00Z".into();
        condition
    };
    let broken = problem(names::condition::READY, ConditionStatus::False, "the server answered 404");
    image(&context, |image| image.status.as_mut().unwrap().conditions = vec![broken.clone()]).await;
    create(&context, "v", &[("backingImage", "ubuntu")]).await.unwrap();
    let message = "image ubuntu: the server answered 404\nand more";
    let waits = problem(names::condition::WAIT_FOR_BACKING_IMAGE, ConditionStatus::True, message);
    set_status(&context, "v", |status| status.conditions = vec![waits.clone()]).await;
    let (_, text) = error(publish(&context, "v", "node-1", 50).await);
    expect_test::expect!["volume `v` is not attached to node `node-1` yet: image ubuntu: the server answered 404; and more, next attempt at 2026-01-01T00:00:00Z (correct the address)"].assert_eq(&text);
}

#[tokio::test]
async fn an_image_that_is_too_large_is_told_at_once() {
    let context = context();
    node(&context, "node-1").await;
    create(&context, "v", &[]).await.unwrap();
    let condition = Condition::new(
        names::condition::BACKING_IMAGE_INCOMPATIBLE,
        ConditionStatus::True,
        "BackingImageVirtualSizeTooLarge",
        "image ubuntu needs 5 GiB, the volume has 1 GiB",
    );
    set_status(&context, "v", |status| status.conditions = vec![condition.clone()]).await;
    let (kind, text) = error(publish(&context, "v", "node-1", 10_000).await);
    assert!(kind == ErrorKind::OutOfRange && text.contains("5 GiB"), "{text}");
    let request = csi::ControllerGetVolumeHealthRequest { volume_id: "v".into(), ..Default::default() };
    let health = list::get_health(&context, request, &soon(20)).await.unwrap().volume_health.unwrap();
    assert_eq!(health.health_statuses[0].reason, "BackingImageIncompatible");
}

#[tokio::test]
async fn ill_volumes_are_listed_and_well_ones_are_not() {
    let context = context();
    create(&context, "well", &[]).await.unwrap();
    create(&context, "ill", &[]).await.unwrap();
    set_status(&context, "ill", |status| status.robustness = Robustness::Degraded).await;
    let ill = list::list_health(&context, Default::default(), &soon(20)).await.unwrap();
    assert_eq!(ill.entries.iter().map(|e| e.volume_id.as_str()).collect::<Vec<_>>(), ["ill"]);
}

#[tokio::test]
async fn capabilities_are_confirmed_or_the_reason_is_told() {
    let context = context();
    let request = |capabilities, parameters: &[(&str, &str)]| csi::ValidateVolumeCapabilitiesRequest {
        volume_id: "v".into(),
        volume_capabilities: capabilities,
        parameters: parameters.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect(),
        ..Default::default()
    };
    assert_eq!(error(create::validate(&context, request(vec![mount()], &[]), &soon(20)).await).0, ErrorKind::NotFound);
    create(&context, "v", &[("numberOfReplicas", "2")]).await.unwrap();
    assert_eq!(error(create::validate(&context, request(vec![], &[]), &soon(20)).await).0, ErrorKind::Invalid);
    let good =
        create::validate(&context, request(vec![mount()], &[("numberOfReplicas", "2")]), &soon(20)).await.unwrap();
    assert_eq!(good.confirmed.unwrap().volume_capabilities, [mount()]);
    let other =
        create::validate(&context, request(vec![mount()], &[("numberOfReplicas", "3")]), &soon(20)).await.unwrap();
    assert!(other.confirmed.is_none() && other.message.contains("wanted 3, has 2"), "{}", other.message);
    let rwx = capability(AccessType::Mount(Default::default()), Mode::MultiNodeMultiWriter);
    let refused = create::validate(&context, request(vec![rwx], &[]), &soon(20)).await.unwrap();
    assert!(refused.confirmed.is_none() && refused.message.contains("ReadWriteOnce"), "{}", refused.message);
}

#[tokio::test]
async fn a_deletion_that_takes_long_says_so() {
    let context = context();
    create(&context, "v", &[]).await.unwrap();
    assert_eq!(error(delete(&context, "v", 30).await).0, ErrorKind::Pending);
    assert_eq!(error(create(&context, "v", &[]).await).0, ErrorKind::NotReady);
}

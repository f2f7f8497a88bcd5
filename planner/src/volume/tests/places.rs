//! Where the replicas of a blank volume come.

use api::image::CopyState;

use super::*;

#[test]
fn a_replica_lies_only_where_its_image_can_be() {
    let said = |change: fn(&mut api::BackingImage), disk: fn(&mut Disk)| {
        let mut o = world("");
        let mut image = api::BackingImage::new("ubuntu", Default::default());
        image.status.get_or_insert_default().size = 50;
        change(&mut image);
        o.volume.spec.backing_image = "ubuntu".into();
        o.image = Some(image);
        disk(&mut o.disks.list[1]);
        let decision = decide(&o);
        let created = decision.actions.iter().filter(|a| matches!(a, Action::CreateReplica(_))).count();
        let scheduled = condition::find(&decision.status.conditions, api::names::condition::SCHEDULED).cloned();
        (created, scheduled.unwrap_or_default().message)
    };
    let full: fn(&mut Disk) = |d| d.available_bytes = 49;
    let (created, why) = said(|_| (), full);
    assert_eq!(created, 2);
    assert!(why.contains("disk of n2: 49 bytes are free of 50 that a copy of the image needs there"), "{why}");
    assert_eq!(said(|_| (), |_| ()).0, 3);
    let has_copy = |image: &mut api::BackingImage| {
        image.spec.disk_file_spec_map.insert("d2".into(), Default::default());
    };
    assert_eq!(said(has_copy, full).0, 3, "its room is taken already");
    let was_full: fn(&mut api::BackingImage) = |image| {
        image.spec.disk_file_spec_map.insert("d2".into(), Default::default());
        let kind = Some(api::ErrorKind::Exhausted);
        let copy = api::image::DiskFileStatus { error_kind: kind, ..Default::default() };
        image.status.as_mut().unwrap().disk_file_status_map.insert("d2".into(), copy);
    };
    assert_eq!(said(was_full, full).0, 2, "it was too small for the copy");
    assert_eq!(said(|image| image.status = None, full).0, 3, "its size is not known yet");
    let slow: fn(&mut api::BackingImage) = |image| image.spec.disk_selector = vec!["ssd".into()];
    assert_eq!(said(slow, |d| d.tags = vec!["ssd".into()]).0, 1, "the selectors of the image count, too");
    assert_eq!(said(|_| (), |d| d.cordoned = true).0, 2);
}

#[test]
fn the_reason_for_the_place_of_a_replica_is_kept() {
    let mut o = world("");
    o.volume.spec.number_of_replicas = 2;
    o.image = Some(api::BackingImage::new("ubuntu", Default::default()));
    let copies = &mut o.image.as_mut().unwrap().status.get_or_insert_default().disk_file_status_map;
    copies.insert("d1".into(), api::image::DiskFileStatus { state: CopyState::Ready, ..Default::default() });
    for (disk, free) in o.disks.list.iter_mut().zip([1000, 3000, 2000]) {
        (disk.maximum_bytes, disk.zone) = (free, "x".into());
    }
    let reasons = decide(&o).actions.into_iter().filter_map(|action| match action {
        Action::CreateReplica(replica) => Some(format!("{}: {}", replica.spec.disk_id, replica.spec.place_reason)),
        _ => None,
    });
    expect![[r#"
        d1: one of 3 eligible disks: 0 others in zone `x`, 0 others on node n1, 1000 bytes free, a copy of the image is there
        d2: one of 2 eligible disks: 1 others in zone `x`, 0 others on node n2, 3000 bytes free"#]]
    .assert_eq(&reasons.collect::<Vec<_>>().join("\n"));
}

#[test]
fn replicas_lie_in_distinct_zones_then_on_distinct_nodes() {
    let mut o = world("");
    o.volume.spec.number_of_replicas = 2;
    for (disk, zone) in o.disks.list.iter_mut().zip(["x", "x", "y"]) {
        disk.zone = zone.into();
    }
    // A copy is there already, yet the zone comes first.
    o.image = Some(api::BackingImage::new("ubuntu", Default::default()));
    let copies = &mut o.image.as_mut().unwrap().status.get_or_insert_default().disk_file_status_map;
    for disk in ["d1", "d2"] {
        copies.insert(disk.into(), api::image::DiskFileStatus { state: CopyState::Ready, ..Default::default() });
    }
    let places = decide(&o).actions;
    let places =
        places.iter().filter_map(|a| if let Action::CreateReplica(r) = a { Some(&*r.spec.disk_id) } else { None });
    assert!(places.collect::<Vec<_>>().contains(&"d3"));
}

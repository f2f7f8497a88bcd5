//! Tables of what nodes get.

use std::sync::Arc;

use serde_json::{Value, json};
use store::Store;
use store::embedded::Embedded;

use super::*;
use crate::role::EngineOptions;

fn machine(metadata: Value) -> Machine {
    serde_json::from_value(json!({"metadata": metadata})).unwrap()
}

/// Disks by name with their paths, or the reason why there are none.
fn given(
    is_new: bool,
    labeled_only: bool,
    metadata: Value,
    path: &Path,
) -> Result<Vec<(String, String)>, &'static str> {
    let defaults = Defaults { labeled_only, path: path.display().to_string(), reserved_percent: 30 };
    let disks = disks(is_new, &machine(metadata), &defaults).map_err(|no| no.reason)?;
    Ok(disks.into_iter().map(|(name, disk)| (name, disk.path)).collect())
}

#[test]
fn the_setting_and_the_label_decide_who_gets_a_disk() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("longhorn");
    let labeled = |value: &str| json!({"labels": {CREATE_LABEL: value}});
    let disk = Ok(vec![(DEFAULT_DISK.to_owned(), path.display().to_string())]);
    for (is_new, labeled_only, metadata, expected) in [
        (true, false, json!({}), disk.clone()),
        // What a user took away is not given again.
        (false, false, json!({}), Err("NoDisks")),
        (true, true, json!({}), Err("NotLabeled")),
        (true, true, labeled("false"), Err("NotLabeled")),
        (true, true, labeled("true"), disk.clone()),
        (false, true, labeled("True"), disk.clone()),
        (false, true, labeled("config"), Err("NoAnnotation")),
    ] {
        assert_eq!(
            given(is_new, labeled_only, metadata.clone(), &path),
            expected,
            "{is_new} {labeled_only} {metadata}"
        );
    }
    assert!(path.is_dir());
}

#[test]
fn a_default_disk_keeps_a_share_for_others() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("longhorn");
    let defaults = Defaults { labeled_only: false, path: path.display().to_string(), reserved_percent: 30 };
    let disk = default_disk(&defaults).map_err(|no| no.message).unwrap().remove(DEFAULT_DISK).unwrap();
    let size = rustix::fs::statvfs(&path).map(|found| found.f_blocks * found.f_frsize).unwrap();
    assert_eq!(disk.storage_reserved, size / 100 * 30);
}

#[test]
fn the_annotation_lists_disks_as_longhorn_does() {
    let read = |text: &str| configured(text).map_err(|no| no.message);
    let disks = read(
        r#"[{"path":"/mnt/disk1","allowScheduling":true},
            {"name":"fast-ssd-disk","path":"/mnt/disk2/","allowScheduling":false,"storageReserved":10485760,"tags":["ssd","fast"]}]"#,
    )
    .unwrap();
    assert_eq!(disks.keys().collect::<Vec<_>>(), ["disk-mnt-disk1", "fast-ssd-disk"]);
    let plain = DiskSpec { path: "/mnt/disk1".into(), ..DiskSpec::default() };
    assert_eq!(disks["disk-mnt-disk1"], plain);
    let ssd = &disks["fast-ssd-disk"];
    assert_eq!((ssd.path.as_str(), ssd.allow_scheduling, ssd.storage_reserved), ("/mnt/disk2", false, 10_485_760));
    assert_eq!(ssd.tags, ["ssd", "fast"]);
    let emptied = read(r#"[{"path":"/a","evictionRequested":true,"diskType":"block"}]"#).unwrap();
    assert!(emptied["disk-a"].eviction_requested && emptied["disk-a"].r#type == "block");
    assert!(read(r#"[{"path":"/a"}]"#).unwrap()["disk-a"].allow_scheduling);
    for (wrong, why) in [
        ("", "EOF"),
        ("[]", "empty"),
        (r#"[{"path":"a"}]"#, "absolute"),
        (r#"[{"path":"/a"},{"path":"/a/"}]"#, "twice"),
        (r#"[{"path":"/a","name":"x"},{"path":"/b","name":"x"}]"#, "called `x`"),
        (r#"[{"name":"x"}]"#, "path"),
    ] {
        let message = read(wrong).unwrap_err();
        assert!(message.contains(why) && message.contains(DISKS_ANNOTATION), "{wrong}: {message}");
    }
}

#[test]
fn tags_come_from_the_annotation_only_while_there_are_none() {
    let metadata = json!({"annotations": {TAGS_ANNOTATION: r#"["fast","storage"]"#}});
    let mut spec = NodeSpec::default();
    assert!(tags(&mut spec, &machine(metadata.clone())).is_ok());
    assert_eq!(spec.tags, ["fast", "storage"]);
    spec.tags = vec!["mine".into()];
    assert!(tags(&mut spec, &machine(metadata)).is_ok());
    assert_eq!(spec.tags, ["mine"]);
    spec.tags.clear();
    let wrong = machine(json!({"annotations": {TAGS_ANNOTATION: "fast"}}));
    assert_eq!(tags(&mut spec, &wrong).map_err(|no| no.reason), Err("BadAnnotation"));
}

#[tokio::test]
async fn wrong_tags_are_told_unless_disks_are_missing() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::new(Arc::new(Embedded::in_memory()), "longhorn-system");
    let config = config(folder.path(), &store);
    let wrong = json!({"name": "n1", "annotations": {TAGS_ANNOTATION: "fast"}});
    store.create(&machine(wrong)).await.unwrap();
    let mut node = Node::new("n1", NodeSpec::default());
    let node_without = store.create(&node).await.unwrap();
    let (_, found) = complete_node(&config, node_without.clone()).await.unwrap();
    assert_eq!((found.condition.is_true(), found.condition.reason.as_str()), (false, "NoDisks"));
    let mut disks_too = machine(json!({"labels": {CREATE_LABEL: "config"}, "annotations": {TAGS_ANNOTATION: "fast"}}));
    let path = folder.path().join("a");
    let annotations = disks_too.metadata.annotations.as_mut().unwrap();
    annotations.insert(DISKS_ANNOTATION.into(), json!([{ "path": path }]).to_string());
    let mut both = NodeSpec::default();
    let mut labeled = Setting { value: "true".into(), ..Setting::default() };
    labeled.metadata.name = Some(setting::CREATE_DEFAULT_DISK_LABELED_NODES.into());
    store.create(&labeled).await.unwrap();
    let told = complete(&config, &mut both, false, &disks_too).await.unwrap().map_err(|no| no.reason);
    assert_eq!((told, both.disks.len()), (Err("BadAnnotation"), 1), "wrong tags cost no disk");
    node.metadata = node_without.metadata;
    node.spec.disks = BTreeMap::from([("a".to_owned(), DiskSpec::default())]);
    let (_, found) = complete_node(&config, node).await.unwrap();
    assert_eq!((found.condition.is_true(), found.condition.reason.as_str()), (false, "BadAnnotation"));
}

fn config(folder: &Path, store: &Store) -> Config {
    Config {
        node: "n1".parse().unwrap(),
        ip: [127, 0, 0, 1].into(),
        directory: folder.to_owned(),
        program: "/proc/self/exe".into(),
        store: store.clone(),
        create_disks: false,
        discover: true,
        disk_owner: None,
        engines: EngineOptions::default(),
        security: Default::default(),
        metrics: Default::default(),
        ready: Default::default(),
    }
}

#[tokio::test]
async fn a_node_comes_to_be_and_is_completed_later() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::new(Arc::new(Embedded::in_memory()), "longhorn-system");
    let config = config(folder.path(), &store);
    let error = create(&config).await.unwrap_err();
    assert!(error.to_string().contains("no node `n1`"), "{error}");

    let mut set = Setting { value: "true".into(), ..Setting::default() };
    set.metadata.name = Some(setting::CREATE_DEFAULT_DISK_LABELED_NODES.into());
    store.create(&set).await.unwrap();
    let labels = json!({"topology.kubernetes.io/region": "r", "topology.kubernetes.io/zone": "z"});
    let mut here = store.create(&machine(json!({"name": "n1", "labels": labels}))).await.unwrap();
    create(&config).await.unwrap();
    create(&config).await.unwrap();
    let node: Node = store.get("n1").await.unwrap().unwrap();
    assert!(node.spec.disks.is_empty() && node.spec.allow_scheduling);
    let (node, found) = complete_node(&config, node).await.unwrap();
    assert_eq!((found.region.as_str(), found.zone.as_str()), ("r", "z"));
    assert_eq!((found.condition.is_true(), found.condition.reason.as_str()), (false, "NotLabeled"));

    let disks = json!([{"path": folder.path().join("a")}, {"path": folder.path().join("b"), "name": "b"}]);
    here.metadata.labels = Some([(CREATE_LABEL.to_owned(), "config".to_owned())].into());
    here.metadata.annotations = Some([(DISKS_ANNOTATION.to_owned(), disks.to_string())].into());
    store.replace(&here).await.unwrap();
    let (node, found) = complete_node(&config, node).await.unwrap();
    assert!(found.condition.is_true());
    assert_eq!(node.spec.disks.len(), 2);
    let stored: Node = store.get("n1").await.unwrap().unwrap();
    assert_eq!(stored.spec, node.spec);
}

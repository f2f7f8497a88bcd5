//! Every parameter, right and wrong in turn.

use std::collections::BTreeMap;

use api::BackingImage;
use api::image::{BackingImageStatus, DataEngine, SourceType};

use super::*;

fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
}

fn parse(pairs: &[(&str, &str)]) -> Result<Parameters, ParameterError> {
    Parameters::parse(&map(pairs))
}

const SUM: &str = "a55f7b9d0a55f7b9d0a55f7b9d0a55f7b9d0a55f7b9d0a55f7b9d0a55f7b9d0aa55f7b9d0a55f7b9d0a55f7b9d0a55f7b9d0a55f7b9d0a55f7b9d0a55f7b9d0a";

#[test]
fn reads_the_storage_class_of_the_documentation() {
    assert_eq!(SUM.len(), 128);
    let parameters = parse(&[
        ("numberOfReplicas", "3"),
        ("staleReplicaTimeout", "2880"),
        ("backingImage", "ubuntu-24.04"),
        ("backingImageDataSourceType", "download"),
        ("backingImageDataSourceParameters", r#"{"url": " https://example.com/u.qcow2 "}"#),
        ("backingImageChecksum", SUM),
        ("backingImageMinNumberOfCopies", "2"),
        ("backingImageNodeSelector", "a, b"),
        ("backingImageDiskSelector", " ssd ,fast"),
        ("diskSelector", " ssd , fast "),
        ("csi.storage.k8s.io/fstype", "xfs"),
        ("csi.storage.k8s.io/pvc/name", "data"),
        ("mkfsParams", "-O quota  -m 0"),
        ("encrypted", "false"),
        ("dataLocality", "disabled"),
        ("dataEngine", "v1"),
        ("fromBackup", ""),
    ])
    .unwrap();
    assert_eq!(parameters.number_of_replicas, Some(3));
    assert_eq!(parameters.disk_selector, ["ssd", "fast"]);
    assert_eq!(parameters.fs_type, Some(FsType::Xfs));
    assert_eq!(parameters.mkfs_params, ["-O", "quota", "-m", "0"]);
    let image = parameters.image.unwrap();
    assert_eq!(image.name.as_str(), "ubuntu-24.04");
    assert_eq!(image.source_type, Some(SourceType::Download));
    assert_eq!(image.source_parameters["url"], "https://example.com/u.qcow2");
    assert_eq!(image.checksum.unwrap().as_str(), SUM);
    assert_eq!(image.min_number_of_copies, Some(2));
    assert_eq!(image.node_selector.unwrap(), ["a", "b"]);
    assert_eq!(image.disk_selector.unwrap(), ["ssd", "fast"]);
}

#[test]
fn defaults_are_those_of_longhorn() {
    let parameters = parse(&[("numberOfReplicas", "0"), ("staleReplicaTimeout", "0")]).unwrap();
    assert_eq!(
        (parameters.number_of_replicas, parameters.stale_replica_timeout, parameters.image.clone()),
        (None, 2880, None)
    );
    assert_eq!(parameters, parse(&[]).unwrap());
}

#[test]
fn takes_the_documented_name_of_the_image_too() {
    assert_eq!(parse(&[("backingImageName", "u2")]).unwrap().image.unwrap().name.as_str(), "u2");
    assert!(parse(&[("backingImageName", "u2"), ("backingImage", "u2")]).is_ok());
    let error = parse(&[("backingImageName", "u2"), ("backingImage", "u3")]).unwrap_err();
    assert!(matches!(error, ParameterError::Contradiction { .. }), "{error}");
}

#[test]
fn every_wrong_value_is_refused_with_key_and_value_and_what_is_right() {
    let download = "backingImageDataSourceParameters";
    for (key, value, right) in [
        ("numberOfReplicas", "-1", "from 1 to 20"),
        ("numberOfReplicas", "three", "from 1 to 20"),
        ("numberOfReplicas", "", "from 1 to 20"),
        ("numberOfReplicas", "21", "from 1 to 20"),
        ("numberOfReplicas", "1.5", "from 1 to 20"),
        ("staleReplicaTimeout", "-30", "minutes"),
        ("staleReplicaTimeout", "30m", "minutes"),
        ("exclusive", "yes", "`true` or `false`"),
        ("share", "maybe", "`true` or `false`"),
        ("migratable", "", "`true` or `false`"),
        ("encrypted", "on", "`true` or `false`"),
        ("disableRevisionCounter", "x", "`true` or `false`"),
        ("strictTopology", "x", "`true` or `false`"),
        ("dataLocality", "near", "`disabled`"),
        ("replicaAutoBalance", "x", "`disabled`"),
        ("unmapMarkSnapChainRemoved", "x", "`disabled`"),
        ("replicaSoftAntiAffinity", "true", "`enabled`"),
        ("replicaZoneSoftAntiAffinity", "x", "`enabled`"),
        ("replicaDiskSoftAntiAffinity", "x", "`enabled`"),
        ("freezeFilesystemForSnapshot", "x", "`disabled`"),
        ("cloneMode", "x", "`full-copy`"),
        ("dataEngine", "v3", "`v1`"),
        ("frontend", "x", "`blockdev`"),
        ("volumeTopology", "x", "`any`"),
        ("storageCapacityMode", "x", "`node`"),
        ("diskSelector", "ssd,,fast", "commas"),
        ("nodeSelector", "a b", "commas"),
        ("fsType", "ntfs", "`ext4` or `xfs`"),
        ("csi.storage.k8s.io/fstype", "zfs", "`ext4` or `xfs`"),
        ("backingImage", "../etc", "a-z 0-9"),
        ("backingImage", "Ubuntu", "a-z 0-9"),
        ("backingImageDataSourceType", "http", "`download`"),
        ("backingImageChecksum", "abc", "128 lower-case"),
        ("backingImageChecksum", &SUM.to_uppercase(), "128 lower-case"),
        ("backingImageMinNumberOfCopies", "-1", "from 1 to 1000"),
        ("backingImageMinNumberOfCopies", "two", "from 1 to 1000"),
        ("backingImageNodeSelector", ",", "commas"),
        ("backingImageDiskSelector", "a,", "commas"),
        (download, r#"{"url": 5}"#, "`url` is the number 5 without quotes"),
        (download, r#"{"url": "x", "padToSector": true}"#, "`padToSector` is true without quotes"),
        (download, r#"{"url": {"a": "b"}}"#, "`url` is an object"),
        (download, r#"{"url": null}"#, "`url` is null"),
        (download, r#"["url"]"#, "it is an array"),
        (download, "url=x", "expected value"),
    ] {
        let mut given = map(&[(key, value)]);
        if key.starts_with("backingImage") && key != "backingImage" {
            given.insert("backingImage".into(), "ubuntu".into());
        }
        let error = Parameters::parse(&given).unwrap_err();
        let text = error.to_string();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(!matches!(error, ParameterError::NotOffered { .. }), "{error}");
        assert!(text.contains(&format!("`{key}`")) && text.contains(right), "{key}={value}: {text}");
        if key != download {
            assert!(text.contains(&format!("`{value}`")), "{text}");
        }
    }
}

#[test]
fn what_would_change_the_volume_and_is_not_offered_is_refused() {
    for (key, value) in [
        ("share", "true"),
        ("migratable", "true"),
        ("encrypted", "true"),
        ("strictTopology", "true"),
        ("dataLocality", "strict-local"),
        ("dataLocality", "best-effort"),
        ("replicaAutoBalance", "best-effort"),
        ("unmapMarkSnapChainRemoved", "enabled"),
        ("replicaSoftAntiAffinity", "disabled"),
        ("replicaZoneSoftAntiAffinity", "disabled"),
        ("freezeFilesystemForSnapshot", "enabled"),
        ("fromBackup", "s3://b?backup=1"),
        ("backupTargetName", "other"),
        ("backupBlockSize", "16Mi"),
        ("dataSource", "vol://v"),
        ("cloneMode", "linked-clone"),
        ("recurringJobSelector", r#"[{"name":"a"}]"#),
        ("dataEngine", "v2"),
        ("dataLayout.type", "sharded"),
        ("dataLayout.mode", "erasure-coding"),
        ("dataLayout.dataChunks", "4"),
        ("dataLayout.parityChunks", "2"),
        ("dataLayout.stripSizeKB", "64"),
        ("ublkNumberOfQueue", "1"),
        ("ublkQueueDepth", "1"),
        ("nvmeTcpNrIoQueues", "1"),
        ("frontend", "ublk"),
        ("volumeTopology", "zonal"),
        ("storageCapacityMode", "zone"),
        ("nfsOptions", "vers=4.2"),
        ("shareManagerNodeSelector", "a:b"),
        ("shareManagerTolerations", "a:b"),
    ] {
        let error = parse(&[(key, value)]).unwrap_err();
        assert!(matches!(error, ParameterError::NotOffered { .. }), "{key}: {error}");
        assert!(error.to_string().contains(value), "{error}");
    }
}

#[test]
fn an_unknown_key_is_refused_with_the_nearest_known_one() {
    let error = parse(&[("backingImageChecksun", "x")]).unwrap_err();
    assert_eq!(error.to_string(), "parameter `backingImageChecksun` is unknown; did you mean `backingImageChecksum`?");
    assert!(parse(&[("csi.storage.k8s.io/foo/bar/baz/qux", "x")]).is_err());
}

#[test]
fn two_names_of_one_key_must_agree() {
    let both = |one, other| parse(&[("fsType", one), ("csi.storage.k8s.io/fstype", other)]);
    assert_eq!(both("xfs", "xfs").unwrap().fs_type, Some(FsType::Xfs));
    let error = both("xfs", "ext4").unwrap_err();
    assert!(matches!(error, ParameterError::Contradiction { .. }), "{error}");
}

#[test]
fn what_longhorn_fills_in_by_itself_is_no_difference() {
    let source = r#"{"url":"https://user:secret@example.com/u.qcow2","export-type":"raw","encryption":"ignore"}"#;
    let none: [&str; 0] = [];
    assert_eq!(check_image(&[("backingImageDataSourceParameters", source)], |_| ()), none);
}

#[test]
fn words_about_an_image_need_its_name() {
    assert_eq!(
        parse(&[("backingImageChecksum", SUM)]),
        Err(ParameterError::WithoutImage { key: "backingImageChecksum" })
    );
    let empty = [
        ("backingImage", ""),
        ("backingImageDataSourceType", ""),
        ("backingImageDataSourceParameters", "{}"),
        ("backingImageMinNumberOfCopies", "0"),
    ];
    assert_eq!(parse(&empty).unwrap().image, None);
}

#[test]
fn lists_every_difference_of_two_volumes() {
    let wanted =
        parse(&[("numberOfReplicas", "2"), ("diskSelector", "b,a"), ("backingImage", "u1"), ("fsType", "ext4")])
            .unwrap();
    assert_eq!(
        wanted.differences(
            &parse(&[("numberOfReplicas", "2"), ("diskSelector", "a,b"), ("backingImageName", "u1")]).unwrap()
        ),
        []
    );
    let has = parse(&[("numberOfReplicas", "3"), ("backingImage", "u2")]).unwrap();
    let texts: Vec<String> = wanted.differences(&has).iter().map(|d| d.to_string()).collect();
    assert_eq!(
        texts,
        [
            "backingImage: wanted u1, has u2",
            "diskSelector: wanted a,b, has nothing",
            "numberOfReplicas: wanted 2, has 3"
        ]
    );
}

fn check_image(wanted: &[(&str, &str)], change: impl FnOnce(&mut BackingImage)) -> Vec<String> {
    let mut image = BackingImage::new("ubuntu", Default::default());
    image.spec.source_type = Some(SourceType::Download);
    image.spec.source_parameters = map(&[("url", "https://user:secret@example.com/u.qcow2")]);
    image.spec.node_selector = vec!["b".into(), "a".into()];
    image.status = Some(BackingImageStatus::default());
    change(&mut image);
    let mut wanted = map(wanted);
    wanted.insert("backingImage".into(), "ubuntu".into());
    let wish = Parameters::parse(&wanted).unwrap().image.unwrap();
    image_differences(&wish, &image, 3).iter().map(|d| d.to_string()).collect()
}

#[test]
fn an_image_is_compared_field_by_field_and_only_where_something_is_said() {
    let none: [&str; 0] = [];
    assert_eq!(check_image(&[], |_| ()), none);
    assert_eq!(
        check_image(&[("backingImageNodeSelector", "a,b"), ("backingImageMinNumberOfCopies", "3")], |_| ()),
        none
    );
    assert_eq!(
        check_image(&[("backingImageDataSourceType", "upload")], |_| ()),
        ["sourceType: wanted upload, has download"]
    );
    // As Longhorn stores it (LF 3.1).
    assert_eq!(check_image(&[("backingImageDataSourceType", "download")], |image| image.spec.source_type = None), none);
    assert_eq!(
        check_image(&[("backingImageDataSourceParameters", r#"{"url":"https://x/y","padToSector":"true"}"#)], |_| ()),
        [
            "sourceParameters.padToSector: wanted true, has nothing",
            "sourceParameters.url: wanted https://x/y, has https://<redacted>@example.com/u.qcow2"
        ]
    );
    assert_eq!(
        check_image(&[("backingImageChecksum", SUM)], |image| image.status.as_mut().unwrap().checksum =
            "b".repeat(128)),
        [format!("checksum (of the file): wanted {SUM}, has {}", "b".repeat(128))]
    );
    assert_eq!(
        check_image(&[("backingImageChecksum", SUM)], |image| image.spec.checksum = "c".repeat(128)),
        [format!("checksum (expected): wanted {SUM}, has {}", "c".repeat(128))]
    );
    assert_eq!(
        check_image(&[("backingImageMinNumberOfCopies", "2"), ("backingImageDiskSelector", "ssd")], |_| ()),
        ["minNumberOfCopies: wanted 2, has 3", "diskSelector: wanted ssd, has nothing"]
    );
    assert_eq!(check_image(&[], |image| image.spec.data_engine = DataEngine::V2), ["dataEngine: wanted v1, has v2"]);
}

#[test]
fn passwords_in_urls_are_compared_and_never_shown() {
    let text = check_image(
        &[("backingImageDataSourceParameters", r#"{"url":"https://user:other@example.com/u.qcow2"}"#)],
        |_| (),
    );
    assert_eq!(text.len(), 1);
    assert!(!text[0].contains("other@") && !text[0].contains("secret"), "{text:?}");
}

#[test]
fn addresses_that_differ_in_a_secret_only_differ_and_do_not_show_it() {
    let with = |url: &str| {
        let source = serde_json::json!({ "url": url }).to_string();
        Parameters::parse(&map(&[("backingImage", "ubuntu"), ("backingImageDataSourceParameters", &source)])).unwrap()
    };
    for (one, other, shown) in [
        ("http://u:a@example.com/i", "http://u:b@example.com/i", "http://<redacted>@example.com/i"),
        ("http://example.com/i?token=a", "http://example.com/i?token=b", "http://example.com/i?<redacted>"),
        ("http:u:a@example.com/i", "http:u:b@example.com/i", "http://<redacted>@example.com/i"),
    ] {
        let differences: Vec<String> = with(one).differences(&with(other)).iter().map(ToString::to_string).collect();
        let expected = format!(
            "backingImageDataSourceParameters.url: wanted {shown}, has {shown} (with another user, password or query)"
        );
        assert_eq!(differences, [expected]);
    }
}

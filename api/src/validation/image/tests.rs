//! Tables of what is filled in and what is refused.

use expect_test::{Expect, expect};
use serde_json::{Value, json};

use super::*;
use crate::image::{BackingImageSpec, BackingImageStatus, CopyState, DiskFileStatus};

const RULES: ImageRules = ImageRules { default_min_copies: 3, allowed_sources: AllowedSources::none() };
const URL: &str = "https://example.com/a.qcow2";

fn image(name: &str, spec: Value) -> BackingImage {
    let meta = json!({"name": name});
    serde_json::from_value(
        json!({"apiVersion": "longhorn.io/v1beta2", "kind": "BackingImage", "metadata": meta, "spec": spec}),
    )
    .unwrap()
}

fn download(url: &str) -> Value {
    json!({"sourceType": "download", "sourceParameters": {"url": url}})
}

fn with(mut spec: Value, field: &str, value: impl Into<Value>) -> Value {
    spec[field] = value.into();
    spec
}

fn check(name: &str, spec: Value, expected: Expect) {
    let shown = admit_new(image(name, spec), &RULES).map_or_else(|e| e.to_string(), |_| "fine".into());
    expected.assert_eq(&shown);
}

#[test]
fn a_wish_to_verify_is_a_time() {
    check("a1", with(download(URL), "verifyRequestedAt", "2026-01-02T03:04:05Z"), expect!["fine"]);
    check(
        "a1",
        with(download(URL), "verifyRequestedAt", "now"),
        expect!["spec.verifyRequestedAt is `now`: it is no time; give one like 2026-01-02T03:04:05Z, or leave it out"],
    );
}

#[test]
fn fills_in_defaults() {
    let spec = json!({
        "checksum": format!(" {}\n", "a".repeat(128)),
        "sourceType": "export-from-volume",
        "sourceParameters": {"volume-name": " vol ", "export-type": " "},
        "dataEngine": "",
        "futureField": 7,
    });
    let admitted = admit_new(image("a1", spec), &RULES).unwrap();
    expect![[r#"
        {
          "apiVersion": "longhorn.io/v1beta2",
          "kind": "BackingImage",
          "metadata": {
            "finalizers": [
              "longhorn.io"
            ],
            "labels": {
              "longhorn.io/component": "backing-image",
              "longhorn.io/managed-by": "longhorn-manager"
            },
            "name": "a1"
          },
          "spec": {
            "checksum": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
            "sourceType": "export-from-volume",
            "sourceParameters": {
              "export-type": "raw",
              "volume-name": "vol"
            },
            "minNumberOfCopies": 3,
            "nodeSelector": [],
            "diskSelector": [],
            "secret": "",
            "secretNamespace": "",
            "dataEngine": "v1",
            "diskFileSpecMap": {},
            "futureField": 7
          }
        }"#]]
    .assert_eq(&serde_json::to_string_pretty(&admitted).unwrap());
    assert_eq!(admit_new(admitted.clone(), &RULES).unwrap(), admitted, "once is enough");
    let clone = json!({"sourceType": "clone", "sourceParameters": {"backing-image": "b1"}});
    let clone = admit_new(image("a1", clone), &RULES).unwrap();
    assert_eq!(clone.spec.source_parameters["encryption"], "ignore");
    let untyped = admit_new(image("a1", json!({"sourceType": "", "sourceParameters": {"url": URL}})), &RULES).unwrap();
    assert_eq!(untyped.spec.source_type, Some(SourceType::Download));
}

#[test]
fn judges_names_and_checksums() {
    check("ubuntu-24.04_x", download(URL), expect!["fine"]);
    check(
        "a",
        download(URL),
        expect![
            "metadata.name is `a`: invalid name: 2 to 253 characters of a-z 0-9 _ . -, beginning with a letter or digit"
        ],
    );
    check(
        "Ubuntu",
        download(URL),
        expect![
            "metadata.name is `Ubuntu`: invalid name: 2 to 253 characters of a-z 0-9 _ . -, beginning with a letter or digit"
        ],
    );
    check(
        "../../etc",
        download(URL),
        expect![
            "metadata.name is `../../etc`: invalid name: 2 to 253 characters of a-z 0-9 _ . -, beginning with a letter or digit"
        ],
    );
    check(
        "a_",
        download(URL),
        expect![
            "metadata.name is `a_`: invalid name: at most 63 characters that end with a letter or digit, as it becomes a label of other objects"
        ],
    );
    check(
        "a1",
        with(download(URL), "checksum", "abc"),
        expect![
            "spec.checksum is `abc`: invalid checksum: the SHA-512 of the file is 128 characters of 0-9 a-f, and this has 3; `sha512sum FILE` prints it"
        ],
    );
    check(
        "a1",
        with(download(URL), "checksum", "A".repeat(128)),
        expect![
            "spec.checksum is `AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA`: invalid checksum: write its letters in lower case"
        ],
    );
}

#[test]
fn judges_sources() {
    check(
        "a1",
        json!({}),
        expect![
            "spec.sourceType: it is not provided, and must be one of download, upload, export-from-volume, restore or clone"
        ],
    );
    check(
        "a1",
        json!({"sourceType": "download"}),
        expect![
            "spec.sourceParameters[url]: download URL is not provided: give the http or https address of a qcow2 or raw file"
        ],
    );
    check(
        "a1",
        download("example.com/a"),
        expect![
            "spec.sourceParameters[url] is `example.com/a`: invalid URI for request: an address looks like https://example.com/image.qcow2"
        ],
    );
    check(
        "a1",
        download("ftp://user:secret@example.com/a"),
        expect![
            "spec.sourceParameters[url] is `ftp://<redacted>@example.com/a`: invalid download URL scheme: only http and https are offered"
        ],
    );
    check(
        "a1",
        download("http://localhost/a"),
        expect![
            "spec.sourceParameters[url] is `http://localhost/a`: must not target a loopback address: the file is fetched from within the cluster, so give an address that every node reaches, or allow this one by setting `backing-image-allowed-source-addresses`"
        ],
    );
    let standalone = ImageRules { allowed_sources: "127.0.0.0/8,::1".parse().unwrap(), ..RULES };
    assert!(admit_new(image("a1", download("http://localhost/a")), &standalone).is_ok());
    check(
        "a1",
        json!({"sourceType": "download", "sourceParameters": {"url": URL, "padToSectors": "true"}}),
        expect![
            "spec.sourceParameters[padToSectors] is `true`: a download source has no such parameter; did you mean `padToSector`?"
        ],
    );
    check(
        "a1",
        json!({"sourceType": "download", "sourceParameters": {"url": URL, "padToSector": "yes"}}),
        expect!["spec.sourceParameters[padToSector] is `yes`: it must be one of true, false"],
    );
    check("a1", json!({"sourceType": "upload"}), expect!["fine"]);
    check(
        "a1",
        json!({"sourceType": "export-from-volume", "sourceParameters": {"export-type": "vmdk"}}),
        expect![
            "spec.sourceParameters[volume-name]: it is not provided: give the name of a volume; spec.sourceParameters[export-type] is `vmdk`: it must be one of raw, qcow2"
        ],
    );
    check(
        "a1",
        json!({"sourceType": "restore", "sourceParameters": {"concurrent-limit": "-1"}}),
        expect![
            "spec.sourceParameters[backup-url]: it is not provided: give the address of the backup; spec.sourceParameters[concurrent-limit] is `-1`: it must be a whole number, at least 1"
        ],
    );
    check(
        "a1",
        json!({"sourceType": "clone", "sourceParameters": {"encryption": "encrypt", "secret": "s"}}),
        expect![
            "spec.sourceParameters[backing-image]: it is not provided: give the name of another image; spec.sourceParameters[secret-namespace]: it is not provided: give the namespace of the secret"
        ],
    );
}

#[test]
fn refuses_what_is_not_offered_and_reports_every_mistake() {
    let spec = json!({
        "sourceType": "upload", "dataEngine": "v2", "secret": "s", "secretNamespace": "n",
        "nodeSelector": ["a,b"], "diskFileSpecMap": {"disk 1": {}},
    });
    check(
        "a1",
        spec,
        expect![
            "spec.dataEngine is `v2`: v2 backing images are not supported, use v1; spec.secret is `s`: encrypted images are not supported; leave it out; spec.secretNamespace is `n`: encrypted images are not supported; leave it out; spec.nodeSelector is `a,b`: a tag is a word without blanks, commas and semicolons; spec.diskFileSpecMap is `disk 1`: its keys are UUIDs of disks: 1 to 64 characters of a-z A-Z 0-9 -"
        ],
    );
}

#[test]
fn judges_changes() {
    let old = admit_new(image("a1", download(URL)), &RULES).unwrap();
    let changed = |change: fn(&mut BackingImage)| {
        let mut new = old.clone();
        change(&mut new);
        admit_change(&old, new, &RULES).map_or_else(|e| e.to_string(), |_| "fine".into())
    };
    expect!["fine"].assert_eq(&changed(|i| i.spec.min_number_of_copies = 1));
    expect!["fine"].assert_eq(&changed(|i| i.metadata.finalizers = None));
    expect!["spec.minNumberOfCopies is `0`: the minimum number of copies must larger than 0"]
        .assert_eq(&changed(|i| i.spec.min_number_of_copies = 0));
    expect!["fine"].assert_eq(&changed(|i| i.spec.bandwidth_limit = 64 << 10));
    expect!["spec.bandwidthLimit is `65535`: must be a whole number of bytes a second: 0 for no limit, else at least 65536 (64 KiB), below which a transfer would look dead"]
        .assert_eq(&changed(|i| i.spec.bandwidth_limit = 65535));
    expect!["spec.dataEngine is `v2`: it cannot be changed, and was `v1`"]
        .assert_eq(&changed(|i| i.spec.data_engine = DataEngine::V2));
    expect!["spec.secret is `s`: it cannot be changed, and was ``"].assert_eq(&changed(|i| i.spec.secret = "s".into()));
    expect!["spec.sourceParameters[url]: download URL is not provided: give the http or https address of a qcow2 or raw file"]
        .assert_eq(&changed(|i| i.spec.source_parameters.clear()));
    expect!["fine"].assert_eq(&changed(|i| i.spec.source_type = None));
}

/// What is said about a change of a ready image, or that it is fine.
fn changed(pinned: bool, change: fn(&mut BackingImageSpec)) -> String {
    let mut old = admit_new(image("a1", download(URL)), &RULES).unwrap();
    let known = "a".repeat(128);
    if pinned {
        old.spec.checksum.clone_from(&known);
    }
    old.status = Some(BackingImageStatus { checksum: known, ..Default::default() });
    let mut new = old.clone();
    change(&mut new.spec);
    admit_change(&old, new, &RULES).map_or_else(|e| e.to_string(), |_| "fine".into())
}

#[test]
fn what_an_image_is_made_from_cannot_change_once_a_copy_is_ready() {
    type Change = fn(&mut BackingImageSpec);
    let why = "a copy of the image is ready, so what it is made from is settled: volumes lie on just that content";
    let another = "create another image for another content";
    let a = "a".repeat(128);
    let cases: [(bool, Change, String); 12] = [
        (false, |s| s.min_number_of_copies = 1, "fine".into()),
        (false, |s| s.source_parameters = [("url".into(), format!(" {URL} "))].into(), "fine".into()),
        (
            true,
            |s| s.source_type = Some(SourceType::Upload),
            format!("spec.sourceType is `upload`: it cannot be changed any more, and was `download`: {why}; {another}"),
        ),
        (
            true,
            |s| s.checksum = "b".repeat(128),
            format!(
                "spec.checksum is `{}`: it cannot be changed any more, and was `{a}`: {why}; {another}",
                "b".repeat(128)
            ),
        ),
        (
            true,
            |s| s.checksum.clear(),
            format!("spec.checksum: it cannot be changed any more, and was `{a}`: {why}; {another}"),
        ),
        (
            false,
            |s| s.checksum = "b".repeat(128),
            format!(
                "spec.checksum is `{}`: it cannot be changed any more, and was ``: {why}; it may be pinned to what it is, `{a}`; {another}",
                "b".repeat(128)
            ),
        ),
        (
            true,
            |s| drop(s.source_parameters.insert("padToSector".into(), "true".into())),
            format!(
                "spec.sourceParameters[padToSector] is `true`: it cannot be changed any more, and was ``: {why}; {another}"
            ),
        ),
        (
            false,
            |s| drop(s.source_parameters.insert("url".into(), "https://u:secret@example.com/b".into())),
            format!(
                "spec.sourceParameters[url] is `https://<redacted>@example.com/b`: it cannot be changed any more, and was `{URL}`: {why}; another address may be given once `checksum` pins the content (status.checksum has it)"
            ),
        ),
        (
            true,
            |s| s.source_parameters.clear(),
            format!(
                "spec.sourceParameters[url]: it cannot be changed any more, and was `{URL}`: {why}; another address may be given once `checksum` pins the content (status.checksum has it)"
            ),
        ),
        (true, |s| s.secret = "s".into(), "spec.secret is `s`: it cannot be changed, and was ``".into()),
        (
            true,
            |s| s.secret_namespace = "n".into(),
            "spec.secretNamespace is `n`: it cannot be changed, and was ``".into(),
        ),
        (
            true,
            |s| s.data_engine = DataEngine::V2,
            "spec.dataEngine is `v2`: it cannot be changed, and was `v1`".into(),
        ),
    ];
    for (pinned, change, expected) in cases {
        assert_eq!(changed(pinned, change), expected);
    }
}

#[test]
fn a_wish_for_another_content_than_there_is_may_be_taken_back() {
    let mut old = admit_new(image("a1", with(download(URL), "checksum", "b".repeat(128))), &RULES).unwrap();
    old.status = Some(BackingImageStatus { checksum: "a".repeat(128), ..Default::default() });
    let said = |checksum: String| {
        let mut new = old.clone();
        new.spec.checksum = checksum;
        admit_change(&old, new, &RULES).map_or_else(|e| e.to_string(), |_| "fine".into())
    };
    assert_eq!(said("a".repeat(128)), "fine");
    for other in ["c".repeat(128), String::new()] {
        assert!(said(other).contains("it cannot be changed any more"));
    }
}

#[test]
fn a_dead_address_is_replaced_while_a_checksum_is_pinned() {
    let other =
        |s: &mut BackingImageSpec| drop(s.source_parameters.insert("url".into(), "https://example.com/b".into()));
    assert_eq!(changed(true, other), "fine");
    assert_eq!(changed(false, |s| s.checksum = "a".repeat(128)), "fine", "what is there may be pinned");
    let both = |s: &mut BackingImageSpec| {
        s.checksum = "a".repeat(128);
        drop(s.source_parameters.insert("url".into(), "https://example.com/b".into()));
    };
    assert_eq!(changed(false, both), "fine");
    let bad =
        |s: &mut BackingImageSpec| drop(s.source_parameters.insert("url".into(), "http://169.254.169.254/".into()));
    assert!(
        changed(true, bad).contains("must not target the address of a cloud's metadata service"),
        "{}",
        changed(true, bad)
    );
}

#[test]
fn an_image_without_a_source_type_may_be_edited_like_a_download() {
    let sum = "a".repeat(128);
    let parameters = json!({"url": format!(" {URL}\n")});
    // Longhorn stores it so, and trims nothing when an image is edited.
    let mut old =
        image("a1", json!({"sourceType": "", "sourceParameters": parameters, "checksum": format!(" {sum} ")}));
    old.spec.min_number_of_copies = 1;
    assert_eq!(old.spec.source_type, None);
    old.status = Some(BackingImageStatus { checksum: sum.clone(), ..Default::default() });
    let said = |old: &BackingImage, change: &dyn Fn(&mut BackingImageSpec)| {
        let mut new = old.clone();
        change(&mut new.spec);
        admit_change(old, new, &RULES).map(|image| image.spec).map_err(|error| error.to_string())
    };
    let type_is_settled = "spec.sourceType is `upload`: it cannot be changed any more, and was `download`";
    for is_going in [false, true] {
        if is_going {
            old.metadata.deletion_timestamp = Some(serde_json::from_value(json!("2026-01-01T00:00:00Z")).unwrap());
        }
        let wished = said(&old, &|s| s.min_number_of_copies = 2).unwrap();
        assert_eq!(wished.source_type, (!is_going).then_some(SourceType::Download), "{is_going}");
        said(&old, &|s| s.source_type = Some(SourceType::Download)).unwrap();
        said(&old, &|s| s.checksum.clone_from(&sum)).unwrap();
        let mut unpinned = old.clone();
        unpinned.spec.checksum.clear();
        said(&unpinned, &|s| drop(s.source_parameters.insert("url".into(), URL.into()))).unwrap();
        let error = said(&old, &|s| s.source_type = Some(SourceType::Upload)).unwrap_err();
        assert!(error.starts_with(type_is_settled), "{error}");
        let mut typed = old.clone();
        typed.spec.source_type = Some(SourceType::Download);
        assert_eq!(said(&typed, &|s| s.source_type = None).is_err(), is_going, "nobody fills it in again then");
    }
    // What is there is not judged anew, only because a default is written down.
    let mut old = image("a1", json!({"sourceParameters": {"url": "http://localhost/a"}, "minNumberOfCopies": 1}));
    said(&old, &|s| s.min_number_of_copies = 2).unwrap();
    old.spec.source_parameters.insert("url".into(), URL.into());
    let local = |s: &mut BackingImageSpec| drop(s.source_parameters.insert("url".into(), "http://localhost/a".into()));
    assert!(said(&old, &local).unwrap_err().contains("must not target a loopback address"));
}

#[test]
fn before_a_copy_is_ready_everything_about_the_source_may_be_corrected() {
    let mut old = admit_new(image("a1", with(download(URL), "checksum", "a".repeat(128))), &RULES).unwrap();
    let failed = DiskFileStatus { state: CopyState::Failed, ..Default::default() };
    let mut status = BackingImageStatus { uuid: "12345678".into(), ..Default::default() };
    status.disk_file_status_map.insert("d".into(), failed);
    old.status = Some(status);
    let mut new = old.clone();
    new.spec.checksum.clear();
    new.spec.source_parameters.insert("url".into(), "https://example.com/b".into());
    new.spec.source_parameters.insert("padToSector".into(), "true".into());
    assert!(admit_change(&old, new.clone(), &RULES).is_ok());
    old.status.as_mut().unwrap().disk_file_status_map.get_mut("d").unwrap().state = CopyState::Ready;
    assert!(admit_change(&old, new, &RULES).is_err(), "a ready copy counts also before its checksum is told");
}

#[test]
fn what_cannot_change_cannot_while_the_image_is_being_deleted_either() {
    let mut old = image("a1", json!({"checksum": "", "sourceType": "download", "sourceParameters": {"url": URL}}));
    old.metadata.deletion_timestamp = Some(serde_json::from_value(json!("2026-01-01T00:00:00Z")).unwrap());
    old.status = Some(BackingImageStatus { checksum: "a".repeat(128), ..Default::default() });
    let mut new = old.clone();
    new.metadata.finalizers = None;
    assert!(admit_change(&old, new.clone(), &RULES).is_ok());
    new.spec.source_type = Some(SourceType::Upload);
    assert!(admit_change(&old, new, &RULES).is_err());
}

#[test]
fn lets_an_image_go_that_is_being_deleted_whatever_it_holds() {
    let mut old = image("A", json!({"checksum": "wrong", "minNumberOfCopies": 0}));
    let now = serde_json::from_value(json!("2026-01-01T00:00:00Z")).unwrap();
    old.metadata.deletion_timestamp = Some(now);
    assert_eq!(admit_change(&old, old.clone(), &RULES).unwrap(), old);
}

#[test]
fn keeps_an_image_that_replicas_use() {
    let said = |replicas: &[&str], volumes: &[&str]| {
        let owned = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>();
        admit_deletion("a1", &owned(replicas), &owned(volumes)).err().map(|e| e.to_string()).unwrap_or_default()
    };
    assert_eq!(said(&[], &[]), "");
    expect!["cannot delete backing image `a1` since there are replicas using it: v-r-1, v-r-2; delete volume v first"]
        .assert_eq(&said(&["v-r-1", "v-r-2"], &["v"]));
    expect!["cannot delete backing image `a1` since there are replicas using it: those of volumes v, w; delete volumes v, w first"]
        .assert_eq(&said(&[], &["v", "w"]));
    expect!["cannot delete backing image `a1` since there are replicas using it: v-r-1; delete their volumes first"]
        .assert_eq(&said(&["v-r-1"], &[]));
}

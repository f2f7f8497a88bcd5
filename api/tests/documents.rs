//! Manifests written for Longhorn parse, and lose nothing when they are read and written.

use backing_image_api as api;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Every field of `part` is in `whole`, with the same value.
fn contains(whole: &Value, part: &Value, path: &str) {
    match (whole, part) {
        (Value::Object(whole), Value::Object(part)) => {
            for (key, value) in part {
                let found = whole.get(key).unwrap_or_else(|| panic!("{path}.{key} is lost"));
                contains(found, value, &format!("{path}.{key}"));
            }
        }
        (whole, part) => assert_eq!(whole, part, "{path}"),
    }
}

fn survives<T: Serialize + DeserializeOwned>(yaml: &str) -> T {
    let given: Value = serde_yaml_ng::from_str(yaml).unwrap();
    let object: T = serde_json::from_value(given.clone()).unwrap();
    let written = serde_json::to_value(&object).unwrap();
    contains(&written, &given, "");
    let again: T = serde_json::from_value(written.clone()).unwrap();
    assert_eq!(serde_json::to_value(&again).unwrap(), written, "a second time changes nothing");
    object
}

#[test]
fn reads_the_download_example() {
    let image: api::BackingImage = survives(
        r#"
apiVersion: longhorn.io/v1beta2
kind: BackingImage
metadata:
  name: bi-download
  namespace: longhorn-system
spec:
  dataEngine: v1
  minNumberOfCopies: 2
  nodeSelector:
    - "node1"
  diskSelector:
    - "disk1"
  sourceType: download
  sourceParameters:
    url: https://longhorn-backing-image.s3-us-west-1.amazonaws.com/parrot.raw
  checksum: 304f3ed30ca6878e9056ee6f1b02b328239f0d0c2c1272840998212f9734b196371560b3b939037e4f4c2884ce457c2cbc9f0621f4f5d1ca983983c8cdf8cd9a
"#,
    );
    let rules = api::validation::image::ImageRules { default_min_copies: 3, allowed_sources: Default::default() };
    let image = api::validation::image::admit_new(image, &rules).unwrap();
    assert_eq!((image.spec.min_number_of_copies, image.spec.node_selector), (2, vec!["node1".to_owned()]));
}

#[test]
fn reads_the_export_example() {
    let image: api::BackingImage = survives(
        r#"
apiVersion: longhorn.io/v1beta2
kind: BackingImage
metadata:
  name: bi-export
  namespace: longhorn-system
spec:
  dataEngine: v1
  minNumberOfCopies: 2
  nodeSelector:
    - "node1"
  diskSelector:
    - "disk1"
  sourceType: export-from-volume
  sourceParameters:
    volume-name: vol-export-src
    export-type: qcow2
"#,
    );
    assert_eq!(image.spec.source_type, Some(api::image::SourceType::ExportFromVolume));
}

#[test]
fn keeps_what_it_does_not_know() {
    survives::<api::BackingImage>(
        r#"
apiVersion: longhorn.io/v1beta2
kind: BackingImage
metadata: {name: a1, namespace: longhorn-system, resourceVersion: "7", annotations: {a: b}, managedFields: []}
spec:
  disks: {old: ""}
  diskFileSpecMap: {d1: {evictionRequested: true, dataEngine: v1}}
  fromTheFuture: {deep: [1, {x: null}]}
status:
  uuid: 0a1b2c3d
  v2FirstCopyStatus: ""
  v2FirstCopyDisk: ""
  size: 10737418240
  diskFileStatusMap: {d1: {state: failed-and-cleanup, progress: 30, message: m, lastStateTransitionTime: "2026-01-01T00:00:00Z"}}
  diskLastRefAtMap: {d1: "2026-01-01T00:00:00Z"}
"#,
    );
    survives::<api::Volume>(
        r#"
apiVersion: longhorn.io/v1beta2
kind: Volume
metadata: {name: v, namespace: longhorn-system}
spec: {size: "10737418240", backingImage: a1, encrypted: false, dataLocality: disabled, replicaAutoBalance: ignored}
status: {state: attached, robustness: degraded, kubernetesStatus: {pvName: v, workloadsStatus: []}, currentNodeID: n1}
"#,
    );
    survives::<api::Node>(
        r#"
apiVersion: longhorn.io/v1beta2
kind: Node
metadata: {name: n1, namespace: longhorn-system}
spec: {disks: {d: {path: /data, diskDriver: auto, allowScheduling: true}}, instanceManagerCPURequest: 0}
status: {diskStatus: {d: {diskUUID: u, scheduledReplica: {r: 1}, storageScheduled: 7, filesystemType: ext4}}, autoEvicting: false}
"#,
    );
    survives::<api::Setting>(
        "{apiVersion: longhorn.io/v1beta2, kind: Setting, metadata: {name: default-replica-count}, value: '2', status: {applied: true}}",
    );
}

#[test]
fn reads_empty_texts_of_go_clients() {
    let yaml = "{apiVersion: longhorn.io/v1beta2, kind: BackingImage, metadata: {name: a1}, spec: {sourceType: '', dataEngine: ''}}";
    let image: api::BackingImage = serde_yaml_ng::from_str(yaml).unwrap();
    assert_eq!((image.spec.source_type, image.spec.data_engine), (None, api::image::DataEngine::V1));
    let error =
        serde_yaml_ng::from_str::<api::BackingImage>(&yaml.replace("sourceType: ''", "sourceType: ftp")).unwrap_err();
    assert!(error.to_string().contains("export-from-volume"), "it names what is possible: {error}");
}

//! Tables of objects, with the columns of `kubectl`: those of the CRD, those of Kubernetes for its own kinds.

use api::setting;
use comfy_table::presets::NOTHING;
use comfy_table::{CellAlignment, Table};
use jiff::Timestamp;
use kube::CustomResourceExt;
use serde_json::Value;
use store::ResourceType;

/// One column: its title, where its value is, whether it is shown only in wide tables.
struct Column {
    title: String,
    path: String,
    wide: bool,
}

/// Objects as a table with a header.
pub fn objects(resource: &ResourceType, items: &[Value], namespaces: bool, wide: bool, now: Timestamp) -> String {
    let columns: Vec<Column> = columns(resource).into_iter().filter(|c| wide || !c.wide).collect();
    let mut header: Vec<String> =
        if namespaces { vec!["NAMESPACE".into(), "NAME".into()] } else { vec!["NAME".into()] };
    header.extend(columns.iter().map(|c| c.title.to_uppercase()));
    let rows = items.iter().map(|item| {
        let metadata = &item["metadata"];
        let mut row = vec![];
        if namespaces {
            row.push(plain(&metadata["namespace"]));
        }
        row.push(plain(&metadata["name"]));
        row.extend(columns.iter().map(|column| cell(item, &column.path, now)));
        row
    });
    text(header, rows)
}

/// A table without lines, like those of `kubectl`.
pub fn text(header: Vec<String>, rows: impl Iterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING).set_header(header);
    for row in rows {
        table.add_row(row);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 3)).set_cell_alignment(CellAlignment::Left);
    }
    table.lines().map(|line| format!("{}\n", line.trim_end())).collect()
}

fn columns(resource: &ResourceType) -> Vec<Column> {
    let crds = [
        api::BackingImage::crd(),
        api::BackingImageManager::crd(),
        api::BackingImageDataSource::crd(),
        api::Volume::crd(),
        api::Engine::crd(),
        api::Replica::crd(),
        api::Node::crd(),
    ];
    for crd in crds {
        if resource.group == crd.spec.group && resource.plural == crd.spec.names.plural {
            let list = crd.spec.versions.into_iter().flat_map(|v| v.additional_printer_columns.unwrap_or_default());
            return list
                .map(|c| Column { title: c.name, path: c.json_path, wide: c.priority.unwrap_or(0) > 0 })
                .collect();
        }
    }
    let age = ("Age", ".metadata.creationTimestamp", false);
    let list: &[(&str, &str, bool)] = match resource.kind.as_str() {
        "PersistentVolumeClaim" => &[
            ("Status", ".status.phase", false),
            ("Volume", ".spec.volumeName", false),
            ("Capacity", ".status.capacity.storage", false),
            ("Access modes", ".status.accessModes", false),
            ("StorageClass", ".spec.storageClassName", false),
            age,
            ("VolumeMode", ".spec.volumeMode", true),
        ],
        "PersistentVolume" => &[
            ("Capacity", ".spec.capacity.storage", false),
            ("Access modes", ".spec.accessModes", false),
            ("Reclaim policy", ".spec.persistentVolumeReclaimPolicy", false),
            ("Status", ".status.phase", false),
            ("Claim", "claim", false),
            ("StorageClass", ".spec.storageClassName", false),
            age,
            ("VolumeMode", ".spec.volumeMode", true),
            ("Handle", ".spec.csi.volumeHandle", true),
        ],
        "StorageClass" => &[
            ("Provisioner", ".provisioner", false),
            ("ReclaimPolicy", ".reclaimPolicy", false),
            ("VolumeBindingMode", ".volumeBindingMode", false),
            ("AllowVolumeExpansion", ".allowVolumeExpansion", false),
            age,
        ],
        "VolumeAttachment" => &[
            ("Attacher", ".spec.attacher", false),
            ("PV", ".spec.source.persistentVolumeName", false),
            ("Node", ".spec.nodeName", false),
            ("Attached", ".status.attached", false),
            age,
            ("Error", ".status.attachError.message", true),
        ],
        "Event" => &[
            ("Last seen", ".lastTimestamp", false),
            ("Type", ".type", false),
            ("Reason", ".reason", false),
            ("Object", "involved", false),
            ("Count", ".count", true),
            ("Message", ".message", false),
        ],
        "Setting" => &[
            ("Value", ".value", false),
            ("Default", "default", false),
            ("Range", "range", false),
            age,
            ("Effect", "effect", true),
        ],
        _ => &[age],
    };
    list.iter()
        .map(|(title, path, wide)| Column { title: (*title).into(), path: (*path).into(), wide: *wide })
        .collect()
}

fn cell(item: &Value, path: &str, now: Timestamp) -> String {
    match path {
        "claim" => {
            let claim = &item["spec"]["claimRef"];
            return if claim.is_null() {
                String::new()
            } else {
                format!("{}/{}", plain(&claim["namespace"]), plain(&claim["name"]))
            };
        }
        "default" | "range" | "effect" => {
            let name = plain(&item["metadata"]["name"]);
            let (known, about) = (setting::known(&name), setting::about(&name));
            return match path {
                "default" => known.map_or("", |known| known.default),
                "range" => known.map_or("", |known| known.rule),
                _ => about.map_or("", |about| about.effect),
            }
            .to_owned();
        }
        "involved" => {
            let object = &item["involvedObject"];
            return format!("{}/{}", plain(&object["kind"]).to_lowercase(), plain(&object["name"]));
        }
        _ => {}
    }
    let value = follow(item, path);
    if path.ends_with("Timestamp") {
        return value.as_str().map_or("<unknown>".into(), |since| age(since, now));
    }
    if path.ends_with("accessModes") {
        let modes = value.as_array().map(Vec::as_slice).unwrap_or_default();
        return modes.iter().map(|m| short_access_mode(m.as_str().unwrap_or_default())).collect::<Vec<_>>().join(",");
    }
    plain(value)
}

/// The value at a JSON path of the kind that printer columns use: `.a.b`, `.a[?(@.type=='Ready')].status`.
fn follow<'a>(item: &'a Value, path: &str) -> &'a Value {
    let mut value = item;
    let mut rest = path.trim_start_matches('.');
    while !rest.is_empty() {
        if let Some(filter) = rest.strip_prefix("[?(@.") {
            let Some((condition, after)) = filter.split_once(")]") else { return &Value::Null };
            let Some((field, wanted)) = condition.split_once("==") else { return &Value::Null };
            let wanted = wanted.trim_matches(['\'', '"']);
            let list = value.as_array().map(Vec::as_slice).unwrap_or_default();
            value = list.iter().find(|entry| entry[field] == wanted).unwrap_or(&Value::Null);
            rest = after.trim_start_matches('.');
        } else {
            let end = rest.find(['.', '[']).unwrap_or(rest.len());
            value = value.get(&rest[..end]).unwrap_or(&Value::Null);
            rest = rest[end..].trim_start_matches('.');
        }
    }
    value
}

fn plain(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn short_access_mode(mode: &str) -> &str {
    match mode {
        "ReadWriteOnce" => "RWO",
        "ReadWriteMany" => "RWX",
        "ReadOnlyMany" => "ROX",
        "ReadWriteOncePod" => "RWOP",
        other => other,
    }
}

/// How long ago a time was, in the short form of `kubectl`: `5s`, `3m20s`, `2h`, `4d`.
pub fn age(since: &str, now: Timestamp) -> String {
    let Ok(since) = since.parse::<Timestamp>() else { return since.to_owned() };
    let seconds = (now.as_second() - since.as_second()).max(0);
    span(seconds)
}

/// A number of seconds in that form.
pub fn span(seconds: i64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    match seconds {
        0..120 => format!("{seconds}s"),
        120..600 => match seconds % 60 {
            0 => format!("{minutes}m"),
            rest => format!("{minutes}m{rest}s"),
        },
        600..10800 => format!("{minutes}m"),
        10800..172800 => format!("{hours}h"),
        _ => format!("{days}d"),
    }
}

/// A number of bytes for people: `512 B`, `1.5 MiB`.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{count} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use controller::http::registry;
    use expect_test::{Expect, expect};
    use serde_json::json;

    use super::*;

    fn check(word: &str, items: &[Value], namespaces: bool, wide: bool, expected: Expect) {
        let now = "2026-01-01T01:00:00Z".parse().unwrap();
        expected.assert_eq(&objects(&registry::by_word(word).unwrap().resource, items, namespaces, wide, now));
    }

    #[test]
    fn images_have_the_columns_of_the_crd() {
        let image = json!({
            "metadata": { "name": "bi-download", "creationTimestamp": "2026-01-01T00:56:40Z" },
            "spec": { "sourceType": "download" },
            "status": { "uuid": "1a2b3c4d", "size": 10485760, "virtualSize": 67108864,
                "conditions": [{ "type": "Other", "status": "False" }, { "type": "Ready", "status": "True" }] },
        });
        check(
            "lhbi",
            &[image],
            false,
            false,
            expect![[r#"
            NAME          UUID       SOURCETYPE   SIZE       VIRTUALSIZE   READY   AGE
            bi-download   1a2b3c4d   download     10485760   67108864      True    3m20s
        "#]],
        );
    }

    #[test]
    fn claims_look_as_in_kubectl() {
        let claim = json!({
            "metadata": { "name": "data", "namespace": "default", "creationTimestamp": "2026-01-01T00:00:00Z" },
            "spec": { "volumeName": "pvc-1", "storageClassName": "longhorn", "volumeMode": "Block" },
            "status": { "phase": "Bound", "capacity": { "storage": "1Gi" }, "accessModes": ["ReadWriteOnce"] },
        });
        check(
            "pvc",
            &[claim],
            true,
            true,
            expect![[r#"
            NAMESPACE   NAME   STATUS   VOLUME   CAPACITY   ACCESS MODES   STORAGECLASS   AGE   VOLUMEMODE
            default     data   Bound    pvc-1    1Gi        RWO            longhorn       60m   Block
        "#]],
        );
    }

    #[test]
    fn settings_show_their_default_and_range() {
        let setting = |name: &str, value: &str| json!({ "metadata": { "name": name, "creationTimestamp": "2026-01-01T00:00:00Z" }, "value": value });
        check(
            "settings",
            &[setting("default-replica-count", "2"), setting("of-another-version", "x")],
            false,
            true,
            expect![[r#"
                NAME                    VALUE   DEFAULT   RANGE                        AGE   EFFECT
                default-replica-count   2       3         a whole number, at least 1   60m   Replicas of a volume that does not say how many
                of-another-version      x                                              60m
            "#]],
        );
    }

    #[test]
    fn sizes_and_ages_are_short() {
        assert_eq!([bytes(512), bytes(1536), bytes(3 << 30)], ["512 B", "1.5 KiB", "3.0 GiB"]);
        let now = "2026-01-03T00:00:00Z".parse().unwrap();
        let ages = ["2026-01-02T23:59:59Z", "2026-01-02T23:55:00Z", "2026-01-02T20:00:00Z", "2025-12-01T00:00:00Z"];
        assert_eq!(ages.map(|a| age(a, now)), ["1s", "5m", "4h", "33d"]);
    }
}

//! Volume: rules of creation and change.

use crate::ids::VolumeName;
use crate::image::DataEngine;
use crate::volume::{AccessMode, VolumeState};
use crate::{BackingImage, Volume};

use super::{FieldErrors, LABEL_RULE, Mistakes, fits_label};

/// More replicas than this do not make a volume safer, only slower; Longhorn's bound.
const MAX_REPLICAS: u32 = 20;

/// Whether a new volume may be stored. `image` is the one that it names, if that exists.
pub fn check_new(volume: &Volume, image: Option<&BackingImage>) -> Result<(), FieldErrors> {
    let mut mistakes = Mistakes::default();
    let name = volume.metadata.name.as_deref().unwrap_or_default();
    if let Err(error) = name.parse::<VolumeName>() {
        mistakes.add("metadata.name", name, format!("invalid name: {}", error.rule));
    } else if !fits_label(name) {
        mistakes.add("metadata.name", name, format!("invalid name: {LABEL_RULE}"));
    }
    let spec = &volume.spec;
    if spec.size.0 == 0 || !spec.size.0.is_multiple_of(512) {
        mistakes.add("spec.size", spec.size.to_string(), "it must be a number of bytes above 0 and a multiple of 512");
    }
    if !matches!(spec.frontend.as_str(), "" | "blockdev") {
        mistakes.add("spec.frontend", &spec.frontend, "only `blockdev` is supported");
    }
    if spec.data_engine == DataEngine::V2 {
        mistakes.add("spec.dataEngine", "v2", "the v2 data engine is not supported, use v1");
    }
    if spec.access_mode == AccessMode::Rwx {
        mistakes.add("spec.accessMode", "rwx", "shared volumes are not supported, use rwo or rwop");
    }
    check_image(&mut mistakes, volume, image);
    check_wishes(&mut mistakes, volume);
    mistakes.result()
}

/// Whether a volume may be changed in this way.
pub fn check_change(old: &Volume, new: &Volume) -> Result<(), FieldErrors> {
    let mut mistakes = Mistakes::default();
    mistakes.refuse_change("spec.backingImage", &old.spec.backing_image, &new.spec.backing_image);
    check_growth(&mut mistakes, old, new);
    if new.spec.data_engine != old.spec.data_engine {
        mistakes.add("spec.dataEngine", "v2", "it cannot be changed, and was `v1`");
    }
    if new.spec.access_mode == AccessMode::Rwx && old.spec.access_mode != AccessMode::Rwx {
        mistakes.add("spec.accessMode", "rwx", "shared volumes are not supported, use rwo or rwop");
    }
    check_wishes(&mut mistakes, new);
    mistakes.result()
}

/// Who may use a volume, as the end of a sentence about it; a volume at rest has nobody.
pub fn use_of(volume: &Volume) -> Option<String> {
    let status = volume.status.clone().unwrap_or_default();
    if !volume.spec.node_id.is_empty() {
        Some(format!("is attached to node `{}`, or on its way there", volume.spec.node_id))
    } else if !status.current_node_id.is_empty() {
        Some(format!("is still being detached from node `{}`", status.current_node_id))
    } else {
        let moves = matches!(status.state, VolumeState::Attached | VolumeState::Attaching | VolumeState::Detaching);
        moves.then(|| "is still being detached".to_owned())
    }
}

/// A volume grows when nothing uses it: its replicas do so when they are started, and its filesystem before it is mounted.
fn check_growth(mistakes: &mut Mistakes, old: &Volume, new: &Volume) {
    let (has, wanted) = (old.spec.size, new.spec.size);
    let reason = if wanted == has {
        return;
    } else if wanted < has {
        format!("a volume cannot become smaller, and this one has {has}")
    } else if !wanted.0.is_multiple_of(512) {
        "it must be a multiple of 512".into()
    } else if let Some(used) = use_of(old).or_else(|| use_of(new)) {
        format!("this one has {has} and {used}; a volume grows once it is detached")
    } else {
        return;
    };
    mistakes.add("spec.size", wanted.to_string(), reason);
}

fn check_image(mistakes: &mut Mistakes, volume: &Volume, image: Option<&BackingImage>) {
    let name = &volume.spec.backing_image;
    if name.is_empty() {
        return;
    }
    let Some(image) = image else {
        mistakes.add("spec.backingImage", name, "there is no such backing image; create it first");
        return;
    };
    if image.metadata.deletion_timestamp.is_some() {
        mistakes.add("spec.backingImage", name, "it is being deleted; wait until it is gone, or use another name");
    }
    let virtual_size = image.status.as_ref().map_or(0, |status| status.virtual_size);
    if volume.spec.size.0 < virtual_size {
        let rule = format!("volume size should be larger than the backing image size, {virtual_size} bytes");
        mistakes.add("spec.size", volume.spec.size.to_string(), rule);
    }
}

fn check_wishes(mistakes: &mut Mistakes, volume: &Volume) {
    let count = volume.spec.number_of_replicas;
    if !(1..=MAX_REPLICAS).contains(&count) {
        mistakes.add("spec.numberOfReplicas", count.to_string(), format!("it must be 1 to {MAX_REPLICAS}"));
    }
    mistakes.check_tags("spec.nodeSelector", &volume.spec.node_selector);
    mistakes.check_tags("spec.diskSelector", &volume.spec.disk_selector);
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};
    use serde_json::{Value, json};

    use super::*;

    fn volume(name: &str, changes: Value) -> Volume {
        let mut spec = json!({"size": "1073741824", "numberOfReplicas": 3, "frontend": "blockdev"});
        spec.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        let meta = json!({"name": name});
        serde_json::from_value(
            json!({"apiVersion": "longhorn.io/v1beta2", "kind": "Volume", "metadata": meta, "spec": spec}),
        )
        .unwrap()
    }

    fn shown(result: Result<(), FieldErrors>) -> String {
        result.map_or_else(|e| e.to_string(), |()| "fine".into())
    }

    fn check(name: &str, changes: Value, expected: Expect) {
        let mut image = BackingImage::new("img", Default::default());
        image.status.get_or_insert_default().virtual_size = 512 << 20;
        let volume = volume(name, changes);
        let image = (volume.spec.backing_image == "img").then_some(&image);
        expected.assert_eq(&shown(super::check_new(&volume, image)));
    }

    #[test]
    fn judges_new_volumes() {
        check("pvc-1", json!({}), expect!["fine"]);
        check("pvc-1", json!({"backingImage": "img"}), expect!["fine"]);
        check(
            "Pvc",
            json!({}),
            expect![
                "metadata.name is `Pvc`: invalid name: 1 to 63 characters of a-z 0-9 . -, beginning with a letter or digit"
            ],
        );
        check(
            "pvc-",
            json!({}),
            expect![
                "metadata.name is `pvc-`: invalid name: at most 63 characters that end with a letter or digit, as it becomes a label of other objects"
            ],
        );
        check(
            "a",
            json!({"size": "0"}),
            expect!["spec.size is `0`: it must be a number of bytes above 0 and a multiple of 512"],
        );
        check(
            "a",
            json!({"size": "1000"}),
            expect!["spec.size is `1000`: it must be a number of bytes above 0 and a multiple of 512"],
        );
        check(
            "a",
            json!({"size": "1048576", "backingImage": "img"}),
            expect![
                "spec.size is `1048576`: volume size should be larger than the backing image size, 536870912 bytes"
            ],
        );
        check(
            "a",
            json!({"backingImage": "other"}),
            expect!["spec.backingImage is `other`: there is no such backing image; create it first"],
        );
        check(
            "a",
            json!({"numberOfReplicas": 0, "frontend": "iscsi", "dataEngine": "v2", "accessMode": "rwx"}),
            expect![
                "spec.frontend is `iscsi`: only `blockdev` is supported; spec.dataEngine is `v2`: the v2 data engine is not supported, use v1; spec.accessMode is `rwx`: shared volumes are not supported, use rwo or rwop; spec.numberOfReplicas is `0`: it must be 1 to 20"
            ],
        );
    }

    #[test]
    fn no_volume_begins_on_an_image_that_is_being_deleted() {
        let mut image = BackingImage::new("img", Default::default());
        image.metadata.deletion_timestamp = Some(serde_json::from_value(json!("2026-01-01T00:00:00Z")).unwrap());
        expect!["spec.backingImage is `img`: it is being deleted; wait until it is gone, or use another name"]
            .assert_eq(&shown(super::check_new(&volume("a", json!({"backingImage": "img"})), Some(&image))));
        // One that lies on it already goes on.
        let old = volume("a", json!({"backingImage": "img"}));
        let new = volume("a", json!({"backingImage": "img", "numberOfReplicas": 2}));
        expect!["fine"].assert_eq(&shown(super::check_change(&old, &new)));
    }

    #[test]
    fn judges_changes() {
        let check = |changes: Value, expected: Expect| {
            expected.assert_eq(&shown(super::check_change(&volume("a", json!({})), &volume("a", changes))));
        };
        check(json!({"nodeID": "node-1", "numberOfReplicas": 2}), expect!["fine"]);
        check(
            json!({"size": "1048576"}),
            expect!["spec.size is `1048576`: a volume cannot become smaller, and this one has 1073741824"],
        );
        check(
            json!({"size": "1073741823"}),
            expect!["spec.size is `1073741823`: a volume cannot become smaller, and this one has 1073741824"],
        );
        check(json!({"size": "2147483648"}), expect!["fine"]);
        check(json!({"size": "2147483649"}), expect!["spec.size is `2147483649`: it must be a multiple of 512"]);
        check(
            json!({"size": "2147483648", "nodeID": "node-1"}),
            expect![
                "spec.size is `2147483648`: this one has 1073741824 and is attached to node `node-1`, or on its way there; a volume grows once it is detached"
            ],
        );
        check(
            json!({"backingImage": "img", "numberOfReplicas": 21}),
            expect![
                "spec.backingImage is `img`: it cannot be changed, and was ``; spec.numberOfReplicas is `21`: it must be 1 to 20"
            ],
        );
    }

    #[test]
    fn a_volume_grows_only_while_it_is_at_rest() {
        let check = |node: &str, status: Value, expected: Expect| {
            let mut old = volume("a", json!({"nodeID": node}));
            old.status = serde_json::from_value(status).unwrap();
            let mut new = old.clone();
            new.spec.size.0 *= 2;
            new.spec.node_id.clear();
            expected.assert_eq(&shown(super::check_change(&old, &new)));
        };
        check("", json!({}), expect!["fine"]);
        check("", json!({"state": "creating"}), expect!["fine"]);
        check("", json!({"state": "detached"}), expect!["fine"]);
        // Whoever takes it off its node in the same breath.
        check(
            "n1",
            json!({"state": "detached"}),
            expect![
                "spec.size is `2147483648`: this one has 1073741824 and is attached to node `n1`, or on its way there; a volume grows once it is detached"
            ],
        );
        check(
            "",
            json!({"state": "detaching", "currentNodeID": "n2"}),
            expect![
                "spec.size is `2147483648`: this one has 1073741824 and is still being detached from node `n2`; a volume grows once it is detached"
            ],
        );
        check(
            "",
            json!({"state": "attaching"}),
            expect![
                "spec.size is `2147483648`: this one has 1073741824 and is still being detached; a volume grows once it is detached"
            ],
        );
    }
}

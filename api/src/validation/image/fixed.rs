//! What of an image can never change, and what no more once a copy is ready: its content has a name then, and volumes may lie on it.

use std::collections::BTreeSet;

use crate::BackingImage;
use crate::image::{CopyState, DataEngine, SourceType};
use crate::validation::{Mistakes, url};

/// Why `sourceType`, `sourceParameters` and `checksum` stay what they are.
const WHY: &str = "a copy of the image is ready, so what it is made from is settled: volumes lie on just that content";
const NEXT: &str = "create another image for another content";

/// Refuses what may not change.
pub(super) fn check(mistakes: &mut Mistakes, old: &BackingImage, new: &BackingImage) {
    let (was, is) = (&old.spec, &new.spec);
    let engine = |engine| if engine == DataEngine::V2 { "v2" } else { "v1" };
    mistakes.refuse_change("spec.dataEngine", &engine(was.data_engine), &engine(is.data_engine));
    mistakes.refuse_change("spec.secret", &was.secret, &is.secret);
    mistakes.refuse_change("spec.secretNamespace", &was.secret_namespace, &is.secret_namespace);
    let Some(checksum) = settled(old) else { return };
    let source = |source: Option<SourceType>| source.map_or("", SourceType::as_str);
    if is.source_type != was.source_type {
        let message = format!("it cannot be changed any more, and was `{}`: {WHY}; {NEXT}", source(was.source_type));
        mistakes.add("spec.sourceType", source(is.source_type), message);
    }
    // To pin what is there changes nothing, also where something else was wished.
    let is_pinned_now = !is.checksum.is_empty() && is.checksum == checksum;
    if is.checksum != was.checksum && !is_pinned_now {
        let pin = match was.checksum.is_empty() && !checksum.is_empty() {
            true => format!("; it may be pinned to what it is, `{checksum}`"),
            false => String::new(),
        };
        let message = format!("it cannot be changed any more, and was `{}`: {WHY}{pin}; {NEXT}", was.checksum);
        mistakes.add("spec.checksum", &is.checksum, message);
    }
    check_parameters(mistakes, old, new);
}

fn check_parameters(mistakes: &mut Mistakes, old: &BackingImage, new: &BackingImage) {
    let (was, is) = (&old.spec.source_parameters, &new.spec.source_parameters);
    let keys: BTreeSet<&String> = was.keys().chain(is.keys()).collect();
    for key in keys {
        let text = |value: Option<&String>| value.map(|value| url::redact(value)).unwrap_or_default();
        if was.get(key) == is.get(key) {
            continue;
        }
        let next = match key.as_str() {
            // Whatever comes from there, nothing but the pinned content is taken; whether it is an address is looked at elsewhere.
            "url" if !new.spec.checksum.is_empty() && is.contains_key(key) => continue,
            "url" => "another address may be given once `checksum` pins the content (status.checksum has it)",
            _ => NEXT,
        };
        let message = format!("it cannot be changed any more, and was `{}`: {WHY}; {next}", text(was.get(key)));
        mistakes.add(format!("spec.sourceParameters[{key}]"), text(is.get(key)), message);
    }
}

/// The checksum of what was ready once, empty when it is not told; `None` before that.
fn settled(image: &BackingImage) -> Option<String> {
    let status = image.status.as_ref()?;
    let is_ready = status.disk_file_status_map.values().any(|copy| copy.state == CopyState::Ready);
    (is_ready || !status.checksum.is_empty()).then(|| status.checksum.clone())
}

//! BackingImage: defaults and rules of creation, change and deletion (LF 3).

use crate::ids::{DiskId, ImageName, Sha512Digest};
use crate::image::{DataEngine, SourceType};
use crate::names::{FINALIZER, MANAGED_BY, label};
use crate::source_address::AllowedSources;
use crate::{BackingImage, ErrorKind, Setting, bandwidth, setting};

use super::{FieldErrors, LABEL_RULE, Mistakes, fits_label, nearest, url};

mod fixed;

/// What the rules depend on.
#[derive(Clone, Debug)]
pub struct ImageRules {
    /// The setting `default-min-number-of-backing-image-copies`.
    pub default_min_copies: u32,
    /// The setting `backing-image-allowed-source-addresses`.
    pub allowed_sources: AllowedSources,
}

impl ImageRules {
    /// The rules of stored settings.
    pub fn of(settings: &[Setting]) -> ImageRules {
        let default_min_copies = setting::value(settings, setting::DEFAULT_MIN_COPIES).parse().unwrap_or(1);
        ImageRules { default_min_copies, allowed_sources: AllowedSources::of(settings) }
    }
}

/// A new image with its defaults filled in.
pub fn admit_new(mut image: BackingImage, rules: &ImageRules) -> Result<BackingImage, FieldErrors> {
    fill_in(&mut image, rules);
    let mut mistakes = Mistakes::default();
    check_name(&mut mistakes, image.metadata.name.as_deref().unwrap_or_default());
    check_checksum(&mut mistakes, &image.spec.checksum);
    check_source(&mut mistakes, &image, rules);
    if image.spec.data_engine == DataEngine::V2 {
        mistakes.add("spec.dataEngine", "v2", "v2 backing images are not supported, use v1");
    }
    for (field, value) in [("spec.secret", &image.spec.secret), ("spec.secretNamespace", &image.spec.secret_namespace)]
    {
        if !value.is_empty() {
            mistakes.add(field, value, "encrypted images are not supported; leave it out");
        }
    }
    check_wishes(&mut mistakes, &image);
    mistakes.result().map(|()| image)
}

/// A changed image with its defaults filled in.
pub fn admit_change(old: &BackingImage, new: BackingImage, rules: &ImageRules) -> Result<BackingImage, FieldErrors> {
    let mut mistakes = Mistakes::default();
    // Longhorn also stores no type, which is a download, and blanks around a value, which are none of it.
    let (mut was, mut is) = (old.clone(), new.clone());
    trim(&mut was);
    trim(&mut is);
    was.spec.source_type = was.spec.source_type.or(Some(SourceType::Download));
    // What holds an image back while it is being deleted is not put back, and what it holds is not judged.
    let is_going = old.metadata.deletion_timestamp.is_some();
    if !is_going || old.spec.source_type.is_none() {
        is.spec.source_type = is.spec.source_type.or(was.spec.source_type);
    }
    fixed::check(&mut mistakes, &was, &is);
    if is_going {
        return mistakes.result().map(|()| new);
    }
    // Old objects may hold what is refused today; only what changes is judged, and what may not change is told once.
    if is.spec.checksum != was.spec.checksum && !mistakes.has("spec.checksum") {
        check_checksum(&mut mistakes, &is.spec.checksum);
    }
    let has_changed =
        (is.spec.source_type, &is.spec.source_parameters) != (was.spec.source_type, &was.spec.source_parameters);
    if has_changed && !mistakes.has("spec.source") {
        check_source(&mut mistakes, &is, rules);
    }
    check_wishes(&mut mistakes, &is);
    mistakes.result().map(|()| is)
}

/// Why an image cannot be deleted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot delete backing image `{image}` since there are replicas using it: {}; delete {} first", users(.replicas, .volumes), named(.volumes))]
pub struct ImageInUse {
    pub image: String,
    pub replicas: Vec<String>,
    /// The volumes that use it, also those without a replica so far.
    pub volumes: Vec<String>,
}

impl ImageInUse {
    /// What kind of failure this is.
    pub fn kind(&self) -> ErrorKind {
        ErrorKind::NotReady
    }
}

fn users(replicas: &[String], volumes: &[String]) -> String {
    if replicas.is_empty() { format!("those of {}", named(volumes)) } else { replicas.join(", ") }
}

fn named(volumes: &[String]) -> String {
    match volumes {
        [] => "their volumes".into(),
        [one] => format!("volume {one}"),
        several => format!("volumes {}", several.join(", ")),
    }
}

/// Whether an image may be deleted, given the names of all replicas that are labeled with it, whatever their state, and of all volumes.
pub fn admit_deletion(image: &str, replicas: &[String], volumes: &[String]) -> Result<(), ImageInUse> {
    if replicas.is_empty() && volumes.is_empty() {
        return Ok(());
    }
    Err(ImageInUse { image: image.to_owned(), replicas: replicas.to_vec(), volumes: volumes.to_vec() })
}

fn fill_in(image: &mut BackingImage, rules: &ImageRules) {
    trim(image);
    let spec = &mut image.spec;
    if spec.source_type.is_none() && spec.source_parameters.contains_key("url") {
        spec.source_type = Some(SourceType::Download);
    }
    let default = match spec.source_type {
        Some(SourceType::ExportFromVolume) => Some(("export-type", "raw")),
        Some(SourceType::Clone) => Some(("encryption", "ignore")),
        _ => None,
    };
    if let Some((key, value)) = default {
        let entry = spec.source_parameters.entry(key.to_owned()).or_default();
        if entry.is_empty() {
            *entry = value.to_owned();
        }
    }
    if spec.min_number_of_copies == 0 {
        spec.min_number_of_copies = rules.default_min_copies;
    }
    let finalizers = image.metadata.finalizers.get_or_insert_default();
    if !finalizers.iter().any(|f| f == FINALIZER) {
        finalizers.push(FINALIZER.to_owned());
    }
    let labels = image.metadata.labels.get_or_insert_default();
    labels.insert(label::COMPONENT.to_owned(), "backing-image".to_owned());
    labels.insert(label::MANAGED_BY.to_owned(), MANAGED_BY.to_owned());
}

fn trim(image: &mut BackingImage) {
    let trimmed = |text: &String| text.trim().to_owned();
    image.spec.checksum = trimmed(&image.spec.checksum);
    for value in image.spec.source_parameters.values_mut() {
        *value = trimmed(value);
    }
}

fn check_name(mistakes: &mut Mistakes, name: &str) {
    if let Err(error) = name.parse::<ImageName>() {
        mistakes.add("metadata.name", name, format!("invalid name: {}", error.rule));
    } else if !fits_label(name) {
        mistakes.add("metadata.name", name, format!("invalid name: {LABEL_RULE}"));
    }
}

fn check_checksum(mistakes: &mut Mistakes, checksum: &str) {
    if checksum.is_empty() || checksum.parse::<Sha512Digest>().is_ok() {
        return;
    }
    let reason = if checksum.to_ascii_lowercase().parse::<Sha512Digest>().is_ok() {
        "write its letters in lower case".to_owned()
    } else {
        let count = checksum.chars().count();
        format!(
            "the SHA-512 of the file is 128 characters of 0-9 a-f, and this has {count}; `sha512sum FILE` prints it"
        )
    };
    mistakes.add("spec.checksum", checksum, format!("invalid checksum: {reason}"));
}

/// Rules for what may change at any time.
fn check_wishes(mistakes: &mut Mistakes, image: &BackingImage) {
    if image.spec.min_number_of_copies < 1 {
        mistakes.add("spec.minNumberOfCopies", "0", "the minimum number of copies must larger than 0");
    }
    mistakes.check_tags("spec.nodeSelector", &image.spec.node_selector);
    mistakes.check_tags("spec.diskSelector", &image.spec.disk_selector);
    let limit = image.spec.bandwidth_limit;
    if !bandwidth::is_possible(limit) {
        mistakes.add("spec.bandwidthLimit", limit.to_string(), format!("must be {}", bandwidth::RULE_OF_NUMBERS));
    }
    let asked = &image.spec.verify_requested_at;
    if !asked.is_empty() && asked.parse::<jiff::Timestamp>().is_err() {
        mistakes.add(
            "spec.verifyRequestedAt",
            asked,
            "it is no time; give one like 2026-01-02T03:04:05Z, or leave it out",
        );
    }
    for disk in image.spec.disk_file_spec_map.keys() {
        if let Err(error) = disk.parse::<DiskId>() {
            mistakes.add("spec.diskFileSpecMap", disk, format!("its keys are UUIDs of disks: {}", error.rule));
        }
    }
}

fn keys(source: SourceType) -> &'static [&'static str] {
    match source {
        SourceType::Download => &["url", "padToSector"],
        SourceType::Upload => &["padToSector"],
        SourceType::ExportFromVolume => &["volume-name", "export-type"],
        SourceType::Restore => &["backup-url", "concurrent-limit", "backup-target-name"],
        SourceType::Clone => &["backing-image", "encryption", "secret", "secret-namespace"],
    }
}

fn check_source(mistakes: &mut Mistakes, image: &BackingImage, rules: &ImageRules) {
    const FIELD: &str = "spec.sourceParameters";
    let Some(source) = image.spec.source_type else {
        let types = "download, upload, export-from-volume, restore or clone";
        mistakes.add("spec.sourceType", "", format!("it is not provided, and must be one of {types}"));
        return;
    };
    let parameters = &image.spec.source_parameters;
    for (key, value) in parameters {
        if !keys(source).contains(&key.as_str()) {
            let hint = match nearest(key, keys(source).iter().copied()) {
                Some(meant) => format!("did you mean `{meant}`?"),
                None => format!("known are {}", keys(source).join(", ")),
            };
            mistakes.add(
                format!("{FIELD}[{key}]"),
                value,
                format!("a {} source has no such parameter; {hint}", source.as_str()),
            );
        }
    }
    let given = |key: &str| parameters.get(key).map(String::as_str).unwrap_or_default();
    let one_of = |mistakes: &mut Mistakes, key: &str, allowed: &[&str]| {
        if !allowed.contains(&given(key)) {
            mistakes.add(format!("{FIELD}[{key}]"), given(key), format!("it must be one of {}", allowed.join(", ")));
        }
    };
    let required = |mistakes: &mut Mistakes, key: &str, what: &str| {
        if given(key).is_empty() {
            mistakes.add(format!("{FIELD}[{key}]"), "", format!("it is not provided: give {what}"));
        }
    };
    if parameters.contains_key("padToSector") {
        one_of(mistakes, "padToSector", &["true", "false"]);
    }
    match source {
        SourceType::Download => {
            if let Err(mistake) = url::check(given("url"), &rules.allowed_sources) {
                mistakes.add(format!("{FIELD}[url]"), url::redact(given("url")), mistake.message());
            }
        }
        SourceType::Upload => {}
        SourceType::ExportFromVolume => {
            required(mistakes, "volume-name", "the name of a volume");
            one_of(mistakes, "export-type", &["raw", "qcow2"]);
        }
        SourceType::Restore => {
            required(mistakes, "backup-url", "the address of the backup");
            if given("concurrent-limit").parse::<u32>().is_ok_and(|limit| limit >= 1) {
            } else if parameters.contains_key("concurrent-limit") {
                let field = format!("{FIELD}[concurrent-limit]");
                mistakes.add(field, given("concurrent-limit"), "it must be a whole number, at least 1");
            }
        }
        SourceType::Clone => {
            required(mistakes, "backing-image", "the name of another image");
            one_of(mistakes, "encryption", &["ignore", "encrypt", "decrypt"]);
            if given("encryption") != "ignore" {
                required(mistakes, "secret", "the name of the secret with the key");
                required(mistakes, "secret-namespace", "the namespace of the secret");
            }
        }
    }
}

#[cfg(test)]
mod tests;

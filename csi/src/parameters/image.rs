//! The `backingImage*` parameters, and how an image that exists differs from them.

use std::collections::BTreeMap;

use api::BackingImage;
use api::ids::{ImageName, Sha512Digest};
use api::image::SourceType;
use api::validation::url;
use serde_json::Value;

use super::{Given, ParameterError, sorted};
use crate::error::Difference;
use crate::limits::MAX_COPIES;

const TYPE: &str = "backingImageDataSourceType";
const PARAMETERS: &str = "backingImageDataSourceParameters";
const CHECKSUM: &str = "backingImageChecksum";
const COPIES: &str = "backingImageMinNumberOfCopies";
const NODES: &str = "backingImageNodeSelector";
const DISKS: &str = "backingImageDiskSelector";

/// What a StorageClass says about the image of its volumes. `None`: it says nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageWish {
    pub name: ImageName,
    pub source_type: Option<SourceType>,
    pub source_parameters: BTreeMap<String, String>,
    pub checksum: Option<Sha512Digest>,
    pub min_number_of_copies: Option<u32>,
    pub node_selector: Option<Vec<String>>,
    pub disk_selector: Option<Vec<String>>,
}

impl ImageWish {
    /// A wish for an image that exists, whatever it is.
    pub fn named(name: ImageName) -> ImageWish {
        ImageWish {
            name,
            source_type: None,
            source_parameters: BTreeMap::new(),
            checksum: None,
            min_number_of_copies: None,
            node_selector: None,
            disk_selector: None,
        }
    }

    pub(super) fn parse(given: &Given<'_>) -> Result<Option<ImageWish>, ParameterError> {
        let (first, second) = ("backingImage", "backingImageName");
        let (key, name) = match (given.text(first), given.text(second)) {
            (Some(one), Some(other)) if one != other => {
                return Err(ParameterError::Contradiction { first, second, reason: format!("`{one}` and `{other}`") });
            }
            (Some(name), _) => (first, name),
            (None, Some(name)) => (second, name),
            (None, None) => {
                let others = [TYPE, PARAMETERS, CHECKSUM, COPIES, NODES, DISKS];
                let said = |key: &&str| {
                    given.text(key).is_some_and(|v| !(*key == COPIES && v == "0" || *key == PARAMETERS && v == "{}"))
                };
                return match others.into_iter().find(said) {
                    Some(key) => Err(ParameterError::WithoutImage { key }),
                    None => Ok(None),
                };
            }
        };
        let name = match name.parse::<ImageName>() {
            Ok(name) => name,
            Err(error) => return given.wrong(key, error.rule),
        };
        let source_type = match given.text(TYPE) {
            None => None,
            Some(text) => match source_type(text) {
                Some(source_type) => Some(source_type),
                None => return given.wrong(TYPE, "`download`, `upload`, `export-from-volume`, `restore` or `clone`"),
            },
        };
        let checksum = match given.text(CHECKSUM).map(str::parse::<Sha512Digest>) {
            None => None,
            Some(Ok(digest)) => Some(digest),
            Some(Err(error)) => return given.wrong(CHECKSUM, format!("a SHA-512: {}", error.rule)),
        };
        let copies = given.count(COPIES, MAX_COPIES, "a whole number from 1 to 1000 (0: the default)")?;
        Ok(Some(ImageWish {
            name,
            source_type,
            source_parameters: json_strings(given.text(PARAMETERS).unwrap_or("{}"))?,
            checksum,
            min_number_of_copies: copies.filter(|n| *n > 0),
            node_selector: given.tags(NODES)?,
            disk_selector: given.tags(DISKS)?,
        }))
    }

    pub(super) fn fields(&self, add: &mut impl FnMut(&str, String)) {
        let ImageWish {
            name,
            source_type,
            source_parameters,
            checksum,
            min_number_of_copies,
            node_selector,
            disk_selector,
        } = self;
        add("backingImage", name.to_string());
        add(TYPE, source_type.map(|t| t.as_str().to_owned()).unwrap_or_default());
        for (key, value) in source_parameters {
            add(&format!("{PARAMETERS}.{key}"), value.clone());
        }
        add(CHECKSUM, checksum.as_ref().map(|c| c.to_string()).unwrap_or_default());
        add(COPIES, min_number_of_copies.map(|n| n.to_string()).unwrap_or_default());
        add(NODES, sorted(node_selector.as_deref().unwrap_or_default()));
        add(DISKS, sorted(disk_selector.as_deref().unwrap_or_default()));
    }
}

fn source_type(text: &str) -> Option<SourceType> {
    [SourceType::Download, SourceType::Upload, SourceType::ExportFromVolume, SourceType::Restore, SourceType::Clone]
        .into_iter()
        .find(|t| t.as_str() == text)
}

fn json_strings(text: &str) -> Result<BTreeMap<String, String>, ParameterError> {
    let wrong = |reason: String| ParameterError::Json { key: PARAMETERS, reason };
    let value: Value = serde_json::from_str(text).map_err(|error| wrong(error.to_string()))?;
    let kind = |value: &Value| match value {
        Value::Null => "null".to_owned(),
        Value::Bool(on) => format!("{on} without quotes"),
        Value::Number(number) => format!("the number {number} without quotes"),
        Value::String(_) => "a string".to_owned(),
        Value::Array(_) => "an array".to_owned(),
        Value::Object(_) => "an object".to_owned(),
    };
    let Value::Object(map) = value else { return Err(wrong(format!("it is {}", kind(&value)))) };
    map.into_iter()
        .map(|(key, value)| match value {
            Value::String(text) => Ok((key, text.trim().to_owned())),
            other => Err(wrong(format!("the value of `{key}` is {}", kind(&other)))),
        })
        .collect()
}

/// In what an image that exists is not what is asked for. What was not asked for is not compared.
pub fn differences(wish: &ImageWish, image: &BackingImage, default_copies: u32) -> Vec<Difference> {
    let ImageWish {
        name: _,
        source_type,
        source_parameters,
        checksum,
        min_number_of_copies,
        node_selector,
        disk_selector,
    } = wish;
    let mut found = vec![];
    let mut compare = |field: &str, wanted: String, has: String| {
        if wanted != has {
            found.push(Difference { field: field.to_owned(), wanted, has });
        }
    };
    if let Some(wanted) = source_type {
        // Longhorn's default.
        let has = image.spec.source_type.unwrap_or(SourceType::Download);
        compare("sourceType", wanted.as_str().to_owned(), has.as_str().to_owned());
    }
    if !source_parameters.is_empty() {
        let (wanted, has) = (with_defaults(source_parameters), with_defaults(&image.spec.source_parameters));
        let keys: std::collections::BTreeSet<&String> = wanted.keys().chain(has.keys()).collect();
        for key in keys {
            let (wanted, has) =
                (wanted.get(key).cloned().unwrap_or_default(), has.get(key).cloned().unwrap_or_default());
            if wanted != has {
                compare(&format!("sourceParameters.{key}"), url::redact(&wanted), redacted_other(&has, &wanted));
            }
        }
    }
    if let Some(wanted) = checksum {
        let current = image.status.as_ref().map(|s| s.checksum.as_str()).unwrap_or_default();
        for (field, has) in [("checksum (expected)", image.spec.checksum.as_str()), ("checksum (of the file)", current)]
        {
            if !has.is_empty() {
                compare(field, wanted.to_string(), has.to_owned());
            }
        }
    }
    if let Some(wanted) = min_number_of_copies {
        let has = Some(image.spec.min_number_of_copies).filter(|n| *n > 0).unwrap_or(default_copies);
        compare("minNumberOfCopies", wanted.to_string(), has.to_string());
    }
    if let Some(wanted) = node_selector {
        compare("nodeSelector", sorted(wanted), sorted(&image.spec.node_selector));
    }
    if let Some(wanted) = disk_selector {
        compare("diskSelector", sorted(wanted), sorted(&image.spec.disk_selector));
    }
    // Only `v1` volumes are offered.
    if image.spec.data_engine != api::image::DataEngine::V1 {
        compare("dataEngine", "v1".into(), "v2".into());
    }
    found
}

/// Two values that differ only in what is not shown must not look equal.
pub(super) fn redacted_other(has: &str, wanted: &str) -> String {
    let text = url::redact(has);
    if text == url::redact(wanted) { format!("{text} (with another user, password or query)") } else { text }
}

/// With what Longhorn fills in by itself, so that a repeated request compares equal.
fn with_defaults(parameters: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    let mut all = parameters.clone();
    all.retain(|key, value| {
        !matches!((key.as_str(), value.as_str()), ("export-type", "raw") | ("encryption", "ignore"))
    });
    all
}

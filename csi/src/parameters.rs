//! StorageClass parameters: every key that Longhorn reads (LF 2.1), parsed and checked, nothing ignored.
//!
//! A value that does not parse is refused with key, value and what would be right. A key that would change what the user gets and
//! that is not offered is refused unless its value means "off". An unknown key is refused with the nearest known one.

mod image;
mod keys;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use api::ErrorKind;
use api::validation::url;

pub use image::{ImageWish, differences as image_differences};

use crate::capability::FsType;
use crate::error::Difference;
use crate::limits::{DEFAULT_STALE_REPLICA_TIMEOUT, MAX_REPLICAS};

/// A parameter that cannot be served.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParameterError {
    #[error("parameter `{key}` is `{value}`: it must be {right}")]
    Wrong { key: String, value: String, right: String },
    #[error("parameter `{key}` is `{value}`, which is not offered yet ({what}); {instead}")]
    NotOffered { key: String, value: String, what: &'static str, instead: String },
    #[error("parameter `{key}` is unknown; {hint}")]
    Unknown { key: String, hint: String },
    #[error(
        "parameter `{key}` is no JSON object of strings: {reason}; write for example {{\"url\": \"https://example.com/image.qcow2\"}}"
    )]
    Json { key: &'static str, reason: String },
    #[error("parameters `{first}` and `{second}` contradict each other: {reason}")]
    Contradiction { first: &'static str, second: &'static str, reason: String },
    #[error(
        "parameter `{key}` says something about an image, but `backingImage` names none; add `backingImage`, or remove `{key}`"
    )]
    WithoutImage { key: &'static str },
}

impl ParameterError {
    /// What kind of failure this is.
    pub fn kind(&self) -> ErrorKind {
        ErrorKind::Invalid
    }
}

/// The keys that the node reads again when it stages a volume.
pub const FILESYSTEM_KEYS: [&str; 3] = ["fsType", "csi.storage.k8s.io/fstype", "mkfsParams"];

/// What a StorageClass asks for, checked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parameters {
    /// `None`: the setting `default-replica-count`.
    pub number_of_replicas: Option<u32>,
    /// Minutes.
    pub stale_replica_timeout: u32,
    /// One pod only (`rwop`), whatever the access mode says.
    pub exclusive: bool,
    pub disk_selector: Vec<String>,
    pub node_selector: Vec<String>,
    /// `None`: ext4.
    pub fs_type: Option<FsType>,
    /// Appended to what we tell `mkfs`.
    pub mkfs_params: Vec<String>,
    pub image: Option<ImageWish>,
}

impl Parameters {
    /// Reads the parameters of a StorageClass.
    ///
    /// # Errors
    /// The first parameter, by name, that cannot be served.
    pub fn parse(given: &BTreeMap<String, String>) -> Result<Parameters, ParameterError> {
        keys::check(given)?;
        let given = Given(given);
        let number_of_replicas =
            given.count("numberOfReplicas", MAX_REPLICAS, "a whole number from 1 to 20 (0: the default)")?;
        let stale = given.count("staleReplicaTimeout", u32::MAX, "minutes, a whole number, 0 or more")?;
        let exclusive = given.switch("exclusive")?.unwrap_or(false);
        Ok(Parameters {
            number_of_replicas: number_of_replicas.filter(|n| *n > 0),
            stale_replica_timeout: stale.filter(|n| *n > 0).unwrap_or(DEFAULT_STALE_REPLICA_TIMEOUT),
            exclusive,
            disk_selector: given.tags("diskSelector")?.unwrap_or_default(),
            node_selector: given.tags("nodeSelector")?.unwrap_or_default(),
            fs_type: given.fs_type()?,
            mkfs_params: given.text("mkfsParams").unwrap_or_default().split_whitespace().map(str::to_owned).collect(),
            image: ImageWish::parse(&given)?,
        })
    }

    /// In what `has` is not what `self` asks for.
    pub fn differences(&self, has: &Parameters) -> Vec<Difference> {
        let (wanted, has) = (self.fields(), has.fields());
        let fields = wanted.keys().chain(has.keys()).collect::<std::collections::BTreeSet<_>>();
        let text = |map: &BTreeMap<String, String>, field: &str| map.get(field).cloned().unwrap_or_default();
        fields
            .into_iter()
            .map(|f| (f, text(&wanted, f), text(&has, f)))
            // What is not shown counts as well: two addresses may differ in a password only.
            .filter(|(_, wanted, has)| wanted != has)
            .map(|(f, wanted, has)| Difference {
                field: f.clone(),
                wanted: url::redact(&wanted),
                has: image::redacted_other(&has, &wanted),
            })
            .collect()
    }

    /// Every field as text; what was not given is not there.
    fn fields(&self) -> BTreeMap<String, String> {
        let Parameters {
            number_of_replicas,
            stale_replica_timeout,
            exclusive,
            disk_selector,
            node_selector,
            fs_type,
            mkfs_params,
            image,
        } = self;
        let mut fields = BTreeMap::new();
        let mut add = |field: &str, value: String| {
            if !value.is_empty() {
                fields.insert(field.to_owned(), value);
            }
        };
        add("numberOfReplicas", number_of_replicas.map(|n| n.to_string()).unwrap_or_default());
        add("staleReplicaTimeout", stale_replica_timeout.to_string());
        add("exclusive", exclusive.to_string());
        add("diskSelector", sorted(disk_selector));
        add("nodeSelector", sorted(node_selector));
        add("fsType", fs_type.unwrap_or_default().to_string());
        add("mkfsParams", mkfs_params.join(" "));
        if let Some(image) = image {
            image.fields(&mut add);
        }
        fields
    }
}

fn sorted(tags: &[String]) -> String {
    let mut tags = tags.to_vec();
    tags.sort();
    tags.dedup();
    tags.join(",")
}

/// The given parameters, by key.
struct Given<'a>(&'a BTreeMap<String, String>);

impl<'a> Given<'a> {
    /// The value of a key without blanks around it; an empty one counts as not given.
    fn text(&self, key: &str) -> Option<&'a str> {
        self.0.get(key).map(|v| v.trim()).filter(|v| !v.is_empty())
    }

    fn wrong<T>(&self, key: &str, right: impl Into<String>) -> Result<T, ParameterError> {
        let value = self.0.get(key).cloned().unwrap_or_default();
        Err(ParameterError::Wrong { key: key.to_owned(), value, right: right.into() })
    }

    fn count(&self, key: &str, most: u32, right: &str) -> Result<Option<u32>, ParameterError> {
        let Some(value) = self.0.get(key) else { return Ok(None) };
        match value.trim().parse::<u32>() {
            Ok(count) if count <= most => Ok(Some(count)),
            _ => self.wrong(key, right),
        }
    }

    fn switch(&self, key: &str) -> Result<Option<bool>, ParameterError> {
        let Some(value) = self.0.get(key) else { return Ok(None) };
        match keys::switch(value) {
            Some(on) => Ok(Some(on)),
            None => self.wrong(key, "`true` or `false`"),
        }
    }

    /// A comma-separated list, blanks around its members removed.
    fn tags(&self, key: &str) -> Result<Option<Vec<String>>, ParameterError> {
        let Some(value) = self.text(key) else { return Ok(None) };
        let tags: Vec<String> = value.split(',').map(|t| t.trim().to_owned()).collect();
        if tags.iter().any(|t| t.is_empty() || t.contains(char::is_whitespace)) {
            return self.wrong(key, "tags with commas between them, for example `ssd,fast`");
        }
        Ok(Some(tags))
    }

    fn fs_type(&self) -> Result<Option<FsType>, ParameterError> {
        let read = |key| match self.text(key) {
            None => Ok(None),
            Some(text) => text.parse().map(Some).or_else(|()| self.wrong(key, "`ext4` or `xfs`")),
        };
        let (first, second) = ("fsType", "csi.storage.k8s.io/fstype");
        match (read(first)?, read(second)?) {
            (Some(one), Some(other)) if one != other => {
                Err(ParameterError::Contradiction { first, second, reason: format!("{one} and {other}") })
            }
            (one, other) => Ok(one.or(other)),
        }
    }
}

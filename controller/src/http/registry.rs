//! Every kind that the API serves, with the names that people use for it.

use std::sync::LazyLock;

use k8s_openapi::api::core::v1::{Event, PersistentVolume, PersistentVolumeClaim};
use k8s_openapi::api::storage::v1::{StorageClass, VolumeAttachment};
use store::ResourceType;

/// A kind that the API serves.
#[derive(Clone, Debug)]
pub struct Served {
    pub resource: ResourceType,
    pub singular: String,
    pub short_names: &'static [&'static str],
}

impl Served {
    /// Whether a person means this kind by a word: plural, singular, kind or short name, in any case, also `plural.group`.
    pub fn is_called(&self, word: &str) -> bool {
        let word = word.to_ascii_lowercase();
        let word = match word.split_once('.') {
            Some((kind, group)) if group == self.resource.group => kind,
            Some(_) => return false,
            None => &word,
        };
        word == self.resource.plural || word == self.singular || self.short_names.contains(&word)
    }
}

static ALL: LazyLock<Vec<Served>> = LazyLock::new(|| {
    fn served(resource: ResourceType, short_names: &'static [&'static str]) -> Served {
        Served { singular: resource.kind.to_ascii_lowercase(), resource, short_names }
    }
    vec![
        served(ResourceType::of::<api::BackingImage>(), &["lhbi", "bi"]),
        served(ResourceType::of::<api::BackingImageManager>(), &["lhbim", "bim"]),
        served(ResourceType::of::<api::BackingImageDataSource>(), &["lhbids", "bids"]),
        served(ResourceType::of::<api::Volume>(), &["lhv", "vol"]),
        served(ResourceType::of::<api::Engine>(), &["lhe"]),
        served(ResourceType::of::<api::Replica>(), &["lhr"]),
        served(ResourceType::of::<api::Node>(), &["lhn", "no"]),
        served(ResourceType::of::<api::Setting>(), &["lhs"]),
        served(ResourceType::of::<StorageClass>(), &["sc"]),
        served(ResourceType::of::<PersistentVolumeClaim>(), &["pvc"]),
        served(ResourceType::of::<PersistentVolume>(), &["pv"]),
        served(ResourceType::of::<VolumeAttachment>(), &["va"]),
        served(ResourceType::of::<Event>(), &["ev"]),
    ]
});

/// Every kind that the API serves.
pub fn all() -> &'static [Served] {
    &ALL
}

/// The kind of a REST path.
pub fn by_path(group: &str, version: &str, plural: &str) -> Option<&'static Served> {
    all().iter().find(|s| s.resource.group == group && s.resource.version == version && s.resource.plural == plural)
}

/// The kind of a manifest.
pub fn by_manifest(api_version: &str, kind: &str) -> Option<&'static Served> {
    all().iter().find(|s| s.resource.api_version() == api_version && s.resource.kind == kind)
}

/// The kind that a person means by a word.
pub fn by_word(word: &str) -> Option<&'static Served> {
    all().iter().find(|s| s.is_called(word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_kinds_by_every_name_that_people_use() {
        for word in ["backingimages", "BackingImage", "lhbi", "backingimages.longhorn.io"] {
            assert_eq!(by_word(word).unwrap().resource.kind, "BackingImage", "{word}");
        }
        assert_eq!(by_word("pvc").unwrap().resource.plural, "persistentvolumeclaims");
        assert_eq!(by_word("sc").unwrap().resource.api_version(), "storage.k8s.io/v1");
        assert!(by_word("pods").is_none());
    }

    #[test]
    fn no_word_means_two_kinds() {
        for one in all() {
            for word in one.short_names.iter().copied().chain([one.singular.as_str(), one.resource.plural.as_str()]) {
                assert_eq!(all().iter().filter(|s| s.is_called(word)).count(), 1, "{word}");
            }
        }
    }
}

//! What is refused or filled in before an object is stored on behalf of a user.
//!
//! The rules are those of `api::validation`. The HTTP API and the admission webhook both ask here, so a mistake is the same sentence in
//! both. Our own controllers write to the store directly and are not checked.

use api::ids::ImageName;
use api::names::{self, label};
use api::validation::image::ImageRules;
use api::validation::{self, FieldErrors};
use api::{BackingImage, ErrorKind, Node, Replica, Setting, Volume, setting};
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use k8s_openapi::api::storage::v1::StorageClass;
use kube::ResourceExt;
use planner::volume::growth;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use store::{Object, ObjectKey, ResourceType, Selector, Store};

use crate::http::failure::Failure;

/// What the rules look up.
#[derive(Clone)]
pub struct Admission {
    pub store: Store,
    /// Whether images may be downloaded from this very machine (the standalone mode, where every node is this machine).
    pub allow_loopback_sources: bool,
}

impl Admission {
    /// The object as it is to be stored, or why it cannot be. `old` is what it replaces.
    pub async fn admit(&self, resource: &ResourceType, new: Object, old: Option<&Object>) -> Result<Object, Failure> {
        if let Some(old) = old.filter(|_| resource.kind == "PersistentVolumeClaim") {
            self.admit_claim(resource, &new, old).await?;
        }
        if resource.group != names::GROUP {
            return Ok(new);
        }
        let name = new.name().to_owned();
        let refused = |errors: FieldErrors| {
            Failure::new(errors.kind(), format!("{} `{name}` is invalid: {errors}", resource.kind))
        };
        match resource.kind.as_str() {
            "BackingImage" => {
                let rules = self.rules().await?;
                let image: BackingImage = parsed(resource, &new)?;
                let admitted = match old {
                    None => validation::image::admit_new(image, &rules),
                    Some(old) => validation::image::admit_change(&parsed(resource, old)?, image, &rules),
                };
                return object(&admitted.map_err(refused)?, new);
            }
            "Volume" => {
                let volume: Volume = parsed(resource, &new)?;
                let result = match old {
                    Some(old) => validation::volume::check_change(&parsed(resource, old)?, &volume),
                    None => {
                        let image: Option<BackingImage> = match volume.spec.backing_image.parse::<ImageName>() {
                            Ok(name) => self.store.get(name.as_str()).await?,
                            Err(_) => None,
                        };
                        validation::volume::check_new(&volume, image.as_ref())
                    }
                };
                result.map_err(refused)?;
                if let Some(old) = old {
                    self.admit_growth(&parsed(resource, old)?, &parsed(resource, &new)?).await?;
                }
            }
            "Node" => validation::node::check(&parsed::<Node>(resource, &new)?).map_err(refused)?,
            "Setting" => validation::setting::check(&parsed::<Setting>(resource, &new)?).map_err(refused)?,
            "BackingImageManager" => drop(parsed::<api::BackingImageManager>(resource, &new)?),
            "BackingImageDataSource" => drop(parsed::<api::BackingImageDataSource>(resource, &new)?),
            "Engine" => drop(parsed::<api::Engine>(resource, &new)?),
            "Replica" => drop(parsed::<Replica>(resource, &new)?),
            _ => {}
        }
        Ok(new)
    }

    /// What Kubernetes asks of a claim whose size is changed.
    async fn admit_claim(&self, resource: &ResourceType, new: &Object, old: &Object) -> Result<(), Failure> {
        let (new, old): (PersistentVolumeClaim, PersistentVolumeClaim) =
            (parsed(resource, new)?, parsed(resource, old)?);
        if validation::claim::requested(&old) == validation::claim::requested(&new) {
            return Ok(());
        }
        // A claim of the default class does not name it, its volume does.
        let spec = old.spec.clone().unwrap_or_default();
        let volume = match spec.volume_name.filter(|name| !name.is_empty()) {
            Some(name) => self.store.get::<PersistentVolume>(&name).await?,
            None => None,
        };
        let class = volume.and_then(|v| v.spec?.storage_class_name).or(spec.storage_class_name);
        let class = match class.filter(|name| !name.is_empty()) {
            Some(name) => self.store.get::<StorageClass>(&name).await?,
            None => None,
        };
        validation::claim::check_change(&old, &new, class.as_ref()).map_err(Failure::forbidden)
    }

    /// Whether there is room for a volume that is to be larger: nobody else asks when it is edited by hand.
    async fn admit_growth(&self, old: &Volume, new: &Volume) -> Result<(), Failure> {
        if new.spec.size <= old.spec.size {
            return Ok(());
        }
        let world = growth::World {
            nodes: self.store.list(&Selector::default()).await?,
            replicas: self.store.list(&Selector::default()).await?,
            images: self.store.list(&Selector::default()).await?,
            settings: self.store.list(&Selector::default()).await?,
        };
        let name = new.name_any();
        match growth::refusal(&world, &name, new.spec.size.0) {
            Some(why) => Err(Failure::new(ErrorKind::Exhausted, format!("Volume `{name}` cannot grow: {why}"))),
            None => Ok(()),
        }
    }

    async fn rules(&self) -> Result<ImageRules, Failure> {
        let settings: Vec<Setting> = self.store.list(&Selector::default()).await?;
        Ok(ImageRules {
            default_min_copies: setting::value(&settings, setting::DEFAULT_MIN_COPIES).parse().unwrap_or(1),
            allow_loopback_sources: self.allow_loopback_sources,
        })
    }

    /// Refuses a deletion that would take something away from somebody.
    pub async fn admit_deletion(&self, resource: &ResourceType, key: &ObjectKey) -> Result<(), Failure> {
        if resource.kind != "BackingImage" || resource.group != names::GROUP {
            return Ok(());
        }
        let replicas: Vec<Replica> = self.store.list(&Selector::label(label::BACKING_IMAGE, &key.name)).await?;
        let mut users: Vec<String> = replicas.iter().map(|r| r.name_any()).collect();
        if users.is_empty() {
            // A volume that was created a moment ago has no replicas yet.
            let volumes: Vec<Volume> = self.store.list(&Selector::default()).await?;
            users = volumes.iter().filter(|v| v.spec.backing_image == key.name).map(|v| v.name_any()).collect();
        }
        validation::image::admit_deletion(&key.name, &users).map_err(|in_use| Failure::forbidden(in_use.to_string()))
    }
}

fn parsed<T: DeserializeOwned>(resource: &ResourceType, object: &Object) -> Result<T, Failure> {
    serde_json::from_value(Value::Object(object.0.clone())).map_err(|error| {
        Failure::new(ErrorKind::Invalid, format!("{} `{}` is invalid: {error}", resource.kind, object.name()))
    })
}

/// The typed object as it is stored, keeping the identity that the typed form does not carry.
fn object<T: Serialize>(typed: &T, mut original: Object) -> Result<Object, Failure> {
    let failed =
        |error: &dyn std::fmt::Display| Failure::new(ErrorKind::Internal, format!("cannot write the object: {error}"));
    match serde_json::to_value(typed) {
        Ok(Value::Object(map)) => {
            original.0.extend(map);
            Ok(original)
        }
        Ok(_) => Err(failed(&"it is not a JSON object")),
        Err(error) => Err(failed(&error)),
    }
}

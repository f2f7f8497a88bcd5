//! What is refused or filled in before an object is stored on behalf of a user.
//!
//! The rules are those of `api::validation`. The HTTP API and the admission webhook both ask here, so a mistake is the same sentence in
//! both. Our own controllers write to the store directly and are not checked.

use std::collections::BTreeSet;

use api::ids::ImageName;
use api::names::{self, label};
use api::validation::image::ImageRules;
use api::validation::{self, FieldErrors};
use api::{BackingImage, BackingImageDataSource, ErrorKind, Node, Replica, Setting, Volume};
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use k8s_openapi::api::storage::v1::StorageClass;
use kube::ResourceExt;
use planner::disk::Disks;
use planner::image::guard::{self, Scene};
use planner::setting::Settings;
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
                let mut image: BackingImage = parsed(resource, &new)?;
                let Some(old) = old else {
                    let admitted = validation::image::admit_new(image, &rules).map_err(refused)?;
                    return object(&admitted, new);
                };
                let says_nothing_of_copies = new.0.get("spec").and_then(|s| s.get("diskFileSpecMap")).is_none();
                let old: BackingImage = parsed(resource, old)?;
                if says_nothing_of_copies {
                    image.spec.disk_file_spec_map.clone_from(&old.spec.disk_file_spec_map);
                }
                let admitted = validation::image::admit_change(&old, image, &rules).map_err(refused)?;
                self.admit_copies(&old, &admitted).await?;
                return object(&admitted, new);
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
            Some(why) => Err(Failure::new(why.kind(), format!("Volume `{name}` cannot grow: {why}"))),
            None => Ok(()),
        }
    }

    /// Refuses to take a copy out of the map that a guard keeps.
    async fn admit_copies(&self, old: &BackingImage, new: &BackingImage) -> Result<(), Failure> {
        let staying: BTreeSet<String> = new.spec.disk_file_spec_map.keys().cloned().collect();
        let removed = old.spec.disk_file_spec_map.keys().filter(|disk| !staying.contains(*disk));
        let removed: BTreeSet<String> = removed.cloned().collect();
        if removed.is_empty() || old.metadata.deletion_timestamp.is_some() {
            return Ok(());
        }
        let name = old.name_any();
        let replicas: Vec<Replica> = self.store.list(&Selector::default()).await?;
        let nodes: Vec<Node> = self.store.list(&Selector::default()).await?;
        let settings: Vec<Setting> = self.store.list(&Selector::default()).await?;
        let replicas: Vec<Replica> = replicas.into_iter().filter(|r| r.spec.backing_image == name).collect();
        let data_source: Option<BackingImageDataSource> = self.store.get(&name).await?;
        let status = old.status.clone().unwrap_or_default();
        let (disks, settings) = (Disks::of(&nodes), Settings::of(&settings));
        let scene = Scene {
            image: new,
            status: &status,
            data_source: data_source.as_ref(),
            replicas: &replicas,
            disks: &disks,
            settings: &settings,
        };
        match guard::refusal(&scene, &removed, &staying) {
            None => Ok(()),
            Some(why) => Err(Failure::forbidden(format!("spec.diskFileSpecMap cannot be changed like that: {why}"))),
        }
    }

    async fn rules(&self) -> Result<ImageRules, Failure> {
        let settings: Vec<Setting> = self.store.list(&Selector::default()).await?;
        Ok(ImageRules::of(&settings))
    }

    /// Refuses a deletion that would take something away from somebody.
    pub async fn admit_deletion(&self, resource: &ResourceType, key: &ObjectKey) -> Result<(), Failure> {
        if resource.kind != "BackingImage" || resource.group != names::GROUP {
            return Ok(());
        }
        let replicas: Vec<Replica> = self.store.list(&Selector::label(label::BACKING_IMAGE, &key.name)).await?;
        // A volume that was created a moment ago has no replicas yet.
        let volumes: Vec<Volume> = self.store.list(&Selector::default()).await?;
        let volumes = volumes.iter().filter(|v| v.spec.backing_image == key.name).map(|v| v.name_any());
        // A replica whose volume is gone names it all the same.
        let volumes: BTreeSet<String> = volumes.chain(replicas.iter().map(|r| r.spec.volume_name.clone())).collect();
        let volumes: Vec<String> = volumes.into_iter().filter(|name| !name.is_empty()).collect();
        let replicas: Vec<String> = replicas.iter().map(|r| r.name_any()).collect();
        validation::image::admit_deletion(&key.name, &replicas, &volumes)
            .map_err(|in_use| Failure::forbidden(in_use.to_string()))
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

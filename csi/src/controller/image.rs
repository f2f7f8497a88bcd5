//! The image step of CreateVolume: an absent image is made when the StorageClass says how, a present one is compared.

use api::image::{BackingImageSpec, SourceType};
use api::validation::image::ImageRules;
use api::{BackingImage, Setting, names, validation};
use kube::ResourceExt;
use store::Selector;
use tracing::info;

use super::Context;
use crate::deadline::Deadline;
use crate::parameters::{ImageWish, image_differences};
use crate::wait::{self, Outcome};
use crate::{CsiError, volume};

/// Makes sure that the image exists and is the one that the parameters describe. Does not wait for its file.
pub async fn ensure(context: &Context, wish: &ImageWish) -> Result<BackingImage, CsiError> {
    let rules = ImageRules::of(&context.store.list::<Setting>(&Selector::default()).await?);
    if let Some(existing) = context.store.get::<BackingImage>(wish.name.as_str()).await? {
        return accept(existing, wish, rules.default_min_copies);
    }
    let wanted = describe(wish, &rules)?;
    match context.store.create(&wanted).await {
        Ok(created) => {
            info!(image = %wish.name, "image created for a volume");
            Ok(created)
        }
        // Another volume of the same StorageClass was faster.
        Err(store::StoreError::AlreadyExists { .. }) => {
            match context.store.get::<BackingImage>(wish.name.as_str()).await? {
                Some(existing) => accept(existing, wish, rules.default_min_copies),
                None => Err(CsiError::Contended { what: format!("image `{}`", wish.name) }),
            }
        }
        Err(error) => Err(error.into()),
    }
}

fn accept(existing: BackingImage, wish: &ImageWish, default_copies: u32) -> Result<BackingImage, CsiError> {
    let image = wish.name.to_string();
    if existing.metadata.deletion_timestamp.is_some() {
        return Err(CsiError::ImageDeleting { image });
    }
    let differences = image_differences(wish, &existing, default_copies);
    let known = existing.status.as_ref().is_some_and(|s| !s.checksum.is_empty()) || !existing.spec.checksum.is_empty();
    if differences.is_empty() && wish.checksum.is_some() && !known {
        // Whoever pins a checksum gets that content or nothing, so there is nothing to say before it is known.
        return Err(CsiError::ImageUnknown { image, progress: progress(&existing) });
    }
    if differences.is_empty() { Ok(existing) } else { Err(CsiError::ImageDiffers { image, differences }) }
}

/// The object of an absent image, when its source type lets us make it.
fn describe(wish: &ImageWish, rules: &ImageRules) -> Result<BackingImage, CsiError> {
    let name = &wish.name;
    let absent = |help: &str| Err(CsiError::NoImage { reason: format!("image `{name}` does not exist; {help}") });
    let by_hand = |source_type| Err(CsiError::ImageByHand { image: name.to_string(), source_type });
    match wish.source_type {
        Some(SourceType::Download) => {}
        None => {
            return absent(
                "create it first, or let `backingImageDataSourceType: download` and `backingImageDataSourceParameters: '{\"url\": \"…\"}'` say where it comes from",
            );
        }
        Some(SourceType::Upload) => return by_hand("upload"),
        Some(SourceType::Clone) => return by_hand("clone"),
        Some(SourceType::Restore) => return by_hand("restore"),
        Some(SourceType::ExportFromVolume) => {
            return Err(CsiError::NotOffered {
                what: "making an image from a volume (`backingImageDataSourceType: export-from-volume`)",
                instead: "use an image that exists, or `download`",
            });
        }
    }
    let image = BackingImage::new(
        name.as_str(),
        BackingImageSpec {
            checksum: wish.checksum.as_ref().map(|c| c.to_string()).unwrap_or_default(),
            source_type: wish.source_type,
            source_parameters: wish.source_parameters.clone(),
            min_number_of_copies: wish.min_number_of_copies.unwrap_or(0),
            node_selector: wish.node_selector.clone().unwrap_or_default(),
            disk_selector: wish.disk_selector.clone().unwrap_or_default(),
            ..Default::default()
        },
    );
    validation::image::admit_new(image, rules)
        .map_err(|source| CsiError::Refused { what: format!("image `{name}` cannot be made"), source })
}

/// The image's virtual size, waited for within the deadline.
pub async fn virtual_size(
    context: &Context,
    image: &BackingImage,
    volume_id: &str,
    deadline: &Deadline,
) -> Result<u64, CsiError> {
    let name = image.name_any();
    let known = |image: Option<&BackingImage>| match image {
        Some(image) => image.status.as_ref().map(|s| s.virtual_size).filter(|s| *s > 0).map(Some),
        None => Some(None),
    };
    match wait::until(&context.store, &name, deadline, known).await? {
        Outcome::Reached(Some(size)) => Ok(size),
        Outcome::Reached(None) => Err(CsiError::ImageDeleting { image: name }),
        Outcome::Late(image) => Err(CsiError::StillWaiting {
            volume_id: volume_id.to_owned(),
            progress: format!(
                "has no size of its own, and that of its image is not known yet ({}); wait, or ask for a size",
                image.as_ref().map(progress).unwrap_or_default()
            ),
        }),
    }
}

/// How far an image is: "image ubuntu: 2 of 3 copies ready, disk d3 at 61 %".
pub fn progress(image: &BackingImage) -> String {
    let status = image.status.clone().unwrap_or_default();
    let ready = api::condition::find(&status.conditions, names::condition::READY);
    match ready.filter(|c| !c.message.is_empty()) {
        Some(ready) => format!("image {}: {}", image.name_any(), volume::in_words(ready)),
        None => format!("image {} was just created", image.name_any()),
    }
}

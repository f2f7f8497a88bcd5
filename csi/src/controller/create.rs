//! CreateVolume and ValidateVolumeCapabilities.

use std::collections::BTreeMap;

use api::volume::VolumeSpec;
use api::{Volume, names, setting, validation};
use kube::ResourceExt;
use proto::csi;
use proto::csi::validate_volume_capabilities_response::Confirmed;
use tracing::info;

use super::{Context, image, settings};
use crate::capability::{Access, FsType, Usage};
use crate::deadline::Deadline;
use crate::error::Difference;
use crate::limits::MIN_XFS_BYTES;
use crate::parameters::{ImageWish, Parameters};
use crate::size::{Bounds, ImageSize};
use crate::{CsiError, volume};

/// A request, read and checked without a look at the world.
struct Wish {
    parameters: Parameters,
    given: BTreeMap<String, String>,
    usages: Vec<Usage>,
    bounds: Bounds,
}

impl Wish {
    fn of(request: csi::CreateVolumeRequest) -> Result<Wish, CsiError> {
        let usages = usages(&request.volume_capabilities)?;
        let bounds = Bounds::of(request.capacity_range.as_ref())?;
        if request.volume_content_source.is_some() {
            return Err(CsiError::NotOffered {
                what: "a volume that begins as a copy of a snapshot or volume",
                instead: "leave `volume_content_source` (the PVC's `dataSource`) out and name a `backingImage`",
            });
        }
        if !request.mutable_parameters.is_empty() {
            return Err(CsiError::NotOffered {
                what: "a VolumeAttributesClass",
                instead: "leave `mutable_parameters` out and put parameters into the StorageClass",
            });
        }
        let given: BTreeMap<String, String> = request.parameters.into_iter().collect();
        let mut parameters = Parameters::parse(&given)?;
        parameters.exclusive |= usages.iter().all(|u| u.single_writer);
        Ok(Wish { parameters, given, usages, bounds })
    }

    /// The filesystem that a blank volume would get.
    fn fs_type(&self) -> Option<FsType> {
        self.usages.iter().find_map(|usage| match &usage.access {
            Access::Mount { fs_type, .. } => Some(fs_type.or(self.parameters.fs_type).unwrap_or_default()),
            Access::Block => None,
        })
    }
}

/// Makes sure that the volume exists. Does not wait for its image's file.
pub async fn create_volume(
    context: &Context,
    request: csi::CreateVolumeRequest,
    deadline: &Deadline,
) -> Result<csi::CreateVolumeResponse, CsiError> {
    let id = volume::id_of(&request.name)?;
    let wish = Wish::of(request)?;
    let _flight = context.in_flight.take(id.as_str())?;
    if let Some(existing) = context.store.get::<Volume>(id.as_str()).await? {
        return accept_existing(&existing, &wish);
    }
    let image = match &wish.parameters.image {
        Some(wish) => Some(image::ensure(context, wish).await?),
        None => None,
    };
    let virtual_size_bytes = match &image {
        // Without a size in the request the image's decides, so it must be known.
        Some(image) if wish.bounds.required.is_none() => {
            Some(image::virtual_size(context, image, id.as_str(), deadline).await?)
        }
        Some(image) => image.status.as_ref().map(|s| s.virtual_size).filter(|size| *size > 0),
        None => None,
    };
    let name = image.as_ref().map(|i| i.name_any()).unwrap_or_default();
    let size = wish
        .bounds
        .choose(virtual_size_bytes.map(|virtual_size_bytes| ImageSize { name: &name, virtual_size_bytes }))?;
    if image.is_none() && wish.fs_type() == Some(FsType::Xfs) && size < MIN_XFS_BYTES {
        return Err(CsiError::Size {
            reason: format!(
                "a new xfs filesystem needs {MIN_XFS_BYTES} bytes, the volume would have {size}; ask for more, or use ext4"
            ),
        });
    }
    let replicas = match wish.parameters.number_of_replicas {
        Some(count) => count,
        None => settings::number(&context.store, setting::DEFAULT_REPLICA_COUNT).await?,
    };
    let wanted = object(id.as_str(), &wish, size, replicas);
    validation::volume::check_new(&wanted, image.as_ref())
        .map_err(|source| CsiError::Refused { what: format!("volume `{id}` cannot be made"), source })?;
    match context.store.create(&wanted).await {
        Ok(created) => {
            info!(volume = %id, size_bytes = size, image = name, replicas, "volume created");
            Ok(csi::CreateVolumeResponse { volume: Some(volume::describe(&created)) })
        }
        // Somebody else made it in the meantime, by hand or through another driver process.
        Err(store::StoreError::AlreadyExists { .. }) => match context.store.get::<Volume>(id.as_str()).await? {
            Some(existing) => accept_existing(&existing, &wish),
            None => Err(CsiError::Contended { what: format!("volume `{id}`") }),
        },
        Err(error) => Err(error.into()),
    }
}

fn object(id: &str, wish: &Wish, size: u64, number_of_replicas: u32) -> Volume {
    let parameters = &wish.parameters;
    let exclusive = Usage { access: Access::Block, single_writer: parameters.exclusive };
    let mut volume = Volume::new(
        id,
        VolumeSpec {
            size: api::quantity::SizeBytes(size),
            frontend: "blockdev".into(),
            backing_image: parameters.image.as_ref().map(|i| i.name.to_string()).unwrap_or_default(),
            number_of_replicas,
            stale_replica_timeout: parameters.stale_replica_timeout,
            disk_selector: parameters.disk_selector.clone(),
            node_selector: parameters.node_selector.clone(),
            access_mode: exclusive.access_mode(),
            parameters: wish.given.clone(),
            ..Default::default()
        },
    );
    volume.metadata.finalizers = Some(vec![names::FINALIZER.into()]);
    volume
}

/// The same answer again when a volume is what was asked for, else every difference.
fn accept_existing(existing: &Volume, wish: &Wish) -> Result<csi::CreateVolumeResponse, CsiError> {
    let volume_id = existing.name_any();
    if existing.metadata.deletion_timestamp.is_some() {
        return Err(CsiError::VolumeDeleting { volume_id });
    }
    let mut differences = wish.parameters.differences(&parameters_of(existing)?);
    if !wish.bounds.accept(existing.spec.size.0) {
        let text = |bytes: Option<u64>, otherwise: &str| bytes.map_or(otherwise.to_owned(), |b| b.to_string());
        let Bounds { required, limit } = wish.bounds;
        let wanted = format!("{} to {} bytes", text(required, "0"), text(limit, "any number of"));
        differences.push(Difference { field: "size".into(), wanted, has: format!("{} bytes", existing.spec.size) });
    }
    if differences.is_empty() {
        Ok(csi::CreateVolumeResponse { volume: Some(volume::describe(existing)) })
    } else {
        Err(CsiError::VolumeDiffers { volume_id, differences })
    }
}

/// The parameters that a volume was created with; of one that was made by hand, what its spec says.
fn parameters_of(existing: &Volume) -> Result<Parameters, CsiError> {
    let spec = &existing.spec;
    let exclusive = spec.access_mode == api::volume::AccessMode::Rwop;
    if !spec.parameters.is_empty() {
        // What an earlier version took and this one refuses differs from every request of today.
        return Ok(Parameters { exclusive, ..Parameters::parse(&spec.parameters)? });
    }
    let defaults = Parameters::parse(&BTreeMap::new())?;
    let image = spec.backing_image.parse().ok().map(ImageWish::named);
    Ok(Parameters {
        exclusive,
        image,
        disk_selector: spec.disk_selector.clone(),
        node_selector: spec.node_selector.clone(),
        ..defaults
    })
}

fn usages(capabilities: &[csi::VolumeCapability]) -> Result<Vec<Usage>, CsiError> {
    if capabilities.is_empty() {
        return Err(CsiError::Missing { field: "volume_capabilities" });
    }
    capabilities.iter().map(Usage::of).collect()
}

/// Says whether a volume can be used in these ways.
pub async fn validate(
    context: &Context,
    request: csi::ValidateVolumeCapabilitiesRequest,
    _: &Deadline,
) -> Result<csi::ValidateVolumeCapabilitiesResponse, CsiError> {
    let existing = find(context, &request.volume_id).await?;
    if request.volume_capabilities.is_empty() {
        return Err(CsiError::Missing { field: "volume_capabilities" });
    }
    let refuse = |message: String| Ok(csi::ValidateVolumeCapabilitiesResponse { confirmed: None, message });
    if let Err(error) = usages(&request.volume_capabilities) {
        return refuse(error.to_string());
    }
    let given: BTreeMap<String, String> = request.parameters.clone().into_iter().collect();
    if !given.is_empty() {
        let mut wanted = match Parameters::parse(&given) {
            Ok(wanted) => wanted,
            Err(error) => return refuse(error.to_string()),
        };
        let has = parameters_of(&existing)?;
        wanted.exclusive |= has.exclusive;
        let differences = wanted.differences(&has);
        if !differences.is_empty() {
            return refuse(CsiError::VolumeDiffers { volume_id: request.volume_id, differences }.to_string());
        }
    }
    Ok(csi::ValidateVolumeCapabilitiesResponse {
        confirmed: Some(Confirmed {
            volume_context: request.volume_context,
            volume_capabilities: request.volume_capabilities,
            parameters: request.parameters,
            mutable_parameters: Default::default(),
        }),
        message: String::new(),
    })
}

/// The volume with an id that the caller must have sent.
pub async fn find(context: &Context, volume_id: &str) -> Result<Volume, CsiError> {
    if volume_id.is_empty() {
        return Err(CsiError::Missing { field: "volume_id" });
    }
    context.store.get::<Volume>(volume_id).await?.ok_or_else(|| CsiError::NoVolume { volume_id: volume_id.to_owned() })
}

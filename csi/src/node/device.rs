//! The block device of a volume on this node: what its engine reports.

use std::path::{Path, PathBuf};

use api::engine::InstanceState;
use api::{Engine, Volume, names};
use dataplane::loop_device;

use super::{Context, mounts};
use crate::CsiError;

/// A volume's block device, seen to be there.
#[derive(Clone, Debug)]
pub struct Device {
    pub path: PathBuf,
    pub number: mounts::DeviceNumber,
}

/// The volume with an id that the caller must have sent.
pub async fn find_volume(context: &Context, volume_id: &str) -> Result<Volume, CsiError> {
    if volume_id.is_empty() {
        return Err(CsiError::Missing { field: "volume_id" });
    }
    context.store.get::<Volume>(volume_id).await?.ok_or_else(|| CsiError::NoVolume { volume_id: volume_id.to_owned() })
}

/// The device of a volume that is attached to this node; refused with the reason when it is not.
pub async fn of_volume(context: &Context, volume_id: &str) -> Result<Device, CsiError> {
    let node = &context.node_name;
    let refuse = |reason: String| Err(CsiError::NotUsable { volume_id: volume_id.to_owned(), reason });
    let engine_name = names::engine_name(volume_id);
    let engine = context.store.get::<Engine>(&engine_name).await?;
    let Some(engine) = engine.filter(|e| e.spec.node_id == *node) else {
        return refuse(format!("is not attached to node `{node}`; attach it first (ControllerPublishVolume)"));
    };
    let status = engine.status.unwrap_or_default();
    if status.current_state != InstanceState::Running || status.endpoint.is_empty() {
        return refuse(format!("has no block device on node `{node}` yet; repeat the call when it is attached"));
    }
    let path = PathBuf::from(&status.endpoint);
    match mounts::device_number(&path) {
        Ok(Some(number)) => match problem(&path, &engine_name) {
            None => Ok(Device { path, number }),
            Some(problem) => refuse(format!(
                "had `{}` as its device, which {problem}, as after the node was started anew; repeat the call when the volume is attached again",
                path.display()
            )),
        },
        Ok(None) => refuse(format!("has `{}` as its device, which is no block device", path.display())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            refuse(format!("has `{}` as its device, which is not there; detach and attach it again", path.display()))
        }
        Err(source) => Err(CsiError::Path { what: "look at", path, source }),
    }
}

/// The device of a volume that its caller says is at a path.
pub async fn at_path(context: &Context, volume_id: &str, path: &Path) -> Result<Device, CsiError> {
    find_volume(context, volume_id).await?;
    if !path.is_absolute() || !path.exists() {
        return Err(CsiError::NotThere { volume_id: volume_id.to_owned(), path: path.to_owned() });
    }
    of_volume(context, volume_id).await
}

/// Why a device is not that of an engine. What its status says was true once: after a loss of power the same `/dev/loopN` may be
/// anybody's, and must be neither formatted nor mounted.
fn problem(device: &Path, engine_name: &str) -> Option<String> {
    match loop_device::at(device) {
        Some(found) if found.backing_file.ends_with(Path::new(engine_name).join(names::ENGINE_VOLUME_FILE)) => None,
        Some(found) => Some(format!("now belongs to `{}`", found.backing_file.display())),
        None => Some("has nothing behind it".into()),
    }
}

/// Whether a path is this device itself.
pub fn is_at(device: &Device, path: &Path) -> bool {
    matches!(mounts::device_number(path), Ok(Some(number)) if number == device.number)
}

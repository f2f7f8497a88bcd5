//! Names that others rely on: group, labels, condition types, ports, object names.

use crate::ids::{DiskId, ImageName};

/// API group of the custom resources.
pub const GROUP: &str = "longhorn.io";
/// API version of the custom resources.
pub const VERSION: &str = "v1beta2";
/// Default namespace of the custom resources.
pub const DEFAULT_NAMESPACE: &str = "longhorn-system";
/// Default CSI driver name and StorageClass provisioner.
pub const DEFAULT_DRIVER_NAME: &str = "driver.longhorn.io";
/// Finalizer on every custom resource (LF 1.1).
pub const FINALIZER: &str = "longhorn.io";
/// Value of [`label::MANAGED_BY`].
pub const MANAGED_BY: &str = "longhorn-manager";

/// gRPC of a backing image manager; HTTP of a data source (LF 5.5).
pub const MANAGER_PORT: u16 = 8000;
/// Chunk transfer between managers (LF 5.5: the sync server).
pub const SYNC_PORT: u16 = 8001;

/// Environment variable of a data source: its source parameters, a JSON object. Arguments of processes can be read by others.
pub const SOURCE_PARAMETERS: &str = "BACKING_IMAGE_SOURCE_PARAMETERS";

/// Where the directory of its disk is in the container of a manager or a data source (LF 1.7).
pub const DISK_MOUNT: &str = "/data";
/// User and group that managers and data sources run as in pods; the instance role gives them what they write.
/// Below the ids that systemd and Debian hand out, above those of people.
pub const AGENT_UID: u32 = 57_345;

/// Label keys (LF 1.1, 1.6).
pub mod label {
    pub const COMPONENT: &str = "longhorn.io/component";
    pub const MANAGED_BY: &str = "longhorn.io/managed-by";
    pub const DISK_UUID: &str = "longhorn.io/disk-uuid";
    pub const NODE: &str = "longhorn.io/node";
    pub const DATA_SOURCE: &str = "longhorn.io/backing-image-data-source";
    /// On replicas: the image that they use.
    pub const BACKING_IMAGE: &str = "longhorn.io/backing-image";
    /// On managers (`longhornnode`) and replicas and engines.
    pub const LONGHORN_NODE: &str = "longhornnode";
    pub const LONGHORN_DISK_UUID: &str = "longhorndiskuuid";
    /// On engines and replicas: the volume that they belong to.
    pub const LONGHORN_VOLUME: &str = "longhornvolume";
}

/// Types of conditions.
pub mod condition {
    /// Everything: it does what it is for.
    pub const READY: &str = "Ready";
    /// Volume and replica: waits for a copy of its image.
    pub const WAIT_FOR_BACKING_IMAGE: &str = "WaitForBackingImage";
    /// Volume: it cannot use its image at all.
    pub const BACKING_IMAGE_INCOMPATIBLE: &str = "BackingImageIncompatible";
    /// Volume: replicas are placed. Node and disk: something may be placed there.
    pub const SCHEDULABLE: &str = "Schedulable";
    /// Volume (Longhorn's name): every replica has a place.
    pub const SCHEDULED: &str = "Scheduled";
    /// Engine: what came of the last request to replace it by one of the installed version.
    pub const UPGRADED: &str = "Upgraded";
    /// Node: an engine that dies there is replaced under a mounted filesystem.
    pub const ENGINE_REPLACEMENT: &str = "EngineReplacement";
    /// Node: while it is there and `False`, the clock of the machine was set a short while ago.
    pub const CLOCK_STEADY: &str = "ClockSteady";
    /// Node: Kubernetes runs it. While it is not `True`, the controller says with it whether the node is `Ready`.
    pub const IN_SERVICE: &str = "InService";
    /// Node: it has disks, or what it waits for to get them by itself.
    pub const DEFAULT_DISKS: &str = "DefaultDisks";
    /// Image: copies were taken out of `diskFileSpecMap`; while it is `False`, some were put back.
    pub const CLEANED_UP: &str = "CleanedUp";
    /// Image: copies shall leave their disks; while it is `False`, some stay there, and why.
    pub const EVICTED: &str = "Evicted";
    /// Node: while it is there and `True`, Kubernetes calls the node unschedulable.
    pub const CORDONED: &str = "Cordoned";
    /// Manager: while it is `False`, something on its disk belongs to no image that exists.
    pub const NO_ORPHANS: &str = "NoOrphans";
    /// Manager: while it is `False`, something that is nothing of ours lies among the files of images.
    pub const NO_FOREIGN_FILES: &str = "NoForeignFiles";
    /// Volume: its detachment or deletion waits for something.
    pub const DETACHED: &str = "Detached";

    /// Reasons of an Engine's `Ready` which say that requests wait although it is wished and there.
    pub const ENGINE_WAITS: [&str; 3] = ["EngineSilent", "EngineStarting", "EngineStuck"];
}

/// The object and workload name of the manager of a disk (Longhorn: `bim-` and a digest; ours: the disk UUID itself, so that it can be read).
pub fn manager_name(disk: &DiskId) -> String {
    format!("bim-{}", disk.as_str().to_ascii_lowercase())
}

/// The workload name of the data source of an image (LF 1.6).
pub fn data_source_workload_name(image: &ImageName) -> String {
    format!("backing-image-ds-{image}")
}

/// What may follow the name of an image file on a disk: of the whole file, nothing.
pub const IMAGE_FILE_SUFFIXES: [&str; 5] = ["", ".tmp", ".cfg", ".chunks", ".resume"];
/// What an interrupted replacement of a file leaves beside it, behind its name.
const WRITING: &str = ".writing";

/// The name of an image file without what may follow it.
///
/// ```
/// use backing_image_api::names::without_image_suffix;
/// assert_eq!(without_image_suffix("ubuntu-24.04-0a1b2c3d.cfg.writing"), "ubuntu-24.04-0a1b2c3d");
/// assert_eq!(without_image_suffix("notes.txt"), "notes.txt");
/// ```
pub fn without_image_suffix(name: &str) -> &str {
    let name = name.strip_suffix(WRITING).unwrap_or(name);
    let mut suffixes = IMAGE_FILE_SUFFIXES.iter().filter(|suffix| !suffix.is_empty());
    suffixes.find_map(|suffix| name.strip_suffix(suffix)).unwrap_or(name)
}

/// The file that an engine shows its volume as, in a directory that has the engine's name.
pub const ENGINE_VOLUME_FILE: &str = "volume";

/// The name of the engine of a volume.
pub fn engine_name(volume: &str) -> String {
    format!("{volume}-e-0")
}

//! How a volume is used: filesystem or block device, by one writer or several.

use std::fmt;
use std::str::FromStr;

use api::volume::AccessMode;
use proto::csi::VolumeCapability;
use proto::csi::volume_capability::AccessType;
use proto::csi::volume_capability::access_mode::Mode;

use crate::CsiError;

/// A filesystem that we make on blank volumes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FsType {
    #[default]
    Ext4,
    Xfs,
}

impl FsType {
    /// Its name, as `mount` knows it.
    pub fn as_str(self) -> &'static str {
        match self {
            FsType::Ext4 => "ext4",
            FsType::Xfs => "xfs",
        }
    }
}

impl fmt::Display for FsType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for FsType {
    type Err = ();
    fn from_str(text: &str) -> Result<FsType, ()> {
        match text {
            "ext4" => Ok(FsType::Ext4),
            "xfs" => Ok(FsType::Xfs),
            _ => Err(()),
        }
    }
}

/// How a volume is used, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Usage {
    pub access: Access,
    /// One writer on one node, and nobody else (`ReadWriteOncePod`).
    pub single_writer: bool,
}

/// As what a volume appears.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Access {
    Block,
    Mount {
        /// `None`: the caller leaves it to us.
        fs_type: Option<FsType>,
        flags: Vec<String>,
    },
}

impl Usage {
    /// Reads a capability that the caller must have sent.
    pub fn required(capability: Option<&VolumeCapability>) -> Result<Usage, CsiError> {
        Usage::of(capability.ok_or(CsiError::Missing { field: "volume_capability" })?)
    }

    /// Reads a capability; one that we do not offer is refused with the reason.
    pub fn of(capability: &VolumeCapability) -> Result<Usage, CsiError> {
        let refuse = |reason: String| Err(CsiError::Capability { reason });
        let mode = capability.access_mode.as_ref().map_or(0, |m| m.mode);
        let single_writer = match Mode::try_from(mode) {
            Ok(Mode::SingleNodeWriter | Mode::SingleNodeMultiWriter) => false,
            Ok(Mode::SingleNodeSingleWriter) => true,
            Ok(Mode::Unknown) => {
                return refuse("it has no access mode; SINGLE_NODE_WRITER (ReadWriteOnce) is what fits most".into());
            }
            Ok(
                Mode::SingleNodeReaderOnly
                | Mode::MultiNodeReaderOnly
                | Mode::MultiNodeSingleWriter
                | Mode::MultiNodeMultiWriter,
            ) => {
                let name = Mode::try_from(mode).map_or("", |m| m.as_str_name());
                return refuse(format!(
                    "access mode {name} is not offered; volumes are for one node at a time: use ReadWriteOnce or ReadWriteOncePod"
                ));
            }
            Err(_) => return refuse(format!("access mode {mode} is unknown")),
        };
        let access = match &capability.access_type {
            None => return refuse("it is neither `mount` nor `block`; one of them is needed".into()),
            Some(AccessType::Block(_)) => Access::Block,
            Some(AccessType::Mount(mount)) => {
                if !mount.volume_mount_group.is_empty() {
                    return refuse("volume_mount_group is not offered; use fsGroup of the pod".into());
                }
                let fs_type = match mount.fs_type.as_str() {
                    "" => None,
                    text => match text.parse() {
                        Ok(fs_type) => Some(fs_type),
                        Err(()) => return refuse(format!("fs_type `{text}` is not offered; use ext4 or xfs")),
                    },
                };
                Access::Mount { fs_type, flags: mount.mount_flags.clone() }
            }
        };
        Ok(Usage { access, single_writer })
    }

    /// What a Volume object says about it.
    pub fn access_mode(&self) -> AccessMode {
        if self.single_writer { AccessMode::Rwop } else { AccessMode::Rwo }
    }
}

#[cfg(test)]
pub mod tests {
    use proto::csi::volume_capability::{self, BlockVolume, MountVolume};

    use super::*;

    pub fn mount() -> VolumeCapability {
        capability(AccessType::Mount(MountVolume::default()), Mode::SingleNodeWriter)
    }

    pub fn capability(access: AccessType, mode: Mode) -> VolumeCapability {
        VolumeCapability {
            access_mode: Some(volume_capability::AccessMode { mode: mode.into() }),
            access_type: Some(access),
        }
    }

    #[test]
    fn offers_one_node_at_a_time() {
        for (mode, offered) in [
            (Mode::SingleNodeWriter, true),
            (Mode::SingleNodeSingleWriter, true),
            (Mode::SingleNodeMultiWriter, true),
            (Mode::Unknown, false),
            (Mode::SingleNodeReaderOnly, false),
            (Mode::MultiNodeReaderOnly, false),
            (Mode::MultiNodeSingleWriter, false),
            (Mode::MultiNodeMultiWriter, false),
        ] {
            assert_eq!(Usage::of(&capability(AccessType::Block(BlockVolume {}), mode)).is_ok(), offered, "{mode:?}");
        }
    }

    #[test]
    fn refuses_what_is_neither_or_unknown() {
        let mut neither = mount();
        neither.access_type = None;
        assert!(Usage::of(&neither).is_err());
        let zfs = MountVolume { fs_type: "zfs".into(), ..Default::default() };
        let error = Usage::of(&capability(AccessType::Mount(zfs), Mode::SingleNodeWriter)).unwrap_err();
        assert!(error.to_string().contains("use ext4 or xfs"), "{error}");
        let group = MountVolume { volume_mount_group: "1000".into(), ..Default::default() };
        assert!(Usage::of(&capability(AccessType::Mount(group), Mode::SingleNodeWriter)).is_err());
    }
}

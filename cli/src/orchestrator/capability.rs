//! Kubernetes' access modes and volume modes as CSI capabilities.

use ::api::ErrorKind;
use proto::csi::VolumeCapability;
use proto::csi::volume_capability::access_mode::Mode;
use proto::csi::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};

use crate::failure::Failure;

/// How a volume is to be used.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    pub block: bool,
    pub fs_type: String,
    pub mount_flags: Vec<String>,
    /// As in `accessModes`.
    pub access_modes: Vec<String>,
}

impl Usage {
    /// One capability for each access mode, as the provisioner asks for.
    pub fn capabilities(&self) -> Result<Vec<VolumeCapability>, Failure> {
        let modes =
            if self.access_modes.is_empty() { vec!["ReadWriteOnce".to_owned()] } else { self.access_modes.clone() };
        modes.iter().map(|mode| Ok(self.capability(access_mode(mode)?))).collect()
    }

    /// The one capability that an attachment uses: that of the first access mode, as the attacher takes it.
    pub fn attach_capability(&self) -> Result<VolumeCapability, Failure> {
        let mode = self.access_modes.first().map_or("ReadWriteOnce", String::as_str);
        Ok(self.capability(access_mode(mode)?))
    }

    fn capability(&self, mode: Mode) -> VolumeCapability {
        let access_type = if self.block {
            AccessType::Block(BlockVolume {})
        } else {
            AccessType::Mount(MountVolume {
                fs_type: self.fs_type.clone(),
                mount_flags: self.mount_flags.clone(),
                ..Default::default()
            })
        };
        VolumeCapability { access_mode: Some(AccessMode { mode: mode as i32 }), access_type: Some(access_type) }
    }
}

/// The plain table of drivers without SINGLE_NODE_MULTI_WRITER; `ReadWriteOncePod` needs that one and gets its single-writer mode.
fn access_mode(mode: &str) -> Result<Mode, Failure> {
    match mode {
        "ReadWriteOnce" => Ok(Mode::SingleNodeWriter),
        "ReadWriteOncePod" => Ok(Mode::SingleNodeSingleWriter),
        "ReadOnlyMany" => Ok(Mode::MultiNodeReaderOnly),
        "ReadWriteMany" => Ok(Mode::MultiNodeMultiWriter),
        other => Err(Failure::new(
            ErrorKind::Invalid,
            format!(
                "`{other}` is not an access mode; there are ReadWriteOnce, ReadWriteOncePod, ReadOnlyMany, ReadWriteMany"
            ),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_those_of_the_sidecars() {
        let usage = Usage { fs_type: "ext4".into(), access_modes: vec!["ReadWriteOnce".into()], ..Default::default() };
        let capability = usage.attach_capability().unwrap();
        assert_eq!(capability.access_mode.unwrap().mode, Mode::SingleNodeWriter as i32);
        assert!(matches!(capability.access_type, Some(AccessType::Mount(m)) if m.fs_type == "ext4"));
        let wrong = Usage { access_modes: vec!["Often".into()], ..Default::default() };
        assert_eq!(wrong.capabilities().unwrap_err().kind, ErrorKind::Invalid);
    }
}

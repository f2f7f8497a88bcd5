//! The last step of every file: described durably, then given its final name.

use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::config_file::{FileConfig, modification_time, real_size};
use crate::durable;
use crate::error::AgentError;
use crate::layout::FileSet;
use crate::manifest::Manifest;

/// Gives a whole file its final name: data synced, config and manifest written, renamed, directory synced.
///
/// `from` is renamed to `to.file`. Invariant 7: the final name appears last. Invariant 1: the file is read-only from here on.
pub(crate) fn seal(
    file: &File,
    from: &Path,
    to: &FileSet,
    manifest: &Manifest,
    expected_checksum: &str,
) -> Result<FileConfig, AgentError> {
    file.set_permissions(PermissionsExt::from_mode(0o444)).map_err(AgentError::io("make read-only", from))?;
    file.sync_all().map_err(AgentError::io("sync", from))?;
    let config = describe(file, &to.file, manifest, expected_checksum)?;
    manifest.write(&to.manifest)?;
    config.write(&to.config)?;
    durable::rename(from, &to.file)?;
    Ok(config)
}

/// The config of a file that is described by a manifest.
pub(crate) fn describe(
    file: &File,
    name: &Path,
    manifest: &Manifest,
    expected_checksum: &str,
) -> Result<FileConfig, AgentError> {
    let metadata = file.metadata().map_err(AgentError::io("look at", name))?;
    assert_eq!(metadata.len(), manifest.size_bytes, "a manifest describes the whole file");
    Ok(FileConfig {
        name: name.display().to_string(),
        uuid: manifest.uuid.to_string(),
        size: manifest.size_bytes,
        virtual_size: manifest.virtual_size_bytes,
        real_size: real_size(&metadata),
        expected_checksum: expected_checksum.to_owned(),
        current_checksum: manifest.sha512.to_string(),
        modification_time: modification_time(&metadata),
        format: manifest.format.as_str().to_owned(),
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config_file::Format;
    use crate::layout::{Disk, ImageKey};
    use crate::manifest::hash_chunk;

    #[test]
    fn a_file_that_cannot_be_described_does_not_get_its_final_name() {
        let dir = tempfile::tempdir().unwrap();
        let files = Disk::new(dir.path()).source(&ImageKey::parse("parrot", "0a1b2c3d").unwrap());
        let manifest = Manifest {
            uuid: "0a1b2c3d".parse().unwrap(),
            sha512: "a".repeat(128).parse().unwrap(),
            format: Format::Raw,
            size_bytes: 512,
            virtual_size_bytes: 512,
            chunks: vec![hash_chunk(&[1; 512])],
        };
        for in_the_way in [&files.manifest, &files.config] {
            std::fs::create_dir_all(in_the_way.join("x")).unwrap();
            std::fs::write(&files.partial, [1; 512]).unwrap();
            let file = File::open(&files.partial).unwrap();
            assert!(seal(&file, &files.partial, &files, &manifest, "").is_err());
            assert!(files.partial.exists() && !files.file.exists());
            std::fs::remove_dir_all(in_the_way).unwrap();
            std::fs::remove_file(&files.partial).unwrap();
        }
    }
}

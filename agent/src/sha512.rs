//! SHA-512 of image files: which library does it stands here and nowhere else (docs/decisions/0005-sha512-library.md).

use std::fs::File;
use std::io::Read;
use std::path::Path;

use api::ids::Sha512Digest;
use aws_lc_rs::digest::{Context, SHA512};

use crate::error::AgentError;
use crate::limits::CHUNK_BYTES;

/// A digest that is being computed. A clone goes on from where it was taken.
#[derive(Clone)]
pub(crate) struct Sha512(Context);

impl Sha512 {
    pub fn new() -> Sha512 {
        Sha512(Context::new(&SHA512))
    }

    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    pub fn finish(self) -> Sha512Digest {
        hex::encode(self.0.finish()).parse().expect("SHA-512 has 64 bytes")
    }
}

/// The digest of a whole file, read in pieces of the size in which a download is hashed.
pub fn of_file(path: &Path) -> Result<Sha512Digest, AgentError> {
    let mut file = File::open(path).map_err(AgentError::io("open", path))?;
    let mut digest = Sha512::new();
    let mut buffer = vec![0; CHUNK_BYTES as usize];
    loop {
        match file.read(&mut buffer).map_err(AgentError::io("read", path))? {
            0 => return Ok(digest.finish()),
            length => digest.update(&buffer[..length]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// FIPS 180-4: the digests of "abc" and of nothing.
    const ABC: &str = "ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a\
                       2192992a274fc1a836ba3c23a3feebbd454d4423643ce80e2a9ac94fa54ca49f";
    const NOTHING: &str = "cf83e1357eefb8bdf1542850d66d8007d620e4050b5715dc83f4a921d36ce9ce\
                           47d0d13c5d85f2b0ff8318d2877eec2f63b931bd47417a81a538327af927da3e";

    #[test]
    fn computes_what_the_standard_says() {
        let mut digest = Sha512::new();
        assert_eq!(digest.clone().finish().as_str(), NOTHING);
        digest.update(b"a");
        let other = digest.clone();
        digest.update(b"bc");
        assert_eq!(digest.finish().as_str(), ABC);
        assert_ne!(other.finish().as_str(), ABC, "a clone goes its own way");
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"abc").unwrap();
        assert_eq!(of_file(file.path()).unwrap().as_str(), ABC);
    }
}

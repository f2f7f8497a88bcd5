//! Loopback addresses for processes that play machines of their own.
//!
//! A standalone instance claims a /24 of 127.0.0.0/8, so that the fixed ports of its processes never clash with those of
//! another instance on the same machine. The claim is kept in a file of the instance and in a machine-wide directory.

use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use crate::files;

/// Where claims of all instances of this machine stand.
const CLAIMS: &str = "/run/backing-image-csi/loopback";
/// First host number of workloads; nodes have the numbers below.
const FIRST_WORKLOAD: u8 = 64;

/// 256 addresses that belong to one instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subnet {
    prefix: [u8; 3],
}

impl Subnet {
    /// The subnet of the instance whose data is in `directory`: the one that it had before, else a free one.
    pub fn claim(directory: &Path) -> io::Result<Subnet> {
        Subnet::claim_in(directory, Path::new(CLAIMS))
    }

    fn claim_in(directory: &Path, claims: &Path) -> io::Result<Subnet> {
        fs::create_dir_all(claims)?;
        let directory = directory.canonicalize()?;
        let own = directory.join("loopback");
        if let Some(subnet) = read_claim(&own)
            && subnet.take(claims, &directory)?
        {
            return Ok(subnet);
        }
        for number in candidates(&directory) {
            let subnet = Subnet { prefix: [127, (number >> 8) as u8, number as u8] };
            if subnet.take(claims, &directory)? {
                files::write_durably(&own, subnet.to_string().as_bytes())?;
                return Ok(subnet);
            }
        }
        Err(io::Error::other(format!("no free loopback subnet; remove unused files in {}", claims.display())))
    }

    /// Gives the claim back.
    pub fn release(&self, directory: &Path) -> io::Result<()> {
        files::remove_if_present(&self.claim_file(Path::new(CLAIMS)))?;
        files::remove_if_present(&directory.join("loopback"))
    }

    fn claim_file(&self, claims: &Path) -> PathBuf {
        claims.join(self.to_string())
    }

    /// Whether the claim is ours now.
    fn take(&self, claims: &Path, directory: &Path) -> io::Result<bool> {
        let path = self.claim_file(claims);
        // Linked into place whole: a claim that is seen names its holder.
        let draft = claims.join(format!(".{self}.{}", std::process::id()));
        fs::write(&draft, directory.as_os_str().as_encoded_bytes())?;
        let linked = fs::hard_link(&draft, &path);
        files::remove_if_present(&draft)?;
        match linked {
            Ok(()) => return Ok(true),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e),
        }
        let holder = PathBuf::from(fs::read_to_string(&path)?);
        if holder == directory {
            return Ok(true);
        }
        // A holder that was deleted, or that has claimed another subnet since, no longer needs this one.
        if read_claim(&holder.join("loopback")).as_ref() == Some(self) {
            return Ok(false);
        }
        files::write_durably(&path, directory.as_os_str().as_encoded_bytes())?;
        Ok(true)
    }

    /// The address of the node with this number, from 1.
    ///
    /// # Panics
    /// When the number is 0 or above 63.
    pub fn node(&self, number: u8) -> Ipv4Addr {
        assert!((1..FIRST_WORKLOAD).contains(&number), "a standalone instance has 1 to 63 nodes");
        let [a, b, c] = self.prefix;
        Ipv4Addr::new(a, b, c, number)
    }

    /// The addresses for workloads.
    pub fn workloads(&self) -> Vec<Ipv4Addr> {
        let [a, b, c] = self.prefix;
        (FIRST_WORKLOAD..=254).map(|d| Ipv4Addr::new(a, b, c, d)).collect()
    }
}

impl std::fmt::Display for Subnet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [a, b, c] = self.prefix;
        write!(f, "{a}.{b}.{c}")
    }
}

fn read_claim(path: &Path) -> Option<Subnet> {
    let text = fs::read_to_string(path).ok()?;
    let mut parts = text.trim().split('.').map(|p| p.parse::<u8>());
    let prefix = [parts.next()?.ok()?, parts.next()?.ok()?, parts.next()?.ok()?];
    (prefix[0] == 127 && parts.next().is_none()).then_some(Subnet { prefix })
}

/// Subnet numbers 127.1.0 to 127.255.255 in an order that depends on the directory.
fn candidates(directory: &Path) -> impl Iterator<Item = u32> {
    const FIRST: u32 = 1 << 8;
    const COUNT: u32 = (255 << 8) + 256 - FIRST;
    // FNV-1a: only spreads the starting points.
    let hash = directory
        .as_os_str()
        .as_encoded_bytes()
        .iter()
        .fold(0x811c_9dc5_u32, |h, b| (h ^ u32::from(*b)).wrapping_mul(0x0100_0193));
    (0..COUNT).map(move |i| FIRST + (hash % COUNT + i) % COUNT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_its_subnet_and_never_shares_it() {
        let folder = tempfile::tempdir().unwrap();
        let claims = folder.path().join("claims");
        let (one, two) = (folder.path().join("one"), folder.path().join("two"));
        fs::create_dir_all(&one).unwrap();
        fs::create_dir_all(&two).unwrap();
        let first = Subnet::claim_in(&one, &claims).unwrap();
        assert_eq!(Subnet::claim_in(&one, &claims).unwrap(), first);
        fs::write(two.join("loopback"), first.to_string()).unwrap();
        let second = Subnet::claim_in(&two, &claims).unwrap();
        assert_ne!(first, second);
    }

    #[test]
    fn takes_over_the_subnet_of_a_deleted_instance() {
        let folder = tempfile::tempdir().unwrap();
        let claims = folder.path().join("claims");
        let (one, two) = (folder.path().join("one"), folder.path().join("two"));
        fs::create_dir_all(&one).unwrap();
        fs::create_dir_all(&two).unwrap();
        let first = Subnet::claim_in(&one, &claims).unwrap();
        fs::remove_dir_all(&one).unwrap();
        assert!(first.take(&claims, &two).unwrap());
    }
}

//! An authority of the tests, which signs for whoever asks. A test includes it by `#[path]`; its crate needs `rcgen` for its tests.

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};

use super::{Identity, PEER_NAME, Security};

pub struct Authority(CertifiedIssuer<'static, KeyPair>);

#[allow(dead_code, reason = "each test program uses its part")]
impl Authority {
    pub fn new() -> Authority {
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Authority(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    /// What is to be trusted, PEM.
    pub fn pem(&self) -> String {
        self.0.pem()
    }

    /// A certificate for that name, and its key, PEM.
    pub fn pair(&self, name: &str) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        (params.signed_by(&key, &self.0).unwrap().pem(), key.serialize_pem())
    }

    pub fn identity(&self, name: &str) -> Identity {
        let (chain, key) = self.pair(name);
        Identity::from_pem(&chain, &key).unwrap()
    }

    /// The files of a process that trusts this authority and has a certificate of it.
    pub fn issue(&self, directory: &std::path::Path) {
        let (chain, key) = self.pair(PEER_NAME);
        for (name, text) in [("ca.crt", self.pem()), ("tls.crt", chain), ("tls.key", key)] {
            // Another file each time, as where a Secret changes.
            let new = directory.join(format!("{name}.new"));
            std::fs::write(&new, text).unwrap();
            std::fs::rename(new, directory.join(name)).unwrap();
        }
    }

    /// A process that trusts this authority and has a certificate of it.
    pub fn member(&self) -> Security {
        Security::mutual(&self.pem(), &self.identity(PEER_NAME)).unwrap()
    }
}

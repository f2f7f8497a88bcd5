//! The webhook's certificate: how it is made, how it lies in its Secret, and when the next one comes.
//!
//! Each certificate has an authority of its own, whose key is thrown away at once: nobody can sign another one with it.
//! A next certificate is served only after its authority stands in the webhook configurations, beside the one before.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp, ToSpan, tz::TimeZone};
use k8s_openapi::ByteString;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};
use runtime::transport::{Identity, is_accepted};

/// A certificate chain and its key, PEM.
#[derive(Clone, PartialEq, Eq)]
pub struct Pair {
    pub chain: String,
    pub key: String,
}

/// What lies in the Secret.
#[derive(Clone, PartialEq, Eq)]
pub struct Stored {
    /// Who must be trusted now: the authority of the current certificate first or beside that of the next or the last one.
    pub authorities: String,
    pub current: Pair,
    /// Made, and served as soon as its authority is known everywhere.
    pub next: Option<Pair>,
}

/// What certificates are for.
#[derive(Clone, Debug)]
pub struct Rules {
    pub names: Vec<String>,
    pub lifetime_days: u32,
    pub renew_days: u32,
}

/// What to do about a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    Keep,
    /// Nothing that is there can be served: begin anew.
    Make,
    /// Make the next one and have its authority trusted.
    Prepare,
    /// Serve the next one.
    Promote,
}

/// What is to be done now. `is_registered`: whoever calls us trusts all that is stored.
pub fn decide(stored: Option<&Stored>, is_registered: bool, now: Timestamp, rules: &Rules) -> Step {
    let Some(stored) = stored else { return Step::Make };
    let later = now.saturating_add(SignedDuration::from_hours(24 * i64::from(rules.renew_days))).unwrap_or(now);
    let serves = |pair: &Pair, at: Timestamp| {
        let seconds = u64::try_from(at.as_second()).unwrap_or(0);
        let is_pair = Identity::from_pem(&pair.chain, &pair.key).is_ok();
        is_pair && rules.names.iter().all(|name| is_accepted(&stored.authorities, &pair.chain, name, seconds))
    };
    if !serves(&stored.current, now) {
        return if stored.next.as_ref().is_some_and(|next| serves(next, now)) { Step::Promote } else { Step::Make };
    }
    if serves(&stored.current, later) {
        return Step::Keep;
    }
    match &stored.next {
        Some(next) if serves(next, now) => match is_registered {
            true => Step::Promote,
            false => Step::Keep,
        },
        _ => Step::Prepare,
    }
}

/// What is stored after a step.
///
/// # Errors
/// When a name cannot stand in a certificate.
pub fn after(
    step: Step,
    stored: Option<Stored>,
    now: Timestamp,
    rules: &Rules,
) -> Result<Option<Stored>, rcgen::Error> {
    match (step, stored) {
        (Step::Keep, stored) => Ok(stored),
        (Step::Promote, Some(Stored { authorities, next: Some(next), .. })) => {
            // Another replica may serve the one before for a moment more, so its authority stays until the next time.
            Ok(Some(Stored { authorities, current: next, next: None }))
        }
        (Step::Prepare, Some(stored)) => {
            let (authority, next) = make(now, rules)?;
            let own = authority_of(&stored.authorities, &stored.current.chain, now, rules);
            Ok(Some(Stored { authorities: authority + &own, current: stored.current, next: Some(next) }))
        }
        (Step::Make | Step::Prepare | Step::Promote, _) => {
            let (authorities, current) = make(now, rules)?;
            Ok(Some(Stored { authorities, current, next: None }))
        }
    }
}

/// A new authority (PEM), and the only certificate that it ever signs.
fn make(now: Timestamp, rules: &Rules) -> Result<(String, Pair), rcgen::Error> {
    let today = now.to_zoned(TimeZone::UTC).date();
    let day = |date: jiff::civil::Date| {
        rcgen::date_time_ymd(date.year().into(), date.month().unsigned_abs(), date.day().unsigned_abs())
    };
    // From yesterday on, for clocks that are behind.
    let valid = |params: &mut CertificateParams, name: &str| {
        params.not_before = day(today.saturating_sub(1.day()));
        params.not_after = day(today.saturating_add(i64::from(rules.lifetime_days).days()));
        params.distinguished_name.push(DnType::CommonName, name);
    };
    let mut authority = CertificateParams::new(vec![])?;
    valid(&mut authority, "backing-image-csi webhook authority");
    authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate()?)?;
    let mut own = CertificateParams::new(rules.names.clone())?;
    valid(&mut own, "backing-image-csi webhook");
    own.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    own.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    own.use_authority_key_identifier_extension = true;
    let key = KeyPair::generate()?;
    let chain = own.signed_by(&key, &authority)?.pem();
    Ok((authority.pem(), Pair { chain, key: key.serialize_pem() }))
}

/// Those of `authorities` that a certificate is of.
fn authority_of(authorities: &str, chain: &str, now: Timestamp, rules: &Rules) -> String {
    let seconds = u64::try_from(now.as_second()).unwrap_or(0);
    let signed = |pem: &&str| rules.names.iter().all(|name| is_accepted(pem, chain, name, seconds));
    authorities.split_inclusive("-----END CERTIFICATE-----\n").filter(signed).collect()
}

impl Stored {
    /// From the data of a Secret; none when a part is missing.
    pub fn read(data: &BTreeMap<String, ByteString>) -> Option<Stored> {
        let text = |key: &str| String::from_utf8(data.get(key)?.0.clone()).ok();
        let pair = |name: &str| Some(Pair { chain: text(&format!("{name}.crt"))?, key: text(&format!("{name}.key"))? });
        Some(Stored { authorities: text("ca.crt")?, current: pair("tls")?, next: pair("next") })
    }

    /// As the data of a Secret of the type `kubernetes.io/tls`.
    pub fn write(&self) -> BTreeMap<String, ByteString> {
        let mut data = BTreeMap::new();
        let mut put = |key: &str, text: &str| data.insert(key.to_owned(), ByteString(text.as_bytes().to_vec()));
        put("ca.crt", &self.authorities);
        for (name, pair) in [("tls", Some(&self.current)), ("next", self.next.as_ref())] {
            if let Some(pair) = pair {
                put(&format!("{name}.crt"), &pair.chain);
                put(&format!("{name}.key"), &pair.key);
            }
        }
        data
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: SignedDuration = SignedDuration::from_hours(24);

    fn rules() -> Rules {
        Rules { names: vec!["hook.shop.svc".into(), "127.0.0.1".into()], lifetime_days: 90, renew_days: 30 }
    }

    fn start() -> Timestamp {
        "2026-11-22T23:59:59Z".parse().unwrap()
    }

    fn step(stored: &Stored, day: i32, is_registered: bool) -> Step {
        decide(Some(stored), is_registered, start() + DAY * day, &rules())
    }

    fn go(step: Step, stored: Option<Stored>, day: i32) -> Stored {
        after(step, stored, start() + DAY * day, &rules()).unwrap().unwrap()
    }

    #[test]
    fn a_certificate_is_followed_by_the_next_one_before_it_ends() {
        assert_eq!(decide(None, true, start(), &rules()), Step::Make);
        let first = go(Step::Make, None, 0);
        // Also by a clock that is behind.
        for day in [-1, 0, 1, 58] {
            assert_eq!(step(&first, day, true), Step::Keep, "{day}");
        }
        assert_eq!(step(&first, 61, true), Step::Prepare);
        let prepared = go(Step::Prepare, Some(first.clone()), 61);
        assert!(prepared.current == first.current && prepared.next.is_some());
        assert!(prepared.authorities.ends_with(&first.authorities), "both are trusted");
        assert_eq!(step(&prepared, 61, false), Step::Keep, "not before its authority is trusted");
        assert_eq!(step(&prepared, 61, true), Step::Promote);
        let second = go(Step::Promote, Some(prepared.clone()), 61);
        assert!(Some(&second.current) == prepared.next.as_ref() && second.next.is_none());
        assert_eq!(step(&second, 61, true), Step::Keep);
        // Authorities do not pile up.
        let third = go(Step::Prepare, Some(second.clone()), 122);
        assert_eq!(third.authorities.matches("BEGIN CERTIFICATE").count(), 2);
        assert!(!third.authorities.contains(&first.authorities));
    }

    #[test]
    fn what_cannot_be_served_any_more_is_replaced_at_once() {
        let first = go(Step::Make, None, 0);
        assert_eq!(step(&first, 91, false), Step::Make, "it has ended");
        let prepared = go(Step::Prepare, Some(first.clone()), 61);
        assert_eq!(step(&prepared, 91, false), Step::Promote, "the next one is there");
        assert_eq!(step(&prepared, 200, false), Step::Make, "both have ended");
        let another = go(Step::Make, None, 0);
        let useless = Stored { next: Some(another.current.clone()), ..prepared };
        assert_eq!(step(&useless, 61, true), Step::Prepare, "nobody trusts the next one");
        for broken in [
            Stored { authorities: another.authorities.clone(), ..first.clone() },
            Stored { current: Pair { key: another.current.key.clone(), ..first.current.clone() }, ..first.clone() },
            Stored { current: Pair { chain: "?".into(), ..first.current.clone() }, ..first.clone() },
        ] {
            assert_eq!(step(&broken, 0, true), Step::Make);
        }
        let renamed = Rules { names: vec!["hook.attic.svc".into()], ..rules() };
        assert_eq!(decide(Some(&first), true, start(), &renamed), Step::Make);
    }

    #[test]
    fn a_secret_holds_all_of_it() {
        let first = go(Step::Make, None, 0);
        let prepared = go(Step::Prepare, Some(first.clone()), 61);
        for stored in [first, prepared] {
            let data = stored.write();
            assert!(Stored::read(&data).is_some_and(|read| read == stored));
            for missing in ["ca.crt", "tls.crt", "tls.key"] {
                let mut data = data.clone();
                data.remove(missing);
                assert!(Stored::read(&data).is_none(), "{missing}");
            }
        }
    }
}

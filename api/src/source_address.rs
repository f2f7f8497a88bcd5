//! From which addresses no image is fetched unless a setting allows it: this machine, the link, the metadata service of a cloud.
//!
//! Who may create an image would otherwise read what only a node can reach. Private networks are allowed: sources live there.
//! An address counts as what it is in the end, whatever it is written as: `127.1`, `0x7f000001`, `::ffff:127.0.0.1` are all 127.0.0.1.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use crate::setting;

/// What is special about an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Special {
    /// The machine itself; also the unspecified address, by which it is reached as well.
    Loopback,
    /// Valid on one network segment only.
    LinkLocal,
    /// Where a cloud tells a machine its identity and credentials.
    Metadata,
}

impl Special {
    /// With its article.
    pub fn as_str(self) -> &'static str {
        match self {
            Special::Loopback => "a loopback address",
            Special::LinkLocal => "a link-local address",
            Special::Metadata => "the address of a cloud's metadata service",
        }
    }
}

/// The value of the setting: addresses and networks from which images may be fetched although they are special.
///
/// ```
/// use backing_image_api::source_address::{AllowedSources, Special};
/// let none = AllowedSources::default();
/// assert_eq!(none.refusal_of_host("localhost"), Some(Special::Loopback));
/// let some: AllowedSources = "127.0.0.0/8, ::1".parse().unwrap();
/// assert_eq!(some.refusal_of_host("localhost"), None);
/// assert_eq!(some.refusal_of_host("169.254.169.254"), Some(Special::Metadata));
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AllowedSources(Vec<Network>);

/// A text that is no list of addresses and networks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it must be {RULE}")]
pub struct InvalidSources;

/// What the setting may be.
pub const RULE: &str = "addresses and networks like 127.0.0.1, 127.0.0.0/8 or ::1 with commas between, or empty";

impl AllowedSources {
    /// Nothing is allowed.
    pub const fn none() -> AllowedSources {
        AllowedSources(vec![])
    }

    /// What stored settings allow.
    pub fn of(settings: &[crate::Setting]) -> AllowedSources {
        setting::value(settings, setting::ALLOWED_SOURCE_ADDRESSES).parse().unwrap_or_default()
    }

    /// Whether it names nothing.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Why an image must not come from an address, if so.
    pub fn refusal(&self, address: IpAddr) -> Option<Special> {
        let is_allowed = |address: IpAddr| self.0.iter().any(|network| network.contains(address));
        meant(address).into_iter().filter(|address| !is_allowed(*address)).filter_map(special).max()
    }

    /// The same of the host of a URL, as far as that can be judged without asking the network: an address in any spelling, with or
    /// without brackets, or a name that always means such an address.
    pub fn refusal_of_host(&self, host: &str) -> Option<Special> {
        let name = host.trim_matches(['[', ']']);
        let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
        if let Ok(address) = name.parse::<Ipv6Addr>() {
            return self.refusal(address.into());
        }
        if let Some(address) = classic_v4(&name) {
            return self.refusal(address.into());
        }
        let refusals: Vec<Option<Special>> = known_name(&name).iter().map(|address| self.refusal(*address)).collect();
        // One of them is enough to go on with; what the name resolves to is looked at again.
        if refusals.contains(&None) { None } else { refusals.into_iter().flatten().next() }
    }
}

impl fmt::Display for AllowedSources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, Network { address, bits }) in self.0.iter().enumerate() {
            f.write_str(if index == 0 { "" } else { "," })?;
            write!(f, "{address}/{bits}")?;
        }
        Ok(())
    }
}

impl FromStr for AllowedSources {
    type Err = InvalidSources;

    fn from_str(text: &str) -> Result<Self, InvalidSources> {
        if text.trim().is_empty() {
            return Ok(AllowedSources::none());
        }
        text.split(',')
            .map(|part| Network::parse(part.trim()).ok_or(InvalidSources))
            .collect::<Result<_, _>>()
            .map(Self)
    }
}

/// Addresses that begin with the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Network {
    address: IpAddr,
    bits: u8,
}

impl Network {
    fn parse(text: &str) -> Option<Network> {
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => (address, Some(bits)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().ok()?;
        // An IPv4 address in IPv6 spelling is judged as the former, so a network of such ones would never match.
        if meant(address) != [address] {
            return None;
        }
        let all = if address.is_ipv4() { 32 } else { 128 };
        let bits = match bits {
            Some(digits) if digits.bytes().all(|b| b.is_ascii_digit()) => digits.parse().ok()?,
            Some(_) => return None,
            None => all,
        };
        (bits <= all).then_some(Network { address, bits })
    }

    fn contains(&self, other: IpAddr) -> bool {
        let bits = u32::from(self.bits);
        match (self.address, other) {
            (IpAddr::V4(own), IpAddr::V4(other)) => {
                (own.to_bits() ^ other.to_bits()).checked_shr(32 - bits).unwrap_or(0) == 0
            }
            (IpAddr::V6(own), IpAddr::V6(other)) => {
                (own.to_bits() ^ other.to_bits()).checked_shr(128 - bits).unwrap_or(0) == 0
            }
            _ => false,
        }
    }
}

fn special(address: IpAddr) -> Option<Special> {
    match address {
        _ if METADATA.contains(&address) => Some(Special::Metadata),
        IpAddr::V4(v4) if v4.is_loopback() || v4.octets()[0] == 0 => Some(Special::Loopback),
        IpAddr::V6(v6) if v6.is_loopback() || v6.is_unspecified() => Some(Special::Loopback),
        IpAddr::V4(v4) if v4.is_link_local() => Some(Special::LinkLocal),
        IpAddr::V6(v6) if v6.is_unicast_link_local() => Some(Special::LinkLocal),
        _ => None,
    }
}

const AWS: IpAddr = IpAddr::V4(Ipv4Addr::new(169, 254, 169, 254));

/// Metadata services: most clouds, AWS by IPv6 and its pods, Google by IPv6, containers of AWS, Alibaba, Azure's wire server, Oracle.
const METADATA: [IpAddr; 8] = [
    AWS,
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x23)),
    IpAddr::V6(Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254)),
    IpAddr::V4(Ipv4Addr::new(169, 254, 170, 2)),
    IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200)),
    IpAddr::V4(Ipv4Addr::new(168, 63, 129, 16)),
    IpAddr::V4(Ipv4Addr::new(192, 0, 0, 192)),
];

/// What names mean that need no resolver.
fn known_name(name: &str) -> &'static [IpAddr] {
    const LOCAL: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
    match name {
        "" | "localhost" => &LOCAL,
        "metadata.google.internal" | "metadata.goog" => &[AWS],
        _ if name.ends_with(".localhost") => &LOCAL,
        _ => &[],
    }
}

/// Where a local NAT64 (RFC 8215) may carry an IPv4 address: behind prefixes of 96, 64, 56 and 48 bits (RFC 6052).
const LOCAL_NAT64: [[usize; 4]; 4] = [[12, 13, 14, 15], [9, 10, 11, 12], [7, 9, 10, 11], [6, 7, 9, 10]];

/// The IPv4 address that an IPv6 address carries (mapped, compatible, translated, NAT64, 6to4), as the packets may end up there.
/// Several where nobody can tell which.
fn meant(address: IpAddr) -> Vec<IpAddr> {
    let IpAddr::V6(v6) = address else { return vec![address] };
    let low = v6.octets();
    let read = |at: [usize; 4]| Ipv4Addr::from(at.map(|index| low[index]));
    let carried = match v6.segments() {
        [0, 0, 0, 0, 0, 0xffff, ..] | [0, 0, 0, 0, 0xffff, 0, ..] | [0x64, 0xff9b, 0, 0, 0, 0, ..] => {
            vec![read([12, 13, 14, 15])]
        }
        [0x64, 0xff9b, 1, 0, 0, 0, 0, 0] => vec![Ipv4Addr::UNSPECIFIED],
        // A reading that begins with zero is the filling beside the address.
        [0x64, 0xff9b, 1, ..] => LOCAL_NAT64.map(read).into_iter().filter(|v4| v4.octets()[0] != 0).collect(),
        [0, 0, 0, 0, 0, 0, 0, 0 | 1] => vec![],
        [0, 0, 0, 0, 0, 0, ..] => vec![read([12, 13, 14, 15])],
        [0x2002, ..] => vec![read([2, 3, 4, 5])],
        _ => vec![],
    };
    if carried.is_empty() { vec![address] } else { carried.into_iter().map(IpAddr::V4).collect() }
}

/// An address in any form that resolvers accept: `127.1`, `0x7f000001`, `2130706433`.
fn classic_v4(text: &str) -> Option<Ipv4Addr> {
    let number = |part: &str| match (part.strip_prefix("0x"), part.strip_prefix('0')) {
        (Some(digits), _) => u32::from_str_radix(digits, 16).ok(),
        (None, Some(digits)) if !digits.is_empty() => u32::from_str_radix(digits, 8).ok(),
        _ => part.parse().ok(),
    };
    let parts: Vec<u32> = text.split('.').map(number).collect::<Option<_>>()?;
    let (last, first) = parts.split_last()?;
    if first.len() > 3 || first.iter().any(|part| *part > 255) {
        return None;
    }
    let room = 32 - 8 * first.len() as u32;
    if u64::from(*last) >= 1 << room {
        return None;
    }
    let high = first.iter().enumerate().fold(0_u32, |all, (index, part)| all | part << (24 - 8 * index));
    Some(Ipv4Addr::from(high | last))
}

#[cfg(test)]
mod tests {
    use super::Special::{LinkLocal, Loopback, Metadata};
    use super::*;

    #[test]
    fn addresses_are_judged_by_what_they_are_in_the_end() {
        for (host, expected) in [
            ("127.0.0.1", Some(Loopback)),
            ("127.255.255.254", Some(Loopback)),
            ("128.0.0.1", None),
            ("0.0.0.0", Some(Loopback)),
            ("0", Some(Loopback)),
            ("127.1", Some(Loopback)),
            ("0177.0.0.1", Some(Loopback)),
            ("0x7f.1", Some(Loopback)),
            ("0X7F000001", Some(Loopback)),
            ("2130706433", Some(Loopback)),
            ("127.0.0.1.", Some(Loopback)),
            ("[::1]", Some(Loopback)),
            ("[::]", Some(Loopback)),
            ("[::ffff:127.0.0.1]", Some(Loopback)),
            ("[::127.0.0.1]", Some(Loopback)),
            ("[64:ff9b::127.0.0.1]", Some(Loopback)),
            ("[2002:7f00:1::]", Some(Loopback)),
            ("[::ffff:0:127.0.0.1]", Some(Loopback)),
            ("[::ffff:0:8.8.8.8]", None),
            ("[::fffe:0:127.0.0.1]", None),
            ("[64:ff9b:1::127.0.0.1]", Some(Loopback)),
            ("[64:ff9b:1::0.0.0.0]", Some(Loopback)),
            ("[64:ff9b:1::8.8.8.8]", None),
            ("[64:ff9b:2::127.0.0.1]", None),
            // Behind prefixes of 48, 56 and 64 bits, whatever stands behind it.
            ("[64:ff9b:1:7f00:0:100::]", Some(Loopback)),
            ("[64:ff9b:1:a9fe:a9:fe00::]", Some(Metadata)),
            ("[64:ff9b:1:a9fe:a9:fe00:808:808]", Some(Metadata)),
            ("[64:ff9b:1:a9:fe:a9fe::]", Some(Metadata)),
            ("[64:ff9b:1:0:a9:fea9:fe00:0]", Some(Metadata)),
            ("[64:ff9b:1:808:8:800::]", None),
            ("localhost", Some(Loopback)),
            ("LocalHost.", Some(Loopback)),
            ("a.b.localhost", Some(Loopback)),
            ("", Some(Loopback)),
            ("169.254.0.1", Some(LinkLocal)),
            ("169.255.0.1", None),
            ("0xa9fe0001", Some(LinkLocal)),
            ("[fe80::1]", Some(LinkLocal)),
            ("[febf::1]", Some(LinkLocal)),
            ("[fec0::1]", None),
            ("[::ffff:169.254.1.1]", Some(LinkLocal)),
            ("169.254.169.254", Some(Metadata)),
            ("2852039166", Some(Metadata)),
            ("[::ffff:a9fe:a9fe]", Some(Metadata)),
            ("[fd00:ec2::254]", Some(Metadata)),
            ("[fd00:ec2::23]", Some(Metadata)),
            ("[fd00:ec2::24]", None),
            ("[fd20:ce::254]", Some(Metadata)),
            ("[fd20:ce::253]", None),
            ("100.100.100.200", Some(Metadata)),
            ("metadata.google.internal", Some(Metadata)),
            ("Metadata.Google.Internal.", Some(Metadata)),
            ("10.0.0.7", None),
            ("192.168.1.1", None),
            ("172.16.0.1", None),
            ("100.64.0.1", None),
            ("[fd12::1]", None),
            ("[2001:db8::1]", None),
            ("example.com", None),
            ("localhost.example.com", None),
            ("1.2.3.4.5", None),
        ] {
            assert_eq!(AllowedSources::none().refusal_of_host(host), expected, "{host}");
        }
    }

    #[test]
    fn a_list_allows_what_it_holds_and_nothing_else() {
        for (list, host, expected) in [
            ("127.0.0.1", "127.0.0.1", None),
            ("127.0.0.1", "127.0.0.2", Some(Loopback)),
            ("127.0.0.0/8", "127.9.9.9", None),
            ("127.0.0.0/8", "[::ffff:127.0.0.1]", None),
            ("127.0.0.0/8", "[::1]", Some(Loopback)),
            ("127.0.0.0/8", "localhost", None),
            ("::1", "localhost", None),
            ("::1", "[::1]", None),
            ("169.254.0.0/16", "169.254.169.254", None),
            ("169.254.0.0/17", "169.254.169.254", Some(Metadata)),
            ("169.254.169.254", "metadata.google.internal", None),
            ("127.0.0.0/8", "metadata.google.internal", Some(Metadata)),
            (" 127.0.0.1 , fe80::/10 ", "[fe80::1]", None),
            ("0.0.0.0/0", "169.254.169.254", None),
            ("0.0.0.0/0", "[::1]", Some(Loopback)),
            ("::/0", "[fe80::1]", None),
            ("127.0.0.0/8", "[64:ff9b:1::127.0.0.1]", None),
            ("169.254.0.0/17", "[64:ff9b:1:a9fe:a9:fe00::]", Some(Metadata)),
        ] {
            let allowed: AllowedSources = list.parse().unwrap();
            assert_eq!(allowed.refusal_of_host(host), expected, "{host} with {list}");
            assert_eq!(allowed.to_string().parse(), Ok(allowed), "{list}");
        }
    }

    #[test]
    fn what_is_no_list_is_refused() {
        let bad = ["localhost", "127.0.0.1/33", "::1/129", "127.0.0.1/", "127.0.0.1/+8", "127.1", ",", "127.0.0.1;::1"];
        for text in bad.into_iter().chain(["::ffff:127.0.0.1", "::ffff:127.0.0.0/104", "64:ff9b:1::/48", "true"]) {
            assert_eq!(text.parse::<AllowedSources>(), Err(InvalidSources), "{text}");
        }
        assert!(" ".parse::<AllowedSources>().unwrap().is_empty());
    }
}

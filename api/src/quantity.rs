//! Sizes: Longhorn's 64-bit JSON strings (`size: "10485760"`), and Kubernetes' quantities of storage (`10Gi`, `500M`, `1.5Gi`, `1e9`).

use std::borrow::Cow;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{Error, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A number of bytes, a decimal string on the wire (as Longhorn's `int64,string`); a plain number is accepted too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct SizeBytes(pub u64);

impl fmt::Display for SizeBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Serialize for SizeBytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for SizeBytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Digits;
        impl Visitor<'_> for Digits {
            type Value = SizeBytes;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of bytes, as a decimal string")
            }
            fn visit_str<E: Error>(self, text: &str) -> Result<SizeBytes, E> {
                if text.is_empty() {
                    return Ok(SizeBytes(0));
                }
                text.parse().map(SizeBytes).map_err(|_| E::custom(format!("`{text}` is not a number of bytes")))
            }
            fn visit_u64<E: Error>(self, value: u64) -> Result<SizeBytes, E> {
                Ok(SizeBytes(value))
            }
            fn visit_i64<E: Error>(self, value: i64) -> Result<SizeBytes, E> {
                u64::try_from(value)
                    .map(SizeBytes)
                    .map_err(|_| E::custom(format!("`{value}` is not a number of bytes")))
            }
        }
        deserializer.deserialize_any(Digits)
    }
}

impl JsonSchema for SizeBytes {
    fn schema_name() -> Cow<'static, str> {
        "SizeBytes".into()
    }
    fn inline_schema() -> bool {
        true
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string" })
    }
}

/// Reads a quantity of Kubernetes as a number of bytes, rounded up; `None` when it is none, or too large.
pub fn bytes(text: &str) -> Option<u64> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let factor: u128 = match unit {
        "" => 1,
        "k" => 1000,
        "M" => 1000 * 1000,
        "G" => 1000 * 1000 * 1000,
        "T" => 1000_u128.pow(4),
        "P" => 1000_u128.pow(5),
        "E" => 1000_u128.pow(6),
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        "Pi" => 1 << 50,
        "Ei" => 1 << 60,
        exponent if exponent.starts_with(['e', 'E']) => 10_u128.checked_pow(exponent[1..].parse().ok()?)?,
        _ => return None,
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() || fraction.len() > 18 {
        return None;
    }
    let digits = |text: &str| if text.is_empty() { Some(0_u128) } else { text.parse::<u128>().ok() };
    let scale = 10_u128.pow(fraction.len() as u32);
    let part = digits(fraction)?.checked_mul(factor)?.div_ceil(scale);
    u64::try_from(digits(whole)?.checked_mul(factor)?.checked_add(part)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_kubernetes_reads() {
        let good =
            [("10Gi", 10 << 30), ("500M", 500_000_000), ("1.5Gi", 3 << 29), ("1e3", 1000), ("42", 42), (".5Ki", 512)];
        for (text, number) in good {
            assert_eq!(bytes(text), Some(number), "{text}");
        }
        for bad in ["", "Gi", "10GB", "-1", "1.2.3", "99999999999Ei", "1e99"] {
            assert_eq!(bytes(bad), None, "{bad}");
        }
    }
}

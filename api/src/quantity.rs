//! 64-bit sizes that Longhorn writes as JSON strings (`size: "10485760"`).

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

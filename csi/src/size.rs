//! How large a volume becomes, when it is made and when it grows.

use proto::csi::CapacityRange;

use crate::CsiError;
use crate::limits::{MAX_VOLUME_BYTES, MIN_VOLUME_BYTES, VOLUME_ROUNDING_BYTES};

/// The two bounds of a request in bytes; `None` is open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bounds {
    pub required: Option<u64>,
    pub limit: Option<u64>,
}

impl Bounds {
    /// Reads a range; negative numbers and a limit below the requirement are refused.
    pub fn of(range: Option<&CapacityRange>) -> Result<Bounds, CsiError> {
        let range = range.copied().unwrap_or_default();
        let bytes = |field, value: i64| {
            u64::try_from(value).map(|bytes| Some(bytes).filter(|b| *b > 0)).map_err(|_| CsiError::Field {
                field,
                value: value.to_string(),
                right: "a number of bytes, 0 or more",
            })
        };
        let bounds = Bounds {
            required: bytes("capacity_range.required_bytes", range.required_bytes)?,
            limit: bytes("capacity_range.limit_bytes", range.limit_bytes)?,
        };
        match bounds {
            Bounds { required: Some(required), limit: Some(limit) } if required > limit => Err(CsiError::Field {
                field: "capacity_range.limit_bytes",
                value: format!("{limit}` with `required_bytes` {required}"),
                right: "at least `required_bytes`",
            }),
            bounds => Ok(bounds),
        }
    }

    /// Whether a volume of that size is what was asked for.
    pub fn accept(&self, size_bytes: u64) -> bool {
        self.required.is_none_or(|required| size_bytes >= required)
            && self.limit.is_none_or(|limit| size_bytes <= limit)
    }

    /// The size of a volume that has this many bytes and is to be in these bounds: it grows to what a new one would have, and never
    /// shrinks.
    pub fn grow(&self, has: u64) -> Result<u64, CsiError> {
        match *self {
            Bounds { limit: Some(limit), .. } if limit < has => Err(CsiError::Size {
                reason: format!(
                    "the volume has {has} bytes and cannot become smaller, the limit is {limit}; raise the limit"
                ),
            }),
            Bounds { required: Some(required), .. } if required > has => self.choose(None),
            _ => Ok(has),
        }
    }

    /// The size of a new volume, given what the image (if any) makes a guest see.
    pub fn choose(&self, image: Option<ImageSize<'_>>) -> Result<u64, CsiError> {
        let refuse = |reason: String| Err(CsiError::Size { reason });
        if let (Some(required), Some(image)) = (self.required, image)
            && required < image.virtual_size_bytes
        {
            return refuse(format!(
                "the volume would be smaller than image `{}`: {required} bytes are wanted, the image needs {}; ask for at least that, or leave the size out",
                image.name, image.virtual_size_bytes
            ));
        }
        let least = self.required.unwrap_or(0).max(image.map_or(0, |i| i.virtual_size_bytes)).max(MIN_VOLUME_BYTES);
        if least > MAX_VOLUME_BYTES {
            return refuse(format!("{least} bytes are wanted; the largest volume has {MAX_VOLUME_BYTES} bytes"));
        }
        let size = least.next_multiple_of(VOLUME_ROUNDING_BYTES);
        match self.limit {
            Some(limit) if size > limit => refuse(format!(
                "the volume would have {size} bytes (at least {MIN_VOLUME_BYTES}, a multiple of {VOLUME_ROUNDING_BYTES}, not smaller than its image), the limit is {limit}; raise the limit"
            )),
            _ => Ok(size),
        }
    }
}

/// What an image makes a guest see.
#[derive(Clone, Copy, Debug)]
pub struct ImageSize<'a> {
    pub name: &'a str,
    pub virtual_size_bytes: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn check(required: i64, limit: i64, image: Option<u64>) -> Result<u64, String> {
        let range = CapacityRange { required_bytes: required, limit_bytes: limit };
        let image = image.map(|virtual_size_bytes| ImageSize { name: "ubuntu", virtual_size_bytes });
        Bounds::of(Some(&range)).and_then(|b| b.choose(image)).map_err(|e| format!("{} {e}", e.kind()))
    }

    #[test]
    fn rounds_up_and_never_above_the_limit() {
        let mib = MIB as i64;
        assert_eq!(check(0, 0, None), Ok(10 * MIB));
        assert_eq!(check(1, 0, None), Ok(10 * MIB));
        assert_eq!(check(11 * mib, 0, None), Ok(12 * MIB));
        assert_eq!(check(11 * mib, 12 * mib, None), Ok(12 * MIB));
        assert_eq!(check(10 << 30, 10 << 30, None), Ok(10 << 30));
        assert!(check(11 * mib, 11 * mib, None).unwrap_err().starts_with("OutOfRange"));
        assert!(check(0, 5 * mib, None).unwrap_err().starts_with("OutOfRange"));
        assert!(check(i64::MAX, 0, None).unwrap_err().starts_with("OutOfRange"));
    }

    #[test]
    fn takes_the_size_of_the_image_and_never_less() {
        let mib = MIB as i64;
        assert_eq!(check(0, 0, Some(33 * MIB + 512)), Ok(34 * MIB));
        assert_eq!(check(64 * mib, 0, Some(33 * MIB)), Ok(64 * MIB));
        let error = check(32 * mib, 0, Some(33 * MIB)).unwrap_err();
        assert!(error.starts_with("OutOfRange") && error.contains("34603008") && error.contains("ubuntu"), "{error}");
        assert!(check(0, 20 * mib, Some(33 * MIB)).unwrap_err().starts_with("OutOfRange"));
    }

    #[test]
    fn refuses_what_is_no_range() {
        assert!(check(-1, 0, None).unwrap_err().starts_with("Invalid"));
        assert!(check(0, -1, None).unwrap_err().starts_with("Invalid"));
        assert!(check(2 << 30, 1 << 30, None).unwrap_err().starts_with("Invalid"));
    }
}

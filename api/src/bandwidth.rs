//! Limits of bandwidth: bytes a second, 0 for none.

use crate::quantity;

/// The lowest limit there is. Below it the pieces that many receivers wait for come so seldom that a transfer looks dead.
pub const LOWEST: u64 = 64 << 10;

/// The highest one: what the wire and the API server can carry.
pub const HIGHEST: u64 = i64::MAX as u64;

/// What a limit may be where a number is asked for, a phrase for messages.
pub const RULE_OF_NUMBERS: &str = "a whole number of bytes a second: 0 for no limit, else at least 65536 (64 KiB), below which a transfer would look dead";

/// What a limit may be where text is asked for, a phrase for messages.
pub const RULE: &str = "bytes a second, a number or a quantity like 100Mi: 0 for no limit, else at least 64Ki (65536), below which a transfer would look dead";

/// Reads a limit, such as `104857600` or `100Mi`; `None` when it is none.
///
/// ```
/// # use backing_image_api::bandwidth::parse;
/// assert_eq!((parse("100Mi"), parse("0"), parse("1Ki")), (Some(104857600), Some(0), None));
/// ```
pub fn parse(text: &str) -> Option<u64> {
    quantity::bytes(text).filter(|limit| is_possible(*limit))
}

/// Whether transfers can be held to that limit.
pub fn is_possible(limit: u64) -> bool {
    limit == 0 || (LOWEST..=HIGHEST).contains(&limit)
}

/// The stricter one of two limits.
pub fn stricter(one: u64, other: u64) -> u64 {
    match (one, other) {
        (0, limit) | (limit, 0) => limit,
        (one, other) => one.min(other),
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde gives a reference")]
pub(crate) fn is_none(limit: &u64) -> bool {
    *limit == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_none_or_one_that_can_be_kept() {
        assert!(RULE.contains(&LOWEST.to_string()) && RULE_OF_NUMBERS.contains(&LOWEST.to_string()));
        let good =
            [("0", 0), ("65536", LOWEST), ("64Ki", LOWEST), ("1.5M", 1_500_000), ("9223372036854775807", HIGHEST)];
        for (text, limit) in good {
            assert_eq!(parse(text), Some(limit), "{text}");
        }
        for bad in ["", "-1", "1", "65535", "63Ki", "fast", "9223372036854775808", "64 KiB/s"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn of_two_limits_the_stricter_one_counts() {
        let cases = [(0, 0, 0), (0, 7, 7), (7, 0, 7), (7, 9, 7), (9, 7, 7)];
        for (one, other, both) in cases {
            assert_eq!(stricter(one, other), both, "{one} {other}");
        }
    }
}

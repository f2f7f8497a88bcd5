//! Kubernetes quantities of storage: `10Gi`, `500M`, `1.5Gi`, `1e9`.

use ::api::ErrorKind;

use crate::failure::Failure;

/// Reads a quantity as a number of bytes, rounded up.
pub fn parse(text: &str) -> Result<u64, Failure> {
    let wrong = || {
        Failure::new(ErrorKind::Invalid, format!("`{text}` is not a size; write for example 10Gi, 500Mi or 1073741824"))
    };
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
        exponent if exponent.starts_with(['e', 'E']) => {
            let power: u32 = exponent[1..].parse().map_err(|_| wrong())?;
            10_u128.checked_pow(power).ok_or_else(wrong)?
        }
        _ => return Err(wrong()),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() || fraction.len() > 18 {
        return Err(wrong());
    }
    let digits = |text: &str| if text.is_empty() { Ok(0_u128) } else { text.parse::<u128>().map_err(|_| wrong()) };
    let scale = 10_u128.pow(fraction.len() as u32);
    let value = digits(whole)?
        .checked_mul(factor)
        .and_then(|w| w.checked_add((digits(fraction).ok()?.checked_mul(factor)?).div_ceil(scale)))
        .ok_or_else(wrong)?;
    digits(fraction)?;
    u64::try_from(value).map_err(|_| wrong())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_kubernetes_reads() {
        let good =
            [("10Gi", 10 << 30), ("500M", 500_000_000), ("1.5Gi", 3 << 29), ("1e3", 1000), ("42", 42), (".5Ki", 512)];
        for (text, bytes) in good {
            assert_eq!(parse(text).unwrap(), bytes, "{text}");
        }
        for bad in ["", "Gi", "10GB", "-1", "1.2.3", "99999999999Ei", "1e99"] {
            assert_eq!(parse(bad).unwrap_err().kind, ErrorKind::Invalid, "{bad}");
        }
    }
}

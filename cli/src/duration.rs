//! Durations on the command line: `90s`, `5m`, `1h30m`, or a plain number of seconds.

use std::time::Duration;

/// Reads a duration.
pub fn parse(text: &str) -> Result<Duration, String> {
    let wrong = || format!("`{text}` is not a duration; write for example 90s, 5m or 1h30m");
    if let Ok(seconds) = text.parse::<u64>() {
        return Ok(Duration::from_secs(seconds));
    }
    let (mut total, mut digits) = (Duration::ZERO, String::new());
    let mut units = text.chars().peekable();
    while let Some(c) = units.next() {
        if c.is_ascii_digit() {
            digits.push(c);
            continue;
        }
        let number: u64 = digits.parse().map_err(|_| wrong())?;
        digits.clear();
        let step = match c {
            'h' => Duration::from_secs(3600),
            'm' if units.peek() == Some(&'s') => {
                units.next();
                Duration::from_millis(1)
            }
            'm' => Duration::from_secs(60),
            's' => Duration::from_secs(1),
            _ => return Err(wrong()),
        };
        total += step.checked_mul(number.try_into().map_err(|_| wrong())?).ok_or_else(wrong)?;
    }
    if !digits.is_empty() || text.is_empty() {
        return Err(wrong());
    }
    Ok(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_people_write() {
        let seconds = |text: &str| parse(text).map(|d| d.as_secs_f64());
        assert_eq!(seconds("90"), Ok(90.0));
        assert_eq!(seconds("1h30m"), Ok(5400.0));
        assert_eq!(seconds("250ms"), Ok(0.25));
        for bad in ["", "m", "5x", "5m3", "-1s"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}

//! The last words of a log, short enough for the status of an object: one line, about 200 characters.

/// Characters that a status has for the end of a log; the log itself has the rest.
const MOST_CHARS: usize = 200;

/// The last lines that fit, in order, with ` | ` between. Of a last line that is too long, its end.
pub fn last(log: &str) -> String {
    let mut kept = String::new();
    for line in log.lines().rev().map(str::trim).filter(|line| !line.is_empty()) {
        let joined = if kept.is_empty() { line.to_owned() } else { format!("{line} | {kept}") };
        if joined.chars().count() > MOST_CHARS {
            break;
        }
        kept = joined;
    }
    if kept.is_empty() {
        let line = log.lines().rev().map(str::trim).find(|line| !line.is_empty()).unwrap_or_default();
        let excess = line.chars().count().saturating_sub(MOST_CHARS);
        let end: String = line.chars().skip(excess).collect();
        return if excess > 0 { format!("…{end}") } else { end };
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_that_fit_become_one() {
        assert_eq!(last(""), "");
        assert_eq!(last("one\n\n  two \nthree\n"), "one | two | three");
        let long = format!("{}\nlast", "x".repeat(199));
        assert_eq!(last(&long), "last");
        let words = last(&"é".repeat(300));
        assert_eq!((words.chars().count(), words.starts_with('…')), (201, true));
    }
}

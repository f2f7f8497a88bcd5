//! The word that somebody may have meant.

/// The candidate that is nearest to a word, if one is near enough to be meant.
///
/// ```
/// use backing_image_api::validation::nearest;
/// assert_eq!(nearest("checksumm", ["checksum", "secret"]), Some("checksum"));
/// assert_eq!(nearest("banana", ["checksum", "secret"]), None);
/// ```
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let wanted = plain(word);
    let distances = candidates.into_iter().map(|candidate| (distance(&wanted, &plain(candidate)), candidate));
    let (distance, candidate) = distances.min_by_key(|(distance, _)| *distance)?;
    (distance <= 1.max(word.len() / 3)).then_some(candidate)
}

/// Case and separators are what people get wrong most, so they do not count.
fn plain(word: &str) -> Vec<char> {
    word.chars().filter(|c| c.is_alphanumeric()).map(|c| c.to_ascii_lowercase()).collect()
}

/// How many characters to insert, remove or replace (Levenshtein).
fn distance(from: &[char], to: &[char]) -> usize {
    let mut previous: Vec<usize> = (0..=to.len()).collect();
    for (row, a) in from.iter().enumerate() {
        let mut current = vec![row + 1];
        for (column, b) in to.iter().enumerate() {
            let replaced = previous[column] + usize::from(a != b);
            current.push(replaced.min(previous[column + 1] + 1).min(current[column] + 1));
        }
        previous = current;
    }
    previous[to.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_what_was_meant_and_nothing_far_off() {
        let keys = ["volume-name", "export-type", "url"];
        for (word, expected) in [
            ("volumeName", Some("volume-name")),
            ("volum-name", Some("volume-name")),
            ("URL", Some("url")),
            ("urls", Some("url")),
            ("x", None),
            ("completely-different", None),
        ] {
            assert_eq!(nearest(word, keys), expected, "{word}");
        }
        assert_eq!(nearest("url", []), None);
    }
}

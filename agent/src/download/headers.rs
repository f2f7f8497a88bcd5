//! What the headers of an answer say of the file: how long it is, whether it is still the same, where a part of it begins.

use reqwest::header::{
    CONTENT_LENGTH, CONTENT_RANGE, DATE, ETAG, HeaderMap, HeaderValue, LAST_MODIFIED, TRANSFER_ENCODING,
};
use reqwest::{Response, Version};

/// The length of the file, if it is said.
pub(super) fn length(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// What proves in `If-Range` that the file is still the same: a strong ETag, else the modification time, unless that is this
/// very second, in which the file may change once more.
pub(super) fn validator(headers: &HeaderMap) -> Option<HeaderValue> {
    let strong = headers.get(ETAG).filter(|tag| !tag.as_bytes().starts_with(b"W/"));
    let old = headers.get(LAST_MODIFIED).filter(|time| headers.get(DATE) != Some(time));
    strong.or(old).cloned()
}

/// Whether a partial answer begins exactly where ours ends and is of the same whole; if so, the length of that when it says it.
pub(super) fn continues(headers: &HeaderMap, have: u64, length: Option<u64>) -> Option<Option<u64>> {
    let range = headers.get(CONTENT_RANGE).and_then(|value| value.to_str().ok()).and_then(parse_content_range);
    let (start, total) = range?;
    let is_same = length.is_none() || total.is_none() || total == length;
    (have > 0 && start == have && is_same).then_some(total)
}

/// The start and the total of `bytes 5-9/10`; none when that makes no sense. A total of `*` is not known.
pub fn parse_content_range(text: &str) -> Option<(u64, Option<u64>)> {
    let number = |text: &str| text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse::<u64>().ok()).flatten();
    let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (start, last) = range.split_once('-')?;
    let (start, last) = (number(start)?, number(last)?);
    let total = if total == "*" { None } else { Some(number(total)?) };
    (start <= last && total.is_none_or(|total| last < total)).then_some((start, total))
}

/// Whether a body without length says itself where it ends.
pub(super) fn is_framed(response: &Response) -> bool {
    response.version() >= Version::HTTP_2
        || response
            .headers()
            .get(TRANSFER_ENCODING)
            .is_some_and(|value| value.to_str().is_ok_and(|text| text.trim().to_ascii_lowercase().ends_with("chunked")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_content_range() {
        assert_eq!(parse_content_range("bytes 5-9/10"), Some((5, Some(10))));
        assert_eq!(parse_content_range("bytes 5-9/*"), Some((5, None)));
        for wrong in
            ["bytes */10", "bytes 5-4/10", "bytes 5-10/10", "bytes 5-/10", "bytes 5-9/", "bytes 5-9/x", "bytes +5-9/10"]
        {
            assert_eq!(parse_content_range(wrong), None, "{wrong}");
        }
        assert_eq!(parse_content_range("items 5-9/10"), None);
    }

    #[test]
    fn a_part_goes_on_only_where_the_last_one_ended_in_the_same_file() {
        let check = |have, length, range: &'static str| {
            continues(&HeaderMap::from_iter([(CONTENT_RANGE, HeaderValue::from_static(range))]), have, length)
        };
        assert_eq!(check(5, Some(10), "bytes 5-9/10"), Some(Some(10)));
        assert_eq!(check(5, Some(10), "bytes 5-9/*"), Some(None));
        assert_eq!(check(5, None, "bytes 5-9/10"), Some(Some(10)));
        for (have, length, range) in [
            (5, Some(10), "bytes 4-9/10"),
            (5, Some(10), "bytes 6-9/10"),
            (5, Some(10), "bytes 5-9/11"),
            (0, None, "bytes 0-9/10"),
        ] {
            assert_eq!(check(have, length, range), None, "{have} {range}");
        }
        assert_eq!(continues(&HeaderMap::new(), 5, None), None);
    }

    #[test]
    fn a_weak_tag_proves_nothing() {
        let mut headers = HeaderMap::new();
        headers.insert(ETAG, HeaderValue::from_static("W/\"a\""));
        assert_eq!(validator(&headers), None);
        headers.insert(LAST_MODIFIED, HeaderValue::from_static("Sun, 22 Nov 2026 07:00:00 GMT"));
        assert!(validator(&headers).is_some());
        headers.insert(DATE, HeaderValue::from_static("Sun, 22 Nov 2026 07:00:00 GMT"));
        assert_eq!(validator(&headers), None, "it may change once more within this second");
        headers.insert(ETAG, HeaderValue::from_static("\"a\""));
        assert_eq!(validator(&headers).unwrap(), "\"a\"");
    }
}

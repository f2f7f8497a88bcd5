//! What servers and users say about a download.

use agent::download::parse_content_range;
use agent::source_url::SourceUrl;

/// The header `Content-Range`.
pub fn content_range(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Some((start, total)) = parse_content_range(text) else { return };
    // What the parser understood stands in the text, digit by digit: leading zeroes and a sign aside.
    let number = |text: &str| text.trim_start_matches('+').trim_start_matches('0').to_owned();
    let range = text.strip_prefix("bytes ").expect("only bytes are understood");
    let (first, rest) = range.split_once('-').expect("it has a range");
    assert_eq!(number(first), number(&start.to_string()));
    let (last, all) = rest.split_once('/').expect("it has a total");
    let last: u64 = last.parse().expect("a range has an end");
    assert!(start <= last, "a range that ends before it begins");
    match total {
        Some(total) => assert!(number(all) == number(&total.to_string()) && last < total, "a range beyond the whole"),
        None => assert_eq!(all, "*", "a total that is no number"),
    }
}

/// The address of a source: what is shown of it holds no secret.
pub fn source_url(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(url) = SourceUrl::parse(text) else { return };
    assert!(matches!(url.expose().scheme(), "http" | "https"));
    let shown = url.to_string();
    let others = [api::validation::url::redact(text), shown.clone()];
    let secrets =
        [Some(url.expose().username()), url.expose().password(), url.expose().query(), url.expose().fragment()];
    // What is shown has no control characters: without them a path, which is no secret, may say the same word.
    let printed: String = text.chars().filter(|c| !c.is_control()).collect();
    let hidden = |secret: &&str| secret.starts_with("SECRET") && printed.matches(*secret).count() == 1;
    for secret in secrets.into_iter().flatten().filter(hidden) {
        assert!(!others.iter().any(|other| other.contains(secret)), "`{secret}` is shown in {others:?}");
    }
    assert!(!shown.chars().any(char::is_control), "{shown:?}");
    let plain = SourceUrl::parse(&shown.replace("<redacted>@", "").replace("?<redacted>", ""));
    let plain = plain.unwrap_or_else(|error| panic!("`{shown}` is no address without what was left out: {error}"));
    let (plain, url) = (plain.expose(), url.expose());
    assert!(plain.username().is_empty() && plain.password().is_none() && plain.query().is_none());
    assert!(plain.fragment().is_none(), "`{shown}`");
    assert_eq!((plain.host_str(), plain.port(), plain.path()), (url.host_str(), url.port(), url.path()));
}

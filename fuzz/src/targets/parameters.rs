//! StorageClass parameters, the JSON in them included.

use std::collections::BTreeMap;

use agent::source_url::SourceUrl;
use csi::{ParameterError, Parameters};

/// Text that may be cut into parameters: a JSON object of strings, or lines of `key=value`.
fn read(data: &[u8]) -> Option<BTreeMap<String, String>> {
    let text = std::str::from_utf8(data).ok()?;
    serde_json::from_str(text).ok().or_else(|| {
        let pairs = text.lines().map(|line| line.split_once('=').map(|(key, value)| (key.into(), value.into())));
        pairs.collect()
    })
}

/// [`Parameters::parse`].
pub fn parameters(data: &[u8]) {
    let Some(given) = read(data) else { return };
    match Parameters::parse(&given) {
        Ok(parameters) => accepted(&given, &parameters),
        Err(error) => refused(&given, &error),
    }
}

fn accepted(given: &BTreeMap<String, String>, parameters: &Parameters) {
    assert_eq!(parameters.differences(parameters), vec![], "a repeated request is the same request");
    assert!(parameters.number_of_replicas.is_none_or(|count| (1..=20).contains(&count)));
    assert!(parameters.stale_replica_timeout > 0);
    let tags = parameters.disk_selector.iter().chain(&parameters.node_selector);
    assert!(tags.clone().all(|tag| !tag.is_empty() && !tag.contains([' ', '\t', '\n', ','])));
    let with_blanks = given.iter().map(|(key, value)| (key.clone(), format!("  {value}\t"))).collect();
    assert_eq!(Parameters::parse(&with_blanks).as_ref(), Ok(parameters), "blanks around a value mean nothing");
    let mut more = given.clone();
    more.insert("noSuchParameter".into(), String::new());
    assert!(Parameters::parse(&more).is_err(), "an unknown key is never ignored");
    let Some(image) = &parameters.image else { return };
    let mut other = parameters.clone();
    for value in other.image.iter_mut().flat_map(|image| image.source_parameters.values_mut()) {
        value.push('x');
    }
    let differ = parameters.differences(&other).len();
    assert_eq!(differ, image.source_parameters.len(), "a change that is not shown is a change");
    assert!(given.values().any(|value| value.trim() == image.name.to_string()));
    assert!(image.min_number_of_copies.is_none_or(|count| (1..=1000).contains(&count)));
    let shown: String =
        parameters.differences(&Parameters::default()).iter().map(|d| format!("{}\n", d.wanted)).collect();
    for url in image.source_parameters.values().filter_map(|value| SourceUrl::parse(value).ok()) {
        let url = url.expose();
        let secrets = [Some(url.username()), url.password(), url.query(), url.fragment()].into_iter().flatten();
        // It may stand elsewhere as well, where it is no secret.
        let hidden = |secret: &&str| {
            let all: String = given.values().map(String::as_str).collect();
            secret.starts_with("SECRET") && all.matches(*secret).count() == 1
        };
        for secret in secrets.filter(hidden) {
            assert!(!shown.contains(secret), "`{secret}` is shown in {shown:?}");
        }
    }
}

fn refused(given: &BTreeMap<String, String>, error: &ParameterError) {
    let sentence = error.to_string();
    match error {
        ParameterError::Wrong { key, .. }
        | ParameterError::NotOffered { key, .. }
        | ParameterError::Unknown { key, .. } => {
            assert!(given.contains_key(key) && sentence.contains(key), "{sentence}");
        }
        ParameterError::Json { key, .. } | ParameterError::WithoutImage { key } => {
            assert!(given.contains_key(*key) && sentence.contains(key), "{sentence}");
        }
        ParameterError::Contradiction { first, second, .. } => {
            assert!(given.contains_key(*first) && given.contains_key(*second), "{sentence}");
        }
    }
}

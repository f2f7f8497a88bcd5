//! `docs/semantics.md` promises what tests show: every heading of level 3 has a test of the same name.
//!
//! `Keeps a thing through kill 9` is the Rust function `keeps_a_thing_through_kill_9` of a test, or Go's `TestKeepsAThingThroughKill9`.

use std::collections::BTreeSet;

/// What begins a heading that promises something.
const PROMISE: &str = "### ";

/// The names of the tests in a file, without `_` and in lower case.
pub fn tests_in(path: &str, text: &str) -> Vec<String> {
    let names: Vec<&str> = if path.ends_with("_test.go") {
        text.lines().filter_map(|line| line.strip_prefix("func Test")).collect()
    } else if path.ends_with(".rs") {
        // A suite is called from elsewhere, so the attribute is no sign.
        let tests = match text.find("#[cfg(test)]") {
            _ if path.contains("/tests/") || path.ends_with("tests.rs") => text,
            Some(start) => &text[start..],
            None => "",
        };
        tests.lines().filter_map(|line| Some(line.split_once("fn ")?.1)).collect()
    } else {
        vec![]
    };
    names.into_iter().filter_map(|rest| rest.split(['(', '<']).next()).map(plain).collect()
}

/// The headings without a test, one sentence for each.
pub fn check(path: &str, text: &str, tests: &BTreeSet<String>) -> Vec<String> {
    let mut problems = vec![];
    for (index, line) in text.lines().enumerate() {
        let Some(heading) = line.strip_prefix(PROMISE) else { continue };
        if !tests.contains(&plain(heading)) {
            let name = heading.to_lowercase().split_whitespace().collect::<Vec<_>>().join("_");
            problems.push(format!("{path}:{}: no test is called `{name}`: write it, or promise less", index + 1));
        }
    }
    problems
}

/// A name without `_` and blanks, in lower case.
pub fn plain(name: &str) -> String {
    name.chars().filter(char::is_ascii_alphanumeric).map(|c| c.to_ascii_lowercase()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(path: &str, text: &str) -> Vec<String> {
        tests_in(path, text)
    }

    #[test]
    fn finds_tests_of_both_languages() {
        assert_eq!(names("s/a_test.go", "func TestKeepsIt(t *testing.T) {\nfunc helper() {\n"), ["keepsit"]);
        assert_eq!(names("a/tests/suite/mod.rs", "pub async fn keeps_it(store: Any) {\n"), ["keepsit"]);
        assert_eq!(
            names("a/src/a.rs", "fn not_this() {}\n#[cfg(test)]\nmod tests {\n    fn keeps_it() {}\n}\n"),
            ["keepsit"]
        );
        assert!(names("a/src/a.rs", "fn not_this() {}\n").is_empty());
    }

    #[test]
    fn names_the_headings_without_a_test() {
        let tests = BTreeSet::from(["keepsit".to_owned(), "survivesx9".to_owned()]);
        let text = "# Title\n\n## Chapter\n\n### Keeps it\n\n### Survives x 9\n\n### Flies to the moon\n";
        let problems = check("docs/semantics.md", text, &tests);
        assert_eq!(problems.len(), 1);
        assert!(problems[0].starts_with("docs/semantics.md:9:") && problems[0].contains("flies_to_the_moon"));
    }
}

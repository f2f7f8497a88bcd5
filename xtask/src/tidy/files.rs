//! Rules about one file: what it begins with, how long it is, what may not stand in it.

/// Longest source file; above it there is a second noun in it.
const MAX_LINES: usize = 500;
/// Longest file of tests only.
const MAX_TEST_LINES: usize = 600;

/// Marks of unfinished or left-over code. Written in two parts so that this file passes its own check.
const UNFINISHED: [&str; 3] = [concat!("todo", "!("), concat!("unimplemented", "!("), concat!("dbg", "!(")];
/// Paths of one machine, or beside the repository.
const FOREIGN_PATHS: [&str; 2] = [concat!("/wo", "rk/"), concat!("../sha", "red")];
/// Sleeps in Rust and Go.
const SLEEPS: [&str; 3] = [concat!("thread::", "sleep("), concat!("time::", "sleep("), concat!("time.", "Sleep(")];

/// What is wrong with a file, one sentence for each finding.
pub fn check(path: &str, text: &str) -> Vec<String> {
    let mut problems = vec![];
    let rust = path.ends_with(".rs");
    let source = rust || path.ends_with(".go");
    if rust && !is_generated(path) {
        if !text.starts_with("//!") {
            problems.push(format!("{path}:1: begin with `//!` and one sentence that says what the file promises"));
        }
        let (lines, limit) = (text.lines().count(), if is_test_file(path) { MAX_TEST_LINES } else { MAX_LINES });
        if lines > limit {
            problems.push(format!("{path}: {lines} lines, at most {limit}: give its second noun a file of its own"));
        }
    }
    let mut in_tests = is_test_file(path);
    let mut previous = "";
    for (index, line) in text.lines().enumerate() {
        let place = || format!("{path}:{}", index + 1);
        in_tests |= rust && line.trim() == "#[cfg(test)]";
        if source && !is_generated(path) {
            for mark in UNFINISHED.iter().filter(|m| line.contains(**m)) {
                problems.push(format!("{}: `{mark}…` is unfinished code: finish it, or answer Unsupported", place()));
            }
            let explained = |line: &str| {
                line.split_once("// ").is_some_and(|(_, c)| c.starts_with("poll") || c.starts_with("Not a wait"))
            };
            if in_tests && !explained(line) && !explained(previous) && SLEEPS.iter().any(|s| line.contains(s)) {
                problems.push(format!(
                    "{}: a test does not sleep: wait for a condition (between two probes of one say `// poll`; else `// Not a wait: …` and why)",
                    place()
                ));
            }
        }
        if path != ".gitignore" {
            for foreign in FOREIGN_PATHS.iter().filter(|p| line.contains(**p)) {
                problems.push(format!("{}: `{foreign}` is a path outside of the repository", place()));
            }
        }
        previous = line;
    }
    problems
}

fn is_generated(path: &str) -> bool {
    path.contains("/generated/")
}

fn is_test_file(path: &str) -> bool {
    path.ends_with("/tests.rs") || path.contains("/tests/") || path.ends_with("_test.go")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(path: &str, text: &str) -> usize {
        let found = check(path, text);
        assert!(found.iter().all(|p| p.starts_with(path)), "{found:?}");
        found.len()
    }

    #[test]
    fn wants_a_promise_at_the_top_of_every_file() {
        assert_eq!(problems("api/src/a.rs", "//! A.\n"), 0);
        assert_eq!(problems("api/src/a.rs", "use b;\n"), 1);
        assert_eq!(problems("proto/src/generated/a.rs", "use b;\n"), 0);
    }

    #[test]
    fn limits_the_length_of_a_file() {
        let text = |lines: usize| "//! A.\n".repeat(lines);
        assert_eq!(problems("a/src/a.rs", &text(MAX_LINES)), 0);
        assert_eq!(problems("a/src/a.rs", &text(MAX_LINES + 1)), 1);
        assert_eq!(problems("a/src/a/tests.rs", &text(MAX_TEST_LINES)), 0);
        assert_eq!(problems("a/tests/a.rs", &text(MAX_TEST_LINES + 1)), 1);
        assert_eq!(problems("a/src/generated/a.rs", &text(5000)), 0);
    }

    #[test]
    fn finds_unfinished_code() {
        for mark in UNFINISHED {
            assert_eq!(problems("a/src/a.rs", &format!("//! A.\nfn f() {{ {mark}) }}\n")), 1, "{mark}");
        }
    }

    #[test]
    fn finds_paths_outside_of_the_repository_in_any_text() {
        for path in FOREIGN_PATHS {
            assert_eq!(problems("README.md", &format!("see {path}x\n")), 1, "{path}");
        }
        assert_eq!(problems(".gitignore", FOREIGN_PATHS[0]), 0);
    }

    #[test]
    fn finds_sleeps_in_tests_only() {
        for sleep in SLEEPS {
            let call = format!("{sleep}second);");
            assert_eq!(problems("a/src/a.rs", &format!("//! A.\n{call}\n")), 0, "{sleep}");
            assert_eq!(
                problems("a/src/a.rs", &format!("//! A.\n#[cfg(test)]\nmod tests {{\n{call}\n}}\n")),
                1,
                "{sleep}"
            );
            assert_eq!(problems("a/tests/a.rs", &format!("//! A.\n{call}\n")), 1, "{sleep}");
            assert_eq!(problems("s/a_test.go", &format!("package s\n{call}\n")), 1, "{sleep}");
            assert_eq!(
                problems("a/tests/a.rs", &format!("//! A.\n{call} // poll\n// poll again\n{call}\n")),
                0,
                "{sleep}"
            );
        }
    }
}

//! `docs/faults.md` lists faults, `docs/longhorn-flows.md` flows, and what shows that they are survived and work: every row names tests
//! that exist, in its last column.

use std::collections::BTreeSet;

use super::promises::plain;

/// The rows without a test, and the tests that do not exist, one sentence for each.
pub fn check(path: &str, text: &str, tests: &BTreeSet<String>) -> Vec<String> {
    let mut problems = vec![];
    let mut is_head = true;
    for (index, line) in text.lines().enumerate() {
        let Some(row) = line.trim().strip_prefix('|') else {
            is_head = true;
            continue;
        };
        // The line of dashes ends the head of a table.
        if is_head {
            is_head = !row.contains("---");
            continue;
        }
        let last = row.trim_end_matches('|').rsplit('|').next().unwrap_or_default();
        let named: Vec<&str> = last.split('`').skip(1).step_by(2).collect();
        if named.is_empty() {
            problems
                .push(format!("{path}:{}: this row has no test in its last column: name it in backticks", index + 1));
        }
        for name in named {
            // Of Go's `TestX/case` the function is what can be looked for.
            let function = name.split('/').next().unwrap_or(name);
            let function = function.strip_prefix("Test").unwrap_or(function);
            if !tests.contains(&plain(function)) {
                problems
                    .push(format!("{path}:{}: no test is called `{name}`: write it, or correct the name", index + 1));
            }
        }
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_names_tests_that_exist() {
        let tests = BTreeSet::from(["keepsit".to_owned(), "saysit".to_owned()]);
        let text = "# Faults\n\n| fault | test |\n| --- | --- |\n| a `b` | `keeps_it`, `TestSaysIt/once` |\n| c | none |\n\
                    | d | `flies` |\n\ntext\n\n| x | test |\n|---|---|\n| e | `TestFalls` |\n";
        let problems = check("docs/faults.md", text, &tests);
        assert_eq!(problems.len(), 3, "{problems:?}");
        assert!(problems[0].starts_with("docs/faults.md:6: this row has no test"));
        assert!(problems[1].contains(":7:") && problems[1].contains("`flies`"));
        assert!(problems[2].contains(":13:") && problems[2].contains("`TestFalls`"));
    }
}

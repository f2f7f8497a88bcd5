//! SPDX license expressions: `MIT OR (Apache-2.0 AND ISC)`, with the old `MIT/Apache-2.0` for `OR`.

use std::collections::BTreeSet;

/// Whether the licenses that are allowed suffice for an expression; the error says why not.
pub fn allowed(expression: &str, allow: &BTreeSet<String>) -> Result<(), String> {
    let spaced = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
    let mut tokens = Tokens { words: spaced.split_whitespace().collect(), at: 0 };
    match tokens.any(allow) {
        Some(true) if tokens.at == tokens.words.len() => Ok(()),
        Some(false) if tokens.at == tokens.words.len() => {
            Err(format!("license `{expression}` is not allowed by `licenses.allow` of deny.toml"))
        }
        _ => Err(format!("license `{expression}` is not an SPDX expression")),
    }
}

struct Tokens<'a> {
    words: Vec<&'a str>,
    at: usize,
}

impl Tokens<'_> {
    fn take(&mut self, word: &str) -> bool {
        let found = self.words.get(self.at) == Some(&word);
        self.at += usize::from(found);
        found
    }

    /// `all (OR all)*`
    fn any(&mut self, allow: &BTreeSet<String>) -> Option<bool> {
        let mut result = self.all(allow)?;
        while self.take("OR") {
            result |= self.all(allow)?;
        }
        Some(result)
    }

    /// `one (AND one)*`
    fn all(&mut self, allow: &BTreeSet<String>) -> Option<bool> {
        let mut result = self.one(allow)?;
        while self.take("AND") {
            result &= self.one(allow)?;
        }
        Some(result)
    }

    /// `( any )`, or a license with or without an exception.
    fn one(&mut self, allow: &BTreeSet<String>) -> Option<bool> {
        if self.take("(") {
            let result = self.any(allow)?;
            return self.take(")").then_some(result);
        }
        let mut name = (*self.words.get(self.at)?).to_owned();
        if matches!(name.as_str(), "OR" | "AND" | "WITH" | ")") {
            return None;
        }
        self.at += 1;
        if self.take("WITH") {
            name = format!("{name} WITH {}", self.words.get(self.at)?);
            self.at += 1;
        }
        Some(allow.contains(&name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(expression: &str) -> Result<(), String> {
        allowed(expression, &["MIT", "ISC", "Apache-2.0 WITH LLVM-exception"].map(String::from).into())
    }

    #[test]
    fn one_alternative_suffices() {
        for good in [
            "MIT",
            "GPL-3.0-only OR MIT",
            "MIT/Apache-2.0",
            "Apache-2.0 / MIT",
            "Apache-2.0 WITH LLVM-exception OR GPL-2.0",
        ] {
            assert_eq!(check(good), Ok(()), "{good}");
        }
    }

    #[test]
    fn every_part_of_a_conjunction_is_needed() {
        assert_eq!(check("ISC AND (Apache-2.0 OR MIT)"), Ok(()));
        for bad in ["MIT AND GPL-3.0-only", "GPL-3.0-only", "Apache-2.0", "Apache-2.0 WITH Classpath-exception-2.0"] {
            assert!(check(bad).unwrap_err().contains("not allowed"), "{bad}");
        }
    }

    #[test]
    fn says_when_it_cannot_read_an_expression() {
        for bad in ["", "MIT OR", "(MIT", "MIT ISC", "OR MIT"] {
            assert!(check(bad).unwrap_err().contains("not an SPDX expression"), "{bad}");
        }
    }
}

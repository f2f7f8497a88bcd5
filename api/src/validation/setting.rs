//! Setting: known names and legal values.

use crate::Setting;
use crate::setting::{KNOWN, known};

use super::{FieldErrors, Mistakes, nearest};

/// Whether a setting may be stored.
pub fn check(setting: &Setting) -> Result<(), FieldErrors> {
    let mut mistakes = Mistakes::default();
    let name = setting.metadata.name.as_deref().unwrap_or_default();
    match known(name) {
        Some(known) if known.accepts(&setting.value) => {}
        Some(known) => {
            let rule = format!("setting `{name}` must be {}; the default is {}", known.rule, shown(known.default));
            mistakes.add("value", &setting.value, rule);
        }
        None => {
            let names = KNOWN.iter().map(|known| known.name);
            let hint = match nearest(name, names.clone()) {
                Some(meant) => format!("did you mean `{meant}`?"),
                None => format!("known are {}", names.collect::<Vec<_>>().join(", ")),
            };
            mistakes.add("metadata.name", name, format!("there is no such setting; {hint}"));
        }
    }
    mistakes.result()
}

fn shown(default: &str) -> &str {
    if default.is_empty() { "empty" } else { default }
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};

    use super::*;

    fn named(name: &str) -> Setting {
        let mut setting = Setting::default();
        setting.metadata.name = Some(name.into());
        setting
    }

    fn check(name: &str, value: &str, expected: Expect) {
        let setting = Setting { value: value.into(), ..named(name) };
        expected.assert_eq(&super::check(&setting).map_or_else(|e| e.to_string(), |()| "fine".into()));
    }

    #[test]
    fn a_bad_value_of_a_setting_is_refused_with_its_range() {
        for known in &KNOWN {
            check(known.name, known.default, expect!["fine"]);
            let bad = "no/such value";
            let said = format!(
                "value is `{bad}`: setting `{}` must be {}; the default is {}",
                known.name,
                known.rule,
                shown(known.default)
            );
            let setting = Setting { value: bad.into(), ..named(known.name) };
            assert_eq!(super::check(&setting).unwrap_err().to_string(), said);
        }
        check("default-replica-count", "2", expect!["fine"]);
        check(
            "default-replica-count",
            "0",
            expect![
                "value is `0`: setting `default-replica-count` must be a whole number, at least 1; the default is 3"
            ],
        );
        check(
            "default-replica-count",
            "",
            expect!["value: setting `default-replica-count` must be a whole number, at least 1; the default is 3"],
        );
        check(
            "storage-reserved-percentage-for-default-disk",
            "101",
            expect![
                "value is `101`: setting `storage-reserved-percentage-for-default-disk` must be percent, 0 to 100; the default is 30"
            ],
        );
        check(
            "backing-image-allowed-source-addresses",
            "localhost",
            expect![
                "value is `localhost`: setting `backing-image-allowed-source-addresses` must be addresses and networks like 127.0.0.1, 127.0.0.0/8 or ::1 with commas between, or empty; the default is empty"
            ],
        );
    }

    #[test]
    fn an_unknown_setting_is_refused_with_the_nearest_known_one() {
        check(
            "defaultReplicaCount",
            "2",
            expect![
                "metadata.name is `defaultReplicaCount`: there is no such setting; did you mean `default-replica-count`?"
            ],
        );
        for known in &KNOWN {
            let typo = known.name.replacen('-', "", 1);
            let said = super::check(&named(&typo)).unwrap_err().to_string();
            assert!(said.ends_with(&format!("did you mean `{}`?", known.name)), "{said}");
        }
        let said = super::check(&named("color")).unwrap_err().to_string();
        let names: Vec<&str> = KNOWN.iter().map(|known| known.name).collect();
        let list = names.join(", ");
        assert_eq!(said, format!("metadata.name is `color`: there is no such setting; known are {list}"));
    }
}

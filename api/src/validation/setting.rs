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
            let rule = format!("setting `{name}` must be {}; the default is {}", known.rule, known.default);
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

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};

    use super::*;

    fn check(name: &str, value: &str, expected: Expect) {
        let mut setting = Setting { value: value.into(), ..Setting::default() };
        setting.metadata.name = Some(name.into());
        expected.assert_eq(&super::check(&setting).map_or_else(|e| e.to_string(), |()| "fine".into()));
    }

    #[test]
    fn knows_names_and_ranges() {
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
            "allow-empty-node-selector-volume",
            "yes",
            expect![
                "value is `yes`: setting `allow-empty-node-selector-volume` must be true or false; the default is true"
            ],
        );
        check(
            "defaultReplicaCount",
            "2",
            expect![
                "metadata.name is `defaultReplicaCount`: there is no such setting; did you mean `default-replica-count`?"
            ],
        );
        check(
            "color",
            "red",
            expect![[
                "metadata.name is `color`: there is no such setting; known are default-replica-count, default-min-number-of-backing-image-copies, concurrent-backing-image-replenish-per-node-limit, backing-image-cleanup-wait-interval, backing-image-recovery-wait-interval, allow-empty-node-selector-volume, allow-empty-disk-selector-volume, storage-over-provisioning-percentage, create-default-disk-labeled-nodes, default-data-path, storage-reserved-percentage-for-default-disk, backing-image-scrub-interval, orphan-backing-image-auto-deletion"
            ]],
        );
    }
}

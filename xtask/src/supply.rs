//! Licenses, bans, sources and duplicates of the dependency graph, by the rules of `deny.toml`.
//!
//! `cargo deny` is used where it is installed; otherwise the check here, which reads the same file (docs/decisions/0002-supply-check.md).

mod license;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, bail};
use toml_edit::{DocumentMut, Item};

use crate::metadata::Package;

/// Checks the graph; fails with the list of what is wrong.
pub fn run(root: &Path) -> anyhow::Result<()> {
    let mut deny = Command::new("cargo");
    deny.arg("deny").current_dir(root);
    if deny.arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|s| s.success()) {
        let status =
            Command::new("cargo").args(["deny", "check", "bans", "licenses", "sources"]).current_dir(root).status()?;
        if !status.success() {
            bail!("cargo deny found problems");
        }
        return Ok(());
    }
    let rules = Rules::parse(&std::fs::read_to_string(root.join("deny.toml")).context("cannot read deny.toml")?)?;
    let problems = rules.check(&crate::metadata::load(root)?.packages, &crate::metadata::built(root)?);
    for problem in &problems {
        eprintln!("supply: {problem}");
    }
    if !problems.is_empty() {
        bail!("{} packages break a rule of deny.toml", problems.len());
    }
    Ok(())
}

/// The part of `deny.toml` that we check.
#[derive(Debug)]
struct Rules {
    licenses: BTreeSet<String>,
    banned: BTreeSet<String>,
    /// `name@version`.
    skipped: BTreeSet<String>,
    registries: BTreeSet<String>,
}

impl Rules {
    fn parse(text: &str) -> anyhow::Result<Rules> {
        let document: DocumentMut = text.parse().context("deny.toml is not valid TOML")?;
        let list = |section: &str, key: &str| -> anyhow::Result<BTreeSet<String>> {
            let array = document.get(section).and_then(|s| s.get(key)).and_then(Item::as_array);
            let array = array.with_context(|| format!("deny.toml: `{section}.{key}` is not a list"))?;
            let names = array.iter().map(|value| {
                let name = value.as_str().or_else(|| value.as_inline_table()?.get("crate")?.as_str());
                Ok(name.with_context(|| format!("deny.toml: an entry of `{section}.{key}` names nothing"))?.to_owned())
            });
            names.collect()
        };
        Ok(Rules {
            licenses: list("licenses", "allow")?,
            banned: list("bans", "deny")?,
            skipped: list("bans", "skip")?,
            registries: list("sources", "allow-registry")?,
        })
    }

    /// What is wrong with the packages that are built (`name@version`).
    fn check(&self, packages: &[Package], built: &BTreeSet<String>) -> Vec<String> {
        let packages: Vec<&Package> = packages.iter().filter(|p| built.contains(&p.at_version())).collect();
        let mut problems = vec![];
        let mut versions: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        for package in &packages {
            let (name, version) = (package.name.as_str(), package.version.as_str());
            if let Err(reason) = license::allowed(package.license.as_deref().unwrap_or(""), &self.licenses) {
                problems.push(format!("{name} {version}: {reason}"));
            }
            if self.banned.contains(name) {
                problems
                    .push(format!("{name} {version}: banned in deny.toml; `cargo tree -i {name}` says who uses it"));
            }
            let Some(source) = &package.source else { continue };
            if !self.registries.iter().any(|r| source == &format!("registry+{r}")) {
                problems.push(format!("{name} {version}: comes from `{source}`, which deny.toml does not allow"));
            }
            if !self.skipped.contains(&package.at_version()) {
                versions.entry(name).or_default().insert(version);
            }
        }
        for (name, versions) in versions.iter().filter(|(_, v)| v.len() > 1) {
            let versions = versions.iter().copied().collect::<Vec<_>>().join(", ");
            problems.push(format!(
                "{name}: versions {versions} at once; update, or list the second one in `bans.skip` of deny.toml"
            ));
        }
        for stale in self.skipped.difference(built) {
            problems.push(format!("{stale}: listed in `bans.skip` of deny.toml but not in the graph: remove the line"));
        }
        problems
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: &str = r#"
        [licenses]
        allow = ["MIT"]
        [bans]
        deny = [{ crate = "bad" }]
        skip = [{ crate = "old@1.0.0", reason = "forced" }]
        [sources]
        allow-registry = ["https://index"]
    "#;

    fn problems(packages: &[(&str, &str, &str, &str)]) -> Vec<String> {
        let packages: Vec<Package> = [("old", "1.0.0", "MIT", "registry+https://index")]
            .iter()
            .chain(packages)
            .map(|(name, version, license, source)| Package {
                id: format!("{name}@{version}"),
                name: (*name).into(),
                version: (*version).into(),
                license: Some((*license).into()),
                source: Some((*source).into()),
                manifest_path: String::new(),
                dependencies: vec![],
            })
            .collect();
        let built = packages.iter().map(Package::at_version).filter(|p| p != "unused@1.0.0").collect();
        Rules::parse(RULES).unwrap().check(&packages, &built)
    }

    #[test]
    fn accepts_what_the_rules_allow() {
        assert_eq!(problems(&[("a", "1.0.0", "MIT", "registry+https://index")]), Vec::<String>::new());
        assert_eq!(problems(&[("old", "2.0.0", "MIT", "registry+https://index")]), Vec::<String>::new());
        assert_eq!(problems(&[("unused", "1.0.0", "GPL-3.0-only", "git+https://elsewhere")]), Vec::<String>::new());
    }

    #[test]
    fn finds_a_license_a_ban_a_source_and_a_second_version() {
        assert_eq!(problems(&[("a", "1.0.0", "GPL-3.0-only", "registry+https://index")]).len(), 1);
        assert_eq!(problems(&[("bad", "1.0.0", "MIT", "registry+https://index")]).len(), 1);
        assert_eq!(problems(&[("a", "1.0.0", "MIT", "git+https://elsewhere")]).len(), 1);
        let twice = [("a", "1.0.0", "MIT", "registry+https://index"), ("a", "2.0.0", "MIT", "registry+https://index")];
        assert_eq!(problems(&twice).len(), 1);
    }

    #[test]
    fn finds_an_exception_that_nobody_needs_any_more() {
        let rules = Rules::parse(RULES).unwrap();
        assert_eq!(rules.check(&[], &BTreeSet::new()).len(), 1);
    }

    #[test]
    fn refuses_a_file_without_its_sections() {
        assert!(Rules::parse("[licenses]\nallow = []\n").is_err());
    }
}

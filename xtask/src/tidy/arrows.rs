//! Arrows between rooms: what a crate may use, read from the code map in `ARCHITECTURE.md` and compared with the manifests.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, bail};

use crate::metadata::Metadata;

/// What the code map calls "capabilities".
const CAPABILITIES: [&str; 5] = ["store", "workloads", "engine", "dataplane", "runtime"];
/// External crates that would make a decision depend on more than what it was given.
const IMPURE: [&str; 8] = ["tokio", "rand", "reqwest", "tonic", "rustix", "libc", "hyper", "axum"];

/// Room → rooms that it may use, itself excluded.
type Map = BTreeMap<String, BTreeSet<String>>;

/// What is wrong with the manifests. Dev-dependencies are free: a test may join what the product keeps apart.
pub fn check(architecture: &str, metadata: &Metadata) -> anyhow::Result<Vec<String>> {
    let allowed = closure(&parse(architecture)?);
    let mut problems = vec![];
    for package in metadata.packages.iter().filter(|p| metadata.workspace_members.contains(&p.id)) {
        let room = package.room();
        let Some(may_use) = allowed.get(room) else {
            problems.push(format!("{room}/Cargo.toml: room `{room}` is missing in the code map of ARCHITECTURE.md"));
            continue;
        };
        for dependency in package.dependencies.iter().filter(|d| d.kind.as_deref() != Some("dev")) {
            match dependency.path.as_deref().and_then(|p| p.rsplit('/').next()) {
                Some(used) if !may_use.contains(used) => problems.push(format!(
                    "{room}/Cargo.toml: `{room}` may not use `{used}` (code map of ARCHITECTURE.md): let them meet through objects in the store or `proto/`"
                )),
                None if room == "planner" && IMPURE.contains(&dependency.name.as_str()) => problems.push(format!(
                    "planner/Cargo.toml: decisions are pure, `{}` is not: observe it elsewhere and pass it in",
                    dependency.name
                )),
                _ => {}
            }
        }
    }
    Ok(problems)
}

/// The rows of the code map.
fn parse(architecture: &str) -> anyhow::Result<Map> {
    let section = architecture.split("## Code map").nth(1).context("ARCHITECTURE.md has no section `Code map`")?;
    let section = section.split("\n## ").next().unwrap_or(section);
    let rows: Vec<(String, String)> = section
        .lines()
        .filter_map(|line| {
            let cells: Vec<&str> = line.trim().trim_matches('|').split(" |").map(str::trim).collect();
            let room = cells.first()?.strip_prefix('`')?.strip_suffix("/`")?;
            Some((room.to_owned(), cells.last()?.trim().to_owned()))
        })
        .collect();
    if rows.is_empty() {
        bail!("the code map of ARCHITECTURE.md has no rows");
    }
    let rooms: BTreeSet<String> = rows.iter().map(|(room, _)| room.clone()).collect();
    let mut map = Map::new();
    for (room, cell) in &rows {
        let mut may_use = BTreeSet::new();
        for word in cell.split(',').map(str::trim).filter(|w| !w.is_empty()) {
            match word {
                "everything" => may_use.extend(rooms.iter().cloned()),
                "capabilities" => may_use.extend(CAPABILITIES.map(String::from)),
                "the binary" => {}
                word if rooms.contains(word) => _ = may_use.insert(word.to_owned()),
                word => bail!("the code map of ARCHITECTURE.md lets `{room}` use `{word}`, which is no room"),
            }
        }
        may_use.remove(room);
        map.insert(room.clone(), may_use);
    }
    Ok(map)
}

/// Arrows may skip a level: whoever may use a room may use what that room may use.
fn closure(map: &Map) -> Map {
    let mut closed = map.clone();
    loop {
        let mut grown = closed.clone();
        for (room, may_use) in &closed {
            let more =
                may_use.iter().filter_map(|used| closed.get(used)).flatten().filter(|more| *more != room).cloned();
            grown.get_mut(room).expect("the same keys").extend(more.collect::<Vec<_>>());
        }
        if grown == closed {
            return closed;
        }
        closed = grown;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metadata::{Dependency, Package};

    const ARCHITECTURE: &str = "# A\n\n## Code map\n\n| room | what it knows | may use |\n| --- | --- | --- |\n| `api/` | nouns | |\n\
        | `planner/` | decisions | api |\n| `runtime/` | plumbing | api |\n| `store/` | objects | api, runtime |\n\
        | `csi/` | role | store, planner |\n| `agent/` | role | store |\n| `cli/` | all | everything |\n\n## Next\n\n| `no/` | room | csi |\n";

    fn problems(room: &str, dependencies: &[(&str, Option<&str>)]) -> Vec<String> {
        let package = Package {
            id: room.into(),
            name: room.into(),
            version: "0.1.0".into(),
            license: None,
            source: None,
            manifest_path: format!("/x/{room}/Cargo.toml"),
            dependencies: dependencies
                .iter()
                .map(|(name, kind)| Dependency {
                    name: (*name).into(),
                    kind: kind.map(String::from),
                    path: ARCHITECTURE.contains(&format!("`{name}/`")).then(|| format!("/x/{name}")),
                })
                .collect(),
        };
        let metadata = Metadata { packages: vec![package], workspace_members: vec![room.into()] };
        check(ARCHITECTURE, &metadata).unwrap()
    }

    #[test]
    fn arrows_point_down_and_may_skip_a_level() {
        assert_eq!(problems("csi", &[("store", None), ("api", None), ("tokio", None)]), Vec::<String>::new());
        assert_eq!(problems("cli", &[("csi", None), ("agent", None)]), Vec::<String>::new());
    }

    #[test]
    fn roles_never_use_each_other_except_in_tests() {
        assert_eq!(problems("csi", &[("agent", None)]).len(), 1);
        assert_eq!(problems("csi", &[("agent", Some("build"))]).len(), 1);
        assert_eq!(problems("csi", &[("agent", Some("dev"))]).len(), 0);
        assert_eq!(problems("store", &[("csi", None)]).len(), 1);
    }

    #[test]
    fn decisions_are_pure() {
        assert_eq!(problems("planner", &[("tokio", None), ("serde", None)]).len(), 1);
    }

    #[test]
    fn every_crate_has_a_row_in_the_code_map() {
        assert_eq!(problems("helpers", &[]).len(), 1);
    }

    #[test]
    fn refuses_a_code_map_that_names_no_room() {
        assert!(parse(&ARCHITECTURE.replace("store, planner", "store, plans")).is_err());
        assert!(parse("# nothing\n").is_err());
    }
}

//! Replays every kept input, and compares the qcow2 files among them with what QEMU sees in them.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use backing_image_fuzz::{TARGETS, folder};

/// The kept inputs of a target.
fn inputs(target: &str) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = ["corpus", "regressions"]
        .into_iter()
        .filter_map(|kind| std::fs::read_dir(folder(kind, target)).ok())
        .flat_map(|entries| entries.map(|entry| entry.unwrap().path()))
        .collect();
    paths.sort();
    paths
}

#[test]
fn every_kept_input_keeps_the_promises() {
    let mut broken = vec![];
    for (name, target) in TARGETS {
        let inputs = inputs(name);
        assert!(!inputs.is_empty(), "`{name}` has no inputs: cargo run -p backing-image-fuzz --example seeds");
        for path in inputs {
            let bytes = std::fs::read(&path).unwrap();
            if std::panic::catch_unwind(|| target(&bytes)).is_err() {
                broken.push(path);
            }
        }
    }
    assert!(broken.is_empty(), "broken by {broken:#?}");
}

#[test]
fn the_folders_of_the_corpus_are_the_targets_and_stay_small() {
    let corpus = folder("corpus", "");
    let mut names: Vec<_> = std::fs::read_dir(&corpus).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, TARGETS.iter().map(|(name, _)| *name).collect::<Vec<_>>());
    let sizes: Vec<u64> =
        TARGETS.iter().flat_map(|(name, _)| inputs(name)).map(|path| path.metadata().unwrap().len()).collect();
    assert!(sizes.len() < 400 && sizes.iter().sum::<u64>() < 1 << 20, "{} files", sizes.len());
}

/// What QEMU says about a file; `None` when it refuses it.
fn qemu_sees(path: &Path) -> Option<serde_json::Value> {
    let name = format!(
        "json:{}",
        serde_json::json!({"driver": "qcow2", "file": {"driver": "file", "filename": path}, "backing": null})
    );
    let output =
        Command::new("qemu-img").args(["info", "--output=json", &name]).output().expect("qemu-img is installed");
    output.status.success().then(|| serde_json::from_slice(&output.stdout).unwrap())
}

#[test]
fn an_accepted_qcow2_file_is_to_qemu_what_it_is_to_us() {
    let mut accepted = 0;
    for path in inputs("qcow2_file") {
        let file = File::open(&path).unwrap();
        let verdict = agent::qcow2::inspect(&file, file.metadata().unwrap().len());
        let seen = qemu_sees(&path);
        let reaches_out = seen.as_ref().is_some_and(|info| {
            let data = &info["format-specific"]["data"];
            [&info["backing-filename"], &info["encrypted"], &info["snapshots"], &data["data-file"]]
                .iter()
                .any(|v| !v.is_null())
        });
        match verdict {
            Err(_) => {}
            Ok(_) if reaches_out => panic!("{}: accepted, but QEMU sees {seen:?}", path.display()),
            Ok(header) => {
                let seen = seen.unwrap_or_else(|| panic!("{}: accepted, but QEMU refuses it", path.display()));
                assert_eq!(seen["virtual-size"], header.virtual_size_bytes, "{}", path.display());
                accepted += 1;
            }
        }
    }
    assert!(accepted >= 7, "only {accepted} files were compared");
}

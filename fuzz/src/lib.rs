//! Fuzz targets: what the parsers that meet foreign bytes promise about every input.
//!
//! A target is a plain function that panics when a promise is broken. `cargo xtask fuzz` runs it under libFuzzer with our crates
//! instrumented; `cargo test` replays `corpus/` (inputs that reach much of the code) and `regressions/` (inputs that once broke
//! a promise). Both folders have one folder for each target.

mod targets;

use std::path::PathBuf;

/// A function that panics when these bytes make a parser break its promise.
pub type Target = fn(&[u8]);

/// All targets by name.
pub const TARGETS: &[(&str, Target)] = &[
    ("content_range", targets::http::content_range),
    ("file_config", targets::json::file_config),
    ("fuse_request", targets::fuse::request),
    ("json_lines", targets::json::lines),
    ("manifest", targets::manifest::manifest),
    ("nbd_client", targets::nbd_client::handshake),
    ("nbd_handshake", targets::nbd_server::handshake),
    ("nbd_replica", targets::nbd_client::replies),
    ("nbd_session", targets::nbd_server::session),
    ("parameters", targets::parameters::parameters),
    ("qcow2_file", targets::qcow2::file),
    ("qcow2_header", targets::qcow2::header),
    ("source_url", targets::http::source_url),
];

/// The target of that name.
pub fn target(name: &str) -> Option<Target> {
    TARGETS.iter().find(|(known, _)| *known == name).map(|(_, target)| *target)
}

/// The folder of this crate that keeps inputs of one kind (`corpus`, `regressions`) for a target.
pub fn folder(kind: &str, target: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(kind).join(target)
}

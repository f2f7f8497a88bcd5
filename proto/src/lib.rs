//! Wire contracts and their generated code.
//!
//! `cargo xtask generate` writes `src/generated/` from the `.proto` files; the result is committed, so that a build needs no compiler of them.

/// Longhorn's backing image manager API.
#[allow(clippy::all, clippy::allow_attributes_without_reason, missing_docs, reason = "generated code")]
pub mod bimrpc {
    include!("generated/bimrpc.rs");
}

/// The Container Storage Interface.
#[allow(clippy::all, clippy::allow_attributes_without_reason, missing_docs, rustdoc::all, reason = "generated code")]
pub mod csi {
    include!("generated/csi.v1.rs");
}

/// The key of the metadata in which a refusal of a role carries the name of its `ErrorKind`, which gRPC codes do not tell.
pub const ERROR_KIND_KEY: &str = "error-kind";

pub mod engine;
pub mod generation;
pub mod replica;

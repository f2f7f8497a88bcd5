//! Role: image files of one disk.
//!
//! Two processes are made from this crate. The **data source** ([`data_source::run`]) makes the first file of an image;
//! the **manager** ([`manager::run`]) owns every image file of one disk: it takes the first file over, receives further
//! copies from other managers, serves its copies to them, verifies and deletes.
//!
//! Files lie where Longhorn puts them ([`layout`]), with a chunk manifest ([`manifest`]) beside each.

pub mod bandwidth;
pub mod client;
pub mod config_file;
pub mod data_source;
mod direct;
pub mod download;
mod durable;
pub mod error;
mod http_client;
pub mod ingest;
pub mod layout;
pub mod limits;
pub mod manager;
pub mod manifest;
mod metrics;
pub mod peer;
pub mod qcow2;
mod seal;
pub mod sha512;
mod source_guard;
pub mod source_url;
mod sparse;
pub mod ssync;
mod survey;
pub mod sync;
mod unfinished;
mod verify;

pub use error::AgentError;

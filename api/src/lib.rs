//! Nouns: custom resources, typed ids, conditions, error kinds. Plain data, no I/O.
//!
//! Resources carry Longhorn's group, version, kinds and field names (`longhorn.io/v1beta2`), so that manifests and clients written
//! for Longhorn work unchanged. Fields that Longhorn does not have are marked "Ours" in their doc comment.
//! Fields that we do not know are kept: every spec and status ends in an `other` map.

pub mod bandwidth;
pub mod condition;
pub mod crd;
pub mod data_source;
pub mod engine;
pub mod error;
pub mod event;
pub mod generations;
pub mod ids;
pub mod image;
pub mod manager;
pub mod metrics;
pub mod names;
pub mod node;
pub mod owner;
pub mod quantity;
pub mod replica;
pub mod secrets;
pub mod setting;
pub mod source_address;
pub mod unknown;
pub mod validation;
pub mod volume;

pub use condition::{Condition, ConditionStatus};
pub use data_source::BackingImageDataSource;
pub use engine::Engine;
pub use error::ErrorKind;
pub use image::BackingImage;
pub use manager::BackingImageManager;
pub use node::Node;
pub use owner::Owner;
pub use replica::Replica;
pub use secrets::Secrets;
pub use setting::Setting;
pub use unknown::Unknown;
pub use volume::Volume;

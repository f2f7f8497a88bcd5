//! Decisions: an observed world in, actions out; pure.
//!
//! Every `decide` is total and deterministic: the time and a random value are part of what was observed, maps are ordered, and
//! nothing here waits, reads or writes. Decisions converge: once the actions took effect, `decide` plans nothing more.

pub mod concern;
pub mod data_source;
pub mod disk;
pub mod generations;
pub mod image;
pub mod manager;
pub mod news;
pub mod node;
pub mod placement;
pub mod retry;
pub mod setting;
pub mod volume;
pub mod why;
pub mod workload;

//! Decisions: an observed world in, actions out; pure.
pub mod why;

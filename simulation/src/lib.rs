//! The control plane in a seeded fake world.

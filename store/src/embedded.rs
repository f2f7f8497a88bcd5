//! The embedded store: objects in one redb file.

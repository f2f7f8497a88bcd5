//! Role: CSI Identity, Controller and Node services.

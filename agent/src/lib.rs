//! Role: image files of one disk.

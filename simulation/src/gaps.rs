//! What the control plane does not do yet, as the simulation found it. Each constant holds one operation back or relaxes one check;
//! whoever closes the gap sets it and sees the simulation pass.

/// What no manager remembers is removed: files of images that were deleted while their disk was off its node, and what a preparation
/// left on a disk whose manager had not heard of it yet.
pub const ORPHANS_ARE_REMOVED: bool = false;

/// What a preparation left in `tmp/` that was given up goes at once, and not only with the copy on that disk.
pub const ABANDONED_PREPARATIONS_GO: bool = false;

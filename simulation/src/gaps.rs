//! What the control plane does not do yet, as the simulation found it. Each constant holds one operation back or relaxes one check;
//! whoever closes the gap sets it and sees the simulation pass.

/// Users take keys out of `spec.diskFileSpecMap`. Today the manager then removes the files unasked, also the last one.
pub const MAP_EDITS_ARE_GUARDED: bool = true;

/// An eviction leaves as many ready copies as are wanted. Today it is content with one elsewhere when the disk cannot be chosen again.
pub const EVICTION_KEEPS_THE_MINIMUM: bool = true;

/// What no manager remembers is removed: files of images that were deleted while their disk was off its node, and what a preparation
/// left on a disk whose manager had not heard of it yet.
pub const ORPHANS_ARE_REMOVED: bool = false;

/// An entry of a disk that is gone for good leaves `spec.diskFileSpecMap` by itself.
pub const ENTRIES_OF_GONE_DISKS_GO: bool = true;

/// What a preparation left in `tmp/` that was given up goes at once, and not only with the copy on that disk.
pub const ABANDONED_PREPARATIONS_GO: bool = false;

/// A replica is deleted although another disk took the place of its own on the node. Today it waits for the one that was taken off.
pub const REPLACED_DISKS_ARE_GIVEN_UP: bool = false;

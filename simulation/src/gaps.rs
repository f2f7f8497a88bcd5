//! What the control plane does not do yet, as the simulation found it. Each constant holds one operation back or relaxes one check;
//! whoever closes the gap sets it and sees the simulation pass.

/// Users take keys out of `spec.diskFileSpecMap`. Today the manager then removes the files unasked, also the last one.
pub const MAP_EDITS_ARE_GUARDED: bool = true;

/// An eviction leaves as many ready copies as are wanted. Today it is content with one elsewhere when the disk cannot be chosen again.
pub const EVICTION_KEEPS_THE_MINIMUM: bool = true;

/// A disk that shall be emptied and cannot be says why, while the image has enough copies elsewhere.
pub const BLOCKED_EVICTIONS_ARE_TOLD: bool = false;

/// An entry of a disk that is gone for good leaves `spec.diskFileSpecMap` by itself.
pub const ENTRIES_OF_GONE_DISKS_GO: bool = true;

/// A replica is deleted although another disk took the place of its own on the node. Today it waits for the one that was taken off.
pub const REPLACED_DISKS_ARE_GIVEN_UP: bool = false;

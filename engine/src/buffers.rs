//! The buffers behind [`BufferId`]: last in, first out, so that a load of small requests touches few pages.
//!
//! What was not needed for a while is given back to the kernel ([`Buffers::trim`]).

use crate::core::{BufferId, Payload};
use crate::limits;

/// Length of a pooled buffer: a FUSE request with the largest payload.
pub const POOLED_BYTES: usize = limits::FUSE_MAX_IO + limits::FUSE_HEADER_ROOM;

/// All buffers of an engine.
#[derive(Default)]
pub struct Buffers {
    slots: Vec<Box<[u8]>>,
    /// Slots with a pooled buffer that nobody uses.
    pooled: Vec<u32>,
    /// So many of them, the first ones, were not used since the last [`Buffers::trim`].
    unused: usize,
    /// Slots without memory.
    vacant: Vec<u32>,
}

impl Buffers {
    /// A buffer of at least `bytes` bytes, with whatever content.
    pub fn get(&mut self, bytes: usize) -> BufferId {
        if bytes <= POOLED_BYTES
            && let Some(id) = self.pooled.pop()
        {
            self.unused = self.unused.min(self.pooled.len());
            return BufferId(id);
        }
        // Large zeroed allocations come from the kernel untouched: no memory is used before it is written.
        let memory = vec![0; bytes.max(POOLED_BYTES)].into_boxed_slice();
        match self.vacant.pop() {
            Some(id) => {
                self.slots[id as usize] = memory;
                BufferId(id)
            }
            None => {
                self.slots.push(memory);
                BufferId((self.slots.len() - 1) as u32)
            }
        }
    }

    /// A pooled buffer for [`rustix::io::read`] of `/dev/fuse`: the kernel will find all of its pages.
    ///
    /// A page that the kernel would have to bring in while it copies a request is not brought in any more for a process that was
    /// just killed with SIGKILL. The copy then fails, and the kernel ends that request with EIO (`fuse_dev_do_read`) instead of
    /// keeping it for the next engine.
    pub fn get_resident(&mut self) -> BufferId {
        const SMALLEST_PAGE: usize = 4096;
        let id = self.get(POOLED_BYTES);
        let memory = self.bytes_mut(id);
        memory.iter_mut().step_by(SMALLEST_PAGE).for_each(|byte| *byte = 0);
        memory[POOLED_BYTES - 1] = 0;
        id
    }

    pub fn put(&mut self, id: BufferId) {
        let slot = &mut self.slots[id.0 as usize];
        if slot.len() == POOLED_BYTES && self.pooled.len() < limits::MAX_POOLED_BUFFERS {
            self.pooled.push(id.0);
        } else {
            *slot = Box::default();
            self.vacant.push(id.0);
        }
    }

    /// Gives the memory of buffers back that were not used since the last call.
    pub fn trim(&mut self) {
        for id in self.pooled.drain(..self.unused) {
            self.slots[id as usize] = Box::default();
            self.vacant.push(id);
        }
        self.unused = self.pooled.len();
    }

    /// Whether there is something that [`Buffers::trim`] may give back some day.
    pub fn has_unused(&self) -> bool {
        !self.pooled.is_empty()
    }

    /// Whether nobody uses a buffer.
    pub fn all_free(&self) -> bool {
        self.pooled.len() + self.vacant.len() == self.slots.len()
    }

    pub fn bytes(&self, id: BufferId) -> &[u8] {
        &self.slots[id.0 as usize]
    }

    pub fn bytes_mut(&mut self, id: BufferId) -> &mut [u8] {
        &mut self.slots[id.0 as usize]
    }

    /// Copies the first `length` bytes of one buffer to another one.
    pub fn copy(&mut self, from: BufferId, to: BufferId, length: usize) {
        let places = [from.0 as usize, to.0 as usize];
        let [from, to] = self.slots.get_disjoint_mut(places).expect("two different buffers");
        to[..length].copy_from_slice(&from[..length]);
    }

    pub fn part(&self, payload: Payload, length: usize) -> &[u8] {
        &self.bytes(payload.buffer)[payload.start..payload.start + length]
    }

    pub fn part_mut(&mut self, payload: Payload, length: usize) -> &mut [u8] {
        &mut self.bytes_mut(payload.buffer)[payload.start..payload.start + length]
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::sys;

    #[test]
    fn gives_the_buffer_that_was_returned_last() {
        let mut buffers = Buffers::default();
        let (a, b) = (buffers.get(1), buffers.get(1));
        buffers.put(b);
        buffers.put(a);
        assert_eq!(buffers.get(4096), a);
    }

    #[test]
    fn gives_memory_back_that_was_not_needed_for_a_while() {
        let mut buffers = Buffers::default();
        let [a, b, c] = [(); 3].map(|()| buffers.get(1));
        for id in [a, b, c] {
            buffers.put(id);
        }
        let held = |buffers: &Buffers| [a, b, c].map(|id| !buffers.bytes(id).is_empty());
        buffers.trim();
        assert_eq!(held(&buffers), [true; 3], "they were in use a moment ago");
        // One at a time: the others lie idle.
        for _ in 0..2 {
            let id = buffers.get(1);
            assert_eq!(id, c);
            buffers.put(id);
        }
        buffers.trim();
        assert_eq!(held(&buffers), [false, false, true]);
        buffers.trim();
        assert!(!buffers.has_unused());
        assert_eq!(held(&buffers), [false; 3]);
        let again = buffers.get(1);
        assert_eq!(buffers.bytes(again).len(), POOLED_BYTES, "a place without memory gets new memory");
    }

    /// Whether each page of it is in memory, as `/proc/self/pagemap` says.
    fn is_resident(memory: &[u8]) -> bool {
        let page = rustix::param::page_size();
        let (start, end) = (memory.as_ptr() as usize / page, (memory.as_ptr() as usize + memory.len()).div_ceil(page));
        let mut entries = vec![0; (end - start) * 8];
        let pagemap = std::fs::File::open("/proc/self/pagemap").unwrap();
        pagemap.read_exact_at(&mut entries, start as u64 * 8).unwrap();
        entries.chunks_exact(8).all(|entry| entry[7] & 0x80 != 0)
    }

    #[test]
    fn a_buffer_for_requests_of_the_kernel_is_in_memory_whatever_was_used_before() {
        sys::map_large_allocations();
        let mut buffers = Buffers::default();
        // The allocator may have memory that other tests have used.
        let untouched = (0..64).map(|_| buffers.get(POOLED_BYTES)).collect::<Vec<_>>();
        let untouched = untouched.into_iter().find(|id| !is_resident(buffers.bytes(*id)));
        let untouched = untouched.expect("the kernel gives memory when it is written");
        buffers.bytes_mut(untouched)[..8192].fill(1);
        assert!(!is_resident(buffers.bytes(untouched)));
        buffers.put(untouched);
        let partly_used = buffers.get_resident();
        assert_eq!(partly_used, untouched);
        assert!(is_resident(buffers.bytes(partly_used)));
        let fresh = buffers.get_resident();
        assert!(is_resident(buffers.bytes(fresh)));
    }

    #[test]
    fn copies_the_beginning_and_nothing_else() {
        let mut buffers = Buffers::default();
        let (from, to) = (buffers.get(1), buffers.get(1));
        buffers.bytes_mut(from)[..8].copy_from_slice(b"12345678");
        buffers.copy(from, to, 4);
        assert_eq!(buffers.bytes(to)[..8], *b"1234\0\0\0\0");
    }

    #[test]
    fn keeps_no_large_buffer() {
        let mut buffers = Buffers::default();
        let large = buffers.get(2 * POOLED_BYTES);
        assert_eq!(buffers.bytes(large).len(), 2 * POOLED_BYTES);
        buffers.put(large);
        assert!(buffers.bytes(large).is_empty());
        assert_eq!(buffers.get(1), large, "its place is used again");
    }
}

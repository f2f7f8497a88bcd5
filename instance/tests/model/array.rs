//! The model: what a volume holds is an array of bytes, and requests that were in flight together happened in some order.

use std::ops::Range;

pub const SECTOR: u64 = 512;

/// A write or zeroing that was in flight together with others.
#[derive(Clone, Debug)]
pub struct Change {
    pub range: Range<u64>,
    /// `None`: zeroes. Else the bytes of [`fill`].
    pub stamp: Option<u64>,
    /// It was acknowledged. Else each of its sectors may have been changed or not.
    pub certain: bool,
    /// It is done at once as a whole, as the engine promises of a request. The kernel may cut one to a block device.
    pub whole: bool,
}

/// The bytes of a write, at their offset: other bytes in every write, and at every place.
pub fn fill(stamp: u64, offset: u64, bytes: &mut [u8]) {
    for (at, byte) in (offset..).zip(bytes) {
        let word = (at / 8 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ stamp.wrapping_mul(0xd6e8_feb8_6659_fd93);
        *byte = (word >> (at % 8 * 8)) as u8 | 1;
    }
}

fn bytes_of(stamp: Option<u64>, range: &Range<u64>) -> Vec<u8> {
    let mut bytes = vec![0; (range.end - range.start) as usize];
    if let Some(stamp) = stamp {
        fill(stamp, range.start, &mut bytes);
    }
    bytes
}

fn indices(range: &Range<u64>) -> Range<usize> {
    range.start as usize..range.end as usize
}

pub fn first_difference(a: &[u8], b: &[u8]) -> Option<usize> {
    if a == b { None } else { Some(a.iter().zip(b).position(|(a, b)| a != b).unwrap_or(a.len().min(b.len()))) }
}

impl Change {
    /// The parts of it that happen at once.
    fn pieces(&self) -> Vec<Range<u64>> {
        if self.whole && self.certain {
            return vec![self.range.clone()];
        }
        let first = self.range.start / SECTOR * SECTOR;
        let starts = (first..self.range.end).step_by(SECTOR as usize);
        starts.map(|at| at.max(self.range.start)..(at + SECTOR).min(self.range.end)).collect()
    }
}

pub struct Array {
    pub bytes: Vec<u8>,
}

impl Array {
    /// A read that was in flight together with changes: each byte is from before, or from one of them.
    pub fn check_read(&self, offset: u64, read: &[u8], changes: &[Change]) -> Result<(), String> {
        let range = offset..offset + read.len() as u64;
        let mut allowed = self.bytes[indices(&range)].to_vec();
        for change in changes {
            let both = change.range.start.max(range.start)..change.range.end.min(range.end);
            if both.is_empty() {
                continue;
            }
            let here = indices(&(both.start - offset..both.end - offset));
            // What is right is taken over; what no change explains stays different.
            let content = bytes_of(change.stamp, &both);
            for ((allowed, read), new) in allowed[here.clone()].iter_mut().zip(&read[here]).zip(content) {
                if *allowed != *read && new == *read {
                    *allowed = new;
                }
            }
        }
        match first_difference(&allowed, read) {
            None => Ok(()),
            Some(at) => Err(format!(
                "a read shows {:#x} at byte {}, {}",
                read[at],
                offset + at as u64,
                self.about(offset + at as u64, changes)
            )),
        }
    }

    /// Takes over what the volume holds after changes that were in flight together, if some order of them explains it.
    pub fn settle(&mut self, changes: &[Change], observed: &[u8]) -> Result<(), String> {
        if observed.len() != self.bytes.len() {
            return Err(format!("{} bytes instead of {}", observed.len(), self.bytes.len()));
        }
        // From the last to the first: what is seen whole, apart from what came after it, may have been the next one back.
        let mut explained = vec![false; observed.len()];
        let mut open: Vec<(Range<u64>, Option<u64>)> =
            changes.iter().flat_map(|change| change.pieces().into_iter().map(|piece| (piece, change.stamp))).collect();
        loop {
            let before = open.len();
            open.retain(|(piece, stamp)| {
                let content = bytes_of(*stamp, piece);
                let here = indices(piece);
                let seen = observed[here.clone()].iter().zip(&content).zip(&explained[here.clone()]);
                let fits =
                    observed[here.clone()] == content || seen.into_iter().all(|((a, b), known)| a == b || *known);
                if fits {
                    explained[here].fill(true);
                }
                !fits
            });
            if open.len() == before {
                break;
            }
        }
        for change in changes {
            let here = indices(&change.range);
            let unexplained = explained[here.clone()].iter().position(|known| !known).filter(|_| change.certain);
            if let Some(at) = unexplained.map(|at| at + here.start) {
                return Err(format!(
                    "no order of the requests explains {:#x} at byte {at}, {}",
                    observed[at],
                    self.about(at as u64, changes)
                ));
            }
            for at in here.filter(|at| explained[*at]) {
                self.bytes[at] = observed[at];
            }
        }
        match first_difference(&self.bytes, observed) {
            None => Ok(()),
            Some(at) => Err(format!("byte {at} is {:#x}, {}", observed[at], self.about(at as u64, changes))),
        }
    }

    fn about(&self, at: u64, changes: &[Change]) -> String {
        let over: Vec<_> = changes.iter().filter(|change| change.range.contains(&at)).collect();
        format!("it was {:#x} before; in flight there: {over:?}", self.bytes[at as usize])
    }
}

#[cfg(test)]
mod tests {
    use std::slice::from_ref;

    use super::*;

    fn change(range: Range<u64>, stamp: u64, certain: bool, whole: bool) -> Change {
        Change { range, stamp: Some(stamp), certain, whole }
    }

    fn applied(changes: &[Change]) -> Vec<u8> {
        let mut bytes = vec![0; 4096];
        for change in changes {
            fill(change.stamp.unwrap(), change.range.start, &mut bytes[indices(&change.range)]);
        }
        bytes
    }

    fn settles(changes: &[Change], observed: &[u8]) -> bool {
        let mut array = Array { bytes: vec![0; 4096] };
        let settled = array.settle(changes, observed).is_ok();
        assert!(!settled || array.bytes == observed);
        settled
    }

    #[test]
    fn either_order_of_two_requests_is_right_and_a_mixture_is_not() {
        let (a, b) = (change(0..1024, 1, true, true), change(512..2048, 2, true, true));
        let both = [a.clone(), b.clone()];
        assert!(settles(&both, &applied(&[a.clone(), b.clone()])));
        assert!(settles(&both, &applied(&[b.clone(), a.clone()])));
        assert!(!settles(&both, &applied(from_ref(&a))), "an acknowledged write is not there");
        let mut mixed = applied(&[a.clone(), b.clone()]);
        fill(1, 512, &mut mixed[512..700]);
        assert!(!settles(&both, &mixed));
        let by_sectors = [change(0..1024, 1, true, false), change(0..1024, 2, true, false)];
        let mut mixed = applied(&by_sectors);
        fill(1, 512, &mut mixed[512..1024]);
        assert!(settles(&by_sectors, &mixed), "sectors of a block device may come in any order");
        fill(2, 600, &mut mixed[600..610]);
        assert!(!settles(&by_sectors, &mixed), "parts of a sector may not");
    }

    #[test]
    fn what_was_not_acknowledged_is_there_or_not_sector_by_sector() {
        let a = change(0..1024, 1, false, true);
        let mut half = applied(from_ref(&a));
        assert!(settles(from_ref(&a), &half) && settles(from_ref(&a), &[0; 4096]));
        half[512..1024].fill(0);
        assert!(settles(from_ref(&a), &half));
        half[100] ^= 1;
        assert!(!settles(from_ref(&a), &half));
        assert!(
            !settles(from_ref(&a), &applied(&[change(0..1536, 1, true, true)])),
            "beyond the request nothing changes"
        );
    }

    #[test]
    fn a_read_shows_what_was_before_or_what_is_under_way() {
        let array = Array { bytes: vec![0; 4096] };
        let a = change(512..1024, 1, true, true);
        let after = applied(from_ref(&a));
        assert!(array.check_read(0, &[0; 2048], from_ref(&a)).is_ok());
        assert!(array.check_read(0, &after[..2048], from_ref(&a)).is_ok());
        assert!(array.check_read(0, &after[..2048], &[]).is_err());
        assert!(array.check_read(0, &[7; 2048], from_ref(&a)).is_err());
    }
}

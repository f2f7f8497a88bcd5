//! A look at a qcow2 file that nobody vouches for: what it claims, and whether that is safe and whole.
//!
//! Refused is whatever would make another file be opened (backing file, external data file), what we do not offer
//! (encryption, internal snapshots), what was not closed properly, tables that overlap, and tables or clusters that lie outside
//! of the file, which is how a cut file shows. Only header and tables are read, never data; all arithmetic is checked.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::limits::MAX_VIRTUAL_BYTES;

/// The first four bytes of every qcow2 file.
pub const MAGIC: [u8; 4] = *b"QFI\xfb";

/// Bytes of the longest fixed header; with fewer only version 2 is possible.
pub const HEADER_BYTES: usize = 112;
const HEADER_BYTES_V2: usize = 72;

/// QEMU's own limits for tables.
const MAX_L1_BYTES: u64 = 32 << 20;
const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
const MAX_EXTENSIONS: usize = 64;

const DIRTY: u64 = 1 << 0;
const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;
const COMPRESSION_TYPE: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;

const EXTENSION_END: u32 = 0;
const EXTENSION_DATA_FILE: u32 = 0x4441_5441;
const EXTENSION_ENCRYPTION: u32 = 0x0537_be77;
const EXTENSION_BITMAPS: u32 = 0x2385_2875;
const BITMAPS_EXTENSION_BYTES: u64 = 24;
/// QEMU's own limit for the directory of bitmaps.
const MAX_BITMAP_DIRECTORY_BYTES: u64 = 64 << 20;

const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
const L2_COMPRESSED: u64 = 1 << 62;

/// Why a qcow2 file is refused.
#[derive(Debug, thiserror::Error)]
pub enum Qcow2Error {
    #[error("the qcow2 header is cut: the file ends after {size_bytes} bytes")]
    HeaderCut { size_bytes: u64 },
    #[error("qcow2 version {version} is not supported, only 2 and 3 are")]
    Version { version: u32 },
    #[error("the qcow2 file has a backing file: images must stand alone, flatten it with `qemu-img convert -O qcow2`")]
    BackingFile,
    #[error(
        "the qcow2 file keeps its data in an external data file: convert it with `qemu-img convert -O qcow2` where that file is"
    )]
    ExternalDataFile,
    #[error("the qcow2 file is encrypted, which is not supported: decrypt it with `qemu-img convert`")]
    Encrypted,
    #[error(
        "the qcow2 file has {count} internal snapshots, which are not supported: drop them with `qemu-img convert -O qcow2`"
    )]
    Snapshots { count: u32 },
    #[error(
        "the qcow2 file is marked as {mark}, it was not closed properly: repair it with `qemu-img check -r all` where it comes from"
    )]
    Unclean { mark: &'static str },
    #[error("the qcow2 file needs features that are not known here (incompatible feature bits {bits:#x})")]
    UnknownFeatures { bits: u64 },
    #[error("the qcow2 header is invalid: {problem}")]
    Header { problem: &'static str },
    #[error("the virtual size of {virtual_bytes} bytes is above the limit of {MAX_VIRTUAL_BYTES}")]
    VirtualSize { virtual_bytes: u64 },
    #[error("the {table} table claims {claimed_bytes} bytes, more than any valid file has")]
    TableSize { table: &'static str, claimed_bytes: u64 },
    #[error("the qcow2 file is cut: {what} at byte {offset} lies beyond its end, it has {size_bytes} bytes")]
    Truncated { what: &'static str, offset: u64, size_bytes: u64 },
    #[error("the qcow2 file is corrupt: {problem} at byte {offset}")]
    Corrupt { problem: &'static str, offset: u64 },
    #[error("the qcow2 file is corrupt: {one} and {other} overlap at byte {offset}")]
    Overlap { one: &'static str, other: &'static str, offset: u64 },
    #[error("the qcow2 file is corrupt: {what} at byte {offset} is used twice")]
    UsedTwice { what: &'static str, offset: u64 },
    #[error("cannot read the qcow2 tables")]
    Read(#[from] io::Error),
}

/// What a header says, after it was found to be acceptable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    pub version: u32,
    pub virtual_size_bytes: u64,
    pub cluster_bits: u32,
    extended_l2: bool,
    l1_offset: u64,
    l1_entries: u64,
    refcount_table_offset: u64,
    refcount_table_bytes: u64,
    /// Where header extensions begin, and where they end at the latest.
    extensions: std::ops::Range<u64>,
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

impl Header {
    /// Judges the first bytes of a file: [`HEADER_BYTES`] of them, or all if it is shorter.
    pub fn parse(bytes: &[u8]) -> Result<Header, Qcow2Error> {
        use Qcow2Error::Header as Invalid;
        let cut = || Qcow2Error::HeaderCut { size_bytes: bytes.len() as u64 };
        if bytes.len() < HEADER_BYTES_V2 {
            return Err(cut());
        }
        if bytes[..4] != MAGIC {
            return Err(Invalid { problem: "the magic number is missing" });
        }
        let version = be32(bytes, 4);
        if !matches!(version, 2 | 3) {
            return Err(Qcow2Error::Version { version });
        }
        if be64(bytes, 8) != 0 || be32(bytes, 16) != 0 {
            return Err(Qcow2Error::BackingFile);
        }
        let cluster_bits = be32(bytes, 20);
        if !(9..=21).contains(&cluster_bits) {
            return Err(Invalid { problem: "the cluster size is not between 512 bytes and 2 MiB" });
        }
        let cluster = 1u64 << cluster_bits;
        let virtual_size_bytes = be64(bytes, 24);
        if virtual_size_bytes > MAX_VIRTUAL_BYTES {
            return Err(Qcow2Error::VirtualSize { virtual_bytes: virtual_size_bytes });
        }
        if virtual_size_bytes == 0 || !virtual_size_bytes.is_multiple_of(512) {
            return Err(Invalid { problem: "the virtual size is not a multiple of 512 bytes above 0" });
        }
        if be32(bytes, 32) != 0 {
            return Err(Qcow2Error::Encrypted);
        }
        let snapshots = be32(bytes, 60);
        if snapshots != 0 {
            return Err(Qcow2Error::Snapshots { count: snapshots });
        }

        let mut extended_l2 = false;
        let mut header_length = HEADER_BYTES_V2 as u64;
        if version == 3 {
            if bytes.len() < 104 {
                return Err(cut());
            }
            let features = be64(bytes, 72);
            if features & EXTERNAL_DATA != 0 {
                return Err(Qcow2Error::ExternalDataFile);
            }
            if features & CORRUPT != 0 {
                return Err(Qcow2Error::Unclean { mark: "corrupt" });
            }
            if features & DIRTY != 0 {
                return Err(Qcow2Error::Unclean { mark: "dirty" });
            }
            let unknown = features & !(COMPRESSION_TYPE | EXTENDED_L2);
            if unknown != 0 {
                return Err(Qcow2Error::UnknownFeatures { bits: unknown });
            }
            if be32(bytes, 96) > 6 {
                return Err(Invalid { problem: "the refcount width is above 64 bits" });
            }
            header_length = u64::from(be32(bytes, 100));
            if header_length < 104 || !header_length.is_multiple_of(8) || header_length > cluster {
                return Err(Invalid { problem: "the header length is impossible" });
            }
            if features & COMPRESSION_TYPE != 0 && (header_length < 112 || bytes.len() < 105 || bytes[104] > 1) {
                return Err(Invalid { problem: "the compression type is neither zlib nor zstd" });
            }
            extended_l2 = features & EXTENDED_L2 != 0;
            if extended_l2 && cluster_bits < 14 {
                return Err(Invalid { problem: "extended L2 entries need clusters of 16 KiB or more" });
            }
        }

        let l1_entries = u64::from(be32(bytes, 36));
        if l1_entries * 8 > MAX_L1_BYTES {
            return Err(Qcow2Error::TableSize { table: "L1", claimed_bytes: l1_entries * 8 });
        }
        let refcount_table_bytes = u64::from(be32(bytes, 56)) * cluster;
        if refcount_table_bytes > MAX_REFCOUNT_TABLE_BYTES {
            return Err(Qcow2Error::TableSize { table: "refcount", claimed_bytes: refcount_table_bytes });
        }
        let header = Header {
            version,
            virtual_size_bytes,
            cluster_bits,
            extended_l2,
            l1_offset: be64(bytes, 40),
            l1_entries,
            refcount_table_offset: be64(bytes, 48),
            refcount_table_bytes,
            extensions: header_length..cluster,
        };
        if header.l1_entries < virtual_size_bytes.div_ceil(header.guest_bytes_of_l2()) {
            return Err(Invalid { problem: "the L1 table is too small for the virtual size" });
        }
        if !header.l1_offset.is_multiple_of(cluster) || header.l1_offset == 0 {
            return Err(Invalid { problem: "the L1 table is not at the start of a cluster" });
        }
        if !header.refcount_table_offset.is_multiple_of(cluster) || header.refcount_table_offset == 0 {
            return Err(Invalid { problem: "the refcount table is not at the start of a cluster" });
        }
        if refcount_table_bytes == 0 {
            return Err(Invalid { problem: "there is no refcount table" });
        }
        Ok(header)
    }

    fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    fn entry_bytes(&self) -> u64 {
        if self.extended_l2 { 16 } else { 8 }
    }

    fn guest_bytes_of_l2(&self) -> u64 {
        self.cluster_bytes() / self.entry_bytes() * self.cluster_bytes()
    }
}

/// Judges a whole qcow2 file by its header and tables.
pub fn inspect(file: &File, size_bytes: u64) -> Result<Header, Qcow2Error> {
    let mut bytes = vec![0; HEADER_BYTES.min(usize::try_from(size_bytes).unwrap_or(HEADER_BYTES))];
    file.read_exact_at(&mut bytes, 0)?;
    let header = Header::parse(&bytes)?;
    let mut tables = Tables { cluster_bytes: header.cluster_bytes(), clusters: vec![] };
    tables.add("the header", 0, header.cluster_bytes());
    tables.add("the L1 table", header.l1_offset, header.l1_entries * 8);
    tables.add("the refcount table", header.refcount_table_offset, header.refcount_table_bytes);
    let mut inspection = Inspection { file, size_bytes, header: &header, tables };
    // Already now: what one finds by following the tables that share bytes is blamed on something else.
    inspection.tables.check_overlap()?;
    inspection.check_extensions()?;
    inspection.check_refcounts()?;
    let l2_tables = inspection.check_l1()?;
    inspection.tables.check_overlap()?;
    inspection.check_clusters(&l2_tables)?;
    Ok(header)
}

/// The clusters that hold tables. Each belongs to one of them.
struct Tables {
    cluster_bytes: u64,
    /// Number of the cluster, and what lies there; sorted by [`Tables::check_overlap`].
    clusters: Vec<(u64, &'static str)>,
}

impl Tables {
    /// The caller has checked that it lies within a file, or that its size is limited.
    fn add(&mut self, what: &'static str, offset: u64, length: u64) {
        let first = offset / self.cluster_bytes;
        let count = length.div_ceil(self.cluster_bytes);
        self.clusters.extend((first..first.saturating_add(count)).map(|cluster| (cluster, what)));
    }

    fn check_overlap(&mut self) -> Result<(), Qcow2Error> {
        self.clusters.sort_unstable();
        match self.clusters.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            Some(pair) if pair[0].1 == pair[1].1 => {
                Err(Qcow2Error::UsedTwice { what: pair[0].1, offset: pair[0].0 * self.cluster_bytes })
            }
            Some(pair) => {
                Err(Qcow2Error::Overlap { one: pair[0].1, other: pair[1].1, offset: pair[0].0 * self.cluster_bytes })
            }
            None => Ok(()),
        }
    }

    /// The table at an offset, if there is one.
    fn at(&self, offset: u64) -> Option<&'static str> {
        let cluster = offset / self.cluster_bytes;
        let found = self.clusters.binary_search_by_key(&cluster, |(cluster, _)| *cluster).ok()?;
        Some(self.clusters[found].1)
    }
}

struct Inspection<'a> {
    file: &'a File,
    size_bytes: u64,
    header: &'a Header,
    tables: Tables,
}

impl Inspection<'_> {
    fn check_within(&self, what: &'static str, offset: u64, length: u64) -> Result<(), Qcow2Error> {
        match offset.checked_add(length) {
            Some(end) if end <= self.size_bytes => Ok(()),
            _ => Err(Qcow2Error::Truncated { what, offset, size_bytes: self.size_bytes }),
        }
    }

    fn read_table(&self, what: &'static str, offset: u64, length: u64) -> Result<Vec<u64>, Qcow2Error> {
        self.check_within(what, offset, length)?;
        let mut bytes = vec![0; usize::try_from(length).expect("table sizes are limited")];
        self.file.read_exact_at(&mut bytes, offset)?;
        Ok(bytes.chunks_exact(8).map(|entry| be64(entry, 0)).collect())
    }

    fn check_extensions(&mut self) -> Result<(), Qcow2Error> {
        let mut offset = self.header.extensions.start;
        for _ in 0..MAX_EXTENSIONS {
            if offset + 8 > self.header.extensions.end.min(self.size_bytes) {
                return Ok(());
            }
            let mut bytes = [0; 8];
            self.file.read_exact_at(&mut bytes, offset)?;
            match be32(&bytes, 0) {
                EXTENSION_END => return Ok(()),
                EXTENSION_DATA_FILE => return Err(Qcow2Error::ExternalDataFile),
                EXTENSION_ENCRYPTION => return Err(Qcow2Error::Encrypted),
                EXTENSION_BITMAPS => self.check_bitmaps(offset + 8, u64::from(be32(&bytes, 4)))?,
                _ => {}
            }
            let length = u64::from(be32(&bytes, 4)).next_multiple_of(8);
            offset += 8 + length;
            if offset > self.header.extensions.end {
                return Err(Qcow2Error::Header { problem: "a header extension is longer than the header" });
            }
        }
        Err(Qcow2Error::Header { problem: "there are too many header extensions" })
    }

    /// QEMU reads the directory of bitmaps when it opens the file, and refuses the file when it is not there.
    fn check_bitmaps(&mut self, offset: u64, length: u64) -> Result<(), Qcow2Error> {
        let lie = || Qcow2Error::Header { problem: "the header extension of bitmaps is not what it should be" };
        if length != BITMAPS_EXTENSION_BYTES {
            return Err(lie());
        }
        self.check_within("the header extension of bitmaps", offset, length)?;
        let mut bytes = [0; BITMAPS_EXTENSION_BYTES as usize];
        self.file.read_exact_at(&mut bytes, offset)?;
        let (directory_bytes, directory) = (be64(&bytes, 8), be64(&bytes, 16));
        let cluster = self.header.cluster_bytes();
        if directory_bytes > MAX_BITMAP_DIRECTORY_BYTES || !directory.is_multiple_of(cluster) {
            return Err(lie());
        }
        self.check_within("the directory of bitmaps", directory, directory_bytes)?;
        self.tables.add("the directory of bitmaps", directory, directory_bytes);
        Ok(())
    }

    fn check_refcounts(&mut self) -> Result<(), Qcow2Error> {
        let header = self.header;
        let table = self.read_table("the refcount table", header.refcount_table_offset, header.refcount_table_bytes)?;
        for block in table.into_iter().filter(|block| *block != 0) {
            if !block.is_multiple_of(header.cluster_bytes()) {
                return Err(Qcow2Error::Corrupt { problem: "an unaligned refcount block", offset: block });
            }
            self.check_within("a refcount block", block, header.cluster_bytes())?;
            self.tables.add("a refcount block", block, header.cluster_bytes());
        }
        Ok(())
    }

    /// The offsets of all L2 tables; 0 where there is none.
    ///
    /// Without snapshots every L2 table belongs to one L1 entry. A file that uses one twice would cost unbounded reading.
    fn check_l1(&mut self) -> Result<Vec<u64>, Qcow2Error> {
        let header = self.header;
        let mut l1 = self.read_table("the L1 table", header.l1_offset, header.l1_entries * 8)?;
        for entry in &mut l1 {
            let offset = *entry & OFFSET_MASK;
            if *entry & L1_RESERVED != 0 || !offset.is_multiple_of(header.cluster_bytes()) {
                return Err(Qcow2Error::Corrupt { problem: "an invalid L1 entry", offset: *entry });
            }
            if offset != 0 {
                // Whether it lies within the file is seen when it is read.
                self.tables.add("an L2 table", offset, header.cluster_bytes());
            }
            *entry = offset;
        }
        Ok(l1)
    }

    fn check_clusters(&self, l2_tables: &[u64]) -> Result<(), Qcow2Error> {
        let header = self.header;
        for (index, offset) in l2_tables.iter().enumerate().filter(|(_, offset)| **offset != 0) {
            let l2 = self.read_table("an L2 table", *offset, header.cluster_bytes())?;
            self.check_l2(index as u64 * header.guest_bytes_of_l2(), &l2)?;
        }
        Ok(())
    }

    /// What is data and a table at once is wrong as one of them, and QEMU does not notice when it reads.
    fn check_data(&self, offset: u64) -> Result<(), Qcow2Error> {
        match self.tables.at(offset) {
            Some(other) => Err(Qcow2Error::Overlap { one: "a data cluster", other, offset }),
            None => Ok(()),
        }
    }

    fn check_l2(&self, guest_start: u64, words: &[u64]) -> Result<(), Qcow2Error> {
        let header = self.header;
        let words_per_entry = header.entry_bytes() as usize / 8;
        for (index, entry) in words.chunks_exact(words_per_entry).enumerate() {
            let guest = guest_start + index as u64 * header.cluster_bytes();
            if entry[0] & L2_COMPRESSED != 0 {
                self.check_compressed(entry[0])?;
                continue;
            }
            let offset = entry[0] & OFFSET_MASK;
            let reserved = if header.extended_l2 { L2_RESERVED | 1 } else { L2_RESERVED };
            if entry[0] & reserved != 0 || !offset.is_multiple_of(header.cluster_bytes()) {
                return Err(Qcow2Error::Corrupt { problem: "an invalid L2 entry", offset: entry[0] });
            }
            if offset == 0 {
                continue;
            }
            // The last cluster need not be stored further than the guest can read.
            let mut length = header.cluster_bytes().min(header.virtual_size_bytes.saturating_sub(guest));
            if let Some(bitmap) = entry.get(1) {
                let allocated = *bitmap as u32;
                let subcluster = header.cluster_bytes() / 32;
                length = length.min(u64::from(32 - allocated.leading_zeros()) * subcluster);
            }
            self.check_within("a data cluster", offset, length)?;
            self.check_data(offset)?;
        }
        Ok(())
    }

    fn check_compressed(&self, entry: u64) -> Result<(), Qcow2Error> {
        let offset_bits = 62 - (self.header.cluster_bits - 8);
        let descriptor = entry & (L2_COMPRESSED - 1);
        let offset = descriptor & ((1 << offset_bits) - 1);
        let sectors = (descriptor >> offset_bits) + 1;
        // The length is given in sectors, the data ends anywhere in the last one, and so may the file.
        let end = (offset & !511).checked_add(sectors * 512);
        match end {
            Some(end) if end <= self.size_bytes.next_multiple_of(512) && offset < self.size_bytes => {
                let cluster = self.header.cluster_bytes();
                (offset / cluster * cluster..end).step_by(cluster as usize).try_for_each(|part| self.check_data(part))
            }
            _ => Err(Qcow2Error::Truncated { what: "a compressed cluster", offset, size_bytes: self.size_bytes }),
        }
    }
}

#[cfg(test)]
mod tests;

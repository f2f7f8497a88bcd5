//! qcow2 headers and files that nobody vouches for.

use std::cell::OnceCell;
use std::fs::File;
use std::os::unix::fs::FileExt;

use agent::limits::MAX_VIRTUAL_BYTES;
use agent::qcow2::{HEADER_BYTES, Header, MAGIC, inspect};

fn be32(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes")))
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// What an accepted header must not say, read from the bytes by the qcow2 specification and not by the parser.
fn assert_harmless(bytes: &[u8], header: &Header) {
    assert_eq!(bytes[..4], MAGIC);
    assert!((2..=3).contains(&be32(bytes, 4)) && header.version == be32(bytes, 4) as u32);
    assert_eq!((be64(bytes, 8), be32(bytes, 16)), (0, 0), "a backing file");
    let cluster_bits = be32(bytes, 20);
    assert!((9..=21).contains(&cluster_bits) && u64::from(header.cluster_bits) == cluster_bits);
    let size = be64(bytes, 24);
    assert!(size > 0 && size <= MAX_VIRTUAL_BYTES && size.is_multiple_of(512) && size == header.virtual_size_bytes);
    assert_eq!(be32(bytes, 32), 0, "encryption");
    assert!(be32(bytes, 36) * 8 <= 32 << 20, "an L1 table that costs more memory than QEMU allows");
    assert!(be32(bytes, 56) << cluster_bits <= 8 << 20, "a refcount table that costs more memory than QEMU allows");
    assert_eq!(be32(bytes, 60), 0, "snapshots");
    assert!(be64(bytes, 40) >= 1 << cluster_bits && be64(bytes, 48) >= 1 << cluster_bits, "a table in the header");
    if header.version == 3 {
        let (compression, extended) = (1 << 3, 1 << 4);
        assert_eq!(be64(bytes, 72) & !(compression | extended), 0, "a feature that is not offered");
    }
}

/// [`Header::parse`] on the first bytes of a file.
pub fn header(data: &[u8]) {
    let bytes = &data[..data.len().min(HEADER_BYTES)];
    match Header::parse(bytes) {
        Ok(header) => assert_harmless(bytes, &header),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

thread_local! {
    static SCRATCH: OnceCell<File> = const { OnceCell::new() };
}

fn inspected(bytes: &[u8], room: usize) -> Option<Header> {
    SCRATCH.with(|scratch| {
        let file = scratch.get_or_init(|| {
            let flags = rustix::fs::MemfdFlags::CLOEXEC;
            File::from(rustix::fs::memfd_create("qcow2", flags).expect("a file in memory"))
        });
        file.set_len(0).expect("it can be emptied");
        file.write_all_at(bytes, 0).expect("it can be written");
        let size_bytes = (bytes.len() + room) as u64;
        file.set_len(size_bytes).expect("it can grow");
        inspect(file, size_bytes).ok()
    })
}

/// [`inspect`] on a whole file.
pub fn file(data: &[u8]) {
    let Some(header) = inspected(data, 0) else { return };
    assert_harmless(data, &header);
    assert_eq!(
        Header::parse(&data[..data.len().min(HEADER_BYTES)]).expect("a file has a header that is accepted"),
        header
    );
    let cluster = 1u64 << header.cluster_bits;
    for (what, offset, length) in [
        ("the L1 table", be64(data, 40), be32(data, 36) * 8),
        ("the refcount table", be64(data, 48), be32(data, 56) * cluster),
    ] {
        assert!(offset + length <= data.len() as u64, "{what} ends beyond the file");
    }
    for table in
        (0..be32(data, 36)).map(|entry| be64(data, (be64(data, 40) + entry * 8) as usize) & 0x00ff_ffff_ffff_fe00)
    {
        assert!(table == 0 || table + cluster <= data.len() as u64, "an L2 table ends beyond the file");
    }
    assert_eq!(inspected(data, 4096).as_ref(), Some(&header), "bytes behind the end make a whole file no less whole");
}

//! Tests of the qcow2 inspection, with images that `qemu-img` makes.

use std::path::{Path, PathBuf};
use std::process::Command;

use proptest::prelude::*;

use super::*;

/// What QEMU says when a virtual machine's clock of CPU time stood still while it measured its key derivation (LUKS).
const UNMEASURED: &str = "Unable to get accurate CPU usage";

fn run(program: &str, arguments: &[&str]) {
    let once = || Command::new(program).args(arguments).output().expect("the program is installed");
    let is_measured = |output: &std::process::Output| !String::from_utf8_lossy(&output.stderr).contains(UNMEASURED);
    let mut outputs = (0..20).map(|_| once());
    let output = outputs.find(is_measured).expect("it can measure the time of its process");
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn judge(path: &Path) -> Result<Header, Qcow2Error> {
    let file = File::open(path).unwrap();
    let size = file.metadata().unwrap().len();
    inspect(&file, size)
}

fn refused(path: &Path) -> String {
    judge(path).unwrap_err().to_string()
}

/// A raw file of 3 MiB with data in it, and some of it random so that compression leaves something.
fn raw(dir: &Path) -> PathBuf {
    let path = dir.join("raw");
    let mut bytes = vec![0u8; 3 << 20];
    let mut state = 1u32;
    for byte in &mut bytes[500_000..1_900_000] {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *byte = (state >> 24) as u8;
    }
    std::fs::write(&path, bytes).unwrap();
    path
}

fn qcow2(dir: &Path, name: &str, options: &[&str]) -> PathBuf {
    let path = dir.join(name);
    let source = raw(dir);
    let mut arguments = vec!["convert", "-f", "raw", "-O", "qcow2"];
    arguments.extend_from_slice(options);
    let (from, to) = (source.to_str().unwrap(), path.to_str().unwrap());
    arguments.extend_from_slice(&[from, to]);
    run("qemu-img", &arguments);
    path
}

#[test]
fn accepts_what_qemu_makes() {
    let dir = tempfile::tempdir().unwrap();
    let variants: &[&[&str]] = &[
        &[],
        &["-c"],
        &["-c", "-o", "compression_type=zstd"],
        &["-c", "-o", "cluster_size=512"],
        &["-o", "compat=0.10"],
        &["-o", "cluster_size=512"],
        &["-o", "cluster_size=2M"],
        &["-o", "extended_l2=on,cluster_size=128k"],
        &["-o", "preallocation=metadata"],
        &["-o", "lazy_refcounts=on"],
    ];
    for (index, options) in variants.iter().enumerate() {
        let path = qcow2(dir.path(), &format!("v{index}"), options);
        let header = judge(&path).unwrap_or_else(|e| panic!("{options:?}: {e}"));
        assert_eq!(header.virtual_size_bytes, 3 << 20, "{options:?}");
    }
    let odd = dir.path().join("odd");
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", odd.to_str().unwrap(), "1000448"]);
    judge(&odd).unwrap();
    let marked = qcow2(dir.path(), "marked", &[]);
    run("qemu-img", &["bitmap", "--add", marked.to_str().unwrap(), "b"]);
    judge(&marked).unwrap();
}

#[test]
fn refuses_a_backing_file() {
    let dir = tempfile::tempdir().unwrap();
    qcow2(dir.path(), "base", &[]);
    let top = dir.path().join("top");
    let base = dir.path().join("base");
    run(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "-b", base.to_str().unwrap(), "-F", "qcow2", top.to_str().unwrap()],
    );
    assert!(refused(&top).contains("has a backing file"), "{}", refused(&top));
}

#[test]
fn refuses_an_external_data_file() {
    let dir = tempfile::tempdir().unwrap();
    let (top, data) = (dir.path().join("top"), dir.path().join("data"));
    let option = format!("data_file={},data_file_raw=on", data.display());
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &option, top.to_str().unwrap(), "1M"]);
    assert!(refused(&top).contains("external data file"), "{}", refused(&top));
}

#[test]
fn refuses_encryption_and_internal_snapshots() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("luks");
    let arguments = ["create", "-q", "-f", "qcow2", "--object", "secret,id=s,data=x", "-o"];
    let mut arguments = arguments.to_vec();
    arguments.extend_from_slice(&["encrypt.format=luks,encrypt.key-secret=s", path.to_str().unwrap(), "1M"]);
    run("qemu-img", &arguments);
    assert!(refused(&path).contains("encrypted"), "{}", refused(&path));

    let path = qcow2(dir.path(), "snap", &[]);
    run("qemu-img", &["snapshot", "-c", "one", path.to_str().unwrap()]);
    assert!(refused(&path).contains("1 internal snapshots"), "{}", refused(&path));
}

#[test]
fn notices_a_cut_at_every_place() {
    let dir = tempfile::tempdir().unwrap();
    for options in [&[][..], &["-c"][..], &["-o", "extended_l2=on,cluster_size=128k"][..]] {
        let path = qcow2(dir.path(), "cut", options);
        let whole = std::fs::read(&path).unwrap();
        for part in 0..40 {
            let length = whole.len() * part / 40;
            std::fs::write(&path, &whole[..length]).unwrap();
            let error = refused(&path);
            assert!(error.contains("cut"), "{options:?} {length}: {error}");
        }
        std::fs::write(&path, &whole[..whole.len() - 512]).unwrap();
        assert!(judge(&path).is_err(), "{options:?}: the last sector is missing");
    }
}

#[test]
fn refuses_absurd_headers() {
    let dir = tempfile::tempdir().unwrap();
    let path = qcow2(dir.path(), "h", &[]);
    let whole = std::fs::read(&path).unwrap();
    let cases: &[(usize, &[u8], &str)] = &[
        (0, b"QFI\0", "the magic number is missing"),
        (4, &4u32.to_be_bytes(), "version 4"),
        (8, &8u64.to_be_bytes(), "has a backing file"),
        (16, &8u32.to_be_bytes(), "has a backing file"),
        (20, &31u32.to_be_bytes(), "cluster size"),
        (24, &(!511u64).to_be_bytes(), "above the limit"),
        (24, &1000u64.to_be_bytes(), "multiple of 512"),
        (24, &0u64.to_be_bytes(), "multiple of 512 bytes above 0"),
        (32, &1u32.to_be_bytes(), "encrypted"),
        (36, &u32::MAX.to_be_bytes(), "L1 table claims"),
        (36, &0u32.to_be_bytes(), "L1 table is too small"),
        (40, &(1u64 << 50).to_be_bytes(), "beyond its end"),
        (40, &(!0xffffu64).to_be_bytes(), "beyond its end"),
        (40, &0x3_0200u64.to_be_bytes(), "the L1 table is not at the start of a cluster"),
        (48, &0u64.to_be_bytes(), "the refcount table is not at the start of a cluster"),
        (48, &0x1_0200u64.to_be_bytes(), "the refcount table is not at the start of a cluster"),
        (48, &(!0xffffu64).to_be_bytes(), "beyond its end"),
        (56, &u32::MAX.to_be_bytes(), "refcount table claims"),
        (56, &0u32.to_be_bytes(), "there is no refcount table"),
        (72, &1u64.to_be_bytes(), "marked as dirty"),
        (72, &2u64.to_be_bytes(), "marked as corrupt"),
        (72, &4u64.to_be_bytes(), "external data file"),
        (72, &(1u64 << 40).to_be_bytes(), "feature bits 0x10000000000"),
        (96, &7u32.to_be_bytes(), "the refcount width is above 64 bits"),
        (100, &u32::MAX.to_be_bytes(), "header length"),
        (100, &96u32.to_be_bytes(), "header length"),
        (100, &108u32.to_be_bytes(), "header length"),
        (100, &0x1_0008u32.to_be_bytes(), "header length"),
    ];
    for (position, bytes, expected) in cases {
        let error = changed(&whole, &path, &[(*position, bytes)]);
        assert!(error.contains(expected), "{position} {expected}: {error}");
    }
    let compressed = COMPRESSION_TYPE.to_be_bytes();
    for rest in [(104, &[2u8] as &[u8]), (100, &104u32.to_be_bytes())] {
        let error = changed(&whole, &path, &[(72, &compressed), rest]);
        assert!(error.contains("neither zlib nor zstd"), "{rest:?}: {error}");
    }
    let small = std::fs::read(qcow2(dir.path(), "s", &["-o", "cluster_size=8k"])).unwrap();
    let error = changed(&small, &path, &[(72, &EXTENDED_L2.to_be_bytes())]);
    assert!(error.contains("need clusters of 16 KiB or more"), "{error}");
}

#[test]
fn refuses_a_header_that_ends_within_a_field() {
    let mut whole = minimal();
    for length in [0, HEADER_BYTES_V2 - 1, 103] {
        let error = Header::parse(&whole[..length]).unwrap_err().to_string();
        assert!(error.contains(&format!("the file ends after {length} bytes")), "{length}: {error}");
    }
    whole[72..80].copy_from_slice(&COMPRESSION_TYPE.to_be_bytes());
    let error = Header::parse(&whole[..104]).unwrap_err().to_string();
    assert!(error.contains("neither zlib nor zstd"), "{error}");
}

#[test]
fn refuses_an_l2_table_that_is_used_twice() {
    let dir = tempfile::tempdir().unwrap();
    let path = qcow2(dir.path(), "l", &["-o", "cluster_size=512"]);
    let mut bytes = std::fs::read(&path).unwrap();
    let l1 = be64(&bytes, 40) as usize;
    let entries = be32(&bytes, 36) as usize;
    let used = (0..entries).map(|i| be64(&bytes, l1 + i * 8)).find(|entry| *entry != 0).unwrap();
    let free = (0..entries).find(|i| be64(&bytes, l1 + i * 8) == 0).unwrap();
    bytes[l1 + free * 8..][..8].copy_from_slice(&used.to_be_bytes());
    std::fs::write(&path, bytes).unwrap();
    assert!(refused(&path).contains("used twice"), "{}", refused(&path));
}

#[test]
fn refuses_a_compressed_cluster_that_runs_into_a_table() {
    let dir = tempfile::tempdir().unwrap();
    let path = qcow2(dir.path(), "r", &["-o", "cluster_size=512"]);
    let whole = std::fs::read(&path).unwrap();
    let l1 = be64(&whole, 40) as usize;
    let l2 = |i: usize| be64(&whole, l1 + i * 8) & OFFSET_MASK;
    let used: Vec<u64> = (0..be32(&whole, 36) as usize).map(l2).filter(|offset| *offset != 0).collect();
    // It begins in a data cluster and has two sectors.
    let table = *used.last().unwrap();
    let entry = L2_COMPRESSED | 1 << 61 | (table - 512);
    let error = changed(&whole, &path, &[(used[0] as usize, &entry.to_be_bytes())]);
    assert!(error.contains(&format!("a data cluster and an L2 table overlap at byte {table}")), "{error}");
}

/// A copy of a good file with some bytes changed.
fn changed(whole: &[u8], path: &Path, changes: &[(usize, &[u8])]) -> String {
    let mut bytes = whole.to_vec();
    for (position, change) in changes {
        bytes[*position..position + change.len()].copy_from_slice(change);
    }
    std::fs::write(path, &bytes).unwrap();
    refused(path)
}

#[test]
fn refuses_tables_that_overlap() {
    let dir = tempfile::tempdir().unwrap();
    let path = qcow2(dir.path(), "o", &[]);
    let whole = std::fs::read(&path).unwrap();
    let (l1, refcounts) = (be64(&whole, 40), be64(&whole, 48));
    let l2 = be64(&whole, l1 as usize) & OFFSET_MASK;
    let block = be64(&whole, refcounts as usize);
    let entry = (0..8192).map(|i| l2 as usize + i * 8).find(|at| be64(&whole, *at) != 0).unwrap();
    let data = |offset: u64| (be64(&whole, entry) & !OFFSET_MASK | offset).to_be_bytes();
    let table = |offset: u64| (1u64 << 63 | offset).to_be_bytes();
    type Case<'a> = (&'a str, &'a [(usize, &'a [u8])], &'a str);
    let cases: &[Case<'_>] = &[
        ("L1 = refcount", &[(40, &refcounts.to_be_bytes())], "the L1 table and the refcount table overlap"),
        ("L2 = header", &[(l1 as usize, &table(0x200))], "an invalid L1 entry"),
        ("L2 = L1", &[(l1 as usize, &table(l1))], "an L2 table and the L1 table overlap"),
        ("L2 = refcount", &[(l1 as usize, &table(refcounts))], "an L2 table and the refcount table overlap"),
        ("L2 = block", &[(l1 as usize, &table(block))], "an L2 table and a refcount block overlap"),
        ("block = L1", &[(refcounts as usize, &l1.to_be_bytes())], "a refcount block and the L1 table overlap"),
        ("two blocks", &[(refcounts as usize + 8, &block.to_be_bytes())], "is used twice"),
        ("data = L2", &[(entry, &data(l2))], "a data cluster and an L2 table overlap"),
        ("data = L1", &[(entry, &data(l1))], "a data cluster and the L1 table overlap"),
        (
            "compressed = L2",
            &[(entry, &(L2_COMPRESSED | (l2 + 512)).to_be_bytes())],
            "a data cluster and an L2 table overlap",
        ),
        (
            "compressed = header",
            &[(entry, &(L2_COMPRESSED | 512).to_be_bytes())],
            "a data cluster and the header overlap",
        ),
    ];
    for (what, changes, expected) in cases {
        let error = changed(&whole, &path, changes);
        let (one, other) = expected.split_once(" and ").unwrap_or((expected, ""));
        let turned = format!("{} and {one} overlap", other.trim_end_matches(" overlap"));
        assert!(error.contains(expected) || error.contains(&turned), "{what}: {error}");
    }
    let misplaced: &[(usize, u64, &str)] = &[
        (refcounts as usize, block + 512, "an unaligned refcount block"),
        (refcounts as usize, 1 << 40, "a refcount block at byte 1099511627776 lies beyond its end"),
        (l1 as usize, 1 << 63 | 1 << 40, "an L2 table at byte 1099511627776 lies beyond its end"),
        (l1 as usize, 1 << 63 | 1 << 56 | l2, "an invalid L1 entry"),
        (l1 as usize, 1 << 63 | l2 | 2, "an invalid L1 entry"),
        (entry, be64(&whole, entry) | 1 << 56, "an invalid L2 entry"),
        (entry, be64(&whole, entry) | 2, "an invalid L2 entry"),
        (entry, be64(&whole, entry) + 512, "an invalid L2 entry"),
    ];
    for (position, value, expected) in misplaced {
        let error = changed(&whole, &path, &[(*position, &value.to_be_bytes())]);
        assert!(error.contains(expected), "{position}: {error}");
    }
    // A file with a table of one entry only, so that the header itself is the L1 table.
    assert!(changed(&whole, &path, &[(40, &0u64.to_be_bytes())]).contains("not at the start of a cluster"));
}

#[test]
fn refuses_a_compressed_cluster_beyond_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = qcow2(dir.path(), "c", &["-c"]);
    let whole = std::fs::read(&path).unwrap();
    let l2 = (be64(&whole, be64(&whole, 40) as usize) & OFFSET_MASK) as usize;
    let entry = (0..8192).map(|i| l2 + i * 8).find(|at| be64(&whole, *at) & L2_COMPRESSED != 0).unwrap();
    let end = whole.len() as u64;
    for descriptor in [end, end + (1 << 40), (1 << 54) - 1, (0xffu64 << 54) | (end - 512)] {
        let error = changed(&whole, &path, &[(entry, &(L2_COMPRESSED | descriptor).to_be_bytes())]);
        assert!(error.contains("a compressed cluster") && error.contains("beyond its end"), "{descriptor:#x}: {error}");
    }
    // The file may end within the last sector of the data, but not before its first byte.
    let odd = [&whole[..], &[0; 100]].concat();
    let error = changed(&odd, &path, &[(entry, &(L2_COMPRESSED | (end + 200)).to_be_bytes())]);
    assert!(error.contains("a compressed cluster"), "{error}");
}

#[test]
fn refuses_a_virtual_size_out_of_all_proportion() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("huge");
    run("qemu-img", &["create", "-q", "-f", "qcow2", path.to_str().unwrap(), "17T"]);
    assert!(path.metadata().unwrap().len() < 1 << 20, "a small file that claims much");
    assert!(refused(&path).contains("above the limit of 17592186044416"), "{}", refused(&path));
    run("qemu-img", &["create", "-q", "-f", "qcow2", path.to_str().unwrap(), "16T"]);
    judge(&path).unwrap();
}

#[test]
fn refuses_header_extensions_that_lie() {
    let dir = tempfile::tempdir().unwrap();
    let path = qcow2(dir.path(), "x", &[]);
    let whole = std::fs::read(&path).unwrap();
    let start = be32(&whole, 100) as usize;
    let extension = |kind: u32, length: u32| [kind.to_be_bytes(), length.to_be_bytes()].concat();
    let cases: &[(&str, Vec<u8>, &str)] = &[
        ("longer than the header", extension(0x6803_f857, 1 << 16), "longer than the header"),
        ("longer than any file", extension(0x1234_5678, u32::MAX), "longer than the header"),
        ("a data file", [extension(EXTENSION_DATA_FILE, 8), b"/etc/pwd".to_vec()].concat(), "external data file"),
        ("encryption", [extension(EXTENSION_ENCRYPTION, 16), vec![0; 16]].concat(), "encrypted"),
        ("short bitmaps", [extension(EXTENSION_BITMAPS, 16), vec![0; 24]].concat(), "extension of bitmaps is not"),
        (
            "bitmaps within a cluster",
            [extension(EXTENSION_BITMAPS, 24), vec![0; 8], 64u64.to_be_bytes().into(), 512u64.to_be_bytes().into()]
                .concat(),
            "extension of bitmaps is not",
        ),
        (
            "bitmaps elsewhere",
            [
                extension(EXTENSION_BITMAPS, 24),
                vec![0; 8],
                64u64.to_be_bytes().into(),
                (1u64 << 40).to_be_bytes().into(),
            ]
            .concat(),
            "the directory of bitmaps at byte 1099511627776 lies beyond its end",
        ),
        (
            "bitmaps in the L1 table",
            [extension(EXTENSION_BITMAPS, 24), vec![0; 8], 64u64.to_be_bytes().into(), whole[40..48].into()].concat(),
            "the directory of bitmaps overlap",
        ),
        (
            "too many bitmaps",
            [extension(EXTENSION_BITMAPS, 24), vec![0; 8], (1u64 << 40).to_be_bytes().into(), vec![0; 8]].concat(),
            "extension of bitmaps is not",
        ),
        ("without an end", extension(0x1234_5678, 0).repeat(65), "too many header extensions"),
    ];
    for (what, bytes, expected) in cases {
        let error = changed(&whole, &path, &[(start, bytes)]);
        assert!(error.contains(expected), "{what}: {error}");
    }
    let cut = [&whole[..start], &extension(EXTENSION_BITMAPS, 24), &[0; 8]].concat();
    let error = changed(&cut, &path, &[]);
    assert!(error.contains("the header extension of bitmaps at byte"), "{error}");
}

fn minimal() -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m");
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path.to_str().unwrap(), "1M"]);
    std::fs::read(path).unwrap()
}

proptest! {
    #[test]
    fn arbitrary_headers_never_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..200), version in 2u32..4) {
        let _ = Header::parse(&bytes);
        if bytes.len() >= 8 {
            bytes[..4].copy_from_slice(&MAGIC);
            bytes[4..8].copy_from_slice(&version.to_be_bytes());
            let _ = Header::parse(&bytes);
        }
    }
}

#[test]
fn arbitrary_changes_of_a_valid_file_never_panic() {
    let whole = minimal();
    let file = tempfile::tempfile().unwrap();
    let mut runner = proptest::test_runner::TestRunner::default();
    let changes = prop::collection::vec((0..whole.len(), any::<u8>()), 1..40);
    runner
        .run(&changes, |changes| {
            let mut bytes = whole.clone();
            for (position, value) in changes {
                bytes[position] = value;
            }
            bytes[..4].copy_from_slice(&MAGIC);
            file.write_all_at(&bytes, 0).unwrap();
            let _ = inspect(&file, bytes.len() as u64);
            Ok(())
        })
        .unwrap();
}

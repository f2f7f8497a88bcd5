//! A replica that is started with more bytes than it has: what was written stays, what is new reads as zeroes.

use std::fs;
use std::process::Command;

use dataplane::storage_daemon::BaseFormat;
use proto::replica::{Reply, Request};

use crate::replica::{Replica, SIZE, qemu_img, raw_base};

const GROWN: u64 = 64 << 20;

/// The size in the header of the head.
fn head_bytes(replica: &Replica) -> u64 {
    let header = fs::read(replica.config.directory.join("volume-head.qcow2")).unwrap();
    u64::from_be_bytes(header[24..32].try_into().unwrap())
}

/// One whose 32 MiB were used: over 8 MiB of image, with bytes at both ends.
fn used() -> Replica {
    let mut replica = Replica::new(raw_base);
    replica.start();
    let export = replica.open(1);
    replica.io_ok(&export, &["write -P 0x22 4k 64k", "write -P 0x33 32764k 4k", "flush"]);
    assert_eq!(replica.ask(Request::Close { generation: 1 }), Reply::Done);
    replica.stop();
    replica
}

fn is_grown(replica: &mut Replica) {
    replica.config.size_bytes = GROWN;
    replica.start();
    let record = replica.record();
    assert_eq!((record.size_bytes, record.generation, record.clean), (GROWN, 1, true));
    let export = replica.open(2);
    let reads = ["read -P 0x11 0 4k", "read -P 0x22 4k 64k", "read -P 0x11 68k 8124k", "read -P 0 8M 24572k"];
    replica.io_ok(&export, &reads);
    replica.io_ok(&export, &["read -P 0x33 32764k 4k", "read -P 0 32M 32M", "write -P 0x44 65532k 4k", "flush"]);
    let (ok, said) = replica.io(&export, &["write -P 1 64M 4k"]);
    assert!(!ok, "there is nothing behind the end: {said}");
    assert_eq!(replica.ask(Request::Close { generation: 2 }), Reply::Done);
    replica.stop();
    replica.start();
    let export = replica.open(3);
    replica.io_ok(&export, &["read -P 0x22 4k 64k", "read -P 0x44 65532k 4k"]);
}

#[test]
fn a_replica_grows_at_its_next_start_and_keeps_every_byte() {
    is_grown(&mut used());
}

/// Cut off between the head and the record, or in the middle of a growth to another size before.
#[test]
fn a_growth_that_was_cut_off_is_finished_at_the_next_start() {
    for reached in ["64M", "48M"] {
        let mut replica = used();
        let head = replica.config.directory.join("volume-head.qcow2");
        qemu_img(&["resize", "-q", "-f", "qcow2", head.to_str().unwrap(), reached]);
        is_grown(&mut replica);
    }
}

/// An image that is longer than the volume was: what it has there was never the volume's.
#[test]
fn nothing_of_the_image_shows_in_what_is_new() {
    let mut replica = Replica::new(raw_base);
    // In the middle of a cluster.
    replica.config.size_bytes = (4 << 20) + 512;
    replica.start();
    let export = replica.open(1);
    replica.io_ok(&export, &["write -P 0x22 4095k 1k", "flush"]);
    assert_eq!(replica.ask(Request::Close { generation: 1 }), Reply::Done);
    replica.stop();
    replica.config.size_bytes = SIZE;
    replica.start();
    let export = replica.open(2);
    let reads = ["read -P 0x11 0 4095k", "read -P 0x22 4095k 1k", "read -P 0x11 4M 512", "read -P 0 4194816 29359616"];
    replica.io_ok(&export, &reads);
}

/// The size of a head may be on the disk before what makes the new part read as zeroes is: such a growth counts for nothing.
#[test]
fn what_a_growth_that_was_cut_off_left_behind_the_end_does_not_show() {
    for reached in ["32M", "16M"] {
        let mut replica = Replica::new(raw_base);
        replica.config.size_bytes = 4 << 20;
        replica.start();
        let export = replica.open(1);
        replica.io_ok(&export, &["write -P 0x22 4092k 4k", "flush"]);
        assert_eq!(replica.ask(Request::Close { generation: 1 }), Reply::Done);
        replica.stop();
        let head = replica.config.directory.join("volume-head.qcow2");
        let head = head.to_str().unwrap();
        // It knows nothing of the image, so it puts no zeroes over it.
        qemu_img(&["resize", "-q", "-f", "qcow2", head, reached]);
        let garbage = ["-f", "qcow2", "-c", "write -P 0x77 10M 1M", "-c", "write -P 0x77 4M 4k", head];
        assert!(Command::new("qemu-io").args(garbage).output().unwrap().status.success());
        replica.config.size_bytes = SIZE;
        replica.start();
        let export = replica.open(2);
        replica.io_ok(&export, &["read -P 0x11 0 4092k", "read -P 0x22 4092k 4k", "read -P 0 4M 28M"]);
        assert_eq!(replica.record().size_bytes, SIZE);
        replica.stop();
        qemu_img(&["check", "-q", "-f", "qcow2", head]);
    }
}

/// A volume that was too small for its image, whose size was not known yet, and was made larger before anybody used it.
#[test]
fn a_replica_that_nobody_used_begins_as_its_image_also_where_it_grew() {
    for format in [BaseFormat::Raw, BaseFormat::Qcow2] {
        let mut replica = Replica::new(|path| {
            raw_base(path);
            if format == BaseFormat::Qcow2 {
                let raw = path.with_extension("raw");
                fs::rename(path, &raw).unwrap();
                qemu_img(&["convert", "-q", "-O", "qcow2", raw.to_str().unwrap(), path.to_str().unwrap()]);
            }
            Some(format)
        });
        replica.config.size_bytes = 4 << 20;
        replica.start();
        replica.stop();
        replica.config.size_bytes = SIZE;
        replica.start();
        let export = replica.open(1);
        replica.io_ok(&export, &["read -P 0x11 0 8M", "read -P 0 8M 24M"]);
    }
}

#[test]
fn a_replica_never_shrinks() {
    let mut replica = used();
    replica.config.size_bytes = SIZE / 2;
    let said = replica.start_fails();
    assert!(said.contains("was made for size `33554432` and is not opened for size `16777216`"), "{said}");
    replica.config.size_bytes = SIZE;
    replica.start();
    assert_eq!((replica.record().size_bytes, head_bytes(&replica)), (SIZE, SIZE));
}

/// One that has less than is recorded was cut or exchanged, and one that has more than is wished belongs to something else.
#[test]
fn a_head_of_a_size_that_no_growth_explains_is_refused() {
    for (size, wished) in [("24M", GROWN), ("24M", SIZE), ("128M", GROWN)] {
        let mut replica = used();
        let head = replica.config.directory.join("volume-head.qcow2");
        let mut args = vec!["resize", "-q", "-f", "qcow2"];
        args.extend((size == "24M").then_some("--shrink"));
        args.extend([head.to_str().unwrap(), size]);
        qemu_img(&args);
        let has = head_bytes(&replica);
        replica.config.size_bytes = wished;
        let said = replica.start_fails();
        assert!(said.contains(&format!("has {has} bytes, the volume has {wished}")), "{said}");
        assert_eq!(head_bytes(&replica), has, "nothing was changed");
    }
}

/// A growth that the disk refuses is told, the replica is what it was, and grows when it can.
#[test]
fn a_replica_that_cannot_grow_says_why_and_stays_as_it_was() {
    let mut replica = used();
    // Far more than a table of its head can describe.
    replica.config.size_bytes = 1 << 62;
    let said = replica.start_fails();
    assert!(said.contains("block_resize"), "{said}");
    assert_eq!(head_bytes(&replica), SIZE);
    is_grown(&mut replica);
}

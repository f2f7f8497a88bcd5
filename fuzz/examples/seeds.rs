//! Writes the first inputs of every target into `fuzz/corpus`: what our own code and `qemu-img` make.
//!
//! `cargo run -p backing-image-fuzz --example seeds`. Everything else in there was found by fuzzing (`cargo xtask fuzz --keep`).

use std::path::Path;
use std::process::Command;

use backing_image_fuzz::folder;
use engine::fuse::wire as fuse;
use engine::nbd::{server, wire};
use serde_json::json;

fn main() {
    let json = |value: serde_json::Value| value.to_string().into_bytes();
    let text = |text: &str| text.as_bytes().to_vec();
    for (target, seeds) in [
        ("content_range", vec![text("bytes 5-9/10"), text("bytes 5-9/*"), text("bytes */10")]),
        ("source_url", urls().map(text).to_vec()),
        ("file_config", vec![json(file_config())]),
        ("json_lines", messages().into_iter().map(json).collect()),
        ("parameters", parameters()),
        ("manifest", manifests()),
        ("fuse_request", fuse_requests()),
        ("nbd_client", nbd_servers()),
        ("nbd_handshake", nbd_options()),
        ("nbd_replica", nbd_replies()),
        ("nbd_session", nbd_requests()),
        ("qcow2_file", qcow2_files()),
        ("qcow2_header", qcow2_files().into_iter().map(|file| file[..112].to_vec()).collect()),
    ] {
        let folder = folder("corpus", target);
        std::fs::create_dir_all(&folder).expect("the folder");
        for (number, seed) in seeds.iter().enumerate() {
            std::fs::write(folder.join(format!("seed-{number:02}")), seed).expect("the file");
        }
    }
}

fn urls() -> [&'static str; 4] {
    [
        "https://example.com/images/ubuntu.qcow2",
        "http://user:SECRET1@example.com:8080/a%20b.img?token=SECRET2#part",
        "http://[2001:db8::1]/x",
        "http://127.1/x;y=z",
    ]
}

fn file_config() -> serde_json::Value {
    json!({
        "name": "/data/backing-images/a-01234567/backing", "uuid": "01234567", "size": 1024, "virtualSize": 1024, "realSize": 512,
        "expectedChecksum": "", "currentChecksum": "c", "modificationTime": "2026-01-02 03:04:05.12 +0000 UTC", "format": "qcow2"
    })
}

fn messages() -> Vec<serde_json::Value> {
    let record = json!({
        "volume": "v", "replica": "r1", "sizeBytes": 1048576, "backingImage": "i", "backingImageUuid": "01234567", "generation": 3,
        "members": ["r1", "r2"], "clean": true
    });
    vec![
        json!({
            "volume": "v", "sizeBytes": 1048576, "generation": 7, "replicas": {"r1": {"directory": "/r"}, "r2": {"tcp": "127.0.0.1:1"}},
            "readFrom": "r1", "compareReplicas": false, "mountFile": "/m", "controlSocket": "/c", "nbdSocket": "/n",
            "replicaTimeoutMs": 1, "noReplicaHoldMs": 0, "holderLimitMs": 1
        }),
        json!({
            "volume": "v", "replica": "r1", "directory": "/d", "sizeBytes": 512, "listen": "127.0.0.1:20000",
            "image": {"name": "i", "uuid": "01234567", "path": "/p", "format": "raw"}
        }),
        json!({"request": "status"}),
        json!({"request": "watch"}),
        json!({"request": "shutdown"}),
        json!({"request": "open", "generation": 4, "members": ["r1"]}),
        json!({"request": "fence", "generation": 5, "members": ["r1"], "export": "v-4"}),
        json!({"request": "close", "generation": 5}),
        json!({"reply": "done"}),
        json!({"reply": "refused", "message": "no"}),
        json!({"reply": "opened", "export": "v-4"}),
        json!({"reply": "status", "record": record, "export": null, "actual_size_bytes": 4096}),
        json!({
            "reply": "status", "volume": "v", "pid": 1, "generation": 3, "serving": true, "replicas": {"r1": "in_sync", "r2": "dropped"},
            "replicaErrors": {"r2": "gone"}, "faulted": null, "readOps": 1, "readBytes": 2, "writeOps": 3, "writeBytes": 4,
            "flushOps": 5, "inFlight": 6, "lives": 1
        }),
        record,
    ]
}

fn parameters() -> Vec<Vec<u8>> {
    let image = json!({"url": "https://user:SECRET1@example.com/i.qcow2?t=SECRET2", "padToSector": "true"}).to_string();
    let whole = json!({
        "backingImage": "ubuntu", "backingImageDataSourceType": "download", "backingImageDataSourceParameters": image,
        "backingImageChecksum": "5".repeat(128), "backingImageMinNumberOfCopies": "2", "backingImageNodeSelector": "a,b",
        "backingImageDiskSelector": "ssd", "numberOfReplicas": "3", "staleReplicaTimeout": "30", "exclusive": "false",
        "diskSelector": "ssd,fast", "nodeSelector": "a", "fsType": "ext4", "mkfsParams": "-O ^64bit -b 4096"
    });
    let others = [
        "backingImageName=ubuntu\nbackingImageDataSourceParameters={\"url\":\"http:user:SECRET1@example.com/\"}",
        "share=true\nmigratable=false\nencrypted=f",
        "dataLocality=disabled\nreplicaAutoBalance=ignored\nfromBackup=\nrecurringJobSelector=",
        "numberOfReplicas=0\nfsType=xfs\ncsi.storage.k8s.io/fstype=xfs",
        "numberOfReplica=3",
        "dataEngine=v1\nunmapMarkSnapChainRemoved=ignored\nfreezeFilesystemForSnapshot=ignored\ndisableRevisionCounter=true",
        "replicaSoftAntiAffinity=ignored\nreplicaZoneSoftAntiAffinity=enabled\nreplicaDiskSoftAntiAffinity=disabled",
    ];
    std::iter::once(whole.to_string()).chain(others.map(String::from)).map(String::into_bytes).collect()
}

fn manifests() -> Vec<Vec<u8>> {
    let manifest = |size_bytes: u64, format| {
        let chunks = (0..agent::manifest::chunk_count(size_bytes)).map(|c| (c % 3 != 1).then_some([c as u8 + 1; 32]));
        let manifest = agent::manifest::Manifest {
            uuid: "0a1b2c3d".parse().expect("a uuid"),
            sha512: "5".repeat(128).parse().expect("a digest"),
            format,
            size_bytes,
            virtual_size_bytes: 1 << 30,
            chunks: chunks.collect(),
        };
        let mut bytes = manifest.encode();
        // The target adds the checksum.
        bytes.truncate(bytes.len() - 32);
        bytes
    };
    use agent::config_file::Format::{Qcow2, Raw};
    vec![manifest(512, Raw), manifest((3 << 20) + 1, Qcow2), manifest(5 << 20, Raw)]
}

fn fuse_requests() -> Vec<Vec<u8>> {
    let request = |opcode: u32, length: usize, fields: &[(usize, u64)]| {
        let mut bytes = vec![0; length];
        bytes[4..8].copy_from_slice(&opcode.to_ne_bytes());
        bytes[8] = 77;
        for (at, value) in fields {
            bytes[*at..at + 8].copy_from_slice(&value.to_ne_bytes());
        }
        bytes
    };
    vec![
        request(fuse::INIT, 104, &[(40, 7 | 40 << 32), (52, u64::MAX)]),
        request(fuse::GETATTR, 56, &[]),
        request(fuse::SETATTR, 128, &[(40, 8), (56, 4096)]),
        request(fuse::READ, 80, &[(48, 4096), (56, 8192)]),
        request(fuse::WRITE, 80 + 64, &[(48, 4096), (56, 64)]),
        request(fuse::FALLOCATE, 72, &[(48, 4096), (56, 8192), (64, 3)]),
        request(fuse::FALLOCATE, 72, &[(48, 4096), (56, 8192), (64, 0x11)]),
        request(fuse::FSYNC, 56, &[]),
        request(fuse::STATFS, 40, &[]),
        request(fuse::FORGET, 48, &[]),
    ]
}

fn option_reply(kind: u32, content: &[u8]) -> Vec<u8> {
    let header = [wire::OPT_GO, kind, content.len() as u32].map(u32::to_be_bytes).concat();
    [&wire::OPTION_REPLY_MAGIC.to_be_bytes()[..], &header, content].concat()
}

fn nbd_servers() -> Vec<Vec<u8>> {
    let info = [&[0, 0], &(1u64 << 30).to_be_bytes()[..], &0x45u16.to_be_bytes()].concat();
    let opened = [option_reply(wire::REP_INFO, &info), option_reply(wire::REP_ACK, &[])].concat();
    let refused = option_reply(wire::REP_ERR_UNKNOWN, b"no such export");
    vec![[server::greeting(), opened].concat(), [server::greeting(), refused].concat()]
}

fn nbd_options() -> Vec<Vec<u8>> {
    let flags = 3u32.to_be_bytes().to_vec();
    let option = |option: u32, content: &[u8]| {
        [&wire::OPTION_MAGIC.to_be_bytes()[..], &option.to_be_bytes(), &(content.len() as u32).to_be_bytes(), content]
            .concat()
    };
    let info = [&5u32.to_be_bytes()[..], b"vol-1", &1u16.to_be_bytes(), &3u16.to_be_bytes()].concat();
    vec![
        wire::encode_go("vol-1"),
        wire::encode_go("another"),
        [flags.clone(), option(wire::OPT_LIST, &[]), option(wire::OPT_INFO, &info), option(wire::OPT_GO, &info)]
            .concat(),
        [flags.clone(), option(8, &[]), option(10, b"x"), option(wire::OPT_ABORT, &[])].concat(),
        [1u32.to_be_bytes().to_vec(), option(wire::OPT_EXPORT_NAME, b"vol-1")].concat(),
    ]
}

fn nbd_replies() -> Vec<Vec<u8>> {
    let reply = |index: u8, error| wire::encode_reply(u64::from(index) << 56, error).to_vec();
    let read = |index: u8| [reply(index, 0), vec![index + 1; 512]].concat();
    vec![
        [read(0), reply(1, 0), reply(2, 0), read(3), reply(4, 0), reply(5, 0)].concat(),
        [reply(2, 5), reply(1, 28), reply(0, 22)].concat(),
        [reply(1, 0), reply(1, 0)].concat(),
    ]
}

fn nbd_requests() -> Vec<Vec<u8>> {
    let request =
        |command, flags, offset, length| wire::Request { flags, command, cookie: 0, offset, length }.encode().to_vec();
    let write = |offset, length: u32| [request(wire::CMD_WRITE, 0, offset, length), vec![7; length as usize]].concat();
    vec![
        [vec![255], write(1, 512), request(wire::CMD_READ, 0, 1, 512), request(wire::CMD_FLUSH, 0, 0, 0)].concat(),
        [vec![0], write(4096, 40), request(wire::CMD_TRIM, 0, 4, 8), request(wire::CMD_DISC, 0, 0, 0)].concat(),
        [
            vec![66],
            request(wire::CMD_WRITE_ZEROES, wire::NO_HOLE, 1, 4096),
            request(99, 0, 0, 0),
            request(wire::CMD_READ, 1, 0, 1),
        ]
        .concat(),
        [vec![3], request(wire::CMD_READ, 0, 1, 40 << 20), request(wire::CMD_READ, 0, 1, 0), write(1, 0)].concat(),
    ]
}

fn qemu_img(arguments: &[&str]) {
    let status = Command::new("qemu-img").args(arguments).status().expect("qemu-img is installed");
    assert!(status.success(), "{arguments:?}");
}

/// Small files of all kinds, not larger than what is fuzzed with.
fn qcow2_files() -> Vec<Vec<u8>> {
    let folder = std::env::temp_dir().join(format!("seeds-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder");
    let path = |name: &str| folder.join(name).display().to_string();
    let mut raw = vec![0u8; 24 << 10];
    raw[1000..3000].iter_mut().zip(0u32..).for_each(|(byte, index)| *byte = ((index * index) >> 3) as u8 | 1);
    raw[9000..9100].fill(7);
    std::fs::write(path("raw"), raw).expect("a file");
    let files: Vec<Vec<u8>> = [
        &["-o", "cluster_size=512"][..],
        &["-c", "-o", "cluster_size=512"],
        &["-c", "-o", "cluster_size=512,compression_type=zstd"],
        &["-o", "cluster_size=512,compat=0.10"],
        &["-o", "cluster_size=1k,lazy_refcounts=on"],
        &["-o", "cluster_size=512,preallocation=metadata"],
    ]
    .iter()
    .map(|options| {
        let mut arguments = vec!["convert", "-q", "-f", "raw", "-O", "qcow2"];
        arguments.extend_from_slice(options);
        let (from, to) = (path("raw"), path("out"));
        arguments.extend([from.as_str(), to.as_str()]);
        qemu_img(&arguments);
        std::fs::read(Path::new(&to)).expect("a file")
    })
    .collect();
    std::fs::remove_dir_all(&folder).expect("it can be removed");
    files.into_iter().chain([extended()]).collect()
}

/// Extended L2 entries need clusters of 16 KiB: one for the header and each table.
fn extended() -> Vec<u8> {
    let mut bytes = vec![0; 64 << 10];
    bytes[..4].copy_from_slice(&agent::qcow2::MAGIC);
    for (at, value) in [(4, 3u32), (20, 14), (36, 1), (56, 1), (96, 4), (100, 112)] {
        bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
    }
    for (at, value) in [(24, 1u64 << 20), (40, 16 << 10), (48, 32 << 10), (72, 16), (16 << 10, 1 << 63 | 48 << 10)] {
        bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
    }
    bytes
}

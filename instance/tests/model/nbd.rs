//! The NBD sides as strangers see them: `nbdinfo`, `nbdcopy`, `qemu-img`, fio, and clients that break every rule.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::Duration;

use engine::nbd::client::open_export;
use engine::nbd::{server, wire};
use proto::replica::{Reply, Request};
use serde_json::Value;

use crate::array::first_difference;
use crate::clients::{Call, by_nbd, read_device};
use crate::steps::Kind;
use crate::world::{Form, Length, Shape, World, image_content, run};

const SIZE: u16 = 2047;
const INVALID: u32 = 22;
const NO_SPACE: u32 = 28;

/// An attached volume over a shorter image, and its bytes.
fn volume(replicas: usize) -> (World, Vec<u8>) {
    let mut world = World::new(&Shape { image: Some((Form::Zlib, Length::Shorter)), replicas, tls: false }, SIZE);
    world.attach();
    let mut bytes = image_content(world.image_bytes);
    bytes.resize(world.volume_bytes as usize, 0);
    (world, bytes)
}

fn uri(world: &World) -> String {
    format!("nbd+unix:///vol?socket={}", world.config.nbd_socket.display())
}

fn info(uri: &str) -> Value {
    let text = run(Command::new("nbdinfo").args(["--json", uri]));
    serde_json::from_str::<Value>(&text).unwrap()["exports"][0].take()
}

#[test]
fn tools_see_the_volume_as_it_is() {
    let (mut world, bytes) = volume(3);
    let uri = uri(&world);
    let seen = info(&uri);
    for (key, expected) in [
        ("export-name", Value::from("vol")),
        ("export-size", world.volume_bytes.into()),
        ("is_read_only", false.into()),
        ("can_flush", true.into()),
        ("can_trim", true.into()),
        ("can_zero", true.into()),
        ("can_multi_conn", true.into()),
        ("can_fua", false.into()),
        ("block_size_minimum", 1.into()),
        ("block_size_preferred", 4096.into()),
        ("block_size_maximum", (32 << 20).into()),
    ] {
        assert_eq!(seen[key], expected, "{key} in {seen}");
    }
    let server = format!("nbd+unix://?socket={}", world.config.nbd_socket.display());
    let list = run(Command::new("nbdinfo").args(["--list", "--json", &server]));
    assert_eq!(serde_json::from_str::<Value>(&list).unwrap()["exports"].as_array().unwrap().len(), 1, "{list}");

    let copy = world.folder().join("copy");
    run(Command::new("nbdcopy").arg(&uri).arg(&copy));
    assert_eq!(first_difference(&std::fs::read(&copy).unwrap(), &bytes), None);
    run(Command::new("qemu-img").args(["compare", "-f", "raw", "-F", "raw"]).arg(&copy).arg(&uri));

    // The other way: what a tool writes is what the device shows.
    let new: Vec<u8> = bytes.iter().rev().copied().collect();
    std::fs::write(&copy, &new).unwrap();
    run(Command::new("nbdcopy").arg("--flush").arg(&copy).arg(&uri));
    assert_eq!(first_difference(&read_device(&world.device, world.volume_bytes), &new), None);

    let mut fio = Command::new("fio");
    fio.args([
        "--name=nbd",
        "--ioengine=nbd",
        "--rw=randwrite",
        "--bsrange=512-64k",
        "--bs_unaligned=1",
        "--iodepth=16",
    ]);
    fio.args(["--size=1M", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1"]).arg(format!("--uri={uri}"));
    run(fio.current_dir(world.folder()));
    let bytes = read_device(&world.device, world.volume_bytes);
    world.detach();
    world.assert_replicas_hold(&bytes);
}

#[test]
fn tools_see_an_export_of_a_replica_as_it_is() {
    let (mut world, bytes) = volume(1);
    world.detach();
    world.start_replicas();
    let generation = world.record(0).generation + 1;
    let opened = world.ask_replica(0, &Request::Open { generation, members: vec!["r0".into()], seen: None });
    let Reply::Opened { export } = opened else { panic!("{opened:?}") };
    let address = world.replica_address(0);
    let seen = info(&format!("nbd://{address}/{export}"));
    for (key, expected) in [
        ("export-size", Value::from(world.volume_bytes)),
        ("is_read_only", false.into()),
        ("can_flush", true.into()),
        ("can_zero", true.into()),
    ] {
        assert_eq!(seen[key], expected, "{key} in {seen}");
    }
    let copy = world.folder().join("copy");
    run(Command::new("nbdcopy").arg(format!("nbd://{address}/{export}")).arg(&copy));
    assert_eq!(first_difference(&std::fs::read(&copy).unwrap(), &bytes), None);
    // The image and what is behind its end come with the replica; another name opens nothing.
    let mut stream = TcpStream::connect(address).unwrap();
    assert!(open_export(&mut stream, "vol").unwrap_err().to_string().contains("refused export `vol`"));
}

fn connect(world: &World) -> UnixStream {
    let stream = UnixStream::connect(&world.config.nbd_socket).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    stream.set_write_timeout(Some(Duration::from_secs(30))).unwrap();
    stream
}

fn opened(world: &World) -> UnixStream {
    let mut stream = connect(world);
    assert_eq!(open_export(&mut stream, "vol").unwrap(), world.volume_bytes);
    stream
}

/// Whether the server ended the connection (and did not just fall silent).
fn is_over(stream: &mut UnixStream) -> bool {
    match stream.read(&mut [0; 1]) {
        Ok(count) => count == 0,
        Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
    }
}

fn ask(stream: &mut UnixStream, request: wire::Request, payload: &[u8]) -> (u32, u64) {
    stream.write_all(&[&request.encode()[..], payload].concat()).unwrap();
    let mut header = [0; wire::REPLY_LENGTH];
    stream.read_exact(&mut header).unwrap();
    wire::parse_reply(&header).unwrap()
}

/// Requests that ask for what cannot be: refused one by one, and the connection goes on.
fn check_odd_requests(world: &World) {
    let size = world.volume_bytes;
    let request = |command, flags, offset, length| wire::Request { flags, command, cookie: 77, offset, length };
    let mut stream = opened(world);
    for (what, request, payload, allowed) in [
        ("a read of nothing", request(wire::CMD_READ, 0, 0, 0), 0, &[0, INVALID][..]),
        ("a write of nothing", request(wire::CMD_WRITE, 0, size, 0), 0, &[0, INVALID]),
        ("zeroes of nothing", request(wire::CMD_WRITE_ZEROES, 0, 4096, 0), 0, &[0, INVALID]),
        ("a read across the end", request(wire::CMD_READ, 0, size - 1, 2), 0, &[INVALID]),
        ("a read behind the end", request(wire::CMD_READ, 0, size, 1), 0, &[INVALID]),
        ("a read at the end of numbers", request(wire::CMD_READ, 0, u64::MAX, 4096), 0, &[INVALID]),
        ("a write across the end", request(wire::CMD_WRITE, 0, size - 1, 2), 2, &[INVALID, NO_SPACE]),
        ("a write at the end of numbers", request(wire::CMD_WRITE, 0, u64::MAX - 1, 4096), 4096, &[INVALID, NO_SPACE]),
        ("zeroes across the end", request(wire::CMD_WRITE_ZEROES, 0, 512, u32::MAX), 0, &[INVALID, NO_SPACE]),
        ("a discard behind the end", request(wire::CMD_TRIM, 0, size + 512, 512), 0, &[INVALID, NO_SPACE]),
        ("a huge read", request(wire::CMD_READ, 0, 0, u32::MAX), 0, &[INVALID]),
        ("an unknown flag", request(wire::CMD_READ, 1, 0, 512), 0, &[INVALID]),
        ("a cache request", request(5, 0, 0, 512), 0, &[INVALID]),
        ("block status without having asked for it", request(7, 0, 0, 512), 0, &[INVALID]),
        ("an unknown command", request(99, 0, 0, 512), 0, &[INVALID]),
    ] {
        let (error, cookie) = ask(&mut stream, request, &vec![0xee; payload]);
        assert!(cookie == 77 && allowed.contains(&error), "{what}: error {error}, cookie {cookie}");
    }
    let mut one = [0];
    assert_eq!(ask(&mut stream, request(wire::CMD_READ, 0, 1, 1), &[]), (0, 77), "a read of one byte");
    stream.read_exact(&mut one).unwrap();
    assert_eq!(ask(&mut stream, request(wire::CMD_FLUSH, 0, 0, 0), &[]), (0, 77));
    stream.write_all(&request(wire::CMD_DISC, 0, 0, 0).encode()).unwrap();
    assert!(is_over(&mut stream), "good-bye");
}

fn option(option: u32, content: &[u8]) -> Vec<u8> {
    let header = [option, content.len() as u32].map(u32::to_be_bytes).concat();
    [&wire::OPTION_MAGIC.to_be_bytes()[..], &header, content].concat()
}

/// Options in any order; those that are not known are refused and the negotiation goes on.
fn check_odd_options(world: &World) {
    let mut stream = connect(world);
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).unwrap();
    assert_eq!(greeting[..], server::greeting());
    stream.write_all(&3u32.to_be_bytes()).unwrap();
    let another = [&7u32.to_be_bytes()[..], b"another", &[0, 0]].concat();
    let lies = [&4000u32.to_be_bytes()[..], b"vol", &[0, 0]].concat();
    for (what, sent, expected) in [
        ("structured replies", option(8, &[]), wire::REP_ERR_UNSUP),
        ("TLS", option(5, &[]), wire::REP_ERR_UNSUP),
        ("an option that nobody knows", option(4711, &[1; 300]), wire::REP_ERR_UNSUP),
        ("a list with something in it", option(wire::OPT_LIST, b"x"), wire::REP_ERR_INVALID),
        ("another export", option(wire::OPT_INFO, &another), wire::REP_ERR_UNKNOWN),
        ("a name longer than its option", option(wire::OPT_GO, &lies), wire::REP_ERR_INVALID),
    ] {
        stream.write_all(&sent).unwrap();
        let mut header = [0; 20];
        stream.read_exact(&mut header).unwrap();
        let (_, kind, length) = wire::parse_option_reply(&header).unwrap();
        stream.read_exact(&mut vec![0; length]).unwrap();
        assert_eq!(kind, expected, "{what}");
    }
    stream.write_all(&option(wire::OPT_ABORT, &[])).unwrap();
    stream.read_exact(&mut [0; 20]).unwrap();
    assert!(is_over(&mut stream), "an abort");
}

/// Clients that make no sense are left.
fn check_strangers(world: &World) {
    let unknown_flags = 4u32.to_be_bytes().to_vec();
    let long =
        [&3u32.to_be_bytes()[..], &wire::OPTION_MAGIC.to_be_bytes(), &3u32.to_be_bytes(), &u32::MAX.to_be_bytes()];
    let other_name = [&3u32.to_be_bytes()[..], &option(wire::OPT_EXPORT_NAME, b"another")];
    for (what, says) in [
        ("another protocol", b"GET / HTTP/1.1\r\n\r\n".to_vec()),
        ("unknown flags", unknown_flags),
        ("an option of 4 GiB", long.concat()),
        ("an export that is not there", other_name.concat()),
    ] {
        let mut stream = connect(world);
        stream.read_exact(&mut [0; 18]).unwrap();
        stream.write_all(&says).unwrap();
        assert!(is_over(&mut stream), "{what}");
    }
    let mut garbage = opened(world);
    garbage.write_all(&[0x55; 28]).unwrap();
    assert!(is_over(&mut garbage), "a request without its magic number");
    let mut huge = opened(world);
    let write = wire::Request { flags: 0, command: wire::CMD_WRITE, cookie: 1, offset: 0, length: u32::MAX };
    huge.write_all(&write.encode()).unwrap();
    assert!(is_over(&mut huge), "a write of 4 GiB");
}

fn resident_bytes(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

#[test]
fn clients_that_break_every_rule_disturb_nobody() {
    let (mut world, bytes) = volume(1);
    let same = |what: &str, world: &World| {
        let seen = read_device(&world.device, world.volume_bytes);
        assert_eq!(first_difference(&seen, &bytes), None, "after {what}");
    };
    check_odd_requests(&world);
    check_odd_options(&world);
    check_strangers(&world);
    same("odd requests", &world);

    // The half of a write, and the connection is gone: nothing is written.
    let mut half = opened(&world);
    let write = wire::Request { flags: 0, command: wire::CMD_WRITE, cookie: 1, offset: 0, length: 1 << 20 };
    half.write_all(&[&write.encode()[..], &[0xee; 300_000]].concat()).unwrap();
    drop(half);
    same("a write that was cut", &world);

    // Many that ask for much and read nothing.
    let read = wire::Request { flags: 0, command: wire::CMD_READ, cookie: 1, offset: 0, length: 1 << 20 };
    let slow: Vec<UnixStream> = (0..4).map(|_| opened(&world)).collect();
    for mut stream in &slow {
        stream.write_all(&read.encode().repeat(1000)).unwrap();
    }
    let call = Call { kind: Kind::Read, offset: 0, length: 4096, stamp: 0 };
    let answer = by_nbd(&world.config.nbd_socket, "vol", &[call], || ()).remove(0).unwrap();
    assert_eq!(answer, bytes[..4096], "another client is served meanwhile");
    same("clients that do not read", &world);
    let resident = resident_bytes(world.status().pid);
    assert!(resident < 400 << 20, "the engine holds {resident} bytes for four clients that do not read");
    drop(slow);

    // Too many clients: the last ones are turned away, the first ones are served, and their places are free again.
    let mut many: Vec<UnixStream> = (0..engine::limits::MAX_NBD_CLIENTS).map(|_| opened(&world)).collect();
    assert!(is_over(&mut connect(&world)), "one client too many");
    for stream in &mut many {
        assert_eq!(ask(stream, wire::Request { command: wire::CMD_FLUSH, length: 0, ..read }, &[]), (0, 1));
    }
    drop(many);
    let seen = Command::new("nbdinfo").arg(uri(&world)).stdout(Stdio::null()).status().unwrap();
    assert!(seen.success(), "their places are free again");
    same("too many clients", &world);
    world.detach();
    world.assert_replicas_hold(&bytes);
}

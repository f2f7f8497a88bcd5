//! The engine as users meet it: a loop device on FUSE, replicas in `qemu-storage-daemon`, and processes that die.

mod support;

use backing_image_engine as engine;

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use proto::engine::{ReplicaAddress, ReplicaState};
use proto::replica::{Request, file};
use rustix::process::Signal;
use support::{MIB, Moment, Replica, VERIFY, Volume, fio, kill, run, sh, signal, wait_until};

/// Not a test: what the holder and engine processes of the tests run.
#[test]
#[ignore = "a role for the processes that the tests start"]
fn role_process() {
    support::role();
}

const OVERLAP: [&str; 5] = ["--rw=randwrite", "--size=2M", "--norandommap", "--time_based", "--runtime=2"];

#[test]
fn a_volume_works_like_a_disk_and_ends_cleanly() {
    let mut volume = Volume::new(3, 64 * MIB);
    let device = volume.attach();
    run(&mut fio(&volume, &VERIFY));
    run(&mut fio(&volume, &OVERLAP));
    run(Command::new("blkdiscard").args(["-z", "-o", "1048576", "-l", "4194304"]).arg(&device));
    run(Command::new("blkdiscard").args(["-o", "8388608", "-l", "4194304"]).arg(&device));
    let zeroes = sh(&format!(
        "cmp -n 4194304 -i 1048576:0 {0} /dev/zero && cmp -n 4194304 -i 8388608:0 {0} /dev/zero",
        device.display()
    ));
    assert!(zeroes.status.success(), "{}", String::from_utf8_lossy(&zeroes.stdout));
    let status = volume.status();
    assert_eq!((status.generation, status.lives, status.faulted), (1, 1, None));
    assert!(status.write_bytes >= 24 * MIB && status.read_ops > 0 && status.flush_ops > 0);
    let limit = Duration::from_secs(10);
    let refusal = engine::control_client::shutdown(&volume.config.control_socket, limit).unwrap_err().to_string();
    assert!(refusal.contains("in use") && refusal.contains("loop device"), "{refusal}");
    assert_eq!(volume.status().generation, 1, "a refusal disturbs nothing");
    volume.detach_loop();
    assert!(volume.shutdown(), "{}", volume.log());
    assert!(!volume.is_mounted());
    assert!(!volume.config.control_socket.exists() && !volume.config.nbd_socket.exists());
    for replica in &volume.replicas {
        let record = replica.record();
        assert_eq!((record.generation, record.clean, record.members.len()), (1, true, 3));
    }
    volume.assert_equal(0, 1);
    volume.assert_equal(0, 2);
}

#[test]
fn a_replica_that_dies_under_load_costs_no_error_and_is_stale_then() {
    let mut volume = Volume::new(3, 64 * MIB);
    volume.attach();
    let load = fio(&volume, &["--rw=randrw", "--size=48M", "--time_based", "--runtime=4"]).spawn().unwrap();
    wait_until("the load runs", || volume.status().write_ops > 100);
    volume.replicas[0].kill();
    wait_until("the replica is dropped", || volume.state("r1") == ReplicaState::Dropped);
    let output = load.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let status = volume.status();
    assert_eq!((status.generation, status.faulted), (2, None));
    assert!(!status.replica_errors["r1"].is_empty());
    volume.detach_loop();
    assert!(volume.shutdown());
    let left = engine::process::last_generation(&volume.config.control_socket).unwrap();
    assert_eq!(left, Some(2), "nobody may have been told of it before its end");
    let records: Vec<_> = volume.replicas.iter().map(|replica| replica.record()).collect();
    assert_eq!((records[0].generation, records[0].clean), (1, false));
    for record in &records[1..] {
        assert_eq!((record.generation, record.clean), (2, true));
        assert_eq!(record.members, ["r2", "r3"]);
    }
    volume.assert_equal(1, 2);
}

#[test]
fn a_silent_replica_is_dropped_after_its_time_limit() {
    let mut volume = Volume::new(2, 64 * MIB);
    volume.config.replica_timeout_ms = 1_500;
    volume.attach();
    let daemon = volume.replicas[1].daemon_pid();
    assert!(sh(&format!("kill -STOP {daemon}")).status.success());
    let started = Instant::now();
    run(&mut fio(&volume, &["--rw=write", "--size=1M"]));
    assert!(started.elapsed() >= Duration::from_millis(1_500));
    assert_eq!(volume.state("r2"), ReplicaState::Dropped);
    assert!(volume.status().replica_errors["r2"].contains("1.5s"));
    // What was on its way to it may still be carried out, but nothing comes any more.
    assert!(sh(&format!("kill -CONT {daemon}")).status.success());
    let served = format!(" 03 [0-9]+ {}$", volume.replicas[1].directory.join(file::NBD_SOCKET).display());
    wait_until("its connection has ended", || !sh(&format!("grep -qE '{served}' /proc/net/unix")).status.success());
    volume.detach_loop();
    assert!(volume.shutdown());
    assert!(volume.replicas[0].record().clean);
}

#[test]
fn requests_are_held_for_a_while_when_the_last_replica_is_gone() {
    let mut volume = Volume::new(1, 64 * MIB);
    let device = volume.attach();
    volume.replicas[0].kill();
    wait_until("the fault is noticed", || volume.status().faulted.is_some());
    let started = Instant::now();
    let write = sh(&format!("dd if=/dev/zero of={} bs=4096 count=1 oflag=direct", device.display()));
    assert!(String::from_utf8_lossy(&write.stderr).contains("Input/output error"));
    assert!(started.elapsed() >= Duration::from_millis(1_000), "held for {:?}", started.elapsed());
    assert!(volume.status().faulted.unwrap().contains("fail"));
    volume.detach_loop();
    assert!(volume.shutdown());
    assert!(!volume.replicas[0].record().clean);
}

#[test]
fn an_engine_that_is_killed_twice_under_load_is_replaced_without_an_error() {
    let mut volume = Volume::new(3, 64 * MIB);
    volume.attach();
    let load = fio(&volume, &VERIFY).spawn().unwrap();
    for life in 1..=2 {
        let already = volume.status().write_ops;
        wait_until("the load runs", || volume.try_status().is_some_and(|status| status.write_ops > already + 100));
        kill(volume.engine_pid());
        wait_until("the next engine serves", || volume.try_status().is_some_and(|status| status.lives == life + 1));
    }
    let output = load.wait_with_output().unwrap();
    assert!(output.status.success(), "{}\n{}", String::from_utf8_lossy(&output.stderr), volume.log());
    let status = volume.status();
    // Each life begins above whatever the last one could have asked its three replicas for.
    assert_eq!((status.lives, status.generation), (3, 7));
    assert!(status.replicas.values().all(|state| *state == ReplicaState::InSync));
    volume.detach_loop();
    assert!(volume.shutdown());
    assert!(volume.replicas.iter().all(|replica| replica.record().clean));
    volume.assert_equal(0, 1);
    volume.assert_equal(0, 2);
}

#[test]
fn a_replica_that_dies_with_the_engine_stays_out_and_checksums_are_right() {
    let mut volume = Volume::new(3, 64 * MIB);
    volume.config.replica_timeout_ms = 3_000;
    volume.attach();
    let load = fio(&volume, &VERIFY).spawn().unwrap();
    wait_until("the load runs", || volume.status().write_ops > 100);
    let engine = volume.engine_pid();
    volume.replicas[2].kill();
    kill(engine);
    wait_until("the next engine serves", || volume.try_status().is_some_and(|status| status.lives == 2));
    let output = load.wait_with_output().unwrap();
    assert!(output.status.success(), "{}\n{}", String::from_utf8_lossy(&output.stderr), volume.log());
    assert_eq!(volume.state("r3"), ReplicaState::Dropped);
    volume.detach_loop();
    assert!(volume.shutdown());
    assert_eq!(volume.replicas[0].record().members, ["r1", "r2"]);
    volume.assert_equal(0, 1);
}

#[test]
fn an_engine_begins_by_comparing_when_an_nbd_client_wrote_before() {
    let mut volume = Volume::new(2, 64 * MIB);
    volume.start_holder();
    volume.wait_serving();
    let uri = format!("nbd+unix:///vol-1?socket={}", volume.config.nbd_socket.display());
    run(Command::new("qemu-io").args(["-f", "raw", "-c", "write -P 7 1M 1M", &uri]));
    let mark = volume.folder().join("engine.sock.differ");
    assert!(mark.exists());
    kill(volume.engine_pid());
    wait_until("the next engine serves", || volume.try_status().is_some_and(|status| status.lives == 2));
    wait_until("the replicas are equal", || volume.state("r2") == ReplicaState::InSync && !mark.exists());
    assert!(volume.shutdown());
    volume.assert_equal(0, 1);
}

#[test]
fn the_engine_goes_on_without_its_holder() {
    let mut volume = Volume::new(1, 64 * MIB);
    volume.attach();
    let mut holder = volume.holder.take().unwrap();
    holder.kill().unwrap();
    holder.wait().unwrap();
    run(&mut fio(&volume, &["--rw=write", "--size=4M"]));
    let socket = &volume.config.control_socket;
    assert!(engine::process::is_served(socket).unwrap(), "whoever cleans up must not take it for dead");
    assert_eq!(engine::process::last_generation(socket).unwrap(), Some(volume.replicas[0].record().generation));
    volume.detach_loop();
    let limit = Duration::from_secs(10);
    wait_until("the engine ends", || engine::control_client::shutdown(&volume.config.control_socket, limit).is_ok());
    wait_until("it is unmounted", || !volume.is_mounted());
    assert!(volume.replicas[0].record().clean);
    wait_until("it is gone", || !engine::process::is_served(&volume.config.control_socket).unwrap());
    // For whoever cleans up: the controller may not have heard of it yet.
    let last = engine::process::last_generation(&volume.config.control_socket).unwrap();
    assert_eq!(last, Some(volume.replicas[0].record().generation));
}

#[test]
fn a_volume_that_was_detached_from_its_file_in_use_does_not_end() {
    let mut volume = Volume::new(1, 64 * MIB);
    volume.attach();
    run(Command::new("umount").arg("-l").arg(&volume.config.mount_file));
    let limit = Duration::from_secs(10);
    let refusal = engine::control_client::shutdown(&volume.config.control_socket, limit).unwrap_err().to_string();
    assert!(refusal.contains("not mounted there"), "{refusal}");
    run(&mut fio(&volume, &["--rw=write", "--size=1M"]));
    volume.detach_loop();
    assert!(volume.wait_holder(), "it ends by itself");
    assert!(volume.replicas[0].record().clean);
}

/// The loop driver asks in whole sectors; whoever opens the file itself need not.
#[test]
fn the_volume_file_takes_any_place_and_any_opener() {
    const SIZE: u64 = 4 * MIB + 1536;
    let mut volume = Volume::new(2, SIZE);
    volume.start_holder();
    volume.wait_serving();
    let open = || File::options().read(true).write(true).open(&volume.config.mount_file).unwrap();
    let (one, other) = (open(), open());
    assert_eq!(one.metadata().unwrap().len(), SIZE);
    one.write_all_at(b"abc", 4095).unwrap();
    let mut read = [9; 7];
    other.read_exact_at(&mut read, 4093).unwrap();
    assert_eq!(&read, b"\0\0abc\0\0");
    // Nothing of it is answered by the kernel from memory.
    let already = volume.status().read_ops;
    other.read_exact_at(&mut read, 4093).unwrap();
    assert!(volume.status().read_ops > already);
    // Across the end and behind it.
    let mut page = [9; 4096];
    for (offset, count) in [(SIZE - 100, 100), (SIZE, 0), (SIZE + 7, 0), (1 << 40, 0)] {
        assert_eq!(one.read_at(&mut page, offset).unwrap(), count, "at {offset}");
    }
    for offset in [SIZE - 4095, SIZE, 1 << 40] {
        let refused = one.write_at(&page, offset).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EINVAL), "at {offset}: {refused}");
    }
    assert_eq!(one.set_len(0).unwrap_err().raw_os_error(), Some(libc::EPERM));
    let reserve = |flags| rustix::fs::fallocate(&one, flags, 4095, 2);
    assert_eq!(reserve(rustix::fs::FallocateFlags::empty()), Err(rustix::io::Errno::OPNOTSUPP));
    assert_eq!(reserve(rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE), Ok(()));
    other.read_exact_at(&mut read, 4093).unwrap();
    assert_eq!(&read, b"\0\0\0\0c\0\0");
    // Several openers at once, on pieces that share sectors, some longer than one request may be.
    let length = 1_100_003;
    std::thread::scope(|scope| {
        for part in 0..3u8 {
            scope.spawn(move || {
                let (file, mut content) = (open(), vec![part + 1; length]);
                file.write_all_at(&content, 11 + u64::from(part) * length as u64).unwrap();
                file.read_exact_at(&mut content, 11 + u64::from(part) * length as u64).unwrap();
                assert!(content.iter().all(|byte| *byte == part + 1));
            });
        }
    });
    let mut content = vec![0; 3 * length + 2];
    other.read_exact_at(&mut content, 10).unwrap();
    assert!(content[0] == 0 && content[3 * length + 1] == 0);
    assert!((0..3).all(|part| content[1 + part * length..][..length].iter().all(|byte| *byte == part as u8 + 1)));
    drop((one, other));
    assert!(volume.shutdown(), "{}", volume.log());
    volume.assert_equal(0, 1);
}

#[test]
fn a_reader_that_is_killed_while_it_waits_disturbs_nobody() {
    let mut volume = Volume::new(1, 64 * MIB);
    volume.start_holder();
    volume.wait_serving();
    let daemon = volume.replicas[0].daemon_pid();
    signal(daemon, Signal::STOP);
    let (file, already) = (volume.config.mount_file.clone(), volume.status().read_ops);
    let mut reader = Command::new("dd").arg(format!("if={}", file.display())).arg("of=/dev/null").spawn().unwrap();
    wait_until("it waits", || volume.status().read_ops > already);
    reader.kill().unwrap();
    // A second one, which the kernel takes back before an engine saw it, or not.
    let mut second = Command::new("dd").arg(format!("if={}", file.display())).arg("of=/dev/null").spawn().unwrap();
    second.kill().unwrap();
    signal(daemon, Signal::CONT);
    assert!(!reader.wait().unwrap().success() && !second.wait().unwrap().success());
    let read = std::fs::read(&file).unwrap();
    assert!(read.len() as u64 == 64 * MIB && read.iter().all(|byte| *byte == 0));
    assert_eq!((volume.status().lives, volume.status().in_flight), (1, 0));
    assert!(volume.shutdown(), "{}", volume.log());
}

#[test]
fn what_dead_engines_left_mounted_is_taken_away() {
    let mut volume = Volume::new(1, 64 * MIB);
    for _ in 0..2 {
        volume.start_holder();
        volume.wait_serving();
        let pid = volume.engine_pid();
        let mut holder = volume.holder.take().unwrap();
        holder.kill().unwrap();
        holder.wait().unwrap();
        kill(pid);
        wait_until("both are gone", || !engine::process::is_served(&volume.config.control_socket).unwrap());
        assert!(volume.is_mounted() && std::fs::File::open(&volume.config.mount_file).is_err());
    }
    volume.start_holder();
    volume.wait_serving();
    assert_eq!(std::fs::metadata(&volume.config.mount_file).unwrap().len(), 64 * MIB);
    assert!(volume.shutdown(), "{}", volume.log());
    assert!(!volume.is_mounted(), "not the dead ones either");
}

/// One line of a control connection.
#[test]
fn too_many_control_clients_are_turned_away_and_the_others_served() {
    let mut volume = Volume::new(1, 64 * MIB);
    volume.start_holder();
    volume.wait_serving();
    let connect = || BufReader::new(UnixStream::connect(&volume.config.control_socket).unwrap());
    let asked = |connection: &mut BufReader<UnixStream>| {
        // One that was turned away may be closed already.
        let _ = writeln!(connection.get_mut(), "{{\"request\":\"status\"}}");
        let mut line = String::new();
        connection.read_line(&mut line).is_ok_and(|count| count > 0)
    };
    let mut connections: Vec<_> = (0..2 * engine::limits::MAX_CONTROL_CLIENTS).map(|_| connect()).collect();
    let served: Vec<_> = connections.iter_mut().map(asked).collect();
    let count = served.iter().filter(|served| **served).count();
    assert!(served[0] && count < engine::limits::MAX_CONTROL_CLIENTS + 1, "{count} clients are served");
    assert!(count + 8 > engine::limits::MAX_CONTROL_CLIENTS, "{count} clients are served");
    drop(connections);
    wait_until("there is room again", || asked(&mut connect()));
    assert!(volume.shutdown(), "{}", volume.log());
}

#[test]
fn a_holder_without_a_replica_ends_at_a_signal() {
    let mut volume = Volume::new(1, 64 * MIB);
    volume.replicas[0].kill();
    volume.start_holder();
    wait_until("it is mounted", || volume.is_mounted());
    volume.signal_holder();
    assert!(volume.wait_holder(), "{}", volume.log());
    assert!(!volume.is_mounted());
}

#[test]
fn replicas_on_other_nodes_are_reached_over_tcp() {
    let mut volume = Volume::new(2, 64 * MIB);
    let address = volume.replicas[1].relay();
    volume.config.replicas.insert("r2".into(), ReplicaAddress::Tcp(address));
    volume.attach();
    run(&mut fio(&volume, &VERIFY));
    volume.replicas[0].kill();
    wait_until("the replica is dropped", || volume.state("r1") == ReplicaState::Dropped);
    run(&mut fio(&volume, &["--rw=read", "--size=24M", "--verify=crc32c"]));
    volume.detach_loop();
    assert!(volume.shutdown());
    let record = volume.replicas[1].record();
    assert_eq!((record.generation, record.clean), (2, true));
}

#[test]
fn a_device_without_an_engine_fails_after_the_holders_limit() {
    let mut volume = Volume::new(1, 64 * MIB);
    volume.config.holder_limit_ms = 2_000;
    volume.config.replica_timeout_ms = 1_000;
    let device = volume.attach();
    let engine = volume.engine_pid();
    volume.replicas[0].kill();
    kill(engine);
    let read = sh(&format!("dd if={} of=/dev/null bs=4096 count=1 iflag=direct", device.display()));
    assert!(String::from_utf8_lossy(&read.stderr).contains("Input/output error"));
    assert!(!volume.wait_holder());
    assert!(volume.log().contains("no engine came to serve") && volume.log().contains("r1"), "{}", volume.log());
    let said = engine::process::holder_report(&volume.config.control_socket).unwrap().unwrap().problem;
    assert!(said.contains("no engine came to serve") && said.contains("r1"), "{said}");
    assert!(volume.is_mounted(), "the loop device is found by its file");
    volume.detach_loop();
}

#[test]
fn a_volume_is_never_served_twice() {
    let mut volume = Volume::new(1, 64 * MIB);
    volume.start_holder();
    volume.wait_serving();
    let first = volume.holder.take();
    volume.start_holder();
    let second = volume.wait_holder();
    volume.holder = first;
    assert!(!second);
    assert!(volume.log().contains("already served"), "{}", volume.log());
    assert_eq!(volume.status().generation, 1);
    assert!(volume.shutdown());
}

#[test]
fn replicas_that_differ_are_compared_and_repaired() {
    let mut volume = Volume::new(3, 64 * MIB);
    for (replica, pattern) in [(0, 1), (1, 2), (2, 1)] {
        volume.replicas[replica].write_pattern(pattern, 5 * MIB + 4096, 3 * MIB);
        volume.replicas[replica].set_record(|record| {
            (record.generation, record.members) = (4, ["r1", "r2", "r3"].map(String::from).to_vec());
        });
    }
    volume.config.compare_replicas = true;
    volume.config.generation = 4;
    volume.attach();
    assert_eq!(volume.state("r1"), ReplicaState::InSync);
    run(&mut fio(&volume, &VERIFY[..2]));
    wait_until("the replicas are equal", || volume.status().replicas.values().all(|s| *s == ReplicaState::InSync));
    volume.detach_loop();
    assert!(volume.shutdown());
    assert!(volume.replicas.iter().all(|replica| replica.record().clean && replica.record().generation == 5));
    volume.assert_equal(0, 1);
    volume.assert_equal(0, 2);
}

#[test]
fn what_a_next_engine_must_know_is_noted_before_a_replica_is_opened() {
    let mut volume = Volume::new(2, 64 * MIB);
    volume.config.compare_replicas = true;
    let [claim, differ] = ["claim", "differ"].map(|what| volume.folder().join(format!("engine.sock.{what}")));
    let noted = Arc::new(Mutex::new(None));
    let seen = noted.clone();
    volume.replicas[0].set_hook(move |request, moment| {
        if matches!(request, Request::Open { .. }) && moment == Moment::Before {
            *seen.lock().unwrap() = Some((std::fs::read_to_string(&claim).ok(), differ.exists()));
        }
    });
    volume.start_holder();
    volume.wait_serving();
    // The first generation, and one more should a replica have to be fenced out.
    assert_eq!(*noted.lock().unwrap(), Some((Some(r#"{"highest":2,"holders":null}"#.to_owned()), true)));
    assert!(volume.shutdown());
}

#[test]
fn a_replica_of_another_volume_or_size_is_never_a_member() {
    let mut volume = Volume::new(3, 64 * MIB);
    volume.replicas[1].set_record(|record| record.volume = "vol-2".into());
    volume.replicas[2].set_record(|record| record.size_bytes = 32 * MIB);
    // One that says the right size and has another one.
    let small = Replica::create(volume.folder(), "r4", "vol-1", 32 * MIB);
    small.set_record(|record| record.size_bytes = 64 * MIB);
    volume.config.replicas.insert("r4".into(), ReplicaAddress::Directory(small.directory.clone()));
    volume.replicas.push(small);
    volume.start_holder();
    volume.wait_serving();
    let status = volume.status();
    for (replica, words) in
        [("r2", "belongs to volume `vol-2`"), ("r3", "33554432 bytes"), ("r4", "export has 33554432")]
    {
        assert_eq!(status.replicas[replica], ReplicaState::Dropped, "{replica}: {status:?}");
        assert!(status.replica_errors[replica].contains(words), "{:?}", status.replica_errors);
    }
    assert_eq!(volume.replicas[0].record().members, ["r1"]);
    assert!(volume.shutdown());
}

#[test]
fn an_attachment_goes_on_without_a_replica_that_does_not_answer_and_leaves_it_behind() {
    let mut volume = Volume::new(2, 64 * MIB);
    volume.config.replica_timeout_ms = 1_000;
    volume.replicas[1].kill();
    volume.attach();
    let status = volume.status();
    assert_eq!((status.replicas["r1"], status.replicas["r2"]), (ReplicaState::InSync, ReplicaState::Dropped));
    assert!(status.replica_errors.contains_key("r2"));
    assert_eq!(volume.replicas[0].record().members, ["r1"]);
    volume.detach_loop();
    assert!(volume.shutdown());
}

#[test]
fn a_watcher_sees_a_replica_go() {
    let mut volume = Volume::new(2, 64 * MIB);
    volume.start_holder();
    volume.wait_serving();
    let mut watch = engine::control_client::watch(&volume.config.control_socket).unwrap();
    let limit = Duration::from_secs(30);
    assert_eq!(watch.next(limit).unwrap().replicas["r2"], ReplicaState::InSync);
    volume.replicas[1].kill();
    let mut status = watch.next(limit).unwrap();
    while status.generation < 2 {
        status = watch.next(limit).unwrap();
    }
    assert_eq!(status.replicas["r2"], ReplicaState::Dropped);
    assert!(volume.shutdown());
    assert!(watch.next(limit).is_err());
}

#[test]
fn the_nbd_export_serves_the_usual_tools() {
    let mut volume = Volume::new(2, 64 * MIB);
    volume.start_holder();
    volume.wait_serving();
    let uri = format!("nbd+unix:///vol-1?socket={}", volume.config.nbd_socket.display());
    let list = run(Command::new("nbdinfo").args(["--list", "--json", &uri]));
    let list: serde_json::Value = serde_json::from_slice(&list.stdout).unwrap();
    let export = &list["exports"][0];
    assert_eq!((export["export-name"].as_str(), export["export-size"].as_u64()), (Some("vol-1"), Some(64 * MIB)));
    assert_eq!((export["can_flush"].as_bool(), export["can_zero"].as_bool()), (Some(true), Some(true)));
    let wrong = Command::new("nbdinfo").arg(uri.replace("vol-1", "vol-2")).output().unwrap();
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("No such file"), "{wrong:?}");

    let (source, copy) = (volume.folder().join("source"), volume.folder().join("copy"));
    let bytes: Vec<u8> = (0..64 * MIB as usize).map(|at| if at % 7 < 3 { (at >> 9) as u8 } else { 0 }).collect();
    std::fs::write(&source, &bytes).unwrap();
    run(Command::new("nbdcopy").arg(&source).arg(&uri));
    run(Command::new("nbdcopy").arg(&uri).arg(&copy));
    assert!(std::fs::read(&copy).unwrap() == bytes);
    run(Command::new("qemu-img").args(["compare", "-f", "raw", "-F", "raw"]).arg(&source).arg(&uri));
    let mut load = Command::new("fio");
    load.args(["--name=nbd", "--ioengine=nbd", "--rw=randwrite", "--bs=4k", "--iodepth=16", "--size=8M"]);
    run(load.args(["--verify=crc32c", "--uri", &uri]).current_dir(volume.folder()));
    run(Command::new("qemu-io").args(["-f", "raw", "-c", "write -P 7 0 20M", "-c", "read -P 7 0 20M", &uri]));
    assert!(volume.shutdown());
    volume.assert_equal(0, 1);
}

#[test]
fn memory_of_large_requests_is_given_back() {
    let mut volume = Volume::new(2, 64 * MIB);
    volume.attach();
    // 16 requests of 1 MiB in flight.
    run(&mut fio(&volume, &["--rw=write", "--bs=1M", "--size=48M"]));
    let engine = volume.engine_pid();
    let anonymous_kib = || -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{engine}/status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    };
    wait_until("the engine has given its buffers back", || anonymous_kib() < 4096);
    volume.detach_loop();
    assert!(volume.shutdown());
}

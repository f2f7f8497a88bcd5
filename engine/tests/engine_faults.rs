//! Engines that are killed at every step, that hang, that cannot be started: what the holder makes of it.

mod support;

use backing_image_engine as engine;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use engine::control_client;
use proto::engine::{HolderReport, ReplicaState};
use proto::replica::{Record, Request};
use rustix::process::Signal;
use support::{MIB, Moment, VERIFY, Volume, children, fio, fio_on, is_alive, kill, run, sh, signal, wait_until};

/// Not a test: what the holder and engine processes of the tests run.
#[test]
#[ignore = "a role for the processes that the tests start"]
fn role_process() {
    support::role();
}

const LOAD: [&str; 5] = ["--rw=randwrite", "--size=8M", "--verify=crc32c", "--verify_fatal=1", "--rate_iops=3000"];

fn start_load(volume: &Volume) -> Child {
    let already = volume.status().write_ops;
    let load = fio(volume, &LOAD).spawn().unwrap();
    wait_until("the load runs", || volume.try_status().is_some_and(|status| status.write_ops > already + 50));
    load
}

fn assert_no_error(volume: &Volume, load: Child) {
    let output = load.wait_with_output().unwrap();
    assert!(output.status.success(), "{}\n{}", String::from_utf8_lossy(&output.stderr), volume.log());
}

fn wait_for_life(volume: &Volume, life: u32) {
    wait_until("the next engine serves", || volume.try_status().is_some_and(|status| status.lives >= life));
}

fn report(volume: &Volume) -> Option<HolderReport> {
    engine::process::holder_report(&volume.config.control_socket).unwrap()
}

/// Does something to the engine of this moment, once, when a replica is at that point of such a request.
fn at(
    volume: &Volume,
    replica: usize,
    kind: &'static str,
    moment: Moment,
    act: impl Fn(u32) + Send + Sync + 'static,
) -> Arc<AtomicBool> {
    let (holder, done) = (volume.holder.as_ref().unwrap().id(), Arc::new(AtomicBool::new(false)));
    let is_done = done.clone();
    volume.replicas[replica].set_hook(move |request, now| {
        let name = match request {
            Request::Status => "status",
            Request::Open { .. } => "open",
            Request::Fence { .. } => "fence",
            Request::Close { .. } => "close",
        };
        if (name, now) == (kind, moment) && !is_done.swap(true, Ordering::SeqCst) {
            children(holder).into_iter().for_each(&act);
        }
    });
    done
}

fn kill_for_good(pid: u32) {
    kill(pid);
    wait_until("it is gone", || !is_alive(pid));
}

fn dd(device: &Path) -> String {
    let read = sh(&format!("dd if={} of=/dev/null bs=4096 count=1 iflag=direct", device.display()));
    String::from_utf8_lossy(&read.stderr).into_owned()
}

fn end(volume: &mut Volume) {
    volume.detach_loop();
    assert!(volume.shutdown(), "{}", volume.log());
}

/// What the device that was lost had acknowledged is read from the next one.
fn everything_is_there_after_another_attachment(volume: &mut Volume) {
    volume.detach_loop();
    volume.config.compare_replicas = true;
    volume.attach();
    run(&mut fio(volume, &["--rw=read", "--size=24M", "--verify=crc32c"]));
    end(volume);
}

/// A mounted filesystem; taken away also when a test fails.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).stderr(Stdio::null()).status();
    }
}

#[test]
fn an_engine_that_is_killed_again_and_again_is_replaced_under_a_mounted_filesystem() {
    let mut volume = Volume::new(2, 128 * MIB);
    let device = volume.attach();
    run(Command::new("mkfs.ext4").arg("-q").arg(&device));
    let mounted = Mounted(volume.folder().join("mnt"));
    std::fs::create_dir(&mounted.0).unwrap();
    run(Command::new("mount").arg(&device).arg(&mounted.0));
    let load =
        fio_on(&volume, &mounted.0.join("file"), &[&LOAD[..], &["--size=24M", "--fsync=64"]].concat()).spawn().unwrap();
    for life in 2..=6 {
        let already = volume.status().write_ops;
        wait_until("the load runs", || volume.try_status().is_some_and(|status| status.write_ops > already + 50));
        kill(volume.engine_pid());
        wait_for_life(&volume, life);
    }
    assert_no_error(&volume, load);
    run(Command::new("umount").arg(&mounted.0));
    run(Command::new("e2fsck").arg("-fn").arg(&device));
    assert_eq!(report(&volume), None, "nothing is said while an engine serves");
    end(&mut volume);
    assert!(volume.replicas.iter().all(|replica| replica.record().clean));
    volume.assert_equal(0, 1);
}

/// The kernel must not be in need of memory of the engine for the requests that it hands over: it gets none for a process that was
/// killed, and ends such a request with an error.
#[test]
fn an_engine_that_is_killed_while_it_takes_its_first_requests_loses_none() {
    let mut volume = Volume::new(1, 256 * MIB);
    volume.attach();
    // In a thread: killing it ends all of it.
    let options =
        ["--rw=randwrite", "--bs=1M", "--size=256M", "--iodepth=64", "--time_based", "--runtime=1000", "--thread"];
    let mut load = fio(&volume, &options).spawn().unwrap();
    let repeated = |volume: &Volume| volume.log().matches("are repeated").count();
    for round in 0..10 {
        let (life, pid) = (2 * round as u32 + 1, volume.engine_pid());
        // The holder counts from its own sight of the engine, which may come late.
        let seen = format!("engine answers volume=vol-1 pid={pid}\n");
        wait_until("the holder sees it", || volume.log().contains(&seen));
        let started = Instant::now();
        wait_until("it is replaced at once", || started.elapsed() > engine::limits::HOLDER_SETTLED);
        kill(pid);
        // Without a pause: what the next engine takes first is over within milliseconds.
        while repeated(&volume) == 2 * round {
            assert!(started.elapsed() < Duration::from_secs(60), "{}", volume.log());
        }
        let taking = Instant::now();
        while taking.elapsed() < Duration::from_micros(500 * round as u64) {}
        volume.engines().into_iter().for_each(kill);
        wait_for_life(&volume, life + 2);
        wait_until("the next engine has repeated them", || repeated(&volume) == 2 * round + 2);
        assert!(load.try_wait().unwrap().is_none(), "the load ended in round {round}");
    }
    load.kill().unwrap();
    let errors = load.wait_with_output().unwrap().stderr;
    assert!(errors.is_empty(), "{}", String::from_utf8_lossy(&errors));
    end(&mut volume);
}

#[test]
fn an_engine_that_is_killed_at_any_step_of_its_start_is_replaced() {
    let mut volume = Volume::new(3, 64 * MIB);
    volume.attach();
    let points = [
        (0, "status", Moment::After),
        (1, "open", Moment::Before),
        (0, "open", Moment::After),
        (2, "open", Moment::After),
    ];
    for (replica, kind, moment) in points {
        let load = start_load(&volume);
        let before = volume.status();
        let reached = at(&volume, replica, kind, moment, kill_for_good);
        kill(before.pid);
        wait_for_life(&volume, before.lives + 2);
        assert!(reached.load(Ordering::SeqCst), "no engine came to {kind} {moment:?}");
        assert_no_error(&volume, load);
        let status = volume.status();
        assert!(status.replicas.values().all(|state| *state == ReplicaState::InSync), "{kind} {moment:?}: {status:?}");
    }
    end(&mut volume);
    assert!(volume.replicas.iter().all(|replica| replica.record().clean));
    volume.assert_equal(0, 1);
    volume.assert_equal(0, 2);
}

#[test]
fn no_engine_goes_on_without_what_the_first_one_of_its_attachment_found() {
    let mut volume = Volume::new(2, 64 * MIB);
    (volume.config.attachment, volume.config.generation) = (3, 1_000_002);
    (volume.config.replica_timeout_ms, volume.config.holder_limit_ms) = (1_000, 3_000);
    let left = |generation, members: &[&str]| {
        let members = members.iter().copied().map(String::from).collect();
        move |record: &mut Record| (record.generation, record.members) = (generation, members)
    };
    // The second attachment went on with r1 alone; nobody but r1 knows.
    volume.replicas[0].set_record(left(2_000_001, &["r1"]));
    volume.replicas[1].set_record(left(1_000_002, &["r1", "r2"]));
    let open = volume.replicas[0].hold(|request| matches!(request, Request::Open { .. }));
    volume.start_holder();
    wait_until("r1 is asked", || open.is_reached());
    volume.replicas[0].kill();
    kill_for_good(volume.engines()[0]);
    open.release();
    assert!(!volume.wait_holder());
    let said = report(&volume).unwrap().problem;
    assert!(said.contains("those that answer missed writes") && said.contains(": r1) do not answer"), "{said}");
    assert_eq!(volume.replicas[1].record().generation, 1_000_002);
}

#[test]
fn a_lost_replica_that_does_not_tell_who_has_it_keeps_nobody_waiting() {
    let mut volume = Volume::new(2, 64 * MIB);
    volume.config.replica_timeout_ms = 600_000;
    let device = volume.attach();
    // Its process is there and says nothing.
    let _mute = volume.replicas[1].hold(|request| matches!(request, Request::Status));
    kill(volume.replicas[1].daemon_pid());
    wait_until("the other one goes on alone", || volume.state("r2") == ReplicaState::Dropped);
    let write = sh(&format!("dd if=/dev/zero of={} bs=4096 count=1 oflag=direct", device.display()));
    assert!(write.status.success(), "{}", volume.log());
    volume.detach_loop();
    assert!(volume.shutdown());
    assert_eq!(volume.replicas[0].record().members, ["r1"]);
}

#[test]
fn an_engine_that_is_killed_at_any_step_of_a_fence_leaves_it_to_the_next() {
    let mut volume = Volume::new(6, 64 * MIB);
    volume.config.replica_timeout_ms = 3_000;
    volume.attach();
    let points = [(0, Moment::Before), (0, Moment::After), (1, Moment::Before), (1, Moment::After)];
    for (victim, (replica, moment)) in (2..6).rev().zip(points) {
        let load = start_load(&volume);
        let before = volume.status();
        let reached = at(&volume, replica, "fence", moment, kill_for_good);
        volume.replicas[victim].kill();
        wait_for_life(&volume, before.lives + 1);
        assert!(reached.load(Ordering::SeqCst), "no engine came to the fence {moment:?}");
        assert_no_error(&volume, load);
        let name = format!("r{}", victim + 1);
        let status = volume.status();
        assert_eq!((status.replicas[&name], status.faulted), (ReplicaState::Dropped, None));
        assert!(status.generation > before.generation);
        assert!(!volume.replicas[0].record().members.contains(&name));
    }
    end(&mut volume);
    assert_eq!(volume.replicas[0].record().members, ["r1", "r2"]);
    volume.assert_equal(0, 1);
}

#[test]
fn a_silent_engine_is_reported_and_replaced_and_never_writes_again() {
    let mut volume = Volume::new(2, 64 * MIB);
    volume.config.silence_limit_ms = 3_000;
    volume.attach();
    let load = start_load(&volume);
    let pid = volume.engine_pid();
    let was_alive = Arc::new(AtomicBool::new(false));
    let seen = was_alive.clone();
    let opened = at(&volume, 0, "open", Moment::Before, move |_| seen.store(is_alive(pid), Ordering::SeqCst));
    signal(pid, Signal::STOP);
    let stopped = Instant::now();
    wait_until("the silence is reported", || report(&volume).is_some());
    assert!(stopped.elapsed() < Duration::from_secs(8), "reported after {:?}", stopped.elapsed());
    let said = report(&volume).unwrap();
    assert!(said.problem.contains(&pid.to_string()) && said.then.contains("replaced"), "{said:?}");
    assert!(said.deadline_ms > said.since_ms);
    assert!(is_alive(pid), "it is reported before it is replaced");
    wait_for_life(&volume, 2);
    assert!(opened.load(Ordering::SeqCst) && !was_alive.load(Ordering::SeqCst), "a stopped engine may write some day");
    assert_no_error(&volume, load);
    assert!(volume.log().contains("did not answer for 3s"), "{}", volume.log());
    wait_until("nothing is said any more", || report(&volume).is_none());
    end(&mut volume);
    volume.assert_equal(0, 1);
}

#[test]
fn a_pause_of_the_holder_is_no_silence_of_the_engine() {
    let mut volume = Volume::new(1, 64 * MIB);
    volume.config.silence_limit_ms = 6_000;
    volume.attach();
    let (holder, pid) = (volume.holder.as_ref().unwrap().id(), volume.engine_pid());
    // Before that, the holder takes an engine that is silent for one that does not begin to serve.
    wait_until("the holder watches it", || volume.log().contains("engine answers"));
    signal(pid, Signal::STOP);
    wait_until("the silence is reported", || report(&volume).is_some());
    signal(holder, Signal::STOP);
    let stopped = Instant::now();
    wait_until("more time than the limit has passed", || stopped.elapsed() > Duration::from_millis(5_500));
    signal(holder, Signal::CONT);
    let going = Instant::now();
    wait_until("the holder had its turn", || going.elapsed() > Duration::from_secs(2));
    assert!(is_alive(pid), "{}", volume.log());
    signal(pid, Signal::CONT);
    wait_until("it answers again", || report(&volume).is_none());
    assert_eq!(volume.status().lives, 1);
    end(&mut volume);
}

#[test]
fn silences_with_answers_between_them_do_not_add_up() {
    let mut volume = Volume::new(1, 64 * MIB);
    volume.config.silence_limit_ms = 5_000;
    volume.attach();
    let pid = volume.engine_pid();
    wait_until("the holder watches it", || volume.log().contains("engine answers"));
    for _ in 0..6 {
        signal(pid, Signal::STOP);
        wait_until("the silence is reported", || report(&volume).is_some());
        signal(pid, Signal::CONT);
        wait_until("it answers again", || report(&volume).is_none());
    }
    assert_eq!((volume.engine_pid(), volume.status().lives), (pid, 1), "{}", volume.log());
    end(&mut volume);
}

#[test]
fn an_engine_that_hangs_while_it_starts_leaves_time_for_another() {
    let mut volume = Volume::new(1, 64 * MIB);
    volume.config.holder_limit_ms = 8_000;
    volume.attach();
    let load = start_load(&volume);
    let reached = at(&volume, 0, "open", Moment::Before, |pid| signal(pid, Signal::STOP));
    kill(volume.engine_pid());
    wait_until("an engine serves", || volume.try_status().is_some_and(|status| status.lives == 3));
    assert!(reached.load(Ordering::SeqCst));
    assert_no_error(&volume, load);
    assert!(volume.log().contains("did not begin to serve in time"), "{}", volume.log());
    end(&mut volume);
}

/// A volume in use is not lost because somebody ends all processes, whatever its engine does at that moment.
#[test]
fn a_signal_to_the_holder_of_a_volume_in_use_changes_nothing() {
    let mut volume = Volume::new(1, 64 * MIB);
    volume.attach();
    let load = start_load(&volume);
    wait_until("the holder watches it", || volume.log().contains("engine answers"));
    let pid = volume.engine_pid();
    volume.signal_holder();
    wait_until("the engine refuses", || volume.log().contains("is in use: something has"));
    assert_eq!((volume.engine_pid(), volume.status().lives), (pid, 1));
    // While the next one begins.
    let begins = Arc::new(AtomicU32::new(0));
    let stopped = begins.clone();
    let reached = at(&volume, 0, "open", Moment::Before, move |pid| {
        signal(pid, Signal::STOP);
        stopped.store(pid, Ordering::SeqCst);
    });
    kill(pid);
    wait_until("it begins", || begins.load(Ordering::SeqCst) > 0);
    assert!(reached.load(Ordering::SeqCst));
    volume.signal_holder();
    let refused = || volume.log().matches("signal ignored: the volume is in use").count();
    wait_until("the holder refuses", || refused() == 1);
    assert!(volume.is_mounted());
    // While none is there.
    std::fs::write(volume.broken(), "").unwrap();
    kill(begins.load(Ordering::SeqCst));
    wait_until("it pauses", || {
        report(&volume).is_some_and(|said| said.next_attempt_ms.is_some() && said.attempts >= 3)
    });
    volume.signal_holder();
    wait_until("the holder refuses again", || refused() == 2);
    assert!(volume.is_mounted());
    std::fs::remove_file(volume.broken()).unwrap();
    wait_until("an engine serves", || volume.try_status().is_some_and(|status| status.serving));
    assert_no_error(&volume, load);
    end(&mut volume);
}

#[test]
fn engines_that_die_at_once_are_tried_more_and_more_slowly_until_the_limit() {
    let mut volume = Volume::new(2, 64 * MIB);
    volume.config.holder_limit_ms = 4_000;
    let device = volume.attach();
    run(&mut fio(&volume, &VERIFY));
    std::fs::write(volume.broken(), "").unwrap();
    kill(volume.engine_pid());
    wait_until("the attempts are reported", || report(&volume).is_some_and(|said| said.attempts >= 2));
    let said = report(&volume).unwrap();
    assert!(said.problem.contains("died before it served") && said.then.contains("given up"), "{said:?}");
    assert!(said.next_attempt_ms.is_some_and(|next| next >= said.since_ms && next <= said.deadline_ms), "{said:?}");
    assert!(dd(&device).contains("Input/output error"));
    assert!(!volume.wait_holder());
    assert!(volume.log().contains("no engine came to serve"), "{}", volume.log());
    let attempts = std::fs::read_to_string(volume.broken()).unwrap().lines().count();
    assert!((4..=9).contains(&attempts), "{attempts} attempts in four seconds");
    assert!(volume.is_mounted(), "the loop device is found by its file");
    assert!(report(&volume).unwrap().problem.contains("no engine came to serve"), "its last words stay");
    // The volume is attached anew and has everything.
    std::fs::remove_file(volume.broken()).unwrap();
    everything_is_there_after_another_attachment(&mut volume);
}

#[test]
fn a_program_that_is_missing_or_broken_is_replaced_by_the_holders_own() {
    let mut volume = Volume::new(1, 64 * MIB);
    // What an earlier attachment left is no past of this one, although no engine of it came far enough to say so.
    let stale = volume.folder().join("engine.sock.generation");
    std::fs::write(&stale, r#"{"generation":50,"members":["zz"]}"#).unwrap();
    let program = volume.folder().join("missing");
    volume.config.program = Some(program.clone());
    volume.attach();
    assert_eq!(volume.status().generation, 1);
    write_program(&program, "#!/bin/sh\nexit 3\n");
    let load = start_load(&volume);
    let before = volume.status();
    kill(before.pid);
    wait_for_life(&volume, before.lives + 1);
    assert_no_error(&volume, load);
    assert!(
        volume.log().contains("cannot start the engine process") && volume.log().contains("exit status: 3"),
        "{}",
        volume.log()
    );
    end(&mut volume);
}

fn write_program(path: &Path, text: &str) {
    std::fs::write(path, text).unwrap();
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o755)).unwrap();
}

const LIMIT: Duration = Duration::from_secs(20);

#[test]
fn an_engine_makes_room_for_another_program_under_load() {
    let mut volume = Volume::new(2, 64 * MIB);
    volume.attach();
    let (program, mark) = (volume.folder().join("next"), volume.folder().join("ran"));
    write_program(&program, &format!("#!/bin/sh\ntouch {}\nexec sh \"$@\"\n", mark.display()));
    volume.config.program = Some(program);
    volume.write_config();
    let load = start_load(&volume);
    let pid = volume.engine_pid();
    control_client::hand_over(&volume.config.control_socket, LIMIT).unwrap();
    wait_for_life(&volume, 2);
    assert!(mark.exists() && !is_alive(pid));
    assert_no_error(&volume, load);
    assert_eq!(volume.status().version, env!("CARGO_PKG_VERSION"));
    end(&mut volume);
    assert!(volume.replicas.iter().all(|replica| replica.record().clean));
    volume.assert_equal(0, 1);
}

fn refusal(volume: &Volume) -> String {
    let refused = control_client::hand_over(&volume.config.control_socket, LIMIT).unwrap_err();
    assert!(matches!(refused, engine::EngineError::Refused { .. }), "{refused}");
    refused.to_string()
}

#[test]
fn an_engine_does_not_make_room_when_the_next_one_might_fail() {
    let mut volume = Volume::new(2, 64 * MIB);
    volume.attach();
    // An NBD client's requests are not repeated.
    let uri = format!("nbd+unix:///vol-1?socket={}", volume.config.nbd_socket.display());
    let mut client = Command::new("qemu-io");
    let client = client.args(["-f", "raw", &uri]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut client = client.spawn().unwrap();
    writeln!(client.stdin.as_mut().unwrap(), "read 0 512").unwrap();
    let mut said = BufReader::new(client.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains("512/512") {
        line.clear();
        assert!(said.read_line(&mut line).unwrap() > 0, "qemu-io ended");
    }
    assert!(refusal(&volume).contains("NBD client"));
    let ended = control_client::shutdown(&volume.config.control_socket, LIMIT).unwrap_err().to_string();
    assert!(ended.contains("in use by an NBD client"), "{ended}");
    drop(client.stdin.take());
    client.wait().unwrap();
    // In the middle of a fence.
    let fence = volume.replicas[0].hold(|request| matches!(request, Request::Fence { .. }));
    volume.replicas[1].kill();
    wait_until("the fence is under way", || fence.is_reached());
    assert!(refusal(&volume).contains("dropping a replica"));
    fence.release();
    wait_until("the fence is done", || volume.replicas[0].record().members == ["r1"]);
    // Without a replica.
    volume.replicas[0].kill();
    wait_until("the fault is noticed", || volume.status().faulted.is_some());
    assert!(refusal(&volume).contains("faulted"));
    end(&mut volume);
}

#[test]
fn without_repeated_requests_the_device_ends_with_its_engine() {
    let mut volume = Volume::new(2, 64 * MIB);
    volume.config.replace_engine = false;
    let device = volume.attach();
    run(&mut fio(&volume, &VERIFY));
    assert!(refusal(&volume).contains("Linux 6.9"));
    let killed = Instant::now();
    kill(volume.engine_pid());
    assert!(!volume.wait_holder());
    assert!(
        killed.elapsed() < Duration::from_secs(15),
        "at once, not after the holder's limit: {:?}",
        killed.elapsed()
    );
    assert!(dd(&device).contains("Input/output error"));
    assert!(volume.log().contains("is not replaced") && volume.log().contains("attached again"), "{}", volume.log());
    everything_is_there_after_another_attachment(&mut volume);
}

#[test]
fn the_kernel_says_whether_it_repeats_requests() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("probe");
    // One that was killed in the middle left its mount, which would wait for an answer for ever.
    std::fs::write(&file, "").unwrap();
    let left = engine::fuse::mount::mount(&file).unwrap();
    let (sender, answer) = std::sync::mpsc::channel();
    let probed = file.clone();
    std::thread::spawn(move || sender.send(engine::fuse::probe::repeats_requests(&probed)));
    let answer = answer.recv_timeout(Duration::from_secs(20));
    engine::fuse::mount::detach(&file);
    drop(left);
    let repeats = answer.expect("it waits for the mount that was left").unwrap();
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let number = |text: Option<&str>| text.and_then(|text| text.parse::<u32>().ok()).unwrap();
    let mut parts = release.split(['.', '-']);
    let version = (number(parts.next()), number(parts.next()));
    assert_eq!(repeats, version >= (6, 9), "{release}");
    assert!(!file.exists());
}

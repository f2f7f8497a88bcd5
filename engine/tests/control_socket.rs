//! Who asks an engine for something over its control socket, and who is told.

mod support;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::Duration;

use proto::replica::Request;
use rustix::process::Signal;
use support::{MIB, Volume, signal, wait_until};

/// Not a test: what the holder and engine processes of the tests run.
#[test]
#[ignore = "a role for the processes that the tests start"]
fn role_process() {
    support::role();
}

fn connect(volume: &Volume) -> BufReader<UnixStream> {
    let connection = UnixStream::connect(&volume.config.control_socket).unwrap();
    connection.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    BufReader::new(connection)
}

fn ask(connection: &mut BufReader<UnixStream>, request: &str) {
    writeln!(connection.get_mut(), "{{\"request\":\"{request}\"}}").unwrap();
}

fn line(connection: &mut BufReader<UnixStream>) -> String {
    let mut line = String::new();
    connection.read_line(&mut line).unwrap();
    line
}

#[test]
fn everybody_who_asks_for_the_end_is_told_and_nobody_else() {
    let mut volume = Volume::new(1, 64 * MIB);
    volume.start_holder();
    volume.wait_serving();
    let connect = || connect(&volume);
    let close = volume.replicas[0].hold(|request| matches!(request, Request::Close { .. }));
    let (mut first, mut gone) = (connect(), connect());
    ask(&mut gone, "shutdown");
    wait_until("it closes its replica", || close.is_reached());
    drop(gone);
    ask(&mut first, "status");
    assert!(line(&mut first).contains("\"reply\":\"status\""));
    // It gets the place of the one that is gone.
    let mut other = connect();
    ask(&mut other, "status");
    assert!(line(&mut other).contains("\"reply\":\"status\""));
    ask(&mut first, "shutdown");
    ask(&mut first, "status");
    assert!(line(&mut first).contains("\"reply\":\"status\""), "it is not over yet");
    close.release();
    assert!(line(&mut first).contains("\"reply\":\"done\""));
    assert_eq!(line(&mut other), "", "it did not ask for that");
    assert!(volume.wait_holder(), "{}", volume.log());
}

#[test]
fn one_replacement_at_a_time_and_whoever_asked_for_it_is_told() {
    let mut volume = Volume::new(1, 64 * MIB);
    let device = volume.attach();
    let (daemon, before) = (volume.replicas[0].daemon_pid(), volume.engine_pid());
    signal(daemon, Signal::STOP);
    let mut write = Command::new("dd");
    write.arg("if=/dev/zero").arg(format!("of={}", device.display())).args(["bs=4096", "count=1", "oflag=direct"]);
    let mut write = write.stderr(Stdio::null()).spawn().unwrap();
    wait_until("a request is in flight", || volume.status().in_flight > 0);
    let (mut first, mut second) = (connect(&volume), connect(&volume));
    ask(&mut first, "hand_over");
    ask(&mut first, "status");
    assert!(line(&mut first).contains("\"reply\":\"status\""), "it waits for what is in flight");
    ask(&mut second, "hand_over");
    assert!(line(&mut second).contains("is being replaced already"));
    signal(daemon, Signal::CONT);
    assert!(line(&mut first).contains("\"reply\":\"done\""));
    assert!(write.wait().unwrap().success(), "{}", volume.log());
    wait_until("the next engine serves", || volume.try_status().is_some_and(|status| status.pid != before));
    volume.detach_loop();
    assert!(volume.shutdown());
}

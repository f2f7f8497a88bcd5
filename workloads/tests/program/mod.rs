//! The program that the workloads of these tests run: the test program itself, called with a role.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};

use crate::suite::PORT;

/// Not a test of its own: the program that the workloads of these tests run.
#[test]
fn plays_a_role() {
    let Ok(role) = std::env::var("WORKLOADS_TEST_ROLE") else { return };
    let ip = std::env::args().find_map(|a| a.strip_prefix("listen=").map(str::to_owned)).unwrap();
    assert_eq!(std::env::var("POD_IP").unwrap(), ip);
    match role.as_str() {
        "serve" => serve(&ip),
        "broken" => {
            eprintln!("cannot open the disk");
            std::process::exit(3);
        }
        "late" => loop {
            std::thread::park();
        },
        other => panic!("no role {other}"),
    }
}

fn serve(ip: &str) {
    let listener = TcpListener::bind((ip, PORT)).unwrap();
    let mut children: Vec<Child> = vec![];
    for stream in listener.incoming() {
        let mut stream = stream.unwrap();
        let mut question = String::new();
        if BufReader::new(&stream).read_line(&mut question).is_err() {
            continue;
        }
        match question.trim() {
            "ip" => stream.write_all(ip.as_bytes()).unwrap(),
            "pid" => stream.write_all(std::process::id().to_string().as_bytes()).unwrap(),
            "child" => {
                let child = Command::new("sleep").arg("1000").stdin(Stdio::null()).spawn().unwrap();
                stream.write_all(child.id().to_string().as_bytes()).unwrap();
                children.push(child);
            }
            "exit" => {
                println!("I end, as I was told");
                std::process::exit(7);
            }
            _ => {}
        }
    }
}

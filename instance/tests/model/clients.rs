//! Requests to a volume, several at a time: by its block device and by the engine's NBD socket.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use engine::nbd::client::open_export;
use engine::nbd::wire;
use rustix::fs::{FallocateFlags, OFlags, fallocate};

use crate::array::fill;
use crate::steps::Kind;

/// A request at its place.
#[derive(Clone, Debug)]
pub struct Call {
    pub kind: Kind,
    pub offset: u64,
    pub length: u64,
    pub stamp: u64,
}

/// The bytes of a read, nothing of others, or why there is no answer.
pub type Answer = Result<Vec<u8>, String>;

/// Longest time a request may take; an engine is replaced in far less.
const PATIENCE: Duration = Duration::from_secs(60);
const ALIGNMENT: usize = 4096;

/// Memory as direct I/O wants it.
struct Aligned {
    bytes: Vec<u8>,
    start: usize,
    length: usize,
}

impl Aligned {
    fn new(length: u64) -> Aligned {
        let bytes = vec![0; length as usize + ALIGNMENT];
        let start = bytes.as_ptr().align_offset(ALIGNMENT);
        Aligned { bytes, start, length: length as usize }
    }

    fn part(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.length]
    }
}

fn open_device(device: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(OFlags::DIRECT.bits() as i32).open(device)
}

fn call_device(device: &Path, call: &Call) -> io::Result<Vec<u8>> {
    let file = open_device(device)?;
    let mut buffer = Aligned::new(call.length);
    match call.kind {
        Kind::Read => {
            file.read_exact_at(buffer.part(), call.offset)?;
            return Ok(buffer.part().to_vec());
        }
        Kind::Write => {
            fill(call.stamp, call.offset, buffer.part());
            file.write_all_at(buffer.part(), call.offset)?;
        }
        Kind::Zero { allocate: true } => fallocate(&file, FallocateFlags::ZERO_RANGE, call.offset, call.length)?,
        Kind::Zero { allocate: false } => {
            fallocate(&file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, call.offset, call.length)?;
        }
        Kind::Discard => {
            let (offset, length) = (call.offset.to_string(), call.length.to_string());
            let output = Command::new("blkdiscard").args(["-f", "-o", &offset, "-l", &length]).arg(device).output()?;
            if !output.status.success() {
                return Err(io::Error::other(String::from_utf8_lossy(&output.stderr).into_owned()));
            }
        }
        Kind::Flush => file.sync_all()?,
    }
    Ok(vec![])
}

/// All calls at once; `meanwhile` happens while they are in flight.
pub fn by_device(device: &Path, calls: &[Call], meanwhile: impl FnOnce()) -> Vec<Answer> {
    std::thread::scope(|scope| {
        let running: Vec<_> = calls
            .iter()
            .map(|call| scope.spawn(move || call_device(device, call).map_err(|error| error.to_string())))
            .collect();
        meanwhile();
        running.into_iter().map(|thread| thread.join().expect("no call panics")).collect()
    })
}

/// All calls at once on one connection; `meanwhile` happens after they are sent.
pub fn by_nbd(socket: &Path, export: &str, calls: &[Call], meanwhile: impl FnOnce()) -> Vec<Answer> {
    let mut answers: Vec<Answer> = vec![Err("there is no answer".into()); calls.len()];
    let mut stream = UnixStream::connect(socket).expect("the engine listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
    open_export(&mut stream, export).expect("the export opens");
    let sent: io::Result<()> = calls.iter().zip(0..).try_for_each(|(call, cookie)| {
        let (command, flags) = match call.kind {
            Kind::Read => (wire::CMD_READ, 0),
            Kind::Write => (wire::CMD_WRITE, 0),
            Kind::Zero { allocate } => (wire::CMD_WRITE_ZEROES, if allocate { wire::NO_HOLE } else { 0 }),
            Kind::Discard => (wire::CMD_TRIM, 0),
            Kind::Flush => (wire::CMD_FLUSH, 0),
        };
        let request = wire::Request { flags, command, cookie, offset: call.offset, length: call.length as u32 };
        stream.write_all(&request.encode())?;
        if call.kind == Kind::Write {
            let mut bytes = vec![0; call.length as usize];
            fill(call.stamp, call.offset, &mut bytes);
            stream.write_all(&bytes)?;
        }
        Ok(())
    });
    meanwhile();
    if sent.is_err() {
        return answers;
    }
    for _ in calls {
        let mut header = [0; wire::REPLY_LENGTH];
        if stream.read_exact(&mut header).is_err() {
            break;
        }
        let (error, cookie) = wire::parse_reply(&header).expect("a reply");
        let call = &calls[cookie as usize];
        let mut bytes = vec![0; if call.kind == Kind::Read && error == 0 { call.length as usize } else { 0 }];
        if stream.read_exact(&mut bytes).is_err() {
            break;
        }
        answers[cookie as usize] = if error == 0 { Ok(bytes) } else { Err(format!("NBD error {error}")) };
    }
    answers
}

/// Everything that the device shows, to its end.
pub fn read_device(device: &Path, length: u64) -> Vec<u8> {
    let file = open_device(device).expect("the device opens");
    let mut buffer = Aligned::new(length + ALIGNMENT as u64);
    let mut have = 0;
    loop {
        match file.read_at(&mut buffer.part()[have..], have as u64).expect("the device can be read") {
            0 => break,
            count => have += count,
        }
    }
    buffer.part()[..have].to_vec()
}

//! The client's handshake with a replica's NBD server. It blocks; the caller sets time limits on the stream.

use std::io::{self, Read, Write};

use super::wire;
use crate::limits;

fn bad(problem: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, problem.into())
}

/// Opens an export for writing; returns its size in bytes.
///
/// # Errors
/// When the server does not speak the protocol, does not know the export, or offers it read-only.
pub fn open_export(stream: &mut (impl Read + Write), export: &str) -> io::Result<u64> {
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting)?;
    if !wire::is_greeting(&greeting) {
        return Err(bad("its NBD server does not speak fixed newstyle"));
    }
    stream.write_all(&wire::encode_go(export))?;
    let mut found = None;
    for _ in 0..limits::NBD_MAX_OPTION_REPLIES {
        let mut header = [0; 20];
        stream.read_exact(&mut header)?;
        let (option, kind, length) =
            wire::parse_option_reply(&header).ok_or_else(|| bad("its NBD server sent no option reply"))?;
        if option != wire::OPT_GO || length > limits::NBD_MAX_OPTION_REPLY {
            return Err(bad(format!("its NBD server sent an option reply that was not asked for ({length} bytes)")));
        }
        let mut content = vec![0; length];
        stream.read_exact(&mut content)?;
        match kind {
            wire::REP_ACK => {
                let (size, flags): (u64, u16) = found.ok_or_else(|| bad("its NBD server told no size"))?;
                let needed = wire::SEND_FLUSH | wire::SEND_WRITE_ZEROES;
                if flags & wire::READ_ONLY != 0 || flags & needed != needed {
                    return Err(bad(format!(
                        "its export must be writable with flush and write-zeroes (flags {flags:#x})"
                    )));
                }
                return Ok(size);
            }
            wire::REP_INFO => found = wire::parse_export_info(&content).or(found),
            _ => {
                let message = String::from_utf8_lossy(&content[..length.min(200)]).into_owned();
                return Err(bad(format!("its NBD server refused export `{export}` ({kind:#x} {message})")));
            }
        }
    }
    Err(bad("its NBD server does not end the handshake"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    struct Hostile {
        says: io::Cursor<Vec<u8>>,
    }

    impl Read for Hostile {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.says.read(buffer)
        }
    }

    impl Write for Hostile {
        fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
            Ok(buffer.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn greeting() -> Vec<u8> {
        [&wire::MAGIC.to_be_bytes()[..], &wire::OPTION_MAGIC.to_be_bytes(), &[0, 3]].concat()
    }

    fn reply(kind: u32, content: &[u8]) -> Vec<u8> {
        let header = [&wire::OPTION_REPLY_MAGIC.to_be_bytes()[..], &wire::OPT_GO.to_be_bytes(), &kind.to_be_bytes()];
        [&header.concat()[..], &(content.len() as u32).to_be_bytes(), content].concat()
    }

    fn export(size: u64, flags: u16) -> Vec<u8> {
        reply(wire::REP_INFO, &[&[0, 0], &size.to_be_bytes()[..], &flags.to_be_bytes()].concat())
    }

    fn open(says: Vec<u8>) -> io::Result<u64> {
        open_export(&mut Hostile { says: io::Cursor::new(says) }, "generation-7")
    }

    #[test]
    fn learns_the_size() {
        let says = [greeting(), export(1 << 30, 0x45), reply(wire::REP_ACK, &[])].concat();
        assert_eq!(open(says).unwrap(), 1 << 30);
    }

    #[test]
    fn refuses_what_it_cannot_use() {
        let mut of_another_option = reply(wire::REP_ACK, &[]);
        of_another_option[11] = wire::OPT_LIST as u8;
        let mut endless = reply(wire::REP_INFO, &[]);
        endless[16..20].copy_from_slice(&u32::MAX.to_be_bytes());
        for (says, why) in [
            ([greeting(), export(512, 0x45), of_another_option].concat(), "not asked for"),
            ([greeting(), endless].concat(), "not asked for"),
            (vec![0; 18], "fixed newstyle"),
            ([greeting(), reply(wire::REP_ACK, &[])].concat(), "no size"),
            ([greeting(), export(512, 0x47), reply(wire::REP_ACK, &[])].concat(), "writable"),
            ([greeting(), export(512, 0x01), reply(wire::REP_ACK, &[])].concat(), "write-zeroes"),
            ([greeting(), reply(wire::REP_ERR_UNKNOWN, b"no such export")].concat(), "no such export"),
            ([greeting(), export(512, 0x45).repeat(100)].concat(), "does not end"),
        ] {
            let error = open(says).unwrap_err().to_string();
            assert!(error.contains(why), "{error} should contain {why}");
        }
    }

    proptest! {
        #[test]
        fn no_server_makes_it_panic_or_allocate_much(noise in prop::collection::vec(any::<u8>(), 0..200), polite: bool) {
            let says = if polite { [greeting(), noise].concat() } else { noise };
            prop_assert!(open(says).is_err());
        }
    }
}

//! The server's handshake as a pure state machine: bytes in, bytes out.

use super::wire::{self, u32_at, u64_at};
use crate::limits;

/// What the one export offers.
///
/// Several connections are fine: all of them are served by one core, and a flush covers what any of them was told is written.
pub const FLAGS: u16 =
    wire::HAS_FLAGS | wire::SEND_FLUSH | wire::SEND_TRIM | wire::SEND_WRITE_ZEROES | wire::CAN_MULTI_CONN;

/// Where a handshake stands after some input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// More input is needed.
    More,
    /// Requests follow.
    Transmission,
    /// The connection ends, once what was answered is sent.
    End,
}

/// One client's handshake.
#[derive(Debug)]
pub struct Handshake<'a> {
    pub export: &'a str,
    pub size_bytes: u64,
}

/// What a server says first.
pub fn greeting() -> Vec<u8> {
    let mut bytes = wire::MAGIC.to_be_bytes().to_vec();
    bytes.extend(wire::OPTION_MAGIC.to_be_bytes());
    bytes.extend((wire::FIXED_NEWSTYLE | wire::NO_ZEROES).to_be_bytes());
    bytes
}

/// The client's 4 bytes of flags: whether it wants no zeroes after an export name; none when it is no client of ours.
pub fn parse_client_flags(bytes: &[u8]) -> Option<bool> {
    let flags = u32_at(bytes, 0)?;
    let known = u32::from(wire::FIXED_NEWSTYLE | wire::NO_ZEROES);
    (flags & !known == 0 && flags & 1 == 1).then_some(flags & u32::from(wire::NO_ZEROES) != 0)
}

impl Handshake<'_> {
    /// Takes one option from the input, if it is whole: how many bytes it had, and what follows.
    pub fn option(&self, input: &[u8], no_zeroes: bool, answer: &mut Vec<u8>) -> (usize, Progress) {
        if input.len() < 16 {
            return (0, Progress::More);
        }
        let (Some(wire::OPTION_MAGIC), Some(option), Some(length)) =
            (u64_at(input, 0), u32_at(input, 8), u32_at(input, 12))
        else {
            return (input.len(), Progress::End);
        };
        let length = length as usize;
        if length > limits::NBD_MAX_OPTION {
            return (input.len(), Progress::End);
        }
        let Some(content) = input.get(16..16 + length) else { return (0, Progress::More) };
        (16 + length, self.answer_option(option, content, no_zeroes, answer))
    }

    fn answer_option(&self, option: u32, content: &[u8], no_zeroes: bool, answer: &mut Vec<u8>) -> Progress {
        match option {
            wire::OPT_EXPORT_NAME => {
                if !self.is_export(content) {
                    return Progress::End;
                }
                answer.extend(self.size_bytes.to_be_bytes());
                answer.extend(FLAGS.to_be_bytes());
                if !no_zeroes {
                    answer.extend([0; 124]);
                }
                Progress::Transmission
            }
            wire::OPT_ABORT => {
                reply(answer, option, wire::REP_ACK, &[]);
                Progress::End
            }
            wire::OPT_LIST if content.is_empty() => {
                let name = [&(self.export.len() as u32).to_be_bytes(), self.export.as_bytes()].concat();
                reply(answer, option, wire::REP_SERVER, &name);
                reply(answer, option, wire::REP_ACK, &[]);
                Progress::More
            }
            wire::OPT_LIST => {
                reply(answer, option, wire::REP_ERR_INVALID, b"a list request carries nothing");
                Progress::More
            }
            wire::OPT_INFO | wire::OPT_GO => self.answer_info(option, content, answer),
            _ => {
                reply(answer, option, wire::REP_ERR_UNSUP, &[]);
                Progress::More
            }
        }
    }

    fn answer_info(&self, option: u32, content: &[u8], answer: &mut Vec<u8>) -> Progress {
        let name = u32_at(content, 0).and_then(|length| content.get(4..4 + length as usize));
        let Some(name) = name else {
            reply(answer, option, wire::REP_ERR_INVALID, b"the name is longer than the option");
            return Progress::More;
        };
        if !self.is_export(name) {
            let message = format!("this server has one export, `{}`", self.export);
            reply(answer, option, wire::REP_ERR_UNKNOWN, message.as_bytes());
            return Progress::More;
        }
        let export = [&wire::INFO_EXPORT.to_be_bytes()[..], &self.size_bytes.to_be_bytes(), &FLAGS.to_be_bytes()];
        reply(answer, option, wire::REP_INFO, &export.concat());
        let name = [&wire::INFO_NAME.to_be_bytes()[..], self.export.as_bytes()];
        reply(answer, option, wire::REP_INFO, &name.concat());
        let (least, best, most) = (1u32, 4096u32, limits::NBD_MAX_IO);
        let sizes = [least.to_be_bytes(), best.to_be_bytes(), most.to_be_bytes()].concat();
        reply(answer, option, wire::REP_INFO, &[&wire::INFO_BLOCK_SIZE.to_be_bytes()[..], &sizes].concat());
        reply(answer, option, wire::REP_ACK, &[]);
        if option == wire::OPT_GO { Progress::Transmission } else { Progress::More }
    }

    /// The empty name asks for the default export.
    fn is_export(&self, name: &[u8]) -> bool {
        name.is_empty() || name == self.export.as_bytes()
    }
}

fn reply(answer: &mut Vec<u8>, option: u32, kind: u32, content: &[u8]) {
    answer.extend(wire::OPTION_REPLY_MAGIC.to_be_bytes());
    answer.extend(option.to_be_bytes());
    answer.extend(kind.to_be_bytes());
    answer.extend((content.len() as u32).to_be_bytes());
    answer.extend(content);
}

#[cfg(test)]
mod tests {
    use std::io::{self, Read, Write};

    use proptest::prelude::*;

    use super::*;
    use crate::nbd::client;

    const HANDSHAKE: Handshake<'static> = Handshake { export: "vol-1", size_bytes: 1 << 20 };

    /// Our client against our server, without a socket.
    #[derive(Default)]
    struct Served {
        input: Vec<u8>,
        output: Vec<u8>,
        greeted: bool,
    }

    impl Read for Served {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let count = buffer.len().min(self.output.len());
            buffer[..count].copy_from_slice(&self.output[..count]);
            self.output.drain(..count);
            Ok(count)
        }
    }

    impl Write for Served {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.input.extend(bytes);
            if !self.greeted {
                assert_eq!(parse_client_flags(&self.input), Some(true));
                self.input.drain(..4);
                self.greeted = true;
            }
            let (count, _) = HANDSHAKE.option(&self.input, true, &mut self.output);
            self.input.drain(..count);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn our_client_and_our_server_understand_each_other() {
        let mut served = Served { output: greeting(), ..Served::default() };
        assert_eq!(client::open_export(&mut served, "vol-1").unwrap(), 1 << 20);
        let mut served = Served { output: greeting(), ..Served::default() };
        let error = client::open_export(&mut served, "vol-2").unwrap_err().to_string();
        assert!(error.contains("one export, `vol-1`"), "{error}");
    }

    fn option(number: u32, length: u32, content: &[u8]) -> Vec<u8> {
        let header = [&wire::OPTION_MAGIC.to_be_bytes()[..], &number.to_be_bytes(), &length.to_be_bytes()];
        [&header.concat()[..], content].concat()
    }

    #[test]
    fn an_option_without_measure_ends_the_connection_before_it_has_come() {
        let most = limits::NBD_MAX_OPTION as u32;
        assert_eq!(HANDSHAKE.option(&option(wire::OPT_GO, most, b""), true, &mut Vec::new()), (0, Progress::More));
        for length in [most + 1, u32::MAX] {
            let input = option(wire::OPT_GO, length, b"");
            assert_eq!(HANDSHAKE.option(&input, true, &mut Vec::new()).1, Progress::End, "{length}");
        }
    }

    /// The old way to open an export has no other way to refuse.
    #[test]
    fn an_unknown_export_name_ends_the_connection() {
        for (name, progress) in
            [("vol-1", Progress::Transmission), ("", Progress::Transmission), ("vol-2", Progress::End)]
        {
            let input = option(wire::OPT_EXPORT_NAME, name.len() as u32, name.as_bytes());
            let mut answer = Vec::new();
            assert_eq!(HANDSHAKE.option(&input, true, &mut answer), (input.len(), progress), "{name}");
            assert_eq!(answer.len(), if progress == Progress::End { 0 } else { 10 }, "{name}");
        }
    }

    #[test]
    fn ends_the_connection_of_a_stranger() {
        for input in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 64]] {
            assert_eq!(HANDSHAKE.option(input, true, &mut Vec::new()).1, Progress::End);
        }
        assert_eq!(parse_client_flags(&[0, 0, 0, 0]), None);
        assert_eq!(parse_client_flags(&[1, 0, 0, 1]), None);
    }

    proptest! {
        #[test]
        fn no_client_makes_it_panic(option in 0u32..16, content in prop::collection::vec(any::<u8>(), 0..100), lie in 0u32..200) {
            let length = if lie < 100 { lie } else { content.len() as u32 };
            let mut input = wire::OPTION_MAGIC.to_be_bytes().to_vec();
            input.extend(option.to_be_bytes());
            input.extend(length.to_be_bytes());
            input.extend(&content);
            let mut answer = Vec::new();
            let (count, _) = HANDSHAKE.option(&input, false, &mut answer);
            prop_assert!(count <= input.len());
        }
    }
}

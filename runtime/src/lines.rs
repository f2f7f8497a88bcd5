//! Lines from the other side of a connection: no longer than agreed, whatever it sends.

use std::io;

use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt};

/// Reads the rest of a line of at most `most` bytes into `line`, its end included; whether there was one before the connection ended.
///
/// What has come of a line stays in `line` when the wait is given up, so that the next call goes on with it. The caller empties it
/// between two lines.
///
/// # Errors
/// When the line is longer, the connection broke, or it ended in the middle of a line.
pub async fn read_line<R: AsyncBufRead + Unpin>(reader: &mut R, line: &mut Vec<u8>, most: usize) -> io::Result<bool> {
    let room = most.saturating_sub(line.len());
    reader.take(room as u64).read_until(b'\n', line).await?;
    if line.ends_with(b"\n") {
        Ok(true)
    } else if line.len() >= most {
        Err(io::Error::new(io::ErrorKind::InvalidData, format!("the other side sent a line of more than {most} bytes")))
    } else if line.is_empty() {
        Ok(false)
    } else {
        Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the connection ended in the middle of a line"))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::io::{AsyncWriteExt, BufReader};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_line_may_come_in_pieces_and_between_two_waits() {
        let (near, mut far) = tokio::io::duplex(64);
        let (mut reader, mut line) = (BufReader::new(near), vec![]);
        far.write_all(b"one\ntw").await.unwrap();
        assert!(read_line(&mut reader, &mut line, 8).await.unwrap());
        assert_eq!(std::mem::take(&mut line), b"one\n");
        let given_up = tokio::time::timeout(Duration::from_secs(1), read_line(&mut reader, &mut line, 8)).await;
        assert!(given_up.is_err());
        far.write_all(b"o\n").await.unwrap();
        assert!(read_line(&mut reader, &mut line, 8).await.unwrap());
        assert_eq!(std::mem::take(&mut line), b"two\n");
        drop(far);
        assert!(!read_line(&mut reader, &mut line, 8).await.unwrap());
    }

    #[tokio::test]
    async fn a_line_is_taken_up_to_its_limit_and_not_without_its_end() {
        let read = async |bytes: &'static [u8]| {
            let mut line = vec![];
            let read = read_line(&mut BufReader::new(bytes), &mut line, 4).await;
            (read.map_err(|error| error.kind()), line.len())
        };
        assert_eq!(read(b"abc\n").await, (Ok(true), 4));
        assert_eq!(read(b"abcd\n").await, (Err(io::ErrorKind::InvalidData), 4));
        assert_eq!(read(b"ab").await, (Err(io::ErrorKind::UnexpectedEof), 2));
    }
}

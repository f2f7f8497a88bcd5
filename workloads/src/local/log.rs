//! Logs of workloads: their end is shown in failures, and their size is bounded.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;

use super::limits;

/// The last lines as one, or the empty string when there are none.
pub fn tail(path: &Path) -> String {
    let Ok(bytes) = read_end(path, limits::MESSAGE_BYTES) else { return String::new() };
    runtime::words::last(&String::from_utf8_lossy(&bytes))
}

fn read_end(path: &Path, bytes: u64) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(bytes)))?;
    let mut end = vec![];
    file.take(bytes).read_to_end(&mut end)?;
    Ok(end)
}

/// Shortens a log that has become too long; the end of it stays.
///
/// Its process writes in append mode, so it goes on at the new end. Lines that it writes in between are lost.
pub fn shorten(path: &Path) -> io::Result<()> {
    let length = match path.metadata() {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?.len(),
    };
    if length <= limits::LOG_BYTES {
        return Ok(());
    }
    let end = read_end(path, limits::LOG_KEPT_BYTES)?;
    let from = end.iter().position(|byte| *byte == b'\n').map_or(0, |newline| newline + 1);
    let mut file = OpenOptions::new().append(true).open(path)?;
    file.set_len(0)?;
    file.write_all(format!("({} earlier bytes were dropped)\n", length - (end.len() - from) as u64).as_bytes())?;
    file.write_all(&end[from..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shows_the_last_lines_only() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        assert_eq!(tail(&path), "");
        std::fs::write(&path, (0..100).map(|n| format!("line {n}\n\n")).collect::<String>()).unwrap();
        let tail = tail(&path);
        assert!(tail.contains("line 92 | line 93") && tail.ends_with("line 99") && tail.len() <= 200, "{tail}");
    }

    #[test]
    fn keeps_the_end_of_a_log_that_is_too_long_while_it_is_written() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let mut writer = OpenOptions::new().create(true).append(true).open(&path).unwrap();
        for n in 0..(limits::LOG_BYTES / 100 + 1000) {
            writer.write_all(format!("{n:>99}\n").as_bytes()).unwrap();
        }
        shorten(&path).unwrap();
        writer.write_all(b"the last line\n").unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!((text.len() as u64) < limits::LOG_KEPT_BYTES + 200);
        assert!(text.starts_with('(') && text.lines().nth(1).unwrap().len() == 99);
        assert!(text.ends_with("\nthe last line\n"));
        shorten(&path).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), text, "a short one stays");
    }
}

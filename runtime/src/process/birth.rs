//! A new process writes itself down before it becomes another program.
//!
//! Between fork and exec a process has neither a record nor an environment of its own, and its starter may be killed just then.
//! So the child writes its own line into a file, and that file is locked until the program runs: whoever comes after the starter
//! waits for the lock and then knows what was started, if anything was.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use rustix::io::Errno;

use super::{ProcessIdentity, boot_id, parse_stat};

/// How long a child may take from fork to exec before nobody waits for it any more.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often the lock is tried meanwhile.
const LOOK_AGAIN: Duration = Duration::from_millis(1);

/// The file of one start, locked.
#[derive(Debug)]
pub(super) struct Birth(File);

impl Birth {
    /// Begins a start; the lock ends when this and the copy of every child are gone, which exec does.
    pub(super) fn prepare(path: &Path) -> io::Result<Birth> {
        let mut file = File::options().create(true).write(true).truncate(false).open(path)?;
        flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        // Only now: the line of a process that is still on its way must stay.
        file.set_len(0)?;
        writeln!(file, "{}", boot_id()?)?;
        Ok(Birth(file))
    }

    /// Writes the calling process down. Async-signal-safe: system calls and a buffer on the stack.
    pub(super) fn write(&self) -> io::Result<()> {
        let mut line = [0; 1024];
        let stat = rustix::fs::open(c"/proc/self/stat", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        let length = rustix::io::read(&stat, &mut line)?;
        rustix::io::write(&self.0, &line[..length])?;
        Ok(())
    }
}

/// The process that was started with `path` as its [`started_file`](super::Launch::started_file), while it runs.
/// Blocks while it is on its way to its program, 10 s at the most.
pub fn started(path: &Path) -> io::Result<Option<ProcessIdentity>> {
    let file = match File::open(path) {
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => return Ok(None),
        other => other?,
    };
    let deadline = Instant::now() + PATIENCE;
    let is_over = loop {
        match flock(&file, FlockOperation::NonBlockingLockShared) {
            Ok(()) => break true,
            Err(Errno::WOULDBLOCK) if Instant::now() < deadline => std::thread::sleep(LOOK_AGAIN),
            Err(Errno::WOULDBLOCK) => break false,
            Err(e) => return Err(e.into()),
        }
    };
    match written(path)? {
        Written::Process(process) => Ok(Some(process).filter(ProcessIdentity::is_alive)),
        _ if !is_over => {
            let text = format!("a process that is being started has not come up for {PATIENCE:?}: {}", path.display());
            Err(io::Error::new(io::ErrorKind::TimedOut, text))
        }
        Written::Nothing => Ok(None),
        Written::Nonsense => {
            tracing::warn!(file = %path.display(), "what was started here cannot be read, and nothing is being started");
            Ok(None)
        }
    }
}

enum Written {
    /// No process, or one of an earlier boot.
    Nothing,
    Process(ProcessIdentity),
    Nonsense,
}

/// What stands in the file. It is never synced, so after a loss of power anything may; but then not the name of this boot.
fn written(path: &Path) -> io::Result<Written> {
    let bytes = fs::read(path)?;
    let text = String::from_utf8_lossy(&bytes);
    let Some((boot_id, stat)) = text.split_once('\n').filter(|(_, stat)| !stat.is_empty()) else {
        return Ok(Written::Nothing);
    };
    if boot_id != super::boot_id()? {
        return Ok(Written::Nothing);
    }
    let pid = stat.split_once(' ').and_then(|(pid, _)| pid.parse().ok());
    let Some((pid, (_, start_ticks))) = pid.zip(parse_stat(stat)) else { return Ok(Written::Nonsense) };
    Ok(Written::Process(ProcessIdentity { pid, start_ticks, boot_id: boot_id.to_owned() }))
}

#[cfg(test)]
mod tests {
    use super::super::Launch;
    use super::*;

    #[tokio::test]
    async fn a_started_process_is_found_by_its_file_while_it_runs() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("started");
        assert_eq!(started(&file).unwrap(), None, "nothing was ever started");
        let mut launch = Launch::new("/bin/sleep").arg("60");
        launch.started_file = Some(file.clone());
        let process = launch.spawn_detached().unwrap();
        assert_eq!(started(&file).unwrap(), Some(process.clone()));
        process.terminate(Duration::ZERO).await.unwrap();
        assert_eq!(started(&file).unwrap(), None);
        let mut launch = Launch::new("/nowhere/program");
        launch.started_file = Some(file.clone());
        launch.spawn_detached().unwrap_err();
        assert_eq!(started(&file).unwrap(), None, "a start that failed left nothing");
    }

    /// The starter is killed between fork and exec: here it lets go of its lock while the child still has it.
    #[test]
    fn a_process_that_is_on_its_way_is_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("started");
        let birth = Birth::prepare(&file).unwrap();
        let child = Birth(birth.0.try_clone().unwrap());
        drop(birth);
        let (begun, begins) = std::sync::mpsc::channel();
        let place = file.clone();
        let finder = std::thread::spawn(move || {
            begun.send(()).unwrap();
            started(&place).unwrap()
        });
        begins.recv().unwrap();
        child.write().unwrap();
        drop(child);
        assert_eq!(finder.join().unwrap(), Some(ProcessIdentity::of(std::process::id()).unwrap()));
    }

    #[test]
    fn a_starter_that_ended_before_it_had_a_child_left_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("started");
        drop(Birth::prepare(&file).unwrap());
        assert_eq!(started(&file).unwrap(), None);
    }

    #[test]
    fn what_a_loss_of_power_left_of_a_start_is_no_process() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("started");
        let this_boot = boot_id().unwrap();
        let texts = [&[][..], b"\0\0\0", b"\xff\xfe\n\xff", b"another boot\nnonsense", b"another boot\n1 (init) S 0"];
        for text in texts.into_iter().chain([format!("{this_boot}\nnonsense").as_bytes()]) {
            fs::write(&file, text).unwrap();
            assert_eq!(started(&file).unwrap(), None, "{}", String::from_utf8_lossy(text));
        }
        assert_eq!(started(&file.join("started")).unwrap(), None, "a file where a directory should be");
    }
}

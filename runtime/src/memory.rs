//! Memory that a process gives back once it has started.
#![allow(unsafe_code, reason = "madvise has no safe form")]

/// Takes the code that has run so far out of this process's resident memory; what runs again comes back from the page cache.
///
/// The kernel maps 16 pages around each one that is touched, so a start (arguments, configuration, logs) leaves megabytes of
/// code behind in each process, of which those that stay for long and do little need a tenth.
pub fn release_startup_code() {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    for (start, length) in maps.lines().filter_map(code_of_a_file) {
        // SAFETY: the range is mapped privately from a file, executable and not writable, so nothing in it is ours: a page that
        // is touched again, be it the one that runs now, is the file's again.
        unsafe { libc::madvise(start as *mut libc::c_void, length, libc::MADV_DONTNEED) };
    }
}

/// Start and length of a line of `/proc/self/maps` when it is code of a file. Read-only data is left alone: relocations may have
/// changed it before it became read-only.
fn code_of_a_file(line: &str) -> Option<(usize, usize)> {
    let mut words = line.split_whitespace();
    let (range, mode) = (words.next()?, words.next()?);
    let path = words.nth(3)?;
    let (start, end) = range.split_once('-')?;
    let (start, end) = (usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?);
    (mode == "r-xp" && path.starts_with('/')).then(|| (start, end - start))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_code_of_files_is_released() {
        let code = "55d0c0000000-55d0c0003000 r-xp 007ef000 fe:00 1234   /usr/bin/program (deleted)";
        assert_eq!(code_of_a_file(code), Some((0x55d0_c000_0000, 0x3000)));
        for other in [
            "55d0c0000000-55d0c0003000 r--p 007ef000 fe:00 1234   /usr/bin/program",
            "55d0c0000000-55d0c0003000 rwxp 007ef000 fe:00 1234   /usr/bin/program",
            "7ffd5a5f2000-7ffd5a5f4000 r-xp 00000000 00:00 0      [vdso]",
            "7ffd5a5f2000-7ffd5a5f4000 r-xp 00000000 00:00 0",
            "",
        ] {
            assert_eq!(code_of_a_file(other), None, "{other}");
        }
    }

    #[test]
    fn less_is_resident_and_everything_still_runs() {
        let resident = || -> u64 {
            let status = std::fs::read_to_string("/proc/self/status").unwrap();
            let line = status.lines().find_map(|line| line.strip_prefix("RssFile:")).unwrap();
            line.trim().trim_end_matches(" kB").parse().unwrap()
        };
        let before = resident();
        release_startup_code();
        let after = resident();
        assert!(after < before, "{before} KiB, then {after} KiB");
    }
}

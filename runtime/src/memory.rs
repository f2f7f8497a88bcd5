//! Memory that a process gives back once it has started.
#![allow(unsafe_code, reason = "madvise has no safe form")]

/// Takes the code and the constants that were used so far out of this process's resident memory; what is used again comes back
/// from the page cache.
///
/// The kernel maps 16 pages around each one that is touched, so a start (arguments, configuration, logs, relocations) leaves
/// megabytes behind in each process, of which those that stay for long and do little need a tenth.
pub fn release_startup_code() {
    let mappings = std::fs::read_to_string("/proc/self/smaps").unwrap_or_default();
    for (start, length) in files_unchanged(&mappings) {
        // SAFETY: the range is mapped privately from a file, cannot be written, and no page of it differs from the file's, so
        // nothing in it is ours: a page that is touched again, be it the one that runs now, is the file's again.
        unsafe { libc::madvise(start as *mut libc::c_void, length, libc::MADV_DONTNEED) };
    }
}

/// Start and length of the mappings in a text like `/proc/self/smaps` that are of files, read-only, and as the files are.
/// (Read-only data that relocations have changed before it became read-only counts as `Anonymous`.)
fn files_unchanged(smaps: &str) -> Vec<(usize, usize)> {
    let mut found = vec![];
    let mut last = None;
    for line in smaps.lines() {
        match line.strip_prefix("Anonymous:") {
            Some(size) if size.trim() == "0 kB" => found.extend(last.take()),
            Some(_) => last = None,
            None => last = read_only_file(line).or(last),
        }
    }
    found
}

/// Start and length in the first line of a mapping when it is of a file, private and read-only.
fn read_only_file(line: &str) -> Option<(usize, usize)> {
    let mut words = line.split_whitespace();
    let (range, mode) = (words.next()?, words.next()?);
    let path = words.nth(3)?;
    let (start, end) = range.split_once('-')?;
    let (start, end) = (usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?);
    (matches!(mode, "r-xp" | "r--p") && path.starts_with('/')).then(|| (start, end - start))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A text like that of the kernel: each mapping with the size of its changed pages.
    fn smaps(mappings: &[(&str, u32)]) -> String {
        let of =
            |(line, changed): &(&str, u32)| format!("{line}\nRss: 12 kB\nAnonymous: {changed:9} kB\nVmFlags: rd ex\n");
        mappings.iter().map(of).collect()
    }

    #[test]
    fn only_what_is_still_as_in_its_file_is_released() {
        let code = ("55d0c0000000-55d0c0003000 r-xp 007ef000 fe:00 1234   /usr/bin/program (deleted)", 0);
        let constants = ("55d0c0003000-55d0c0004000 r--p 00000000 fe:00 1234   /usr/bin/program", 0);
        let both = [(0x55d0_c000_0000, 0x3000), (0x55d0_c000_3000, 0x1000)];
        let others = [
            ("55d0c0004000-55d0c0006000 r--p 007ef000 fe:00 1234   /usr/bin/program", 4),
            ("55d0c0006000-55d0c0008000 rw-p 007ef000 fe:00 1234   /usr/bin/program", 0),
            ("55d0c0008000-55d0c000a000 rwxp 007ef000 fe:00 1234   /usr/bin/program", 0),
            ("55d0c000a000-55d0c000c000 r--s 007ef000 fe:00 1234   /usr/bin/program", 0),
            ("7ffd5a5f2000-7ffd5a5f4000 r-xp 00000000 00:00 0      [vdso]", 0),
            ("7ffd5a5f4000-7ffd5a5f6000 r-xp 00000000 00:00 0", 0),
        ];
        for other in others {
            assert_eq!(files_unchanged(&smaps(&[other])), [], "{other:?}");
            assert_eq!(files_unchanged(&smaps(&[code, other, constants])), both, "{other:?}");
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

//! Owns: what the kernel says of this process: memory, CPU time, open files.
//! Does not own: what they are called (`telemetry/meters.rs`).

use std::fs;

use rustix::process::{Resource, getrlimit};

/// Linux counts CPU time for user space in this unit, whatever the kernel's own clock.
const TICKS_PER_SECOND: u64 = 100;

/// What could not be read is `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProcessFacts {
    pub resident_bytes: Option<u64>,
    pub cpu_seconds: Option<u64>,
    pub open_files: Option<u64>,
    pub open_files_max: Option<u64>,
}

impl ProcessFacts {
    pub fn read() -> ProcessFacts {
        let status = fs::read_to_string("/proc/self/status").ok();
        let stat = fs::read_to_string("/proc/self/stat").ok();
        ProcessFacts {
            resident_bytes: status.as_deref().and_then(resident_bytes),
            cpu_seconds: stat.as_deref().and_then(cpu_seconds),
            open_files: fs::read_dir("/proc/self/fd").ok().map(|entries| entries.count() as u64),
            open_files_max: getrlimit(Resource::Nofile).current,
        }
    }
}

/// `VmRSS:     1234 kB`
fn resident_bytes(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// Fields 14 and 15, counted behind the name, which may hold blanks and parentheses.
fn cpu_seconds(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut ticks = rest.split_whitespace().skip(11).take(2).map(|field| field.parse::<u64>());
    Some((ticks.next()?.ok()? + ticks.next()?.ok()?) / TICKS_PER_SECOND)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_is_understood() {
        assert_eq!(resident_bytes("Name:\tx\nVmRSS:\t    1024 kB\n"), Some(1 << 20));
        assert_eq!(cpu_seconds("7 (a) b) S 1 1 1 0 -1 4194560 1 2 3 4 150 250 0 0 20"), Some(4));
        assert_eq!((cpu_seconds(""), resident_bytes("VmRSS:")), (None, None));
        let facts = ProcessFacts::read();
        assert!(facts.resident_bytes.unwrap() > 1 << 20 && facts.open_files.unwrap() >= 3, "{facts:?}");
        assert!(facts.cpu_seconds.is_some() && facts.open_files_max.is_some());
    }
}

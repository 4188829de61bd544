//! Owns: what a restore leaves for its recovery: the marker in a data directory, requests as PostgreSQL makes them, and
//! the helper that reads ahead.
//! Does not own: the archive (`archived.rs`, `s3_rig.rs`), servers that recover (`postgres.rs`).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::process::{Pid, Signal};
use seawall::repository::layout::Lineage;
use seawall::restore::marker::{RestoreId, RestoreMarker};
use seawall::wal::{History, Lsn, SegmentSize};

use super::process::{self, Scratch};

pub const ID: RestoreId = RestoreId(0x00C0_FFEE);
pub const OTHER_ID: RestoreId = RestoreId(0xDECAF);
const DEADLINE: Duration = process::DEADLINE;

/// The marker a restore of everything would leave.
pub fn marker(lineage: &Lineage, size: SegmentSize, path: &History, start: Lsn, end: Option<Lsn>) -> RestoreMarker {
    RestoreMarker {
        schema: RestoreMarker::SCHEMA,
        id: ID,
        cluster: lineage.cluster.clone(),
        lineage: lineage.directory_name(),
        system_id: lineage.system_id,
        segment_size: size,
        path: RestoreMarker::path_of(path),
        follow: end.is_none(),
        start_lsn: start,
        end_lsn: end,
        standby: end.is_none(),
        backup: "20261122T110000Z-full".parse().expect("a backup's id"),
        target: "latest".to_owned(),
        created: "2026-11-22T11:00:00Z".parse().expect("a time"),
        pinned: false,
    }
}

/// Where a base backup's recovery begins, as its label says.
pub fn start_lsn(backup: &Path) -> Lsn {
    let label = fs::read_to_string(backup.join("backup_label")).expect("a backup has a label");
    let line = label.lines().find_map(|line| line.strip_prefix("START WAL LOCATION: ")).expect("it says where");
    line.split(' ').next().expect("an LSN").parse().expect("an LSN")
}

/// As much of a data directory as `wal-get` needs.
#[derive(Debug)]
pub struct DataDir {
    pub scratch: Scratch,
}

impl DataDir {
    pub fn with(marker: &RestoreMarker) -> DataDir {
        let scratch = Scratch::new();
        fs::create_dir(scratch.join("pg_wal")).expect("our directory can be made");
        marker.write(scratch.path()).expect("a marker can be written");
        DataDir { scratch }
    }

    pub fn path(&self) -> &Path {
        self.scratch.path()
    }

    pub fn dest(&self) -> PathBuf {
        self.path().join("pg_wal/RECOVERYXLOG")
    }

    /// One request, as the shell of a `restore_command` makes it: the exit code, what was delivered, what was said.
    pub fn ask(&self, command: &mut Command, name: &str) -> Asked {
        let _ = fs::remove_file(self.dest());
        let command = command.current_dir(self.path()).arg(name).arg("pg_wal/RECOVERYXLOG");
        let output = process::run(command, DEADLINE);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        Asked { code: output.status.code(), delivered: fs::read(self.dest()).ok(), stderr }
    }

    pub fn prefetch(&self) -> PathBuf {
        prefetch_of(self.path())
    }
}

#[derive(Debug)]
pub struct Asked {
    /// `None`: a signal.
    pub code: Option<i32>,
    pub delivered: Option<Vec<u8>>,
    pub stderr: String,
}

impl Asked {
    #[track_caller]
    pub fn is(&self, expected: &[u8]) {
        assert_eq!(self.code, Some(0), "{}", self.stderr);
        assert!(self.delivered.as_deref() == Some(expected), "other bytes than the server's were delivered");
    }

    #[track_caller]
    pub fn is_absent(&self) {
        assert_eq!((self.code, &self.delivered), (Some(1), &None), "{}", self.stderr);
    }
}

pub fn prefetch_of(pgdata: &Path) -> PathBuf {
    pgdata.join(format!("pg_wal/.seawall-{ID}"))
}

/// The segments held ready in a data directory.
pub fn ready(pgdata: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(prefetch_of(pgdata)) else { return Vec::new() };
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let segment = |name: String| name.split_once('-').filter(|(segment, _)| segment.len() == 24)?.0.to_owned().into();
    let mut names: Vec<String> = names.filter_map(segment).collect();
    names.sort();
    names
}

/// The helpers at work in a data directory.
pub fn helpers(pgdata: &Path) -> Vec<Pid> {
    let processes = fs::read_dir("/proc").expect("/proc can be listed");
    let pids = processes.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
    let is_helper = |pid: &i32| {
        let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd == pgdata)
            && words.split(|&byte| byte == 0).any(|word| word == b"--prefetch")
    };
    pids.filter(is_helper).filter_map(Pid::from_raw).filter(|&pid| process::is_alive(pid)).collect()
}

/// The one helper, once it is there.
pub fn helper(pgdata: &Path) -> Pid {
    process::eventually(DEADLINE, "a helper is at work", || helpers(pgdata).first().copied())
}

/// The same once it holds something ready: it knows its server and its marker by then.
pub fn helper_at_work(pgdata: &Path) -> Pid {
    process::eventually(DEADLINE, "a helper holds segments ready", || (!ready(pgdata).is_empty()).then_some(()));
    helper(pgdata)
}

pub fn kill(pid: Pid) {
    let _ = rustix::process::kill_process(pid, Signal::KILL);
    process::eventually(DEADLINE, "the helper is gone", || (!process::is_alive(pid)).then_some(()));
}

pub fn wait_no_helper(pgdata: &Path) {
    process::eventually(DEADLINE, "the helper ends", || helpers(pgdata).is_empty().then_some(()));
}

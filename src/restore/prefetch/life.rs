//! Owns: whether anybody still needs the helper.
//! Does not own: what it does while somebody does (`helper.rs`).

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::Pid;
use tokio::time::Instant;

use crate::restore::marker::{RestoreId, RestoreMarker};

/// Without a request: a standby asks every five seconds, a long replay of one segment takes minutes.
const IDLE_MAX: Duration = Duration::from_secs(15 * 60);
/// The log begins anew when it is longer.
const LOG_BYTES_MAX: u64 = 1 << 20;
/// Written by the postmaster into its data directory, with its process id in the first line.
const POSTMASTER_PID: &str = "postmaster.pid";

/// Why a helper ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    AnotherIsThere,
    /// `recovery_end_command` said so, or the marker is not that of this restore any more.
    RestoreEnded,
    ServerGone,
    Idle,
}

#[derive(Debug)]
pub struct Life {
    id: RestoreId,
    log: PathBuf,
    /// Of the server that was there in the beginning; none when `wal-get` is tried out by hand.
    postmaster: Option<Pid>,
    needed_at: Instant,
}

impl Life {
    pub fn begin(id: RestoreId, log: PathBuf) -> Life {
        Life { id, log, postmaster: postmaster(), needed_at: Instant::now() }
    }

    pub fn is_needed(&mut self) {
        self.needed_at = Instant::now();
    }

    /// Looked at each second.
    pub fn ended(&self) -> Option<Ended> {
        self.bound_log();
        // One that cannot be read is no reason to leave: PostgreSQL's own requests say what is wrong with it.
        match RestoreMarker::read(Path::new(".")) {
            Ok(Some(marker)) if marker.id == self.id => {}
            Ok(_) => return Some(Ended::RestoreEnded),
            Err(_) => {}
        }
        if self.postmaster.is_some_and(|pid| postmaster() != Some(pid) || !is_alive(pid)) {
            return Some(Ended::ServerGone);
        }
        (self.needed_at.elapsed() > IDLE_MAX).then_some(Ended::Idle)
    }

    fn bound_log(&self) {
        if fs::metadata(&self.log).is_ok_and(|found| found.len() > LOG_BYTES_MAX) {
            let _ = fs::File::options().write(true).open(&self.log).and_then(|log| log.set_len(0));
        }
    }
}

fn postmaster() -> Option<Pid> {
    let content = fs::read_to_string(POSTMASTER_PID).ok()?;
    Pid::from_raw(content.lines().next()?.trim().parse().ok().filter(|&pid: &i32| pid > 0)?)
}

fn is_alive(pid: Pid) -> bool {
    // One that may not be signalled is there.
    rustix::process::test_kill_process(pid) != Err(Errno::SRCH)
}

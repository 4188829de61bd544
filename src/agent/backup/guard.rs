//! Owns: noticing that a backup does not get on, whatever it hangs in, so that the next one is not kept waiting.
//! Does not own: the deadlines of single calls (`backup`, `repository`), which end nearly everything earlier.

use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use crate::backup::{BackupPhase, BackupProgress};
use crate::error::{Disposition, ExitCode, Failure};
use crate::units::show_duration;

/// How long a backup that hangs may take to end once it is told to.
pub const FAREWELL: Duration = Duration::from_secs(60);

/// What moves while a backup gets on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Signs {
    phase: BackupPhase,
    raw_bytes: u64,
    stored_bytes: u64,
    volumes: u32,
    streams_done: u32,
}

#[derive(Debug)]
pub struct Guard {
    patience: Duration,
    last: Signs,
    at: Instant,
}

impl Guard {
    pub fn new(patience: Duration) -> Guard {
        Guard { patience, last: Signs::default(), at: Instant::now() }
    }

    pub fn note(&mut self, progress: &BackupProgress) {
        let BackupProgress { phase, raw_bytes, stored_bytes, volumes, streams_done, .. } = *progress;
        let signs = Signs { phase, raw_bytes, stored_bytes, volumes, streams_done };
        if signs != self.last {
            (self.last, self.at) = (signs, Instant::now());
        }
    }

    /// Until nothing has moved for too long. A checkpoint shows nothing, nor does waiting for WAL: they have deadlines of
    /// their own.
    pub async fn expired(&self) {
        match self.last.phase {
            BackupPhase::Checkpoint | BackupPhase::WaitingForWal => std::future::pending().await,
            _ => sleep_until(self.at + self.patience).await,
        }
    }

    pub fn failure(&self) -> Failure {
        hung(&format!("while {}", self.last.phase.word()), self.patience)
    }
}

/// Within `patience`, or given up.
pub async fn within<T>(
    patience: Duration,
    what: &str,
    work: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    tokio::time::timeout(patience, work).await.unwrap_or_else(|_| Err(hung(what, patience)))
}

fn hung(what: &str, patience: Duration) -> Failure {
    let message = format!("the backup hung {what}: nothing moved for {}, and it is given up", show_duration(patience));
    Failure::new(ExitCode::Unavailable, message)
        .disposition(Disposition::Retry)
        .hint("does the server send, and does the repository take anything? It is tried again")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn it_waits_as_long_as_anything_moves() {
        let patience = Duration::from_secs(100);
        let mut guard = Guard::new(patience);
        let expires = async |guard: &Guard, seconds| {
            tokio::time::timeout(Duration::from_secs(seconds), guard.expired()).await.is_ok()
        };
        let mut progress = BackupProgress { phase: BackupPhase::Copying, ..BackupProgress::default() };
        guard.note(&progress);
        for bytes in 1..20 {
            assert!(!expires(&guard, 60).await);
            // Of what is told, only what moved counts.
            progress.raw_bytes = bytes / 2;
            progress.bytes_per_second = Some(bytes);
            guard.note(&progress);
        }
        assert!(expires(&guard, 101).await);
        for phase in [BackupPhase::Checkpoint, BackupPhase::WaitingForWal] {
            progress.phase = phase;
            guard.note(&progress);
            assert!(!expires(&guard, 100_000).await, "{phase:?}");
        }
        assert_eq!(
            guard.failure().message,
            "the backup hung while waiting for WAL: nothing moved for 100s, and it is given up"
        );
    }
}

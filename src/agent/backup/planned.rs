//! Owns: what the schedule asks for: of each repository, by the full backups it holds, so that nothing is kept from one
//! process to the next.
//! Does not own: what a line means, clocks that jump (`schedule`), taking a backup (`keeper.rs`).

use std::collections::BTreeMap;

use jiff::Timestamp;
use tokio::time::Instant;

use crate::catalog::shelf::Shelf;
use crate::config::ScheduleConfig;
use crate::monitor::backup::NextBackup;
use crate::repository::layout::{BackupId, BackupType};
use crate::schedule::{self, Moment, Next, Ran, Timing};
use crate::wal::Lsn;

/// The schedule of one cluster, and what this process saw end.
#[derive(Debug)]
pub struct Planned {
    config: ScheduleConfig,
    cluster: String,
    /// By the clock as it was when this process began.
    began: Timestamp,
    up: Instant,
    /// When each was seen first; `None`: it was there before.
    seen: Option<BTreeMap<BackupId, Option<Instant>>>,
}

impl Planned {
    pub fn new(config: ScheduleConfig, cluster: &str, now: Timestamp) -> Planned {
        Planned { config, cluster: cluster.to_string(), began: now, up: Instant::now(), seen: None }
    }

    /// Takes note of all complete backups there are.
    pub fn note(&mut self, complete: impl Iterator<Item = BackupId>) {
        let now = self.seen.is_some().then(Instant::now);
        let before = self.seen.take().unwrap_or_default();
        self.seen = Some(complete.map(|id| (id, before.get(&id).copied().unwrap_or(now))).collect());
    }

    /// When the next full backup of a repository is; `None`: there is no schedule.
    pub fn next(&self, lineage: &str, shelf: &Shelf, now: Timestamp, lsn: Option<Lsn>) -> Option<Next> {
        let line = self.config.full.as_ref()?;
        let seen = |id: &BackupId| Some(self.seen.as_ref()?.get(id).copied()??.elapsed());
        let fulls = shelf.complete().filter(|file| file.backup_type == BackupType::Full);
        let runs: Vec<Ran> = fulls
            .map(|file| Ran {
                started: file.started,
                finished: file.finished,
                start_lsn: Some(file.start_lsn),
                seen: seen(&file.id),
            })
            .collect();
        let seed = seed(&self.cluster, lineage);
        let timing = Timing { zone: self.config.timezone.clone(), jitter: self.config.jitter, seed };
        let moment = Moment { now, since: self.began, began: self.began, up: self.up.elapsed(), lsn };
        Some(schedule::next(line, &timing, &runs, &moment))
    }
}

/// What is due, else what is next by the clock, else what is known of it.
pub fn earliest<'a>(nexts: impl Iterator<Item = &'a Next>) -> Option<NextBackup> {
    let next = nexts.min_by_key(|next| (!next.is_due, next.at.is_none(), next.at))?;
    Some(NextBackup { backup_type: BackupType::Full, at: next.at, because: next.because.clone() })
}

/// FNV-1a: the same on every host, so that two agents of one cluster mean the same time.
fn seed(cluster: &str, lineage: &str) -> u64 {
    let bytes = cluster.bytes().chain([0]).chain(lineage.bytes());
    bytes.fold(0xCBF2_9CE4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3))
}

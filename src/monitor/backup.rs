//! Owns: how a backup is shown: the JSON object of `list`, `backup` and `status`.
//! Does not own: what has become of it (`catalog::shelf`), tables (`cli`). Pure.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::status::size;
use crate::catalog::shelf::{Outcome, Shelved};
use crate::repository::layout::BackupType;
use crate::wal::Lsn;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupEntry {
    pub id: String,
    #[serde(rename = "type")]
    pub backup_type: BackupType,
    pub parent: Option<String>,
    pub started: Timestamp,
    pub finished: Option<Timestamp>,
    pub start_lsn: Option<Lsn>,
    pub stop_lsn: Option<Lsn>,
    pub timeline: Option<u32>,
    pub raw_bytes: Option<u64>,
    pub stored_bytes: Option<u64>,
    pub status: BackupStatus,
    pub pinned: bool,
    pub label: Option<String>,
    pub postgres_version: Option<String>,
    pub cluster: String,
    pub lineage: String,
    /// Those that hold it whole; where none does, those that hold anything of it.
    pub repositories: Vec<String>,
    /// Why it failed, where that is known.
    pub cause: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackupStatus {
    Complete,
    Running,
    Failed,
}

impl BackupStatus {
    pub fn word(self) -> &'static str {
        match self {
            BackupStatus::Complete => "complete",
            BackupStatus::Running => "running",
            BackupStatus::Failed => "failed",
        }
    }
}

/// The next one of the schedule.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NextBackup {
    #[serde(rename = "type")]
    pub backup_type: BackupType,
    /// `None`: WAL decides, not time.
    pub at: Option<Timestamp>,
    /// The line of the schedule, and what is to say about it.
    pub because: String,
}

impl NextBackup {
    /// `2026-11-29T02:00:00Z (0 2 * * 0)`.
    pub fn to_text(&self) -> String {
        match self.at {
            Some(at) => format!("{at:.0} ({})", self.because),
            None => self.because.clone(),
        }
    }
}

/// A backup that is being taken.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupRunning {
    /// `None`: not begun yet.
    pub id: Option<String>,
    pub phase: String,
    pub raw_bytes: u64,
    pub raw_bytes_expected: Option<u64>,
    pub stored_bytes: u64,
    pub bytes_per_second: Option<u64>,
}

impl BackupRunning {
    /// `backup 2026…-full: copying, 1.5 GiB of 3.0 GiB`.
    pub fn to_text(&self) -> String {
        let id = self.id.as_deref().map(|id| format!(" {id}")).unwrap_or_default();
        let of = self.raw_bytes_expected.map(|expected| format!(" of {}", size(expected.max(self.raw_bytes))));
        format!("backup{id}: {}, {}{}", self.phase, size(self.raw_bytes), of.unwrap_or_default())
    }
}

impl BackupEntry {
    pub fn new(cluster: &str, lineage: &str, shelved: &Shelved) -> BackupEntry {
        let (begin, file) = (shelved.begin.as_ref(), shelved.file.as_ref());
        let parent = file.map_or_else(|| begin.and_then(|begin| begin.parent), |file| file.parent);
        let label = file.map_or_else(|| begin.and_then(|begin| begin.label.clone()), |file| file.label.clone());
        let timeline = file.map(|file| file.timeline).or_else(|| begin.map(|begin| begin.timeline));
        BackupEntry {
            id: shelved.id.to_string(),
            backup_type: shelved.id.backup_type(),
            parent: parent.map(|parent| parent.to_string()),
            started: file.map(|file| file.started).unwrap_or_else(|| shelved.id.started()),
            finished: file.map(|file| file.finished),
            start_lsn: file.map(|file| file.start_lsn),
            stop_lsn: file.map(|file| file.stop_lsn),
            timeline: timeline.map(|timeline| timeline.0),
            raw_bytes: file.map(|file| file.raw_bytes),
            stored_bytes: file.map(|file| file.stored_bytes),
            status: match shelved.outcome {
                Outcome::Complete => BackupStatus::Complete,
                Outcome::Running => BackupStatus::Running,
                Outcome::Failed => BackupStatus::Failed,
            },
            pinned: shelved.is_pinned,
            label,
            postgres_version: file.map(|file| file.server_version.clone()),
            cluster: cluster.to_string(),
            lineage: lineage.to_string(),
            repositories: shelved.repositories.clone(),
            cause: shelved.cause.clone().filter(|_| shelved.outcome == Outcome::Failed),
        }
    }
}

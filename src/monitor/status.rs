//! Owns: what `status` says of a cluster, as JSON and as a line: the one shape for the agent's `/status` and the command.
//! Does not own: how it is found out (`health.rs` for the agent, `cli/status.rs` from repository and server). Pure.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::backup::{BackupEntry, BackupRunning, NextBackup};
use super::retention::RetentionStatus;
use crate::receiver::Acknowledge;
use crate::verify::record::LastVerify;
use crate::wal::Lsn;

/// The version of every JSON answer.
pub const SCHEMA: u32 = 1;

/// The answer to `status`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Answer {
    pub schema: u32,
    /// Who was asked.
    pub source: String,
    pub clusters: Vec<ClusterStatus>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ClusterStatus {
    pub name: String,
    pub system_id: Option<String>,
    pub timeline: Option<u32>,
    /// `None`: unknown.
    pub state: Option<State>,
    pub acknowledge: Contract,
    pub server_lsn: Option<Lsn>,
    pub received_lsn: Option<Lsn>,
    pub proven_lsn: Option<Lsn>,
    pub durable_lsn: Option<Lsn>,
    pub acknowledged_lsn: Option<Lsn>,
    pub rpo_seconds: Option<f64>,
    pub lag_bytes: Option<u64>,
    pub repositories: Vec<RepositoryStatus>,
    pub slot: SlotStatus,
    /// The newest complete one.
    pub last_backup: Option<BackupEntry>,
    /// Taken by the agent at this moment.
    pub backup_running: Option<BackupRunning>,
    /// What the agent has expired; `None` where it does not, or is not asked.
    #[serde(default)]
    pub retention: Option<RetentionStatus>,
    /// Of the schedule.
    pub next_backup: Option<NextBackup>,
    /// Of all repositories together.
    #[serde(default)]
    pub last_verify: Option<LastVerify>,
    /// What can be restored without a hole up to its end: of the newest line, the newest part.
    pub window: Option<Window>,
    /// Open ones.
    pub gaps: Option<usize>,
    pub health: Health,
    pub reasons: Vec<String>,
    /// The last durable one.
    #[serde(skip)]
    pub last_commit: Option<Timestamp>,
}

/// Every instant from the one to the other can be restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    pub from: Moment,
    pub to: Moment,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moment {
    pub lsn: Lsn,
    /// Of the last commit before it, where it is known.
    pub time: Option<Timestamp>,
}

impl std::fmt::Display for Window {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let shown = |moment: &Moment| match moment.time {
            Some(time) => time.strftime("%Y-%m-%d %H:%M:%SZ").to_string(),
            None => moment.lsn.to_string(),
        };
        write!(f, "{} to {}", shown(&self.from), shown(&self.to))
    }
}

/// What an agent does for a cluster.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    #[default]
    Connecting,
    Streaming,
    /// Streaming, but not reading: memory is full.
    Paused,
    /// Another agent streams; this one takes over when it ends.
    Waiting,
    Fenced,
    /// Nothing is stored or acknowledged.
    Stopped,
}

impl State {
    pub const ALL: [State; 6] =
        [State::Connecting, State::Streaming, State::Paused, State::Waiting, State::Fenced, State::Stopped];

    pub fn word(self) -> &'static str {
        match self {
            State::Connecting => "connecting",
            State::Streaming => "streaming",
            State::Paused => "paused",
            State::Waiting => "waiting",
            State::Fenced => "fenced",
            State::Stopped => "stopped",
        }
    }
}

/// What acknowledged means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Contract {
    #[default]
    Repository,
    Spool,
}

impl From<Acknowledge> for Contract {
    fn from(acknowledge: Acknowledge) -> Contract {
        match acknowledge {
            Acknowledge::Repository => Contract::Repository,
            Acknowledge::Spool => Contract::Spool,
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RepositoryStatus {
    pub name: String,
    pub frontier_lsn: Option<Lsn>,
    /// A word: `ok`, `failing`, `behind`, `repairing`, `unavailable`, `empty`, `unknown`.
    pub state: String,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SlotStatus {
    pub name: String,
    pub wal_status: Option<String>,
    pub safe_wal_bytes: Option<i64>,
    pub hours_left: Option<f64>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Health {
    #[default]
    Ok,
    Degraded,
    Failing,
}

impl Health {
    pub fn word(self) -> &'static str {
        match self {
            Health::Ok => "ok",
            Health::Degraded => "degraded",
            Health::Failing => "failing",
        }
    }
}

impl ClusterStatus {
    /// A reason not to be content.
    pub fn finding(&mut self, health: Health, reason: impl Into<String>) {
        self.health = self.health.max(health);
        self.reasons.push(reason.into());
    }

    /// One line that is true, and a line for each reason.
    pub fn to_text(&self) -> String {
        let state = match self.state {
            Some(State::Stopped) => "not streaming",
            Some(state) => state.word(),
            None => "state unknown",
        };
        let rpo = self.rpo_seconds.map_or("unknown".to_string(), |seconds| format!("{seconds:.0} s"));
        let lag = self.lag_bytes.map_or("unknown".to_string(), size);
        let slot = self.slot.wal_status.as_deref().unwrap_or("unknown");
        let safe = self.slot.safe_wal_bytes.map(|bytes| format!(" ({} left)", size(bytes.max(0) as u64)));
        let durable = self.durable_lsn.map_or("nothing".to_string(), |lsn| lsn.to_string());
        let gaps = self.gaps.map_or("unknown".to_string(), |count| count.to_string());
        let line = format!(
            "{}: {}, {state}, durable to {durable}, RPO {rpo}, lag {lag}, slot {slot}{}, last backup {}{}{}, open gaps {gaps}",
            self.name,
            self.health.word(),
            safe.unwrap_or_default(),
            self.last_backup.as_ref().map_or("none", |backup| &backup.id),
            self.next_backup.as_ref().map_or(String::new(), |next| format!(", next {}", next.to_text())),
            self.window.map_or(String::new(), |window| format!(", restorable {window}")),
        );
        let reasons = self.reasons.iter().map(|reason| format!("  - {reason}"));
        std::iter::once(line).chain(reasons).collect::<Vec<_>>().join("\n")
    }
}

/// `12 B`, `3.5 MiB`.
pub fn size(bytes: u64) -> String {
    bytesize::ByteSize(bytes).display().iec().to_string()
}

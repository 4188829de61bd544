//! Full base backups: from the server's stream to volumes in every repository (DESIGN: "Base backups";
//! proto-notes/04-base-backup.md).
//!
//! Owns: running BASE_BACKUP, verifying what it sends against its manifest, cutting, compressing, encrypting and storing
//! volumes, and the order of a backup's objects: `begin.json` first, `backup.json` last.
//! Does not own: when a backup is taken, leases, the slot, that WAL is archived (`agent`); restoring.
//!
//! ```text
//!  connection ──CopyData──▶ [decompress] ──▶ intake ──4 MiB frames──▶ threads ──▶ stream ──▶ store (repository A)
//!                                            tar, checksums,          zstd        order,   ▶ store (repository B)
//!                                            where volumes end                    age
//! ```
//!
//! Nothing of it touches a disk. Memory is bounded by the frames between intake and stores: [`memory_bytes`].

use std::fmt;
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::catalog::BackupFile;
use crate::catalog::manifest::ChecksumAlgorithm;
use crate::catalog::store::Archive;
use crate::error::Failure;
use crate::replication::Connection;
use crate::replication::base_backup::{Checkpoint, ServerCompression};
use crate::repository::layout::{BackupId, LeaseNumber};
use crate::wal::{Lsn, TimelineId};

mod error;

pub use error::BackupError;

/// What a backup is asked to be.
#[derive(Clone, Debug)]
pub struct BackupOptions {
    /// One line of at most 1023 bytes.
    pub label: Option<String>,
    pub checkpoint: Checkpoint,
    /// The server sends no faster, in KiB/s: 32 to 1048576.
    pub max_rate_kib: Option<u32>,
    /// What the server sums files up with.
    pub checksums: ChecksumAlgorithm,
    /// What the server compresses the stream with on its way here; volumes are zstd in any case.
    pub compression: Option<ServerCompression>,
    /// A volume ends before the file that would make it longer than this, raw; a longer file is a volume of its own.
    pub volume_bytes: u64,
    /// Of zstd: 1 to 19.
    pub level: i32,
    /// That compress.
    pub threads: usize,
    /// How long a store may refuse for passing reasons before its repository is given up for this backup.
    pub store_patience: Duration,
}

impl Default for BackupOptions {
    fn default() -> BackupOptions {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        BackupOptions {
            label: None,
            checkpoint: Checkpoint::Fast,
            max_rate_kib: None,
            checksums: ChecksumAlgorithm::Crc32c,
            compression: None,
            volume_bytes: 1 << 30,
            level: 1,
            threads: cores.min(4),
            store_patience: Duration::from_secs(300),
        }
    }
}

/// A repository a backup goes to.
#[derive(Clone, Debug)]
pub struct Destination {
    /// As the configuration names it.
    pub name: String,
    /// The lineage there, and the keys its objects are encrypted to.
    pub archive: Archive,
    /// Under which the backup is taken there; recorded in `begin.json`.
    pub lease: Option<LeaseNumber>,
}

/// A configuration file that lives outside PGDATA.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigFile {
    /// Its name below `config/`: plain components.
    pub name: String,
    /// Where it is on the server, absolute.
    pub path: String,
    pub bytes: bytes::Bytes,
}

/// Everything about one backup but the connection.
#[derive(Clone, Debug)]
pub struct Request {
    pub options: BackupOptions,
    /// At least one.
    pub destinations: Vec<Destination>,
    /// Of the slot the WAL comes through, when it was known to stream contiguously: the backup starts at or after it.
    pub slot_restart_lsn: Lsn,
    pub config: Vec<ConfigFile>,
    /// Who takes it, for people.
    pub host: Option<String>,
}

/// What a backup needs of those who run it.
#[async_trait]
pub trait Surroundings: fmt::Debug + Send + Sync {
    fn now(&self) -> Timestamp;

    /// Returns once `repository` holds the WAL of `needed.timeline` from the segment of `needed.start` on, durably and
    /// without a hole, to `needed.stop` at least, and the timeline's history file. Its own patience ends the waiting.
    /// May be dropped at any time.
    async fn wal_is_stored(&self, repository: &str, needed: NeededWal) -> Result<WalStored, Failure>;

    /// Whether the lease is still ours in `repository`, by a look at the store: the last thing before `backup.json`.
    async fn lease_holds(&self, repository: &str) -> Result<(), Failure>;
}

/// The WAL without which a backup is not consistent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NeededWal {
    pub timeline: TimelineId,
    pub start: Lsn,
    /// One past the last byte needed.
    pub stop: Lsn,
    /// A standby ends no segment at the stop LSN, so the last one may stay unfinished for long: its tails do.
    pub from_standby: bool,
}

/// What is known when it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WalStored {
    /// Of the last commit known at or before the stop LSN.
    pub last_commit: Option<Timestamp>,
}

/// How far a backup is. Published at least once a second while bytes flow.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BackupProgress {
    pub phase: BackupPhase,
    /// From `begin.json` on.
    pub id: Option<BackupId>,
    pub timeline: Option<TimelineId>,
    pub start_lsn: Option<Lsn>,
    /// From the end of the copy on.
    pub stop_lsn: Option<Lsn>,
    /// Of the tar streams, uncompressed.
    pub raw_bytes: u64,
    /// What the server thinks they come to; it changes while it is read.
    pub raw_bytes_expected: Option<u64>,
    /// Of the volumes, as one repository stores them.
    pub stored_bytes: u64,
    /// Begun.
    pub volumes: u32,
    /// Streams: one for each tablespace, and PGDATA.
    pub streams: u32,
    pub streams_done: u32,
    /// Of `raw_bytes`, lately.
    pub bytes_per_second: Option<u64>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BackupPhase {
    /// `begin.json`.
    #[default]
    Beginning,
    /// The server makes its checkpoint: seconds, or with `spread` most of `checkpoint_timeout`.
    Checkpoint,
    Copying,
    /// Everything is stored but the WAL up to the stop LSN.
    WaitingForWal,
    Committing,
    Ended,
}

impl BackupPhase {
    /// In a word, for people and JSON.
    pub fn word(self) -> &'static str {
        match self {
            BackupPhase::Beginning => "beginning",
            BackupPhase::Checkpoint => "checkpoint",
            BackupPhase::Copying => "copying",
            BackupPhase::WaitingForWal => "waiting for WAL",
            BackupPhase::Committing => "committing",
            BackupPhase::Ended => "ended",
        }
    }
}

/// How it went.
#[derive(Clone, Debug)]
pub struct Report {
    /// `None`: it failed before anything was begun anywhere.
    pub id: Option<BackupId>,
    /// One for each destination, in their order.
    pub outcomes: Vec<Outcome>,
}

impl Report {
    /// Whether it exists in some repository.
    pub fn is_complete_somewhere(&self) -> bool {
        self.outcomes.iter().any(|outcome| outcome.result.is_ok())
    }

    /// Whether it exists in all of them.
    pub fn is_complete(&self) -> bool {
        self.outcomes.iter().all(|outcome| outcome.result.is_ok())
    }
}

#[derive(Clone, Debug)]
pub struct Outcome {
    pub repository: String,
    pub result: Result<BackupFile, BackupError>,
}

/// Takes a full backup over `connection`, a physical session with nothing running on it, which is closed afterwards.
///
/// A repository that fails drops out with its own error and the others go on; what the source does wrong fails all. Every
/// object but `backup.json` may be left behind by a failure: without it the backup does not exist. `stop` ends it at any
/// point: uploads are aborted, nothing more is written, the outcome is [`BackupError::Stopped`].
///
/// Dropping the future is as safe as a crash, and as untidy.
pub async fn take(
    connection: Connection,
    request: Request,
    surroundings: &dyn Surroundings,
    progress: &watch::Sender<BackupProgress>,
    stop: &CancellationToken,
) -> Report {
    let _ = (connection, surroundings, progress, stop);
    let stopped =
        |destination: Destination| Outcome { repository: destination.name, result: Err(BackupError::Stopped) };
    Report { id: None, outcomes: request.destinations.into_iter().map(stopped).collect() }
}

/// What a backup holds in memory at most, beside the connection's and the stores' own buffers.
pub fn memory_bytes(options: &BackupOptions) -> u64 {
    options.threads as u64 * (16 << 20)
}

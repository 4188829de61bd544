//! Full base backups: from the server's stream to volumes in every repository (proto-notes/04-base-backup.md).
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

mod commit;
mod error;
mod frames;
mod inflate;
mod intake;
mod receive;
mod store;
mod verdict;

use std::fmt;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::future::join_all;
use jiff::Timestamp;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::catalog::Crc32;
use crate::catalog::backup::{BackupFile, BeginFile, ManifestEntry, TablespaceEntry};
use crate::catalog::manifest::ChecksumAlgorithm;
use crate::catalog::store::Archive;
use crate::codec::encrypt::Recipients;
use crate::error::{Advice, Failure};
use crate::replication::Connection;
use crate::replication::base_backup::{Checkpoint, ServerCompression};
use crate::repository::layout::{BackupId, LeaseNumber};
use crate::wal::{Lsn, SegmentSize, TimelineId};

pub use error::BackupError;
use frames::Encoded;
use receive::{ReceiveError, Received, SourceFacts, receive};
use store::Patience;

const SCHEMA: u32 = 1;
const VERSION: &str = env!("CARGO_PKG_VERSION");
/// For `begin.json`.
const BEGIN_PATIENCE_MAX: Duration = Duration::from_secs(30);
/// In `backup_label`, where none was given.
const DEFAULT_LABEL: &str = "seawall";

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

    /// Of one that did not end when it was told to, and was left.
    pub fn stopped(id: Option<BackupId>, repositories: &[String]) -> Report {
        let outcome = |name: &String| Outcome { repository: name.clone(), result: Err(BackupError::Stopped) };
        Report { id, outcomes: repositories.iter().map(outcome).collect() }
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
    mut connection: Connection,
    request: Request,
    surroundings: &dyn Surroundings,
    progress: &watch::Sender<BackupProgress>,
    stop: &CancellationToken,
) -> Report {
    let mut backup = Backup::new(request, surroundings, progress, stop);
    if let Err(error) = backup.run(&mut connection).await {
        backup.fail_all(&error);
    }
    progress.send_modify(|progress| progress.phase = BackupPhase::Ended);
    connection.close().await;
    backup.report()
}

/// What a backup holds in memory at most, beside the connection's and the stores' own buffers and about 60 bytes for each
/// file.
pub fn memory_bytes(options: &BackupOptions) -> u64 {
    frames::memory_bytes(options.threads)
}

/// One backup on its way.
struct Backup<'a> {
    request: Request,
    surroundings: &'a dyn Surroundings,
    progress: &'a watch::Sender<BackupProgress>,
    patience: Patience,
    id: Option<BackupId>,
    /// Of each destination: `None` while all is well there.
    results: Vec<Option<Result<BackupFile, BackupError>>>,
}

/// What is asked of a server before the backup.
#[derive(Debug)]
struct Source {
    facts: SourceFacts,
    version: String,
    segment_size: SegmentSize,
    data_checksums: Option<bool>,
}

impl<'a> Backup<'a> {
    fn new(
        request: Request,
        surroundings: &'a dyn Surroundings,
        progress: &'a watch::Sender<BackupProgress>,
        stop: &CancellationToken,
    ) -> Backup<'a> {
        let patience = Patience { limit: request.options.store_patience, stop: stop.clone() };
        let results = request.destinations.iter().map(|_| None).collect();
        Backup { request, surroundings, progress, patience, id: None, results }
    }

    /// The story. An error ends it in every repository that had none of its own.
    async fn run(&mut self, connection: &mut Connection) -> Result<(), BackupError> {
        let source = self.ask(connection).await?;
        let begun = self.begin(&source).await?;
        let (received, encoded) = self.copy(connection, &source).await?;
        self.progress.send_modify(|progress| progress.phase = BackupPhase::WaitingForWal);
        let file = self.file(&source, &begun, received, encoded);
        self.finish(file).await;
        Ok(())
    }

    /// Asks the server who it is, and whether it is the one the archives are of.
    async fn ask(&self, connection: &mut Connection) -> Result<Source, BackupError> {
        let source = |error| BackupError::of_source(error, &[]);
        let identity = connection.identify_system().await.map_err(source)?;
        let segment_size = connection.wal_segment_size().await.map_err(source)?;
        let data_checksums = match connection.show("data_checksums").await.map_err(source)?.as_str() {
            "on" => Some(true),
            "off" => Some(false),
            _ => None,
        };
        for Destination { name, archive, .. } in &self.request.destinations {
            let expected = archive.lineage.system_id;
            if expected != identity.system_id {
                let found = identity.system_id;
                return Err(BackupError::OtherSystem { repository: name.clone(), found, expected });
            }
        }
        let version = connection.parameter("server_version").unwrap_or_default();
        let facts = SourceFacts {
            system_id: identity.system_id,
            timeline: identity.timeline,
            major: connection.server_major(),
            label: self.request.options.label.clone().unwrap_or_else(|| DEFAULT_LABEL.to_string()),
            slot_restart_lsn: self.request.slot_restart_lsn,
        };
        // Distributions append their own.
        let version = version.split_whitespace().next().unwrap_or_default().to_string();
        Ok(Source { facts, version, segment_size, data_checksums })
    }

    /// `begin.json` in every repository. Told is when it began.
    async fn begin(&mut self, source: &Source) -> Result<Timestamp, BackupError> {
        let started = self.surroundings.now();
        let id = commit::free_id(&self.request.destinations, started).await;
        self.id = Some(id);
        self.progress.send_modify(|progress| {
            progress.id = Some(id);
            progress.timeline = Some(source.facts.timeline);
        });
        let begin_in = |destination: &Destination| BeginFile {
            schema: SCHEMA,
            id,
            backup_type: id.backup_type(),
            parent: None,
            label: self.request.options.label.clone(),
            started,
            slot_restart_lsn: self.request.slot_restart_lsn,
            timeline: source.facts.timeline,
            lease: destination.lease,
            host: self.request.host.clone(),
            version: VERSION.to_string(),
        };
        let files: Vec<BeginFile> = self.request.destinations.iter().map(begin_in).collect();
        // One that is down now does not hold the others up for long.
        let patience = Patience { limit: self.patience.limit.min(BEGIN_PATIENCE_MAX), ..self.patience.clone() };
        let beginning = self.request.destinations.iter().zip(&files);
        let begun = join_all(beginning.map(|(destination, file)| commit::begin(destination, file, &patience))).await;
        for (index, begun) in begun.into_iter().enumerate() {
            self.note(index, begun);
        }
        if self.remaining().is_empty() { Err(BackupError::Stopped) } else { Ok(started) }
    }

    /// Everything from the server into every repository that is left.
    async fn copy(&mut self, connection: &mut Connection, source: &Source) -> Result<(Received, Encoded), BackupError> {
        let id = self.id.expect("it has begun");
        let remaining = self.remaining();
        let recipients = self.request.destinations[remaining[0]].archive.keys.recipients.clone();
        // When the source fails, no store goes on trying.
        let patience = Patience { stop: self.patience.stop.child_token(), ..self.patience.clone() };
        let (mut outlets, mut stores) = (Vec::new(), Vec::new());
        for &index in &remaining {
            let archive = self.request.destinations[index].archive.clone();
            let same = archive.keys.recipients.as_ref().map(Recipients::public_keys);
            assert_eq!(same, recipients.as_ref().map(Recipients::public_keys), "one cluster has one set of recipients");
            let (outlet, items) = mpsc::channel(frames::PARTS_QUEUED);
            outlets.push(outlet);
            let storing = store::run_storing(archive, id, items, patience.clone());
            stores.push(AbortOnDropHandle::new(tokio::spawn(storing)));
        }
        let BackupOptions { level, threads, .. } = self.request.options;
        let (framer, encoding) = frames::pipeline(outlets, recipients, level, threads, self.progress.clone());
        let encoding = AbortOnDropHandle::new(tokio::spawn(encoding.run()));
        let config = std::mem::take(&mut self.request.config);
        let (options, stop) = (&self.request.options, &self.patience.stop);
        let received = receive(connection, &source.facts, options, config, framer, self.progress, stop).await;
        if received.is_err() {
            patience.stop.cancel();
        }
        let encoded = joined(encoding.await);
        for (&index, store) in remaining.iter().zip(stores) {
            let stored = joined(store.await);
            // Without the last word from here every store ends as if it was stopped: the reason is the reader's.
            if !(matches!(stored, Err(BackupError::Stopped)) && received.is_err()) {
                self.note(index, stored);
            }
        }
        match (received, encoded) {
            (Ok(received), Ok(encoded)) => Ok((received, encoded)),
            (Err(ReceiveError::Failed(error)), _) => Err(error),
            // Every store has said why.
            _ => Err(BackupError::Stopped),
        }
    }

    /// `backup.json`, but for what only the end can tell.
    fn file(&self, source: &Source, started: &Timestamp, received: Received, encoded: Encoded) -> BackupFile {
        let id = self.id.expect("it has begun");
        let stored = |bytes: &mut dyn Iterator<Item = u64>| bytes.sum::<u64>();
        let stored_bytes = encoded.manifest_bytes
            + stored(&mut encoded.volumes.iter().map(|volume| volume.stored_bytes))
            + stored(&mut encoded.config.iter().map(|file| file.stored_bytes));
        let tablespaces = received.streams.into_iter().filter_map(|row| row.tablespace);
        BackupFile {
            schema: SCHEMA,
            id,
            backup_type: id.backup_type(),
            parent: None,
            fallback: None,
            label: self.request.options.label.clone(),
            started: *started,
            finished: *started,
            system_id: source.facts.system_id,
            server_version: source.version.clone(),
            segment_size: source.segment_size,
            timeline: received.timeline,
            start_lsn: received.start,
            stop_lsn: received.stop,
            stop_time: None,
            from_standby: received.from_standby,
            data_checksums: source.data_checksums,
            raw_bytes: stored(&mut encoded.volumes.iter().map(|volume| volume.raw_bytes)),
            stored_bytes,
            manifest: ManifestEntry {
                bytes: encoded.manifest_bytes,
                crc32: Crc32(encoded.manifest_crc32),
                files: received.manifest.files,
                checksums: self.request.options.checksums.name().to_string(),
            },
            tablespaces: tablespaces
                .map(|space| TablespaceEntry { oid: space.oid, location: space.location })
                .collect(),
            volumes: encoded.volumes,
            config: encoded.config,
            version: VERSION.to_string(),
        }
    }

    /// In each repository that is left, on its own: its WAL, then the commit mark.
    async fn finish(&mut self, file: BackupFile) {
        let remaining = self.remaining();
        let finishing = remaining.iter().map(|&index| self.finish_in(&self.request.destinations[index], file.clone()));
        let finished = join_all(finishing).await;
        for (index, result) in remaining.into_iter().zip(finished) {
            self.results[index] = Some(result);
        }
    }

    async fn finish_in(&self, destination: &Destination, mut file: BackupFile) -> Result<BackupFile, BackupError> {
        let needed = NeededWal {
            timeline: file.timeline,
            start: file.start_lsn,
            stop: file.stop_lsn,
            from_standby: file.from_standby,
        };
        file.stop_time = commit::wait_for_wal(destination, self.surroundings, needed, &self.patience).await?;
        self.progress.send_modify(|progress| progress.phase = BackupPhase::Committing);
        file.finished = self.surroundings.now();
        commit::commit(destination, self.surroundings, &file, &self.patience).await?;
        tracing::info!(repository = destination.name, id = %file.id, "the backup is complete");
        Ok(file)
    }

    /// The destinations where nothing has failed.
    fn remaining(&self) -> Vec<usize> {
        (0..self.results.len()).filter(|&index| self.results[index].is_none()).collect()
    }

    fn note(&mut self, index: usize, result: Result<(), BackupError>) {
        if let Err(error) = result {
            let repository = &self.request.destinations[index].name;
            tracing::warn!(repository, %error, hint = error.hint(), "the backup goes on without this repository");
            self.results[index] = Some(Err(error));
        }
    }

    fn fail_all(&mut self, error: &BackupError) {
        for result in &mut self.results {
            result.get_or_insert_with(|| Err(error.clone()));
        }
    }

    fn report(self) -> Report {
        let stopped = || Err(BackupError::Stopped);
        let outcomes = self.request.destinations.into_iter().zip(self.results);
        let outcome = |(destination, result): (Destination, Option<_>)| Outcome {
            repository: destination.name,
            result: result.unwrap_or_else(stopped),
        };
        Report { id: self.id, outcomes: outcomes.map(outcome).collect() }
    }
}

fn joined<T>(result: Result<T, tokio::task::JoinError>) -> T {
    result.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
}

#[cfg(test)]
mod tests;

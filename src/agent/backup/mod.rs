//! Base backups around the stream: the lease, what a backup needs of the archive, what is recorded of one that failed.
//!
//! Owns: one backup from the lease to the ledger ([`Job`]), for the agent and for `seawall backup`; when the agent takes
//! one by itself (`keeper.rs`, `planned.rs`), and when one is given up (`guard.rs`).
//! Does not own: taking it (`backup`), streaming (`session.rs`): a backup has a connection and a memory of its own, and
//! the stream never waits for it.

pub mod files;
mod guard;
pub mod keeper;
pub mod lease;
pub mod planned;
mod standby;
pub mod wal;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::cluster::Status;
use super::opening::Opened;
use super::startup;
use super::world::{ClusterOptions, LoginSource, World};
use crate::backup::{
    self, BackupError, BackupOptions, BackupPhase, BackupProgress, ConfigFile, Destination, NeededWal, Report, Request,
    Surroundings, WalStored,
};
use crate::catalog::backup::BackupFile;
use crate::catalog::ledger::{BACKUP_ID, BACKUP_PHASE, FactKind, LedgerFact};
use crate::catalog::shelf::Shelf;
use crate::catalog::store::Archive;
use crate::config::ScheduleConfig;
use crate::error::{Disposition, ExitCode, Failure};
use crate::monitor::backup::BackupRunning;
use crate::postgres::{Purpose, TargetSessionAttrs, connect, sql};
use crate::replication::{Connection, Login, SlotReading};
use crate::repository::layout::BackupId;
use crate::wal::{Lsn, SegmentSize, TimelineId};
use guard::Guard;
use lease::{Lease, Patience, Tenant};

/// How a cluster's backups are taken.
#[derive(Clone, Debug)]
pub struct BackupSettings {
    /// Whether the agent takes them by itself.
    pub automatic: bool,
    pub options: BackupOptions,
    /// Whose files are copied; `None`: those of the server WAL is streamed from.
    pub from: Option<Arc<dyn LoginSource>>,
    /// When it takes them, besides the first one and one behind a gap.
    pub schedule: ScheduleConfig,
    /// One that does not get on for so long is given up.
    pub hung_after: Duration,
}

/// Far beyond what single calls may take, all their attempts together.
pub const HUNG_AFTER: Duration = Duration::from_secs(1800);
/// A standby may have to wait for a checkpoint of its primary, and to replay it.
const PREPARING_MAX: Duration = Duration::from_secs(2 * 3600);

/// A lineage in one repository.
#[derive(Clone, Debug)]
pub struct Place {
    /// Its place in the configuration.
    pub index: usize,
    pub name: String,
    /// Of `repository.json`.
    pub id: String,
    pub archive: Archive,
}

impl From<&Opened> for Place {
    fn from(opened: &Opened) -> Place {
        let Opened { index, name, id, archive } = opened.clone();
        Place { index, name, id, archive }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "repository {} ({})", self.name, self.archive.backend.describe())
    }
}

/// One backup to take.
#[derive(Debug)]
pub struct Job<'a> {
    pub world: &'a World,
    pub cluster: &'a ClusterOptions,
    pub settings: &'a BackupSettings,
    /// Where it goes; at least one.
    pub places: Vec<Place>,
    pub segment_size: SegmentSize,
    /// The server WAL is streamed from.
    pub primary: Login,
    /// For the log, and for others who want the lease.
    pub purpose: String,
    pub patience: Patience,
    /// Of the agent in this process; `None`: another one streams.
    pub status: Option<watch::Receiver<Status>>,
    /// The backups there were when it was decided, by repository: once the lease is ours there must be no others, or it
    /// is to be decided again. `None`: it is taken in any case.
    pub decided_by: Option<BTreeMap<String, BTreeSet<BackupId>>>,
}

/// A backup that exists.
#[derive(Debug)]
pub struct Done {
    pub id: BackupId,
    /// One for each repository that has it.
    pub files: Vec<(String, BackupFile)>,
    /// Those that do not, and why.
    pub failed: Vec<(String, Failure)>,
    /// What could not be read of the configuration outside the data directory.
    pub missing_config: Option<String>,
}

impl Job<'_> {
    /// Takes the lease, the backup, and gives the lease back. What fails is recorded where it was begun.
    pub async fn run(
        &self,
        progress: &watch::Sender<BackupProgress>,
        stop: &CancellationToken,
    ) -> Result<Done, Failure> {
        let tenant = self.tenant();
        let (lease, absent) = tokio::select! {
            biased;
            () = stop.cancelled() => return Err(BackupError::Stopped.into()),
            acquired = self.acquire(&tenant) => acquired?,
        };
        for (place, why) in &absent {
            tracing::warn!(
                cluster = self.cluster.name,
                repository = place.name,
                hint = why.hint.as_deref(),
                "no backup goes there: {why}"
            );
        }
        let done = self.take_under(&lease, progress, stop).await;
        // It lapses where it cannot be given back.
        let _ = tokio::time::timeout(guard::FAREWELL, lease.release()).await;
        let mut done = done?;
        done.failed.extend(absent.into_iter().map(|(place, why)| (place.name, why)));
        Ok(done)
    }

    fn tenant(&self) -> Tenant {
        let mut random = self.world.random.lock().expect("no holder panics");
        Tenant {
            holder: format!("{:032x}", random.u128(..)),
            host: self.cluster.host.clone(),
            purpose: self.purpose.clone(),
            clock: self.world.clock.clone(),
        }
    }

    async fn acquire(&self, tenant: &Tenant) -> Result<(Lease, Vec<(Place, Failure)>), Failure> {
        let acquiring = Lease::acquire(&self.places, tenant, self.patience);
        match self.patience {
            Patience::None => guard::within(self.settings.hung_after, "before it took the lease", acquiring).await,
            // Whoever waits for it says for how long.
            _ => acquiring.await,
        }
    }

    async fn take_under(
        &self,
        lease: &Lease,
        progress: &watch::Sender<BackupProgress>,
        stop: &CancellationToken,
    ) -> Result<Done, Failure> {
        let preparing_max = match self.settings.from {
            Some(_) => self.settings.hung_after.max(PREPARING_MAX),
            None => self.settings.hung_after,
        };
        let prepared = guard::within(preparing_max, "before it began", self.prepare(lease)).await;
        let (connection, request, missing_config) = prepared?;
        let id_of = || progress.borrow().id;
        let around = Around {
            parts: lease.parts(),
            clock: &self.world.clock,
            segment_size: self.segment_size,
            status: self.status.clone(),
        };
        // Ours to cancel, and cancelled with `stop`.
        let ended = stop.child_token();
        let lost = lease.lost();
        let mut watching = progress.subscribe();
        let mut phase = BackupPhase::default();
        let mut guard = Guard::new(self.settings.hung_after);
        let mut given_up = None;
        let taking = backup::take(connection, request, &around, progress, &ended);
        tokio::pin!(taking);
        let report = loop {
            tokio::select! {
                report = &mut taking => break report,
                () = lost.cancelled(), if !ended.is_cancelled() => ended.cancel(),
                () = guard.expired(), if given_up.is_none() && !ended.is_cancelled() => {
                    given_up = Some((guard.failure(), tokio::time::Instant::now() + guard::FAREWELL));
                    ended.cancel();
                }
                () = until(given_up.as_ref().map(|(_, at)| *at)) => break Report::stopped(id_of(), &lease_names(lease)),
                _ = watching.changed() => {
                    let now = watching.borrow_and_update();
                    guard.note(&now);
                    if now.phase != BackupPhase::Ended {
                        phase = now.phase;
                    }
                }
            }
        };
        let given_up = given_up.map(|(why, _)| why);
        let concluding = self.conclude(lease, report, phase, given_up, missing_config);
        guard::within(self.settings.hung_after, "when it had ended", concluding).await
    }

    /// Everything before the server is asked for a backup.
    async fn prepare(&self, lease: &Lease) -> Result<(Connection, Request, Option<String>), Failure> {
        for part in lease.parts() {
            if let Some(known) = self.decided_by.as_ref().and_then(|decided| decided.get(&part.place.name)) {
                let found: BTreeSet<BackupId> = part.place.archive.backup_ids().await?.into_iter().collect();
                if found != *known {
                    let message = format!("{} has got another backup meanwhile", part.place);
                    return Err(Failure::new(ExitCode::TryAgain, message));
                }
            }
            if let Err(failure) = settle(self.world, &part.place).await {
                tracing::info!(repository = part.place.name, %failure, "cannot look for what earlier backups left unfinished");
            }
        }
        let (mut connection, login) = self.connect().await?;
        let slot_restart_lsn = self.start_at_least(&mut connection, &login, lease).await?;
        let captured = match self.sql_login(&login) {
            Ok(login) => files::capture(self.world.dialer.as_ref(), &login).await,
            Err(failure) => Err(failure),
        };
        let captured = captured
            .unwrap_or_else(|failure| files::Captured { files: Vec::new(), missing: Some(failure.to_string()) });
        let config = captured.files.into_iter();
        let request = Request {
            options: self.settings.options.clone(),
            destinations: lease.parts().iter().map(destination).collect(),
            slot_restart_lsn,
            config: config.map(|file| ConfigFile { name: file.name, path: file.path, bytes: file.content }).collect(),
            host: self.cluster.host.clone(),
        };
        Ok((connection, request, captured.missing))
    }

    /// Records what failed, and what a complete one heals.
    async fn conclude(
        &self,
        lease: &Lease,
        report: Report,
        phase: BackupPhase,
        given_up: Option<Failure>,
        missing_config: Option<String>,
    ) -> Result<Done, Failure> {
        let (mut files, mut failed) = (Vec::new(), Vec::new());
        for outcome in report.outcomes {
            let part = lease.parts().iter().find(|part| part.place.name == outcome.repository);
            match outcome.result {
                Ok(file) => {
                    if let Some(part) = part {
                        self.heal(&part.place, &file).await;
                    }
                    files.push((outcome.repository, file));
                }
                Err(error) => {
                    let why = match &given_up {
                        Some(why) if matches!(error, BackupError::Stopped) => why.clone(),
                        _ => Failure::from(error),
                    };
                    if let (Some(part), Some(id)) = (part, report.id) {
                        record_failure(self.world, &part.place, id, phase, why.to_string()).await;
                    }
                    failed.push((outcome.repository, why));
                }
            }
        }
        match (report.id, files.is_empty(), failed.first()) {
            (Some(id), false, _) => Ok(Done { id, files, failed, missing_config }),
            (_, _, Some((_, why))) => Err(why.clone()),
            _ => Err(BackupError::Stopped.into()),
        }
    }

    /// What is missing before the backup is no longer needed to restore what comes after it.
    async fn heal(&self, place: &Place, file: &BackupFile) {
        let healed = async {
            for gap in open_gaps(&place.archive.ledger().await?) {
                let (Some(timeline), Some(from), Some(to)) = (gap.timeline, gap.from_lsn, gap.to_lsn) else { continue };
                if to <= file.start_lsn && timeline <= file.timeline {
                    let cause = "a base backup begins behind it";
                    let mut fact = LedgerFact::new(FactKind::GapHealed, self.world.clock.now(), cause);
                    fact.healed_by = Some(file.id.to_string());
                    startup::record_once(self.world, &place.archive, fact.about(timeline, from, to)).await?;
                }
            }
            Ok::<_, Failure>(())
        };
        if let Err(failure) = healed.await {
            tracing::warn!(repository = place.name, %failure, "that a gap is healed could not be written to the ledger");
        }
    }

    /// A physical session on the server whose files are copied.
    async fn connect(&self) -> Result<(Connection, Login), Failure> {
        let connected = match &self.settings.from {
            Some(from) => {
                let logins = from.logins(Purpose::Physical)?;
                connect::connect_or_explain(self.world.dialer.as_ref(), &logins, from.wanted()).await
            }
            None => {
                let logins = std::slice::from_ref(&self.primary);
                connect::connect_or_explain(self.world.dialer.as_ref(), logins, TargetSessionAttrs::Any).await
            }
        };
        let connected = connected.map_err(|failure| failure.context("connect for a base backup"))?;
        Ok((connected.connection, connected.login))
    }

    fn sql_login(&self, login: &Login) -> Result<Login, Failure> {
        let source = self.settings.from.as_ref().unwrap_or(&self.world.logins);
        let logins = source.logins(Purpose::Sql)?;
        let same_server = logins.into_iter().find(|other| other.address == login.address);
        same_server.ok_or_else(|| Failure::new(ExitCode::Internal, "no SQL login for this host"))
    }

    /// The earliest LSN the backup can start at: where the slot holds WAL from. A standby starts at its last
    /// restartpoint, which lies before that, and must be one the archive has WAL from.
    async fn start_at_least(&self, connection: &mut Connection, copied: &Login, lease: &Lease) -> Result<Lsn, Failure> {
        let held = self.slot_restart().await?;
        if self.settings.from.is_none() {
            return Ok(held);
        }
        let (dialer, sql) = (self.world.dialer.as_ref(), self.sql_login(copied)?);
        // Where it is not known, anything: that the archive has what the backup needs is looked up in the end.
        let redo = match standby::redo(dialer, &sql).await {
            Ok(Some(redo)) => redo,
            Ok(None) => return Ok(Lsn::ZERO),
            Err(failure) => {
                tracing::info!(cluster = self.cluster.name, %failure, "the standby cannot be asked where a backup of it begins");
                return Ok(Lsn::ZERO);
            }
        };
        let timeline = connection.identify_system().await?.timeline;
        let begin = wal::Needed { timeline, start: redo, stop: Lsn(redo.0 + 1), segment_size: self.segment_size };
        for part in lease.parts() {
            if !wal::holds(&part.place, begin).await? {
                tracing::info!(
                    cluster = self.cluster.name, standby = %copied.address, restartpoint = %redo, repository = part.place.name,
                    "the standby's last restartpoint lies before what the archive holds: the primary makes a checkpoint"
                );
                standby::follow_checkpoint(dialer, &self.primary, &sql).await?;
                break;
            }
        }
        Ok(redo.min(held))
    }

    async fn slot_restart(&self) -> Result<Lsn, Failure> {
        let (dialer, slot) = (self.world.dialer.as_ref(), &self.cluster.slot);
        let logins = self.world.logins.logins(Purpose::Sql)?;
        if let Some(login) = logins.iter().find(|other| other.address == self.primary.address)
            && let Ok(row) = sql::read_slot(dialer, login, slot, 0).await
        {
            return row.and_then(|row| row.restart_lsn).ok_or_else(|| {
                let message = format!("slot {slot} holds no WAL on {}", self.primary.address);
                Failure::new(ExitCode::Unavailable, message)
                    .disposition(Disposition::Retry)
                    .hint("a backup needs the WAL written meanwhile: `seawall run` creates the slot and archives it")
            });
        }
        let mut connection = Connection::open(dialer, &self.primary).await?;
        let read = connection.read_slot(slot).await;
        connection.close().await;
        match read? {
            SlotReading::Reserved { restart_lsn, .. } => Ok(restart_lsn),
            _ => Ok(Lsn::ZERO),
        }
    }
}

fn destination(part: &lease::Part) -> Destination {
    Destination { name: part.place.name.clone(), archive: part.place.archive.clone(), lease: part.number() }
}

fn lease_names(lease: &Lease) -> Vec<String> {
    lease.parts().iter().map(|part| part.place.name.clone()).collect()
}

async fn until(at: Option<tokio::time::Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// What was begun there and never ended is taken note of: the lease says that nobody is at it any more.
pub async fn settle(world: &World, place: &Place) -> Result<(), Failure> {
    let shelf = place.archive.shelf().await?;
    for id in abandoned(&shelf) {
        tracing::warn!(repository = place.name, backup = %id, "an unfinished backup is recorded as failed: whoever took it is gone");
        let cause = "interrupted: whoever took it ended without a word".to_string();
        append_failure(world, place, id, None, cause).await?;
    }
    Ok(())
}

fn abandoned(shelf: &Shelf) -> BTreeSet<BackupId> {
    shelf.unfinished().map(|record| record.id).collect()
}

async fn record_failure(world: &World, place: &Place, id: BackupId, phase: BackupPhase, cause: String) {
    if let Err(failure) = append_failure(world, place, id, Some(phase), cause).await {
        tracing::warn!(repository = place.name, backup = %id, %failure, "that the backup failed could not be written to the ledger");
    }
}

async fn append_failure(
    world: &World,
    place: &Place,
    id: BackupId,
    phase: Option<BackupPhase>,
    cause: String,
) -> Result<(), Failure> {
    let mut fact = LedgerFact::new(FactKind::BackupFailed, world.clock.now(), cause);
    fact.details.insert(BACKUP_ID.into(), id.to_string().into());
    if let Some(phase) = phase {
        fact.details.insert(BACKUP_PHASE.into(), phase.word().into());
    }
    Ok(place.archive.append_ledger(&fact, world.random_u32()).await?)
}

/// Gaps nothing has healed, as the ledger knows them.
fn open_gaps(ledger: &[LedgerFact]) -> Vec<&LedgerFact> {
    let bounds = |fact: &LedgerFact| (fact.timeline, fact.from_lsn, fact.to_lsn);
    let healed: Vec<_> = ledger.iter().filter(|fact| fact.kind == FactKind::GapHealed).map(bounds).collect();
    ledger.iter().filter(|fact| fact.kind == FactKind::Gap && !healed.contains(&bounds(fact))).collect()
}

/// How far a backup is, as it is shown.
pub fn running(progress: &BackupProgress) -> BackupRunning {
    BackupRunning {
        id: progress.id.map(|id| id.to_string()),
        phase: progress.phase.word().to_string(),
        raw_bytes: progress.raw_bytes,
        raw_bytes_expected: progress.raw_bytes_expected,
        stored_bytes: progress.stored_bytes,
        bytes_per_second: progress.bytes_per_second,
    }
}

/// What [`backup::take`] asks for.
#[derive(Debug)]
struct Around<'a> {
    parts: &'a [lease::Part],
    clock: &'a crate::receiver::Clock,
    segment_size: SegmentSize,
    status: Option<watch::Receiver<Status>>,
}

impl Around<'_> {
    fn part(&self, repository: &str) -> Result<&lease::Part, Failure> {
        let part = self.parts.iter().find(|part| part.place.name == repository);
        part.ok_or_else(|| Failure::new(ExitCode::Internal, format!("no lease is held in repository {repository}")))
    }
}

#[async_trait]
impl Surroundings for Around<'_> {
    fn now(&self) -> Timestamp {
        self.clock.now()
    }

    async fn wal_is_stored(&self, repository: &str, needed: NeededWal) -> Result<WalStored, Failure> {
        let place = &self.part(repository)?.place;
        let NeededWal { timeline, start, stop, .. } = needed;
        let wanted = wal::Needed { timeline, start, stop, segment_size: self.segment_size };
        let last_commit = wal::wait(place, wanted, self.status.clone()).await?;
        if timeline > TimelineId(1) && place.archive.history(timeline).await?.is_none() {
            let message = format!("{place} has no history file of timeline {timeline}");
            return Err(Failure::new(ExitCode::Unavailable, message).disposition(Disposition::Retry));
        }
        Ok(WalStored { last_commit })
    }

    async fn lease_holds(&self, repository: &str) -> Result<(), Failure> {
        self.part(repository)?.confirm().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_is_open_until_a_fact_of_the_same_bounds_heals_it() {
        let at: Timestamp = "2026-11-22T11:00:00Z".parse().unwrap();
        let fact = |kind, from, to| LedgerFact::new(kind, at, "x").about(TimelineId(1), Lsn(from), Lsn(to));
        let ledger = [fact(FactKind::Gap, 8, 16), fact(FactKind::Gap, 32, 64), fact(FactKind::GapHealed, 8, 16)];
        let open: Vec<_> = open_gaps(&ledger).iter().map(|fact| fact.from_lsn).collect();
        assert_eq!(open, [Some(Lsn(32))]);
    }
}

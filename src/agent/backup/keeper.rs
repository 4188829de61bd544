//! Owns: when the agent takes a backup by itself: where a repository has none, behind a gap, and when its time has come;
//! trying again; what others may know of it.
//! Does not own: taking one (`mod.rs`), when its time comes (`planned.rs`).
//!
//! It runs beside the stream and looks at what that publishes; the stream knows nothing of it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::{Notify, Semaphore, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::lease::{Lease, Patience, Tenant};
use super::planned::Planned;
use super::{BackupSettings, Job, Place, guard, open_gaps, planned, running, settle};
use crate::agent::cluster::{State, Status};
use crate::agent::mend::MendFacts;
use crate::agent::session::{RepositoryState, Watched};
use crate::agent::world::{ClusterOptions, World};
use crate::backup::{BackupError, BackupPhase, BackupProgress};
use crate::catalog::Damages;
use crate::catalog::backup::BackupFile;
use crate::catalog::ledger::LedgerFact;
use crate::catalog::shelf::{self, Outcome, Shelf};
use crate::error::{ExitCode, Failure};
use crate::monitor::backup::BackupEntry;
use crate::monitor::health::BackupFacts;
use crate::postgres::Purpose;
use crate::repository::layout::BackupId;
use crate::schedule::Next;
use crate::telemetry::meters;
use crate::wal::Lsn;

/// Between two looks at which backups there are: one request each, where nothing has changed.
const LOOK_INTERVAL: Duration = Duration::from_secs(60);
/// Everything is read again after this: somebody may have declared one dead.
const READ_INTERVAL: Duration = Duration::from_secs(900);
/// A backup that fails is tried again after this, then after twice as long each time. Shorter at the end: the server
/// would be read over and over for nothing.
const RETRY_MIN: Duration = Duration::from_secs(15);
const RETRY_MAX: Duration = Duration::from_secs(3600);
/// While somebody else takes one.
const BUSY_INTERVAL: Duration = Duration::from_secs(30);
/// Between two looks at the clock, which may jump.
const TICK: Duration = Duration::from_secs(1);
/// Between two lines about a backup under way.
const SAY_INTERVAL: Duration = Duration::from_secs(60);

/// Sees to it that one cluster has backups.
#[derive(Debug)]
pub struct Keeper {
    world: World,
    options: ClusterOptions,
    settings: BackupSettings,
    status: watch::Receiver<Status>,
    /// Shared by all clusters of the process.
    turns: Arc<Semaphore>,
    stop: CancellationToken,
    facts: Arc<watch::Sender<BackupFacts>>,
    planned: Planned,
    /// What was read last.
    known: Option<Known>,
    /// Consecutive failures.
    failures: u32,
    /// That the server's configuration cannot be read is said once.
    said_config: Option<String>,
    /// Who makes damaged backups whole, and what it says when it cannot.
    mended: Option<watch::Receiver<MendFacts>>,
    lost: Arc<Notify>,
}

#[derive(Debug)]
struct Known {
    shelves: Vec<(Place, Shelf)>,
    damages: Vec<Damages>,
    ids: Vec<BTreeSet<BackupId>>,
    read: Instant,
}

/// Why a backup is to be taken, and where it goes.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Need {
    why: String,
    /// Names of repositories; what has a good one is not given another.
    lacking: Vec<String>,
}

/// What is waited for before the next look.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Pause {
    at_most: Duration,
    /// The next run by the clock; `None`: it is not waited for.
    at: Option<Timestamp>,
    /// The next run by WAL.
    at_lsn: Option<Lsn>,
}

impl Pause {
    /// For nothing but time.
    fn of(at_most: Duration) -> Pause {
        Pause { at_most, at: None, at_lsn: None }
    }
}

impl Keeper {
    pub fn new(
        world: World,
        options: ClusterOptions,
        settings: BackupSettings,
        status: watch::Receiver<Status>,
        turns: Arc<Semaphore>,
        stop: CancellationToken,
    ) -> (Keeper, watch::Receiver<BackupFacts>) {
        let (facts, watching) = watch::channel(BackupFacts::default());
        let facts = Arc::new(facts);
        let planned = Planned::new(settings.schedule.clone(), &options.name, world.clock.now());
        let keeper = Keeper {
            planned,
            world,
            options,
            settings,
            status,
            turns,
            stop,
            facts,
            known: None,
            failures: 0,
            said_config: None,
            mended: None,
            lost: Arc::default(),
        };
        (keeper, watching)
    }

    /// What another repository has is copied from there, not taken anew; `lost` is notified when there may be need.
    pub fn beside(self, mended: watch::Receiver<MendFacts>, lost: Arc<Notify>) -> Keeper {
        Keeper { mended: Some(mended), lost, ..self }
    }

    /// Until told to stop. A backup under way is given up then.
    pub async fn run(mut self) {
        let (stop, lost) = (self.stop.clone(), self.lost.clone());
        loop {
            let watched = tokio::select! {
                biased;
                () = stop.cancelled() => return,
                watched = self.streaming() => match watched {
                    Some(watched) => watched,
                    None => return,
                },
            };
            let pause = self.round(&watched).await;
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = tokio::time::sleep(pause.at_most) => {}
                () = self.clock_reaches(pause.at) => {}
                () = wal_reaches(&watched, pause.at_lsn) => {}
                () = lost.notified() => {}
                // A new stream may begin behind a gap.
                () = self.another_stream(&watched) => {}
            }
        }
    }

    /// Waits for a stream that continues what the repositories hold. `None`: the agent has ended.
    async fn streaming(&mut self) -> Option<Watched> {
        loop {
            let ready = |status: &Status| status.state == State::Streaming && status.watched.is_some();
            let watched = self.status.wait_for(ready).await.ok()?.watched.clone()?;
            let mut progress = watched.progress.subscribe();
            let mut status = self.status.clone();
            tokio::select! {
                // What is stored of its first segment was matched, and something is durable.
                matched = progress.wait_for(|progress| progress.prefix_matched() && progress.durable() > Default::default()) => {
                    if matched.is_ok() {
                        return Some(watched);
                    }
                }
                changed = status.changed() => if changed.is_err() { return None },
            }
        }
    }

    async fn another_stream(&self, watched: &Watched) {
        let mut status = self.status.clone();
        let is_other = |status: &Status| {
            status.watched.as_ref().is_some_and(|other| !Arc::ptr_eq(&other.progress, &watched.progress))
        };
        if status.wait_for(is_other).await.is_err() {
            std::future::pending().await
        }
    }

    /// Until the clock shows that time, or jumps back.
    async fn clock_reaches(&self, at: Option<Timestamp>) {
        let Some(at) = at else { return std::future::pending().await };
        let mut before = self.world.clock.now();
        loop {
            tokio::time::sleep(TICK).await;
            let now = self.world.clock.now();
            if now >= at || now < before {
                return;
            }
            before = now;
        }
    }

    /// One look, and what follows from it; what to wait for before the next.
    async fn round(&mut self, watched: &Watched) -> Pause {
        // One that is out gets its own when it is back: a new stream begins then.
        let is_there = |place: &Place| {
            let repository = watched.repositories.get(place.index);
            repository.is_some_and(|repository| !matches!(repository.state(), RepositoryState::Absent(_)))
        };
        let mut places: Vec<Place> = watched.opened.iter().map(Place::from).filter(is_there).collect();
        let looking = guard::within(self.settings.hung_after, "before it began", self.look(&places));
        let ledgers = match looking.await {
            Ok(ledgers) => ledgers,
            Err(failure) => {
                tracing::debug!(cluster = self.options.name, %failure, "cannot look for backups");
                return Pause::of(BUSY_INTERVAL);
            }
        };
        let nexts = self.plan(watched);
        let Some(need) = self.judge(&ledgers, &nexts).filter(|_| self.settings.automatic) else {
            self.settle(&places).await;
            return Pause {
                at_most: LOOK_INTERVAL,
                at: nexts.iter().filter_map(|(_, next)| next.at).min(),
                at_lsn: nexts.iter().filter_map(|(_, next)| next.at_lsn).min(),
            };
        };
        places.retain(|place| need.lacking.contains(&place.name));
        match self.attempt(watched, places, &need.why).await {
            Ok(()) => {
                self.failures = 0;
                self.facts.send_modify(|facts| facts.failure = None);
                // What it has changed is looked at, at once.
                self.known = None;
                Pause::of(Duration::ZERO)
            }
            Err(_) if self.stop.is_cancelled() => Pause::of(Duration::ZERO),
            Err(failure) if failure.exit_code == ExitCode::TryAgain => {
                tracing::info!(cluster = self.options.name, "no backup now: {failure}");
                Pause::of(BUSY_INTERVAL)
            }
            Err(failure) => Pause::of(self.handle_failure(&failure)),
        }
    }

    /// When the schedule has the next one taken, in each repository that has one to go on from.
    fn plan(&mut self, watched: &Watched) -> Vec<(String, Next)> {
        let Some(known) = self.known.as_ref().filter(|_| self.settings.automatic) else { return Vec::new() };
        let complete = known.shelves.iter().flat_map(|(_, shelf)| shelf.complete().map(|file| file.id));
        self.planned.note(complete);
        let (now, lsn) = (self.world.clock.now(), watched.progress.borrow().durable());
        let next = |(place, shelf): &(Place, Shelf)| {
            shelf.complete().next()?;
            let lineage = place.archive.lineage.directory_name();
            Some((place.name.clone(), self.planned.next(&lineage, shelf, now, Some(lsn))?))
        };
        known.shelves.iter().filter_map(next).collect()
    }

    fn handle_failure(&mut self, failure: &Failure) -> Duration {
        let pause = RETRY_MIN.saturating_mul(1 << self.failures.min(10)).min(RETRY_MAX);
        self.failures += 1;
        self.known = None;
        let (cluster, hint) = (&self.options.name, failure.hint.as_deref());
        tracing::error!(cluster, hint, again_in = ?pause, "the backup failed: {failure}");
        meters::backup_failed(cluster);
        self.facts.send_modify(|facts| {
            facts.failures += 1;
            facts.failure = Some(failure.to_string());
        });
        pause
    }

    /// Finds out which backups there are; what each ledger says.
    async fn look(&mut self, places: &[Place]) -> Result<Vec<Vec<LedgerFact>>, Failure> {
        let (mut ids, mut ledgers) = (Vec::new(), Vec::new());
        for place in places {
            ids.push(place.archive.backup_ids().await?.into_iter().collect::<BTreeSet<BackupId>>());
            ledgers.push(place.archive.ledger().await?);
        }
        let damages: Vec<Damages> = ledgers.iter().map(|ledger| Damages::of(ledger)).collect();
        let is_known = |known: &Known| {
            let names = |(place, _): &(Place, Shelf)| place.name.clone();
            (&known.ids, &known.damages) == (&ids, &damages)
                && known.shelves.iter().map(names).eq(places.iter().map(|place| place.name.clone()))
                && known.shelves.iter().all(|(_, shelf)| shelf.unfinished().next().is_none())
                && known.read.elapsed() < READ_INTERVAL
        };
        if !self.known.as_ref().is_some_and(is_known) {
            let mut shelves = Vec::new();
            for place in places {
                shelves.push((place.clone(), place.archive.shelf().await?));
            }
            self.known = Some(Known { shelves, damages, ids, read: Instant::now() });
        }
        Ok(ledgers)
    }

    /// What is missing, published too.
    fn judge(&self, ledgers: &[Vec<LedgerFact>], nexts: &[(String, Next)]) -> Option<Need> {
        let shelves = self.known.as_ref().map_or(&[][..], |known| &known.shelves[..]);
        let named: Vec<(&str, &Shelf)> = shelves.iter().map(|(place, shelf)| (place.name.as_str(), shelf)).collect();
        let all = shelf::union(&named, self.world.clock.now());
        let newest = all.iter().rfind(|shelved| shelved.outcome == Outcome::Complete);
        let lineage = shelves.first().map(|(place, _)| place.archive.lineage.directory_name()).unwrap_or_default();
        let (mut missing, mut behind) = (Vec::new(), Vec::new());
        for ((place, shelf), ledger) in shelves.iter().zip(ledgers) {
            match shelf.complete().last() {
                None if self.is_being_mended(place, shelves) => {}
                None => missing.push(place.name.clone()),
                Some(file) if follows_gap(file, ledger) => behind.push(place.name.clone()),
                Some(_) => {}
            }
        }
        let last = newest.map(|shelved| BackupEntry::new(&self.options.name, &lineage, shelved));
        let is_behind_gap = !behind.is_empty();
        self.facts.send_modify(|facts| {
            (facts.is_known, facts.last, facts.is_behind_gap) = (true, last, is_behind_gap);
            facts.missing.clone_from(&missing);
            facts.next = planned::earliest(nexts.iter().map(|(_, next)| next));
        });
        let due: Vec<&(String, Next)> = nexts.iter().filter(|(_, next)| next.is_due).collect();
        let why = match (missing.is_empty(), is_behind_gap, due.first()) {
            (false, _, _) => "a repository has none".to_string(),
            (true, true, _) => "a gap follows the newest one".to_string(),
            (true, false, Some((_, next))) => format!("schedule: {}", next.because),
            (true, false, None) => return None,
        };
        missing.extend(behind);
        // Whose time has come too gets the same one.
        missing.extend(due.into_iter().map(|(name, _)| name.clone()));
        Some(Need { why, lacking: missing })
    }

    /// Whether a damaged backup of this repository may still be copied from another one.
    fn is_being_mended(&self, place: &Place, shelves: &[(Place, Shelf)]) -> bool {
        let Some(mended) = &self.mended else { return false };
        let lost = &mended.borrow().lost;
        let is_elsewhere = |id: BackupId| {
            let others = shelves.iter().filter(|(other, _)| other.index != place.index);
            others.flat_map(|(_, shelf)| shelf.complete()).any(|file| file.id == id)
        };
        let own = shelves.iter().filter(|(own, _)| own.index == place.index).flat_map(|(_, shelf)| &shelf.records);
        let mut damaged = own.filter(|record| record.damaged.is_some() && !record.is_dead);
        damaged.any(|record| !lost.contains(&(place.index, record.id)) && is_elsewhere(record.id))
    }

    /// Takes note of what somebody left unfinished, where no backup follows that would.
    async fn settle(&mut self, places: &[Place]) {
        let now = self.world.clock.now();
        let shelves = self.known.iter().flat_map(|known| &known.shelves);
        let named: Vec<(&str, &Shelf)> = shelves.map(|(place, shelf)| (place.name.as_str(), shelf)).collect();
        let is_running = shelf::union(&named, now).iter().any(|shelved| shelved.outcome == Outcome::Running);
        if is_running || named.iter().all(|(_, shelf)| shelf.unfinished().next().is_none()) {
            return;
        }
        let settled = async {
            let (lease, _) = Lease::acquire(places, &self.tenant(), Patience::None).await?;
            for part in lease.parts() {
                settle(&self.world, &part.place).await?;
            }
            lease.release().await;
            Ok::<_, Failure>(())
        };
        let stop = self.stop.clone();
        tokio::select! {
            () = stop.cancelled() => return,
            settled = settled => if let Err(failure) = settled {
                tracing::debug!(cluster = self.options.name, %failure, "unfinished backups are looked at later");
            }
        }
        self.known = None;
    }

    fn tenant(&self) -> Tenant {
        Tenant {
            holder: format!("{:032x}", self.world.random.lock().expect("no holder panics").u128(..)),
            host: self.options.host.clone(),
            purpose: "tidying up after a backup".to_string(),
            clock: self.world.clock.clone(),
        }
    }

    async fn attempt(&mut self, watched: &Watched, places: Vec<Place>, why: &str) -> Result<(), Failure> {
        let cluster = &self.options.name;
        let _turn = tokio::select! {
            biased;
            () = self.stop.cancelled() => return Err(BackupError::Stopped.into()),
            turn = self.turns.acquire() => turn.expect("the semaphore is never closed"),
        };
        tracing::info!(cluster, why, "taking a base backup");
        let known = self.known.as_ref();
        let decided_by = known.map(|known| {
            let names = known.shelves.iter().map(|(place, _)| place.name.clone());
            names.zip(known.ids.iter().cloned()).collect()
        });
        let logins = self.world.logins.logins(Purpose::Physical)?;
        let primary = logins.into_iter().find(|login| login.address == watched.address);
        let primary = primary.ok_or_else(|| Failure::new(ExitCode::Internal, "no login for this host"))?;
        let file = places.first().map(|place| place.archive.clone());
        let segment_size = match file {
            Some(archive) => archive.lineage_file().await?.segment_size,
            None => return Err(BackupError::Stopped.into()),
        };
        let job = Job {
            world: &self.world,
            cluster: &self.options,
            settings: &self.settings,
            places,
            segment_size,
            primary,
            purpose: "a backup by the agent".to_string(),
            patience: Patience::None,
            status: Some(self.status.clone()),
            decided_by,
        };
        let (progress, watching) = watch::channel(BackupProgress::default());
        let showing = show(cluster.clone(), self.facts.clone(), watching);
        let done = tokio::select! {
            done = job.run(&progress, &self.stop) => done,
            () = showing => unreachable!("it shows as long as the backup is taken"),
        };
        self.facts.send_modify(|facts| facts.running = None);
        let has_begun = progress.borrow().id.is_some();
        let done = done.map_err(|failure| match failure.exit_code {
            // Only somebody else's lease is no failure.
            ExitCode::TryAgain if has_begun => Failure { exit_code: ExitCode::Unavailable, ..failure },
            _ => failure,
        })?;
        let (_, file) = &done.files[0];
        tracing::info!(
            cluster, backup = %done.id, start = %file.start_lsn, stop = %file.stop_lsn, raw_bytes = file.raw_bytes,
            stored_bytes = file.stored_bytes, repositories = done.files.len(), "the backup is complete"
        );
        meters::backup_completed(cluster);
        if done.missing_config != self.said_config {
            if let Some(missing) = &done.missing_config {
                let hint = "`seawall init` prints the grants; a backup is complete without it";
                tracing::info!(
                    cluster,
                    hint,
                    "configuration outside the data directory is not in the backup: {missing}"
                );
            }
            self.said_config = done.missing_config;
        }
        match done.failed.into_iter().next() {
            None => Ok(()),
            Some((repository, why)) => Err(why.context(format_args!("repository {repository}"))),
        }
    }
}

/// Until the archive has come so far, or the stream ends.
async fn wal_reaches(watched: &Watched, at: Option<Lsn>) {
    let Some(at) = at else { return std::future::pending().await };
    let mut progress = watched.progress.subscribe();
    if progress.wait_for(|progress| progress.durable() >= at).await.is_err() {
        std::future::pending().await
    }
}

/// Whether something is missing between a backup and what the archive holds after it.
fn follows_gap(file: &BackupFile, ledger: &[LedgerFact]) -> bool {
    let is_behind = |fact: &&LedgerFact| {
        fact.timeline.is_some_and(|timeline| timeline >= file.timeline) && fact.to_lsn > Some(file.start_lsn)
    };
    open_gaps(ledger).iter().any(is_behind)
}

/// Publishes how far it is, for as long as it is taken, and says so now and then.
async fn show(cluster: String, facts: Arc<watch::Sender<BackupFacts>>, mut progress: watch::Receiver<BackupProgress>) {
    let mut said = (BackupPhase::default(), Instant::now());
    loop {
        let now = progress.borrow_and_update().clone();
        let running = running(&now);
        if said.0 != now.phase || said.1.elapsed() >= SAY_INTERVAL {
            said = (now.phase, Instant::now());
            tracing::info!(cluster, "{}", running.to_text());
        }
        facts.send_modify(|facts| facts.running = Some(running));
        if progress.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::Crc32;
    use crate::catalog::backup::ManifestEntry;
    use crate::catalog::ledger::FactKind;
    use crate::repository::layout::BackupType;
    use crate::wal::{SegmentSize, SystemId, TimelineId};

    fn backup(timeline: u32, start: u64) -> BackupFile {
        let started = jiff::Timestamp::UNIX_EPOCH;
        BackupFile {
            schema: 1,
            id: BackupId::new(started, BackupType::Full),
            backup_type: BackupType::Full,
            parent: None,
            fallback: None,
            label: None,
            started,
            finished: started,
            system_id: SystemId(7),
            server_version: "18.1".into(),
            segment_size: SegmentSize::new(1 << 20).unwrap(),
            timeline: TimelineId(timeline),
            start_lsn: Lsn(start),
            stop_lsn: Lsn(start + 8),
            stop_time: None,
            from_standby: false,
            data_checksums: None,
            raw_bytes: 0,
            stored_bytes: 0,
            manifest: ManifestEntry { bytes: 0, crc32: Crc32(0), files: 0, checksums: "CRC32C".into() },
            tablespaces: Vec::new(),
            volumes: Vec::new(),
            config: Vec::new(),
            version: "0".into(),
        }
    }

    #[test]
    fn only_an_open_gap_behind_its_start_makes_a_backup_needed() {
        let fact = |kind, timeline, from, to| {
            LedgerFact::new(kind, jiff::Timestamp::UNIX_EPOCH, "x").about(TimelineId(timeline), Lsn(from), Lsn(to))
        };
        let gap = fact(FactKind::Gap, 1, 100, 200);
        assert!(follows_gap(&backup(1, 50), std::slice::from_ref(&gap)));
        assert!(!follows_gap(&backup(1, 200), std::slice::from_ref(&gap)), "it begins where the gap ends");
        assert!(follows_gap(&backup(1, 199), std::slice::from_ref(&gap)), "WAL it needs is missing");
        assert!(!follows_gap(&backup(2, 50), std::slice::from_ref(&gap)), "on a line it has left");
        assert!(follows_gap(&backup(1, 50), &[fact(FactKind::Gap, 2, 100, 200)]), "on a later one");
        assert!(!follows_gap(&backup(1, 50), &[gap, fact(FactKind::GapHealed, 1, 100, 200)]));
    }
}

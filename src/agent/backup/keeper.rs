//! Owns: when the agent takes a backup by itself: where a repository has none, and behind a gap; trying again; what
//! others may know of it.
//! Does not own: taking one (`mod.rs`), schedules.
//!
//! It runs beside the stream and looks at what that publishes; the stream knows nothing of it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::lease::{Lease, Patience, Tenant};
use super::{BackupSettings, Job, Place, open_gaps, running, settle};
use crate::agent::cluster::{State, Status};
use crate::agent::session::Watched;
use crate::agent::world::{ClusterOptions, World};
use crate::backup::{BackupError, BackupPhase, BackupProgress};
use crate::catalog::backup::BackupFile;
use crate::catalog::ledger::LedgerFact;
use crate::catalog::shelf::{self, Outcome, Shelf};
use crate::error::{ExitCode, Failure};
use crate::monitor::backup::BackupEntry;
use crate::monitor::health::BackupFacts;
use crate::postgres::Purpose;
use crate::repository::layout::BackupId;
use crate::telemetry::meters;

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
/// Between two lines about a backup under way.
const SAY_INTERVAL: Duration = Duration::from_secs(60);

/// Sees to it that one cluster has backups.
#[derive(Debug)]
pub struct Keeper {
    world: World,
    options: ClusterOptions,
    settings: BackupSettings,
    status: watch::Receiver<Status>,
    stop: CancellationToken,
    facts: Arc<watch::Sender<BackupFacts>>,
    /// What was read last.
    known: Option<Known>,
    /// Consecutive failures.
    failures: u32,
    /// That the server's configuration cannot be read is said once.
    said_config: Option<String>,
}

#[derive(Debug)]
struct Known {
    shelves: Vec<(Place, Shelf)>,
    ids: Vec<BTreeSet<BackupId>>,
    read: Instant,
}

/// Why a backup is to be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Need {
    None,
    First,
    Gap,
}

impl Keeper {
    pub fn new(
        world: World,
        options: ClusterOptions,
        settings: BackupSettings,
        status: watch::Receiver<Status>,
        stop: CancellationToken,
    ) -> (Keeper, watch::Receiver<BackupFacts>) {
        let (facts, watching) = watch::channel(BackupFacts::default());
        let facts = Arc::new(facts);
        let keeper =
            Keeper { world, options, settings, status, stop, facts, known: None, failures: 0, said_config: None };
        (keeper, watching)
    }

    /// Until told to stop. A backup under way is given up then.
    pub async fn run(mut self) {
        let stop = self.stop.clone();
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
                () = tokio::time::sleep(pause) => {}
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

    /// One look, and what follows from it; how long to wait before the next.
    async fn round(&mut self, watched: &Watched) -> Duration {
        let places: Vec<Place> = watched.opened.iter().map(Place::from).collect();
        let ledger = match self.look(&places).await {
            Ok(ledger) => ledger,
            Err(failure) => {
                tracing::debug!(cluster = self.options.name, %failure, "cannot look for backups");
                return BUSY_INTERVAL;
            }
        };
        let need = self.judge(&ledger);
        if !self.settings.automatic || need == Need::None {
            self.settle(&places).await;
            return LOOK_INTERVAL;
        }
        match self.attempt(watched, places, need).await {
            Ok(()) => {
                self.failures = 0;
                self.facts.send_modify(|facts| facts.failure = None);
                // What it has changed is looked at, at once.
                self.known = None;
                Duration::ZERO
            }
            Err(_) if self.stop.is_cancelled() => Duration::ZERO,
            Err(failure) if failure.exit_code == ExitCode::TryAgain => {
                tracing::info!(cluster = self.options.name, "no backup now: {failure}");
                BUSY_INTERVAL
            }
            Err(failure) => self.handle_failure(&failure),
        }
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

    /// Finds out which backups there are; what the ledgers say.
    async fn look(&mut self, places: &[Place]) -> Result<Vec<LedgerFact>, Failure> {
        let mut ids = Vec::new();
        let mut ledger = Vec::new();
        for place in places {
            ids.push(place.archive.backup_ids().await?.into_iter().collect::<BTreeSet<BackupId>>());
            ledger.extend(place.archive.ledger().await?);
        }
        let is_known = |known: &Known| {
            let names = |(place, _): &(Place, Shelf)| place.name.clone();
            known.ids == ids
                && known.shelves.iter().map(names).eq(places.iter().map(|place| place.name.clone()))
                && known.shelves.iter().all(|(_, shelf)| shelf.unfinished().next().is_none())
                && known.read.elapsed() < READ_INTERVAL
        };
        if !self.known.as_ref().is_some_and(is_known) {
            let mut shelves = Vec::new();
            for place in places {
                shelves.push((place.clone(), place.archive.shelf().await?));
            }
            self.known = Some(Known { shelves, ids, read: Instant::now() });
        }
        Ok(ledger)
    }

    /// What is missing, published too.
    fn judge(&self, ledger: &[LedgerFact]) -> Need {
        let shelves = self.known.as_ref().map_or(&[][..], |known| &known.shelves[..]);
        let named: Vec<(&str, &Shelf)> = shelves.iter().map(|(place, shelf)| (place.name.as_str(), shelf)).collect();
        let all = shelf::union(&named, self.world.clock.now());
        let newest = all.iter().rfind(|shelved| shelved.outcome == Outcome::Complete);
        let lineage = shelves.first().map(|(place, _)| place.archive.lineage.directory_name()).unwrap_or_default();
        let missing: Vec<String> = shelves
            .iter()
            .filter(|(_, shelf)| shelf.complete().next().is_none())
            .map(|(place, _)| place.name.clone())
            .collect();
        let is_behind_gap =
            newest.and_then(|shelved| shelved.file.as_ref()).is_some_and(|file| follows_gap(file, ledger));
        let need = match (missing.is_empty(), is_behind_gap) {
            (false, _) => Need::First,
            (true, true) => Need::Gap,
            (true, false) => Need::None,
        };
        let last = newest.map(|shelved| BackupEntry::new(&self.options.name, &lineage, shelved));
        self.facts.send_modify(|facts| {
            (facts.is_known, facts.last, facts.missing, facts.is_behind_gap) = (true, last, missing, is_behind_gap);
        });
        need
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

    async fn attempt(&mut self, watched: &Watched, places: Vec<Place>, need: Need) -> Result<(), Failure> {
        let cluster = &self.options.name;
        let why = match need {
            Need::Gap => "a gap follows the newest one",
            _ => "a repository has none",
        };
        tracing::info!(cluster, why, "taking a base backup");
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
        };
        let (progress, watching) = watch::channel(BackupProgress::default());
        let showing = show(cluster.clone(), self.facts.clone(), watching);
        let done = tokio::select! {
            done = job.run(&progress, &self.stop) => done,
            () = showing => unreachable!("it shows as long as the backup is taken"),
        };
        self.facts.send_modify(|facts| facts.running = None);
        let done = done?;
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

//! Owns: when the agent verifies by itself, one repository at a time; what others may know of it.
//! Does not own: what is examined (`verify`), when a line is due (`schedule`).
//!
//! What ran is read from the ledgers: a new process goes on where the last one was. It reads no faster than it may, takes
//! no lease, and the stream knows nothing of it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::tz::TimeZone;
use tokio::sync::{Notify, Semaphore, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::backup::Place;
use super::cluster::Status;
use super::session::Watched;
use super::world::{ClusterOptions, World};
use crate::catalog::ledger::LedgerFact;
use crate::error::Failure;
use crate::schedule::{self, Line, Moment, Next, Ran, Timing};
use crate::verify::record::{self, LastVerify, Mode, VerifyRecord};
use crate::verify::{Now, Outcome, Pace, Progress, VerifyOptions, verify};

/// Between two looks at what is due: a ledger is listed and read for each.
const LOOK_INTERVAL: Duration = Duration::from_secs(300);
/// After a run that could not be finished.
const RETRY_INTERVAL: Duration = Duration::from_secs(900);

/// When, and how fast.
#[derive(Clone, Debug, Default)]
pub struct VerifySettings {
    /// What reads more first: it is enough for what reads less.
    pub lines: Vec<(Mode, Line)>,
    /// Of cron lines.
    pub zone: Option<TimeZone>,
    /// How much of it `sample` reads, 0 to 1.
    pub share: f64,
    pub max_rate: Option<u64>,
}

/// Verifies one cluster's repositories.
#[derive(Debug)]
pub struct Verifier {
    world: World,
    options: ClusterOptions,
    settings: VerifySettings,
    status: watch::Receiver<Status>,
    /// Shared by all clusters of the process.
    turns: Arc<Semaphore>,
    stop: CancellationToken,
    last: watch::Sender<Option<LastVerify>>,
    /// When it began, by the clock as it was then, and by one that does not jump.
    began: jiff::Timestamp,
    started: Instant,
    /// Told when something is damaged.
    found: Arc<Notify>,
    /// Runs this process saw end.
    seen: BTreeMap<(String, Mode), Instant>,
}

impl Verifier {
    pub fn new(
        world: World,
        options: ClusterOptions,
        settings: VerifySettings,
        status: watch::Receiver<Status>,
        turns: Arc<Semaphore>,
        stop: CancellationToken,
    ) -> (Verifier, watch::Receiver<Option<LastVerify>>) {
        let (last, watching) = watch::channel(None);
        let (started, seen) = (Instant::now(), BTreeMap::new());
        let (found, began) = (Arc::default(), world.clock.now());
        (Verifier { world, options, settings, status, turns, stop, last, began, started, found, seen }, watching)
    }

    /// Somebody can do something about what is found.
    pub fn telling(self, found: Arc<Notify>) -> Verifier {
        Verifier { found, ..self }
    }

    /// Until told to stop. A run under way is given up then: the next one goes on behind it.
    pub async fn run(mut self) {
        let stop = self.stop.clone();
        let work = async {
            loop {
                let pause = match self.streaming().await {
                    Some(watched) => self.round(&watched).await,
                    None => return,
                };
                tokio::time::sleep(pause).await;
            }
        };
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            () = work => {}
        }
    }

    async fn streaming(&mut self) -> Option<Watched> {
        self.status.wait_for(|status| status.watched.is_some()).await.ok()?.watched.clone()
    }

    /// One look at what is due, and one run at most; how long to wait before the next.
    async fn round(&mut self, watched: &Watched) -> Duration {
        let places: Vec<Place> = watched.opened.iter().map(Place::from).collect();
        let (mut ledgers, mut pause) = (Vec::new(), LOOK_INTERVAL);
        for place in &places {
            match self.ledger(place).await {
                Ok((since, ledger)) => ledgers.push((place, since, ledger)),
                Err(failure) => {
                    tracing::debug!(cluster = self.options.name, repository = place.name, %failure, "not verified now");
                }
            }
        }
        self.publish(ledgers.iter().map(|(_, _, ledger)| ledger.as_slice()));
        for (place, since, ledger) in &ledgers {
            let nexts = self.nexts(place, *since, ledger);
            let Some((mode, next)) = schedule::first_due(&nexts) else {
                let waits = nexts.iter().filter_map(|(_, next)| next.wait(self.world.clock.now()));
                pause = waits.fold(pause, Duration::min).max(Duration::from_secs(1));
                continue;
            };
            return self.attempt(place, *mode, &next.because, places.len() == 1).await;
        }
        pause
    }

    async fn ledger(&self, place: &Place) -> Result<(jiff::Timestamp, Vec<LedgerFact>), Failure> {
        let since = place.archive.lineage_file().await?.created;
        Ok((since, place.archive.ledger().await?))
    }

    fn publish<'l>(&self, ledgers: impl Iterator<Item = &'l [LedgerFact]>) {
        let last = record::last_over(ledgers);
        self.last.send_if_modified(|known| std::mem::replace(known, last) != last);
    }

    fn nexts(&self, place: &Place, since: jiff::Timestamp, ledger: &[LedgerFact]) -> Vec<(Mode, Next)> {
        let zone = self.settings.zone.clone().unwrap_or(TimeZone::UTC);
        // What announces nothing need not be told apart.
        let timing = Timing { zone, jitter: Duration::ZERO, seed: 0 };
        let moment =
            Moment { now: self.world.clock.now(), since, began: self.began, up: self.started.elapsed(), lsn: None };
        let lines = self.settings.lines.iter();
        lines
            .map(|(mode, line)| (*mode, schedule::next(line, &timing, &self.runs(place, *mode, ledger), &moment)))
            .collect()
    }

    /// Runs that count for a mode: its own, and those that read more.
    fn runs(&self, place: &Place, mode: Mode, ledger: &[LedgerFact]) -> Vec<Ran> {
        let enough = Mode::ALL.into_iter().filter(|other| *other >= mode);
        let ran = |mode: Mode| {
            let VerifyRecord { started, finished, .. } = record::last_of(ledger, mode)?;
            let seen = self.seen.get(&(place.name.clone(), mode)).map(Instant::elapsed);
            Some(Ran { started, finished: finished?, start_lsn: None, seen })
        };
        enough.filter_map(ran).collect()
    }

    async fn attempt(&mut self, place: &Place, mode: Mode, because: &str, is_alone: bool) -> Duration {
        let (cluster, repository) = (&self.options.name, &place.name);
        let _turn = self.turns.acquire().await.expect("the semaphore is never closed");
        tracing::info!(cluster, repository, because, "verify --{mode} begins");
        let clock = self.world.clock.clone();
        let options = VerifyOptions {
            mode,
            share: self.settings.share,
            seed: self.world.random.lock().expect("no holder panics").u64(..),
            pace: Pace::new(self.settings.max_rate),
            is_alone,
            now: Now(Arc::new(move || clock.now())),
            ..VerifyOptions::default()
        };
        let (progress, _) = watch::channel(Progress::default());
        let Outcome { report, failure } = verify(&place.archive, &options, &progress).await;
        for finding in &report.findings {
            let (object, fault) = (&finding.fault.object, &finding.fault.what);
            tracing::error!(cluster, repository, object, hint = finding.remedy, "damaged: {fault}; {}", finding.means);
        }
        if !report.findings.is_empty() {
            self.found.notify_one();
        }
        match failure {
            Some(failure) => {
                tracing::warn!(cluster, repository, hint = failure.hint, "verify --{mode} was not finished: {failure}");
                RETRY_INTERVAL
            }
            None => {
                let (objects, bytes, faults) = (report.counts.objects, report.counts.bytes, report.findings.len());
                tracing::info!(cluster, repository, objects, bytes, faults, "verify --{mode} is done");
                self.seen.insert((place.name.clone(), mode), Instant::now());
                // Where nothing may be written, nothing says that it ran: not again at once.
                if report.unrecorded.is_some() { LOOK_INTERVAL } else { Duration::ZERO }
            }
        }
    }
}

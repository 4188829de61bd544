//! Owns: one expiry under the lease of a lineage ([`in_place`]), and expiring after each good backup ([`Expirer`]).
//! Does not own: what goes (`retention`), the lease (`backup/lease.rs`).
//!
//! It runs beside the stream and beside the keeper of backups: neither waits for it, and nothing it fails at is theirs.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::FutureExt;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::backup::Place;
use super::backup::lease::{Lease, Part, Patience, Tenant};
use super::cluster::Status;
use super::session::{RepositoryState, Watched};
use super::world::{ClusterOptions, World};
use crate::catalog::store::{self, Archive};
use crate::error::{ExitCode, Failure};
use crate::monitor::health::BackupFacts;
use crate::monitor::retention::RetentionFacts;
use crate::receiver::Clock;
use crate::repository::layout::Lineage;
use crate::retention::Policy;
use crate::retention::apply::{self, ExpireProgress, Expiry, Job, Tenure};
use crate::telemetry::meters;

/// A repository that cannot be expired in now is tried again after this, then after twice as long each time.
const RETRY_MIN: Duration = Duration::from_secs(60);
const RETRY_MAX: Duration = Duration::from_secs(6 * 3600);

/// What an expiry needs of whoever begins it.
#[derive(Clone, Debug)]
pub struct Errand {
    pub policy: Policy,
    pub host: Option<String>,
    /// For others who want the lease.
    pub purpose: String,
    pub clock: Clock,
    pub stop: CancellationToken,
}

#[async_trait]
impl Tenure for Part {
    async fn confirm(&self) -> Result<(), Failure> {
        Part::confirm(self).await
    }

    fn is_held(&self) -> bool {
        self.is_valid()
    }
}

/// Takes the lease of a lineage in one repository, expires there, and gives the lease back.
pub async fn in_place(
    errand: &Errand,
    place: &Place,
    newest: Option<Archive>,
    random: &(dyn Fn() -> u64 + Send + Sync),
    progress: watch::Sender<ExpireProgress>,
) -> Result<Expiry, Failure> {
    let tenant = Tenant {
        holder: format!("{:016x}{:016x}", random(), random()),
        host: errand.host.clone(),
        purpose: errand.purpose.clone(),
        clock: errand.clock.clone(),
    };
    let places = [place.clone()];
    let stop = errand.stop.clone();
    let (lease, _) = tokio::select! {
        biased;
        () = stop.cancelled() => return Err(stopped()),
        acquired = Lease::acquire(&places, &tenant, Patience::None) => acquired?,
    };
    let Some(part) = lease.parts().first() else { return Err(stopped()) };
    let clock = errand.clock.clone();
    let job = Job {
        archive: &place.archive,
        policy: &errand.policy,
        newest,
        tenure: part,
        now: Arc::new(move || clock.now()),
        random,
        stop: errand.stop.clone(),
        progress,
    };
    let expired = apply::expire(&job).boxed().await;
    drop(job);
    lease.release().await;
    expired
}

fn stopped() -> Failure {
    Failure::new(ExitCode::TryAgain, "stopped before anything was deleted")
}

/// Expires in every repository of one cluster after each good backup.
#[derive(Debug)]
pub struct Expirer {
    world: World,
    options: ClusterOptions,
    policy: Policy,
    status: watch::Receiver<Status>,
    backups: watch::Receiver<BackupFacts>,
    stop: CancellationToken,
    facts: watch::Sender<RetentionFacts>,
}

impl Expirer {
    pub fn new(
        world: World,
        options: ClusterOptions,
        policy: Policy,
        status: watch::Receiver<Status>,
        backups: watch::Receiver<BackupFacts>,
        stop: CancellationToken,
    ) -> (Expirer, watch::Receiver<RetentionFacts>) {
        let facts = RetentionFacts { is_automatic: true, ..RetentionFacts::default() };
        let (facts, watching) = watch::channel(facts);
        (Expirer { world, options, policy, status, backups, stop, facts }, watching)
    }

    /// Until told to stop. What is under way stops between two batches then.
    pub async fn run(mut self) {
        let mut done: Option<String> = None;
        let mut failures = 0;
        loop {
            // Also once in the beginning: an earlier agent may have ended between a backup and this.
            let stop = self.stop.clone();
            let newest = tokio::select! {
                biased;
                () = stop.cancelled() => return,
                newest = self.another_backup(done.as_deref()) => match newest {
                    Some(newest) => newest,
                    None => return,
                },
            };
            match self.expire_everywhere().await {
                Ok(()) => {
                    (done, failures) = (Some(newest), 0);
                    continue;
                }
                Err(_) if stop.is_cancelled() => return,
                // Whoever holds the lease is done some time; nobody is told.
                Err(failure) if failure.exit_code == ExitCode::TryAgain => {
                    tracing::info!(cluster = self.options.name, "nothing expires now: {failure}");
                }
                Err(failure) => self.handle_failure(&failure),
            }
            let pause = RETRY_MIN.saturating_mul(1 << failures.min(10)).min(RETRY_MAX);
            failures += 1;
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
                // What stood in the way then may not any more.
                another = self.another_backup(Some(&newest)) => if another.is_none() { return },
            }
        }
    }

    /// The id of the newest complete backup, once it is another than `known`; `None`: nobody takes any more.
    async fn another_backup(&mut self, known: Option<&str>) -> Option<String> {
        let is_other = |facts: &BackupFacts| {
            let last = facts.last.as_ref().map(|last| last.id.as_str());
            facts.is_known && facts.running.is_none() && last.is_some() && last != known
        };
        let facts = self.backups.wait_for(is_other).await.ok()?;
        facts.last_id()
    }

    fn handle_failure(&self, failure: &Failure) {
        let cluster = &self.options.name;
        tracing::error!(cluster, hint = failure.hint.as_deref(), "retention could not be applied: {failure}");
        meters::expiry_failed(cluster);
        self.facts.send_modify(|facts| {
            facts.failures += 1;
            facts.failure = Some(failure.to_string());
        });
    }

    /// The first failure, once every repository has had its turn.
    async fn expire_everywhere(&self) -> Result<(), Failure> {
        let Some(watched) = self.status.borrow().watched.clone() else {
            return Err(Failure::new(ExitCode::TryAgain, "there is no stream"));
        };
        let (mut freed, mut locked, mut first) = (0, 0, None);
        for place in places(&watched) {
            match self.expire_in(place.clone()).await {
                Ok(expiries) => {
                    freed += expiries.iter().map(|expiry| expiry.freed.bytes).sum::<u64>();
                    locked += expiries.iter().map(|expiry| expiry.locked.len() as u64).sum::<u64>();
                }
                Err(failure) => {
                    let failure = failure.context(format_args!("repository {}", place.name));
                    // Something to be done about says more than a lease that is taken.
                    let is_worse = |known: &Failure| known.exit_code == ExitCode::TryAgain;
                    if first.as_ref().is_none_or(is_worse) {
                        first = Some(failure);
                    }
                }
            }
        }
        if let Some(failure) = first {
            return Err(failure);
        }
        meters::expired(&self.options.name, freed);
        let now = self.world.clock.now();
        self.facts.send_modify(|facts| {
            (facts.last_run, facts.freed_bytes, facts.locked_objects) = (Some(now), freed, locked);
            facts.failure = None;
        });
        Ok(())
    }

    /// Every lineage of the cluster there, the newest first: its backups may be what lets an earlier one go.
    async fn expire_in(&self, place: Place) -> Result<Vec<Expiry>, Failure> {
        let backend = place.archive.backend.as_ref();
        let lineages = store::lineages(backend, &self.options.name).await?;
        let newest: Option<Lineage> = lineages.last().map(|(lineage, _)| lineage.clone());
        let mut expiries = Vec::new();
        for (lineage, _) in lineages.into_iter().rev() {
            let is_newest = newest.as_ref() == Some(&lineage);
            let of = |lineage: Lineage| Archive { lineage, ..place.archive.clone() };
            let place = Place { archive: of(lineage), ..place.clone() };
            let above = newest.clone().filter(|_| !is_newest).map(of);
            let random = || self.world.random.lock().expect("no holder panics").u64(..);
            let progress = watch::Sender::new(ExpireProgress::default());
            let expiry = in_place(&self.errand(), &place, above, &random, progress).boxed().await?;
            self.say(&place, &expiry);
            expiries.push(expiry);
        }
        Ok(expiries)
    }

    fn errand(&self) -> Errand {
        Errand {
            policy: self.policy.clone(),
            host: self.options.host.clone(),
            purpose: "expiring by the agent".to_string(),
            clock: self.world.clock.clone(),
            stop: self.stop.clone(),
        }
    }

    fn say(&self, place: &Place, expiry: &Expiry) {
        let (cluster, repository, freed) = (&self.options.name, &place.name, expiry.freed);
        if freed.objects > 0 {
            tracing::info!(
                cluster,
                repository,
                backups = freed.backups,
                segments = freed.segments,
                objects = freed.objects,
                bytes = freed.bytes,
                "expired by retention ({})",
                self.policy
            );
        }
        if let Some(first) = expiry.locked.first() {
            let objects = expiry.locked.len();
            tracing::warn!(
                cluster,
                repository,
                objects,
                "the store keeps what is expired: {}: {}",
                first.key,
                first.cause
            );
        }
    }
}

fn places(watched: &Watched) -> Vec<Place> {
    let is_there = |place: &Place| {
        let repository = watched.repositories.get(place.index);
        repository.is_some_and(|repository| !matches!(repository.state(), RepositoryState::Absent(_)))
    };
    watched.opened.iter().map(Place::from).filter(is_there).collect()
}

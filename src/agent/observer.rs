//! Owns: what the agent knows of its clusters, gathered for whoever asks: positions once a second from what the streams
//! publish, the slot once a minute, gaps when there may be new ones.
//! Does not own: what follows from it (`monitor/health.rs`), how it is shown (`monitor`). Nothing here is needed to archive.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::future;
use jiff::Timestamp;
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::cluster::{State as AgentState, Status};
use super::mend::MendFacts;
use super::session::{self, Watched, WatchedRepository};
use super::slot;
use super::world::{ClusterOptions, Repository, World};
use crate::catalog::store::Archive;
use crate::catalog::{Catalog, Holdings};
use crate::continuity::{self, GapState};
use crate::error::{ExitCode, Failure};
use crate::monitor::health::{
    BackupFacts, ClusterFacts, LossClock, Positions, RepositoryFacts, RepositoryState, SlotFacts, SpoolFacts,
};
use crate::monitor::http::Source;
use crate::monitor::retention::RetentionFacts;
use crate::monitor::status::State;
use crate::postgres::sql::{self, SlotRow};
use crate::receiver::{Acknowledge, Activity};
use crate::verify::record::LastVerify;
use crate::wal::{Commit, Lsn};

/// Finer would cost more and show nothing else: an upload begins after seconds.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// Between two questions about a slot, each a short SQL session; varied, so that many clusters do not ask at once.
const SLOT_INTERVAL: Duration = Duration::from_secs(60);
/// A slot that was not seen for this long is not known.
const SLOT_KEPT: Duration = Duration::from_secs(180);
/// The catalog is read again after this, where something was stored meanwhile.
const GAPS_INTERVAL: Duration = Duration::from_secs(3600);
/// What may be lost is worth a word beyond this and two tails.
const RPO_ALLOWANCE: Duration = Duration::from_secs(50);

/// One cluster, as seen from outside its task.
#[derive(Debug)]
struct Observed {
    world: World,
    options: ClusterOptions,
    status: watch::Receiver<Status>,
    backups: watch::Receiver<BackupFacts>,
    retention: Option<watch::Receiver<RetentionFacts>>,
    mended: watch::Receiver<MendFacts>,
    verified: watch::Receiver<Option<LastVerify>>,
    kept: Mutex<Kept>,
}

/// What one look leaves to the next.
#[derive(Debug, Default)]
struct Kept {
    positions: Option<Positions>,
    /// Of the server's end, and of what was received.
    rpo: LossClock,
    lag: LossClock,
    /// Where the durable position stood when it was last seen to move, or to be nowhere behind.
    durable: (Duration, Lsn),
    /// Not durable yet, when it was last looked at.
    commit: Option<Commit>,
    last_commit: Option<Timestamp>,
    slot: Option<(Instant, Option<SlotRow>)>,
    gaps: Option<Gaps>,
}

#[derive(Debug)]
struct Gaps {
    open: usize,
    /// Damaged objects then: what is damaged may be a gap, and what is mended none.
    damaged: usize,
    looked: Instant,
    durable: Lsn,
    /// The newest backup then: a new one may have healed some.
    backup: Option<String>,
}

/// All clusters of the process.
#[derive(Clone, Debug)]
pub struct Observer {
    clusters: Arc<Vec<Observed>>,
    started: Instant,
    stop: CancellationToken,
}

/// What an observer is told of a cluster that is served.
#[derive(Debug)]
pub struct Subject {
    pub world: World,
    pub options: ClusterOptions,
    pub status: watch::Receiver<Status>,
    pub backups: watch::Receiver<BackupFacts>,
    /// Where the agent expires by itself.
    pub retention: Option<watch::Receiver<RetentionFacts>>,
    pub mended: watch::Receiver<MendFacts>,
    pub verified: watch::Receiver<Option<LastVerify>>,
}

impl Observer {
    pub fn new(subjects: Vec<Subject>, stop: CancellationToken) -> Observer {
        let observed = |subject: Subject| Observed {
            world: subject.world,
            options: subject.options,
            status: subject.status,
            backups: subject.backups,
            retention: subject.retention,
            mended: subject.mended,
            verified: subject.verified,
            kept: Mutex::default(),
        };
        Observer { clusters: Arc::new(subjects.into_iter().map(observed).collect()), started: Instant::now(), stop }
    }

    /// Looks for as long as the process lives.
    pub async fn run(self) {
        // One catalog at a time is read into memory.
        let turn = Arc::new(Semaphore::new(1));
        for index in 0..self.clusters.len() {
            tokio::spawn(self.clone().ask(index, turn.clone()));
        }
        loop {
            let now = self.started.elapsed();
            self.clusters.iter().for_each(|cluster| cluster.look(now));
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }

    /// Asks server and repository about one cluster, now and then.
    async fn ask(self, index: usize, turn: Arc<Semaphore>) {
        let cluster = &self.clusters[index];
        let mut wait = SLOT_INTERVAL.mul_f64(cluster.chance() / 6.0);
        let mut status = cluster.status.clone();
        loop {
            // Without a stream there is nobody to ask.
            if status.wait_for(|status| status.watched.is_some()).await.is_err() {
                return;
            }
            tokio::time::sleep(wait).await;
            wait = SLOT_INTERVAL.mul_f64(0.9 + cluster.chance() / 5.0);
            let Some(watched) = status.borrow().watched.clone() else { continue };
            cluster.look_at_slot(&watched).await;
            if cluster.may_have_new_gaps(&watched) {
                let _turn = turn.acquire().await.expect("the semaphore is never closed");
                cluster.look_for_gaps(&watched).await;
            }
        }
    }
}

impl Source for Observer {
    fn facts(&self) -> Vec<ClusterFacts> {
        let now = self.started.elapsed();
        self.clusters
            .iter()
            .map(|cluster| {
                cluster.look(now);
                cluster.facts(now)
            })
            .collect()
    }

    fn is_ready(&self) -> bool {
        !self.stop.is_cancelled()
    }
}

impl Observed {
    fn chance(&self) -> f64 {
        self.world.random.lock().expect("no holder panics").f64()
    }

    /// Takes what the stream has published into account.
    fn look(&self, now: Duration) {
        let Some(watched) = self.status.borrow().watched.clone() else { return };
        let (mut positions, commit) = {
            let progress = watched.progress.borrow();
            let positions = Positions {
                server: progress.server_end(),
                received: progress.received(),
                proven: progress.proven(),
                durable: progress.durable(),
                acknowledged: progress.acknowledged(),
            };
            (positions, progress.last_commit())
        };
        let kept = &mut *self.kept.lock().expect("no holder panics");
        if let (Lsn::ZERO, Some(before)) = (positions.durable, kept.positions) {
            // A stream that has just begun says nothing yet; what was durable still is.
            positions.durable = before.durable;
        }
        kept.rpo.handle_look(now, positions.server, positions.durable);
        kept.lag.handle_look(now, positions.received, positions.durable);
        if positions.durable != kept.durable.1 || positions.durable >= positions.proven {
            kept.durable = (now, positions.durable);
        }
        // A commit record that begins before a durable record end is durable itself.
        if let Some(waiting) = kept.commit.filter(|waiting| waiting.lsn < positions.durable) {
            (kept.last_commit, kept.commit) = (Some(waiting.time), None);
        }
        match commit {
            Some(commit) if commit.lsn < positions.durable => kept.last_commit = Some(commit.time),
            Some(commit) => kept.commit = kept.commit.or(Some(commit)),
            None => {}
        }
        kept.positions = Some(positions);
    }

    fn facts(&self, now: Duration) -> ClusterFacts {
        let status = self.status.borrow().clone();
        let watched = status.watched.as_ref();
        let kept = self.kept.lock().expect("no holder panics");
        let positions = kept.positions;
        let is_behind = positions.is_some_and(|positions| positions.durable < positions.proven);
        let tail_age = positions.map(|_| if is_behind { now.saturating_sub(kept.durable.0) } else { Duration::ZERO });
        ClusterFacts {
            name: self.options.name.clone(),
            state: state_of(&status),
            system_id: status.system_id,
            timeline: status.timeline,
            acknowledge: watched.map_or_else(Default::default, |watched| watched.progress.borrow().acknowledge()),
            positions,
            rpo: kept.rpo.since(now),
            lag: kept.lag.since(now),
            tail_age,
            rpo_max: RPO_ALLOWANCE + 2 * self.options.tail_interval,
            last_commit: kept.last_commit,
            repositories: self.repository_facts(watched),
            required: self.options.required,
            held_bytes: watched.map_or(0, |watched| watched.memory.held_bytes()),
            held_limit_bytes: self.options.memory_bytes,
            spool: spool_facts(watched),
            slot: self.slot_facts(kept.slot.as_ref()),
            gaps: kept.gaps.as_ref().map(|gaps| gaps.open),
            backups: self.backups.borrow().clone(),
            retention: self.retention.as_ref().map(|facts| facts.borrow().clone()).unwrap_or_default(),
            damaged: self.damaged(),
            last_verify: *self.verified.borrow(),
            failure: status.failure.as_ref().map(Failure::to_string),
            contract_broken: broken_contract(watched),
            accidental_standby: self.options.synchronous.is_none()
                && watched.is_some_and(|watched| *watched.synchronous.borrow()),
        }
    }

    fn repository_facts(&self, watched: Option<&Watched>) -> Vec<RepositoryFacts> {
        let unknown = |repository: &Repository| RepositoryFacts {
            name: repository.name.clone(),
            frontier: None,
            state: RepositoryState::Unknown,
            reason: None,
        };
        match watched {
            Some(watched) => watched.repositories.iter().map(facts_of).collect(),
            None => self.world.repositories.iter().map(unknown).collect(),
        }
    }

    fn damaged(&self) -> Option<(usize, String)> {
        let mended = self.mended.borrow();
        mended.first.clone().map(|first| (mended.open, first))
    }

    fn slot_facts(&self, seen: Option<&(Instant, Option<SlotRow>)>) -> SlotFacts {
        let name = self.options.slot.to_string();
        let Some((_, row)) = seen.filter(|(at, _)| at.elapsed() < SLOT_KEPT) else {
            return SlotFacts { name, ..SlotFacts::default() };
        };
        match row {
            None => SlotFacts { name, lost: Some("there is none on the server".into()), ..SlotFacts::default() },
            Some(row) => SlotFacts {
                name,
                wal_status: row.wal_status.clone(),
                safe_wal_bytes: row.safe_wal_bytes,
                is_active: Some(row.active),
                lost: row
                    .is_lost()
                    .then(|| row.invalidation_reason.clone().unwrap_or_else(|| "its WAL was removed".to_string())),
            },
        }
    }

    /// In a session that ends with its answer: an open one would block a smart stop.
    async fn look_at_slot(&self, watched: &Watched) {
        let (world, slot) = (&self.world, &self.options.slot);
        let read = async {
            let login = slot::sql_login(world, &watched.address)?;
            sql::read_slot(world.dialer.as_ref(), &login, slot, watched.server_major).await
        };
        match read.await {
            Ok(row) => self.kept.lock().expect("no holder panics").slot = Some((Instant::now(), row)),
            Err(failure) => tracing::debug!(cluster = self.options.name, %failure, "the slot cannot be looked at"),
        }
    }

    fn may_have_new_gaps(&self, watched: &Watched) -> bool {
        let kept = self.kept.lock().expect("no holder panics");
        let durable = watched.progress.borrow().durable();
        let (backup, damaged) = (self.backups.borrow().last_id(), self.mended.borrow().open);
        kept.gaps.as_ref().is_none_or(|gaps| {
            let is_old = gaps.looked.elapsed() >= GAPS_INTERVAL && gaps.durable != durable;
            is_old || gaps.backup != backup || gaps.damaged != damaged
        })
    }

    /// Of all repositories together: what one lacks and another holds is no gap.
    async fn look_for_gaps(&self, watched: &Watched) {
        let (durable, backup) = (watched.progress.borrow().durable(), self.backups.borrow().last_id());
        let damaged = self.mended.borrow().open;
        let catalogs = future::join_all(watched.archives.iter().map(Archive::load_catalog)).await;
        let readable: Vec<&Catalog> = catalogs.iter().filter_map(|catalog| catalog.as_ref().ok()).collect();
        match Holdings::union(&readable) {
            Ok(holdings) if !readable.is_empty() => {
                let gaps = continuity::gaps_of(&holdings);
                let open = gaps.iter().filter(|gap| gap.state == GapState::Open).count();
                self.kept.lock().expect("no holder panics").gaps =
                    Some(Gaps { open, damaged, looked: Instant::now(), durable, backup });
            }
            Ok(_) => tracing::debug!(cluster = self.options.name, "gaps cannot be looked for: nothing can be read"),
            Err(error) => tracing::debug!(cluster = self.options.name, %error, "gaps cannot be looked for"),
        }
    }
}

fn facts_of(repository: &WatchedRepository) -> RepositoryFacts {
    let failure = repository.health.failure();
    let (state, reason) = match repository.state() {
        session::RepositoryState::Absent(why) => (RepositoryState::Unavailable, Some(why.to_string())),
        _ if failure.is_some() => (RepositoryState::Failing, failure.as_ref().map(ToString::to_string)),
        session::RepositoryState::Writing => (RepositoryState::Ok, None),
        session::RepositoryState::Behind => {
            (RepositoryState::Behind, Some("it misses WAL that nobody who is there can give it yet".to_string()))
        }
        session::RepositoryState::Repairing { from, to } => {
            (RepositoryState::Repairing, Some(format!("what it misses is being copied to it: at {from} of {to}")))
        }
    };
    let frontier = repository.frontier().map(|stored| stored.record_end);
    RepositoryFacts { name: repository.name.clone(), frontier, state, reason }
}

fn state_of(status: &Status) -> State {
    let is_paused = |watched: &Watched| *watched.activity.borrow() == Activity::Paused;
    match status.state {
        AgentState::Streaming if status.watched.as_ref().is_some_and(is_paused) => State::Paused,
        AgentState::Streaming => State::Streaming,
        AgentState::Waiting => State::Waiting,
        AgentState::Stopped => State::Stopped,
        // The slot is busy: another agent streams from it.
        AgentState::Connecting if is_busy(status) => State::Waiting,
        AgentState::Connecting => State::Connecting,
    }
}

fn is_busy(status: &Status) -> bool {
    status.failure.as_ref().is_some_and(|failure| failure.exit_code == ExitCode::TryAgain)
}

/// `None` where there is no spool.
fn spool_facts(watched: Option<&Watched>) -> Option<SpoolFacts> {
    let spool = watched?.spool.borrow();
    (spool.limit_bytes > 0).then(|| SpoolFacts { used_bytes: spool.used_bytes, limit_bytes: spool.limit_bytes })
}

/// Acknowledged from the spool, that is what the contract says: without it, the repositories decide.
fn broken_contract(watched: Option<&Watched>) -> Option<String> {
    let watched = watched?;
    match watched.progress.borrow().acknowledge() {
        Acknowledge::Repository => None,
        Acknowledge::Spool => watched.spool.borrow().failure.clone(),
    }
}

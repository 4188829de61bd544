//! The agent: one task per cluster, the order in which they stop, and what the process ends with.
//!
//! Owns: spawning clusters, watching them for `--until`, the shutdown order.
//! Does not own: signals and configuration (`cli/run.rs`), one cluster's life (`cluster.rs`).

mod absence;
pub mod backup;
pub mod cluster;
mod drain;
pub mod expire;
mod known;
pub mod mend;
pub mod observer;
pub mod opening;
mod sentinel;
pub mod session;
pub mod slot;
mod standby;
pub mod startup;
mod synchronous;
pub mod verify;
pub mod world;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, Semaphore, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::error::{ExitCode, Failure};
use crate::retention::Policy;
use crate::wal::Lsn;
use backup::BackupSettings;
use backup::keeper::Keeper;
use cluster::{ClusterAgent, Status};
use expire::Expirer;
use mend::Mender;
use observer::{Observer, Subject};
use verify::{Verifier, VerifySettings};
use world::{ClusterOptions, World};

/// Backups at a time, whatever many clusters there are: each has a memory of its own, and cores to compress on.
const BACKUPS_MAX: usize = 2;
/// For a backup under way to be given up, once nothing streams any more.
const FAREWELL: Duration = Duration::from_secs(5);

/// A cluster to serve, in its world.
#[derive(Debug)]
pub struct Assignment {
    pub world: World,
    pub options: ClusterOptions,
    pub backups: BackupSettings,
    /// What expires after each good backup; `None`: nothing does by itself.
    pub retention: Option<Policy>,
    pub verify: VerifySettings,
}

/// Every cluster of the process. One failing never touches another.
#[derive(Debug)]
pub struct Fleet {
    clusters: Vec<(String, ClusterAgent, watch::Receiver<Status>)>,
    keepers: Vec<Keeper>,
    expirers: Vec<Expirer>,
    menders: Vec<Mender>,
    verifiers: Vec<Verifier>,
    observer: Observer,
    stop: CancellationToken,
}

impl Fleet {
    /// Where there is one cluster only, a refusal before it ever streamed ends the process: somebody is starting it
    /// and wants to know. Later, or beside other clusters, it is tried again until the operator has acted.
    pub fn new(assignments: Vec<Assignment>, stop: CancellationToken) -> Fleet {
        let is_alone = assignments.len() == 1;
        let mut clusters = Vec::new();
        let mut subjects = Vec::new();
        let (mut keepers, mut menders) = (Vec::new(), Vec::new());
        let (mut expirers, mut verifiers) = (Vec::new(), Vec::new());
        let turns = Arc::new(Semaphore::new(BACKUPS_MAX));
        let verify_turns = Arc::new(Semaphore::new(1));
        for Assignment { world, options, backups, retention, verify } in assignments {
            let name = options.name.clone();
            let (mut agent, status) = ClusterAgent::new(world.clone(), options.clone(), stop.clone());
            if is_alone {
                agent = agent.ending_when_refused();
            }
            let (keeper, kept) =
                Keeper::new(world.clone(), options.clone(), backups, status.clone(), turns.clone(), stop.clone());
            // Whoever finds damage has it mended, and what cannot be has a backup taken, at once.
            let (found, lost) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
            let signals = (found.clone(), lost.clone());
            let (mender, mended) = Mender::new(world.clone(), options.clone(), status.clone(), signals, stop.clone());
            keepers.push(keeper.beside(mended.clone(), lost));
            menders.push(mender);
            let retention = retention.map(|policy| {
                let (world, options, status) = (world.clone(), options.clone(), status.clone());
                let (expirer, facts) = Expirer::new(world, options, policy, status, kept.clone(), stop.clone());
                expirers.push(expirer);
                facts
            });
            let (verifier, verified) = Verifier::new(
                world.clone(),
                options.clone(),
                verify,
                status.clone(),
                verify_turns.clone(),
                stop.clone(),
            );
            verifiers.push(verifier.telling(found));
            subjects.push(Subject {
                world,
                options,
                status: status.clone(),
                backups: kept,
                retention,
                mended,
                verified,
            });
            clusters.push((name, agent, status));
        }
        let observer = Observer::new(subjects, stop.clone());
        Fleet { clusters, keepers, expirers, menders, verifiers, observer, stop }
    }

    /// For whoever wants to know how the clusters are; it looks only when it is run.
    pub fn observer(&self) -> &Observer {
        &self.observer
    }

    /// Serves until told to stop, or until no cluster is left; with `until`, until everything up to there is durable.
    /// The worst failure is what the process ends with, and is said by whoever gets it.
    pub async fn run(self, until: Option<Lsn>) -> Result<(), Failure> {
        let is_alone = self.clusters.len() == 1;
        let mut running = JoinSet::new();
        let mut keeping: JoinSet<()> = self.keepers.into_iter().map(Keeper::run).collect();
        self.expirers.into_iter().for_each(|expirer| drop(keeping.spawn(expirer.run())));
        // What one was at is found again by the next.
        let _mending: JoinSet<()> = self.menders.into_iter().map(Mender::run).collect();
        // They end with the process: nothing they do has to be finished.
        let _verifying: JoinSet<()> = self.verifiers.into_iter().map(Verifier::run).collect();
        for (name, agent, status) in self.clusters {
            if let Some(until) = until {
                tokio::spawn(stop_at(until, status, self.stop.clone()));
            }
            running.spawn(async move { (name, agent.run().await) });
        }
        let mut worst: Option<Failure> = None;
        while let Some(ended) = running.join_next().await {
            let failure = match ended {
                Ok((_, Ok(()))) => continue,
                // Where there is one only, its name says nothing.
                Ok((_, Err(failure))) if is_alone => failure,
                Ok((cluster, Err(failure))) => {
                    tracing::error!(
                        cluster,
                        hint = failure.hint.as_deref(),
                        others = running.len(),
                        "stopped: {failure}; the others go on"
                    );
                    failure.context(format_args!("cluster {cluster}"))
                }
                Err(error) => Failure::new(ExitCode::Internal, format!("a cluster's task failed: {error}")),
            };
            worst = Some(worse(worst, failure));
        }
        // A backup that is given up says so in the ledger; the next one would say it for it.
        let farewell = async { while keeping.join_next().await.is_some() {} };
        if self.stop.is_cancelled() && tokio::time::timeout(FAREWELL, farewell).await.is_err() {
            tracing::warn!("a backup under way did not end in time: it will be found unfinished");
        }
        worst.map_or(Ok(()), Err)
    }
}

/// Data that conflicts is what an operator has to hear of first; otherwise the first failure is the cause.
fn worse(one: Option<Failure>, other: Failure) -> Failure {
    match one {
        Some(one) if one.exit_code == ExitCode::Data || other.exit_code != ExitCode::Data => one,
        _ => other,
    }
}

/// Stops the agent once everything up to `until` is durable.
async fn stop_at(until: Lsn, mut status: watch::Receiver<Status>, stop: CancellationToken) {
    loop {
        let watched = status.borrow_and_update().watched.clone();
        let Some(watched) = watched else {
            if status.changed().await.is_err() {
                return;
            }
            continue;
        };
        let mut progress = watched.progress.subscribe();
        loop {
            if progress.borrow_and_update().acknowledged() >= until {
                return stop.cancel();
            }
            tokio::select! {
                changed = progress.changed() => if changed.is_err() { break },
                changed = status.changed() => match changed {
                    Ok(()) => break,
                    Err(_) => return,
                },
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conflicting_data_is_what_several_failures_come_to() {
        let fail = |code| Failure::new(code, "x");
        let end = |codes: &[ExitCode]| {
            codes.iter().fold(None, |worst, code| Some(worse(worst, fail(*code)))).map(|failure| failure.exit_code)
        };
        assert_eq!(end(&[ExitCode::Config, ExitCode::Permission]), Some(ExitCode::Config));
        assert_eq!(end(&[ExitCode::Config, ExitCode::Data, ExitCode::Config]), Some(ExitCode::Data));
    }
}

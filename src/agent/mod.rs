//! The agent: one task per cluster, the order in which they stop, and what the process ends with.
//!
//! Owns: spawning clusters, watching them for `--until`, the shutdown order.
//! Does not own: signals and configuration (`cli/run.rs`), one cluster's life (`cluster.rs`).

mod absence;
pub mod cluster;
mod drain;
pub mod opening;
mod sentinel;
pub mod session;
pub mod slot;
mod standby;
pub mod startup;
mod synchronous;
pub mod world;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::error::{ExitCode, Failure};
use crate::wal::Lsn;
use cluster::{ClusterAgent, Status};
use world::{ClusterOptions, World};

/// A cluster to serve, in its world.
#[derive(Debug)]
pub struct Assignment {
    pub world: World,
    pub options: ClusterOptions,
}

/// Serves every cluster until `stop`, or until none is left. One failing never touches another; the last
/// failure is what the process ends with, and said by whoever gets it.
///
/// Where there is one cluster only, a refusal before it ever streamed ends the process too: somebody is starting it
/// and wants to know. Later, or beside other clusters, it is tried again until the operator has acted.
pub async fn run(clusters: Vec<Assignment>, stop: CancellationToken, until: Option<Lsn>) -> Result<(), Failure> {
    let is_alone = clusters.len() == 1;
    let mut running = JoinSet::new();
    for Assignment { world, options } in clusters {
        let name = options.name.clone();
        let (mut agent, status) = ClusterAgent::new(world, options, stop.clone());
        if let Some(until) = until {
            tokio::spawn(stop_at(until, status, stop.clone()));
        }
        if is_alone {
            agent = agent.ending_when_refused();
        }
        running.spawn(async move { (name, agent.run().await) });
    }
    let mut result = Ok(());
    while let Some(ended) = running.join_next().await {
        match ended {
            Ok((_, Ok(()))) => {}
            Ok((cluster, Err(failure))) => {
                if !running.is_empty() {
                    tracing::error!(cluster, hint = failure.hint.as_deref(), "stopped: {failure}");
                }
                // Where there is one only, its name says nothing.
                result = Err(if is_alone { failure } else { failure.context(format_args!("cluster {cluster}")) });
            }
            Err(error) => result = Err(Failure::new(ExitCode::Internal, format!("a cluster's task failed: {error}"))),
        }
    }
    result
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

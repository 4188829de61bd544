//! Owns: `run`: signals, the service manager, the runtime the agent lives in.
//! Does not own: what an agent does (`agent`).

use std::sync::Arc;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::args::{Global, RunArgs};
use super::{Verdict, setup};
use crate::agent::{Assignment, Fleet};
use crate::archiver::Workers;
use crate::config::{ClusterConfig, HttpConfig};
use crate::error::{ExitCode, Failure};
use crate::monitor::exposition::Exposition;
use crate::monitor::http::Server;
use crate::wal::Lsn;

pub fn run(global: &Global, args: &RunArgs) -> Result<Verdict, Failure> {
    let (clusters, http) = setup::clusters_and_http(global)?;
    let spool = setup::spool_share(global)?;
    let workers = Workers::threads(setup::cores());
    let mut stores = setup::Stores::default();
    let assignments: Vec<Assignment> = clusters
        .iter()
        .map(|cluster| {
            let mut world = setup::world_among(&mut stores, cluster, workers.clone());
            if http.is_some() {
                world = setup::metered(world, cluster);
            }
            let options = setup::options(cluster, spool.clone())?;
            let retention = cluster.retention.policy.clone().filter(|_| cluster.retention.automatic);
            let (backups, verify) = (setup::backups(cluster), setup::verify(cluster));
            Ok(Assignment { world, options, backups, retention, verify })
        })
        .collect::<Result<_, Failure>>()?;
    for cluster in &clusters {
        tracing::info!(
            cluster = cluster.name, server = %cluster.postgres, slot = cluster.slot,
            repositories = %urls(cluster), version = env!("CARGO_PKG_VERSION"), "archiving"
        );
    }
    let threads = stores.threads(&clusters, spool.is_some());
    setup::block_on_threads(threads, async {
        tokio::spawn(setup::clean_debris(stores, clusters));
        serve(assignments, http, args.until).await
    })??;
    Ok(Verdict::Fine)
}

fn urls(cluster: &ClusterConfig) -> String {
    cluster.repositories.iter().map(|repository| repository.url.as_str()).collect::<Vec<_>>().join(", ")
}

async fn serve(assignments: Vec<Assignment>, http: Option<HttpConfig>, until: Option<Lsn>) -> Result<(), Failure> {
    let stop = CancellationToken::new();
    let signals = Signals::listen()?;
    let server = match http {
        Some(HttpConfig { listen, token_file }) => Some(Server::bind(listen, token_file).await?),
        None => None,
    };
    tokio::spawn(signals.stop(stop.clone()));
    if let Some(interval) = watchdog_interval() {
        tokio::spawn(feed_watchdog(interval));
    }
    // The process is ready: whether its clusters are protected is for `status` to say.
    let names: Vec<&str> = assignments.iter().map(|assignment| assignment.options.name.as_str()).collect();
    notify(&[NotifyState::Ready, NotifyState::Status(&format!("archiving {}", names.join(", ")))]);
    let fleet = Fleet::new(assignments, stop);
    if let Some(server) = server {
        show(&fleet, server)?;
    }
    let result = fleet.run(until).await;
    notify(&[NotifyState::Stopping]);
    match &result {
        Ok(()) => tracing::info!("stopped"),
        Err(failure) => notify(&[NotifyState::Status(&format!("failed: {}", failure.message))]),
    }
    result
}

/// Lets others look.
fn show(fleet: &Fleet, server: Server) -> Result<(), Failure> {
    let exposition = Exposition::install()?;
    if let Some(address) = server.address() {
        tracing::info!(%address, "listening for /metrics, /status, /protected, /healthz, /readyz");
    }
    let observer = fleet.observer().clone();
    tokio::spawn(exposition.clone().upkeep());
    tokio::spawn(server.serve(Arc::new(observer.clone()), exposition));
    tokio::spawn(observer.run());
    Ok(())
}

/// SIGTERM and SIGINT.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

/// 128 and the signal's number, as a shell says it of a process the signal has ended.
const SECOND_TERMINATE: i32 = 143;
const SECOND_INTERRUPT: i32 = 130;

impl Signals {
    fn listen() -> Result<Signals, Failure> {
        let listen = |kind| {
            signal(kind)
                .map_err(|error| Failure::new(ExitCode::Unavailable, format!("could not listen for signals: {error}")))
        };
        Ok(Signals { terminate: listen(SignalKind::terminate())?, interrupt: listen(SignalKind::interrupt())? })
    }

    /// The first asks the agent to drain; the second ends the process where it stands. Nothing acknowledged is
    /// lost by that: what is not durable is still held by the slot.
    async fn stop(mut self, stop: CancellationToken) {
        self.next().await;
        tracing::info!("stopping: what was received is made durable first; a second signal ends at once");
        notify(&[NotifyState::Stopping, NotifyState::Status("making durable what was received")]);
        stop.cancel();
        let code = self.next().await;
        tracing::warn!("stopped at once by a second signal: the slot holds what is not durable");
        std::process::exit(code);
    }

    async fn next(&mut self) -> i32 {
        tokio::select! {
            _ = self.terminate.recv() => SECOND_TERMINATE,
            _ = self.interrupt.recv() => SECOND_INTERRUPT,
        }
    }
}

/// Half of what the service manager waits for.
fn watchdog_interval() -> Option<Duration> {
    let mut micros = 0;
    sd_notify::watchdog_enabled(false, &mut micros).then(|| Duration::from_micros(micros / 2))
}

/// As long as tasks run. A store that does not answer is no reason to be killed: the agent outlives it.
async fn feed_watchdog(interval: Duration) {
    loop {
        notify(&[NotifyState::Watchdog]);
        tokio::time::sleep(interval).await;
    }
}

/// Tells the service manager, where there is one.
fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(false, states) {
        tracing::debug!("could not tell the service manager: {error}");
    }
}

//! Owns: from what was typed to what works: configuration, repository, logins, the world of an agent, runtimes.
//! Does not own: what is done with them (the verbs).

use std::collections::BTreeSet;
use std::future::Future;
use std::num::NonZero;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::runtime;

use super::args::Global;
use super::keys;
use crate::agent::backup::BackupSettings;
use crate::agent::world::{ClusterOptions, LoginSource, Repository, World};
use crate::archiver::Workers;
use crate::backup::BackupOptions;
use crate::codec::encrypt::{Identities, Keys};
use crate::config::{ArchiveConfig, ClusterConfig, Config, HttpConfig, Loaded, Location, RepositoryConfig, Sources};
use crate::error::{Advice, ExitCode, Failure};
use crate::postgres::{Conninfo, Purpose, SystemEnvironment, TargetSessionAttrs};
use crate::receiver::Clock;
use crate::replication::base_backup::ServerCompression;
use crate::replication::{Login, NetDialer, SlotName};
use crate::repository::{Backend, LocalBackend, MeteredBackend, S3Backend, StoreErrorKind};
use crate::spool::SpoolOptions;
use crate::telemetry::meters::StoreMeter;

/// Store calls in the hands of the kernel, and a few threads for name resolution, beside the compressing ones.
const BLOCKING_THREADS: usize = 40;
/// A thread that has nothing to do gives its stack and its heap back soon.
const THREAD_KEEP_ALIVE: Duration = Duration::from_secs(10);
/// What a stuck store call may delay the end of the process by: everything that counts was waited for before.
const SHUTDOWN_PATIENCE: Duration = Duration::from_millis(500);

/// The whole configuration; what an operator should know about it is said.
pub fn load(global: &Global) -> Result<Loaded, Failure> {
    let flags = global.flags();
    let sources = Sources { path: global.config.as_deref(), environment: &SystemEnvironment, flags: &flags };
    let loaded = Config::load(sources)?;
    for warning in &loaded.warnings {
        tracing::warn!("{warning}");
    }
    Ok(loaded)
}

/// The clusters a verb is about: the one that is named, or all.
pub fn clusters(global: &Global) -> Result<Vec<ClusterConfig>, Failure> {
    Ok(clusters_and_http(global)?.0)
}

/// The clusters to serve or to ask about, and where an agent listens.
pub fn clusters_and_http(global: &Global) -> Result<(Vec<ClusterConfig>, Option<HttpConfig>), Failure> {
    let config = load(global)?.config;
    let clusters = match &global.cluster {
        Some(name) => vec![config.cluster(Some(name))?.clone()],
        None => config.clusters,
    };
    Ok((clusters, config.http))
}

/// Each cluster's share of the spool: all that are configured have one, also those another process serves.
pub fn spool_share(global: &Global) -> Result<Option<SpoolOptions>, Failure> {
    let flags = global.flags();
    let sources = Sources { path: global.config.as_deref(), environment: &SystemEnvironment, flags: &flags };
    let config = Config::load(sources)?.config;
    let share = |bytes: u64| bytes / config.clusters.len() as u64;
    Ok(config
        .spool
        .as_ref()
        .map(|spool| SpoolOptions { path: spool.path.clone(), limit_bytes: share(spool.limit_bytes) }))
}

/// The one cluster a verb is about.
pub fn cluster(global: &Global) -> Result<ClusterConfig, Failure> {
    let loaded = load(global)?;
    Ok(loaded.config.cluster(global.cluster.as_deref())?.clone())
}

/// Where clusters are archived, for verbs that need no server: no connection string is looked at.
pub fn archives(global: &Global) -> Result<Vec<ArchiveConfig>, Failure> {
    let flags = global.flags();
    let sources = Sources { path: global.config.as_deref(), environment: &SystemEnvironment, flags: &flags };
    Ok(Config::load_archives(sources)?)
}

pub fn backend(repository: &RepositoryConfig) -> Arc<dyn Backend> {
    match &repository.location {
        Location::Local(path) => Arc::new(LocalBackend::open(path.clone())),
        Location::S3(options) => Arc::new(S3Backend::open(options.clone())),
    }
}

fn repository(config: &RepositoryConfig) -> Repository {
    Repository { name: config.name.clone(), backend: backend(config) }
}

pub fn slot_name(cluster: &ClusterConfig) -> Result<SlotName, Failure> {
    SlotName::new(&cluster.slot).map_err(|error| Failure::new(ExitCode::Config, error.to_string()))
}

/// The real world of one cluster.
pub fn world(cluster: &ClusterConfig, workers: Workers) -> World {
    World {
        dialer: Arc::new(NetDialer),
        logins: Arc::new(ConfiguredLogins::new(cluster.postgres.clone())),
        repositories: cluster.repositories.iter().map(repository).collect(),
        clock: Clock::system(),
        random: Arc::new(Mutex::new(fastrand::Rng::with_seed(seed()))),
        workers,
    }
}

/// From the system's randomness: what is told apart by random names, repositories among them, is so between any two
/// processes on any two machines.
fn seed() -> u64 {
    let mut bytes = [0; 8];
    aws_lc_rs::rand::fill(&mut bytes).expect("the system gives random bytes");
    u64::from_ne_bytes(bytes)
}

/// The same world, what is asked of its stores counted.
pub fn metered(world: World, cluster: &ClusterConfig) -> World {
    let metered = |repository: Repository| {
        let meter = StoreMeter::new(&cluster.name, &repository.name);
        Repository { backend: Arc::new(MeteredBackend::new(repository.backend, meter)), ..repository }
    };
    World { repositories: world.repositories.into_iter().map(metered).collect(), ..world }
}

pub fn options(cluster: &ClusterConfig, spool: Option<SpoolOptions>) -> Result<ClusterOptions, Failure> {
    Ok(ClusterOptions {
        name: cluster.name.clone(),
        slot: slot_name(cluster)?,
        tail_interval: cluster.tail_interval,
        shutdown_grace: cluster.shutdown_grace,
        memory_bytes: cluster.memory_bytes,
        required: cluster.required,
        acknowledge: cluster.acknowledge,
        spool,
        synchronous: cluster.synchronous,
        keys: Keys { recipients: cluster.encrypt_to.clone(), identities: identities(cluster) },
        host: host_name(),
    })
}

/// How this cluster's backups are taken.
pub fn backups(cluster: &ClusterConfig) -> BackupSettings {
    let config = &cluster.backup;
    let from = config.from.clone().map(|from| Arc::new(ConfiguredLogins::new(from)) as Arc<dyn LoginSource>);
    BackupSettings {
        automatic: config.automatic,
        options: BackupOptions {
            label: config.label.clone(),
            checkpoint: config.checkpoint,
            max_rate_kib: config.max_rate_kib,
            checksums: config.checksums,
            compression: config.compression.map(|method| ServerCompression { method, level: None }),
            ..BackupOptions::default()
        },
        from,
    }
}

/// What an agent can do without: it compares an encrypted object nothing else tells about, where the key is at hand.
fn identities(cluster: &ClusterConfig) -> Option<Identities> {
    match keys::reading(cluster.identity_file.as_deref()) {
        Ok(keys) => keys.identities,
        Err(failure) => {
            tracing::warn!(
                cluster = cluster.name,
                hint = failure.hint.as_deref(),
                "archiving without identities: {failure}"
            );
            None
        }
    }
}

pub fn host_name() -> Option<String> {
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    Some(name).filter(|name| !name.is_empty())
}

/// Logins from a connection string; passwords are looked up anew each time, warnings said once.
#[derive(Debug)]
pub struct ConfiguredLogins {
    conninfo: Conninfo,
    said: Mutex<BTreeSet<String>>,
}

impl ConfiguredLogins {
    pub fn new(conninfo: Conninfo) -> ConfiguredLogins {
        ConfiguredLogins { conninfo, said: Mutex::default() }
    }
}

impl LoginSource for ConfiguredLogins {
    fn logins(&self, purpose: Purpose) -> Result<Vec<Login>, Failure> {
        let found = self.conninfo.logins(purpose, &SystemEnvironment)?;
        let mut said = self.said.lock().expect("no holder panics");
        for warning in found.warnings {
            if said.insert(warning.clone()) {
                tracing::warn!("{warning}");
            }
        }
        Ok(found.logins)
    }

    fn wanted(&self) -> TargetSessionAttrs {
        self.conninfo.target_session_attrs()
    }
}

/// Cores to compress on.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, NonZero::get)
}

/// Runs a command that asks and answers.
pub fn block_on<T>(work: impl Future<Output = T>) -> Result<T, Failure> {
    finish(runtime::Builder::new_current_thread(), work)
}

/// Runs the agent: two threads are enough for the network, the rest is compressing and the store's calls.
pub fn block_on_threads<T>(work: impl Future<Output = T>) -> Result<T, Failure> {
    let mut builder = runtime::Builder::new_multi_thread();
    builder.worker_threads(cores().min(2));
    finish(builder, work)
}

fn finish<T>(mut builder: runtime::Builder, work: impl Future<Output = T>) -> Result<T, Failure> {
    builder.enable_all().max_blocking_threads(BLOCKING_THREADS + cores()).thread_keep_alive(THREAD_KEEP_ALIVE);
    let runtime = builder.build().map_err(|error| {
        Failure::new(ExitCode::Unavailable, format!("could not start threads: {error}"))
            .hint("does a limit on processes or memory apply to this user?")
    })?;
    let result = runtime.block_on(work);
    runtime.shutdown_timeout(SHUTDOWN_PATIENCE);
    Ok(result)
}

/// Removes what killed writers left unfinished in repositories, once the agent is under way.
pub async fn clean_debris(clusters: Vec<ClusterConfig>) {
    /// No upload takes longer; a younger file may be another agent's.
    const AGE: Duration = Duration::from_secs(24 * 3600);
    let mut seen = BTreeSet::new();
    for repository in clusters.iter().flat_map(|cluster| &cluster.repositories) {
        if !seen.insert(repository.url.clone()) {
            continue;
        }
        let cleaned = match repository.location.clone() {
            Location::Local(root) => LocalBackend::open(root).clean_debris(AGE).await,
            Location::S3(options) => S3Backend::open(options).clean_debris(AGE).await,
        };
        match cleaned {
            Ok(0) => {}
            Ok(count) => tracing::info!(count, repository = repository.url, "removed unfinished files or uploads"),
            Err(error) if error.is(StoreErrorKind::PermissionDenied) => {
                tracing::info!(%error, hint = error.hint(), "unfinished uploads stay");
            }
            Err(error) => tracing::debug!(%error, "unfinished files or uploads stay"),
        }
    }
}

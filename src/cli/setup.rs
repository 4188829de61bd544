//! Owns: from what was typed to what works: configuration, repository, logins, the world of an agent, runtimes.
//! Does not own: what is done with them (the verbs).

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::runtime;

use super::args::Global;
use super::keys;
use crate::agent::backup::{BackupSettings, HUNG_AFTER};
use crate::agent::verify::VerifySettings;
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
use crate::repository::{Backend, LocalBackend, MeteredBackend, S3Backend, StoreErrorKind, THREADS_PER_ROOT};
use crate::spool::SpoolOptions;
use crate::telemetry::meters::StoreMeter;
use crate::verify::record::Mode;

/// Threads for name resolution and small files, beside those for stores, spool and compression.
const SPARE_THREADS: usize = 8;
/// What a cluster can have under way on the spool's disk: a write, and for each repository the reads of four segments,
/// of one that is moved, and of a tail.
const SPOOL_WRITES: usize = 1;
const SPOOL_READS: usize = 6;
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

/// The file the configuration is read from, if there is one.
pub fn config_path(global: &Global) -> Result<Option<std::path::PathBuf>, Failure> {
    let flags = global.flags();
    let sources = Sources { path: global.config.as_deref(), environment: &SystemEnvironment, flags: &flags };
    Ok(crate::config::file_path(sources)?)
}

/// The archives a verb is about: the cluster's that is named, or all.
pub fn chosen_archives(global: &Global) -> Result<Vec<ArchiveConfig>, Failure> {
    let archives = archives(global)?;
    Ok(match &global.cluster {
        Some(name) => vec![ArchiveConfig::choose(&archives, Some(name))?.clone()],
        None => archives,
    })
}

pub fn backend(repository: &RepositoryConfig) -> Arc<dyn Backend> {
    Stores::default().backend(repository)
}

/// The stores of one process: a directory is one, whichever clusters archive there, so that what a hung disk may hold
/// is bounded for all of them together.
#[derive(Debug, Default)]
pub struct Stores {
    local: BTreeMap<PathBuf, LocalBackend>,
}

impl Stores {
    pub fn backend(&mut self, repository: &RepositoryConfig) -> Arc<dyn Backend> {
        match &repository.location {
            Location::Local(root) => Arc::new(self.local(root)),
            Location::S3(options) => Arc::new(S3Backend::open(options.clone())),
        }
    }

    fn local(&mut self, root: &Path) -> LocalBackend {
        let key = std::path::absolute(root).unwrap_or_else(|_| root.to_path_buf());
        let first = self.local.entry(key).or_insert_with(|| LocalBackend::open(root.to_path_buf()));
        first.beside()
    }

    /// How many threads there must be for blocking work, so that every disk there is may hang and name resolution and
    /// compression still find one. Most are never started.
    pub fn threads(&self, clusters: &[ClusterConfig], has_spool: bool) -> usize {
        let on_spool = |cluster: &ClusterConfig| SPOOL_WRITES + SPOOL_READS * cluster.repositories.len();
        let spool: usize = if has_spool { clusters.iter().map(on_spool).sum() } else { 0 };
        SPARE_THREADS + cores() + self.local.len() * THREADS_PER_ROOT + spool
    }
}

pub fn slot_name(cluster: &ClusterConfig) -> Result<SlotName, Failure> {
    SlotName::new(&cluster.slot).map_err(|error| Failure::new(ExitCode::Config, error.to_string()))
}

/// The real world of one cluster.
pub fn world(cluster: &ClusterConfig, workers: Workers) -> World {
    world_among(&mut Stores::default(), cluster, workers)
}

/// The same, of one cluster among several.
pub fn world_among(stores: &mut Stores, cluster: &ClusterConfig, workers: Workers) -> World {
    let repository =
        |config: &RepositoryConfig| Repository { name: config.name.clone(), backend: stores.backend(config) };
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
        schedule: cluster.schedule.clone(),
        hung_after: HUNG_AFTER,
    }
}

/// When the agent verifies by itself.
pub fn verify(cluster: &ClusterConfig) -> VerifySettings {
    let config = &cluster.verify;
    let lines = [(Mode::Full, &config.full), (Mode::Sample, &config.sample), (Mode::Quick, &config.quick)];
    VerifySettings {
        lines: lines.into_iter().filter_map(|(mode, line)| Some((mode, line.clone()?))).collect(),
        zone: Some(cluster.schedule.timezone.clone()),
        share: f64::from(config.sample_percent) / 100.0,
        max_rate: config.max_rate,
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
    finish(runtime::Builder::new_current_thread(), threads_for_roots(1), work)
}

/// Blocking threads of a command that works with so many directories at the same time.
pub fn threads_for_roots(roots: usize) -> usize {
    SPARE_THREADS + cores() + roots * THREADS_PER_ROOT
}

/// Runs the agent: two threads are enough for the network, the rest is compressing and the store's calls, on as many
/// as `blocking` threads ([`Stores::threads`]).
pub fn block_on_threads<T>(blocking: usize, work: impl Future<Output = T>) -> Result<T, Failure> {
    let mut builder = runtime::Builder::new_multi_thread();
    builder.worker_threads(cores().min(2));
    finish(builder, blocking, work)
}

fn finish<T>(mut builder: runtime::Builder, blocking: usize, work: impl Future<Output = T>) -> Result<T, Failure> {
    builder.enable_all().max_blocking_threads(blocking).thread_keep_alive(THREAD_KEEP_ALIVE);
    let runtime = builder.build().map_err(|error| {
        Failure::new(ExitCode::Unavailable, format!("could not start threads: {error}"))
            .hint("does a limit on processes or memory apply to this user?")
    })?;
    let result = runtime.block_on(work);
    runtime.shutdown_timeout(SHUTDOWN_PATIENCE);
    Ok(result)
}

/// Removes what killed writers left unfinished in repositories, once the agent is under way.
pub async fn clean_debris(mut stores: Stores, clusters: Vec<ClusterConfig>) {
    /// No upload takes longer; a younger file may be another agent's.
    const AGE: Duration = Duration::from_secs(24 * 3600);
    let mut seen = BTreeSet::new();
    for repository in clusters.iter().flat_map(|cluster| &cluster.repositories) {
        if !seen.insert(repository.url.clone()) {
            continue;
        }
        let cleaned = match repository.location.clone() {
            Location::Local(root) => stores.local(&root).clean_debris(AGE).await,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_directory_has_its_threads_however_many_clusters_use_it() {
        let repository = |name: &str| RepositoryConfig {
            name: name.into(),
            url: format!("file:///{name}"),
            location: Location::Local(format!("/{name}").into()),
        };
        let mut stores = Stores::default();
        let before = stores.threads(&[], false);
        for name in ["one", "other", "one", "one"] {
            stores.backend(&repository(name));
        }
        assert_eq!(stores.threads(&[], false), before + 2 * THREADS_PER_ROOT);
    }
}

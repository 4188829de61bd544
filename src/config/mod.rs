//! The configuration: what was typed (`file`), checked and resolved.
//!
//! Owns: where the configuration is found, layers (file < environment < flags), the meaning and limits of every key
//! (documented in `reference`), when things are due in
//! it (`times.rs`).
//! Does not own: units (`units`), connection strings (`postgres`), command-line parsing (`cli`).
//!
//! Nothing is accepted that would not take effect: an unknown key, or one of a later version, is an error that names
//! its file and line.

mod backup;
mod cluster;
mod error;
mod example;
mod file;
mod reference;
mod repository;
mod section;
mod times;

use std::collections::BTreeSet;
use std::fmt;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use crate::units::{parse_duration, parse_size};
pub use backup::{BackupConfig, label_fault};
pub use error::{ConfigError, Source};
use file::{Table, Tree, Typed, Value};
use reference::Group;
pub use reference::{KeyDoc, reference};
use section::Section;
use times::Times;
pub use times::{RetentionConfig, ScheduleConfig, VerifyConfig};

use crate::codec::encrypt::Recipients;
use crate::postgres::{Conninfo, Environment, FileContent};
use crate::receiver::Acknowledge;
use crate::repository::s3::S3Options;

/// Where a configuration is looked for when none is named.
const SEARCH: [&str; 2] = ["seawall.toml", "/etc/seawall/seawall.toml"];
const PATH_VARIABLE: &str = "SEAWALL_CONFIG";
/// The cluster and the repository that flags describe without a file.
const FLAG_NAME: &str = "main";
/// The repository of `--repository` beside a file.
const FLAG_REPOSITORY: &str = "command_line";

const SPOOL_LIMIT: u64 = 10 << 30;
/// Less would hold a few seconds of WAL.
const SPOOL_LIMIT_MIN: u64 = 64 << 20;
const HTTP_LISTEN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9187);

/// Where settings come from. `path` is `--config`.
#[derive(Clone, Copy)]
pub struct Sources<'a> {
    pub path: Option<&'a Path>,
    pub environment: &'a dyn Environment,
    pub flags: &'a Flags,
}

impl fmt::Debug for Sources<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sources").field("path", &self.path).field("flags", &self.flags).finish_non_exhaustive()
    }
}

/// The settings that are also flags. `Debug` does not show the connection string.
#[derive(Clone, Default)]
pub struct Flags {
    /// `--cluster`: the cluster the other flags are about, where several are configured.
    pub cluster: Option<String>,
    pub postgres: Option<String>,
    pub repository_url: Option<String>,
    pub slot: Option<String>,
}

impl fmt::Debug for Flags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let postgres = self.postgres.as_ref().map(|_| "***");
        f.debug_struct("Flags")
            .field("cluster", &self.cluster)
            .field("postgres", &postgres)
            .field("repository_url", &self.repository_url)
            .field("slot", &self.slot)
            .finish()
    }
}

/// A configuration with what an operator should be told about it.
#[derive(Clone, Debug)]
pub struct Loaded {
    pub config: Config,
    /// The file that was read; `None` when flags and variables said it all.
    pub path: Option<PathBuf>,
    pub warnings: Vec<String>,
}

/// Every value checked. Clusters are sorted by name; there is at least one.
#[derive(Clone, Debug)]
pub struct Config {
    pub clusters: Vec<ClusterConfig>,
    /// `None`: no spool.
    pub spool: Option<SpoolConfig>,
    /// `None`: nothing listens.
    pub http: Option<HttpConfig>,
}

/// The spool all clusters share: one subdirectory and an equal share of the limit for each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpoolConfig {
    pub path: PathBuf,
    pub limit_bytes: u64,
}

/// The read-only HTTP server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpConfig {
    pub listen: SocketAddr,
    /// Holds the bearer token that `/metrics`, `/status`, `/protected` and `/` ask for; `None`: nobody is asked.
    pub token_file: Option<PathBuf>,
}

#[derive(Clone, Debug)]
pub struct ClusterConfig {
    pub name: String,
    pub postgres: Conninfo,
    pub slot: String,
    /// In the order of the configuration; at least one, each name once.
    pub repositories: Vec<RepositoryConfig>,
    /// How many of them must hold a byte before it is acknowledged.
    pub required: usize,
    pub acknowledge: Acknowledge,
    /// Whether commits wait for this archive; `None`: as the server says.
    pub synchronous: Option<bool>,
    /// Whom objects are encrypted to; `None`: not encrypted.
    pub encrypt_to: Option<Recipients>,
    /// The age identities that decrypt, where something has to be read.
    pub identity_file: Option<PathBuf>,
    pub tail_interval: Duration,
    pub shutdown_grace: Duration,
    pub memory_bytes: u64,
    pub backup: BackupConfig,
    pub schedule: ScheduleConfig,
    pub retention: RetentionConfig,
    pub verify: VerifyConfig,
    /// Already part of `postgres`; here for showing.
    pub password_file: Option<PathBuf>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepositoryConfig {
    pub name: String,
    pub url: String,
    pub location: Location,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Location {
    Local(PathBuf),
    S3(S3Options),
}

/// Where one cluster's archive is and how long it is kept: all that is needed to work on it, without its server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArchiveConfig {
    pub cluster: String,
    pub repositories: Vec<RepositoryConfig>,
    pub identity_file: Option<PathBuf>,
    /// Its `timezone` is what a day is to retention too.
    pub schedule: ScheduleConfig,
    pub retention: RetentionConfig,
    pub verify: VerifyConfig,
}

impl ArchiveConfig {
    /// The archive of the cluster called `name`, or the only one.
    pub fn choose<'a>(archives: &'a [ArchiveConfig], name: Option<&str>) -> Result<&'a ArchiveConfig, ConfigError> {
        choose(archives, name, |archive| &archive.cluster)
    }
}

/// What is called `name`, or the only one.
fn choose<'a, T>(all: &'a [T], name: Option<&str>, name_of: impl Fn(&T) -> &String) -> Result<&'a T, ConfigError> {
    let known = || all.iter().map(|one| name_of(one).clone()).collect();
    match (name, all) {
        (None, [only]) => Ok(only),
        (None, _) => Err(ConfigError::SeveralClusters { known: known() }),
        (Some(name), all) => all
            .iter()
            .find(|one| name_of(one) == name)
            .ok_or_else(|| ConfigError::UnknownCluster { name: name.to_string(), known: known() }),
    }
}

/// All layers, and the file among them.
type Layers = (Tree, Option<(PathBuf, FileContent)>);

impl Config {
    /// Finds, reads and checks the configuration.
    pub fn load(sources: Sources<'_>) -> Result<Loaded, ConfigError> {
        let mut warnings = Vec::new();
        let (tree, file) = Config::layers(sources, false)?;
        let config = Config::from_tree(&tree, sources.environment)?;
        if let Some((path, content)) = &file {
            warn_of_readable_password(&tree, &config, path, content, &mut warnings);
        }
        warn_of_plain_endpoints(&config, &mut warnings);
        Ok(Loaded { config, path: file.map(|(path, _)| path), warnings })
    }

    /// Where every cluster's archive is, for a `restore_command` on any host: nothing about servers is looked at, and
    /// without a file `--cluster` names the cluster in the repository.
    pub fn load_archives(sources: Sources<'_>) -> Result<Vec<ArchiveConfig>, ConfigError> {
        let (tree, _) = Config::layers(sources, true)?;
        let archive = |(name, table): (&String, &Table)| {
            let section = Section { group: Group::Clusters, name, table };
            let Times { schedule, retention, verify } = times::check(&section)?;
            Ok(ArchiveConfig {
                cluster: name.clone(),
                repositories: cluster::repositories(&section, &tree)?,
                identity_file: section.path("identity_file")?,
                schedule,
                retention,
                verify,
            })
        };
        tree.tables(Group::Clusters).map(archive).collect()
    }

    /// The file that a configuration is read from, if there is one.
    pub fn path(sources: Sources<'_>) -> Result<Option<PathBuf>, ConfigError> {
        Ok(find_file(sources)?.map(|(path, _)| path))
    }

    fn layers(sources: Sources<'_>, any_cluster: bool) -> Result<Layers, ConfigError> {
        let mut tree = Tree::default();
        let file = find_file(sources)?;
        if let Some((path, content)) = &file {
            let text = content.text().map_err(|_| read_error(path, "not UTF-8".to_string(), false))?;
            tree.add_file(text, path)?;
        }
        tree.add_variables(sources.environment)?;
        if let (true, None, Some(name)) = (any_cluster, &file, &sources.flags.cluster) {
            tree.declare_flagged(name)?;
        }
        add_flags(&mut tree, sources.flags, file.is_some())?;
        if tree.tables(Group::Clusters).next().is_none() {
            return Err(nothing_configured(file.map(|(path, _)| path)));
        }
        Ok((tree, file))
    }

    fn from_tree(tree: &Tree, environment: &dyn Environment) -> Result<Config, ConfigError> {
        // All repositories are checked, also those no cluster uses yet.
        for (name, table) in tree.tables(Group::Repositories) {
            repository::check(name, table)?;
        }
        let clusters = tree.tables(Group::Clusters).map(|(name, table)| cluster::check(name, table, tree, environment));
        let clusters = clusters.collect::<Result<Vec<_>, _>>()?;
        let single = |group: Group| tree.tables(group).next().map(|(name, table)| Section { group, name, table });
        let spool = single(Group::Spool).map(|section| spool(&section, &clusters)).transpose()?;
        let http = single(Group::Http).map(|section| http(&section)).transpose()?;
        Ok(Config { clusters, spool, http })
    }

    /// The cluster called `name`, or the only one.
    pub fn cluster(&self, name: Option<&str>) -> Result<&ClusterConfig, ConfigError> {
        choose(&self.clusters, name, |cluster| &cluster.name)
    }
}

// Finding and reading.

/// Which file the configuration is read from; `None`: there is none, and flags and variables say it all.
pub fn file_path(sources: Sources<'_>) -> Result<Option<PathBuf>, ConfigError> {
    Ok(find_file(sources)?.map(|(path, _)| path))
}

/// The named file, which must exist, or the first that does.
fn find_file(sources: Sources<'_>) -> Result<Option<(PathBuf, FileContent)>, ConfigError> {
    let variable = || sources.environment.var(PATH_VARIABLE).filter(|path| !path.is_empty()).map(PathBuf::from);
    if let Some(path) = sources.path.map(Path::to_path_buf).or_else(variable) {
        let content = sources.environment.read(&path).map_err(|error| io_error(&path, &error))?;
        return checked(path, content).map(Some);
    }
    for path in SEARCH.map(PathBuf::from) {
        match sources.environment.read(&path) {
            Ok(content) => return checked(path, content).map(Some),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(io_error(&path, &error)),
        }
    }
    Ok(None)
}

/// Whoever may write the file decides where WAL, and the password, go.
fn checked(path: PathBuf, content: FileContent) -> Result<(PathBuf, FileContent), ConfigError> {
    match content.mode & 0o022 {
        0 => Ok((path, content)),
        _ => Err(ConfigError::Writable { path, mode: content.mode }),
    }
}

fn io_error(path: &Path, error: &std::io::Error) -> ConfigError {
    read_error(path, error.to_string(), error.kind() == ErrorKind::PermissionDenied)
}

fn read_error(path: &Path, cause: String, permission: bool) -> ConfigError {
    ConfigError::Read { path: path.to_path_buf(), cause, permission }
}

fn nothing_configured(file: Option<PathBuf>) -> ConfigError {
    match file {
        Some(path) => ConfigError::Missing {
            key: format!("[clusters.NAME] in {}: a cluster to archive", path.display()),
            example: "[clusters.main] with postgres, slot and repositories".to_string(),
        },
        None => ConfigError::Nothing { searched: SEARCH.map(PathBuf::from).to_vec() },
    }
}

/// The topmost layer. Without a file, flags describe the cluster `main` and its repository `main`.
fn add_flags(tree: &mut Tree, flags: &Flags, has_file: bool) -> Result<(), ConfigError> {
    if flags.postgres.is_none() && flags.repository_url.is_none() && flags.slot.is_none() {
        return Ok(());
    }
    let cluster = flagged_cluster(tree, flags, has_file)?;
    // With a file, a repository of its own: other clusters keep theirs, whatever it is called.
    let repository = if has_file { FLAG_REPOSITORY } else { FLAG_NAME };
    let mut set = |group, name: &str, key, flag, value: Option<Value>| {
        if let Some(value) = value {
            tree.set(group, name, key, Typed { value, source: Source::Flag(flag) });
        }
    };
    let text = |value: &Option<String>| value.clone().map(Value::Text);
    let list = flags.repository_url.as_ref().map(|_| Value::List(vec![repository.to_string()]));
    set(Group::Clusters, &cluster, "postgres", "--postgres", text(&flags.postgres));
    set(Group::Clusters, &cluster, "slot", "--slot", text(&flags.slot));
    set(Group::Clusters, &cluster, "repositories", "--repository", list);
    set(Group::Repositories, repository, "url", "--repository", text(&flags.repository_url));
    Ok(())
}

/// The cluster that flags are about.
fn flagged_cluster(tree: &Tree, flags: &Flags, has_file: bool) -> Result<String, ConfigError> {
    let known = tree.names(Group::Clusters);
    match (&flags.cluster, &known[..]) {
        (Some(name), _) if known.contains(name) => Ok(name.clone()),
        (Some(name), []) if !has_file && name == FLAG_NAME => Ok(name.clone()),
        (Some(name), _) => Err(ConfigError::UnknownCluster { name: name.clone(), known }),
        (None, []) => Ok(FLAG_NAME.to_string()),
        (None, [only]) => Ok(only.clone()),
        (None, _) => Err(ConfigError::SeveralClusters { known }),
    }
}

fn warn_of_readable_password(
    tree: &Tree,
    config: &Config,
    path: &Path,
    content: &FileContent,
    warnings: &mut Vec<String>,
) {
    let in_file = |cluster: &&ClusterConfig| {
        let typed = tree.table(Group::Clusters, &cluster.name).and_then(|table| table.get("postgres"));
        typed.is_some_and(|typed| matches!(typed.source, Source::File { .. })) && cluster.postgres.password_in_string()
    };
    if content.mode & 0o044 != 0 && config.clusters.iter().any(|cluster| in_file(&cluster)) {
        warnings.push(format!(
            "{} holds a password and others may read it (mode {:04o}); use password_file, or chmod 0600 it",
            path.display(),
            content.mode
        ));
    }
}

fn warn_of_plain_endpoints(config: &Config, warnings: &mut Vec<String>) {
    let mut said = BTreeSet::new();
    for repository in config.clusters.iter().flat_map(|cluster| &cluster.repositories) {
        let Location::S3(S3Options { endpoint: Some(endpoint), .. }) = &repository.location else { continue };
        if repository::is_plain_beyond_loopback(endpoint) && said.insert(&repository.name) {
            warnings.push(format!(
                "repository {} is reached without encryption: {endpoint}; use https:// outside this machine",
                repository.name
            ));
        }
    }
}

// Checking what all clusters share.

fn spool(section: &Section<'_>, clusters: &[ClusterConfig]) -> Result<SpoolConfig, ConfigError> {
    let Some(path) = section.path("path")? else {
        return Err(ConfigError::Missing { key: "spool.path".into(), example: "\"/var/lib/seawall/spool\"".into() });
    };
    for repository in clusters.iter().flat_map(|cluster| &cluster.repositories) {
        // Files of the one would be found among those of the other.
        let Location::Local(root) = &repository.location else { continue };
        if root.starts_with(&path) || path.starts_with(root) {
            let expected = format!("a directory apart from repository {}", repository.name);
            return Err(section.invalid("path", path.to_str(), expected));
        }
    }
    let limit_bytes = section.size("limit", SPOOL_LIMIT, SPOOL_LIMIT_MIN, "at least 64MiB")?;
    Ok(SpoolConfig { path, limit_bytes })
}

fn http(section: &Section<'_>) -> Result<HttpConfig, ConfigError> {
    const EXPECTED: &str = "an IP address and a port, such as \"127.0.0.1:9187\" or \"[::]:9187\"";
    let listen = match section.text("listen")? {
        None => HTTP_LISTEN,
        Some(text) => text.parse().map_err(|_| section.invalid("listen", Some(text), EXPECTED))?,
    };
    Ok(HttpConfig { listen, token_file: section.path("token_file")? })
}

#[cfg(test)]
mod tests;

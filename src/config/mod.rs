//! The configuration: what was typed (`file`), checked and resolved.
//!
//! Owns: where the configuration is found, layers (file < environment < flags), the meaning and limits of every key
//! (documented in `reference`), units (`units`).
//! Does not own: connection strings (`postgres`), command-line parsing (`cli`).
//!
//! Nothing is accepted that would not take effect: an unknown key, or one of a later version, is an error that names
//! its file and line.

mod error;
mod file;
mod reference;
mod units;

use std::fmt;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use error::{ConfigError, Source};
use file::{Table, Tree, Typed, Value};
use reference::Group;
pub use reference::{KeyDoc, reference};
pub use units::{parse_duration, parse_size};

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

const SLOT: &str = "seawall";
const SLOT_BYTES_MAX: usize = 63;
const TAIL_INTERVAL: Duration = Duration::from_secs(5);
const SHUTDOWN_GRACE: Duration = Duration::from_secs(10);
const MEMORY_BYTES: u64 = 32 << 20;
/// Less would not hold a few encoded frames of 1 MiB and the buffers around them.
const MEMORY_BYTES_MIN: u64 = 8 << 20;
const HOUR: Duration = Duration::from_secs(3600);

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

/// Where one cluster's archive is: all that is needed to read it, without its server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArchiveConfig {
    pub cluster: String,
    pub repositories: Vec<RepositoryConfig>,
    pub identity_file: Option<PathBuf>,
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
        Ok(Loaded { config, path: file.map(|(path, _)| path), warnings })
    }

    /// Where every cluster's archive is, for a `restore_command` on any host: nothing about servers is looked at, and
    /// without a file `--cluster` names the cluster in the repository.
    pub fn load_archives(sources: Sources<'_>) -> Result<Vec<ArchiveConfig>, ConfigError> {
        let (tree, _) = Config::layers(sources, true)?;
        let archive = |(name, table): (&String, &Table)| {
            let section = Section { group: Group::Clusters, name, table };
            Ok(ArchiveConfig {
                cluster: name.clone(),
                repositories: vec![cluster_repository(&section, &tree)?],
                identity_file: None,
            })
        };
        tree.tables(Group::Clusters).map(archive).collect()
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
            repository(name, table)?;
        }
        let clusters = tree.tables(Group::Clusters).map(|(name, table)| cluster(name, table, tree, environment));
        Ok(Config { clusters: clusters.collect::<Result<_, _>>()?, spool: None, http: None })
    }

    /// The cluster called `name`, or the only one.
    pub fn cluster(&self, name: Option<&str>) -> Result<&ClusterConfig, ConfigError> {
        choose(&self.clusters, name, |cluster| &cluster.name)
    }

    /// A configuration file that says the same, for `seawall init` to print. A password is not repeated.
    pub fn to_example_toml(&self) -> String {
        let clusters = self.clusters.iter().map(ClusterConfig::to_example_toml);
        let mut repositories: Vec<&RepositoryConfig> =
            self.clusters.iter().flat_map(|cluster| &cluster.repositories).collect();
        repositories.sort_by(|a, b| a.name.cmp(&b.name));
        repositories.dedup_by(|a, b| a.name == b.name);
        let repositories = repositories.into_iter().map(|repository| {
            format!("[repositories.{}]\nurl            = {}\n", repository.name, toml_string(&repository.url))
        });
        clusters.chain(repositories).collect::<Vec<_>>().join("\n")
    }
}

impl ClusterConfig {
    fn to_example_toml(&self) -> String {
        let mut lines = vec![format!("[clusters.{}]", self.name)];
        let mut line = |key: &str, value: String| lines.push(format!("{key:<14} = {value}"));
        line("postgres", toml_string(&self.postgres.to_keywords()));
        match &self.password_file {
            Some(path) => line("password_file", toml_string(&path.to_string_lossy())),
            None if self.postgres.password_in_string() => {
                line("# password_file", "\"/path/to/a/file\"      # the password itself is not repeated here".into());
            }
            None => {}
        }
        line("slot", toml_string(&self.slot));
        line("repositories", format!("[{}]", toml_string(&self.repositories[0].name)));
        line("tail_interval", format!("\"{}\"", units::show_duration(self.tail_interval)));
        line("shutdown_grace", format!("\"{}\"", units::show_duration(self.shutdown_grace)));
        line("memory", format!("\"{}\"", units::show_size(self.memory_bytes)));
        lines.join("\n") + "\n"
    }
}

fn toml_string(text: &str) -> String {
    toml::Value::String(text.to_string()).to_string()
}

// Finding and reading.

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

// Checking.

/// One table with its full name, for errors.
struct Section<'a> {
    group: Group,
    name: &'a str,
    table: &'a Table,
}

impl Section<'_> {
    fn key(&self, key: &str) -> String {
        format!("{}.{}.{key}", self.group.name(), self.name)
    }

    fn source(&self, key: &str) -> Source {
        self.table.get(key).map_or(Source::Default, |typed| typed.source.clone())
    }

    fn invalid(&self, key: &str, value: Option<&str>, expected: impl Into<String>) -> ConfigError {
        // Long values, and those with blanks or "=", may be something else than meant, such as a connection string.
        let plain =
            |value: &&str| value.len() <= 100 && !value.contains(|c: char| c.is_whitespace() || c == '=' || c == '@');
        ConfigError::Invalid {
            source_place: self.source(key),
            key: self.key(key),
            value: value.filter(plain).map(str::to_string),
            expected: expected.into(),
        }
    }

    fn not_available(&self, key: &str, what: impl Into<String>) -> ConfigError {
        ConfigError::NotAvailable { source_place: self.source(key), what: what.into() }
    }

    fn text(&self, key: &str) -> Result<Option<&str>, ConfigError> {
        match self.table.get(key).map(|typed| &typed.value) {
            None => Ok(None),
            Some(Value::Text(text)) => Ok(Some(text)),
            Some(Value::List(_)) => Err(self.wrong_type(key, "list")),
            Some(Value::Other(kind)) => Err(self.wrong_type(key, kind)),
        }
    }

    fn wrong_type(&self, key: &str, found: &str) -> ConfigError {
        let example = self.group.find(key).map_or("", |(_, doc)| doc.example);
        self.invalid(key, None, format!("text in quotes, such as {example}, not a {found}"))
    }

    fn duration(&self, key: &str, default: Duration, min: Duration, range: &str) -> Result<Duration, ConfigError> {
        let Some(text) = self.text(key)? else { return Ok(default) };
        let parsed = parse_duration(text).filter(|duration| (min..=HOUR).contains(duration));
        parsed.ok_or_else(|| self.invalid(key, Some(text), error::expected_duration(range)))
    }

    fn path(&self, key: &str) -> Result<Option<PathBuf>, ConfigError> {
        let Some(text) = self.text(key)? else { return Ok(None) };
        if !Path::new(text).is_absolute() || text.contains('\0') {
            return Err(self.invalid(key, Some(text), "an absolute path, such as \"/run/secrets/postgres-password\""));
        }
        Ok(Some(PathBuf::from(text)))
    }
}

fn cluster(
    name: &str,
    table: &Table,
    tree: &Tree,
    environment: &dyn Environment,
) -> Result<ClusterConfig, ConfigError> {
    let section = Section { group: Group::Clusters, name, table };
    check_acknowledge(&section)?;
    let password_file = section.path("password_file")?;
    Ok(ClusterConfig {
        name: name.to_string(),
        postgres: conninfo(&section, password_file.as_deref(), environment)?,
        slot: slot(&section)?,
        repositories: vec![cluster_repository(&section, tree)?],
        required: 1,
        acknowledge: Acknowledge::Repository,
        synchronous: None,
        encrypt_to: None,
        identity_file: None,
        tail_interval: section.duration("tail_interval", TAIL_INTERVAL, Duration::from_millis(100), "100ms to 1h")?,
        shutdown_grace: section.duration("shutdown_grace", SHUTDOWN_GRACE, Duration::ZERO, "0s to 1h")?,
        memory_bytes: memory(&section)?,
        password_file,
    })
}

fn conninfo(
    section: &Section<'_>,
    password_file: Option<&Path>,
    environment: &dyn Environment,
) -> Result<Conninfo, ConfigError> {
    let conflict = |first: &str, second: &str| ConfigError::Conflict {
        source_place: section.source(second),
        first: section.key(first),
        second: section.key(second),
    };
    let path = section.path("postgres_file")?;
    if path.is_some() && section.text("postgres")?.is_some() {
        return Err(conflict("postgres", "postgres_file"));
    }
    let (key, text) = match &path {
        Some(path) => ("postgres_file", read_conninfo(path, environment)?),
        None => ("postgres", section.text("postgres")?.unwrap_or_default().to_string()),
    };
    let parsed = Conninfo::parse(&text, environment).map_err(|source| ConfigError::Postgres {
        source_place: section.source(key),
        key: section.key(key),
        source: Box::new(source),
    })?;
    match password_file {
        Some(_) if parsed.password_in_string() => Err(conflict("password_file", key)),
        Some(path) => Ok(parsed.with_password_file(path)),
        None => Ok(parsed),
    }
}

fn read_conninfo(path: &Path, environment: &dyn Environment) -> Result<String, ConfigError> {
    let content = environment.read(path).map_err(|error| io_error(path, &error))?;
    let (path, content) = checked(path.to_path_buf(), content)?;
    let text = content.text().map_err(|_| read_error(&path, "not UTF-8".to_string(), false))?;
    Ok(text.strip_suffix('\n').unwrap_or(text).to_string())
}

fn slot(section: &Section<'_>) -> Result<String, ConfigError> {
    let slot = section.text("slot")?.unwrap_or(SLOT);
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
    if !(1..=SLOT_BYTES_MAX).contains(&slot.len()) || !slot.bytes().all(plain) {
        return Err(section.invalid("slot", Some(slot), "1 to 63 characters a-z, 0-9 and _"));
    }
    Ok(slot.to_string())
}

fn check_acknowledge(section: &Section<'_>) -> Result<(), ConfigError> {
    match section.text("acknowledge")? {
        None | Some("repository") => Ok(()),
        Some("spool") => Err(section.not_available("acknowledge", "acknowledge = \"spool\" is")),
        Some(other) => Err(section.invalid("acknowledge", Some(other), "\"repository\"")),
    }
}

fn memory(section: &Section<'_>) -> Result<u64, ConfigError> {
    let Some(text) = section.text("memory")? else { return Ok(MEMORY_BYTES) };
    let parsed = parse_size(text).filter(|&bytes| bytes >= MEMORY_BYTES_MIN);
    parsed.ok_or_else(|| section.invalid("memory", Some(text), error::expected_size("at least 8MiB")))
}

/// The one repository the cluster names, or the only one there is.
fn cluster_repository(section: &Section<'_>, tree: &Tree) -> Result<RepositoryConfig, ConfigError> {
    const KEY: &str = "repositories";
    let from_flag = |table: &Table| table.get("url").is_some_and(|typed| matches!(typed.source, Source::Flag(_)));
    let repositories = tree.tables(Group::Repositories).filter(|(_, table)| !from_flag(table));
    let known: Vec<String> = repositories.map(|(name, _)| name.clone()).collect();
    let names = match section.table.get(KEY).map(|typed| &typed.value) {
        None => &known,
        Some(Value::List(names)) => names,
        Some(_) => return Err(section.invalid(KEY, None, "a list with one name, such as [\"local\"]")),
    };
    let given = section.table.contains_key(KEY);
    let name = match &names[..] {
        [name] => name,
        [] if given => return Err(section.invalid(KEY, None, "a list with one name, such as [\"local\"]")),
        [] => {
            let example = "file:///var/lib/seawall".to_string();
            return Err(ConfigError::Missing {
                key: "a repository: repositories.NAME.url (or --repository)".into(),
                example,
            });
        }
        _ if given => return Err(section.not_available(KEY, "several repositories are")),
        _ => return Err(ConfigError::Missing { key: section.key(KEY), example: format!("[\"{}\"]", known[0]) }),
    };
    let Some(table) = tree.table(Group::Repositories, name) else {
        let (key, name) = (section.key(KEY), name.clone());
        return Err(ConfigError::UnknownRepository { source_place: section.source(KEY), key, name, known });
    };
    repository(name, table)
}

fn repository(name: &str, table: &Table) -> Result<RepositoryConfig, ConfigError> {
    let section = Section { group: Group::Repositories, name, table };
    let Some(url) = section.text("url")? else {
        return Err(ConfigError::Missing { key: section.key("url"), example: "\"file:///var/lib/seawall\"".into() });
    };
    let location = location(&section, url)?;
    Ok(RepositoryConfig { name: name.to_string(), url: url.to_string(), location })
}

/// `file:///absolute/path`, percent-encoding allowed.
fn location(section: &Section<'_>, url: &str) -> Result<Location, ConfigError> {
    const EXPECTED: &str = "file:// and an absolute path (three slashes), such as \"file:///var/lib/seawall\"";
    let wrong = || section.invalid("url", Some(url), EXPECTED);
    let scheme = url.split_once("://").map(|(scheme, _)| scheme);
    if let Some(scheme @ ("s3" | "gs" | "az" | "azure" | "http" | "https" | "sftp")) = scheme {
        return Err(section.not_available("url", format!("a repository at {scheme}:// is")));
    }
    let path = url.strip_prefix("file://").ok_or_else(wrong)?;
    let path = percent_encoding::percent_decode_str(path).decode_utf8().map_err(|_| wrong())?;
    // "?", "#" and ".." would mean something else to the next reader of the URL.
    let odd = path.contains('\0') || url.contains(['?', '#']) || path.split('/').any(|part| part == "..");
    if !path.starts_with('/') || path.trim_matches('/').is_empty() || odd {
        return Err(wrong());
    }
    Ok(Location::Local(PathBuf::from(path.as_ref())))
}

#[cfg(test)]
mod tests;

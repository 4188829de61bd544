//! Owns: what `[clusters.NAME]` may say: its server, its slot, its repositories, and the contract of acknowledgement.
//! Does not own: connection strings (`postgres`), what a repository's table says (`repository.rs`).

use std::path::Path;
use std::time::Duration;

use super::file::{Table, Tree, Value};
use super::reference::Group;
use super::section::Section;
use super::{
    ClusterConfig, ConfigError, Location, RepositoryConfig, Source, backup, checked, io_error, read_error, repository,
    times,
};
use crate::codec::encrypt::Recipients;
use crate::postgres::{Conninfo, Environment};
use crate::receiver::Acknowledge;
use crate::repository::s3::S3Options;

const SLOT: &str = "seawall";
const SLOT_BYTES_MAX: usize = 63;
const TAIL_INTERVAL: Duration = Duration::from_secs(5);
const SHUTDOWN_GRACE: Duration = Duration::from_secs(10);
const MEMORY_BYTES: u64 = 32 << 20;
/// Less would not hold a few encoded frames of 1 MiB and the buffers around them.
const MEMORY_BYTES_MIN: u64 = 8 << 20;
/// How a key that may be published begins, and how one that may not.
const RECIPIENT_PREFIX: &str = "age1";

pub(super) fn check(
    name: &str,
    table: &Table,
    tree: &Tree,
    environment: &dyn Environment,
) -> Result<ClusterConfig, ConfigError> {
    let section = Section { group: Group::Clusters, name, table };
    let acknowledge = acknowledge(&section, tree)?;
    let password_file = section.path("password_file")?;
    let repositories = repositories(&section, tree)?;
    let times::Times { schedule, retention, verify } = times::check(&section)?;
    Ok(ClusterConfig {
        name: name.to_string(),
        postgres: conninfo(&section, password_file.as_deref(), environment)?,
        slot: slot(&section)?,
        required: required(&section, repositories.len())?,
        repositories,
        acknowledge,
        synchronous: section.flag("synchronous")?,
        encrypt_to: recipients(&section)?,
        identity_file: section.path("identity_file")?,
        tail_interval: section.duration("tail_interval", TAIL_INTERVAL, Duration::from_millis(100), "100ms to 1h")?,
        shutdown_grace: section.duration("shutdown_grace", SHUTDOWN_GRACE, Duration::ZERO, "0s to 1h")?,
        memory_bytes: section.size("memory", MEMORY_BYTES, MEMORY_BYTES_MIN, "at least 8MiB")?,
        backup: backup::check(&section, password_file.as_deref(), environment)?,
        schedule,
        retention,
        verify,
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

fn acknowledge(section: &Section<'_>, tree: &Tree) -> Result<Acknowledge, ConfigError> {
    const KEY: &str = "acknowledge";
    match section.text(KEY)? {
        None | Some("repository") => Ok(Acknowledge::Repository),
        Some("spool") if tree.tables(Group::Spool).next().is_some() => Ok(Acknowledge::Spool),
        Some("spool") => Err(section.needs(KEY, format!("{} = \"spool\"", section.key(KEY)), "[spool] with a path")),
        Some(other) => Err(section.invalid(KEY, Some(other), "\"repository\" or \"spool\"")),
    }
}

/// How many of `count` repositories must hold a byte before it is acknowledged.
fn required(section: &Section<'_>, count: usize) -> Result<usize, ConfigError> {
    const KEY: &str = "required";
    let number = |number: i64| usize::try_from(number).ok().filter(|number| (1..=count).contains(number));
    let typed = section.table.get(KEY);
    let (found, shown) = match typed.map(|typed| (&typed.value, &typed.source)) {
        None => return Ok(count),
        Some((Value::Integer(integer), _)) => (number(*integer), Some(integer.to_string())),
        Some((Value::Text(text), source)) => {
            let found = match (text.as_str(), source) {
                ("all", _) => Some(count),
                ("any", _) => Some(1),
                (text, Source::Variable(_)) => text.parse().ok().and_then(number),
                _ => None,
            };
            (found, Some(text.clone()))
        }
        Some(_) => (None, None),
    };
    let expected = match count {
        1 => "\"all\", \"any\" or 1: there is one repository".to_string(),
        _ => format!("\"all\", \"any\" or a number from 1 to {count}, how many repositories there are"),
    };
    found.ok_or_else(|| section.invalid(KEY, shown.as_deref(), expected))
}

fn recipients(section: &Section<'_>) -> Result<Option<Recipients>, ConfigError> {
    const KEY: &str = "encrypt_to";
    const EXPECTED: &str = "a list of public keys as age-keygen prints them, such as [\"age1…\"]";
    let Some(keys) = section.list(KEY, EXPECTED)? else { return Ok(None) };
    for key in keys {
        // What is not public is not repeated in an error: somebody may have pasted the secret key.
        if !key.starts_with(RECIPIENT_PREFIX) {
            let secret = key.trim().to_ascii_uppercase().starts_with("AGE-SECRET-KEY-");
            let aside = if secret { "; a secret key belongs into identity_file, where something is read" } else { "" };
            return Err(section.invalid(KEY, None, format!("{EXPECTED}{aside}")));
        }
        Recipients::parse(std::slice::from_ref(key))
            .map_err(|why| section.invalid(KEY, Some(key), format!("{EXPECTED}: {why}")))?;
    }
    Recipients::parse(keys).map(Some).map_err(|why| section.invalid(KEY, None, format!("{EXPECTED}: {why}")))
}

/// The repositories the cluster names, or the only one there is.
pub(super) fn repositories(section: &Section<'_>, tree: &Tree) -> Result<Vec<RepositoryConfig>, ConfigError> {
    const KEY: &str = "repositories";
    const EXPECTED: &str = "a list of names, each once, such as [\"local\", \"offsite\"]";
    let from_flag = |table: &Table| table.get("url").is_some_and(|typed| matches!(typed.source, Source::Flag(_)));
    let all = tree.tables(Group::Repositories).filter(|(_, table)| !from_flag(table));
    let known: Vec<String> = all.map(|(name, _)| name.clone()).collect();
    let names = match (section.list(KEY, EXPECTED)?, &known[..]) {
        (Some(names), _) => names,
        (None, [_]) => &known[..],
        (None, []) => {
            let key = "a repository: repositories.NAME.url (or --repository)".into();
            return Err(ConfigError::Missing { key, example: "file:///var/lib/seawall".into() });
        }
        (None, [first, ..]) => {
            return Err(ConfigError::Missing { key: section.key(KEY), example: format!("[\"{first}\"]") });
        }
    };
    let mut found: Vec<RepositoryConfig> = Vec::new();
    for name in names {
        let Some(table) = tree.table(Group::Repositories, name) else {
            let (key, name) = (section.key(KEY), name.clone());
            return Err(ConfigError::UnknownRepository { source_place: section.source(KEY), key, name, known });
        };
        let repository = repository::check(name, table)?;
        if found.iter().any(|other| other.name == *name) {
            return Err(section.invalid(KEY, Some(name), EXPECTED));
        }
        // Two names for one place would count one copy as two.
        if let Some(other) = found.iter().find(|other| is_same_place(&other.location, &repository.location)) {
            return Err(ConfigError::SamePlace {
                source_place: section.source(KEY),
                first: other.name.clone(),
                second: name.clone(),
            });
        }
        found.push(repository);
    }
    Ok(found)
}

fn is_same_place(one: &Location, other: &Location) -> bool {
    match (one, other) {
        (Location::Local(one), Location::Local(other)) => one.components().eq(other.components()),
        (Location::S3(one), Location::S3(other)) => place(one) == place(other),
        _ => false,
    }
}

fn place(options: &S3Options) -> (&str, &str, Option<&str>) {
    let endpoint = options.endpoint.as_deref().map(|endpoint| endpoint.trim_end_matches('/'));
    (&options.bucket, &options.prefix, endpoint)
}

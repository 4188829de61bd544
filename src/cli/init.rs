//! Owns: `init`: what to run on the server, what to write into the configuration, and how an archive begins when an
//! operator says so (`--apply`, `--create`, `--new-lineage`).
//! Does not own: when the agent begins one by itself (`agent/startup.rs`), which it does where that is safe.

use std::net::{IpAddr, ToSocketAddrs, UdpSocket};

use serde::Serialize;

use super::args::{Global, InitArgs};
use super::repositories::{self, Look};
use super::{Verdict, output, setup};
use crate::agent::opening;
use crate::agent::slot::{self, Found};
use crate::agent::startup::{self, Server};
use crate::agent::world::{ClusterOptions, World};
use crate::archiver::Workers;
use crate::catalog::lineage::LineageFile;
use crate::catalog::store::{self, Archive, CatalogError};
use crate::config::{ClusterConfig, Config, ConfigError, Sources};
use crate::error::{ExitCode, Failure};
use crate::postgres::{Purpose, SystemEnvironment, connect};
use crate::replication::{Address, Connection, Login, SystemIdentity};
use crate::repository::StoreErrorKind;
use crate::repository::layout::Lineage;
use crate::wal::{Lsn, SystemId};

/// What `init` shows where nothing is configured yet.
const EXAMPLE_POSTGRES: &str = "host=localhost user=seawall dbname=postgres target_session_attrs=read-write";
const EXAMPLE_REPOSITORY: &str = "file:///var/lib/seawall";

pub fn run(global: &Global, args: &InitArgs) -> Result<Verdict, Failure> {
    if !(args.apply || args.create || args.new_lineage) {
        let config = config_or_example(global)?;
        let instructions = Instructions::of(&config, global.cluster.as_deref())?;
        match global.json {
            true => output::json(&instructions),
            false => output::text(&instructions.to_text()),
        }
        return Ok(Verdict::Fine);
    }
    let cluster = setup::cluster(global)?;
    let begun = setup::block_on(begin(&cluster, args))??;
    match global.json {
        true => output::json(&begun),
        false => output::text(&begun.to_text()),
    }
    Ok(Verdict::Fine)
}

// --- Printing ----------------------------------------------------------------------------------------------------

/// The configuration, or an example where there is none at all or flags say only a part.
fn config_or_example(global: &Global) -> Result<Config, Failure> {
    let load = |flags: &crate::config::Flags| {
        let sources = Sources { path: global.config.as_deref(), environment: &SystemEnvironment, flags };
        Config::load(sources).map(|loaded| loaded.config)
    };
    let mut flags = global.flags();
    match load(&flags) {
        Err(ConfigError::Nothing { .. } | ConfigError::Missing { .. }) if global.config.is_none() => {
            flags.postgres.get_or_insert_with(|| EXAMPLE_POSTGRES.to_string());
            flags.repository_url.get_or_insert_with(|| EXAMPLE_REPOSITORY.to_string());
            Ok(load(&flags)?)
        }
        loaded => Ok(loaded?),
    }
}

#[derive(Debug, Serialize)]
struct Instructions {
    cluster: String,
    /// For a superuser, in psql.
    sql: Vec<String>,
    pg_hba: Vec<String>,
    settings: Vec<Setting>,
    config: String,
}

#[derive(Debug, Serialize)]
struct Setting {
    name: &'static str,
    value: &'static str,
    why: &'static str,
}

const SETTINGS: [Setting; 8] = [
    Setting { name: "wal_level", value: "replica", why: "or logical; minimal WAL cannot rebuild a server (restart)" },
    Setting { name: "max_wal_senders", value: "10", why: "streams, base backups and one to spare (restart)" },
    Setting { name: "max_replication_slots", value: "10", why: "one for seawall beside those in use (restart)" },
    Setting {
        name: "max_slot_wal_keep_size",
        value: "'64GB'",
        why: "less than the disk has: an archive that is down must not fill it (reload)",
    },
    Setting { name: "wal_keep_size", value: "'512MB'", why: "a cushion after a failover (reload)" },
    Setting { name: "wal_sender_timeout", value: "'60s'", why: "a dead connection is noticed (reload)" },
    Setting { name: "full_page_writes", value: "on", why: "torn pages cannot be repaired without (reload)" },
    Setting {
        name: "idle_replication_slot_timeout",
        value: "0",
        why: "18 and later: an agent that is down must not lose its slot (reload)",
    },
];

impl Instructions {
    fn of(config: &Config, cluster: Option<&str>) -> Result<Instructions, Failure> {
        let cluster = config.cluster(cluster)?;
        Ok(Instructions {
            cluster: cluster.name.clone(),
            sql: sql(cluster),
            pg_hba: pg_hba(cluster),
            settings: SETTINGS.into(),
            config: config.to_example_toml(),
        })
    }

    fn to_text(&self) -> String {
        let settings = self.settings.iter().map(|Setting { name, value, why }| {
            let assignment = format!("{name} = {value}");
            format!("{assignment:<36} # {why}")
        });
        let sections = [
            ("1. On the server, as a superuser in psql", self.sql.clone()),
            (
                "2. In the server's pg_hba.conf, above broader lines; then: SELECT pg_reload_conf();",
                self.pg_hba.clone(),
            ),
            ("3. In the server's postgresql.conf (recommended)", settings.collect()),
            ("4. In /etc/seawall/seawall.toml (mode 0600 when it holds a password)", vec![self.config.clone()]),
            (
                "5. Then",
                vec![
                    "seawall check           # every finding with its cure".to_string(),
                    "seawall init --apply    # repository, lineage and slot; `seawall run` does this by itself too"
                        .into(),
                    "seawall run".to_string(),
                ],
            ),
        ];
        let section = |(title, lines): (&str, Vec<String>)| format!("# {title}\n\n{}\n", lines.join("\n").trim_end());
        sections.into_iter().map(section).collect::<Vec<_>>().join("\n")
    }
}

fn sql(cluster: &ClusterConfig) -> Vec<String> {
    let role = quote_ident(cluster.postgres.user());
    vec![
        format!("CREATE ROLE {role} LOGIN REPLICATION PASSWORD 'choose one';"),
        format!("GRANT pg_monitor TO {role};  -- optional: `status` and `check` see synchronous replication"),
        "-- Optional, where configuration lives outside the data directory (Debian): backups take it along. In"
            .to_string(),
        format!("-- database {}:", quote_ident(cluster.postgres.database())),
        format!("GRANT pg_read_all_settings, pg_read_server_files TO {role};"),
        format!("GRANT EXECUTE ON FUNCTION pg_catalog.pg_read_binary_file(text, bigint, bigint) TO {role};"),
    ]
}

/// Two lines: physical replication matches `replication` only, the checks' sessions match the database.
fn pg_hba(cluster: &ClusterConfig) -> Vec<String> {
    let user = quote_ident(cluster.postgres.user());
    let database = quote_ident(cluster.postgres.database());
    let logins = cluster.postgres.logins(Purpose::Physical, &SystemEnvironment).map(|found| found.logins);
    let mut lines: Vec<String> = Vec::new();
    for login in logins.unwrap_or_default() {
        let (kind, address) = match &login.address {
            Address::Unix { .. } => ("local", String::new()),
            Address::Tcp { host, ip, port } => source_of(host, *ip, *port),
        };
        for database in ["replication", &database] {
            let line = format!("{kind:<8} {database:<12} {user:<12} {address:<24} scram-sha-256");
            if !lines.contains(&line) {
                lines.push(line);
            }
        }
    }
    lines
}

/// How the server sees this machine: the address the system would connect from. Nothing is sent.
fn source_of(host: &str, ip: Option<IpAddr>, port: u16) -> (&'static str, String) {
    let unknown = || ("hostssl", "<this machine's address>/32".to_string());
    let target = match ip {
        Some(ip) => Some((ip, port).into()),
        None => (host, port).to_socket_addrs().ok().and_then(|mut found| found.next()),
    };
    let Some(target) = target else { return unknown() };
    let any = if target.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let route = UdpSocket::bind(any).and_then(|socket| {
        socket.connect(target)?;
        socket.local_addr()
    });
    match route {
        Err(_) => unknown(),
        Ok(source) => {
            let kind = if source.ip().is_loopback() { "host" } else { "hostssl" };
            (kind, format!("{}/{}", source.ip(), if source.is_ipv4() { 32 } else { 128 }))
        }
    }
}

fn quote_ident(name: &str) -> String {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    match name.chars().all(plain) && !name.starts_with(|c: char| c.is_ascii_digit()) {
        true => name.to_string(),
        false => format!("\"{}\"", name.replace('"', "\"\"")),
    }
}

// --- Beginning an archive ----------------------------------------------------------------------------------------

/// What there is now, and what of it is new.
#[derive(Debug, Serialize)]
struct Begun {
    cluster: String,
    /// All of them, for people.
    repository: String,
    repositories: Vec<BegunRepository>,
    lineage: String,
    start_timeline: u32,
    start_lsn: Option<Lsn>,
    slot: String,
    /// Anywhere.
    created: Vec<&'static str>,
}

#[derive(Debug, Serialize)]
struct BegunRepository {
    name: String,
    url: String,
    created: Vec<&'static str>,
}

impl Begun {
    fn to_text(&self) -> String {
        let new = |created: &[&str], what: &str| if created.contains(&what) { "created" } else { "there already" };
        let start = self.start_lsn.map_or("unknown".to_string(), |lsn| lsn.to_string());
        let places = self.repositories.iter().flat_map(|repository| {
            let BegunRepository { url, created, .. } = repository;
            [
                format!("repository  {url}  ({})", new(created, "repository")),
                format!("lineage     {}/{}  ({})", self.cluster, self.lineage, new(created, "lineage")),
            ]
        });
        let slot = format!("slot        {}  ({})", self.slot, new(&self.created, "slot"));
        let start = format!("The archive starts at {start} on timeline {}.", self.start_timeline);
        places.chain([slot, start]).collect::<Vec<_>>().join("\n")
    }
}

/// A server that has introduced itself, and the slot there.
struct Met {
    connection: Connection,
    login: Login,
    server: Server,
    found: Found,
}

async fn begin(cluster: &ClusterConfig, args: &InitArgs) -> Result<Begun, Failure> {
    let world = setup::world(cluster, Workers::inline());
    let options = setup::options(cluster, None)?;
    let mut met = meet(&world, &options).await?;
    let looks = repositories::look(&cluster.repositories, &cluster.name).await;
    // Any of them may hold what the others have to continue: nothing is written before all have answered.
    for look in &looks {
        look.found.as_ref().map_err(|failure| of_repository(&looks, look, failure.clone()))?;
    }
    let had = repositories::all_lineages(&looks);
    refuse_empty_ones(cluster, &looks, met.server.identity.system_id, args)?;
    let (archive, file) = match (args.new_lineage, args.create) {
        (true, _) => new_lineage(cluster, &options, &looks, &met.server).await?,
        (false, true) if had.is_empty() => adopt(cluster, &options, &looks, &mut met).await?,
        // Nothing to adopt: the same refusals as without --create.
        (false, _) => {
            let holder = holder_of(&looks, met.server.identity.system_id);
            opening::open_lineage(&world_of(cluster, holder), &options, &met.server, met.found.presence()).await?
        }
    };
    let mut begun = Vec::new();
    for look in &looks {
        if look.found.as_ref().is_ok_and(|found| found.missing.is_some()) {
            match args.create || args.new_lineage {
                true => look.backend.create_root().await?,
                false => look.backend.create_missing_root().await?,
            }
        }
        let copied = copy(&world, look, &archive.lineage, &file, &met.server).await;
        copied.map_err(|failure| of_repository(&looks, look, failure))?;
        let found = look.found.as_ref().ok();
        let created = [
            ("repository", found.is_none_or(|found| found.file.is_none())),
            ("lineage", look.file_of(&archive.lineage).is_none()),
        ];
        begun.push(BegunRepository {
            name: look.config.name.clone(),
            url: look.config.url.clone(),
            created: created.into_iter().filter(|(_, is_new)| *is_new).map(|(what, _)| what).collect(),
        });
    }
    let slot_created = ensure_slot(&mut met, &options).await?;
    met.connection.close().await;
    let is_created = |what: &str| begun.iter().any(|repository| repository.created.contains(&what));
    let created =
        [("repository", is_created("repository")), ("lineage", is_created("lineage")), ("slot", slot_created)];
    let urls: Vec<&str> = begun.iter().map(|repository| repository.url.as_str()).collect();
    Ok(Begun {
        cluster: options.name.clone(),
        repository: urls.join(", "),
        lineage: archive.lineage.directory_name(),
        start_timeline: file.start_timeline.0,
        start_lsn: file.start_lsn,
        slot: options.slot.to_string(),
        created: created.into_iter().filter(|(_, is_new)| *is_new).map(|(what, _)| what).collect(),
        repositories: begun,
    })
}

/// Says which repository a failure is about, where there are several.
fn of_repository(looks: &[Look], look: &Look, failure: Failure) -> Failure {
    match looks.len() {
        1 => failure,
        _ => failure.context(format_args!("repository {}", look.config.name)),
    }
}

/// As if a repository were the only one.
fn world_of(cluster: &ClusterConfig, look: &Look) -> World {
    let alone = ClusterConfig { repositories: vec![look.config.clone()], ..cluster.clone() };
    setup::world(&alone, Workers::inline())
}

/// The one that goes on with this system longest; the first when none does.
fn holder_of(looks: &[Look], system_id: SystemId) -> &Look {
    let ordinal = |look: &Look| newest_of(system_id, look.lineages()).map(|(lineage, _)| lineage.ordinal);
    let furthest = looks.iter().map(ordinal).max().flatten();
    let holds_other = |look: &&Look| !look.lineages().is_empty();
    let holder = looks.iter().find(|look| furthest.is_some() && ordinal(look) == furthest);
    holder.or_else(|| looks.iter().find(holds_other)).unwrap_or(&looks[0])
}

/// Nothing at all, where others hold the archive, is an unmounted volume far more often than a new copy.
fn refuse_empty_ones(
    cluster: &ClusterConfig,
    looks: &[Look],
    system_id: SystemId,
    args: &InitArgs,
) -> Result<(), Failure> {
    let is_continued = looks.iter().any(|look| newest_of(system_id, look.lineages()).is_some());
    let is_empty = |look: &&Look| look.readable().is_err();
    match looks.iter().find(is_empty) {
        Some(look) if is_continued && !args.create => {
            let location = look.backend.describe();
            let message = format!("{location} holds nothing, but other repositories hold cluster {}", cluster.name);
            Err(Failure::new(ExitCode::Config, message).hint(
                "is its volume mounted, and is its `url` right? If it is new, or was lost, run `seawall init --create`: the agent copies what the others hold",
            ))
        }
        _ => Ok(()),
    }
}

/// Makes a repository hold the lineage as the others do: `repository.json`, `lineage.json`, history files; what is
/// there stays.
async fn copy(
    world: &World,
    look: &Look,
    lineage: &Lineage,
    file: &LineageFile,
    server: &Server,
) -> Result<(), Failure> {
    let backend = look.backend.as_ref();
    if store::read_repository(backend).await?.is_none() {
        let id = format!("{:08x}{:08x}", world.random_u32(), world.random_u32());
        keep_existing(store::create_repository(backend, world.clock.now(), &id).await.map(drop))?;
    }
    let archive = look.archive(lineage);
    keep_existing(archive.create_lineage(file).await)?;
    startup::archive_histories(&archive, server).await
}

/// What is there counts: another `init`, or our own success that was not answered.
fn keep_existing(created: Result<(), CatalogError>) -> Result<(), Failure> {
    match created {
        Err(CatalogError::Store(error)) if error.is(StoreErrorKind::AlreadyExists) => Ok(()),
        other => Ok(other?),
    }
}

async fn meet(world: &World, options: &ClusterOptions) -> Result<Met, Failure> {
    let logins = world.logins.logins(Purpose::Physical)?;
    let connected = connect::connect_or_explain(world.dialer.as_ref(), &logins, world.logins.wanted()).await?;
    let connect::Connected { mut connection, login, in_recovery } = connected;
    let server = startup::introduce(&mut connection, in_recovery).await?;
    let found = slot::find(world, &mut connection, &login, &options.slot, &server).await?;
    Ok(Met { connection, login, server, found })
}

/// `--create`: what is there is the beginning.
async fn adopt(
    cluster: &ClusterConfig,
    options: &ClusterOptions,
    looks: &[Look],
    met: &mut Met,
) -> Result<(Archive, LineageFile), Failure> {
    let server = &met.server;
    let held_from = match met.found {
        Found::Usable { restart_lsn } => restart_lsn,
        Found::Absent | Found::Lost { .. } | Found::Unknown => server.identity.flush_lsn,
    };
    // WAL of an ancestor may be gone from the server; the child's first segment repeats what it shares with it.
    let begin = server.history.begin_of(server.identity.timeline).unwrap_or(Lsn::ZERO);
    let start = held_from.max(begin).min(server.identity.flush_lsn);
    let server = Server { identity: SystemIdentity { flush_lsn: start, ..server.identity }, ..server.clone() };
    let lineage = Lineage::new(&options.name, server.identity.system_id, 1);
    create_in_first(cluster, options, looks, &server, lineage).await
}

/// `--new-lineage`: apart from everything there is. One that is still empty is taken, so that this can be repeated.
async fn new_lineage(
    cluster: &ClusterConfig,
    options: &ClusterOptions,
    looks: &[Look],
    server: &Server,
) -> Result<(Archive, LineageFile), Failure> {
    let had = repositories::all_lineages(looks);
    if had.is_empty() {
        let locations: Vec<String> = looks.iter().map(|look| look.backend.describe()).collect();
        let message = format!("{} holds no lineage of cluster {} yet", locations.join(" or "), options.name);
        return Err(Failure::new(ExitCode::Config, message).hint("begin the first one with `seawall init --apply`"));
    }
    let ordinal = match newest_of(server.identity.system_id, &had) {
        None => 1,
        Some((lineage, file)) => {
            if is_unused(looks, lineage).await? {
                return Ok((holder_of(looks, lineage.system_id).archive(lineage), file.clone()));
            }
            lineage.ordinal + 1
        }
    };
    let lineage = Lineage::new(&options.name, server.identity.system_id, ordinal);
    create_in_first(cluster, options, looks, server, lineage).await
}

/// Whether nobody has written to a lineage, in any repository.
async fn is_unused(looks: &[Look], lineage: &Lineage) -> Result<bool, Failure> {
    for look in looks.iter().filter(|look| look.file_of(lineage).is_some()) {
        let archive = look.archive(lineage);
        let (_, directories) = archive.wal_listing().await?;
        if !directories.is_empty() || !archive.epochs().await?.is_empty() {
            return Ok(false);
        }
    }
    Ok(true)
}

async fn create_in_first(
    cluster: &ClusterConfig,
    options: &ClusterOptions,
    looks: &[Look],
    server: &Server,
    lineage: Lineage,
) -> Result<(Archive, LineageFile), Failure> {
    let first = &looks[0];
    first.backend.create_root().await?;
    let exists = store::read_repository(first.backend.as_ref()).await?.is_some();
    opening::create_lineage(&world_of(cluster, first), &first.backend, options, server, lineage, exists).await
}

fn newest_of(system_id: SystemId, had: &[(Lineage, LineageFile)]) -> Option<&(Lineage, LineageFile)> {
    had.iter().filter(|(lineage, _)| lineage.system_id == system_id).max_by_key(|(lineage, _)| lineage.ordinal)
}

/// The slot comes last: one that exists means that an archive has begun. True when it is new.
async fn ensure_slot(met: &mut Met, options: &ClusterOptions) -> Result<bool, Failure> {
    match &met.found {
        Found::Usable { .. } => Ok(false),
        Found::Absent | Found::Unknown => {
            slot::create(&mut met.connection, &options.slot).await.map(|existed| !existed)
        }
        Found::Lost { why } => {
            let message = format!("slot {} on {} is lost: {why}", options.slot, met.login.address);
            Err(Failure::new(ExitCode::Finding, message)
                .hint("`seawall run` replaces it and records the gap; until then nothing is archived"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_in_pg_hba_is_this_machines() {
        assert_eq!(source_of("localhost", Some([127, 0, 0, 1].into()), 5432), ("host", "127.0.0.1/32".to_string()));
        let (kind, address) = source_of("does.not.exist.invalid", None, 5432);
        assert_eq!((kind, address.as_str()), ("hostssl", "<this machine's address>/32"));
    }

    #[test]
    fn names_are_quoted_where_sql_needs_it() {
        assert_eq!(quote_ident("seawall"), "seawall");
        assert_eq!(quote_ident("Sea wall\""), "\"Sea wall\"\"\"");
    }
}

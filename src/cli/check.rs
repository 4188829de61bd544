//! Owns: `check`: what stands in the way of archiving, or will, each finding with its cure.
//! Does not own: the questions (`server.rs`), what the agent does about a finding (`agent`).

use std::sync::Arc;

use bytes::Bytes;
use jiff::Timestamp;
use serde::Serialize;

use super::args::{CheckArgs, Global};
use super::server::{self, ServerFacts};
use super::{Verdict, output, setup};
use crate::agent::world::World;
use crate::archiver::Workers;
use crate::catalog::store;
use crate::config::{ClusterConfig, Location};
use crate::error::Failure;
use crate::postgres::Purpose;
use crate::replication::{Address, Connection, Login};
use crate::repository::s3::{Finding, Outcome};
use crate::repository::{Backend, S3Backend, layout};
use crate::wal::SystemId;

/// Times of commits and of gaps are compared by people across machines.
const CLOCK_SKEW_SECONDS_MAX: f64 = 2.0;
/// Less than this on the repository's volume is hours, not days, on a busy server.
const FREE_BYTES_MIN: u64 = 10 << 30;

#[derive(Debug, Serialize)]
struct Answer {
    clusters: Vec<ClusterCheck>,
}

#[derive(Debug, Serialize)]
struct ClusterCheck {
    name: String,
    checks: Vec<Check>,
}

#[derive(Debug, Serialize)]
struct Check {
    level: Level,
    what: &'static str,
    found: String,
    cure: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Level {
    Ok,
    /// Works, and will not always.
    Warning,
    /// In the way of archiving.
    Problem,
}

impl Check {
    fn ok(what: &'static str, found: impl Into<String>) -> Check {
        Check { level: Level::Ok, what, found: found.into(), cure: None }
    }

    fn warning(what: &'static str, found: impl Into<String>, cure: impl Into<String>) -> Check {
        Check { level: Level::Warning, what, found: found.into(), cure: Some(cure.into()) }
    }

    fn problem(what: &'static str, found: impl Into<String>, cure: impl Into<String>) -> Check {
        Check { level: Level::Problem, what, found: found.into(), cure: Some(cure.into()) }
    }

    fn failed(what: &'static str, failure: Failure) -> Check {
        Check { level: Level::Problem, what, found: failure.message, cure: failure.hint }
    }
}

pub fn run(global: &Global, _args: &CheckArgs) -> Result<Verdict, Failure> {
    let loaded = setup::load(global)?;
    let mut general = vec![match &loaded.path {
        Some(path) => Check::ok("configuration", format!("{} is well-formed", path.display())),
        None => Check::ok("configuration", "given by flags and variables"),
    }];
    for warning in &loaded.warnings {
        general.push(Check::warning("configuration", warning, "see the message"));
    }
    let clusters = setup::clusters(global)?;
    let checked = setup::block_on(async {
        let mut checked = Vec::new();
        for cluster in &clusters {
            checked.push(ClusterCheck { name: cluster.name.clone(), checks: examine(cluster).await? });
        }
        Ok::<_, Failure>(checked)
    });
    let mut clusters = checked??;
    if let Some(first) = clusters.first_mut() {
        first.checks.splice(0..0, general);
    }
    let is_fine = clusters.iter().all(|cluster| cluster.checks.iter().all(|check| check.level == Level::Ok));
    match global.json {
        true => output::json(&Answer { clusters }),
        false => output::text(&clusters.iter().map(to_text).collect::<Vec<_>>().join("\n\n")),
    }
    Ok(if is_fine { Verdict::Fine } else { Verdict::Finding })
}

fn to_text(cluster: &ClusterCheck) -> String {
    let mut lines = vec![format!("cluster {}", cluster.name)];
    for check in &cluster.checks {
        let level = match check.level {
            Level::Ok => "ok     ",
            Level::Warning => "warning",
            Level::Problem => "PROBLEM",
        };
        lines.push(format!("  {level}  {:<22} {}", check.what, check.found));
        lines.extend(check.cure.iter().map(|cure| format!("           {:<22} → {cure}", "")));
    }
    let bad = cluster.checks.iter().filter(|check| check.level != Level::Ok).count();
    lines.push(match bad {
        0 => "  everything is as it should be".to_string(),
        1 => "  1 finding".to_string(),
        count => format!("  {count} findings"),
    });
    lines.join("\n")
}

async fn examine(cluster: &ClusterConfig) -> Result<Vec<Check>, Failure> {
    let world = setup::world(cluster, Workers::inline());
    let slot = setup::slot_name(cluster)?;
    let mut checks = hosts(&world).await;
    let server = server::ask(&world, &slot).await;
    match &server {
        Ok(facts) => checks.extend(server_checks(cluster, facts, world.clock.now())),
        Err(failure) => checks.push(Check::failed("SQL session", failure.clone())),
    }
    checks.extend(repository_checks(cluster, &world, server.as_ref().ok().and_then(|facts| facts.system_id)).await);
    checks.push(restore_path(cluster));
    Ok(checks)
}

/// A replication session on every host: reachable, HBA, password, role.
async fn hosts(world: &World) -> Vec<Check> {
    let logins = match world.logins.logins(Purpose::Physical) {
        Ok(logins) => logins,
        Err(failure) => return vec![Check::failed("connection string", failure)],
    };
    let mut checks = Vec::new();
    for login in &logins {
        checks.push(match replication_session(world, login).await {
            Ok(check) => check,
            Err(failure) => Check::failed("replication session", failure),
        });
    }
    checks
}

async fn replication_session(world: &World, login: &Login) -> Result<Check, Failure> {
    let mut connection = Connection::open(world.dialer.as_ref(), login).await?;
    let identity = connection.identify_system().await?;
    let encrypted = connection.encrypted();
    let major = connection.server_major();
    connection.close().await;
    let found = format!(
        "{}: PostgreSQL {major}, system {}, timeline {}, at {}{}",
        login.address,
        identity.system_id,
        identity.timeline,
        identity.flush_lsn,
        if encrypted { ", TLS" } else { "" }
    );
    let is_open = match &login.address {
        Address::Unix { .. } => false,
        Address::Tcp { host, ip, .. } => {
            !encrypted && !ip.is_some_and(|ip| ip.is_loopback()) && host != "localhost" && host != "127.0.0.1"
        }
    };
    Ok(match is_open {
        true => {
            Check::warning("replication session", found + ", not encrypted", "use sslmode=require and hostssl lines")
        }
        false => Check::ok("replication session", found),
    })
}

fn server_checks(cluster: &ClusterConfig, facts: &ServerFacts, now: Timestamp) -> Vec<Check> {
    let mut checks = vec![Check::ok("SQL session", format!("{}: PostgreSQL {}", facts.login.address, facts.version))];
    checks.push(role(cluster, facts));
    checks.push(wal_level(facts));
    checks.push(headroom("max_wal_senders", facts, facts.wal_senders_used, facts.wal_sender.is_some()));
    checks.push(headroom("max_replication_slots", facts, facts.slots_used, facts.slot.is_some()));
    checks.push(slot_limit(facts));
    checks.push(sender_timeout(facts));
    checks.push(switched_on("full_page_writes", facts, "torn pages after a crash cannot be repaired from WAL without"));
    checks.push(switched_on("fsync", facts, "a crash of the server's machine can destroy the cluster without"));
    checks.push(synchronous(facts));
    checks.extend(idle_timeout(facts));
    checks.push(slot(cluster, facts));
    checks.extend(clock(facts, now));
    checks
}

fn role(cluster: &ClusterConfig, facts: &ServerFacts) -> Check {
    let user = cluster.postgres.user();
    match (facts.may_replicate, facts.monitors) {
        (Some(false), _) => Check::problem(
            "role",
            format!("{user} has no REPLICATION attribute"),
            format!("ALTER ROLE \"{user}\" REPLICATION;"),
        ),
        (_, Some(false)) => {
            Check::ok("role", format!("{user} may replicate (not in pg_monitor: some facts stay unknown)"))
        }
        _ => Check::ok("role", format!("{user} may replicate and monitor")),
    }
}

fn wal_level(facts: &ServerFacts) -> Check {
    match facts.setting("wal_level") {
        Some(level @ ("replica" | "logical")) => Check::ok("wal_level", level),
        level => Check::problem(
            "wal_level",
            level.unwrap_or("unknown"),
            "ALTER SYSTEM SET wal_level = 'replica'; and restart the server",
        ),
    }
}

/// One must be free for us, unless one is ours already.
fn headroom(name: &'static str, facts: &ServerFacts, used: Option<u64>, has_ours: bool) -> Check {
    let limit = facts.setting(name).and_then(|text| text.parse::<u64>().ok());
    let (Some(limit), Some(used)) = (limit, used) else { return Check::ok(name, "unknown") };
    let found = format!("{used} of {limit} in use");
    let cure = format!("ALTER SYSTEM SET {name} = {}; and restart the server", limit.max(used) + 5);
    match limit.saturating_sub(used) {
        0 if !has_ours => Check::problem(name, found, cure),
        0 => Check::warning(name, found, cure),
        _ => Check::ok(name, found),
    }
}

fn slot_limit(facts: &ServerFacts) -> Check {
    const WHAT: &str = "max_slot_wal_keep_size";
    match facts.setting(WHAT) {
        Some("-1") => Check::warning(
            WHAT,
            "-1: while the archive is down, WAL fills the server's disk without a limit",
            "ALTER SYSTEM SET max_slot_wal_keep_size = '64GB'; SELECT pg_reload_conf();  (less than the disk has free)",
        ),
        value => Check::ok(WHAT, value.unwrap_or("unknown")),
    }
}

fn sender_timeout(facts: &ServerFacts) -> Check {
    const WHAT: &str = "wal_sender_timeout";
    match facts.setting(WHAT) {
        Some("0") => Check::warning(
            WHAT,
            "0: a dead connection holds the slot until TCP gives up",
            "ALTER SYSTEM SET wal_sender_timeout = '60s'; SELECT pg_reload_conf();",
        ),
        value => Check::ok(WHAT, value.unwrap_or("unknown")),
    }
}

fn switched_on(what: &'static str, facts: &ServerFacts, why: &str) -> Check {
    match facts.setting(what) {
        Some("off") => Check::warning(
            what,
            format!("off: {why}"),
            format!("ALTER SYSTEM SET {what} = on; SELECT pg_reload_conf();"),
        ),
        value => Check::ok(what, value.unwrap_or("unknown")),
    }
}

/// Whoever reports what it has flushed and is on the list holds commits back.
fn synchronous(facts: &ServerFacts) -> Check {
    const WHAT: &str = "synchronous_standbys";
    let names = facts.setting("synchronous_standby_names").unwrap_or_default();
    let sync_state = facts.wal_sender.as_ref().and_then(|sender| sender.sync_state.as_deref());
    match sync_state {
        Some(state @ ("sync" | "quorum")) => Check::warning(
            WHAT,
            format!("commits wait for this archive ({state})"),
            "if that is not wanted, name the standbys in synchronous_standby_names",
        ),
        Some("potential") => Check::warning(
            WHAT,
            "commits come to wait for this archive when another standby is gone (potential)",
            "if that is not wanted, name the standbys in synchronous_standby_names",
        ),
        _ if names.contains('*') => Check::warning(
            WHAT,
            format!("synchronous_standby_names = '{names}' matches everybody: this archive too becomes one"),
            "name the standbys instead of `*`",
        ),
        _ if names.is_empty() => Check::ok(WHAT, "none"),
        _ => Check::ok(WHAT, names),
    }
}

fn idle_timeout(facts: &ServerFacts) -> Option<Check> {
    const WHAT: &str = "idle_replication_slot_timeout";
    let value = facts.setting(WHAT)?;
    Some(match value {
        "0" => Check::ok("idle slot timeout", "0 (never)"),
        value => Check::warning(
            "idle slot timeout",
            format!("{value}: an agent that is down this long loses its slot"),
            format!("ALTER SYSTEM SET {WHAT} = 0; SELECT pg_reload_conf();  (or more than the longest outage)"),
        ),
    })
}

fn slot(cluster: &ClusterConfig, facts: &ServerFacts) -> Check {
    const WHAT: &str = "slot";
    let name = &cluster.slot;
    let Some(slot) = &facts.slot else {
        return Check::ok(WHAT, format!("{name} does not exist yet: `seawall run` creates it"));
    };
    let status = slot.wal_status.as_deref().unwrap_or("nothing reserved");
    match status {
        _ if slot.slot_type != "physical" => Check::problem(
            WHAT,
            format!("{name} is a {} slot", slot.slot_type),
            "choose another name for `slot`: streaming WAL needs a physical one",
        ),
        _ if slot.is_lost() => {
            let why = slot.invalidation_reason.as_deref().unwrap_or("its WAL was removed");
            let cure = "`seawall run` replaces it and records the gap; take a base backup after that";
            Check::problem(WHAT, format!("{name} is lost: {why}"), cure)
        }
        "unreserved" => Check::problem(
            WHAT,
            format!("{name} may lose its WAL at the next checkpoint"),
            "is the agent running, and does the repository keep up? Raise max_slot_wal_keep_size meanwhile",
        ),
        _ => {
            let active = if slot.active { "in use" } else { "not in use" };
            Check::ok(WHAT, format!("{name}: {status}, {active}"))
        }
    }
}

fn clock(facts: &ServerFacts, now: Timestamp) -> Option<Check> {
    let skew = now.duration_since(facts.now?).as_secs_f64();
    Some(match skew.abs() > CLOCK_SKEW_SECONDS_MAX {
        true => Check::warning(
            "clock",
            format!(
                "this machine is {:.1} s {} the server",
                skew.abs(),
                if skew > 0.0 { "ahead of" } else { "behind" }
            ),
            "run an NTP client on both: restore targets and the loss shown by `status` are times",
        ),
        false => Check::ok("clock", "agrees with the server"),
    })
}

// --- Repository --------------------------------------------------------------------------------------------------

async fn repository_checks(cluster: &ClusterConfig, world: &World, system_id: Option<SystemId>) -> Vec<Check> {
    let mut checks = vec![contents(cluster, world, system_id).await];
    let repository = &cluster.repositories[0];
    match &repository.location {
        Location::Local(_) => checks.push(match probe(&world.backend, world.random_u32()).await {
            Ok(()) => Check::ok("repository writable", format!("{} stores, reads and deletes", repository.url)),
            Err(failure) => Check::failed("repository writable", failure),
        }),
        Location::S3(options) => {
            let findings = S3Backend::open(options.clone()).survey(world.random_u32()).await;
            checks.extend(findings.into_iter().map(store_check));
        }
    }
    checks.extend(free_space(&repository.location));
    checks
}

fn store_check(finding: Finding) -> Check {
    match finding.outcome {
        Outcome::Good(found) => Check::ok(finding.what, found),
        Outcome::Fair { found, cure } => Check::warning(finding.what, found, cure),
        Outcome::Bad(error) => Check::failed(finding.what, error.into()),
    }
}

async fn contents(cluster: &ClusterConfig, world: &World, system_id: Option<SystemId>) -> Check {
    const WHAT: &str = "repository";
    let backend = world.backend.as_ref();
    let look = async {
        let repository = store::read_repository(backend).await?;
        let lineages = match repository {
            Some(_) => store::lineages(backend, &cluster.name).await?,
            None => Vec::new(),
        };
        Ok::<_, store::CatalogError>(lineages)
    };
    let lineages = match look.await {
        Ok(lineages) => lineages,
        Err(error) => return Check::failed(WHAT, error.into()),
    };
    let names: Vec<String> = lineages.iter().map(|(lineage, _)| lineage.directory_name()).collect();
    let Some(system_id) = system_id else { return Check::ok(WHAT, format!("lineages: {}", names.join(", "))) };
    match lineages.iter().any(|(lineage, _)| lineage.system_id == system_id) {
        true => Check::ok(WHAT, format!("holds system {system_id} for cluster {}", cluster.name)),
        false if names.is_empty() => {
            Check::ok(WHAT, format!("holds nothing for cluster {} yet: `seawall run` begins", cluster.name))
        }
        false => Check::problem(
            WHAT,
            format!(
                "holds cluster {} of other systems ({}), the server is {system_id}",
                cluster.name,
                names.join(", ")
            ),
            "is this the right server, and the right repository? If it replaces the old one: `seawall init --new-lineage`",
        ),
    }
}

/// Stores, reads and deletes a small object.
async fn probe(backend: &Arc<dyn Backend>, random: u32) -> Result<(), Failure> {
    let key = layout::probe(random);
    let body = Bytes::from_static(b"seawall check: may be deleted\n");
    backend.put_new(&key, std::slice::from_ref(&body)).await?;
    let read = backend.fetch(&key, 0..body.len() as u64).await;
    backend.delete(&key).await?;
    match read? == body {
        true => Ok(()),
        false => Err(Failure::new(crate::error::ExitCode::Data, "the store gave back other bytes than it was given")),
    }
}

fn free_space(location: &Location) -> Option<Check> {
    let Location::Local(path) = location else { return None };
    let found = rustix::fs::statvfs(path).ok()?;
    let free = found.f_bavail.saturating_mul(found.f_frsize);
    let text = format!("{} on the repository's volume", output::size(free));
    Some(match free < FREE_BYTES_MIN {
        true => Check::warning(
            "free space",
            text,
            "make room: a full repository stops archiving, and WAL stays on the server",
        ),
        false => Check::ok("free space", text),
    })
}

/// The line to put into postgresql.conf of a restored server.
fn restore_path(cluster: &ClusterConfig) -> Check {
    const WHAT: &str = "restore path";
    match std::env::current_exe() {
        Ok(path) => {
            let repository = &cluster.repositories[0].url;
            let name = &cluster.name;
            let command = format!("{} --repository {repository} --cluster {name} wal-get %f %p", path.display());
            Check::ok(WHAT, format!("restore_command = '{command}'"))
        }
        Err(error) => Check::warning(
            WHAT,
            format!("could not tell where this program is: {error}"),
            "use an absolute path in restore_command: servers have a short PATH",
        ),
    }
}

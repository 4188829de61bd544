//! Owns: `check`: what stands in the way of archiving, or will, each finding with its cure.
//! Does not own: the questions (`server.rs`), repositories (`check/archive.rs`), what the agent does about a finding (`agent`).

mod archive;

use std::path::Path;

use jiff::Timestamp;
use serde::Serialize;

use super::args::{CheckArgs, Global};
use super::server::{self, ServerFacts};
use super::{Verdict, output, setup};
use crate::agent::world::World;
use crate::archiver::Workers;
use crate::config::{ClusterConfig, RetentionConfig};
use crate::error::Failure;
use crate::postgres::{Purpose, connect};
use crate::replication::{Connection, Login};
use crate::schedule::Line;

/// Times of commits and of gaps are compared by people across machines.
const CLOCK_SKEW_SECONDS_MAX: f64 = 2.0;

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
            let checks = examine(cluster, loaded.path.as_deref()).await?;
            checked.push(ClusterCheck { name: cluster.name.clone(), checks });
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

async fn examine(cluster: &ClusterConfig, config: Option<&Path>) -> Result<Vec<Check>, Failure> {
    let world = setup::world(cluster, Workers::inline());
    let slot = setup::slot_name(cluster)?;
    let mut checks = hosts(&world).await;
    checks.extend(copied(cluster, &world).await);
    let server = server::ask(&world, &slot).await;
    match &server {
        Ok(facts) => checks.extend(server_checks(cluster, facts, world.clock.now())),
        Err(failure) => checks.push(Check::failed("SQL session", failure.clone())),
    }
    let system_id = server.as_ref().ok().and_then(|facts| facts.system_id);
    checks.extend(archive::examine(cluster, system_id, world.random_u32()).await);
    checks.extend(times(cluster));
    checks.push(archive::restore_path(cluster, config));
    Ok(checks)
}

/// When backups are taken, and how long they are kept: left open, one backup for ever and a repository that only grows.
fn times(cluster: &ClusterConfig) -> [Check; 2] {
    const SCHEDULE: &str = "schedule";
    const RETENTION: &str = "retention";
    let table = &cluster.name;
    let schedule = match &cluster.schedule.full {
        _ if !cluster.backup.automatic => Check::warning(
            SCHEDULE,
            "the agent takes no backups (`backup.automatic = false`)",
            "let it, or see that `seawall backup` runs regularly",
        ),
        None => Check::warning(
            SCHEDULE,
            "no backups but the first one and one behind a gap: a restore replays all WAL since",
            format!("add [clusters.{table}.backup] full = \"0 2 * * 0\""),
        ),
        Some(line @ Line::Cron(_)) => {
            let zone = cluster.schedule.timezone.iana_name().unwrap_or("UTC");
            Check::ok(SCHEDULE, format!("{line} ({zone})"))
        }
        Some(line) => Check::ok(SCHEDULE, line.to_string()),
    };
    let retention = match &cluster.retention {
        RetentionConfig { policy: None, .. } => Check::warning(
            RETENTION,
            "nothing is ever removed: the repositories grow without end",
            format!("add [clusters.{table}.retention] window = \"14d\""),
        ),
        RetentionConfig { policy: Some(policy), automatic: true } => Check::ok(RETENTION, policy.to_string()),
        RetentionConfig { policy: Some(policy), automatic: false } => {
            Check::ok(RETENTION, format!("{policy}; only when `seawall expire --apply` is run"))
        }
    };
    [schedule, retention]
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

/// The standby backups are taken from, where one is named.
async fn copied(cluster: &ClusterConfig, world: &World) -> Option<Check> {
    const WHAT: &str = "backup.from";
    let from = setup::backups(cluster).from?;
    let examined = async {
        let logins = from.logins(Purpose::Physical)?;
        let connected = connect::connect_or_explain(world.dialer.as_ref(), &logins, from.wanted()).await?;
        let connect::Connected { mut connection, login, in_recovery } = connected;
        let identity = connection.identify_system().await?;
        connection.close().await;
        let kind = if in_recovery { "a standby" } else { "not a standby" };
        Ok::<_, Failure>(format!("{}: {kind} of system {}", login.address, identity.system_id))
    };
    Some(examined.await.map_or_else(|failure| Check::failed(WHAT, failure), |found| Check::ok(WHAT, found)))
}

async fn replication_session(world: &World, login: &Login) -> Result<Check, Failure> {
    let mut connection = Connection::open(world.dialer.as_ref(), login).await?;
    let identity = connection.identify_system().await?;
    let tls = connection.tls().map(|tls| format!(", {} ({})", tls.version, tls.verified));
    let major = connection.server_major();
    connection.close().await;
    let found = format!(
        "{}: PostgreSQL {major}, system {}, timeline {}, at {}{}",
        login.address,
        identity.system_id,
        identity.timeline,
        identity.flush_lsn,
        tls.as_deref().unwrap_or_default()
    );
    let is_open = tls.is_none() && login.address.is_remote();
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
    checks.push(room_for_backup(cluster, facts));
    checks.extend(server_compression(cluster, facts));
    checks.extend(data_checksums(facts));
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

/// A base backup is one more walsender while it lasts, beside the stream.
fn room_for_backup(cluster: &ClusterConfig, facts: &ServerFacts) -> Check {
    const WHAT: &str = "base backup";
    if cluster.backup.from.is_some() {
        return Check::ok(WHAT, "taken from another server (`backup.from`)");
    }
    if facts.may_replicate == Some(false) {
        return Check::problem(WHAT, "the role may not take one", "see `role`");
    }
    let limit = facts.setting("max_wal_senders").and_then(|text| text.parse::<u64>().ok());
    let (Some(limit), Some(used)) = (limit, facts.wal_senders_used) else { return Check::ok(WHAT, "unknown") };
    let streams = u64::from(facts.wal_sender.is_none());
    match limit.saturating_sub(used + streams) {
        0 => Check::problem(
            WHAT,
            format!("max_wal_senders = {limit} leaves none for it beside the stream"),
            format!("ALTER SYSTEM SET max_wal_senders = {}; and restart the server", limit + 5),
        ),
        spare => Check::ok(WHAT, format!("the role may take one, {spare} walsender(s) to spare")),
    }
}

fn server_compression(cluster: &ClusterConfig, facts: &ServerFacts) -> Option<Check> {
    const WHAT: &str = "backup compression";
    let method = cluster.backup.compression?;
    let major: u32 = facts.version.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()?;
    Some(match major < 15 {
        true => Check::problem(
            WHAT,
            format!("PostgreSQL {major} cannot compress what it sends ({method})"),
            "remove backup.compression: what is stored is compressed here in any case",
        ),
        false => Check::ok(WHAT, format!("{method} on the server, where its build has it")),
    })
}

/// With them the server checks every page it sends.
fn data_checksums(facts: &ServerFacts) -> Option<Check> {
    const WHAT: &str = "data_checksums";
    Some(match facts.setting(WHAT)? {
        // Advice, not a finding: it cannot be changed while the server runs.
        "off" => Check::ok(
            WHAT,
            "off: a damaged page would be backed up unnoticed (`pg_checksums --enable`, server stopped)",
        ),
        value => Check::ok(WHAT, value),
    })
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

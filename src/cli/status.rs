//! Owns: `status`: what is true of each cluster now, from its repository and, where it answers, its server.
//! Does not own: what the agent knows by itself: where one answers, its word is shown (`source` says what was asked).

use jiff::Timestamp;
use serde::Serialize;

use super::args::{Global, StatusArgs};
use super::repositories::{self, Copy, Look};
use super::server::{self, ServerFacts};
use super::{Verdict, list, output, restorable, setup};
use crate::agent::backup::planned::{self, Planned};
use crate::archiver::Workers;
use crate::catalog::shelf::{Outcome, Shelved};
use crate::catalog::{BackupRecord, Catalog, Holdings};
use crate::config::{ClusterConfig, HttpConfig};
use crate::continuity::{self, GapState, Run};
use crate::error::Failure;
use crate::monitor::backup::{BackupEntry, BackupRunning, NextBackup};
use crate::monitor::retention::RetentionStatus;
use crate::monitor::status::{Moment, Window};
use crate::monitor::{self, client};
use crate::receiver::Acknowledge;
use crate::repository::layout::Lineage;
use crate::restore::reach::{self, Ends, Interval, KnownBackup, Point, Reach};
use crate::schedule::Next;
use crate::verify::record::{self, LastVerify};
use crate::wal::{Lsn, Proof, SystemId};

/// A loss of more than this, while the agent streams, is worth a word: a tail's upload starts after seconds.
const RPO_SECONDS_MAX: f64 = 60.0;
/// A repository this many segments behind the furthest one is worth a word: less is the segment under way.
const SEGMENTS_BEHIND_MAX: u64 = 2;

#[derive(Debug, Serialize)]
struct Answer {
    source: &'static str,
    clusters: Vec<ClusterStatus>,
}

#[derive(Debug, Default, Serialize)]
struct ClusterStatus {
    name: String,
    system_id: Option<String>,
    timeline: Option<u32>,
    /// `streaming`, `stopped` (nobody streams from the slot), or unknown.
    state: Option<&'static str>,
    acknowledge: &'static str,
    server_lsn: Option<Lsn>,
    received_lsn: Option<Lsn>,
    proven_lsn: Option<Lsn>,
    durable_lsn: Option<Lsn>,
    /// The last durable one.
    #[serde(skip)]
    last_commit: Option<Timestamp>,
    acknowledged_lsn: Option<Lsn>,
    rpo_seconds: Option<f64>,
    lag_bytes: Option<u64>,
    repositories: Vec<RepositoryStatus>,
    slot: SlotStatus,
    /// The newest complete one.
    last_backup: Option<BackupEntry>,
    /// Under way: taken by whom, only an agent that takes it can tell more.
    backup_running: Option<BackupRunning>,
    /// Only an agent that expires can tell.
    retention: Option<RetentionStatus>,
    /// As the schedule and what is there have it; an agent that is gone takes none.
    next_backup: Option<NextBackup>,
    last_verify: Option<LastVerify>,
    /// What can be restored without a hole up to its end: of the newest line, the newest part.
    window: Option<Window>,
    /// Open ones.
    gaps: Option<usize>,
    health: Health,
    reasons: Vec<String>,
}

#[derive(Debug, Serialize)]
struct RepositoryStatus {
    name: String,
    frontier_lsn: Option<Lsn>,
    /// `ok`, `behind`, `incomplete` (others hold what it lacks), `empty` or `unavailable`.
    state: &'static str,
}

#[derive(Debug, Default, Serialize)]
struct SlotStatus {
    name: String,
    wal_status: Option<String>,
    safe_wal_bytes: Option<i64>,
    hours_left: Option<f64>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Health {
    #[default]
    Ok,
    Degraded,
    Failing,
}

impl Health {
    fn word(self) -> &'static str {
        match self {
            Health::Ok => "ok",
            Health::Degraded => "degraded",
            Health::Failing => "failing",
        }
    }
}

impl ClusterStatus {
    /// A reason not to be content.
    fn finding(&mut self, health: Health, reason: impl Into<String>) {
        self.health = self.health.max(health);
        self.reasons.push(reason.into());
    }
}

pub fn run(global: &Global, _args: &StatusArgs) -> Result<Verdict, Failure> {
    let (clusters, http) = setup::clusters_and_http(global)?;
    if let Some(verdict) = from_agent(global, &clusters, http)? {
        return Ok(verdict);
    }
    let clusters = setup::block_on(async {
        let mut found = Vec::new();
        for cluster in &clusters {
            found.push(status(cluster).await?);
        }
        Ok::<_, Failure>(found)
    })??;
    let is_fine = clusters.iter().all(|cluster| cluster.health == Health::Ok);
    match global.json {
        true => output::json(&Answer { source: "repository and server", clusters }),
        false => clusters.iter().for_each(|cluster| output::text(&cluster.to_text())),
    }
    Ok(if is_fine { Verdict::Fine } else { Verdict::Finding })
}

/// What a running agent says of these clusters, where one listens and serves all of them.
fn from_agent(
    global: &Global,
    clusters: &[ClusterConfig],
    http: Option<HttpConfig>,
) -> Result<Option<Verdict>, Failure> {
    let Some(http) = http else { return Ok(None) };
    let asked = setup::block_on(client::ask(http.listen, http.token_file.as_deref()))?;
    let mut answer = match asked {
        Ok(answer) => answer,
        Err(why) => {
            tracing::warn!("no agent answers at {}: {why}; asking repository and server", http.listen);
            return Ok(None);
        }
    };
    answer.clusters.retain(|status| clusters.iter().any(|cluster| cluster.name == status.name));
    if answer.clusters.len() != clusters.len() {
        tracing::warn!("the agent at {} serves other clusters; asking repository and server", http.listen);
        return Ok(None);
    }
    for (status, cluster) in answer.clusters.iter_mut().filter_map(|status| {
        let cluster = clusters.iter().find(|cluster| cluster.name == status.name)?;
        status.window.is_none().then_some((status, cluster))
    }) {
        let system_id = status.system_id.as_ref().and_then(|id| id.parse().ok());
        status.window = setup::block_on(window_in_repositories(cluster, system_id))?;
    }
    let is_fine = answer.clusters.iter().all(|cluster| cluster.health == monitor::status::Health::Ok);
    match global.json {
        true => output::json_as_it_is(&answer),
        false => {
            output::note(format_args!("as the agent at {} says", http.listen));
            answer.clusters.iter().for_each(|cluster| output::text(&cluster.to_text()));
        }
    }
    Ok(Some(if is_fine { Verdict::Fine } else { Verdict::Finding }))
}

async fn status(cluster: &ClusterConfig) -> Result<ClusterStatus, Failure> {
    let world = setup::world(cluster, Workers::inline());
    let slot = setup::slot_name(cluster)?;
    let mut status = ClusterStatus {
        name: cluster.name.clone(),
        acknowledge: match cluster.acknowledge {
            Acknowledge::Repository => "repository",
            Acknowledge::Spool => "spool",
        },
        slot: SlotStatus { name: slot.to_string(), ..SlotStatus::default() },
        ..ClusterStatus::default()
    };
    let server = server::ask(&world, &slot).await;
    match &server {
        Ok(facts) => add_server(&mut status, facts),
        Err(failure) => status.finding(Health::Degraded, format!("the server does not answer: {failure}")),
    }
    let system_id = server.as_ref().ok().and_then(|facts| facts.system_id);
    let looks = repositories::look(&cluster.repositories, &cluster.name).await;
    add_repositories(&mut status, &looks, cluster, system_id).await;
    add_loss(&mut status, world.clock.now());
    Ok(status)
}

fn add_server(status: &mut ClusterStatus, facts: &ServerFacts) {
    status.system_id = facts.system_id.map(|id| id.to_string());
    status.timeline = facts.timeline.map(|timeline| timeline.0);
    status.server_lsn = facts.flush_lsn;
    let name = status.slot.name.clone();
    let Some(slot) = &facts.slot else {
        status.state = Some("stopped");
        return status.finding(Health::Failing, format!("there is no slot {name} on the server: nobody archives"));
    };
    status.slot.wal_status = slot.wal_status.clone();
    status.slot.safe_wal_bytes = slot.safe_wal_bytes;
    match &facts.wal_sender {
        Some(sender) => {
            status.state = Some("streaming");
            status.received_lsn = sender.write_lsn;
            status.acknowledged_lsn = sender.flush_lsn.filter(|lsn| *lsn != Lsn::ZERO);
            match sender.sync_state.as_deref() {
                Some(kind @ ("sync" | "quorum")) => status
                    .finding(Health::Degraded, format!("it is a synchronous standby ({kind}): commits wait for it")),
                Some("potential") => status.finding(
                    Health::Degraded,
                    "it is a potential synchronous standby: commits wait for it when another one is gone",
                ),
                _ => {}
            }
        }
        None if slot.active => status.state = Some("streaming"),
        None => {
            status.state = Some("stopped");
            status.finding(Health::Failing, format!("nobody streams from slot {name}"));
        }
    }
    match slot.wal_status.as_deref() {
        _ if slot.is_lost() => {
            let why = slot.invalidation_reason.as_deref().unwrap_or("its WAL was removed");
            status.finding(Health::Failing, format!("slot {name} is lost: {why}"));
        }
        Some("unreserved") => {
            status.finding(Health::Failing, format!("slot {name} may lose its WAL at the next checkpoint"));
        }
        _ => {}
    }
}

/// The lineage that counts: the server's newest, where the server is known.
fn newest(looks: &[Look], system_id: Option<SystemId>) -> Option<Lineage> {
    let lineages = repositories::all_lineages(looks).into_iter();
    let ours = lineages.filter(|(lineage, _)| system_id.is_none_or(|id| lineage.system_id == id));
    ours.max_by_key(|(lineage, file)| (file.created, lineage.ordinal)).map(|(lineage, _)| lineage)
}

async fn add_repositories(
    status: &mut ClusterStatus,
    looks: &[Look],
    cluster: &ClusterConfig,
    system_id: Option<SystemId>,
) {
    let required = cluster.required;
    let lineage = newest(looks, system_id);
    let (copies, unread) = match &lineage {
        Some(lineage) => repositories::copies(looks, lineage).await,
        None => (Vec::new(), Vec::new()),
    };
    let is_enough = copies.len() >= required.max(1);
    for look in looks {
        let name = &look.config.name;
        let failure = unread.iter().find(|unread| unread.repository == *name).map(|unread| unread.failure.clone());
        let state = match look.readable().err().or(failure) {
            _ if copies.iter().any(|copy| copy.repository == name) => "ok",
            Some(failure) => {
                // Without the others nothing more is made durable: with them, only the second copy is missing.
                let health = if is_enough { Health::Degraded } else { Health::Failing };
                status.finding(health, format!("repository {name} cannot be read: {failure}"));
                let answers = look.found.as_ref().is_ok_and(|found| found.missing.is_none());
                if answers && look.lineages().is_empty() { "empty" } else { "unavailable" }
            }
            None => {
                status.finding(Health::Failing, format!("repository {name} holds nothing of this cluster"));
                "empty"
            }
        };
        status.repositories.push(RepositoryStatus { name: name.clone(), frontier_lsn: None, state });
    }
    let Some(lineage) = lineage.filter(|_| !copies.is_empty()) else { return };
    status.last_verify = record::last_over(copies.iter().map(|copy| copy.catalog.ledger.as_slice()));
    if let Some(reason) = status.last_verify.and_then(|last| last.reason()) {
        status.finding(Health::Degraded, reason);
    }
    let backups = add_backups(status, looks, cluster, &lineage).await;
    match repositories::union(&lineage, &copies) {
        Ok(all) => {
            add_union(status, &all, &copies, required);
            add_window(status, &all, &backups);
        }
        Err(failure) => status.finding(Health::Failing, failure.message),
    }
}

/// Without a base backup the WAL alone restores nothing.
async fn add_backups(
    status: &mut ClusterStatus,
    looks: &[Look],
    cluster: &ClusterConfig,
    lineage: &Lineage,
) -> Vec<KnownBackup> {
    let (shelves, _) = list::shelves(looks, lineage).await;
    let all = list::union(&shelves);
    let name = lineage.directory_name();
    let entry = |shelved: &Shelved| BackupEntry::new(&status.name, &name, shelved);
    status.last_backup = all.iter().rfind(|shelved| shelved.outcome == Outcome::Complete).map(entry);
    let running = all.iter().rfind(|shelved| shelved.outcome == Outcome::Running).map(|shelved| BackupRunning {
        id: Some(shelved.id.to_string()),
        phase: "running".to_string(),
        ..BackupRunning::default()
    });
    status.backup_running = running;
    if cluster.backup.automatic {
        let now = Timestamp::now();
        let planned = Planned::new(cluster.schedule.clone(), &cluster.name, now);
        let held = shelves.iter().filter(|(_, shelf)| shelf.complete().next().is_some());
        let nexts: Vec<Next> =
            held.filter_map(|(_, shelf)| planned.next(&name, shelf, now, status.server_lsn)).collect();
        status.next_backup = planned::earliest(nexts.iter());
    }
    let under_way = status.backup_running.as_ref().map_or("", |_| "; one is being taken");
    let lacking: Vec<&str> = shelves
        .iter()
        .filter(|(_, shelf)| shelf.complete().next().is_none())
        .map(|(look, _)| look.config.name.as_str())
        .collect();
    match (&status.last_backup, &lacking[..]) {
        (_, _) if shelves.is_empty() => {}
        (None, _) => {
            status.finding(Health::Degraded, format!("there is no base backup: nothing can be restored{under_way}"));
        }
        (Some(_), []) => {}
        (Some(_), lacking) => {
            let text = format!("there is no base backup in repository {}{under_way}", lacking.join(", "));
            status.finding(Health::Degraded, text);
        }
    }
    let records: Vec<(&str, &[BackupRecord])> =
        shelves.iter().map(|(look, shelf)| (look.config.name.as_str(), shelf.records.as_slice())).collect();
    reach::known_backups(&records).unwrap_or_else(|disputed| {
        status.finding(Health::Failing, disputed.to_string());
        Vec::new()
    })
}

/// Which instants could be restored now.
fn add_window(status: &mut ClusterStatus, all: &Holdings, backups: &[KnownBackup]) {
    let newest = Reach::new(all, backups).newest_interval();
    match &newest {
        None if backups.is_empty() => {}
        None => status.finding(Health::Failing, "no backup can be restored: WAL that it needs is missing"),
        Some(interval) if interval.ends == Ends::Archive => {}
        Some(interval) => {
            let text = format!("nothing later than {} can be restored: see `seawall window`", interval.to.lsn);
            status.finding(Health::Failing, text);
        }
    }
    status.window = newest.as_ref().map(window_of);
}

fn window_of(interval: &Interval) -> Window {
    let moment = |point: &Point| Moment { lsn: point.lsn, time: point.time };
    Window { from: moment(&interval.from), to: moment(&interval.to) }
}

/// An agent tells what it does; what can be restored, the repositories do.
async fn window_in_repositories(cluster: &ClusterConfig, system_id: Option<SystemId>) -> Option<Window> {
    let looks = repositories::look(&cluster.repositories, &cluster.name).await;
    let found = restorable::read(&looks, &newest(&looks, system_id)?).await.ok()?;
    found.reach().newest_interval().as_ref().map(window_of)
}

/// What the repositories that can be read hold together, and each by itself.
fn add_union(status: &mut ClusterStatus, all: &Holdings, copies: &[Copy<'_>], required: usize) {
    let system_id = copies[0].catalog.lineage.system_id;
    status.system_id.get_or_insert_with(|| system_id.to_string());
    let newest = all.parts.keys().next_back().copied().unwrap_or(all.start_timeline);
    status.timeline.get_or_insert(newest.0);
    let frontier_of = |held: &Holdings| continuity::all_runs(held).pop();
    let furthest = frontier_of(all);
    let mut frontiers: Vec<Run> = Vec::new();
    for copy in copies {
        let held = Holdings::of(&copy.catalog);
        let frontier = frontier_of(&held);
        let lacks = continuity::lacks(all, &held).len();
        let behind = bytes_behind(frontier.as_ref(), furthest.as_ref());
        let mut state = "ok";
        if behind > SEGMENTS_BEHIND_MAX * all.segment_size.bytes() {
            state = "behind";
            let text = format!("repository {} is {} behind", copy.repository, output::size(behind));
            status.finding(Health::Degraded, text);
        }
        if lacks > 0 {
            state = "incomplete";
            let text =
                format!("repository {} lacks {lacks} range(s) that others hold: see `seawall gaps`", copy.repository);
            status.finding(Health::Degraded, text);
        }
        let shown = status.repositories.iter_mut().find(|shown| shown.name == copy.repository);
        let shown = shown.expect("every repository is shown");
        (shown.frontier_lsn, shown.state) = (frontier.as_ref().map(|run| run.to), state);
        frontiers.extend(frontier);
    }
    // Durable is what as many repositories hold as have to.
    frontiers.sort_by_key(|run| std::cmp::Reverse((run.timeline, run.to)));
    if let Some(durable) = frontiers.get(required.saturating_sub(1)) {
        (status.durable_lsn, status.last_commit) = (Some(durable.to), durable.last_commit);
    } else if furthest.is_none() {
        status.finding(Health::Degraded, "nothing is durable yet");
    }
    let open_gaps = continuity::gaps_of(all).iter().filter(|gap| gap.state == GapState::Open).count();
    status.gaps = Some(open_gaps);
    if open_gaps > 0 {
        status.finding(Health::Degraded, format!("{open_gaps} open gap(s) in the archive: see `seawall gaps`"));
    }
    let conflicts = conflicts(all, copies);
    if conflicts > 0 {
        let text = format!("{conflicts} segment(s) with two different contents: see the ledger");
        status.finding(Health::Failing, text);
    }
    if copies.iter().any(|copy| is_unproven(&copy.catalog)) {
        let text = "unproven: the WAL is stored as it came; this seawall cannot read the format of its pages";
        status.finding(Health::Degraded, text);
    }
}

/// On an older timeline it is behind by an unknown amount: it has yet to begin with the newest.
fn bytes_behind(frontier: Option<&Run>, furthest: Option<&Run>) -> u64 {
    match (frontier, furthest) {
        (Some(frontier), Some(furthest)) => furthest.to.saturating_distance(frontier.to),
        _ => 0,
    }
}

fn conflicts(all: &Holdings, copies: &[Copy<'_>]) -> usize {
    let directories = copies.iter().flat_map(|copy| copy.catalog.directories());
    let mut names = all.disputed.clone();
    names.extend(directories.flat_map(|directory| directory.conflicts.iter().copied()));
    names.len()
}

/// The newest segment is of a WAL format this program cannot read: stored, but not checked.
fn is_unproven(catalog: &Catalog) -> bool {
    let newest = catalog.timelines.values().next_back().into_iter().flatten();
    let digest = newest.filter_map(|directory| directory.indexed().max_by_key(|digest| digest.segment)).next_back();
    digest.is_some_and(|digest| digest.proof == Proof::Unproven)
}

/// What would be lost if the server burned now: everything since the last durable commit, or nothing.
fn add_loss(status: &mut ClusterStatus, now: Timestamp) {
    let (Some(server), Some(durable)) = (status.server_lsn, status.durable_lsn) else { return };
    let lag = server.saturating_distance(durable);
    status.lag_bytes = Some(lag);
    status.rpo_seconds = match lag {
        0 => Some(0.0),
        _ => status.last_commit.map(|commit| now.duration_since(commit).as_secs_f64().max(0.0)),
    };
    if status.state == Some("streaming") && status.rpo_seconds.is_some_and(|seconds| seconds > RPO_SECONDS_MAX) {
        let text = format!("the last {} are not durable yet", output::size(lag));
        status.finding(Health::Degraded, text);
    }
}

impl ClusterStatus {
    /// How many repositories can be read, where there are several.
    fn in_repositories(&self) -> String {
        let readable = |shown: &&RepositoryStatus| !matches!(shown.state, "empty" | "unavailable");
        match self.repositories.len() {
            0 | 1 => String::new(),
            all => format!(" ({} of {all} repositories)", self.repositories.iter().filter(readable).count()),
        }
    }

    fn to_text(&self) -> String {
        let state = match self.state {
            Some("stopped") => "not streaming",
            Some(state) => state,
            None => "state unknown",
        };
        let rpo = self.rpo_seconds.map_or("unknown".to_string(), |seconds| format!("{seconds:.0} s"));
        let lag = self.lag_bytes.map_or("unknown".to_string(), output::size);
        let slot = self.slot.wal_status.as_deref().unwrap_or("unknown");
        let safe = self.slot.safe_wal_bytes.map(|bytes| format!(" ({} left)", output::size(bytes.max(0) as u64)));
        let is_known = self.repositories.iter().all(|shown| shown.frontier_lsn.is_none());
        let none = if is_known { "nothing" } else { "unknown" };
        let durable = self.durable_lsn.map_or(none.to_string(), |lsn| lsn.to_string());
        let gaps = self.gaps.map_or("unknown".to_string(), |count| count.to_string());
        let line = format!(
            "{}: {}, {state}, durable to {durable}{}, RPO {rpo}, lag {lag}, slot {slot}{}, last backup {}{}, restorable {}, open gaps {gaps}",
            self.name,
            self.health.word(),
            self.in_repositories(),
            safe.unwrap_or_default(),
            self.last_backup.as_ref().map_or("none", |backup| &backup.id),
            self.next_backup.as_ref().map_or(String::new(), |next| format!(", next {}", next.to_text())),
            self.window.map_or("nothing".to_string(), |window| window.to_string()),
        );
        let reasons = self.reasons.iter().map(|reason| format!("  - {reason}"));
        std::iter::once(line).chain(reasons).collect::<Vec<_>>().join("\n")
    }
}

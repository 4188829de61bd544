//! Owns: `status`: what is true of each cluster now, from its repository and, where it answers, its server.
//! Does not own: what the agent knows by itself: where one answers, its word is shown (`source` says what was asked).

use std::sync::Arc;

use jiff::Timestamp;
use serde::Serialize;

use super::args::{Global, StatusArgs};
use super::server::{self, ServerFacts};
use super::{Verdict, output, setup};
use crate::archiver::Workers;
use crate::catalog::store::{self, Archive};
use crate::config::{ClusterConfig, HttpConfig};
use crate::continuity::{self, GapState, Run};
use crate::error::Failure;
use crate::monitor::{self, client};
use crate::repository::Backend;
use crate::repository::layout::Lineage;
use crate::wal::{Lsn, Proof, SystemId};

/// A loss of more than this, while the agent streams, is worth a word: a tail's upload starts after seconds.
const RPO_SECONDS_MAX: f64 = 60.0;

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
    last_backup: Option<String>,
    window: Option<()>,
    /// Open ones.
    gaps: Option<usize>,
    health: Health,
    reasons: Vec<String>,
}

#[derive(Debug, Serialize)]
struct RepositoryStatus {
    name: String,
    frontier_lsn: Option<Lsn>,
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
        acknowledge: "repository",
        slot: SlotStatus { name: slot.to_string(), ..SlotStatus::default() },
        ..ClusterStatus::default()
    };
    let server = server::ask(&world, &slot).await;
    match &server {
        Ok(facts) => add_server(&mut status, facts),
        Err(failure) => status.finding(Health::Degraded, format!("the server does not answer: {failure}")),
    }
    let system_id = server.as_ref().ok().and_then(|facts| facts.system_id);
    let stored = look(&world.backend, &cluster.name, system_id).await;
    add_repository(&mut status, &cluster.repositories[0].name, stored);
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

/// What a repository holds of a cluster.
struct Stored {
    lineage: Lineage,
    timeline: u32,
    frontier: Option<Run>,
    open_gaps: usize,
    conflicts: usize,
    /// The newest segment is of a WAL format this program cannot read: stored, but not checked.
    is_unproven: bool,
}

/// Looks at the newest lineage: the server's, where it is known.
async fn look(
    backend: &Arc<dyn Backend>,
    cluster: &str,
    system_id: Option<SystemId>,
) -> Result<Option<Stored>, Failure> {
    if store::read_repository(backend.as_ref()).await?.is_none() {
        return Ok(None);
    }
    let lineages = store::lineages(backend.as_ref(), cluster).await?;
    let ours = lineages.into_iter().filter(|(lineage, _)| system_id.is_none_or(|id| lineage.system_id == id));
    let Some((lineage, _)) = ours.max_by_key(|(lineage, file)| (file.created, lineage.ordinal)) else {
        return Ok(None);
    };
    let catalog = Archive::new(backend.clone(), lineage.clone()).load_catalog().await?;
    let newest = catalog.timelines.keys().next_back().copied().unwrap_or(catalog.file.start_timeline);
    let gaps = continuity::gaps(&catalog);
    let of_newest = catalog.timelines.get(&newest).into_iter().flatten();
    let newest_entry = of_newest.filter_map(|directory| directory.entries.values().next_back()).next_back();
    let directories = catalog.timelines.values().flatten();
    Ok(Some(Stored {
        lineage,
        timeline: newest.0,
        frontier: continuity::runs(newest, catalog.pieces(newest)).pop(),
        open_gaps: gaps.iter().filter(|gap| gap.state == GapState::Open).count(),
        conflicts: directories.map(|directory| directory.conflicts.len() + directory.disputed.len()).sum(),
        is_unproven: newest_entry.is_some_and(|entry| entry.summary.proof == Proof::Unproven),
    }))
}

fn add_repository(status: &mut ClusterStatus, name: &str, stored: Result<Option<Stored>, Failure>) {
    let mut shown = RepositoryStatus { name: name.to_string(), frontier_lsn: None, state: "ok" };
    match stored {
        Err(failure) => {
            shown.state = "unavailable";
            status.finding(Health::Failing, format!("repository {name} cannot be read: {failure}"));
        }
        Ok(None) => {
            shown.state = "empty";
            status.finding(Health::Failing, format!("repository {name} holds nothing of this cluster"));
        }
        Ok(Some(stored)) => {
            status.system_id.get_or_insert_with(|| stored.lineage.system_id.to_string());
            status.timeline.get_or_insert(stored.timeline);
            status.gaps = Some(stored.open_gaps);
            shown.frontier_lsn = stored.frontier.as_ref().map(|run| run.to);
            status.durable_lsn = shown.frontier_lsn;
            status.last_commit = stored.frontier.as_ref().and_then(|run| run.last_commit);
            if stored.open_gaps > 0 {
                let text = format!("{} open gap(s) in the archive: see `seawall gaps`", stored.open_gaps);
                status.finding(Health::Degraded, text);
            }
            if stored.conflicts > 0 {
                let text = format!("{} segment(s) with two different contents: see the ledger", stored.conflicts);
                status.finding(Health::Failing, text);
            }
            if stored.is_unproven {
                let text = "unproven: the WAL is stored as it came; this seawall cannot read the format of its pages";
                status.finding(Health::Degraded, text);
            }
            if stored.frontier.is_none() {
                status.finding(Health::Degraded, "nothing is durable yet");
            }
        }
    }
    status.repositories.push(shown);
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
        let durable = self.durable_lsn.map_or("nothing".to_string(), |lsn| lsn.to_string());
        let gaps = self.gaps.map_or("unknown".to_string(), |count| count.to_string());
        let line = format!(
            "{}: {}, {state}, durable to {durable}, RPO {rpo}, lag {lag}, slot {slot}{}, open gaps {gaps}",
            self.name,
            self.health.word(),
            safe.unwrap_or_default(),
        );
        let reasons = self.reasons.iter().map(|reason| format!("  - {reason}"));
        std::iter::once(line).chain(reasons).collect::<Vec<_>>().join("\n")
    }
}

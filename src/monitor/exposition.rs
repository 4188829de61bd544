//! Owns: the recorder of metrics, and the gauges' values, set from the agent's facts whenever somebody asks.
//! Does not own: names and meanings (`telemetry/meters.rs`), what is counted where it happens.

use std::time::Duration;

use jiff::Timestamp;
use metrics::{counter, gauge};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

use super::health::{ClusterFacts, RepositoryState};
use super::process::ProcessFacts;
use super::status::State;
use crate::error::{ExitCode, Failure};
use crate::telemetry::meters as names;
use crate::wal::Lsn;

/// What `wal_status` of `pg_replication_slots` may be.
const SLOT_STATUSES: [&str; 4] = ["reserved", "extended", "unreserved", "lost"];
/// Recorded durations are gathered up to here when nobody scrapes.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(30);

/// The process' metrics, as text.
#[derive(Clone)]
pub struct Exposition {
    handle: PrometheusHandle,
    started: Timestamp,
}

impl std::fmt::Debug for Exposition {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Exposition").field("started", &self.started).finish_non_exhaustive()
    }
}

impl Exposition {
    /// Makes this the process' recorder; there can be one.
    pub fn install() -> Result<Exposition, Failure> {
        let bug = |error: &dyn std::fmt::Display| Failure::new(ExitCode::Internal, format!("metrics: {error}"));
        let matcher = Matcher::Full(names::UPLOAD_SECONDS.to_string());
        let builder = PrometheusBuilder::new().set_buckets_for_metric(matcher, names::UPLOAD_SECONDS_BUCKETS);
        let recorder = builder.map_err(|error| bug(&error))?.build_recorder();
        let handle = recorder.handle();
        metrics::set_global_recorder(recorder).map_err(|error| bug(&error))?;
        names::describe();
        gauge!(names::BUILD_INFO, "version" => env!("CARGO_PKG_VERSION")).set(1.0);
        Ok(Exposition { handle, started: Timestamp::now() })
    }

    /// Keeps what is recorded bounded, for as long as the process lives.
    pub async fn upkeep(self) {
        loop {
            tokio::time::sleep(UPKEEP_INTERVAL).await;
            self.handle.run_upkeep();
        }
    }

    /// In the text format.
    pub fn render(&self, clusters: &[ClusterFacts]) -> String {
        clusters.iter().for_each(set_cluster);
        self.set_process(&ProcessFacts::read());
        self.handle.render()
    }

    fn set_process(&self, facts: &ProcessFacts) {
        gauge!(names::PROCESS_RSS).set(number(facts.resident_bytes));
        gauge!(names::PROCESS_FDS).set(number(facts.open_files));
        gauge!(names::PROCESS_FDS_MAX).set(number(facts.open_files_max));
        gauge!(names::PROCESS_START).set(self.started.as_second() as f64);
        if let Some(seconds) = facts.cpu_seconds {
            counter!(names::PROCESS_CPU).absolute(seconds);
        }
    }
}

/// What is not known is not a number.
fn number(value: Option<u64>) -> f64 {
    value.map_or(f64::NAN, |value| value as f64)
}

fn truth(value: bool) -> f64 {
    f64::from(u8::from(value))
}

fn set_backups(facts: &ClusterFacts, set: impl Fn(&'static str, f64)) {
    let backups = &facts.backups;
    let last = backups.last.as_ref();
    let finished = last.and_then(|last| last.finished);
    let seconds = |at: jiff::Timestamp| at.as_microsecond() as f64 / 1e6;
    set(names::BACKUP_LAST, finished.map_or(f64::NAN, seconds));
    let took = finished.zip(last).map(|(finished, last)| finished.duration_since(last.started).as_secs_f64());
    set(names::BACKUP_SECONDS, took.unwrap_or(f64::NAN));
    set(names::BACKUP_RAW, number(last.and_then(|last| last.raw_bytes)));
    set(names::BACKUP_STORED, number(last.and_then(|last| last.stored_bytes)));
    set(names::BACKUP_NEXT, backups.next.as_ref().and_then(|next| next.at).map_or(f64::NAN, seconds));
    set(names::BACKUP_RUNNING, truth(backups.running.is_some()));
    set(names::BACKUP_DONE_BYTES, number(backups.running.as_ref().map(|running| running.raw_bytes)));
    set(names::BACKUPS_MISSING, number(backups.is_known.then_some(backups.missing.len() as u64)));
}

fn set_retention(facts: &ClusterFacts, set: impl Fn(&'static str, f64)) {
    let last_run = facts.retention.last_run;
    set(names::RETENTION_LAST, last_run.map_or(f64::NAN, |at| at.as_microsecond() as f64 / 1e6));
}

fn set_cluster(facts: &ClusterFacts) {
    let cluster = &facts.name;
    let set = |name: &'static str, value: f64| gauge!(name, "cluster" => cluster.clone()).set(value);
    set(names::PROTECTED, truth(!facts.findings().iter().any(|finding| finding.exposes)));
    for state in State::ALL {
        let labels = [("cluster", cluster.clone()), ("state", state.word().to_string())];
        gauge!(names::STATE, &labels).set(truth(state == facts.state));
    }
    let seconds = |duration: Option<Duration>| duration.map_or(f64::NAN, |duration| duration.as_secs_f64());
    set(names::RPO_SECONDS, seconds(facts.rpo));
    set(names::LAG_SECONDS, seconds(facts.lag));
    set(names::LAG_BYTES, number(facts.lag_bytes()));
    set(names::TAIL_AGE_SECONDS, seconds(facts.tail_age));
    let commit = facts.last_commit.map_or(f64::NAN, |commit| commit.as_microsecond() as f64 / 1e6);
    set(names::LAST_COMMIT, commit);
    let lsn = |lsn: Option<Lsn>| number(lsn.filter(|lsn| *lsn != Lsn::ZERO).map(|lsn| lsn.0));
    let positions = facts.positions.as_ref();
    set(names::SERVER_LSN, lsn(positions.map(|positions| positions.server)));
    set(names::RECEIVED_LSN, lsn(positions.map(|positions| positions.received)));
    set(names::PROVEN_LSN, lsn(positions.map(|positions| positions.proven)));
    set(names::DURABLE_LSN, lsn(positions.map(|positions| positions.durable)));
    set(names::ACKNOWLEDGED_LSN, lsn(positions.map(|positions| positions.acknowledged)));
    set(names::TIMELINE, number(facts.timeline.map(|timeline| u64::from(timeline.0))));
    set(names::PAUSED, truth(facts.state == State::Paused));
    set(names::HELD_BYTES, facts.held_bytes as f64);
    set(names::HELD_LIMIT_BYTES, facts.held_limit_bytes as f64);
    set(names::GAPS_OPEN, number(facts.gaps.map(|count| count as u64)));
    set_backups(facts, set);
    set_retention(facts, set);
    let finished = facts.last_verify.map(|last| last.finished.as_microsecond() as f64 / 1e6);
    set(names::VERIFY_LAST, finished.unwrap_or(f64::NAN));
    set(names::VERIFY_FAULTS, number(facts.last_verify.map(|last| last.faults)));
    if let Some(spool) = &facts.spool {
        set(names::SPOOL_BYTES, spool.used_bytes as f64);
        set(names::SPOOL_LIMIT_BYTES, spool.limit_bytes as f64);
    }
    set(names::SLOT_ACTIVE, facts.slot.is_active.map_or(f64::NAN, truth));
    set(names::SLOT_SAFE_BYTES, facts.slot.safe_wal_bytes.map_or(f64::NAN, |bytes| bytes as f64));
    for status in SLOT_STATUSES {
        let is_it = facts.slot.wal_status.as_deref().map(|other| truth(other == status));
        let labels = [("cluster", cluster.clone()), ("status", status.to_string())];
        gauge!(names::SLOT_STATUS, &labels).set(is_it.unwrap_or(f64::NAN));
    }
    for repository in &facts.repositories {
        let labels = [("cluster", cluster.clone()), ("repository", repository.name.clone())];
        gauge!(names::REPOSITORY_LSN, &labels).set(lsn(repository.frontier));
        for state in RepositoryState::ALL {
            let labels = [
                ("cluster", cluster.clone()),
                ("repository", repository.name.clone()),
                ("state", state.word().to_string()),
            ];
            gauge!(names::REPOSITORY_STATE, &labels).set(truth(state == repository.state));
        }
    }
}

//! Owns: every metric's name, unit and meaning, in one table; the events that are counted where they happen.
//! Does not own: who reads them (`monitor`). Without a recorder an event costs a load and a branch.
//!
//! Positions are bytes since the beginning of WAL: 0/3000000 is 50331648. What is not known is NaN, never absent.

use std::time::Duration;

use metrics::{Label, counter, histogram};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Counter,
    Gauge,
    Histogram,
}

/// One metric, documented.
#[derive(Clone, Copy, Debug)]
pub struct MetricDoc {
    pub name: &'static str,
    pub kind: Kind,
    pub labels: &'static [&'static str],
    pub help: &'static str,
}

const CLUSTER: &[&str] = &["cluster"];
const REPOSITORY: &[&str] = &["cluster", "repository"];

const fn gauge(name: &'static str, labels: &'static [&'static str], help: &'static str) -> MetricDoc {
    MetricDoc { name, kind: Kind::Gauge, labels, help }
}

const fn counter(name: &'static str, labels: &'static [&'static str], help: &'static str) -> MetricDoc {
    MetricDoc { name, kind: Kind::Counter, labels, help }
}

pub const BUILD_INFO: &str = "seawall_build_info";
pub const STATE: &str = "seawall_state";
pub const PROTECTED: &str = "seawall_protected";
pub const RPO_SECONDS: &str = "seawall_rpo_seconds";
pub const LAG_SECONDS: &str = "seawall_lag_seconds";
pub const LAG_BYTES: &str = "seawall_lag_bytes";
pub const TAIL_AGE_SECONDS: &str = "seawall_tail_age_seconds";
pub const LAST_COMMIT: &str = "seawall_last_durable_commit_timestamp_seconds";
pub const SERVER_LSN: &str = "seawall_server_lsn_bytes";
pub const RECEIVED_LSN: &str = "seawall_received_lsn_bytes";
pub const PROVEN_LSN: &str = "seawall_proven_lsn_bytes";
pub const DURABLE_LSN: &str = "seawall_durable_lsn_bytes";
pub const ACKNOWLEDGED_LSN: &str = "seawall_acknowledged_lsn_bytes";
pub const TIMELINE: &str = "seawall_timeline";
pub const PAUSED: &str = "seawall_paused";
pub const HELD_BYTES: &str = "seawall_held_bytes";
pub const HELD_LIMIT_BYTES: &str = "seawall_held_limit_bytes";
pub const SPOOL_BYTES: &str = "seawall_spool_bytes";
pub const SPOOL_LIMIT_BYTES: &str = "seawall_spool_limit_bytes";
pub const GAPS_OPEN: &str = "seawall_gaps_open";
pub const REPOSITORY_LSN: &str = "seawall_repository_lsn_bytes";
pub const REPOSITORY_STATE: &str = "seawall_repository_state";
pub const SLOT_STATUS: &str = "seawall_slot_wal_status";
pub const SLOT_SAFE_BYTES: &str = "seawall_slot_safe_wal_bytes";
pub const SLOT_ACTIVE: &str = "seawall_slot_active";
pub const BACKUP_LAST: &str = "seawall_last_backup_timestamp_seconds";
pub const BACKUP_SECONDS: &str = "seawall_last_backup_duration_seconds";
pub const BACKUP_RAW: &str = "seawall_last_backup_raw_bytes";
pub const BACKUP_STORED: &str = "seawall_last_backup_stored_bytes";
pub const BACKUP_NEXT: &str = "seawall_next_backup_timestamp_seconds";
pub const BACKUP_RUNNING: &str = "seawall_backup_running";
pub const BACKUP_DONE_BYTES: &str = "seawall_backup_running_raw_bytes";
pub const BACKUPS_MISSING: &str = "seawall_repositories_without_backup";
pub const VERIFY_LAST: &str = "seawall_last_verify_timestamp_seconds";
pub const VERIFY_FAULTS: &str = "seawall_last_verify_faults";
const BACKUPS: &str = "seawall_backups_total";
const BACKUP_FAILURES: &str = "seawall_failed_backups_total";
pub const RETENTION_LAST: &str = "seawall_last_retention_timestamp_seconds";
const EXPIRED_BYTES: &str = "seawall_expired_bytes_total";
const EXPIRY_FAILURES: &str = "seawall_failed_expiries_total";
const STREAMS: &str = "seawall_streams_total";
const FAILURES: &str = "seawall_failed_attempts_total";
const STORE_REQUESTS: &str = "seawall_store_requests_total";
const STORE_ERRORS: &str = "seawall_store_errors_total";
const STORE_RETRIES: &str = "seawall_store_retries_total";
const STORE_WRITTEN: &str = "seawall_store_written_bytes_total";
const STORE_READ: &str = "seawall_store_read_bytes_total";
const UPLOADS: &str = "seawall_uploads_total";
pub const UPLOAD_SECONDS: &str = "seawall_upload_seconds";
pub const PROCESS_RSS: &str = "process_resident_memory_bytes";
pub const PROCESS_CPU: &str = "process_cpu_seconds_total";
pub const PROCESS_FDS: &str = "process_open_fds";
pub const PROCESS_FDS_MAX: &str = "process_max_fds";
pub const PROCESS_START: &str = "process_start_time_seconds";

/// Every metric there is.
pub const CATALOGUE: &[MetricDoc] = &[
    gauge(PROTECTED, CLUSTER, "1 while everything promised holds; 0 as /protected says it."),
    gauge(RPO_SECONDS, CLUSTER, "What would be lost if the server burned now: seconds since all it had was durable."),
    gauge(LAG_BYTES, CLUSTER, "WAL the server has and the required repositories do not."),
    gauge(LAG_SECONDS, CLUSTER, "Seconds since all that was received was durable."),
    gauge(TAIL_AGE_SECONDS, CLUSTER, "Seconds the durable position has stood still behind what is proven."),
    gauge(LAST_COMMIT, CLUSTER, "When the newest durable commit was made, by the server's clock, in Unix time."),
    gauge(SERVER_LSN, CLUSTER, "The server's own end of WAL, as it said last."),
    gauge(RECEIVED_LSN, CLUSTER, "End of what was received."),
    gauge(PROVEN_LSN, CLUSTER, "End of the records whose checksums and links were verified."),
    gauge(DURABLE_LSN, CLUSTER, "Record end that as many repositories as required hold."),
    gauge(ACKNOWLEDGED_LSN, CLUSTER, "What the server is told is flushed."),
    gauge(TIMELINE, CLUSTER, "The timeline that is streamed."),
    gauge(STATE, &["cluster", "state"], "1 for the state the agent is in, 0 for the others."),
    gauge(PAUSED, CLUSTER, "1 while nothing is read, because memory is full."),
    gauge(HELD_BYTES, CLUSTER, "Encoded WAL in memory that is not stored yet."),
    gauge(HELD_LIMIT_BYTES, CLUSTER, "The budget for it (`memory`)."),
    gauge(SPOOL_BYTES, CLUSTER, "WAL in the local spool."),
    gauge(SPOOL_LIMIT_BYTES, CLUSTER, "The cluster's share of the spool."),
    gauge(GAPS_OPEN, CLUSTER, "Holes in the archive that nothing has healed."),
    gauge(BACKUP_LAST, CLUSTER, "When the newest complete base backup was finished, in Unix time."),
    gauge(BACKUP_SECONDS, CLUSTER, "How long the newest complete base backup took."),
    gauge(BACKUP_RAW, CLUSTER, "What the newest complete base backup holds, uncompressed."),
    gauge(BACKUP_STORED, CLUSTER, "What the newest complete base backup takes in a repository."),
    gauge(
        BACKUP_NEXT,
        CLUSTER,
        "When the schedule has the next base backup begin, in Unix time; NaN where WAL decides.",
    ),
    gauge(BACKUP_RUNNING, CLUSTER, "1 while this agent takes a base backup."),
    gauge(BACKUP_DONE_BYTES, CLUSTER, "What the server has sent of the base backup under way; NaN without one."),
    gauge(BACKUPS_MISSING, CLUSTER, "Repositories that take part and hold no complete base backup."),
    gauge(VERIFY_LAST, CLUSTER, "When the repositories were last verified, in Unix time."),
    gauge(VERIFY_FAULTS, CLUSTER, "Faults the last verification found, in all repositories together."),
    counter(BACKUPS, CLUSTER, "Base backups this agent has completed."),
    counter(BACKUP_FAILURES, CLUSTER, "Base backups this agent has tried in vain."),
    gauge(RETENTION_LAST, CLUSTER, "When this agent last applied retention, in Unix time."),
    counter(EXPIRED_BYTES, CLUSTER, "What this agent has deleted by retention, in all repositories."),
    counter(EXPIRY_FAILURES, CLUSTER, "Times this agent could not apply retention."),
    gauge(REPOSITORY_LSN, REPOSITORY, "Record end up to which the repository holds everything."),
    gauge(REPOSITORY_STATE, &["cluster", "repository", "state"], "1 for the state it is in, 0 for the others."),
    gauge(SLOT_STATUS, &["cluster", "status"], "1 for the slot's wal_status, 0 for the others; asked once a minute."),
    gauge(SLOT_SAFE_BYTES, CLUSTER, "WAL that can be written before the slot is in danger; NaN without a limit."),
    gauge(SLOT_ACTIVE, CLUSTER, "1 while somebody streams from the slot."),
    counter(STREAMS, CLUSTER, "Streams that began: reconnects, and timelines followed."),
    counter(FAILURES, &["cluster", "class"], "Attempts to connect and stream that failed."),
    counter(STORE_REQUESTS, &["cluster", "repository", "operation"], "Calls to the store."),
    counter(
        STORE_ERRORS,
        &["cluster", "repository", "operation", "class"],
        "Calls that failed; a name that is taken counts too.",
    ),
    counter(STORE_RETRIES, CLUSTER, "Calls repeated because the store did not take the one before."),
    counter(STORE_WRITTEN, REPOSITORY, "Bytes of objects, or parts of them, the store has taken."),
    counter(STORE_READ, REPOSITORY, "Bytes the store has given."),
    counter(UPLOADS, &["cluster", "repository", "kind"], "Objects stored: segment, tail, index, other."),
    MetricDoc {
        name: UPLOAD_SECONDS,
        kind: Kind::Histogram,
        labels: &["cluster", "repository", "kind"],
        help: "How long the store took for an object sent whole.",
    },
    gauge(BUILD_INFO, &["version"], "1, for the version that runs."),
    gauge(PROCESS_RSS, &[], "Resident memory."),
    counter(PROCESS_CPU, &[], "User and system CPU time spent, in whole seconds."),
    gauge(PROCESS_FDS, &[], "Open file descriptors."),
    gauge(PROCESS_FDS_MAX, &[], "How many may be open."),
    gauge(PROCESS_START, &[], "When the process started, in Unix time."),
];

/// From a local disk to a store that hardly answers.
pub const UPLOAD_SECONDS_BUCKETS: &[f64] =
    &[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0];

/// Gives every metric its help; after a recorder was installed.
pub fn describe() {
    for metric in CATALOGUE {
        match metric.kind {
            Kind::Counter => metrics::describe_counter!(metric.name, metric.help),
            Kind::Gauge => metrics::describe_gauge!(metric.name, metric.help),
            Kind::Histogram => metrics::describe_histogram!(metric.name, metric.help),
        }
    }
}

/// A stream began.
pub fn stream_began(cluster: &str) {
    counter!(STREAMS, "cluster" => cluster.to_string()).increment(1);
}

/// An attempt to connect and stream failed.
pub fn attempt_failed(cluster: &str, class: &'static str) {
    counter!(FAILURES, "cluster" => cluster.to_string(), "class" => class).increment(1);
}

/// A base backup exists.
pub fn backup_completed(cluster: &str) {
    counter!(BACKUPS, "cluster" => cluster.to_string()).increment(1);
}

/// A base backup came to nothing.
pub fn backup_failed(cluster: &str) {
    counter!(BACKUP_FAILURES, "cluster" => cluster.to_string()).increment(1);
}

/// Retention was applied, in all repositories.
pub fn expired(cluster: &str, bytes: u64) {
    counter!(EXPIRED_BYTES, "cluster" => cluster.to_string()).increment(bytes);
}

/// Retention could not be applied.
pub fn expiry_failed(cluster: &str) {
    counter!(EXPIRY_FAILURES, "cluster" => cluster.to_string()).increment(1);
}

/// A call to a store is about to be repeated.
pub fn store_retried(cluster: &str) {
    counter!(STORE_RETRIES, "cluster" => cluster.to_string()).increment(1);
}

/// One cluster's view of one repository.
#[derive(Clone, Debug)]
pub struct StoreMeter {
    labels: Vec<Label>,
}

impl StoreMeter {
    pub fn new(cluster: &str, repository: &str) -> StoreMeter {
        StoreMeter {
            labels: vec![Label::new("cluster", cluster.to_string()), Label::new("repository", repository.to_string())],
        }
    }

    fn with(&self, more: &[(&'static str, &'static str)]) -> Vec<Label> {
        let more = more.iter().map(|(name, value)| Label::from_static_parts(name, value));
        self.labels.iter().cloned().chain(more).collect()
    }

    pub fn called(&self, operation: &'static str) {
        counter!(STORE_REQUESTS, self.with(&[("operation", operation)])).increment(1);
    }

    pub fn failed(&self, operation: &'static str, class: &'static str) {
        counter!(STORE_ERRORS, self.with(&[("operation", operation), ("class", class)])).increment(1);
    }

    pub fn wrote(&self, bytes: u64) {
        counter!(STORE_WRITTEN, self.with(&[])).increment(bytes);
    }

    pub fn read(&self, bytes: u64) {
        counter!(STORE_READ, self.with(&[])).increment(bytes);
    }

    /// `took`: of an object sent whole.
    pub fn stored(&self, kind: &'static str, took: Option<Duration>) {
        counter!(UPLOADS, self.with(&[("kind", kind)])).increment(1);
        if let Some(took) = took {
            histogram!(UPLOAD_SECONDS, self.with(&[("kind", kind)])).record(took.as_secs_f64());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_conventions_and_are_listed_once() {
        for (index, metric) in CATALOGUE.iter().enumerate() {
            assert!(!CATALOGUE[..index].iter().any(|other| other.name == metric.name), "{}", metric.name);
            assert_eq!(metric.name.ends_with("_total"), metric.kind == Kind::Counter, "{}", metric.name);
            assert!(metric.help.ends_with('.'), "{}", metric.name);
        }
    }
}

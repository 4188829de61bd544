//! Owns: how the plan of a restore looks, in JSON and in words.
//! Does not own: what is in it (`restore/plan.rs`).

use std::fmt::Write;

use jiff::Timestamp;
use serde::Serialize;

use super::super::output;
use crate::repository::layout::{BackupId, BackupType};
use crate::restore::plan::RestorePlan;
use crate::restore::target::{self, Action, Target};
use crate::wal::{Lsn, SystemId};

/// What an estimate assumes of the machine: writing the data directory, and replaying WAL.
const BYTES_PER_SECOND: u64 = 100 << 20;

#[derive(Debug, Serialize)]
pub struct ShownPlan {
    cluster: String,
    lineage: String,
    system_id: SystemId,
    target: Target,
    standby: bool,
    stop: ShownStop,
    timeline: u32,
    path: Vec<ShownStep>,
    backup: ShownBackup,
    /// Those that hold it, the preferred one first.
    repositories: Vec<String>,
    start_lsn: Lsn,
    consistent_lsn: Lsn,
    end: ShownPoint,
    wal: ShownWal,
    estimate: Estimate,
    remarks: Vec<String>,
}

/// What PostgreSQL will be told.
#[derive(Debug, Serialize)]
struct ShownStop {
    setting: Option<&'static str>,
    value: Option<String>,
    inclusive: bool,
    action: Action,
    /// The record it stops at, where that is known.
    at: Option<ShownPoint>,
}

#[derive(Debug, Serialize)]
struct ShownStep {
    timeline: u32,
    end_lsn: Option<Lsn>,
}

#[derive(Debug, Serialize)]
struct ShownPoint {
    lsn: Lsn,
    time: Option<Timestamp>,
}

#[derive(Debug, Serialize)]
struct ShownBackup {
    id: BackupId,
    #[serde(rename = "type")]
    backup_type: BackupType,
    chain: Vec<BackupId>,
    label: Option<String>,
    finished: Timestamp,
    timeline: u32,
    server_version: String,
    raw_bytes: u64,
    stored_bytes: u64,
    data_checksums: Option<bool>,
    tablespaces: Vec<ShownTablespace>,
    /// Outside the data directory.
    config: Vec<String>,
}

#[derive(Debug, Serialize)]
struct ShownTablespace {
    oid: u32,
    location: String,
}

#[derive(Debug, Serialize)]
struct ShownWal {
    from_lsn: Lsn,
    to_lsn: Lsn,
    bytes: u64,
    segments: u64,
}

#[derive(Debug, Serialize)]
struct Estimate {
    seconds: u64,
    assuming: String,
}

impl ShownPlan {
    pub fn of(plan: &RestorePlan) -> ShownPlan {
        let setting = plan.stop.setting();
        let ancestors = plan.path.ancestors().iter();
        let left = ancestors.map(|entry| ShownStep { timeline: entry.timeline.0, end_lsn: Some(entry.end) });
        ShownPlan {
            cluster: plan.lineage.cluster.clone(),
            lineage: plan.lineage.directory_name(),
            system_id: plan.system_id,
            target: plan.target.clone(),
            standby: plan.standby,
            stop: ShownStop {
                setting: setting.as_ref().map(|(name, _)| *name),
                value: setting.map(|(_, value)| value),
                inclusive: plan.inclusive,
                action: plan.action,
                at: plan.stop_at.map(|at| ShownPoint { lsn: at.lsn, time: at.time }),
            },
            timeline: plan.timeline().0,
            path: left.chain([ShownStep { timeline: plan.timeline().0, end_lsn: None }]).collect(),
            backup: shown_backup(plan),
            repositories: plan.copies.iter().map(|copy| copy.repository.clone()).collect(),
            start_lsn: plan.start_lsn,
            consistent_lsn: plan.consistent_lsn,
            end: ShownPoint { lsn: plan.end_lsn, time: plan.end_time },
            wal: ShownWal {
                from_lsn: plan.replay.from,
                to_lsn: plan.replay.to,
                bytes: plan.replay.bytes(),
                segments: plan.replay.segments(plan.segment_size),
            },
            estimate: Estimate {
                seconds: (plan.raw_bytes() + plan.replay.bytes()).div_ceil(BYTES_PER_SECOND),
                assuming: format!("{}/s written, and as much replayed", output::size(BYTES_PER_SECOND)),
            },
            remarks: plan.remarks.clone(),
        }
    }

    pub fn to_text(&self) -> String {
        let ShownBackup { id, raw_bytes, stored_bytes, .. } = &self.backup;
        let mut text = String::new();
        let mut line = |name: &str, value: String| {
            let _ = writeln!(text, "{name:<12}{value}");
        };
        line("cluster", format!("{} (lineage {})", self.cluster, self.lineage));
        line("target", self.target_in_words());
        line("backup", format!("{id}, {}, consistent at {}", self.why_this_one(), self.consistent_lsn));
        line(
            "from",
            format!(
                "{}: {} to fetch, {} to write",
                self.repositories.join(", then "),
                output::size(*stored_bytes),
                output::size(*raw_bytes)
            ),
        );
        line("timeline", self.path_in_words());
        let ShownWal { from_lsn, to_lsn, bytes, segments } = &self.wal;
        line("WAL", format!("{from_lsn} to {to_lsn}: {segments} segment(s), at most {}", output::size(*bytes)));
        for ShownTablespace { oid, location } in &self.backup.tablespaces {
            line("tablespace", format!("{oid}, which was at {location}"));
        }
        for path in &self.backup.config {
            line("config", format!("{path}, which lies outside the data directory"));
        }
        line("time", format!("about {} s, assuming {}", self.estimate.seconds.max(1), self.estimate.assuming));
        for remark in &self.remarks {
            line("note", remark.clone());
        }
        text
    }

    fn target_in_words(&self) -> String {
        if self.standby {
            return "none: a standby replays whatever comes".to_string();
        }
        let time = |time: Option<Timestamp>| time.map_or(String::new(), |time| format!(", {}", target::instant(time)));
        let end = || format!("the end of the WAL at {}{}", self.end.lsn, time(self.end.time));
        let stop = match (&self.stop.setting, &self.stop.at) {
            (None, _) => end(),
            (Some(_), None) => format!("as soon as the copy is consistent, at {}", self.consistent_lsn),
            (Some(setting), Some(at)) => {
                // PostgreSQL stops in front of the record that is past a time, and in front of any with exclusive.
                let is_before = *setting == "recovery_target_time" || !self.stop.inclusive;
                let side = if is_before { "before" } else { "after" };
                format!("just {side} the record at {}{}", at.lsn, time(at.time))
            }
        };
        let action = match (self.stop.setting, self.stop.action) {
            (None, _) | (_, Action::Promote) => "then promotes",
            (_, Action::Pause) => "then pauses",
            (_, Action::Shutdown) => "then shuts down",
        };
        format!("{}: stops {}{stop}, {action}", self.target, if self.stop.setting.is_none() { "at " } else { "" })
    }

    fn why_this_one(&self) -> String {
        format!("the newest that serves, finished {}", target::instant(self.backup.finished))
    }

    /// `1 up to 0/03000000, then 2`.
    fn path_in_words(&self) -> String {
        let step = |step: &ShownStep| match step.end_lsn {
            Some(end) => format!("{} up to {end}", step.timeline),
            None => step.timeline.to_string(),
        };
        self.path.iter().map(step).collect::<Vec<_>>().join(", then ")
    }
}

fn shown_backup(plan: &RestorePlan) -> ShownBackup {
    let backup = plan.backup();
    let tablespaces = backup.tablespaces.iter();
    ShownBackup {
        id: backup.id,
        backup_type: backup.backup_type,
        chain: plan.copies[0].chain.iter().map(|part| part.id).collect(),
        label: backup.label.clone(),
        finished: backup.finished,
        timeline: backup.timeline.0,
        server_version: backup.server_version.clone(),
        raw_bytes: plan.raw_bytes(),
        stored_bytes: plan.stored_bytes(),
        data_checksums: backup.data_checksums,
        tablespaces: tablespaces.map(|it| ShownTablespace { oid: it.oid, location: it.location.clone() }).collect(),
        config: backup.config.iter().map(|file| file.path.clone()).collect(),
    }
}

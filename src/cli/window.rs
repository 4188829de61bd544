//! Owns: `window`: what can be restored of every lineage, to the commit, in all repositories together; as table or JSON.
//! Does not own: what can be restored (`restore/reach.rs`).

use jiff::Timestamp;
use serde::Serialize;

use super::args::{Global, WindowArgs};
use super::repositories::{self, Unread};
use super::restorable::{self, Restorable};
use super::{Verdict, output, setup};
use crate::config::ArchiveConfig;
use crate::error::Failure;
use crate::repository::layout::{BackupId, Lineage};
use crate::restore::reach::{Ends, Interval, Point, Reach};
use crate::wal::{Lsn, SystemId};

#[derive(Debug, Default, Serialize)]
struct Answer {
    lineages: Vec<ShownLineage>,
    /// They may hold more than was seen.
    unread: Vec<ShownUnread>,
}

#[derive(Debug, Serialize)]
struct ShownLineage {
    cluster: String,
    lineage: String,
    system_id: SystemId,
    timelines: Vec<ShownTimeline>,
    /// Complete backups that no interval counts: the WAL that makes them consistent is not there.
    unusable: Vec<BackupId>,
    #[serde(skip)]
    is_newest: bool,
}

/// What `restore --timeline N` reaches.
#[derive(Debug, Serialize)]
struct ShownTimeline {
    timeline: u32,
    intervals: Vec<ShownInterval>,
}

#[derive(Debug, Serialize)]
struct ShownInterval {
    from: ShownPoint,
    to: ShownPoint,
    /// The first one, which makes `from` reachable.
    backup: BackupId,
    backups: Vec<BackupId>,
    ends_because: &'static str,
    /// Its id, where that is why.
    gap: Option<String>,
    proven: bool,
    #[serde(skip)]
    ends: Ends,
}

#[derive(Debug, Serialize)]
struct ShownPoint {
    lsn: Lsn,
    time: Option<Timestamp>,
    timeline: u32,
}

#[derive(Debug, Serialize)]
struct ShownUnread {
    repository: String,
    cluster: String,
    error: String,
    hint: Option<String>,
}

pub fn run(global: &Global, _args: &WindowArgs) -> Result<Verdict, Failure> {
    let chosen = setup::chosen_archives(global)?;
    let answer = setup::block_on(find(&chosen))??;
    match global.json {
        true => output::json(&answer),
        false => print(&answer),
    }
    let is_covered = |lineage: &ShownLineage| !lineage.is_newest || lineage.has_intervals();
    let is_fine = answer.lineages.iter().all(is_covered) && answer.unread.is_empty();
    Ok(if is_fine { Verdict::Fine } else { Verdict::Finding })
}

async fn find(archives: &[ArchiveConfig]) -> Result<Answer, Failure> {
    let mut answer = Answer::default();
    for config in archives {
        let looks = repositories::look(&config.repositories, &config.cluster).await;
        let lineages = repositories::all_lineages(&looks);
        let Some((newest, _)) = lineages.last() else {
            return Err(repositories::nothing(&looks, &config.cluster));
        };
        for (lineage, _) in &lineages {
            let mut found = restorable::read(&looks, lineage).await?;
            for Unread { repository, failure } in std::mem::take(&mut found.unread) {
                let known = |shown: &ShownUnread| shown.repository == repository && shown.cluster == config.cluster;
                if !answer.unread.iter().any(known) {
                    let (cluster, error, hint) = (config.cluster.clone(), failure.message, failure.hint);
                    answer.unread.push(ShownUnread { repository, cluster, error, hint });
                }
            }
            answer.lineages.push(shown(lineage, &found, lineage == newest));
        }
    }
    Ok(answer)
}

fn shown(lineage: &Lineage, found: &Restorable, is_newest: bool) -> ShownLineage {
    let reach = found.reach();
    let timelines: Vec<ShownTimeline> =
        reach.timelines().into_iter().filter_map(|timeline| of_line(&reach, timeline)).collect();
    let used: Vec<BackupId> =
        timelines.iter().flat_map(|of| &of.intervals).flat_map(|of| &of.backups).copied().collect();
    let unusable = found.backups.iter().map(|backup| backup.id).filter(|id| !used.contains(id));
    ShownLineage {
        cluster: lineage.cluster.clone(),
        lineage: lineage.directory_name(),
        system_id: lineage.system_id,
        unusable: unusable.collect(),
        timelines,
        is_newest,
    }
}

fn of_line(reach: &Reach<'_>, timeline: crate::wal::TimelineId) -> Option<ShownTimeline> {
    let intervals = reach.intervals(&reach.line(timeline)?).into_iter().map(shown_interval).collect();
    Some(ShownTimeline { timeline: timeline.0, intervals })
}

fn shown_interval(interval: Interval) -> ShownInterval {
    let point = |Point { timeline, lsn, time }: Point| ShownPoint { lsn, time, timeline: timeline.0 };
    ShownInterval {
        from: point(interval.from),
        to: point(interval.to),
        backup: interval.backups[0],
        backups: interval.backups,
        ends_because: interval.ends.word(),
        gap: match &interval.ends {
            Ends::Gap(id) => id.clone(),
            _ => None,
        },
        proven: !interval.is_unproven,
        ends: interval.ends,
    }
}

impl ShownLineage {
    fn has_intervals(&self) -> bool {
        self.timelines.iter().any(|timeline| !timeline.intervals.is_empty())
    }
}

/// Why nothing further can be reached, in words.
fn because(interval: &ShownInterval) -> String {
    let why = match &interval.ends {
        Ends::Archive => "all that is archived".to_string(),
        Ends::Timeline => "the server went on on another timeline".to_string(),
        Ends::Gap(Some(id)) => format!("gap {id}"),
        Ends::Gap(None) => "WAL is missing".to_string(),
        Ends::Expired => "expired".to_string(),
        Ends::Conflict(name) => format!("two contents of {name}"),
    };
    if interval.proven { why } else { format!("{why}; unproven: its WAL is in a format this seawall cannot read") }
}

fn print(answer: &Answer) {
    let mut table = output::table(&["CLUSTER", "LINEAGE", "TIMELINE", "FROM", "TO", "BACKUPS", "ENDS WITH"]);
    for lineage in &answer.lineages {
        for timeline in &lineage.timelines {
            for interval in &timeline.intervals {
                table.add_row([
                    lineage.cluster.clone(),
                    lineage.lineage.clone(),
                    timeline.timeline.to_string(),
                    place(&interval.from),
                    place(&interval.to),
                    interval.backups.len().to_string(),
                    because(interval),
                ]);
            }
        }
    }
    if table.row_count() > 0 {
        output::text(&table.to_string());
    }
    answer.remarks().iter().for_each(|remark| output::text(remark));
}

/// `2026-11-22 13:05:00.123456Z (0/03000028)`: the last commit before a place, and the place.
fn place(point: &ShownPoint) -> String {
    match point.time {
        Some(time) => format!("{} ({})", time.strftime("%Y-%m-%d %H:%M:%S%.fZ"), point.lsn),
        None => point.lsn.to_string(),
    }
}

impl Answer {
    fn remarks(&self) -> Vec<String> {
        let bare = self.lineages.iter().filter(|lineage| !lineage.has_intervals() && lineage.is_newest);
        let bare = bare.map(|lineage| {
            let why = match lineage.unusable.is_empty() {
                true => "it has no complete backup",
                false => "no backup has the WAL that makes it consistent",
            };
            format!("nothing of cluster {} can be restored (lineage {}): {why}", lineage.cluster, lineage.lineage)
        });
        let unusable = self.lineages.iter().flat_map(|lineage| {
            lineage.unusable.iter().map(|id| {
                format!(
                    "backup {id} of cluster {} cannot be restored: WAL it needs is not in the archive",
                    lineage.cluster
                )
            })
        });
        let unread = self.unread.iter().map(|unread| {
            let hint = unread.hint.as_ref().map(|hint| format!(" ({hint})")).unwrap_or_default();
            let (repository, cluster, error) = (&unread.repository, &unread.cluster, &unread.error);
            format!("repository {repository} of cluster {cluster} cannot be read, and may hold more: {error}{hint}")
        });
        bare.chain(unusable).chain(unread).collect()
    }
}

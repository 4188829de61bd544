//! Owns: `gaps`: every hole of every lineage in all repositories together, what single ones lack; as table, JSON or page.
//! Does not own: what a gap is (`continuity`), the page (`gaps/`).

mod drawing;
mod page;
mod report;

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::Serialize;

use super::args::{GapsArgs, Global};
use super::repositories::{self, Copy, Look, Unread};
use super::restorable::{self, Restorable};
use super::{Verdict, output, setup};
use crate::catalog::Holdings;
use crate::config::ArchiveConfig;
use crate::continuity::{self, Gap, GapState, Lack, Run};
use crate::error::{ExitCode, Failure};
use crate::repository::layout::Lineage;
use crate::wal::Lsn;
use report::{LineageReport, Report};

#[derive(Debug, Default, Serialize)]
struct Answer {
    gaps: Vec<ShownGap>,
    /// What one repository does not hold and another one does.
    lacks: Vec<ShownLack>,
    /// They may hold more than was seen.
    unread: Vec<ShownUnread>,
}

#[derive(Clone, Debug, Serialize)]
struct ShownGap {
    id: String,
    cluster: String,
    lineage: String,
    timeline: u32,
    from_lsn: Lsn,
    to_lsn: Lsn,
    bytes: u64,
    detected: Option<Timestamp>,
    cause: Option<String>,
    state: GapState,
    healed_by: Option<String>,
}

#[derive(Clone, Debug, Serialize)]
struct ShownLack {
    repository: String,
    cluster: String,
    lineage: String,
    timeline: u32,
    from_lsn: Lsn,
    to_lsn: Lsn,
    bytes: u64,
    held_by: Vec<String>,
}

#[derive(Clone, Debug, Serialize)]
struct ShownUnread {
    repository: String,
    cluster: String,
    error: String,
    hint: Option<String>,
}

pub fn run(global: &Global, args: &GapsArgs) -> Result<Verdict, Failure> {
    let chosen = setup::chosen_archives(global)?;
    let (answer, lineages) = setup::block_on(find(&chosen, args.html.is_some()))??;
    if let Some(path) = &args.html {
        let report = Report {
            made: Timestamp::now(),
            host: setup::host_name(),
            lineages,
            gaps: answer.gaps.clone(),
            lacks: answer.lacks.clone(),
            unread: answer.unread.iter().map(ShownUnread::in_words).collect(),
        };
        std::fs::write(path, page::page(&report)).map_err(|error| {
            Failure::new(ExitCode::Permission, format!("could not write {}: {error}", path.display()))
                .hint("is there room, and may this user write there?")
        })?;
    }
    match global.json {
        true => output::json(&answer),
        false => print(&answer),
    }
    let is_open = answer.gaps.iter().any(|gap| gap.state == GapState::Open);
    Ok(if is_open || !answer.unread.is_empty() { Verdict::Finding } else { Verdict::Fine })
}

/// The answer; what the page says of each lineage too where there is to be one.
async fn find(archives: &[ArchiveConfig], has_page: bool) -> Result<(Answer, Vec<LineageReport>), Failure> {
    let mut answer = Answer::default();
    let mut reports = Vec::new();
    for config in archives {
        let looks = repositories::look(&config.repositories, &config.cluster).await;
        let lineages = repositories::all_lineages(&looks);
        if lineages.is_empty() {
            return Err(repositories::nothing(&looks, &config.cluster));
        }
        for (lineage, _) in lineages {
            let found = match has_page {
                true => restorable::read(&looks, &lineage).await?,
                false => without_backups(&looks, &lineage).await?,
            };
            let first = answer.gaps.len();
            add_lineage(&mut answer, &lineage, &found.copies, &found.held);
            if has_page {
                let location = |look: &Look| (look.config.name.clone(), look.backend.describe());
                let locations: BTreeMap<String, String> = looks.iter().map(location).collect();
                reports.push(report::of_lineage(&lineage, &found, &locations, &answer.gaps[first..]));
            }
            found.unread.into_iter().for_each(|unread| add_unread(&mut answer, &config.cluster, unread));
        }
    }
    Ok((answer, reports))
}

async fn without_backups<'a>(looks: &'a [Look], lineage: &Lineage) -> Result<Restorable<'a>, Failure> {
    let (copies, unread) = repositories::copies(looks, lineage).await;
    if copies.is_empty() {
        return Err(unread.into_iter().next().expect("a lineage was found somewhere").failure);
    }
    let held = repositories::union(lineage, &copies)?;
    Ok(Restorable { copies, held, backups: Vec::new(), unread })
}

fn add_lineage(answer: &mut Answer, lineage: &Lineage, copies: &[Copy<'_>], all: &Holdings) {
    let name = lineage.directory_name();
    answer.gaps.extend(continuity::gaps_of(all).into_iter().map(|gap| shown(&lineage.cluster, &name, gap)));
    let each: Vec<(&str, Holdings)> =
        copies.iter().map(|copy| (copy.repository, Holdings::of(&copy.catalog))).collect();
    let runs: Vec<(&str, Vec<Run>)> = each.iter().map(|(name, held)| (*name, continuity::all_runs(held))).collect();
    for (repository, held) in &each {
        for lack in continuity::lacks(all, held) {
            let holders = runs.iter().filter(|(_, runs)| lack.is_touched_by(runs));
            let Lack { timeline, from, to } = lack;
            answer.lacks.push(ShownLack {
                repository: repository.to_string(),
                cluster: lineage.cluster.clone(),
                lineage: name.clone(),
                timeline: timeline.0,
                from_lsn: from,
                to_lsn: to,
                bytes: to.saturating_distance(from),
                held_by: holders.map(|(name, _)| name.to_string()).collect(),
            });
        }
    }
}

/// Said once, not for every lineage.
fn add_unread(answer: &mut Answer, cluster: &str, unread: Unread) {
    let Unread { repository, failure } = unread;
    if answer.unread.iter().all(|known| known.repository != repository || known.cluster != cluster) {
        let (cluster, error, hint) = (cluster.to_string(), failure.message, failure.hint);
        answer.unread.push(ShownUnread { repository, cluster, error, hint });
    }
}

fn shown(cluster: &str, lineage: &str, gap: Gap) -> ShownGap {
    ShownGap {
        bytes: gap.bytes(),
        id: gap.id,
        cluster: cluster.to_string(),
        lineage: lineage.to_string(),
        timeline: gap.timeline.0,
        from_lsn: gap.from,
        to_lsn: gap.to,
        detected: gap.detected,
        cause: gap.cause,
        state: gap.state,
        healed_by: gap.healed_by,
    }
}

const COLUMNS: [&str; 9] = ["CLUSTER", "LINEAGE", "TIMELINE", "FROM", "TO", "SIZE", "DETECTED", "STATE", "CAUSE"];

fn cells(gap: &ShownGap) -> [String; 9] {
    let state = match (gap.state, &gap.healed_by) {
        (GapState::Open, _) => "open".to_string(),
        (GapState::Healed, None) => "healed".to_string(),
        (GapState::Healed, Some(by)) => format!("healed by {by}"),
    };
    [
        gap.cluster.clone(),
        gap.lineage.clone(),
        gap.timeline.to_string(),
        gap.from_lsn.to_string(),
        gap.to_lsn.to_string(),
        output::size(gap.bytes),
        gap.detected.map_or("unknown".to_string(), |time| time.strftime("%Y-%m-%d %H:%M:%SZ").to_string()),
        state,
        gap.cause.clone().unwrap_or_else(|| "unknown".to_string()),
    ]
}

fn print(answer: &Answer) {
    if answer.gaps.is_empty() {
        output::text("no gaps");
    } else {
        let mut table = output::table(&COLUMNS);
        for gap in &answer.gaps {
            table.add_row(cells(gap));
        }
        output::text(&table.to_string());
    }
    answer.remarks().iter().for_each(|remark| output::text(remark));
}

impl Answer {
    /// What else is to be known about the repositories.
    fn remarks(&self) -> Vec<String> {
        let lacks = self.lacks.iter().map(|lack| {
            format!(
                "repository {} lacks {} to {} ({}) of timeline {} of cluster {}; {} holds it, and the agent copies it",
                lack.repository,
                lack.from_lsn,
                lack.to_lsn,
                output::size(lack.bytes),
                lack.timeline,
                lack.cluster,
                lack.held_by.join(" or ")
            )
        });
        let unread = self.unread.iter().map(ShownUnread::in_words);
        lacks.chain(unread).collect()
    }
}

impl ShownUnread {
    fn in_words(&self) -> String {
        let hint = self.hint.as_ref().map(|hint| format!(" ({hint})")).unwrap_or_default();
        let (repository, cluster, error) = (&self.repository, &self.cluster, &self.error);
        format!("repository {repository} of cluster {cluster} cannot be read, and may hold more: {error}{hint}")
    }
}

//! Owns: `gaps`: every hole of every lineage in all repositories together, what single ones lack; as table, JSON or page.
//! Does not own: what a gap is (`continuity`).

use std::fmt::Write;

use jiff::Timestamp;
use serde::Serialize;

use super::args::{GapsArgs, Global};
use super::repositories::{self, Copy, Unread};
use super::{Verdict, output, setup};
use crate::catalog::Holdings;
use crate::config::ArchiveConfig;
use crate::continuity::{self, Gap, GapState, Lack, Run};
use crate::error::{ExitCode, Failure};
use crate::repository::layout::Lineage;
use crate::wal::Lsn;

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
    let answer = setup::block_on(find(&chosen))??;
    if let Some(path) = &args.html {
        std::fs::write(path, page(&answer)).map_err(|error| {
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

async fn find(archives: &[ArchiveConfig]) -> Result<Answer, Failure> {
    let mut answer = Answer::default();
    for config in archives {
        let looks = repositories::look(&config.repositories, &config.cluster).await;
        let lineages = repositories::all_lineages(&looks);
        if lineages.is_empty() {
            return Err(repositories::nothing(&looks, &config.cluster));
        }
        for (lineage, _) in lineages {
            let (copies, unread) = repositories::copies(&looks, &lineage).await;
            if copies.is_empty() {
                return Err(unread.into_iter().next().expect("a lineage was found somewhere").failure);
            }
            add_lineage(&mut answer, &lineage, &copies)?;
            unread.into_iter().for_each(|unread| add_unread(&mut answer, &config.cluster, unread));
        }
    }
    Ok(answer)
}

fn add_lineage(answer: &mut Answer, lineage: &Lineage, copies: &[Copy<'_>]) -> Result<(), Failure> {
    let name = lineage.directory_name();
    let all = repositories::union(lineage, copies)?;
    answer.gaps.extend(continuity::gaps_of(&all).into_iter().map(|gap| shown(&lineage.cluster, &name, gap)));
    let each: Vec<(&str, Holdings)> =
        copies.iter().map(|copy| (copy.repository, Holdings::of(&copy.catalog))).collect();
    let runs: Vec<(&str, Vec<Run>)> = each.iter().map(|(name, held)| (*name, continuity::all_runs(held))).collect();
    for (repository, held) in &each {
        for lack in continuity::lacks(&all, held) {
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
    Ok(())
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
        let unread = self.unread.iter().map(|unread| {
            let hint = unread.hint.as_ref().map(|hint| format!(" ({hint})")).unwrap_or_default();
            let (repository, cluster, error) = (&unread.repository, &unread.cluster, &unread.error);
            format!("repository {repository} of cluster {cluster} cannot be read, and may hold more: {error}{hint}")
        });
        lacks.chain(unread).collect()
    }
}

/// One self-contained page.
fn page(answer: &Answer) -> String {
    let gaps = &answer.gaps;
    let open = gaps.iter().filter(|gap| gap.state == GapState::Open).count();
    let mut rows = String::new();
    for gap in gaps {
        let cells: String = cells(gap).iter().map(|cell| format!("<td>{}</td>", escaped(cell))).collect();
        let _ = writeln!(rows, "<tr>{cells}</tr>");
    }
    let header: String = COLUMNS.iter().map(|name| format!("<th>{name}</th>")).collect();
    let remarks: String = answer.remarks().iter().map(|remark| format!("<p>{}</p>\n", escaped(remark))).collect();
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head><meta charset=\"utf-8\"><title>Seawall: gaps</title>\n<style>\
         body {{ font-family: sans-serif }} td, th {{ text-align: left; padding: 0.2em 1em 0.2em 0; \
         font-variant-numeric: tabular-nums }}</style></head>\n<body>\n<h1>Gaps in the archive</h1>\n\
         <p>{open} open, {} healed.</p>\n<table>\n<tr>{header}</tr>\n{rows}</table>\n{remarks}</body>\n</html>\n",
        gaps.len() - open
    )
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_shows_causes_as_text() {
        let gap = ShownGap {
            id: "1-0-8".into(),
            cluster: "main".into(),
            lineage: "7".into(),
            timeline: 1,
            from_lsn: Lsn(0),
            to_lsn: Lsn(8),
            bytes: 8,
            detected: None,
            cause: Some("<script>&".into()),
            state: GapState::Open,
            healed_by: None,
        };
        let error = "it's <gone>".to_string();
        let unread = ShownUnread { repository: "offsite".into(), cluster: "main".into(), error, hint: None };
        let page = page(&Answer { gaps: vec![gap], lacks: Vec::new(), unread: vec![unread] });
        assert!(page.contains("offsite") && page.contains("&lt;gone&gt;"), "{page}");
        assert!(page.contains("1 open, 0 healed") && page.contains("&lt;script&gt;&amp;"), "{page}");
    }
}

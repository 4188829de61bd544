//! Owns: `gaps`: every hole of every lineage, as table, JSON or page.
//! Does not own: what a gap is (`continuity`).

use std::fmt::Write;
use std::sync::Arc;

use jiff::Timestamp;
use serde::Serialize;

use super::args::{GapsArgs, Global};
use super::{Verdict, output, setup};
use crate::catalog::store::{self, Archive};
use crate::config::ArchiveConfig;
use crate::continuity::{self, Gap, GapState};
use crate::error::{ExitCode, Failure};
use crate::repository::Backend;
use crate::wal::Lsn;

#[derive(Debug, Serialize)]
struct Answer {
    gaps: Vec<ShownGap>,
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

pub fn run(global: &Global, args: &GapsArgs) -> Result<Verdict, Failure> {
    let archives = setup::archives(global)?;
    let chosen = match &global.cluster {
        Some(name) => vec![ArchiveConfig::choose(&archives, Some(name))?.clone()],
        None => archives,
    };
    let answer = Answer { gaps: setup::block_on(find(&chosen))?? };
    if let Some(path) = &args.html {
        std::fs::write(path, page(&answer.gaps)).map_err(|error| {
            Failure::new(ExitCode::Permission, format!("could not write {}: {error}", path.display()))
                .hint("is there room, and may this user write there?")
        })?;
    }
    match global.json {
        true => output::json(&answer),
        false => print(&answer.gaps),
    }
    let is_open = answer.gaps.iter().any(|gap| gap.state == GapState::Open);
    Ok(if is_open { Verdict::Finding } else { Verdict::Fine })
}

async fn find(archives: &[ArchiveConfig]) -> Result<Vec<ShownGap>, Failure> {
    let mut found = Vec::new();
    for config in archives {
        let backend: Arc<dyn Backend> = setup::backend(&config.repositories[0]);
        for archive in lineages(&backend, &config.cluster).await? {
            let catalog = archive.load_catalog().await?;
            let lineage = archive.lineage.directory_name();
            found.extend(continuity::gaps(&catalog).into_iter().map(|gap| shown(&config.cluster, &lineage, gap)));
        }
    }
    Ok(found)
}

/// Every lineage of a cluster, oldest first; there must be one.
async fn lineages(backend: &Arc<dyn Backend>, cluster: &str) -> Result<Vec<Archive>, Failure> {
    let is_repository = store::read_repository(backend.as_ref()).await?.is_some();
    let found = if is_repository { store::lineages(backend.as_ref(), cluster).await? } else { Vec::new() };
    if found.is_empty() {
        let message = format!("{} holds nothing for cluster {cluster}", backend.describe());
        return Err(Failure::new(ExitCode::Config, message).hint(
            "is --cluster right, and is `url` (or --repository) the right one? `seawall run` begins an archive",
        ));
    }
    Ok(found.into_iter().map(|(lineage, _)| Archive::new(backend.clone(), lineage)).collect())
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

fn print(gaps: &[ShownGap]) {
    if gaps.is_empty() {
        return output::text("no gaps");
    }
    let mut table = output::table(&COLUMNS);
    for gap in gaps {
        table.add_row(cells(gap));
    }
    output::text(&table.to_string());
}

/// One self-contained page.
fn page(gaps: &[ShownGap]) -> String {
    let open = gaps.iter().filter(|gap| gap.state == GapState::Open).count();
    let mut rows = String::new();
    for gap in gaps {
        let cells: String = cells(gap).iter().map(|cell| format!("<td>{}</td>", escaped(cell))).collect();
        let _ = writeln!(rows, "<tr>{cells}</tr>");
    }
    let header: String = COLUMNS.iter().map(|name| format!("<th>{name}</th>")).collect();
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head><meta charset=\"utf-8\"><title>Seawall: gaps</title>\n<style>\
         body {{ font-family: sans-serif }} td, th {{ text-align: left; padding: 0.2em 1em 0.2em 0; \
         font-variant-numeric: tabular-nums }}</style></head>\n<body>\n<h1>Gaps in the archive</h1>\n\
         <p>{open} open, {} healed.</p>\n<table>\n<tr>{header}</tr>\n{rows}</table>\n</body>\n</html>\n",
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
        let page = page(&[gap]);
        assert!(page.contains("1 open, 0 healed") && page.contains("&lt;script&gt;&amp;"), "{page}");
    }
}

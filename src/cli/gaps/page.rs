//! Owns: the continuity report as one self-contained page: no script, nothing fetched, readable printed and in the dark.
//! Does not own: the facts (`report.rs`), the drawing (`drawing.rs`).

use jiff::Timestamp;
use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::drawing;
use super::report::{LineageReport, RangeReport, Report, RepositoryReport, RunReport, TimelineReport};
use super::{ShownGap, ShownLack};
use crate::catalog::LedgerFact;
use crate::cli::output;
use crate::continuity::GapState;
use crate::wal::Proof;

const STYLE: &str = include_str!("page.css");
/// Rows of a table; what is beyond is counted, and in the JSON answer.
const ROWS_MAX: usize = 500;
const RUNS_MAX: usize = 60;
/// How an auditor computes what stands under "CRC of the list".
const RECIPE: &str = "jq -r '.entries[] | \"\\(.segment) \\(.raw_crc32) \\(.stored_crc32)\"' DIRECTORY/*.index.json \\\n  \
    | LC_ALL=C sort -u | gzip -1 | tail -c 8 | head -c 4 | od -A n -t x4";

pub fn page(report: &Report) -> String {
    let markup = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="generator" content=(concat!("seawall ", env!("CARGO_PKG_VERSION")));
                title { "WAL continuity: " (clusters(report)) ", " (report.made.strftime("%Y-%m-%d")) }
                style { (PreEscaped(STYLE)) }
            }
            body {
                // Shared by all drawings.
                svg width="0" height="0" style="position:absolute" aria-hidden="true" { (drawing::patterns()) }
                (head(report))
                @for lineage in &report.lineages { (of_lineage(lineage, report)) }
                (method())
            }
        }
    };
    let mut text = markup.into_string();
    text.push('\n');
    text
}

fn clusters(report: &Report) -> String {
    let mut names: Vec<&str> = report.lineages.iter().map(|lineage| lineage.cluster.as_str()).collect();
    names.dedup();
    names.join(", ")
}

fn count(gaps: &[ShownGap], state: GapState) -> usize {
    gaps.iter().filter(|gap| gap.state == state).count()
}

fn head(report: &Report) -> Markup {
    let (open, healed) = (count(&report.gaps, GapState::Open), count(&report.gaps, GapState::Healed));
    let is_good = open == 0 && report.unread.is_empty() && report.lacks.is_empty();
    html! {
        h1 { "WAL continuity of " (clusters(report)) }
        p.dim {
            "Made " (instant(report.made)) " by seawall " (env!("CARGO_PKG_VERSION"))
            @if let Some(host) = &report.host { " on " (host) }
            ", from the archive alone."
        }
        div.verdict.bad[!is_good] {
            strong {
                @match open {
                    0 => "No gap is open.",
                    1 => "One gap is open.",
                    _ => { (open) " gaps are open." },
                }
            }
            p { "Gaps: " (open) " open, " (healed) " healed." }
            @for unread in &report.unread { p.open { (unread) } }
            @for lack in report.lacks.iter().take(ROWS_MAX) { p { (lacking(lack)) } }
        }
    }
}

fn lacking(lack: &ShownLack) -> String {
    format!(
        "Repository {} lacks {} to {} ({}) of timeline {} of cluster {}; {} holds it.",
        lack.repository,
        lack.from_lsn,
        lack.to_lsn,
        output::size(lack.bytes),
        lack.timeline,
        lack.cluster,
        lack.held_by.join(" or ")
    )
}

fn of_lineage(lineage: &LineageReport, report: &Report) -> Markup {
    html! {
        h2 { "Cluster " (lineage.cluster) ", lineage " (lineage.lineage) }
        dl {
            dt { "System identifier" } dd { (lineage.system_id) }
            dt { "PostgreSQL" } dd { (lineage.server_version) ", WAL segments of " (output::size(lineage.segment_size.bytes())) }
            dt { "Archived since" } dd {
                (instant(lineage.created))
                @if let Some(lsn) = lineage.start_lsn { ", from " (lsn) " on" }
            }
            dt { "Repositories" } dd {
                @for (index, repository) in lineage.repositories.iter().enumerate() {
                    @if index > 0 { br; }
                    (repository.name) ": " span.mono { (repository.location) }
                }
            }
        }
        h3 { "Coverage" }
        @match drawing::coverage(lineage) {
            Some(drawing) => {
                (drawing)
                div.legend {
                    span.l-run { "archived" } span.l-window { "can be restored" } span.l-gap { "gap" }
                    span.l-healed { "gap, healed" } span.l-backup { "backup" } span.l-fork { "fork" }
                }
            }
            None => p { "No WAL is archived." },
        }
        (coverage_table(lineage))
        h3 { "Gaps" }
        (gap_table(lineage))
        h3 { "Backups" }
        (backup_table(lineage))
        @for repository in &lineage.repositories { (evidence(repository, report)) }
    }
}

fn runs_of(timeline: &TimelineReport) -> impl Iterator<Item = (&TimelineReport, &RunReport)> {
    timeline.runs.iter().map(move |run| (timeline, run))
}

fn coverage_table(lineage: &LineageReport) -> Markup {
    let rows: Vec<(&TimelineReport, &RunReport)> = lineage.timelines.iter().flat_map(runs_of).collect();
    html! {
        div.scroll { table {
            thead { tr {
                th { "Timeline" } th { "From" } th { "To" } th.number { "WAL" } th { "Last commit" } th { "Began" } th { "Records" }
            } }
            tbody { @for (timeline, run) in rows.iter().rev().take(RUNS_MAX).rev() { tr {
                td.tight { (timeline.timeline) }
                td.tight.code { (run.from) }
                td.tight.code { (run.to) }
                td.tight.number { (output::size(run.to.saturating_distance(run.from))) }
                td.tight { (maybe(run.last_commit)) }
                td.tight { @match timeline.parent { Some((parent, at)) => { "at " (at) " of timeline " (parent) }, None => "-" } }
                td { (match run.proof { Proof::Proven => "proven", Proof::Unproven => "stored as they came, format not known" }) }
            } } }
        } }
        (rest(rows.len(), RUNS_MAX, "older stretches"))
    }
}

fn gap_table(lineage: &LineageReport) -> Markup {
    if lineage.gaps.is_empty() {
        return html! { p { "None: every byte between the first and the last one above is in the archive, or was let go by retention." } };
    }
    html! {
        div.scroll { table {
            thead { tr {
                th { "Timeline" } th { "From" } th { "To" } th.number { "Bytes" } th { "Between commits of" } th { "Detected" }
                th { "State" } th { "Cause" }
            } }
            tbody { @for report in lineage.gaps.iter().take(ROWS_MAX) {
                @let gap = &report.gap;
                tr {
                    td.tight { (gap.timeline) }
                    td.tight.code { (gap.from_lsn) }
                    td.tight.code { (gap.to_lsn) }
                    td.tight.number { (gap.bytes) }
                    td { (maybe(report.before)) " and " (maybe(report.after)) }
                    td.tight { (maybe(gap.detected)) }
                    td { (state(gap)) }
                    td { (gap.cause.as_deref().unwrap_or("not recorded")) }
                }
            } }
        } }
        (rest(lineage.gaps.len(), ROWS_MAX, "more gaps, which `gaps --json` lists"))
    }
}

fn state(gap: &ShownGap) -> Markup {
    match (gap.state, &gap.healed_by) {
        (GapState::Open, _) => html! { span.open { "open" } },
        (GapState::Healed, None) => html! { span.fine { "healed" } },
        (GapState::Healed, Some(by)) => html! { span.fine { "healed" } " by " (by) },
    }
}

fn backup_table(lineage: &LineageReport) -> Markup {
    if lineage.backups.is_empty() {
        return html! { p.open { "There is no complete backup: none of this WAL can be replayed." } };
    }
    html! {
        div.scroll { table {
            thead { tr { th { "Backup" } th { "Finished" } th { "Timeline" } th { "Start" } th { "Consistent at" } th { "Repositories" } } }
            tbody { @for backup in lineage.backups.iter().rev().take(ROWS_MAX) { tr {
                td.tight.code { (backup.id) }
                td.tight { (instant(backup.finished)) }
                td.tight { (backup.timeline) }
                td.tight.code { (backup.start_lsn) }
                td.tight.code { (backup.stop_lsn) }
                td { (backup.repositories.join(", ")) }
            } } }
        } }
        (rest(lineage.backups.len(), ROWS_MAX, "older backups"))
    }
}

fn evidence(repository: &RepositoryReport, report: &Report) -> Markup {
    let sum = |of: fn(&RangeReport) -> u64| repository.sum(of);
    html! {
        h3 { "Evidence in repository " (repository.name) }
        dl {
            dt { "Sealed segments" } dd {
                (sum(|range| range.segments)) ", " (output::size(sum(|range| range.raw_bytes))) " of WAL in "
                (output::size(sum(|range| range.stored_bytes))) ", each listed in the size its index entry tells"
            }
            dt { "Records" } dd {
                (sum(|range| range.records)) " checked before they were stored"
                @if sum(|range| range.unproven) > 0 { "; " (sum(|range| range.unproven)) " segments are in a format that was not known" }
            }
            dt { "Unfinished segments" } dd { (sum(|range| range.tails)) " tail objects, " (output::size(sum(|range| range.tail_bytes))) }
            dt { "Index" } dd { (sum(|range| range.index_objects)) " objects, " (output::size(sum(|range| range.index_bytes))) }
            @if sum(|range| range.missing + range.disputed + range.repaired) > 0 {
                dt { "Not as the index tells" } dd.open {
                    (sum(|range| range.missing)) " missing or of another size, " (sum(|range| range.disputed))
                    " with two contents, " (sum(|range| range.repaired)) " repaired"
                }
            }
            dt { "Read back last" } dd {
                @match repository.verified.first() {
                    Some(fact) => (verified(fact, report.made)),
                    None => span.open { "the ledger tells of no verification" },
                }
            }
        }
        @if !repository.ranges.is_empty() {
            div.scroll { table {
                thead { tr {
                    th { "WAL directories" } th.number { "Segments" } th { "First" } th { "Last" } th.number { "WAL" }
                    th.number { "Stored" } th.number { "Records" } th.number { "Tails" } th { "CRC of the list" }
                } }
                tbody { @for range in &repository.ranges { (of_range(range)) } }
            } }
        }
        (ledger(repository))
    }
}

fn of_range(range: &RangeReport) -> Markup {
    let name = |name: Option<crate::wal::SegmentName>| name.map_or("-".to_string(), |name| name.to_string());
    html! { tr {
        td.tight.code { (range.first) @if range.directories > 1 { br; "to " (range.last) " (" (range.directories) ")" } }
        td.tight.number { (range.segments) }
        td.tight.code { (name(range.first_segment)) }
        td.tight.code { (name(range.last_segment)) }
        td.tight.number { (output::size(range.raw_bytes)) }
        td.tight.number { (output::size(range.stored_bytes)) }
        td.tight.number { (range.records) }
        td.tight.number { (range.tails) }
        td.tight.code { (format!("{:08x}", range.list_crc32.0)) }
    } }
}

/// `verify` says in its facts what it read; what is there is shown.
fn verified(fact: &LedgerFact, made: Timestamp) -> Markup {
    let detail = |name: &str| {
        fact.details.get(name).map(|value| value.as_str().map_or_else(|| value.to_string(), str::to_string))
    };
    let days = made.duration_since(fact.at).as_hours() / 24;
    let faults = detail("faults");
    html! {
        (instant(fact.at))
        @if days > 0 { " (" (days) " days ago)" }
        @if let Some(mode) = detail("mode") { ", " (mode) }
        @if let Some(objects) = detail("objects") { ", " (objects) " objects" }
        @if let Some(bytes) = detail("bytes").and_then(|bytes| bytes.parse().ok()) { ", " (output::size(bytes)) }
        @if let Some(faults) = &faults {
            ", " span class=(if faults == "0" { "fine" } else { "open" }) { (faults) " faults" }
        }
        @if detail("finished").as_deref() == Some("false") { ", not finished" }
        ": " (fact.cause)
    }
}

fn ledger(repository: &RepositoryReport) -> Markup {
    if repository.facts.is_empty() {
        return html! { p.small { "The ledger of this repository has " (repository.ledger_facts) " facts, none of them about trouble." } };
    }
    let place = |fact: &LedgerFact| match (fact.timeline, fact.from_lsn, fact.to_lsn) {
        (Some(timeline), Some(from), Some(to)) => format!("timeline {timeline}, {from} to {to}"),
        (Some(timeline), ..) => format!("timeline {timeline}"),
        _ => "-".to_string(),
    };
    html! {
        p.small { "From the ledger, the newest first: " (repository.facts.len()) " of " (repository.ledger_facts) " facts." }
        div.scroll { table {
            thead { tr { th { "At" } th { "Fact" } th { "About" } th { "In words" } } }
            tbody { @for fact in &repository.facts { tr {
                td.tight { (instant(fact.at)) }
                td.tight { (fact.kind.word()) }
                td { (place(fact)) }
                td { (fact.cause) }
            } } }
        } }
    }
}

fn method() -> Markup {
    html! {
        h2 { "What this rests on" }
        p {
            "Made from listings, index files, histories, backups' records and the ledger of every repository named above; no "
            "segment was read for it. A segment counts when an index entry describes it and an object of exactly the size told "
            "is listed under its name; of an unfinished segment, its tails count as far as they follow one another. Objects are "
            "created once and never replaced."
        }
        p {
            "Before a byte was stored, the record it belongs to was whole, its CRC-32C right, and linked to the record before "
            "it, across segments; pages had the right address, timeline and system identifier. The index entry then keeps the "
            "CRC-32 (IEEE) of the segment as the server wrote it (raw) and of the object as it is stored (compressed, encrypted "
            "where that is configured), the number of records, and their bounds. Whether objects still have these checksums, "
            "reading them back tells: " code { "seawall verify --full" } "; when that was last done stands with each repository."
        }
        p {
            "The " em { "CRC of the list" } " is the CRC-32 (IEEE) over one line per segment, in the order of their names: name, "
            "raw CRC, stored CRC, and a line feed. Where several entries describe a segment, the one that has its object's size "
            "counts; segments whose object is missing, of another size, repaired or expired are left out. Where there are none "
            "of these, it is computed so, from the index files of the WAL directories of a row:"
        }
        pre { (RECIPE) }
        p {
            "WAL between the start of the archive, or of what retention has kept, and its end that no repository holds is a gap. "
            "A gap is healed when its WAL was found elsewhere, or when a backup begins behind it: what lies before it can be "
            "restored up to it, what lies behind from the backup on. Positions are LSNs; a range includes its first byte and not "
            "its end. Times are UTC, as the server's commits have them."
        }
    }
}

fn rest(count: usize, max: usize, what: &str) -> Markup {
    html! { @if count > max { p.small { "And " (count - max) " " (what) "." } } }
}

fn instant(time: Timestamp) -> String {
    time.strftime("%Y-%m-%d %H:%M:%SZ").to_string()
}

fn maybe(time: Option<Timestamp>) -> String {
    time.map_or("not known".to_string(), instant)
}

#[cfg(test)]
mod tests;

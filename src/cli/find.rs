//! Owns: `find`: when did it happen, and which `restore --to …` stops just before it; as table and JSON.
//! Does not own: what counts as an event (`catalog::events`), the proof of WAL (`wal`), restoring.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::Serialize;

use super::args::{FindArgs, Global};
use super::repositories::{self, Copy, Look};
use super::{Verdict, keys, output, setup};
use crate::catalog::events::{self, Between, Event, EventKind};
use crate::catalog::{DirectoryContents, Holdings, IndexEntry};
use crate::codec::encrypt::Keys;
use crate::config::ArchiveConfig;
use crate::continuity;
use crate::error::{ExitCode, Failure};
use crate::repository::layout::Lineage;
use crate::restore::wal_get::{Holder, Outcome, PathChoice, WalGet};
use crate::wal::{Carry, History, Lsn, ScanOptions, Scanner, SegmentName, SegmentSummary, TimelineId};

const READ_BYTES: usize = 128 << 10;
/// A text table shows so many relations of one event.
const RELATIONS_SHOWN: usize = 3;

#[derive(Debug, Default, Serialize)]
struct Answer {
    events: Vec<ShownEvent>,
    /// What could not be looked into, and may hold more.
    unread: Vec<String>,
}

#[derive(Debug, Serialize)]
struct ShownEvent {
    cluster: String,
    lineage: String,
    #[serde(flatten)]
    event: Event,
}

pub fn run(global: &Global, args: &FindArgs) -> Result<Verdict, Failure> {
    let archives = setup::archives(global)?;
    let config = ArchiveConfig::choose(&archives, global.cluster.as_deref())?;
    let between = Between { since: args.since, until: args.until };
    let answer = setup::block_on(find(config, between))??;
    match global.json {
        true => output::json(&answer),
        false => print(&answer),
    }
    Ok(if answer.unread.is_empty() { Verdict::Fine } else { Verdict::Finding })
}

async fn find(config: &ArchiveConfig, between: Between) -> Result<Answer, Failure> {
    let keys = keys::reading(config.identity_file.as_deref())?;
    let looks = repositories::look(&config.repositories, &config.cluster).await;
    let lineages = repositories::all_lineages(&looks);
    if lineages.is_empty() {
        return Err(repositories::nothing(&looks, &config.cluster));
    }
    let mut answer = Answer::default();
    for (lineage, _) in lineages {
        let (copies, unread) = repositories::copies(&looks, &lineage).await;
        answer.unread.extend(
            unread
                .into_iter()
                .map(|unread| format!("repository {} cannot be read: {}", unread.repository, unread.failure)),
        );
        if copies.is_empty() {
            continue;
        }
        let held = repositories::union(&lineage, &copies)?;
        let sealed = sealed(&copies);
        let mut found = Vec::new();
        for (name, entry) in &sealed {
            found.extend(events::events(name.timeline, &entry.summary, between));
            if entry.summary.truncated && between.may_touch(&entry.summary) {
                answer.unread.push(format!("segment {name} holds more events than its index entry could keep"));
            }
        }
        for name in unfinished(&copies, &sealed) {
            match read_unfinished(&looks, &lineage, &keys, &held, &sealed, name).await {
                Ok(summary) => found.extend(events::events(name.timeline, &summary, between)),
                Err(failure) => answer.unread.push(format!("segment {name}, which is unfinished: {failure}")),
            }
        }
        found.sort_by_key(|event| (event.lsn, event.timeline));
        let (cluster, directory) = (&lineage.cluster, lineage.directory_name());
        let shown = |event| ShownEvent { cluster: cluster.clone(), lineage: directory.clone(), event };
        answer.events.extend(found.into_iter().map(shown));
    }
    Ok(answer)
}

/// Every sealed segment once, whoever holds it.
fn sealed<'a>(copies: &'a [Copy<'_>]) -> BTreeMap<SegmentName, &'a IndexEntry> {
    let directories = copies.iter().flat_map(|copy| copy.catalog.timelines.values().flatten());
    let entry = |contents: &'a DirectoryContents| {
        contents.entries.keys().filter_map(|&name| contents.sealed(name).map(|entry| (name, entry)))
    };
    directories.flat_map(entry).collect()
}

/// The last segment of each timeline, where there are only tails of it. Others are behind a hole, and `gaps` tells.
fn unfinished(copies: &[Copy<'_>], sealed: &BTreeMap<SegmentName, &IndexEntry>) -> Vec<SegmentName> {
    let mut last: BTreeMap<TimelineId, SegmentName> = BTreeMap::new();
    for contents in copies.iter().flat_map(|copy| copy.catalog.timelines.values().flatten()) {
        for &name in contents.tails.keys().filter(|name| !sealed.contains_key(name)) {
            let known = last.entry(name.timeline).or_insert(name);
            *known = name.max(*known);
        }
    }
    last.into_values().collect()
}

/// Puts the tails together as `wal-get` would, and reads what their records say.
async fn read_unfinished(
    looks: &[Look],
    lineage: &Lineage,
    keys: &Keys,
    held: &Holdings,
    sealed: &BTreeMap<SegmentName, &IndexEntry>,
    name: SegmentName,
) -> Result<SegmentSummary, Failure> {
    let holders = looks.iter().filter(|look| look.file_of(lineage).is_some());
    let holder = |look: &Look| Holder::new(&look.config.name, look.archive(lineage).with_keys(keys.clone()));
    let scratch = tempfile::tempdir().map_err(|error| local("make a directory for it", &error))?;
    let path = scratch.path().join(name.to_string());
    let wal_get = WalGet::new(holders.map(holder).collect(), PathChoice::Timeline(name.timeline));
    match wal_get.get(&name.to_string(), &path).await? {
        Outcome::Delivered => {}
        Outcome::Absent(absence) => {
            return Err(Failure::new(ExitCode::Finding, format!("not in the archive: {absence}")));
        }
    }
    let size = held.segment_size;
    let history = continuity::path_of(name.timeline, &held.histories, held.start_timeline)
        .unwrap_or_else(|| History::root(name.timeline));
    let pieces = held.pieces.get(&name.timeline).into_iter().flatten();
    let end = pieces.map(|piece| piece.to).max().unwrap_or(Lsn::ZERO);
    let before = sealed.range(..name).next_back().map(|(_, entry)| *entry);
    let start = name.number(size).map(|number| size.start_of(number)).expect("it was listed with this size");
    let carry = before.filter(|entry| entry.end_lsn == start && entry.segment.timeline == name.timeline);
    let carry = carry.map_or_else(Carry::default, |entry| entry.summary.carry.clone());
    let options = ScanOptions { system_id: lineage.system_id, segment_size: size, history };
    summarise(&path, Scanner::new(options, start, carry), end)
}

/// Reads a segment's file up to `end`: behind it are the zeros it was padded with.
fn summarise(path: &Path, mut scanner: Scanner, end: Lsn) -> Result<SegmentSummary, Failure> {
    let mut file = File::open(path).map_err(|error| local("read it", &error))?;
    let mut buffer = vec![0; READ_BYTES];
    while scanner.position() < end {
        let wanted = (end - scanner.position()).min(READ_BYTES as u64) as usize;
        file.read_exact(&mut buffer[..wanted]).map_err(|error| local("read it", &error))?;
        scanner
            .feed(scanner.position(), &buffer[..wanted])
            .map_err(|fault| Failure::new(ExitCode::Data, format!("its WAL is damaged: {fault}")))?;
    }
    Ok(scanner.summary_of_open_segment().clone())
}

fn local(verb: &str, error: &std::io::Error) -> Failure {
    Failure::new(ExitCode::Unavailable, format!("could not {verb}: {error}"))
        .hint("is there room, and may this user write there? TMPDIR names another place")
}

fn print(answer: &Answer) {
    if answer.events.is_empty() {
        output::text("nothing was dropped or truncated, and there is no restore point");
    } else {
        let mut table = output::table(&["TIME", "WHAT", "XID", "LSN", "TIMELINE", "TO STOP JUST BEFORE"]);
        for ShownEvent { event, .. } in &answer.events {
            let time = event.time.map_or("-".to_string(), |time| time.strftime("%Y-%m-%d %H:%M:%S%.3fZ").to_string());
            let xid = event.xid.map_or("-".to_string(), |xid| xid.to_string());
            let restore = format!("restore {}", event.restore);
            table.add_row([time, what(event), xid, event.lsn.to_string(), event.timeline.to_string(), restore]);
        }
        output::text(&table.to_string());
    }
    answer.unread.iter().for_each(|unread| output::note(format_args!("not looked into: {unread}")));
}

fn what(event: &Event) -> String {
    let shown = event.relations.iter().take(RELATIONS_SHOWN).cloned().collect::<Vec<_>>().join(" ");
    let more = match event.relations.len().saturating_sub(RELATIONS_SHOWN) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    match event.kind {
        EventKind::Drop => format!("drop {shown}{more}"),
        EventKind::Truncation => format!("truncate {shown}{more}"),
        EventKind::RestorePoint => format!("restore point {}", event.name.as_deref().unwrap_or("?")),
    }
}

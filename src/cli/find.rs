//! Owns: `find`: when did it happen, and which `restore --to …` stops just before it; as table and JSON.
//! Does not own: what counts as an event (`catalog::events`), the proof of WAL (`wal`), restoring.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::Serialize;

use super::args::{FindArgs, Global};
use super::repositories::{self, Copy, Look};
use super::{Verdict, keys, output, setup};
use crate::catalog::events::{self, Between, Event, EventKind};
use crate::catalog::{Archive, Digest, Holdings, IndexEntry};
use crate::codec::encrypt::Keys;
use crate::config::ArchiveConfig;
use crate::continuity;
use crate::error::{ExitCode, Failure};
use crate::repository::layout::Lineage;
use crate::restore::wal_get::{Holder, Outcome, PathChoice, WalGet};
use crate::wal::{Carry, History, Lsn, ScanOptions, Scanner, SegmentName, SegmentSize, SegmentSummary, TimelineId};

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
        let mut found = Vec::new();
        for entry in eventful(&looks, &copies, between).await? {
            let name = entry.segment;
            found.extend(events::events(name.timeline, &entry.summary, between));
            if entry.summary.truncated && between.may_touch(&entry.summary) {
                answer.unread.push(format!("segment {name} holds more events than its index entry could keep"));
            }
        }
        for name in unfinished(&copies) {
            match read_unfinished(&looks, &lineage, &keys, &held, &copies, name).await {
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

/// The whole entries of segments in which something happened, each once, whoever holds it.
async fn eventful(looks: &[Look], copies: &[Copy<'_>], between: Between) -> Result<Vec<IndexEntry>, Failure> {
    let mut seen = BTreeSet::new();
    let mut found = Vec::new();
    for copy in copies {
        let archive = archive_of(looks, copy);
        let wanted = |digest: &Digest| digest.has_events() && between.may_touch_digest(digest);
        for directory in copy.catalog.directories() {
            let is_new = |digest: &Digest| wanted(digest) && !seen.contains(&digest.segment);
            found.extend(archive.entries(directory, is_new).await?);
            seen.extend(directory.sealed.iter().filter(|digest| wanted(digest)).map(|digest| digest.segment));
        }
    }
    Ok(found)
}

fn archive_of(looks: &[Look], copy: &Copy<'_>) -> Archive {
    let look = looks.iter().find(|look| look.config.name == copy.repository).expect("copies are of these repositories");
    look.archive(&copy.catalog.lineage)
}

/// The last segment of each timeline, where there are only tails of it. Others are behind a hole, and `gaps` tells.
fn unfinished(copies: &[Copy<'_>]) -> Vec<SegmentName> {
    let mut last: BTreeMap<TimelineId, SegmentName> = BTreeMap::new();
    let is_open = |name: &&SegmentName| copies.iter().all(|copy| copy.catalog.sealed(**name).is_none());
    for directory in copies.iter().flat_map(|copy| copy.catalog.directories()) {
        for &name in directory.tails.keys().filter(is_open) {
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
    copies: &[Copy<'_>],
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
    let end = held.end(name.timeline).unwrap_or(Lsn::ZERO);
    let start = name.number(size).map(|number| size.start_of(number)).expect("it was listed with this size");
    let carry = carry_before(looks, copies, name.timeline, start, size).await?;
    let options = ScanOptions { system_id: lineage.system_id, segment_size: size, history };
    summarise(&path, Scanner::new(options, start, carry), end)
}

/// What the segment before leaves to whoever goes on proving, where somebody has it sealed.
async fn carry_before(
    looks: &[Look],
    copies: &[Copy<'_>],
    timeline: TimelineId,
    start: Lsn,
    size: SegmentSize,
) -> Result<Carry, Failure> {
    let before = SegmentName::new(timeline, size.segment_before(start), size);
    let Some(copy) = copies.iter().find(|copy| copy.catalog.sealed(before).is_some()) else {
        return Ok(Carry::default());
    };
    let contents = archive_of(looks, copy).directory_around(before, size).await?;
    Ok(contents.sealed(before).map_or_else(Carry::default, |entry| entry.summary.carry.clone()))
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

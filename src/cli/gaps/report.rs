//! Owns: what the continuity report says: coverage, gaps and evidence of each lineage, as values of bounded size.
//! Does not own: what a gap is (`continuity`), what can be restored (`restore/reach.rs`), how the page looks (`page.rs`).

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::Timestamp;

use super::{ShownGap, ShownLack};
use crate::catalog::union::Part;
use crate::catalog::{Crc32, DirectoryDigest, FactKind, Holdings, LedgerFact};
use crate::cli::repositories::Copy;
use crate::cli::restorable::Restorable;
use crate::repository::layout::{BackupId, Lineage, WalDirectory};
use crate::restore::reach::Reach;
use crate::wal::{Lsn, Proof, SegmentName, SegmentSize, TimelineId};

/// Ranges of directories told of one timeline in one repository: an archive of ten thousand directories has a page of
/// the same length.
const RANGES_MAX: usize = 24;
/// Ledger facts quoted, the newest.
const FACTS_MAX: usize = 60;

/// Everything on the page.
#[derive(Debug)]
pub struct Report {
    pub made: Timestamp,
    pub host: Option<String>,
    pub lineages: Vec<LineageReport>,
    pub gaps: Vec<ShownGap>,
    pub lacks: Vec<ShownLack>,
    /// Repositories that could not be read, and why.
    pub unread: Vec<String>,
}

#[derive(Debug)]
pub struct LineageReport {
    pub cluster: String,
    pub lineage: String,
    pub system_id: String,
    pub server_version: String,
    pub segment_size: SegmentSize,
    pub created: Timestamp,
    pub start_lsn: Option<Lsn>,
    pub timelines: Vec<TimelineReport>,
    pub backups: Vec<BackupReport>,
    pub gaps: Vec<GapReport>,
    pub repositories: Vec<RepositoryReport>,
    /// Positions with the time of the last commit before them, in order: what the axis says.
    pub times: Vec<(Lsn, Timestamp)>,
}

#[derive(Debug)]
pub struct TimelineReport {
    pub timeline: TimelineId,
    pub parent: Option<(TimelineId, Lsn)>,
    pub runs: Vec<RunReport>,
    /// What can be restored, of this timeline's own part of its line.
    pub windows: Vec<(Lsn, Lsn)>,
}

#[derive(Debug)]
pub struct RunReport {
    pub from: Lsn,
    pub to: Lsn,
    pub last_commit: Option<Timestamp>,
    pub proof: Proof,
}

#[derive(Debug)]
pub struct BackupReport {
    pub id: BackupId,
    pub timeline: TimelineId,
    pub start_lsn: Lsn,
    pub stop_lsn: Lsn,
    pub finished: Timestamp,
    pub repositories: Vec<String>,
}

/// A gap, and what is known on either side of it.
#[derive(Debug)]
pub struct GapReport {
    pub gap: ShownGap,
    /// The last commit known before it, and the earliest in the segment after it.
    pub before: Option<Timestamp>,
    pub after: Option<Timestamp>,
}

#[derive(Debug)]
pub struct RepositoryReport {
    pub name: String,
    pub location: String,
    pub ranges: Vec<RangeReport>,
    pub ledger_facts: usize,
    /// The newest run of `verify` first.
    pub verified: Vec<LedgerFact>,
    /// The newest of all others but expiry.
    pub facts: Vec<LedgerFact>,
}

/// Neighbouring WAL directories of one timeline.
#[derive(Debug)]
pub struct RangeReport {
    pub first: WalDirectory,
    pub last: WalDirectory,
    pub directories: usize,
    /// Sealed, indexed, and listed in the size the index tells.
    pub segments: u64,
    pub first_segment: Option<SegmentName>,
    pub last_segment: Option<SegmentName>,
    pub raw_bytes: u64,
    pub stored_bytes: u64,
    pub records: u64,
    /// Of the lines `NAME RAW-CRC STORED-CRC`, in the order of the names, each with a line feed.
    pub list_crc32: Crc32,
    pub unproven: u64,
    /// Indexed, and not listed in that size.
    pub missing: u64,
    /// Names with a second content.
    pub disputed: u64,
    pub repaired: u64,
    pub tails: u64,
    pub tail_bytes: u64,
    pub index_objects: u64,
    pub index_bytes: u64,
}

/// `locations` are by the names of repositories.
pub fn of_lineage(
    lineage: &Lineage,
    found: &Restorable<'_>,
    locations: &BTreeMap<String, String>,
    gaps: &[ShownGap],
) -> LineageReport {
    let reach = found.reach();
    let file = &found.copies[0].catalog.file;
    let backups = found.backups.iter().map(|backup| BackupReport {
        id: backup.id,
        timeline: backup.timeline,
        start_lsn: backup.start_lsn,
        stop_lsn: backup.stop_lsn,
        finished: backup.finished,
        repositories: backup.copies.iter().map(|copy| copy.repository.clone()).collect(),
    });
    LineageReport {
        cluster: lineage.cluster.clone(),
        lineage: lineage.directory_name(),
        system_id: lineage.system_id.to_string(),
        server_version: file.server_version.clone(),
        segment_size: found.held.segment_size,
        created: file.created,
        start_lsn: found.held.start_lsn,
        timelines: timelines(&reach),
        backups: backups.collect(),
        gaps: gaps.iter().map(|gap| around(gap, found)).collect(),
        repositories: found.copies.iter().map(|copy| of_repository(copy, locations)).collect(),
        times: times(&found.held),
    }
}

fn timelines(reach: &Reach<'_>) -> Vec<TimelineReport> {
    let of = |timeline: TimelineId| {
        let spans = reach.held.parts(timeline).iter().map(Part::span);
        let runs = crate::continuity::runs(timeline, spans).into_iter().map(|run| RunReport {
            from: run.from,
            to: run.to,
            last_commit: run.last_commit,
            proof: run.proof,
        });
        let line = reach.line(timeline);
        let begin = line.as_ref().and_then(|line| line.path.begin_of(timeline)).unwrap_or(Lsn::ZERO);
        let intervals = line.as_ref().map(|line| reach.intervals(line)).unwrap_or_default();
        let own = intervals.iter().map(|it| (it.from.lsn.max(begin), it.to.lsn)).filter(|(from, to)| from < to);
        let parent = line.as_ref().and_then(|line| line.path.parent());
        TimelineReport {
            timeline,
            parent: parent.map(|entry| (entry.timeline, entry.end)),
            runs: runs.collect(),
            windows: own.collect(),
        }
    };
    reach.timelines().into_iter().map(of).collect()
}

/// A few hundred positions are enough to label an axis with.
fn times(held: &Holdings) -> Vec<(Lsn, Timestamp)> {
    const POSITIONS: usize = 512;
    let pieces = held.parts.values().flatten().flat_map(Part::pieces);
    let mut all: Vec<(Lsn, Timestamp)> = pieces.filter_map(|piece| Some((piece.to, piece.last_commit?))).collect();
    all.sort();
    let step = all.len().div_ceil(POSITIONS).max(1);
    let last = all.last().copied();
    let mut some: Vec<(Lsn, Timestamp)> = all.into_iter().step_by(step).collect();
    some.extend(last);
    some
}

fn around(gap: &ShownGap, found: &Restorable<'_>) -> GapReport {
    let (timeline, size) = (TimelineId(gap.timeline), found.held.segment_size);
    let ending = found.held.parts(timeline).iter().filter(|part| {
        let span = part.span();
        span.from < gap.from_lsn && gap.from_lsn <= span.to
    });
    let before =
        ending.flat_map(Part::pieces).filter(|piece| piece.to == gap.from_lsn).find_map(|piece| piece.last_commit);
    let name = SegmentName::new(timeline, size.segment_of(gap.to_lsn), size);
    let after = found.copies.iter().find_map(|copy| copy.catalog.sealed(name)?.min_commit_time());
    GapReport { gap: gap.clone(), before, after }
}

fn of_repository(copy: &Copy<'_>, locations: &BTreeMap<String, String>) -> RepositoryReport {
    let ledger = &copy.catalog.ledger;
    let newest = |wanted: &dyn Fn(&LedgerFact) -> bool, max: usize| -> Vec<LedgerFact> {
        let mut facts: Vec<LedgerFact> = ledger.iter().filter(|fact| wanted(fact)).cloned().collect();
        facts.sort_by_key(|fact| std::cmp::Reverse(fact.at));
        facts.truncate(max);
        facts
    };
    RepositoryReport {
        name: copy.repository.to_string(),
        location: locations.get(copy.repository).cloned().unwrap_or_default(),
        ranges: copy.catalog.timelines.values().flat_map(|directories| ranges(directories)).collect(),
        ledger_facts: ledger.len(),
        verified: newest(&|fact| fact.kind == FactKind::Verify, 5),
        facts: newest(&|fact| !matches!(fact.kind, FactKind::Verify | FactKind::Expired), FACTS_MAX),
    }
}

/// The directories of one timeline, neighbours together where there are many.
pub fn ranges(directories: &[Arc<DirectoryDigest>]) -> Vec<RangeReport> {
    directories.chunks(directories.len().div_ceil(RANGES_MAX).max(1)).map(range).collect()
}

fn range(directories: &[Arc<DirectoryDigest>]) -> RangeReport {
    let (first, last) = (directories[0].directory, directories[directories.len() - 1].directory);
    let mut range = RangeReport {
        first,
        last,
        directories: directories.len(),
        segments: 0,
        first_segment: None,
        last_segment: None,
        raw_bytes: 0,
        stored_bytes: 0,
        records: 0,
        list_crc32: Crc32(0),
        unproven: 0,
        missing: 0,
        disputed: 0,
        repaired: 0,
        tails: 0,
        tail_bytes: 0,
        index_objects: 0,
        index_bytes: 0,
    };
    let mut list = crc32fast::Hasher::new();
    for contents in directories {
        range.missing += contents.missing.len() as u64;
        range.repaired += contents.repaired.len() as u64;
        for entry in contents.sealed.iter().filter(|entry| !contents.repaired.contains(&entry.segment)) {
            let name = entry.segment;
            list.update(format!("{name} {:08x} {:08x}\n", entry.raw_crc32.0, entry.stored_crc32.0).as_bytes());
            range.first_segment = range.first_segment.or(Some(name));
            range.last_segment = Some(name);
            range.segments += 1;
            range.raw_bytes += contents.segment_size.bytes();
            range.stored_bytes += entry.stored_bytes;
            range.records += u64::from(entry.records);
            range.unproven += u64::from(entry.proof == Proof::Unproven);
        }
        range.disputed += (contents.disputed.len() + contents.conflicts.len()) as u64;
        let tails = contents.tails.values().flatten();
        range.tails += tails.clone().count() as u64;
        range.tail_bytes += tails.map(|tail| tail.stored_bytes).sum::<u64>();
        range.index_objects += contents.index_files.len() as u64;
        range.index_bytes += contents.index_files.iter().map(|(_, bytes)| bytes).sum::<u64>();
    }
    range.list_crc32 = Crc32(list.finalize());
    range
}

impl RepositoryReport {
    pub fn sum(&self, of: impl Fn(&RangeReport) -> u64) -> u64 {
        self.ranges.iter().map(of).sum()
    }
}

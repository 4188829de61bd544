//! Owns: what can be restored: on each line of history, from the consistency of a backup to the end of the WAL that follows.
//! Does not own: which WAL is there (`continuity`), which backup serves a target (`choose.rs`), how it is shown (`cli`).
//! Pure.
//!
//! A line is the history of one timeline: its ancestors up to their forks, then itself. A backup counts for a line when
//! start and stop lie on it, and all WAL from the start of the segment that replay begins in is there without a hole.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;

use super::plan::BackupCopy;
use crate::catalog::union::{Part, SealedSpan};
use crate::catalog::{BackupFile, BackupRecord, Digest, Holdings, Piece};
use crate::continuity::{self, Gap, GapState, Run, Stretch};
use crate::repository::layout::BackupId;
use crate::wal::{History, Lsn, Proof, SegmentName, SegmentSize, TimelineId};

/// A complete backup, in every repository that has it and all that it builds on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KnownBackup {
    pub id: BackupId,
    pub timeline: TimelineId,
    pub start_lsn: Lsn,
    pub stop_lsn: Lsn,
    pub stop_time: Option<Timestamp>,
    pub finished: Timestamp,
    /// In the order the repositories were given; at least one.
    pub copies: Vec<BackupCopy>,
}

/// Repositories say different things of one backup.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("backup {id} is not the same in repositories {one} and {other}")]
pub struct BackupDisputed {
    pub id: BackupId,
    pub one: String,
    pub other: String,
}

/// The backups of a lineage that can be relied on, by when they are consistent.
pub fn known_backups(stored: &[(&str, &[BackupRecord])]) -> Result<Vec<KnownBackup>, BackupDisputed> {
    let mut known: BTreeMap<BackupId, KnownBackup> = BTreeMap::new();
    for (repository, records) in stored {
        let complete: BTreeMap<BackupId, &BackupFile> =
            records.iter().filter_map(|record| Some((record.id, record.complete()?))).collect();
        for file in complete.values() {
            let Some(chain) = chain_of(file, &complete) else { continue };
            let copy = BackupCopy { repository: repository.to_string(), chain };
            match known.get_mut(&file.id) {
                Some(other) if !is_same(other.copies[0].backup(), file) => {
                    let (one, other) = (other.copies[0].repository.clone(), repository.to_string());
                    return Err(BackupDisputed { id: file.id, one, other });
                }
                Some(backup) => backup.copies.push(copy),
                None => drop(known.insert(file.id, known_backup(file, copy))),
            }
        }
    }
    let mut backups: Vec<KnownBackup> = known.into_values().collect();
    backups.sort_by_key(|backup| (backup.stop_lsn, backup.timeline, backup.id));
    Ok(backups)
}

fn known_backup(file: &BackupFile, copy: BackupCopy) -> KnownBackup {
    KnownBackup {
        id: file.id,
        timeline: file.timeline,
        start_lsn: file.start_lsn,
        stop_lsn: file.stop_lsn,
        stop_time: file.stop_time,
        finished: file.finished,
        copies: vec![copy],
    }
}

/// What a backup builds on, oldest first, then itself; `None` when something of it is not there.
fn chain_of(file: &BackupFile, complete: &BTreeMap<BackupId, &BackupFile>) -> Option<Vec<BackupFile>> {
    let mut chain = vec![file.clone()];
    while let Some(parent) = chain.last().and_then(|last| last.parent) {
        let parent = complete.get(&parent)?;
        // Whatever is built on is older: a circle is nobody's chain.
        if chain.last().is_some_and(|last| parent.start_lsn >= last.start_lsn) {
            return None;
        }
        chain.push((*parent).clone());
    }
    chain.reverse();
    Some(chain)
}

fn is_same(one: &BackupFile, other: &BackupFile) -> bool {
    let facts = |file: &BackupFile| {
        (file.timeline, file.start_lsn, file.stop_lsn, file.parent, file.manifest.bytes, file.manifest.crc32)
    };
    facts(one) == facts(other)
}

/// A place on a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Point {
    pub timeline: TimelineId,
    pub lsn: Lsn,
    /// Of the last commit before it, where it is known.
    pub time: Option<Timestamp>,
}

/// Why nothing further can be reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ends {
    /// The newest line, as far as it is archived.
    Archive,
    /// The server went on on another timeline; this one ends here.
    Timeline,
    /// WAL is missing; the id `gaps` gives it, where it lists it.
    Gap(Option<String>),
    /// Retention has let go what follows.
    Expired,
    /// The archive holds two contents for this segment.
    Conflict(SegmentName),
}

impl Ends {
    /// In JSON.
    pub fn word(&self) -> &'static str {
        match self {
            Ends::Archive => "end_of_archive",
            Ends::Timeline => "end_of_timeline",
            Ends::Gap(_) => "gap",
            Ends::Expired => "expired",
            Ends::Conflict(_) => "conflict",
        }
    }
}

/// Every instant from `from` to `to` of one line can be restored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interval {
    /// The line's.
    pub timeline: TimelineId,
    /// The first one's consistency.
    pub from: Point,
    pub to: Point,
    /// All that are consistent inside, the earliest first; at least one.
    pub backups: Vec<BackupId>,
    pub ends: Ends,
    /// Some of its WAL is stored as it came, in a format that was not known.
    pub is_unproven: bool,
}

/// Everything an archive can tell about restoring one lineage.
#[derive(Debug)]
pub struct Reach<'a> {
    pub held: &'a Holdings,
    /// By when they are consistent.
    pub backups: &'a [KnownBackup],
    runs: Vec<Run>,
    gaps: Vec<Gap>,
}

/// One line, with the WAL there is of it.
#[derive(Clone, Debug)]
pub struct Line {
    pub path: History,
    pub stretches: Vec<Stretch>,
    pub is_newest: bool,
}

impl<'a> Reach<'a> {
    pub fn new(held: &'a Holdings, backups: &'a [KnownBackup]) -> Reach<'a> {
        let gaps = continuity::gaps_of(held).into_iter().filter(|gap| gap.state == GapState::Open).collect();
        Reach { held, backups, runs: continuity::all_runs(held), gaps }
    }

    pub fn size(&self) -> SegmentSize {
        self.held.segment_size
    }

    /// Every timeline the archive knows by history, by data, or as its start.
    pub fn timelines(&self) -> BTreeSet<TimelineId> {
        let known = self.held.histories.keys().chain(self.held.parts.keys());
        known.copied().chain([self.held.start_timeline]).collect()
    }

    pub fn newest(&self) -> TimelineId {
        self.timelines().into_iter().next_back().expect("the archive starts on one")
    }

    /// The line that ends on `timeline`; `None` when the archive does not know how it came to be.
    pub fn line(&self, timeline: TimelineId) -> Option<Line> {
        if !self.timelines().contains(&timeline) {
            return None;
        }
        let path = continuity::path_of(timeline, &self.held.histories, self.held.start_timeline)?;
        let stretches = continuity::stretches(&path, &self.runs, self.size());
        Some(Line { path, stretches, is_newest: timeline == self.newest() })
    }

    /// The WAL a backup can be replayed with: `None` when it is not of this line, or not even its consistency can be reached.
    pub fn stretch_of<'l>(&self, line: &'l Line, backup: &KnownBackup) -> Option<&'l Stretch> {
        let begin = line.path.begin_of(backup.timeline)?;
        let end = line.path.end_of(backup.timeline).unwrap_or(Lsn::MAX);
        let is_of_line = begin <= backup.start_lsn && backup.start_lsn < backup.stop_lsn && backup.stop_lsn <= end;
        let first = self.size().floor(backup.start_lsn);
        let whole = |stretch: &&Stretch| stretch.from <= first && backup.stop_lsn <= stretch.to;
        line.stretches.iter().find(whole).filter(|_| is_of_line)
    }

    /// What can be restored of every line, lines in order.
    pub fn window(&self) -> Vec<Interval> {
        self.timelines()
            .into_iter()
            .filter_map(|timeline| self.line(timeline))
            .flat_map(|line| self.intervals(&line))
            .collect()
    }

    /// Of the newest line what reaches furthest.
    pub fn newest_interval(&self) -> Option<Interval> {
        self.intervals(&self.line(self.newest())?).pop()
    }

    /// What can be restored of one line, in order.
    pub fn intervals(&self, line: &Line) -> Vec<Interval> {
        let of = |stretch: &Stretch| {
            let usable = |backup: &&KnownBackup| self.stretch_of(line, backup) == Some(stretch);
            let backups: Vec<&KnownBackup> = self.backups.iter().filter(usable).collect();
            let first = backups.first()?;
            let is_unproven = self.runs.iter().any(|run| {
                let inside = run.from < stretch.to && stretch.from < run.to;
                run.proof == Proof::Unproven && inside && line.path.contains(run.timeline)
            });
            Some(Interval {
                timeline: line.path.timeline,
                from: Point { timeline: first.timeline, lsn: first.stop_lsn, time: first.stop_time },
                to: Point { timeline: stretch.to_timeline, lsn: stretch.to, time: self.last_commit(line, stretch) },
                backups: backups.iter().map(|backup| backup.id).collect(),
                ends: self.why(line, stretch),
                is_unproven,
            })
        };
        line.stretches.iter().filter_map(of).collect()
    }

    /// Why a stretch of a line ends.
    fn why(&self, line: &Line, stretch: &Stretch) -> Ends {
        let end = stretch.to;
        // At a fork it is the child that has nothing.
        let is_left = line.path.end_of(stretch.to_timeline) == Some(end);
        let child = line.path.child_of(stretch.to_timeline).filter(|_| is_left);
        let timeline = child.unwrap_or(stretch.to_timeline);
        let name = SegmentName::new(timeline, self.size().segment_of(end), self.size());
        let gap = self.gaps.iter().find(|gap| gap.timeline == timeline && gap.from <= end && end < gap.to);
        let goes_on = line.stretches.iter().any(|later| later.from > end);
        if self.held.disputed.contains(&name) {
            return Ends::Conflict(name);
        }
        if self.held.expired(timeline).iter().any(|(from, to)| *from <= end && end < *to) {
            return Ends::Expired;
        }
        match gap {
            Some(gap) => Ends::Gap(Some(gap.id.clone())),
            None if goes_on => Ends::Gap(None),
            None if line.is_newest => Ends::Archive,
            None => Ends::Timeline,
        }
    }

    /// Of the last commit in a stretch that is known to be of the line.
    pub fn last_commit(&self, line: &Line, stretch: &Stretch) -> Option<Timestamp> {
        self.last_commit_before(line, stretch.from, stretch.to)
    }

    /// Of the last commit in [from, to) that is known to be of the line.
    pub fn last_commit_before(&self, line: &Line, from: Lsn, to: Lsn) -> Option<Timestamp> {
        let path = &line.path;
        let timelines = path.ancestors().iter().map(|entry| entry.timeline).chain([path.timeline]);
        let knows = |block: &Block<'_>| !block.is_cut && block.last_commit.is_some();
        // The last one of each part: parts are few, what they are made of are not.
        let last = timelines.filter_map(|timeline| {
            let bounds = self.bounds(path, timeline, from, to);
            let parts = self.held.parts(timeline).iter();
            parts.filter_map(|part| blocks_of(part, timeline, bounds).rfind(knows)).max_by_key(Block::order)
        });
        last.max_by_key(Block::order)?.last_commit
    }

    /// The objects that hold a line's WAL [from, to), in order. They may overlap where a timeline forks.
    pub fn blocks(&self, line: &Line, from: Lsn, to: Lsn) -> Vec<Block<'a>> {
        let path = &line.path;
        let timelines = path.ancestors().iter().map(|entry| entry.timeline).chain([path.timeline]);
        let of = |timeline| {
            let bounds = self.bounds(path, timeline, from, to);
            self.held.parts(timeline).iter().flat_map(move |part| blocks_of(part, timeline, bounds))
        };
        let mut blocks: Vec<Block<'a>> = timelines.flat_map(of).collect();
        blocks.sort_by_key(Block::order);
        blocks
    }

    /// The part of [from, to) that a line has of a timeline.
    fn bounds(&self, path: &History, timeline: TimelineId, from: Lsn, to: Lsn) -> (Lsn, Lsn) {
        let begin = path.begin_of(timeline).map_or(Lsn::MAX, |begin| self.size().floor(begin));
        let end = path.end_of(timeline).unwrap_or(Lsn::MAX);
        (from.max(begin), to.min(end))
    }
}

/// The objects of a part that hold any byte of [first, limit), in order.
fn blocks_of(
    part: &Part,
    timeline: TimelineId,
    (first, limit): (Lsn, Lsn),
) -> impl DoubleEndedIterator<Item = Block<'_>> {
    let (sealed, tail): (Option<&SealedSpan>, Option<&Piece>) = match part {
        Part::Sealed(sealed) => (Some(sealed), None),
        Part::Piece(piece) => (None, Some(piece)),
    };
    let block = move |piece: Piece, digest| {
        let is_cut = piece.to > limit;
        Block { timeline, from: piece.from, to: piece.to.min(limit), is_cut, digest, last_commit: piece.last_commit }
    };
    let sealed = sealed.into_iter().flat_map(move |sealed| sealed.within(first, limit));
    let tail = tail.into_iter().filter(move |piece| first < limit && piece.from < limit && first < piece.to);
    let sealed = sealed.map(move |(piece, digest)| block(piece, Some(digest)));
    sealed.chain(tail.map(move |piece| block(piece.clone(), None)))
}

/// WAL of a line in one object.
#[derive(Clone, Copy, Debug)]
pub struct Block<'a> {
    pub timeline: TimelineId,
    pub from: Lsn,
    /// The end of what belongs to the line and was asked for.
    pub to: Lsn,
    /// The object has more: what it says of itself may be about that.
    pub is_cut: bool,
    /// Of a sealed segment; a tail says nothing of itself but its last commit.
    pub digest: Option<&'a Digest>,
    pub last_commit: Option<Timestamp>,
}

impl Block<'_> {
    fn order(&self) -> (Lsn, TimelineId, Lsn) {
        (self.from, self.timeline, self.to)
    }
}

#[cfg(test)]
pub(super) mod tests;

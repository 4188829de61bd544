//! Owns: what the listings and index files of a lineage say, as values: per directory, per timeline, whole.
//! Does not own: reading them (`store.rs`), intervals and gaps (`continuity`).

use std::collections::BTreeMap;
use std::ops::Range;

use jiff::Timestamp;

use super::damage::Damages;
use super::index::IndexEntry;
use super::ledger::{Expired, LedgerFact};
use super::lineage::LineageFile;
use super::tails::{self, TailLink};
use crate::codec::Form;
use crate::repository::layout::{IndexName, Lineage, Part, TailName, WalDirectory, WalObject};
use crate::wal::{History, Lsn, Proof, SegmentName, SegmentSize, TimelineId};

/// The [start, end) of a segment, or `None` when the name cannot occur with this size (or ends beyond the last LSN).
pub fn segment_span(name: SegmentName, size: SegmentSize) -> Option<Range<Lsn>> {
    let start = name.number(size)?.0.checked_mul(size.bytes())?;
    Some(Lsn(start)..Lsn(start.checked_add(size.bytes())?))
}

/// A tail as listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TailObject {
    pub name: TailName,
    pub stored_bytes: u64,
}

/// An object that holds a whole segment, as listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentObject {
    pub form: Form,
    pub stored_bytes: u64,
}

/// Everything one WAL directory holds. Names of no known form are left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirectoryContents {
    pub directory: WalDirectory,
    pub segment_size: SegmentSize,
    /// Sealed segments by name. A second object of one name is in the other form: no writer makes it.
    pub segments: BTreeMap<SegmentName, Vec<SegmentObject>>,
    /// The union of the index files, whether the object is there or not.
    pub entries: BTreeMap<SegmentName, IndexEntry>,
    /// Entries that disagree on the raw CRC; none of them is in `entries`.
    pub disputed: BTreeMap<SegmentName, Vec<IndexEntry>>,
    pub index_files: Vec<(IndexName, u64)>,
    pub tails: BTreeMap<SegmentName, Vec<TailObject>>,
    /// Second contents of a name, by raw CRC.
    pub conflicts: BTreeMap<SegmentName, Vec<(u32, SegmentObject)>>,
    /// Good contents of names whose object is damaged, by raw CRC.
    pub repairs: BTreeMap<SegmentName, Vec<(u32, SegmentObject)>>,
    /// What writers announced that they would store, by raw CRC: their own affair, and nothing that is there.
    pub raw_markers: BTreeMap<SegmentName, Vec<u32>>,
    /// Objects that are listed, and known not to hold what they promise; they stay in the maps above.
    pub damaged: BTreeMap<SegmentName, Vec<Part>>,
}

impl DirectoryContents {
    pub fn new(directory: WalDirectory, segment_size: SegmentSize) -> DirectoryContents {
        DirectoryContents {
            directory,
            segment_size,
            segments: BTreeMap::new(),
            entries: BTreeMap::new(),
            disputed: BTreeMap::new(),
            index_files: Vec::new(),
            tails: BTreeMap::new(),
            conflicts: BTreeMap::new(),
            repairs: BTreeMap::new(),
            raw_markers: BTreeMap::new(),
            damaged: BTreeMap::new(),
        }
    }

    /// Adds an entry to the union. Entries that differ only in how the object was encoded: the one whose size is
    /// the listed object's counts.
    pub fn add_entry(&mut self, entry: IndexEntry) {
        let name = entry.segment;
        if let Some(disputed) = self.disputed.get_mut(&name) {
            disputed.push(entry);
            return;
        }
        match self.entries.get(&name) {
            Some(known) if known.raw_crc32 != entry.raw_crc32 => {
                let known = self.entries.remove(&name).expect("just found");
                self.disputed.insert(name, vec![known, entry]);
            }
            Some(known) if self.object_of(known).is_some() => {}
            _ => {
                self.entries.insert(name, entry);
            }
        }
    }

    /// Takes away what `expire` has announced it deletes.
    pub fn subtract(&mut self, expired: &Expired) {
        self.segments.retain(|name, _| !expired.contains(*name));
        self.entries.retain(|name, _| !expired.contains(*name));
        self.disputed.retain(|name, _| !expired.contains(*name));
        self.tails.retain(|name, _| !expired.contains(*name));
        self.conflicts.retain(|name, _| !expired.contains(*name));
        self.repairs.retain(|name, _| !expired.contains(*name));
    }

    /// Takes note of objects that are known to be damaged: from now on they count as not there. For readers; a writer
    /// goes on where it was, and what is damaged behind it is mended.
    pub fn mark(&mut self, damages: &Damages) {
        for damage in damages.iter() {
            if let Some(name) = damage.segment.filter(|name| WalDirectory::of(*name) == self.directory) {
                self.damaged.entry(name).or_default().push(damage.part());
            }
        }
    }

    fn is_damaged(&self, name: SegmentName, part: Part) -> bool {
        self.damaged.get(&name).is_some_and(|parts| parts.contains(&part))
    }

    /// The object that an entry describes, by its size.
    pub fn object_of(&self, entry: &IndexEntry) -> Option<SegmentObject> {
        let name = entry.segment;
        let is_it = |object: &&SegmentObject| {
            object.stored_bytes > 0
                && object.stored_bytes == entry.stored_bytes
                && !self.is_damaged(name, Part::Wal(WalObject::Segment(name, object.form)))
        };
        self.segments.get(&name)?.iter().find(is_it).copied()
    }

    /// The repair that has the content an entry describes.
    pub fn repair_of(&self, entry: &IndexEntry) -> Option<SegmentObject> {
        let (name, wanted) = (entry.segment, entry.raw_crc32.0);
        let is_it = |(raw_crc32, object): &&(u32, SegmentObject)| {
            *raw_crc32 == wanted
                && object.stored_bytes > 0
                && !self.is_damaged(name, Part::Wal(WalObject::Repair(name, wanted, object.form)))
        };
        self.repairs.get(&name)?.iter().find(is_it).map(|(_, object)| *object)
    }

    /// The entry of a segment whose object is there in the size the entry tells, or repaired.
    pub fn sealed(&self, name: SegmentName) -> Option<&IndexEntry> {
        let entry = self.entries.get(&name)?;
        (self.object_of(entry).is_some() || self.repair_of(entry).is_some()).then_some(entry)
    }

    /// Objects under a segment's name that no entry describes: a crash between the two, or a write in progress.
    pub fn unindexed(&self) -> impl Iterator<Item = (SegmentName, SegmentObject)> {
        let known = |name: &SegmentName| self.entries.contains_key(name) || self.disputed.contains_key(name);
        let unknown = self.segments.iter().filter(move |(name, _)| !known(name));
        unknown.flat_map(|(name, objects)| objects.iter().map(|object| (*name, *object)))
    }

    /// Entries without an object as they describe it: deleted, truncated, or replaced behind our back.
    pub fn missing(&self) -> impl Iterator<Item = &IndexEntry> {
        self.entries.values().filter(|entry| self.sealed(entry.segment).is_none())
    }

    /// The tails that count for a segment, in order, and those that do not.
    pub fn tail_chain(&self, name: SegmentName) -> tails::TailChain {
        // A zero-length object is never data: no zstd frame is that short.
        let counts = |tail: &&TailObject| tail.stored_bytes > 0 && !self.is_damaged(name, Part::Tail(name, tail.name));
        let listed = self.tails.get(&name).into_iter().flatten().filter(counts);
        tails::resolve(&listed.map(|tail| tail.name).collect::<Vec<_>>())
    }

    /// Proven bytes in order, without overlap: sealed and indexed segments, and tails of all others.
    pub fn pieces(&self) -> Vec<Piece> {
        let mut names: Vec<SegmentName> = self.entries.keys().chain(self.tails.keys()).copied().collect();
        names.sort();
        names.dedup();
        let mut pieces = Vec::new();
        for name in names {
            match self.sealed(name) {
                Some(entry) => pieces.push(Piece::sealed(entry)),
                None if self.disputed.contains_key(&name) => {}
                None => pieces.extend(self.tail_chain(name).links.into_iter().map(Piece::tail)),
            }
        }
        pieces
    }
}

/// Where proven bytes are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    Sealed(SegmentName),
    Tail(TailName),
}

/// Proven bytes [from, to) of one timeline, in one object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    pub from: Lsn,
    pub to: Lsn,
    pub proof: Proof,
    /// Time of the last commit at or before `to`, where the writer knew of one.
    pub last_commit: Option<Timestamp>,
    pub source: Source,
}

impl Piece {
    pub(super) fn sealed(entry: &IndexEntry) -> Piece {
        Piece {
            from: entry.start_lsn,
            to: entry.end_lsn,
            proof: entry.summary.proof,
            last_commit: entry.summary.last_commit.map(|commit| commit.time),
            source: Source::Sealed(entry.segment),
        }
    }

    /// A tail does not say how it was proven: it follows what it extends (`continuity::runs`).
    pub(super) fn tail(link: TailLink) -> Piece {
        // Used only in part, its last commit may lie beyond that part.
        let last_commit = link.tail.last_commit.filter(|_| link.to == link.tail.to);
        Piece { from: link.from, to: link.to, proof: Proof::Proven, last_commit, source: Source::Tail(link.tail) }
    }
}

/// A whole lineage, as `window`, `gaps`, `verify` and `expire` look at it; what is expired is already taken away.
#[derive(Clone, Debug)]
pub struct Catalog {
    pub lineage: Lineage,
    pub file: LineageFile,
    pub histories: BTreeMap<TimelineId, History>,
    /// Directories in order, per timeline.
    pub timelines: BTreeMap<TimelineId, Vec<DirectoryContents>>,
    pub ledger: Vec<LedgerFact>,
}

impl Catalog {
    pub fn segment_size(&self) -> SegmentSize {
        self.file.segment_size
    }

    /// As writers see it: what was stored, whatever was found damaged since.
    pub fn as_written(mut self) -> Catalog {
        self.timelines.values_mut().flatten().for_each(|contents| contents.damaged.clear());
        self
    }

    /// Proven bytes of one timeline, in order.
    pub fn pieces(&self, timeline: TimelineId) -> Vec<Piece> {
        self.timelines.get(&timeline).into_iter().flatten().flat_map(DirectoryContents::pieces).collect()
    }
}

/// The end of one timeline's archive: what a writer needs to resume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TimelineState {
    pub timeline: TimelineId,
    /// Whether any directory of this timeline holds a segment, a tail or an index entry, usable or not.
    pub has_data: bool,
    /// Where the last contiguous run begins, as far back as directories were read (it may begin earlier).
    pub run_from: Option<Lsn>,
    /// The last sealed and indexed segment of that run; `None` when the run consists of tails only. Its
    /// `summary.carry` continues the proof.
    pub last_sealed: Option<IndexEntry>,
    /// The tails after `last_sealed` that belong to the run, in order, each with the part of it that counts.
    pub tails: Vec<TailLink>,
    /// The end of the run: the frontier. `None` without any proven byte.
    pub end: Option<Lsn>,
    /// Tails of the run's unfinished segments that do not count: conflicts, or not comparable by name.
    pub refused: Vec<TailName>,
    /// Sealed objects no entry describes, in the directories read.
    pub unindexed: Vec<(SegmentName, SegmentObject)>,
    /// Entries whose object is not there as they describe it.
    pub missing: Vec<SegmentName>,
    /// Names with entries of different raw content.
    pub disputed: Vec<SegmentName>,
}

impl TimelineState {
    /// The state that `directories` (of one timeline, in order, up to the newest) show.
    pub fn of(timeline: TimelineId, directories: &[DirectoryContents]) -> TimelineState {
        let run = last_run(directories.iter().flat_map(DirectoryContents::pieces).collect());
        let last_sealed = run.iter().rev().find_map(|piece| match piece.source {
            Source::Sealed(name) => directories.iter().find_map(|dir| dir.sealed(name)).cloned(),
            Source::Tail(_) => None,
        });
        let sealed_end = last_sealed.as_ref().map_or(Lsn::ZERO, |entry| entry.end_lsn);
        let link = |piece: &Piece| match piece.source {
            Source::Tail(tail) if piece.from >= sealed_end => Some(TailLink { tail, from: piece.from, to: piece.to }),
            _ => None,
        };
        let has_data = |dir: &DirectoryContents| {
            !(dir.segments.is_empty() && dir.tails.is_empty() && dir.entries.is_empty() && dir.disputed.is_empty())
        };
        TimelineState {
            timeline,
            has_data: directories.iter().any(has_data),
            run_from: run.first().map(|piece| piece.from),
            tails: run.iter().filter_map(link).collect(),
            end: run.last().map(|piece| piece.to),
            refused: refused_from(directories, sealed_end),
            unindexed: directories.iter().flat_map(DirectoryContents::unindexed).collect(),
            missing: directories.iter().flat_map(|dir| dir.missing().map(|entry| entry.segment)).collect(),
            disputed: directories.iter().flat_map(|dir| dir.disputed.keys().copied()).collect(),
            last_sealed,
        }
    }
}

/// The pieces of the contiguous run with the highest end.
fn last_run(mut pieces: Vec<Piece>) -> Vec<Piece> {
    let mut begin = pieces.len().saturating_sub(1);
    while begin > 0 && pieces[begin - 1].to == pieces[begin].from {
        begin -= 1;
    }
    pieces.split_off(begin)
}

fn refused_from(directories: &[DirectoryContents], from: Lsn) -> Vec<TailName> {
    let unfinished = |dir: &DirectoryContents| {
        let open = dir.tails.keys().filter(|&&name| dir.sealed(name).is_none());
        open.flat_map(|&name| dir.tail_chain(name).refused).collect::<Vec<_>>()
    };
    directories.iter().flat_map(unfinished).filter(|tail| tail.to > from).collect()
}

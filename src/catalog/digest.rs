//! Owns: what is kept of a directory and of its index entries for questions about a whole archive: little enough that a
//! million segments fit into memory.
//! Does not own: reading them (`store/directories.rs`), whole entries (`index.rs`), what follows from them (`continuity`).
//! Pure.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use serde::Deserialize;
use serde::de::{DeserializeOwned, IgnoredAny};

use super::contents::{DirectoryContents, Piece, TailObject};
use super::index::{Crc32, IndexEntry};
use super::tails;
use crate::repository::layout::{IndexName, WalDirectory};
use crate::wal::{Lsn, Proof, SegmentName, SegmentSize};

/// An index entry, or as much of it as is kept.
pub trait Indexed: Sized + Clone + Send + 'static {
    /// As it stands in an index object.
    type Stored: DeserializeOwned;

    /// What it says of its place, to be checked before it counts.
    fn claim(stored: &Self::Stored) -> Claim;
    fn of(stored: Self::Stored) -> Self;

    fn segment(&self) -> SegmentName;
    fn raw_crc32(&self) -> Crc32;
    fn stored_bytes(&self) -> u64;
    fn proof(&self) -> Proof;
    /// Time of the last commit in the segment, or before it.
    fn last_commit(&self) -> Option<Timestamp>;
}

/// What an entry says of its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    pub segment: SegmentName,
    pub start_lsn: Lsn,
    pub end_lsn: Lsn,
    pub raw_bytes: u64,
    /// Ends of records, which lie in the segment or before it.
    pub record_ends: [Option<Lsn>; 2],
}

impl Indexed for IndexEntry {
    type Stored = IndexEntry;

    fn claim(stored: &IndexEntry) -> Claim {
        Claim {
            segment: stored.segment,
            start_lsn: stored.start_lsn,
            end_lsn: stored.end_lsn,
            raw_bytes: stored.raw_bytes,
            record_ends: [stored.summary.record_end, stored.summary.carry.record_end],
        }
    }

    fn of(stored: IndexEntry) -> IndexEntry {
        stored
    }

    fn segment(&self) -> SegmentName {
        self.segment
    }

    fn raw_crc32(&self) -> Crc32 {
        self.raw_crc32
    }

    fn stored_bytes(&self) -> u64 {
        self.stored_bytes
    }

    fn proof(&self) -> Proof {
        self.summary.proof
    }

    fn last_commit(&self) -> Option<Timestamp> {
        self.summary.last_commit.map(|commit| commit.time)
    }
}

/// Microseconds since 1970, the precision of the WAL's own times.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Micros(i64);

impl Micros {
    const NONE: Micros = Micros(i64::MIN);

    fn of(time: Option<Timestamp>) -> Micros {
        time.map_or(Micros::NONE, |time| Micros(time.as_microsecond()))
    }

    fn time(self) -> Option<Timestamp> {
        if self == Micros::NONE { None } else { Timestamp::from_microsecond(self.0).ok() }
    }
}

/// What is kept of an index entry: 88 bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Digest {
    pub segment: SegmentName,
    pub raw_crc32: Crc32,
    pub stored_crc32: Crc32,
    /// Records that start in the segment.
    pub records: u32,
    /// 0: no transaction.
    min_xid: u32,
    max_xid: u32,
    pub stored_bytes: u64,
    last_commit: Micros,
    min_commit: Micros,
    max_commit: Micros,
    /// Names of the restore points in it; almost no segment has any.
    points: Option<Box<[String]>>,
    pub proof: Proof,
    /// Something was removed or cut in it (every list of the summary but the restore points): its whole entry tells what.
    pub has_changes: bool,
    /// It holds more restore points, drops or truncations than its entry tells.
    pub is_truncated: bool,
}

impl Digest {
    /// [`crate::wal::SegmentSummary::min_commit_time`]
    pub fn min_commit_time(&self) -> Option<Timestamp> {
        self.min_commit.time()
    }

    pub fn max_commit_time(&self) -> Option<Timestamp> {
        self.max_commit.time()
    }

    /// The lowest and the highest transaction id of its records.
    pub fn xids(&self) -> Option<(u32, u32)> {
        (self.min_xid != 0).then_some((self.min_xid, self.max_xid))
    }

    pub fn restore_points(&self) -> impl Iterator<Item = &str> {
        self.points.iter().flat_map(|points| points.iter().map(String::as_str))
    }

    /// Its whole entry tells of something that happened, or that there is more than it could keep.
    pub fn has_events(&self) -> bool {
        self.has_changes || self.is_truncated || self.points.is_some()
    }
}

impl Indexed for Digest {
    type Stored = StoredEntry;

    fn claim(stored: &StoredEntry) -> Claim {
        Claim {
            segment: stored.segment,
            start_lsn: stored.start_lsn,
            end_lsn: stored.end_lsn,
            raw_bytes: stored.raw_bytes,
            record_ends: [stored.record_end, stored.carry.record_end],
        }
    }

    fn of(stored: StoredEntry) -> Digest {
        let points: Vec<String> = stored.restore_points.into_iter().map(|point| point.name).collect();
        Digest {
            segment: stored.segment,
            raw_crc32: stored.raw_crc32,
            stored_crc32: stored.stored_crc32,
            records: u32::try_from(stored.record_count).unwrap_or(u32::MAX),
            min_xid: stored.min_xid.unwrap_or(0),
            max_xid: stored.max_xid.unwrap_or(0),
            stored_bytes: stored.stored_bytes,
            last_commit: Micros::of(stored.last_commit.map(|commit| commit.time)),
            min_commit: Micros::of(stored.min_commit_time),
            max_commit: Micros::of(stored.max_commit_time),
            points: (!points.is_empty()).then(|| points.into_boxed_slice()),
            proof: stored.proof,
            has_changes: !(stored.drops.is_empty()
                && stored.truncations.is_empty()
                && stored.database_removals.is_empty()
                && stored.tablespace_removals.is_empty()),
            is_truncated: stored.truncated,
        }
    }

    fn segment(&self) -> SegmentName {
        self.segment
    }

    fn raw_crc32(&self) -> Crc32 {
        self.raw_crc32
    }

    fn stored_bytes(&self) -> u64 {
        self.stored_bytes
    }

    fn proof(&self) -> Proof {
        self.proof
    }

    fn last_commit(&self) -> Option<Timestamp> {
        self.last_commit.time()
    }
}

/// The fields of an [`IndexEntry`] that a [`Digest`] is made of. What else stands in it is only looked over.
#[derive(Debug, Deserialize)]
pub struct StoredEntry {
    segment: SegmentName,
    start_lsn: Lsn,
    end_lsn: Lsn,
    raw_bytes: u64,
    raw_crc32: Crc32,
    stored_bytes: u64,
    stored_crc32: Crc32,
    proof: Proof,
    record_count: u64,
    record_end: Option<Lsn>,
    min_commit_time: Option<Timestamp>,
    max_commit_time: Option<Timestamp>,
    min_xid: Option<u32>,
    max_xid: Option<u32>,
    last_commit: Option<StoredCommit>,
    restore_points: Vec<StoredPoint>,
    drops: Vec<IgnoredAny>,
    truncations: Vec<IgnoredAny>,
    #[serde(default)]
    database_removals: Vec<IgnoredAny>,
    #[serde(default)]
    tablespace_removals: Vec<IgnoredAny>,
    truncated: bool,
    carry: StoredCarry,
}

#[derive(Debug, Deserialize)]
struct StoredCommit {
    time: Timestamp,
}

#[derive(Debug, Deserialize)]
struct StoredPoint {
    name: String,
}

#[derive(Debug, Deserialize)]
struct StoredCarry {
    #[serde(default)]
    record_end: Option<Lsn>,
}

/// What is kept of one directory, without what is expired or damaged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirectoryDigest {
    pub directory: WalDirectory,
    pub segment_size: SegmentSize,
    /// Segments that count ([`DirectoryContents::sealed`]), in order.
    pub sealed: Box<[Digest]>,
    /// Entries whose object is not there as they describe it, in order.
    pub missing: Vec<Digest>,
    /// Of those that count, the ones whose content is in a repair, and not in their own object.
    pub repaired: BTreeSet<SegmentName>,
    /// Names with entries of different raw content.
    pub disputed: BTreeSet<SegmentName>,
    /// Names of which there is a second content.
    pub conflicts: BTreeSet<SegmentName>,
    /// Names whose object no entry describes.
    pub unindexed: BTreeSet<SegmentName>,
    /// But for those known to be damaged.
    pub tails: BTreeMap<SegmentName, Vec<TailObject>>,
    pub index_files: Vec<(IndexName, u64)>,
}

impl DirectoryDigest {
    pub fn of<E: Indexed>(mut contents: DirectoryContents<E>) -> DirectoryDigest
    where
        Digest: From<E>,
    {
        contents.drop_damaged_tails();
        let is_sealed = |entry: &E| contents.sealed(entry.segment()).is_some();
        let sealed: BTreeSet<SegmentName> =
            contents.entries.values().filter(|entry| is_sealed(entry)).map(Indexed::segment).collect();
        let is_repaired = |entry: &&E| sealed.contains(&entry.segment()) && contents.object_of(entry).is_none();
        let repaired = contents.entries.values().filter(is_repaired).map(Indexed::segment).collect();
        let unindexed = contents.unindexed().map(|(name, _)| name).collect();
        let (mut counting, mut missing) = (Vec::with_capacity(sealed.len()), Vec::new());
        for (name, entry) in contents.entries {
            if sealed.contains(&name) { counting.push(entry.into()) } else { missing.push(entry.into()) }
        }
        DirectoryDigest {
            directory: contents.directory,
            segment_size: contents.segment_size,
            sealed: counting.into_boxed_slice(),
            missing,
            repaired,
            disputed: contents.disputed.into_keys().collect(),
            conflicts: contents.conflicts.into_keys().collect(),
            unindexed,
            tails: contents.tails,
            index_files: contents.index_files,
        }
    }

    /// A segment that counts.
    pub fn sealed(&self, name: SegmentName) -> Option<&Digest> {
        self.position(name).map(|at| &self.sealed[at])
    }

    /// Its place among those that count.
    pub fn position(&self, name: SegmentName) -> Option<usize> {
        self.sealed.binary_search_by_key(&name, |digest| digest.segment).ok()
    }

    /// Names with an index entry, in no order.
    pub fn indexed(&self) -> impl Iterator<Item = &Digest> {
        self.sealed.iter().chain(&self.missing)
    }

    /// There is nothing in it but segments that count.
    pub fn is_all_sealed(&self) -> bool {
        self.missing.is_empty() && self.disputed.is_empty() && self.tails.is_empty()
    }

    /// What the index says of a name, whether the object is there or not.
    pub fn indexed_as(&self, name: SegmentName) -> Option<&Digest> {
        self.sealed(name).or_else(|| self.missing.iter().find(|digest| digest.segment == name))
    }

    /// Where its first piece begins.
    pub fn first_byte(&self) -> Option<Lsn> {
        let first = self.sealed.first().and_then(|digest| Piece::sealed(digest, self.segment_size));
        let open = |name: &&SegmentName| self.sealed(**name).is_none() && !self.disputed.contains(name);
        let tails = self.tails.keys().filter(open).flat_map(|name| self.tail_chain(*name).links);
        tails.map(|link| link.from).chain(first.map(|piece| piece.from)).min()
    }

    /// Every name that something is known of.
    pub fn names(&self) -> BTreeSet<SegmentName> {
        let indexed = self.indexed().map(|digest| digest.segment);
        indexed.chain(self.tails.keys().copied()).chain(self.disputed.iter().copied()).collect()
    }

    /// The tails that count for a segment, in order, and those that do not.
    pub fn tail_chain(&self, name: SegmentName) -> tails::TailChain {
        tails::of_listed(self.tails.get(&name).into_iter().flatten())
    }

    /// Proven bytes in order, without overlap: as [`DirectoryContents::pieces`].
    pub fn pieces(&self) -> Vec<Piece> {
        let mut pieces = Vec::new();
        for name in self.names() {
            match self.sealed(name) {
                Some(digest) => pieces.extend(Piece::sealed(digest, self.segment_size)),
                None if self.disputed.contains(&name) => {}
                None => pieces.extend(self.tail_chain(name).links.into_iter().map(Piece::tail)),
            }
        }
        pieces
    }
}

impl From<IndexEntry> for Digest {
    fn from(entry: IndexEntry) -> Digest {
        let summary = entry.summary;
        let points: Vec<String> = summary.restore_points.into_iter().map(|point| point.name).collect();
        Digest {
            segment: entry.segment,
            raw_crc32: entry.raw_crc32,
            stored_crc32: entry.stored_crc32,
            records: u32::try_from(summary.record_count).unwrap_or(u32::MAX),
            min_xid: summary.min_xid.unwrap_or(0),
            max_xid: summary.max_xid.unwrap_or(0),
            stored_bytes: entry.stored_bytes,
            last_commit: Micros::of(summary.last_commit.map(|commit| commit.time)),
            min_commit: Micros::of(summary.min_commit_time),
            max_commit: Micros::of(summary.max_commit_time),
            points: (!points.is_empty()).then(|| points.into_boxed_slice()),
            proof: summary.proof,
            has_changes: !(summary.drops.is_empty()
                && summary.truncations.is_empty()
                && summary.database_removals.is_empty()
                && summary.tablespace_removals.is_empty()),
            is_truncated: summary.truncated,
        }
    }
}

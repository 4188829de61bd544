//! Owns: what one repository holds of one lineage, as far as retention looks at it, in few bytes.
//! Does not own: reading it (`catalog/store/inventory.rs`), what is to become of it (`plan.rs`).
//! Pure.
//!
//! Unlike a [`crate::catalog::Catalog`] it shows what is there, announced as expired or not: an earlier `expire` may have
//! ended half way, and somebody may need what it had announced.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;

use crate::catalog::backup::{BackupFile, BackupRecord, PinFile};
use crate::catalog::ledger::SegmentRange;
use crate::repository::Key;
use crate::repository::layout::{BackupId, BackupType, IndexName, Lineage, PinName};
use crate::wal::{History, Lsn, SegmentNumber, SegmentSize, TimelineId};

/// What is there, whoever needs it.
#[derive(Clone, Debug)]
pub struct Inventory {
    pub lineage: Lineage,
    pub segment_size: SegmentSize,
    pub start_timeline: TimelineId,
    /// When `lineage.json` was made: nothing of the lineage is older.
    pub created: Timestamp,
    pub histories: BTreeMap<TimelineId, History>,
    /// Every name there is an object of, by number.
    pub wal: BTreeMap<TimelineId, Vec<HeldSegment>>,
    pub indexes: Vec<HeldIndex>,
    /// Every backup there is anything of, by id.
    pub backups: Vec<HeldBackup>,
    /// The latest word on each pin.
    pub pins: Vec<HeldPin>,
    /// `expired` facts that nobody has withdrawn.
    pub announcements: Vec<Announcement>,
    /// When the facts of the ledger were put there: each shows that the archive was alive then.
    pub ledger_times: Vec<Timestamp>,
    /// What the reader has found that nothing looks at any more.
    pub debris: Vec<Debris>,
}

impl Inventory {
    pub fn new(
        lineage: Lineage,
        segment_size: SegmentSize,
        start_timeline: TimelineId,
        created: Timestamp,
    ) -> Inventory {
        Inventory {
            lineage,
            segment_size,
            start_timeline,
            created,
            histories: BTreeMap::new(),
            wal: BTreeMap::new(),
            indexes: Vec::new(),
            backups: Vec::new(),
            pins: Vec::new(),
            announcements: Vec::new(),
            ledger_times: Vec::new(),
            debris: Vec::new(),
        }
    }
}

/// All objects of one segment's name: the segment, its tails, conflicts, repairs and markers. 40 bytes, since there may be
/// a million.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeldSegment {
    pub number: SegmentNumber,
    /// Of all objects of the name.
    pub bytes: u64,
    /// µs since 1970; [`NEVER`]: not known.
    latest: i64,
    pub objects: u32,
    /// Bytes from the segment's start on that count: all of a sealed and indexed one (or its repair), the tails that join
    /// one another from the start; 0 where nothing counts (not indexed, disputed, damaged).
    covered: u32,
    /// An announcement in force names it: readers act as if it were gone.
    pub is_expired: bool,
    /// A confirmed one does: whoever confirmed it may delete it at any moment.
    pub is_confirmed: bool,
}

const NEVER: i64 = i64::MIN;

impl HeldSegment {
    pub fn new(number: SegmentNumber) -> HeldSegment {
        HeldSegment { number, bytes: 0, latest: NEVER, objects: 0, covered: 0, is_expired: false, is_confirmed: false }
    }

    /// Adds an object of the name.
    pub fn add(&mut self, stored_bytes: u64) {
        self.bytes = self.bytes.saturating_add(stored_bytes);
        self.objects = self.objects.saturating_add(1);
    }

    /// The whole segment counts.
    pub fn cover_all(&mut self, size: SegmentSize) {
        self.cover_to(size.end_of(self.number), size);
    }

    /// The WAL from the segment's start to `end` counts.
    pub fn cover_to(&mut self, end: Lsn, size: SegmentSize) {
        let bytes = end.saturating_distance(size.start_of(self.number)).min(size.bytes());
        self.covered = self.covered.max(bytes as u32);
    }

    /// Time of a commit in it; the latest one counts. Without any, no commit is in it: what is not told is taken for old. Commits are not in the order of their times: give the latest that is
    /// known (`max_commit_time`) as well as the last one.
    pub fn saw_commit(&mut self, time: Timestamp) {
        self.latest = self.latest.max(time.as_microsecond());
    }

    pub fn latest_commit(&self) -> Option<Timestamp> {
        Some(self.latest).filter(|&micros| micros != NEVER).and_then(|micros| Timestamp::from_microsecond(micros).ok())
    }

    /// The end of what counts; the segment's start where nothing does.
    pub fn covered_to(&self, size: SegmentSize) -> Lsn {
        Lsn(size.start_of(self.number).0 + u64::from(self.covered))
    }

    pub fn is_covered(&self) -> bool {
        self.covered > 0
    }
}

/// An index object that is needed as long as one of its entries is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeldIndex {
    pub name: IndexName,
    pub bytes: u64,
}

/// What is there of one backup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldBackup {
    pub id: BackupId,
    /// What `begin.json` says, where it is there.
    pub begun: Option<Begun>,
    /// What `backup.json` says, where it is there.
    pub completed: Option<Completed>,
    pub is_dead: bool,
    /// A confirmed announcement names it: whoever confirmed it may delete it at any moment.
    pub is_confirmed: bool,
    /// Objects are missing that `backup.json` names, or an open `damaged` fact names it.
    pub is_damaged: bool,
    /// The ledger says that it failed.
    pub is_failed: bool,
    /// Whoever began it may still hold the lease it was begun under. Where that cannot be told: true.
    pub is_leased_alive: bool,
    /// Of all objects below its name.
    pub bytes: u64,
    pub objects: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Begun {
    pub parent: Option<BackupId>,
    pub started: Timestamp,
    pub timeline: TimelineId,
    pub slot_restart_lsn: Lsn,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completed {
    pub parent: Option<BackupId>,
    pub started: Timestamp,
    pub finished: Timestamp,
    /// The last commit at or before `stop_lsn`.
    pub stop_time: Option<Timestamp>,
    pub timeline: TimelineId,
    pub start_lsn: Lsn,
    pub stop_lsn: Lsn,
}

impl Completed {
    pub fn of(file: &BackupFile) -> Completed {
        Completed {
            parent: file.parent,
            started: file.started,
            finished: file.finished,
            stop_time: file.stop_time,
            timeline: file.timeline,
            start_lsn: file.start_lsn,
            stop_lsn: file.stop_lsn,
        }
    }
}

impl HeldBackup {
    /// Without what only listings and the ledger tell: damage, failure, sizes. A lease is taken for alive until it is said
    /// not to be.
    pub fn of(record: &BackupRecord) -> HeldBackup {
        let begun = record.begin.as_ref().map(|file| Begun {
            parent: file.parent,
            started: file.started,
            timeline: file.timeline,
            slot_restart_lsn: file.slot_restart_lsn,
        });
        HeldBackup {
            id: record.id,
            begun,
            completed: record.backup.as_ref().map(Completed::of),
            is_dead: record.is_dead,
            is_confirmed: false,
            is_damaged: false,
            is_failed: false,
            is_leased_alive: true,
            bytes: 0,
            objects: 0,
        }
    }

    pub fn backup_type(&self) -> BackupType {
        self.id.backup_type()
    }

    /// Readers count it.
    pub fn complete(&self) -> Option<&Completed> {
        self.completed.as_ref().filter(|_| !self.is_dead)
    }

    /// It is being taken, as far as anybody can tell.
    pub fn running(&self) -> Option<&Begun> {
        let is_open = self.completed.is_none() && !self.is_dead && !self.is_failed && self.is_leased_alive;
        self.begun.as_ref().filter(|_| is_open)
    }
}

/// The latest word on a pin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldPin {
    pub name: PinName,
    pub file: PinFile,
    /// All that are there of its id, rising; the last one is `name.number`.
    pub numbers: Vec<u32>,
    /// Of all of them.
    pub bytes: u64,
}

/// An `expired` fact in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Announcement {
    /// Its object in the ledger.
    pub key: Key,
    pub bytes: u64,
    /// How a withdrawal names it; older versions gave none, and cannot be withdrawn.
    pub id: Option<String>,
    pub at: Timestamp,
    pub segments: Vec<SegmentRange>,
    pub backups: Vec<BackupId>,
    /// It is decided: it cannot be withdrawn any more.
    pub is_confirmed: bool,
}

/// An object that nothing looks at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Debris {
    pub kind: DebrisKind,
    pub key: Key,
    pub bytes: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DebrisKind {
    /// A tail of a segment that is sealed and indexed.
    Tail,
    /// Of a segment that is indexed.
    RawMarker,
    /// All of its entries stand in another one.
    Index,
    /// A lease below the highest.
    Lease,
    /// Released or lapsed, or an earlier word on one that is in force.
    Pin,
    /// An `expired` fact whose names a later one has.
    Announcement,
}

impl DebrisKind {
    /// Many of them.
    pub fn words(self) -> &'static str {
        match self {
            DebrisKind::Tail => "tails of sealed segments",
            DebrisKind::RawMarker => "markers of indexed segments",
            DebrisKind::Index => "index files that others contain",
            DebrisKind::Lease => "leases that are over",
            DebrisKind::Pin => "pins that are over",
            DebrisKind::Announcement => "announcements that later ones contain",
        }
    }
}

/// A pin that has lapsed protects for as long again, and what is left of one that is over stays for as long.
pub const PIN_GRACE: Duration = Duration::from_secs(24 * 3600);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_held_segment_is_small_and_says_how_far_it_counts() {
        assert!(size_of::<HeldSegment>() <= 48);
        let size = SegmentSize::MIB_16;
        let mut held = HeldSegment::new(SegmentNumber(3));
        assert_eq!((held.is_covered(), held.covered_to(size), held.latest_commit()), (false, Lsn(3 << 24), None));
        held.cover_to(Lsn((3 << 24) + 5), size);
        held.cover_to(Lsn(3 << 24), size);
        assert_eq!(held.covered_to(size), Lsn((3 << 24) + 5));
        held.cover_all(SegmentSize::MIB_16);
        assert_eq!(held.covered_to(size), Lsn(4 << 24));
        let mut largest = HeldSegment::new(SegmentNumber(1));
        largest.cover_all(SegmentSize::new(1 << 30).unwrap());
        assert_eq!(largest.covered_to(SegmentSize::new(1 << 30).unwrap()), Lsn(2 << 30));
        let (early, late): (Timestamp, Timestamp) =
            ("2026-11-22T11:00:00Z".parse().unwrap(), "2026-11-22T11:00:01Z".parse().unwrap());
        held.saw_commit(late);
        held.saw_commit(early);
        assert_eq!(held.latest_commit(), Some(late));
    }
}

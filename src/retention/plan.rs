//! Owns: the verdict on everything a repository holds of a lineage: what stays, what goes, and why.
//! Does not own: what needs what (`needs.rs`), deleting (`apply.rs`).
//! Pure.

use jiff::Timestamp;

use super::inventory::{DebrisKind, Inventory};
use super::policy::Policy;
use crate::catalog::ledger::SegmentRange;
use crate::repository::Key;
use crate::repository::layout::{BackupId, IndexName, Lineage};
use crate::wal::{SegmentName, TimelineId};

/// Whether a lineage is the one its cluster is on, or one that was left behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// The newest lineage of the cluster in this repository.
    Newest,
    /// An earlier one.
    Old(Newest),
}

/// What an old lineage has to know of the newest one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Newest {}

impl Standing {
    /// Of a lineage that is not the newest; `newest` is what the same repository holds of that.
    pub fn old(newest: &Inventory, now: Timestamp) -> Standing {
        let _ = (newest, now);
        todo!()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    Keep,
    Remove,
}

/// What is known of a backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Complete,
    /// Complete, but objects of it, of what it builds on, or of its WAL are missing or damaged.
    Broken,
    Running,
    /// Failed, or left behind by whoever took it.
    Abandoned,
    /// Deleted in part: an earlier `expire` announced it.
    Expiring,
    /// Nothing says what it is.
    Unknown,
}

/// What becomes of a backup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackupVerdict {
    pub id: BackupId,
    pub outcome: Outcome,
    pub fate: Fate,
    /// `dead.json` is there. Where it stays: to be taken back.
    pub is_dead: bool,
    /// Sentences; at least one.
    pub reasons: Vec<String>,
    pub bytes: u64,
    pub objects: u32,
}

/// What becomes of WAL segments `first` to `last`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WalVerdict {
    pub timeline: TimelineId,
    pub first: SegmentName,
    pub last: SegmentName,
    pub fate: Fate,
    /// All of it stands in an announcement in force. Where it stays: to be taken back.
    pub is_announced: bool,
    /// Sentences; at least one.
    pub reasons: Vec<String>,
    pub segments: u64,
    pub bytes: u64,
    pub objects: u64,
}

/// An index object none of whose entries is needed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IndexVerdict {
    pub name: IndexName,
    pub bytes: u64,
}

/// An object that nothing looks at: removed. Objects of one kind are removed in the order given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DebrisVerdict {
    pub kind: DebrisKind,
    pub key: Key,
    pub bytes: u64,
}

/// What to do with a repository's part of a lineage, in full.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    pub lineage: Lineage,
    /// In order of their ids.
    pub backups: Vec<BackupVerdict>,
    /// In order of timelines and numbers.
    pub wal: Vec<WalVerdict>,
    /// Index objects to be removed; all others stay.
    pub indexes: Vec<IndexVerdict>,
    pub debris: Vec<DebrisVerdict>,
    /// What is to be announced as expired before anything is deleted: all that goes, and all that is announced and in
    /// force already, so that this one announcement replaces them. Empty where nothing new goes.
    pub announce: Vec<SegmentRange>,
    /// Announcements in force that name WAL which has to stay: withdrawn, once `announce` is in the ledger.
    pub withdraw: Vec<String>,
    /// What the reader of the plan has to know.
    pub notes: Vec<String>,
}

/// Decides over everything an inventory lists.
pub fn plan(inventory: &Inventory, policy: &Policy, now: Timestamp, standing: &Standing) -> Plan {
    let _ = (inventory, policy, now, standing);
    todo!()
}

impl Plan {
    /// Nothing of it takes any doing.
    pub fn is_idle(&self) -> bool {
        let goes = |fate: Fate, taken_back: bool| fate == Fate::Remove || taken_back;
        !self.backups.iter().any(|it| goes(it.fate, it.is_dead))
            && !self.wal.iter().any(|it| goes(it.fate, it.is_announced))
            && self.indexes.is_empty()
            && self.debris.is_empty()
            && self.withdraw.is_empty()
    }

    pub fn removed_backups(&self) -> impl Iterator<Item = &BackupVerdict> {
        self.backups.iter().filter(|verdict| verdict.fate == Fate::Remove)
    }

    pub fn removed_wal(&self) -> impl Iterator<Item = &WalVerdict> {
        self.wal.iter().filter(|verdict| verdict.fate == Fate::Remove)
    }

    /// Bytes and objects that go.
    pub fn freed(&self) -> (u64, u64) {
        let backups = self.removed_backups().map(|it| (it.bytes, u64::from(it.objects)));
        let wal = self.removed_wal().map(|it| (it.bytes, it.objects));
        let indexes = self.indexes.iter().map(|it| (it.bytes, 1));
        let debris = self.debris.iter().map(|it| (it.bytes, 1));
        let all = backups.chain(wal).chain(indexes).chain(debris);
        all.fold((0, 0), |sum, (bytes, objects)| (sum.0 + bytes, sum.1 + objects))
    }

    /// What this plan removes and `later` keeps, in words: the same inventory with pins and backups read again after the
    /// announcement. Nothing may be deleted while there is any.
    pub fn objections(&self, later: &Plan) -> Vec<String> {
        let mut objections = Vec::new();
        for gone in self.removed_backups() {
            let kept = later.backups.iter().find(|it| it.id == gone.id && it.fate == Fate::Keep);
            objections.extend(kept.map(|it| format!("backup {} {}", it.id, it.reasons.join("; "))));
        }
        for gone in self.removed_wal() {
            let overlaps = |it: &&WalVerdict| {
                it.fate == Fate::Keep && it.timeline == gone.timeline && it.first <= gone.last && gone.first <= it.last
            };
            let kept = later.wal.iter().filter(overlaps);
            objections.extend(kept.map(|it| format!("WAL {} to {} {}", it.first, it.last, it.reasons.join("; "))));
        }
        objections
    }
}

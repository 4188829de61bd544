//! Owns: what a segment holds, as its index entry tells it: counts, commits, restore points, drops.
//! Does not own: finding it out (`scanner.rs`) or storing it (`catalog/index.rs`).

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{Carry, Lsn, Proof};

/// A commit as the WAL has it. Times are taken before insertion: they are not monotonic in LSN order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Commit {
    pub xid: u32,
    /// Start of the commit record.
    pub lsn: Lsn,
    pub time: Timestamp,
}

/// A named restore point (`pg_create_restore_point`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestorePoint {
    pub name: String,
    pub lsn: Lsn,
    pub time: Timestamp,
}

/// A transaction that dropped relations, a truncation, the removal of a database or tablespace: what `find` looks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RelationChange {
    pub xid: u32,
    pub lsn: Lsn,
    /// Commit time; `None` for all others, whose records have none.
    pub time: Option<Timestamp>,
    /// `<tablespace oid>/<database oid>/<relfilenode>`, capped like the lists in [`SegmentSummary`].
    pub relations: Vec<String>,
}

/// What the records that start in one segment say, and what a reader of the next segment needs to go on proving.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SegmentSummary {
    pub proof: Proof,
    /// Records that start in this segment.
    pub record_count: u64,
    /// Start of the last record that starts in this segment or before it: the next record's `xl_prev`.
    pub last_record: Option<Lsn>,
    /// The last record end at or before the segment's end: what may be acknowledged once the segment is durable.
    pub record_end: Option<Lsn>,
    pub min_commit_time: Option<Timestamp>,
    pub max_commit_time: Option<Timestamp>,
    pub min_xid: Option<u32>,
    pub max_xid: Option<u32>,
    pub last_commit: Option<Commit>,
    pub restore_points: Vec<RestorePoint>,
    pub drops: Vec<RelationChange>,
    pub truncations: Vec<RelationChange>,
    /// Directories of databases that were removed, `<tablespace oid>/<database oid>`: DROP DATABASE, a move to another
    /// tablespace, a CREATE DATABASE that failed. Absent where there is none, as in entries of older versions.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub database_removals: Vec<RelationChange>,
    /// Tablespaces that were removed, by OID.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tablespace_removals: Vec<RelationChange>,
    /// A list above was cut at [`SegmentSummary::LIST_MAX`] entries (or a relation list inside it).
    pub truncated: bool,
    /// The scanner's state at the segment's end, so that the proof continues across restarts.
    pub carry: Carry,
}

impl SegmentSummary {
    /// Entries kept per list: a segment full of drops must not make its index entry as large as itself.
    pub const LIST_MAX: usize = 100;

    /// Of a segment in which no record starts.
    pub fn empty(last_record: Option<Lsn>) -> SegmentSummary {
        SegmentSummary {
            proof: Proof::Proven,
            record_count: 0,
            last_record,
            record_end: None,
            min_commit_time: None,
            max_commit_time: None,
            min_xid: None,
            max_xid: None,
            last_commit: None,
            restore_points: Vec::new(),
            drops: Vec::new(),
            truncations: Vec::new(),
            database_removals: Vec::new(),
            tablespace_removals: Vec::new(),
            truncated: false,
            carry: Carry::default(),
        }
    }
}

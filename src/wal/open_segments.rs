//! Owns: the summaries of the segments that are being read, until everything that starts in them is proven.
//! Does not own: finding out what goes into them (`scanner.rs`).

use std::collections::VecDeque;

use jiff::Timestamp;

use super::record::Fact;
use super::{Carry, Commit, Lsn, Proof, RelationChange, RestorePoint, SegmentNumber, SegmentSize, SegmentSummary};

/// The last one is being read; those before it wait for a record that crosses their end. There are at most as many as
/// one record can span: 1020.
#[derive(Debug)]
pub(super) struct OpenSegments {
    size: SegmentSize,
    first: SegmentNumber,
    open: VecDeque<SegmentSummary>,
    /// Leading summaries that are complete although nothing up to their end is proven: see [`Self::release_all`].
    released: usize,
}

impl OpenSegments {
    pub fn new(size: SegmentSize, start: Lsn, last_record: Option<Lsn>) -> OpenSegments {
        let open = VecDeque::from([SegmentSummary::empty(last_record)]);
        OpenSegments { size, first: size.segment_of(start), open, released: 0 }
    }

    /// The summary of the segment that `start` lies in, unless it was taken before this scanner's time.
    #[inline]
    fn holding(&mut self, start: Lsn) -> Option<&mut SegmentSummary> {
        let index = self.size.segment_of(start).0.checked_sub(self.first.0)?;
        self.open.get_mut(index as usize)
    }

    /// Of the segment being read.
    pub fn reading(&self) -> &SegmentSummary {
        self.open.back().expect("the segment being read is always open")
    }

    fn current(&mut self) -> &mut SegmentSummary {
        self.open.back_mut().expect("the segment being read is always open")
    }

    /// Counts a record that lies in the segment being read.
    #[inline]
    pub fn count_record(&mut self, start: Lsn) {
        let current = self.current();
        current.record_count += 1;
        current.last_record = Some(start);
    }

    /// Counts a record that may have begun in an earlier segment: it is the last one for all it reaches into.
    pub fn count_long_record(&mut self, start: Lsn) {
        if let Some(summary) = self.holding(start) {
            summary.record_count += 1;
        }
        let index = self.size.segment_of(start).0.saturating_sub(self.first.0);
        for summary in self.open.iter_mut().skip(index as usize) {
            summary.last_record = Some(start);
        }
    }

    /// Notes what a record says; returns the commit if it is one.
    pub fn note(&mut self, start: Lsn, fact: Fact) -> Option<Commit> {
        let summary = self.holding(start)?;
        match fact {
            Fact::Commit { xid, time, relations, truncated } => {
                summary.truncated |= truncated;
                note_commit(summary, start, xid, time, relations)
            }
            Fact::RestorePoint { name, time } => {
                if let Some(time) = time {
                    push(&mut summary.truncated, &mut summary.restore_points, RestorePoint { name, lsn: start, time });
                }
                None
            }
            Fact::Truncation { xid, relation } => {
                let change = RelationChange { xid, lsn: start, time: None, relations: vec![relation] };
                push(&mut summary.truncated, &mut summary.truncations, change);
                None
            }
            Fact::DatabaseRemoval { xid, directories: relations, truncated } => {
                summary.truncated |= truncated;
                let change = RelationChange { xid, lsn: start, time: None, relations };
                push(&mut summary.truncated, &mut summary.database_removals, change);
                None
            }
            Fact::TablespaceRemoval { xid, tablespace } => {
                let change = RelationChange { xid, lsn: start, time: None, relations: vec![tablespace.to_string()] };
                push(&mut summary.truncated, &mut summary.tablespace_removals, change);
                None
            }
        }
    }

    /// The segment being read has ended; the next one begins.
    pub fn close(&mut self, proof: Proof, carry: Carry) {
        let last_record = carry.last_record;
        let current = self.current();
        current.proof = proof;
        current.record_end = carry.record_end;
        current.carry = carry;
        self.open.push_back(SegmentSummary::empty(last_record));
    }

    /// Lets the closed segments go unproven: they hold nothing but the rest of a record that began before the archive.
    pub fn release_all(&mut self) {
        self.released = self.open.len() - 1;
    }

    pub fn poll(&mut self, proven: Lsn) -> Option<(SegmentNumber, SegmentSummary)> {
        let closed = self.open.len() > 1;
        if !closed || (self.released == 0 && self.size.end_of(self.first) > proven) {
            return None;
        }
        self.released = self.released.saturating_sub(1);
        let number = self.first;
        self.first = number.next();
        self.open.pop_front().map(|summary| (number, summary))
    }
}

fn note_commit(
    summary: &mut SegmentSummary,
    lsn: Lsn,
    xid: u32,
    time: Option<Timestamp>,
    relations: Vec<String>,
) -> Option<Commit> {
    if xid != 0 {
        summary.min_xid = Some(summary.min_xid.map_or(xid, |min| min.min(xid)));
        summary.max_xid = Some(summary.max_xid.map_or(xid, |max| max.max(xid)));
    }
    if !relations.is_empty() {
        push(&mut summary.truncated, &mut summary.drops, RelationChange { xid, lsn, time, relations });
    }
    let time = time?;
    summary.min_commit_time = Some(summary.min_commit_time.map_or(time, |min| min.min(time)));
    summary.max_commit_time = Some(summary.max_commit_time.map_or(time, |max| max.max(time)));
    let commit = Commit { xid, lsn, time };
    summary.last_commit = Some(commit);
    Some(commit)
}

fn push<T>(truncated: &mut bool, list: &mut Vec<T>, entry: T) {
    if list.len() < SegmentSummary::LIST_MAX {
        list.push(entry);
    } else {
        *truncated = true;
    }
}

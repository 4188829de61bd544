//! skeleton
use super::{Commit, History, Lsn, SegmentNumber, SegmentSize, SegmentSummary, SystemId, TimelineId};
use serde::{Deserialize, Serialize};

/// How far the WAL format of a stream is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Proof {
    Proven,
    Unproven,
}

/// The scanner's state at a segment boundary.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Carry {
    pub last_record: Option<Lsn>,
}

#[derive(Clone, Debug)]
pub struct ScanOptions {
    pub system_id: SystemId,
    pub segment_size: SegmentSize,
    pub history: History,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("WAL does not prove at {lsn}: {fault}")]
pub struct ScanError {
    pub lsn: Lsn,
    pub record: Lsn,
    pub fault: String,
}

#[derive(Debug)]
pub struct Scanner {}
impl Scanner {
    pub fn new(_options: ScanOptions, _start: Lsn, _carry: Carry) -> Scanner {
        todo!()
    }
    pub fn feed(&mut self, _lsn: Lsn, _bytes: &[u8]) -> Result<(), ScanError> {
        todo!()
    }
    pub fn position(&self) -> Lsn {
        todo!()
    }
    pub fn proven(&self) -> Lsn {
        todo!()
    }
    pub fn proof(&self) -> Proof {
        todo!()
    }
    pub fn last_commit(&self) -> Option<Commit> {
        todo!()
    }
    pub fn poll_segment(&mut self) -> Option<(SegmentNumber, SegmentSummary)> {
        todo!()
    }
    pub fn timeline(&self) -> TimelineId {
        todo!()
    }
}

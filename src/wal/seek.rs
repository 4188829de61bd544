//! Owns: single records a reader looks for: ends of transactions, restore points, positions.
//! Does not own: reading them (`scanner.rs`), where to look (`restore`).

use std::collections::VecDeque;

use jiff::Timestamp;

use super::Lsn;
use super::page::Format;
use super::record::{self, Fact, RecordHeader};

/// What is looked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sought {
    /// A commit or rollback later than this instant, or not earlier (`or_at`): where recovery to a time stops.
    EndPast {
        time: Timestamp,
        or_at: bool,
    },
    /// The commit or rollback of this transaction.
    EndOf {
        xid: u32,
    },
    /// The last record that says a time: the end of a transaction, or a restore point.
    LastTime,
    RestorePoint {
        name: String,
    },
    /// A record that starts at or after this position.
    RecordFrom(Lsn),
    /// Whatever comes last.
    LastRecord,
    /// So many commits before a place, the nearest, and so many from it on.
    CommitsAround {
        place: Place,
        before: usize,
        after: usize,
    },
    /// The first commits with times between these, both included; so many.
    CommitsBetween {
        since: Option<Timestamp>,
        until: Option<Timestamp>,
        count: usize,
    },
}

/// Where commits are divided into earlier and later ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Later ones start at or after it.
    Lsn(Lsn),
    /// The first one after this instant is later, and all that follow it, whatever their times are: where recovery to
    /// a time stops.
    After(Timestamp),
}

impl Place {
    /// Whether a commit is the first later one, where none was before.
    pub fn begins_with(self, commit: &Found) -> bool {
        match self {
            Place::Lsn(lsn) => commit.lsn >= lsn,
            Place::After(time) => commit.time.is_some_and(|at| at > time),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FoundKind {
    Commit,
    Rollback,
    RestorePoint,
    Record,
}

/// A record that was looked for. Its CRC was right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// Where it starts.
    pub lsn: Lsn,
    pub kind: FoundKind,
    pub xid: Option<u32>,
    pub time: Option<Timestamp>,
}

/// What was found so far: the first few, or the last one.
#[derive(Debug)]
pub(super) struct Seeker {
    sought: Sought,
    found: Vec<Found>,
    /// Of commits around a place: those before it, the oldest first.
    earlier: VecDeque<Found>,
}

impl Seeker {
    /// No answer but lists of commits needs more, and a segment may hold a million commits.
    const FOUND_MAX: usize = 16;

    pub fn new(sought: Sought) -> Seeker {
        Seeker { sought, found: Vec::new(), earlier: VecDeque::new() }
    }

    pub fn found(&self) -> impl Iterator<Item = &Found> {
        self.earlier.iter().chain(&self.found)
    }

    /// A list of commits that has as many as were asked for.
    pub fn is_full(&self) -> bool {
        match self.sought {
            Sought::CommitsAround { after, .. } => self.found.len() >= after && !self.found.is_empty(),
            Sought::CommitsBetween { count, .. } => self.found.len() >= count,
            _ => false,
        }
    }

    /// `main` may be cut off where only a prefix of the record was kept.
    pub fn see(&mut self, start: Lsn, header: &RecordHeader, main: &[u8], format: Format) {
        let mut found_max = Self::FOUND_MAX;
        let commit = || fact(start, header, main, format, None).filter(|found| found.kind == FoundKind::Commit);
        let (found, is_last_wanted) = match &self.sought {
            Sought::CommitsAround { place, before, after } => {
                let Some(commit) = commit() else { return };
                if self.found.is_empty() && !place.begins_with(&commit) {
                    self.earlier.push_back(commit);
                    if self.earlier.len() > *before {
                        self.earlier.pop_front();
                    }
                    return;
                }
                found_max = *after;
                (Some(commit), false)
            }
            Sought::CommitsBetween { since, until, count } => {
                let is_between = |found: &Found| {
                    found.time.is_some_and(|at| {
                        since.is_none_or(|since| since <= at) && until.is_none_or(|until| at <= until)
                    })
                };
                found_max = *count;
                (commit().filter(is_between), false)
            }
            Sought::RecordFrom(lsn) => (position(start, header).filter(|found| found.lsn >= *lsn), false),
            Sought::LastRecord => (position(start, header), true),
            Sought::LastTime => (fact(start, header, main, format, None).filter(|found| found.time.is_some()), true),
            Sought::RestorePoint { name } => {
                (fact(start, header, main, format, Some(name)).filter(|it| it.kind == FoundKind::RestorePoint), false)
            }
            Sought::EndOf { xid } => {
                let is_it = |found: &Found| found.is_end() && found.xid == Some(*xid);
                (fact(start, header, main, format, None).filter(is_it), false)
            }
            Sought::EndPast { time, or_at } => {
                let is_past = |found: &Found| {
                    found.is_end() && found.time.is_some_and(|at| at > *time || (*or_at && at == *time))
                };
                (fact(start, header, main, format, None).filter(is_past), false)
            }
        };
        match found {
            Some(found) if is_last_wanted => self.found = vec![found],
            Some(found) if self.found.len() < found_max => self.found.push(found),
            _ => {}
        }
    }
}

impl Found {
    fn is_end(&self) -> bool {
        matches!(self.kind, FoundKind::Commit | FoundKind::Rollback)
    }
}

fn position(start: Lsn, header: &RecordHeader) -> Option<Found> {
    let xid = Some(header.xid).filter(|xid| *xid != 0);
    Some(Found { lsn: start, kind: FoundKind::Record, xid, time: None })
}

fn fact(start: Lsn, header: &RecordHeader, main: &[u8], format: Format, name: Option<&str>) -> Option<Found> {
    if let Some((xid, time)) = record::rollback(header, main, format) {
        return Some(Found { lsn: start, kind: FoundKind::Rollback, xid: Some(xid), time });
    }
    match record::fact(header, main, format)? {
        Fact::Commit { xid, time, .. } => Some(Found { lsn: start, kind: FoundKind::Commit, xid: Some(xid), time }),
        Fact::RestorePoint { name: found, time } if name.is_none_or(|name| name == found) => {
            Some(Found { lsn: start, kind: FoundKind::RestorePoint, xid: None, time })
        }
        _ => None,
    }
}

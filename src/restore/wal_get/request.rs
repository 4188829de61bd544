//! Owns: what PostgreSQL asks for, where it lies on the restore's path, and what its first page must say.
//! Does not own: where the bytes come from.
//! Pure.

use std::ops::Range;

use super::error::{Absence, WalGetError};
use crate::catalog::Expired;
use crate::catalog::contents::segment_span;
use crate::repository::layout::{self, WalDirectory};
use crate::wal::{History, Lsn, SegmentName, SegmentSize, SystemId, TimelineId};

pub const LONG_HEADER_BYTES: usize = 40;
const LONG_HEADER_FLAG: u16 = 0x0002;

/// What PostgreSQL asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    Segment(SegmentName),
    History(TimelineId),
    /// `.backup` and `.partial` files: real names, never archived.
    Other,
}

impl Request {
    pub fn parse(name: &str) -> Result<Request, WalGetError> {
        if let Ok(segment) = name.parse() {
            return Ok(Request::Segment(segment));
        }
        if let Some(timeline) = layout::parse_history(name) {
            return Ok(Request::History(timeline));
        }
        let offset =
            |text: &str| text.len() == 8 && text.bytes().all(|b| b.is_ascii_digit() || (b'A'..=b'F').contains(&b));
        match name.split_once('.') {
            Some((segment, rest)) if segment.parse::<SegmentName>().is_ok() => match rest.split_once('.') {
                None if rest == "partial" => Ok(Request::Other),
                Some((text, "backup")) if offset(text) => Ok(Request::Other),
                _ => Err(usage(name)),
            },
            _ => Err(usage(name)),
        }
    }
}

pub fn usage(name: &str) -> WalGetError {
    WalGetError::Usage { name: name.chars().take(80).collect() }
}

/// Whether a segment is part of the path and not expired.
pub fn counts(path: &History, name: SegmentName, size: SegmentSize, expired: &Expired) -> bool {
    let Some(span) = segment_span(name, size) else { return false };
    on_path(path, name.timeline, &span).is_ok() && !expired.contains(name)
}

/// How far the path goes along the timeline inside the segment, or why it holds none of it.
pub fn on_path(path: &History, timeline: TimelineId, span: &Range<Lsn>) -> Result<Lsn, Absence> {
    let begin = path.begin_of(timeline).ok_or(Absence::NotOnPath)?;
    let limit = path.end_of(timeline).map_or(span.end, |fork| fork.min(span.end));
    // A timeline that forks at a segment's very end begins with the next segment.
    if span.end <= begin {
        Err(Absence::BeforeTimeline)
    } else if limit <= span.start {
        Err(Absence::BeyondFork)
    } else {
        Ok(limit)
    }
}

#[derive(Clone, Copy, Debug)]
pub enum Side {
    After,
    Before,
}

impl Side {
    pub fn concerns(self, directory: WalDirectory, wanted: SegmentName) -> bool {
        match self {
            Side::After => directory.high >= wanted.high,
            Side::Before => directory.high <= wanted.high,
        }
    }

    /// Along a path a child's segment comes after its parent's of the same number.
    pub fn holds(self, name: SegmentName, wanted: SegmentName) -> bool {
        let place = |name: SegmentName| (name.high, name.low, name.timeline);
        match self {
            Side::After => place(name) > place(wanted),
            Side::Before => place(name) < place(wanted),
        }
    }

    /// The likeliest directories first.
    pub fn order(self, directories: &[WalDirectory]) -> Vec<WalDirectory> {
        let mut directories = directories.to_vec();
        if matches!(self, Side::After) {
            directories.reverse();
        }
        directories
    }
}

/// The segment asked for: [start, end), of which the path holds [start, limit).
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    pub name: SegmentName,
    pub size: SegmentSize,
    pub start: Lsn,
    pub end: Lsn,
    pub limit: Lsn,
    pub system_id: SystemId,
}

impl Wanted {
    /// Names under which the bytes may be: where the path leaves the timeline inside the segment, the children's
    /// segments begin with the same bytes.
    pub fn sources(&self, path: &History) -> Vec<SegmentName> {
        let mut names = vec![self.name];
        let mut timeline = self.name.timeline;
        while self.limit < self.end
            && let Some(child) = path.child_of(timeline)
            && path.begin_of(child).is_some_and(|begin| begin < self.end)
        {
            names.push(SegmentName { timeline: child, ..self.name });
            timeline = child;
        }
        names
    }

    /// What the long header of the first page must say (proto-notes/05-wal-format.md, "page header").
    pub fn check_header(&self, head: &[u8]) -> Result<(), String> {
        if head.len() < LONG_HEADER_BYTES {
            return Err("it does not hold a whole page header".to_string());
        }
        let u16_at = |at: usize| u16::from_le_bytes(head[at..at + 2].try_into().expect("two bytes"));
        let u32_at = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().expect("four bytes"));
        let u64_at = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().expect("eight bytes"));
        let differs = |what: &str, found: &dyn std::fmt::Display, expected: &dyn std::fmt::Display| {
            Err(format!("its page header has {what} {found}, expected {expected}"))
        };
        let (flags, timeline, address) = (u16_at(2), TimelineId(u32_at(4)), Lsn(u64_at(8)));
        let (system_id, size) = (SystemId(u64_at(24)), u64::from(u32_at(32)));
        if flags & LONG_HEADER_FLAG == 0 {
            return Err("it does not begin with a long page header".to_string());
        }
        if address != self.start {
            return differs("address", &address, &self.start);
        }
        if system_id != self.system_id {
            return differs("system identifier", &system_id, &self.system_id);
        }
        if size != self.size.bytes() {
            return differs("segment size", &size, &self.size.bytes());
        }
        if timeline == TimelineId(0) || timeline > self.name.timeline {
            return differs("timeline", &timeline, &format_args!("at most {}", self.name.timeline));
        }
        Ok(())
    }
}

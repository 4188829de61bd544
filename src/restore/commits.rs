//! Owns: single commits of a line: around a place, between two times, of one transaction; which segments are read for them.
//! Does not own: reading segments (`search.rs`), which WAL there is (`reach.rs`), how commits are shown (`cli`).
//!
//! The index says of each segment between which times and which transaction ids its commits lie; a segment is read
//! only where that leaves it open, and so many at most.

use std::collections::VecDeque;
use std::fmt;

use jiff::Timestamp;

use super::reach::{Block, Line, Reach};
use super::search::Search;
use crate::wal::{Found, Lsn, Place, Sought, TimelineId};

/// Segments read for one answer (around a place: in each direction).
const READS_MAX: usize = 128;
/// Segments that are read in one go, at most.
const RANGE_SEGMENTS_MAX: u64 = 16;

/// Ends of transactions in the order of the WAL, each with the timeline it lies on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Commits {
    pub found: Vec<(TimelineId, Found)>,
    /// There are more between the times than were wanted.
    pub more: bool,
    /// What could not be looked into, and why.
    pub unread: Vec<String>,
}

/// WAL of a line that lies in one segment.
#[derive(Clone, Copy, Debug)]
struct Part {
    from: Lsn,
    to: Lsn,
    /// The end of the stretch it belongs to.
    readable: Lsn,
    known: Known,
}

/// What the index says of its commits.
#[derive(Clone, Copy, Debug)]
enum Known {
    Nothing,
    /// `None`: there is none with a time, or with an id.
    Bounds {
        times: Option<(Timestamp, Timestamp)>,
        xids: Option<(u32, u32)>,
    },
}

impl Known {
    fn of(block: &Block<'_>) -> Known {
        match block.digest.filter(|_| !block.is_cut) {
            None => Known::Nothing,
            Some(digest) => {
                Known::Bounds { times: digest.min_commit_time().zip(digest.max_commit_time()), xids: digest.xids() }
            }
        }
    }

    /// `is_it` sees the bounds of the times.
    fn times_may_be(&self, is_it: impl Fn(Timestamp, Timestamp) -> bool) -> bool {
        match self {
            Known::Nothing => true,
            Known::Bounds { times, .. } => times.is_some_and(|(min, max)| is_it(min, max)),
        }
    }

    fn may_hold(&self, xid: u32) -> bool {
        match self {
            Known::Nothing => true,
            Known::Bounds { xids, .. } => xids.is_some_and(|(min, max)| (min..=max).contains(&xid)),
        }
    }
}

/// A line's WAL segment by segment, in order.
fn parts(reach: &Reach<'_>, line: &Line) -> Vec<Part> {
    let size = reach.size();
    let mut parts: Vec<Part> = Vec::new();
    for stretch in &line.stretches {
        for block in reach.blocks(line, stretch.from, stretch.to) {
            let from = block.from.max(stretch.from);
            let segment = size.segment_of(from);
            match parts.last_mut() {
                // Tails of one segment, or a parent's and its child's.
                Some(last) if last.readable == stretch.to && size.segment_of(last.from) == segment => {
                    last.to = last.to.max(block.to);
                    last.known = Known::Nothing;
                }
                _ => parts.push(Part { from, to: block.to, readable: stretch.to, known: Known::of(&block) }),
            }
        }
    }
    parts.retain(|part| part.from < part.to);
    parts
}

/// Looks into one line.
pub struct Looking<'a> {
    pub reach: &'a Reach<'a>,
    pub search: &'a dyn Search,
    pub line: &'a Line,
}

impl fmt::Debug for Looking<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Looking").field("line", &self.line).finish_non_exhaustive()
    }
}

impl Looking<'_> {
    /// The commits nearest to a place: up to `count` before it, and `count` from it on.
    pub async fn around(&self, place: Place, count: usize) -> Commits {
        let mut commits = Commits::default();
        let parts = parts(self.reach, self.line);
        let is_past = |part: &Part| match place {
            Place::Lsn(lsn) => part.to > lsn,
            Place::After(time) => part.known.times_may_be(|_, max| max > time),
        };
        let first = parts.iter().position(is_past).unwrap_or(parts.len());
        let (mut earlier, mut later) = (VecDeque::new(), Vec::new());
        for (reads, part) in with_commits(parts[first..].iter()).enumerate() {
            if later.len() >= count {
                break;
            }
            if reads == READS_MAX {
                commits.unread.push(self.too_many(part.from, "and after it"));
                break;
            }
            let place = if later.is_empty() { place } else { Place::Lsn(Lsn::ZERO) };
            let sought = Sought::CommitsAround { place, before: count, after: count - later.len() };
            for commit in self.read(part, sought, &mut commits.unread).await {
                if later.is_empty() && !place.begins_with(&commit) {
                    earlier.push_back(commit);
                } else {
                    later.push(commit);
                }
            }
        }
        for (reads, part) in with_commits(parts[..first].iter().rev()).enumerate() {
            if earlier.len() >= count {
                break;
            }
            if reads == READS_MAX {
                commits.unread.push(self.too_many(part.from, "and before it"));
                break;
            }
            // Nothing is later than that: one is asked for because there must be some.
            let (place, before) = (Place::Lsn(Lsn::MAX), count - earlier.len());
            let sought = Sought::CommitsAround { place, before, after: 1 };
            let before = self.read(part, sought, &mut commits.unread).await;
            before.into_iter().rev().for_each(|commit| earlier.push_front(commit));
        }
        let surplus = earlier.len().saturating_sub(count);
        let all = earlier.into_iter().skip(surplus).chain(later.into_iter().take(count));
        commits.found = all.map(|commit| (self.line.path.at(commit.lsn), commit)).collect();
        commits
    }

    /// The first `count` commits with times between these.
    pub async fn between(&self, since: Option<Timestamp>, until: Option<Timestamp>, count: usize) -> Commits {
        let mut commits = Commits::default();
        let touches = |min: Timestamp, max: Timestamp| {
            since.is_none_or(|since| since <= max) && until.is_none_or(|until| min <= until)
        };
        let parts = parts(self.reach, self.line).into_iter().filter(|part| part.known.times_may_be(touches));
        let mut found: Vec<Found> = Vec::new();
        for part in self.bounded(joined(parts, self.reach.size().bytes()), &mut commits.unread) {
            // One more tells whether there are more.
            let sought = Sought::CommitsBetween { since, until, count: count + 1 - found.len() };
            found.extend(self.read(&part, sought, &mut commits.unread).await);
            if found.len() > count {
                commits.more = true;
                break;
            }
        }
        found.truncate(count);
        commits.found = found.into_iter().map(|commit| (self.line.path.at(commit.lsn), commit)).collect();
        commits
    }

    /// Where a transaction ended on the line's own timeline; on those before it, their own lines tell.
    pub async fn ends_of(&self, xid: u32) -> Commits {
        let mut commits = Commits::default();
        let begin = self.line.path.begin_of(self.line.path.timeline).unwrap_or(Lsn::ZERO);
        let parts = parts(self.reach, self.line).into_iter();
        let parts = parts.filter(|part| part.to > begin && part.known.may_hold(xid));
        for part in self.bounded(joined(parts, self.reach.size().bytes()), &mut commits.unread) {
            let found = self.read(&part, Sought::EndOf { xid }, &mut commits.unread).await;
            let own = found.into_iter().filter(|end| end.lsn >= begin);
            commits.found.extend(own.map(|end| (self.line.path.timeline, end)));
        }
        commits
    }

    /// As many as are read for one answer.
    fn bounded(&self, parts: Vec<Part>, unread: &mut Vec<String>) -> Vec<Part> {
        let bytes = self.reach.size().bytes();
        let mut segments = 0;
        let fits = |part: &&Part| {
            segments += (part.to - part.from).div_ceil(bytes) as usize;
            segments <= READS_MAX
        };
        let first: Vec<Part> = parts.iter().take_while(fits).copied().collect();
        if let Some(next) = parts.get(first.len()) {
            unread.push(self.too_many(next.from, "on"));
        }
        first
    }

    fn too_many(&self, from: Lsn, direction: &str) -> String {
        let timeline = self.line.path.at(from);
        format!(
            "timeline {timeline} from {from} {direction}: what is looked for may be in more than {READS_MAX} segments; \
             narrow it down"
        )
    }

    async fn read(&self, part: &Part, sought: Sought, unread: &mut Vec<String>) -> Vec<Found> {
        let Part { from, to, readable, .. } = *part;
        match self.search.find(&self.line.path, from..to, readable, sought).await {
            Ok(found) => found,
            Err(error) => {
                unread.push(format!("timeline {} from {from} to {to}: {error}", self.line.path.at(from)));
                Vec::new()
            }
        }
    }
}

/// Those that have commits with times, or may have.
fn with_commits<'p>(parts: impl Iterator<Item = &'p Part>) -> impl Iterator<Item = &'p Part> {
    parts.filter(|part| part.known.times_may_be(|_, _| true))
}

/// Neighbours together: the end of one is the beginning of the next, and both are read once.
fn joined(parts: impl Iterator<Item = Part>, segment_bytes: u64) -> Vec<Part> {
    let mut joined: Vec<Part> = Vec::new();
    for part in parts {
        match joined.last_mut() {
            Some(last)
                if last.to == part.from
                    && last.readable == part.readable
                    && part.to - last.from <= RANGE_SEGMENTS_MAX * segment_bytes =>
            {
                last.to = part.to;
            }
            _ => joined.push(part),
        }
    }
    joined
}

#[cfg(test)]
mod tests;

//! Owns: timeline ids, the system identifier, and history files (proto-notes/06-timelines.md).
//! Does not own: which path through timelines counts (`continuity`), where streaming goes on (`receiver/resume.rs`).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::Lsn;

/// A timeline: one line of history of a cluster; every promotion starts a new one. 0 is never valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TimelineId(pub u32);

impl fmt::Display for TimelineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// The number `initdb` gave a cluster; clones and standbys share it. Written in decimal.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SystemId(pub u64);

impl fmt::Display for SystemId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for SystemId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl FromStr for SystemId {
    type Err = std::num::ParseIntError;
    fn from_str(text: &str) -> Result<SystemId, Self::Err> {
        text.parse().map(SystemId)
    }
}

/// A string in JSON: the number does not fit a double.
impl Serialize for SystemId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for SystemId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<SystemId, D::Error> {
        super::text::from_text(deserializer, str::parse)
    }
}

/// "The WAL of `timeline` is part of this history up to (not including) `end`."
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HistoryEntry {
    pub timeline: TimelineId,
    pub end: Lsn,
}

/// The ancestry of one timeline, oldest first, as its history file tells it. Timeline 1 has no ancestors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct History {
    pub timeline: TimelineId,
    ancestors: Vec<HistoryEntry>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HistoryError {
    #[error("history of timeline {timeline}, line {line}: expected \"<timeline> <switch LSN> <reason>\"")]
    Syntax { timeline: TimelineId, line: usize },
    #[error(
        "history of timeline {timeline}, line {line}: ancestor {ancestor} does not come after the one before it and before the timeline itself"
    )]
    Order { timeline: TimelineId, line: usize, ancestor: TimelineId },
    #[error("history of timeline {timeline} is {bytes} bytes long, more than the {limit} a history file may have")]
    TooLong { timeline: TimelineId, bytes: usize, limit: usize },
}

impl History {
    /// A larger history is refused: a line is about 60 bytes and every failover adds one.
    pub const BYTES_MAX: usize = 4 << 20;

    /// A timeline without ancestors.
    pub fn root(timeline: TimelineId) -> History {
        History { timeline, ancestors: Vec::new() }
    }

    /// A timeline with these ancestors, oldest first; `None` where their numbers do not rise to its own.
    pub fn of_ancestors(timeline: TimelineId, ancestors: Vec<HistoryEntry>) -> Option<History> {
        let line = ancestors.iter().map(|entry| entry.timeline).chain([timeline]);
        line.is_sorted_by(|one, next| one < next)
            .then_some(History { timeline, ancestors })
            .filter(|history| history.ancestors.first().is_none_or(|entry| entry.timeline > TimelineId(0)))
    }

    /// Parses a history file as PostgreSQL's `readTimeLineHistory` does: `#` comments and blank lines are
    /// skipped, what follows the LSN is a reason in words, which may run over several lines.
    pub fn parse(timeline: TimelineId, content: &[u8]) -> Result<History, HistoryError> {
        if content.len() > Self::BYTES_MAX {
            return Err(HistoryError::TooLong { timeline, bytes: content.len(), limit: Self::BYTES_MAX });
        }
        let mut ancestors: Vec<HistoryEntry> = Vec::new();
        for (index, line) in content.split(|&b| b == b'\n').enumerate() {
            let line_number = index + 1;
            let text = String::from_utf8_lossy(line);
            let text = text.trim_start();
            if text.is_empty() || text.starts_with('#') {
                continue;
            }
            let mut words = text.split_ascii_whitespace();
            let ancestor = words.next().and_then(|word| word.parse::<u32>().ok());
            let end = words.next().and_then(|word| word.parse::<Lsn>().ok());
            let (Some(ancestor), Some(end)) = (ancestor, end) else {
                return Err(HistoryError::Syntax { timeline, line: line_number });
            };
            let ancestor = TimelineId(ancestor);
            let previous = ancestors.last().map_or(TimelineId(0), |entry| entry.timeline);
            if ancestor <= previous || ancestor >= timeline {
                return Err(HistoryError::Order { timeline, line: line_number, ancestor });
            }
            ancestors.push(HistoryEntry { timeline: ancestor, end });
        }
        Ok(History { timeline, ancestors })
    }

    /// The parent's history file, out of its child's: the server copies the parent's file, adds a line feed and
    /// one line of its own. `None` when the parent has none (it is the oldest).
    pub fn parent_file(child: &[u8]) -> Option<&[u8]> {
        let is_entry = |line: &[u8]| line.first().is_some_and(u8::is_ascii_digit);
        let mut last_entry = None;
        let mut start = 0;
        for line in child.split_inclusive(|&b| b == b'\n') {
            if is_entry(line) {
                last_entry = Some(start);
            }
            start += line.len();
        }
        let (parent, separator) = child[..last_entry?].split_at_checked(last_entry?.checked_sub(1)?)?;
        (separator == b"\n" && !parent.is_empty()).then_some(parent)
    }

    /// The history of one of the timelines on this history: its own ancestors only.
    pub fn up_to(&self, timeline: TimelineId) -> Option<History> {
        if timeline == self.timeline {
            return Some(self.clone());
        }
        let at = self.ancestors.iter().position(|entry| entry.timeline == timeline)?;
        Some(History { timeline, ancestors: self.ancestors[..at].to_vec() })
    }

    pub fn ancestors(&self) -> &[HistoryEntry] {
        &self.ancestors
    }

    pub fn parent(&self) -> Option<HistoryEntry> {
        self.ancestors.last().copied()
    }

    /// Whether `timeline` is this one or one of its ancestors.
    pub fn contains(&self, timeline: TimelineId) -> bool {
        self.timeline == timeline || self.ancestors.iter().any(|entry| entry.timeline == timeline)
    }

    /// Where this history leaves `timeline`: `None` for the timeline itself and for strangers.
    pub fn end_of(&self, timeline: TimelineId) -> Option<Lsn> {
        self.ancestors.iter().find(|entry| entry.timeline == timeline).map(|entry| entry.end)
    }

    /// Where `timeline` begins on this history: the end of the one before it, `Lsn::ZERO` for the oldest.
    pub fn begin_of(&self, timeline: TimelineId) -> Option<Lsn> {
        let mut begin = Lsn::ZERO;
        for entry in &self.ancestors {
            if entry.timeline == timeline {
                return Some(begin);
            }
            begin = entry.end;
        }
        (self.timeline == timeline).then_some(begin)
    }

    /// Up to where both are one history: `Lsn::MAX` when they are the same.
    pub fn shared_until(&self, other: &History) -> Lsn {
        let mut begin = Lsn::ZERO;
        for (ours, theirs) in self.entries().zip(other.entries()) {
            if ours.timeline != theirs.timeline {
                return begin;
            }
            if ours.end != theirs.end {
                return ours.end.min(theirs.end);
            }
            begin = ours.end;
        }
        begin
    }

    /// The ancestors, and the timeline itself without an end.
    fn entries(&self) -> impl Iterator<Item = HistoryEntry> + '_ {
        let newest = HistoryEntry { timeline: self.timeline, end: Lsn::MAX };
        self.ancestors.iter().copied().chain([newest])
    }

    /// The timeline that follows `timeline` on this history.
    pub fn child_of(&self, timeline: TimelineId) -> Option<TimelineId> {
        let at = self.ancestors.iter().position(|entry| entry.timeline == timeline)?;
        Some(self.ancestors.get(at + 1).map_or(self.timeline, |entry| entry.timeline))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lsn(text: &str) -> Lsn {
        text.parse().unwrap()
    }

    #[test]
    fn a_live_history_file_is_read() {
        // What PostgreSQL wrote after two promotions; the blank lines are its own.
        let text = b"1\t0/DDB098\tno recovery target specified\n\n2\t0/2000000\tbefore 2026-11-22 11:00:00+00\n\n";
        let history = History::parse(TimelineId(3), text).unwrap();
        assert_eq!(history.end_of(TimelineId(1)), Some(lsn("0/DDB098")));
        assert_eq!(history.begin_of(TimelineId(2)), Some(lsn("0/DDB098")));
        assert_eq!(history.begin_of(TimelineId(3)), Some(lsn("0/2000000")));
        assert_eq!(history.child_of(TimelineId(1)), Some(TimelineId(2)));
        assert_eq!(history.child_of(TimelineId(2)), Some(TimelineId(3)));
        assert_eq!(history.child_of(TimelineId(3)), None);
        assert!(!history.contains(TimelineId(4)));
    }

    #[test]
    fn a_parents_file_is_the_beginning_of_its_childs() {
        // As PostgreSQL 15 wrote them in three promotions in a row.
        let second = b"1\t0/DDB098\tno recovery target specified\n";
        let third = b"1\t0/DDB098\tno recovery target specified\n\n2\t0/2000000\tbefore 2026-11-22 11:00:00+00\n";
        assert_eq!(History::parent_file(third), Some(&second[..]));
        assert_eq!(History::parent_file(second), None);
        assert_eq!(History::parent_file(b""), None);
        assert_eq!(History::parent_file(b"# only words\n"), None);
    }

    #[test]
    fn two_histories_are_one_up_to_the_first_fork_that_only_one_took() {
        let of = |timeline, text: &str| History::parse(TimelineId(timeline), text.as_bytes()).unwrap();
        let (first, second) = (of(1, ""), of(2, "1 0/100 x\n"));
        let third = of(3, "1 0/100 x\n2 0/200 x\n");
        for (one, other, expected) in [
            (&second, &second, Lsn::MAX),
            (&first, &second, Lsn(0x100)),
            (&second, &third, Lsn(0x200)),
            (&first, &third, Lsn(0x100)),
            (&second, &of(3, "1 0/80 x\n"), Lsn(0x80)),
            (&second, &of(3, "1 0/100 x\n"), Lsn(0x100)),
            (&second, &of(4, "3 0/50 x\n"), Lsn::ZERO),
        ] {
            assert_eq!((one.shared_until(other), other.shared_until(one)), (expected, expected), "{one:?} {other:?}");
        }
    }

    #[test]
    fn timeline_numbers_may_be_skipped() {
        let history = History::parse(TimelineId(9), b"1 0/3000000 x\n4 0/5000000 y\n").unwrap();
        assert_eq!(history.child_of(TimelineId(1)), Some(TimelineId(4)));
        assert_eq!(history.parent().unwrap().timeline, TimelineId(4));
    }

    #[test]
    fn forged_ancestries_are_refused() {
        let order = |text: &[u8]| matches!(History::parse(TimelineId(3), text), Err(HistoryError::Order { .. }));
        assert!(order(b"3 0/1 self\n"));
        assert!(order(b"4 0/1 above\n"));
        assert!(order(b"2 0/1 x\n1 0/2 falling\n"));
        assert!(order(b"1 0/1 x\n1 0/2 twice\n"));
        assert!(order(b"0 0/1 zero\n"));
        assert!(matches!(History::parse(TimelineId(3), b"one 0/1\n"), Err(HistoryError::Syntax { line: 1, .. })));
        assert!(matches!(History::parse(TimelineId(3), b"1\n"), Err(HistoryError::Syntax { .. })));
        let long = vec![b'#'; History::BYTES_MAX + 1];
        assert!(matches!(History::parse(TimelineId(3), &long), Err(HistoryError::TooLong { .. })));
    }
}

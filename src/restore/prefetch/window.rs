//! Owns: which segments are held ready ahead of replay: names along the path of history, how many, which are in the way.
//! Does not own: whether the archive has them, fetching them (`source.rs`).
//! Pure.

use crate::catalog::contents::segment_span;
use crate::wal::{History, Lsn, SegmentName, SegmentNumber, SegmentSize, TimelineId};

/// However small they are: the directory is read through for every segment that is handed over.
const SEGMENTS_MAX: u64 = 64;

/// The next segments that PostgreSQL will ask for.
#[derive(Clone, Debug)]
pub struct Window {
    size: SegmentSize,
    path: History,
    /// Names that start at or after it are never asked for with success.
    end: Option<Lsn>,
    /// How many segments are held ready at most.
    depth: u64,
    /// The first that is not handed over yet.
    next: SegmentNumber,
}

impl Window {
    /// Starts with the segment that holds `start`. At least one segment fits, whatever `limit_bytes` is.
    pub fn new(path: History, size: SegmentSize, start: Lsn, end: Option<Lsn>, limit_bytes: u64) -> Window {
        let depth = (limit_bytes / size.bytes()).clamp(1, SEGMENTS_MAX);
        Window { size, path, end, depth, next: size.segment_of(start) }
    }

    pub fn path(&self) -> &History {
        &self.path
    }

    /// Has the names follow another line from now on.
    pub fn follow(&mut self, path: History) {
        self.path = path;
    }

    /// PostgreSQL has got this segment. It may go back: at the end of WAL, and when recovery is started again.
    pub fn delivered(&mut self, name: SegmentName) {
        if let Some(number) = name.number(self.size) {
            self.next = number.next();
        }
    }

    /// PostgreSQL waits for this segment, or has been told that there is none.
    pub fn asked(&mut self, name: SegmentName) {
        if let Some(number) = name.number(self.size) {
            self.next = number;
        }
    }

    /// What is to be held ready, in the order in which it will be asked for.
    pub fn wanted(&self) -> impl Iterator<Item = SegmentName> {
        let beyond_the_last = self.size.segments_per_high_word() << 32;
        let numbers = self.next.0..beyond_the_last.min(self.next.0.saturating_add(self.depth));
        let names = numbers.map(|number| self.name(SegmentNumber(number)));
        let ends_before = |name: &SegmentName| match segment_span(*name, self.size) {
            Some(span) => self.end.is_some_and(|end| span.start >= end),
            None => true,
        };
        names.take_while(move |name| !ends_before(name)).filter(|name| self.holds_whole(*name))
    }

    /// Whether a file under this name is worth its place.
    pub fn wants(&self, name: SegmentName) -> bool {
        self.wanted().any(|wanted| wanted == name)
    }

    /// PostgreSQL tries the newest timeline of the path that has begun by the end of the segment first.
    fn name(&self, number: SegmentNumber) -> SegmentName {
        let begun = |timeline: &TimelineId| {
            self.path.begin_of(*timeline).is_some_and(|begin| self.size.segment_of(begin) <= number)
        };
        let oldest_first = self.path.ancestors().iter().map(|entry| entry.timeline).chain([self.path.timeline]);
        let timeline = oldest_first.rev().find(begun).unwrap_or(self.path.timeline);
        SegmentName::new(timeline, number, self.size)
    }

    /// A segment that the path leaves in its middle is cut there: that is not done ahead.
    fn holds_whole(&self, name: SegmentName) -> bool {
        let Some(span) = segment_span(name, self.size) else { return false };
        self.path.end_of(name.timeline).is_none_or(|fork| fork >= span.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn window(history: &str, timeline: u32, start: &str, end: Option<&str>, limit_mib: u64) -> Window {
        let size = SegmentSize::MIB_16;
        let path = match history {
            "" => History::root(TimelineId(timeline)),
            text => History::parse(TimelineId(timeline), text.as_bytes()).unwrap(),
        };
        let end = end.map(|end| end.parse().unwrap());
        Window::new(path, size, start.parse().unwrap(), end, limit_mib * MIB)
    }

    fn names(window: &Window) -> Vec<String> {
        window.wanted().map(|name| name.to_string()).collect()
    }

    #[test]
    fn it_begins_where_the_backup_does_and_ends_where_the_plan_does() {
        let window = window("", 1, "0/2000028", Some("0/4000001"), 256);
        let expected = ["000000010000000000000002", "000000010000000000000003", "000000010000000000000004"];
        assert_eq!(names(&window), expected);
    }

    #[test]
    fn it_is_bounded_in_bytes_and_in_number() {
        assert_eq!(names(&window("", 1, "0/2000028", None, 32)).len(), 2);
        assert_eq!(names(&window("", 1, "0/2000028", None, 0)).len(), 1);
        assert_eq!(names(&window("", 1, "0/2000028", None, 1 << 30)).len(), SEGMENTS_MAX as usize);
    }

    #[test]
    fn it_moves_with_replay_in_both_directions_and_over_the_high_word() {
        let mut window = window("", 1, "0/2000028", None, 32);
        window.delivered("0000000100000000000000FE".parse().unwrap());
        assert_eq!(names(&window), ["0000000100000000000000FF", "000000010000000100000000"]);
        window.asked("000000010000000000000004".parse().unwrap());
        assert_eq!(names(&window), ["000000010000000000000004", "000000010000000000000005"]);
        assert!(window.wants("000000010000000000000005".parse().unwrap()));
        for strange in ["000000010000000000000006", "000000020000000000000005", "000000010000000000000105"] {
            assert!(!window.wants(strange.parse().unwrap()), "{strange}");
        }
        window.delivered("000000010000000000000105".parse().unwrap()); // no number with this size
        assert_eq!(names(&window)[0], "000000010000000000000004");
        window.delivered(SegmentName { timeline: TimelineId(1), high: u32::MAX, low: 0xFF });
        assert_eq!(names(&window), Vec::<String>::new());
    }

    #[test]
    fn a_segment_with_a_fork_is_asked_for_by_the_childs_name() {
        // Timeline 1 is left inside segment 3, timeline 2 at the very start of segment 5.
        let window = window("1\t0/3000100\tx\n2\t0/5000000\ty\n", 4, "0/2000028", None, 64);
        let expected = [
            "000000010000000000000002",
            "000000020000000000000003",
            "000000020000000000000004",
            "000000040000000000000005",
        ];
        assert_eq!(names(&window), expected);
    }

    #[test]
    fn two_forks_in_one_segment_leave_only_the_last_name() {
        let window = window("1\t0/3000100\tx\n2\t0/3000200\ty\n", 3, "0/3000028", None, 32);
        assert_eq!(names(&window), ["000000030000000000000003", "000000030000000000000004"]);
    }
}

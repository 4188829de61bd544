//! What is known of each repository from one stream to the next.
//!
//! Owns: that it counts only as far as the history it was found on is the server's still, and only among those it was
//! found out with.
//! Does not own: finding it out (`archiver/repair.rs`), what a stream makes of it (`archiver/reach.rs`). Pure.

use std::collections::{BTreeMap, BTreeSet};

use crate::receiver::Stored;
use crate::wal::{History, Lsn, TimelineId};

/// By place in the configuration. What is not known is looked for.
#[derive(Debug, Default)]
pub struct Known {
    /// What a repository was found to hold without a hole, and on which path.
    contiguous: BTreeMap<usize, (Stored, History)>,
    compared: BTreeMap<usize, Comparison>,
}

/// A repository was found to miss nothing, or got it.
#[derive(Debug)]
struct Comparison {
    /// The one that was streamed: when it ends, some may hold more of it than others.
    timeline: TimelineId,
    /// With whom: one that was out may hold what nobody else does.
    others: BTreeSet<usize>,
}

/// A stream that begins.
#[derive(Clone, Copy, Debug)]
pub struct Beginning<'a> {
    /// The server's.
    pub path: &'a History,
    pub timeline: TimelineId,
    pub segment_start: Lsn,
    /// Who takes part.
    pub present: &'a [usize],
}

impl Known {
    /// Another archive.
    pub fn forget_all(&mut self) {
        *self = Known::default();
    }

    /// These have lost our epoch, or never had it: they may have lost anything, and the others be the last to hold
    /// what they got from them.
    pub fn forget(&mut self, newcomers: &[usize]) {
        self.contiguous.retain(|index, _| !newcomers.contains(index));
        if !newcomers.is_empty() {
            self.compared.clear();
        }
    }

    pub fn handle_contiguous(&mut self, index: usize, stored: Stored, path: &History) {
        if stored != Stored::default() {
            self.contiguous.insert(index, (stored, path.clone()));
        }
    }

    pub fn handle_compared(&mut self, index: usize, timeline: TimelineId, others: &[usize]) {
        self.compared.insert(index, Comparison { timeline, others: others.iter().copied().collect() });
    }

    /// What it holds without a hole as far as is known, never beyond `run`: its own part of what the stream begins
    /// with, up to which it holds everything from `contiguous_from` on. Zero when that has to be found out.
    pub fn contiguous(
        &self,
        index: usize,
        run: Stored,
        contiguous_from: Option<Lsn>,
        beginning: Beginning<'_>,
    ) -> Stored {
        let known = self.on_path(index, beginning.path);
        match () {
            () if reaches(known, contiguous_from) => run,
            () if known.bytes_end <= beginning.segment_start => known,
            // It holds more than the others do together, so they have lost something: it is looked for anew.
            () => Stored::default(),
        }
    }

    /// Whether it has to be compared with the others.
    pub fn is_to_compare(&self, index: usize, contiguous_from: Option<Lsn>, beginning: Beginning<'_>) -> bool {
        let is_compared = self.compared.get(&index).is_some_and(|comparison| {
            let mut others = beginning.present.iter().filter(|other| **other != index);
            comparison.timeline == beginning.timeline && others.all(|other| comparison.others.contains(other))
        });
        !is_compared || !reaches(self.on_path(index, beginning.path), contiguous_from)
    }

    /// Beyond the place where the server's path leaves the one it was found on, it is another history's.
    fn on_path(&self, index: usize, path: &History) -> Stored {
        let Some((stored, found_on)) = self.contiguous.get(&index) else { return Stored::default() };
        let bytes_end = stored.bytes_end.min(found_on.shared_until(path));
        let record_end = if stored.record_end <= bytes_end { stored.record_end } else { Lsn::ZERO };
        Stored { record_end, bytes_end }
    }
}

/// Whole up to there before, and from before there up to here now.
fn reaches(known: Stored, contiguous_from: Option<Lsn>) -> bool {
    known != Stored::default() && contiguous_from.is_some_and(|from| from <= known.bytes_end)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored(record_end: u64, bytes_end: u64) -> Stored {
        Stored { record_end: Lsn(record_end), bytes_end: Lsn(bytes_end) }
    }

    fn path(timeline: u32, text: &str) -> History {
        History::parse(TimelineId(timeline), text.as_bytes()).expect("a history")
    }

    fn at<'a>(path: &'a History, segment_start: u64, present: &'a [usize]) -> Beginning<'a> {
        Beginning { path, timeline: path.timeline, segment_start: Lsn(segment_start), present }
    }

    #[test]
    fn one_that_was_whole_and_holds_all_that_followed_is_whole() {
        let first = path(1, "");
        let mut known = Known::default();
        known.handle_contiguous(0, stored(0x190, 0x190), &first);
        let beginning = at(&first, 0x400, &[0, 1]);
        let run = stored(0x410, 0x410);
        assert_eq!(known.contiguous(0, run, Some(Lsn(0x100)), beginning), run);
        assert_eq!(known.contiguous(0, run, Some(Lsn(0x200)), beginning), stored(0x190, 0x190), "a hole behind it");
        assert_eq!(known.contiguous(0, run, None, beginning), stored(0x190, 0x190));
        assert_eq!(known.contiguous(1, run, Some(Lsn(0x100)), beginning), Stored::default(), "nothing is known of it");
    }

    #[test]
    fn what_was_found_on_another_path_counts_up_to_where_the_paths_part() {
        let mut known = Known::default();
        known.handle_contiguous(0, stored(0x500, 0x500), &path(2, "1 0/100 x\n"));
        // Timeline 3 left timeline 1 where 2 did not; the repository was out, and holds it from 0x400 on.
        let other = path(3, "1 0/80 x\n");
        let beginning = at(&other, 0x700, &[0, 1]);
        let run = stored(0x710, 0x710);
        assert_eq!(known.contiguous(0, run, Some(Lsn(0x400)), beginning), stored(0, 0x80));
        assert_eq!(known.contiguous(0, run, Some(Lsn(0x80)), beginning), run);
        let child = path(3, "1 0/100 x\n2 0/480 x\n");
        assert_eq!(known.contiguous(0, run, Some(Lsn(0x400)), at(&child, 0x700, &[0, 1])), run);
    }

    #[test]
    fn nobody_is_believed_to_hold_what_the_stream_begins_before() {
        let first = path(1, "");
        let mut known = Known::default();
        known.handle_contiguous(0, stored(0x500, 0x500), &first);
        assert_eq!(known.contiguous(0, stored(0x400, 0x400), None, at(&first, 0x400, &[0, 1])), Stored::default());
    }

    #[test]
    fn a_comparison_counts_for_its_timeline_and_for_those_who_took_part() {
        let first = path(1, "");
        let mut known = Known::default();
        known.handle_contiguous(0, stored(0x190, 0x190), &first);
        known.handle_compared(0, TimelineId(1), &[1]);
        let is_due = |known: &Known, path: &History, present: &[usize]| {
            known.is_to_compare(0, Some(Lsn::ZERO), at(path, 0x200, present))
        };
        assert!(!is_due(&known, &first, &[0, 1]) && !is_due(&known, &first, &[0]));
        assert!(is_due(&known, &first, &[0, 1, 2]), "2 was out, and may hold what no one else does");
        assert!(is_due(&known, &path(2, "1 0/200 x\n"), &[0, 1]), "of a timeline that ended some may hold more");
        assert!(known.is_to_compare(0, None, at(&first, 0x200, &[0, 1])), "behind a hole");
        known.forget(&[1]);
        assert!(is_due(&known, &first, &[0, 1]), "1 has lost what it had");
    }
}

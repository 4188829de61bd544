//! Owns: which bytes are durable in one repository, and how far that reaches without a hole.
//! Does not own: making them durable. Pure.

use std::collections::BTreeMap;

use crate::receiver::Stored;
use crate::wal::Lsn;

/// Work is done in parallel and finishes in any order; the frontier advances only over a gap-free prefix.
#[derive(Debug)]
pub struct Queue {
    frontier: Stored,
    /// Durable ranges that begin at or above the frontier: start → (end, last record end at or before the end).
    beyond: BTreeMap<Lsn, (Lsn, Lsn)>,
}

impl Queue {
    pub fn new(frontier: Stored) -> Queue {
        Queue { frontier, beyond: BTreeMap::new() }
    }

    pub fn frontier(&self) -> Stored {
        self.frontier
    }

    /// `[from, to)` is durable, and `record_end` is the last record end at or before `to`. Ranges may overlap.
    pub fn handle_durable(&mut self, from: Lsn, to: Lsn, record_end: Lsn) {
        assert!(from < to && record_end <= to, "not a durable range: [{from}, {to}) with a record end at {record_end}");
        let longest = self.beyond.entry(from).or_insert((to, record_end));
        *longest = (*longest).max((to, record_end));
        while let Some((&from, &(to, record_end))) = self.beyond.first_key_value() {
            if from > self.frontier.bytes_end {
                break;
            }
            self.beyond.pop_first();
            if to > self.frontier.bytes_end {
                let record_end = record_end.max(self.frontier.record_end);
                self.frontier = Stored { bytes_end: to, record_end };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn queue() -> Queue {
        Queue::new(Stored { record_end: Lsn(0), bytes_end: Lsn(0) })
    }

    #[test]
    fn a_hole_stops_the_frontier_until_it_is_filled() {
        let mut queue = queue();
        queue.handle_durable(Lsn(100), Lsn(200), Lsn(190));
        queue.handle_durable(Lsn(200), Lsn(240), Lsn(240));
        assert_eq!(queue.frontier().bytes_end, Lsn(0));
        queue.handle_durable(Lsn(0), Lsn(100), Lsn(80));
        assert_eq!(queue.frontier(), Stored { record_end: Lsn(240), bytes_end: Lsn(240) });
    }

    #[test]
    fn a_segment_that_covers_its_tails_does_not_take_the_record_end_back() {
        let mut queue = queue();
        queue.handle_durable(Lsn(0), Lsn(60), Lsn(60));
        queue.handle_durable(Lsn(0), Lsn(100), Lsn(50));
        assert_eq!(queue.frontier(), Stored { record_end: Lsn(60), bytes_end: Lsn(100) });
    }

    proptest! {
        #[test]
        fn the_frontier_is_the_end_of_the_gap_free_prefix(ranges in prop::collection::vec((0u64..64, 1u64..16), 0..40)) {
            let mut queue = queue();
            let mut durable = [false; 96];
            for (from, length) in ranges {
                queue.handle_durable(Lsn(from), Lsn(from + length), Lsn(from + length));
                durable[from as usize..(from + length) as usize].fill(true);
                let expected = durable.iter().position(|&held| !held).unwrap();
                prop_assert_eq!(queue.frontier().bytes_end, Lsn(expected as u64));
            }
        }
    }
}

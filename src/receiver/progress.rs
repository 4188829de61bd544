//! Owns: the positions of one cluster's stream, their order, and what may be acknowledged.
//! Does not own: how anything becomes durable. Pure.
//!
//! Order, always: `received ≥ proven ≥ acknowledged`, and every repository's stored record end is one that was
//! proven. Nothing else in the program decides what the server is told.

use crate::wal::Lsn;

/// What "flushed" means to the server (`acknowledge`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Acknowledge {
    /// Stored in the required repositories.
    #[default]
    Repository,
    /// Synced to the local spool.
    Spool,
}

/// What one repository holds, contiguously from the start of the archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Stored {
    /// The last record end at or before `bytes_end`: what may be acknowledged. Zero when there is none yet.
    pub record_end: Lsn,
    /// End of the durable bytes: a record can be cut here by a segment's end.
    pub bytes_end: Lsn,
}

/// The positions of one stream on one timeline, from START_REPLICATION to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    /// The server's own end of WAL, as its last message said.
    server_end: Lsn,
    received: Lsn,
    proven: Lsn,
    /// Whether the prefix the server repeats equals what is stored: until then flush is "not reporting".
    prefix_matched: bool,
    /// By repository, in the order of the configuration.
    stored: Vec<Stored>,
    /// How many repositories must hold a byte before it is acknowledged.
    required: usize,
    /// Where the slot already is: less is never reported, it would move the slot back.
    slot_restart: Lsn,
    durable: Lsn,
}

impl Progress {
    /// `start` is where the stream begins, `stored` what each repository held when it was last looked at.
    pub fn new(start: Lsn, stored: Vec<Stored>, required: usize, slot_restart: Lsn) -> Progress {
        assert!(
            (1..=stored.len()).contains(&required),
            "{required} of {} repositories cannot be required",
            stored.len()
        );
        Progress {
            server_end: start,
            received: start,
            proven: start,
            prefix_matched: false,
            stored,
            required,
            slot_restart,
            durable: Lsn::ZERO,
        }
    }

    pub fn server_end(&self) -> Lsn {
        self.server_end
    }

    pub fn received(&self) -> Lsn {
        self.received
    }

    pub fn proven(&self) -> Lsn {
        self.proven
    }

    pub fn stored(&self) -> &[Stored] {
        &self.stored
    }

    pub fn prefix_matched(&self) -> bool {
        self.prefix_matched
    }

    /// A server's end may go back: a standby's does when it restarts.
    pub fn handle_server_end(&mut self, lsn: Lsn) {
        self.server_end = lsn;
    }

    pub fn handle_received(&mut self, received: Lsn, proven: Lsn) {
        assert!(received >= self.received, "received went back from {} to {received}", self.received);
        assert!(proven >= self.proven, "proven went back from {} to {proven}", self.proven);
        assert!(proven <= received, "{proven} is proven, but only {received} was received");
        self.received = received;
        self.proven = proven;
        self.server_end = self.server_end.max(received);
    }

    /// The server's bytes equal everything stored of the segment the stream started in.
    pub fn handle_prefix_matched(&mut self) {
        self.prefix_matched = true;
        self.advance();
    }

    /// A repository's contiguous frontier moved.
    pub fn handle_stored(&mut self, repository: usize, stored: Stored) {
        let before = &mut self.stored[repository];
        assert!(
            stored.bytes_end >= before.bytes_end,
            "repository {repository} went back from {before:?} to {stored:?}"
        );
        assert!(
            stored.record_end >= before.record_end,
            "repository {repository} went back from {before:?} to {stored:?}"
        );
        assert!(stored.record_end <= stored.bytes_end, "a record end beyond the stored bytes: {stored:?}");
        *before = stored;
        self.advance();
    }

    fn advance(&mut self) {
        if !self.prefix_matched {
            return;
        }
        let mut record_ends: Vec<Lsn> = self.stored.iter().map(|stored| stored.record_end).collect();
        record_ends.sort_unstable_by(|a, b| b.cmp(a));
        let durable = record_ends[self.required - 1];
        assert!(durable <= self.proven, "{durable} is called durable, but only {} is proven", self.proven);
        assert!(durable >= self.durable, "durable went back from {} to {durable}", self.durable);
        self.durable = durable;
    }

    /// What the server is told is flushed: durable in the required repositories, contiguous, proven, a record
    /// end. `Lsn::ZERO` means "not reporting".
    pub fn acknowledged(&self) -> Lsn {
        if self.durable >= self.slot_restart { self.durable } else { Lsn::ZERO }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored(record_end: u64, bytes_end: u64) -> Stored {
        Stored { record_end: Lsn(record_end), bytes_end: Lsn(bytes_end) }
    }

    #[test]
    fn nothing_is_reported_before_the_prefix_matched() {
        let mut progress = Progress::new(Lsn(100), vec![stored(140, 140)], 1, Lsn::ZERO);
        progress.handle_received(Lsn(150), Lsn(144));
        assert_eq!(progress.acknowledged(), Lsn::ZERO);
        progress.handle_prefix_matched();
        assert_eq!(progress.acknowledged(), Lsn(140));
    }

    #[test]
    fn a_cut_record_is_not_acknowledged_although_its_bytes_are_stored() {
        let mut progress = Progress::new(Lsn(100), vec![stored(100, 100)], 1, Lsn::ZERO);
        progress.handle_prefix_matched();
        progress.handle_received(Lsn(230), Lsn(220));
        progress.handle_stored(0, stored(190, 200));
        assert_eq!(progress.acknowledged(), Lsn(190));
    }

    #[test]
    fn the_slot_is_never_moved_back() {
        let mut progress = Progress::new(Lsn(100), vec![stored(100, 100)], 1, Lsn(150));
        progress.handle_prefix_matched();
        progress.handle_received(Lsn(200), Lsn(200));
        progress.handle_stored(0, stored(140, 140));
        assert_eq!(progress.acknowledged(), Lsn::ZERO);
        progress.handle_stored(0, stored(160, 160));
        assert_eq!(progress.acknowledged(), Lsn(160));
    }

    #[test]
    fn the_required_number_of_repositories_decides() {
        let mut progress = Progress::new(Lsn(0), vec![stored(0, 0); 3], 2, Lsn::ZERO);
        progress.handle_prefix_matched();
        progress.handle_received(Lsn(90), Lsn(90));
        progress.handle_stored(0, stored(80, 80));
        assert_eq!(progress.acknowledged(), Lsn(0));
        progress.handle_stored(2, stored(60, 60));
        assert_eq!(progress.acknowledged(), Lsn(60));
        progress.handle_stored(1, stored(90, 90));
        assert_eq!(progress.acknowledged(), Lsn(80));
    }

    #[test]
    #[should_panic(expected = "only 0/00000028 is proven")]
    fn acknowledging_what_is_not_proven_is_a_bug() {
        let mut progress = Progress::new(Lsn(0), vec![stored(0, 0)], 1, Lsn::ZERO);
        progress.handle_prefix_matched();
        progress.handle_received(Lsn(90), Lsn(40));
        progress.handle_stored(0, stored(80, 80));
    }

    #[test]
    #[should_panic(expected = "went back")]
    fn a_frontier_never_goes_back() {
        let mut progress = Progress::new(Lsn(0), vec![stored(50, 50)], 1, Lsn::ZERO);
        progress.handle_stored(0, stored(40, 40));
    }
}

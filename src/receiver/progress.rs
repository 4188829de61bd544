//! Owns: the positions of one cluster's stream, their order, and what may be acknowledged.
//! Does not own: how anything becomes durable. Pure.
//!
//! Order, always: `received ≥ proven ≥ acknowledged`, and every repository's stored record end is one that was
//! proven. Nothing else in the program decides what the server is told.
//!
//! A repository counts with what it holds *contiguously*: a run behind a hole is not its frontier until the hole is
//! repaired (`archiver/reach.rs`).

use crate::wal::{Commit, Lsn};

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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Stored {
    /// The last record end at or before `bytes_end`: what may be acknowledged. Zero when there is none yet.
    pub record_end: Lsn,
    /// End of the durable bytes: a record can be cut here by a segment's end.
    pub bytes_end: Lsn,
}

/// One repository's part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Held {
    stored: Stored,
    /// It takes the stream: a stop waits for it. One that is absent, or repairs a hole, is not waited for.
    is_awaited: bool,
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
    held: Vec<Held>,
    /// How many repositories must hold a byte before it is durable.
    required: usize,
    acknowledge: Acknowledge,
    /// What the local spool holds, contiguously from what was durable when the stream began.
    spooled: Stored,
    /// Where the slot already is: less is never reported, it would move the slot back.
    slot_restart: Lsn,
    /// A record end that as many repositories as required hold.
    durable: Lsn,
    /// A record end that is durable, or spooled where that is the contract.
    acknowledged: Lsn,
    /// The newest that was proven, for whoever watches: nothing is decided by it.
    last_commit: Option<Commit>,
}

impl Progress {
    /// `start` is where the stream begins, `stored` what each repository held when it was last looked at: zero for
    /// one that is not there.
    pub fn new(
        start: Lsn,
        stored: Vec<Stored>,
        required: usize,
        acknowledge: Acknowledge,
        slot_restart: Lsn,
    ) -> Progress {
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
            held: stored.into_iter().map(|stored| Held { stored, is_awaited: true }).collect(),
            required,
            acknowledge,
            spooled: Stored::default(),
            slot_restart,
            durable: Lsn::ZERO,
            acknowledged: Lsn::ZERO,
            last_commit: None,
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

    /// What each repository holds, in the order of the configuration.
    pub fn stored(&self) -> Vec<Stored> {
        self.held.iter().map(|held| held.stored).collect()
    }

    pub fn spooled(&self) -> Stored {
        self.spooled
    }

    /// How many repositories must hold a byte.
    pub fn required(&self) -> usize {
        self.required
    }

    pub fn acknowledge(&self) -> Acknowledge {
        self.acknowledge
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

    /// The newest commit that was proven.
    pub fn handle_commit(&mut self, commit: Option<Commit>) {
        self.last_commit = commit.or(self.last_commit);
    }

    pub fn last_commit(&self) -> Option<Commit> {
        self.last_commit
    }

    /// The server's bytes equal everything stored, and spooled, of the segment the stream started in.
    pub fn handle_prefix_matched(&mut self) {
        self.prefix_matched = true;
        self.advance();
    }

    /// A repository's contiguous frontier moved.
    pub fn handle_stored(&mut self, repository: usize, stored: Stored) {
        let before = &mut self.held[repository].stored;
        assert_moves_on(*before, stored, &format_args!("repository {repository}"));
        *before = stored;
        self.advance();
    }

    /// The spool's contiguous frontier moved. Whether that is acknowledged is the contract's to say.
    pub fn handle_spooled(&mut self, spooled: Stored) {
        assert_moves_on(self.spooled, spooled, &"the spool");
        self.spooled = spooled;
        self.advance();
    }

    /// Whether a stop waits for this repository.
    pub fn handle_awaited(&mut self, repository: usize, is_awaited: bool) {
        self.held[repository].is_awaited = is_awaited;
    }

    /// Whether everything up to `target` is where it belongs: acknowledged, and stored in every repository that takes
    /// the stream.
    pub fn is_settled(&self, target: Lsn) -> bool {
        let mut awaited = self.held.iter().filter(|held| held.is_awaited);
        self.acknowledged >= target && awaited.all(|held| held.stored.record_end >= target)
    }

    /// Whether `target` is as durable as the contract asks, whether or not the slot can be told yet.
    pub fn is_durable(&self, target: Lsn) -> bool {
        self.acknowledged >= target
    }

    fn advance(&mut self) {
        if !self.prefix_matched {
            return;
        }
        let mut record_ends: Vec<Lsn> = self.held.iter().map(|held| held.stored.record_end).collect();
        record_ends.sort_unstable_by(|a, b| b.cmp(a));
        let durable = record_ends[self.required - 1];
        assert!(durable <= self.proven, "{durable} is called durable, but only {} is proven", self.proven);
        assert!(durable >= self.durable, "durable went back from {} to {durable}", self.durable);
        self.durable = durable;
        let acknowledged = match self.acknowledge {
            Acknowledge::Repository => durable,
            Acknowledge::Spool => {
                let spooled = self.spooled.record_end;
                assert!(spooled <= self.proven, "{spooled} is spooled, but only {} is proven", self.proven);
                durable.max(spooled)
            }
        };
        self.acknowledged = self.acknowledged.max(acknowledged);
    }

    /// The record end that as many repositories as required hold, contiguously. `Lsn::ZERO` until the server's bytes
    /// have matched what is stored.
    pub fn durable(&self) -> Lsn {
        self.durable
    }

    /// What the server is told is flushed: durable in the required repositories (or spooled, where that is the
    /// contract), contiguous, proven, a record end. `Lsn::ZERO` means "not reporting".
    pub fn acknowledged(&self) -> Lsn {
        if self.acknowledged >= self.slot_restart { self.acknowledged } else { Lsn::ZERO }
    }
}

fn assert_moves_on(before: Stored, after: Stored, whose: &dyn std::fmt::Display) {
    assert!(after.bytes_end >= before.bytes_end, "{whose} went back from {before:?} to {after:?}");
    assert!(after.record_end >= before.record_end, "{whose} went back from {before:?} to {after:?}");
    assert!(after.record_end <= after.bytes_end, "a record end beyond the stored bytes: {after:?}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn stored(record_end: u64, bytes_end: u64) -> Stored {
        Stored { record_end: Lsn(record_end), bytes_end: Lsn(bytes_end) }
    }

    fn progress(start: Lsn, stored: Vec<Stored>, required: usize, slot_restart: Lsn) -> Progress {
        Progress::new(start, stored, required, Acknowledge::Repository, slot_restart)
    }

    #[test]
    fn nothing_is_reported_before_the_prefix_matched() {
        let mut progress = progress(Lsn(100), vec![stored(140, 140)], 1, Lsn::ZERO);
        progress.handle_received(Lsn(150), Lsn(144));
        assert_eq!(progress.acknowledged(), Lsn::ZERO);
        progress.handle_prefix_matched();
        assert_eq!(progress.acknowledged(), Lsn(140));
    }

    #[test]
    fn a_cut_record_is_not_acknowledged_although_its_bytes_are_stored() {
        let mut progress = progress(Lsn(100), vec![stored(100, 100)], 1, Lsn::ZERO);
        progress.handle_prefix_matched();
        progress.handle_received(Lsn(230), Lsn(220));
        progress.handle_stored(0, stored(190, 200));
        assert_eq!(progress.acknowledged(), Lsn(190));
    }

    #[test]
    fn the_slot_is_never_moved_back() {
        let mut progress = progress(Lsn(100), vec![stored(100, 100)], 1, Lsn(150));
        progress.handle_prefix_matched();
        progress.handle_received(Lsn(200), Lsn(200));
        progress.handle_stored(0, stored(140, 140));
        assert_eq!(progress.acknowledged(), Lsn::ZERO);
        progress.handle_stored(0, stored(160, 160));
        assert_eq!(progress.acknowledged(), Lsn(160));
    }

    #[test]
    fn the_required_number_of_repositories_decides() {
        let mut progress = progress(Lsn(0), vec![stored(0, 0); 3], 2, Lsn::ZERO);
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
        let mut progress = progress(Lsn(0), vec![stored(0, 0)], 1, Lsn::ZERO);
        progress.handle_prefix_matched();
        progress.handle_received(Lsn(90), Lsn(40));
        progress.handle_stored(0, stored(80, 80));
    }

    #[test]
    #[should_panic(expected = "went back")]
    fn a_frontier_never_goes_back() {
        let mut progress = progress(Lsn(0), vec![stored(50, 50)], 1, Lsn::ZERO);
        progress.handle_stored(0, stored(40, 40));
    }

    #[test]
    fn what_is_spooled_is_acknowledged_only_where_that_is_the_contract() {
        for (acknowledge, expected) in [(Acknowledge::Repository, 40), (Acknowledge::Spool, 70)] {
            let mut progress = Progress::new(Lsn(0), vec![stored(40, 40)], 1, acknowledge, Lsn::ZERO);
            progress.handle_spooled(stored(30, 30));
            progress.handle_received(Lsn(90), Lsn(80));
            assert_eq!(progress.acknowledged(), Lsn::ZERO, "not before the prefix has matched");
            progress.handle_prefix_matched();
            progress.handle_spooled(stored(70, 75));
            assert_eq!((progress.acknowledged(), progress.durable()), (Lsn(expected), Lsn(40)));
            progress.handle_stored(0, stored(80, 80));
            assert_eq!(progress.acknowledged(), Lsn(80), "a repository that overtakes the spool counts");
        }
    }

    #[test]
    #[should_panic(expected = "only 0/00000028 is proven")]
    fn acknowledging_from_the_spool_what_is_not_proven_is_a_bug() {
        let mut progress = Progress::new(Lsn(0), vec![stored(0, 0)], 1, Acknowledge::Spool, Lsn::ZERO);
        progress.handle_prefix_matched();
        progress.handle_received(Lsn(90), Lsn(40));
        progress.handle_spooled(stored(80, 80));
    }

    #[test]
    fn a_stop_waits_for_what_is_required_and_for_every_repository_that_takes_the_stream() {
        let mut progress = progress(Lsn(0), vec![stored(0, 0); 3], 1, Lsn::ZERO);
        progress.handle_prefix_matched();
        progress.handle_received(Lsn(90), Lsn(90));
        progress.handle_awaited(2, false);
        progress.handle_stored(0, stored(80, 80));
        assert!(!progress.is_settled(Lsn(80)), "repository 1 is still storing");
        progress.handle_stored(1, stored(80, 80));
        assert!(progress.is_settled(Lsn(80)) && !progress.is_settled(Lsn(81)));
        progress.handle_awaited(0, false);
        progress.handle_awaited(1, false);
        assert!(!progress.is_settled(Lsn(90)), "nobody is waited for, but nobody has it either");
    }

    /// What can happen to a stream, in any order.
    #[derive(Clone, Debug)]
    enum Step {
        Received { bytes: u64, unproven: u64 },
        Matched,
        Stored { repository: usize, record: u64, bytes: u64 },
        Spooled { record: u64, bytes: u64 },
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0u64..50, 0u64..10).prop_map(|(bytes, unproven)| Step::Received { bytes, unproven }),
            Just(Step::Matched),
            (0usize..3, 0u64..60, 0u64..5).prop_map(|(repository, record, bytes)| Step::Stored {
                repository,
                record,
                bytes
            }),
            (0u64..60, 0u64..5).prop_map(|(record, bytes)| Step::Spooled { record, bytes }),
        ]
    }

    /// `before` moved on by as much as is proven.
    fn moved(before: Stored, record: u64, bytes: u64, proven: Lsn) -> Stored {
        let record_end = (before.record_end + record).min(proven).max(before.record_end);
        Stored { record_end, bytes_end: (record_end + bytes).max(before.bytes_end) }
    }

    proptest! {
        #[test]
        fn no_more_is_acknowledged_than_enough_repositories_hold(
            steps in prop::collection::vec(step(), 0..80),
            repositories in 1usize..4,
            required in 1usize..4,
            slot_restart in 0u64..120,
            spool in any::<bool>(),
        ) {
            let required = required.min(repositories);
            let acknowledge = if spool { Acknowledge::Spool } else { Acknowledge::Repository };
            let held = vec![Stored::default(); repositories];
            let mut progress = Progress::new(Lsn(0), held, required, acknowledge, Lsn(slot_restart));
            let mut reported = Lsn::ZERO;
            for step in steps {
                match step {
                    Step::Received { bytes, unproven } => {
                        let received = progress.received() + bytes;
                        let proven = Lsn(received.0.saturating_sub(unproven)).max(progress.proven());
                        progress.handle_received(received, proven);
                    }
                    Step::Matched => progress.handle_prefix_matched(),
                    Step::Stored { repository, record, bytes } => {
                        let repository = repository % repositories;
                        let stored = moved(progress.stored()[repository], record, bytes, progress.proven());
                        progress.handle_stored(repository, stored);
                    }
                    Step::Spooled { record, bytes } => {
                        progress.handle_spooled(moved(progress.spooled(), record, bytes, progress.proven()));
                    }
                }
                let acknowledged = progress.acknowledged();
                let enough = |lsn: Lsn| {
                    progress.stored().iter().filter(|stored| stored.record_end >= lsn).count() >= required
                };
                let spooled = spool && acknowledged <= progress.spooled().record_end;
                prop_assert!(acknowledged == Lsn::ZERO || progress.prefix_matched());
                prop_assert!(enough(acknowledged) || spooled, "{progress:?}");
                prop_assert!(acknowledged <= progress.proven() && acknowledged >= reported);
                prop_assert!(acknowledged == Lsn::ZERO || acknowledged >= Lsn(slot_restart));
                reported = acknowledged;
                // No less either: whatever enough of them hold is.
                if progress.prefix_matched() && progress.durable() >= Lsn(slot_restart) {
                    prop_assert!(acknowledged >= progress.durable() && !enough(progress.durable() + 1));
                }
            }
        }
    }
}

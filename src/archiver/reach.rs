//! Owns: what one repository holds without a hole, when its newest run may begin behind one: the archiver moves the
//! run's end, the repair what lies below it, and only what both make contiguous reaches `Progress`.
//! Does not own: what is acknowledged (`receiver/progress.rs`), filling the hole (`repair.rs`).

use std::sync::{Arc, Mutex};

use tokio::sync::watch;

use crate::receiver::{Progress, Stored};
use crate::wal::Lsn;

/// One repository's reach in one stream. Clones share it.
#[derive(Clone, Debug)]
pub struct Reach {
    /// Its place in the configuration, and in [`Progress`].
    pub repository: usize,
    progress: Arc<watch::Sender<Progress>>,
    state: Arc<Mutex<State>>,
}

impl Reach {
    /// The run of this stream begins at `run_from` and holds `run`; `contiguous` is what the repository is known to
    /// hold from the archive's start on.
    pub fn new(
        repository: usize,
        progress: Arc<watch::Sender<Progress>>,
        run_from: Lsn,
        run: Stored,
        contiguous: Stored,
    ) -> Reach {
        let state = Arc::new(Mutex::new(State::new(run_from, run, contiguous)));
        Reach { repository, progress, state }
    }

    /// What counts of a repository when a stream begins.
    pub fn initial(run_from: Lsn, run: Stored, contiguous: Stored) -> Stored {
        State::new(run_from, run, contiguous).contiguous
    }

    /// How far the stream is proven.
    pub fn proven(&self) -> Lsn {
        self.progress.borrow().proven()
    }

    /// The end of what this stream has stored, behind a hole or not.
    pub fn run(&self) -> Stored {
        self.state.lock().expect("no holder panics").run
    }

    pub fn contiguous(&self) -> Stored {
        self.state.lock().expect("no holder panics").contiguous
    }

    /// Whether there is no hole below the run.
    pub fn is_whole(&self) -> bool {
        self.state.lock().expect("no holder panics").is_whole()
    }

    /// The run holds more.
    pub fn handle_run(&self, run: Stored) {
        self.change(|state| state.handle_run(run));
    }

    /// Everything below `repaired.bytes_end` is there, or is a recorded gap nobody can fill.
    pub fn handle_repaired(&self, repaired: Stored) {
        self.change(|state| state.handle_repaired(repaired));
    }

    /// Everything below the run is there, or is a recorded gap nobody can fill.
    pub fn handle_whole(&self) {
        self.change(State::handle_whole);
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        // Held until `Progress` knows: two changes must not overtake each other.
        let mut state = self.state.lock().expect("no holder panics");
        let (before, was_whole) = (state.contiguous, state.is_whole());
        change(&mut state);
        let (after, is_whole) = (state.contiguous, state.is_whole());
        if after == before {
            return;
        }
        self.progress.send_modify(|progress| {
            progress.handle_stored(self.repository, after);
            if is_whole && !was_whole {
                progress.handle_awaited(self.repository, true);
            }
        });
    }
}

#[derive(Clone, Copy, Debug)]
struct State {
    contiguous: Stored,
    run_from: Lsn,
    run: Stored,
}

impl State {
    fn new(run_from: Lsn, run: Stored, contiguous: Stored) -> State {
        let mut state = State { contiguous: Stored::default(), run_from, run };
        state.handle_repaired(contiguous);
        state
    }

    fn is_whole(&self) -> bool {
        self.contiguous.bytes_end >= self.run_from
    }

    fn handle_run(&mut self, run: Stored) {
        self.run = run;
        self.join();
    }

    /// What the run repeats is the run's to tell: it may lie on another timeline, and not be proven there yet.
    fn handle_repaired(&mut self, repaired: Stored) {
        let below = |lsn: Lsn| lsn <= self.run_from;
        if below(repaired.record_end) {
            self.contiguous.record_end = self.contiguous.record_end.max(repaired.record_end);
        }
        self.contiguous.bytes_end = self.contiguous.bytes_end.max(repaired.bytes_end.min(self.run_from));
        self.join();
    }

    fn handle_whole(&mut self) {
        self.contiguous.bytes_end = self.contiguous.bytes_end.max(self.run_from);
        self.join();
    }

    fn join(&mut self) {
        if self.is_whole() {
            self.contiguous = Stored {
                record_end: self.contiguous.record_end.max(self.run.record_end),
                bytes_end: self.contiguous.bytes_end.max(self.run.bytes_end),
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn stored(record_end: u64, bytes_end: u64) -> Stored {
        Stored { record_end: Lsn(record_end), bytes_end: Lsn(bytes_end) }
    }

    #[test]
    fn a_run_behind_a_hole_counts_once_the_hole_is_repaired() {
        let mut state = State::new(Lsn(300), stored(290, 300), stored(100, 110));
        state.handle_run(stored(400, 410));
        assert_eq!(state.contiguous, stored(100, 110));
        state.handle_repaired(stored(195, 200));
        assert_eq!((state.contiguous, state.is_whole()), (stored(195, 200), false));
        state.handle_repaired(stored(290, 300));
        assert_eq!((state.contiguous, state.is_whole()), (stored(400, 410), true));
        state.handle_run(stored(500, 500));
        assert_eq!(state.contiguous, stored(500, 500));
    }

    #[test]
    fn without_a_hole_the_run_is_all() {
        let state = State::new(Lsn(300), stored(320, 320), stored(300, 300));
        assert_eq!(state.contiguous, stored(320, 320));
    }

    #[test]
    fn what_the_run_repeats_is_the_runs_to_tell() {
        // A parent's tails reach into the segment in which its child's run begins.
        let mut state = State::new(Lsn(300), stored(290, 300), stored(0, 0));
        state.handle_repaired(stored(350, 350));
        assert_eq!(state.contiguous, stored(290, 300));
    }

    #[derive(Clone, Debug)]
    enum Step {
        /// The run holds more: record and bytes, where the stream is proven up to that record.
        Run(u64, u64),
        Repaired(u64, u64),
        Whole,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0u64..60, 0u64..9).prop_map(|(record, bytes)| Step::Run(record, bytes)),
            (0u64..900, 0u64..900).prop_map(|(record, bytes)| Step::Repaired(record.min(bytes), bytes)),
            Just(Step::Whole),
        ]
    }

    proptest! {
        /// Where the run ends is proven before it is stored, and a stream begins proven where its run does: what counts
        /// of a repository is proven, whatever was known of it, and what a repair says.
        #[test]
        fn no_record_end_counts_beyond_the_runs_that_are_not_proven(
            (run_record, run_tail) in (0u64..=300, 0u64..50),
            (known_record, known_bytes) in (0u64..900, 0u64..900),
            steps in prop::collection::vec(step(), 0..20),
        ) {
            let from = Lsn(300);
            // Of a run without a tail the record end lies before it; a tail ends with its record.
            let run = if run_tail == 0 { stored(run_record, 300) } else { stored(300 + run_tail, 300 + run_tail) };
            let mut state = State::new(from, run, stored(known_record.min(known_bytes), known_bytes));
            let mut before = Stored::default();
            let sound = |state: &State, before: Stored| {
                let Stored { record_end, bytes_end } = state.contiguous;
                record_end <= bytes_end
                    && record_end <= state.run.record_end.max(from)
                    && bytes_end <= state.run.bytes_end
                    && record_end >= before.record_end && bytes_end >= before.bytes_end
            };
            prop_assert!(sound(&state, before), "{state:?}");
            for step in steps {
                before = state.contiguous;
                match step {
                    Step::Run(record, bytes) => {
                        let record_end = state.run.record_end + record;
                        let bytes_end = (record_end + bytes).max(state.run.bytes_end);
                        state.handle_run(Stored { record_end, bytes_end });
                    }
                    Step::Repaired(record, bytes) => state.handle_repaired(stored(record, bytes)),
                    Step::Whole => state.handle_whole(),
                }
                prop_assert!(sound(&state, before), "{state:?} after {before:?}");
            }
        }
    }

    #[test]
    fn a_gap_nobody_can_fill_does_not_stand_in_the_way() {
        let mut state = State::new(Lsn(300), stored(290, 320), stored(100, 110));
        state.handle_whole();
        assert_eq!(state.contiguous, stored(290, 320));
    }
}

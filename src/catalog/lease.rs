//! Owns: whose a lease is, from its objects and one process' own monotonic clock.
//! Does not own: reading and creating them (`store/backups.rs`), who wants one (`agent/lease.rs`).
//! Pure: time is an argument, counted from any moment of the process' own.
//!
//! No two clocks are compared. A holder trusts its lease for two thirds of its seconds, counted from *before* the put
//! that made it; a challenger takes the next number only after it has itself watched the last one stand still for all
//! of them. What the holder counts began earlier than what the challenger counts, so the holder has stopped trusting
//! a third of the seconds before anybody else begins. Numbers are created once: two challengers cannot both get one,
//! and a holder that gets the number after its own knows that nobody held the lease in between, however late it is.

use std::time::Duration;

use super::backup::LeaseFile;
use crate::repository::layout::LeaseNumber;

/// One process' part in one lease.
#[derive(Clone, Debug)]
pub struct Claim {
    holder: String,
    seconds: u32,
    /// Another's, and since when it stands still.
    watched: Option<(LeaseNumber, Duration)>,
    /// What this process has tried to create last, and when it first tried that.
    tried: Option<(LeaseNumber, Duration)>,
    /// What it has created, and from when its seconds count.
    held: Option<(LeaseNumber, Duration)>,
}

/// What a look says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Ours, from here on until it is renewed, given back or taken.
    Held,
    /// Nobody's: this number may be tried.
    Free { next: LeaseNumber },
    /// Another's, and free then, unless it is renewed.
    Taken { by: LeaseFile, free_in: Duration },
}

impl Claim {
    /// `holder`: random, one per process and purpose.
    pub fn new(holder: impl Into<String>, seconds: u32) -> Claim {
        Claim { holder: holder.into(), seconds, watched: None, tried: None, held: None }
    }

    /// This number is about to be put. Trying it again does not make it any younger: the first try may have worked.
    pub fn handle_try(&mut self, now: Duration, number: LeaseNumber) {
        if self.tried.is_none_or(|(tried, _)| tried != number) {
            self.tried = Some((number, now));
        }
    }

    /// The highest lease there is, looked at after every try: `now` is when the look was over. What the store
    /// answered to a put says less than what is there: answers are lost, and old numbers may have been tidied away.
    pub fn handle_look(&mut self, now: Duration, highest: Option<&LeaseFile>) -> Standing {
        let Some(file) = highest else {
            (self.watched, self.held) = (None, None);
            return Standing::Free { next: LeaseNumber(1) };
        };
        let next = LeaseNumber(file.number.0.saturating_add(1));
        if file.holder == self.holder && !file.released {
            let since = [self.tried, self.held].into_iter().flatten().find(|(number, _)| *number == file.number);
            // A number of ours that was never tried: nothing is known of when.
            self.held = Some(since.unwrap_or((file.number, Duration::ZERO)));
            self.watched = None;
            return Standing::Held;
        }
        // Whoever it is: it is not ours any longer.
        self.held = None;
        let since = match self.watched {
            Some((number, since)) if number == file.number => since,
            _ => now,
        };
        self.watched = Some((file.number, since));
        let lifetime = Duration::from_secs(u64::from(file.seconds));
        let free_in = (since + lifetime).saturating_sub(now);
        match file.released || free_in.is_zero() {
            true => Standing::Free { next },
            false => Standing::Taken { by: file.clone(), free_in },
        }
    }

    /// The number held, valid or not.
    pub fn number(&self) -> Option<LeaseNumber> {
        self.held.map(|(number, _)| number)
    }

    /// The number that renews it, or gives it back.
    pub fn next(&self) -> Option<LeaseNumber> {
        self.held.map(|(number, _)| LeaseNumber(number.0.saturating_add(1)))
    }

    /// Whether nobody else can hold it now. When it is not, a renewal that succeeds makes it so again.
    pub fn is_valid(&self, now: Duration) -> bool {
        let trusted = Duration::from_secs(u64::from(self.seconds)) * 2 / 3;
        self.held.is_some_and(|(_, since)| now < since + trusted)
    }

    /// When it is to be renewed; `None`: it is not held.
    pub fn renewal_due(&self) -> Option<Duration> {
        self.held.map(|(_, since)| since + Duration::from_secs(u64::from(self.seconds)) / 3)
    }

    pub fn seconds(&self) -> u32 {
        self.seconds
    }

    pub fn holder(&self) -> &str {
        &self.holder
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::Timestamp;
    use proptest::prelude::*;

    const SECONDS: u32 = 30;

    fn file(holder: &str, number: u64, released: bool) -> LeaseFile {
        LeaseFile {
            schema: 1,
            number: LeaseNumber(number),
            holder: holder.into(),
            host: None,
            purpose: "backup".into(),
            at: Timestamp::UNIX_EPOCH,
            seconds: SECONDS,
            released,
            version: "0".into(),
        }
    }

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_lease_that_stands_still_is_free_after_its_seconds() {
        let mut claim = Claim::new("b", SECONDS);
        let other = file("a", 7, false);
        let taken = |free_in| Standing::Taken { by: other.clone(), free_in: at(free_in) };
        assert_eq!(claim.handle_look(at(100), Some(&other)), taken(30));
        assert_eq!(claim.handle_look(at(129), Some(&other)), taken(1));
        assert_eq!(claim.handle_look(at(130), Some(&other)), Standing::Free { next: LeaseNumber(8) });
        // Renewed meanwhile: it is watched from the beginning.
        let renewed = file("a", 8, false);
        assert_eq!(claim.handle_look(at(131), Some(&renewed)), Standing::Taken { by: renewed, free_in: at(30) });
        assert_eq!(claim.handle_look(at(132), Some(&file("a", 9, true))), Standing::Free { next: LeaseNumber(10) });
    }

    #[test]
    fn what_counts_is_when_it_was_first_tried() {
        let mut claim = Claim::new("a", SECONDS);
        assert_eq!(claim.handle_look(at(5), None), Standing::Free { next: LeaseNumber(1) });
        claim.handle_try(at(10), LeaseNumber(1));
        // No answer; tried again, and the name was taken: by the first try.
        claim.handle_try(at(25), LeaseNumber(1));
        assert_eq!(claim.handle_look(at(26), Some(&file("a", 1, false))), Standing::Held);
        assert!(claim.is_valid(at(29)) && !claim.is_valid(at(30)));
        assert_eq!(claim.renewal_due(), Some(at(20)));
        // Late, but nobody was there in between.
        claim.handle_try(at(50), LeaseNumber(2));
        assert_eq!(claim.handle_look(at(51), Some(&file("a", 2, false))), Standing::Held);
        assert!(claim.is_valid(at(69)));
        assert!(matches!(claim.handle_look(at(60), Some(&file("b", 3, false))), Standing::Taken { .. }));
        assert!(!claim.is_valid(at(60)) && claim.next().is_none());
    }

    /// A store, its clock nobody's, and processes that look and put in any order, are paused, and lose answers.
    #[derive(Default)]
    struct Model {
        now: u64,
        files: Vec<LeaseFile>,
        parties: Vec<Party>,
    }

    struct Party {
        claim: Claim,
        /// Its clock began at another moment.
        offset: u64,
        standing: Option<Standing>,
        /// Put, and not at the store yet.
        under_way: Option<LeaseFile>,
    }

    #[derive(Clone, Debug)]
    enum Step {
        Pass(u64),
        Look(usize),
        /// Puts what it may; the second says whether it arrives at once.
        Put(usize, bool),
        Arrive(usize),
        Release(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => (0_u64..12).prop_map(Step::Pass),
            1 => (12_u64..60).prop_map(Step::Pass),
            4 => (0_usize..3).prop_map(Step::Look),
            4 => (0_usize..3, prop::bool::weighted(0.8)).prop_map(|(party, arrives)| Step::Put(party, arrives)),
            1 => (0_usize..3).prop_map(Step::Arrive),
            1 => (0_usize..3).prop_map(Step::Release),
        ]
    }

    impl Model {
        fn new() -> Model {
            let party = |number: usize| Party {
                claim: Claim::new(format!("p{number}"), SECONDS),
                offset: 1000 * number as u64,
                standing: None,
                under_way: None,
            };
            Model { parties: (0..3).map(party).collect(), ..Model::default() }
        }

        fn create(files: &mut Vec<LeaseFile>, file: LeaseFile) {
            if files.iter().all(|known| known.number != file.number) {
                files.push(file);
            }
        }

        fn take(&mut self, step: Step) {
            let now = |party: &Party, now: u64| at(party.offset + now);
            match step {
                Step::Pass(seconds) => self.now += seconds,
                Step::Look(index) => {
                    let highest = self.files.iter().max_by_key(|file| file.number);
                    let party = &mut self.parties[index];
                    party.standing = Some(party.claim.handle_look(now(party, self.now), highest));
                }
                Step::Put(index, arrives) => {
                    let party = &mut self.parties[index];
                    let number = match &party.standing {
                        Some(Standing::Free { next }) => *next,
                        Some(Standing::Held) => party.claim.next().expect("it is held"),
                        _ => return,
                    };
                    party.claim.handle_try(now(party, self.now), number);
                    let file = file(party.claim.holder(), number.0, false);
                    match arrives {
                        true => Model::create(&mut self.files, file),
                        false => party.under_way = Some(file),
                    }
                }
                Step::Arrive(index) => {
                    if let Some(file) = self.parties[index].under_way.take() {
                        Model::create(&mut self.files, file);
                    }
                }
                Step::Release(index) => {
                    let party = &mut self.parties[index];
                    if let Some(next) = party.claim.next() {
                        let file = file(party.claim.holder(), next.0, true);
                        party.claim = Claim::new(party.claim.holder().to_string() + "'", SECONDS);
                        party.standing = None;
                        Model::create(&mut self.files, file);
                    }
                }
            }
        }

        fn valid(&self) -> Vec<usize> {
            let is_valid = |party: &Party| party.claim.is_valid(at(party.offset + self.now));
            (0..self.parties.len()).filter(|index| is_valid(&self.parties[*index])).collect()
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn two_never_trust_it_at_once_and_somebody_always_gets_it(steps in prop::collection::vec(step(), 1..120)) {
            let mut model = Model::new();
            for step in steps {
                model.take(step.clone());
                let valid = model.valid();
                prop_assert!(valid.len() <= 1, "{valid:?} after {step:?}");
            }
            // However it was left: who goes on asking has it soon after the seconds are over.
            for _ in 0..2 {
                model.take(Step::Look(1));
                model.take(Step::Put(1, true));
                model.take(Step::Look(1));
                if model.valid() == [1] {
                    return Ok(());
                }
                model.take(Step::Pass(u64::from(SECONDS)));
            }
            model.take(Step::Look(1));
            model.take(Step::Put(1, true));
            model.take(Step::Look(1));
            prop_assert_eq!(model.valid(), vec![1]);
        }
    }
}

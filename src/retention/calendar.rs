//! Owns: how old an instant is, whatever a clock may have said.
//! Does not own: which instant a piece of WAL or a backup stands for (`survey.rs`).
//! Pure.
//!
//! An age is counted on a calendar made of the archive's own evidence: every time found in it, up to now. A step between
//! two neighbours of more than [`STEP_MAX`] counts as nothing: either the archive stood still, and so did what it
//! promises, or a clock jumped, and no time passed at all. What lies after now is not old. So a clock that jumps ahead
//! by more than that makes nothing older, and one that jumps back makes everything younger; at worst more is kept, and
//! longer.
//!
//! The calendar keeps only the spans in which each step counts, so a million times come to a few numbers.

use std::time::Duration;

use jiff::Timestamp;

/// Larger: a clock may jump further before it is noticed. Smaller: an archive with rarer signs of life (a weekly backup
/// is one) never lets anything go.
pub const STEP_MAX: Duration = Duration::from_secs(8 * 86_400);

/// Times are µs since 1970.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Calendar {
    now: i64,
    /// [from, to], in order, more than a step apart; the last one ends now or, after a pause, is now alone.
    spans: Vec<(i64, i64)>,
}

impl Calendar {
    pub fn of(times: impl IntoIterator<Item = Timestamp>, now: Timestamp) -> Calendar {
        let now = now.as_microsecond();
        let times = times.into_iter().map(|time| time.as_microsecond()).filter(|&time| time < now);
        Calendar { now, spans: joined(times.chain([now]).map(|time| (time, time)).collect()) }
    }

    /// One of all the evidence of both.
    pub fn with(&self, other: &Calendar) -> Calendar {
        let until = |&(from, to): &(i64, i64)| (from <= self.now).then_some((from, to.min(self.now)));
        Calendar { now: self.now, spans: joined(self.spans.iter().chain(&other.spans).filter_map(until).collect()) }
    }

    pub fn age(&self, time: Timestamp) -> Duration {
        let time = time.as_microsecond();
        let passed = self.spans.iter().map(|&(from, to)| (to - from.max(time)).max(0));
        Duration::from_micros(passed.sum::<i64>() as u64)
    }

    pub fn is_future(&self, time: Timestamp) -> bool {
        time.as_microsecond() > self.now
    }

    /// The earliest instant that is not older than `age`; everything from there on is not older either.
    pub fn instant(&self, age: Duration) -> Timestamp {
        let mut left = i64::try_from(age.as_micros()).unwrap_or(i64::MAX);
        for &(from, to) in self.spans.iter().rev() {
            if to - from > left {
                return Timestamp::from_microsecond(to - left).unwrap_or(Timestamp::MIN);
            }
            left -= to - from;
        }
        Timestamp::MIN
    }

    /// The steps that count as nothing, in order.
    pub fn pauses(&self) -> impl Iterator<Item = (Timestamp, Timestamp)> {
        let time = |micros: i64| Timestamp::from_microsecond(micros).unwrap_or(Timestamp::MIN);
        self.spans.windows(2).map(move |pair| (time(pair[0].1), time(pair[1].0)))
    }
}

fn joined(mut spans: Vec<(i64, i64)>) -> Vec<(i64, i64)> {
    let step = STEP_MAX.as_micros() as i64;
    spans.sort_unstable();
    let mut joined: Vec<(i64, i64)> = Vec::new();
    for (from, to) in spans {
        match joined.last_mut() {
            Some(last) if from - last.1 <= step => last.1 = last.1.max(to),
            _ => joined.push((from, to)),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DAY: i64 = 86_400;

    fn at(day: i64) -> Timestamp {
        Timestamp::from_second(1_767_225_600 + day * DAY).unwrap()
    }

    fn days(n: u64) -> Duration {
        Duration::from_secs(n * DAY as u64)
    }

    fn calendar(evidence: impl IntoIterator<Item = i64>, now: i64) -> Calendar {
        Calendar::of(evidence.into_iter().map(at), at(now))
    }

    #[test]
    fn an_age_is_what_passed_while_the_archive_lived() {
        let calendar = calendar([0, 8, 10, 30, 32], 35);
        let ages: Vec<u64> = [0, 8, 10, 20, 30, 32, 35, 900].map(|day| calendar.age(at(day)).as_secs() / 86_400).into();
        assert_eq!(ages, [15, 7, 5, 5, 5, 3, 0, 0]);
        assert_eq!(calendar.pauses().collect::<Vec<_>>(), [(at(10), at(30))]);
    }

    #[test]
    fn a_clock_a_year_ahead_makes_nothing_old() {
        let daily = 0..=20;
        assert_eq!(calendar(daily.clone(), 20).age(at(5)), days(15));
        assert_eq!(calendar(daily.clone(), 385).age(at(5)), days(15));
        assert_eq!(calendar(daily.clone().chain([384]), 385).age(at(5)), days(16));
        // Corrected: what was written meanwhile lies in the future.
        let corrected = calendar(daily.chain([384, 385]), 21);
        assert_eq!((corrected.age(at(5)), corrected.age(at(384))), (days(16), days(0)));
    }

    #[test]
    fn a_clock_a_year_behind_makes_everything_young() {
        assert_eq!(calendar(0..=20, -345).age(at(5)), days(0));
    }

    #[test]
    fn an_archive_that_is_left_ages_by_the_evidence_of_the_one_that_goes_on() {
        let (left, next) = (calendar(0..=20, 90), calendar(21..=90, 90));
        assert_eq!(left.age(at(20)), days(0));
        assert_eq!(left.with(&next).age(at(20)), days(70));
        assert_eq!(left.with(&next), calendar(0..=90, 90));
    }

    proptest! {
        /// By the words: sorted, up to now, steps of more than eight days left out.
        #[test]
        fn ages_are_sums_of_steps(
            mut evidence in prop::collection::vec(0i64..90, 0..20),
            other in prop::collection::vec(0i64..90, 0..20),
            now in 0i64..100,
            age in 0u64..60,
        ) {
            let parts = calendar(evidence.clone(), now).with(&calendar(other.clone(), now + 3));
            evidence.extend(other);
            let calendar = calendar(evidence.clone(), now);
            prop_assert_eq!(&parts, &calendar);
            evidence.retain(|&day| day < now);
            evidence.push(now);
            evidence.sort();
            for &day in evidence.iter().chain([&(now + 1)]) {
                let steps = evidence.windows(2).filter(|pair| pair[0] >= day).map(|pair| pair[1] - pair[0]);
                let expected: i64 = steps.filter(|&step| step <= 8).sum();
                prop_assert_eq!(calendar.age(at(day)), days(expected as u64));
                prop_assert_eq!(at(day) >= calendar.instant(days(age)), expected as u64 <= age);
            }
        }
    }
}

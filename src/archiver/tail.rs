//! Owns: which bytes the next tail holds and which tails it makes superfluous.
//! Does not own: building or storing it. Pure.

use crate::repository::layout::TailName;
use crate::wal::Lsn;

/// A tail to be written: `[from, to)`, after which `absorbed` are deleted (new object first).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TailPlan {
    pub from: Lsn,
    pub to: Lsn,
    pub absorbed: Vec<TailName>,
}

/// Plans the tail for a cut at `to`. `stored` are the segment's tails, contiguous from `segment_start`.
///
/// A tail absorbs the ones before it that are not longer than itself, like the carries of a binary counter:
/// a segment has at most about 20 tails, and a byte is written again at most about as many times. Costs no
/// request of its own: merging happens in the tail that is due anyway. A final tail absorbs everything.
///
/// Bytes below `at_hand_from` went into an upload that gives none back: tails that begin below it stay as they are.
///
/// `None` when the stored tails already reach `to` (and, for a final one, cannot become fewer), and when bytes that no
/// tail holds are not at hand: then only the whole segment can make them durable.
pub fn plan_tail(
    stored: &[TailName],
    segment_start: Lsn,
    at_hand_from: Lsn,
    to: Lsn,
    is_final: bool,
) -> Option<TailPlan> {
    let end = stored.iter().map(|tail| tail.to).max().unwrap_or(segment_start);
    // Below the stored end only a stream can end that did not get as far as an earlier one.
    if to < end || to == segment_start || (to == end && !is_final) || (to > end && end < at_hand_from) {
        return None;
    }
    let mut by_start: Vec<TailName> = stored.to_vec();
    by_start.sort_by_key(|tail| (tail.from, tail.to));
    let mut plan = TailPlan { from: end, to, absorbed: Vec::new() };
    while let Some(last) = by_start.pop() {
        let longer = plan.from.saturating_distance(last.from) > plan.to - plan.from;
        if last.from < at_hand_from || (longer && !is_final) {
            break;
        }
        plan.from = plan.from.min(last.from);
        plan.absorbed.push(last);
    }
    // Without new bytes, one tail in the place of one is none the fewer.
    (to > end || plan.absorbed.len() > 1).then_some(plan)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::Form;
    use crate::repository::layout::Epoch;
    use proptest::prelude::*;

    fn tail(from: u64, to: u64) -> TailName {
        TailName { epoch: Epoch(1), from: Lsn(from), to: Lsn(to), raw_crc32: 0, last_commit: None, form: Form::Plain }
    }

    #[test]
    fn the_first_tail_starts_with_the_segment() {
        let plan = plan_tail(&[], Lsn(100), Lsn(100), Lsn(130), false).unwrap();
        assert_eq!(plan, TailPlan { from: Lsn(100), to: Lsn(130), absorbed: vec![] });
    }

    #[test]
    fn a_longer_tail_is_left_alone_and_shorter_ones_are_absorbed() {
        let stored = [tail(0, 100), tail(100, 110), tail(110, 120)];
        let plan = plan_tail(&stored, Lsn(0), Lsn(0), Lsn(140), false).unwrap();
        assert_eq!((plan.from, plan.to), (Lsn(100), Lsn(140)));
        assert_eq!(plan.absorbed, [stored[2], stored[1]]);
    }

    #[test]
    fn nothing_new_means_no_tail_but_a_final_one_merges() {
        let stored = [tail(0, 100), tail(100, 110)];
        assert_eq!(plan_tail(&stored, Lsn(0), Lsn(0), Lsn(110), false), None);
        let plan = plan_tail(&stored, Lsn(0), Lsn(0), Lsn(110), true).unwrap();
        assert_eq!((plan.from, plan.to, plan.absorbed.len()), (Lsn(0), Lsn(110), 2));
        assert_eq!(plan_tail(&stored[..1], Lsn(0), Lsn(0), Lsn(100), true), None);
        assert_eq!(plan_tail(&[], Lsn(0), Lsn(0), Lsn(0), true), None);
        assert_eq!(plan_tail(&stored, Lsn(0), Lsn(0), Lsn(105), true), None, "bytes up to 110 were not received again");
    }

    #[test]
    fn what_is_not_at_hand_is_not_absorbed() {
        let stored = [tail(0, 50), tail(50, 90), tail(90, 100)];
        let plan = plan_tail(&stored, Lsn(0), Lsn(60), Lsn(400), false).unwrap();
        assert_eq!((plan.from, plan.to), (Lsn(90), Lsn(400)));
        assert_eq!(plan.absorbed, [stored[2]]);
        let plan = plan_tail(&stored, Lsn(0), Lsn(50), Lsn(100), true).unwrap();
        assert_eq!((plan.from, plan.to, plan.absorbed.len()), (Lsn(50), Lsn(100), 2));
        assert_eq!(plan_tail(&stored, Lsn(0), Lsn(60), Lsn(100), true), None, "one tail is as few as can be");
        assert_eq!(plan_tail(&stored, Lsn(0), Lsn(100), Lsn(100), true), None);
        let plan = plan_tail(&stored, Lsn(0), Lsn(100), Lsn(101), false).unwrap();
        assert_eq!(plan, TailPlan { from: Lsn(100), to: Lsn(101), absorbed: vec![] });
        assert_eq!(plan_tail(&stored, Lsn(0), Lsn(101), Lsn(200), false), None, "a tail never skips a byte");
        assert_eq!(plan_tail(&[], Lsn(0), Lsn(1), Lsn(200), true), None);
    }

    proptest! {
        #[test]
        fn a_plan_never_touches_what_is_not_at_hand(
            lengths in prop::collection::vec(1u64..100, 0..8), floor in 0u64..400, further in 0u64..100, is_final in any::<bool>()
        ) {
            let mut stored = Vec::new();
            let mut end = 0;
            for length in lengths {
                stored.push(tail(end, end + length));
                end += length;
            }
            if let Some(plan) = plan_tail(&stored, Lsn(0), Lsn(floor), Lsn(end + further), is_final) {
                prop_assert!(plan.from >= Lsn(floor) && plan.from <= Lsn(end) && plan.to == Lsn(end + further));
                prop_assert!(plan.absorbed.iter().all(|tail| plan.from <= tail.from && tail.to <= plan.to));
                let kept = stored.iter().filter(|tail| !plan.absorbed.contains(tail));
                prop_assert!(kept.map(|tail| tail.to).max().unwrap_or(Lsn(0)) <= plan.from);
            }
        }

        #[test]
        fn tails_stay_few_contiguous_and_cheap(steps in prop::collection::vec(1u64..300_000, 1..800)) {
            let mut stored: Vec<TailName> = Vec::new();
            let (mut end, mut written) = (0, 0u64);
            for step in steps {
                end += step;
                let plan = plan_tail(&stored, Lsn(0), Lsn(0), Lsn(end), false).unwrap();
                stored.retain(|held| !plan.absorbed.contains(held));
                stored.push(tail(plan.from.0, plan.to.0));
                written += plan.to - plan.from;
                let mut next = 0;
                for held in &stored {
                    prop_assert_eq!(held.from, Lsn(next));
                    next = held.to.0;
                }
                prop_assert_eq!(next, end);
                prop_assert!(stored.len() <= 64 - end.leading_zeros() as usize + 1, "{} tails", stored.len());
            }
            prop_assert!(written <= end * 24, "{written} bytes written for {end}");
        }
    }
}

//! Owns: which tails of one unfinished segment count, decided by their names ("Reading tails" in
//! proto-notes/07-repository-format.md).
//! Does not own: fetching and checking their bytes (`restore/wal_get.rs`), other segments (`contents.rs`).
//!
//! The rule, as far as names can tell:
//!
//! * Tails of one epoch are one writer's bytes: their union counts, a tail inside another (merged) one adds nothing.
//!   Equal bounds with different CRCs are a conflict, and neither counts.
//! * Epochs are taken from the highest down. A lower epoch adds only bytes below the first `from`, or above the last
//!   `to`, of what counts already, and only where they join it without a hole.
//! * Overlaps compare by CRC where both sides' tails have common bounds. A difference refuses the lower epoch whole.
//! * Where bounds do not coincide the overlap cannot be judged. Then bytes below still count, because a writer matches
//!   everything stored before its first tail; bytes above do not, because nobody matched them. Readers of the bytes
//!   compare every overlap again and refuse a difference.
//!
//! Epochs of different repositories are numbered independently: each repository is resolved by itself, then the chains
//! are joined ([`join`]) by what their bytes are alone.

use std::collections::{BTreeMap, BTreeSet};

use super::contents::TailObject;
use crate::repository::layout::{Epoch, TailName};
use crate::wal::Lsn;

/// The bytes [from, to) of the tail are the ones that count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TailLink {
    pub tail: TailName,
    pub from: Lsn,
    pub to: Lsn,
}

/// What counts, in order and without overlap (holes are possible), and what contradicts or cannot be judged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TailChain {
    pub links: Vec<TailLink>,
    /// Tails whose bytes above the chain, or all of them, do not count: a conflict, or not comparable by name.
    pub refused: Vec<TailName>,
}

impl TailChain {
    /// The end of the contiguous bytes that start at `begin`; `begin` itself when there are none.
    pub fn end_from(&self, begin: Lsn) -> Lsn {
        let mut end = begin;
        for link in &self.links {
            if link.from <= end && link.to > end {
                end = link.to;
            }
        }
        end
    }
}

/// What the chains of one segment in several repositories come to together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JoinedTails {
    /// From the segment's start on, in order, without overlap and without a hole: which chain, and which part of it.
    pub links: Vec<(usize, TailLink)>,
    /// Where they end; the segment's start when there are none.
    pub end: Lsn,
    /// The first bytes beyond `end` that some chain has, and nothing joins to the rest.
    pub beyond: Option<(usize, TailLink)>,
    /// Two chains with different bytes for one place.
    pub contradiction: Option<(usize, usize)>,
}

/// Joins chains from `base` on: another chain goes on where `base` ends only if it holds bytes below that end too, and
/// all bytes both have are equal by CRC. Touching is not enough: nobody has compared the two.
pub fn join(chains: &[TailChain], base: usize, begin: Lsn) -> JoinedTails {
    let mut end = chains[base].end_from(begin);
    let own = chains[base].links.iter().filter(|link| link.from < end && link.to > begin);
    let mut links: Vec<(usize, TailLink)> = own.map(|link| (base, *link)).collect();
    let mut contradiction = None;
    let mut rest: Vec<usize> = (0..chains.len()).filter(|&other| other != base).collect();
    loop {
        let joined: Vec<TailLink> = links.iter().map(|(_, link)| *link).collect();
        let mut further = None;
        for &other in &rest {
            let verdict = compare(&joined, &chains[other].links);
            let overlaps_end = spans(&chains[other].links).into_iter().any(|(from, to)| from < end && end < to);
            match verdict {
                Overlap::Different => contradiction = contradiction.or(Some((base, other))),
                Overlap::Equal if overlaps_end && further.is_none() => further = Some(other),
                Overlap::Equal | Overlap::Unknown => {}
            }
        }
        let Some(other) = further.filter(|_| contradiction.is_none()) else { break };
        let above = joined_above(clip(&chains[other].links, end, Lsn::MAX), end);
        end = above.last().map_or(end, |link| link.to);
        links.extend(above.into_iter().map(|link| (other, link)));
        rest.retain(|&left| left != other);
    }
    let all = chains.iter().enumerate().flat_map(|(index, chain)| chain.links.iter().map(move |link| (index, *link)));
    let beyond = all.filter(|(_, link)| link.to > end).min_by_key(|(_, link)| link.from.max(end));
    JoinedTails { links, end, beyond, contradiction }
}

/// The chains that reach furthest from `begin`, the first of them first; empty when none begins there.
pub fn furthest(chains: &[TailChain], begin: Lsn) -> Vec<(usize, JoinedTails)> {
    let joined: Vec<(usize, JoinedTails)> = (0..chains.len())
        .map(|base| (base, join(chains, base, begin)))
        .filter(|(_, found)| found.end > begin)
        .collect();
    let end = joined.iter().map(|(_, found)| found.end).max();
    joined.into_iter().filter(|(_, found)| Some(found.end) == end).collect()
}

/// Decides which of the tails listed of one segment count.
pub fn of_listed<'a>(listed: impl Iterator<Item = &'a TailObject>) -> TailChain {
    // A zero-length object is never data: no zstd frame is that short.
    let listed = listed.filter(|tail| tail.stored_bytes > 0);
    resolve(&listed.map(|tail| tail.name).collect::<Vec<_>>())
}

/// Decides which of the tails of one segment count.
pub fn resolve(tails: &[TailName]) -> TailChain {
    let mut epochs: BTreeMap<Epoch, Vec<TailName>> = BTreeMap::new();
    for tail in tails {
        epochs.entry(tail.epoch).or_default().push(*tail);
    }
    let mut chain = TailChain::default();
    for (_, tails) in epochs.into_iter().rev() {
        let own = one_writer(tails, &mut chain.refused);
        if chain.links.is_empty() {
            chain.links = own;
        } else {
            add_lower_epoch(&mut chain, own);
        }
    }
    chain
}

/// The union of one writer's tails as links, sorted; contradictions go to `refused`.
fn one_writer(mut tails: Vec<TailName>, refused: &mut Vec<TailName>) -> Vec<TailLink> {
    // The longest first among equal starts: the ones it contains then add nothing.
    tails.sort_by_key(|tail| (tail.from, std::cmp::Reverse(tail.to), tail.raw_crc32));
    let contradicts = |a: &TailName, b: &TailName| (a.from, a.to) == (b.from, b.to) && a.raw_crc32 != b.raw_crc32;
    let mut links: Vec<TailLink> = Vec::new();
    for tail in &tails {
        if tails.iter().any(|other| contradicts(tail, other)) {
            refused.push(*tail);
            continue;
        }
        let from = links.last().map_or(tail.from, |last| last.to.max(tail.from));
        if from < tail.to {
            links.push(TailLink { tail: *tail, from, to: tail.to });
        }
    }
    links
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Overlap {
    Equal,
    Different,
    Unknown,
}

fn add_lower_epoch(chain: &mut TailChain, own: Vec<TailLink>) {
    let (Some(first), Some(last)) = (chain.links.first(), chain.links.last()) else { return };
    let (begin, end) = (first.from, last.to);
    let verdict = compare(&chain.links, &own);
    if verdict == Overlap::Different {
        chain.refused.extend(own.iter().map(|link| link.tail));
        return;
    }
    let mut below: Vec<TailLink> = clip(&own, Lsn::ZERO, begin);
    below = joined_below(below, begin);
    let above = joined_above(clip(&own, end, Lsn::MAX), end);
    if verdict == Overlap::Equal {
        chain.links.extend(above);
    } else {
        chain.refused.extend(above.iter().map(|link| link.tail));
    }
    below.append(&mut chain.links);
    chain.links = below;
}

/// The parts of `links` inside [from, to).
fn clip(links: &[TailLink], from: Lsn, to: Lsn) -> Vec<TailLink> {
    let part = |link: &TailLink| TailLink { tail: link.tail, from: link.from.max(from), to: link.to.min(to) };
    links.iter().map(part).filter(|link| link.from < link.to).collect()
}

/// The links that reach `begin` from below without a hole.
fn joined_below(mut links: Vec<TailLink>, begin: Lsn) -> Vec<TailLink> {
    let mut reached = begin;
    let mut keep = links.len();
    while keep > 0 && links[keep - 1].to == reached {
        keep -= 1;
        reached = links[keep].from;
    }
    links.split_off(keep)
}

/// The links that go on from `end` without a hole.
fn joined_above(mut links: Vec<TailLink>, end: Lsn) -> Vec<TailLink> {
    let mut reached = end;
    let mut keep = 0;
    while keep < links.len() && links[keep].from == reached {
        reached = links[keep].to;
        keep += 1;
    }
    links.truncate(keep);
    links
}

/// Whether the bytes both sides have are the same, by the CRCs of pieces with common bounds.
fn compare(one: &[TailLink], other: &[TailLink]) -> Overlap {
    let mut verdict = Overlap::Equal;
    for (from, to) in overlaps(one, other) {
        match (crc_pieces(one, from, to), crc_pieces(other, from, to)) {
            (Some(a), Some(b)) if combined(&a) == combined(&b) => {}
            (Some(_), Some(_)) => return Overlap::Different,
            _ => verdict = Overlap::Unknown,
        }
    }
    verdict
}

/// The ranges both sides have, cut at the bounds that occur on both sides.
fn overlaps(one: &[TailLink], other: &[TailLink]) -> Vec<(Lsn, Lsn)> {
    let mut found = Vec::new();
    for (from, to) in spans(one) {
        for (other_from, other_to) in spans(other) {
            let (from, to) = (from.max(other_from), to.min(other_to));
            if from < to {
                found.extend(cut_at_common_bounds(one, other, from, to));
            }
        }
    }
    found
}

fn cut_at_common_bounds(one: &[TailLink], other: &[TailLink], from: Lsn, to: Lsn) -> Vec<(Lsn, Lsn)> {
    let bounds = |links: &[TailLink]| -> BTreeSet<Lsn> { links.iter().flat_map(|link| [link.from, link.to]).collect() };
    let common = &bounds(one) & &bounds(other);
    let mut cuts: Vec<Lsn> = common.into_iter().filter(|&cut| from < cut && cut < to).collect();
    cuts.insert(0, from);
    cuts.push(to);
    cuts.windows(2).map(|pair| (pair[0], pair[1])).collect()
}

/// Contiguous ranges.
fn spans(links: &[TailLink]) -> Vec<(Lsn, Lsn)> {
    let mut spans: Vec<(Lsn, Lsn)> = Vec::new();
    for link in links {
        match spans.last_mut() {
            Some((_, to)) if *to == link.from => *to = link.to,
            _ => spans.push((link.from, link.to)),
        }
    }
    spans
}

/// The whole tails that make up exactly [from, to), or `None` when its bounds cut through one.
fn crc_pieces(links: &[TailLink], from: Lsn, to: Lsn) -> Option<Vec<TailName>> {
    let inside: Vec<&TailLink> = links.iter().filter(|link| link.from < to && from < link.to).collect();
    // A link that uses only a part of its tail has no CRC for that part.
    let whole = inside.iter().all(|link| (link.from, link.to) == (link.tail.from, link.tail.to));
    let exact = inside.first().is_some_and(|link| link.from == from) && inside.last().is_some_and(|link| link.to == to);
    (whole && exact).then(|| inside.iter().map(|link| link.tail).collect())
}

fn combined(pieces: &[TailName]) -> u32 {
    let mut whole = crc32fast::Hasher::new();
    for piece in pieces {
        whole.combine(&crc32fast::Hasher::new_with_initial_len(piece.raw_crc32, piece.to - piece.from));
    }
    whole.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What every honest writer sees: byte `i` of the segment is a function of `i` and of the branch of history.
    fn tail(epoch: u32, from: u64, to: u64, branch: u8) -> TailName {
        let bytes: Vec<u8> = (from..to).map(|i| (i as u8).wrapping_mul(31) ^ branch).collect();
        TailName {
            epoch: Epoch(epoch),
            from: Lsn(from),
            to: Lsn(to),
            raw_crc32: crc32fast::hash(&bytes),
            last_commit: None,
            form: crate::codec::Form::Plain,
        }
    }

    fn ranges(chain: &TailChain) -> Vec<(u64, u64)> {
        chain.links.iter().map(|link| (link.from.0, link.to.0)).collect()
    }

    #[test]
    fn merged_tails_subsume_older_ones() {
        let chain = resolve(&[tail(1, 0, 10, 0), tail(1, 10, 20, 0), tail(1, 0, 20, 0), tail(1, 20, 25, 0)]);
        assert_eq!(ranges(&chain), [(0, 20), (20, 25)]);
        assert!(chain.refused.is_empty());
        assert_eq!(chain.end_from(Lsn(0)), Lsn(25));
    }

    #[test]
    fn a_new_writer_goes_on_where_the_old_one_stopped() {
        let chain = resolve(&[tail(1, 0, 10, 0), tail(2, 10, 20, 0)]);
        assert_eq!(ranges(&chain), [(0, 10), (10, 20)]);
    }

    #[test]
    fn equal_overlaps_let_the_lower_epoch_reach_further() {
        // [10, 20) is one tail here and two there: the CRCs combine.
        let chain = resolve(&[
            tail(1, 0, 10, 0),
            tail(1, 10, 15, 0),
            tail(1, 15, 20, 0),
            tail(1, 20, 30, 0),
            tail(2, 10, 20, 0),
        ]);
        assert_eq!(chain.end_from(Lsn(0)), Lsn(30));
        assert!(chain.refused.is_empty());
    }

    #[test]
    fn a_different_overlap_refuses_the_lower_epoch() {
        let chain = resolve(&[tail(1, 0, 10, 0), tail(1, 10, 20, 7), tail(1, 20, 30, 7), tail(2, 10, 20, 0)]);
        assert_eq!(ranges(&chain), [(10, 20)]);
        assert_eq!(chain.refused.len(), 3);
    }

    #[test]
    fn an_overlap_that_names_cannot_judge_adds_below_but_not_above() {
        let chain = resolve(&[tail(1, 0, 10, 0), tail(1, 10, 30, 0), tail(2, 10, 20, 0)]);
        assert_eq!(ranges(&chain), [(0, 10), (10, 20)]);
        assert_eq!(chain.refused, [tail(1, 10, 30, 0)]);
        let straddling = resolve(&[tail(1, 0, 30, 0), tail(2, 10, 20, 0)]);
        assert_eq!(ranges(&straddling), [(0, 10), (10, 20)]);
    }

    #[test]
    fn one_writer_that_contradicts_itself_is_not_believed() {
        let chain = resolve(&[tail(1, 0, 10, 0), tail(1, 0, 10, 1), tail(1, 10, 20, 0)]);
        assert_eq!(chain.end_from(Lsn(0)), Lsn(0));
        assert_eq!(chain.refused.len(), 2);
    }

    #[test]
    fn holes_are_not_bridged() {
        let chain = resolve(&[tail(1, 0, 10, 0), tail(1, 12, 20, 0)]);
        assert_eq!(chain.end_from(Lsn(0)), Lsn(10));
        assert_eq!(resolve(&[]).end_from(Lsn(7)), Lsn(7));
        let between = resolve(&[tail(1, 0, 8, 0), tail(2, 10, 20, 0), tail(1, 22, 30, 0)]);
        assert_eq!(ranges(&between), [(10, 20)]);
    }

    fn chains(repositories: &[&[TailName]]) -> Vec<TailChain> {
        repositories.iter().map(|tails| resolve(tails)).collect()
    }

    fn joined(repositories: &[&[TailName]], base: usize) -> JoinedTails {
        join(&chains(repositories), base, Lsn(0))
    }

    #[test]
    fn the_repository_that_reaches_furthest_counts_whatever_its_epochs_are() {
        let (slow, fast): (&[_], &[_]) = (&[tail(9, 0, 10, 0)], &[tail(1, 0, 10, 0), tail(2, 10, 20, 0)]);
        let found = furthest(&chains(&[slow, fast]), Lsn(0));
        assert_eq!(found.iter().map(|(base, joined)| (*base, joined.end.0)).collect::<Vec<_>>(), [(0, 20), (1, 20)]);
        let other: &[_] = &[tail(9, 0, 12, 0)];
        let found = furthest(&chains(&[other, fast]), Lsn(0));
        assert_eq!(found.iter().map(|(base, joined)| (*base, joined.end.0)).collect::<Vec<_>>(), [(1, 20)]);
        // Equally far: in the order of the repositories.
        let both = furthest(&chains(&[fast, fast]), Lsn(0));
        assert_eq!(both.iter().map(|(base, _)| *base).collect::<Vec<_>>(), [0, 1]);
        assert_eq!(furthest(&chains(&[&[tail(1, 5, 9, 0)], &[]]), Lsn(0)), []);
    }

    #[test]
    fn another_repository_goes_on_where_an_equal_overlap_proves_it() {
        let holed: &[_] = &[tail(4, 5, 10, 0), tail(4, 10, 30, 0)];
        let found = joined(&[&[tail(1, 0, 5, 0), tail(1, 5, 10, 0), tail(1, 10, 30, 0)], holed], 0);
        assert_eq!(found.end, Lsn(30));
        let found = joined(&[&[tail(1, 0, 5, 0), tail(1, 5, 10, 0)], holed], 0);
        assert_eq!((found.end, found.links.last().unwrap().0, found.beyond), (Lsn(30), 1, None));
        // Only touching, or not comparable by name: nothing says they belong together.
        for first in [tail(1, 0, 5, 0), tail(1, 0, 7, 0)] {
            let found = joined(&[&[first], holed], 0);
            assert_eq!((found.end, found.contradiction), (first.to, None));
            assert_eq!(found.beyond.map(|(chain, _)| chain), Some(1));
        }
    }

    #[test]
    fn different_bytes_in_two_repositories_are_a_contradiction() {
        let found = joined(&[&[tail(1, 0, 10, 0), tail(1, 10, 20, 0)], &[tail(1, 10, 20, 7), tail(1, 20, 30, 7)]], 0);
        assert_eq!((found.end, found.contradiction), (Lsn(20), Some((0, 1))));
    }

    proptest! {
        #[test]
        fn joined_tails_are_contiguous_and_in_their_chains(
            repositories in prop::collection::vec(prop::collection::vec((1u32..4, 0u64..24, 1u64..16, 0u8..2), 0..6), 1..4)
        ) {
            let tails = |one: &Vec<(u32, u64, u64, u8)>| -> Vec<TailName> {
                one.iter().map(|&(epoch, from, len, branch)| tail(epoch, from, from + len, branch)).collect()
            };
            let chains: Vec<TailChain> = repositories.iter().map(|one| resolve(&tails(one))).collect();
            for (_, found) in furthest(&chains, Lsn(0)) {
                let mut end = Lsn(0);
                for (chain, link) in &found.links {
                    prop_assert!(link.from == end && link.from < link.to);
                    let whole = chains[*chain].links.iter().find(|known| known.tail == link.tail);
                    prop_assert!(whole.is_some_and(|known| known.from <= link.from && link.to <= known.to));
                    end = link.to;
                }
                prop_assert_eq!(end, found.end);
                prop_assert!(chains.iter().all(|chain| chain.end_from(Lsn(0)) <= found.end));
            }
        }

        #[test]
        fn every_byte_that_counts_is_in_its_tail_and_counts_once(
            tails in prop::collection::vec((1u32..5, 0u64..64, 1u64..32, 0u8..2), 0..12)
        ) {
            let tails: Vec<TailName> = tails.into_iter().map(|(epoch, from, len, branch)| tail(epoch, from, from + len, branch)).collect();
            let chain = resolve(&tails);
            let mut end = Lsn::ZERO;
            for link in &chain.links {
                prop_assert!(tails.contains(&link.tail));
                prop_assert!(link.tail.from <= link.from && link.from < link.to && link.to <= link.tail.to);
                prop_assert!(end <= link.from);
                end = link.to;
            }
            // The highest epoch decides between its first and last byte: no lower one fills in there.
            if let Some(highest) = chain.links.iter().map(|link| link.tail.epoch).max() {
                let own: Vec<_> = chain.links.iter().filter(|link| link.tail.epoch == highest).collect();
                let (begin, end) = (own[0].from, own[own.len() - 1].to);
                prop_assert!(chain.links.iter().all(|l| l.tail.epoch == highest || l.to <= begin || l.from >= end));
            }
        }

        #[test]
        fn order_of_listing_does_not_matter(
            tails in prop::collection::vec((1u32..4, 0u64..32, 1u64..16, 0u8..2), 0..8)
        ) {
            let tails: Vec<TailName> = tails.into_iter().map(|(epoch, from, len, branch)| tail(epoch, from, from + len, branch)).collect();
            let mut reversed = tails.clone();
            reversed.reverse();
            prop_assert_eq!(resolve(&tails).links, resolve(&reversed).links);
        }
    }
}

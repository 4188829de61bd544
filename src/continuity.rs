//! Which WAL the archive holds without a hole: runs, paths through timelines, gaps.
//!
//! Owns: turning pieces of WAL, histories and ledger facts into runs and gaps (proto-notes/06-timelines.md).
//! Does not own: reading them (`catalog`), which instants a backup makes reachable (`restore`).
//! Pure.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use serde::Serialize;

use crate::catalog::contents::segment_span;
use crate::catalog::{Catalog, FactKind, Holdings, LedgerFact, Piece, Source};
use crate::wal::{History, Lsn, Proof, SegmentSize, TimelineId};

/// Contiguous bytes [from, to) of one timeline, every one of them in an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    pub timeline: TimelineId,
    pub from: Lsn,
    pub to: Lsn,
    /// The end of its last sealed segment; `from` when it consists of tails only.
    pub sealed_to: Lsn,
    /// Time of the last commit in it, where it is known.
    pub last_commit: Option<Timestamp>,
    /// `Unproven` as soon as one sealed segment is.
    pub proof: Proof,
}

/// The runs of one timeline, from its pieces in any order. Pieces may overlap: no byte is counted that is in none.
pub fn runs(timeline: TimelineId, mut pieces: Vec<Piece>) -> Vec<Run> {
    pieces.sort_by_key(|piece| (piece.from, piece.to));
    let mut runs: Vec<Run> = Vec::new();
    for piece in pieces.into_iter().filter(|piece| piece.from < piece.to) {
        match runs.last_mut() {
            Some(run) if piece.from <= run.to => extend(run, &piece),
            _ => {
                let (from, last_commit) = (piece.from, None);
                let mut run = Run { timeline, from, to: from, sealed_to: from, last_commit, proof: Proof::Proven };
                extend(&mut run, &piece);
                runs.push(run);
            }
        }
    }
    runs
}

fn extend(run: &mut Run, piece: &Piece) {
    if piece.to > run.to {
        run.to = piece.to;
        run.last_commit = piece.last_commit.or(run.last_commit);
    }
    if let Source::Sealed(_) = piece.source {
        run.sealed_to = run.sealed_to.max(piece.to);
    }
    if piece.proof == Proof::Unproven {
        run.proof = Proof::Unproven;
    }
}

/// The line of history that ends on `timeline`; `None` when the archive does not know how it came to be.
/// `start_timeline`, where the archive starts, needs no history file.
pub fn path_of(
    timeline: TimelineId,
    histories: &BTreeMap<TimelineId, History>,
    start_timeline: TimelineId,
) -> Option<History> {
    let rootless = timeline == TimelineId(1) || timeline == start_timeline;
    histories.get(&timeline).cloned().or_else(|| rootless.then(|| History::root(timeline)))
}

/// The path PostgreSQL's `latest` takes: to the newest timeline known by history file or by data.
pub fn latest_path(
    histories: &BTreeMap<TimelineId, History>,
    with_data: impl IntoIterator<Item = TimelineId>,
    start_timeline: TimelineId,
) -> Option<History> {
    let known = histories.keys().copied().chain(with_data);
    path_of(known.fold(start_timeline, TimelineId::max), histories, start_timeline)
}

/// Proven bytes [from, to) along a path: the timelines that `to` and `from` lie on may differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stretch {
    pub from: Lsn,
    pub from_timeline: TimelineId,
    pub to: Lsn,
    pub to_timeline: TimelineId,
    pub last_commit: Option<Timestamp>,
}

/// The contiguous stretches of a path. A timeline's bytes count from where the path enters its fork's segment (it
/// repeats the parent's bytes there) up to where the path leaves it.
pub fn stretches(path: &History, runs: &[Run], size: SegmentSize) -> Vec<Stretch> {
    let mut parts: Vec<Run> = runs.iter().filter_map(|run| on_path(path, run, size)).collect();
    parts.sort_by_key(|run| (run.from, run.timeline, run.to));
    let mut stretches: Vec<Stretch> = Vec::new();
    for run in parts {
        match stretches.last_mut() {
            Some(last) if run.from <= last.to => {
                if run.to > last.to {
                    (last.to, last.to_timeline) = (run.to, run.timeline);
                    last.last_commit = run.last_commit.or(last.last_commit);
                }
            }
            _ => stretches.push(Stretch {
                from: run.from,
                from_timeline: run.timeline,
                to: run.to,
                to_timeline: run.timeline,
                last_commit: run.last_commit,
            }),
        }
    }
    stretches
}

/// The part of a run that belongs to the path.
fn on_path(path: &History, run: &Run, size: SegmentSize) -> Option<Run> {
    let begin = size.floor(path.begin_of(run.timeline)?);
    let end = path.end_of(run.timeline).unwrap_or(Lsn::MAX);
    let (from, to) = (run.from.max(begin), run.to.min(end));
    // Cut before its end, the run's last commit may lie beyond the cut.
    let last_commit = run.last_commit.filter(|_| to == run.to);
    (from < to).then(|| Run { from, to, last_commit, sealed_to: run.sealed_to.clamp(from, to), ..run.clone() })
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum GapState {
    Open,
    Healed,
}

/// WAL [from, to) of a timeline that is not in the archive, or was not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gap {
    /// Stable as long as the bounds are.
    pub id: String,
    pub timeline: TimelineId,
    pub from: Lsn,
    pub to: Lsn,
    pub detected: Option<Timestamp>,
    pub cause: Option<String>,
    pub state: GapState,
    pub healed_by: Option<String>,
}

impl Gap {
    fn new(hole: Hole) -> Gap {
        Gap {
            id: format!("{}-{:016X}-{:016X}", hole.timeline, hole.from.0, hole.to.0),
            timeline: hole.timeline,
            from: hole.from,
            to: hole.to,
            detected: None,
            cause: None,
            state: GapState::Open,
            healed_by: None,
        }
    }

    pub fn bytes(&self) -> u64 {
        self.to.saturating_distance(self.from)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Hole {
    timeline: TimelineId,
    from: Lsn,
    to: Lsn,
}

/// Every gap of a lineage in one repository.
pub fn gaps(catalog: &Catalog) -> Vec<Gap> {
    gaps_of(&Holdings::of(catalog))
}

/// Every gap: holes on the latest path and inside other timelines, and what the ledger remembers.
pub fn gaps_of(held: &Holdings) -> Vec<Gap> {
    let size = held.segment_size;
    let runs = all_runs(held);
    let start_timeline = held.start_timeline;
    let path = latest_path(&held.histories, held.pieces.keys().copied(), start_timeline);
    let mut holes: BTreeSet<Hole> = BTreeSet::new();
    if let Some(path) = &path {
        let start = held.start_lsn.filter(|_| path.contains(start_timeline));
        holes.extend(path_holes(path, &runs, start, size));
    }
    holes.extend(holes_between(&runs).filter_map(|hole| off_path(path.as_ref(), hole)));
    let holes = holes.into_iter().flat_map(|hole| subtract(hole, held.expired(hole.timeline))).collect();
    let stretches = path.as_ref().map_or(Vec::new(), |path| stretches(path, &runs, size));
    let is_held = |hole: &Hole| {
        let inside = |from: Lsn, to: Lsn| from <= hole.from && hole.to <= to;
        runs.iter().any(|run| run.timeline == hole.timeline && inside(run.from, run.to))
            || path.as_ref().is_some_and(|path| off_path(Some(path), *hole).is_none())
                && stretches.iter().any(|part| inside(part.from, part.to))
    };
    // What was expired on purpose is neither a gap nor healed.
    let forgotten = |hole: &Hole| subtract(*hole, held.expired(hole.timeline)).is_empty();
    with_facts(holes, &held.ledger, size, is_held, forgotten)
}

/// The runs of every timeline, timelines in order.
pub fn all_runs(held: &Holdings) -> Vec<Run> {
    held.pieces.iter().flat_map(|(&timeline, pieces)| runs(timeline, pieces.clone())).collect()
}

/// WAL [from, to) that one repository does not hold while others do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Lack {
    pub timeline: TimelineId,
    pub from: Lsn,
    pub to: Lsn,
}

impl Lack {
    /// Whether the runs have any byte of it.
    pub fn is_touched_by(&self, runs: &[Run]) -> bool {
        runs.iter().any(|run| run.timeline == self.timeline && run.from < self.to && self.from < run.to)
    }
}

/// What `one` repository lacks of what `all` hold together. What it has expired it does not lack, and being behind at
/// the end of the newest timeline is no hole.
pub fn lacks(all: &Holdings, one: &Holdings) -> Vec<Lack> {
    let own = all_runs(one);
    let newest = all.pieces.keys().next_back().copied();
    let mut lacks = Vec::new();
    for run in all_runs(all) {
        let hole = Hole { timeline: run.timeline, from: run.from, to: run.to };
        let of_timeline = own.iter().filter(|own| own.timeline == run.timeline);
        let held: Vec<(Lsn, Lsn)> = of_timeline.map(|own| (own.from, own.to)).collect();
        let end = held.iter().map(|(_, to)| *to).max();
        let missing = subtract(hole, &[&held[..], one.expired(run.timeline)].concat());
        let is_behind = |hole: &Hole| Some(hole.timeline) == newest && end.is_some_and(|end| hole.from >= end);
        let kept = missing.into_iter().filter(|hole| !is_behind(hole));
        lacks.extend(kept.map(|Hole { timeline, from, to }| Lack { timeline, from, to }));
    }
    lacks
}

/// The part of a hole that the path does not take, and so `path_holes` has not judged.
fn off_path(path: Option<&History>, hole: Hole) -> Option<Hole> {
    let Some(path) = path.filter(|path| path.contains(hole.timeline)) else { return Some(hole) };
    let from = hole.from.max(path.end_of(hole.timeline)?);
    (from < hole.to).then_some(Hole { from, ..hole })
}

/// What is missing between the path's first and last byte (its start as recorded, if that is earlier).
fn path_holes(path: &History, runs: &[Run], start: Option<Lsn>, size: SegmentSize) -> Vec<Hole> {
    let stretches = stretches(path, runs, size);
    let Some(first) = stretches.first() else { return Vec::new() };
    let mut end = start.map_or(first.from, |start| start.min(first.from));
    let mut holes = Vec::new();
    for stretch in &stretches {
        holes.extend(split_by_timeline(path, end, stretch.from));
        end = end.max(stretch.to);
    }
    // A child that has nothing yet still promises its parent's WAL up to the fork.
    let fork = path.parent().map_or(Lsn::ZERO, |parent| parent.end);
    holes.extend(split_by_timeline(path, end, fork));
    holes
}

/// A hole of the path as holes of its timelines.
fn split_by_timeline(path: &History, from: Lsn, to: Lsn) -> Vec<Hole> {
    let timelines = path.ancestors().iter().map(|entry| entry.timeline).chain([path.timeline]);
    let part = |timeline: TimelineId| {
        let from = from.max(path.begin_of(timeline)?);
        let to = to.min(path.end_of(timeline).unwrap_or(Lsn::MAX));
        (from < to).then_some(Hole { timeline, from, to })
    };
    timelines.filter_map(part).collect()
}

/// Holes between the runs of each timeline by itself.
fn holes_between(runs: &[Run]) -> impl Iterator<Item = Hole> + '_ {
    runs.windows(2).filter(|pair| pair[0].timeline == pair[1].timeline && pair[0].to < pair[1].from).map(|pair| Hole {
        timeline: pair[0].timeline,
        from: pair[0].to,
        to: pair[1].from,
    })
}

/// What is left of a hole without the ranges.
fn subtract(hole: Hole, ranges: &[(Lsn, Lsn)]) -> Vec<Hole> {
    let mut left = vec![hole];
    for &(from, to) in ranges {
        let outside = |hole: Hole| {
            let below = Hole { to: hole.to.min(from), ..hole };
            let above = Hole { from: hole.from.max(to), ..hole };
            [below, above].into_iter().filter(|part| part.from < part.to)
        };
        left = left.into_iter().flat_map(outside).collect();
    }
    left
}

/// Adds what the ledger knows: when and why a hole was found, what healed it, and gaps that are no holes any more.
/// `held` tells whether the archive has the bytes now, `forgotten` whether they were expired.
fn with_facts(
    holes: Vec<Hole>,
    ledger: &[LedgerFact],
    size: SegmentSize,
    held: impl Fn(&Hole) -> bool,
    forgotten: impl Fn(&Hole) -> bool,
) -> Vec<Gap> {
    let recorded: Vec<(Hole, &LedgerFact)> = facts(ledger, &[FactKind::Gap, FactKind::CorruptAtSource]);
    let healed: Vec<(Hole, &LedgerFact)> = facts(ledger, &[FactKind::GapHealed]);
    // They say why a hole is one, and no more: what was mended was never missed.
    let damaged = damaged_segments(ledger, size);
    let mut gaps: Vec<Gap> = Vec::new();
    for hole in &holes {
        let mut gap = Gap::new(*hole);
        if let Some((_, fact)) = recorded.iter().chain(&damaged).find(|(known, _)| overlap(known, hole)) {
            (gap.detected, gap.cause) = (Some(fact.at), Some(fact.cause.clone()));
        }
        heal(&mut gap, hole, &healed);
        gaps.push(gap);
    }
    for (known, fact) in &recorded {
        let id = Gap::new(*known).id;
        let told = holes.iter().any(|hole| overlap(known, hole)) || gaps.iter().any(|gap| gap.id == id);
        if told || forgotten(known) {
            continue;
        }
        let mut gap = Gap { detected: Some(fact.at), cause: Some(fact.cause.clone()), ..Gap::new(*known) };
        heal(&mut gap, known, &healed);
        if gap.state == GapState::Open && held(known) {
            // Whoever brought them.
            (gap.state, gap.healed_by) = (GapState::Healed, Some("archive".to_string()));
        }
        gaps.push(gap);
    }
    gaps.sort_by_key(|gap| (gap.timeline, gap.from, gap.to));
    gaps
}

fn heal(gap: &mut Gap, hole: &Hole, healed: &[(Hole, &LedgerFact)]) {
    let covers = |known: &Hole| known.timeline == hole.timeline && known.from <= hole.from && hole.to <= known.to;
    if let Some((_, fact)) = healed.iter().find(|(known, _)| covers(known)) {
        gap.state = GapState::Healed;
        gap.healed_by = Some(fact.healed_by.clone().unwrap_or_else(|| fact.cause.clone()));
    }
}

fn facts<'a>(ledger: &'a [LedgerFact], kinds: &[FactKind]) -> Vec<(Hole, &'a LedgerFact)> {
    let about = |fact: &'a LedgerFact| {
        let hole = Hole { timeline: fact.timeline?, from: fact.from_lsn?, to: fact.to_lsn? };
        (hole.from < hole.to).then_some((hole, fact))
    };
    ledger.iter().filter(|fact| kinds.contains(&fact.kind)).filter_map(about).collect()
}

fn damaged_segments(ledger: &[LedgerFact], size: SegmentSize) -> Vec<(Hole, &LedgerFact)> {
    let segment = |fact: &LedgerFact| {
        let name = fact.segments.first()?.first;
        let span = segment_span(name, size)?;
        Some(Hole { timeline: name.timeline, from: span.start, to: span.end })
    };
    let damaged = ledger.iter().filter(|fact| fact.kind == FactKind::Damaged);
    damaged.filter_map(|fact| Some((segment(fact)?, fact))).collect()
}

fn overlap(a: &Hole, b: &Hole) -> bool {
    a.timeline == b.timeline && a.from < b.to && b.from < a.to
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::Form;
    use crate::repository::layout::{Epoch, TailName};
    use proptest::prelude::*;

    const SIZE: SegmentSize = SegmentSize::MIB_16;

    fn piece(from: u64, to: u64) -> Piece {
        let tail = TailName {
            epoch: Epoch(1),
            from: Lsn(from),
            to: Lsn(to),
            raw_crc32: 0,
            last_commit: None,
            form: Form::Plain,
        };
        Piece { from: Lsn(from), to: Lsn(to), proof: Proof::Proven, last_commit: None, source: Source::Tail(tail) }
    }

    fn run(timeline: u32, from: u64, to: u64) -> Run {
        runs(TimelineId(timeline), vec![piece(from, to)]).remove(0)
    }

    fn history(timeline: u32, text: &str) -> History {
        History::parse(TimelineId(timeline), text.as_bytes()).unwrap()
    }

    fn holes(path: &History, runs: &[Run], start: Option<u64>) -> Vec<(u32, u64, u64)> {
        let found = path_holes(path, runs, start.map(Lsn), SIZE);
        found.iter().map(|hole| (hole.timeline.0, hole.from.0, hole.to.0)).collect()
    }

    #[test]
    fn a_child_that_starts_inside_its_parents_run_is_no_gap() {
        let path = history(2, "1\t0/2800000\tx\n");
        let runs = [run(1, 0x100_0000, 0x300_0000), run(2, 0x200_0000, 0x280_1000)];
        assert_eq!(holes(&path, &runs, None), []);
        let stretches = stretches(&path, &runs, SIZE);
        assert_eq!(stretches.len(), 1);
        assert_eq!((stretches[0].from, stretches[0].to), (Lsn(0x100_0000), Lsn(0x280_1000)));
        assert_eq!((stretches[0].from_timeline.0, stretches[0].to_timeline.0), (1, 2));
    }

    #[test]
    fn parents_wal_beyond_the_fork_is_off_the_path() {
        let path = history(2, "1\t0/2800000\tx\n");
        let stretches = stretches(&path, &[run(1, 0x100_0000, 0x900_0000)], SIZE);
        assert_eq!(stretches[0].to, Lsn(0x280_0000));
    }

    #[test]
    fn a_parent_that_ends_before_the_fork_leaves_a_gap_unless_the_child_repeats_it() {
        let path = history(2, "1\t0/4800000\tx\n");
        let short = run(1, 0x100_0000, 0x380_0000);
        assert_eq!(holes(&path, std::slice::from_ref(&short), None), [(1, 0x380_0000, 0x480_0000)]);
        // The child's first segment holds the parent's bytes from 0/4000000 on.
        let child = run(2, 0x400_0000, 0x500_0000);
        assert_eq!(holes(&path, &[short, child], None), [(1, 0x380_0000, 0x400_0000)]);
    }

    #[test]
    fn a_late_start_is_a_gap() {
        assert_eq!(holes(&History::root(TimelineId(1)), &[run(1, 64, 128)], Some(16)), [(1, 16, 64)]);
        assert_eq!(holes(&History::root(TimelineId(1)), &[run(1, 0, 128)], Some(16)), []);
    }

    #[test]
    fn a_hole_over_a_fork_belongs_to_both_timelines() {
        let path = history(2, "1\t0/2800000\tx\n");
        let runs = [run(1, 0x100_0000, 0x200_0000), run(2, 0x300_0000, 0x400_0000)];
        assert_eq!(holes(&path, &runs, None), [(1, 0x200_0000, 0x280_0000), (2, 0x280_0000, 0x300_0000)]);
    }

    #[test]
    fn the_latest_path_is_the_newest_timeline_even_without_data() {
        let histories = BTreeMap::from([(TimelineId(2), history(2, "1\t0/2800000\tx\n"))]);
        let one = TimelineId(1);
        assert_eq!(latest_path(&histories, [one], one).unwrap().timeline, TimelineId(2));
        assert_eq!(latest_path(&BTreeMap::new(), [one], one), Some(History::root(one)));
        assert_eq!(latest_path(&histories, [TimelineId(3)], one), None);
        assert_eq!(path_of(TimelineId(3), &histories, TimelineId(3)), Some(History::root(TimelineId(3))));
    }

    #[test]
    fn the_ledger_dates_heals_and_remembers() {
        let at: Timestamp = "2026-11-22T11:00:00Z".parse().unwrap();
        let hole = |from, to| Hole { timeline: TimelineId(1), from: Lsn(from), to: Lsn(to) };
        let gap = |from, to| LedgerFact::new(FactKind::Gap, at, "slot lost").about(TimelineId(1), Lsn(from), Lsn(to));
        let mut healed = LedgerFact::new(FactKind::GapHealed, at, "backup").about(TimelineId(1), Lsn(32), Lsn(64));
        healed.healed_by = Some("20261122T110000Z-full".into());
        let facts = [gap(0, 16), gap(32, 64), gap(70, 72), gap(100, 120), gap(200, 220), healed];
        let holes = vec![hole(8, 16), hole(32, 64), hole(80, 96)];
        let gaps = with_facts(holes, &facts, SIZE, |hole| hole.to.0 == 72, |hole| hole.to.0 == 120);
        let states: Vec<_> = gaps.iter().map(|gap| (gap.from.0, gap.state, gap.detected.is_some())).collect();
        use GapState::*;
        assert_eq!(
            states,
            [(8, Open, true), (32, Healed, true), (70, Healed, true), (80, Open, false), (200, Open, true)]
        );
        assert_eq!(gaps[1].healed_by.as_deref(), Some("20261122T110000Z-full"));
        assert_eq!(gaps[0].id, "1-0000000000000008-0000000000000010");
    }

    proptest! {
        #[test]
        fn runs_claim_exactly_the_bytes_that_are_in_an_object(pieces in prop::collection::vec((0u64..64, 0u64..16), 0..12)) {
            let pieces: Vec<Piece> = pieces.into_iter().map(|(from, len)| piece(from, from + len)).collect();
            let found = runs(TimelineId(1), pieces.clone());
            for byte in 0..96 {
                let inside = |from: Lsn, to: Lsn| from.0 <= byte && byte < to.0;
                let real = pieces.iter().any(|piece| inside(piece.from, piece.to));
                prop_assert_eq!(found.iter().filter(|run| inside(run.from, run.to)).count(), usize::from(real));
            }
            prop_assert!(found.windows(2).all(|pair| pair[0].to < pair[1].from));
        }

        #[test]
        fn stretches_and_holes_divide_the_path(
            fork in 1u64..96,
            parent in prop::collection::vec((0u64..96, 1u64..24), 0..5),
            child in prop::collection::vec((0u64..96, 1u64..24), 0..5),
        ) {
            const MIB: u64 = 1 << 20;
            let size = SegmentSize::new(8 * MIB).unwrap();
            let path = history(2, &format!("1\t0/{:X}\tx\n", fork * MIB));
            let of = |timeline: u32, raw: &[(u64, u64)]| {
                let pieces = raw.iter().map(|(from, len)| piece(from * MIB, (from + len) * MIB)).collect();
                runs(TimelineId(timeline), pieces)
            };
            let (parent, child) = (of(1, &parent), of(2, &child));
            let all: Vec<Run> = parent.iter().chain(&child).cloned().collect();
            let stretches = stretches(&path, &all, size);
            let holes = path_holes(&path, &all, None, size);
            let has = |runs: &[Run], at: u64| runs.iter().any(|run| run.from.0 <= at && at < run.to.0);
            let begin = size.floor(Lsn(fork * MIB)).0;
            let real = |at: u64| (at < fork * MIB && has(&parent, at)) || (at >= begin && has(&child, at));
            let bytes: Vec<u64> = (0..128).map(|mib| mib * MIB).collect();
            let first = bytes.iter().copied().find(|&at| real(at));
            let last = bytes.iter().copied().rfind(|&at| real(at)).map(|last| last.max(fork * MIB - MIB));
            for at in bytes {
                let claimed = stretches.iter().any(|part| part.from.0 <= at && at < part.to.0);
                prop_assert_eq!(claimed, real(at));
                let expected = first.zip(last).is_some_and(|(first, last)| first <= at && at <= last) && !real(at);
                prop_assert_eq!(holes.iter().any(|hole| hole.from.0 <= at && at < hole.to.0), expected);
            }
        }
    }
}

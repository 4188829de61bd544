//! Owns: what one lineage holds in one repository, or in several together, as far as continuity is concerned.
//! Does not own: reading the repositories (`store.rs`), runs and gaps (`continuity`).
//! Pure.

use std::collections::{BTreeMap, BTreeSet};

use super::contents::{Catalog, DirectoryContents, Piece};
use super::index::Crc32;
use super::ledger::{Expired, LedgerFact};
use super::tails;
use crate::repository::layout::WalDirectory;
use crate::wal::{History, Lsn, SegmentName, SegmentSize, TimelineId};

/// Why repositories are no copies of one lineage.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnionError {
    #[error("its WAL segments are {one} bytes in one repository and {other} in another")]
    SegmentSize { one: u64, other: u64 },
    #[error("the history of timeline {timeline} differs between repositories")]
    History { timeline: TimelineId },
}

/// What [`crate::continuity::gaps`] looks at.
#[derive(Clone, Debug)]
pub struct Holdings {
    pub segment_size: SegmentSize,
    pub start_timeline: TimelineId,
    pub start_lsn: Option<Lsn>,
    pub histories: BTreeMap<TimelineId, History>,
    /// Proven bytes of every timeline with a directory, in no order; they may overlap.
    pub pieces: BTreeMap<TimelineId, Vec<Piece>>,
    pub ledger: Vec<LedgerFact>,
    /// [from, to) of each timeline that nobody promises any more.
    pub expired: BTreeMap<TimelineId, Vec<(Lsn, Lsn)>>,
    /// Names with two different contents, in one repository or between two: none of them is in `pieces`.
    pub disputed: BTreeSet<SegmentName>,
}

impl Holdings {
    pub fn of(catalog: &Catalog) -> Holdings {
        Holdings::union(&[catalog]).expect("one catalog does not contradict itself")
    }

    /// What several repositories hold together of one lineage; at least one.
    pub fn union(catalogs: &[&Catalog]) -> Result<Holdings, UnionError> {
        let files = catalogs.iter().map(|catalog| &catalog.file);
        let first = files.clone().min_by_key(|file| file.start_timeline).expect("at least one repository");
        let segment_size = first.segment_size;
        if let Some(other) = files.clone().find(|file| file.segment_size != segment_size) {
            return Err(UnionError::SegmentSize { one: segment_size.bytes(), other: other.segment_size.bytes() });
        }
        let start_timeline = first.start_timeline;
        let starts = files.filter(|file| file.start_timeline == start_timeline).filter_map(|file| file.start_lsn);
        let timelines: BTreeSet<TimelineId> =
            catalogs.iter().flat_map(|catalog| catalog.timelines.keys().copied()).collect();
        let mut disputed = BTreeSet::new();
        let mut pieces = BTreeMap::new();
        for &timeline in &timelines {
            pieces.insert(timeline, timeline_pieces(catalogs, timeline, &mut disputed));
        }
        // Also those of which nothing is left.
        let facts = catalogs.iter().flat_map(|catalog| &catalog.ledger).flat_map(|fact| &fact.segments);
        let known: BTreeSet<TimelineId> = facts.map(|range| range.first.timeline).collect();
        Ok(Holdings {
            segment_size,
            start_timeline,
            start_lsn: starts.min(),
            histories: histories(catalogs)?,
            expired: known
                .into_iter()
                .map(|timeline| (timeline, forgotten(catalogs, timeline, segment_size)))
                .collect(),
            pieces,
            ledger: ledger(catalogs),
            disputed,
        })
    }

    pub fn expired(&self, timeline: TimelineId) -> &[(Lsn, Lsn)] {
        self.expired.get(&timeline).map_or(&[], Vec::as_slice)
    }
}

fn histories(catalogs: &[&Catalog]) -> Result<BTreeMap<TimelineId, History>, UnionError> {
    let mut union: BTreeMap<TimelineId, History> = BTreeMap::new();
    for (&timeline, history) in catalogs.iter().flat_map(|catalog| &catalog.histories) {
        if union.get(&timeline).is_some_and(|known| known != history) {
            return Err(UnionError::History { timeline });
        }
        union.insert(timeline, history.clone());
    }
    Ok(union)
}

/// Every fact once: repairing a repository copies its ledger too.
fn ledger(catalogs: &[&Catalog]) -> Vec<LedgerFact> {
    let mut union: Vec<LedgerFact> = Vec::new();
    for fact in catalogs.iter().flat_map(|catalog| &catalog.ledger) {
        if !union.contains(fact) {
            union.push(fact.clone());
        }
    }
    union.sort_by_key(|fact| fact.at);
    union
}

fn timeline_pieces(catalogs: &[&Catalog], timeline: TimelineId, disputed: &mut BTreeSet<SegmentName>) -> Vec<Piece> {
    let mut directories: BTreeMap<WalDirectory, Vec<&DirectoryContents>> = BTreeMap::new();
    for catalog in catalogs {
        for contents in catalog.timelines.get(&timeline).into_iter().flatten() {
            directories.entry(contents.directory).or_default().push(contents);
        }
    }
    directories.values().flat_map(|copies| directory_pieces(copies, disputed)).collect()
}

/// The pieces of one directory in several repositories.
fn directory_pieces(copies: &[&DirectoryContents], disputed: &mut BTreeSet<SegmentName>) -> Vec<Piece> {
    let named = |contents: &&DirectoryContents| {
        let names = contents.entries.keys().chain(contents.tails.keys()).chain(contents.disputed.keys());
        names.copied().collect::<Vec<_>>()
    };
    let names: BTreeSet<SegmentName> = copies.iter().flat_map(named).collect();
    let mut pieces = Vec::new();
    for name in names {
        if is_disputed(copies, name) {
            disputed.insert(name);
        } else if let Some(entry) = copies.iter().find_map(|contents| contents.sealed(name)) {
            pieces.push(Piece::sealed(entry));
        } else {
            pieces.extend(tail_pieces(copies, name));
        }
    }
    pieces
}

fn is_disputed(copies: &[&DirectoryContents], name: SegmentName) -> bool {
    let entries = copies.iter().filter_map(|contents| contents.entries.get(&name));
    let contents: BTreeSet<u32> = entries.map(|entry| entry.raw_crc32).map(|Crc32(crc)| crc).collect();
    contents.len() > 1 || copies.iter().any(|contents| contents.disputed.contains_key(&name))
}

/// The tails that count for an unfinished segment: of the repository that reaches furthest, and what others add beyond
/// a hole, so that the hole shows.
fn tail_pieces(copies: &[&DirectoryContents], name: SegmentName) -> Vec<Piece> {
    let chains: Vec<tails::TailChain> = copies.iter().map(|contents| contents.tail_chain(name)).collect();
    let begin = chains.iter().filter_map(|chain| chain.links.first()).map(|link| link.from).min();
    let Some(begin) = begin else { return Vec::new() };
    let Some((_, joined)) = tails::furthest(&chains, begin).into_iter().next() else { return Vec::new() };
    let beyond = chains.iter().flat_map(|chain| &chain.links).filter(|link| link.from > joined.end);
    let links = joined.links.iter().map(|(_, link)| link).chain(beyond);
    links.map(|link| Piece::tail(*link)).collect()
}

/// What is expired is no gap: where some repository has let it go, and no other one still promises it. A repository
/// promises what lies above the first byte it holds.
fn forgotten(catalogs: &[&Catalog], timeline: TimelineId, size: SegmentSize) -> Vec<(Lsn, Lsn)> {
    let expired = |catalog: &&Catalog| Expired::of(&catalog.ledger).lsns(timeline, size);
    let any: Vec<(Lsn, Lsn)> = catalogs.iter().flat_map(expired).collect();
    catalogs.iter().fold(any, |left, catalog| {
        let first = catalog.pieces(timeline).iter().map(|piece| piece.from).min().unwrap_or(Lsn::MAX);
        let mut unpromised = expired(catalog);
        unpromised.push((Lsn::ZERO, first));
        intersect(&left, &unpromised)
    })
}

fn intersect(one: &[(Lsn, Lsn)], other: &[(Lsn, Lsn)]) -> Vec<(Lsn, Lsn)> {
    let pairs = one.iter().flat_map(|a| other.iter().map(move |b| (a.0.max(b.0), a.1.min(b.1))));
    pairs.filter(|(from, to)| from < to).collect()
}

#[cfg(test)]
mod tests {
    use super::super::contents::TailObject;
    use super::super::ledger::{FactKind, SegmentRange};
    use super::super::lineage::LineageFile;
    use super::*;
    use crate::continuity::{self, GapState, Lack};
    use crate::repository::layout::{Epoch, Lineage, TailName};
    use crate::wal::{SegmentNumber, SystemId};
    use jiff::Timestamp;

    const MIB: u64 = 1 << 20;
    const ONE: TimelineId = TimelineId(1);

    fn size() -> SegmentSize {
        SegmentSize::new(MIB).unwrap()
    }

    fn now() -> Timestamp {
        "2026-11-22T11:00:00Z".parse().unwrap()
    }

    fn name(number: u64) -> SegmentName {
        SegmentName::new(ONE, SegmentNumber(number), size())
    }

    fn tail(epoch: u32, from: u64, to: u64, crc: u32) -> TailName {
        TailName {
            epoch: Epoch(epoch),
            from: Lsn(from),
            to: Lsn(to),
            raw_crc32: crc,
            last_commit: None,
            form: Default::default(),
        }
    }

    /// A repository that holds these tails of timeline 1: whole segments as tails do for what is tested here.
    fn catalog(start: u64, tails: &[TailName]) -> Catalog {
        let mut contents = DirectoryContents::new(WalDirectory::of(name(0)), size());
        for &tail in tails {
            let name = SegmentName::new(ONE, size().segment_of(tail.from), size());
            contents.tails.entry(name).or_default().push(TailObject { name: tail, stored_bytes: 1 });
        }
        let system_id = SystemId(7);
        Catalog {
            lineage: Lineage::new("main", system_id, 1),
            file: LineageFile {
                schema: 1,
                system_id,
                server_version: "18.1".into(),
                segment_size: size(),
                created: now(),
                start_timeline: ONE,
                start_lsn: Some(Lsn(start)),
                slot: None,
            },
            histories: BTreeMap::new(),
            timelines: BTreeMap::from([(ONE, vec![contents])]),
            ledger: Vec::new(),
        }
    }

    fn segments(numbers: impl IntoIterator<Item = u64>) -> Catalog {
        let tails: Vec<TailName> = numbers.into_iter().map(|n| tail(1, n * MIB, (n + 1) * MIB, n as u32)).collect();
        catalog(0, &tails)
    }

    fn expire(catalog: &mut Catalog, first: u64, last: u64) {
        let mut fact = LedgerFact::new(FactKind::Expired, now(), "retention");
        fact.segments.push(SegmentRange { first: name(first), last: name(last) });
        catalog.ledger.push(fact);
        let expired = Expired::of(&catalog.ledger);
        catalog.timelines.values_mut().flatten().for_each(|contents| contents.subtract(&expired));
    }

    /// Open gaps in segments.
    fn gaps(catalogs: &[&Catalog]) -> Vec<(u64, u64)> {
        let gaps = continuity::gaps_of(&Holdings::union(catalogs).unwrap());
        let open = gaps.iter().filter(|gap| gap.state == GapState::Open);
        open.map(|gap| (gap.from.0 / MIB, gap.to.0 / MIB)).collect()
    }

    fn lacks(catalogs: &[&Catalog], one: &Catalog) -> Vec<(u64, u64)> {
        let found = continuity::lacks(&Holdings::union(catalogs).unwrap(), &Holdings::of(one));
        found.iter().map(|Lack { from, to, .. }| (from.0 / MIB, to.0 / MIB)).collect()
    }

    #[test]
    fn a_hole_is_a_gap_only_where_no_repository_holds_it() {
        let (one, other) = (segments([0, 1, 4, 5]), segments([0, 2, 5, 6]));
        assert_eq!(gaps(&[&one]), [(2, 4)]);
        assert_eq!(gaps(&[&one, &other]), [(3, 4)]);
        assert_eq!(lacks(&[&one, &other], &one), [(2, 3)], "behind at the end is no hole");
        assert_eq!(lacks(&[&one, &other], &other), [(1, 2), (4, 5)]);
        let empty = segments([]);
        assert_eq!(gaps(&[&one, &other, &empty]), [(3, 4)]);
        assert_eq!(lacks(&[&one, &empty], &empty), [(0, 2), (4, 6)]);
    }

    #[test]
    fn what_is_expired_is_no_gap_unless_another_repository_still_promises_it() {
        let (mut one, later) = (segments(0..8), segments(4..8));
        expire(&mut one, 0, 2);
        assert_eq!(gaps(&[&one]), []);
        assert_eq!(gaps(&[&one, &later]), [], "the other one never held it");
        assert_eq!(lacks(&[&one, &later], &later), [(3, 4)]);
        let damaged = segments([0, 2, 3, 4, 5, 6, 7]);
        assert_eq!(gaps(&[&one, &damaged]), [(1, 2)], "its retention is longer");
        assert_eq!(lacks(&[&one, &damaged], &one), []);
    }

    #[test]
    fn tails_that_only_touch_are_not_one_run() {
        let (one, other) = (catalog(0, &[tail(1, 0, 500, 1)]), catalog(0, &[tail(7, 500, 900, 2)]));
        let held = Holdings::union(&[&one, &other]).unwrap();
        let ends: Vec<u64> = continuity::all_runs(&held).iter().map(|run| run.to.0).collect();
        assert_eq!(ends, [500]);
        let beyond = catalog(0, &[tail(7, 600, 900, 2)]);
        let open = continuity::gaps_of(&Holdings::union(&[&one, &beyond]).unwrap());
        assert_eq!(open.iter().map(|gap| (gap.from.0, gap.to.0)).collect::<Vec<_>>(), [(500, 600)]);
    }

    #[test]
    fn repositories_that_contradict_one_another_are_no_union() {
        let (one, mut other) = (segments(0..4), segments(0..4));
        other.file.segment_size = SegmentSize::MIB_16;
        assert!(matches!(Holdings::union(&[&one, &other]), Err(UnionError::SegmentSize { .. })));
        let (mut one, mut other) = (segments(0..4), segments(0..4));
        let two = TimelineId(2);
        one.histories.insert(two, History::parse(two, b"1\t0/200000\tx\n").unwrap());
        assert!(Holdings::union(&[&one, &other]).unwrap().histories.contains_key(&two));
        other.histories.insert(two, History::parse(two, b"1\t0/300000\tx\n").unwrap());
        assert_eq!(Holdings::union(&[&one, &other]).unwrap_err(), UnionError::History { timeline: two });
    }
}

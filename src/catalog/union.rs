//! Owns: what one lineage holds in one repository, or in several together, as far as continuity is concerned.
//! Does not own: reading the repositories (`store.rs`), runs and gaps (`continuity`).
//! Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use jiff::Timestamp;

use super::contents::{Catalog, Piece, Source};
use super::digest::{Digest, DirectoryDigest};
use super::ledger::{Expired, LedgerFact};
use super::tails;
use crate::repository::layout::WalDirectory;
use crate::wal::{History, Lsn, Proof, SegmentName, SegmentSize, TimelineId};

/// Why repositories are no copies of one lineage.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnionError {
    #[error("its WAL segments are {one} bytes in one repository and {other} in another")]
    SegmentSize { one: u64, other: u64 },
    #[error("the history of timeline {timeline} differs between repositories")]
    History { timeline: TimelineId },
}

/// Proven bytes of one timeline that several pieces make up, or one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    pub from: Lsn,
    pub to: Lsn,
    /// Of sealed segments, not of a tail.
    pub is_sealed: bool,
    /// `Unproven` as soon as one segment is.
    pub proof: Proof,
    /// Time of the last commit at or before `to`, where it is known.
    pub last_commit: Option<Timestamp>,
}

impl From<&Piece> for Span {
    fn from(piece: &Piece) -> Span {
        let is_sealed = matches!(piece.source, Source::Sealed(_));
        Span { from: piece.from, to: piece.to, is_sealed, proof: piece.proof, last_commit: piece.last_commit }
    }
}

impl From<Piece> for Span {
    fn from(piece: Piece) -> Span {
        Span::from(&piece)
    }
}

/// Sealed segments of one directory that follow one another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SealedSpan {
    directory: Arc<DirectoryDigest>,
    /// Where they are in it; never empty.
    at: Range<usize>,
    span: Span,
}

impl SealedSpan {
    pub fn digests(&self) -> &[Digest] {
        &self.directory.sealed[self.at.clone()]
    }

    /// Those that hold any byte of [from, to).
    pub fn within(&self, from: Lsn, to: Lsn) -> impl DoubleEndedIterator<Item = (Piece, &Digest)> {
        let size = self.directory.segment_size;
        let index = |lsn: Lsn| usize::try_from(lsn.saturating_distance(self.span.from) / size.bytes());
        let all = self.digests();
        let first = index(from).unwrap_or(usize::MAX).min(all.len());
        let last = index(Lsn(to.0.saturating_sub(1))).unwrap_or(usize::MAX).saturating_add(1).min(all.len());
        let inside = if from < to && self.span.from < to { &all[first..last.max(first)] } else { &[] };
        inside.iter().filter_map(move |digest| Some((Piece::sealed(digest, size)?, digest)))
    }
}

/// What holds proven bytes of one timeline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    Sealed(SealedSpan),
    /// Of a tail, or whatever is looked at by itself.
    Piece(Piece),
}

impl Part {
    pub fn pieces(&self) -> impl Iterator<Item = Piece> {
        let (sealed, tail) = match self {
            Part::Sealed(sealed) => (Some(sealed.within(Lsn::ZERO, Lsn::MAX).map(|(piece, _)| piece)), None),
            Part::Piece(piece) => (None, Some(piece.clone())),
        };
        sealed.into_iter().flatten().chain(tail)
    }

    pub fn span(&self) -> Span {
        match self {
            Part::Sealed(sealed) => sealed.span,
            Part::Piece(piece) => Span::from(piece),
        }
    }
}

/// Parts, in the order of their pieces.
#[derive(Debug, Default)]
struct Parts(Vec<Part>);

impl Parts {
    fn push_sealed(&mut self, directory: &Arc<DirectoryDigest>, at: usize) {
        let Some(piece) = Piece::sealed(&directory.sealed[at], directory.segment_size) else { return };
        if let Some(Part::Sealed(last)) = self.0.last_mut()
            && Arc::ptr_eq(&last.directory, directory)
            && last.at.end == at
            && last.span.to == piece.from
        {
            last.at.end = at + 1;
            last.span.to = piece.to;
            last.span.last_commit = piece.last_commit.or(last.span.last_commit);
            if piece.proof == Proof::Unproven {
                last.span.proof = Proof::Unproven;
            }
            return;
        }
        let span = Span::from(&piece);
        self.0.push(Part::Sealed(SealedSpan { directory: directory.clone(), at: at..at + 1, span }));
    }
}

/// What [`crate::continuity::gaps`] looks at.
#[derive(Clone, Debug)]
pub struct Holdings {
    pub segment_size: SegmentSize,
    pub start_timeline: TimelineId,
    pub start_lsn: Option<Lsn>,
    pub histories: BTreeMap<TimelineId, History>,
    /// Proven bytes of every timeline with a directory, directories in order; they may overlap.
    pub parts: BTreeMap<TimelineId, Vec<Part>>,
    pub ledger: Vec<LedgerFact>,
    /// [from, to) of each timeline that nobody promises any more.
    pub expired: BTreeMap<TimelineId, Vec<(Lsn, Lsn)>>,
    /// Names with two different contents, in one repository or between two: none of them is in `parts`.
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
        let mut parts = BTreeMap::new();
        for &timeline in &timelines {
            parts.insert(timeline, timeline_parts(catalogs, timeline, &mut disputed));
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
            parts,
            ledger: ledger(catalogs),
            disputed,
        })
    }

    pub fn expired(&self, timeline: TimelineId) -> &[(Lsn, Lsn)] {
        self.expired.get(&timeline).map_or(&[], Vec::as_slice)
    }

    pub fn parts(&self, timeline: TimelineId) -> &[Part] {
        self.parts.get(&timeline).map_or(&[], Vec::as_slice)
    }

    /// What the parts are made of, one by one.
    pub fn pieces(&self, timeline: TimelineId) -> impl Iterator<Item = Piece> {
        self.parts(timeline).iter().flat_map(Part::pieces)
    }

    /// The end of the last byte of a timeline.
    pub fn end(&self, timeline: TimelineId) -> Option<Lsn> {
        self.parts(timeline).iter().map(|part| part.span().to).max()
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

fn timeline_parts(catalogs: &[&Catalog], timeline: TimelineId, disputed: &mut BTreeSet<SegmentName>) -> Vec<Part> {
    let mut directories: BTreeMap<WalDirectory, Vec<&Arc<DirectoryDigest>>> = BTreeMap::new();
    for catalog in catalogs {
        for digest in catalog.timelines.get(&timeline).into_iter().flatten() {
            directories.entry(digest.directory).or_default().push(digest);
        }
    }
    let mut parts = Parts::default();
    for copies in directories.values() {
        add_directory(&mut parts, copies, disputed);
    }
    parts.0
}

/// The pieces of one directory in several repositories.
fn add_directory(parts: &mut Parts, copies: &[&Arc<DirectoryDigest>], disputed: &mut BTreeSet<SegmentName>) {
    if let [copy] = copies
        && copy.is_all_sealed()
    {
        // As almost all are.
        return (0..copy.sealed.len()).for_each(|at| parts.push_sealed(copy, at));
    }
    let names: BTreeSet<SegmentName> = copies.iter().flat_map(|copy| copy.names()).collect();
    for name in names {
        let sealed = || copies.iter().find_map(|copy| Some((*copy, copy.position(name)?)));
        if is_disputed(copies, name) {
            disputed.insert(name);
        } else if let Some((copy, at)) = sealed() {
            parts.push_sealed(copy, at);
        } else {
            parts.0.extend(tail_pieces(copies, name).into_iter().map(Part::Piece));
        }
    }
}

fn is_disputed(copies: &[&Arc<DirectoryDigest>], name: SegmentName) -> bool {
    let entries = copies.iter().filter_map(|copy| copy.indexed_as(name));
    let contents: BTreeSet<u32> = entries.map(|digest| digest.raw_crc32.0).collect();
    contents.len() > 1 || copies.iter().any(|copy| copy.disputed.contains(&name))
}

/// The tails that count for an unfinished segment: of the repository that reaches furthest, and what others add beyond
/// a hole, so that the hole shows.
fn tail_pieces(copies: &[&Arc<DirectoryDigest>], name: SegmentName) -> Vec<Piece> {
    let chains: Vec<tails::TailChain> = copies.iter().map(|copy| copy.tail_chain(name)).collect();
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
        let mut directories = catalog.of_timeline(timeline);
        let first = directories.find_map(DirectoryDigest::first_byte).unwrap_or(Lsn::MAX);
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
    use super::super::contents::{DirectoryContents, TailObject};
    use super::super::index::IndexEntry;
    use super::super::ledger::{FactKind, SegmentRange};
    use super::super::lineage::LineageFile;
    use super::*;
    use crate::continuity::{self, GapState, Lack};
    use crate::repository::layout::{Epoch, Lineage, TailName};
    use crate::wal::{SegmentNumber, SystemId};

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
        let mut contents = DirectoryContents::<IndexEntry>::new(WalDirectory::of(name(0)), size());
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
            timelines: BTreeMap::from([(ONE, vec![Arc::new(DirectoryDigest::of(contents))])]),
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
        for digest in catalog.timelines.values_mut().flatten() {
            Arc::make_mut(digest).tails.retain(|name, _| !expired.contains(*name));
        }
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

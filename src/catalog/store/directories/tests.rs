//! What is kept of a directory against the whole of it: pieces, runs, gaps and blocks are the same whichever way an archive
//! is read, and whether its segments stand one by one or in spans.

use std::collections::BTreeSet;

use jiff::Timestamp;
use proptest::prelude::*;

use super::*;
use crate::catalog::contents::{Piece, Source};
use crate::catalog::index::Crc32;
use crate::catalog::ledger::{FactKind, SegmentRange};
use crate::catalog::lineage::LineageFile;
use crate::catalog::tails::{self, TailChain};
use crate::catalog::union::{Holdings, Part};
use crate::continuity;
use crate::repository::layout::{Epoch, Lineage};
use crate::restore::reach::Reach;
use crate::testkit::store::MemoryStore;
use crate::wal::{Commit, Lsn, Proof, RestorePoint, SegmentNumber, SegmentSummary, SystemId};

const MIB: u64 = 1 << 20;
const ONE: TimelineId = TimelineId(1);
/// Two directories meet at 4096.
const FIRST: u64 = 4088;
const SEGMENTS: usize = 16;

fn size() -> SegmentSize {
    SegmentSize::new(MIB).unwrap()
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_790_000_000 + second).unwrap()
}

fn name(number: u64) -> SegmentName {
    SegmentName::new(ONE, SegmentNumber(number), size())
}

/// What is there of a segment.
#[derive(Clone, Copy, Debug)]
enum State {
    Absent,
    Sealed,
    Unproven,
    /// With tails that were not removed yet.
    Tailed,
    /// Without its object.
    Lost,
    /// The object is shorter than its entry says.
    Cut,
    /// As that, with a repair.
    Repaired,
    Unindexed,
    Disputed,
    /// Another content than the other repository has.
    Different,
    Open,
    /// Tails of two writers that cannot be compared.
    Torn,
    Damaged,
    /// The tails of it.
    DamagedTail,
}

fn states() -> impl Strategy<Value = Vec<State>> {
    use State::*;
    let state = prop_oneof![
        8 => Just(Sealed), 1 => Just(Absent), 1 => Just(Unproven), 1 => Just(Tailed), 1 => Just(Lost), 1 => Just(Cut),
        1 => Just(Repaired), 1 => Just(Unindexed), 1 => Just(Disputed), 1 => Just(Different), 1 => Just(Open),
        1 => Just(Torn), 1 => Just(Damaged), 1 => Just(DamagedTail),
    ];
    prop::collection::vec(state, SEGMENTS)
}

fn entry(number: u64, raw_crc32: u32, proof: Proof) -> IndexEntry {
    let (start_lsn, end_lsn) = (Lsn(number * MIB), Lsn((number + 1) * MIB));
    // Some have no commit of their own, some no commit at all before them.
    let time = at((number * 7 % 40) as i64);
    let summary = SegmentSummary {
        proof,
        record_count: number,
        last_commit: (!number.is_multiple_of(3)).then_some(Commit { xid: 9, lsn: start_lsn, time }),
        min_commit_time: (!number.is_multiple_of(4)).then_some(at(1)),
        max_commit_time: (!number.is_multiple_of(4)).then_some(time.max(at(1))),
        min_xid: (!number.is_multiple_of(5)).then_some(7),
        max_xid: (!number.is_multiple_of(5)).then_some(9),
        restore_points: (0..number % 3)
            .map(|n| RestorePoint { name: format!("p{number}-{n}"), lsn: start_lsn, time })
            .collect(),
        truncated: number.is_multiple_of(6),
        ..SegmentSummary::empty(None)
    };
    let (raw_bytes, stored_bytes) = (MIB, 3);
    let (raw_crc32, stored_crc32) = (Crc32(raw_crc32), Crc32(5));
    IndexEntry { segment: name(number), start_lsn, end_lsn, raw_bytes, raw_crc32, stored_bytes, stored_crc32, summary }
}

fn put(store: &MemoryStore, key: Key, body: &[u8]) {
    store.tamper(|objects| drop(objects.insert(key, Bytes::copy_from_slice(body))));
}

struct Made {
    store: MemoryStore,
    archive: Archive,
    random: u32,
}

impl Made {
    /// `merged`: one index object for neighbours, as a finished directory has it.
    fn new(states: &[State], merged: bool) -> Made {
        let store = MemoryStore::listing_deep();
        let archive = Archive::new(Arc::new(store.clone()), Lineage::new("main", SystemId(7), 1));
        let mut made = Made { store, archive, random: 0 };
        let file = LineageFile {
            schema: 1,
            system_id: SystemId(7),
            server_version: "18.1".into(),
            segment_size: size(),
            created: at(0),
            start_timeline: ONE,
            start_lsn: Some(Lsn((FIRST - 1) * MIB)),
            slot: None,
        };
        put(&made.store, made.archive.lineage.lineage_json(), &serde_json::to_vec(&file).unwrap());
        let mut entries: Vec<IndexEntry> = Vec::new();
        for (number, state) in (FIRST..).zip(states) {
            entries.extend(made.add(number, *state));
        }
        let mut groups: Vec<Vec<IndexEntry>> = Vec::new();
        for entry in entries {
            let follows = |group: &Vec<IndexEntry>| {
                let last = group.last().expect("no group is empty");
                last.end_lsn == entry.start_lsn && WalDirectory::of(last.segment) == WalDirectory::of(entry.segment)
            };
            match groups.last_mut() {
                Some(group) if merged && follows(group) => group.push(entry),
                _ => groups.push(vec![entry]),
            }
        }
        groups.into_iter().for_each(|group| made.index(group, 1));
        made
    }

    fn index(&mut self, entries: Vec<IndexEntry>, epoch: u32) {
        let (first, last) = (entries[0].segment, entries[entries.len() - 1].segment);
        let key = self.archive.lineage.index(IndexName { first, last, epoch: Epoch(epoch) });
        let file = IndexFile { schema: 1, segment_size: size(), entries };
        put(&self.store, key, &serde_json::to_vec(&file).unwrap());
    }

    fn tail(&self, number: u64, epoch: u32, from: u64, to: u64) -> Key {
        let (from, to) = (Lsn(number * MIB + from), Lsn(number * MIB + to));
        let last_commit = number.is_multiple_of(2).then(|| at(number as i64));
        let tail = TailName { epoch: Epoch(epoch), from, to, raw_crc32: epoch, last_commit, form: Form::Plain };
        let key = self.archive.lineage.tail(name(number), &tail);
        put(&self.store, key.clone(), b"x");
        key
    }

    fn fact(&mut self, fact: &LedgerFact) {
        self.random += 1;
        let key = self.archive.lineage.ledger_entry(fact.at, fact.kind.word(), self.random);
        put(&self.store, key, &serde_json::to_vec(fact).unwrap());
    }

    fn damaged(&mut self, key: &Key) {
        let object = self.archive.lineage.below(key).expect("it is below the lineage");
        self.fact(&LedgerFact::damaged(&[], at(9), object, "its CRC-32 is wrong"));
    }

    /// Returns the entry it has.
    fn add(&mut self, number: u64, state: State) -> Option<IndexEntry> {
        let lineage = self.archive.lineage.clone();
        let segment = lineage.segment(name(number), Form::Plain);
        let seal = |body: &[u8]| put(&self.store, segment.clone(), body);
        match state {
            State::Absent => return None,
            State::Sealed | State::Unproven => seal(b"abc"),
            State::Tailed => {
                seal(b"abc");
                self.tail(number, 1, 0, 100);
            }
            State::Lost => {}
            State::Cut => seal(b"ab"),
            State::Repaired => {
                seal(b"ab");
                put(&self.store, lineage.repair(name(number), 1, Form::Plain), b"abcd");
            }
            State::Unindexed => {
                seal(b"abc");
                return None;
            }
            State::Disputed => {
                seal(b"abc");
                self.index(vec![entry(number, 2, Proof::Proven)], 2);
            }
            State::Different => {
                seal(b"abc");
                return Some(entry(number, 3, Proof::Proven));
            }
            State::Open => {
                self.tail(number, 1, 0, 100 + number);
                self.tail(number, 1, 100 + number, MIB);
                return None;
            }
            State::Torn => {
                self.tail(number, 1, 0, 500);
                self.tail(number, 2, 200, 900);
                return None;
            }
            State::Damaged => {
                seal(b"abc");
                self.damaged(&segment);
            }
            State::DamagedTail => {
                self.tail(number, 1, 0, 100);
                let key = self.tail(number, 1, 100, 300);
                self.damaged(&key);
                return None;
            }
        }
        let proof = if matches!(state, State::Unproven) { Proof::Unproven } else { Proof::Proven };
        Some(entry(number, 1, proof))
    }

    fn expire(&mut self, first: u64, segments: u64) {
        let mut fact = LedgerFact::new(FactKind::Expired, at(5), "retention");
        fact.segments.push(SegmentRange { first: name(FIRST + first), last: name(FIRST + first + segments) });
        self.fact(&fact);
    }

    fn catalog(&self) -> Catalog {
        block_on(self.archive.load_catalog())
    }

    /// Whole, one directory after the other, as `verify` and writers read them.
    fn whole(&self) -> Vec<DirectoryContents> {
        let plain = Archive { backend: Arc::new(self.store.listing_plainly()), ..self.archive.clone() };
        let ledger = block_on(plain.ledger());
        let mut directories = block_on(plain.timeline(ONE, size()));
        directories.iter_mut().for_each(|contents| contents.mark(&Damages::of(&ledger)));
        directories
    }
}

fn block_on<T>(work: impl Future<Output = Result<T, CatalogError>>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(work).unwrap()
}

/// The pieces of several repositories, name by name.
fn together(copies: &[Vec<DirectoryContents>]) -> Vec<Piece> {
    let all: Vec<&DirectoryContents> = copies.iter().flatten().collect();
    let names: BTreeSet<SegmentName> =
        all.iter().flat_map(|it| it.entries.keys().chain(it.tails.keys()).chain(it.disputed.keys()).copied()).collect();
    let mut pieces = Vec::new();
    for name in names {
        let of: Vec<&&DirectoryContents> = all.iter().filter(|it| it.directory == WalDirectory::of(name)).collect();
        let crcs: BTreeSet<u32> =
            of.iter().filter_map(|it| it.entries.get(&name)).map(|entry| entry.raw_crc32.0).collect();
        if crcs.len() > 1 || of.iter().any(|it| it.disputed.contains_key(&name)) {
            continue;
        }
        if let Some(entry) = of.iter().find_map(|it| it.sealed(name)) {
            pieces.push(Piece {
                from: entry.start_lsn,
                to: entry.end_lsn,
                proof: entry.summary.proof,
                last_commit: entry.summary.last_commit.map(|commit| commit.time),
                source: Source::Sealed(name),
            });
            continue;
        }
        let chains: Vec<TailChain> = of.iter().map(|it| it.tail_chain(name)).collect();
        let begin = chains.iter().filter_map(|chain| chain.links.first()).map(|link| link.from).min();
        let joined = begin.and_then(|begin| tails::furthest(&chains, begin).into_iter().next());
        let Some((_, joined)) = joined else { continue };
        let beyond = chains.iter().flat_map(|chain| &chain.links).filter(|link| link.from > joined.end);
        pieces.extend(joined.links.iter().map(|(_, link)| link).chain(beyond).map(|link| Piece::tail(*link)));
    }
    pieces
}

/// Everything that is read from holdings, in one text.
fn told(held: &Holdings, cut: u64) -> String {
    let reach = Reach::new(held, &[]);
    let line = reach.line(ONE).expect("the archive starts there");
    let (from, to) = (Lsn((FIRST - 1) * MIB), Lsn(FIRST * MIB + cut));
    let blocks: Vec<_> =
        reach.blocks(&line, from, to).iter().map(|it| (it.from, it.to, it.is_cut, it.last_commit)).collect();
    let commits: Vec<_> = line.stretches.iter().map(|stretch| reach.last_commit(&line, stretch)).collect();
    let before = reach.last_commit_before(&line, from, to);
    let (runs, gaps) = (continuity::all_runs(held), continuity::gaps_of(held));
    format!("{runs:#?} {gaps:#?} {:#?} {blocks:#?} {commits:?} {before:?}", line.stretches)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    #[test]
    fn digests_tell_what_whole_directories_do(
        one in states(), other in states(), merged: bool, cut in 0..SEGMENTS as u64 * MIB,
        expired in prop::option::of((0..12u64, 0..4u64)),
    ) {
        let mut made = [Made::new(&one, merged), Made::new(&other, !merged)];
        if let Some((first, segments)) = expired {
            made[0].expire(first, segments);
        }
        let (catalogs, whole) = (made.each_ref().map(Made::catalog), made.each_ref().map(Made::whole));
        for (catalog, whole) in catalogs.iter().zip(&whole) {
            let pieces: Vec<Piece> = whole.iter().flat_map(DirectoryContents::pieces).collect();
            prop_assert_eq!(catalog.pieces(ONE), pieces);
            let digests: Vec<DirectoryDigest> = catalog.of_timeline(ONE).cloned().collect();
            let of_whole: Vec<DirectoryDigest> = whole.iter().cloned().map(DirectoryDigest::of).collect();
            prop_assert_eq!(digests, of_whole, "an entry says the same whole and in part");
        }
        for chosen in [vec![0], vec![1], vec![0, 1], vec![1, 0]] {
            let held = Holdings::union(&chosen.iter().map(|&at| &catalogs[at]).collect::<Vec<_>>()).unwrap();
            let pieces = together(&chosen.iter().map(|&at| whole[at].clone()).collect::<Vec<_>>());
            prop_assert_eq!(&held.pieces(ONE).collect::<Vec<_>>(), &pieces);
            // As if no two segments followed one another.
            let single = pieces.into_iter().map(Part::Piece).collect();
            let apart = Holdings { parts: BTreeMap::from([(ONE, single)]), ..held.clone() };
            prop_assert_eq!(told(&held, cut), told(&apart, cut));
        }
        // A plain store shows the same.
        let plain = Archive { backend: Arc::new(made[0].store.listing_plainly()), ..made[0].archive.clone() };
        prop_assert_eq!(&block_on(plain.load_catalog()).timelines, &catalogs[0].timelines);
        // Whole entries of what happened are those the digests point at.
        for digest in catalogs[0].of_timeline(ONE) {
            let entries = block_on(made[0].archive.entries(digest, Digest::has_events));
            let names: Vec<SegmentName> = entries.iter().map(|entry| entry.segment).collect();
            let contents = whole[0].iter().find(|contents| contents.directory == digest.directory).unwrap();
            let eventful = |entry: &&IndexEntry| entry.summary.truncated || !entry.summary.restore_points.is_empty();
            let sealed = contents.entries.values().filter(|entry| contents.sealed(entry.segment).is_some());
            prop_assert_eq!(names, sealed.filter(eventful).map(|entry| entry.segment).collect::<Vec<_>>());
        }
    }
}

#[test]
fn directories_are_listed_in_groups_of_one_timeline() {
    let directory = |timeline, high| WalDirectory { timeline: TimelineId(timeline), high };
    let all: Vec<WalDirectory> = (0..40).map(|high| directory(1, high)).chain([directory(2, 39)]).collect();
    let lengths = |size: SegmentSize| groups(all.clone(), size).iter().map(Vec::len).collect::<Vec<_>>();
    assert_eq!(lengths(SegmentSize::MIB_16), [32, 8, 1]);
    assert_eq!(lengths(SegmentSize::new(1 << 30).unwrap()), [40, 1]);
    assert_eq!(lengths(size())[..2], [2, 2]);
}

#[test]
fn an_index_object_that_vanishes_after_a_deep_listing_is_listed_anew() {
    let made = Made::new(&[State::Sealed; 3], false);
    let listed = block_on(made.archive.listed(vec![WalDirectory::of(name(FIRST))], size()));
    let (directory, listed) = listed.into_iter().next().unwrap();
    // Meanwhile they are merged.
    made.store.tamper(|objects| objects.retain(|key, _| !key.as_str().ends_with(".index.json")));
    let mut made = made;
    made.index((FIRST..FIRST + 3).map(|number| entry(number, 1, Proof::Proven)).collect(), 2);
    let contents = block_on(made.archive.directory_digest(directory, size(), listed));
    assert_eq!(DirectoryDigest::of(contents).sealed.len(), 3);
}

#[test]
fn a_segment_sealed_between_two_pages_is_looked_at_again() {
    let mut made = Made::new(&[State::Sealed, State::Unindexed], false);
    let listed = block_on(made.archive.listed(vec![WalDirectory::of(name(FIRST))], size()));
    let (directory, listed) = listed.into_iter().next().unwrap();
    // Its entry came after the page it would stand on.
    made.index(vec![entry(FIRST + 1, 1, Proof::Proven)], 1);
    let contents = block_on(made.archive.directory_digest(directory, size(), listed));
    assert_eq!(DirectoryDigest::of(contents).sealed.len(), 2);
}

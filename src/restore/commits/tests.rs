//! Lists of commits against all commits there are, whatever lies in which segment. The WAL is told by a table, as
//! reading it would tell it; what one reading finds is tested with the scanner (`wal/tests.rs`).

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use futures_util::FutureExt;
use proptest::prelude::*;

use super::*;
use crate::catalog::contents::{Catalog, DirectoryContents, SegmentObject};
use crate::catalog::{Crc32, DirectoryDigest, Holdings, IndexEntry, LineageFile};
use crate::codec::Form;
use crate::repository::layout::{Lineage, WalDirectory};
use crate::restore::search::SearchError;
use crate::wal::{FoundKind, History, SegmentName, SegmentNumber, SegmentSize, SegmentSummary, SystemId};

const MIB: u64 = 1 << 20;
const ONE: TimelineId = TimelineId(1);

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_790_000_000 + second).unwrap()
}

/// Segments of 1 MiB; commits by position in KiB, with their seconds.
struct Wal {
    commits: Vec<Found>,
    reads: AtomicUsize,
}

#[async_trait]
impl Search for Wal {
    async fn find(
        &self,
        _path: &History,
        range: Range<Lsn>,
        readable: Lsn,
        sought: Sought,
    ) -> Result<Vec<Found>, SearchError> {
        assert!(range.start < range.end && range.end <= readable);
        self.reads.fetch_add(1, Ordering::Relaxed);
        let inside: Vec<Found> = self.commits.iter().filter(|it| range.contains(&it.lsn)).copied().collect();
        Ok(match sought {
            Sought::CommitsAround { place, before, after } => {
                let first = inside.iter().position(|it| place.begins_with(it)).unwrap_or(inside.len());
                let (earlier, later) = inside.split_at(first);
                let earlier = &earlier[earlier.len().saturating_sub(before)..];
                earlier.iter().chain(later.iter().take(after)).copied().collect()
            }
            Sought::CommitsBetween { since, until, count } => {
                let is_between = |it: &&Found| {
                    since.is_none_or(|t| t <= it.time.unwrap()) && until.is_none_or(|t| it.time.unwrap() <= t)
                };
                inside.iter().filter(is_between).take(count).copied().collect()
            }
            Sought::EndOf { xid } => inside.into_iter().filter(|it| it.xid == Some(xid)).collect(),
            other => unreachable!("{other:?}"),
        })
    }
}

impl Wal {
    fn new(raw: &BTreeMap<u64, i64>) -> Wal {
        let commit = |(index, (kib, second)): (usize, (&u64, &i64))| Found {
            lsn: Lsn(kib << 10),
            kind: FoundKind::Commit,
            xid: Some(700 + index as u32),
            time: Some(at(*second)),
        };
        Wal { commits: raw.iter().enumerate().map(commit).collect(), reads: AtomicUsize::new(0) }
    }

    /// Sealed and indexed, all segments but those left out.
    fn catalog(&self, segments: Range<u64>, left_out: &[u64]) -> Catalog {
        let size = SegmentSize::new(MIB).unwrap();
        let mut contents =
            DirectoryContents::<IndexEntry>::new(WalDirectory::of(SegmentName::new(ONE, SegmentNumber(0), size)), size);
        for number in segments.filter(|number| !left_out.contains(number)) {
            let segment = SegmentName::new(ONE, SegmentNumber(number), size);
            let span = Lsn(number * MIB)..Lsn((number + 1) * MIB);
            let inside = || self.commits.iter().filter(|it| span.contains(&it.lsn));
            let times = || inside().filter_map(|it| it.time);
            let summary = SegmentSummary {
                min_commit_time: times().min(),
                max_commit_time: times().max(),
                min_xid: inside().filter_map(|it| it.xid).min(),
                max_xid: inside().filter_map(|it| it.xid).max(),
                ..SegmentSummary::empty(None)
            };
            let (raw_bytes, stored_bytes) = (MIB, 9);
            let (start_lsn, end_lsn, raw_crc32, stored_crc32) = (span.start, span.end, Crc32(1), Crc32(2));
            let entry =
                IndexEntry { segment, start_lsn, end_lsn, raw_bytes, raw_crc32, stored_bytes, stored_crc32, summary };
            contents.segments.insert(segment, vec![SegmentObject { form: Form::Plain, stored_bytes }]);
            contents.add_entry(entry);
        }
        let system_id = SystemId(7);
        Catalog {
            lineage: Lineage::new("main", system_id, 1),
            file: LineageFile {
                schema: 1,
                system_id,
                server_version: "18.1".into(),
                segment_size: size,
                created: at(0),
                start_timeline: ONE,
                start_lsn: None,
                slot: None,
            },
            histories: BTreeMap::new(),
            timelines: BTreeMap::from([(ONE, vec![Arc::new(DirectoryDigest::of(contents))])]),
            ledger: Vec::new(),
        }
    }

    /// Positions in KiB, and how many reads it took.
    fn ask<'w>(
        &'w self,
        catalog: &Catalog,
        question: impl for<'a> FnOnce(Looking<'a>) -> futures_util::future::BoxFuture<'a, Commits>,
    ) -> (Vec<u64>, Commits, usize) {
        let held = Holdings::of(catalog);
        let reach = Reach::new(&held, &[]);
        let line = reach.line(ONE).unwrap();
        self.reads.store(0, Ordering::Relaxed);
        let looking = Looking { reach: &reach, search: self, line: &line };
        let commits = question(looking).now_or_never().expect("it never waits");
        let places = commits.found.iter().map(|(_, commit)| commit.lsn.0 >> 10).collect();
        (places, commits, self.reads.load(Ordering::Relaxed))
    }
}

fn around(wal: &Wal, catalog: &Catalog, place: Place, count: usize) -> (Vec<u64>, usize) {
    let (places, commits, reads) =
        wal.ask(catalog, |looking| Box::pin(async move { looking.around(place, count).await }));
    assert_eq!(commits.unread, Vec::<String>::new());
    (places, reads)
}

#[test]
fn only_the_segments_that_hold_the_answer_are_read() {
    // Ten commits in each segment, a second apart.
    let raw = (0..1000).map(|n| (n * 100, n as i64)).collect();
    let wal = Wal::new(&raw);
    let catalog = wal.catalog(0..98, &[]);
    let (places, reads) = around(&wal, &catalog, Place::After(at(504)), 3);
    assert_eq!((places, reads), (vec![50200, 50300, 50400, 50500, 50600, 50700], 1));
    let (places, reads) = around(&wal, &catalog, Place::Lsn(Lsn(99 << 20)), 2);
    assert_eq!((places, reads), (vec![99_800, 99_900], 1), "behind everything");
    let (places, commits, reads) = wal.ask(&catalog, |looking| Box::pin(async move { looking.ends_of(1204).await }));
    assert_eq!((places, reads, commits.found[0].0), (vec![50400], 1, ONE));
}

#[test]
fn what_is_beyond_the_bound_is_said() {
    let raw = (0..300).map(|n| (n * 1024, n as i64)).collect();
    let wal = Wal::new(&raw);
    let catalog = wal.catalog(0..300, &[]);
    let (places, commits, reads) =
        wal.ask(&catalog, |looking| Box::pin(async move { looking.around(Place::Lsn(Lsn(0)), 1000).await }));
    assert_eq!((places.len(), reads, commits.unread.len()), (READS_MAX, READS_MAX, 1));
    let (places, commits, _) =
        wal.ask(&catalog, |looking| Box::pin(async move { looking.between(None, None, 1000).await }));
    assert_eq!((places.len(), commits.unread.len(), commits.more), (READS_MAX, 1, false), "{commits:?}");
}

proptest! {
    #[test]
    fn lists_are_those_of_all_commits_there_are(
        raw in prop::collection::btree_map(0u64..20 * 1024, 0i64..100, 0..60),
        left_out in prop::collection::vec(0u64..20, 0..3),
        pivot in 0i64..100,
        lsn in 0u64..20 * 1024,
        count in 1usize..12,
    ) {
        let wal = Wal::new(&raw);
        let catalog = wal.catalog(0..20, &left_out);
        let there: Vec<(u64, i64)> =
            raw.iter().filter(|(kib, _)| !left_out.contains(&(**kib >> 10))).map(|(kib, second)| (*kib, *second)).collect();
        let expected = |first: usize| -> Vec<u64> {
            let (earlier, later) = there.split_at(first);
            let earlier = &earlier[earlier.len().saturating_sub(count)..];
            earlier.iter().chain(later.iter().take(count)).map(|(kib, _)| *kib).collect()
        };
        let by_time = there.iter().position(|(_, second)| *second > pivot).unwrap_or(there.len());
        prop_assert_eq!(around(&wal, &catalog, Place::After(at(pivot)), count).0, expected(by_time));
        let by_lsn = there.iter().position(|(kib, _)| *kib >= lsn).unwrap_or(there.len());
        prop_assert_eq!(around(&wal, &catalog, Place::Lsn(Lsn(lsn << 10)), count).0, expected(by_lsn));
        let until = pivot + 20;
        let (places, commits, _) = wal.ask(&catalog, |looking| {
            Box::pin(async move { looking.between(Some(at(pivot)), Some(at(until)), count).await })
        });
        let inside: Vec<u64> =
            there.iter().filter(|(_, second)| (pivot..=until).contains(second)).map(|(kib, _)| *kib).collect();
        prop_assert_eq!(commits.more, inside.len() > count);
        prop_assert_eq!(places, inside.into_iter().take(count).collect::<Vec<_>>());
        let names: BTreeSet<u32> = commits.found.iter().filter_map(|(_, commit)| commit.xid).collect();
        for xid in names {
            let (_, ends, _) = wal.ask(&catalog, |looking| Box::pin(async move { looking.ends_of(xid).await }));
            prop_assert_eq!(ends.found.len(), 1);
        }
    }
}

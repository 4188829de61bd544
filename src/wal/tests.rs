//! The scanner against generated WAL of every version, against damage, and (on demand) against a real server's.

use std::ops::Range;

use jiff::Timestamp;
use proptest::prelude::*;

use super::*;
use crate::testkit::wal_writer::WalWriter;

const SYSTEM: SystemId = SystemId(7_123_456_789_012_345_678);
const MIB: u64 = 1 << 20;

fn time(second: i64) -> Timestamp {
    Timestamp::from_second(1_700_000_000 + second).unwrap()
}

fn size(mib: u64) -> SegmentSize {
    SegmentSize::new(mib * MIB).unwrap()
}

fn writer(version: u32) -> WalWriter {
    writer_at(version, 1, Lsn(MIB))
}

fn writer_at(version: u32, mib: u64, start: Lsn) -> WalWriter {
    WalWriter::new(version, SYSTEM, size(mib), TimelineId(1), start)
}

fn options(wal: &WalWriter) -> ScanOptions {
    ScanOptions { system_id: SYSTEM, segment_size: wal.segment_size(), history: wal.history() }
}

fn scanner(wal: &WalWriter) -> Scanner {
    Scanner::new(options(wal), wal.start(), Carry::default())
}

fn all(wal: &WalWriter) -> &[u8] {
    wal.bytes(wal.start()..wal.flush_lsn())
}

fn drain(scanner: &mut Scanner) -> Vec<(SegmentNumber, SegmentSummary)> {
    std::iter::from_fn(|| scanner.poll_segment()).collect()
}

/// Feeds a whole WAL and requires that all of it proves.
fn prove(wal: &WalWriter) -> (Scanner, Vec<(SegmentNumber, SegmentSummary)>) {
    let mut scanner = scanner(wal);
    scanner.feed(wal.start(), all(wal)).unwrap();
    assert_eq!(scanner.proven(), wal.flush_lsn());
    assert_eq!(scanner.proof(), Proof::Proven);
    let segments = drain(&mut scanner);
    (scanner, segments)
}

fn fault_of(wal: &WalWriter, bytes: &[u8]) -> ScanError {
    scanner(wal).feed(wal.start(), bytes).unwrap_err()
}

/// A bit of everything, over several segments of 1 MiB, seen by a deterministic pattern of lengths.
fn mixed(version: u32, start: Lsn) -> WalWriter {
    let mut wal = writer_at(version, 1, start);
    for round in 0..3u32 {
        for step in 0..700u32 {
            let xid = 1000 + round * 1000 + step;
            let data = vec![step as u8; (step as usize * 37) % 611];
            wal.insert_block(xid, (1663, 5, 16384), step, &data, &[1, 2, 3]);
            wal.commit(xid, time(i64::from(round * 1000 + 700 - step)));
        }
        wal.insert(7, &vec![round as u8; 20_000]);
        wal.restore_point(&format!("round {round}"), time(i64::from(round)));
        wal.truncate_relation(8, (1663, 5, 20000 + round));
        wal.commit_dropping(9, time(0), &[(1663, 5, 16384), (1663, 5, 16385)]);
        wal.commit_prepared(4711, time(1));
        wal.abort(10, time(2));
        wal.switch();
        wal.insert(11, &vec![7; 2_500_000]);
        wal.commit(11, time(3));
    }
    wal
}

// ---- what proves ----

#[test]
fn wal_of_every_version_proves() {
    for version in 13..=19 {
        let wal = mixed(version, Lsn(MIB));
        let (scanner, segments) = prove(&wal);
        assert_eq!(scanner.magic().and_then(PageMagic::version), Some(version));
        let (xid, lsn, _, time) = *wal.commits().last().unwrap();
        assert_eq!(scanner.last_commit(), Some(Commit { xid, lsn, time }));
        assert_eq!(segments.first().unwrap().0, SegmentNumber(1));
        assert!(segments.windows(2).all(|pair| pair[1].0 == pair[0].0.next()));
    }
}

#[test]
fn a_summary_says_what_starts_in_its_segment() {
    let wal = mixed(15, Lsn(MIB));
    let (_, segments) = prove(&wal);
    for (number, summary) in &segments {
        let holds: Range<Lsn> = wal.segment_size().start_of(*number)..wal.segment_size().end_of(*number);
        let starts: Vec<Lsn> = wal.record_starts().iter().copied().filter(|lsn| holds.contains(lsn)).collect();
        let commits: Vec<_> = wal.commits().iter().filter(|(_, lsn, _, _)| holds.contains(lsn)).collect();
        assert_eq!(summary.record_count, starts.len() as u64, "{number:?}");
        assert_eq!(summary.last_record, wal.record_starts().iter().copied().rfind(|lsn| *lsn < holds.end));
        assert_eq!(summary.record_end, wal.record_ends().iter().copied().rfind(|lsn| *lsn <= holds.end));
        assert_eq!(summary.min_commit_time, commits.iter().map(|commit| commit.3).min());
        assert_eq!(summary.max_commit_time, commits.iter().map(|commit| commit.3).max());
        assert_eq!(summary.min_xid, commits.iter().map(|commit| commit.0).min());
        assert_eq!(summary.max_xid, commits.iter().map(|commit| commit.0).max());
        let last = commits.last().map(|(xid, lsn, _, time)| Commit { xid: *xid, lsn: *lsn, time: *time });
        assert_eq!(summary.last_commit, last);
    }
    let names: Vec<String> = segments.iter().flat_map(|(_, s)| &s.restore_points).map(|p| p.name.clone()).collect();
    assert_eq!(names, ["round 0", "round 1", "round 2"]);
    let drops: Vec<_> = segments.iter().flat_map(|(_, s)| &s.drops).collect();
    assert_eq!((drops.len(), drops[0].xid, drops[0].time), (3, 9, Some(time(0))));
    assert_eq!(drops[0].relations, ["1663/5/16384", "1663/5/16385"]);
    let truncations: Vec<_> = segments.iter().flat_map(|(_, s)| &s.truncations).collect();
    assert_eq!(truncations[1].relations, ["1663/5/20001"]);
    assert!(segments.iter().any(|(_, s)| s.max_xid == Some(4711)));
}

#[test]
fn commits_are_listed_around_a_place_and_between_times() {
    let wal = mixed(18, Lsn(MIB));
    let listed = |sought: Sought| {
        let mut scanner = scanner(&wal).seeking(sought);
        scanner.feed(wal.start(), all(&wal)).unwrap();
        let found: Vec<Lsn> =
            scanner.found().filter(|found| found.kind == FoundKind::Commit).map(|it| it.lsn).collect();
        assert_eq!(found.len(), scanner.found().count(), "commits only");
        (found, scanner.found_all_wanted())
    };
    let commits: Vec<(Lsn, Timestamp)> = wal.commits().iter().map(|(_, lsn, _, time)| (*lsn, *time)).collect();
    let lsns = |range: Range<usize>| commits[range].iter().map(|(lsn, _)| *lsn).collect::<Vec<_>>();
    let around = |place: Place, before: usize, after: usize| listed(Sought::CommitsAround { place, before, after });
    let middle = commits.len() / 2;
    assert_eq!(around(Place::Lsn(commits[middle].0), 20, 30), (lsns(middle - 20..middle + 30), true));
    assert_eq!(around(Place::Lsn(commits[middle].0 + 1), 2, 1), (lsns(middle - 1..middle + 2), true));
    assert_eq!(around(Place::Lsn(Lsn::MAX), 3, 1), (lsns(commits.len() - 3..commits.len()), false));
    // Times are not in the order of positions: the first one past the time divides.
    let second = commits.iter().position(|(_, at)| *at > time(1000)).unwrap();
    assert_eq!(around(Place::After(time(1000)), 5, 5), (lsns(second - 5..second + 5), true));
    let (since, until) = (Some(time(1100)), Some(time(1200)));
    let inside: Vec<Lsn> =
        commits.iter().filter(|(_, at)| (time(1100)..=time(1200)).contains(at)).map(|(lsn, _)| *lsn).collect();
    assert_eq!(inside.len(), 101);
    assert_eq!(listed(Sought::CommitsBetween { since, until, count: 1000 }), (inside.clone(), false));
    assert_eq!(listed(Sought::CommitsBetween { since, until, count: 40 }), (inside[..40].to_vec(), true));
}

#[test]
fn long_lists_are_cut() {
    let mut wal = writer(18);
    let relations: Vec<_> = (0..150).map(|number| (1663, 5, number)).collect();
    wal.commit_dropping(1, time(0), &relations);
    for xid in 2..200 {
        wal.commit_dropping(xid, time(0), &relations[..1]);
    }
    wal.switch();
    let (_, segments) = prove(&wal);
    let summary = &segments[0].1;
    assert!(summary.truncated);
    assert_eq!((summary.drops.len(), summary.drops[0].relations.len()), (100, 100));
    assert_eq!(summary.max_xid, Some(199));
}

#[test]
fn one_byte_at_a_time_is_like_the_whole() {
    let mut wal = writer(17);
    wal.insert(1, &[1; 300]);
    wal.commit(1, time(1));
    wal.insert(2, &vec![2; 30_000]);
    wal.switch();
    wal.insert(3, &[3; 9000]);
    let (whole, segments) = prove(&wal);
    let mut single = scanner(&wal);
    let mut ends = vec![];
    for (at, byte) in all(&wal).iter().enumerate() {
        let lsn = wal.start() + at as u64;
        single.feed(lsn, &[*byte]).unwrap();
        assert_eq!(single.position(), lsn + 1);
        assert!(single.proven() <= single.position());
        if ends.last() != Some(&single.proven()) {
            ends.push(single.proven());
        }
    }
    // Proven moves from record end to record end; after the switch first to its end, then over the zeros.
    let mut expected = vec![wal.start()];
    expected.extend(wal.record_ends());
    let switch = *wal.record_starts().iter().rev().nth(1).unwrap();
    expected.insert(expected.len() - 2, (switch + 24).align8());
    assert_eq!(ends, expected);
    assert_eq!(drain(&mut single), segments);
    assert_eq!(single.last_commit(), whole.last_commit());
}

#[test]
fn a_header_may_straddle_a_page() {
    for room in (8..=80).step_by(8) {
        let mut wal = writer(16);
        let to_page_end = 8192 - 40 - room;
        wal.noop(to_page_end);
        let start = wal.flush_lsn();
        wal.commit(5, time(5));
        wal.noop(8192 * 2);
        assert_eq!(start.0 % 8192, 8192 - room as u64);
        let (scanner, _) = prove(&wal);
        assert_eq!(scanner.last_commit(), Some(Commit { xid: 5, lsn: start, time: time(5) }));
    }
}

#[test]
fn a_record_that_ends_with_its_page_proves_up_to_the_boundary() {
    let mut wal = writer(18);
    wal.noop(8192 - 40);
    let (scanner, _) = prove(&wal);
    assert_eq!(scanner.proven(), Lsn(MIB + 8192));
}

#[test]
fn a_record_that_ends_with_its_segment_proves_it() {
    let mut wal = writer(18);
    wal.noop(1 << 19);
    let rest = wal.segment_size().end_of(SegmentNumber(1)) - wal.flush_lsn();
    let page_headers = (rest - 1) / 8192 * 24;
    wal.noop((rest - page_headers) as usize);
    let (scanner, segments) = prove(&wal);
    assert_eq!(scanner.proven(), Lsn(2 * MIB));
    assert_eq!(segments.len(), 1);
    assert_eq!(segments[0].1.carry.pending, None);
    let mut next = Scanner::new(options(&wal), Lsn(2 * MIB), segments[0].1.carry.clone());
    wal.noop(100);
    next.feed(Lsn(2 * MIB), wal.bytes(Lsn(2 * MIB)..wal.flush_lsn())).unwrap();
    assert_eq!(next.proven(), wal.flush_lsn());
}

#[test]
fn a_switch_may_lie_anywhere() {
    // At the very end of a segment, cut by a page, cut by the segment end (then the whole next segment is zeros).
    for before_end in (8..=64).step_by(8) {
        let mut wal = writer(14);
        wal.noop(1 << 19);
        let rest = Lsn(2 * MIB) - wal.flush_lsn() - before_end;
        wal.noop((rest - (rest + before_end - 1) / 8192 * 24) as usize);
        assert_eq!(wal.flush_lsn(), Lsn(2 * MIB - before_end));
        wal.switch();
        assert_eq!(wal.flush_lsn(), Lsn(if before_end >= 24 { 2 * MIB } else { 3 * MIB }));
        wal.commit(3, time(3));
        let (scanner, segments) = prove(&wal);
        assert_eq!(segments.len(), if before_end >= 24 { 1 } else { 2 });
        assert!(scanner.last_commit().is_some());
    }
}

#[test]
fn segments_of_16_mib_and_the_4_gib_boundary() {
    let mut wal = writer_at(18, 16, Lsn(0xFF00_0000));
    wal.insert(1, &vec![1; 15 << 20]);
    wal.insert(2, &vec![2; 3 << 20]);
    wal.commit(2, time(2));
    assert!(wal.flush_lsn() > Lsn(1 << 32));
    let (_, segments) = prove(&wal);
    assert_eq!(segments.len(), 1);
    assert_eq!(segments[0].0, SegmentNumber(255));
    assert_eq!(segments[0].1.record_count, 2);
}

#[test]
fn an_overwritten_record_is_passed() {
    for version in 13..=19 {
        for payload in [9000, 50_000, 3_000_000] {
            let mut wal = writer(version);
            wal.insert(1, &[1; 100]);
            wal.insert(2, &vec![2; payload]);
            wal.overwrite_contrecord(time(0));
            wal.commit(3, time(3));
            wal.insert(4, &vec![4; 2_000_000]);
            let (_, segments) = prove(&wal);
            let counted: u64 = segments.iter().map(|(_, summary)| summary.record_count).sum();
            assert_eq!(counted, wal.record_starts().len() as u64);
            rescan_from_every_segment(&wal, &segments);
        }
    }
}

#[test]
fn a_child_timeline_continues_its_parent() {
    let mut parent = mixed(15, Lsn(MIB));
    let at = parent.record_ends()[1500];
    let mut scanner_of_parent = scanner(&parent);
    scanner_of_parent.feed(parent.start(), parent.bytes(parent.start()..at)).unwrap();
    let mut child = parent.fork(at, TimelineId(3));
    child.end_of_recovery(time(0));
    child.insert(1, &vec![1; 3_000_000]);
    child.commit(1, time(1));
    let carry = scanner_of_parent.carry_at_segment_start();
    let mut scanner = Scanner::new(options(&child), child.start(), carry.clone());
    scanner.feed(child.start(), all(&child)).unwrap();
    assert_eq!((scanner.proven(), scanner.timeline()), (child.flush_lsn(), TimelineId(3)));

    // The parent's WAL beyond the fork is not the child's.
    parent.insert(1, &vec![1; 3_000_000]);
    let mut scanner = Scanner::new(options(&child), child.start(), carry);
    let error = scanner.feed(child.start(), parent.bytes(child.start()..parent.flush_lsn())).unwrap_err();
    assert_eq!(error.class(), FaultClass::Identity);
    assert!(matches!(error.fault, ScanFault::Timeline { found: TimelineId(1), .. }), "{error}");
}

#[test]
fn timelines_never_go_back() {
    let mut parent = writer(18);
    parent.insert(1, &[1; 5000]);
    let child = parent.fork(parent.flush_lsn(), TimelineId(2));
    let mut grandchild = child.fork(child.flush_lsn(), TimelineId(5));
    grandchild.insert(1, &vec![1; 30_000]);
    prove(&grandchild);
}

// ---- starting and restarting ----

fn rescan_from_every_segment(wal: &WalWriter, segments: &[(SegmentNumber, SegmentSummary)]) {
    for (index, (number, summary)) in segments.iter().enumerate() {
        let json = serde_json::to_string(&summary.carry).unwrap();
        let carry: Carry = serde_json::from_str(&json).unwrap();
        let start = wal.segment_size().end_of(*number);
        let mut fresh = Scanner::new(options(wal), start, carry.clone());
        assert_eq!(fresh.carry_at_segment_start(), carry);
        fresh.feed(start, wal.bytes(start..wal.flush_lsn())).unwrap_or_else(|error| panic!("{start}: {error}"));
        assert_eq!(drain(&mut fresh), segments[index + 1..], "{number:?} {json}");
    }
}

#[test]
fn a_scan_goes_on_from_every_segment() {
    for version in [13, 15, 18, 19] {
        let wal = mixed(version, Lsn(0xFFE0_0000));
        let (_, segments) = prove(&wal);
        assert!(segments.iter().any(|(_, summary)| summary.carry.pending.is_some()));
        rescan_from_every_segment(&wal, &segments);
    }
}

#[test]
fn a_carry_that_cuts_a_record_header_goes_on() {
    for before_end in [8, 16, 24, 32] {
        let mut wal = writer(15);
        wal.noop(1 << 19);
        let rest = Lsn(2 * MIB) - wal.flush_lsn() - before_end;
        wal.noop((rest - (rest + before_end - 1) / 8192 * 24) as usize);
        wal.commit_dropping(3, time(3), &[(1, 2, 3)]);
        wal.commit(4, time(4));
        wal.switch();
        let (_, segments) = prove(&wal);
        assert_eq!(segments[0].1.carry.pending.as_ref().map(|p| u64::from(p.received)), Some(before_end));
        assert_eq!(segments[0].1.drops.len(), 1);
        rescan_from_every_segment(&wal, &segments);
    }
}

#[test]
fn a_carry_is_small_json() {
    let wal = mixed(15, Lsn(MIB));
    let (_, segments) = prove(&wal);
    for (_, summary) in segments {
        assert!(serde_json::to_string(&summary.carry).unwrap().len() < 300);
    }
    assert_eq!(serde_json::to_string(&Carry::default()).unwrap(), "{}");
}

#[test]
fn a_start_without_knowledge_skips_the_record_before_it() {
    let wal = mixed(16, Lsn(MIB));
    let (_, segments) = prove(&wal);
    for (number, _) in &segments {
        let start = wal.segment_size().end_of(*number);
        let mut fresh = Scanner::new(options(&wal), start, Carry::default());
        let first = wal.record_starts().iter().position(|lsn| *lsn > start).unwrap();
        let first_end = wal.record_ends()[first];
        for (at, chunk) in wal.bytes(start..wal.flush_lsn()).chunks(1000).enumerate() {
            fresh.feed(start + at as u64 * 1000, chunk).unwrap();
            assert!(fresh.proven() == start || fresh.proven() >= first_end);
        }
        assert_eq!(fresh.proven(), wal.flush_lsn());
        let seen = drain(&mut fresh);
        let expected: Vec<_> = segments.iter().filter(|(other, _)| other > number).collect();
        assert_eq!(seen.len(), expected.len());
        for ((_, seen), (_, expected)) in seen.iter().zip(expected) {
            assert_eq!(seen.record_count, expected.record_count);
            assert_eq!(seen.last_commit, expected.last_commit);
        }
    }
}

#[test]
fn a_segment_inside_an_unseen_record_is_passed_at_its_end() {
    let mut wal = writer(18);
    wal.insert(1, &vec![1; 4_000_000]);
    let mut fresh = Scanner::new(options(&wal), Lsn(2 * MIB), Carry::default());
    fresh.feed(Lsn(2 * MIB), wal.bytes(Lsn(2 * MIB)..Lsn(3 * MIB))).unwrap();
    let (number, summary) = fresh.poll_segment().unwrap();
    assert_eq!((number, summary.record_count, fresh.proven()), (SegmentNumber(2), 0, Lsn(2 * MIB)));
    assert_eq!(fresh.poll_segment(), None);
}

#[test]
fn a_forged_carry_never_panics() {
    let wal = mixed(15, Lsn(MIB));
    let (_, segments) = prove(&wal);
    let (number, summary) = segments.iter().find(|(_, summary)| summary.carry.pending.is_some()).unwrap();
    let start = wal.segment_size().end_of(*number);
    let good = summary.carry.pending.clone().unwrap();
    for pending in [
        PendingRecord { total: 0, ..good.clone() },
        PendingRecord { total: u32::MAX, ..good.clone() },
        PendingRecord { received: u32::MAX, ..good.clone() },
        PendingRecord { received: 0, ..good.clone() },
        PendingRecord { header: vec![], ..good.clone() },
        PendingRecord { header: vec![0; 100], ..good.clone() },
        PendingRecord { lsn: Lsn::MAX, ..good.clone() },
    ] {
        let carry = Carry { pending: Some(pending), ..summary.carry.clone() };
        let mut fresh = Scanner::new(options(&wal), start, carry);
        let _ = fresh.feed(start, wal.bytes(start..wal.flush_lsn()));
    }
}

// ---- what does not prove ----

#[test]
fn a_hole_in_the_stream_is_our_fault_and_sticks() {
    let mut wal = writer(18);
    wal.insert(1, &[1; 100]);
    let mut scanner = scanner(&wal);
    scanner.feed(wal.start(), wal.bytes(wal.start()..wal.start() + 50)).unwrap();
    let error = scanner.feed(wal.start() + 60, &[1]).unwrap_err();
    assert_eq!(error.class(), FaultClass::Discontinuity);
    assert_eq!(scanner.feed(wal.start() + 50, &[1]), Err(error));
}

#[test]
fn another_server_is_told_apart_from_damage() {
    let mut wal = writer(18);
    wal.insert(1, &vec![1; 20_000]);
    let other = ScanOptions { system_id: SystemId(1), ..options(&wal) };
    let error = Scanner::new(other, wal.start(), Carry::default()).feed(wal.start(), all(&wal)).unwrap_err();
    assert_eq!(error.class(), FaultClass::Identity);
    assert_eq!(
        error.to_string(),
        "WAL does not prove at 0/00100000: system identifier is 7123456789012345678, expected 1"
    );
    let other = ScanOptions { segment_size: size(2), ..options(&wal) };
    let error = Scanner::new(other, Lsn(2 * MIB), Carry::default()).feed(Lsn(2 * MIB), all(&wal)).unwrap_err();
    assert_eq!(error.class(), FaultClass::Identity);
    let mut blocks = all(&wal).to_vec();
    blocks[36..40].copy_from_slice(&32768u32.to_le_bytes());
    assert_eq!(fault_of(&wal, &blocks).fault, ScanFault::BlockSize { found: 32768 });
    let mut swapped = all(&wal).to_vec();
    swapped.swap(0, 1);
    assert_eq!(fault_of(&wal, &swapped).fault, ScanFault::ByteOrder(PageMagic(0x18D1)));
}

#[test]
fn an_unknown_magic_is_passed_on_unproven() {
    let mut wal = writer(18);
    wal.insert(1, &vec![1; 2_500_000]);
    let mut bytes = all(&wal).to_vec();
    bytes[0..2].copy_from_slice(&0xD122u16.to_le_bytes());
    let mut scanner = scanner(&wal);
    for (at, chunk) in bytes.chunks(7777).enumerate() {
        scanner.feed(wal.start() + at as u64 * 7777, chunk).unwrap();
        assert_eq!(scanner.proven(), scanner.position());
    }
    assert_eq!((scanner.proof(), scanner.magic()), (Proof::Unproven, Some(PageMagic(0xD122))));
    let segments = drain(&mut scanner);
    assert_eq!(segments.len(), 2);
    assert!(segments.iter().all(|(_, summary)| summary.proof == Proof::Unproven));
    assert_eq!(segments[0].1.record_end, Some(Lsn(2 * MIB)));
    let json = serde_json::to_string(&segments[0].1.carry).unwrap();
    let mut next = Scanner::new(options(&wal), Lsn(2 * MIB), serde_json::from_str(&json).unwrap());
    next.feed(Lsn(2 * MIB), &[0x22, 0xD1, 9, 9, 9]).unwrap();
    assert_eq!(next.proof(), Proof::Unproven);
}

/// Bit 0x0004 of the page flags is "ordinary page" up to 18, and "the record before this page was given up" in 19.
#[test]
fn golden_pages_of_18_and_19() {
    let page = |magic: u16, flags: u16| {
        let mut page = vec![];
        page.extend(magic.to_le_bytes());
        page.extend(flags.to_le_bytes());
        page.extend([1, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        page.extend(SYSTEM.0.to_le_bytes());
        page.extend([0, 0, 0x10, 0, 0, 0x20, 0, 0]);
        page
    };
    // An XLOG_NOOP with 0 bytes of main data: length 24, xid 0, prev 0/FFF40, info 0x20.
    let mut noop = vec![24, 0, 0, 0, 0, 0, 0, 0, 0x40, 0xFF, 0x0F, 0, 0, 0, 0, 0, 0x20, 0, 0, 0];
    noop.extend(crc32c::crc32c(&noop).to_le_bytes());
    let scan = |magic, flags| {
        let mut scanner = scanner(&writer(18));
        scanner.feed(Lsn(MIB), &[page(magic, flags), noop.clone()].concat()).map(|()| scanner.proven())
    };
    assert_eq!(scan(0xD118, 0x0006), Ok(Lsn(MIB + 64)));
    assert_eq!(scan(0xD118, 0x0002), Ok(Lsn(MIB + 64)));
    assert_eq!(scan(0xD121, 0x0002), Ok(Lsn(MIB + 64)));
    assert_eq!(scan(0xD118, 0x000A).unwrap_err().fault, ScanFault::MissingOverwrite);
    assert_eq!(scan(0xD121, 0x0006).unwrap_err().fault, ScanFault::MissingOverwrite);
    assert!(matches!(scan(0xD121, 0x000A).unwrap_err().fault, ScanFault::PageFlags { found: 0x000A, .. }));
    assert!(matches!(scan(0xD118, 0x0016).unwrap_err().fault, ScanFault::PageFlags { found: 0x0016, .. }));
    assert!(matches!(scan(0xD118, 0x0004).unwrap_err().fault, ScanFault::PageFlags { .. }));
}

/// Every bit of a WAL with each kind of region. Not noticed, and not noticeable: BKP_REMOVABLE of 13-18 (either value
/// is legal), what is left of a record that was given up (nobody reads it), and a flip that turns the first page's magic into another one: nothing says which it should be, so the
/// caller compares `Scanner::magic` with the server's version.
#[test]
fn every_flipped_bit_is_noticed() {
    for version in [15, 19] {
        let mut wal = writer(version);
        wal.insert(1, &[1; 77]);
        wal.commit(1, time(1));
        wal.insert(2, &vec![2; 17_003]);
        wal.insert_block(2, (1, 2, 3), 4, &[5; 19], &[6; 3]);
        let given_up = (wal.flush_lsn() - wal.start()) as usize;
        wal.insert(3, &vec![3; 10_000]);
        wal.overwrite_contrecord(time(4));
        let given_up = given_up..(given_up + 8191) & !8191;
        wal.commit(5, time(5));
        let end = wal.flush_lsn();
        wal.switch();
        wal.commit(9, time(9));
        let mut bytes = all(&wal).to_vec();
        let tail = (end - wal.start()) as usize + 24;
        let next = (MIB) as usize;
        let interesting = (0..tail).chain([tail + 8, tail + 8192, next - 1]).chain(next..bytes.len());
        for at in interesting.filter(|at| (8192..16384).contains(at) == (at % 61 == 0) || at % 8192 < 100) {
            if given_up.contains(&at) {
                continue;
            }
            for bit in 0..8 {
                let page_flags = at % 8192 == 2 && !(tail..next).contains(&at);
                if page_flags && bit == 2 && version <= 18 {
                    continue;
                }
                bytes[at] ^= 1 << bit;
                let mut scanner = scanner(&wal);
                let result = scanner.feed(wal.start(), &bytes);
                bytes[at] ^= 1 << bit;
                // A record that now claims to be longer just is not proven, until more comes.
                let noticed = result.is_err()
                    || scanner.proven() < wal.flush_lsn()
                    || scanner.proof() == Proof::Unproven && at < 2;
                assert!(noticed, "version {version}, bit {bit} of byte {at} flipped unnoticed");
                // A first page that claims another version is noticed on the second: here the caller knows better.
                if let Err(error) = result
                    && at >= 2
                {
                    // A page header may only be refuted by the record behind it.
                    assert!(error.record.0 & !8191 <= wal.start().0 + at as u64, "{error}");
                    assert!(error.record >= scanner.proven(), "{error}");
                }
            }
        }
    }
}

#[test]
fn faults_name_their_values() {
    let mut wal = writer(15);
    wal.insert(1, &[1; 100]);
    let second = wal.flush_lsn();
    wal.insert(2, &[2; 100]);
    let at = (second - wal.start()) as usize;
    let tampered = |at: usize, new: &[u8]| {
        let mut bytes = all(&wal).to_vec();
        bytes[at..at + new.len()].copy_from_slice(new);
        let error = fault_of(&wal, &bytes);
        assert_eq!(error, fault_of(&wal, &bytes), "equal bytes, equal errors");
        error
    };
    assert_eq!(tampered(at, &[0; 4]).fault, ScanFault::NoRecord);
    assert_eq!(tampered(at, &[23, 0, 0, 0]).fault, ScanFault::RecordLength(23));
    assert_eq!(tampered(at, &[0xFF; 4]).fault, ScanFault::RecordLength(u32::MAX));
    assert_eq!(tampered(at + 17, &[22]).fault, ScanFault::ResourceManager(22));
    assert!(matches!(tampered(at + 8, &[1]).fault, ScanFault::PreviousLink { .. }));
    let error = tampered(at + 50, &[9]);
    assert_eq!((error.lsn, error.record, error.class()), (second, second, FaultClass::Damage));
    assert!(error.to_string().contains(": record CRC is "), "{error}");
    assert_eq!(error.detail.len(), 48);
    assert_ne!(error, tampered(at + 50, &[8]));
}

#[test]
fn custom_resource_managers_are_for_15_and_later() {
    for (version, id, legal) in [(13, 21, true), (14, 128, false), (15, 128, true), (18, 22, false), (19, 22, true)] {
        let mut wal = writer(version);
        wal.record(id, 0, 0, &[]);
        assert_eq!(scanner(&wal).feed(wal.start(), all(&wal)).is_ok(), legal, "{version} {id}");
    }
}

#[test]
fn fragments_must_add_up() {
    for (body, legal) in [
        (&[255, 1, 9][..], true),
        (&[255, 2, 9], false),
        (&[255, 0, 9], false),
        (&[254, 1, 0, 0, 0, 9], true),
        (&[254, 255, 255, 255, 255, 9], false),
        (&[253, 1, 0, 252, 1, 0, 0, 0, 255, 1, 9], true),
        (&[33, 0, 0, 0], false),
        (&[0, 0x80, 0, 0, 1, 0, 0, 0, 1, 0x80, 0, 0, 1, 0, 0, 0], true),
        (&[1, 0x80, 0, 0, 1, 0, 0, 0, 0, 0x80, 0, 0, 1, 0, 0, 0], false),
        (&[0, 0x90, 0, 0, 2, 0, 0, 0, 1, 1, 0, 0, 0, 7, 7], true),
        (&[0, 0x90, 0, 0, 2, 0, 0, 0, 5, 3, 0, 1, 0, 0, 0, 7, 7], true),
        (&[0, 0x90], false),
        (&[252], false),
    ] {
        let mut wal = writer(15);
        wal.record(10, 0, 0, body);
        assert_eq!(scanner(&wal).feed(wal.start(), all(&wal)).is_ok(), legal, "{body:?}");
    }
}

#[test]
fn a_claim_of_1020_mib_costs_no_memory() {
    let mut wal = writer(18);
    wal.insert(1, &[1; 100]);
    let mut bytes = all(&wal).to_vec();
    bytes[40..44].copy_from_slice(&(1020u32 << 20).to_le_bytes());
    let mut scanner = scanner(&wal);
    scanner.feed(wal.start(), &bytes).unwrap();
    assert_eq!((scanner.proven(), scanner.poll_segment()), (wal.start(), None));
    bytes.resize(8192, 0);
    scanner.feed(wal.flush_lsn(), &bytes[(wal.flush_lsn() - wal.start()) as usize..]).unwrap();
    let error = scanner.feed(wal.start() + 8192, &[0; 8192]).unwrap_err();
    assert_eq!((error.lsn, error.record), (wal.start() + 8192, wal.start() + 40));
}

#[test]
fn positions_near_the_end_of_the_address_space_are_refused() {
    let start = Lsn(u64::MAX - (1 << 30) + 1);
    let mut scanner = Scanner::new(options(&writer(18)), start, Carry::default());
    assert!(scanner.feed(start, &[0; 100]).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn chunks_of_any_size_are_like_the_whole(
        sizes in prop::collection::vec(prop_oneof![1usize..40, 1usize..9000, 100_000usize..140_000], 1..200),
        version in 13u32..=19,
    ) {
        let wal = mixed(version, Lsn(MIB));
        let (_, expected) = prove(&wal);
        let mut scanner = scanner(&wal);
        let (mut rest, mut seen) = (all(&wal), vec![]);
        for length in sizes.iter().cycle() {
            let (chunk, left) = rest.split_at(rest.len().min(*length));
            scanner.feed(scanner.position(), chunk).unwrap();
            seen.extend(drain(&mut scanner));
            rest = left;
            if rest.is_empty() { break; }
        }
        prop_assert_eq!(seen, expected);
        prop_assert_eq!(scanner.proven(), wal.flush_lsn());
    }

    #[test]
    fn a_fault_does_not_depend_on_chunks(at in 0usize..200_000, byte in 1u8..=255, length in 1usize..20_000) {
        let mut wal = writer(17);
        while wal.flush_lsn() - wal.start() < 200_000 {
            wal.insert_block(1, (1, 2, 3), 4, &[5; 60], &[6; 3]);
            wal.commit(1, time(1));
            wal.insert(2, &[7; 9999]);
        }
        let mut bytes = all(&wal).to_vec();
        bytes[at] ^= byte;
        let mut pieces = scanner(&wal);
        let result = bytes.chunks(length).try_for_each(|chunk| pieces.feed(pieces.position(), chunk));
        prop_assert_eq!(result, scanner(&wal).feed(wal.start(), &bytes));
    }

    #[test]
    fn random_bytes_never_panic(
        start in 0usize..60,
        noise in prop::collection::vec(any::<u8>(), 0..400),
        positions in prop::collection::vec(0usize..60_000, 0..20),
        length in 1usize..9000,
    ) {
        let mut wal = writer(18);
        wal.insert(1, &[1; 100]);
        wal.insert(2, &vec![2; 60_000]);
        let mut bytes = all(&wal).to_vec();
        for position in positions { bytes[position] ^= noise.first().copied().unwrap_or(1); }
        bytes.splice(start..start + 20, noise);
        let mut scanner = scanner(&wal);
        for chunk in bytes.chunks(length) {
            let _ = scanner.feed(scanner.position(), chunk);
        }
        prop_assert!(scanner.proven() <= scanner.position());
    }

    /// Records whose CRC is right and whose content is noise: what a hostile server can send.
    #[test]
    fn well_summed_noise_never_panics(
        records in prop::collection::vec(
            (0u8..24, any::<u8>(), prop::collection::vec(prop_oneof![any::<u8>(), Just(0), Just(255)], 0..300)), 1..40),
        version in 13u32..=19,
    ) {
        let mut wal = writer(version);
        for (resource_manager, info, body) in &records {
            wal.record(*resource_manager, *info, 3, body);
            let mut framed = vec![254];
            framed.extend((body.len() as u32).to_le_bytes());
            framed.extend(body);
            wal.record(resource_manager % 3, *info, 3, &framed);
        }
        let _ = scanner(&wal).feed(wal.start(), all(&wal));
    }
}

// ---- on demand ----

/// `cargo test --release --lib -- --ignored bench_scan --nocapture`
#[test]
#[ignore = "prints a speed, proves nothing"]
fn bench_scan() {
    let mut small = writer_at(18, 16, Lsn(16 * MIB));
    while small.flush_lsn().0 < 256 * MIB {
        for step in 0..4u8 {
            small.insert_block(9, (1663, 5, 16384), 77, &[step; 27 + 13], &[1; 14]);
            small.insert_block(9, (1663, 5, 16384), 77, &[], &[1; 8]);
        }
        small.commit(9, time(9));
    }
    let mut large = writer_at(18, 16, Lsn(16 * MIB));
    while large.flush_lsn().0 < 256 * MIB {
        large.insert(9, &[9; 7000]);
    }
    let mut records = vec![];
    for end in small.record_starts().windows(2).take(1_000_000) {
        let (start, end) = ((end[0] - small.start()) as usize, (end[1] - small.start()) as usize);
        let total = u32::from_le_bytes(*all(&small)[start..].first_chunk().unwrap()) as usize;
        if start / 8192 == end / 8192 {
            records.push(&all(&small)[start..start + total]);
        }
    }
    let two_calls = |record: &[u8]| crc32c::crc32c_append(crc32c::crc32c(&record[24..]), &record[..20]);
    for (what, crc) in [("two calls", &two_calls as &dyn Fn(&[u8]) -> u32), ("one", &record::record_crc)] {
        let started = std::time::Instant::now();
        let sum = records.iter().fold(0, |sum, record| sum ^ crc(record));
        println!(
            "crc by {what}: {:.1} ns per record ({sum:x})",
            started.elapsed().as_nanos() as f64 / records.len() as f64
        );
    }
    for (what, wal) in [("small records", &small), ("7 kB records", &large)] {
        for chunk_bytes in [128 << 10, 8192 + 25, 1000] {
            let started = std::time::Instant::now();
            let mut scanner = scanner(wal);
            for chunk in all(wal).chunks(chunk_bytes) {
                scanner.feed(scanner.position(), chunk).unwrap();
                while scanner.poll_segment().is_some() {}
            }
            let per_gib = started.elapsed().as_secs_f64() * (1u64 << 30) as f64 / all(wal).len() as f64;
            let record_bytes = all(wal).len() / wal.record_ends().len();
            println!("{what} ({record_bytes} bytes), chunks of {chunk_bytes}: {per_gib:.3} s/GiB");
        }
    }
}

/// Proves a real server's segments: `SEAWALL_PG_WAL=<pg_wal> SEAWALL_WAL_END=<flush LSN> cargo test --lib -- --ignored
/// real_wal --nocapture`. Prints the records per segment, to be compared with `pg_waldump`.
#[test]
#[ignore = "needs the pg_wal directory of a server"]
fn real_wal_proves() {
    let directory = std::path::PathBuf::from(std::env::var("SEAWALL_PG_WAL").expect("SEAWALL_PG_WAL is set"));
    let end: Lsn = std::env::var("SEAWALL_WAL_END").expect("SEAWALL_WAL_END is set").parse().unwrap();
    let mut names: Vec<SegmentName> = std::fs::read_dir(&directory)
        .unwrap()
        .filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok())
        .collect();
    names.sort();
    let timeline = names.last().unwrap().timeline;
    names.retain(|name| name.timeline == timeline);
    let first = std::fs::read(directory.join(names[0].to_string())).unwrap();
    let segment_size = SegmentSize::new(first.len() as u64).unwrap();
    let system_id = SystemId(u64::from_le_bytes(*first[24..].first_chunk().unwrap()));
    let history = match std::fs::read(directory.join(format!("{:08X}.history", timeline.0))) {
        Ok(text) => History::parse(timeline, &text).unwrap(),
        Err(_) => History::parse(timeline, b"").unwrap(),
    };
    let start = segment_size.start_of(names[0].number(segment_size).unwrap());
    let mut scanner = Scanner::new(ScanOptions { system_id, segment_size, history }, start, Carry::default());
    for name in names {
        let lsn = segment_size.start_of(name.number(segment_size).unwrap());
        let bytes = std::fs::read(directory.join(name.to_string())).unwrap();
        let length = end.saturating_distance(lsn).min(bytes.len() as u64) as usize;
        for chunk in bytes[..length].chunks(4099) {
            scanner.feed(scanner.position(), chunk).unwrap_or_else(|error| panic!("{error}\n{}", error.detail));
        }
        for (number, summary) in drain(&mut scanner) {
            println!("SEGMENT {} {}", SegmentName::new(timeline, number, segment_size), summary.record_count);
            println!("  {}", serde_json::to_string(&summary).unwrap());
        }
    }
    println!("PROVEN {} of {end}, {:?}, last commit {:?}", scanner.proven(), scanner.magic(), scanner.last_commit());
    assert_eq!(scanner.proven(), end);
}

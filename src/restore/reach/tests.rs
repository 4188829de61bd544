//! What can be restored, against a reckoning byte by byte.

use proptest::prelude::*;

use super::*;
use crate::catalog::backup::ManifestEntry;
use crate::catalog::{Crc32, Piece, Source};
use crate::repository::layout::{BackupType, Epoch, TailName};
use crate::wal::{SegmentNumber, SystemId};

const MIB: u64 = 1 << 20;
const ONE: TimelineId = TimelineId(1);

fn size() -> SegmentSize {
    SegmentSize::new(8 * MIB).unwrap()
}

fn lsn(mib: u64) -> Lsn {
    Lsn(mib * MIB)
}

fn piece(from: u64, to: u64) -> Piece {
    let last_commit = Some(Timestamp::from_second(to as i64).unwrap());
    let (epoch, raw_crc32, form) = (Epoch(1), 0, Default::default());
    let tail = TailName { epoch, from: lsn(from), to: lsn(to), raw_crc32, last_commit, form };
    Piece { from: lsn(from), to: lsn(to), proof: Proof::Proven, last_commit, source: Source::Tail(tail) }
}

fn history(timeline: u32, forks: &[(u32, u64)]) -> History {
    let lines: String = forks.iter().map(|(parent, at)| format!("{parent}\t0/{:X}\tx\n", at * MIB)).collect();
    History::parse(TimelineId(timeline), lines.as_bytes()).unwrap()
}

fn holdings(pieces: &[(u32, &[(u64, u64)])], histories: Vec<History>) -> Holdings {
    let of = |raw: &[(u64, u64)]| raw.iter().map(|(from, to)| Part::Piece(piece(*from, *to))).collect();
    Holdings {
        segment_size: size(),
        start_timeline: ONE,
        start_lsn: None,
        histories: histories.into_iter().map(|history| (history.timeline, history)).collect(),
        parts: pieces.iter().map(|(timeline, raw)| (TimelineId(*timeline), of(raw))).collect(),
        ledger: Vec::new(),
        expired: BTreeMap::new(),
        disputed: BTreeSet::new(),
    }
}

pub fn backup_file(second: i64, timeline: u32, start_lsn: Lsn, stop_lsn: Lsn) -> BackupFile {
    let started = Timestamp::from_second(1_790_000_000 + second).unwrap();
    BackupFile {
        schema: 1,
        id: BackupId::new(started, BackupType::Full),
        backup_type: BackupType::Full,
        parent: None,
        fallback: None,
        label: None,
        started,
        finished: started,
        system_id: SystemId(7),
        server_version: "18.1".into(),
        segment_size: size(),
        timeline: TimelineId(timeline),
        start_lsn,
        stop_lsn,
        stop_time: None,
        from_standby: false,
        data_checksums: None,
        raw_bytes: 1,
        stored_bytes: 1,
        manifest: ManifestEntry { bytes: 1, crc32: Crc32(1), files: 1, checksums: "CRC32C".into() },
        tablespaces: Vec::new(),
        volumes: Vec::new(),
        config: Vec::new(),
        version: "0.1.0".into(),
    }
}

fn record(file: BackupFile) -> BackupRecord {
    BackupRecord::of(file)
}

/// (timeline, start, stop) in MiB.
fn backups(raw: &[(u32, u64, u64)]) -> Vec<KnownBackup> {
    let file = |(index, (timeline, start, stop)): (usize, &(u32, u64, u64))| {
        record(backup_file(index as i64, *timeline, lsn(*start), lsn(*stop)))
    };
    known_backups(&[("local", &raw.iter().enumerate().map(file).collect::<Vec<_>>())]).unwrap()
}

/// (line, from, to, backups, why) in MiB.
fn window(held: &Holdings, backups: &[KnownBackup]) -> Vec<(u32, u64, u64, usize, Ends)> {
    let shown = |interval: Interval| {
        let Interval { timeline, from, to, backups, ends, .. } = interval;
        (timeline.0, from.lsn.0 / MIB, to.lsn.0 / MIB, backups.len(), ends)
    };
    Reach::new(held, backups).window().into_iter().map(shown).collect()
}

#[test]
fn a_line_reaches_from_the_first_consistency_to_the_end_of_the_archive() {
    let held = holdings(&[(1, &[(0, 100)])], vec![]);
    let all = backups(&[(1, 9, 12), (1, 40, 41)]);
    assert_eq!(window(&held, &all), [(1, 12, 100, 2, Ends::Archive)]);
    let reach = Reach::new(&held, &all);
    assert_eq!(reach.window()[0].to.time, Some(Timestamp::from_second(100).unwrap()));
    assert_eq!(window(&held, &[]), []);
}

#[test]
fn wal_from_the_start_of_the_first_segment_is_needed() {
    // The segment of 9 begins at 8, with the header that replay reads first.
    assert_eq!(window(&holdings(&[(1, &[(9, 100)])], vec![]), &backups(&[(1, 9, 12)])), []);
    assert_eq!(window(&holdings(&[(1, &[(8, 11)])], vec![]), &backups(&[(1, 9, 12)])), []);
    assert_eq!(window(&holdings(&[(1, &[(8, 12)])], vec![]), &backups(&[(1, 9, 12)])).len(), 1);
}

#[test]
fn a_gap_ends_an_interval_and_the_next_backup_begins_another() {
    let held = holdings(&[(1, &[(0, 20), (30, 100)])], vec![]);
    let gap = Ends::Gap(Some("1-0000000001400000-0000000001E00000".into()));
    let all = backups(&[(1, 9, 12), (1, 25, 40), (1, 41, 42)]);
    assert_eq!(window(&held, &all), [(1, 12, 20, 1, gap), (1, 42, 100, 1, Ends::Archive)]);
}

#[test]
fn wal_beyond_a_fork_is_another_lines() {
    let held = holdings(&[(1, &[(0, 60)]), (2, &[(40, 90)])], vec![history(2, &[(1, 44)])]);
    let all = backups(&[(1, 9, 12), (1, 43, 50), (2, 44, 70)]);
    assert_eq!(
        window(&held, &all),
        [(1, 12, 60, 2, Ends::Timeline), (2, 12, 90, 2, Ends::Archive)],
        "the second backup was taken on what line 2 has left, the third on what line 1 never had"
    );
    // Line 2 has a history and nothing else yet: it can be restored up to its fork.
    let held = holdings(&[(1, &[(0, 60)])], vec![history(2, &[(1, 44)])]);
    assert_eq!(window(&held, &backups(&[(1, 9, 12)]))[1], (2, 12, 44, 1, Ends::Archive));
}

#[test]
fn what_is_expired_or_disputed_ends_an_interval_by_that_name() {
    let mut held = holdings(&[(1, &[(0, 16), (32, 100)])], vec![]);
    held.expired.insert(ONE, vec![(lsn(16), lsn(32))]);
    assert_eq!(window(&held, &backups(&[(1, 9, 12)])), [(1, 12, 16, 1, Ends::Expired)]);
    let mut held = holdings(&[(1, &[(0, 16), (24, 100)])], vec![]);
    let name = SegmentName::new(ONE, SegmentNumber(2), size());
    held.disputed.insert(name);
    assert_eq!(window(&held, &backups(&[(1, 9, 12)])), [(1, 12, 16, 1, Ends::Conflict(name))]);
}

#[test]
fn a_backup_is_known_by_all_its_copies_and_by_none_that_differ() {
    let file = backup_file(0, 1, lsn(9), lsn(12));
    let dead = BackupRecord { is_dead: true, ..record(file.clone()) };
    let both = known_backups(&[("a", &[record(file.clone())]), ("b", &[record(file.clone())])]).unwrap();
    let names: Vec<&str> = both[0].copies.iter().map(|copy| copy.repository.as_str()).collect();
    assert_eq!(names, ["a", "b"]);
    let one = known_backups(&[("a", std::slice::from_ref(&dead)), ("b", &[record(file.clone())])]).unwrap();
    assert_eq!((one.len(), one[0].copies.len(), one[0].copies[0].repository.as_str()), (1, 1, "b"));
    assert_eq!(known_backups(&[("a", &[dead])]), Ok(vec![]));
    let other = BackupFile { stop_lsn: lsn(13), ..file.clone() };
    known_backups(&[("a", &[record(file)]), ("b", &[record(other)])]).unwrap_err();
}

#[test]
fn a_backup_without_all_it_builds_on_is_none() {
    let full = backup_file(0, 1, lsn(9), lsn(12));
    let id = BackupId::new(Timestamp::from_second(1_790_000_100).unwrap(), BackupType::Incremental);
    let incremental = BackupFile {
        id,
        parent: Some(full.id),
        backup_type: BackupType::Incremental,
        ..backup_file(100, 1, lsn(20), lsn(21))
    };
    let all = known_backups(&[("a", &[record(full.clone()), record(incremental.clone())])]).unwrap();
    assert_eq!(all[1].copies[0].chain, [full, incremental.clone()]);
    assert_eq!(known_backups(&[("a", &[record(incremental.clone())])]), Ok(vec![]));
    let circle = BackupFile { parent: Some(id), ..incremental };
    assert_eq!(known_backups(&[("a", &[record(circle)])]), Ok(vec![]));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Three timelines: 2 forks off 1, 3 off either of them.
    #[test]
    fn exactly_what_a_backup_and_all_wal_after_it_reach(
        second in 1u64..96,
        third in 1u64..96,
        from_second: bool,
        raw in prop::collection::vec((1u32..4, 0u64..96, 1u64..40), 0..9),
        taken in prop::collection::vec((1u32..4, 0u64..90, 1u64..12), 0..6),
    ) {
        let third = if from_second { third.max(second) } else { third };
        let ancestors = if from_second { vec![(1, second), (2, third)] } else { vec![(1, third)] };
        let histories = vec![history(2, &[(1, second)]), history(3, &ancestors)];
        let of = |timeline: u32| {
            let mine = raw.iter().filter(move |(tl, ..)| *tl == timeline);
            mine.map(|(_, from, length)| (*from, from + length)).collect::<Vec<_>>()
        };
        let (one, two, three) = (of(1), of(2), of(3));
        let held = holdings(&[(1, &one), (2, &two), (3, &three)], histories);
        let taken: Vec<(u32, u64, u64)> = taken.iter().map(|(tl, start, length)| (*tl, *start, start + length)).collect();
        let all = backups(&taken);
        let reach = Reach::new(&held, &all);
        let window = reach.window();
        for line in [1u32, 2, 3] {
            let path = reach.line(TimelineId(line)).unwrap().path;
            let is_there = |mib: u64| [(1, &one), (2, &two), (3, &three)].iter().any(|(timeline, pieces)| {
                let Some(begin) = path.begin_of(TimelineId(*timeline)) else { return false };
                let end = path.end_of(TimelineId(*timeline)).unwrap_or(Lsn::MAX);
                size().floor(begin) <= lsn(mib) && lsn(mib) < end
                    && pieces.iter().any(|(from, to)| *from <= mib && mib < *to)
            });
            let reaches = |target: u64| taken.iter().any(|(timeline, start, stop)| {
                let Some(begin) = path.begin_of(TimelineId(*timeline)) else { return false };
                let end = path.end_of(TimelineId(*timeline)).unwrap_or(Lsn::MAX);
                begin <= lsn(*start) && lsn(*stop) <= end && *stop <= target
                    && (start / 8 * 8..target).all(is_there)
            });
            for target in 0..140 {
                let claimed = window.iter().any(|interval| {
                    interval.timeline.0 == line && interval.from.lsn <= lsn(target) && lsn(target) <= interval.to.lsn
                });
                prop_assert_eq!(claimed, reaches(target), "line {} at {} MiB: {:?}", line, target, &window);
            }
        }
    }
}

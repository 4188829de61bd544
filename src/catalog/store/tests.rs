//! Reading a lineage from a store in memory, honest and tampered with.

use super::*;
use crate::catalog::index::Crc32;
use crate::testkit::store::MemoryStore;
use crate::wal::{Carry, Lsn, SegmentNumber, SegmentSummary, SystemId};

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

fn archive() -> (MemoryStore, Archive) {
    let store = MemoryStore::default();
    (store.clone(), Archive::new(Arc::new(store), Lineage::new("main", SystemId(7), 1)))
}

fn lineage_file(system_id: u64) -> LineageFile {
    LineageFile {
        schema: 1,
        system_id: SystemId(system_id),
        server_version: "18.1".into(),
        segment_size: size(),
        created: now(),
        start_timeline: ONE,
        start_lsn: None,
        slot: Some("seawall".into()),
    }
}

fn entry(number: u64, raw_crc32: u32) -> IndexEntry {
    let summary = SegmentSummary {
        carry: Carry { last_record: Some(Lsn(number * MIB + 40)), ..Carry::default() },
        ..SegmentSummary::empty(None)
    };
    IndexEntry {
        segment: name(number),
        start_lsn: Lsn(number * MIB),
        end_lsn: Lsn((number + 1) * MIB),
        raw_bytes: MIB,
        raw_crc32: Crc32(raw_crc32),
        stored_bytes: 3,
        stored_crc32: Crc32(0),
        summary,
    }
}

fn put(store: &MemoryStore, key: &Key, body: &[u8]) {
    store.tamper(|objects| drop(objects.insert(key.clone(), Bytes::copy_from_slice(body))));
}

fn index(store: &MemoryStore, archive: &Archive, entry: IndexEntry, epoch: u32) -> Key {
    let key = archive.lineage.index(IndexName { first: entry.segment, last: entry.segment, epoch: Epoch(epoch) });
    let file = IndexFile { schema: 1, segment_size: size(), entries: vec![entry] };
    put(store, &key, &serde_json::to_vec(&file).unwrap());
    key
}

fn seal(store: &MemoryStore, archive: &Archive, number: u64) -> Key {
    put(store, &archive.lineage.segment(name(number), Form::Plain), b"abc");
    index(store, archive, entry(number, 1), 1)
}

fn tail(store: &MemoryStore, archive: &Archive, epoch: u32, number: u64, from: u64, to: u64) {
    let (from, to) = (Lsn(number * MIB + from), Lsn(number * MIB + to));
    let tail = TailName { epoch: Epoch(epoch), from, to, raw_crc32: 0, last_commit: None, form: Form::Plain };
    put(store, &archive.lineage.tail(name(number), &tail), b"abc");
}

#[tokio::test]
async fn an_entry_whose_last_record_ends_beyond_its_segment_is_damaged() {
    let beyond = Some(Lsn(4 * MIB + 8));
    let (mut of_summary, mut of_carry) = (entry(3, 1), entry(3, 1));
    of_summary.summary.record_end = beyond;
    of_carry.summary.carry.record_end = beyond;
    let mut whole = entry(3, 1);
    whole.summary.record_end = Some(Lsn(4 * MIB));
    for (entry, is_damaged) in [(of_summary, true), (of_carry, true), (whole, false)] {
        let (store, archive) = archive();
        index(&store, &archive, entry, 1);
        let read = archive.directory(WalDirectory::of(name(3)), size()).await;
        assert_eq!(matches!(read, Err(CatalogError::Damaged { .. })), is_damaged, "{read:?}");
    }
}

#[tokio::test]
async fn the_frontier_of_nothing_is_nothing() {
    let (_, archive) = archive();
    let state = archive.frontier(ONE, size()).await.unwrap();
    assert_eq!((state.has_data, state.end, state.run_from), (false, None, None));
}

#[tokio::test]
async fn the_frontier_is_the_last_run_with_its_tails() {
    let (store, archive) = archive();
    for number in [2, 3, 5, 6] {
        seal(&store, &archive, number);
    }
    tail(&store, &archive, 1, 7, 0, 100);
    tail(&store, &archive, 2, 7, 100, 160);
    let state = archive.frontier(ONE, size()).await.unwrap();
    assert_eq!(state.run_from, Some(Lsn(5 * MIB)));
    assert_eq!(state.end, Some(Lsn(7 * MIB + 160)));
    assert_eq!(state.last_sealed.unwrap().summary.carry.last_record, Some(Lsn(6 * MIB + 40)));
    assert_eq!(state.tails.len(), 2);
}

#[tokio::test]
async fn the_frontier_looks_back_over_a_directory_without_a_sealed_segment() {
    let (store, archive) = archive();
    seal(&store, &archive, 4095);
    tail(&store, &archive, 1, 4096, 0, 100);
    let state = archive.frontier(ONE, size()).await.unwrap();
    assert_eq!(state.last_sealed.unwrap().segment, name(4095));
    assert_eq!(state.end, Some(Lsn(4096 * MIB + 100)));
}

#[tokio::test]
async fn a_run_of_tails_after_a_hole_has_no_sealed_segment() {
    let (store, archive) = archive();
    seal(&store, &archive, 2);
    tail(&store, &archive, 1, 9, 0, 100);
    let state = archive.frontier(ONE, size()).await.unwrap();
    assert_eq!((state.run_from, state.end), (Some(Lsn(9 * MIB)), Some(Lsn(9 * MIB + 100))));
    assert!(state.last_sealed.is_none());
}

#[tokio::test]
async fn nothing_counts_that_is_not_there_as_described() {
    let (store, archive) = archive();
    (2..6).for_each(|number| drop(seal(&store, &archive, number)));
    store.tamper(|objects| drop(objects.remove(&archive.lineage.segment(name(5), Form::Plain))));
    put(&store, &archive.lineage.segment(name(4), Form::Plain), b"ab");
    put(&store, &archive.lineage.segment(name(9), Form::Plain), b"abc");
    let state = archive.frontier(ONE, size()).await.unwrap();
    assert_eq!(state.end, Some(Lsn(4 * MIB)));
    assert_eq!(state.missing, [name(4), name(5)]);
    assert_eq!(state.unindexed, [(name(9), SegmentObject { form: Form::Plain, stored_bytes: 3 })]);
    index(&store, &archive, entry(3, 2), 2);
    let state = archive.frontier(ONE, size()).await.unwrap();
    assert_eq!((state.end, state.disputed), (Some(Lsn(3 * MIB)), vec![name(3)]));
}

#[tokio::test]
async fn damaged_objects_are_named_and_unknown_names_left_alone() {
    let (store, archive) = archive();
    let key = seal(&store, &archive, 2);
    let directory = archive.lineage.wal_directory(WalDirectory::of(name(2)));
    put(&store, &Key::new(format!("{directory}/README")), b"x");
    put(&store, &Key::new(format!("{directory}/FFFFFFFFFFFFFFFFFFFFFFFF.zst")), b"x");
    assert!(archive.frontier(ONE, size()).await.is_ok());
    let whole = store.objects()[&key].clone();
    for body in [&b""[..], &whole[..whole.len() / 2], b"{}", b"[1]", b"\xFF\xFE", &whole[..whole.len() - 1]] {
        put(&store, &key, body);
        let error = archive.frontier(ONE, size()).await.unwrap_err();
        assert!(error.to_string().contains(key.as_str()), "{error}");
        assert_eq!(error.exit_code(), ExitCode::Data);
    }
    let foreign = String::from_utf8_lossy(&whole).replace("1048576", "16777216");
    put(&store, &key, foreign.as_bytes());
    assert!(matches!(archive.frontier(ONE, size()).await, Err(CatalogError::Damaged { .. })));
}

#[tokio::test]
async fn newer_formats_are_refused_with_both_numbers() {
    let (store, archive) = archive();
    assert!(read_repository(&store).await.unwrap().is_none());
    let file = create_repository(&store, now(), "00ff").await.unwrap();
    assert_eq!(read_repository(&store).await.unwrap(), Some(file));
    put(&store, &layout::repository(), br#"{"schema": 9, "format": 2, "anything": []}"#);
    let error = read_repository(&store).await.unwrap_err();
    assert!(matches!(error, CatalogError::NewerFormat { found: 2, supported: 1, .. }));
    assert_eq!(error.exit_code(), ExitCode::Config);
    put(&store, &layout::repository(), b"not json");
    assert_eq!(read_repository(&store).await.unwrap_err().exit_code(), ExitCode::Data);
    assert_eq!(archive.lineage_file().await.unwrap_err().exit_code(), ExitCode::Config);
}

#[tokio::test]
async fn lineages_are_found_and_strangers_refused() {
    let (store, archive) = archive();
    archive.create_lineage(&lineage_file(7)).await.unwrap();
    let second = Lineage::new("main", SystemId(7), 2);
    let mut file = lineage_file(7);
    file.created = "2026-11-23T11:00:00Z".parse().unwrap();
    put_json_new(&store, &second.lineage_json(), &file).await.unwrap();
    let found = lineages(&store, "main").await.unwrap();
    assert_eq!(found.iter().map(|(lineage, _)| lineage.ordinal).collect::<Vec<_>>(), [1, 2]);
    put_json_new(&store, &Lineage::new("main", SystemId(8), 1).lineage_json(), &lineage_file(7)).await.unwrap();
    assert!(lineages(&store, "main").await.unwrap_err().to_string().contains("belongs to system 7"));
}

#[tokio::test]
async fn every_writer_gets_its_own_epoch() {
    let (_, archive) = archive();
    let take = || archive.take_epoch(Epoch::default(), "seawall", None, "0.1.0", now());
    let (a, b, c) = tokio::join!(take(), take(), take());
    let mut taken = [a.unwrap().0, b.unwrap().0, c.unwrap().0];
    taken.sort();
    assert_eq!(taken, [1, 2, 3]);
    assert_eq!(archive.highest_writer().await.unwrap().unwrap().epoch, Epoch(3));
}

#[tokio::test]
async fn a_history_is_stored_once() {
    let (_, archive) = archive();
    let history = |text: &'static str| Bytes::from_static(text.as_bytes());
    archive.put_history(TimelineId(2), &history("1\t0/900000\tx\n")).await.unwrap();
    archive.put_history(TimelineId(2), &history("1\t0/900000\tx\n")).await.unwrap();
    let error = archive.put_history(TimelineId(2), &history("1\t0/900008\tx\n")).await.unwrap_err();
    assert!(matches!(error, CatalogError::HistoryConflict { .. }));
    assert_eq!((error.exit_code(), error.disposition()), (ExitCode::Data, Disposition::Stop));
    assert_eq!(archive.histories().await.unwrap().len(), 1);
}

#[tokio::test]
async fn the_whole_catalog_shows_its_gaps() {
    let (store, archive) = archive();
    archive.create_lineage(&lineage_file(7)).await.unwrap();
    [2, 3, 6].iter().for_each(|&number| drop(seal(&store, &archive, number)));
    let gap = LedgerFact::new(FactKind::Gap, now(), "slot lost").about(ONE, Lsn(4 * MIB), Lsn(6 * MIB));
    let end = LedgerFact::new(FactKind::Gap, now(), "slot lost").about(ONE, Lsn(7 * MIB), Lsn(8 * MIB));
    let mut healed = LedgerFact::new(FactKind::Gap, now(), "outage").about(ONE, Lsn(2 * MIB), Lsn(3 * MIB));
    for (random, fact) in [&gap, &end, &healed].into_iter().enumerate() {
        archive.append_ledger(fact, random as u32).await.unwrap();
    }
    let gaps = crate::continuity::gaps(&archive.load_catalog().await.unwrap());
    use crate::continuity::GapState::{Healed, Open};
    let found: Vec<_> = gaps.iter().map(|gap| (gap.from.0 / MIB, gap.to.0 / MIB, gap.state)).collect();
    assert_eq!(found, [(2, 3, Healed), (4, 6, Open), (7, 8, Open)]);
    assert_eq!(gaps[1].cause.as_deref(), Some("slot lost"));

    healed = LedgerFact::new(FactKind::Expired, now(), "retention");
    healed.segments.push(super::super::SegmentRange { first: name(2), last: name(5) });
    archive.append_ledger(&healed, 9).await.unwrap();
    let gaps = crate::continuity::gaps(&archive.load_catalog().await.unwrap());
    assert_eq!(gaps.len(), 1, "what was expired on purpose is no gap: {gaps:?}");
}

#[tokio::test]
async fn a_damaged_segment_is_a_hole_until_a_repair_or_its_mending_and_writers_go_on() {
    let (store, archive) = archive();
    archive.create_lineage(&lineage_file(7)).await.unwrap();
    (2..=5).for_each(|number| drop(seal(&store, &archive, number)));
    let gaps = async || {
        let catalog = archive.load_catalog().await.unwrap();
        let gaps = crate::continuity::gaps(&catalog).into_iter();
        gaps.map(|gap| (gap.from.0 / MIB, gap.to.0 / MIB, gap.cause.unwrap())).collect::<Vec<_>>()
    };
    let object = archive.lineage.segment(name(3), Form::Plain);
    let below = archive.lineage.below(&object).unwrap();
    archive.append_ledger(&LedgerFact::damaged(&[], now(), below, "it does not decode"), 1).await.unwrap();
    let hole = [(3, 4, "damaged: it does not decode".to_string())];
    assert_eq!(gaps().await, hole);
    assert_eq!(archive.frontier(ONE, size()).await.unwrap().run_from, Some(Lsn(2 * MIB)));
    let as_written = archive.load_catalog().await.unwrap().as_written();
    assert_eq!(crate::continuity::gaps(&as_written), []);
    // Of other content than the index has: it is nobody's repair.
    put(&store, &archive.lineage.repair(name(3), 9, Form::Plain), b"abc");
    assert_eq!(gaps().await, hole);
    let repair = archive.lineage.repair(name(3), 1, Form::Plain);
    put(&store, &repair, b"abcd");
    assert_eq!(gaps().await, []);
    let below = archive.lineage.below(&repair).unwrap();
    let ledger = archive.ledger().await.unwrap();
    archive.append_ledger(&LedgerFact::damaged(&ledger, now(), below, "that too"), 2).await.unwrap();
    assert_eq!(gaps().await[0].0, 3);
    let ledger = archive.ledger().await.unwrap();
    archive.append_ledger(&LedgerFact::mended(&ledger, now(), below, "copied", "abc"), 3).await.unwrap();
    assert_eq!(gaps().await, []);
}

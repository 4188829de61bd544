//! The contract of `wal-get` against a store in memory, honest and tampered with.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use jiff::Timestamp;
use zstd::zstd_safe::CParameter;

use super::*;
use crate::catalog::IndexEntry;
use crate::catalog::store::Archive;
use crate::catalog::{Crc32, FactKind, IndexFile, LedgerFact, SegmentRange};
use crate::codec::Form;
use crate::codec::encrypt::{Encryptor, Identities, Recipients};
use crate::repository::layout::{self, Epoch, IndexName, Lineage, TailName};
use crate::repository::{Backend, Entry, Facts, Upload};
use crate::repository::{Key, StoreError, StoreErrorKind};
use crate::testkit::store::MemoryStore;
use crate::wal::{SegmentSize, SegmentSummary};

const MIB: u64 = 1 << 20;
const SYSTEM: SystemId = SystemId(7_000_000_000_000_000_001);

fn size() -> SegmentSize {
    SegmentSize::new(MIB).unwrap()
}

fn now() -> Timestamp {
    "2026-11-22T11:00:00Z".parse().unwrap()
}

fn lineage() -> Lineage {
    Lineage::new("main", SYSTEM, 1)
}

fn name(timeline: u32, number: u64) -> SegmentName {
    SegmentName::new(TimelineId(timeline), crate::wal::SegmentNumber(number), size())
}

/// A segment's bytes: a long header, then a pattern that differs between segments and branches.
fn raw(timeline: u32, number: u64, branch: u8) -> Vec<u8> {
    let mut raw: Vec<u8> = (0..MIB).map(|i| (((i * i) >> 9) as u8).wrapping_add(number as u8) ^ branch).collect();
    raw[..40].fill(0);
    raw[0..2].copy_from_slice(&0xD118u16.to_le_bytes());
    raw[2..4].copy_from_slice(&6u16.to_le_bytes());
    raw[4..8].copy_from_slice(&timeline.to_le_bytes());
    raw[8..16].copy_from_slice(&(number * MIB).to_le_bytes());
    raw[24..32].copy_from_slice(&SYSTEM.0.to_le_bytes());
    raw[32..36].copy_from_slice(&(MIB as u32).to_le_bytes());
    raw[36..40].copy_from_slice(&8192u32.to_le_bytes());
    raw
}

fn encode(raw: &[u8]) -> Vec<u8> {
    let mut compressor = zstd::bulk::Compressor::new(1).unwrap();
    compressor.set_parameter(CParameter::ChecksumFlag(true)).unwrap();
    raw.chunks(MIB as usize / 4).flat_map(|frame| compressor.compress(frame).unwrap()).collect()
}

fn entry(name: SegmentName, raw: &[u8], stored: &[u8]) -> IndexEntry {
    let span = segment_span(name, size()).unwrap();
    let summary = SegmentSummary { record_count: 1, ..SegmentSummary::empty(None) };
    IndexEntry {
        segment: name,
        start_lsn: span.start,
        end_lsn: span.end,
        raw_bytes: MIB,
        raw_crc32: Crc32(crc32fast::hash(raw)),
        stored_bytes: stored.len() as u64,
        stored_crc32: Crc32(crc32fast::hash(stored)),
        summary,
    }
}

fn tail_name(epoch: u32, number: u64, from: u64, bytes: &[u8]) -> TailName {
    let from = Lsn(number * MIB + from);
    let raw_crc32 = crc32fast::hash(bytes);
    TailName {
        epoch: Epoch(epoch),
        from,
        to: from + bytes.len() as u64,
        raw_crc32,
        last_commit: None,
        form: Form::Plain,
    }
}

/// An archive under construction.
#[derive(Clone, Debug, Default)]
struct World {
    store: MemoryStore,
}

impl World {
    fn new() -> World {
        let world = World::default();
        let file = LineageFile {
            schema: 1,
            system_id: SYSTEM,
            server_version: "18.1".into(),
            segment_size: size(),
            created: now(),
            start_timeline: TimelineId(1),
            start_lsn: None,
            slot: None,
        };
        world.put(&lineage().lineage_json(), &serde_json::to_vec(&file).unwrap());
        world.put(&layout::repository(), br#"{"schema":1,"format":1,"created":"2026-11-22T11:00:00Z","id":"1"}"#);
        world
    }

    fn put(&self, key: &Key, body: &[u8]) {
        self.store.tamper(|objects| drop(objects.insert(key.clone(), Bytes::copy_from_slice(body))));
    }

    fn remove(&self, key: &Key) {
        self.store.tamper(|objects| drop(objects.remove(key)));
    }

    fn index(&self, entry: IndexEntry, epoch: u32) -> Key {
        let key = lineage().index(IndexName { first: entry.segment, last: entry.segment, epoch: Epoch(epoch) });
        let file = IndexFile { schema: 1, segment_size: size(), entries: vec![entry] };
        self.put(&key, &serde_json::to_vec(&file).unwrap());
        key
    }

    fn seal(&self, timeline: u32, number: u64) {
        self.seal_raw(name(timeline, number), &raw(timeline, number, 0));
    }

    fn seal_raw(&self, name: SegmentName, raw: &[u8]) {
        let stored = encode(raw);
        self.put(&lineage().segment(name, Form::Plain), &stored);
        self.index(entry(name, raw, &stored), 1);
    }

    fn tail(&self, epoch: u32, timeline: u32, number: u64, from: u64, bytes: &[u8]) -> Key {
        let key = lineage().tail(name(timeline, number), &tail_name(epoch, number, from, bytes));
        self.put(&key, &encode(bytes));
        key
    }

    fn fork(&self, child: u32, text: &str) {
        self.put(&lineage().history(TimelineId(child)), text.as_bytes());
    }

    fn wal_get(&self) -> WalGet {
        wal_get_from(Arc::new(self.store.clone()))
    }

    async fn get(&self, name: SegmentName) -> Result<Option<Vec<u8>>, String> {
        get_by(&self.wal_get(), &name.to_string()).await
    }

    async fn fault(&self, name: SegmentName) -> String {
        self.get(name).await.expect_err("this must be an error")
    }
}

fn holder(repository: &str, backend: Arc<dyn Backend>) -> Holder {
    Holder::new(repository, Archive::new(backend, lineage()))
}

fn wal_get_from(backend: Arc<dyn Backend>) -> WalGet {
    WalGet::new(vec![holder("local", backend)], PathChoice::Latest)
}

/// The delivered bytes, `None` for absent; whatever happens, nothing else is left in the directory.
async fn get_by(wal_get: &WalGet, name: &str) -> Result<Option<Vec<u8>>, String> {
    let directory = tempfile::tempdir().unwrap();
    let dest = directory.path().join("RECOVERYXLOG");
    let outcome = wal_get.get(name, &dest).await;
    let left = std::fs::read_dir(directory.path()).unwrap().count();
    assert_eq!(left, usize::from(outcome.as_ref().is_ok_and(|outcome| *outcome == Outcome::Delivered)));
    match outcome {
        Ok(Outcome::Delivered) => Ok(Some(std::fs::read(dest).unwrap())),
        Ok(Outcome::Absent(_)) => Ok(None),
        Err(error) => Err(error.to_string()),
    }
}

fn padded(bytes: &[u8]) -> Vec<u8> {
    let mut padded = bytes.to_vec();
    padded.resize(MIB as usize, 0);
    padded
}

#[tokio::test(start_paused = true)]
async fn sealed_segments_are_delivered_and_names_outside_are_absent() {
    let world = World::new();
    assert_eq!(world.get(name(1, 3)).await, Ok(None), "an archive without data");
    (3..6).for_each(|number| world.seal(1, number));
    assert!(world.get(name(1, 4)).await == Ok(Some(raw(1, 4, 0))));
    assert_eq!(world.get(name(1, 2)).await, Ok(None), "below the first");
    assert_eq!(world.get(name(1, 6)).await, Ok(None), "above the last");
    assert_eq!(world.get(name(1, 5000)).await, Ok(None), "in a directory that does not exist");
    assert_eq!(world.get(name(2, 4)).await, Ok(None), "on a timeline that does not exist");
}

#[tokio::test(start_paused = true)]
async fn a_hole_is_an_error_whatever_directory_it_is_in() {
    let world = World::new();
    [3, 5, 4096 + 7].iter().for_each(|&number| world.seal(1, number));
    for number in [4, 6, 4096, 4096 + 6] {
        assert!(world.fault(name(1, number)).await.contains("is a hole"), "{number}");
    }
    assert_eq!(world.get(name(1, 4096 + 8)).await, Ok(None));
    world.remove(&lineage().segment(name(1, 5), Form::Plain));
    assert!(world.fault(name(1, 5)).await.contains("its object is not there"));
}

#[tokio::test(start_paused = true)]
async fn the_unfinished_segment_is_assembled_and_padded() {
    let (world, bytes) = (World::new(), raw(1, 4, 0));
    world.seal(1, 3);
    world.tail(1, 1, 4, 0, &bytes[..1000]);
    world.tail(1, 1, 4, 1000, &bytes[1000..700_000]);
    world.tail(2, 1, 4, 700_000, &bytes[700_000..700_008]);
    assert!(world.get(name(1, 4)).await == Ok(Some(padded(&bytes[..700_008]))));
    assert_eq!(world.get(name(1, 5)).await, Ok(None));
    world.seal(1, 5);
    assert!(world.fault(name(1, 4)).await.contains("its tails end at"), "an unfinished segment in the middle");
}

#[tokio::test(start_paused = true)]
async fn overlapping_tails_are_compared_byte_by_byte() {
    let (world, bytes) = (World::new(), raw(1, 4, 0));
    world.tail(1, 1, 4, 0, &bytes[..3000]);
    world.tail(2, 1, 4, 2000, &bytes[2000..5000]);
    assert!(world.get(name(1, 4)).await == Ok(Some(padded(&bytes[..5000]))));
    let other = raw(1, 4, 0x55);
    world.tail(3, 1, 4, 4000, &other[4000..6000]);
    assert!(world.fault(name(1, 4)).await.contains("differ from another tail's"));
}

#[tokio::test(start_paused = true)]
async fn damaged_tails_are_never_the_end_of_wal() {
    let bytes = raw(1, 4, 0);
    let honest = |world: &World| {
        world.tail(1, 1, 4, 0, &bytes[..1000]);
        world.tail(1, 1, 4, 1000, &bytes[1000..2000])
    };
    let world = World::new();
    let second = honest(&world);
    world.put(&second, b"");
    assert!(world.fault(name(1, 4)).await.contains("it is empty"));
    world.put(&second, &encode(&bytes[1001..2001]));
    assert!(world.fault(name(1, 4)).await.contains("its name says"));
    world.put(&second, &encode(&bytes[1000..1999]));
    assert!(world.fault(name(1, 4)).await.contains("decodes to 999 bytes"));
    world.remove(&second);
    world.tail(1, 1, 4, 1001, &bytes[1001..2000]);
    assert!(world.fault(name(1, 4)).await.contains("go on at"));
    let world = World::new();
    world.tail(1, 1, 4, 8, &bytes[8..2000]);
    assert!(world.fault(name(1, 4)).await.contains("do not hold its beginning"));
}

#[tokio::test(start_paused = true)]
async fn wal_beyond_a_fork_does_not_leak() {
    let world = World::new();
    (3..8).for_each(|number| world.seal(1, number));
    let fork = 4 * MIB + 5000;
    world.fork(2, &format!("1\t0/{fork:X}\tno recovery target specified\n"));
    let parent = padded(&raw(1, 4, 0)[..5000]);
    assert!(world.get(name(1, 4)).await == Ok(Some(parent.clone())));
    assert_eq!(world.get(name(2, 4)).await, Ok(None), "nothing of timeline 2 is archived");
    assert_eq!(world.get(name(1, 5)).await, Ok(None));
    assert!(world.get(name(1, 3)).await == Ok(Some(raw(1, 3, 0))));

    let mut whole = world.wal_get();
    whole.path = PathChoice::Timeline(TimelineId(1));
    assert!(get_by(&whole, &name(1, 5).to_string()).await == Ok(Some(raw(1, 5, 0))));

    let mut child = raw(1, 4, 0);
    child[5000..].fill(0x77);
    world.tail(1, 2, 4, 0, &child[..6000]);
    assert!(world.get(name(2, 4)).await == Ok(Some(padded(&child[..6000]))));
    world.remove(&lineage().segment(name(1, 4), Form::Plain));
    world.remove(&lineage().index(IndexName { first: name(1, 4), last: name(1, 4), epoch: Epoch(1) }));
    assert!(world.get(name(1, 4)).await == Ok(Some(parent)), "the child repeats its parent's bytes");
    world.remove(&lineage().segment(name(1, 3), Form::Plain));
    world.remove(&lineage().index(IndexName { first: name(1, 3), last: name(1, 3), epoch: Epoch(1) }));
    assert_eq!(world.get(name(1, 3)).await, Ok(None), "the path now begins with segment 4");
}

#[tokio::test(start_paused = true)]
async fn a_parent_that_does_not_reach_its_fork_is_a_hole_once_the_child_has_data() {
    let world = World::new();
    world.seal(1, 3);
    world.fork(2, &format!("1\t0/{:X}\tx\n", 6 * MIB + 96));
    assert_eq!(world.get(name(1, 4)).await, Ok(None));
    world.seal(2, 7);
    for name in [name(1, 4), name(1, 6), name(2, 6)] {
        assert!(world.fault(name).await.contains("is a hole"), "{name}");
    }
    let short = World::new();
    short.seal(1, 6);
    short.fork(2, &format!("1\t0/{:X}\tx\n", 6 * MIB + 96));
    short.seal(2, 7);
    assert!(short.fault(name(2, 6)).await.contains("is a hole"), "only its parent's part is there");
    assert_eq!(world.get(name(2, 5)).await, Ok(None), "before timeline 2 begins");
    assert_eq!(world.get(name(1, 7)).await, Ok(None), "beyond the fork");
}

#[tokio::test(start_paused = true)]
async fn strangers_under_a_name_are_refused() {
    let at = name(1, 4);
    let with = |offset: usize, bytes: &[u8]| {
        let mut raw = raw(1, 4, 0);
        raw[offset..offset + bytes.len()].copy_from_slice(bytes);
        raw
    };
    for (raw, word) in [
        (with(24, &1u64.to_le_bytes()), "system identifier"),
        (with(8, &(5 * MIB).to_le_bytes()), "address"),
        (with(4, &2u32.to_le_bytes()), "timeline"),
        (with(4, &0u32.to_le_bytes()), "timeline"),
        (with(32, &(16u32 << 20).to_le_bytes()), "segment size"),
        (with(2, &4u16.to_le_bytes()), "long page header"),
    ] {
        let world = World::new();
        world.seal_raw(at, &raw);
        let fault = world.fault(at).await;
        assert!(fault.contains(word), "{fault}");
    }
}

#[tokio::test(start_paused = true)]
async fn every_object_is_distrusted_at_header_middle_and_trailer() {
    let (world, at) = (World::new(), name(1, 4));
    world.seal(1, 3);
    world.seal(1, 4);
    world.fork(2, "1\t0/900000\tx\n");
    world.put(&lineage().segment(name(1, 6), Form::Plain), &encode(&raw(1, 6, 0)));
    world.tail(1, 1, 7, 0, &raw(1, 7, 0)[..9000]);
    for (key, body) in world.store.objects() {
        let index = key.as_str().ends_with(".json");
        let asked = if key.as_str().contains(".tail/") { name(1, 7) } else { at };
        let asked = if key == lineage().segment(name(1, 6), Form::Plain) { name(1, 6) } else { asked };
        let good = world.get(asked).await;
        for length in [0, 1, body.len() / 2, body.len() - 1] {
            world.put(&key, &body[..length]);
            let found = world.get(asked).await;
            // A history file may lose its end, the reason in words; a neighbour's damage does not concern us.
            assert!(found.is_err() || found == good, "{key} cut to {length}");
            assert_ne!(found, Ok(None), "{key} cut to {length}");
        }
        // A history file is PostgreSQL's own text without a checksum: another digit is another valid fork.
        let history = key.as_str().ends_with(".history");
        for byte in [0, 4, 12, body.len() / 2, body.len() - 1].into_iter().filter(|_| !history) {
            let mut damaged = body.to_vec();
            damaged[byte] ^= 0x10;
            world.put(&key, &damaged);
            let found = world.get(asked).await;
            assert!(found.is_err() || found == good, "{key} byte {byte}");
            assert!(index || found != Ok(None), "{key} byte {byte}");
        }
        world.put(&key, &body);
    }
}

#[tokio::test(start_paused = true)]
async fn unindexed_segments_prove_themselves() {
    let (world, at) = (World::new(), name(1, 4));
    let stored = encode(&raw(1, 4, 0));
    world.put(&lineage().segment(at, Form::Plain), &stored);
    assert!(world.get(at).await == Ok(Some(raw(1, 4, 0))));
    world.put(&lineage().segment(at, Form::Plain), &encode(&raw(1, 4, 0)[..500_000]));
    assert!(world.fault(at).await.contains("decodes to 500000 bytes"));
    world.put(&lineage().segment(at, Form::Plain), b"");
    assert!(world.fault(at).await.contains("decodes to 0 bytes"));
    world.put(&lineage().segment(at, Form::Plain), &encode(&vec![0; 40 * MIB as usize]));
    assert!(world.fault(at).await.contains("follows the last one"), "a decompression bomb");
}

#[tokio::test(start_paused = true)]
async fn entries_that_disagree_are_a_conflict_and_repairs_are_preferred() {
    let (world, at) = (World::new(), name(1, 4));
    world.seal(1, 4);
    let good = raw(1, 4, 0);
    let stored = encode(&good);
    // The same content, encoded differently elsewhere: no conflict.
    let mut restated = entry(at, &good, &stored);
    restated.stored_bytes += 1;
    world.index(restated, 2);
    assert!(world.get(at).await == Ok(Some(good.clone())));

    let mut damaged = stored.clone();
    damaged[5000] ^= 1;
    world.put(&lineage().segment(at, Form::Plain), &damaged);
    assert!(world.fault(at).await.contains("is damaged"));
    world.put(&lineage().repair(at, crc32fast::hash(&good), Form::Plain), &stored);
    assert!(world.get(at).await == Ok(Some(good.clone())));

    world.index(entry(at, &raw(1, 4, 9), &stored), 3);
    assert!(world.fault(at).await.contains("disagree"));
}

#[tokio::test(start_paused = true)]
async fn valid_content_that_is_not_the_indexed_one_is_refused() {
    let (world, at) = (World::new(), name(1, 4));
    let stored = encode(&raw(1, 4, 0));
    world.put(&lineage().segment(at, Form::Plain), &stored);
    // Same size, every frame valid, the header fits: only the index entry tells them apart.
    world.index(entry(at, &raw(1, 4, 9), &stored), 1);
    assert!(world.fault(at).await.contains("its content has CRC-32"));
    world.put(&lineage().segment(at, Form::Plain), &stored[..stored.len() - 1]);
    assert!(world.fault(at).await.contains("its index entry says"));
}

#[tokio::test(start_paused = true)]
async fn after_the_end_of_the_plan_everything_is_absent() {
    let world = World::new();
    (3..6).for_each(|number| world.seal(1, number));
    let mut wal_get = world.wal_get();
    wal_get.plan_end = Some(Lsn(4 * MIB + 8));
    assert!(get_by(&wal_get, &name(1, 4).to_string()).await.unwrap().is_some());
    assert_eq!(get_by(&wal_get, &name(1, 5).to_string()).await, Ok(None));
}

#[tokio::test(start_paused = true)]
async fn expired_segments_are_gone_before_they_are_deleted() {
    let world = World::new();
    (3..7).for_each(|number| world.seal(1, number));
    let mut fact = LedgerFact::new(FactKind::Expired, now(), "retention");
    fact.segments.push(SegmentRange { first: name(1, 3), last: name(1, 4) });
    let archive = world.wal_get().holders.remove(0).archive;
    archive.append_ledger(&fact, 1).await.unwrap();
    world.remove(&lineage().segment(name(1, 4), Form::Plain));
    assert_eq!(world.get(name(1, 4)).await, Ok(None), "half deleted");
    let state = archive.frontier(TimelineId(1), size()).await.unwrap();
    assert_eq!((state.run_from, state.end), (Some(Lsn(5 * MIB)), Some(Lsn(7 * MIB))));
}

#[tokio::test(start_paused = true)]
async fn other_names_and_history_files() {
    let world = World::new();
    let get = async |name: &str| get_by(&world.wal_get(), name).await;
    assert_eq!(get("00000002.history").await, Ok(None));
    world.fork(2, "1\t0/900000\tx\n");
    assert_eq!(get("00000002.history").await, Ok(Some(b"1\t0/900000\tx\n".to_vec())));
    world.fork(2, "");
    assert!(get("00000002.history").await.is_err());
    assert_eq!(get("000000010000000000000004.00000028.backup").await, Ok(None));
    assert_eq!(get("000000010000000000000004.partial").await, Ok(None));
    for name in ["", "x", "../../etc/passwd", "00000001000000000000000a", "00000001000000000000FFFF", "é.history"] {
        assert!(get(name).await.is_err(), "{name}");
    }
    world.remove(&lineage().lineage_json());
    assert!(get("00000003.history").await.is_err(), "behind a mistyped prefix nothing is absent");
}

/// Lets `event` happen once, when the given key is read or listed for the `at`-th time.
#[derive(Debug)]
struct Racing {
    world: World,
    watched: Key,
    seen: AtomicU32,
    at: u32,
    event: fn(&World),
    /// Calls that fail as unavailable before any is answered.
    down: AtomicU32,
}

impl Racing {
    fn step(&self, key: &Key) -> Result<(), StoreError> {
        if self.down.load(Ordering::Relaxed) > 0 {
            self.down.fetch_sub(1, Ordering::Relaxed);
            let (location, cause) = (key.to_string(), "503".to_string());
            return Err(StoreError::new(StoreErrorKind::Unavailable, "read", location, cause));
        }
        if *key == self.watched && self.seen.fetch_add(1, Ordering::Relaxed) == self.at {
            (self.event)(&self.world);
        }
        Ok(())
    }
}

#[async_trait]
impl Backend for Racing {
    fn describe(&self) -> String {
        "racing:".to_string()
    }
    async fn put_new_with(&self, key: &Key, body: &[Bytes], facts: &Facts) -> Result<(), StoreError> {
        self.world.store.put_new_with(key, body, facts).await
    }
    async fn begin_upload(&self, key: &Key) -> Result<Box<dyn Upload>, StoreError> {
        self.world.store.begin_upload(key).await
    }
    async fn stat(&self, key: &Key) -> Result<Option<u64>, StoreError> {
        self.step(key)?;
        self.world.store.stat(key).await
    }
    async fn fetch(&self, key: &Key, range: std::ops::Range<u64>) -> Result<Bytes, StoreError> {
        self.step(key)?;
        self.world.store.fetch(key, range).await
    }
    async fn list(&self, directory: Option<&Key>) -> Result<Vec<Entry>, StoreError> {
        directory.map_or(Ok(()), |key| self.step(key))?;
        self.world.store.list(directory).await
    }
    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        self.world.store.delete(key).await
    }
}

#[tokio::test(start_paused = true)]
async fn a_segment_sealed_while_its_tails_are_read_wins() {
    let bytes = raw(1, 4, 0);
    let first = lineage().tail(name(1, 4), &tail_name(1, 4, 0, &bytes[..1000]));
    for watched in [first.clone(), lineage().tail_directory(name(1, 4))] {
        let world = World::new();
        world.tail(1, 1, 4, 0, &bytes[..1000]);
        let event = |world: &World| {
            world.seal(1, 4);
            world.store.tamper(|objects| objects.retain(|key, _| !key.as_str().contains(".tail/")));
        };
        let racing = Racing { world, watched, seen: AtomicU32::new(0), at: 0, event, down: AtomicU32::new(0) };
        let found = get_by(&wal_get_from(Arc::new(racing)), &name(1, 4).to_string()).await;
        assert!(found == Ok(Some(bytes.clone())));
    }
}

#[tokio::test(start_paused = true)]
async fn an_unavailable_store_is_asked_again_for_a_while_and_never_means_absent() {
    for (down, delivered) in [(5, true), (u32::MAX, false)] {
        for asked in ["00000002.history", "000000010000000000000003"] {
            let world = World::new();
            world.seal(1, 3);
            world.fork(2, "1\t0/900000\tx\n");
            let (watched, down) = (lineage().wal(), AtomicU32::new(down));
            let racing = Racing { world, watched, seen: AtomicU32::new(0), at: u32::MAX, event: |_| (), down };
            let started = Instant::now();
            let found = get_by(&wal_get_from(Arc::new(racing)), asked).await;
            assert_eq!(found.is_ok_and(|found| found.is_some()), delivered);
            assert!(started.elapsed() <= WalGet::PATIENCE);
            assert!(delivered || started.elapsed() >= WalGet::PATIENCE / 2);
        }
    }
}

#[test]
fn the_system_identifier_is_the_first_field_of_pg_control() {
    let pgdata = tempfile::tempdir().unwrap();
    assert!(read_system_id(pgdata.path()).is_err());
    std::fs::create_dir(pgdata.path().join("global")).unwrap();
    let control = pgdata.path().join("global/pg_control");
    std::fs::write(&control, SYSTEM.0.to_le_bytes()).unwrap();
    assert_eq!(read_system_id(pgdata.path()).unwrap(), SYSTEM);
    std::fs::write(&control, [1, 2, 3]).unwrap();
    assert!(read_system_id(pgdata.path()).is_err());
}

// --- Several repositories ----------------------------------------------------------------------------------------

fn union(worlds: &[&World]) -> WalGet {
    let name = |index: usize| ["local", "offsite", "third"][index];
    let holders = worlds.iter().enumerate().map(|(index, world)| holder(name(index), Arc::new(world.store.clone())));
    WalGet::new(holders.collect(), PathChoice::Latest)
}

/// The first answers, the others' stores are down for good.
fn with_silent(worlds: &[&World]) -> WalGet {
    let mut wal_get = union(worlds);
    wal_get.holders.push(holder("silent", Arc::new(down(u32::MAX))));
    wal_get
}

fn down(calls: u32) -> Racing {
    let (world, watched, down) = (World::new(), lineage().wal(), AtomicU32::new(calls));
    Racing { world, watched, seen: AtomicU32::new(0), at: u32::MAX, event: |_| (), down }
}

async fn ask(wal_get: &WalGet, name: SegmentName) -> Result<Option<Vec<u8>>, String> {
    get_by(wal_get, &name.to_string()).await
}

#[tokio::test(start_paused = true)]
async fn a_segment_comes_from_any_repository_that_has_it_intact() {
    let (one, other) = (World::new(), World::new());
    [3, 4, 6, 7].iter().for_each(|&number| one.seal(1, number));
    [4, 5, 6].iter().for_each(|&number| other.seal(1, number));
    let mut stored = encode(&raw(1, 6, 0));
    stored[5000] ^= 1;
    one.put(&lineage().segment(name(1, 6), Form::Plain), &stored);
    one.remove(&lineage().segment(name(1, 4), Form::Plain));
    let both = union(&[&one, &other]);
    for number in 3..8 {
        assert!(ask(&both, name(1, number)).await == Ok(Some(raw(1, number, 0))), "{number}");
    }
    assert_eq!((ask(&both, name(1, 2)).await, ask(&both, name(1, 8)).await), (Ok(None), Ok(None)));
    assert!(ask(&union(&[&one]), name(1, 5)).await.unwrap_err().contains("is a hole"));
    other.remove(&lineage().segment(name(1, 6), Form::Plain));
    assert!(ask(&both, name(1, 6)).await.unwrap_err().contains("is damaged"), "damaged in one, missing in the other");
}

#[tokio::test(start_paused = true)]
async fn a_name_nobody_has_is_absent_only_when_everybody_has_answered() {
    let world = World::new();
    (3..6).for_each(|number| world.seal(1, number));
    world.fork(2, "1\t0/900000\tx\n");
    let wal_get = with_silent(&[&world]);
    assert!(ask(&wal_get, name(1, 4)).await == Ok(Some(raw(1, 4, 0))));
    assert!(get_by(&wal_get, "00000002.history").await.unwrap().is_some());
    for nobody_has in
        ["000000010000000000000006", "000000010000000000000002", "00000003.history", "000000030000000000000004"]
    {
        let started = Instant::now();
        let fault = get_by(&wal_get, nobody_has).await.unwrap_err();
        assert!(fault.contains("not every repository answered: silent: could not read"), "{fault}");
        assert!(started.elapsed() >= WalGet::PATIENCE / 2, "it may come back");
        assert_eq!(get_by(&union(&[&world, &world]), nobody_has).await, Ok(None), "{nobody_has}");
    }
    // A repository that comes back in time has a say.
    let mut wal_get = union(&[&world]);
    wal_get.holders.push(holder("late", Arc::new(down(9))));
    assert_eq!(get_by(&wal_get, "00000003.history").await, Ok(None));
}

#[tokio::test(start_paused = true)]
async fn a_place_that_is_no_repository_or_lacks_the_lineage_has_not_answered() {
    let (world, other) = (World::new(), World::new());
    world.seal(1, 3);
    other.remove(&lineage().lineage_json());
    let wal_get = union(&[&world, &other]);
    assert!(ask(&wal_get, name(1, 3)).await.unwrap().is_some());
    let started = Instant::now();
    assert!(ask(&wal_get, name(1, 4)).await.unwrap_err().contains("offsite: object memory:/main/"));
    other.remove(&layout::repository());
    assert!(ask(&wal_get, name(1, 4)).await.unwrap_err().contains("holds no repository of seawall's"));
    assert!(started.elapsed() < WalGet::PATIENCE, "waiting does not help");
    assert!(ask(&union(&[&other, &other]), name(1, 3)).await.unwrap_err().contains("nothing is known"));
}

/// A store that never answers, as a dead NFS server does.
#[tokio::test(start_paused = true)]
async fn a_repository_that_hangs_does_not_keep_what_others_have() {
    #[derive(Debug)]
    struct Hanging;
    #[async_trait]
    impl Backend for Hanging {
        fn describe(&self) -> String {
            "hanging:".to_string()
        }
        async fn put_new_with(&self, _: &Key, _: &[Bytes], _: &Facts) -> Result<(), StoreError> {
            std::future::pending().await
        }
        async fn begin_upload(&self, _: &Key) -> Result<Box<dyn Upload>, StoreError> {
            std::future::pending().await
        }
        async fn stat(&self, _: &Key) -> Result<Option<u64>, StoreError> {
            std::future::pending().await
        }
        async fn fetch(&self, _: &Key, _: std::ops::Range<u64>) -> Result<Bytes, StoreError> {
            std::future::pending().await
        }
        async fn list(&self, _: Option<&Key>) -> Result<Vec<Entry>, StoreError> {
            std::future::pending().await
        }
        async fn delete(&self, _: &Key) -> Result<(), StoreError> {
            std::future::pending().await
        }
    }
    let world = World::new();
    world.seal(1, 3);
    let mut wal_get = union(&[&world]);
    wal_get.holders.insert(0, holder("hanging", Arc::new(Hanging)));
    let started = Instant::now();
    assert!(ask(&wal_get, name(1, 3)).await.unwrap().is_some());
    assert!(started.elapsed() <= SILENCE * 2);
    let fault = ask(&wal_get, name(1, 4)).await.unwrap_err();
    assert!(fault.contains("hanging: it did not answer within"), "{fault}");
    assert!(started.elapsed() <= WalGet::PATIENCE + SILENCE_MAX);
}

#[tokio::test(start_paused = true)]
async fn the_end_of_an_unfinished_segment_is_the_furthest_of_all_repositories() {
    let (one, other, bytes) = (World::new(), World::new(), raw(1, 4, 0));
    (2..4).for_each(|number| other.seal(1, number));
    one.tail(9, 1, 4, 0, &bytes[..3000]);
    other.tail(1, 1, 4, 0, &bytes[..1000]);
    other.tail(2, 1, 4, 1000, &bytes[1000..5000]);
    for worlds in [[&one, &other], [&other, &one]] {
        assert!(ask(&union(&worlds), name(1, 4)).await == Ok(Some(padded(&bytes[..5000]))));
    }
    // It ends here only if nobody else may know more.
    let fault = ask(&with_silent(&[&one, &other]), name(1, 4)).await.unwrap_err();
    assert!(fault.contains("is unfinished in those that did"), "{fault}");
    one.seal(1, 5);
    assert!(ask(&union(&[&other, &one]), name(1, 4)).await.unwrap_err().contains("is in the archive"));
    one.seal(1, 4);
    assert!(ask(&with_silent(&[&other, &one]), name(1, 4)).await == Ok(Some(bytes)));
}

#[tokio::test(start_paused = true)]
async fn tails_are_read_from_whichever_repository_has_them_intact() {
    let (one, other, bytes) = (World::new(), World::new(), raw(1, 4, 0));
    let first = one.tail(1, 1, 4, 0, &bytes[..1000]);
    one.tail(1, 1, 4, 1000, &bytes[1000..2000]);
    other.tail(5, 1, 4, 0, &bytes[..1000]);
    let second = other.tail(5, 1, 4, 1000, &bytes[1000..2000]);
    let mut torn = encode(&bytes[..1000]);
    *torn.last_mut().unwrap() ^= 1;
    let both = union(&[&one, &other]);
    for damage in [&b""[..], &encode(&raw(1, 4, 0x55)[..1000]), &torn] {
        one.put(&first, damage);
        other.put(&second, damage);
        assert!(ask(&both, name(1, 4)).await == Ok(Some(padded(&bytes[..2000]))));
    }
    assert!(ask(&union(&[&one]), name(1, 4)).await.is_err());
    // Cut in another place, and reaching as far: another way to the same end.
    let third = World::new();
    third.tail(1, 1, 4, 0, &bytes[..2000]);
    assert!(ask(&union(&[&one, &third]), name(1, 4)).await == Ok(Some(padded(&bytes[..2000]))));
    // Not as far: the end would be a lie.
    let short = World::new();
    short.tail(1, 1, 4, 0, &bytes[..1500]);
    assert!(ask(&union(&[&one, &short]), name(1, 4)).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn repositories_that_hold_different_bytes_are_not_chosen_between() {
    let (one, other) = (World::new(), World::new());
    let (bytes, strange) = (raw(1, 4, 0), raw(1, 4, 0x55));
    one.tail(1, 1, 4, 0, &bytes[..3000]);
    other.tail(1, 1, 4, 0, &strange[..3000]);
    let fault = ask(&union(&[&one, &other]), name(1, 4)).await.unwrap_err();
    assert!(fault.contains("repositories local and offsite hold different bytes"), "{fault}");
    // Names cannot tell, the bytes can.
    let other = World::new();
    other.tail(1, 1, 4, 0, &strange[..2000]);
    let fault = ask(&union(&[&one, &other]), name(1, 4)).await.unwrap_err();
    assert!(fault.contains("differ from another tail's"), "{fault}");
    let same = World::new();
    same.tail(1, 1, 4, 0, &bytes[..2000]);
    assert!(ask(&union(&[&one, &same]), name(1, 4)).await == Ok(Some(padded(&bytes[..3000]))));
}

#[tokio::test(start_paused = true)]
async fn a_repository_goes_on_where_another_one_ends_only_over_equal_bytes() {
    let (one, other, bytes) = (World::new(), World::new(), raw(1, 4, 0));
    one.tail(1, 1, 4, 0, &bytes[..1000]);
    one.tail(1, 1, 4, 1000, &bytes[1000..2000]);
    other.tail(3, 1, 4, 2000, &bytes[2000..4000]);
    let fault = ask(&union(&[&one, &other]), name(1, 4)).await.unwrap_err();
    assert!(fault.contains("its tails end at") && fault.contains("go on at"), "{fault}");
    other.tail(3, 1, 4, 1000, &bytes[1000..2000]);
    assert!(ask(&union(&[&one, &other]), name(1, 4)).await == Ok(Some(padded(&bytes[..4000]))));
}

#[tokio::test(start_paused = true)]
async fn histories_are_united_and_two_of_one_timeline_are_an_error() {
    let (one, other) = (World::new(), World::new());
    (3..8).for_each(|number| one.seal(1, number));
    let fork = 4 * MIB + 5000;
    let text = format!("1\t0/{fork:X}\tno recovery target specified\n");
    other.fork(2, &text);
    let both = union(&[&one, &other]);
    assert!(ask(&both, name(1, 4)).await == Ok(Some(padded(&raw(1, 4, 0)[..5000]))), "nothing leaks beyond the fork");
    assert_eq!(get_by(&both, "00000002.history").await, Ok(Some(text.clone().into_bytes())));
    one.put(&lineage().history(TimelineId(2)), b"");
    assert_eq!(get_by(&both, "00000002.history").await, Ok(Some(text.into_bytes())), "one copy is damaged");
    one.fork(2, "1\t0/700000\tx\n");
    for asked in ["00000002.history", "000000010000000000000004"] {
        assert!(get_by(&both, asked).await.unwrap_err().contains("is not the same in repositories local and offsite"));
    }
}

// --- Encrypted objects -------------------------------------------------------------------------------------------

const IDENTITY: &str = "AGE-SECRET-KEY-1GFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPQ4EGAEX";

fn identities() -> Identities {
    Identities::parse(IDENTITY.as_bytes()).unwrap()
}

fn encrypt(plain: &[u8], to: &Identities) -> Vec<u8> {
    let mut encryptor = Encryptor::new(&Recipients::parse(&to.public_keys()).unwrap());
    [encryptor.push(plain), encryptor.finish()].concat()
}

fn stranger() -> Identities {
    use age::secrecy::ExposeSecret;
    Identities::parse(age::x25519::Identity::generate().to_string().expose_secret().as_bytes()).unwrap()
}

impl World {
    fn seal_encrypted(&self, number: u64, to: &Identities) {
        let (name, raw) = (name(1, number), raw(1, number, 0));
        let stored = encrypt(&encode(&raw), to);
        self.put(&lineage().segment(name, Form::Encrypted), &stored);
        self.index(entry(name, &raw, &stored), 1);
    }

    fn tail_encrypted(&self, number: u64, from: u64, bytes: &[u8], to: &Identities) {
        let tail = TailName { form: Form::Encrypted, ..tail_name(1, number, from, bytes) };
        self.put(&lineage().tail(name(1, number), &tail), &encrypt(&encode(bytes), to));
    }
}

fn reading_with(mut wal_get: WalGet, identities: Option<Identities>) -> WalGet {
    for holder in &mut wal_get.holders {
        holder.archive.keys.identities = identities.clone();
    }
    wal_get
}

#[tokio::test(start_paused = true)]
async fn encrypted_and_plain_objects_may_be_mixed() {
    let (world, bytes) = (World::new(), raw(1, 6, 0));
    world.seal(1, 3);
    world.seal_encrypted(4, &identities());
    world.seal(1, 5);
    world.tail(1, 1, 6, 0, &bytes[..70_000]);
    world.tail_encrypted(6, 70_000, &bytes[70_000..700_000], &identities());
    let wal_get = reading_with(world.wal_get(), Some(identities()));
    for number in 3..6 {
        assert!(ask(&wal_get, name(1, number)).await == Ok(Some(raw(1, number, 0))), "{number}");
    }
    assert!(ask(&wal_get, name(1, 6)).await == Ok(Some(padded(&bytes[..700_000]))));
}

#[tokio::test(start_paused = true)]
async fn without_the_right_key_nothing_is_delivered_nor_absent() {
    let (world, bytes) = (World::new(), raw(1, 4, 0));
    world.seal(1, 2);
    world.seal_encrypted(3, &identities());
    world.tail_encrypted(4, 0, &bytes[..700_000], &identities());
    for (keys, words) in
        [(None, "there is no identity to read it with"), (Some(stranger()), "encrypted to other recipients")]
    {
        let wal_get = reading_with(world.wal_get(), keys);
        assert!(ask(&wal_get, name(1, 2)).await.unwrap().is_some());
        for number in [3, 4] {
            let fault = ask(&wal_get, name(1, number)).await.unwrap_err();
            assert!(fault.contains("cannot be read") && fault.contains(words), "{fault}");
        }
        assert_eq!(ask(&wal_get, name(1, 5)).await, Ok(None), "names need no key");
    }
    // Another repository has it plain.
    let plain = World::new();
    plain.seal(1, 3);
    plain.tail(1, 1, 4, 0, &bytes[..700_000]);
    let wal_get = union(&[&world, &plain]);
    assert!(ask(&wal_get, name(1, 3)).await == Ok(Some(raw(1, 3, 0))));
    assert!(ask(&wal_get, name(1, 4)).await == Ok(Some(padded(&bytes[..700_000]))));
}

#[tokio::test(start_paused = true)]
async fn damaged_encrypted_objects_are_found() {
    let world = World::new();
    world.seal(1, 3);
    world.seal_encrypted(4, &identities());
    let key = lineage().segment(name(1, 4), Form::Encrypted);
    let good = world.store.objects()[&key].to_vec();
    let wal_get = reading_with(world.wal_get(), Some(identities()));
    for length in [0, 1, 100, good.len() / 2, good.len() - 1] {
        world.put(&key, &good[..length]);
        assert!(ask(&wal_get, name(1, 4)).await.is_err(), "cut to {length}");
    }
    for byte in [0, 30, 150, 300, good.len() / 2, good.len() - 1] {
        let mut damaged = good.clone();
        damaged[byte] ^= 1;
        world.put(&key, &damaged);
        assert!(ask(&wal_get, name(1, 4)).await.is_err(), "byte {byte}");
    }
    // Authentic, and not what the index tells.
    world.put(&key, &encrypt(&encode(&raw(1, 4, 9)), &identities()));
    assert!(ask(&wal_get, name(1, 4)).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn a_standby_follows_a_promotion_that_continues_its_line() {
    let world = World::new();
    (3..6).for_each(|number| world.seal(1, number));
    world.seal(3, 5);
    let line = History::root(TimelineId(1));
    let along = |path| WalGet { path, ..world.wal_get() };
    let (fixed, following) = (along(PathChoice::Fixed(line.clone())), along(PathChoice::Following(line)));
    world.fork(2, "1\t0/100\tof another line\n");
    world.fork(3, "1\t0/500000\tx\n");
    assert!(ask(&fixed, name(1, 5)).await == Ok(Some(raw(1, 5, 0))));
    assert_eq!(ask(&following, name(1, 5)).await, Ok(None), "beyond the fork");
    assert!(ask(&following, name(3, 5)).await == Ok(Some(raw(3, 5, 0))));
    assert_eq!(ask(&fixed, name(3, 5)).await, Ok(None), "not on its line");
}

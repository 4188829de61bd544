//! Expiries that stop, pause and meet one another between any two calls to the store. The store is one in memory, since no
//! real one can be stopped at each call; `tests/it/expire.rs` has real ones.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bytes::Bytes;
use tokio::sync::Notify;

use super::*;
use crate::catalog::backup::{BackupFile, BackupRecord, BeginFile, ManifestEntry, PinFile, PinKind, VolumeEntry};
use crate::catalog::index::{Crc32, IndexEntry, IndexFile};
use crate::catalog::lineage::LineageFile;
use crate::codec::Form;
use crate::repository::layout::{BackupType, Epoch, IndexName, Lineage, PinName, TailName};
use crate::repository::{Backend, Entry, Facts, StoreError, Upload};
use crate::testkit::store::MemoryStore;
use crate::wal::{Commit, Lsn, SegmentName, SegmentNumber, SegmentSize, SegmentSummary, SystemId, TimelineId};

const MIB: u64 = 1 << 20;
const ONE: TimelineId = TimelineId(1);
const SEGMENTS: Range<u64> = 2..21;
/// (day, first segment, last segment) of the three complete ones; the last stays.
const BACKUPS: [(i64, u64, u64); 3] = [(1, 2, 3), (10, 10, 11), (18, 16, 17)];
/// Begun, and never finished.
const ABANDONED_DAY: i64 = 5;

fn size() -> SegmentSize {
    SegmentSize::new(MIB).unwrap()
}

fn day(day: i64) -> Timestamp {
    Timestamp::from_second(1_790_000_000 + day * 86_400).unwrap()
}

fn now() -> Timestamp {
    day(20)
}

fn name(number: u64) -> SegmentName {
    SegmentName::new(ONE, SegmentNumber(number), size())
}

fn id(of: i64) -> BackupId {
    BackupId::new(day(of), BackupType::Full)
}

fn lineage() -> Lineage {
    Lineage::new("main", SystemId(7), 1)
}

fn policy() -> Policy {
    Policy { count: Some(1), ..Policy::default() }
}

fn backup_file((of, first, last): (i64, u64, u64)) -> BackupFile {
    let volume = |number| VolumeEntry {
        tablespace: None,
        number,
        form: Form::Plain,
        raw_bytes: 10,
        raw_crc32: Crc32(1),
        stored_bytes: 6,
        stored_crc32: Crc32(1),
        manifest_files: 1,
    };
    BackupFile {
        schema: 1,
        id: id(of),
        backup_type: BackupType::Full,
        parent: None,
        fallback: None,
        label: None,
        started: day(of),
        finished: day(of),
        system_id: SystemId(7),
        server_version: "18.1".into(),
        segment_size: size(),
        timeline: ONE,
        start_lsn: Lsn(first * MIB + 40),
        stop_lsn: Lsn(last * MIB + 40),
        stop_time: Some(day(of)),
        from_standby: false,
        data_checksums: None,
        raw_bytes: 20,
        stored_bytes: 18,
        manifest: ManifestEntry { bytes: 6, crc32: Crc32(1), files: 1, checksums: "CRC32C".into() },
        tablespaces: Vec::new(),
        volumes: vec![volume(1), volume(2)],
        config: Vec::new(),
        version: "0".into(),
    }
}

fn put(store: &MemoryStore, key: &Key, body: &[u8]) {
    store.tamper(|objects| drop(objects.insert(key.clone(), Bytes::copy_from_slice(body))));
}

fn json<T: serde::Serialize>(store: &MemoryStore, key: &Key, value: &T) {
    put(store, key, &serde_json::to_vec(value).unwrap());
}

fn entry(number: u64) -> IndexEntry {
    let commit = Commit { xid: 700, lsn: Lsn(number * MIB + 50), time: day(number as i64 - 1) };
    IndexEntry {
        segment: name(number),
        start_lsn: Lsn(number * MIB),
        end_lsn: Lsn((number + 1) * MIB),
        raw_bytes: MIB,
        raw_crc32: Crc32(number as u32),
        stored_bytes: 3,
        stored_crc32: Crc32(0),
        summary: SegmentSummary { last_commit: Some(commit), ..SegmentSummary::empty(None) },
    }
}

fn index(store: &MemoryStore, first: u64, last: u64) {
    let key = lineage().index(IndexName { first: name(first), last: name(last), epoch: Epoch(1) });
    let file = IndexFile { schema: 1, segment_size: size(), entries: (first..=last).map(entry).collect() };
    json(store, &key, &file);
}

/// Nobody's, or another tool's.
fn strangers() -> Vec<Key> {
    let below = format!("main/7/backups/{}", id(1));
    let names = [
        "other/tool.txt",
        "main/7/wal/0000000100000000/README",
        "main/7/wal/0000000100000000/000000010000000000000003.zst.bak",
        "main/7/backups/notes.txt",
        &format!("{below}/surprise.bin"),
        &format!("{below}/base/1.tar.zst"),
        "main/7/ledger/notes.txt",
        "main/7/lease/x.json",
    ];
    names.into_iter().map(Key::new).collect()
}

/// Three backups, one that was left behind, WAL from the first on, and what nobody looks at.
fn store() -> MemoryStore {
    let (store, lineage) = (MemoryStore::default(), lineage());
    let file = LineageFile {
        schema: 1,
        system_id: SystemId(7),
        server_version: "18.1".into(),
        segment_size: size(),
        created: day(0),
        start_timeline: ONE,
        start_lsn: Some(Lsn(2 * MIB)),
        slot: None,
    };
    json(&store, &lineage.lineage_json(), &file);
    for number in SEGMENTS {
        put(&store, &lineage.segment(name(number), Form::Plain), b"abc");
        index(&store, number, number);
    }
    index(&store, 12, 16);
    let tail = TailName {
        epoch: Epoch(1),
        from: Lsn(18 * MIB),
        to: Lsn(18 * MIB + 100),
        raw_crc32: 1,
        last_commit: None,
        form: Form::Plain,
    };
    put(&store, &lineage.tail(name(18), &tail), b"tail");
    for backup in BACKUPS {
        let file = backup_file(backup);
        let record = BackupRecord::of(file.clone());
        json(&store, &lineage.backup_begin(file.id), &record.begin.unwrap());
        json(&store, &lineage.backup_json(file.id), &file);
        put(&store, &lineage.backup_manifest(file.id), b"memory");
        file.volumes.iter().for_each(|it| put(&store, &lineage.volume(file.id, it.name(), it.form), b"volume"));
    }
    let left = backup_file((ABANDONED_DAY, 5, 5));
    let begin: BeginFile = BackupRecord::of(left.clone()).begin.unwrap();
    json(&store, &lineage.backup_begin(left.id), &begin);
    put(&store, &lineage.volume(left.id, left.volumes[0].name(), Form::Plain), b"volume");
    strangers().iter().for_each(|key| put(&store, key, b"not ours"));
    store
}

/// A store that ends, or stands still, at its so-manieth call.
#[derive(Debug)]
struct Stepping {
    inner: MemoryStore,
    calls: AtomicU64,
    at: u64,
    /// `None`: from there on it answers nothing any more.
    gate: Option<Notify>,
    reached: Notify,
}

impl Stepping {
    fn new(inner: &MemoryStore, at: u64, is_gate: bool) -> Arc<Stepping> {
        let gate = is_gate.then(Notify::new);
        Arc::new(Stepping { inner: inner.clone(), calls: AtomicU64::new(0), at, gate, reached: Notify::new() })
    }

    async fn step(&self, key: Option<&Key>) -> Result<(), StoreError> {
        let call = self.calls.fetch_add(1, Ordering::SeqCst);
        let gone = || {
            let location = key.map(Key::to_string).unwrap_or_default();
            StoreError::new(StoreErrorKind::ReadOnly, "reach", location, "the process has ended")
        };
        match &self.gate {
            None if call >= self.at => Err(gone()),
            Some(gate) if call == self.at => {
                self.reached.notify_one();
                gate.notified().await;
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

#[async_trait]
impl Backend for Stepping {
    fn describe(&self) -> String {
        self.inner.describe()
    }

    async fn put_new_with(&self, key: &Key, body: &[Bytes], facts: &Facts) -> Result<(), StoreError> {
        self.step(Some(key)).await?;
        self.inner.put_new_with(key, body, facts).await
    }

    async fn begin_upload(&self, key: &Key) -> Result<Box<dyn Upload>, StoreError> {
        self.inner.begin_upload(key).await
    }

    async fn stat(&self, key: &Key) -> Result<Option<u64>, StoreError> {
        self.step(Some(key)).await?;
        self.inner.stat(key).await
    }

    async fn fetch(&self, key: &Key, range: Range<u64>) -> Result<Bytes, StoreError> {
        self.step(Some(key)).await?;
        self.inner.fetch(key, range).await
    }

    async fn list(&self, directory: Option<&Key>) -> Result<Vec<Entry>, StoreError> {
        self.step(directory).await?;
        self.inner.list(directory).await
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        self.step(Some(key)).await?;
        self.inner.delete(key).await
    }
}

/// A lease that is lost when it is told so.
#[derive(Debug, Default)]
struct Lease {
    is_lost: AtomicBool,
}

#[async_trait]
impl Tenure for Lease {
    async fn confirm(&self) -> Result<(), Failure> {
        match self.is_lost.load(Ordering::SeqCst) {
            false => Ok(()),
            true => Err(Failure::new(ExitCode::TryAgain, "the lease was lost")),
        }
    }

    fn is_held(&self) -> bool {
        !self.is_lost.load(Ordering::SeqCst)
    }
}

async fn expire_with(backend: Arc<dyn Backend>, lease: &Lease, seed: u64) -> Result<Expiry, Failure> {
    let archive = Archive::new(backend, lineage());
    let policy = policy();
    let draws = Mutex::new(fastrand::Rng::with_seed(seed));
    let random = || draws.lock().unwrap().u64(..);
    let job = Job {
        archive: &archive,
        policy: &policy,
        newest: None,
        tenure: lease,
        now: Arc::new(now),
        random: &random,
        stop: CancellationToken::new(),
        progress: watch::Sender::new(ExpireProgress::default()),
    };
    expire(&job).await
}

fn archive(store: &MemoryStore) -> Archive {
    Archive::new(Arc::new(store.clone()), lineage())
}

/// Which backups readers count, after looking whether everything of them is there.
async fn whole_backups(store: &MemoryStore, at: u64) -> BTreeSet<BackupId> {
    let archive = archive(store);
    let mut whole = BTreeSet::new();
    for record in archive.backup_records().await.unwrap() {
        let Some(file) = record.complete() else { continue };
        let lineage = &archive.lineage;
        let objects = store.objects();
        assert!(objects.contains_key(&lineage.backup_manifest(file.id)), "call {at}: {} lost its manifest", file.id);
        for it in &file.volumes {
            let key = lineage.volume(file.id, it.name(), it.form);
            assert!(objects.contains_key(&key), "call {at}: {} counts, and {key} is gone", file.id);
        }
        whole.insert(file.id);
    }
    whole
}

/// Every segment from the backup's first on is there, indexed, and promised.
async fn assert_restorable(store: &MemoryStore, first: u64, at: u64) {
    let catalog = archive(store).load_catalog().await.unwrap();
    let expired = crate::catalog::Expired::of(&catalog.ledger);
    let pieces = catalog.pieces(ONE);
    for number in first..SEGMENTS.end {
        let is_there = pieces.iter().any(|piece| piece.from.0 <= number * MIB && (number + 1) * MIB <= piece.to.0);
        assert!(is_there && !expired.contains(name(number)), "call {at}: segment {number} is gone");
        assert!(store.objects().contains_key(&lineage().segment(name(number), Form::Plain)), "call {at}: {number}");
    }
}

async fn assert_kept(store: &MemoryStore, at: u64) {
    assert!(whole_backups(store, at).await.contains(&id(18)), "call {at}: the last good one has to stay");
    assert_restorable(store, 16, at).await;
    for key in strangers() {
        assert!(store.objects().contains_key(&key), "call {at}: {key} is not ours");
    }
}

fn assert_gone(store: &MemoryStore, at: u64) {
    let objects = store.objects();
    let is_strange = |key: &Key| strangers().contains(key);
    for gone in [1, 10, ABANDONED_DAY] {
        let below = format!("main/7/backups/{}/", id(gone));
        let left: Vec<&Key> =
            objects.keys().filter(|key| key.as_str().starts_with(&below) && !is_strange(key)).collect();
        assert!(left.is_empty(), "call {at}: {left:?}");
    }
    for number in 2..16 {
        let key = lineage().segment(name(number), Form::Plain);
        assert!(!objects.contains_key(&key), "call {at}: segment {number} stays");
    }
    assert!(
        !objects.keys().any(|key| key.as_str().contains(".tail/")),
        "call {at}: the tail of a sealed segment stays"
    );
    assert!(!objects.keys().any(|key| key.as_str().ends_with(".probe")), "call {at}");
}

/// A restore of the backup of day 10, as far as it has to do with retention: it pins, then looks whether that was in time.
async fn pin_in_time(store: &MemoryStore) -> bool {
    match pin(store).await {
        Some(pin) => is_in_time(store, pin).await,
        None => false,
    }
}

/// Unless it finds nothing to restore.
async fn pin(store: &MemoryStore) -> Option<PinFile> {
    let (archive, backup) = (archive(store), id(10));
    let record = archive.backup_record(backup).await.unwrap();
    if record.complete().is_none() || archive.expired().await.unwrap().contains(name(10)) {
        return None;
    }
    let pin = PinFile {
        schema: 1,
        kind: PinKind::Restore,
        backup,
        from_lsn: Some(Lsn(10 * MIB + 40)),
        to_lsn: None,
        timeline: ONE,
        created: now(),
        expires: Some(day(21)),
        released: false,
        host: None,
    };
    assert!(archive.put_pin(PinName { id: 5, number: 1 }, &pin).await.unwrap());
    Some(pin)
}

async fn is_in_time(store: &MemoryStore, pin: PinFile) -> bool {
    let (archive, backup) = (archive(store), pin.backup);
    let expired = archive.expired().await.unwrap();
    let is_in_time = archive.is_kept(backup).await.unwrap()
        && !expired.backups().contains(&backup)
        && (10..SEGMENTS.end).all(|number| !expired.contains(name(number)));
    if !is_in_time {
        let released = PinFile { released: true, ..pin };
        assert!(archive.put_pin(PinName { id: 5, number: 2 }, &released).await.unwrap());
    }
    is_in_time
}

#[tokio::test(start_paused = true)]
async fn everything_that_may_go_goes_and_the_rest_stays() {
    let store = store();
    let done = expire_with(Arc::new(store.clone()), &Lease::default(), 1).await.unwrap();
    assert_kept(&store, 0).await;
    assert_gone(&store, 0);
    assert_eq!((done.freed.backups, done.freed.segments), (3, 14));
    assert!(done.locked.is_empty());
    let left: u64 = store.objects().values().map(|body| body.len() as u64).sum();
    assert!(left > 0 && done.freed.bytes > 0);
    // A second time there is nothing to do, and the ledger does not grow.
    for _ in 0..3 {
        expire_with(Arc::new(store.clone()), &Lease::default(), 2).await.unwrap();
    }
    let ledger = archive(&store).ledger().await.unwrap();
    assert_eq!(ledger.len(), 2, "an announcement and its decision: {ledger:?}");
}

#[tokio::test(start_paused = true)]
async fn a_crash_between_any_two_calls_takes_nothing_and_the_next_run_goes_on() {
    let mut at = 0;
    loop {
        let store = store();
        let ended = expire_with(Stepping::new(&store, at, false), &Lease::default(), 3).await;
        assert_kept(&store, at).await;
        expire_with(Arc::new(store.clone()), &Lease::default(), 4).await.unwrap();
        assert_kept(&store, at).await;
        assert_gone(&store, at);
        if ended.is_ok() {
            break;
        }
        at += 1;
    }
    assert!(at > 50, "{at} calls are too few to have been all");
}

#[tokio::test(start_paused = true)]
async fn a_restore_that_begins_after_a_crash_keeps_what_it_was_in_time_for() {
    let (mut at, mut in_time, mut too_late) = (0, 0, 0);
    loop {
        let store = store();
        let ended = expire_with(Stepping::new(&store, at, false), &Lease::default(), 5).await;
        let is_pinned = pin_in_time(&store).await;
        expire_with(Arc::new(store.clone()), &Lease::default(), 6).await.unwrap();
        assert_kept(&store, at).await;
        match is_pinned {
            true => {
                in_time += 1;
                assert!(whole_backups(&store, at).await.contains(&id(10)), "call {at}: it is pinned");
                assert_restorable(&store, 10, at).await;
            }
            false => {
                too_late += 1;
                assert_gone(&store, at);
            }
        }
        if ended.is_ok() {
            break;
        }
        at += 1;
    }
    assert!(in_time > 10 && too_late > 10, "{in_time} in time, {too_late} too late");
}

#[tokio::test(start_paused = true)]
async fn a_restore_that_begins_while_an_expiry_is_paused_is_seen_or_sees_it() {
    let mut at = 0;
    let (mut in_time, mut too_late) = (0, 0);
    loop {
        let store = store();
        let stepping = Stepping::new(&store, at, true);
        let (backend, lease) = (stepping.clone(), Lease::default());
        let expiring = expire_with(backend, &lease, 7);
        tokio::pin!(expiring);
        let is_paused = tokio::select! {
            biased;
            done = &mut expiring => { done.unwrap(); false }
            () = stepping.reached.notified() => true,
        };
        if !is_paused {
            break;
        }
        let is_pinned = pin_in_time(&store).await;
        stepping.gate.as_ref().unwrap().notify_one();
        expiring.await.unwrap();
        assert_kept(&store, at).await;
        if is_pinned {
            in_time += 1;
            assert!(whole_backups(&store, at).await.contains(&id(10)), "call {at}: it is pinned");
            assert_restorable(&store, 10, at).await;
        } else {
            too_late += 1;
        }
        at += 1;
    }
    assert!(in_time > 10 && too_late > 10, "{in_time} in time, {too_late} too late");
}

#[tokio::test(start_paused = true)]
async fn two_that_expire_at_once_take_nothing_from_each_other() {
    // The first is paused at every call; the second has its lease meanwhile, and somebody begins to need something before it.
    for with_restore in [false, true] {
        let mut at = 0;
        loop {
            let store = store();
            let stepping = Stepping::new(&store, at, true);
            let (backend, lease) = (stepping.clone(), Lease::default());
            let first = expire_with(backend, &lease, 8);
            tokio::pin!(first);
            let is_paused = tokio::select! {
                biased;
                done = &mut first => { done.unwrap(); false }
                () = stepping.reached.notified() => true,
            };
            if !is_paused {
                break;
            }
            let is_pinned = with_restore && pin_in_time(&store).await;
            lease.is_lost.store(true, Ordering::SeqCst);
            expire_with(Arc::new(store.clone()), &Lease::default(), 9).await.unwrap();
            stepping.gate.as_ref().unwrap().notify_one();
            // It may come to its end, or find that it has lost the lease.
            let _ = first.await;
            assert_kept(&store, at).await;
            if is_pinned {
                assert!(whole_backups(&store, at).await.contains(&id(10)), "call {at}: it is pinned");
                assert_restorable(&store, 10, at).await;
            }
            expire_with(Arc::new(store.clone()), &Lease::default(), 10).await.unwrap();
            assert_kept(&store, at).await;
            if !is_pinned {
                assert_gone(&store, at);
            }
            at += 1;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_restore_that_looks_after_two_expiries_is_not_told_that_what_one_still_deletes_is_kept() {
    // It has chosen before the first announces; it pins while that one is paused and has lost its lease; another one runs;
    // only then it looks, and the first one goes on.
    let (mut at, mut in_time, mut too_late) = (0, 0, 0);
    loop {
        let store = store();
        let stepping = Stepping::new(&store, at, true);
        let (backend, lease) = (stepping.clone(), Lease::default());
        let first = expire_with(backend, &lease, 12);
        tokio::pin!(first);
        // Its word is not there yet while the first one runs; what it chose is.
        let chosen = pin(&store).await.unwrap();
        let key = lineage().pin(PinName { id: 5, number: 1 });
        let word = store.objects()[&key].clone();
        store.tamper(|objects| drop(objects.remove(&key)));
        let is_paused = tokio::select! {
            biased;
            done = &mut first => { done.unwrap(); false }
            () = stepping.reached.notified() => true,
        };
        if !is_paused {
            break;
        }
        put(&store, &key, &word);
        lease.is_lost.store(true, Ordering::SeqCst);
        expire_with(Arc::new(store.clone()), &Lease::default(), 13).await.unwrap();
        let is_pinned = is_in_time(&store, chosen).await;
        stepping.gate.as_ref().unwrap().notify_one();
        let _ = first.await;
        assert_kept(&store, at).await;
        match is_pinned {
            true => {
                in_time += 1;
                assert!(whole_backups(&store, at).await.contains(&id(10)), "call {at}: it is pinned");
                assert_restorable(&store, 10, at).await;
            }
            false => too_late += 1,
        }
        at += 1;
    }
    assert!(in_time > 10 && too_late > 10, "{in_time} in time, {too_late} too late");
}

#[tokio::test(start_paused = true)]
async fn a_backup_that_is_finished_after_all_is_kept() {
    // One that was taken for abandoned commits while the expiry is paused at any call; it looks at `dead.json` afterwards.
    let (mut at, mut kept, mut dead) = (0, 0, 0);
    loop {
        let store = store();
        let stepping = Stepping::new(&store, at, true);
        let (backend, lease) = (stepping.clone(), Lease::default());
        let expiring = expire_with(backend, &lease, 11);
        tokio::pin!(expiring);
        let is_paused = tokio::select! {
            biased;
            done = &mut expiring => { done.unwrap(); false }
            () = stepping.reached.notified() => true,
        };
        if !is_paused {
            break;
        }
        let (lineage, archive) = (lineage(), archive(&store));
        let file = backup_file((ABANDONED_DAY, 18, 19));
        let has_begun = archive.is_kept(file.id).await.unwrap();
        let is_complete = if has_begun {
            put(&store, &lineage.backup_manifest(file.id), b"memory");
            file.volumes.iter().for_each(|it| put(&store, &lineage.volume(file.id, it.name(), it.form), b"volume"));
            assert!(archive.commit_backup(&file).await.unwrap());
            archive.is_kept(file.id).await.unwrap()
        } else {
            false
        };
        stepping.gate.as_ref().unwrap().notify_one();
        let _ = expiring.await;
        // By `count` the newest one has to stay: this one, if it was told that it is complete.
        let whole = whole_backups(&store, at).await;
        match is_complete {
            true => {
                kept += 1;
                assert!(whole.contains(&file.id), "call {at}: it was told that it is complete");
                assert_restorable(&store, 18, at).await;
            }
            false => {
                dead += 1;
                assert!(whole.contains(&id(18)), "call {at}");
                assert_restorable(&store, 16, at).await;
            }
        }
        at += 1;
    }
    assert!(kept > 0 && dead > 0, "{kept} kept, {dead} dead");
}

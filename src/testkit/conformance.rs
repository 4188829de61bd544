//! Owns: what every store must do, as functions any backend can be put through.
//! Does not own: faults (`store.rs`), what only one backend has (its own tests).
//!
//! Each function works below `scratch`, which must be empty; [`run_all`] gives each a directory of its own there.
//! They panic where a store does not conform. That they can fail was tried: see `tests` below.

use std::time::Duration;

use bytes::Bytes;
use futures_util::future::{join, join_all};

use crate::codec::Form;
use crate::repository::layout::{Epoch, IndexName, Lineage, TailName, WalDirectory};
use crate::repository::{Backend, Entry, Facts, Key, StoreError, StoreErrorKind};
use crate::wal::{Lsn, SegmentName, SystemId, TimelineId};

/// Every check, one after the other.
pub async fn run_all(backend: &dyn Backend, scratch: &Key) {
    of_two_concurrent_puts_one_wins(backend, &below(scratch, "race")).await;
    run_for_a_single_writer(backend, scratch).await;
}

/// What a store must do that only one writer uses, and that cannot tell two apart.
pub async fn run_for_a_single_writer(backend: &dyn Backend, scratch: &Key) {
    put_new_refuses_overwrite(backend, &below(scratch, "overwrite")).await;
    parts_are_concatenated(backend, &below(scratch, "parts")).await;
    empty_objects_are_objects(backend, &below(scratch, "empty")).await;
    ranges_are_exact_or_refused(backend, &below(scratch, "ranges")).await;
    absent_objects_are_absent(backend, &below(scratch, "absent")).await;
    deleted_objects_are_gone(backend, &below(scratch, "delete")).await;
    a_directory_is_not_an_object(backend, &below(scratch, "directory")).await;
    list_is_sorted_and_one_level_deep(backend, &below(scratch, "list")).await;
    a_deep_listing_shows_what_plain_ones_do(backend, &below(scratch, "deep")).await;
    an_upload_appears_when_completed(backend, &below(scratch, "upload")).await;
    an_upload_refuses_a_taken_name(backend, &below(scratch, "upload_taken")).await;
    an_abandoned_upload_leaves_nothing(backend, &below(scratch, "upload_abandoned")).await;
    an_upload_reads_back_what_it_holds(backend, &below(scratch, "read_back")).await;
    large_objects_arrive_whole(backend, &below(scratch, "large")).await;
    facts_are_kept_or_disclaimed(backend, &below(scratch, "facts")).await;
    every_page_is_listed(backend, &below(scratch, "pages"), 30).await;
    a_dropped_put_is_all_or_nothing(backend, &below(scratch, "dropped")).await;
    names_of_the_layout_are_stored(backend).await;
}

fn below(directory: &Key, name: &str) -> Key {
    Key::new(format!("{directory}/{name}"))
}

fn kind<T: std::fmt::Debug>(result: Result<T, StoreError>) -> StoreErrorKind {
    result.expect_err("the store must refuse this").kind
}

async fn put(backend: &dyn Backend, key: &Key, body: &[u8]) {
    let stored = backend.put_new(key, &[Bytes::copy_from_slice(body)]).await;
    stored.unwrap_or_else(|error| panic!("{error}"));
}

async fn content(backend: &dyn Backend, key: &Key) -> Bytes {
    let bytes = backend.stat(key).await.unwrap().unwrap_or_else(|| panic!("{key} is not there"));
    backend.fetch(key, 0..bytes).await.unwrap()
}

/// Bytes in which every position is recognisable, so that swapped or repeated parts are seen.
fn pattern(bytes: usize, seed: u64) -> Vec<u8> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut content = vec![0; bytes];
    rng.fill(&mut content);
    content
}

fn object(name: &str, bytes: u64) -> Entry {
    Entry::Object { name: name.to_string(), bytes }
}

pub async fn put_new_refuses_overwrite(backend: &dyn Backend, scratch: &Key) {
    let key = below(scratch, "object");
    put(backend, &key, b"first").await;
    for second in [&b"second"[..], b"first", b""] {
        let refused = backend.put_new(&key, &[Bytes::copy_from_slice(second)]).await;
        assert_eq!(kind(refused), StoreErrorKind::AlreadyExists);
        assert_eq!(content(backend, &key).await, &b"first"[..]);
    }
    assert_eq!(backend.list(Some(scratch)).await.unwrap(), [object("object", 5)]);
}

/// Repeated, because a store that looks first and writes then passes most times.
pub async fn of_two_concurrent_puts_one_wins(backend: &dyn Backend, scratch: &Key) {
    for round in 0..20 {
        let key = below(scratch, &format!("round{round}"));
        let bodies = [pattern(100_000, 1), pattern(90_000, 2)].map(|body| [Bytes::from(body)]);
        let (a, b) = join(backend.put_new(&key, &bodies[0]), backend.put_new(&key, &bodies[1])).await;
        let winner = match (a, b) {
            (Ok(()), Err(refused)) => (&bodies[0], refused),
            (Err(refused), Ok(())) => (&bodies[1], refused),
            both => panic!("exactly one put must succeed: {both:?}"),
        };
        assert_eq!(winner.1.kind, StoreErrorKind::AlreadyExists);
        assert_eq!(content(backend, &key).await, winner.0[0]);
    }
}

/// More parts than one `writev` takes (1024), empty ones among them.
pub async fn parts_are_concatenated(backend: &dyn Backend, scratch: &Key) {
    let whole = pattern(300_000, 3);
    let mut parts: Vec<Bytes> = whole.chunks(131).map(Bytes::copy_from_slice).collect();
    parts.insert(0, Bytes::new());
    parts.insert(700, Bytes::new());
    let key = below(scratch, "object");
    backend.put_new(&key, &parts).await.unwrap();
    assert_eq!(content(backend, &key).await, whole);
}

pub async fn empty_objects_are_objects(backend: &dyn Backend, scratch: &Key) {
    let (no_parts, empty_part) = (below(scratch, "a"), below(scratch, "b"));
    backend.put_new(&no_parts, &[]).await.unwrap();
    backend.put_new(&empty_part, &[Bytes::new()]).await.unwrap();
    for key in [&no_parts, &empty_part] {
        assert_eq!(backend.stat(key).await.unwrap(), Some(0));
        assert_eq!(backend.fetch(key, 0..0).await.unwrap(), Bytes::new());
        assert_eq!(kind(backend.put_new(key, &[Bytes::from_static(b"x")]).await), StoreErrorKind::AlreadyExists);
    }
    assert_eq!(backend.list(Some(scratch)).await.unwrap(), [object("a", 0), object("b", 0)]);
}

pub async fn ranges_are_exact_or_refused(backend: &dyn Backend, scratch: &Key) {
    let key = below(scratch, "object");
    let whole = pattern(10_000, 4);
    put(backend, &key, &whole).await;
    for (from, to) in [(0, 10_000), (0, 1), (9_999, 10_000), (4_095, 4_097), (0, 0), (5_000, 5_000), (10_000, 10_000)] {
        let read = backend.fetch(&key, from..to).await.unwrap();
        assert_eq!(read, whole[from as usize..to as usize], "{from}..{to}");
    }
    for (from, to) in [(0, 10_001), (9_999, 10_001), (10_001, 10_002), (0, u64::MAX), (u64::MAX - 1, u64::MAX)] {
        assert_eq!(kind(backend.fetch(&key, from..to).await), StoreErrorKind::Corrupt, "{from}..{to}");
    }
}

pub async fn absent_objects_are_absent(backend: &dyn Backend, scratch: &Key) {
    let key = below(scratch, "never/was/there");
    assert_eq!(backend.stat(&key).await.unwrap(), None);
    assert_eq!(kind(backend.fetch(&key, 0..1).await), StoreErrorKind::NotFound);
    assert_eq!(kind(backend.fetch(&key, 0..0).await), StoreErrorKind::NotFound);
    assert_eq!(backend.list(Some(&key)).await.unwrap(), []);
    backend.delete(&key).await.expect("deleting what is not there is success");
    assert_eq!(backend.list(Some(scratch)).await.unwrap(), [], "asking creates nothing");
}

/// A directory goes with its last object, and a name is free again after its object was deleted.
pub async fn deleted_objects_are_gone(backend: &dyn Backend, scratch: &Key) {
    let (one, two) = (below(scratch, "deep/er/one"), below(scratch, "deep/er/two"));
    put(backend, &one, b"1").await;
    put(backend, &two, b"2").await;
    backend.delete(&one).await.unwrap();
    backend.delete(&one).await.unwrap();
    assert_eq!(backend.stat(&one).await.unwrap(), None);
    assert_eq!(kind(backend.fetch(&one, 0..1).await), StoreErrorKind::NotFound);
    assert_eq!(content(backend, &two).await, &b"2"[..]);
    backend.delete(&two).await.unwrap();
    assert_eq!(backend.list(Some(scratch)).await.unwrap(), []);
    put(backend, &one, b"again").await;
    assert_eq!(content(backend, &one).await, &b"again"[..]);
}

pub async fn a_directory_is_not_an_object(backend: &dyn Backend, scratch: &Key) {
    let directory = below(scratch, "directory");
    let inside = below(&directory, "object");
    put(backend, &inside, b"kept").await;
    assert_eq!(backend.stat(&directory).await.unwrap(), None);
    assert_eq!(kind(backend.fetch(&directory, 0..0).await), StoreErrorKind::NotFound);
    backend.delete(&directory).await.unwrap();
    assert_eq!(content(backend, &inside).await, &b"kept"[..]);
    assert_eq!(backend.list(Some(&inside)).await.unwrap(), [], "nothing lies below an object");
}

pub async fn list_is_sorted_and_one_level_deep(backend: &dyn Backend, scratch: &Key) {
    // "b.tail" beside "b/": a store that lists by prefix must not confuse them, nor order by the slash.
    for name in ["c", "b/deep/er", "b/two", "a", "b.tail/x", "b-", "B", "0"] {
        put(backend, &below(scratch, name), name.as_bytes()).await;
    }
    put(backend, &Key::new(format!("{scratch}2/neighbour")), b"").await;
    let directories = ["b", "b.tail"].map(|name| Entry::Directory(name.to_string()));
    let objects = [object("0", 1), object("B", 1), object("a", 1), object("b-", 2), object("c", 1)];
    let found = backend.list(Some(scratch)).await.unwrap();
    assert_eq!(found, [&directories[..], &objects[..]].concat());
    let deeper = [Entry::Directory("deep".to_string()), object("two", 5)];
    assert_eq!(backend.list(Some(&below(scratch, "b"))).await.unwrap(), deeper);
    let top = scratch.as_str().split('/').next().expect("a key has a first part");
    let root = backend.list(None).await.unwrap();
    assert!(root.contains(&Entry::Directory(top.to_string())), "{root:?}");
}

/// Where there is one. More than a page of it, in stores whose pages are short.
pub async fn a_deep_listing_shows_what_plain_ones_do(backend: &dyn Backend, scratch: &Key) {
    if !backend.lists_deep() {
        return;
    }
    let pages = (0..12).map(|number| format!("b/{number:02}"));
    // Neighbours that sort on either side of the slash.
    let named = ["a/x", "ab/x", "b", "b-/x", "b/deep/er", "b0/x", "c-/x", "c/x", "c/y+z %", "c0/x", "d/x"];
    let paths: Vec<String> = named.into_iter().map(str::to_string).chain(pages).collect();
    for path in &paths {
        put(backend, &below(scratch, path), path.as_bytes()).await;
    }
    put(backend, &Key::new(format!("{scratch}2/b/x")), b"").await;
    for (first, last) in [("b", "b"), ("a", "c"), ("b", "c"), ("ab", "d"), ("bb", "bc"), ("0", "z"), ("e", "f")] {
        let is_inside = |path: &&String| path.split_once('/').is_some_and(|(name, _)| first <= name && name <= last);
        let mut expected: Vec<(String, u64)> =
            paths.iter().filter(is_inside).map(|path| (path.clone(), path.len() as u64)).collect();
        expected.sort();
        assert_eq!(backend.list_deep(scratch, first, last).await.unwrap(), Some(expected), "{first} to {last}");
    }
}

pub async fn an_upload_appears_when_completed(backend: &dyn Backend, scratch: &Key) {
    let key = below(scratch, "object");
    let parts = [pattern(70_000, 5), Vec::new(), pattern(700_000, 6), pattern(1, 7)];
    let mut upload = backend.begin_upload(&key).await.unwrap();
    for part in &parts {
        upload.append(Bytes::from(part.clone())).await.unwrap();
        assert_eq!(backend.stat(&key).await.unwrap(), None);
    }
    assert!(!backend.list(Some(scratch)).await.unwrap().iter().any(|entry| matches!(entry, Entry::Object { .. })));
    upload.complete().await.unwrap();
    assert_eq!(content(backend, &key).await, parts.concat());
    assert_eq!(backend.list(Some(scratch)).await.unwrap(), [object("object", 770_001)]);

    let mut empty = backend.begin_upload(&below(scratch, "empty")).await.unwrap();
    empty.complete().await.unwrap();
    assert_eq!(backend.stat(&below(scratch, "empty")).await.unwrap(), Some(0));
}

/// Whether the name was taken before the upload began, or while it ran: in the end, where the content can be compared.
pub async fn an_upload_refuses_a_taken_name(backend: &dyn Backend, scratch: &Key) {
    let (before, meanwhile) = (below(scratch, "before"), below(scratch, "meanwhile"));
    put(backend, &before, b"first").await;
    let mut upload = backend.begin_upload(&before).await.unwrap();
    upload.append(Bytes::from_static(b"second")).await.unwrap();
    assert_eq!(kind(upload.complete().await), StoreErrorKind::AlreadyExists);

    let mut upload = backend.begin_upload(&meanwhile).await.unwrap();
    upload.append(Bytes::from_static(b"second")).await.unwrap();
    put(backend, &meanwhile, b"first").await;
    assert_eq!(kind(upload.complete().await), StoreErrorKind::AlreadyExists);
    for key in [&before, &meanwhile] {
        assert_eq!(content(backend, key).await, &b"first"[..]);
    }
}

pub async fn an_abandoned_upload_leaves_nothing(backend: &dyn Backend, scratch: &Key) {
    for dropped in [true, false] {
        let key = below(scratch, if dropped { "dropped" } else { "aborted" });
        let mut upload = backend.begin_upload(&key).await.unwrap();
        upload.append(Bytes::from(pattern(400_000, 8))).await.unwrap();
        match dropped {
            true => drop(upload),
            false => upload.abort().await.unwrap(),
        }
        assert_eq!(backend.stat(&key).await.unwrap(), None);
        put(backend, &key, b"free").await;
    }
    assert_eq!(backend.list(Some(scratch)).await.unwrap(), [object("aborted", 4), object("dropped", 4)]);
}

/// Or says that it cannot, and is none the worse for being asked.
pub async fn an_upload_reads_back_what_it_holds(backend: &dyn Backend, scratch: &Key) {
    let key = below(scratch, "object");
    let whole = pattern(600_000, 9);
    let mut upload = backend.begin_upload(&key).await.unwrap();
    let mut appended = 0;
    for part in whole.chunks(150_001) {
        upload.append(Bytes::copy_from_slice(part)).await.unwrap();
        appended += part.len();
        for range in [0..appended, appended - 1..appended, appended / 3..appended / 2] {
            match upload.read_back(range.start as u64..range.end as u64).await {
                Ok(read) => assert_eq!(read, whole[range]),
                Err(error) => assert_eq!(error.kind, StoreErrorKind::Unsupported),
            }
        }
        upload.read_back(0..appended as u64 + 1).await.expect_err("more than was appended");
    }
    upload.complete().await.unwrap();
    assert_eq!(content(backend, &key).await, whole);
}

/// 24 MiB, as a put of many parts and as an upload: over every limit a part of a multipart upload has.
pub async fn large_objects_arrive_whole(backend: &dyn Backend, scratch: &Key) {
    let parts: Vec<Bytes> = (0..24).map(|seed| Bytes::from(pattern(1 << 20, seed))).collect();
    let (put, uploaded) = (below(scratch, "put"), below(scratch, "uploaded"));
    backend.put_new(&put, &parts).await.unwrap();
    let mut upload = backend.begin_upload(&uploaded).await.unwrap();
    for part in &parts {
        upload.append(part.clone()).await.unwrap();
    }
    upload.complete().await.unwrap();
    let whole = parts.concat();
    for key in [&put, &uploaded] {
        assert!(content(backend, key).await == whole, "{key} differs from what was stored");
    }
}

/// A store that keeps facts answers for exactly the objects that were stored with them.
pub async fn facts_are_kept_or_disclaimed(backend: &dyn Backend, scratch: &Key) {
    let (with, without, absent) = (below(scratch, "with"), below(scratch, "without"), below(scratch, "absent"));
    let body = Bytes::from_static(b"stored");
    let facts = Facts { stored_crc32: Some(crc32fast::hash(&body)), raw_crc32: Some(0x00C0_FFEE) };
    backend.put_new_with(&with, std::slice::from_ref(&body), &facts).await.unwrap();
    put(backend, &without, b"stored").await;
    let expected = backend.keeps_facts().then_some(0x00C0_FFEE);
    assert_eq!(backend.raw_crc32(&with).await.unwrap(), expected);
    assert_eq!(backend.raw_crc32(&without).await.unwrap(), None);
    assert_eq!(backend.raw_crc32(&absent).await.unwrap(), None);
    assert_eq!(content(backend, &with).await, body);
}

/// A listing is whole however many answers the store needs for it; with `count` over its page size it needs some.
pub async fn every_page_is_listed(backend: &dyn Backend, scratch: &Key, count: usize) {
    let names: Vec<String> = (0..count).map(|i| format!("object{i:05}")).collect();
    for names in names.chunks(16) {
        let puts = names.iter().map(|name| async { put(backend, &below(scratch, name), b"1").await });
        join_all(puts).await;
    }
    put(backend, &below(scratch, "object00003.d/below"), b"1").await;
    let mut expected = vec![Entry::Directory("object00003.d".to_string())];
    expected.extend(names.iter().map(|name| object(name, 1)));
    assert!(backend.list(Some(scratch)).await.unwrap() == expected, "names are missing, or there twice");
}

/// A put dropped at some await took effect or did not; a second one settles it. Nothing else is ever seen.
pub async fn a_dropped_put_is_all_or_nothing(backend: &dyn Backend, scratch: &Key) {
    let body = [Bytes::from(pattern(500_000, 10))];
    let keys: Vec<Key> = (0..8).map(|i| below(scratch, &format!("object{i}"))).collect();
    for (i, key) in keys.iter().enumerate() {
        let _ = tokio::time::timeout(Duration::from_micros(150 * i as u64), backend.put_new(key, &body)).await;
    }
    let settle = keys.iter().map(|key| backend.put_new(key, &body));
    for settled in join_all(settle).await {
        assert!(settled.is_ok() || kind(settled) == StoreErrorKind::AlreadyExists);
    }
    for key in &keys {
        assert_eq!(content(backend, key).await, body[0]);
    }
}

/// The longest and strangest names the layout makes. Uses a cluster named `conformance` and cleans it up.
pub async fn names_of_the_layout_are_stored(backend: &dyn Backend) {
    let lineage = Lineage::new("conformance", SystemId(u64::MAX), u32::MAX);
    let segment = SegmentName { timeline: TimelineId(u32::MAX), high: u32::MAX, low: 0xFFF };
    let tail = TailName {
        epoch: Epoch(u32::MAX),
        from: Lsn(u64::MAX - 1),
        to: Lsn::MAX,
        raw_crc32: u32::MAX,
        last_commit: jiff::Timestamp::from_microsecond(jiff::Timestamp::MAX.as_microsecond()).ok(),
        form: Form::Plain,
    };
    let keys = [
        lineage.lineage_json(),
        lineage.writer(Epoch(1)),
        lineage.history(TimelineId(2)),
        lineage.segment(segment, Form::Plain),
        lineage.tail(segment, &tail),
        lineage.conflict(segment, 0xABCD, Form::Plain),
        lineage.index(IndexName { first: segment, last: segment, epoch: Epoch(7) }),
        lineage.ledger_entry(jiff::Timestamp::UNIX_EPOCH, "gap-healed", 1),
    ];
    for key in &keys {
        put(backend, key, key.as_str().as_bytes()).await;
    }
    for key in &keys {
        assert_eq!(content(backend, key).await, key.as_str().as_bytes());
    }
    let directory = backend.list(Some(&lineage.wal_directory(WalDirectory::of(segment)))).await.unwrap();
    assert_eq!(directory.len(), 4, "segment, tails, conflict, index: {directory:?}");
    let tails = backend.list(Some(&lineage.tail_directory(segment))).await.unwrap();
    assert!(matches!(&tails[..], [Entry::Object { name, .. }] if TailName::parse(name) == Some(tail)), "{tails:?}");
    for key in &keys {
        backend.delete(key).await.unwrap();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testkit::store::MemoryStore;

    #[tokio::test]
    async fn the_model_conforms() {
        run_all(&MemoryStore::default(), &Key::new("scratch")).await;
        run_all(&MemoryStore::listing_deep(), &Key::new("scratch")).await;
    }
}

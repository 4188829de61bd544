//! Segments and other objects made whole between stores in memory.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::*;
use crate::archiver::StoreHealth;
use crate::catalog::index::{Crc32, IndexFile};
use crate::codec::{Encoder, Form, LEVEL_DEFAULT};
use crate::repository::layout::{Epoch, IndexName, Lineage};
use crate::testkit::store::MemoryStore;
use crate::wal::{Lsn, SegmentNumber, SegmentSummary, SystemId, TimelineId};

const MIB: u64 = 1 << 20;

fn size() -> SegmentSize {
    SegmentSize::new(MIB).unwrap()
}

fn name() -> SegmentName {
    SegmentName::new(TimelineId(1), SegmentNumber(3), size())
}

fn writer() -> (MemoryStore, Writer) {
    let store = MemoryStore::default();
    let archive = Archive::new(Arc::new(store.clone()), Lineage::new("main", SystemId(7), 1));
    (store, Writer::new(archive, Epoch::default(), StoreHealth::default(), CancellationToken::new()))
}

fn raw(seed: u64) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    (0..MIB).map(|_| random.u8(..16)).collect()
}

fn put(store: &MemoryStore, key: Key, body: Bytes) {
    store.tamper(|objects| drop(objects.insert(key, body)));
}

fn object(store: &MemoryStore, key: &Key) -> Option<Bytes> {
    store.objects().get(key).cloned()
}

/// A repository with one sealed segment; its index entry and stored bytes.
fn sealed(store: &MemoryStore, writer: &Writer) -> (IndexEntry, Bytes) {
    let raw = raw(1);
    let frame = Encoder::new(LEVEL_DEFAULT).encode(&raw);
    let entry = IndexEntry {
        segment: name(),
        start_lsn: Lsn(3 * MIB),
        end_lsn: Lsn(4 * MIB),
        raw_bytes: MIB,
        raw_crc32: Crc32(frame.raw_crc32),
        stored_bytes: frame.bytes.len() as u64,
        stored_crc32: Crc32(frame.stored_crc32),
        summary: SegmentSummary::empty(None),
    };
    let lineage = &writer.archive.lineage;
    put(store, lineage.segment(name(), Form::Plain), frame.bytes.clone());
    let file = IndexFile { schema: 1, segment_size: size(), entries: vec![entry.clone()] };
    let index = lineage.index(IndexName { first: name(), last: name(), epoch: Epoch(1) });
    put(store, index, serde_json::to_vec(&file).unwrap().into());
    (entry, frame.bytes)
}

fn flipped(bytes: &Bytes) -> Bytes {
    let mut bytes = bytes.to_vec();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    bytes.into()
}

async fn original(writer: &Writer, entry: &IndexEntry) -> Original {
    copy::originals(&writer.archive, name(), size(), entry).await.unwrap().remove(0)
}

#[tokio::test]
async fn a_copy_goes_beside_what_is_damaged_and_into_the_place_of_what_is_missing() {
    let ((there, source), (here, target)) = (writer(), writer());
    let (entry, good) = sealed(&there, &source);
    sealed(&here, &target);
    let lineage = &target.archive.lineage;
    let (own, repair) = (lineage.segment(name(), Form::Plain), lineage.repair(name(), entry.raw_crc32.0, Form::Plain));
    assert!(is_whole(&target, name(), size(), &entry).await.unwrap());
    let damaged = flipped(&good);
    put(&here, own.clone(), damaged.clone());
    assert!(!is_whole(&target, name(), size(), &entry).await.unwrap());
    let original = original(&source, &entry).await;
    // Twice: as after a crash before anybody was told.
    for _ in 0..2 {
        copy_segment(&target, &source.archive, &original, &entry).await.unwrap();
    }
    assert_eq!((object(&here, &own), object(&here, &repair)), (Some(damaged), Some(good.clone())));
    assert!(is_whole(&target, name(), size(), &entry).await.unwrap());

    here.tamper(|objects| objects.retain(|key, _| *key != own && *key != repair));
    assert!(!is_whole(&target, name(), size(), &entry).await.unwrap());
    copy_segment(&target, &source.archive, &original, &entry).await.unwrap();
    assert_eq!((object(&here, &own), object(&here, &repair)), (Some(good), None));
}

#[tokio::test]
async fn a_damaged_copy_is_never_stored_and_a_repair_is_as_good_a_source() {
    let ((there, source), (here, target)) = (writer(), writer());
    let (entry, good) = sealed(&there, &source);
    let original = original(&source, &entry).await;
    let lineage = &source.archive.lineage;
    put(&there, lineage.segment(name(), Form::Plain), flipped(&good));
    let copied = copy_segment(&target, &source.archive, &original, &entry).await;
    assert!(matches!(copied, Err(Trouble::Damaged(_))), "{copied:?}");
    assert!(here.objects().is_empty());
    put(&there, lineage.repair(name(), entry.raw_crc32.0, Form::Plain), good.clone());
    let originals = copy::originals(&source.archive, name(), size(), &entry).await.unwrap();
    copy_segment(&target, &source.archive, originals.last().unwrap(), &entry).await.unwrap();
    assert_eq!(here.objects().into_values().collect::<Vec<_>>(), [good]);
}

#[tokio::test]
async fn what_is_received_anew_gets_a_name_only_if_it_is_what_was_archived() {
    let ((there, source), (here, target)) = (writer(), writer());
    let (entry, _) = sealed(&there, &source);
    let workers = Workers::inline();
    for (seed, length, is_it) in [(2, MIB, false), (1, MIB - 1, false), (1, MIB, true)] {
        let mut remade = Remade::begin(&target, &workers, &entry).await.unwrap();
        for chunk in raw(seed)[..length as usize].chunks(100_000) {
            remade.feed(chunk).await.unwrap();
        }
        assert_eq!(remade.missing(), MIB - length);
        assert_eq!(remade.finish().await.unwrap(), is_it);
        assert_eq!(here.objects().len(), usize::from(is_it));
    }
    let (key, bytes) = here.objects().into_iter().next().unwrap();
    assert_eq!(key, target.archive.lineage.repair(name(), entry.raw_crc32.0, Form::Plain));
    assert_eq!(crate::codec::decode::decode_exact(&bytes, MIB as usize).unwrap().0, raw(1));
}

#[tokio::test]
async fn nothing_is_deleted_before_what_replaces_it_is_here_and_it_may_be() {
    let ((there, source), (here, target)) = (writer(), writer());
    let key = Key::new("main/7/backups/20261122T110000Z-full/base/0001.tar.zst");
    let (good, damaged) = (Bytes::from_static(b"good"), Bytes::from_static(b"evil"));
    let expected = Expected::Stored(crc32fast::hash(&good));
    put(&here, key.clone(), damaged.clone());
    put(&there, key.clone(), flipped(&good));
    let keys = (&key, &key);
    let replaced = replace(&target, &source.archive, keys, 4, expected, async || panic!("nothing is here yet")).await;
    assert!(matches!(replaced, Err(Trouble::Damaged(_))), "{replaced:?}");
    put(&there, key.clone(), good.clone());
    let refusal = async || Err(Trouble::Damaged("another holds the lease".into()));
    replace(&target, &source.archive, keys, 4, expected, refusal).await.unwrap_err();
    assert_eq!(object(&here, &key), Some(damaged));
    replace(&target, &source.archive, keys, 4, expected, async || Ok(())).await.unwrap();
    assert_eq!(object(&here, &key), Some(good));
}

//! Owns: whether the object under a segment's name holds what we have.
//! Does not own: what follows from it (`push.rs`).
//! Rests on `proto-notes/07-repository-format.md`, "two objects of one name".
//!
//! An encrypted object does not say what it holds to whoever has no identity, and two encryptions of one content differ.
//! What can tell, in this order: it has the very bytes we made; an identity; the raw CRC-32 that the store keeps with
//! it; the one its writer announced in a marker object before it was there. Whoever drops a marker has indexed the
//! segment first, so the markers are looked at before the index: one that is gone by then has its entry there.
//! Where nothing can tell, nothing is claimed.

use super::writer::{ArchiveError, Writer};
use crate::catalog::SegmentObject;
use crate::catalog::store::{StoredObject, place};
use crate::codec::Form;
use crate::repository::layout::{WalDirectory, WalObject};
use crate::repository::{Entry, StoreError, StoreErrorKind};
use crate::wal::{SegmentName, SegmentSize};

/// What we have.
#[derive(Clone, Copy, Debug)]
pub struct Ours {
    pub raw_crc32: u32,
    /// The object we have made of it, if we have.
    pub stored: Option<StoredObject>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    /// The object that is there holds our content.
    Equal(StoredObject),
    /// 0 where it holds no segment at all.
    Different {
        theirs: u32,
    },
    Unknown {
        object: String,
    },
}

/// Compares with every object of the name: normally one.
pub async fn with_stored(
    writer: &Writer,
    name: SegmentName,
    size: SegmentSize,
    ours: &Ours,
) -> Result<Finding, ArchiveError> {
    writer.confirm_epoch(true).await?;
    let mut known = None;
    for object in writer.retry(|| writer.archive.segment_objects(name)).await? {
        match judge(writer, name, size, object, ours).await? {
            different @ Finding::Different { .. } => return Ok(different),
            equal @ Finding::Equal(_) if !matches!(known, Some(Finding::Equal(_))) => known = Some(equal),
            other => known = known.or(Some(other)),
        }
    }
    known.ok_or_else(|| {
        let cause = "its name was taken a moment ago, and is free now";
        StoreError::new(StoreErrorKind::Unavailable, "read", name.to_string(), cause).into()
    })
}

async fn judge(
    writer: &Writer,
    name: SegmentName,
    size: SegmentSize,
    object: SegmentObject,
    ours: &Ours,
) -> Result<Finding, ArchiveError> {
    let archive = &writer.archive;
    let found = match writer.retry(|| archive.inspect_segment(name, object, size)).await {
        // Damaged or foreign: not ours to replace.
        Err(ArchiveError::Store(error)) if error.is(StoreErrorKind::Corrupt) => {
            tracing::error!(%error, "the object under this segment's name is damaged");
            return Ok(Finding::Different { theirs: 0 });
        }
        found => found?,
    };
    let is_ours =
        |made: StoredObject| (made.stored_bytes, made.stored_crc32) == (found.stored_bytes, found.stored_crc32);
    if ours.stored.is_some_and(is_ours) {
        return Ok(Finding::Equal(found));
    }
    let key = archive.lineage.segment(name, object.form);
    let raw_crc32 = match (found.raw_crc32, object.form) {
        (None, Form::Encrypted) => match writer.retry(|| archive.backend.raw_crc32(&key)).await? {
            Some(raw_crc32) => Some(raw_crc32),
            None => announced(writer, name, size, object, ours.raw_crc32).await?,
        },
        (raw_crc32, _) => raw_crc32,
    };
    Ok(match raw_crc32 {
        Some(raw_crc32) if raw_crc32 == ours.raw_crc32 => Finding::Equal(found),
        Some(theirs) => Finding::Different { theirs },
        None => Finding::Unknown { object: place(archive.backend.as_ref(), &key) },
    })
}

/// The raw CRC-32 by the index, or by the only marker; of several markers one that is not ours: then two writers had
/// different content for this name, whichever of them has stored it.
async fn announced(
    writer: &Writer,
    name: SegmentName,
    size: SegmentSize,
    object: SegmentObject,
    ours: u32,
) -> Result<Option<u32>, ArchiveError> {
    let archive = &writer.archive;
    let directory = archive.lineage.wal_directory(WalDirectory::of(name));
    let listed = writer.retry(|| archive.backend.list(Some(&directory))).await?;
    let markers: Vec<u32> = listed.iter().filter_map(|entry| marker_of(entry, name)).collect();
    let contents = writer.retry(|| archive.directory_around(name, size)).await?;
    let entry = contents.entries.get(&name).filter(|entry| contents.object_of(entry) == Some(object));
    let of_markers = || markers.iter().find(|&&marker| marker != ours).or(markers.first()).copied();
    Ok(entry.map(|entry| entry.raw_crc32.0).or_else(of_markers))
}

fn marker_of(entry: &Entry, name: SegmentName) -> Option<u32> {
    let Entry::Object { name: object, .. } = entry else { return None };
    match WalObject::parse(object)? {
        WalObject::RawMarker(segment, raw_crc32) if segment == name => Some(raw_crc32),
        _ => None,
    }
}

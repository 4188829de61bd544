//! Owns: writing index objects, and merging the many small ones of a directory into one.
//! Does not own: what an entry says (`catalog/index.rs`), when it may be written (`mod.rs`).

use std::collections::BTreeMap;

use bytes::Bytes;

use super::writer::{ArchiveError, Writer};
use crate::catalog::index::{IndexEntry, IndexFile};
use crate::repository::StoreErrorKind;
use crate::repository::layout::{Epoch, IndexName, WalDirectory};
use crate::wal::SegmentSize;

/// Stores `entries` under `name`. An object of this name with these entries is success.
pub async fn put_index(
    writer: &Writer,
    name: IndexName,
    segment_size: SegmentSize,
    entries: &[IndexEntry],
) -> Result<(), ArchiveError> {
    writer.confirm_epoch(false).await?;
    let file = IndexFile { schema: 1, segment_size, entries: entries.to_vec() };
    let body = [Bytes::from(serde_json::to_vec(&file).expect("an index file is plain data"))];
    let key = writer.archive.lineage.index(name);
    match writer.retry(|| writer.archive.backend.put_new(&key, &body)).await {
        Err(ArchiveError::Store(error)) if error.is(StoreErrorKind::AlreadyExists) => {
            let stored = writer.retry(|| writer.archive.read_index(name, segment_size)).await?;
            match disagreement(&stored.entries, entries) {
                None => Ok(()),
                Some((stored, ours)) => Err(ArchiveError::Conflict {
                    name: ours.segment,
                    stored: stored.raw_crc32.0,
                    ours: ours.raw_crc32.0,
                }),
            }
        }
        other => other,
    }
}

/// The first pair of entries that tell of different raw contents.
fn disagreement<'a>(stored: &'a [IndexEntry], ours: &'a [IndexEntry]) -> Option<(&'a IndexEntry, &'a IndexEntry)> {
    let mut pairs = stored.iter().zip(ours);
    pairs.find(|(stored, ours)| (stored.segment, stored.raw_crc32) != (ours.segment, ours.raw_crc32))
}

/// The index objects this writer put, by directory: what can be merged.
#[derive(Debug, Default)]
pub struct IndexGroups(BTreeMap<WalDirectory, BTreeMap<IndexName, Vec<IndexEntry>>>);

impl IndexGroups {
    /// Small objects in one directory before they are merged: fewer means more rewriting, more means more
    /// requests for every reader.
    const OBJECTS_MAX: usize = 32;

    pub fn add(&mut self, name: IndexName, entries: Vec<IndexEntry>) {
        self.0.entry(WalDirectory::of(name.first)).or_default().insert(name, entries);
    }

    /// A merge that is due: of a directory with many objects, or one that is finished.
    pub fn plan_merge(&mut self, epoch: Epoch) -> Option<(IndexName, Vec<IndexEntry>)> {
        let newest = *self.0.last_key_value()?.0;
        // A finished directory that is one object needs no more attention.
        self.0.retain(|&directory, objects| directory == newest || objects.len() > 1);
        let due = |directory: &WalDirectory, count: usize| count >= Self::OBJECTS_MAX || *directory != newest;
        let (_, objects) = self.0.iter().find(|(directory, objects)| due(directory, objects.len()))?;
        let entries: Vec<IndexEntry> = objects.values().flatten().cloned().collect();
        let (first, last) = (entries.first()?.segment, entries.last()?.segment);
        Some((IndexName { first, last, epoch }, entries))
    }

    /// The merged object is stored: returns the objects it made superfluous.
    pub fn replace(&mut self, merged: IndexName, entries: Vec<IndexEntry>) -> Vec<IndexName> {
        let objects = self.0.entry(WalDirectory::of(merged.first)).or_default();
        let inside = |name: &IndexName| name.first >= merged.first && name.last <= merged.last && *name != merged;
        let parts: Vec<IndexName> = objects.keys().filter(|name| inside(name)).copied().collect();
        parts.iter().for_each(|part| drop(objects.remove(part)));
        objects.insert(merged, entries);
        parts
    }
}

//! Owns: writing index objects, and merging the many small ones of a directory into one.
//! Does not own: what an entry says (`catalog/index.rs`), when it may be written (`mod.rs`).

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use super::writer::{ArchiveError, Writer};
use crate::catalog::DirectoryContents;
use crate::catalog::index::{IndexEntry, IndexFile};
use crate::repository::StoreErrorKind;
use crate::repository::layout::{Epoch, IndexName, WalDirectory};
use crate::wal::{SegmentName, SegmentSize};

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
    match writer.store(|| writer.archive.backend.put_new(&key, &body)).await {
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

/// The index objects of the directories a writer works in, by directory: what can be merged.
#[derive(Debug, Default)]
pub struct IndexGroups(BTreeMap<WalDirectory, Group>);

#[derive(Debug, Default)]
struct Group {
    objects: BTreeSet<IndexName>,
    entries: BTreeMap<SegmentName, IndexEntry>,
}

impl IndexGroups {
    /// Small objects in one directory before they are merged: fewer means more rewriting, more means more
    /// requests for every reader.
    const OBJECTS_MAX: usize = 32;

    /// Takes what earlier writers left in a directory.
    pub fn adopt(&mut self, contents: &DirectoryContents) {
        let group = self.0.entry(contents.directory).or_default();
        group.objects.extend(contents.index_files.iter().map(|(name, _)| *name));
        group.entries.extend(contents.entries.iter().map(|(name, entry)| (*name, entry.clone())));
    }

    pub fn add(&mut self, name: IndexName, entries: Vec<IndexEntry>) {
        let group = self.0.entry(WalDirectory::of(name.first)).or_default();
        group.objects.insert(name);
        group.entries.extend(entries.into_iter().map(|entry| (entry.segment, entry)));
    }

    /// A merge that is due: in a directory with many objects, or one that is finished. Of consecutive segments
    /// only: a hole in the archive stays one in its index.
    pub fn plan_merge(&mut self, epoch: Epoch) -> Option<(IndexName, Vec<IndexEntry>)> {
        let newest = *self.0.last_key_value()?.0;
        // A finished directory needs no more attention once nothing in it can be merged.
        self.0.retain(|&directory, group| directory == newest || group.merge(epoch).is_some());
        let due =
            |directory: WalDirectory, group: &Group| group.objects.len() >= Self::OBJECTS_MAX || directory != newest;
        self.0.iter().filter(|&(&directory, group)| due(directory, group)).find_map(|(_, group)| group.merge(epoch))
    }

    /// The merged object is stored: returns the objects it made superfluous.
    pub fn replace(&mut self, merged: IndexName) -> Vec<IndexName> {
        let Some(group) = self.0.get_mut(&WalDirectory::of(merged.first)) else { return Vec::new() };
        let parts: Vec<IndexName> = group.objects.iter().filter(|name| is_part(name, &merged)).copied().collect();
        group.objects.retain(|name| !is_part(name, &merged));
        group.objects.insert(merged);
        parts
    }
}

fn is_part(name: &IndexName, merged: &IndexName) -> bool {
    name.first >= merged.first && name.last <= merged.last && name != merged
}

impl Group {
    /// The first run of consecutive segments that several objects describe, as one object.
    fn merge(&self, epoch: Epoch) -> Option<(IndexName, Vec<IndexEntry>)> {
        let mut runs: Vec<Vec<&IndexEntry>> = Vec::new();
        for entry in self.entries.values() {
            match runs.last_mut() {
                Some(run) if run.last().is_some_and(|last| last.end_lsn == entry.start_lsn) => run.push(entry),
                _ => runs.push(vec![entry]),
            }
        }
        runs.into_iter().find_map(|run| {
            let (first, last) = (run.first()?.segment, run.last()?.segment);
            let merged = IndexName { first, last, epoch };
            let parts = self.objects.iter().filter(|name| is_part(name, &merged)).count();
            (parts >= 2).then(|| (merged, run.into_iter().cloned().collect()))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::index::Crc32;
    use crate::wal::{SegmentNumber, SegmentSummary, TimelineId};

    const SIZE: SegmentSize = SegmentSize::MIB_16;

    fn entry(number: u64) -> IndexEntry {
        let number = SegmentNumber(number);
        IndexEntry {
            segment: SegmentName::new(TimelineId(1), number, SIZE),
            start_lsn: SIZE.start_of(number),
            end_lsn: SIZE.end_of(number),
            raw_bytes: SIZE.bytes(),
            raw_crc32: Crc32(1),
            stored_bytes: 5,
            stored_crc32: Crc32(2),
            summary: SegmentSummary::empty(None),
        }
    }

    fn add(groups: &mut IndexGroups, number: u64) {
        let entry = entry(number);
        groups.add(IndexName { first: entry.segment, last: entry.segment, epoch: Epoch(1) }, vec![entry]);
    }

    #[test]
    fn many_objects_are_merged_and_a_finished_directory_is() {
        let mut groups = IndexGroups::default();
        (1..=31).for_each(|number| add(&mut groups, number));
        assert!(groups.plan_merge(Epoch(2)).is_none());
        add(&mut groups, 32);
        let (merged, entries) = groups.plan_merge(Epoch(2)).unwrap();
        assert_eq!((entries.len(), merged.epoch), (32, Epoch(2)));
        assert_eq!(groups.replace(merged).len(), 32);
        assert!(groups.plan_merge(Epoch(2)).is_none());
        add(&mut groups, 33);
        // The next directory begins: this one is finished.
        add(&mut groups, 256);
        let (merged, entries) = groups.plan_merge(Epoch(2)).unwrap();
        assert_eq!(entries.len(), 33);
        assert_eq!(groups.replace(merged).len(), 2);
        assert!(groups.plan_merge(Epoch(2)).is_none());
    }

    #[test]
    fn a_hole_is_not_merged_over() {
        let mut groups = IndexGroups::default();
        [1, 2, 4, 256].iter().for_each(|&number| add(&mut groups, number));
        let (merged, entries) = groups.plan_merge(Epoch(2)).unwrap();
        assert_eq!(entries.len(), 2);
        groups.replace(merged);
        assert!(groups.plan_merge(Epoch(2)).is_none(), "segment 4 stands alone");
    }
}

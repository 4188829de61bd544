//! Owns: deleting what a plan says and an announcement covers: in which order, in batches, at a bounded rate; what the store
//! would not let go.
//! Does not own: the announcement (`apply.rs`).
//!
//! Again and again until all of it is gone is the same as once: every step looks what is there.

use std::collections::BTreeSet;
use std::time::Duration;

use super::apply::{ExpireProgress, Freed, Job, Locked, lost};
use super::inventory::Debris;
use super::plan::Plan;
use crate::catalog::contents::DirectoryContents;
use crate::catalog::store::inventory::HeldObject;
use crate::catalog::{Expired, SegmentRange};
use crate::error::Failure;
use crate::repository::layout::{BackupId, WalDirectory};
use crate::repository::{Key, StoreError, StoreErrorKind};
use crate::wal::{SegmentName, TimelineId};

/// Objects deleted between two looks at the lease: what one request to S3 may name.
const BATCH: usize = 1000;
/// After each object: stores answer a few thousand deletions a second, and others want answers too.
const PACE: Duration = Duration::from_micros(250);
/// For a store that does not answer for a moment.
const TRIES: u32 = 4;
const RETRY_INTERVAL: Duration = Duration::from_secs(2);
/// Named at most in what is said of an expiry.
const LOCKED_MAX: usize = 10_000;

/// A plan on its way.
pub struct Deleting<'a, 'b> {
    job: &'a Job<'b>,
    plan: &'a Plan,
    freed: Freed,
    locked: Vec<Locked>,
    /// Whether anything was deleted since the right to delete was last seen.
    has_deleted: bool,
}

impl<'a, 'b> Deleting<'a, 'b> {
    pub fn new(job: &'a Job<'b>, plan: &'a Plan) -> Deleting<'a, 'b> {
        Deleting { job, plan, freed: Freed::default(), locked: Vec::new(), has_deleted: false }
    }

    pub async fn run(mut self) -> Result<(Freed, Vec<Locked>), Failure> {
        let (bytes_total, objects_total) = self.plan.freed();
        let progress = ExpireProgress { objects_total, bytes_total, ..ExpireProgress::default() };
        self.job.progress.send_replace(progress);
        // Children before what they build on.
        let mut backups: Vec<BackupId> = self.plan.removed_backups().map(|verdict| verdict.id).collect();
        backups.reverse();
        for id in backups {
            self.delete_backup(id).await?;
        }
        self.delete_wal().await?;
        let index = |it: &super::plan::IndexVerdict| HeldObject {
            key: self.job.archive.lineage.index(it.name),
            bytes: it.bytes,
        };
        let indexes: Vec<HeldObject> = self.plan.indexes.iter().map(index).collect();
        self.delete(&indexes).await?;
        let debris: Vec<&[Debris]> = self.plan.debris.chunk_by(|one, next| one.kind == next.kind).collect();
        for kind in debris {
            let objects: Vec<HeldObject> =
                kind.iter().map(|it| HeldObject { key: it.key.clone(), bytes: it.bytes }).collect();
            self.delete(&objects).await?;
        }
        Ok((self.freed, self.locked))
    }

    /// Step by step: what would make it count again goes first, what says that it is dead last.
    async fn delete_backup(&mut self, id: BackupId) -> Result<(), Failure> {
        let archive = self.job.archive;
        if !archive.is_dead(id).await? {
            // Taken back by somebody, or gone since: never without its announcement.
            return Ok(());
        }
        let objects = archive.backup_objects(id).await?;
        let lineage = &archive.lineage;
        let special = [lineage.backup_begin(id), lineage.backup_json(id), lineage.backup_dead(id)];
        let step = |object: &HeldObject| match special.iter().position(|key| *key == object.key) {
            Some(0) => 0,
            Some(at) => at + 1,
            None => 1,
        };
        let steps: Vec<&[HeldObject]> = objects.chunk_by(|one, next| step(one) == step(next)).collect();
        for objects in steps {
            if !self.delete(objects).await? {
                return Ok(());
            }
        }
        self.freed.backups += 1;
        Ok(())
    }

    async fn delete_wal(&mut self) -> Result<(), Failure> {
        let archive = self.job.archive;
        let ranges: Vec<SegmentRange> =
            self.plan.removed_wal().map(|it| SegmentRange { first: it.first, last: it.last }).collect();
        if ranges.is_empty() {
            return Ok(());
        }
        let size = archive.lineage_file().await?.segment_size;
        // What is not announced stays, whatever the plan says.
        let expired = archive.expired().await?;
        let (_, directories) = archive.wal_listing().await?;
        for directory in directories {
            let touched = ranges.iter().filter(|range| touches(range, directory)).copied().collect::<Vec<_>>();
            if touched.is_empty() {
                continue;
            }
            let contents = archive.listed_directory(directory, size).await?;
            let (names, objects) = self.objects_in(&contents, &touched, &expired);
            if self.delete(&objects).await? {
                self.freed.segments += names;
            }
        }
        Ok(())
    }

    /// How many names, and all their objects.
    fn objects_in(
        &self,
        contents: &DirectoryContents,
        ranges: &[SegmentRange],
        expired: &Expired,
    ) -> (u64, Vec<HeldObject>) {
        let lineage = &self.job.archive.lineage;
        let goes = |name: &SegmentName| {
            ranges.iter().any(|range| range.first <= *name && *name <= range.last) && expired.contains(*name)
        };
        let mut names: BTreeSet<SegmentName> = BTreeSet::new();
        let mut objects: Vec<HeldObject> = Vec::new();
        let mut add = |name: &SegmentName, key: Key, bytes: u64| {
            names.insert(*name);
            objects.push(HeldObject { key, bytes });
        };
        for (name, all) in contents.segments.iter().filter(|(name, _)| goes(name)) {
            all.iter().for_each(|it| add(name, lineage.segment(*name, it.form), it.stored_bytes));
        }
        for (name, all) in contents.tails.iter().filter(|(name, _)| goes(name)) {
            all.iter().for_each(|it| add(name, lineage.tail(*name, &it.name), it.stored_bytes));
        }
        for (name, all) in contents.conflicts.iter().filter(|(name, _)| goes(name)) {
            all.iter().for_each(|(crc, it)| add(name, lineage.conflict(*name, *crc, it.form), it.stored_bytes));
        }
        for (name, all) in contents.repairs.iter().filter(|(name, _)| goes(name)) {
            all.iter().for_each(|(crc, it)| add(name, lineage.repair(*name, *crc, it.form), it.stored_bytes));
        }
        for (name, all) in contents.raw_markers.iter().filter(|(name, _)| goes(name)) {
            all.iter().for_each(|crc| add(name, lineage.raw_marker(*name, *crc), 0));
        }
        (names.len() as u64, objects)
    }

    /// Whether all of them are gone.
    async fn delete(&mut self, objects: &[HeldObject]) -> Result<bool, Failure> {
        let mut is_all = true;
        for batch in objects.chunks(BATCH) {
            self.job.confirm().await?;
            let keys: Vec<Key> = batch.iter().map(|object| object.key.clone()).collect();
            let kept = self.delete_batch(&keys).await?;
            if kept.len() == keys.len() && !self.has_deleted {
                // Locks, or no right to delete any more?
                self.job.probe().await?;
            }
            self.has_deleted |= kept.len() < keys.len();
            is_all &= kept.is_empty();
            self.account(batch, kept);
            tokio::time::sleep(PACE * batch.len() as u32).await;
        }
        Ok(is_all)
    }

    async fn delete_batch(&self, keys: &[Key]) -> Result<Vec<(Key, StoreError)>, Failure> {
        let mut tries = 1;
        loop {
            let deleted = self.job.while_held(self.job.archive.backend.delete_each(keys)).await;
            match deleted.ok_or_else(lost)? {
                Ok(kept) => return Ok(kept),
                Err(error) if error.is(StoreErrorKind::Unavailable) && tries < TRIES => {
                    tries += 1;
                    tokio::time::sleep(RETRY_INTERVAL).await;
                    self.job.confirm().await?;
                }
                Err(error) => {
                    return Err(
                        Failure::from(error).context("what was announced is deleted in part; the rest goes next time")
                    );
                }
            }
        }
    }

    fn account(&mut self, batch: &[HeldObject], kept: Vec<(Key, StoreError)>) {
        let is_kept = |key: &Key| kept.iter().any(|(kept, _)| kept == key);
        for object in batch {
            if !is_kept(&object.key) {
                self.freed.objects += 1;
                self.freed.bytes += object.bytes;
            }
        }
        let bytes_of = |key: &Key| batch.iter().find(|object| object.key == *key).map_or(0, |object| object.bytes);
        let room = LOCKED_MAX.saturating_sub(self.locked.len());
        let locked: Vec<Locked> = kept
            .into_iter()
            .take(room)
            .map(|(key, error)| Locked { bytes: bytes_of(&key), key, cause: error.cause })
            .collect();
        self.locked.extend(locked);
        let freed = self.freed;
        self.job.progress.send_modify(|progress| {
            (progress.objects_done, progress.bytes_done) = (freed.objects, freed.bytes);
        });
    }
}

fn touches(range: &SegmentRange, directory: WalDirectory) -> bool {
    let is_in = |timeline: TimelineId| timeline == directory.timeline;
    is_in(range.first.timeline) && range.first.high <= directory.high && directory.high <= range.last.high
}

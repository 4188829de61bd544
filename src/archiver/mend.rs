//! Good bytes for an object that is damaged or missing: a copy of another repository's, or made anew from raw WAL.
//!
//! Owns: that an object gets its name only when its content was seen to be what the index says; that a damaged object is
//! deleted only when what replaces it is here, whole.
//! Does not own: what is damaged and from where it is made whole (`agent::mend`), copying (`copy.rs`).
//! Rests on `proto-notes/07-repository-format.md`, "Damage and repairs".

use bytes::Bytes;

use super::body::{Piece, Wrapping};
use super::copy::{self, Expected, Original, Trouble};
use super::workers::Workers;
use super::writer::{ArchiveError, Writer};
use crate::catalog::index::IndexEntry;
use crate::catalog::store::Archive;
use crate::codec::{Crc32Parts, FRAME_BYTES};
use crate::repository::{Facts, Key, StoreErrorKind, Upload};
use crate::wal::{SegmentName, SegmentSize};

/// Puts a copy of `original` where readers of `target` find it: under the segment's own name where that is free and the
/// copy is the very object `entry`, the target's own, describes; as a repair otherwise. A repair that is there already
/// has the content its name says.
pub async fn copy_segment(
    target: &Writer,
    source: &Archive,
    original: &Original,
    entry: &IndexEntry,
) -> Result<(), Trouble> {
    let (archive, name, raw_crc32) = (&target.archive, entry.segment, entry.raw_crc32.0);
    let objects = target.retry(|| archive.segment_objects(name)).await?;
    let is_the_same =
        (original.stored_bytes, original.expected.stored()) == (entry.stored_bytes, Some(entry.stored_crc32.0));
    let to = match objects.is_empty() && is_the_same {
        true => archive.lineage.segment(name, original.form),
        false => archive.lineage.repair(name, raw_crc32, original.form),
    };
    let facts = Facts { stored_crc32: original.expected.stored(), raw_crc32: Some(raw_crc32) };
    let Original { key, stored_bytes, expected, .. } = original;
    let mut ready = copy::fetch_checked(target, source, key, &to, *stored_bytes, *expected).await?;
    accept_existing(ready.store(target, &to, &facts).await)
}

/// Puts a copy in the place of an object that is damaged, or missing. The damaged one goes when its replacement is here:
/// a crash between the two leaves none, and the ledger says so until it is mended. `may_delete` is asked just before.
pub async fn replace<F>(
    target: &Writer,
    source: &Archive,
    (from, to): (&Key, &Key),
    stored_bytes: u64,
    expected: Expected,
    may_delete: impl FnOnce() -> F,
) -> Result<(), Trouble>
where
    F: Future<Output = Result<(), Trouble>>,
{
    let backend = &target.archive.backend;
    let mut ready = copy::fetch_checked(target, source, from, to, stored_bytes, expected).await?;
    may_delete().await?;
    target.call_once(backend.delete_all(std::slice::from_ref(to))).await?;
    ready.store(target, to, &Facts { stored_crc32: expected.stored(), raw_crc32: None }).await
}

/// As [`replace`], with content that is here.
pub async fn replace_with<F>(
    target: &Writer,
    to: &Key,
    content: Bytes,
    may_delete: impl FnOnce() -> F,
) -> Result<(), Trouble>
where
    F: Future<Output = Result<(), Trouble>>,
{
    let backend = &target.archive.backend;
    may_delete().await?;
    target.call_once(backend.delete_all(std::slice::from_ref(to))).await?;
    Ok(target.store(|| backend.put_new(to, std::slice::from_ref(&content))).await?)
}

/// Ours, from before a crash, or of another who does the same.
fn accept_existing(stored: Result<(), Trouble>) -> Result<(), Trouble> {
    match stored {
        Err(Trouble::Target(ArchiveError::Store(error))) if error.is(StoreErrorKind::AlreadyExists) => Ok(()),
        stored => stored,
    }
}

/// A repair made of raw WAL as it comes; at most one frame of it is in memory.
pub struct Remade<'a> {
    target: &'a Writer,
    workers: &'a Workers,
    entry: &'a IndexEntry,
    upload: Box<dyn Upload>,
    wrapping: Wrapping,
    /// Raw, not a whole frame yet.
    open: Vec<u8>,
    raw_crc32: Crc32Parts,
    raw_bytes: u64,
}

impl std::fmt::Debug for Remade<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Remade { entry, raw_bytes, .. } = self;
        f.debug_struct("Remade").field("segment", &entry.segment).field("raw_bytes", raw_bytes).finish_non_exhaustive()
    }
}

impl<'a> Remade<'a> {
    /// For the segment `entry` describes.
    pub async fn begin(target: &'a Writer, workers: &'a Workers, entry: &'a IndexEntry) -> Result<Remade<'a>, Trouble> {
        let archive = &target.archive;
        let key = archive.lineage.repair(entry.segment, entry.raw_crc32.0, archive.form());
        let upload = target.retry(|| archive.backend.begin_upload(&key)).await?;
        let wrapping = Wrapping::new(archive.keys.recipients.as_ref());
        let open = Vec::with_capacity(FRAME_BYTES);
        Ok(Remade { target, workers, entry, upload, wrapping, open, raw_crc32: Crc32Parts::new(), raw_bytes: 0 })
    }

    /// Bytes still missing.
    pub fn missing(&self) -> u64 {
        self.entry.raw_bytes - self.raw_bytes
    }

    /// Takes the next raw bytes, no more than are missing.
    pub async fn feed(&mut self, mut raw: &[u8]) -> Result<(), Trouble> {
        self.raw_bytes += raw.len() as u64;
        while !raw.is_empty() {
            let (part, rest) = raw.split_at(raw.len().min(FRAME_BYTES - self.open.len()));
            self.open.extend_from_slice(part);
            raw = rest;
            if self.open.len() == FRAME_BYTES {
                self.end_frame().await?;
            }
        }
        Ok(())
    }

    async fn end_frame(&mut self) -> Result<(), Trouble> {
        let raw = std::mem::replace(&mut self.open, Vec::with_capacity(FRAME_BYTES));
        let frame = self.workers.run(move |encoder| encoder.encode(&raw)).await;
        self.raw_crc32.append(frame.raw_crc32, frame.raw_bytes as u64);
        let piece = Piece::Loose { bytes: frame.bytes, stored_crc32: frame.stored_crc32 };
        let part = self.wrapping.add(&piece, self.workers).await.map_err(ArchiveError::from)?;
        Ok(self.target.append(self.upload.as_mut(), &part).await?)
    }

    /// Gives it its name if it is the content that was proven when the segment was archived; false when it is other.
    pub async fn finish(mut self) -> Result<bool, Trouble> {
        if !self.open.is_empty() {
            self.end_frame().await?;
        }
        if (self.raw_bytes, self.raw_crc32.finish()) != (self.entry.raw_bytes, self.entry.raw_crc32.0) {
            self.abandon().await;
            return Ok(false);
        }
        let last = self.wrapping.finish(self.workers).await;
        self.target.append(self.upload.as_mut(), &last).await?;
        accept_existing(self.target.complete(self.upload.as_mut()).await.map_err(Trouble::from))?;
        Ok(true)
    }

    /// Nothing of it has a name; what stays is debris.
    pub async fn abandon(self) {
        let _ = self.target.call_once(self.upload.abort()).await;
    }
}

/// Whether what the target holds of a segment is good by now: the object its entry describes, or a repair.
pub async fn is_whole(
    target: &Writer,
    name: SegmentName,
    size: SegmentSize,
    entry: &IndexEntry,
) -> Result<bool, Trouble> {
    let archive = &target.archive;
    let contents = target.retry(|| archive.directory_around(name, size)).await?;
    let own = contents.object_of(entry).map(|object| (archive.lineage.segment(name, object.form), object));
    let repair =
        contents.repair_of(entry).map(|object| (archive.lineage.repair(name, entry.raw_crc32.0, object.form), object));
    for (key, object) in repair.into_iter().chain(own) {
        let found = match target.retry(|| archive.inspect(&key, object, size.bytes())).await {
            Ok(found) => found,
            Err(ArchiveError::Store(error))
                if matches!(error.kind, StoreErrorKind::Corrupt | StoreErrorKind::NotFound) =>
            {
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        let is_described = (found.stored_bytes, found.stored_crc32) == (entry.stored_bytes, entry.stored_crc32.0);
        let is_proven = match found.raw_crc32 {
            Some(raw_crc32) => raw_crc32 == entry.raw_crc32.0,
            // Nobody here can read it: it is what its index entry says, byte for byte, or it is not known.
            None => is_described,
        };
        if is_proven {
            return Ok(true);
        }
    }
    Ok(false)
}

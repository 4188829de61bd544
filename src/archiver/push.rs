//! The life of one sealed segment, top to bottom: store it under its name, or find that it is there already;
//! say what is there; keep both contents when they differ. And of one tail.
//!
//! Owns: how an object gets its name. Does not own: the order of segments, the index (`mod.rs`).
//! Rests on `proto-notes/07-repository-format.md` and `08-durability.md`.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::Mutex;

use super::encode::HeldFrame;
use super::segment::{Segment, SharedUpload, upload_gone};
use super::workers::Workers;
use super::writer::{ArchiveError, Delays, Writer, is_answer};
use crate::catalog::index::{Crc32, IndexEntry};
use crate::catalog::store::StoredObject;
use crate::receiver::{Cut, Sealed};
use crate::repository::layout::TailName;
use crate::repository::{Key, StoreError, StoreErrorKind};
use crate::wal::{Lsn, SegmentName, SegmentSize};

use super::tail::TailPlan;

/// Stores a whole, proven segment and returns its index entry, which describes the object that is there.
pub async fn push_segment(
    writer: &Writer,
    name: SegmentName,
    size: SegmentSize,
    segment: Segment,
    sealed: &Sealed,
) -> Result<IndexEntry, ArchiveError> {
    writer.confirm_epoch(false).await?;
    let raw_crc32 = segment.raw_crc32();
    let stored = match store_segment(writer, name, &segment).await {
        Ok(()) => {
            StoredObject { stored_bytes: segment.stored_bytes(), stored_crc32: segment.stored_crc32(), raw_crc32 }
        }
        // Our own success whose answer was lost, an earlier run's, or a stranger's: the content decides.
        Err(ArchiveError::Store(error)) if error.is(StoreErrorKind::AlreadyExists) => {
            compare_with_stored(writer, name, size, &segment, raw_crc32).await?
        }
        Err(error) => return Err(error),
    };
    Ok(IndexEntry {
        segment: name,
        start_lsn: size.start_of(sealed.number),
        end_lsn: size.end_of(sealed.number),
        raw_bytes: size.bytes(),
        raw_crc32: Crc32(raw_crc32),
        stored_bytes: stored.stored_bytes,
        stored_crc32: Crc32(stored.stored_crc32),
        summary: sealed.summary.clone(),
    })
}

async fn store_segment(writer: &Writer, name: SegmentName, segment: &Segment) -> Result<(), ArchiveError> {
    let key = writer.archive.lineage.segment(name);
    let held = segment.held_frames();
    let upload = match &segment.upload {
        Some(upload) => upload.clone(),
        None => match put_from_memory(writer, &key, &held).await? {
            Put::Stored => return Ok(()),
            Put::NotInMemory => Arc::new(Mutex::new(None)),
        },
    };
    if upload.lock().await.is_none() {
        let begun = writer.retry(|| writer.archive.backend.begin_upload(&key)).await?;
        *upload.lock().await = Some(begun);
    }
    // A name that is taken is better known before the upload is spent on it: a conflict is kept from it.
    if writer.retry(|| writer.archive.backend.stat(&key)).await?.is_some() {
        return Err(ArchiveError::Store(already_exists(&key.to_string())));
    }
    append_to_upload(writer, &upload, &held, segment.start).await?;
    let mut upload = upload.lock().await;
    let open = upload.as_mut().ok_or_else(|| upload_gone(segment.start))?;
    let mut delays = Delays::new();
    let completed = loop {
        match writer.call_once(open.complete()).await {
            Err(ArchiveError::Store(error)) if !is_answer(&error) => writer.wait(&mut delays).await?,
            completed => break completed,
        }
    };
    *upload = None;
    completed
}

enum Put {
    Stored,
    NotInMemory,
}

/// Stores a segment in one go, as long as all of it is in memory. While the store does not answer nothing is held
/// between two attempts, so that frames can leave for the spool; once one has, the segment is stored piece by piece:
/// read back whole, a backlog's segments would be the memory the spool was to save.
async fn put_from_memory(writer: &Writer, key: &Key, held: &[Arc<HeldFrame>]) -> Result<Put, ArchiveError> {
    let mut delays = Delays::new();
    loop {
        let Some(body) = held.iter().map(|frame| frame.in_memory()).collect::<Option<Vec<Bytes>>>() else {
            return Ok(Put::NotInMemory);
        };
        let put = writer.call_once(writer.archive.backend.put_new(key, &body)).await;
        drop(body);
        match put {
            Err(ArchiveError::Store(error)) if !is_answer(&error) => writer.wait(&mut delays).await?,
            stored => return stored.map(|()| Put::Stored),
        }
    }
}

/// Appends frames to an upload, in order, each until it is taken.
pub async fn append_to_upload(
    writer: &Writer,
    upload: &SharedUpload,
    frames: &[Arc<HeldFrame>],
    start: Lsn,
) -> Result<(), ArchiveError> {
    let mut upload = upload.lock().await;
    let open = upload.as_mut().ok_or_else(|| upload_gone(start))?;
    for held in frames {
        let bytes = writer.load(held.load()).await?;
        let mut delays = Delays::new();
        loop {
            match writer.call_once(open.append(bytes.clone())).await {
                Err(ArchiveError::Store(error)) if !is_answer(&error) => writer.wait(&mut delays).await?,
                Err(error) => return Err(error),
                Ok(()) => break,
            }
        }
    }
    Ok(())
}

/// Equal raw content is success; a difference is kept under a conflict name, written to the ledger, and stops
/// this writer.
async fn compare_with_stored(
    writer: &Writer,
    name: SegmentName,
    size: SegmentSize,
    segment: &Segment,
    raw_crc32: u32,
) -> Result<StoredObject, ArchiveError> {
    writer.confirm_epoch(true).await?;
    let stored = match writer.retry(|| writer.archive.inspect_segment(name, size)).await {
        Ok(stored) if stored.raw_crc32 == raw_crc32 => return Ok(stored),
        Ok(stored) => stored.raw_crc32,
        // Damaged or foreign: not ours to replace; its own CRC is unknown.
        Err(ArchiveError::Store(error)) if error.is(StoreErrorKind::Corrupt) => {
            tracing::error!(%error, "the object under this segment's name is damaged");
            0
        }
        Err(error) => return Err(error),
    };
    keep_conflict(writer, name, segment, raw_crc32).await?;
    Err(ArchiveError::Conflict { name, stored, ours: raw_crc32 })
}

async fn keep_conflict(
    writer: &Writer,
    name: SegmentName,
    segment: &Segment,
    raw_crc32: u32,
) -> Result<(), ArchiveError> {
    let key = writer.archive.lineage.conflict(name, raw_crc32);
    let mut body = Vec::with_capacity(segment.slots.len());
    for slot in &segment.slots {
        body.push(writer.call_once(segment.encoded(slot)).await?);
    }
    match writer.retry(|| writer.archive.backend.put_new(&key, &body)).await {
        Err(ArchiveError::Store(error)) if error.is(StoreErrorKind::AlreadyExists) => Ok(()),
        other => other,
    }
}

/// Stores the tail of `plan` and returns its name.
pub async fn push_tail(
    writer: &Writer,
    name: SegmentName,
    segment: Segment,
    plan: TailPlan,
    cut: Arc<Cut>,
    workers: &Workers,
    first_of_segment: bool,
) -> Result<TailName, ArchiveError> {
    writer.confirm_epoch(first_of_segment).await?;
    let mut delays = Delays::new();
    loop {
        // Put together for each attempt: between two nothing is held, so that memory can be freed meanwhile.
        let parts = writer.load(segment.parts(plan.from, plan.to, &cut, workers)).await?;
        let tail = TailName {
            epoch: writer.epoch,
            from: plan.from,
            to: plan.to,
            raw_crc32: parts.raw_crc32,
            last_commit: cut.last_commit,
        };
        let key = writer.archive.lineage.tail(name, &tail);
        let put = writer.call_once(writer.archive.backend.put_new(&key, &parts.body)).await;
        drop(parts);
        match put {
            // The name holds range and CRC: an object of this name is this tail, stored by a call whose answer was lost.
            Err(ArchiveError::Store(error)) if error.is(StoreErrorKind::AlreadyExists) => return Ok(tail),
            Err(ArchiveError::Store(error)) if !is_answer(&error) => writer.wait(&mut delays).await?,
            stored => return stored.map(|()| tail),
        }
    }
}

fn already_exists(location: &str) -> StoreError {
    StoreError::new(StoreErrorKind::AlreadyExists, "store", location, "the name is taken")
}

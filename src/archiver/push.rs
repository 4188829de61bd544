//! The life of one sealed segment, top to bottom: see that its name is free, store it, or find what is there; say what
//! is there; keep both contents when they differ. And of one tail.
//!
//! Owns: how an object gets its name. Does not own: the order of segments, the index (`mod.rs`), what tells two
//! contents apart (`compare.rs`).
//! Rests on `proto-notes/07-repository-format.md` and `08-durability.md`.

use std::future::Future;
use std::sync::Arc;

use super::body::{Body, Piece, Wrapping};
use super::compare::{self, Finding, Ours};
use super::segment::{OpenUpload, Segment, SharedUpload, upload_gone};
use super::tail::TailPlan;
use super::workers::Workers;
use super::writer::{ArchiveError, Writer, is_answer};
use crate::catalog::index::{Crc32, IndexEntry};
use crate::catalog::store::StoredObject;
use crate::codec::Form;
use crate::receiver::{Cut, MemoryBudget, Sealed};
use crate::repository::layout::TailName;
use crate::repository::{Key, StoreErrorKind};
use crate::wal::{Lsn, SegmentName, SegmentSize};

/// What objects are made with.
#[derive(Clone, Debug)]
pub struct Making {
    pub workers: Workers,
    pub memory: MemoryBudget,
}

/// A stored segment.
#[derive(Debug)]
pub struct Pushed {
    /// Describes the object that is there.
    pub entry: IndexEntry,
    /// Superfluous once the entry is in the index.
    pub marker: Option<Key>,
}

/// Stores a whole, proven segment.
pub async fn push_segment(
    writer: &Writer,
    making: &Making,
    name: SegmentName,
    size: SegmentSize,
    segment: Segment,
    sealed: &Sealed,
) -> Result<Pushed, ArchiveError> {
    writer.confirm_epoch(false).await?;
    let raw_crc32 = segment.raw_crc32();
    // Under either name: encryption may have been switched on or off since an earlier writer was here. And better known
    // before the bytes are spent on it.
    let taken = writer.retry(|| writer.archive.segment_objects(name)).await?;
    let (stored, marker) = if taken.is_empty() {
        store_segment(writer, making, name, size, segment, raw_crc32).await?
    } else {
        let ours = Ours { raw_crc32, stored: None };
        let stored = settle(writer, name, size, &ours, copy_of(writer, making, &segment)).await?;
        give_up_upload(&segment).await;
        // An earlier run's; where it left none there is nothing to drop.
        (stored, Some(writer.archive.lineage.raw_marker(name, raw_crc32)))
    };
    let entry = IndexEntry {
        segment: name,
        start_lsn: size.start_of(sealed.number),
        end_lsn: size.end_of(sealed.number),
        raw_bytes: size.bytes(),
        raw_crc32: Crc32(raw_crc32),
        stored_bytes: stored.stored_bytes,
        stored_crc32: Crc32(stored.stored_crc32),
        summary: sealed.summary.clone(),
    };
    Ok(Pushed { entry, marker })
}

/// Says what an encrypted object is going to hold where the object itself cannot: before it is there, so that nobody
/// ever finds it without.
async fn announce(writer: &Writer, name: SegmentName, raw_crc32: u32) -> Result<Option<Key>, ArchiveError> {
    if writer.archive.form() == Form::Plain {
        return Ok(None);
    }
    let marker = writer.archive.lineage.raw_marker(name, raw_crc32);
    match writer.retry(|| writer.archive.backend.put_new(&marker, &[])).await {
        Err(ArchiveError::Store(error)) if error.is(StoreErrorKind::AlreadyExists) => Ok(Some(marker)),
        put => put.map(|()| Some(marker)),
    }
}

/// What was stored, and the marker that is superfluous once it is indexed.
type Stored = (StoredObject, Option<Key>);

async fn store_segment(
    writer: &Writer,
    making: &Making,
    name: SegmentName,
    size: SegmentSize,
    segment: Segment,
    raw_crc32: u32,
) -> Result<Stored, ArchiveError> {
    if segment.upload.is_none()
        && let Some(stored) = store_from_memory(writer, making, name, size, &segment, raw_crc32).await?
    {
        return Ok(stored);
    }
    let upload = segment.upload.clone().unwrap_or_default();
    let key = writer.archive.lineage.segment(name, writer.archive.form());
    let marker = announce(writer, name, raw_crc32).await?;
    begin_upload(writer, &upload, &key).await?;
    let (completed, (stored_bytes, stored_crc32)) = complete_upload(writer, making, &upload, &segment).await?;
    let ours = StoredObject { stored_bytes, stored_crc32, raw_crc32: Some(raw_crc32) };
    let stored = match completed {
        Err(ArchiveError::Store(error)) if error.is(StoreErrorKind::AlreadyExists) => {
            let compared = Ours { raw_crc32, stored: Some(ours) };
            settle(writer, name, size, &compared, copy_of(writer, making, &segment)).await?
        }
        completed => completed.map(|()| ours)?,
    };
    Ok((stored, marker))
}

/// Stores a segment in one go, as long as all of it is in memory (`None`: it is not). While the store does not answer
/// nothing is held between two attempts, so that frames can leave for the spool; once one has, the segment is stored
/// piece by piece: read back whole, a backlog's segments would be the memory the spool was to save.
async fn store_from_memory(
    writer: &Writer,
    making: &Making,
    name: SegmentName,
    size: SegmentSize,
    segment: &Segment,
    raw_crc32: u32,
) -> Result<Option<Stored>, ArchiveError> {
    let archive = &writer.archive;
    let key = archive.lineage.segment(name, archive.form());
    let marker = match archive.backend.keeps_facts() {
        true => None,
        false => announce(writer, name, raw_crc32).await?,
    };
    let mut attempts = writer.storing();
    while segment.is_in_memory() {
        let (pieces, recipients) = (segment.clone().into_held(), archive.keys.recipients.as_ref());
        let body = Body::new(pieces, recipients, &making.workers, &making.memory).await?;
        let (stored_bytes, stored_crc32) = (body.stored_bytes, body.stored_crc32);
        let ours = StoredObject { stored_bytes, stored_crc32, raw_crc32: Some(raw_crc32) };
        let facts = body.facts(archive.form(), raw_crc32);
        match attempts.call(archive.backend.put_new_with(&key, &body.parts, &facts)).await {
            Ok(()) => return Ok(Some((ours, marker))),
            // Our own success whose answer was lost, or a stranger's object: the content decides.
            Err(ArchiveError::Store(error)) if error.is(StoreErrorKind::AlreadyExists) => {
                let compared = Ours { raw_crc32, stored: Some(ours) };
                let stored = settle(writer, name, size, &compared, async { Ok(Some(body)) }).await?;
                return Ok(Some((stored, marker)));
            }
            Err(ArchiveError::Store(error)) if !is_answer(&error) => {
                drop(body);
                attempts.wait().await?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

/// Appends what is left and gives the object its name; tells its length and CRC-32 also where that name is taken.
async fn complete_upload(
    writer: &Writer,
    making: &Making,
    upload: &SharedUpload,
    segment: &Segment,
) -> Result<(Result<(), ArchiveError>, (u64, u32)), ArchiveError> {
    append_to_upload(writer, &making.workers, upload, segment.clone().into_held(), segment.start).await?;
    let mut shared = upload.lock().await;
    let mut open = shared.take().ok_or_else(|| upload_gone(segment.start))?;
    let last = open.wrapping.finish(&making.workers).await;
    writer.append(open.upload.as_mut(), &last).await?;
    let completed = writer.complete(open.upload.as_mut()).await;
    Ok((completed, open.wrapping.stored()))
}

/// Begins the upload of a segment under its name.
pub async fn begin_upload(writer: &Writer, upload: &SharedUpload, key: &Key) -> Result<(), ArchiveError> {
    let mut shared = upload.lock().await;
    if shared.is_none() {
        writer.confirm_epoch(false).await?;
        let upload = writer.retry(|| writer.archive.backend.begin_upload(key)).await?;
        let wrapping = Wrapping::new(writer.archive.keys.recipients.as_ref());
        *shared = Some(OpenUpload { upload, wrapping });
    }
    Ok(())
}

/// Appends frames to an upload, in order, each until it is taken.
pub async fn append_to_upload(
    writer: &Writer,
    workers: &Workers,
    upload: &SharedUpload,
    pieces: Vec<Piece>,
    start: Lsn,
) -> Result<(), ArchiveError> {
    let mut shared = upload.lock().await;
    let mut open = shared.take().ok_or_else(|| upload_gone(start))?;
    for piece in pieces {
        let part = open.wrapping.add(&piece, workers).await?;
        writer.append(open.upload.as_mut(), &part).await?;
    }
    *shared = Some(open);
    Ok(())
}

/// The name is taken: what was uploaded is of no use. What cannot be removed now is the backend's to clean up.
async fn give_up_upload(segment: &Segment) {
    let Some(upload) = &segment.upload else { return };
    if let Some(open) = upload.lock().await.take()
        && let Err(error) = open.upload.abort().await
    {
        tracing::debug!(%error, "an upload nobody needs stays");
    }
}

/// Equal raw content is success; a difference is kept as `copy` under a conflict name and stops this writer; so does
/// an object nobody here can judge.
async fn settle(
    writer: &Writer,
    name: SegmentName,
    size: SegmentSize,
    ours: &Ours,
    copy: impl Future<Output = Result<Option<Body>, ArchiveError>>,
) -> Result<StoredObject, ArchiveError> {
    match compare::with_stored(writer, name, size, ours).await? {
        Finding::Equal(stored) => Ok(stored),
        Finding::Different { theirs } => {
            keep_conflict(writer, name, ours.raw_crc32, copy).await?;
            Err(ArchiveError::Conflict { name, stored: theirs, ours: ours.raw_crc32 })
        }
        Finding::Unknown { object } => Err(ArchiveError::Incomparable { object, ours: ours.raw_crc32 }),
    }
}

async fn keep_conflict(
    writer: &Writer,
    name: SegmentName,
    raw_crc32: u32,
    copy: impl Future<Output = Result<Option<Body>, ArchiveError>>,
) -> Result<(), ArchiveError> {
    let Some(body) = copy.await? else {
        tracing::error!(segment = %name, "the content received could not be kept: it went into an upload that cannot be read back; the server still has it");
        return Ok(());
    };
    let form = writer.archive.form();
    let key = writer.archive.lineage.conflict(name, raw_crc32, form);
    let facts = body.facts(form, raw_crc32);
    match writer.store(|| writer.archive.backend.put_new_with(&key, &body.parts, &facts)).await {
        Err(ArchiveError::Store(error)) if error.is(StoreErrorKind::AlreadyExists) => Ok(()),
        kept => kept,
    }
}

/// A second copy of a segment's bytes, if all of them are at hand.
async fn copy_of(writer: &Writer, making: &Making, segment: &Segment) -> Result<Option<Body>, ArchiveError> {
    let pieces = match writer.call_once(segment.pieces()).await {
        // The upload has ended.
        Err(ArchiveError::Store(error)) if error.is(StoreErrorKind::NotFound) => None,
        pieces => pieces?,
    };
    let Some(pieces) = pieces else { return Ok(None) };
    let recipients = writer.archive.keys.recipients.as_ref();
    Ok(Some(Body::new(pieces, recipients, &making.workers, &making.memory).await?))
}

/// Stores the tail of `plan` and returns its name.
pub async fn push_tail(
    writer: &Writer,
    making: &Making,
    name: SegmentName,
    segment: Segment,
    plan: TailPlan,
    cut: Arc<Cut>,
    first_of_segment: bool,
) -> Result<TailName, ArchiveError> {
    writer.confirm_epoch(first_of_segment).await?;
    let archive = &writer.archive;
    let recipients = archive.keys.recipients.as_ref();
    let mut attempts = writer.storing();
    loop {
        // Put together for each attempt: between two nothing is held, so that memory can be freed meanwhile.
        let parts = writer.load(segment.parts(plan.from, plan.to, &cut, &making.workers)).await?;
        let body = Body::new(parts.pieces, recipients, &making.workers, &making.memory).await?;
        let tail = TailName {
            epoch: writer.epoch,
            from: plan.from,
            to: plan.to,
            raw_crc32: parts.raw_crc32,
            last_commit: cut.last_commit,
            form: archive.form(),
        };
        let (key, facts) = (archive.lineage.tail(name, &tail), body.facts(tail.form, tail.raw_crc32));
        let put = attempts.call(archive.backend.put_new_with(&key, &body.parts, &facts)).await;
        drop(body);
        match put {
            // The name holds range and CRC: an object of this name is this tail, stored by a call whose answer was lost.
            Err(ArchiveError::Store(error)) if error.is(StoreErrorKind::AlreadyExists) => return Ok(tail),
            Err(ArchiveError::Store(error)) if !is_answer(&error) => attempts.wait().await?,
            stored => return stored.map(|()| tail),
        }
    }
}

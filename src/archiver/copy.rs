//! One stored object on its way from one repository to another: fetched in chunks, checked, and only then given its
//! name.
//!
//! Owns: that a copy is what its name and index promise, bounded memory.
//! Does not own: what is copied and in which order (`repair.rs`).

use std::future::Future;
use std::time::Duration;

use bytes::Bytes;

use super::compare::{self, Finding, Ours};
use super::writer::{ArchiveError, Writer};
use crate::catalog::contents::TailObject;
use crate::catalog::index::{Crc32, IndexEntry};
use crate::catalog::store::{Archive, CatalogError, StoredObject, place};
use crate::codec::Form;
use crate::codec::decode::FrameDecoder;
use crate::repository::{Facts, Key, StoreError, StoreErrorKind, Upload};
use crate::wal::{SegmentName, SegmentSize};

/// Fetched at a time: memory, against requests.
const CHUNK_BYTES: u64 = 4 << 20;
/// A larger object is written piece by piece.
pub const WHOLE_BYTES_MAX: u64 = 8 << 20;
/// No single question to a source may hang longer.
const ANSWER_DEADLINE: Duration = Duration::from_secs(120);

/// Why something could not be copied.
#[derive(Debug, thiserror::Error)]
pub enum Trouble {
    #[error("a repository to copy from: {0}")]
    Source(CatalogError),
    #[error("a repository to copy from gave no answer within {0:?}")]
    SourceSilent(Duration),
    /// What the source gave is not what was stored there.
    #[error("{0}")]
    Damaged(String),
    #[error(transparent)]
    Target(#[from] ArchiveError),
}

impl From<CatalogError> for Trouble {
    fn from(error: CatalogError) -> Trouble {
        Trouble::Source(error)
    }
}

/// A segment that is in the target now, and how its index describes it.
#[derive(Debug)]
pub struct Copied {
    pub entry: IndexEntry,
    pub bytes: u64,
}

/// Asks a source.
pub async fn ask<T, E: Into<CatalogError>>(call: impl Future<Output = Result<T, E>>) -> Result<T, Trouble> {
    match tokio::time::timeout(ANSWER_DEADLINE, call).await {
        Ok(answer) => answer.map_err(|error| Trouble::Source(error.into())),
        Err(_) => Err(Trouble::SourceSilent(ANSWER_DEADLINE)),
    }
}

/// Copies the segment `entry` describes. The entry that comes back describes the target's object.
pub async fn copy_segment(
    writer: &Writer,
    source: &Archive,
    name: SegmentName,
    size: SegmentSize,
    entry: &IndexEntry,
) -> Result<Copied, Trouble> {
    writer.confirm_epoch(false).await?;
    let form = form_of(source, name, entry).await?;
    let (from, to) = (source.lineage.segment(name, form), writer.archive.lineage.segment(name, form));
    let expected = Expected::Stored(entry.stored_crc32.0);
    let facts = Facts { stored_crc32: Some(entry.stored_crc32.0), raw_crc32: Some(entry.raw_crc32.0) };
    let bytes = entry.stored_bytes;
    let mut entry = entry.clone();
    // Under either of its names: encryption may have been switched on or off between two writers.
    if writer.retry(|| writer.archive.segment_objects(name)).await?.is_empty() {
        match copy_object(writer, source, &from, &to, bytes, expected, &facts).await {
            Ok(()) => return Ok(Copied { entry, bytes }),
            Err(Trouble::Target(ArchiveError::Store(error))) if error.is(StoreErrorKind::AlreadyExists) => {}
            Err(trouble) => return Err(trouble),
        }
    }
    // Ours, from before a crash, or somebody else's: the content decides.
    let raw_crc32 = entry.raw_crc32.0;
    let copy = StoredObject { stored_bytes: bytes, stored_crc32: entry.stored_crc32.0, raw_crc32: Some(raw_crc32) };
    match compare::with_stored(writer, name, size, &Ours { raw_crc32, stored: Some(copy) }).await? {
        Finding::Equal(found) => {
            (entry.stored_bytes, entry.stored_crc32) = (found.stored_bytes, Crc32(found.stored_crc32));
            Ok(Copied { entry, bytes: 0 })
        }
        // Damaged, and not ours to replace: the good content gets a name beside it.
        Finding::Different { theirs: 0 } => {
            tracing::error!(segment = %name, "a good copy is put beside the damaged object of this segment");
            let to = writer.archive.lineage.repair(name, raw_crc32, form);
            match copy_object(writer, source, &from, &to, bytes, expected, &facts).await {
                Err(Trouble::Target(ArchiveError::Store(error))) if error.is(StoreErrorKind::AlreadyExists) => {}
                other => other?,
            }
            Ok(Copied { entry, bytes })
        }
        Finding::Different { theirs } => Err(ArchiveError::Conflict { name, stored: theirs, ours: raw_crc32 }.into()),
        Finding::Unknown { object } => Err(ArchiveError::Incomparable { object, ours: raw_crc32 }.into()),
    }
}

/// Under which of its names the source holds the object `entry` describes.
async fn form_of(source: &Archive, name: SegmentName, entry: &IndexEntry) -> Result<Form, Trouble> {
    let objects = ask(source.segment_objects(name)).await?;
    let described = objects.iter().find(|object| object.stored_bytes == entry.stored_bytes).or(objects.first());
    let missing = || Trouble::Damaged(format!("{name} is indexed, but its object is not there"));
    described.map(|object| object.form).ok_or_else(missing)
}

/// Copies a tail under its own name, which holds the CRC of its content; the bytes it takes.
pub async fn copy_tail(
    writer: &Writer,
    source: &Archive,
    name: SegmentName,
    tail: &TailObject,
) -> Result<u64, Trouble> {
    writer.confirm_epoch(false).await?;
    let from = source.lineage.tail(name, &tail.name);
    let to = writer.archive.lineage.tail(name, &tail.name);
    let expected = match tail.name.form {
        Form::Plain => Expected::Raw { crc32: tail.name.raw_crc32, bytes: tail.name.to - tail.name.from },
        Form::Encrypted => Expected::Length,
    };
    let facts = Facts { stored_crc32: None, raw_crc32: Some(tail.name.raw_crc32) };
    match copy_object(writer, source, &from, &to, tail.stored_bytes, expected, &facts).await {
        Err(Trouble::Target(ArchiveError::Store(error))) if error.is(StoreErrorKind::AlreadyExists) => Ok(0),
        other => other.map(|()| tail.stored_bytes),
    }
}

/// By what a copy is checked.
#[derive(Clone, Copy, Debug)]
enum Expected {
    /// CRC-32 of the bytes as stored.
    Stored(u32),
    /// Length and CRC-32 of what they decode to.
    Raw { crc32: u32, bytes: u64 },
    /// Nothing but that all of it came: what an encrypted tail holds shows to whoever can read it.
    Length,
}

async fn copy_object(
    writer: &Writer,
    source: &Archive,
    from: &Key,
    to: &Key,
    stored_bytes: u64,
    expected: Expected,
    facts: &Facts,
) -> Result<(), Trouble> {
    let mut check = Check::new(expected);
    if stored_bytes <= WHOLE_BYTES_MAX {
        let mut body = Vec::new();
        let mut at = 0;
        while at < stored_bytes {
            let chunk = fetch(source, from, at, stored_bytes).await?;
            check.feed(&chunk, from)?;
            at += chunk.len() as u64;
            body.push(chunk);
        }
        check.finish(from)?;
        return Ok(writer.store(|| writer.archive.backend.put_new_with(to, &body, facts)).await?);
    }
    // A name that is taken is better known before all of it is fetched.
    if writer.retry(|| writer.archive.backend.stat(to)).await?.is_some() {
        let location = place(writer.archive.backend.as_ref(), to);
        let taken = StoreError::new(StoreErrorKind::AlreadyExists, "store", location, "the name is taken");
        return Err(ArchiveError::Store(taken).into());
    }
    let mut upload = writer.retry(|| writer.archive.backend.begin_upload(to)).await?;
    let written = write_pieces(writer, source, from, stored_bytes, check, upload.as_mut()).await;
    if written.is_err() {
        // Nothing of it has a name; what stays is debris.
        let _ = writer.call_once(upload.abort()).await;
        return written;
    }
    Ok(writer.complete(upload.as_mut()).await?)
}

async fn write_pieces(
    writer: &Writer,
    source: &Archive,
    from: &Key,
    stored_bytes: u64,
    mut check: Check,
    upload: &mut dyn Upload,
) -> Result<(), Trouble> {
    let mut at = 0;
    while at < stored_bytes {
        let chunk = fetch(source, from, at, stored_bytes).await?;
        check.feed(&chunk, from)?;
        at += chunk.len() as u64;
        writer.append(upload, &chunk).await?;
    }
    check.finish(from)
}

async fn fetch(source: &Archive, key: &Key, at: u64, end: u64) -> Result<Bytes, Trouble> {
    let range = at..(at + CHUNK_BYTES).min(end);
    let wanted = range.end - range.start;
    let chunk = ask(source.backend.fetch(key, range)).await?;
    match chunk.len() as u64 == wanted {
        true => Ok(chunk),
        false => Err(Trouble::Damaged(format!("{key}: {} of {wanted} bytes could be read", chunk.len()))),
    }
}

/// Compares as the bytes come.
struct Check {
    expected: Expected,
    stored: crc32fast::Hasher,
    raw: Option<FrameDecoder>,
}

impl Check {
    fn new(expected: Expected) -> Check {
        let raw = match expected {
            Expected::Stored(_) | Expected::Length => None,
            Expected::Raw { bytes, .. } => FrameDecoder::new(bytes).ok(),
        };
        Check { expected, stored: crc32fast::Hasher::new(), raw }
    }

    fn feed(&mut self, chunk: &[u8], key: &Key) -> Result<(), Trouble> {
        self.stored.update(chunk);
        let Some(decoder) = &mut self.raw else { return Ok(()) };
        decoder.feed(chunk, &mut |_| Ok(())).map_err(|error| Trouble::Damaged(format!("{key}: {error}")))
    }

    fn finish(self, key: &Key) -> Result<(), Trouble> {
        let (found, expected) = match self.expected {
            Expected::Length => return Ok(()),
            Expected::Stored(expected) => (self.stored.finalize(), expected),
            Expected::Raw { crc32, .. } => {
                let decoder = self.raw.ok_or_else(|| Trouble::Damaged(format!("{key}: it cannot be decoded")))?;
                (decoder.finish().map_err(|error| Trouble::Damaged(format!("{key}: {error}")))?, crc32)
            }
        };
        match found == expected {
            true => Ok(()),
            false => Err(Trouble::Damaged(format!("{key}: its CRC-32 is {found:08x}, not {expected:08x}"))),
        }
    }
}

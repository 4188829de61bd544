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
use crate::catalog::contents::{SegmentObject, TailObject};
use crate::catalog::index::{Crc32, IndexEntry};
use crate::catalog::store::{Archive, CatalogError, StoredObject, place};
use crate::codec::Form;
use crate::codec::decode::ObjectDecoder;
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
    let mut trouble = Trouble::Damaged(format!("{name} is indexed, but its object is not there"));
    for original in originals(source, name, size, entry).await? {
        match copy_original(writer, source, name, size, entry, &original).await {
            // Another object of the same source may be what this one is not.
            Err(damaged @ Trouble::Damaged(_)) => trouble = damaged,
            copied => return copied,
        }
    }
    Err(trouble)
}

async fn copy_original(
    writer: &Writer,
    source: &Archive,
    name: SegmentName,
    size: SegmentSize,
    entry: &IndexEntry,
    original: &Original,
) -> Result<Copied, Trouble> {
    let Original { key: from, form, stored_bytes, expected } = original;
    let (form, bytes, raw_crc32) = (*form, *stored_bytes, entry.raw_crc32.0);
    let to = writer.archive.lineage.segment(name, form);
    let facts = Facts { stored_crc32: expected.stored(), raw_crc32: Some(raw_crc32) };
    let mut entry = entry.clone();
    // Under either of its names: encryption may have been switched on or off between two writers.
    if writer.retry(|| writer.archive.segment_objects(name)).await?.is_empty() {
        match copy_object(writer, source, from, &to, bytes, *expected, &facts).await {
            Ok(stored_crc32) => {
                (entry.stored_bytes, entry.stored_crc32) = (bytes, Crc32(stored_crc32));
                return Ok(Copied { entry, bytes });
            }
            Err(Trouble::Target(ArchiveError::Store(error))) if error.is(StoreErrorKind::AlreadyExists) => {}
            Err(trouble) => return Err(trouble),
        }
    }
    // Ours, from before a crash, or somebody else's: the content decides.
    let made = |stored_crc32| StoredObject { stored_bytes: bytes, stored_crc32, raw_crc32: Some(raw_crc32) };
    let copy = expected.stored().map(made);
    match compare::with_stored(writer, name, size, &Ours { raw_crc32, stored: copy }).await? {
        Finding::Equal(found) => {
            (entry.stored_bytes, entry.stored_crc32) = (found.stored_bytes, Crc32(found.stored_crc32));
            Ok(Copied { entry, bytes: 0 })
        }
        // Damaged, and not ours to replace: the good content gets a name beside it.
        Finding::Different { theirs: 0 } => {
            tracing::error!(segment = %name, "a good copy is put beside the damaged object of this segment");
            let to = writer.archive.lineage.repair(name, raw_crc32, form);
            match copy_object(writer, source, from, &to, bytes, *expected, &facts).await {
                Err(Trouble::Target(ArchiveError::Store(error))) if error.is(StoreErrorKind::AlreadyExists) => {}
                other => drop(other?),
            }
            Ok(Copied { entry, bytes })
        }
        Finding::Different { theirs } => Err(ArchiveError::Conflict { name, stored: theirs, ours: raw_crc32 }.into()),
        Finding::Unknown { object } => Err(ArchiveError::Incomparable { object, ours: raw_crc32 }.into()),
    }
}

/// An object of a source that should hold a segment whole, and by what that is seen.
#[derive(Clone, Debug)]
pub struct Original {
    pub key: Key,
    pub form: Form,
    pub stored_bytes: u64,
    pub expected: Expected,
}

/// The objects of a source that should hold what `entry`, its own, describes; the one described first. A repair is known
/// by the CRC-32 of what it holds: encrypted, it can only be copied by who can read it.
pub async fn originals(
    source: &Archive,
    name: SegmentName,
    size: SegmentSize,
    entry: &IndexEntry,
) -> Result<Vec<Original>, Trouble> {
    let (contents, damages) = (ask(source.directory_around(name, size)).await?, ask(source.damages()).await?);
    let mut contents = contents;
    contents.mark(&damages);
    let of_segment = contents.object_of(entry).map(|SegmentObject { form, stored_bytes }| Original {
        key: source.lineage.segment(name, form),
        form,
        stored_bytes,
        expected: Expected::Stored(entry.stored_crc32.0),
    });
    let raw = |form| Expected::Raw { crc32: entry.raw_crc32.0, bytes: size.bytes(), form };
    let can_read = |form: Form| form == Form::Plain || source.keys.identities.is_some();
    let repair = contents.repair_of(entry).filter(|object| can_read(object.form));
    let of_repair = repair.map(|SegmentObject { form, stored_bytes }| Original {
        key: source.lineage.repair(name, entry.raw_crc32.0, form),
        form,
        stored_bytes,
        expected: raw(form),
    });
    Ok(of_segment.into_iter().chain(of_repair).collect())
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
        form @ Form::Plain => Expected::Raw { crc32: tail.name.raw_crc32, bytes: tail.name.to - tail.name.from, form },
        Form::Encrypted => Expected::Length,
    };
    let facts = Facts { stored_crc32: None, raw_crc32: Some(tail.name.raw_crc32) };
    match copy_object(writer, source, &from, &to, tail.stored_bytes, expected, &facts).await {
        Err(Trouble::Target(ArchiveError::Store(error))) if error.is(StoreErrorKind::AlreadyExists) => Ok(0),
        other => other.map(|_| tail.stored_bytes),
    }
}

/// By what a copy is checked.
#[derive(Clone, Copy, Debug)]
pub enum Expected {
    /// CRC-32 of the bytes as stored.
    Stored(u32),
    /// Length and CRC-32 of what they decode to.
    Raw { crc32: u32, bytes: u64, form: Form },
    /// Nothing but that all of it came: what an encrypted tail holds shows to whoever can read it.
    Length,
}

impl Expected {
    pub fn stored(self) -> Option<u32> {
        match self {
            Expected::Stored(crc32) => Some(crc32),
            Expected::Raw { .. } | Expected::Length => None,
        }
    }
}

/// Copies an object whose name is free; the CRC-32 of its bytes as stored.
async fn copy_object(
    writer: &Writer,
    source: &Archive,
    from: &Key,
    to: &Key,
    stored_bytes: u64,
    expected: Expected,
    facts: &Facts,
) -> Result<u32, Trouble> {
    // A name that is taken is better known before all of it is fetched.
    if stored_bytes > WHOLE_BYTES_MAX && writer.retry(|| writer.archive.backend.stat(to)).await?.is_some() {
        let location = place(writer.archive.backend.as_ref(), to);
        let taken = StoreError::new(StoreErrorKind::AlreadyExists, "store", location, "the name is taken");
        return Err(ArchiveError::Store(taken).into());
    }
    let mut ready = fetch_checked(writer, source, from, to, stored_bytes, expected).await?;
    ready.store(writer, to, facts).await?;
    Ok(ready.stored_crc32)
}

/// An object that is what it should be, and has no name yet.
pub struct Ready {
    body: ReadyBody,
    pub stored_crc32: u32,
}

enum ReadyBody {
    Whole(Vec<Bytes>),
    Upload(Box<dyn Upload>),
}

impl std::fmt::Debug for Ready {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ready").field("stored_crc32", &self.stored_crc32).finish_non_exhaustive()
    }
}

impl Ready {
    /// Gives it its name, which must be free.
    pub async fn store(&mut self, writer: &Writer, to: &Key, facts: &Facts) -> Result<(), Trouble> {
        match &mut self.body {
            ReadyBody::Whole(body) => Ok(writer.store(|| writer.archive.backend.put_new_with(to, body, facts)).await?),
            ReadyBody::Upload(upload) => Ok(writer.complete(upload.as_mut()).await?),
        }
    }
}

/// Brings an object here, or most of it to its place, and checks it.
pub async fn fetch_checked(
    writer: &Writer,
    source: &Archive,
    from: &Key,
    to: &Key,
    stored_bytes: u64,
    expected: Expected,
) -> Result<Ready, Trouble> {
    let mut check = Check::new(expected, source);
    if stored_bytes <= WHOLE_BYTES_MAX {
        let mut body = Vec::new();
        let mut at = 0;
        while at < stored_bytes {
            let chunk = fetch(source, from, at, stored_bytes).await?;
            check.feed(&chunk, from)?;
            at += chunk.len() as u64;
            body.push(chunk);
        }
        return Ok(Ready { stored_crc32: check.finish(from)?, body: ReadyBody::Whole(body) });
    }
    let mut upload = writer.retry(|| writer.archive.backend.begin_upload(to)).await?;
    match write_pieces(writer, source, from, stored_bytes, check, upload.as_mut()).await {
        Ok(stored_crc32) => Ok(Ready { stored_crc32, body: ReadyBody::Upload(upload) }),
        Err(trouble) => {
            // Nothing of it has a name; what stays is debris.
            let _ = writer.call_once(upload.abort()).await;
            Err(trouble)
        }
    }
}

async fn write_pieces(
    writer: &Writer,
    source: &Archive,
    from: &Key,
    stored_bytes: u64,
    mut check: Check,
    upload: &mut dyn Upload,
) -> Result<u32, Trouble> {
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
    raw: Option<ObjectDecoder>,
}

impl Check {
    fn new(expected: Expected, source: &Archive) -> Check {
        let raw = match expected {
            Expected::Stored(_) | Expected::Length => None,
            Expected::Raw { bytes, form, .. } => ObjectDecoder::new(form, source.keys.identities.as_ref(), bytes).ok(),
        };
        Check { expected, stored: crc32fast::Hasher::new(), raw }
    }

    fn feed(&mut self, chunk: &[u8], key: &Key) -> Result<(), Trouble> {
        self.stored.update(chunk);
        let Some(decoder) = &mut self.raw else { return Ok(()) };
        decoder.feed(chunk, &mut |_| Ok(())).map_err(|error| Trouble::Damaged(format!("{key}: {error}")))
    }

    /// The CRC-32 of the bytes as stored, where they are what was expected.
    fn finish(self, key: &Key) -> Result<u32, Trouble> {
        let stored = self.stored.finalize();
        let (found, expected) = match self.expected {
            Expected::Length => return Ok(stored),
            Expected::Stored(expected) => (stored, expected),
            Expected::Raw { crc32, .. } => {
                let decoder = self.raw.ok_or_else(|| Trouble::Damaged(format!("{key}: it cannot be decoded")))?;
                let raw = decoder.finish(&mut |_| Ok(()));
                (raw.map_err(|error| Trouble::Damaged(format!("{key}: {error}")))?, crc32)
            }
        };
        match found == expected {
            true => Ok(stored),
            false => Err(Trouble::Damaged(format!("{key}: its CRC-32 is {found:08x}, not {expected:08x}"))),
        }
    }
}

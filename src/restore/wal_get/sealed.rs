//! Owns: delivering a sealed segment from one repository that has it.
//! Does not own: which repository is asked first, unfinished segments (`unfinished.rs`).

use std::path::{Path, PathBuf};

use super::asked::Holder;
use super::error::WalGetError;
use super::object::{self, Object, Use};
use super::request::Wanted;
use super::target::Target;
use crate::catalog::{DirectoryContents, IndexEntry, SegmentObject};
use crate::wal::SegmentName;

#[derive(Debug)]
struct SealedCopy {
    object: Object,
    /// What the index entry, or the name of a repair, promises.
    raw_crc32: Option<u32>,
    indexed_bytes: Option<u64>,
}

/// Delivers the sealed segment `source`; false when the repository has none.
pub async fn deliver(
    holder: &Holder,
    wanted: &Wanted,
    source: SegmentName,
    contents: &DirectoryContents,
    dest: &Path,
) -> Result<bool, WalGetError> {
    let entry = contents.entries.get(&source);
    let mut first_fault = None;
    for copy in copies(holder, wanted, source, entry, contents) {
        match whole_copy(holder, wanted, &copy, dest).await {
            Ok(()) => return Ok(true),
            Err(error @ (WalGetError::Damaged { .. } | WalGetError::Key { .. })) => {
                first_fault = first_fault.or(Some(error));
            }
            Err(error) => return Err(error),
        }
    }
    match (first_fault, entry) {
        (Some(fault), _) => Err(fault),
        (None, Some(_)) if !holder.archive.expired().await?.contains(source) => {
            Err(WalGetError::Hole { name: source, fault: "it is indexed, but its object is not there".into() })
        }
        _ => Ok(false),
    }
}

/// The objects that may hold the whole segment, the preferred one first. An object that no entry describes
/// proves itself: only a complete segment decodes to the full size, every frame carries a checksum of its
/// content, and a name is only given to what was proven. So it is served; a stranger fails the header check.
fn copies(
    holder: &Holder,
    wanted: &Wanted,
    source: SegmentName,
    entry: Option<&IndexEntry>,
    contents: &DirectoryContents,
) -> Vec<SealedCopy> {
    let lineage = &holder.archive.lineage;
    let raw_bytes = wanted.size.bytes();
    let repairs = contents.repairs.get(&source).into_iter().flatten();
    let mut copies: Vec<SealedCopy> = repairs
        .filter(|(raw_crc32, _)| entry.is_none_or(|entry| entry.raw_crc32.0 == *raw_crc32))
        .map(|&(raw_crc32, SegmentObject { form, stored_bytes })| {
            let key = lineage.repair(source, raw_crc32, form);
            let object = Object { key, form, stored_bytes, raw_bytes };
            SealedCopy { object, raw_crc32: Some(raw_crc32), indexed_bytes: None }
        })
        .collect();
    let objects = contents.segments.get(&source).into_iter().flatten();
    copies.extend(objects.map(|&SegmentObject { form, stored_bytes }| SealedCopy {
        object: Object { key: lineage.segment(source, form), form, stored_bytes, raw_bytes },
        raw_crc32: entry.map(|entry| entry.raw_crc32.0),
        indexed_bytes: entry.map(|entry| entry.stored_bytes),
    }));
    copies
}

/// Has the sealed segment written and flushed beside others in `directory`, under the name that `name_of` gives it for
/// the CRC-32 of its raw bytes; false where no object with a known CRC-32 is there intact. Needs a runtime of several
/// threads.
pub async fn hold_ready(
    holder: &Holder,
    wanted: &Wanted,
    contents: &DirectoryContents,
    name_of: impl Fn(u32) -> PathBuf,
) -> Result<bool, WalGetError> {
    let entry = contents.entries.get(&wanted.name);
    for copy in copies(holder, wanted, wanted.name, entry, contents) {
        let Some(raw_crc32) = copy.raw_crc32 else { continue };
        match read_whole(holder, wanted, &copy, &name_of(raw_crc32)).await {
            Ok(target) => {
                // Here, not on a thread of its own: once this is dropped nothing appears any more.
                tokio::task::block_in_place(|| target.finish_flushed(wanted.size))?;
                return Ok(true);
            }
            Err(error @ WalGetError::Damaged { .. }) => tracing::debug!(%error, "not held ready"),
            Err(error) => return Err(error),
        }
    }
    Ok(false)
}

async fn whole_copy(holder: &Holder, wanted: &Wanted, copy: &SealedCopy, dest: &Path) -> Result<(), WalGetError> {
    read_whole(holder, wanted, copy, dest).await?.finish(wanted.size)
}

/// Reads an object through into a file that is complete but for its name.
async fn read_whole(holder: &Holder, wanted: &Wanted, copy: &SealedCopy, dest: &Path) -> Result<Target, WalGetError> {
    let archive = &holder.archive;
    let damaged = |fault: String| object::damaged(archive, &copy.object.key, fault);
    if let Some(indexed) = copy.indexed_bytes
        && indexed != copy.object.stored_bytes
    {
        return Err(damaged(format!("it is {} bytes long, its index entry says {indexed}", copy.object.stored_bytes)));
    }
    object::decoder(archive, &copy.object)?;
    let mut target = Target::new(dest, wanted.limit - wanted.start)?;
    let crc = object::read(archive, &copy.object, 0, &mut target, Use::Write).await?;
    if let Some(expected) = copy.raw_crc32
        && expected != crc
    {
        return Err(damaged(format!("its content has CRC-32 {crc:08x}, expected {expected:08x}")));
    }
    wanted.check_header(&target.head).map_err(damaged)?;
    Ok(target)
}

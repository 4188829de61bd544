//! Owns: one volume from stored bytes to files: decrypted, decoded, taken apart, each file checked against the manifest
//! as it is written.
//! Does not own: getting the bytes, other copies (`copies.rs`), what members may be (`members.rs`), names (`tree.rs`).
//! Everything here blocks, on a thread of its own.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, Write};
use std::sync::atomic::Ordering;

use bytes::Bytes;
use tokio::sync::mpsc;

use super::error::RestoreError;
use super::members::{self, Fate, Kind};
use super::site::{Attempt, CONTROL, CONTROL_ASIDE, Claim, Site};
use super::tree::Tree;
use crate::catalog::backup::VolumeEntry;
use crate::catalog::manifest::{ChecksumAlgorithm, FileHasher};
use crate::codec::decode::{DecodeError, ObjectDecoder};
use crate::codec::tar::{Member, MemberKind, TarError, TarEvent, TarParser, shown};

/// How a volume fails.
#[derive(Debug)]
pub enum UnpackFault {
    /// Another copy may be good.
    Damaged(String),
    Key(DecodeError),
    /// On this machine: another copy would not help.
    Here(RestoreError),
    /// Whoever gets the bytes has stopped, and knows why.
    CutShort,
}

impl From<RestoreError> for UnpackFault {
    fn from(error: RestoreError) -> UnpackFault {
        UnpackFault::Here(error)
    }
}

impl From<TarError> for UnpackFault {
    fn from(error: TarError) -> UnpackFault {
        UnpackFault::Damaged(error.to_string())
    }
}

fn damaged(fault: impl Into<String>) -> UnpackFault {
    UnpackFault::Damaged(fault.into())
}

/// Writes the files of a volume whose stored bytes come through `chunks`.
pub fn unpack(
    site: &Site,
    volume: &VolumeEntry,
    attempt: Attempt,
    decoder: ObjectDecoder,
    chunks: mpsc::Receiver<Bytes>,
) -> Result<(), UnpackFault> {
    let counted = Cell::new(0);
    let unpacked = unpack_counting(site, volume, attempt, decoder, chunks, &counted);
    if unpacked.is_err() {
        site.meter.take_back(counted.get());
    }
    unpacked
}

fn unpack_counting(
    site: &Site,
    volume: &VolumeEntry,
    attempt: Attempt,
    mut decoder: ObjectDecoder,
    mut chunks: mpsc::Receiver<Bytes>,
    counted: &Cell<u64>,
) -> Result<(), UnpackFault> {
    let (tree, prefix) =
        site.tree(volume.tablespace).ok_or_else(|| damaged("it belongs to a tablespace the backup does not have"))?;
    let mut parser = TarParser::new(volume.raw_bytes);
    let mut writer =
        Writer { site, tree, prefix, is_base: volume.tablespace.is_none(), attempt, current: Current::None };
    let mut stored_bytes = 0;
    let mut stored_crc32 = crc32fast::Hasher::new();
    let mut failed = None;
    let mut sink = |raw: &[u8]| {
        site.meter.add(raw.len() as u64);
        counted.set(counted.get() + raw.len() as u64);
        writer.take(&mut parser, raw).map_err(|fault| {
            failed = Some(fault);
            io::ErrorKind::Other.into()
        })
    };
    let mut decoded = Ok(());
    while let Some(chunk) = chunks.blocking_recv() {
        stored_bytes += chunk.len() as u64;
        stored_crc32.update(&chunk);
        decoded = decoder.feed(&chunk, &mut sink);
        if decoded.is_err() {
            break;
        }
    }
    if decoded.is_ok() && stored_bytes < volume.stored_bytes {
        return Err(UnpackFault::CutShort);
    }
    let raw_crc32 = decoded.and_then(|()| decoder.finish(&mut sink));
    if let Some(fault) = failed {
        return Err(fault);
    }
    let raw_crc32 = raw_crc32.map_err(|error| match error.is_about_keys() {
        true => UnpackFault::Key(error),
        false => damaged(error.to_string()),
    })?;
    for (what, found, expected) in
        [("stored", stored_crc32.finalize(), volume.stored_crc32.0), ("raw", raw_crc32, volume.raw_crc32.0)]
    {
        if found != expected {
            return Err(damaged(format!("the CRC-32 of its {what} bytes is {found:08x}, not {expected:08x}")));
        }
    }
    parser.finish()?;
    Ok(())
}

struct Writer<'a> {
    site: &'a Site,
    tree: &'a Tree,
    /// Of the stream's paths in the manifest.
    prefix: Vec<u8>,
    is_base: bool,
    attempt: Attempt,
    current: Current,
}

/// The member whose data comes.
enum Current {
    None,
    File {
        index: usize,
        path: Vec<u8>,
        /// `None`: checked only.
        file: Option<File>,
        hasher: FileHasher,
    },
}

impl Writer<'_> {
    fn take(&mut self, parser: &mut TarParser, mut raw: &[u8]) -> Result<(), UnpackFault> {
        while let Some(event) = parser.next(&mut raw)? {
            match event {
                TarEvent::Member { member, .. } => self.begin(member)?,
                TarEvent::Data(data) => self.write(data)?,
                TarEvent::MemberEnd => self.end()?,
                TarEvent::Padding(_) | TarEvent::End => {}
            }
        }
        Ok(())
    }

    fn begin(&mut self, member: &Member) -> Result<(), UnpackFault> {
        let kind = match member.kind {
            MemberKind::File => Kind::File,
            MemberKind::Directory => Kind::Directory,
            MemberKind::Symlink(_) => Kind::Link,
            MemberKind::HardLink(_) | MemberKind::Other(_) => Kind::Other,
        };
        let fate = match self.is_base {
            true => members::of_base(&member.path, kind),
            false => members::of_tablespace(&member.path, kind),
        };
        self.current = match fate.map_err(|refused| damaged(refused.to_string()))? {
            Fate::File(path) => self.file(path, member, true)?,
            Fate::Dropped(path) => self.file(path, member, false)?,
            Fate::Directory(path) => {
                self.tree.directory(&path, Some(member.mode))?;
                Current::None
            }
            Fate::Ours => Current::None,
        };
        Ok(())
    }

    fn file(&self, path: Vec<u8>, member: &Member, is_wanted: bool) -> Result<Current, UnpackFault> {
        let listed = [&self.prefix, path.as_slice()].concat();
        let files = &self.site.manifest.files;
        let Some(index) = files.find(&listed) else {
            return Err(damaged(format!("the manifest does not list member \"{}\"", shown(&listed))));
        };
        let expected = files.file(index);
        if member.size != expected.size {
            let (found, expected) = (member.size, expected.size);
            return Err(damaged(format!("\"{}\" has {found} bytes, the manifest says {expected}", shown(&listed))));
        }
        match self.site.accounts.claim(index, self.attempt) {
            Claim::Taken => return Err(damaged(format!("\"{}\" comes a second time", shown(&listed)))),
            Claim::Kept => return Ok(Current::None),
            Claim::Ours => {}
        }
        let is_control = self.is_base && path == CONTROL;
        if is_control && member.mode & 0o040 != 0 {
            self.site.group_reads.store(true, Ordering::Relaxed);
        }
        let name = if is_control { CONTROL_ASIDE } else { &path };
        let file = if is_wanted { Some(self.tree.create(name, member.mode)?) } else { None };
        Ok(Current::File { index, path, file, hasher: FileHasher::new(expected.checksum.algorithm()) })
    }

    fn write(&mut self, data: &[u8]) -> Result<(), UnpackFault> {
        let Current::File { path, file, hasher, .. } = &mut self.current else { return Ok(()) };
        hasher.update(data);
        if let Some(file) = file {
            file.write_all(data).map_err(|error| {
                let path = self.tree.path().join(<std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(path));
                RestoreError::local("write", path, error)
            })?;
        }
        Ok(())
    }

    fn end(&mut self) -> Result<(), UnpackFault> {
        let Current::File { index, hasher, .. } = std::mem::replace(&mut self.current, Current::None) else {
            return Ok(());
        };
        let expected = self.site.manifest.files.file(index);
        if expected.checksum.algorithm() == ChecksumAlgorithm::None {
            return Ok(());
        }
        let found = hasher.finish();
        if found != expected.checksum {
            let (path, algorithm) = (shown(&expected.path), found.algorithm());
            let expected = &expected.checksum;
            return Err(damaged(format!("{algorithm} of \"{path}\" is {found}, the manifest says {expected}")));
        }
        Ok(())
    }
}

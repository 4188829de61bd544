//! Owns: the file being put together beside its destination, which sees it complete or not at all.
//! Does not own: which bytes go into it.

use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::error::WalGetError;
use super::request::LONG_HEADER_BYTES;
use crate::repository::durable::{Directory, TempFile};
use crate::wal::SegmentSize;

/// A segment being put together in a temporary file beside its destination.
#[derive(Debug)]
pub struct Target {
    pub dest: PathBuf,
    temp: TempFile,
    /// Bytes from here on are zeros, whatever is decoded.
    limit: u64,
    written: u64,
    /// The first bytes as decoded, for the header check.
    pub head: Vec<u8>,
    /// Two objects hold different bytes for one position.
    pub contradicted: bool,
}

/// How far a [`Target`] was checked.
#[derive(Clone, Copy, Debug)]
pub struct Mark {
    written: u64,
    head_bytes: usize,
}

impl Target {
    pub fn new(dest: &Path, limit: u64) -> Result<Target, WalGetError> {
        let temp = temp_beside(dest)?;
        Ok(Target { dest: dest.to_path_buf(), temp, limit, written: 0, head: Vec::new(), contradicted: false })
    }

    /// Takes bytes that begin at or before the end of what is written; the ones already there are compared.
    pub fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if offset == self.head.len() as u64 && self.head.len() < LONG_HEADER_BYTES {
            let count = bytes.len().min(LONG_HEADER_BYTES - self.head.len());
            self.head.extend_from_slice(&bytes[..count]);
        }
        let bytes = &bytes[..bytes.len().min(self.limit.saturating_sub(offset) as usize)];
        if bytes.is_empty() {
            return Ok(());
        }
        let known = self.compare_at(offset, bytes)?;
        if offset + (known as u64) < self.written {
            return Ok(());
        }
        self.temp.file().write_all_at(&bytes[known..], offset + known as u64)?;
        self.written = offset + bytes.len() as u64;
        Ok(())
    }

    /// Compares bytes with what is written of them; tells how many were.
    pub fn compare_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        let known = bytes.len().min(self.written.saturating_sub(offset) as usize);
        let mut found = vec![0; known];
        self.temp.file().read_exact_at(&mut found, offset)?;
        if found != bytes[..known] {
            self.contradicted = true;
            return Err(io::Error::other("its bytes differ from another tail's"));
        }
        Ok(known)
    }

    pub fn mark(&self) -> Mark {
        Mark { written: self.written, head_bytes: self.head.len() }
    }

    /// Forgets what came after the mark: it was of an object that turned out to be damaged.
    pub fn back_to(&mut self, mark: Mark) {
        self.written = mark.written;
        self.head.truncate(mark.head_bytes);
    }

    /// Pads with zeros and gives the file its name.
    pub fn finish(mut self, size: SegmentSize) -> Result<(), WalGetError> {
        if self.written != self.limit {
            let source = io::Error::other(format!("{} of {} bytes were written", self.written, self.limit));
            return Err(destination(&self.dest, source));
        }
        self.temp.file().set_len(size.bytes()).map_err(|source| destination(&self.dest, source))?;
        put_into_place(self.temp, &self.dest)
    }
}

pub fn temp_beside(dest: &Path) -> Result<TempFile, WalGetError> {
    let parent = dest.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let temp = Directory::open(parent).and_then(TempFile::create);
    temp.map_err(|source| destination(dest, source))
}

/// PostgreSQL sees a complete file or none. Nothing is synced, because recovery asks again after a crash.
pub fn put_into_place(temp: TempFile, dest: &Path) -> Result<(), WalGetError> {
    let name = dest.file_name().ok_or_else(|| destination(dest, io::ErrorKind::InvalidInput.into()))?;
    temp.rename_over(name).map(drop).map_err(|source| destination(dest, source))
}

pub fn destination(path: &Path, source: io::Error) -> WalGetError {
    WalGetError::Destination { path: path.to_path_buf(), source }
}

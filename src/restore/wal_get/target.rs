//! Owns: the file being put together beside its destination, which sees it complete or not at all.
//! Does not own: which bytes go into it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

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
        let mut temp = temp_beside(dest)?;
        temp.file().set_len(limit).map_err(|source| destination(dest, source))?;
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
        write_around_zeros(self.temp.file(), &bytes[known..], offset + known as u64)?;
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
    pub fn back_to(&mut self, mark: Mark) -> Result<(), WalGetError> {
        // Zeros are not written: nothing else may be where they belong.
        let file = self.temp.file();
        let emptied = file.set_len(mark.written).and_then(|()| file.set_len(self.limit));
        emptied.map_err(|source| destination(&self.dest, source))?;
        self.written = mark.written;
        self.head.truncate(mark.head_bytes);
        Ok(())
    }

    /// Pads with zeros and gives the file its name.
    pub fn finish(mut self, size: SegmentSize) -> Result<(), WalGetError> {
        self.complete(size)?;
        put_into_place(self.temp, &self.dest)
    }

    /// Pads with zeros, writes the file to the disk, and gives it its name; one that has it already stays. Blocks.
    pub fn finish_flushed(mut self, size: SegmentSize) -> Result<(), WalGetError> {
        self.complete(size)?;
        let name = self.dest.file_name().and_then(|name| name.to_str());
        let name = name.ok_or_else(|| destination(&self.dest, io::ErrorKind::InvalidInput.into()))?;
        match self.temp.place_flushed(name) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            placed => placed.map_err(|source| destination(&self.dest, source)),
        }
    }

    fn complete(&mut self, size: SegmentSize) -> Result<(), WalGetError> {
        if self.written != self.limit {
            let source = io::Error::other(format!("{} of {} bytes were written", self.written, self.limit));
            return Err(destination(&self.dest, source));
        }
        allocate(self.temp.file(), size.bytes()).map_err(|source| destination(&self.dest, source))
    }
}

/// Writes bytes to where there is nothing yet. Blocks of zeros stay holes: a nearly empty segment is had, checked and
/// synced in a fraction of the time.
fn write_around_zeros(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    const BLOCK: u64 = 4096;
    static ZEROS: [u8; BLOCK as usize] = [0; BLOCK as usize];
    let (mut at, mut begin) = (0, 0);
    while at < bytes.len() {
        let block_end = (BLOCK - (offset + at as u64) % BLOCK) as usize;
        let end = bytes.len().min(at + block_end);
        if bytes[at..end] == ZEROS[..end - at] {
            file.write_all_at(&bytes[begin..at], offset + begin as u64)?;
            begin = end;
        }
        at = end;
    }
    file.write_all_at(&bytes[begin..], offset + begin as u64)
}

/// Gives a file its length, and the holes in it their room: PostgreSQL may use the file again for new WAL, and counts
/// on every byte of it.
fn allocate(file: &File, bytes: u64) -> io::Result<()> {
    loop {
        match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, bytes) {
            Err(Errno::INTR) => {}
            // Not every file system can.
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => return file.set_len(bytes),
            Err(error) => return Err(error.into()),
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::MetadataExt;

    const MIB: u64 = 1 << 20;

    #[test]
    fn zeros_are_holes_with_room_of_their_own() {
        let directory = tempfile::tempdir().unwrap();
        let dest = directory.path().join("x");
        let size = SegmentSize::new(MIB).unwrap();
        let mut raw = vec![0; MIB as usize];
        for (at, byte) in [(0, 1), (4095, 2), (5000, 3), (12_288, 4), (700_001, 5), (MIB as usize - 1, 6)] {
            raw[at] = byte;
        }
        for piece in [1000, 4096, 100_000, MIB as usize] {
            let mut target = Target::new(&dest, MIB).unwrap();
            for (index, part) in raw.chunks(piece).enumerate() {
                target.write_at((index * piece) as u64, part).unwrap();
            }
            assert_eq!(target.compare_at(0, &raw).unwrap(), raw.len());
            assert!(target.compare_at(8192, &[0, 7]).is_err());
            target.finish(size).unwrap();
            assert!(fs::read(&dest).unwrap() == raw, "in pieces of {piece}");
            assert!(fs::metadata(&dest).unwrap().blocks() * 512 >= MIB, "its room is its own");
        }
    }

    #[test]
    fn what_is_forgotten_does_not_shine_through() {
        let directory = tempfile::tempdir().unwrap();
        let dest = directory.path().join("x");
        let mut target = Target::new(&dest, MIB).unwrap();
        target.write_at(0, &[1; 5000]).unwrap();
        let mark = target.mark();
        target.write_at(5000, &vec![9; 500_000]).unwrap();
        target.back_to(mark).unwrap();
        target.write_at(5000, &vec![0; MIB as usize - 5000]).unwrap();
        target.finish(SegmentSize::new(MIB).unwrap()).unwrap();
        let raw = fs::read(&dest).unwrap();
        assert!(raw[..5000] == [1; 5000] && raw[5000..].iter().all(|&byte| byte == 0));
    }
}

//! Owns: reading the spool's files as one stream of raw WAL, as far as it reaches.
//! Does not own: proof of what is read (`wal`): here a frame is whole and has its checksum, or it is the end.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::names::{Kind, RunName};
use super::{LineageSpool, SpoolError};
use crate::codec::FRAME_BYTES;
use crate::codec::decode::{DecodeError, decode_first};
use crate::wal::{Lsn, SegmentSize};

/// A frame of incompressible bytes is a little longer than they are.
const STORED_BYTES_MAX: usize = FRAME_BYTES + (FRAME_BYTES >> 8) + 1024;

/// Reads one timeline's files in the order of the stream.
#[derive(Debug)]
pub struct RunReader {
    spool: LineageSpool,
    runs: Vec<RunName>,
    size: SegmentSize,
    current: Option<Open>,
    buffer: Vec<u8>,
    damage: Option<String>,
}

#[derive(Debug)]
struct Open {
    name: RunName,
    file: File,
    offset: u64,
    /// The raw byte at `offset`.
    at: Lsn,
}

impl RunReader {
    pub(super) fn new(spool: LineageSpool, runs: Vec<RunName>, size: SegmentSize) -> RunReader {
        RunReader { spool, runs, size, current: None, buffer: vec![0; STORED_BYTES_MAX], damage: None }
    }

    /// The raw bytes from `position` to the end of the frame that holds it; `None` where no file goes on.
    pub fn next(&mut self, position: Lsn) -> Result<Option<Vec<u8>>, SpoolError> {
        if let Some(open) = self.current.take().filter(|open| open.at == position)
            && let Some(raw) = self.read_from(open, position)?
        {
            return Ok(Some(raw));
        }
        for name in self.candidates(position) {
            let path = self.spool.path.join(name.to_string());
            let file = match self.spool.directory.open_file(name.to_string()) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                opened => opened.map_err(SpoolError::io("read", &path))?,
            };
            if let Some(raw) = self.read_from(Open { name, file, offset: 0, at: name.from }, position)? {
                return Ok(Some(raw));
            }
        }
        Ok(None)
    }

    /// What was wrong with a frame that should have come next.
    pub fn damage(&self) -> Option<&str> {
        self.damage.as_deref()
    }

    /// Files of the segment that begin at or before `position`: whole frames first, the nearest beginning first.
    fn candidates(&self, position: Lsn) -> Vec<RunName> {
        let begins = |run: &&RunName| {
            let number = run.segment.number(self.size);
            run.from <= position && number == Some(self.size.segment_of(position))
        };
        let mut found: Vec<RunName> = self.runs.iter().filter(begins).copied().collect();
        found.sort_by_key(|run| (run.kind == Kind::Tail, std::cmp::Reverse(run.from)));
        found
    }

    /// Goes through a file until the frame that holds `position`.
    fn read_from(&mut self, mut open: Open, position: Lsn) -> Result<Option<Vec<u8>>, SpoolError> {
        loop {
            let Some((raw, stored_bytes)) = self.read_frame(&open)? else { return Ok(None) };
            let start = open.at;
            open.at = start + raw.len() as u64;
            open.offset += stored_bytes as u64;
            if open.at > position {
                self.current = Some(open);
                let skipped = (position - start) as usize;
                return Ok(Some(if skipped == 0 { raw } else { raw[skipped..].to_vec() }));
            }
        }
    }

    fn read_frame(&mut self, open: &Open) -> Result<Option<(Vec<u8>, usize)>, SpoolError> {
        let mut filled = 0;
        while filled < self.buffer.len() {
            match open.file.read_at(&mut self.buffer[filled..], open.offset + filled as u64) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                // A disk that no longer gives the bytes must not hold up what can still be had from the server.
                Err(error) => return self.refuse(open, error.to_string()),
            }
        }
        if filled == 0 {
            return Ok(None);
        }
        match decode_first(&self.buffer[..filled]) {
            Ok((raw, stored_bytes)) if self.fits(open, raw.len()) => Ok(Some((raw, stored_bytes))),
            Ok((raw, _)) => self.refuse(open, format!("{} raw bytes do not fit there", raw.len())),
            // How a crash in the middle of a write looks.
            Err(DecodeError::Truncated { .. }) if filled < self.buffer.len() => Ok(None),
            Err(error) => self.refuse(open, error.to_string()),
        }
    }

    fn fits(&self, open: &Open, raw_bytes: usize) -> bool {
        let end = open.at + raw_bytes as u64;
        let frame_start = Lsn(open.at.0 & !(FRAME_BYTES as u64 - 1));
        let within = end <= frame_start + FRAME_BYTES as u64 && raw_bytes > 0;
        match open.name.kind {
            Kind::Frames => raw_bytes == FRAME_BYTES && within,
            Kind::Tail => within && frame_start == open.name.from,
        }
    }

    fn refuse<T>(&mut self, open: &Open, cause: String) -> Result<Option<T>, SpoolError> {
        self.damage = Some(format!("{}, byte {}, WAL from {}: {cause}", open.name, open.offset, open.at));
        Ok(None)
    }
}

//! Owns: appending frames to the spool's files, and making them durable in one go.
//! Does not own: which frames, in which order, what is made of a failure (`archiver/spooling.rs`).
//!
//! At most two files are open: the one with whole frames, and the one with pieces of the frame behind them. A file
//! that a write or a sync has failed for is never continued: the next frame begins another one.

use std::fs::File;
use std::io::Write;
use std::sync::Arc;

use super::names::{Kind, RunName};
use super::{LineageSpool, RunFile, SpoolError};
use crate::repository::durable;
use crate::wal::{Lsn, SegmentName, SegmentSize, TimelineId};

/// Where a frame is now.
#[derive(Clone, Debug)]
pub struct Written {
    pub file: Arc<RunFile>,
    pub offset: u64,
}

#[derive(Debug)]
pub struct RunWriter {
    spool: LineageSpool,
    timeline: TimelineId,
    size: SegmentSize,
    frames: Option<Open>,
    tail: Option<Open>,
    /// Closed in this batch.
    unsynced: Vec<Open>,
    has_new_names: bool,
}

#[derive(Debug)]
struct Open {
    run: Arc<RunFile>,
    file: File,
    bytes: u64,
    /// Its length when the batch began.
    kept_bytes: u64,
    /// The raw byte that comes next.
    end: Lsn,
    is_dirty: bool,
}

impl RunWriter {
    pub(super) fn new(spool: LineageSpool, timeline: TimelineId, size: SegmentSize) -> RunWriter {
        RunWriter { spool, timeline, size, frames: None, tail: None, unsynced: Vec::new(), has_new_names: false }
    }

    /// Appends a whole frame to the file of its segment, if that ends where the frame starts; else to a new one.
    pub fn append_frame(&mut self, start: Lsn, end: Lsn, stored: &[u8]) -> Result<Written, SpoolError> {
        let segment = SegmentName::new(self.timeline, self.size.segment_of(start), self.size);
        let continues = |open: &Open| open.end == start && open.run.name.segment == segment;
        let name = RunName { segment, from: start, kind: Kind::Frames };
        let frames = self.frames.take();
        let mut open = self.continued(frames, continues, name)?;
        let written = Written { file: open.run.clone(), offset: open.bytes };
        let appended = self.append(&mut open, end, stored);
        self.frames = Some(open);
        appended.map(|()| written)
    }

    /// Appends a piece of the frame that begins at `frame_start`: its bytes `[from, to)`. Without a file that ends at
    /// `from`, `from` must be the frame's start.
    pub fn append_tail(&mut self, frame_start: Lsn, to: Lsn, stored: &[u8]) -> Result<Arc<RunFile>, SpoolError> {
        let segment = SegmentName::new(self.timeline, self.size.segment_of(frame_start), self.size);
        let name = RunName { segment, from: frame_start, kind: Kind::Tail };
        let tail = self.tail.take();
        let mut open = self.continued(tail, |open| open.run.name == name, name)?;
        let file = open.run.clone();
        let appended = self.append(&mut open, to, stored);
        self.tail = Some(open);
        appended.map(|()| file)
    }

    /// How far the pieces of the frame at `frame_start` reach.
    pub fn tail_end(&self, frame_start: Lsn) -> Lsn {
        self.tail.as_ref().filter(|open| open.run.name.from == frame_start).map_or(frame_start, |open| open.end)
    }

    /// What is appended from here on is kept or lost together.
    pub fn begin_batch(&mut self) {
        for open in self.frames.iter_mut().chain(&mut self.tail) {
            open.kept_bytes = open.bytes;
        }
    }

    /// Makes everything appended in this batch durable. After an error nothing of it is.
    pub fn sync(&mut self) -> Result<(), SpoolError> {
        self.sync_files()?;
        self.has_new_names = false;
        Ok(())
    }

    fn sync_files(&mut self) -> Result<(), SpoolError> {
        let path = self.spool.path.clone();
        for open in self.unsynced.iter_mut().chain(&mut self.frames).chain(&mut self.tail) {
            if std::mem::take(&mut open.is_dirty) {
                durable::flush_data(&open.file)
                    .map_err(|error| SpoolError::io("sync", &path.join(open.run.name.to_string()))(error))?;
            }
        }
        if self.has_new_names {
            self.spool.directory.sync().map_err(SpoolError::io("sync", &path))?;
        }
        Ok(())
    }

    /// The batch is kept: files that it closed are let go of, so that they can be removed and their space is free.
    pub fn end_batch(&mut self) {
        self.unsynced.clear();
    }

    /// Closes what lies in segments that end at or below `end`. Between two batches.
    pub fn close_up_to(&mut self, end: Lsn) {
        let size = self.size;
        let is_below = |open: &mut Open| size.end_of(size.segment_of(open.run.name.from)) <= end;
        drop((self.frames.take_if(is_below), self.tail.take_if(is_below)));
    }

    /// Takes the batch back, as well as that can be done: its files are removed or cut to what they were before, so that
    /// names and space are free. None of them is continued: what a disk that has failed makes of a second write or sync
    /// says nothing.
    pub fn give_up(&mut self) {
        let open = self.unsynced.drain(..).chain(self.frames.take()).chain(self.tail.take());
        for open in open {
            let _ = match open.kept_bytes {
                0 => self.spool.directory.unlink(open.run.name.to_string()),
                kept => open.file.set_len(kept),
            };
            self.spool.usage.release(open.bytes - open.kept_bytes);
        }
    }

    /// Ends the file of pieces, whose frame is whole now; the caller removes it once that is durable.
    pub fn end_tail(&mut self) -> Option<Arc<RunFile>> {
        let open = self.tail.take()?;
        let run = open.run.clone();
        self.unsynced.push(open);
        Some(run)
    }

    fn continued(
        &mut self,
        open: Option<Open>,
        continues: impl FnOnce(&Open) -> bool,
        name: RunName,
    ) -> Result<Open, SpoolError> {
        match open {
            Some(open) if continues(&open) => return Ok(open),
            // Part of this batch, if only to be cut back with it.
            Some(open) => self.unsynced.push(open),
            None => {}
        }
        let path = self.spool.path.join(name.to_string());
        let file = self.spool.directory.create_file(name.to_string()).map_err(SpoolError::io("create", &path))?;
        self.has_new_names = true;
        let run = Arc::new(RunFile { spool: self.spool.clone(), name });
        Ok(Open { run, file, bytes: 0, kept_bytes: 0, end: name.from, is_dirty: false })
    }

    fn append(&self, open: &mut Open, end: Lsn, stored: &[u8]) -> Result<(), SpoolError> {
        let bytes = stored.len() as u64;
        self.spool.usage.reserve(bytes)?;
        // Counted before it is written: a failed write may have taken the space.
        open.bytes += bytes;
        open.end = end;
        open.is_dirty = true;
        let path = || self.spool.path.join(open.run.name.to_string());
        open.file.write_all(stored).map_err(|error| SpoolError::io("write", &path())(error))
    }
}

impl LineageSpool {
    /// Whether a frame of this size has room.
    pub fn has_room_for(&self, bytes: u64) -> bool {
        self.usage.used_bytes() + bytes <= self.usage.limit_bytes()
    }
}

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
    /// Closed since the last sync, with bytes that were not synced.
    unsynced: Vec<Open>,
    has_new_names: bool,
}

#[derive(Debug)]
struct Open {
    run: Arc<RunFile>,
    file: File,
    bytes: u64,
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
        self.append(&mut open, end, stored)?;
        self.frames = Some(open);
        Ok(written)
    }

    /// Appends a piece of the frame that begins at `frame_start`: its bytes `[from, to)`. Without a file that ends at
    /// `from`, `from` must be the frame's start.
    pub fn append_tail(&mut self, frame_start: Lsn, to: Lsn, stored: &[u8]) -> Result<Arc<RunFile>, SpoolError> {
        let segment = SegmentName::new(self.timeline, self.size.segment_of(frame_start), self.size);
        let name = RunName { segment, from: frame_start, kind: Kind::Tail };
        let tail = self.tail.take();
        let mut open = self.continued(tail, |open| open.run.name == name, name)?;
        let file = open.run.clone();
        self.append(&mut open, to, stored)?;
        self.tail = Some(open);
        Ok(file)
    }

    /// How far the pieces of the frame at `frame_start` reach.
    pub fn tail_end(&self, frame_start: Lsn) -> Lsn {
        self.tail.as_ref().filter(|open| open.run.name.from == frame_start).map_or(frame_start, |open| open.end)
    }

    /// Makes everything appended since the last call durable. After an error nothing of it is, and none of these files
    /// is continued: what the kernel makes of a second sync says nothing.
    pub fn sync(&mut self) -> Result<(), SpoolError> {
        let synced = self.sync_all();
        match synced {
            Ok(()) => self.has_new_names = false,
            Err(_) => self.give_up(),
        }
        self.unsynced.clear();
        synced
    }

    fn sync_all(&mut self) -> Result<(), SpoolError> {
        let path = self.spool.path.clone();
        for open in self.unsynced.iter_mut().chain(&mut self.frames).chain(&mut self.tail) {
            if std::mem::take(&mut open.is_dirty) {
                durable::sync_data(&open.file)
                    .map_err(|error| SpoolError::io("sync", &path.join(open.run.name.to_string()))(error))?;
            }
        }
        if self.has_new_names {
            self.spool.directory.sync().map_err(SpoolError::io("sync", &path))?;
        }
        Ok(())
    }

    /// Whatever comes next begins new files.
    pub fn give_up(&mut self) {
        (self.frames, self.tail) = (None, None);
        self.unsynced.clear();
    }

    /// Ends the file of pieces, whose frame is whole now; the caller removes it once that is durable.
    pub fn end_tail(&mut self) -> Option<Arc<RunFile>> {
        self.tail.take().map(|open| open.run)
    }

    fn continued(
        &mut self,
        open: Option<Open>,
        continues: impl FnOnce(&Open) -> bool,
        name: RunName,
    ) -> Result<Open, SpoolError> {
        match open {
            Some(open) if continues(&open) => return Ok(open),
            // Synced with the next batch, if anybody asks for it.
            Some(open) if open.is_dirty => self.unsynced.push(open),
            _ => {}
        }
        let path = self.spool.path.join(name.to_string());
        let file = self.spool.directory.create_file(name.to_string()).map_err(SpoolError::io("create", &path))?;
        self.has_new_names = true;
        let run = Arc::new(RunFile { spool: self.spool.clone(), name });
        Ok(Open { run, file, bytes: 0, end: name.from, is_dirty: false })
    }

    fn append(&self, open: &mut Open, end: Lsn, stored: &[u8]) -> Result<(), SpoolError> {
        let bytes = stored.len() as u64;
        let appended = self.spool.usage.reserve(bytes).and_then(|()| {
            open.file.write_all(stored).map_err(|error| {
                self.spool.usage.release(bytes);
                SpoolError::io("write", &self.spool.path.join(open.run.name.to_string()))(error)
            })
        });
        match appended {
            Ok(()) => {
                (open.bytes, open.end, open.is_dirty) = (open.bytes + bytes, end, true);
                Ok(())
            }
            Err(error) => {
                // A piece of a frame is of no use to anybody, and takes space where there is none. An empty file would
                // stand in the way of its own name.
                let _ = match open.bytes {
                    0 => self.spool.directory.unlink(open.run.name.to_string()),
                    whole => open.file.set_len(whole),
                };
                Err(error)
            }
        }
    }
}

impl LineageSpool {
    /// Whether a frame of this size has room.
    pub fn has_room_for(&self, bytes: u64) -> bool {
        self.usage.used_bytes() + bytes <= self.usage.limit_bytes()
    }
}

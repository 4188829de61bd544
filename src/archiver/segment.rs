//! Owns: the encoded frames of one segment that is not stored yet, in memory or moved to an unfinished upload.
//! Does not own: when they move, when the segment is complete.
//!
//! A plain upload may give frames back ([`Segment::reads_back`]): a tail can be made of them as of those in memory. One
//! that is encrypted, or lies in a store that cannot, gives nothing back: [`Segment::at_hand_from`] is where the bytes
//! begin that can still become a tail.

use std::sync::Arc;

use tokio::sync::Mutex;

use super::body::{Piece, Wrapping};
use super::encode::HeldFrame;
use super::workers::Workers;
use crate::codec::Crc32Parts;
use crate::codec::decode::decode_exact;
use crate::receiver::Cut;
use crate::repository::{StoreError, StoreErrorKind, Upload};
use crate::wal::Lsn;

/// An object under construction. `None` before it is begun, after its end, and once a call to it was dropped: then what
/// it holds is unknown.
pub type SharedUpload = Arc<Mutex<Option<OpenUpload>>>;

/// An unfinished upload and what becomes of the frames on their way into it.
#[derive(Debug)]
pub struct OpenUpload {
    pub upload: Box<dyn Upload>,
    pub wrapping: Wrapping,
}

/// One encoded frame and where its bytes are.
#[derive(Clone, Debug)]
pub enum Slot {
    Held(Arc<HeldFrame>),
    /// Appended to the segment's upload, at `offset` of a plain one.
    Moved {
        start: Lsn,
        raw_bytes: u64,
        raw_crc32: u32,
        stored_crc32: u32,
        offset: u64,
        stored_bytes: u64,
    },
}

impl Slot {
    pub fn start(&self) -> Lsn {
        match self {
            Slot::Held(held) => held.start,
            Slot::Moved { start, .. } => *start,
        }
    }

    pub fn end(&self) -> Lsn {
        match self {
            Slot::Held(held) => held.end(),
            Slot::Moved { start, raw_bytes, .. } => *start + *raw_bytes,
        }
    }

    fn raw_crc32(&self) -> (u32, u64) {
        match self {
            Slot::Held(held) => (held.raw_crc32, held.raw_bytes),
            Slot::Moved { raw_crc32, raw_bytes, .. } => (*raw_crc32, *raw_bytes),
        }
    }

    fn stored_crc32(&self) -> (u32, u64) {
        match self {
            Slot::Held(held) => (held.stored_crc32, held.stored_bytes),
            Slot::Moved { stored_crc32, stored_bytes, .. } => (*stored_crc32, *stored_bytes),
        }
    }
}

/// The frames of one segment, contiguous from its start. Cloning is cheap: frames are shared.
#[derive(Clone, Debug)]
pub struct Segment {
    pub start: Lsn,
    pub slots: Vec<Slot>,
    pub upload: Option<SharedUpload>,
    /// Whether moved frames can be read back.
    pub reads_back: bool,
}

/// Frames of a range, and the CRC-32 of their raw bytes.
#[derive(Clone, Debug)]
pub struct Parts {
    pub pieces: Vec<Piece>,
    pub raw_crc32: u32,
}

impl Segment {
    pub fn new(start: Lsn, reads_back: bool) -> Segment {
        Segment { start, slots: Vec::new(), upload: None, reads_back }
    }

    pub fn end(&self) -> Lsn {
        self.slots.last().map_or(self.start, Slot::end)
    }

    pub fn append(&mut self, frame: Arc<HeldFrame>) {
        assert_eq!(frame.start, self.end(), "frames arrive in order");
        self.slots.push(Slot::Held(frame));
    }

    /// Encoded bytes below `end` that this segment keeps in memory, of whole frames.
    pub fn held_bytes(&self, end: Lsn) -> u64 {
        let held = |slot: &Slot| match slot {
            Slot::Held(held) if held.end() <= end && held.in_memory().is_some() => held.stored_bytes,
            _ => 0,
        };
        self.slots.iter().map(held).sum()
    }

    /// Whether no frame has left memory, for an upload or the spool.
    pub fn is_in_memory(&self) -> bool {
        self.slots.iter().all(|slot| matches!(slot, Slot::Held(held) if held.in_memory().is_some()))
    }

    /// From here on the bytes can still become a tail.
    pub fn at_hand_from(&self) -> Lsn {
        let moved = self.slots.iter().rev().find(|slot| matches!(slot, Slot::Moved { .. }));
        moved.filter(|_| !self.reads_back).map_or(self.start, Slot::end)
    }

    /// The frames below `end`, as they are now.
    pub fn below(&self, end: Lsn) -> Segment {
        let slots = self.slots.iter().take_while(|slot| slot.end() <= end).cloned().collect();
        Segment { slots, ..self.clone() }
    }

    pub fn raw_crc32(&self) -> u32 {
        combined(self.slots.iter().map(Slot::raw_crc32))
    }

    /// Lets go of everything but the frames still in memory, in order.
    pub fn into_held(self) -> Vec<Piece> {
        let held = |slot: Slot| match slot {
            Slot::Held(frame) => Some(Piece::Held(frame)),
            Slot::Moved { .. } => None,
        };
        self.slots.into_iter().filter_map(held).collect()
    }

    /// Every frame, moved ones read back; `None` where they cannot be.
    pub async fn pieces(&self) -> Result<Option<Vec<Piece>>, StoreError> {
        if self.at_hand_from() > self.start {
            return Ok(None);
        }
        let mut pieces = Vec::with_capacity(self.slots.len());
        for slot in &self.slots {
            pieces.push(self.piece(slot).await?);
        }
        Ok(Some(pieces))
    }

    /// The same slots after all of them were appended to the upload, in order.
    pub fn moved(&self) -> Vec<Slot> {
        let mut offset = 0;
        let mut moved = Vec::with_capacity(self.slots.len());
        for slot in &self.slots {
            let (raw_crc32, raw_bytes) = slot.raw_crc32();
            let (stored_crc32, stored_bytes) = slot.stored_crc32();
            moved.push(Slot::Moved { start: slot.start(), raw_bytes, raw_crc32, stored_crc32, offset, stored_bytes });
            offset += stored_bytes;
        }
        moved
    }

    /// The raw bytes `[from, to)` as zstd frames: whole frames as they are, pieces of frames encoded anew.
    /// `cut` holds the raw bytes behind the last whole frame.
    pub async fn parts(&self, from: Lsn, to: Lsn, cut: &Arc<Cut>, workers: &Workers) -> Result<Parts, StoreError> {
        assert!(from >= self.at_hand_from(), "no plan takes bytes that are gone");
        let mut pieces = Vec::new();
        let mut crc32 = Crc32Parts::new();
        let mut at = from;
        for slot in &self.slots {
            if slot.end() <= at || at >= to {
                continue;
            }
            let piece_end = slot.end().min(to);
            let whole = self.piece(slot).await?;
            if (at, piece_end) == (slot.start(), slot.end()) {
                pieces.push(whole);
                let (raw_crc32, raw_bytes) = slot.raw_crc32();
                crc32.append(raw_crc32, raw_bytes);
            } else {
                let encoded = whole.load().await?;
                let range = (at - slot.start()) as usize..(piece_end - slot.start()) as usize;
                let length = (slot.end() - slot.start()) as usize;
                let piece = workers
                    .run(move |encoder| decode_exact(&encoded, length).map(|(raw, _)| encoder.encode(&raw[range])))
                    .await
                    .map_err(|error| damaged_frame(slot.start(), &error))?;
                crc32.append(piece.raw_crc32, piece.raw_bytes as u64);
                pieces.push(Piece::Loose { bytes: piece.bytes, stored_crc32: piece.stored_crc32 });
            }
            at = piece_end;
        }
        if at < to {
            let cut = cut.clone();
            let piece = workers
                .run_for(to - at, move |encoder| {
                    let partial = cut.partial.as_ref().expect("a cut behind the last whole frame brings its bytes");
                    encoder.encode(&partial.bytes()[(at - partial.start) as usize..(to - partial.start) as usize])
                })
                .await;
            crc32.append(piece.raw_crc32, piece.raw_bytes as u64);
            pieces.push(Piece::Loose { bytes: piece.bytes, stored_crc32: piece.stored_crc32 });
        }
        Ok(Parts { pieces, raw_crc32: crc32.finish() })
    }

    async fn piece(&self, slot: &Slot) -> Result<Piece, StoreError> {
        match slot {
            Slot::Held(held) => Ok(Piece::Held(held.clone())),
            Slot::Moved { offset, stored_bytes, stored_crc32, .. } => {
                let upload = self.upload.as_ref().expect("frames move only into an upload");
                let mut upload = upload.lock().await;
                let open = upload.as_mut().ok_or_else(|| upload_gone(self.start))?;
                let bytes = open.upload.read_back(*offset..*offset + *stored_bytes).await?;
                Ok(Piece::Loose { bytes, stored_crc32: *stored_crc32 })
            }
        }
    }
}

fn combined(parts: impl Iterator<Item = (u32, u64)>) -> u32 {
    let mut whole = Crc32Parts::new();
    parts.for_each(|(crc32, bytes)| whole.append(crc32, bytes));
    whole.finish()
}

fn damaged_frame(start: Lsn, error: &dyn std::error::Error) -> StoreError {
    StoreError::new(StoreErrorKind::Corrupt, "read back", format!("the frame at {start}"), error.to_string())
}

/// The upload was completed or given up meanwhile: whoever still reads it is no longer needed.
pub fn upload_gone(start: Lsn) -> StoreError {
    StoreError::new(StoreErrorKind::NotFound, "read back", format!("the segment at {start}"), "its upload has ended")
}

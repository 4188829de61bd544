//! Owns: the encoded frames of one segment that is not stored yet, in memory or moved to an unfinished upload.
//! Does not own: when they move, when the segment is complete.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::Mutex;

use super::encode::HeldFrame;
use super::workers::Workers;
use crate::codec::Crc32Parts;
use crate::codec::decode::decode_exact;
use crate::receiver::Cut;
use crate::repository::{StoreError, StoreErrorKind, Upload};
use crate::wal::Lsn;

/// An object under construction: the upload while it is open, its length so far.
pub type SharedUpload = Arc<Mutex<Option<Box<dyn Upload>>>>;

/// One encoded frame and where its bytes are.
#[derive(Clone, Debug)]
pub enum Slot {
    Held(Arc<HeldFrame>),
    /// Appended to the segment's upload at `offset`.
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
}

/// Bytes ready to be stored and what they are.
#[derive(Clone, Debug)]
pub struct Parts {
    pub body: Vec<Bytes>,
    pub raw_crc32: u32,
}

impl Segment {
    pub fn new(start: Lsn) -> Segment {
        Segment { start, slots: Vec::new(), upload: None }
    }

    pub fn end(&self) -> Lsn {
        self.slots.last().map_or(self.start, Slot::end)
    }

    pub fn append(&mut self, frame: Arc<HeldFrame>) {
        assert_eq!(frame.start, self.end(), "frames arrive in order");
        self.slots.push(Slot::Held(frame));
    }

    /// Encoded bytes this segment keeps in memory.
    pub fn held_bytes(&self) -> u64 {
        let held = |slot: &Slot| match slot {
            Slot::Held(held) if held.in_memory().is_some() => held.stored_bytes,
            _ => 0,
        };
        self.slots.iter().map(held).sum()
    }

    pub fn raw_crc32(&self) -> u32 {
        combined(self.slots.iter().map(Slot::raw_crc32))
    }

    pub fn stored_crc32(&self) -> u32 {
        combined(self.slots.iter().map(Slot::stored_crc32))
    }

    pub fn stored_bytes(&self) -> u64 {
        self.slots.iter().map(|slot| slot.stored_crc32().1).sum()
    }

    /// The whole segment's frames still in memory, in order.
    pub fn held_frames(&self) -> Vec<Arc<HeldFrame>> {
        let held = |slot: &Slot| match slot {
            Slot::Held(frame) => Some(frame.clone()),
            Slot::Moved { .. } => None,
        };
        self.slots.iter().filter_map(held).collect()
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
        let mut body = Vec::new();
        let mut crc32 = Crc32Parts::new();
        let mut at = from;
        for slot in &self.slots {
            if slot.end() <= at || at >= to {
                continue;
            }
            let piece_end = slot.end().min(to);
            let encoded = self.encoded(slot).await?;
            if (at, piece_end) == (slot.start(), slot.end()) {
                body.push(encoded);
                let (raw_crc32, raw_bytes) = slot.raw_crc32();
                crc32.append(raw_crc32, raw_bytes);
            } else {
                let range = (at - slot.start()) as usize..(piece_end - slot.start()) as usize;
                let length = (slot.end() - slot.start()) as usize;
                let piece = workers
                    .run(move |encoder| decode_exact(&encoded, length).map(|(raw, _)| encoder.encode(&raw[range])))
                    .await
                    .map_err(|error| damaged_frame(slot.start(), &error))?;
                crc32.append(piece.raw_crc32, piece.raw_bytes as u64);
                body.push(piece.bytes);
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
            body.push(piece.bytes);
        }
        Ok(Parts { body, raw_crc32: crc32.finish() })
    }

    pub async fn encoded(&self, slot: &Slot) -> Result<Bytes, StoreError> {
        match slot {
            Slot::Held(held) => held.load().await,
            Slot::Moved { offset, stored_bytes, .. } => {
                let upload = self.upload.as_ref().expect("frames move only into an upload");
                let mut upload = upload.lock().await;
                let open = upload.as_mut().ok_or_else(|| upload_gone(self.start))?;
                open.read_back(*offset..*offset + *stored_bytes).await
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

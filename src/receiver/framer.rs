//! Owns: cutting the stream into aligned frames; the raw bytes of the frame being filled.
//! Does not own: compression, what is proven. Pure.

use std::sync::{Arc, Mutex};

use crate::codec::FRAME_BYTES;
use crate::wal::Lsn;

/// Raw bytes of one frame: aligned to [`FRAME_BYTES`], whole unless it is the piece of a [`Framer::partial`].
///
/// The buffer goes back to its pool on drop, so that no frame costs an allocation once streaming is under way.
#[derive(Debug)]
pub struct RawFrame {
    pub start: Lsn,
    bytes: Vec<u8>,
    pool: BufferPool,
}

impl RawFrame {
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub fn end(&self) -> Lsn {
        self.start + self.bytes.len() as u64
    }
}

impl Drop for RawFrame {
    fn drop(&mut self) {
        self.pool.give_back(std::mem::take(&mut self.bytes));
    }
}

/// Frame buffers waiting to be filled again; keeps at most [`BufferPool::KEPT_MAX`].
#[derive(Clone, Debug, Default)]
struct BufferPool(Arc<Mutex<Vec<Vec<u8>>>>);

impl BufferPool {
    /// As many as can be on their way between here and the encoder.
    const KEPT_MAX: usize = 10;

    fn take(&self) -> Vec<u8> {
        let kept = self.0.lock().expect("no holder of the pool panics").pop();
        kept.unwrap_or_else(|| Vec::with_capacity(FRAME_BYTES))
    }

    fn give_back(&self, mut buffer: Vec<u8>) {
        buffer.clear();
        let mut kept = self.0.lock().expect("no holder of the pool panics");
        if kept.len() < Self::KEPT_MAX && buffer.capacity() == FRAME_BYTES {
            kept.push(buffer);
        }
    }
}

/// Fills frames with a contiguous stream.
#[derive(Debug)]
pub struct Framer {
    /// Start of the frame being filled; a multiple of [`FRAME_BYTES`].
    start: Lsn,
    buffer: Vec<u8>,
    pool: BufferPool,
}

impl Framer {
    /// `start` is a segment boundary, so it is a frame boundary too.
    pub fn new(start: Lsn) -> Framer {
        assert!(start.0.is_multiple_of(FRAME_BYTES as u64), "streams start at a segment boundary, not at {start}");
        let pool = BufferPool::default();
        Framer { start, buffer: pool.take(), pool }
    }

    /// The next byte expected.
    pub fn position(&self) -> Lsn {
        self.start + self.buffer.len() as u64
    }

    /// Copies `bytes`, which continue the stream, and hands over every frame they complete.
    pub fn push(&mut self, mut bytes: &[u8], mut complete: impl FnMut(RawFrame)) {
        while !bytes.is_empty() {
            let room = FRAME_BYTES - self.buffer.len();
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            self.buffer.extend_from_slice(now);
            bytes = later;
            if self.buffer.len() == FRAME_BYTES {
                let full = std::mem::replace(&mut self.buffer, self.pool.take());
                complete(RawFrame { start: self.start, bytes: full, pool: self.pool.clone() });
                self.start = self.start + FRAME_BYTES as u64;
            }
        }
    }

    /// The bytes of the unfinished frame below `to`, or `None` when `to` lies in a frame already handed over.
    pub fn partial(&self, to: Lsn) -> Option<RawFrame> {
        assert!(to <= self.position(), "no byte beyond {} was received, {to} was asked for", self.position());
        let length = to.checked_distance(self.start).filter(|&length| length > 0)? as usize;
        let mut bytes = self.pool.take();
        bytes.extend_from_slice(&self.buffer[..length]);
        Some(RawFrame { start: self.start, bytes, pool: self.pool.clone() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn any_cutting_of_the_stream_gives_the_same_frames(sizes in prop::collection::vec(1usize..400_000, 1..30)) {
            let start = Lsn(16 << 20);
            let total: usize = sizes.iter().sum();
            let stream: Vec<u8> = (0..total).map(|i| (i % 253) as u8).collect();
            let mut framer = Framer::new(start);
            let mut whole = Vec::new();
            let mut at = 0;
            for size in sizes {
                framer.push(&stream[at..at + size], |frame| {
                    assert_eq!(frame.start, start + whole.len() as u64);
                    assert_eq!(frame.bytes().len(), FRAME_BYTES);
                    whole.extend_from_slice(frame.bytes());
                });
                at += size;
            }
            prop_assert_eq!(framer.position(), start + total as u64);
            if let Some(rest) = framer.partial(framer.position()) {
                prop_assert_eq!(rest.start, start + whole.len() as u64);
                whole.extend_from_slice(rest.bytes());
            }
            prop_assert_eq!(whole, stream);
        }
    }

    #[test]
    fn a_cut_inside_an_earlier_frame_has_no_partial() {
        let mut framer = Framer::new(Lsn(0));
        framer.push(&vec![7; FRAME_BYTES + 10], |_| ());
        assert!(framer.partial(Lsn(100)).is_none());
        assert!(framer.partial(Lsn(FRAME_BYTES as u64)).is_none());
        assert_eq!(framer.partial(Lsn(FRAME_BYTES as u64 + 3)).unwrap().bytes(), [7, 7, 7]);
    }
}

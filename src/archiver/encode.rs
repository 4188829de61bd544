//! Owns: the stage between receiver and archivers: frames compressed in parallel, handed on in order, each
//! once for all repositories.
//! Does not own: what the archivers make of them.

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::{FuturesOrdered, FuturesUnordered};
use tokio::sync::mpsc;

use super::workers::Workers;
use crate::codec::EncodedFrame;
use crate::receiver::{Cut, MemoryBudget, MemoryHold, Piece, RawFrame, Sealed};
use crate::repository::{StoreError, StoreErrorKind};
use crate::spool::Written;
use crate::wal::Lsn;

/// A whole frame, encoded: what it is, and where its bytes are. Shared by the archivers of all repositories.
#[derive(Debug)]
pub struct HeldFrame {
    pub start: Lsn,
    pub raw_bytes: u64,
    /// CRC-32 (IEEE) of the raw bytes.
    pub raw_crc32: u32,
    pub stored_bytes: u64,
    /// CRC-32 (IEEE) of the encoded bytes.
    pub stored_crc32: u32,
    memory: MemoryBudget,
    place: Mutex<Place>,
}

/// Where a frame's bytes are.
#[derive(Clone, Debug)]
enum Place {
    /// They count against the budget until the last one who loaded them lets go, not only this frame.
    Memory(Bytes),
    Spool(Written),
}

/// Bytes together with what they count for, as one thing that [`Bytes`] can own.
struct Counted<T> {
    bytes: T,
    _hold: MemoryHold,
}

impl<T: AsRef<[u8]>> AsRef<[u8]> for Counted<T> {
    fn as_ref(&self) -> &[u8] {
        self.bytes.as_ref()
    }
}

impl HeldFrame {
    pub fn new(start: Lsn, frame: EncodedFrame, memory: &MemoryBudget) -> HeldFrame {
        let stored_bytes = frame.bytes.len() as u64;
        let counted = Counted { bytes: frame.bytes, _hold: memory.hold(stored_bytes) };
        HeldFrame {
            start,
            raw_bytes: frame.raw_bytes as u64,
            raw_crc32: frame.raw_crc32,
            stored_bytes,
            stored_crc32: frame.stored_crc32,
            memory: memory.clone(),
            place: Mutex::new(Place::Memory(Bytes::from_owner(counted))),
        }
    }

    pub fn end(&self) -> Lsn {
        self.start + self.raw_bytes
    }

    /// The bytes, where they are still in memory.
    pub fn in_memory(&self) -> Option<Bytes> {
        match &*self.place.lock().expect("no holder of a frame's place panics") {
            Place::Memory(bytes) => Some(bytes.clone()),
            Place::Spool(_) => None,
        }
    }

    /// Lets go of the bytes in memory: `written` has them.
    pub fn leave_memory(&self, written: Written) {
        *self.place.lock().expect("no holder of a frame's place panics") = Place::Spool(written);
    }

    /// The encoded bytes, read back where they left memory: then they count against the budget once more.
    pub async fn load(&self) -> Result<Bytes, StoreError> {
        let place = self.place.lock().expect("no holder of a frame's place panics").clone();
        let written = match place {
            Place::Memory(bytes) => return Ok(bytes),
            Place::Spool(written) => written,
        };
        let hold = self.memory.hold(self.stored_bytes);
        let (start, length, crc32) = (self.start, self.stored_bytes, self.stored_crc32);
        let reading = move || written.file.read(start, written.offset, length, crc32);
        match tokio::task::spawn_blocking(reading).await.expect("reading the spool does not panic") {
            Ok(bytes) => Ok(Bytes::from_owner(Counted { bytes, _hold: hold })),
            Err(error) => {
                Err(StoreError::new(StoreErrorKind::SourceLost, "read back", "from the spool", error.to_string()))
            }
        }
    }
}

/// What the archivers get, in the order of the stream.
#[derive(Clone, Debug)]
pub enum Encoded {
    Frame(Arc<HeldFrame>),
    Cut(Arc<Cut>),
    Seal(Arc<Sealed>),
}

/// Encodes until `pieces` closes, or every archiver is gone.
pub async fn run_encoding(
    mut pieces: mpsc::Receiver<Piece>,
    archivers: Vec<mpsc::Sender<Encoded>>,
    workers: Workers,
    memory: MemoryBudget,
) {
    let mut encoding: FuturesOrdered<BoxFuture<'static, Encoded>> = FuturesOrdered::new();
    let mut closed: FuturesUnordered<_> = archivers.iter().map(|archiver| archiver.closed()).collect();
    let mut open = true;
    while open || !encoding.is_empty() {
        tokio::select! {
            biased;
            // An archiver that ended says why itself. Ending with it closes the receiver's channel, so that a
            // failure is noticed although the server has nothing more to send.
            Some(()) = closed.next() => return,
            piece = pieces.recv(), if open && encoding.len() <= workers.width() => match piece {
                Some(piece) => encoding.push_back(encode(piece, workers.clone(), memory.clone())),
                None => open = false,
            },
            Some(encoded) = encoding.next(), if !encoding.is_empty() => {
                for archiver in &archivers {
                    if archiver.send(encoded.clone()).await.is_err() {
                        return;
                    }
                }
            }
        }
    }
}

fn encode(piece: Piece, workers: Workers, memory: MemoryBudget) -> BoxFuture<'static, Encoded> {
    match piece {
        Piece::Frame(raw) => Box::pin(encode_frame(raw, workers, memory)),
        Piece::Cut(cut) => Box::pin(std::future::ready(Encoded::Cut(Arc::new(cut)))),
        Piece::Seal(sealed) => Box::pin(std::future::ready(Encoded::Seal(Arc::new(sealed)))),
    }
}

async fn encode_frame(raw: RawFrame, workers: Workers, memory: MemoryBudget) -> Encoded {
    let start = raw.start;
    let frame = workers.run(move |encoder| encoder.encode(raw.bytes())).await;
    Encoded::Frame(Arc::new(HeldFrame::new(start, frame, &memory)))
}

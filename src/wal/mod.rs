//! The WAL itself: positions, names, pages, records, and the proof that a stream of bytes is a valid WAL.
//!
//! Owns: LSN and segment arithmetic, timelines and history files, the page and record formats, the scanner.
//! Does not own: where the bytes come from, where they go, what is acknowledged.
//! Pure: no IO, clock, randomness or async. Rests on `proto-notes/05-wal-format.md` and `06-timelines.md`.

mod carry;
mod fault;
mod lsn;
mod open_segments;
mod page;
mod record;
pub mod scanner;
mod seek;
mod segment;
mod summary;
#[cfg(test)]
mod tests;
mod text;
mod timeline;

pub use lsn::{Lsn, ParseLsnError};
pub use page::{PAGE_BYTES, PageMagic};
pub use scanner::{Carry, FaultClass, PendingRecord, Proof, ScanError, ScanFault, ScanOptions, Scanner};
pub use seek::{Found, FoundKind, Sought};
pub use segment::{InvalidSegmentSize, ParseSegmentNameError, SegmentName, SegmentNumber, SegmentSize};
pub use summary::{Commit, RelationChange, RestorePoint, SegmentSummary};
pub use text::from_text;
pub use timeline::{History, HistoryEntry, HistoryError, SystemId, TimelineId};

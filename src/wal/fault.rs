//! Owns: what can be wrong with a stream of WAL, and what each fault means to the one who receives it.
//! Does not own: finding it (`scanner.rs`), deciding what to do (`receiver`).

use super::{Lsn, PageMagic, SystemId, TimelineId};

/// The first byte range that does not prove. Equal errors mean equal bytes at the fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("WAL does not prove at {lsn}: {fault}")]
pub struct ScanError {
    /// Where the fault lies.
    pub lsn: Lsn,
    /// Start of the record, or page, concerned. Everything before it is proven.
    pub record: Lsn,
    pub fault: ScanFault,
    /// The header bytes of the record or page in hexadecimal: evidence, and a fingerprint.
    pub detail: String,
}

impl ScanError {
    pub fn class(&self) -> FaultClass {
        self.fault.class()
    }
}

/// What a fault says about its cause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultClass {
    /// Bytes were left out or repeated between server and scanner: our bug.
    Discontinuity,
    /// The bytes are those of another server, another place, or a build we cannot read.
    Identity,
    /// The bytes are not what the server wrote. Fetched again, they may be well.
    Damage,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScanFault {
    #[error("stream is not contiguous: got bytes at {found}, expected {expected}")]
    NotContiguous { found: Lsn, expected: Lsn },

    #[error("page magic is {0} with its bytes swapped: the server is big-endian")]
    ByteOrder(PageMagic),
    #[error("system identifier is {found}, expected {expected}")]
    SystemId { found: SystemId, expected: SystemId },
    #[error("segment size is {found}, server says {expected}")]
    SegmentSize { found: u32, expected: u64 },
    #[error("WAL block size is {found}, only 8192 is supported")]
    BlockSize { found: u32 },
    #[error("page address is {found}, expected {expected}")]
    PageAddress { found: Lsn, expected: Lsn },
    #[error("page timeline is {found}, which does not reach here in the history of timeline {timeline}")]
    Timeline { found: TimelineId, timeline: TimelineId },
    #[error("page timeline goes back from {previous} to {found}")]
    TimelineBackwards { found: TimelineId, previous: TimelineId },

    #[error("page magic changes from {expected} to {found}")]
    MagicChange { found: PageMagic, expected: PageMagic },
    #[error("page flags are {found:04x}, which {magic} does not allow here")]
    PageFlags { found: u16, magic: PageMagic },
    #[error("page header padding is not zero")]
    PagePadding,
    #[error("page continues a record of {remaining} more bytes, but none is pending")]
    UnexpectedContinuation { remaining: u32 },
    #[error("page does not continue the pending record, which lacks {expected} bytes")]
    MissingContinuation { expected: u64 },
    #[error("page says {found} bytes of the record remain, expected {expected}")]
    RemainingLength { found: u32, expected: u64 },

    #[error("record length is {0}, outside 24 to 1069547520")]
    RecordLength(u32),
    #[error("record expected, found zeros")]
    NoRecord,
    #[error("record's previous record is {found}, expected {expected}")]
    PreviousLink { found: Lsn, expected: Lsn },
    #[error("record's previous record is {found}, which does not lie before it")]
    PreviousLinkAhead { found: Lsn },
    #[error("resource manager is {0}, which this version does not have")]
    ResourceManager(u8),
    #[error("record CRC is {computed:08x}, header says {header:08x}")]
    Crc { computed: u32, header: u32 },
    #[error("record content is inconsistent: {0}")]
    Fragments(&'static str),
    #[error("padding after the record is not zero")]
    RecordPadding,
    #[error("byte after a WAL switch is {0:02x}, expected zeros up to the segment end")]
    ZeroTail(u8),
    #[error("page says the record before it was given up, but its first record does not")]
    MissingOverwrite,
    #[error("record gives up another one, but its page does not say so")]
    UnexpectedOverwrite,
    #[error("record gives up the one at {found}, but the one cut off is at {expected}")]
    OverwrittenLsn { found: Lsn, expected: Lsn },
}

impl ScanFault {
    pub fn class(&self) -> FaultClass {
        match self {
            ScanFault::NotContiguous { .. } => FaultClass::Discontinuity,
            ScanFault::ByteOrder(_)
            | ScanFault::SystemId { .. }
            | ScanFault::SegmentSize { .. }
            | ScanFault::BlockSize { .. }
            | ScanFault::PageAddress { .. }
            | ScanFault::Timeline { .. }
            | ScanFault::TimelineBackwards { .. } => FaultClass::Identity,
            _ => FaultClass::Damage,
        }
    }
}

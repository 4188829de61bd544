//! Owns: the page header of every version, and what its magic number says about the format.
//! Does not own: whether a header fits its place in the stream (`scanner.rs`).
//! Rests on `proto-notes/05-wal-format.md`, "page header".

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{Lsn, TimelineId};

/// `XLOG_BLCKSZ` of every server anybody runs; another value is refused with a fault of its own.
pub const PAGE_BYTES: usize = 8192;
pub(super) const SHORT_HEADER_BYTES: usize = 24;
pub(super) const LONG_HEADER_BYTES: usize = 40;

/// Tells the WAL format, and so the major version. Written as four hexadecimal digits: `D118`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageMagic(pub u16);

impl PageMagic {
    /// The major version that writes this magic; `None` for one we do not know (yet).
    pub fn version(self) -> Option<u32> {
        Format::VERSIONS.iter().find(|(_, magic)| *magic == self.0).map(|(version, _)| *version)
    }

    /// What a server of this major version writes. A caller that knows the version can tell a flipped bit in the
    /// first page from a new format: the scanner cannot, and takes both for "unknown".
    pub fn of_version(version: u32) -> Option<PageMagic> {
        Format::VERSIONS.iter().find(|(known, _)| *known == version).map(|(_, magic)| PageMagic(*magic))
    }
}

impl fmt::Display for PageMagic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04X}", self.0)
    }
}

impl FromStr for PageMagic {
    type Err = std::num::ParseIntError;
    fn from_str(text: &str) -> Result<PageMagic, Self::Err> {
        u16::from_str_radix(text, 16).map(PageMagic)
    }
}

impl Serialize for PageMagic {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PageMagic {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<PageMagic, D::Error> {
        super::text::from_text(deserializer, str::parse)
    }
}

/// Where the versions differ, decoded once from the magic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    pub version: u32,
}

impl Format {
    const VERSIONS: [(u32, u16); 7] =
        [(13, 0xD106), (14, 0xD10D), (15, 0xD110), (16, 0xD113), (17, 0xD116), (18, 0xD118), (19, 0xD121)];

    pub fn of(magic: PageMagic) -> Option<Format> {
        magic.version().map(|version| Format { version })
    }

    /// `XLP_ALL_FLAGS`
    pub fn known_flags(self) -> u16 {
        if self.version >= 19 { 0x0007 } else { 0x000F }
    }

    /// `XLP_FIRST_IS_OVERWRITE_CONTRECORD`: 19 gave it the bit that says BKP_REMOVABLE ("ordinary page") up to 18.
    pub fn overwrite_flag(self) -> u16 {
        if self.version >= 19 { 0x0004 } else { 0x0008 }
    }

    /// `RmgrIdIsValid`: the built-in ones, and from 15 on those of extensions.
    pub fn has_resource_manager(self, id: u8) -> bool {
        let last_built_in = if self.version >= 19 { 22 } else { 21 };
        id <= last_built_in || (self.version >= 15 && id >= 128)
    }

    /// The `bimg_info` bits that say "compressed": 15 renumbered them when it learned lz4 and zstd.
    pub fn image_compressed(self, image_info: u8) -> bool {
        let mask = if self.version >= 15 { 0x1C } else { 0x02 };
        image_info & mask != 0
    }

    /// One `xl_xact_stats_item` in a commit record; 18 made the object id 64 bits wide.
    pub fn stats_item_bytes(self) -> usize {
        if self.version >= 18 { 16 } else { 12 }
    }
}

pub(super) const FLAG_CONTRECORD: u16 = 0x0001;
pub(super) const FLAG_LONG_HEADER: u16 = 0x0002;

/// `XLogPageHeaderData`
#[derive(Clone, Copy, Debug)]
pub(super) struct PageHeader {
    pub magic: PageMagic,
    pub flags: u16,
    pub timeline: TimelineId,
    pub address: Lsn,
    pub remaining: u32,
    pub padding: u32,
}

/// What `XLogLongPageHeaderData` adds on the first page of a segment.
#[derive(Clone, Copy, Debug)]
pub(super) struct LongHeader {
    pub system_id: u64,
    pub segment_bytes: u32,
    pub page_bytes: u32,
}

impl PageHeader {
    pub fn parse(bytes: &[u8; SHORT_HEADER_BYTES]) -> PageHeader {
        let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        PageHeader {
            magic: PageMagic(u16::from_le_bytes([bytes[0], bytes[1]])),
            flags: u16::from_le_bytes([bytes[2], bytes[3]]),
            timeline: TimelineId(u32_at(4)),
            address: Lsn(u64::from(u32_at(12)) << 32 | u64::from(u32_at(8))),
            remaining: u32_at(16),
            padding: u32_at(20),
        }
    }
}

impl LongHeader {
    pub fn parse(bytes: &[u8; LONG_HEADER_BYTES - SHORT_HEADER_BYTES]) -> LongHeader {
        let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        LongHeader {
            system_id: u64::from(u32_at(4)) << 32 | u64::from(u32_at(0)),
            segment_bytes: u32_at(8),
            page_bytes: u32_at(12),
        }
    }
}

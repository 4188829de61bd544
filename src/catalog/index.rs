//! Owns: index entries, the record of every sealed segment, and the file they are stored in.
//! Does not own: when they are written (`archiver`), how they are found (`store.rs`).

use serde::{Deserialize, Serialize};

use crate::wal::{Lsn, SegmentName, SegmentSize, SegmentSummary, from_text};

/// A CRC-32 (IEEE) as eight lower-case hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Crc32(pub u32);

impl Serialize for Crc32 {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{:08x}", self.0))
    }
}

impl<'de> Deserialize<'de> for Crc32 {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Crc32, D::Error> {
        from_text(deserializer, |text| {
            let plain = text.len() == 8 && text.bytes().all(|b| b.is_ascii_hexdigit());
            let crc32 = plain.then(|| u32::from_str_radix(text, 16).ok().map(Crc32)).flatten();
            crc32.ok_or("expected a CRC-32 as eight hexadecimal digits")
        })
    }
}

/// One sealed segment: durable, complete, proven (or said not to be).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IndexEntry {
    pub segment: SegmentName,
    pub start_lsn: Lsn,
    pub end_lsn: Lsn,
    pub raw_bytes: u64,
    pub raw_crc32: Crc32,
    /// Of the object that is there, never of our own encoding of it.
    pub stored_bytes: u64,
    pub stored_crc32: Crc32,
    #[serde(flatten)]
    pub summary: SegmentSummary,
}

/// The content of `<first>-<last>-<epoch>.index.json`: consecutive segments of one directory, in order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IndexFile<E = IndexEntry> {
    pub schema: u32,
    pub segment_size: SegmentSize,
    pub entries: Vec<E>,
}

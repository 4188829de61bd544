//! Owns: the record header, the fragments behind it, and the few records whose content the index wants.
//! Does not own: where records lie, their CRC, their chain (`scanner.rs`).
//! Rests on `proto-notes/05-wal-format.md`, "record header", "fragments", "records worth indexing".

use std::ops::Range;

use jiff::Timestamp;

use super::page::Format;
use super::{Lsn, SegmentSummary};

pub(super) const RECORD_HEADER_BYTES: usize = 24;
/// The CRC covers the header up to the CRC itself.
pub(super) const CRC_OFFSET: usize = 20;
/// `XLogRecordMaxSize`: 1020 MiB.
pub(super) const RECORD_BYTES_MAX: u32 = 1020 * 1024 * 1024;

const RM_XLOG: u8 = 0;
const RM_XACT: u8 = 1;
const RM_SMGR: u8 = 2;
const RM_DATABASE: u8 = 4;
const RM_TABLESPACE: u8 = 5;
const XLOG_SWITCH: u8 = 0x40;
const XLOG_RESTORE_POINT: u8 = 0x70;
const XLOG_OVERWRITE_CONTRECORD: u8 = 0xD0;
const XACT_COMMIT: u8 = 0x00;
const XACT_ABORT: u8 = 0x20;
const XACT_COMMIT_PREPARED: u8 = 0x30;
const XACT_ABORT_PREPARED: u8 = 0x40;
const XACT_HAS_INFO: u8 = 0x80;
const SMGR_TRUNCATE: u8 = 0x20;
const TABLESPACE_DROP: u8 = 0x10;

/// `XLogRecord`
#[derive(Clone, Copy, Debug)]
pub(super) struct RecordHeader {
    pub total: u32,
    pub xid: u32,
    pub prev: Lsn,
    pub info: u8,
    pub resource_manager: u8,
    pub crc: u32,
}

impl RecordHeader {
    #[inline]
    pub fn parse(bytes: &[u8; RECORD_HEADER_BYTES]) -> RecordHeader {
        let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        RecordHeader {
            total: u32_at(0),
            xid: u32_at(4),
            prev: Lsn(u64::from(u32_at(12)) << 32 | u64::from(u32_at(8))),
            info: bytes[16],
            resource_manager: bytes[17],
            crc: u32_at(CRC_OFFSET),
        }
    }

    fn is_xlog(&self, info: u8) -> bool {
        self.resource_manager == RM_XLOG && self.info & 0xF0 == info
    }

    pub fn is_switch(&self) -> bool {
        self.is_xlog(XLOG_SWITCH)
    }

    pub fn is_overwrite_contrecord(&self) -> bool {
        self.is_xlog(XLOG_OVERWRITE_CONTRECORD)
    }

    /// How much of a record that crosses pages is kept. All block headers together never exceed 904 bytes (33 of 27,
    /// and the three others), so 1 KiB always holds them; a commit's relations lie behind its subtransactions.
    pub fn prefix_bytes_max(&self) -> usize {
        if self.resource_manager == RM_XACT { 64 << 10 } else { 1 << 10 }
    }

    #[inline]
    fn may_be_indexed(&self) -> bool {
        match self.resource_manager {
            RM_XLOG => self.info & 0xF0 == XLOG_RESTORE_POINT,
            RM_XACT => matches!(self.info & 0x70, XACT_COMMIT | XACT_COMMIT_PREPARED),
            RM_SMGR => self.info & 0xF0 == SMGR_TRUNCATE,
            RM_DATABASE => matches!(self.info & 0xF0, 0x10 | 0x20),
            RM_TABLESPACE => self.info & 0xF0 == TABLESPACE_DROP,
            _ => false,
        }
    }
}

/// The CRC-32C of a whole record: over the bytes behind the header first, then over the header up to the CRC.
///
/// Most records are short, and what costs is not their bytes but the calls and the odd bytes at their ends. So a short
/// record is put in order in front of a word boundary, and summed in whole words: leading zeros leave a CRC register
/// of zero as it is, and complementing the first four bytes has the effect of starting with ones.
#[inline]
pub(super) fn record_crc(record: &[u8]) -> u32 {
    const SHORT: usize = 256;
    #[repr(align(8))]
    struct Words([u8; SHORT]);
    let (header, body) = record.split_at(RECORD_HEADER_BYTES);
    let summed = body.len() + CRC_OFFSET;
    if summed > SHORT {
        return crc32c::crc32c_append(crc32c::crc32c(body), &header[..CRC_OFFSET]);
    }
    let mut words = Words([0; SHORT]);
    let start = SHORT - summed;
    words.0[start..SHORT - CRC_OFFSET].copy_from_slice(body);
    words.0[SHORT - CRC_OFFSET..].copy_from_slice(&header[..CRC_OFFSET]);
    for byte in &mut words.0[start..start + 4] {
        *byte = !*byte;
    }
    crc32c::crc32c_append(!0, &words.0[start & !7..])
}

/// Reads little-endian numbers off the front of a slice; `None` once it is too short.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    #[inline]
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*head)
    }

    #[inline]
    fn u8(&mut self) -> Option<u8> {
        self.array::<1>().map(|[byte]| byte)
    }

    #[inline]
    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    #[inline]
    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    #[inline]
    fn i64(&mut self) -> Option<i64> {
        self.array().map(i64::from_le_bytes)
    }

    #[inline]
    fn skip(&mut self, bytes: usize) -> Option<()> {
        self.0 = self.0.get(bytes..)?;
        Some(())
    }

    /// Skips a counted array.
    fn skip_items(&mut self, item_bytes: usize) -> Option<()> {
        let count = self.u32()? as usize;
        self.skip(count.checked_mul(item_bytes)?)
    }
}

const FRAGMENT_CUT: &str = "a fragment header is cut off";

/// Walks the block and data headers and returns where the main data lies. Everything they declare must add up to the
/// record's length. `prefix` is the record, or as much of it as is kept.
#[inline]
pub(super) fn main_data(prefix: &[u8], total: usize, format: Format) -> Result<Range<usize>, &'static str> {
    let mut reader = Reader(prefix.get(RECORD_HEADER_BYTES..).ok_or(FRAGMENT_CUT)?);
    let mut remaining = (total - RECORD_HEADER_BYTES) as u64;
    let mut declared = 0u64;
    let mut main = 0u64;
    let mut next_block_id = 0u8;
    while remaining > declared {
        let before = reader.0.len();
        let id = reader.u8().ok_or(FRAGMENT_CUT)?;
        match id {
            0..=32 => {
                if id < next_block_id {
                    return Err("block ids are out of order");
                }
                next_block_id = id + 1;
                declared += block_bytes(&mut reader, format).ok_or(FRAGMENT_CUT)?;
            }
            255 => main = u64::from(reader.u8().ok_or(FRAGMENT_CUT)?),
            254 => main = u64::from(reader.u32().ok_or(FRAGMENT_CUT)?),
            253 => reader.skip(2).ok_or(FRAGMENT_CUT)?,
            252 if format.version >= 14 => reader.skip(4).ok_or(FRAGMENT_CUT)?,
            _ => return Err("a fragment has an unknown id"),
        }
        remaining = remaining.checked_sub((before - reader.0.len()) as u64).ok_or(FRAGMENT_CUT)?;
        if id == 255 || id == 254 {
            declared += main;
            break; // the main data fragment is always last
        }
    }
    if remaining != declared {
        return Err("the fragments do not add up to the record's length");
    }
    Ok(total - main as usize..total)
}

/// Reads one block header behind its id; returns the bytes of image and data that it announces.
#[inline]
fn block_bytes(reader: &mut Reader<'_>, format: Format) -> Option<u64> {
    const HAS_IMAGE: u8 = 0x10;
    const SAME_RELATION: u8 = 0x80;
    const HAS_HOLE: u8 = 0x01;
    let flags = reader.u8()?;
    let mut bytes = u64::from(reader.u16()?);
    if flags & HAS_IMAGE != 0 {
        bytes += u64::from(reader.u16()?);
        reader.skip(2)?; // hole offset
        let image_info = reader.u8()?;
        if image_info & HAS_HOLE != 0 && format.image_compressed(image_info) {
            reader.skip(2)?; // hole length
        }
    }
    reader.skip(if flags & SAME_RELATION != 0 { 4 } else { 16 })?;
    Some(bytes)
}

/// The content of a record that the index keeps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Fact {
    Commit {
        xid: u32,
        time: Option<Timestamp>,
        relations: Vec<String>,
        truncated: bool,
    },
    RestorePoint {
        name: String,
        time: Option<Timestamp>,
    },
    Truncation {
        xid: u32,
        relation: String,
    },
    /// `directories`: `<tablespace>/<database>`
    DatabaseRemoval {
        xid: u32,
        directories: Vec<String>,
        truncated: bool,
    },
    TablespaceRemoval {
        xid: u32,
        tablespace: u32,
    },
}

/// Reads what the index wants from a record; `main` may be cut off where only a prefix was kept.
#[inline]
pub(super) fn fact(header: &RecordHeader, main: &[u8], format: Format) -> Option<Fact> {
    if !header.may_be_indexed() { None } else { decode_fact(header, main, format) }
}

fn decode_fact(header: &RecordHeader, main: &[u8], format: Format) -> Option<Fact> {
    let mut reader = Reader(main);
    match header.resource_manager {
        RM_XACT => Some(commit(header, reader, format)),
        RM_DATABASE => database_removal(header, reader, format),
        RM_TABLESPACE => Some(Fact::TablespaceRemoval { xid: header.xid, tablespace: reader.u32()? }),
        RM_SMGR => {
            reader.skip(4)?; // the block the relation now ends at
            Some(Fact::Truncation { xid: header.xid, relation: relation(&mut reader)? })
        }
        _ => {
            let time = timestamp(reader.i64()?);
            let name = reader.0.get(..64).unwrap_or(reader.0);
            let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
            Some(Fact::RestorePoint { name: String::from_utf8_lossy(name).into_owned(), time })
        }
    }
}

/// The transaction a record rolls back, and when; the index does not keep these. The parts of `xl_xact_parsed_abort` are
/// those of a commit, without invalidation messages.
pub(super) fn rollback(header: &RecordHeader, main: &[u8], format: Format) -> Option<(u32, Option<Timestamp>)> {
    let is_rollback = matches!(header.info & 0x70, XACT_ABORT | XACT_ABORT_PREPARED);
    if header.resource_manager != RM_XACT || !is_rollback {
        return None;
    }
    match commit(header, Reader(main), format) {
        Fact::Commit { xid, time, .. } => Some((xid, time)),
        _ => None,
    }
}

/// `xl_xact_parsed_commit`, as far as it is there.
fn commit(header: &RecordHeader, mut reader: Reader<'_>, format: Format) -> Fact {
    let time = reader.i64().and_then(timestamp);
    let (mut xid, mut relations, mut truncated) = (header.xid, Vec::new(), false);
    if header.info & XACT_HAS_INFO != 0 {
        let whole = commit_details(&mut reader, format, &mut xid, &mut relations, &mut truncated);
        truncated |= whole.is_none();
    }
    Fact::Commit { xid, time, relations, truncated }
}

fn commit_details(
    reader: &mut Reader<'_>,
    format: Format,
    xid: &mut u32,
    relations: &mut Vec<String>,
    truncated: &mut bool,
) -> Option<()> {
    let parts = reader.u32()?;
    let has = |bit: u32| parts & bit != 0;
    if has(1) {
        reader.skip(8)?; // database and its tablespace
    }
    if has(2) {
        reader.skip_items(4)?; // subtransactions
    }
    if has(4) {
        for index in 0..reader.u32()? as usize {
            if index < SegmentSummary::LIST_MAX {
                relations.push(relation(reader)?);
            } else {
                *truncated = true;
                reader.skip(12)?;
            }
        }
    }
    if has(256) && format.version >= 15 {
        reader.skip_items(format.stats_item_bytes())?;
    }
    if has(8) {
        reader.skip_items(16)?; // invalidation messages
    }
    if has(16) {
        *xid = reader.u32()?; // of the prepared transaction: the header's is that of COMMIT PREPARED
    }
    Some(())
}

/// `xl_dbase_drop_rec`. Version 15 gave its number to another record.
fn database_removal(header: &RecordHeader, mut reader: Reader<'_>, format: Format) -> Option<Fact> {
    let drop = if format.version >= 15 { 0x20 } else { 0x10 };
    if header.info & 0xF0 != drop {
        return None;
    }
    let (database, count) = (reader.u32()?, reader.u32()? as usize);
    let tablespaces: Vec<u32> = (0..count.min(SegmentSummary::LIST_MAX)).map_while(|_| reader.u32()).collect();
    let truncated = tablespaces.len() < count;
    let directories = tablespaces.iter().map(|tablespace| format!("{tablespace}/{database}")).collect();
    Some(Fact::DatabaseRemoval { xid: header.xid, directories, truncated })
}

/// `RelFileLocator`, as a path below the data directory would name it.
fn relation(reader: &mut Reader<'_>) -> Option<String> {
    let (tablespace, database, number) = (reader.u32()?, reader.u32()?, reader.u32()?);
    Some(format!("{tablespace}/{database}/{number}"))
}

/// The LSN of the record that an overwrite record says was given up.
pub(super) fn overwritten_lsn(main: &[u8]) -> Option<Lsn> {
    Reader(main).i64().map(|lsn| Lsn(lsn as u64))
}

/// 2000-01-01 in Unix microseconds: where PostgreSQL's clock starts.
const POSTGRES_EPOCH: i64 = 946_684_800_000_000;

/// `None` for times a `Timestamp` cannot hold: PostgreSQL's reach to the year 294276, and to infinity.
fn timestamp(microseconds: i64) -> Option<Timestamp> {
    Timestamp::from_microsecond(microseconds.checked_add(POSTGRES_EPOCH)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(resource_manager: u8, info: u8) -> RecordHeader {
        RecordHeader { total: 0, xid: 7, prev: Lsn(0), info, resource_manager, crc: 0 }
    }

    /// A COMMIT PREPARED with every part that has a length of its own.
    fn full_commit(version: u32) -> Vec<u8> {
        let mut main = 1_000_000i64.to_le_bytes().to_vec();
        let words = |main: &mut Vec<u8>, words: &[u32]| words.iter().for_each(|w| main.extend(w.to_le_bytes()));
        let stats = if version >= 15 { 256 } else { 0 };
        words(&mut main, &[1 | 2 | 4 | 8 | 16 | 128 | stats]);
        words(&mut main, &[5, 1663, 2, 100, 101, 2, 1663, 5, 16384, 1663, 5, 16385]);
        if version >= 15 {
            words(&mut main, &[1]);
            main.extend(vec![9; if version >= 18 { 16 } else { 12 }]);
        }
        words(&mut main, &[1, 1, 2, 3, 4, 4711]);
        main.extend(b"gid\0");
        main
    }

    #[test]
    fn every_part_of_a_commit_is_walked_in_every_version() {
        for version in 13..=19 {
            let fact = fact(&header(1, 0xB0), &full_commit(version), Format { version });
            let Some(Fact::Commit { xid, time, relations, truncated }) = fact else { panic!("{version}: {fact:?}") };
            assert_eq!((xid, truncated), (4711, false), "{version}");
            assert_eq!(time.unwrap().to_string(), "2000-01-01T00:00:01Z");
            assert_eq!(relations, ["1663/5/16384", "1663/5/16385"]);
        }
    }

    #[test]
    fn a_database_removal_is_told_from_its_creation_in_every_version() {
        let main: Vec<u8> = [16400u32, 2, 1663, 16500].iter().flat_map(|word| word.to_le_bytes()).collect();
        for version in 13..=19 {
            let format = Format { version };
            let (drop, other) = if version >= 15 { (0x20, 0x10) } else { (0x10, 0x20) };
            let expected = vec!["1663/16400".to_string(), "16500/16400".to_string()];
            let removal = |truncated| Fact::DatabaseRemoval { xid: 7, directories: expected.clone(), truncated };
            assert_eq!(fact(&header(4, drop), &main, format), Some(removal(false)), "{version}");
            assert_eq!(fact(&header(4, other), &main, format), None, "{version}");
            assert_eq!(fact(&header(4, 0x00), &main, format), None, "{version}");
            for length in 0..main.len() {
                let cut = fact(&header(4, drop), &main[..length], format);
                assert!(cut.is_none_or(|cut| matches!(cut, Fact::DatabaseRemoval { truncated: true, .. })), "{length}");
            }
        }
        let removed = fact(&header(5, 0x10), &16500u32.to_le_bytes(), Format { version: 18 });
        assert_eq!(removed, Some(Fact::TablespaceRemoval { xid: 7, tablespace: 16500 }));
    }

    #[test]
    fn a_cut_commit_keeps_what_is_there() {
        let whole = full_commit(15);
        for length in 0..whole.len() {
            let fact = fact(&header(1, 0xB0), &whole[..length], Format { version: 15 });
            assert!(matches!(fact, Some(Fact::Commit { .. })), "{length}");
        }
    }

    #[test]
    fn times_out_of_range_are_none() {
        assert_eq!(timestamp(i64::MAX), None);
        assert_eq!(timestamp(i64::MIN), None);
        assert_eq!(timestamp(0).unwrap().to_string(), "2000-01-01T00:00:00Z");
    }
}

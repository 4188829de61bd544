//! Owns: the text of each replication command, and what the rows of its answer mean.
//! Does not own: sending them, START_REPLICATION's stream. proto-notes/02-commands.md.

use std::fmt;
use std::str::FromStr;

use bytes::Bytes;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::wal::{Lsn, SegmentSize, SystemId, TimelineId};

use super::error::{ServerError, escape};
use super::framing::{Fields, ProtocolError};

/// What one answer may hold in memory: a history file and room to spare.
pub const ANSWER_BYTES_MAX: usize = 32 << 20;

/// The name of a replication slot: `[a-z0-9_]{1,63}`, the server's own rule, so it never needs quoting.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotName(String);

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid slot name {0:?}: expected 1 to 63 lower-case letters, digits and underscores")]
pub struct InvalidSlotName(String);

impl SlotName {
    pub fn new(name: &str) -> Result<SlotName, InvalidSlotName> {
        let plain = name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
        let valid = plain && (1..=63).contains(&name.len());
        if valid { Ok(SlotName(name.to_string())) } else { Err(InvalidSlotName(name.chars().take(80).collect())) }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for SlotName {
    type Err = InvalidSlotName;
    fn from_str(name: &str) -> Result<SlotName, InvalidSlotName> {
        SlotName::new(name)
    }
}

impl fmt::Display for SlotName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Serialize for SlotName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for SlotName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<SlotName, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

pub const IDENTIFY_SYSTEM: &str = "IDENTIFY_SYSTEM";

/// `None` when `name` cannot be the name of a setting.
pub fn show(name: &str) -> Option<String> {
    let plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'.');
    (plain && !name.is_empty()).then(|| format!("SHOW {name}"))
}

pub fn timeline_history(timeline: TimelineId) -> String {
    format!("TIMELINE_HISTORY {timeline}")
}

/// The spelling of 13 and 14, which every later version still takes.
pub fn create_physical_slot(name: &SlotName) -> String {
    format!("CREATE_REPLICATION_SLOT \"{name}\" PHYSICAL RESERVE_WAL")
}

pub fn read_slot(name: &SlotName) -> String {
    format!("READ_REPLICATION_SLOT \"{name}\"")
}

pub fn drop_slot(name: &SlotName) -> String {
    format!("DROP_REPLICATION_SLOT \"{name}\"")
}

/// The timeline is always named: without it the server picks its current one.
pub fn start_replication(slot: &SlotName, start: Lsn, timeline: TimelineId) -> String {
    format!("START_REPLICATION SLOT \"{slot}\" PHYSICAL {start} TIMELINE {timeline}")
}

/// Without a slot: the server keeps nothing for it, and sends what it still has.
pub fn start_replication_without_slot(start: Lsn, timeline: TimelineId) -> String {
    format!("START_REPLICATION PHYSICAL {start} TIMELINE {timeline}")
}

/// The answer to a simple query: the rows of all its result sets, values in text form, `None` for NULL.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct QueryResult {
    /// Of the last result set.
    pub columns: Vec<String>,
    pub rows: Vec<Vec<Option<Bytes>>>,
    bytes: usize,
}

impl QueryResult {
    /// Takes the body of a RowDescription: only the names are of use, the types differ between versions.
    pub fn describe(&mut self, body: &[u8]) -> Result<(), ProtocolError> {
        let malformed = ProtocolError::Malformed { tag: b'T', cause: "it ends early" };
        let mut fields = Fields(body);
        let count = fields.i16().and_then(|count| usize::try_from(count).ok()).ok_or(malformed.clone())?;
        self.columns.clear();
        for _ in 0..count {
            let name = fields.c_string().ok_or(malformed.clone())?;
            fields.take(18).ok_or(malformed.clone())?;
            self.columns.push(escape(&String::from_utf8_lossy(name)));
        }
        Ok(())
    }

    /// Takes the body of a DataRow.
    pub fn push_row(&mut self, body: &[u8]) -> Result<(), ProtocolError> {
        let malformed = |cause| ProtocolError::Malformed { tag: b'D', cause };
        let mut fields = Fields(body);
        let count = fields.i16().and_then(|count| usize::try_from(count).ok()).ok_or(malformed("it ends early"))?;
        if count != self.columns.len() {
            return Err(malformed("its columns are not those announced"));
        }
        // Counted with what a value costs beside its bytes: many empty values are not free.
        self.bytes += 64 * (count + 1) + body.len();
        if self.bytes > ANSWER_BYTES_MAX {
            return Err(ProtocolError::AnswerTooLong { limit: ANSWER_BYTES_MAX });
        }
        let mut row = Vec::with_capacity(count);
        for _ in 0..count {
            row.push(match fields.i32().ok_or(malformed("it ends early"))? {
                -1 => None,
                length => {
                    let length = usize::try_from(length).map_err(|_| malformed("a value has a negative length"))?;
                    Some(Bytes::copy_from_slice(fields.take(length).ok_or(malformed("it ends early"))?))
                }
            });
        }
        if !fields.0.is_empty() {
            return Err(malformed("bytes follow its last value"));
        }
        self.rows.push(row);
        Ok(())
    }

    /// A value as text: `None` for NULL, and where there is no such row, column or UTF-8.
    pub fn text(&self, row: usize, column: usize) -> Option<&str> {
        std::str::from_utf8(self.rows.get(row)?.get(column)?.as_ref()?).ok()
    }
}

/// What IDENTIFY_SYSTEM says. On a standby the timeline is the one being replayed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SystemIdentity {
    pub system_id: SystemId,
    pub timeline: TimelineId,
    pub flush_lsn: Lsn,
}

/// What READ_REPLICATION_SLOT says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotReading {
    Missing,
    /// Exists and holds no WAL: never used, or (16 and later) lost.
    NotReserved,
    Reserved {
        restart_lsn: Lsn,
        restart_timeline: TimelineId,
    },
    /// 13 and 14 do not know the command: ask `pg_replication_slots`.
    Unsupported,
}

/// Where the timeline that was streamed ends, and which one follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimelineEnd {
    pub next_timeline: TimelineId,
    pub next_start: Lsn,
}

/// Why a row does not mean what its command promises.
pub type BadAnswer = String;

/// Exactly one row of at least `columns` columns. Later versions may add columns at the end.
pub(super) fn one_row(result: &QueryResult, columns: usize) -> Result<(), BadAnswer> {
    match result.rows.as_slice() {
        [row] if row.len() >= columns => Ok(()),
        [row] => Err(format!("the answer has {} columns, expected {columns}", row.len())),
        rows => Err(format!("the answer has {} rows, expected one", rows.len())),
    }
}

pub(super) fn parse<T: FromStr>(result: &QueryResult, column: usize, what: &str) -> Result<T, BadAnswer> {
    let text = result.text(0, column).ok_or_else(|| format!("the answer has no {what}"))?;
    text.parse().map_err(|_| format!("the answer's {what} cannot be read: {:?}", escape(text)))
}

pub(super) fn parse_timeline(result: &QueryResult, column: usize) -> Result<TimelineId, BadAnswer> {
    match parse(result, column, "timeline")? {
        0 => Err("the answer names timeline 0, which does not exist".to_string()),
        timeline => Ok(TimelineId(timeline)),
    }
}

pub fn decode_identify_system(result: &QueryResult) -> Result<SystemIdentity, BadAnswer> {
    one_row(result, 3)?;
    Ok(SystemIdentity {
        system_id: parse(result, 0, "system identifier")?,
        timeline: parse_timeline(result, 1)?,
        flush_lsn: parse(result, 2, "position")?,
    })
}

pub fn decode_show(result: &QueryResult) -> Result<String, BadAnswer> {
    one_row(result, 1)?;
    parse(result, 0, "value")
}

/// Reads `16MB`, `1GB`: how `SHOW wal_segment_size` is written.
pub fn parse_segment_size(text: &str) -> Result<SegmentSize, BadAnswer> {
    let bad = || format!("wal_segment_size cannot be read: {:?}", escape(text));
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let unit: u64 = match unit.trim() {
        "" | "B" => 1,
        "kB" => 1 << 10,
        "MB" => 1 << 20,
        "GB" => 1 << 30,
        _ => return Err(bad()),
    };
    let bytes = number.parse::<u64>().ok().and_then(|number| number.checked_mul(unit)).ok_or_else(bad)?;
    SegmentSize::new(bytes).map_err(|error| error.to_string())
}

/// The file's name and its content: raw bytes, whatever type the server declares (proto-notes/02-commands.md, "grammar").
pub fn decode_timeline_history(mut result: QueryResult) -> Result<(String, Bytes), BadAnswer> {
    one_row(&result, 2)?;
    let name = parse(&result, 0, "file name")?;
    let content = result.rows[0][1].take().ok_or("the answer has no content")?;
    Ok((name, content))
}

pub fn decode_read_slot(result: &QueryResult) -> Result<SlotReading, BadAnswer> {
    one_row(result, 3)?;
    if result.rows[0][0].is_none() {
        return Ok(SlotReading::Missing);
    }
    if result.rows[0][1].is_none() {
        return Ok(SlotReading::NotReserved);
    }
    Ok(SlotReading::Reserved {
        restart_lsn: parse(result, 1, "restart position")?,
        restart_timeline: parse_timeline(result, 2)?,
    })
}

/// The row after the end of a timeline; none when the client ended the stream of the current one.
pub fn decode_timeline_end(result: &QueryResult) -> Result<Option<TimelineEnd>, BadAnswer> {
    if result.rows.is_empty() {
        return Ok(None);
    }
    one_row(result, 2)?;
    Ok(Some(TimelineEnd { next_timeline: parse_timeline(result, 0)?, next_start: parse(result, 1, "switch point")? }))
}

/// Whether TIMELINE_HISTORY failed because there is no such file: timeline 1, or one the server never had.
pub fn is_missing_history(error: &ServerError) -> bool {
    error.sqlstate == "58P01"
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The body of a RowDescription and of a DataRow with these values.
    fn answer(values: &[Option<&str>]) -> QueryResult {
        let mut result = QueryResult::default();
        let mut description = (values.len() as i16).to_be_bytes().to_vec();
        let mut row = description.clone();
        for value in values {
            description.extend_from_slice(b"c\0");
            description.extend_from_slice(&[0; 18]);
            row.extend_from_slice(&value.map_or(-1, |text| text.len() as i32).to_be_bytes());
            row.extend_from_slice(value.unwrap_or_default().as_bytes());
        }
        result.describe(&description).unwrap();
        result.push_row(&row).unwrap();
        result
    }

    #[test]
    fn slot_names_are_the_servers() {
        assert!(SlotName::new("seawall_1").is_ok());
        let too_long = "a".repeat(64);
        for name in ["", "A", "a-b", "a b", "a\"", "ä", too_long.as_str()] {
            assert!(SlotName::new(name).is_err(), "{name:?}");
        }
    }

    #[test]
    fn commands_read_as_postgresql_wants_them() {
        let slot = SlotName::new("s").unwrap();
        let start = start_replication(&slot, Lsn(0x1_0200_0000), TimelineId(3));
        assert_eq!(start, "START_REPLICATION SLOT \"s\" PHYSICAL 1/02000000 TIMELINE 3");
        assert_eq!(show("wal_segment_size").unwrap(), "SHOW wal_segment_size");
        assert_eq!(show("x; DROP"), None);
        assert_eq!(show(""), None);
    }

    #[test]
    fn answers_are_read_in_the_form_of_every_version() {
        let found = decode_identify_system(&answer(&[Some("7000000000000000001"), Some("2"), Some("0/1A2B"), None]));
        let expected = SystemIdentity {
            system_id: SystemId(7000000000000000001),
            timeline: TimelineId(2),
            flush_lsn: Lsn(0x1A2B),
        };
        assert_eq!(found, Ok(expected));
        let padded = decode_read_slot(&answer(&[Some("physical"), Some("0/00001A2B"), Some("2")]));
        let reserved = SlotReading::Reserved { restart_lsn: Lsn(0x1A2B), restart_timeline: TimelineId(2) };
        assert_eq!(padded, Ok(reserved));
        assert_eq!(decode_read_slot(&answer(&[None, None, None])), Ok(SlotReading::Missing));
        assert_eq!(decode_read_slot(&answer(&[Some("physical"), None, None])), Ok(SlotReading::NotReserved));
        let end = decode_timeline_end(&answer(&[Some("2"), Some("0/DDB098")]));
        assert_eq!(end, Ok(Some(TimelineEnd { next_timeline: TimelineId(2), next_start: Lsn(0xDDB098) })));
        assert_eq!(decode_timeline_end(&QueryResult::default()), Ok(None));
    }

    #[test]
    fn wrong_answers_are_refused() {
        assert!(decode_identify_system(&answer(&[Some("1"), Some("1")])).is_err());
        assert!(decode_identify_system(&answer(&[Some("x"), Some("1"), Some("0/0")])).is_err());
        assert!(decode_identify_system(&answer(&[Some("1"), Some("0"), Some("0/0")])).is_err());
        assert!(decode_identify_system(&answer(&[Some("1"), Some("-1"), Some("0/0")])).is_err());
        assert!(decode_identify_system(&answer(&[Some("1"), None, Some("0/0")])).is_err());
        assert!(decode_show(&QueryResult::default()).is_err());
        assert!(decode_timeline_history(answer(&[Some("00000002.history"), None])).is_err());
    }

    #[test]
    fn malformed_rows_are_refused() {
        let mut result = answer(&[Some("a")]);
        for body in [&b""[..], b"\0", b"\0\x01", b"\0\x02\0\0\0\0\0\0\0\0", b"\xff\xff", b"\0\x01\0\0\0\x05abc"] {
            assert!(result.push_row(body).is_err(), "{body:?}");
        }
        assert!(result.push_row(b"\0\x01\xff\xff\xff\xfe").is_err(), "negative length");
        assert!(result.push_row(b"\0\x01\0\0\0\x01ab").is_err(), "trailing bytes");
        assert!(result.describe(b"\x7f\xff").is_err());
        assert!(result.describe(b"\xff\xff").is_err());
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_an_answer_panic(columns: Vec<u8>, rows: Vec<Vec<u8>>) {
            let mut result = QueryResult::default();
            let _ = result.describe(&columns);
            for row in &rows {
                let _ = result.push_row(row);
            }
            let _ = (decode_identify_system(&result), decode_read_slot(&result), decode_timeline_end(&result));
            let _ = decode_timeline_history(result);
        }
    }

    #[test]
    fn an_endless_answer_is_cut_off() {
        let mut result = QueryResult::default();
        let error = (0..).find_map(|_| result.push_row(b"\0\0").err()).unwrap();
        assert_eq!(error, ProtocolError::AnswerTooLong { limit: ANSWER_BYTES_MAX });
    }

    #[test]
    fn segment_sizes_are_read_with_their_unit() {
        assert_eq!(parse_segment_size("16MB"), Ok(SegmentSize::MIB_16));
        assert_eq!(parse_segment_size("1GB").unwrap().bytes(), 1 << 30);
        assert_eq!(parse_segment_size("1048576").unwrap().bytes(), 1 << 20);
        for text in ["", "MB", "16", "3MB", "2GB", "16 TB", "-1MB", "99999999999999999999MB", "99999999999GB"] {
            assert!(parse_segment_size(text).is_err(), "{text}");
        }
    }
}

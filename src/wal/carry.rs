//! Owns: what a scanner must know to go on proving from the start of a segment.
//! Does not own: the scanner that fills it in, the index entry that keeps it.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{Lsn, PageMagic, TimelineId};

/// The scanner's state at a segment boundary. The default knows nothing: the start of an archive.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Carry {
    /// Start of the last proven record: the next one's `xl_prev`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_record: Option<Lsn>,
    /// End of the last proven record.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub record_end: Option<Lsn>,
    /// The record that the boundary cuts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pending: Option<PendingRecord>,
    /// Of the last page.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeline: Option<TimelineId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub magic: Option<PageMagic>,
}

/// The part of a record that lies before a segment boundary: enough to check the whole of it later.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingRecord {
    pub lsn: Lsn,
    /// Length of the record, and how much of it lies before the boundary (page headers not counted).
    pub total: u32,
    pub received: u32,
    /// The record header, as far as it was received.
    #[serde(with = "hex")]
    pub header: Vec<u8>,
    /// CRC-32C over the bytes behind the header.
    pub crc: u32,
}

pub(super) fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

mod hex {
    use super::*;

    pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&to_hex(bytes))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(deserializer)?;
        let digit = |byte: u8| (byte as char).to_digit(16).map(|digit| digit as u8);
        let pairs = text.as_bytes().chunks(2);
        let bytes = pairs.map(|pair| match pair {
            [high, low] => Some(digit(*high)? << 4 | digit(*low)?),
            _ => None,
        });
        bytes.collect::<Option<Vec<u8>>>().ok_or_else(|| serde::de::Error::custom("invalid hexadecimal digits"))
    }
}

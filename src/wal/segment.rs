//! Owns: segment size, number and file name, for every size a server can be built with (1 MiB to 1 GiB).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{Lsn, TimelineId};

/// The size of a WAL segment in bytes, as the server reports it: a power of two from 1 MiB to 1 GiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct SegmentSize(u32);

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("invalid WAL segment size {0}: expected a power of two from 1 MiB to 1 GiB")]
pub struct InvalidSegmentSize(pub u64);

impl SegmentSize {
    pub const MIB_16: SegmentSize = SegmentSize(16 << 20);

    pub fn new(bytes: u64) -> Result<SegmentSize, InvalidSegmentSize> {
        let valid = bytes.is_power_of_two() && (1 << 20..=1 << 30).contains(&bytes);
        if valid { Ok(SegmentSize(bytes as u32)) } else { Err(InvalidSegmentSize(bytes)) }
    }

    pub fn bytes(self) -> u64 {
        u64::from(self.0)
    }

    /// Segments that share the middle eight digits of their name: 4 GiB of WAL.
    pub fn segments_per_high_word(self) -> u64 {
        0x1_0000_0000 / self.bytes()
    }

    /// The segment that holds the byte at `lsn`.
    pub fn segment_of(self, lsn: Lsn) -> SegmentNumber {
        SegmentNumber(lsn.0 / self.bytes())
    }

    /// The segment that holds the last byte before `end`.
    pub fn segment_before(self, end: Lsn) -> SegmentNumber {
        SegmentNumber(end.0.saturating_sub(1) / self.bytes())
    }

    pub fn start_of(self, number: SegmentNumber) -> Lsn {
        Lsn(number.0 * self.bytes())
    }

    pub fn end_of(self, number: SegmentNumber) -> Lsn {
        Lsn((number.0 + 1) * self.bytes())
    }

    /// `lsn` rounded down to the start of its segment.
    pub fn floor(self, lsn: Lsn) -> Lsn {
        Lsn(lsn.0 & !(self.bytes() - 1))
    }

    pub fn offset_of(self, lsn: Lsn) -> u64 {
        lsn.0 & (self.bytes() - 1)
    }

    pub fn is_start(self, lsn: Lsn) -> bool {
        self.offset_of(lsn) == 0
    }
}

impl TryFrom<u64> for SegmentSize {
    type Error = InvalidSegmentSize;
    fn try_from(bytes: u64) -> Result<SegmentSize, InvalidSegmentSize> {
        SegmentSize::new(bytes)
    }
}

impl From<SegmentSize> for u64 {
    fn from(size: SegmentSize) -> u64 {
        size.bytes()
    }
}

/// The index of a segment in the WAL: `lsn / segment size`. Segment 0 is never used by a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentNumber(pub u64);

impl SegmentNumber {
    pub fn next(self) -> SegmentNumber {
        SegmentNumber(self.0 + 1)
    }
}

/// The name of a segment file: eight upper-case hexadecimal digits each of timeline, high and low word.
///
/// The name alone does not say the segment number: that needs the segment size.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentName {
    pub timeline: TimelineId,
    pub high: u32,
    pub low: u32,
}

impl SegmentName {
    pub fn new(timeline: TimelineId, number: SegmentNumber, size: SegmentSize) -> SegmentName {
        let per_high = size.segments_per_high_word();
        SegmentName { timeline, high: (number.0 / per_high) as u32, low: (number.0 % per_high) as u32 }
    }

    /// The segment's number, or `None` when the low word cannot occur with this segment size.
    pub fn number(self, size: SegmentSize) -> Option<SegmentNumber> {
        let per_high = size.segments_per_high_word();
        (u64::from(self.low) < per_high).then(|| SegmentNumber(u64::from(self.high) * per_high + u64::from(self.low)))
    }
}

impl fmt::Display for SegmentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08X}{:08X}{:08X}", self.timeline.0, self.high, self.low)
    }
}

impl fmt::Debug for SegmentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid segment name {0:?}: expected 24 upper-case hexadecimal digits")]
pub struct ParseSegmentNameError(String);

impl FromStr for SegmentName {
    type Err = ParseSegmentNameError;

    fn from_str(text: &str) -> Result<SegmentName, ParseSegmentNameError> {
        let upper_hex = |b: u8| b.is_ascii_digit() || (b'A'..=b'F').contains(&b);
        if text.len() != 24 || !text.bytes().all(upper_hex) {
            return Err(ParseSegmentNameError(text.chars().take(80).collect()));
        }
        let word = |at: usize| u32::from_str_radix(&text[at..at + 8], 16).expect("checked: eight hexadecimal digits");
        Ok(SegmentName { timeline: TimelineId(word(0)), high: word(8), low: word(16) })
    }
}

impl Serialize for SegmentName {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for SegmentName {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<SegmentName, D::Error> {
        super::text::from_text(deserializer, str::parse)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sizes() -> impl Strategy<Value = SegmentSize> {
        (20u32..=30).prop_map(|shift| SegmentSize::new(1 << shift).unwrap())
    }

    proptest! {
        #[test]
        fn name_and_number_agree_for_every_size(size in sizes(), lsn in 0u64..1 << 52, timeline in 1u32..) {
            let number = size.segment_of(Lsn(lsn));
            let name = SegmentName::new(TimelineId(timeline), number, size);
            prop_assert_eq!(name.number(size), Some(number));
            prop_assert_eq!(name.to_string().parse(), Ok(name));
            prop_assert!(size.start_of(number) <= Lsn(lsn) && Lsn(lsn) < size.end_of(number));
            prop_assert_eq!(name.high as u64, lsn >> 32);
        }
    }

    #[test]
    fn low_word_ends_where_the_size_says() {
        for (mib, last) in [(1u64, 0xFFF), (16, 0xFF), (64, 0x3F), (1024, 3)] {
            let size = SegmentSize::new(mib << 20).unwrap();
            let name = SegmentName::new(TimelineId(1), size.segment_before(Lsn(1 << 32)), size);
            assert_eq!((name.high, name.low), (0, last));
            let beyond = SegmentName { low: last + 1, ..name };
            assert_eq!(beyond.number(size), None);
        }
    }

    #[test]
    fn an_end_on_the_boundary_belongs_to_the_segment_before() {
        let size = SegmentSize::MIB_16;
        assert_eq!(size.segment_of(Lsn(16 << 20)), SegmentNumber(1));
        assert_eq!(size.segment_before(Lsn(16 << 20)), SegmentNumber(0));
    }

    #[test]
    fn only_powers_of_two_in_range_are_sizes() {
        for bytes in [0, 1, 1 << 19, (1 << 20) + 1, 3 << 20, 1 << 31] {
            assert!(SegmentSize::new(bytes).is_err(), "{bytes}");
        }
    }
}

//! Owns: the names of the spool's files.
//! Does not own: what is in them (`writer.rs`, `reader.rs`). Pure.

use std::fmt;

use crate::wal::{Lsn, SegmentName};

/// A file of zstd frames, contiguous from `from`, all of one segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RunName {
    pub segment: SegmentName,
    /// The first raw byte.
    pub from: Lsn,
    pub kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Whole, aligned frames of 1 MiB: `<segment>-<from>.zst`.
    Frames,
    /// Pieces of the one frame that begins at `from`, as far as it was proven: `<segment>-<from>.tail.zst`.
    Tail,
}

/// Put behind the name of a file whose content did not prove: kept for inspection, never used.
pub const REFUSED: &str = ".refused";

impl RunName {
    pub fn parse(name: &str) -> Option<RunName> {
        let (segment, rest) = name.split_once('-')?;
        let (from, kind) = rest.split_once('.')?;
        let kind = match kind {
            "zst" => Kind::Frames,
            "tail.zst" => Kind::Tail,
            _ => return None,
        };
        let from = Lsn(u64::from_str_radix(from, 16).ok()?);
        let parsed = RunName { segment: segment.parse().ok()?, from, kind };
        (parsed.to_string() == name).then_some(parsed)
    }
}

impl fmt::Display for RunName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let extension = match self.kind {
            Kind::Frames => "zst",
            Kind::Tail => "tail.zst",
        };
        write!(f, "{}-{:016X}.{extension}", self.segment, self.from.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_are_read_back_as_they_are_spelled() {
        let segment = "000000010000000000000003".parse().unwrap();
        for (kind, text) in [(Kind::Frames, "zst"), (Kind::Tail, "tail.zst")] {
            let name = RunName { segment, from: Lsn(0x310_0000), kind };
            assert_eq!(name.to_string(), format!("000000010000000000000003-0000000003100000.{text}"));
            assert_eq!(RunName::parse(&name.to_string()), Some(name));
        }
        for foreign in [
            "000000010000000000000003",
            "000000010000000000000003-0000000003100000.zst.refused",
            "000000010000000000000003-000000000310000a.zst",
            "000000010000000000000003-3100000.zst",
            "000000010000000000000003-+000000003100000.zst",
            "spool.json",
            "-.",
        ] {
            assert_eq!(RunName::parse(foreign), None, "{foreign}");
        }
    }

    proptest! {
        #[test]
        fn hostile_names_do_not_panic(name in "[0-9A-Fa-f.+-]{0,42}(\\PC{0,8}|\\.zst|\\.tail\\.zst)") {
            if let Some(parsed) = RunName::parse(&name) {
                prop_assert_eq!(parsed.to_string(), name);
            }
        }
    }
}

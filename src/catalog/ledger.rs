//! Owns: the facts of the ledger, one JSON object each, and what `expired` ones take away from readers.
//! Does not own: their names (`repository::layout`), what follows from them (`continuity`, `retention`).

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::wal::{Lsn, SegmentName, SegmentSize, TimelineId};

/// What happened. In object names the words are joined by hyphens, in JSON by underscores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FactKind {
    Gap,
    GapHealed,
    Fork,
    Conflict,
    CorruptAtSource,
    /// `expire` deletes these segments: readers act as if they were gone already.
    Expired,
    /// An announcement of that kind is taken back: nothing of it was deleted. It names the other in its details.
    ExpiredWithdrawn,
    BackupFailed,
    Drill,
    /// A run of `verify`, or a part of one.
    Verify,
    /// An object does not hold what it promised, or is not there: `segments` names a segment, the details a backup.
    Damaged,
    /// What was damaged is whole again.
    Mended,
    /// Written by a newer seawall: kept and shown, never acted on.
    #[serde(other)]
    Unknown,
}

impl FactKind {
    /// The word in the object's name.
    pub fn word(self) -> &'static str {
        match self {
            FactKind::Gap => "gap",
            FactKind::GapHealed => "gap-healed",
            FactKind::Fork => "fork",
            FactKind::Conflict => "conflict",
            FactKind::CorruptAtSource => "corrupt-at-source",
            FactKind::Expired => "expired",
            FactKind::ExpiredWithdrawn => "expired-withdrawn",
            FactKind::BackupFailed => "backup-failed",
            FactKind::Drill => "drill",
            FactKind::Verify => "verify",
            FactKind::Damaged => "damaged",
            FactKind::Mended => "mended",
            FactKind::Unknown => "unknown",
        }
    }
}

/// In the details of an `expired` fact and of the one that withdraws it: which announcement, hexadecimal.
pub const ANNOUNCEMENT: &str = "announcement";
/// In the details of a `damaged` or `mended` fact: which object (its key below the lineage), where it is one of a backup
/// which backup, and what is wrong.
pub const OBJECT: &str = "object";
pub const FAULT: &str = "fault";
/// In the details of facts about a backup: which one, and how far it had come.
pub const BACKUP_ID: &str = "backup";
pub const BACKUP_PHASE: &str = "phase";

/// Segments `first` to `last`, both included, of one timeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SegmentRange {
    pub first: SegmentName,
    pub last: SegmentName,
}

/// One append-only fact: `ledger/<time>-<kind>-<random>.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LedgerFact {
    pub schema: u32,
    pub kind: FactKind,
    pub at: Timestamp,
    pub timeline: Option<TimelineId>,
    pub from_lsn: Option<Lsn>,
    pub to_lsn: Option<Lsn>,
    /// In words, for people.
    pub cause: String,
    /// What an `expired` fact takes away.
    #[serde(default)]
    pub segments: Vec<SegmentRange>,
    /// How a gap was healed: a backup's id, a repository's id, a host.
    #[serde(default)]
    pub healed_by: Option<String>,
    #[serde(default)]
    pub details: serde_json::Map<String, serde_json::Value>,
}

impl LedgerFact {
    pub const SCHEMA: u32 = 1;

    pub fn new(kind: FactKind, at: Timestamp, cause: impl Into<String>) -> LedgerFact {
        LedgerFact {
            schema: Self::SCHEMA,
            kind,
            at,
            timeline: None,
            from_lsn: None,
            to_lsn: None,
            cause: cause.into(),
            segments: Vec::new(),
            healed_by: None,
            details: serde_json::Map::new(),
        }
    }

    /// Sets the WAL the fact is about: [from, to) of `timeline`.
    pub fn about(mut self, timeline: TimelineId, from: Lsn, to: Lsn) -> LedgerFact {
        (self.timeline, self.from_lsn, self.to_lsn) = (Some(timeline), Some(from), Some(to));
        self
    }
}

/// Every segment name that `expire` has announced it deletes: readers act as if it were gone already.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Expired {
    ranges: Vec<SegmentRange>,
}

impl Expired {
    pub fn of<'a>(facts: impl IntoIterator<Item = &'a LedgerFact>) -> Expired {
        let expired = facts.into_iter().filter(|fact| fact.kind == FactKind::Expired);
        Expired { ranges: expired.flat_map(|fact| fact.segments.iter().copied()).collect() }
    }

    pub fn contains(&self, name: SegmentName) -> bool {
        // Names of one timeline sort as their numbers do.
        let covers = |range: &SegmentRange| {
            range.first.timeline == name.timeline
                && range.last.timeline == name.timeline
                && range.first <= name
                && name <= range.last
        };
        self.ranges.iter().any(covers)
    }

    /// The expired [from, to) of one timeline, in no order.
    pub fn lsns(&self, timeline: TimelineId, size: SegmentSize) -> Vec<(Lsn, Lsn)> {
        let of_timeline = |range: &&SegmentRange| range.first.timeline == timeline && range.last.timeline == timeline;
        let bounds = |range: &SegmentRange| {
            let first = super::contents::segment_span(range.first, size)?;
            let last = super::contents::segment_span(range.last, size)?;
            Some((first.start, last.end))
        };
        self.ranges.iter().filter(of_timeline).filter_map(bounds).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_and_json_agree_but_for_the_hyphen() {
        use FactKind::*;
        for kind in [
            Gap,
            GapHealed,
            Fork,
            Conflict,
            CorruptAtSource,
            Expired,
            ExpiredWithdrawn,
            BackupFailed,
            Drill,
            Verify,
            Damaged,
            Mended,
        ] {
            let json = serde_json::to_value(kind).unwrap();
            assert_eq!(json.as_str().unwrap().replace('_', "-"), kind.word());
        }
    }

    #[test]
    fn a_fact_survives_the_round_trip_and_newer_kinds_are_kept() {
        let at: Timestamp = "2026-11-22T11:00:00Z".parse().unwrap();
        let fact = LedgerFact::new(FactKind::Gap, at, "slot lost").about(TimelineId(1), Lsn(8), Lsn(16));
        let json = serde_json::to_string(&fact).unwrap();
        assert_eq!(serde_json::from_str::<LedgerFact>(&json).unwrap(), fact);
        let newer = json.replace("\"gap\"", "\"invented-later\"").replace("\"cause\"", "\"extra\":1,\"cause\"");
        assert_eq!(serde_json::from_str::<LedgerFact>(&newer).unwrap().kind, FactKind::Unknown);
    }
}

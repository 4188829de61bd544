//! Owns: the facts of the ledger, one JSON object each, and what `expired` ones take away from readers.
//! Does not own: their names (`repository::layout`), what follows from them (`continuity`, `retention`).

use std::collections::BTreeSet;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::repository::layout::BackupId;
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
    /// An announcement of that kind is carried out, whoever does it. One name holds this or the withdrawal, never both.
    ExpiredConfirmed,
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
            FactKind::ExpiredWithdrawn | FactKind::ExpiredConfirmed => EXPIRY_DECISION,
            FactKind::BackupFailed => "backup-failed",
            FactKind::Drill => "drill",
            FactKind::Verify => "verify",
            FactKind::Damaged => "damaged",
            FactKind::Mended => "mended",
            FactKind::Unknown => "unknown",
        }
    }
}

/// The word of both decisions about an announcement: their name is the announcement's but for the word, so that whoever
/// creates it first decides.
const EXPIRY_DECISION: &str = "expiry-decision";
/// In the details of an `expired` fact and of the decision about it: which announcement, sixteen hexadecimal digits.
pub const ANNOUNCEMENT: &str = "announcement";
/// In the details of an `expired` fact: the ids of the backups that it takes away.
pub const BACKUPS: &str = "backups";
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

    /// Which announcement it makes, or decides about.
    pub fn announcement(&self) -> Option<u64> {
        let text = self.details.get(ANNOUNCEMENT)?.as_str()?;
        (text.len() == 16).then(|| u64::from_str_radix(text, 16).ok()).flatten()
    }

    /// Sets the announcement it makes, or decides about.
    pub fn with_announcement(mut self, announcement: u64) -> LedgerFact {
        self.details.insert(ANNOUNCEMENT.into(), format!("{announcement:016x}").into());
        self
    }

    /// The backups an `expired` fact takes away.
    pub fn expired_backups(&self) -> impl Iterator<Item = BackupId> {
        let ids = self.details.get(BACKUPS).and_then(|ids| ids.as_array());
        ids.into_iter().flatten().filter_map(|id| id.as_str()?.parse().ok())
    }
}

/// The kinds, as words in names, that say what `expire` has announced and what became of it.
pub fn is_about_expiry(word: &str) -> bool {
    word == FactKind::Expired.word() || word == EXPIRY_DECISION
}

/// The announcements of `expire` that are in force: carried out, or not decided about yet. One without a number is older
/// than decisions are.
pub fn announcements<'a>(facts: &'a [LedgerFact]) -> impl Iterator<Item = &'a LedgerFact> + use<'a> {
    let withdrawn = facts.iter().filter(|fact| fact.kind == FactKind::ExpiredWithdrawn);
    let withdrawn: BTreeSet<u64> = withdrawn.filter_map(LedgerFact::announcement).collect();
    let is_withdrawn = move |fact: &LedgerFact| fact.announcement().is_some_and(|id| withdrawn.contains(&id));
    facts.iter().filter(move |fact| fact.kind == FactKind::Expired && !is_withdrawn(fact))
}

/// The announcements that are confirmed: what they name may be deleted at any moment, by whoever confirmed it.
pub fn confirmed(facts: &[LedgerFact]) -> BTreeSet<u64> {
    let confirmed = facts.iter().filter(|fact| fact.kind == FactKind::ExpiredConfirmed);
    confirmed.filter_map(LedgerFact::announcement).collect()
}

/// Everything that `expire` has announced it deletes: readers act as if it were gone already.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Expired {
    ranges: Vec<SegmentRange>,
    backups: BTreeSet<BackupId>,
}

impl Expired {
    pub fn of(facts: &[LedgerFact]) -> Expired {
        let ranges = announcements(facts).flat_map(|fact| fact.segments.iter().copied()).collect();
        Expired { ranges, backups: announcements(facts).flat_map(LedgerFact::expired_backups).collect() }
    }

    /// What of it is confirmed, and cannot be taken back.
    pub fn confirmed(facts: &[LedgerFact]) -> Expired {
        let confirmed = confirmed(facts);
        let is_confirmed = |fact: &&LedgerFact| fact.announcement().is_some_and(|id| confirmed.contains(&id));
        let ranges = announcements(facts).filter(is_confirmed).flat_map(|fact| fact.segments.iter().copied()).collect();
        let backups = announcements(facts).filter(is_confirmed).flat_map(LedgerFact::expired_backups).collect();
        Expired { ranges, backups }
    }

    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty() && self.backups.is_empty()
    }

    /// In no order; they may overlap.
    pub fn ranges(&self) -> &[SegmentRange] {
        &self.ranges
    }

    pub fn backups(&self) -> &BTreeSet<BackupId> {
        &self.backups
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
        for kind in
            [Gap, GapHealed, Fork, Conflict, CorruptAtSource, Expired, BackupFailed, Drill, Verify, Damaged, Mended]
        {
            let json = serde_json::to_value(kind).unwrap();
            assert_eq!(json.as_str().unwrap().replace('_', "-"), kind.word());
        }
    }

    #[test]
    fn an_announcement_counts_unless_it_is_withdrawn() {
        let at: Timestamp = "2026-11-22T11:00:00Z".parse().unwrap();
        let name = |low| SegmentName { timeline: TimelineId(1), high: 0, low };
        let announced = |id: Option<u64>, first, last, backup: &str| {
            let mut fact = LedgerFact::new(FactKind::Expired, at, "retention");
            fact.segments.push(SegmentRange { first: name(first), last: name(last) });
            fact.details.insert(BACKUPS.into(), serde_json::json!([backup, "no id", 7]));
            id.into_iter().fold(fact, LedgerFact::with_announcement)
        };
        let decided = |kind, id| LedgerFact::new(kind, at, "x").with_announcement(id);
        let (one, two, three) = ("20261101T000000Z-full", "20261102T000000Z-full", "20261103T000000Z-full");
        let mut ledger = vec![
            announced(Some(1), 1, 3, one),
            announced(Some(2), 4, 6, two),
            announced(None, 7, 7, three),
            decided(FactKind::ExpiredConfirmed, 1),
        ];
        let seen = |ledger: &[LedgerFact]| {
            let expired = Expired::of(ledger);
            let names: Vec<u32> = (0..9).filter(|&low| expired.contains(name(low))).collect();
            (names, expired.backups().iter().map(BackupId::to_string).collect::<Vec<_>>())
        };
        let all = [one, two, three].map(String::from).to_vec();
        assert_eq!(seen(&ledger), ((1..=7).collect(), all), "one nobody has decided about counts");
        ledger.insert(0, decided(FactKind::ExpiredWithdrawn, 2));
        let left = [one, three].map(String::from).to_vec();
        assert_eq!(seen(&ledger), (vec![1, 2, 3, 7], left.clone()), "in whatever order they are read");
        ledger.push(decided(FactKind::ExpiredWithdrawn, 9));
        ledger.push(LedgerFact::new(FactKind::ExpiredWithdrawn, at, "names none"));
        assert_eq!(seen(&ledger), (vec![1, 2, 3, 7], left));
        assert_eq!(FactKind::ExpiredWithdrawn.word(), FactKind::ExpiredConfirmed.word(), "one name for either");
        assert!(is_about_expiry(FactKind::ExpiredWithdrawn.word()) && is_about_expiry("expired"));
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

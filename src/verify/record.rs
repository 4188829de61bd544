//! Owns: what the ledger keeps of runs of `verify`: results, and how far an unfinished run came.
//! Does not own: when it is written (`mod.rs`), damage (`catalog::damage`).
//! Pure.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::catalog::ledger::{FactKind, LedgerFact};
use crate::repository::layout::{BackupId, Part};
use crate::wal::SegmentName;

/// How much is looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// What is there, against what should be: listings and small objects.
    #[default]
    Quick,
    /// That, and a share of the objects read.
    Sample,
    /// That, and everything read.
    Full,
}

impl Mode {
    pub const ALL: [Mode; 3] = [Mode::Quick, Mode::Sample, Mode::Full];

    pub fn word(self) -> &'static str {
        match self {
            Mode::Quick => "quick",
            Mode::Sample => "sample",
            Mode::Full => "full",
        }
    }
}

impl std::fmt::Display for Mode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.word())
    }
}

/// How far a run has read: WAL first, names in order, then backups, oldest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Position {
    Wal(SegmentName),
    Backup(BackupId),
}

/// A run, or the part of it that was done when this was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyRecord {
    /// Random, hexadecimal: a run that is gone on with keeps it.
    pub run: String,
    pub mode: Mode,
    pub started: Timestamp,
    pub finished: Option<Timestamp>,
    /// All of it was done.
    pub complete: bool,
    /// Looked at.
    pub objects: u64,
    /// Stored ones, read.
    pub bytes: u64,
    pub faults: u64,
    /// The last object that was read, by its path below the lineage.
    pub through: Option<String>,
}

impl VerifyRecord {
    pub fn of(fact: &LedgerFact) -> Option<VerifyRecord> {
        if fact.kind != FactKind::Verify {
            return None;
        }
        serde_json::from_value(serde_json::Value::Object(fact.details.clone())).ok()
    }

    pub fn to_fact(&self, now: Timestamp) -> LedgerFact {
        let mode = self.mode;
        let cause = match (self.complete, self.faults) {
            (false, _) => format!("verify --{mode} has come this far"),
            (true, 0) => format!("verify --{mode} found no fault"),
            (true, 1) => format!("verify --{mode} found 1 fault"),
            (true, count) => format!("verify --{mode} found {count} faults"),
        };
        let mut fact = LedgerFact::new(FactKind::Verify, now, cause);
        if let Ok(serde_json::Value::Object(details)) = serde_json::to_value(self) {
            fact.details = details;
        }
        fact
    }

    pub fn position(&self) -> Option<Position> {
        match Part::parse(self.through.as_deref()?) {
            Part::Backup(id) | Part::Volume(id, ..) => Some(Position::Backup(id)),
            part => part.segment().map(Position::Wal),
        }
    }
}

/// The newest run that was finished, of any mode.
pub fn last_finished(ledger: &[LedgerFact]) -> Option<VerifyRecord> {
    let finished = ledger.iter().filter_map(VerifyRecord::of).filter(|record| record.complete);
    finished.max_by_key(|record| record.finished)
}

/// What `status` says of verifying.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastVerify {
    pub mode: Mode,
    pub finished: Timestamp,
    /// In all repositories together, each by its own last run.
    pub faults: u64,
}

impl LastVerify {
    /// What is to be said where it found any.
    pub fn reason(&self) -> Option<String> {
        let at = self.finished.strftime("%Y-%m-%d %H:%M:%SZ");
        (self.faults > 0)
            .then(|| format!("verify --{} found {} fault(s) ({at}): see `seawall verify`", self.mode, self.faults))
    }
}

/// The newest run over several repositories, by their ledgers.
pub fn last_over<'l>(ledgers: impl Iterator<Item = &'l [LedgerFact]>) -> Option<LastVerify> {
    let records: Vec<VerifyRecord> = ledgers.filter_map(last_finished).collect();
    let newest = records.iter().max_by_key(|record| record.finished)?;
    let faults = records.iter().map(|record| record.faults).sum();
    Some(LastVerify { mode: newest.mode, finished: newest.finished?, faults })
}

/// The last run of one mode that was finished.
pub fn last_of(ledger: &[LedgerFact], mode: Mode) -> Option<VerifyRecord> {
    let finished = ledger.iter().filter_map(VerifyRecord::of).filter(|record| record.complete && record.mode == mode);
    finished.max_by_key(|record| record.finished)
}

/// The full run to go on with: the newest one, if it is unfinished and began after `since`.
pub fn unfinished(ledger: &[LedgerFact], since: Timestamp) -> Option<VerifyRecord> {
    let full = || {
        let of = |fact: &LedgerFact| Some((fact.at, VerifyRecord::of(fact)?));
        ledger.iter().filter_map(of).filter(|(_, record)| record.mode == Mode::Full)
    };
    let (_, newest) = full().max_by_key(|(at, record)| (*at, record.complete))?;
    // The clock may have been set back between two words of one run.
    let is_over = full().any(|(_, record)| record.complete && record.run == newest.run);
    (!is_over && newest.started >= since && newest.position().is_some()).then_some(newest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn record(run: &str, complete: bool) -> VerifyRecord {
        VerifyRecord {
            run: run.into(),
            mode: Mode::Full,
            started: at("2026-11-22T11:00:00Z"),
            finished: complete.then(|| at("2026-11-22T12:00:00Z")),
            complete,
            objects: 7,
            bytes: 1 << 40,
            faults: 0,
            through: Some("wal/0000000100000002/0000000100000002000000A7.zst".into()),
        }
    }

    #[test]
    fn a_record_survives_the_ledger() {
        let fact = record("a", true).to_fact(at("2026-11-22T12:00:00Z"));
        let read: LedgerFact = serde_json::from_str(&serde_json::to_string(&fact).unwrap()).unwrap();
        assert_eq!(VerifyRecord::of(&read), Some(record("a", true)));
        assert_eq!(last_finished(&[read]).unwrap().run, "a");
    }

    #[test]
    fn only_the_newest_full_run_is_gone_on_with_and_only_if_it_is_unfinished_and_young() {
        let (ten, eleven) = (at("2026-11-22T11:10:00Z"), at("2026-11-22T11:20:00Z"));
        let since = at("2026-11-20T00:00:00Z");
        let going = [record("a", false).to_fact(ten), record("a", false).to_fact(eleven)];
        assert_eq!(unfinished(&going, since).unwrap().run, "a");
        assert_eq!(unfinished(&going, at("2026-11-23T00:00:00Z")), None, "too old");
        let over = [record("a", false).to_fact(ten), record("a", true).to_fact(eleven)];
        assert_eq!(unfinished(&over, since), None);
        let set_back = [record("a", true).to_fact(ten), record("a", false).to_fact(eleven)];
        assert_eq!(unfinished(&set_back, since), None);
        let newer = [record("a", false).to_fact(ten), record("b", true).to_fact(eleven)];
        assert_eq!(unfinished(&newer, since), None, "a later run looked at everything");
        let quick = VerifyRecord { mode: Mode::Quick, ..record("c", true) };
        let beside = [record("a", false).to_fact(ten), quick.to_fact(eleven)];
        assert_eq!(unfinished(&beside, since).unwrap().run, "a", "a quick one has nothing to do with it");
    }

    #[test]
    fn wal_comes_before_backups() {
        let wal = record("a", false).position().unwrap();
        let through = Some("backups/20261122T110000Z-full/backup.json".to_string());
        let backup = VerifyRecord { through, ..record("a", false) }.position().unwrap();
        assert!(wal < backup);
        assert_eq!(VerifyRecord { through: Some("nonsense".into()), ..record("a", false) }.position(), None);
    }
}

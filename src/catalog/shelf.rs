//! Owns: what several repositories say together about the backups of a lineage: which are there, which are under way,
//! which came to nothing, and which are pinned.
//! Does not own: reading them (`store/backups.rs`), how they are shown (`monitor/backup.rs`).
//! Pure.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;

use super::backup::{BackupFile, BackupRecord, BeginFile, LeaseFile, PinFile, PinKind};
use super::ledger::LedgerFact;
use crate::repository::layout::{BackupId, LeaseNumber, PinName};

/// How far apart the clocks of two hosts may be before a backup that is under way on the one looks abandoned on the
/// other. Nothing but what is shown follows from it.
const CLOCKS_APART: Duration = Duration::from_secs(60);

/// What one repository holds of backups, and says about them.
#[derive(Clone, Debug, Default)]
pub struct Shelf {
    pub records: Vec<BackupRecord>,
    /// Taken note of in the ledger.
    pub failed: BTreeMap<BackupId, LedgerFact>,
    /// The latest word on each pin.
    pub pins: BTreeMap<PinName, PinFile>,
    /// The lease that counts.
    pub lease: Option<LeaseFile>,
    /// Those that unfinished backups were begun under, where they are still there.
    pub begun_under: BTreeMap<LeaseNumber, LeaseFile>,
}

/// What has become of a backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Complete,
    Running,
    Failed,
}

/// One backup in all repositories together.
#[derive(Clone, Debug)]
pub struct Shelved {
    pub id: BackupId,
    pub outcome: Outcome,
    /// Those that hold it whole; where none does, those that hold anything of it.
    pub repositories: Vec<String>,
    pub begin: Option<BeginFile>,
    /// Where it is complete.
    pub file: Option<BackupFile>,
    pub is_pinned: bool,
    /// Why it failed, where that is known.
    pub cause: Option<String>,
}

impl Shelf {
    fn outcome(&self, record: &BackupRecord, now: Timestamp) -> Outcome {
        match record {
            _ if record.complete().is_some_and(|file| self.lacks(file).is_none()) => Outcome::Complete,
            BackupRecord { backup: None, is_dead: false, damaged: None, begin: Some(begin), .. }
                if !self.failed.contains_key(&record.id) && self.is_under_way(begin, now) =>
            {
                Outcome::Running
            }
            _ => Outcome::Failed,
        }
    }

    /// Whether the one that began it still holds the lease, as far as a look can tell.
    fn is_under_way(&self, begin: &BeginFile, now: Timestamp) -> bool {
        let Some((lease, number)) = self.lease.as_ref().zip(begin.lease) else { return false };
        let is_its =
            lease.number == number || self.begun_under.get(&number).is_some_and(|begun| begun.holder == lease.holder);
        let age = now.duration_since(lease.at).unsigned_abs();
        is_its && !lease.released && age < 2 * Duration::from_secs(u64::from(lease.seconds)) + CLOCKS_APART
    }

    /// Backups that were begun and neither finished nor taken note of as failed.
    pub fn unfinished(&self) -> impl Iterator<Item = &BackupRecord> {
        let is_open = |record: &&BackupRecord| {
            record.backup.is_none()
                && !record.is_dead
                && record.damaged.is_none()
                && !self.failed.contains_key(&record.id)
        };
        self.records.iter().filter(is_open)
    }

    /// Complete ones, with all that they build on, oldest first.
    pub fn complete(&self) -> impl Iterator<Item = &BackupFile> {
        self.records.iter().filter_map(BackupRecord::complete).filter(|file| self.lacks(file).is_none())
    }

    /// What a backup builds on and cannot be relied on, or is not there.
    fn lacks(&self, file: &BackupFile) -> Option<BackupId> {
        let mut file = file;
        while let Some(parent) = file.parent {
            let record = self.records.iter().find(|record| record.id == parent);
            // What is built on is older: a circle is nobody's chain.
            match record.and_then(BackupRecord::complete).filter(|found| found.start_lsn < file.start_lsn) {
                Some(found) => file = found,
                None => return Some(parent),
            }
        }
        None
    }

    /// Why a backup that has all its objects is not complete.
    fn why_incomplete(&self, record: &BackupRecord) -> Option<String> {
        if let Some(damaged) = &record.damaged {
            return Some(format!("damaged: {damaged}"));
        }
        let parent = self.lacks(record.complete()?)?;
        Some(format!("backup {parent}, which it builds on, cannot be relied on"))
    }

    /// An operator's pins on a backup that are in force.
    pub fn pins_on(&self, id: BackupId, now: Timestamp) -> impl Iterator<Item = (PinName, &PinFile)> {
        let holds = move |(_, pin): &(&PinName, &PinFile)| {
            pin.kind == PinKind::Operator && pin.backup == id && pin.is_in_force(now)
        };
        self.pins.iter().filter(holds).map(|(name, pin)| (*name, pin))
    }
}

/// All backups there is anything of in any repository, oldest first.
pub fn union(shelves: &[(&str, &Shelf)], now: Timestamp) -> Vec<Shelved> {
    let mut found: BTreeMap<BackupId, Shelved> = BTreeMap::new();
    for (repository, shelf) in shelves {
        for record in &shelf.records {
            let outcome = shelf.outcome(record, now);
            let one = found.entry(record.id).or_insert_with(|| Shelved {
                id: record.id,
                outcome,
                repositories: Vec::new(),
                begin: None,
                file: None,
                is_pinned: false,
                cause: None,
            });
            if rank(outcome) > rank(one.outcome) {
                one.outcome = outcome;
                one.repositories.clear();
            }
            if rank(outcome) == rank(one.outcome) {
                one.repositories.push(repository.to_string());
            }
            one.begin = one.begin.take().or_else(|| record.begin.clone());
            one.file = one.file.take().or_else(|| record.complete().cloned());
            one.is_pinned |= shelf.pins_on(record.id, now).next().is_some();
            let dead = || record.is_dead.then(|| "abandoned: it is being deleted".to_string());
            let cause = shelf.failed.get(&record.id).map(|fact| fact.cause.clone()).or_else(dead);
            let cause = cause.or_else(|| shelf.why_incomplete(record));
            one.cause = one.cause.take().or(cause);
        }
    }
    found.into_values().collect()
}

fn rank(outcome: Outcome) -> u8 {
    match outcome {
        Outcome::Failed => 0,
        Outcome::Running => 1,
        Outcome::Complete => 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::ledger::FactKind;
    use crate::repository::layout::BackupType;
    use crate::wal::{Lsn, TimelineId};

    fn now() -> Timestamp {
        "2026-11-22T11:10:00Z".parse().unwrap()
    }

    fn id() -> BackupId {
        "20261122T110000Z-full".parse().unwrap()
    }

    fn begun(lease: u64) -> BackupRecord {
        let begin = BeginFile {
            schema: 1,
            id: id(),
            backup_type: BackupType::Full,
            parent: None,
            label: None,
            started: id().started(),
            slot_restart_lsn: Lsn(1),
            timeline: TimelineId(1),
            lease: Some(LeaseNumber(lease)),
            host: None,
            version: "0".into(),
        };
        BackupRecord { id: id(), begin: Some(begin), backup: None, is_dead: false, damaged: None }
    }

    fn lease(holder: &str, number: u64, at: &str) -> LeaseFile {
        LeaseFile {
            schema: 1,
            number: LeaseNumber(number),
            holder: holder.into(),
            host: None,
            purpose: "backup".into(),
            at: at.parse().unwrap(),
            seconds: 30,
            released: false,
            version: "0".into(),
        }
    }

    fn outcome(shelf: &Shelf) -> Outcome {
        union(&[("local", shelf)], now())[0].outcome
    }

    #[test]
    fn one_is_under_way_while_whoever_began_it_holds_the_lease() {
        let fresh = "2026-11-22T11:09:50Z";
        let mut shelf = Shelf { records: vec![begun(4)], lease: Some(lease("a", 9, fresh)), ..Shelf::default() };
        assert_eq!(outcome(&shelf), Outcome::Failed, "nobody knows who had lease 4");
        shelf.begun_under.insert(LeaseNumber(4), lease("a", 4, fresh));
        assert_eq!(outcome(&shelf), Outcome::Running);
        let spoil: [fn(&mut Shelf); 4] = [
            |shelf| shelf.lease.as_mut().unwrap().released = true,
            |shelf| shelf.lease.as_mut().unwrap().holder = "b".into(),
            |shelf| shelf.lease.as_mut().unwrap().at = "2026-11-22T11:00:00Z".parse().unwrap(),
            |shelf| {
                shelf.failed.insert(id(), LedgerFact::new(FactKind::BackupFailed, now(), "no room"));
            },
        ];
        for spoil in spoil {
            let mut spoiled = shelf.clone();
            spoil(&mut spoiled);
            assert_eq!(outcome(&spoiled), Outcome::Failed);
        }
    }

    #[test]
    fn a_damaged_one_is_not_complete_here_and_says_why() {
        let mut shelf = Shelf { records: vec![begun(1)], ..Shelf::default() };
        shelf.records[0].damaged = Some("backups/x/base/0001.tar.zst: its CRC-32 is wrong".into());
        let all = union(&[("one", &shelf)], now());
        assert_eq!((all[0].outcome, shelf.complete().count(), shelf.unfinished().count()), (Outcome::Failed, 0, 0));
        assert!(all[0].cause.as_ref().unwrap().contains("damaged: backups/x/base/0001.tar.zst"));
    }

    #[test]
    fn the_repositories_named_are_those_that_have_come_furthest() {
        let running =
            Shelf { records: vec![begun(1)], lease: Some(lease("a", 1, "2026-11-22T11:09:50Z")), ..Shelf::default() };
        let failed = Shelf { records: vec![begun(1)], ..Shelf::default() };
        let all = union(&[("one", &failed), ("two", &running), ("three", &failed), ("four", &running)], now());
        assert_eq!((all.len(), &all[0].repositories[..]), (1, &["two".to_string(), "four".to_string()][..]));
    }
}

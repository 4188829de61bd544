//! Owns: facts about damaged objects, as they are written and taken back, and what is damaged now.
//! Does not own: finding damage (`verify`), making it whole (`agent::mend`), what readers of segments make of it
//! (`contents.rs`).
//! Pure.
//!
//! Damage is one repository's own: it is told in its ledger alone, never copied to another, and readers of several
//! repositories go to another one.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};

use super::ledger::{BACKUP_ID, FAULT, FactKind, LedgerFact, OBJECT, SegmentRange};
use crate::repository::layout::{BackupId, Part};
use crate::wal::SegmentName;

/// An object that does not hold what it promised, or is not there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// Its path below the lineage (`Lineage::below`, `Lineage::object`).
    pub object: String,
    /// Whose WAL it holds, or should.
    pub segment: Option<SegmentName>,
    /// Which backup it belongs to.
    pub backup: Option<BackupId>,
    /// In words, for people.
    pub fault: String,
    /// When it was found.
    pub at: Timestamp,
}

impl Damage {
    /// What the object is.
    pub fn part(&self) -> Part {
        Part::parse(&self.object)
    }

    fn of(fact: &LedgerFact) -> Option<Damage> {
        let text = |key: &str| fact.details.get(key).and_then(|value| value.as_str());
        let object = text(OBJECT)?.to_string();
        let part = Part::parse(&object);
        Some(Damage {
            segment: part.segment(),
            backup: part.backup(),
            fault: text(FAULT).unwrap_or(&fact.cause).to_string(),
            at: fact.at,
            object,
        })
    }
}

impl LedgerFact {
    /// The object with this path below its lineage (`Lineage::below`) was found damaged or missing. `known` is the ledger
    /// so far: the fact follows whatever it says of the object, also where the clock was set back.
    pub fn damaged(known: &[LedgerFact], now: Timestamp, object: &str, fault: &str) -> LedgerFact {
        let at = following(known, object, now);
        about(FactKind::Damaged, at, object, fault, format!("damaged: {fault}"))
    }

    /// It is whole again: `healed_by` says from where, a repository's id or a host.
    pub fn mended(known: &[LedgerFact], now: Timestamp, object: &str, how: &str, healed_by: &str) -> LedgerFact {
        let at = following(known, object, now);
        let mut fact = about(FactKind::Mended, at, object, how, format!("mended: {how}"));
        fact.healed_by = Some(healed_by.to_string());
        fact
    }
}

fn about(kind: FactKind, at: Timestamp, object: &str, fault: &str, cause: String) -> LedgerFact {
    let mut fact = LedgerFact::new(kind, at, cause);
    let part = Part::parse(object);
    if let Some(name) = part.segment() {
        fact.timeline = Some(name.timeline);
        fact.segments.push(SegmentRange { first: name, last: name });
    }
    if let Some(backup) = part.backup() {
        fact.details.insert(BACKUP_ID.to_string(), backup.to_string().into());
    }
    fact.details.insert(OBJECT.to_string(), object.into());
    if kind == FactKind::Damaged {
        fact.details.insert(FAULT.to_string(), fault.into());
    }
    fact
}

/// `now`, or just after the last word on the object.
fn following(known: &[LedgerFact], object: &str, now: Timestamp) -> Timestamp {
    let words = words(known).filter(|(_, damage)| damage.object == object);
    let last = words.map(|(_, damage)| damage.at).max();
    // Names and order have microseconds.
    let next = last.and_then(|last| last.checked_add(SignedDuration::from_micros(1)).ok());
    next.map_or(now, |next| next.max(now))
}

fn words(facts: &[LedgerFact]) -> impl Iterator<Item = (FactKind, Damage)> + '_ {
    let of = |fact: &LedgerFact| Some((fact.kind, Damage::of(fact)?));
    facts.iter().filter(|fact| matches!(fact.kind, FactKind::Damaged | FactKind::Mended)).filter_map(of)
}

/// What is damaged by the last word on each object, objects in order. Of two words of one instant the worse counts.
pub fn damaged_now(facts: &[LedgerFact]) -> Vec<Damage> {
    let mut last: BTreeMap<String, (FactKind, Damage)> = BTreeMap::new();
    for (kind, damage) in words(facts) {
        let outranks = |known: &(FactKind, Damage)| {
            (damage.at, kind == FactKind::Damaged) >= (known.1.at, known.0 == FactKind::Damaged)
        };
        if last.get(&damage.object).is_none_or(outranks) {
            last.insert(damage.object.clone(), (kind, damage));
        }
    }
    last.into_values().filter(|(kind, _)| *kind == FactKind::Damaged).map(|(_, damage)| damage).collect()
}

/// What is damaged in one repository, for its readers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Damages {
    by_object: BTreeMap<String, Damage>,
    backups: BTreeMap<BackupId, String>,
}

impl Damages {
    pub fn of(facts: &[LedgerFact]) -> Damages {
        let mut damages = Damages::default();
        for damage in damaged_now(facts) {
            if let Some(id) = damage.backup {
                damages.backups.entry(id).or_insert_with(|| format!("{}: {}", damage.object, damage.fault));
            }
            damages.by_object.insert(damage.object.clone(), damage);
        }
        damages
    }

    pub fn is_empty(&self) -> bool {
        self.by_object.is_empty()
    }

    /// Objects in order.
    pub fn iter(&self) -> impl Iterator<Item = &Damage> {
        self.by_object.values()
    }

    /// Why a backup cannot be relied on in this repository.
    pub fn of_backup(&self, id: BackupId) -> Option<&str> {
        self.backups.get(&id).map(String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::ToSpan;

    const SEGMENT: &str = "wal/0000000100000002/0000000100000002000000A7.zst";
    const VOLUME: &str = "backups/20261122T110000Z-full/base/0001.tar.zst";

    fn now() -> Timestamp {
        "2026-11-22T11:00:00Z".parse().unwrap()
    }

    #[test]
    fn a_fact_says_which_segment_or_backup_and_survives_the_round_trip() {
        let facts = [SEGMENT, VOLUME].map(|object| LedgerFact::damaged(&[], now(), object, "its CRC-32 is wrong"));
        assert_eq!(facts[0].segments[0].first.to_string(), "0000000100000002000000A7");
        assert_eq!(facts[1].details[BACKUP_ID], "20261122T110000Z-full");
        let read: Vec<LedgerFact> =
            facts.iter().map(|fact| serde_json::from_str(&serde_json::to_string(fact).unwrap()).unwrap()).collect();
        let damaged = damaged_now(&read);
        assert_eq!(damaged.len(), 2);
        assert_eq!((damaged[0].object.as_str(), damaged[1].object.as_str()), (VOLUME, SEGMENT));
        assert_eq!(damaged[0].backup.unwrap().to_string(), "20261122T110000Z-full");
        assert_eq!(damaged[1].fault, "its CRC-32 is wrong");
        assert!(Damages::of(&read).of_backup("20261122T110000Z-full".parse().unwrap()).unwrap().contains("CRC"));
    }

    #[test]
    fn the_last_word_counts_whatever_the_clock_says() {
        let mut ledger = vec![LedgerFact::damaged(&[], now(), SEGMENT, "gone")];
        let a_year_ago = now().checked_sub(9000.hours()).unwrap();
        ledger.push(LedgerFact::mended(&ledger, a_year_ago, SEGMENT, "copied", "abc"));
        assert_eq!(damaged_now(&ledger), []);
        ledger.push(LedgerFact::damaged(&ledger, a_year_ago, SEGMENT, "gone again"));
        ledger.reverse();
        assert_eq!(damaged_now(&ledger)[0].fault, "gone again");
        assert!(!Damages::of(&ledger).is_empty());
    }

    #[test]
    fn of_two_words_of_one_instant_the_worse_counts() {
        let damaged = LedgerFact::damaged(&[], now(), SEGMENT, "gone");
        let mended = LedgerFact::mended(&[], now(), SEGMENT, "copied", "abc");
        for ledger in [[damaged.clone(), mended.clone()], [mended, damaged]] {
            assert_eq!(damaged_now(&ledger).len(), 1);
        }
    }

    #[test]
    fn a_fact_that_names_no_object_says_nothing() {
        let mut fact = LedgerFact::damaged(&[], now(), SEGMENT, "gone");
        fact.details.clear();
        assert_eq!(damaged_now(&[fact]), []);
    }
}

//! Rules that random lives of an archive seldom tell from a mistake, each in an archive made for it: a segment a day, with
//! one commit.

use std::time::Duration;

use super::model::{DAY, SEGMENT, size, stamp};
use crate::catalog::backup::{PinFile, PinKind};
use crate::catalog::ledger::SegmentRange;
use crate::repository::Key;
use crate::repository::layout::{BackupId, BackupType, Lineage, PinName};
use crate::retention::inventory::{Announcement, Begun, Completed, HeldBackup, HeldPin, HeldSegment, Inventory};
use crate::retention::{Ages, Fate, Gfs, Plan, Policy, Standing, plan};
use crate::wal::{Lsn, SegmentName, SegmentNumber, SystemId, TimelineId};

const ONE: TimelineId = TimelineId(1);
const TODAY: u64 = 100;

/// Full backups by their segment and the day that the clock said.
fn archive(days: impl Iterator<Item = u64>, backups: &[(u64, u64)]) -> Inventory {
    let mut inventory = Inventory::new(Lineage::new("main", SystemId(7), 1), size(), ONE, at(1));
    let held = days.map(|day| {
        let mut held = HeldSegment::new(SegmentNumber(day));
        held.add(1000);
        held.cover_all(size());
        held.saw_commit(at(day));
        held
    });
    inventory.wal.insert(ONE, held.collect());
    inventory.backups = backups.iter().map(|&(segment, day)| backup(segment, day)).collect();
    inventory.backups.sort_by_key(|held| held.id);
    inventory
}

fn at(day: u64) -> jiff::Timestamp {
    stamp(day as i64 * DAY)
}

fn id(day: u64) -> BackupId {
    BackupId::new(at(day), BackupType::Full)
}

fn backup(segment: u64, day: u64) -> HeldBackup {
    let (start_lsn, stop_lsn) = (Lsn(segment * SEGMENT + 64), Lsn(segment * SEGMENT + 512));
    let (started, timeline) = (at(day), ONE);
    HeldBackup {
        id: id(day),
        begun: Some(Begun { parent: None, started, timeline, slot_restart_lsn: start_lsn }),
        completed: Some(Completed {
            parent: None,
            started,
            finished: started,
            stop_time: None,
            timeline,
            start_lsn,
            stop_lsn,
        }),
        is_dead: false,
        is_confirmed: false,
        is_damaged: false,
        is_failed: false,
        is_leased_alive: false,
        bytes: 5000,
        objects: 4,
    }
}

fn name(number: u64) -> SegmentName {
    SegmentName::new(ONE, SegmentNumber(number), size())
}

fn announce(inventory: &mut Inventory, first: u64, last: u64, backups: &[BackupId], is_confirmed: bool) {
    for held in inventory.wal.get_mut(&ONE).unwrap().iter_mut().filter(|it| (first..=last).contains(&it.number.0)) {
        (held.is_expired, held.is_confirmed) = (true, is_confirmed);
    }
    for held in inventory.backups.iter_mut().filter(|it| backups.contains(&it.id)) {
        (held.is_dead, held.is_confirmed) = (true, is_confirmed);
    }
    inventory.announcements.push(Announcement {
        key: Key::new("announcement"),
        bytes: 100,
        id: Some("1".to_string()),
        at: at(TODAY - 1),
        segments: vec![SegmentRange { first: name(first), last: name(last) }],
        backups: backups.to_vec(),
        is_confirmed,
    });
}

fn days(n: u64) -> Option<Duration> {
    Some(Duration::from_secs(n * DAY as u64))
}

fn planned(inventory: &Inventory, policy: &Policy) -> Plan {
    plan(inventory, policy, at(TODAY), &Standing::Newest)
}

/// By the day in its id.
fn kept(plan: &Plan) -> Vec<BackupId> {
    plan.backups.iter().filter(|it| it.fate != Fate::Remove).map(|it| it.id).collect()
}

#[test]
fn a_backup_taken_under_a_clock_that_was_behind_is_as_young_as_the_wal_below_it() {
    let inventory = archive(1..=TODAY, &[(20, 20), (95, 2), (99, 99)]);
    let policy = Policy { ages: Ages { full: days(10), ..Ages::default() }, ..Policy::default() };
    assert_eq!(kept(&planned(&inventory, &policy)), [id(2), id(99)]);
}

#[test]
fn a_window_begins_in_each_stretch_with_a_backup_of_that_stretch() {
    let with_hole = (1..=TODAY).filter(|day| ![92, 93].contains(day));
    let backups = [(45, 45), (50, 50), (94, 94), (96, 96), (97, 97), (98, 98)];
    let inventory = archive(with_hole, &backups);
    let policy = Policy { window: days(10), ages: Ages { full: days(1), ..Ages::default() }, ..Policy::default() };
    // No backup leads to the window in the second stretch: it begins with 94, and 96 is the next.
    assert_eq!(kept(&planned(&inventory, &policy)), [50, 94, 96, 98].map(id));
}

#[test]
fn wal_that_is_announced_makes_no_backup_usable() {
    let mut inventory = archive(1..=TODAY, &[(30, 30), (60, 60), (98, 98)]);
    announce(&mut inventory, 60, 60, &[], true);
    let policy = Policy { count: Some(2), ..Policy::default() };
    let found = planned(&inventory, &policy);
    assert!(kept(&found).contains(&id(30)), "60 cannot be restored and does not count: {found:?}");
    inventory.wal.get_mut(&ONE).unwrap().iter_mut().for_each(|it| (it.is_expired, it.is_confirmed) = (false, false));
    inventory.announcements.clear();
    assert_eq!(kept(&planned(&inventory, &policy)), [60, 98].map(id));
}

#[test]
fn a_backup_from_the_future_stays_and_takes_no_days_place() {
    let inventory = archive(1..=TODAY, &[(90, 90), (95, 95), (97, 97), (98, 98), (99, 500)]);
    let policy = Policy { gfs: Gfs { daily: 3, ..Gfs::default() }, ..Policy::default() };
    assert_eq!(kept(&planned(&inventory, &policy)), [95, 97, 98, 500].map(id));
}

/// A pin that is there when somebody looks, on what a run before has announced: whose word counts is decided once.
#[test]
fn what_is_confirmed_is_not_taken_back_and_what_is_not_decided_is() {
    for is_confirmed in [false, true] {
        let mut inventory = archive(1..=TODAY, &[(30, 30), (98, 98)]);
        announce(&mut inventory, 1, 40, &[id(30)], is_confirmed);
        let file = PinFile {
            schema: 1,
            kind: PinKind::Restore,
            backup: id(30),
            from_lsn: Some(Lsn(30 * SEGMENT + 64)),
            to_lsn: Some(Lsn(35 * SEGMENT)),
            timeline: ONE,
            created: at(TODAY),
            expires: Some(at(TODAY + 1)),
            released: false,
            host: None,
        };
        inventory.pins.push(HeldPin { name: PinName { id: 5, number: 1 }, file, numbers: vec![1], bytes: 100 });
        let found = planned(&inventory, &Policy { count: Some(1), ..Policy::default() });
        let of_30 = found.backups.iter().find(|it| it.id == id(30)).unwrap();
        let taken_back = found.wal.iter().filter(|it| it.fate == Fate::TakeBack).count();
        match is_confirmed {
            true => {
                assert_eq!((of_30.fate, of_30.is_announced, taken_back), (Fate::Remove, true, 0));
                assert!(found.withdraw.is_empty(), "{found:?}");
            }
            false => {
                assert_eq!((of_30.fate, of_30.is_announced, taken_back), (Fate::TakeBack, false, 1));
                assert_eq!(found.withdraw, ["1"]);
                // The rest of it is announced anew.
                let is_named =
                    |number| found.announce.iter().any(|it| it.first <= name(number) && name(number) <= it.last);
                assert!(is_named(29) && !is_named(30) && !is_named(34) && is_named(36));
            }
        }
    }
}

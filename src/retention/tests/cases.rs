//! The properties.

use std::collections::BTreeMap;

use super::model::{Archive, DAY, SEGMENT, stamp};
use super::scenario::Scenario;
use crate::retention::{Fate, Policy, Standing, plan};

fn seeds(usual: std::ops::Range<u64>) -> std::ops::Range<u64> {
    let given = std::env::var("SEAWALL_RETENTION_SEEDS").ok();
    let given = given.and_then(|text| {
        let (from, to) = text.split_once("..")?;
        Some(from.parse().ok()?..to.parse().ok()?)
    });
    given.unwrap_or(usual)
}

fn fail(seed: u64, scenario: &Scenario, broken: &str) -> ! {
    let explained = scenario.explained(&Standing::Newest);
    let (policy, time) = (&scenario.policy, scenario.time);
    panic!("seed {seed}: {broken}\npolicy: {policy}\ntime: {time:?}\n{explained}\n{:?}", scenario.archive);
}

/// Whatever happens in whatever order: what was promised stays.
#[test]
fn no_life_of_an_archive_lets_expire_take_what_is_promised() {
    let (mut removed, mut withdrawn) = (0, 0);
    let mut outcomes: BTreeMap<String, u64> = BTreeMap::new();
    for seed in seeds(0..4000) {
        let mut scenario = Scenario::new(seed);
        for _ in 0..scenario.rng.u32(4..20) {
            scenario.event();
            if scenario.rng.u8(..3) == 0 {
                let done = scenario.expire(&Standing::Newest, false);
                done.unwrap_or_else(|broken| fail(seed, &scenario, &broken));
                if scenario.rng.bool() {
                    scenario.event();
                    let next = scenario.expire(&Standing::Newest, false).and_then(|()| scenario.late_batch());
                    next.unwrap_or_else(|broken| fail(seed, &scenario, &broken));
                }
            }
        }
        scenario.expire(&Standing::Newest, true).unwrap_or_else(|broken| fail(seed, &scenario, &broken));
        (removed, withdrawn) = (removed + scenario.removed, withdrawn + scenario.withdrawn);
        for outcome in scenario.outcomes() {
            *outcomes.entry(format!("{outcome:?}")).or_default() += 1;
        }
    }
    println!("{removed} segments removed, {withdrawn} announcements withdrawn, at the end {outcomes:?}");
    let is_usual = std::env::var_os("SEAWALL_RETENTION_SEEDS").is_none();
    assert!(!is_usual || removed > 0 && withdrawn > 0, "the cases are about something");
}

/// What no rule speaks for goes, all of it.
#[test]
fn nothing_is_kept_for_ever_that_no_rule_needs() {
    let mut cases = 0;
    for seed in seeds(10_000..10_120) {
        let mut scenario = Scenario::new(seed);
        if !scenario.has_only_days() || !scenario.is_full_bounded() {
            continue;
        }
        for _ in 0..scenario.rng.u32(4..12) {
            scenario.event();
            if scenario.rng.u8(..3) == 0 {
                scenario.expire(&Standing::Newest, false).unwrap_or_else(|broken| fail(seed, &scenario, &broken));
            }
        }
        // What lies in the future is young until then.
        if scenario.archive.latest_time() > scenario.time.real {
            continue;
        }
        cases += 1;
        let quiet = scenario.quiet_days(75, &Standing::Newest);
        let begin = quiet.unwrap_or_else(|broken| fail(seed, &scenario, &broken));
        if let Some(leak) = scenario.leaks(begin) {
            fail(seed, &scenario, &leak);
        }
    }
    println!("{cases} cases");
    assert!(cases > 0);
}

/// Left behind, a lineage goes whole, and not before the next one covers the window.
#[test]
fn an_old_lineage_goes_whole_once_the_next_one_covers_the_window() {
    for seed in seeds(20_000..20_050) {
        let mut old = Scenario::new(seed);
        old.policy.window.get_or_insert(std::time::Duration::from_secs(9 * DAY as u64));
        for _ in 0..old.rng.u32(4..10) {
            old.event();
        }
        (old.time.offset, old.time.was_wrong) = (0, true);
        let mut new = Scenario::new(seed);
        new.policy = old.policy.clone();
        new.time = old.time;
        new.archive = Archive::new(2, new.time, SEGMENT);
        let has_future = old.archive.latest_time() > old.time.real;
        old.archive.pins.values_mut().for_each(|pin| (pin.is_live, pin.file.released) = (false, true));
        old.archive.backups.values_mut().filter(|it| it.stopped.is_none()).for_each(|it| it.is_alive = false);
        for _ in 0..20 {
            new.quiet_days(3, &Standing::Newest).unwrap_or_else(|broken| fail(seed, &new, &broken));
            old.time = new.time;
            old.time.was_wrong = true;
            let standing = Standing::old(&new.archive.inventory(), stamp(new.time.clock()));
            let crashed = old.rng.bool();
            // Restores from it end before the next look.
            old.archive.pins.values_mut().for_each(|pin| (pin.is_live, pin.file.released) = (false, true));
            old.expire(&standing, !crashed).unwrap_or_else(|broken| fail(seed, &old, &broken));
        }
        let standing = Standing::old(&new.archive.inventory(), stamp(new.time.clock()));
        old.expire(&standing, true).unwrap_or_else(|broken| fail(seed, &old, &broken));
        let is_empty = old.archive.segments.is_empty() && old.archive.backups.values().all(|it| it.is_empty);
        assert!(is_empty || has_future, "seed {seed}: {} {:#?}", old.policy, old.archive);
    }
}

#[test]
fn without_a_policy_nothing_goes() {
    for seed in seeds(30_000..30_100) {
        let mut scenario = Scenario::new(seed);
        for _ in 0..8 {
            scenario.event();
        }
        let inventory = scenario.archive.inventory();
        let found = plan(&inventory, &Policy::default(), stamp(scenario.time.clock()), &Standing::Newest);
        assert!(found.is_idle() && found.freed() == (0, 0), "seed {seed}");
        assert!(found.backups.iter().all(|it| it.fate == Fate::Keep), "seed {seed}");
    }
}

/// A million segments on three timelines, five hundred backups. `cargo test --lib retention -- --ignored --nocapture`; peak
/// memory is that of the process.
#[test]
#[ignore = "a measurement"]
fn a_million_segments() {
    use crate::retention::inventory::{Begun, Completed, HeldBackup, HeldIndex, HeldSegment, Inventory};
    use crate::wal::{History, HistoryEntry, Lsn, SegmentName, SegmentNumber, SegmentSize, SystemId, TimelineId};
    let size = SegmentSize::MIB_16;
    let lineage = crate::repository::layout::Lineage::new("main", SystemId(7), 1);
    let mut inventory = Inventory::new(lineage, size, TimelineId(1), stamp(0));
    const EACH: u64 = 333_334;
    for timeline in 1..=3u32 {
        let ancestors =
            (1..timeline).map(|it| HistoryEntry { timeline: TimelineId(it), end: Lsn((u64::from(it) * EACH) << 24) });
        let history = History::of_ancestors(TimelineId(timeline), ancestors.collect()).unwrap();
        inventory.histories.extend((timeline > 1).then_some((TimelineId(timeline), history)));
        let numbers = (u64::from(timeline) - 1) * EACH + 1..=u64::from(timeline) * EACH;
        let held = numbers.clone().map(|number| {
            let mut held = HeldSegment::new(SegmentNumber(number));
            held.add(4 << 20);
            held.cover_all(size);
            held.saw_commit(stamp(number as i64 * 30));
            held
        });
        inventory.wal.insert(TimelineId(timeline), held.collect());
        for first in numbers.step_by(256) {
            let name = |number| SegmentName::new(TimelineId(timeline), SegmentNumber(number), size);
            let first = first / 256 * 256;
            let epoch = crate::repository::layout::Epoch(1);
            let name = crate::repository::layout::IndexName { first: name(first), last: name(first + 255), epoch };
            inventory.indexes.push(HeldIndex { name, bytes: 100_000 });
        }
    }
    let full = crate::repository::layout::BackupType::Full;
    for backup in 0..500u64 {
        let number = 10 + backup * 2000;
        let timeline = TimelineId((number / EACH) as u32 + 1);
        let (start_lsn, stop_lsn) = (Lsn((number << 24) + 40), Lsn((number + 20) << 24));
        let started = stamp(number as i64 * 30);
        inventory.backups.push(HeldBackup {
            id: crate::repository::layout::BackupId::new(started, full),
            begun: Some(Begun { parent: None, started, timeline, slot_restart_lsn: start_lsn }),
            completed: Some(Completed {
                parent: None,
                started,
                finished: stamp(number as i64 * 30 + 600),
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
            bytes: 1 << 40,
            objects: 1000,
        });
    }
    let days = |n: u64| Some(std::time::Duration::from_secs(n * DAY as u64));
    let gfs = crate::retention::Gfs { daily: 7, weekly: 8, monthly: 12, yearly: 7 };
    let policy = Policy { window: days(14), gfs, wal: days(14), ..Policy::default() };
    let begun = std::time::Instant::now();
    let found = plan(&inventory, &policy, stamp(3 * EACH as i64 * 30 + 60), &Standing::Newest);
    let took = begun.elapsed();
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find(|line| line.starts_with("VmHWM")).unwrap_or_default();
    println!("{took:?}, {peak}, {} verdicts on WAL, {:?} freed", found.wal.len(), found.freed());
    for verdict in found.wal.iter().take(3) {
        println!("{} to {} {}", verdict.first, verdict.last, verdict.sentence());
    }
}

//! An archive in memory, and what happens to it.

use std::collections::{BTreeMap, BTreeSet};

use fastrand::Rng;
use jiff::Timestamp;

use crate::catalog::backup::{PinFile, PinKind};
use crate::catalog::ledger::SegmentRange;
use crate::repository::layout::{BackupId, BackupType, Epoch, IndexName, Lineage, PinName};
use crate::retention::inventory::*;
use crate::wal::{History, HistoryEntry, Lsn, SegmentName, SegmentNumber, SegmentSize, SystemId, TimelineId};

pub const SEGMENT: u64 = 1 << 20;
pub const DAY: i64 = 86_400;
const EPOCH: i64 = 1_767_225_600;

pub fn size() -> SegmentSize {
    SegmentSize::new(SEGMENT).unwrap()
}

pub fn stamp(seconds: i64) -> Timestamp {
    Timestamp::from_second(EPOCH + seconds).unwrap()
}

#[derive(Clone, Debug)]
pub struct Commit {
    pub lsn: u64,
    pub real: i64,
    /// What the clock said.
    pub recorded: i64,
}

#[derive(Clone, Debug)]
pub struct Timeline {
    /// Oldest first: timeline and where it was left.
    pub ancestors: Vec<(u32, u64)>,
    pub begin: u64,
    pub end: u64,
    pub commits: Vec<Commit>,
}

#[derive(Clone, Copy, Debug)]
pub struct Segment {
    pub covered_to: u64,
    pub latest: Option<i64>,
}

#[derive(Clone, Debug)]
pub struct Backup {
    pub parent: Option<BackupId>,
    pub timeline: u32,
    pub slot_restart: u64,
    pub start: u64,
    pub started: i64,
    /// Stop, finished by the clock, finished in truth.
    pub stopped: Option<(u64, i64, i64)>,
    pub stop_time: Option<i64>,
    pub has_begin: bool,
    pub has_json: bool,
    pub is_dead: bool,
    pub is_failed: bool,
    pub is_alive: bool,
    pub is_damaged: bool,
    pub volumes: u32,
    pub is_empty: bool,
}

pub const VOLUMES: u32 = 2;

#[derive(Clone, Debug)]
pub struct Pin {
    pub file: PinFile,
    pub numbers: Vec<u32>,
    pub created: i64,
    /// Somebody relies on it: a restore that goes on, or an operator.
    pub is_live: bool,
}

#[derive(Clone, Debug)]
pub struct Archive {
    pub lineage: Lineage,
    pub created: i64,
    pub timelines: BTreeMap<u32, Timeline>,
    pub active: u32,
    pub segments: BTreeMap<(u32, u64), Segment>,
    pub indexes: BTreeSet<(u32, u64, u64)>,
    pub backups: BTreeMap<BackupId, Backup>,
    pub pins: BTreeMap<u64, Pin>,
    pub announcements: Vec<Announcement>,
    pub ledger: Vec<i64>,
    pub next: u64,
}

/// True time, and what the clock says.
#[derive(Clone, Copy, Debug, Default)]
pub struct Time {
    pub real: i64,
    pub offset: i64,
    /// A clock was ever wrong.
    pub was_wrong: bool,
}

impl Time {
    pub fn clock(&self) -> i64 {
        self.real + self.offset
    }
}

impl Archive {
    pub fn new(ordinal: u32, time: Time, start: u64) -> Archive {
        let root = Timeline { ancestors: Vec::new(), begin: start, end: start, commits: Vec::new() };
        Archive {
            lineage: Lineage::new("main", SystemId(7), ordinal),
            created: time.clock(),
            timelines: BTreeMap::from([(1, root)]),
            active: 1,
            segments: BTreeMap::new(),
            indexes: BTreeSet::new(),
            backups: BTreeMap::new(),
            pins: BTreeMap::new(),
            announcements: Vec::new(),
            ledger: Vec::new(),
            next: 1,
        }
    }

    /// The server writes, and all of it is archived but for what gets lost.
    pub fn write(&mut self, rng: &mut Rng, time: &mut Time, seconds: i64, bytes: u64, is_lossy: bool) {
        let active = self.active;
        let timeline = self.timelines.get_mut(&active).unwrap();
        let from = timeline.end;
        timeline.end += bytes;
        let mut at = from;
        let commits = rng.u64(0..5);
        let begin = time.real;
        for commit in 0..commits {
            at += 8 + rng.u64(0..bytes / (commits + 1));
            if at + 8 > timeline.end {
                break;
            }
            let real = begin + seconds * (commit as i64 + 1) / (commits as i64 + 1);
            let recorded = real + time.offset - rng.i64(0..3);
            timeline.commits.push(Commit { lsn: at, real, recorded });
        }
        time.real += seconds;
        let lost = if is_lossy { rng.u64(from / SEGMENT..timeline.end / SEGMENT + 1) } else { u64::MAX };
        for number in from / SEGMENT..(timeline.end - 1) / SEGMENT + 1 {
            if number != lost {
                self.archive(active, number);
            }
        }
        self.renew_pins(*time);
    }

    /// The latest that any clock has said.
    pub fn latest_time(&self) -> i64 {
        let commits = self.timelines.values().flat_map(|it| &it.commits).map(|it| it.recorded);
        let backups = self.backups.values().map(|it| it.stopped.map_or(it.started, |(_, at, _)| at));
        let pins = self.pins.values().map(|it| it.created);
        commits.chain(backups).chain(pins).chain(self.ledger.iter().copied()).fold(self.created, i64::max)
    }

    /// Whoever restores does so every hour.
    pub fn renew_pins(&mut self, time: Time) {
        for pin in self.pins.values_mut().filter(|pin| pin.is_live && pin.file.expires.is_some()) {
            pin.file.expires = Some(stamp(time.clock() + DAY));
            pin.numbers.push(pin.numbers.last().unwrap() + 1);
        }
    }

    fn archive(&mut self, timeline: u32, number: u64) {
        let path = self.path(timeline);
        let end = self.timelines[&timeline].end.min((number + 1) * SEGMENT);
        let inside = |lsn: u64| (number * SEGMENT..end).contains(&lsn);
        let mut latest = None;
        for &(of, from, to) in &path {
            let commits = self.timelines[&of].commits.iter();
            let on_path = commits.filter(|it| from <= it.lsn && it.lsn < to && inside(it.lsn));
            latest = latest.max(on_path.map(|it| it.recorded).max());
        }
        self.segments.insert((timeline, number), Segment { covered_to: end, latest });
        if end == (number + 1) * SEGMENT {
            let first = number - number % 4;
            self.indexes.insert((timeline, first, first + 3));
        }
    }

    /// Timeline, where it begins and where it is left, oldest first.
    pub fn path(&self, timeline: u32) -> Vec<(u32, u64, u64)> {
        let mut begin = 0;
        let mut path = Vec::new();
        for &(ancestor, end) in &self.timelines[&timeline].ancestors {
            path.push((ancestor, begin, end));
            begin = end;
        }
        path.push((timeline, begin, u64::MAX));
        path
    }

    pub fn fork(&mut self, rng: &mut Rng) {
        let parents: Vec<u32> = self.timelines.keys().copied().collect();
        let parent = if rng.u8(..4) > 0 { self.active } else { parents[rng.usize(..parents.len())] };
        let of = self.timelines[&parent].clone();
        let low = if rng.bool() { of.begin } else { of.end.saturating_sub(SEGMENT * 2).max(of.begin) };
        let at = match rng.u8(..4) {
            0 => of.end,
            1 => (rng.u64(low..=of.end) / SEGMENT * SEGMENT).max(of.begin),
            _ => rng.u64(low..=of.end),
        } & !7;
        let at = at.max(of.begin);
        let id = *self.timelines.keys().next_back().unwrap() + 1;
        let ancestors = of.ancestors.iter().copied().chain([(parent, at)]).collect();
        self.timelines.insert(id, Timeline { ancestors, begin: at, end: at, commits: Vec::new() });
        // What was being taken on the other timeline comes to nothing.
        self.backups.values_mut().filter(|it| it.stopped.is_none()).for_each(|it| it.is_failed = true);
        self.active = id;
    }

    pub fn begin_backup(&mut self, rng: &mut Rng, time: &mut Time, force_full: bool) -> Option<BackupId> {
        let timeline = self.timelines[&self.active].clone();
        let path = self.path(self.active);
        let on_path = |it: &&BackupId| {
            let backup = &self.backups[it];
            let (stop, ..) = backup.stopped.unwrap_or((u64::MAX, 0, 0));
            let of = path.iter().find(|(timeline, ..)| *timeline == backup.timeline);
            let is_there = backup.has_json && !backup.is_dead && backup.volumes == VOLUMES;
            is_there && of.is_some_and(|(_, from, to)| *from <= backup.start && stop <= *to)
        };
        let newest = |full: bool| {
            let of_type = |id: &&BackupId| !full || id.backup_type() == BackupType::Full;
            let candidates = self.backups.keys().filter(on_path).filter(of_type);
            candidates.copied().max_by_key(|id| (self.backups[id].start, *id))
        };
        let older = |parent: BackupId| self.backups[&parent].start < timeline.end;
        let (backup_type, parent) = match rng.u8(..3) {
            1 if !force_full => (BackupType::Differential, Some(newest(true).filter(|it| older(*it))?)),
            2 if !force_full => (BackupType::Incremental, Some(newest(false).filter(|it| older(*it))?)),
            _ => (BackupType::Full, None),
        };
        let mut id = BackupId::new(stamp(time.clock()), backup_type);
        while self.backups.contains_key(&id) {
            time.real += 1;
            id = BackupId::new(stamp(time.clock()), backup_type);
        }
        let backup = Backup {
            parent,
            timeline: self.active,
            slot_restart: timeline.end.saturating_sub(rng.u64(0..3 * SEGMENT)),
            start: timeline.end,
            started: time.clock(),
            stopped: None,
            stop_time: None,
            has_begin: true,
            has_json: false,
            is_dead: false,
            is_failed: false,
            is_alive: true,
            is_damaged: false,
            volumes: VOLUMES,
            is_empty: false,
        };
        self.backups.insert(id, backup);
        Some(id)
    }

    /// Finishes it, unless something of it is gone; the caller has let some WAL pass.
    pub fn finish_backup(&mut self, id: BackupId, time: Time) {
        let end = self.timelines[&self.active].end;
        let path = self.path(self.active);
        let commits = path.iter().flat_map(|&(of, from, to)| {
            self.timelines[&of].commits.iter().filter(move |it| from <= it.lsn && it.lsn < to.min(end))
        });
        let stop_time = commits.max_by_key(|it| it.lsn).map(|it| it.recorded);
        let is_on = self.backups[&id].timeline == self.active;
        let parent = self.backups[&id].parent;
        let parent_there = parent.is_none_or(|it| self.backups.get(&it).is_some_and(|it| it.has_json && !it.is_dead));
        let backup = self.backups.get_mut(&id).unwrap();
        if !is_on || !parent_there || backup.is_dead || !backup.is_alive || backup.is_failed || end <= backup.start {
            backup.is_failed = true;
            return;
        }
        backup.stopped = Some((end, time.clock(), time.real));
        (backup.stop_time, backup.has_json) = (stop_time, true);
    }

    pub fn is_announced(&self, timeline: u32, number: u64) -> bool {
        self.is_named(timeline, number, |_| true)
    }

    /// Whoever confirmed it may delete it at any moment.
    pub fn is_confirmed(&self, timeline: u32, number: u64) -> bool {
        self.is_named(timeline, number, |it| it.is_confirmed)
    }

    pub fn is_backup_confirmed(&self, id: BackupId) -> bool {
        self.announcements.iter().any(|it| it.is_confirmed && it.backups.contains(&id))
    }

    fn is_named(&self, timeline: u32, number: u64, by: impl Fn(&&Announcement) -> bool) -> bool {
        let name = SegmentName::new(TimelineId(timeline), SegmentNumber(number), size());
        let has = |range: &SegmentRange| range.first <= name && name <= range.last;
        self.announcements.iter().filter(by).flat_map(|it| &it.segments).any(has)
    }

    /// What a reader of the store would list.
    pub fn inventory(&self) -> Inventory {
        let mut inventory = Inventory::new(self.lineage.clone(), size(), TimelineId(1), stamp(self.created));
        for (&id, timeline) in &self.timelines {
            if !timeline.ancestors.is_empty() {
                let entry =
                    |&(timeline, end): &(u32, u64)| HistoryEntry { timeline: TimelineId(timeline), end: Lsn(end) };
                let ancestors = timeline.ancestors.iter().map(entry).collect();
                inventory.histories.insert(TimelineId(id), History::of_ancestors(TimelineId(id), ancestors).unwrap());
            }
        }
        for (&(timeline, number), segment) in &self.segments {
            let mut held = HeldSegment::new(SegmentNumber(number));
            held.add(1000);
            held.cover_to(Lsn(segment.covered_to), size());
            held.is_expired = self.is_announced(timeline, number);
            held.is_confirmed = self.is_confirmed(timeline, number);
            if let Some(latest) = segment.latest {
                held.saw_commit(stamp(latest));
            }
            inventory.wal.entry(TimelineId(timeline)).or_default().push(held);
        }
        for &(timeline, first, last) in &self.indexes {
            let name = |number| SegmentName::new(TimelineId(timeline), SegmentNumber(number), size());
            let name = IndexName { first: name(first), last: name(last), epoch: Epoch(1) };
            inventory.indexes.push(HeldIndex { name, bytes: 10 });
        }
        for (&id, backup) in self.backups.iter().filter(|(_, it)| !it.is_empty) {
            let begun = Begun {
                parent: backup.parent,
                started: stamp(backup.started),
                timeline: TimelineId(backup.timeline),
                slot_restart_lsn: Lsn(backup.slot_restart),
            };
            let completed = backup.stopped.filter(|_| backup.has_json).map(|(stop, finished, _)| Completed {
                parent: backup.parent,
                started: stamp(backup.started),
                finished: stamp(finished),
                stop_time: backup.stop_time.map(stamp),
                timeline: TimelineId(backup.timeline),
                start_lsn: Lsn(backup.start),
                stop_lsn: Lsn(stop),
            });
            inventory.backups.push(HeldBackup {
                id,
                begun: backup.has_begin.then_some(begun),
                completed,
                is_dead: backup.is_dead,
                is_confirmed: self.is_backup_confirmed(id),
                is_damaged: backup.is_damaged || backup.volumes < VOLUMES,
                is_failed: backup.is_failed,
                is_leased_alive: backup.is_alive,
                bytes: 5000,
                objects: backup.volumes + 2,
            });
        }
        for (&id, pin) in &self.pins {
            let name = PinName { id, number: *pin.numbers.last().unwrap() };
            inventory.pins.push(HeldPin { name, file: pin.file.clone(), numbers: pin.numbers.clone(), bytes: 100 });
        }
        inventory.announcements = self.announcements.clone();
        inventory.ledger_times = self.ledger.iter().map(|&at| stamp(at)).collect();
        inventory
    }

    pub fn pin(&mut self, kind: PinKind, backup: BackupId, timeline: u32, to: Option<u64>, time: Time) -> u64 {
        let id = self.next;
        self.next += 1;
        let is_restore = kind == PinKind::Restore;
        let file = PinFile {
            schema: 1,
            kind,
            backup,
            from_lsn: is_restore.then(|| Lsn(self.backups[&backup].start)),
            to_lsn: to.map(Lsn),
            timeline: TimelineId(timeline),
            created: stamp(time.clock()),
            expires: is_restore.then(|| stamp(time.clock() + DAY)),
            released: false,
            host: None,
        };
        self.pins.insert(id, Pin { file, numbers: vec![1], created: time.clock(), is_live: true });
        id
    }

    pub fn release(&mut self, id: u64) {
        let pin = self.pins.get_mut(&id).unwrap();
        (pin.file.released, pin.is_live) = (true, false);
        pin.numbers.push(pin.numbers.last().unwrap() + 1);
    }
}

//! What can be restored from what is there, and what is promised: from the objects and the words of the rules alone.

use std::collections::{BTreeMap, BTreeSet};

use super::model::{Archive, Backup, DAY, SEGMENT, Time, VOLUMES, stamp};
use crate::repository::layout::{BackupId, BackupType};
use crate::retention::Policy;

/// On the line of a timeline: a backup, from where on it is consistent, how far WAL reaches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Way {
    pub line: u32,
    pub backup: BackupId,
    pub stop: u64,
    pub reach: u64,
}

/// Whether objects that are announced as expired are there: not for a reader; for who came before the announcement, those
/// that are not confirmed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Eyes {
    Reader,
    Holder,
}

fn is_there(archive: &Archive, id: BackupId, eyes: Eyes) -> Option<&Backup> {
    let backup = archive.backups.get(&id)?;
    let is_whole = backup.has_json && backup.volumes == VOLUMES && !backup.is_damaged;
    let is_visible = !backup.is_dead || eyes == Eyes::Holder && !archive.is_backup_confirmed(id);
    (is_whole && is_visible).then_some(backup)
}

pub fn is_chain_there(archive: &Archive, id: BackupId, eyes: Eyes) -> bool {
    let Some(backup) = is_there(archive, id, eyes) else { return false };
    backup.parent.is_none_or(|parent| is_chain_there(archive, parent, eyes))
}

/// Byte by byte, in steps of whole objects: how far WAL is there from the start of a segment on, along a line.
pub fn walk(archive: &Archive, line: u32, from: u64, eyes: Eyes) -> u64 {
    let path = archive.path(line);
    let mut at = from;
    loop {
        let number = at / SEGMENT;
        let next = path.iter().filter_map(|&(timeline, begin, end)| {
            let segment = archive.segments.get(&(timeline, number))?;
            let is_visible = match eyes {
                Eyes::Reader => !archive.is_announced(timeline, number),
                Eyes::Holder => !archive.is_confirmed(timeline, number),
            };
            let (low, high) = (begin / SEGMENT * SEGMENT, end.min(segment.covered_to));
            (is_visible && low <= at && at < high).then_some(high)
        });
        match next.max() {
            Some(next) => at = next,
            None => return at,
        }
    }
}

pub fn ways(archive: &Archive, eyes: Eyes) -> Vec<Way> {
    let mut ways = Vec::new();
    for &line in archive.timelines.keys() {
        let path = archive.path(line);
        for (&id, backup) in &archive.backups {
            let Some((stop, ..)) = backup.stopped else { continue };
            let Some((_, begin, end)) = path.iter().find(|(timeline, ..)| *timeline == backup.timeline) else {
                continue;
            };
            if *begin > backup.start || stop > *end || !is_chain_there(archive, id, eyes) {
                continue;
            }
            let reach = walk(archive, line, backup.start / SEGMENT * SEGMENT, eyes);
            if reach >= stop {
                ways.push(Way { line, backup: id, stop, reach });
            }
        }
    }
    ways
}

pub fn can_reach(ways: &[Way], line: u32, lsn: u64) -> bool {
    ways.iter().any(|way| way.line == line && way.stop <= lsn && lsn <= way.reach)
}

/// What the rules promised of what could be restored, and cannot be any more.
pub struct Promise<'a> {
    pub policy: &'a Policy,
    pub time: Time,
    pub before: &'a Archive,
    pub ways: Vec<Way>,
    /// Whether it is the lineage that its cluster is on.
    pub is_current: bool,
}

impl<'a> Promise<'a> {
    pub fn new(policy: &'a Policy, time: Time, before: &'a Archive, is_current: bool) -> Promise<'a> {
        Promise { policy, time, before, ways: ways(before, Eyes::Reader), is_current }
    }

    /// By the clock, or in truth; no clock can be relied on for less than eight days once one was wrong.
    fn is_within(&self, recorded: i64, real: i64, age: i64) -> bool {
        let doubt = if self.time.was_wrong { 8 * DAY + 10 } else { 10 };
        self.time.clock() - recorded <= age || self.time.real - real + doubt <= age
    }

    pub fn broken(&self, after: &Archive) -> Option<String> {
        self.broken_for(after, Eyes::Reader)
    }

    /// `holders`: with whose eyes pins and running backups look at what is left. Until an expire has come to taking back,
    /// what an earlier one announced and nobody decided about is announced still.
    pub fn broken_for(&self, after: &Archive, holders: Eyes) -> Option<String> {
        let left = ways(after, Eyes::Reader);
        self.window(&left)
            .or_else(|| self.newest(&left))
            .or_else(|| self.backups(after, &left))
            .or_else(|| self.onwards(&left))
            .or_else(|| self.held(after, holders))
    }

    fn window(&self, left: &[Way]) -> Option<String> {
        let window = self.policy.window?.as_secs() as i64;
        for &line in self.before.timelines.keys() {
            for (of, begin, end) in self.before.path(line) {
                for commit in &self.before.timelines[&of].commits {
                    let on_line = begin <= commit.lsn && commit.lsn < end;
                    if !on_line || !self.is_within(commit.recorded, commit.real, window) {
                        continue;
                    }
                    for target in [commit.lsn, commit.lsn + 8] {
                        if can_reach(&self.ways, line, target) && !can_reach(left, line, target) {
                            return Some(format!("window: {target:#x} on line {line} ({commit:?})"));
                        }
                    }
                }
            }
        }
        None
    }

    /// The newest line, from its newest backup on.
    fn newest(&self, left: &[Way]) -> Option<String> {
        if !self.is_current {
            return None;
        }
        let newest = *self.before.timelines.keys().next_back()?;
        let of_line = self.ways.iter().filter(|way| way.line == newest);
        let best = of_line.max_by_key(|way| (way.stop, way.reach))?;
        (!left.contains(best)).then(|| format!("last good: {best:?}"))
    }

    fn backups(&self, after: &Archive, left: &[Way]) -> Option<String> {
        if !self.is_current {
            return None;
        }
        let newest = *self.before.timelines.keys().next_back()?;
        let stops: BTreeMap<BackupId, u64> = self.ways.iter().map(|way| (way.backup, way.stop)).collect();
        let of_newest: BTreeSet<BackupId> =
            self.ways.iter().filter(|way| way.line == newest).map(|way| way.backup).collect();
        let mut promised: Vec<(BackupId, String)> = Vec::new();
        if let Some(count) = self.policy.count {
            let fulls = of_newest.iter().filter(|id| id.backup_type() == BackupType::Full);
            let mut fulls: Vec<BackupId> = fulls.copied().collect();
            fulls.sort_by_key(|id| std::cmp::Reverse((stops[id], self.before.backups[id].start)));
            promised.extend(fulls.into_iter().take(count as usize).map(|id| (id, "count".to_string())));
        }
        let gfs = self.policy.gfs;
        for (count, format) in
            [(gfs.daily, "%Y-%m-%d"), (gfs.weekly, "%G-%V"), (gfs.monthly, "%Y-%m"), (gfs.yearly, "%Y")]
        {
            let mut periods: BTreeMap<String, BackupId> = BTreeMap::new();
            for id in &of_newest {
                let started = self.before.backups[id].started;
                if started <= self.time.clock() {
                    // Ids sort by when they began.
                    let period = stamp(started).to_zoned(jiff::tz::TimeZone::UTC).strftime(format).to_string();
                    let newest = periods.entry(period).or_insert(*id);
                    *newest = (*newest).max(*id);
                }
            }
            let last = periods.into_iter().rev().take(count as usize);
            promised.extend(last.map(|(period, id)| (id, format!("gfs {period}"))));
        }
        for &id in stops.keys() {
            let (_, finished, real) = self.before.backups[&id].stopped.unwrap();
            let age = self.policy.ages.of(id.backup_type()).map(|age| age.as_secs() as i64);
            if age.is_some_and(|age| self.is_within(finished, real, age)) {
                promised.push((id, "age".to_string()));
            }
        }
        for (id, why) in promised {
            let stop = stops[&id];
            if !left.iter().any(|way| way.backup == id) {
                return Some(format!("{why}: backup {id} (stop {stop:#x}) of {:?}", after.backups.get(&id)));
            }
        }
        None
    }

    /// What is not pinned only leads as far as it did, as long as no rule shortens WAL.
    fn onwards(&self, left: &[Way]) -> Option<String> {
        if self.policy.wal.is_some() || !self.is_current {
            return None;
        }
        let held = self.only_held();
        let lost = |way: &&Way| {
            let now = left.iter().find(|it| it.line == way.line && it.backup == way.backup);
            !held.contains(&way.backup) && now.is_some_and(|now| now.reach < way.reach)
        };
        self.ways.iter().find(lost).map(|way| format!("onwards: {way:?} now {left:?}"))
    }

    /// Backups that pins or running backups may be the only reason for.
    fn only_held(&self) -> BTreeSet<BackupId> {
        let pinned = self.before.pins.values().map(|pin| pin.file.backup);
        let running = self.before.backups.values().filter(|it| it.stopped.is_none()).filter_map(|it| it.parent);
        let mut held: BTreeSet<BackupId> = BTreeSet::new();
        let mut open: Vec<BackupId> = pinned.chain(running).collect();
        while let Some(id) = open.pop() {
            if held.insert(id) {
                open.extend(self.before.backups.get(&id).and_then(|it| it.parent));
            }
        }
        held
    }

    /// Live pins and running backups, whatever was announced; what was confirmed before they came is not theirs.
    fn held(&self, after: &Archive, eyes: Eyes) -> Option<String> {
        for (id, pin) in self.before.pins.iter().filter(|(_, pin)| pin.is_live) {
            let backup = pin.file.backup;
            if is_chain_there(self.before, backup, Eyes::Holder) && !is_chain_there(after, backup, eyes) {
                return Some(format!("pin {id}: backup {backup} or what it builds on"));
            }
            let Some(of) = self.before.backups.get(&backup) else { continue };
            let line = pin.file.timeline.0;
            let from = of.start / SEGMENT * SEGMENT;
            let until = match (pin.file.from_lsn, pin.file.to_lsn) {
                (None, _) => of.stopped.map_or(0, |(stop, ..)| stop),
                (Some(_), Some(to)) => to.0,
                (Some(_), None) => u64::MAX,
            };
            let was = walk(self.before, line, from, Eyes::Holder).min(until);
            let is = walk(after, line, from, eyes).min(until);
            if is < was {
                return Some(format!("pin {id}: WAL of line {line} from {from:#x} to {was:#x} ends at {is:#x}"));
            }
        }
        for (id, running) in &self.before.backups {
            if running.stopped.is_some() || running.is_failed || !running.is_alive || running.is_dead {
                continue;
            }
            let parent = running.parent.filter(|it| is_chain_there(self.before, *it, Eyes::Holder));
            if parent.is_some_and(|it| !is_chain_there(after, it, eyes)) || after.backups[id].is_dead {
                return Some(format!("running backup {id} or its parent"));
            }
            let path = self.before.path(running.timeline);
            for &(timeline, number) in self.before.segments.keys() {
                let of = path.iter().find(|(it, ..)| *it == timeline);
                let needed = of.is_some_and(|&(_, begin, end)| {
                    let (low, high) = (number * SEGMENT, (number + 1) * SEGMENT);
                    low < end && high > running.slot_restart && high > begin
                });
                let is_gone = !after.segments.contains_key(&(timeline, number))
                    || match eyes {
                        Eyes::Reader => after.is_announced(timeline, number),
                        Eyes::Holder => after.is_confirmed(timeline, number),
                    };
                if needed && is_gone && !self.before.is_confirmed(timeline, number) {
                    return Some(format!("running backup {id}: segment {number} of timeline {timeline}"));
                }
            }
        }
        None
    }
}

//! Owns: what an inventory means: its lines of history, the WAL along them, which backups can be restored on which of
//! them, and which time each position and each backup stands for.
//! Does not own: what is there (`inventory.rs`), what is needed of it (`needs.rs`).
//! Pure.
//!
//! Lines, stretches and usable backups are those of `restore::reach`, in one repository and without what is announced as
//! expired. The time of a position is the latest of all evidence at or below it on its line (commits, backups, the making
//! of the lineage): a clock that was behind makes nothing older than what lies before it.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use jiff::Timestamp;

use super::calendar::Calendar;
use super::inventory::{Completed, HeldBackup, Inventory};
use crate::continuity::{self, Run, Stretch};
use crate::repository::layout::BackupId;
use crate::wal::{History, Lsn, Proof, TimelineId};

pub struct Survey<'a> {
    pub inventory: &'a Inventory,
    pub calendar: Calendar,
    /// Those whose history is known, in order of their timelines.
    pub lines: Vec<Line>,
    /// Timelines of which nobody knows how they came to be.
    pub orphans: BTreeSet<TimelineId>,
    pub newest: TimelineId,
    /// Complete and not announced, by id.
    complete: BTreeMap<BackupId, &'a HeldBackup>,
    /// Of those, the ones that are whole, with all they build on.
    sound: BTreeSet<BackupId>,
    /// Per timeline: positions at which the latest time so far rises, and to what.
    times: BTreeMap<TimelineId, Vec<(Lsn, Timestamp)>>,
}

/// The history of one timeline, with the WAL there is of it.
pub struct Line {
    pub path: History,
    pub stretches: Vec<Stretch>,
}

impl Line {
    pub fn timeline(&self) -> TimelineId {
        self.path.timeline
    }

    /// Whether start and stop of a backup lie on it.
    pub fn leads_through(&self, backup: &Completed) -> bool {
        let Some(begin) = self.path.begin_of(backup.timeline) else { return false };
        let end = self.path.end_of(backup.timeline).unwrap_or(Lsn::MAX);
        begin <= backup.start_lsn && backup.start_lsn < backup.stop_lsn && backup.stop_lsn <= end
    }
}

impl<'a> Survey<'a> {
    pub fn new(inventory: &'a Inventory, calendar: Calendar) -> Survey<'a> {
        let complete: BTreeMap<BackupId, &HeldBackup> =
            inventory.backups.iter().filter(|it| it.complete().is_some()).map(|it| (it.id, it)).collect();
        let held = inventory.wal.keys().chain(inventory.histories.keys()).copied();
        let of_backups = complete.values().filter_map(|it| it.complete()).map(|it| it.timeline);
        let timelines: BTreeSet<TimelineId> = held.chain([inventory.start_timeline]).chain(of_backups).collect();
        let runs: Vec<Run> = inventory.wal.keys().flat_map(|&timeline| runs(inventory, timeline)).collect();
        let path = |timeline| continuity::path_of(timeline, &inventory.histories, inventory.start_timeline);
        let line = |path: History| {
            let stretches = continuity::stretches(&path, &runs, inventory.segment_size);
            Line { path, stretches }
        };
        let times: BTreeMap<TimelineId, Vec<(Lsn, Timestamp)>> =
            timelines.iter().map(|&timeline| (timeline, times(inventory, timeline))).collect();
        let mut survey = Survey {
            inventory,
            calendar,
            newest: timelines.last().copied().expect("an archive starts on one"),
            lines: timelines.iter().filter_map(|&timeline| path(timeline)).map(line).collect(),
            orphans: timelines.iter().copied().filter(|&timeline| path(timeline).is_none()).collect(),
            sound: BTreeSet::new(),
            complete,
            times,
        };
        let sound = survey.complete.keys().copied().filter(|&id| survey.chain(id).is_some());
        survey.sound = sound.collect();
        survey
    }

    /// Complete ones that nobody has announced, by id.
    pub fn complete(&self) -> impl Iterator<Item = (&'a HeldBackup, &'a Completed)> {
        self.complete.values().filter_map(|it| Some((*it, it.complete()?)))
    }

    pub fn newest_line(&self) -> Option<&Line> {
        self.lines.iter().find(|line| line.timeline() == self.newest)
    }

    /// What a backup builds on, the nearest first; `None` where any of it is not there, or damaged.
    fn chain(&self, id: BackupId) -> Option<Vec<BackupId>> {
        let whole = |id: BackupId| self.complete.get(&id).filter(|it| !it.is_damaged)?.complete();
        let mut chain = Vec::new();
        let mut last = whole(id)?;
        while let Some(id) = last.parent {
            let parent = whole(id)?;
            // Whatever is built on is older: a circle is nobody's chain.
            if parent.start_lsn >= last.start_lsn {
                return None;
            }
            chain.push(id);
            last = parent;
        }
        Some(chain)
    }

    /// The full backup at the bottom of a whole chain.
    pub fn root(&self, id: BackupId) -> Option<BackupId> {
        Some(self.chain(id)?.last().copied().unwrap_or(id))
    }

    /// The stretch of a line that a backup can be replayed with.
    pub fn stretch_of<'l>(&self, line: &'l Line, backup: &HeldBackup) -> Option<&'l Stretch> {
        let completed = backup.complete().filter(|it| self.sound.contains(&backup.id) && line.leads_through(it))?;
        let first = self.inventory.segment_size.floor(completed.start_lsn);
        line.stretches.iter().find(|stretch| stretch.from <= first && completed.stop_lsn <= stretch.to)
    }

    /// Whether it can be restored on any line.
    pub fn is_usable(&self, backup: &HeldBackup) -> bool {
        self.lines.iter().any(|line| self.stretch_of(line, backup).is_some())
    }

    /// The segments of each timeline that hold [from, to) along a path, with the whole segments that a fork lies in.
    pub fn along<'p>(
        &self,
        path: &'p History,
        from: Lsn,
        to: Lsn,
    ) -> impl Iterator<Item = (TimelineId, Range<u64>)> + use<'p> {
        let size = self.inventory.segment_size;
        let timelines = path.ancestors().iter().map(|entry| entry.timeline).chain([path.timeline]);
        timelines.filter_map(move |timeline| {
            let from = size.floor(from.max(path.begin_of(timeline)?));
            let to = to.min(path.end_of(timeline).unwrap_or(Lsn::MAX));
            let end = if to == Lsn::MAX { u64::MAX } else { size.segment_before(to).0 + 1 };
            (from < to).then(|| (timeline, size.segment_of(from).0..end))
        })
    }

    /// Where the part of a line begins that is not older than `instant`: the start of a segment.
    pub fn young_from(&self, path: &History, instant: Timestamp) -> Option<Lsn> {
        if self.inventory.created >= instant {
            return Some(Lsn::ZERO);
        }
        let timelines = path.ancestors().iter().map(|entry| entry.timeline).chain([path.timeline]);
        let first = |timeline: TimelineId| {
            let times = self.times.get(&timeline)?;
            let (lsn, _) = times.get(times.partition_point(|(_, time)| *time < instant))?;
            let is_on_path = path.end_of(timeline).is_none_or(|end| *lsn < end);
            is_on_path.then(|| self.inventory.segment_size.floor(*lsn))
        };
        timelines.filter_map(first).min()
    }

    /// The latest time known below `lsn` on the path that ends on `timeline`.
    fn time_below(&self, timeline: TimelineId, lsn: Lsn) -> Timestamp {
        let root = History::root(timeline);
        let line = self.lines.iter().find(|line| line.timeline() == timeline);
        let path = line.map_or(&root, |line| &line.path);
        let timelines = path.ancestors().iter().map(|entry| entry.timeline).chain([path.timeline]);
        let last = |timeline: TimelineId| {
            let end = path.end_of(timeline).unwrap_or(Lsn::MAX).min(lsn);
            let times = self.times.get(&timeline)?;
            times[..times.partition_point(|(at, _)| *at < end)].last().map(|(_, time)| *time)
        };
        timelines.filter_map(last).fold(self.inventory.created, Timestamp::max)
    }

    /// The time a backup stands for.
    pub fn time_of(&self, backup: &Completed) -> Timestamp {
        let below = self.time_below(backup.timeline, self.inventory.segment_size.floor(backup.start_lsn));
        own_times(backup).fold(below, Timestamp::max)
    }

    /// The latest time anything in the archive stands for.
    pub fn last_time(&self) -> Timestamp {
        let last = self.times.values().filter_map(|times| times.last()).map(|(_, time)| *time);
        last.fold(self.inventory.created, Timestamp::max)
    }
}

/// All times found in an archive.
pub fn evidence(inventory: &Inventory) -> impl Iterator<Item = Timestamp> {
    let commits = inventory.wal.values().flatten().filter_map(|held| held.latest_commit());
    let begun = inventory.backups.iter().filter_map(|it| it.begun).map(|begun| begun.started);
    let completed = inventory.backups.iter().filter_map(|it| it.completed.as_ref()).flat_map(own_times);
    let ledger = inventory.ledger_times.iter().copied();
    commits.chain(begun).chain(completed).chain(ledger).chain([inventory.created])
}

fn own_times(backup: &Completed) -> impl Iterator<Item = Timestamp> + use<> {
    [Some(backup.started), Some(backup.finished), backup.stop_time].into_iter().flatten()
}

/// The stairs of one timeline: each position at which the latest time so far rises. A commit counts from the start of its
/// segment on, a backup from where it began and where it ended.
fn times(inventory: &Inventory, timeline: TimelineId) -> Vec<(Lsn, Timestamp)> {
    let size = inventory.segment_size;
    let held = inventory.wal.get(&timeline).into_iter().flatten();
    let commits = held.filter_map(|held| Some((size.start_of(held.number), held.latest_commit()?)));
    let of_timeline =
        inventory.backups.iter().filter_map(|it| it.completed.as_ref()).filter(|it| it.timeline == timeline);
    let mut times: Vec<(Lsn, Timestamp)> = commits.collect();
    for backup in of_timeline {
        times.push((backup.start_lsn, backup.started));
        times.push((backup.stop_lsn, backup.stop_time.unwrap_or(backup.finished).max(backup.finished)));
    }
    times.sort_unstable();
    let mut latest: Option<Timestamp> = None;
    times.retain(|(_, time)| {
        let rises = latest.is_none_or(|latest| *time > latest);
        latest = latest.max(Some(*time));
        rises
    });
    times
}

/// The contiguous WAL of one timeline that readers count.
fn runs(inventory: &Inventory, timeline: TimelineId) -> Vec<Run> {
    let size = inventory.segment_size;
    let held = inventory.wal.get(&timeline).into_iter().flatten();
    let mut runs: Vec<Run> = Vec::new();
    for held in held.filter(|held| held.is_covered() && !held.is_expired) {
        let (from, to) = (size.start_of(held.number), held.covered_to(size));
        match runs.last_mut() {
            Some(run) if run.to == from => (run.to, run.sealed_to) = (to, to),
            _ => runs.push(Run { timeline, from, to, sealed_to: to, last_commit: None, proof: Proof::Proven }),
        }
    }
    runs
}

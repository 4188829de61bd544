//! Owns: which backups stay and which WAL, and for whose sake.
//! Does not own: what there is (`survey.rs`), what becomes of the rest (`plan.rs`).
//! Pure.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::time::Duration;

use jiff::Timestamp;

use super::inventory::{Completed, HeldBackup, HeldPin, PIN_GRACE};
use super::policy::{Policy, words};
use super::survey::{Line, Survey};
use crate::catalog::backup::PinKind;
use crate::repository::layout::{BackupId, BackupType};
use crate::wal::{History, Lsn, TimelineId};

/// How much of an archive the rules are about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Nothing is configured: everything stays.
    Nothing,
    Rules,
    /// The lineage goes whole, but for what somebody holds on to.
    Held,
}

/// What WAL is needed for, the more telling first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    /// A line from a backup on.
    Line,
    /// Somebody holds on to it: it outranks announcements.
    Held,
    /// A backup's own.
    Own,
}

/// Segments of one timeline that are needed.
#[derive(Clone, Debug)]
pub struct WalNeed {
    pub segments: Range<u64>,
    rank: Rank,
    pub reason: String,
}

impl WalNeed {
    /// A pin or a running backup needs it, whatever has been announced: they may have come first.
    pub fn is_held(&self) -> bool {
        self.rank == Rank::Held
    }
}

#[derive(Default)]
pub struct Needs {
    /// Why a backup stays.
    pub backups: BTreeMap<BackupId, Vec<String>>,
    /// By a rule, not only for a pin or a running backup.
    ruled: BTreeSet<BackupId>,
    /// For a pin or a running backup: it outranks an announcement.
    pub held: BTreeSet<BackupId>,
    /// The more telling first.
    pub wal: BTreeMap<TimelineId, Vec<WalNeed>>,
    pub notes: Vec<String>,
}

impl Needs {
    pub fn of(survey: &Survey<'_>, policy: &Policy, scope: Scope) -> Needs {
        let mut needs = Needs::default();
        match scope {
            Scope::Nothing => {
                needs.everything(survey, "no retention is configured");
                return needs;
            }
            Scope::Rules if survey.complete().all(|(backup, _)| !survey.is_usable(backup)) => {
                needs.notes.push("there is no backup that can be restored: no backup and no WAL goes".to_string());
                needs.everything(survey, "there is no backup that can be restored");
            }
            Scope::Rules if survey.orphans.contains(&survey.newest) => {
                let newest = survey.newest;
                needs.notes.push(format!(
                    "how timeline {newest}, the newest, came to be is not known: no backup and no WAL goes while the archive \
                     has no history of it"
                ));
                needs.everything(survey, "nobody knows what the newest timeline builds on");
            }
            Scope::Rules => needs.by_rules(survey, policy),
            Scope::Held => {}
        }
        needs.held(survey);
        needs.own_wal(survey);
        // What explains most comes first.
        let telling = |need: &WalNeed| (need.rank, Reverse(need.segments.end - need.segments.start));
        needs.wal.values_mut().for_each(|wal| wal.sort_by_key(telling));
        needs
    }

    fn keep(&mut self, id: BackupId, reason: impl Into<String>) {
        let (reason, reasons) = (reason.into(), self.backups.entry(id).or_default());
        if !reasons.contains(&reason) {
            reasons.push(reason);
        }
    }

    fn rule(&mut self, id: BackupId, reason: impl Into<String>) {
        self.ruled.insert(id);
        self.keep(id, reason);
    }

    fn wal(&mut self, timeline: TimelineId, segments: Range<u64>, rank: Rank, reason: &str) {
        let needs = self.wal.entry(timeline).or_default();
        if !needs.iter().any(|known| {
            known.rank <= rank && known.segments.start <= segments.start && segments.end <= known.segments.end
        }) || rank == Rank::Held
        {
            needs.push(WalNeed { segments, rank, reason: reason.to_string() });
        }
    }

    fn wal_along(&mut self, survey: &Survey<'_>, path: &History, range: Range<Lsn>, rank: Rank, reason: &str) {
        for (timeline, segments) in survey.along(path, range.start, range.end) {
            self.wal(timeline, segments, rank, reason);
        }
    }

    fn everything(&mut self, survey: &Survey<'_>, reason: &str) {
        for (backup, _) in survey.complete() {
            self.rule(backup.id, reason);
        }
        for &timeline in survey.inventory.wal.keys() {
            self.wal(timeline, 0..u64::MAX, Rank::Line, reason);
        }
    }

    fn by_rules(&mut self, survey: &Survey<'_>, policy: &Policy) {
        let rules = Rules { survey, policy };
        rules.last_good(self);
        rules.window(self);
        rules.count(self);
        rules.gfs(self);
        rules.ages(self);
        self.chains(survey);
        rules.wal(self);
        for &timeline in &survey.orphans {
            self.notes.push(format!(
                "how timeline {timeline} came to be is not known: the archive has no history of it; all of it stays"
            ));
            let reason = format!("nobody knows how timeline {timeline} came to be");
            self.wal(timeline, 0..u64::MAX, Rank::Line, &reason);
            for (backup, _) in survey.complete().filter(|(_, completed)| completed.timeline == timeline) {
                self.rule(backup.id, reason.clone());
            }
        }
        self.chains(survey);
    }

    /// What kept backups build on.
    fn chains(&mut self, survey: &Survey<'_>) {
        let mut open: Vec<BackupId> = self.backups.keys().copied().collect();
        while let Some(child) = open.pop() {
            let found = survey.inventory.backups.iter().find(|it| it.id == child);
            let completed = found.and_then(|it| it.completed.as_ref()).and_then(|it| it.parent);
            let Some(parent) = completed.or(found.and_then(|it| it.begun).and_then(|it| it.parent)) else { continue };
            let is_new = !self.backups.contains_key(&parent);
            let ruled = self.ruled.contains(&child) && self.ruled.insert(parent);
            let held = self.held.contains(&child) && self.held.insert(parent);
            if is_new || ruled || held {
                if is_new {
                    self.keep(parent, format!("{child} builds on it"));
                }
                open.push(parent);
            }
        }
    }

    /// What pins in force and running backups need, announced or not.
    fn held(&mut self, survey: &Survey<'_>) {
        let inventory = survey.inventory;
        for backup in &inventory.backups {
            let Some(begun) = backup.running() else { continue };
            self.held.insert(backup.id);
            self.keep(backup.id, "it is being taken");
            let reason = format!("backup {}, which is being taken, needs it", backup.id);
            self.onwards(survey, begun.timeline, begun.slot_restart_lsn, &reason);
        }
        for pin in inventory.pins.iter().filter(|pin| is_in_force(survey, pin)) {
            let host = pin.file.host.as_ref().map_or_else(String::new, |host| format!(" on {host}"));
            let reason = match pin.file.kind {
                PinKind::Operator => "it is pinned".to_string(),
                PinKind::Restore => format!("a restore{host} needs it (pin {:016x})", pin.name.id),
            };
            self.held.insert(pin.file.backup);
            self.keep(pin.file.backup, reason.clone());
            if pin.file.kind == PinKind::Operator {
                continue;
            }
            let backup = inventory.backups.iter().find(|it| it.id == pin.file.backup);
            let start = backup.and_then(|it| it.completed.as_ref()).map(|it| it.start_lsn);
            let from = pin.file.from_lsn.or(start).unwrap_or(Lsn::ZERO);
            match pin.file.to_lsn {
                Some(to) => {
                    let path = path_of(survey, pin.file.timeline);
                    self.wal_along(survey, &path, from..to, Rank::Held, &reason);
                }
                // It goes on wherever history does.
                None => self.onwards(survey, pin.file.timeline, from, &reason),
            }
        }
        self.chains(survey);
    }

    /// All WAL from `from` on, on every line that goes through `timeline` there.
    fn onwards(&mut self, survey: &Survey<'_>, timeline: TimelineId, from: Lsn, reason: &str) {
        let path = path_of(survey, timeline);
        self.wal_along(survey, &path, from..Lsn::MAX, Rank::Held, reason);
        for line in &survey.lines {
            if line.path.end_of(timeline).is_some_and(|end| from < end) {
                self.wal_along(survey, &line.path, from..Lsn::MAX, Rank::Held, reason);
            }
        }
    }

    /// Without its own WAL no backup is consistent.
    fn own_wal(&mut self, survey: &Survey<'_>) {
        let kept = survey.inventory.backups.iter().filter(|it| self.backups.contains_key(&it.id));
        let kept = kept.filter_map(|it| Some((it.id, it.completed?)));
        for (id, completed) in kept.collect::<Vec<_>>() {
            let path = path_of(survey, completed.timeline);
            let rank = if self.held.contains(&id) { Rank::Held } else { Rank::Own };
            let reason = format!("backup {id} is consistent only with it");
            self.wal_along(survey, &path, completed.start_lsn..completed.stop_lsn, rank, &reason);
        }
    }
}

fn path_of(survey: &Survey<'_>, timeline: TimelineId) -> History {
    let line = survey.lines.iter().find(|line| line.timeline() == timeline);
    line.map_or_else(|| History::root(timeline), |line| line.path.clone())
}

/// Whether a pin protects. One that has lapsed does so for a while more, by the calendar: whoever renews it may have
/// another clock.
pub fn is_in_force(survey: &Survey<'_>, pin: &HeldPin) -> bool {
    !pin.file.released && pin.file.expires.is_none_or(|expires| survey.calendar.age(expires) <= PIN_GRACE)
}

/// The rules of a policy, over one archive.
struct Rules<'s, 'a> {
    survey: &'s Survey<'a>,
    policy: &'s Policy,
}

impl<'a> Rules<'_, 'a> {
    /// Usable on a line, by when they are consistent.
    fn usable_on(&self, line: &Line) -> Vec<(&'a HeldBackup, &'a Completed)> {
        let usable = self.survey.complete().filter(|(backup, _)| self.survey.stretch_of(line, backup).is_some());
        let mut usable: Vec<_> = usable.collect();
        usable.sort_by_key(|(backup, completed)| (completed.stop_lsn, completed.start_lsn, backup.id));
        usable
    }

    fn is_young(&self, completed: &Completed, age: Duration) -> bool {
        self.survey.calendar.age(self.survey.time_of(completed)) <= age
    }

    /// Not older than the age given for its type, or none is given.
    fn is_not_too_old(&self, backup: &HeldBackup, completed: &Completed) -> bool {
        self.policy.ages.of(backup.backup_type()).is_none_or(|age| self.is_young(completed, age))
    }

    /// The newest line can always be restored as far as it can be now.
    fn last_good(&self, needs: &mut Needs) {
        let Some(line) = self.survey.newest_line() else { return };
        let on_line = || self.survey.complete().filter(|(_, completed)| line.leads_through(completed));
        let Some((last, completed)) = self.usable_on(line).pop() else {
            needs.notes.push(format!(
                "no backup can be restored on timeline {}, the newest: nothing of that line goes",
                line.timeline()
            ));
            let reason = "no backup of the newest line can be restored";
            needs.wal_along(self.survey, &line.path, Lsn::ZERO..Lsn::MAX, Rank::Line, reason);
            on_line().for_each(|(backup, _)| needs.rule(backup.id, reason));
            // Whatever else can be restored, the newest of it stays.
            let others = self.survey.lines.iter().filter_map(|line| self.usable_on(line).pop());
            if let Some((backup, _)) = others.max_by_key(|(backup, completed)| (completed.start_lsn, backup.id)) {
                needs.rule(backup.id, "it is the last good backup");
            }
            return;
        };
        needs.rule(last.id, "it is the last good backup");
        let reason = format!("WAL after the last good backup, {}", last.id);
        needs.wal_along(self.survey, &line.path, completed.start_lsn..Lsn::MAX, Rank::Line, &reason);
        for (backup, _) in on_line().filter(|(_, other)| other.stop_lsn > completed.stop_lsn) {
            needs.rule(backup.id, "it is newer than the last good backup, and may yet be made whole");
        }
    }

    fn window(&self, needs: &mut Needs) {
        let Some(window) = self.policy.window else { return };
        let begin = self.survey.calendar.instant(window);
        let words = words(window);
        for line in &self.survey.lines {
            let Some(young) = self.survey.young_from(&line.path, begin) else { continue };
            let usable = self.usable_on(line);
            for stretch in line.stretches.iter().filter(|stretch| young < stretch.to) {
                let of_stretch = || usable.iter().filter(|(it, _)| self.survey.stretch_of(line, it) == Some(stretch));
                let before = of_stretch().rfind(|(_, completed)| completed.stop_lsn <= young);
                let (base, why) = match (before, of_stretch().next()) {
                    (Some(base), _) => (
                        base,
                        format!("the window of {words} begins {} and it is the newest backup before", day(begin)),
                    ),
                    (None, Some(base)) => (
                        base,
                        format!("the window of {words} begins with it: no backup before {} leads there", day(begin)),
                    ),
                    (None, None) => continue,
                };
                needs.rule(base.0.id, why);
                let reason = format!("the window of {words} begins {}, with backup {}", day(begin), base.0.id);
                needs.wal_along(self.survey, &line.path, base.1.start_lsn..stretch.to, Rank::Line, &reason);
            }
        }
        let inside = self.survey.complete().filter(|(_, completed)| self.is_young(completed, window));
        for (backup, _) in inside.filter(|(backup, completed)| self.is_not_too_old(backup, completed)) {
            needs.rule(backup.id, format!("it is younger than the window of {words}"));
        }
    }

    fn count(&self, needs: &mut Needs) {
        let Some(count) = self.policy.count.map(|count| count as usize) else { return };
        let Some(line) = self.survey.newest_line() else { return };
        let is_full = |backup: &HeldBackup| backup.backup_type() == BackupType::Full;
        let usable: Vec<_> = self.usable_on(line).into_iter().filter(|(backup, _)| is_full(backup)).collect();
        let newest = &usable[usable.len().saturating_sub(count)..];
        let from =
            if usable.len() < count { Lsn::ZERO } else { newest.first().map_or(Lsn::ZERO, |(_, it)| it.stop_lsn) };
        let counted: BTreeSet<BackupId> = newest.iter().map(|(backup, _)| backup.id).collect();
        for id in &counted {
            let reason = match count {
                1 => "it is the newest full backup".to_string(),
                count => format!("it is one of the newest {count} full backups"),
            };
            needs.rule(*id, reason);
        }
        self.followers(needs, &counted);
        // They may yet be made whole, and do not count meanwhile.
        let broken = self.survey.complete().filter(|(backup, it)| {
            is_full(backup) && line.leads_through(it) && it.stop_lsn >= from && !counted.contains(&backup.id)
        });
        for (backup, completed) in broken {
            if self.is_not_too_old(backup, completed) && self.survey.stretch_of(line, backup).is_none() {
                needs.rule(backup.id, "it is newer than the oldest full backup that counts, and may yet be made whole");
            }
        }
    }

    /// What is built on full backups stays with them, unless an age is given for its type.
    fn followers(&self, needs: &mut Needs, roots: &BTreeSet<BackupId>) {
        for (backup, completed) in self.survey.complete().filter(|(it, _)| it.backup_type() != BackupType::Full) {
            let root = self.survey.root(backup.id).filter(|root| roots.contains(root));
            if let Some(root) = root.filter(|_| self.is_not_too_old(backup, completed)) {
                needs.rule(backup.id, format!("it builds on {root}, which stays"));
            }
        }
    }

    /// Chosen by the times that backups say and by those that they stand for, among those of the newest line and among
    /// all: a wrong clock can only add to what is kept.
    fn gfs(&self, needs: &mut Needs) {
        let gfs = self.policy.gfs;
        if gfs.is_empty() {
            return;
        }
        let usable: Vec<_> = self.survey.complete().filter(|(backup, _)| self.survey.is_usable(backup)).collect();
        let newest_line = self.survey.newest_line();
        let of_newest =
            |backup: &HeldBackup| newest_line.is_some_and(|line| self.survey.stretch_of(line, backup).is_some());
        let calendar = &self.survey.calendar;
        for only_newest in [true, false] {
            let backups = usable.iter().filter(|(backup, _)| !only_newest || of_newest(backup));
            let backups: Vec<_> = backups.collect();
            for effective in [false, true] {
                let time = |completed: &Completed| match effective {
                    true => self.survey.time_of(completed),
                    false => completed.started,
                };
                let mut dated: Vec<(Timestamp, BackupId)> = Vec::new();
                for (backup, completed) in &backups {
                    match time(completed) {
                        future if calendar.is_future(future) => {
                            needs.rule(backup.id, "it says it was taken in the future")
                        }
                        time => dated.push((time, backup.id)),
                    }
                }
                dated.sort();
                self.newest_of_periods(needs, &dated);
            }
        }
    }

    fn newest_of_periods(&self, needs: &mut Needs, dated: &[(Timestamp, BackupId)]) {
        let gfs = self.policy.gfs;
        let periods = [
            (gfs.daily, Period::Day),
            (gfs.weekly, Period::Week),
            (gfs.monthly, Period::Month),
            (gfs.yearly, Period::Year),
        ];
        for (count, period) in periods {
            let mut seen: BTreeSet<String> = BTreeSet::new();
            for (time, id) in dated.iter().rev() {
                let name = period.name(*time, &self.policy.time_zone);
                if seen.len() < count as usize && seen.insert(name.clone()) {
                    needs.rule(*id, format!("it is the newest of {name}"));
                }
            }
        }
    }

    fn ages(&self, needs: &mut Needs) {
        for (backup, completed) in self.survey.complete() {
            let backup_type = backup.backup_type();
            match self.policy.ages.of(backup_type) {
                Some(age) if self.is_young(completed, age) => {
                    needs.rule(backup.id, format!("it is younger than {backup_type} = {}", words(age)));
                }
                Some(_) => {}
                None if self.policy.speaks_of_backups() => {}
                None if backup_type == BackupType::Full || self.policy.ages.full.is_none() => {
                    needs.rule(backup.id, format!("no rule speaks of {backup_type} backups"));
                }
                None => {}
            }
        }
        if let Some(age) = self.policy.ages.full {
            let is_full = |backup: &HeldBackup| backup.backup_type() == BackupType::Full;
            let young = self.survey.complete().filter(|(backup, it)| is_full(backup) && self.is_young(it, age));
            let young: BTreeSet<BackupId> = young.map(|(backup, _)| backup.id).collect();
            self.followers(needs, &young);
        }
    }

    /// WAL along every line, from the oldest backup on that a rule keeps; with `wal`, from where that begins.
    fn wal(&self, needs: &mut Needs) {
        for line in &self.survey.lines {
            let kept = self
                .survey
                .complete()
                .filter(|(it, completed)| needs.ruled.contains(&it.id) && line.leads_through(completed));
            let kept: Vec<_> = kept.collect();
            let Some(oldest) = kept.iter().min_by_key(|(backup, it)| (it.start_lsn, backup.id)) else { continue };
            let (base, reason) = match self.policy.wal {
                None => (oldest, format!("it can be replayed after backup {}", oldest.0.id)),
                Some(age) => {
                    let Some(young) = self.survey.young_from(&line.path, self.survey.calendar.instant(age)) else {
                        continue;
                    };
                    let usable = kept.iter().filter(|(backup, _)| self.survey.stretch_of(line, backup).is_some());
                    let before = usable.filter(|(_, it)| it.stop_lsn <= young);
                    let base = before.max_by_key(|(backup, it)| (it.stop_lsn, backup.id)).unwrap_or(oldest);
                    (base, format!("it can be replayed after backup {}, where wal = {} begins", base.0.id, words(age)))
                }
            };
            needs.wal_along(self.survey, &line.path, base.1.start_lsn..Lsn::MAX, Rank::Line, &reason);
        }
    }
}

#[derive(Clone, Copy)]
enum Period {
    Day,
    Week,
    Month,
    Year,
}

impl Period {
    /// One name for each period; a week's is that of its year in ISO 8601.
    fn name(self, time: Timestamp, zone: &jiff::tz::TimeZone) -> String {
        let date = time.to_zoned(zone.clone()).date();
        match self {
            Period::Day => date.to_string(),
            Period::Week => {
                let week = date.iso_week_date();
                format!("week {}-W{:02}", week.year(), week.week())
            }
            Period::Month => format!("{:04}-{:02}", date.year(), date.month()),
            Period::Year => format!("{:04}", date.year()),
        }
    }
}

/// For people.
fn day(time: Timestamp) -> String {
    match time == Timestamp::MIN {
        true => "with the archive".to_string(),
        false => time.strftime("%Y-%m-%d %H:%MZ").to_string(),
    }
}

//! Owns: the verdict on everything a repository holds of a lineage: what stays, what goes, and why.
//! Does not own: what needs what (`needs.rs`), deleting (`apply.rs`).
//! Pure.

use std::collections::BTreeSet;
use std::ops::Range;

use jiff::Timestamp;

use super::calendar::Calendar;
use super::inventory::{Announcement, Debris, DebrisKind, HeldBackup, HeldSegment, Inventory, PIN_GRACE};
use super::needs::{Needs, Scope, WalNeed, is_in_force};
use super::policy::{Policy, words};
use super::survey::{Survey, evidence};
use crate::catalog::ledger::SegmentRange;
use crate::repository::layout::{BackupId, IndexName, Lineage, PinName};
use crate::wal::{SegmentName, SegmentNumber, TimelineId};

/// Whether a lineage is the one its cluster is on, or one that was left behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// The newest lineage of the cluster in this repository.
    Newest,
    /// An earlier one.
    Old(Successor),
}

/// What an old lineage has to know of the newest one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Successor {
    calendar: Calendar,
    /// What the oldest backup that can be restored stands for.
    restorable_since: Option<Timestamp>,
}

impl Standing {
    /// Of a lineage that is not the newest; `newest` is what the same repository holds of that one.
    pub fn old(newest: &Inventory, now: Timestamp) -> Standing {
        let calendar = Calendar::of(evidence(newest), now);
        let survey = Survey::new(newest, calendar.clone());
        let usable = survey.complete().filter(|(backup, _)| survey.is_usable(backup));
        let restorable_since = usable.map(|(_, completed)| survey.time_of(completed)).min();
        Standing::Old(Successor { calendar, restorable_since })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    Keep,
    /// It stays, and what announces it as expired is to be withdrawn: the announcement naming WAL, a backup's `dead.json`.
    TakeBack,
    Remove,
}

/// What is known of a backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Complete,
    /// Complete, but objects of it, of what it builds on, or of its WAL are missing or damaged.
    Broken,
    Running,
    /// Failed, or left behind by whoever took it.
    Abandoned,
    /// Deleted in part: an earlier `expire` announced it.
    Expiring,
    /// Nothing says what it is.
    Unknown,
}

/// What becomes of a backup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackupVerdict {
    pub id: BackupId,
    pub outcome: Outcome,
    pub fate: Fate,
    /// `dead.json` is there.
    pub is_dead: bool,
    /// An announcement that stays in force names it.
    pub is_announced: bool,
    /// Sentences; at least one.
    pub reasons: Vec<String>,
    pub bytes: u64,
    pub objects: u32,
}

/// What becomes of WAL segments `first` to `last`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WalVerdict {
    pub timeline: TimelineId,
    pub first: SegmentName,
    pub last: SegmentName,
    pub fate: Fate,
    /// All of it stands in announcements in force.
    pub is_announced: bool,
    /// Sentences; at least one.
    pub reasons: Vec<String>,
    pub segments: u64,
    pub bytes: u64,
    pub objects: u64,
}

/// An index object none of whose entries is needed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IndexVerdict {
    pub name: IndexName,
    pub bytes: u64,
}

/// What to do with a repository's part of a lineage, in full.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    pub lineage: Lineage,
    /// In order of their ids.
    pub backups: Vec<BackupVerdict>,
    /// In order of timelines and numbers.
    pub wal: Vec<WalVerdict>,
    /// Index objects to be removed; all others stay.
    pub indexes: Vec<IndexVerdict>,
    /// What nothing looks at: removed. Objects of one kind in this order: a pin's last word goes last.
    pub debris: Vec<Debris>,
    /// What is to be announced as expired before anything is deleted: all that goes, and all that is announced and in
    /// force already, so that this one announcement replaces them. Empty where nothing new goes.
    pub announce: Vec<SegmentRange>,
    /// Announcements in force that name WAL which has to stay: withdrawn, once `announce` is in the ledger.
    pub withdraw: Vec<String>,
    /// What the reader of the plan has to know.
    pub notes: Vec<String>,
}

/// Decides over everything an inventory lists.
pub fn plan(inventory: &Inventory, policy: &Policy, now: Timestamp, standing: &Standing) -> Plan {
    let own = Calendar::of(evidence(inventory), now);
    let calendar = match standing {
        Standing::Newest => own,
        Standing::Old(successor) => own.with(&successor.calendar),
    };
    let survey = Survey::new(inventory, calendar);
    let left_behind = left_behind(&survey, policy, standing);
    let scope = match &left_behind {
        _ if policy.is_empty() => Scope::Nothing,
        Some(_) => Scope::Held,
        None => Scope::Rules,
    };
    let mut needs = Needs::of(&survey, policy, scope);
    let mut notes = std::mem::take(&mut needs.notes);
    notes.extend(left_behind.clone());
    if scope == Scope::Rules {
        notes.extend(pauses(&survey));
    }
    let verdicts = Verdicts { survey: &survey, policy, needs: &needs, scope, left_behind };
    let wal: Vec<WalVerdict> =
        inventory.wal.iter().flat_map(|(&timeline, held)| verdicts.wal(timeline, held)).collect();
    let mut backups: Vec<BackupVerdict> = inventory.backups.iter().map(|held| verdicts.backup(held)).collect();
    let withdraw = verdicts.withdrawn(&wal, &backups, &mut notes);
    for verdict in &mut backups {
        verdict.is_announced = verdicts.standing(&withdraw).any(|it| it.backups.contains(&verdict.id));
    }
    let (announce, gone) = verdicts.announcements(&wal, !withdraw.is_empty());
    let is_gone = |name: &IndexName| gone.iter().any(|range| range.first <= name.first && name.last <= range.last);
    let indexes = inventory.indexes.iter().filter(|held| scope != Scope::Nothing && is_gone(&held.name));
    Plan {
        lineage: inventory.lineage.clone(),
        backups,
        indexes: indexes.map(|held| IndexVerdict { name: held.name, bytes: held.bytes }).collect(),
        debris: if scope == Scope::Nothing { Vec::new() } else { verdicts.debris(&withdraw) },
        wal,
        announce,
        withdraw,
        notes,
    }
}

/// Why a lineage goes whole, if it does: the newest one covers the window, and this one has nothing inside it.
fn left_behind(survey: &Survey<'_>, policy: &Policy, standing: &Standing) -> Option<String> {
    let Standing::Old(successor) = standing else { return None };
    let window = policy.window?;
    let is_beyond = |time: Timestamp| survey.calendar.age(time) > window;
    let is_covered = successor.restorable_since.is_some_and(is_beyond) && is_beyond(survey.last_time());
    is_covered.then(|| {
        let window = words(window);
        format!(
            "the cluster left this lineage behind before the window of {window} began, and the newest one covers it"
        )
    })
}

/// What the calendar leaves out.
fn pauses(survey: &Survey<'_>) -> Option<String> {
    let pauses: Vec<(Timestamp, Timestamp)> = survey.calendar.pauses().collect();
    let (from, to) = pauses.last()?;
    let earlier = match pauses.len() - 1 {
        0 => String::new(),
        1 => ", and so does an earlier pause".to_string(),
        n => format!(", and so do {n} earlier pauses"),
    };
    let day = |time: &Timestamp| time.strftime("%Y-%m-%d").to_string();
    Some(format!(
        "there is no sign of life between {} and {}: the archive stood still or a clock jumped, and that time does not \
         count towards any age{earlier}",
        day(from),
        day(to)
    ))
}

/// One plan in the making.
struct Verdicts<'s, 'a> {
    survey: &'s Survey<'a>,
    policy: &'s Policy,
    needs: &'s Needs,
    scope: Scope,
    left_behind: Option<String>,
}

impl Verdicts<'_, '_> {
    fn backup(&self, held: &HeldBackup) -> BackupVerdict {
        let kept = self.needs.backups.get(&held.id);
        let is_known = held.begun.is_some() || held.completed.is_some() || held.is_dead || held.is_failed;
        let outcome = match held {
            _ if held.is_dead => Outcome::Expiring,
            _ if held.complete().is_some() && self.survey.is_usable(held) => Outcome::Complete,
            _ if held.complete().is_some() => Outcome::Broken,
            _ if held.running().is_some() => Outcome::Running,
            _ if is_known => Outcome::Abandoned,
            _ => Outcome::Unknown,
        };
        let is_whole = held.completed.is_some() && !held.is_damaged;
        let removed = |reason: &str| (Fate::Remove, vec![reason.to_string()]);
        let (fate, reasons) = match outcome {
            _ if self.scope == Scope::Nothing => (Fate::Keep, vec!["no retention is configured".to_string()]),
            Outcome::Unknown => (Fate::Keep, vec!["nothing in it says that it is a backup of ours".to_string()]),
            Outcome::Expiring => match kept {
                // In part it is of no use to anybody.
                Some(reasons) if self.needs.held.contains(&held.id) && is_whole && !held.is_confirmed => {
                    (Fate::TakeBack, reasons.clone())
                }
                _ => removed("it was announced as expired earlier"),
            },
            Outcome::Abandoned if held.is_failed => removed("it failed"),
            Outcome::Abandoned => removed("it was begun and never finished, and nobody is taking it any more"),
            _ => match kept {
                Some(reasons) => (Fate::Keep, reasons.clone()),
                None => (Fate::Remove, vec![self.why_removed(held)]),
            },
        };
        BackupVerdict {
            id: held.id,
            outcome,
            fate,
            is_dead: held.is_dead,
            is_announced: false,
            reasons,
            bytes: held.bytes,
            objects: held.objects,
        }
    }

    /// What every rule says to a complete backup that none of them keeps.
    fn why_removed(&self, held: &HeldBackup) -> String {
        if let Some(reason) = &self.left_behind {
            return reason.clone();
        }
        let policy = self.policy;
        let backup_type = held.backup_type();
        let mut why: Vec<String> = Vec::new();
        why.extend(policy.ages.of(backup_type).map(|age| format!("it is older than {backup_type} = {}", words(age))));
        why.extend(policy.window.map(|window| format!("it is not needed for the window of {}", words(window))));
        why.extend(policy.count.map(|count| match count {
            1 => "it is not (built on) the newest full backup".to_string(),
            count => format!("it is not (built on) one of the newest {count} full backups"),
        }));
        if !policy.gfs.is_empty() {
            why.push(format!("it is not the newest of any of the last {}", policy.gfs));
        }
        if why.is_empty() {
            why.push("what it builds on does not stay by any rule".to_string());
        }
        format!("{}; no kept backup builds on it", why.join("; "))
    }

    fn wal(&self, timeline: TimelineId, held: &[HeldSegment]) -> Vec<WalVerdict> {
        let none = Vec::new();
        let needs = self.needs.wal.get(&timeline).unwrap_or(&none);
        // Where any need begins or ends; between two of them all segments are alike.
        let bounds = needs.iter().flat_map(|need| [need.segments.start, need.segments.end]);
        let bounds: BTreeSet<u64> = bounds.chain([0, u64::MAX]).collect();
        let bounds: Vec<u64> = bounds.into_iter().collect();
        let mut verdicts: Vec<WalVerdict> = Vec::new();
        let mut rest = held;
        for pair in bounds.windows(2) {
            let (part, after) = rest.split_at(rest.partition_point(|held| held.number.0 < pair[1]));
            rest = after;
            let Some(first) = part.first() else { continue };
            let here: Vec<&WalNeed> = needs.iter().filter(|need| need.segments.contains(&pair[0])).collect();
            let state = |held: &HeldSegment| (held.is_expired, held.is_confirmed);
            for segments in part.chunk_by(|one, next| state(one) == state(next)) {
                let (fate, reason) = self.wal_fate(timeline, first.number, &segments[0], &here);
                self.add_wal(&mut verdicts, timeline, segments, fate, reason);
            }
        }
        verdicts
    }

    fn wal_fate(
        &self,
        timeline: TimelineId,
        at: SegmentNumber,
        segment: &HeldSegment,
        needs: &[&WalNeed],
    ) -> (Fate, String) {
        // What is confirmed may be deleted at any moment: whoever needs it came too late, and has seen that.
        let held = needs.iter().find(|need| need.is_held() && !segment.is_confirmed);
        match (segment.is_expired, needs.first(), held) {
            (true, ..) if self.scope == Scope::Nothing => (Fate::Keep, "no retention is configured".to_string()),
            (true, _, Some(need)) => (Fate::TakeBack, need.reason.clone()),
            (true, _, None) => (Fate::Remove, "it was announced as expired earlier".to_string()),
            (false, Some(need), _) => (Fate::Keep, need.reason.clone()),
            (false, None, _) => (Fate::Remove, self.why_wal_removed(timeline, at)),
        }
    }

    fn why_wal_removed(&self, timeline: TimelineId, at: SegmentNumber) -> String {
        if let Some(reason) = &self.left_behind {
            return reason.clone();
        }
        let needed = self.needs.wal.get(&timeline).into_iter().flatten();
        let is_before = needed.map(|need| need.segments.start).max().is_some_and(|start| at.0 < start);
        match (self.policy.wal, is_before) {
            (Some(age), true) => format!("it is older than wal = {}, and no kept backup needs it", words(age)),
            (None, true) => "it ends before the oldest kept backup of its line begins".to_string(),
            (_, false) => format!("no kept backup leads to this part of timeline {timeline}"),
        }
    }

    fn add_wal(
        &self,
        verdicts: &mut Vec<WalVerdict>,
        timeline: TimelineId,
        segments: &[HeldSegment],
        fate: Fate,
        reason: String,
    ) {
        let (Some(first), Some(last)) = (segments.first(), segments.last()) else { return };
        let size = self.survey.inventory.segment_size;
        let name = |held: &HeldSegment| SegmentName::new(timeline, held.number, size);
        let is_announced = first.is_expired;
        let bytes = segments.iter().fold(0u64, |sum, held| sum.saturating_add(held.bytes));
        let objects = segments.iter().map(|held| u64::from(held.objects)).sum();
        let count = segments.len() as u64;
        match verdicts.last_mut() {
            Some(known)
                if known.fate == fate && known.is_announced == is_announced && known.reasons == [reason.as_str()] =>
            {
                known.last = name(last);
                known.segments += count;
                known.bytes += bytes;
                known.objects += objects;
            }
            _ => verdicts.push(WalVerdict {
                timeline,
                first: name(first),
                last: name(last),
                fate,
                is_announced,
                reasons: vec![reason],
                segments: count,
                bytes,
                objects,
            }),
        }
    }

    /// What has to be announced before this plan is carried out, and all that will have been then.
    ///
    /// Between two segments that go, names that nothing needs go with them, there or not: a hole between them is nobody's
    /// any more. Names that something needs are never announced, but for those that are gone already.
    fn announcements(&self, wal: &[WalVerdict], withdraws: bool) -> (Vec<SegmentRange>, Vec<SegmentRange>) {
        let inventory = self.survey.inventory;
        // What else a withdrawn one names is to stand in another before anything that it says is relied upon.
        let (mut all, mut is_new) = (Vec::new(), withdraws);
        let of_announced = inventory.announcements.iter().flat_map(|it| &it.segments).map(|range| range.first.timeline);
        let of_indexes = inventory.indexes.iter().map(|it| it.name.first.timeline);
        let held = inventory.wal.keys().copied().chain(of_indexes);
        let timelines: BTreeSet<TimelineId> = held.chain(of_announced).collect();
        for timeline in timelines {
            let known = self.announced(timeline);
            let of_timeline: Vec<&WalVerdict> = wal.iter().filter(|it| it.timeline == timeline).collect();
            let going = of_timeline.iter().filter(|it| it.fate == Fate::Remove);
            let going: Vec<Range<u64>> = going.filter_map(|it| self.numbers(it.first, it.last)).collect();
            let staying = of_timeline.iter().filter(|it| it.fate != Fate::Remove);
            let staying: Vec<Range<u64>> = staying.filter_map(|it| self.numbers(it.first, it.last)).collect();
            let needed = self.needs.wal.get(&timeline).into_iter().flatten().map(|need| need.segments.clone());
            let stays = merged(needed.chain(staying.iter().cloned()).collect());
            // An index object may be all that is left of its segments.
            let indexed = inventory.indexes.iter().filter(|it| it.name.first.timeline == timeline);
            let indexed = indexed.filter_map(|it| self.numbers(it.name.first, it.name.last));
            let free = |range: &Range<u64>| !stays.iter().any(|it| it.start < range.end && range.start < it.end);
            let going: Vec<Range<u64>> = going.into_iter().chain(indexed.filter(free)).collect();
            let ends = || going.iter().chain(&known);
            let (Some(from), Some(to)) = (ends().map(|it| it.start).min(), ends().map(|it| it.end).max()) else {
                continue;
            };
            let mut free = subtract(std::iter::once(from..to).collect(), stays.iter().cloned());
            if going.is_empty() {
                free.clear();
            }
            let gone = subtract(known.clone(), staying.iter().cloned());
            let ranges = merged(free.into_iter().chain(gone).collect());
            is_new |= ranges != known;
            all.extend(ranges.iter().filter_map(|range| self.names(timeline, range)));
        }
        let is_needed = is_new && self.scope != Scope::Nothing;
        (if is_needed { all.clone() } else { Vec::new() }, all)
    }

    /// What announcements in force name, of one timeline.
    fn announced(&self, timeline: TimelineId) -> Vec<Range<u64>> {
        let ranges = self.survey.inventory.announcements.iter().flat_map(|it| &it.segments);
        let of_timeline = ranges.filter(|range| range.first.timeline == timeline);
        merged(of_timeline.filter_map(|range| self.numbers(range.first, range.last)).collect())
    }

    fn numbers(&self, first: SegmentName, last: SegmentName) -> Option<Range<u64>> {
        let size = self.survey.inventory.segment_size;
        let is_range = first.timeline == last.timeline && first <= last;
        Some(first.number(size)?.0..last.number(size)?.0 + 1).filter(|_| is_range)
    }

    fn names(&self, timeline: TimelineId, range: &Range<u64>) -> Option<SegmentRange> {
        let name = |number| SegmentName::new(timeline, SegmentNumber(number), self.survey.inventory.segment_size);
        (range.start < range.end).then(|| SegmentRange { first: name(range.start), last: name(range.end - 1) })
    }

    /// The announcements that name what stays after all. A confirmed one never does: nothing of it is taken back.
    fn withdrawn(&self, wal: &[WalVerdict], backups: &[BackupVerdict], notes: &mut Vec<String>) -> Vec<String> {
        let stays = |id: &BackupId| backups.iter().any(|it| it.id == *id && it.fate != Fate::Remove);
        let taken_back: Vec<&WalVerdict> = wal.iter().filter(|it| it.fate == Fate::TakeBack).collect();
        let names = |range: &SegmentRange| {
            let overlaps = |it: &&WalVerdict| {
                it.timeline == range.first.timeline && it.first <= range.last && range.first <= it.last
            };
            taken_back.iter().any(overlaps)
        };
        let mut withdrawn = Vec::new();
        let is_wrong = |it: &&Announcement| it.segments.iter().any(names) || it.backups.iter().any(stays);
        let is_open = |it: &&Announcement| !it.is_confirmed && self.scope != Scope::Nothing;
        for announcement in self.survey.inventory.announcements.iter().filter(is_open).filter(is_wrong) {
            match &announcement.id {
                Some(id) => withdrawn.push(id.clone()),
                None => notes.push(format!(
                    "{} announces WAL that is needed, and has no number by which it could be withdrawn",
                    announcement.key
                )),
            }
        }
        withdrawn
    }

    fn debris(&self, withdraw: &[String]) -> Vec<Debris> {
        let inventory = self.survey.inventory;
        let mut debris = inventory.debris.clone();
        for pin in &inventory.pins {
            let is_old = self.survey.calendar.age(pin.file.created) > PIN_GRACE;
            let is_over = !is_in_force(self.survey, pin) && (!pin.file.released || is_old);
            // Whoever reads pins may have listed an earlier word and not fetched it yet.
            let kept = if is_over { 0 } else { 2 };
            let numbers = &pin.numbers[..pin.numbers.len().saturating_sub(kept)];
            let each = pin.bytes / (pin.numbers.len() as u64).max(1);
            debris.extend(numbers.iter().map(|&number| Debris {
                kind: DebrisKind::Pin,
                key: inventory.lineage.pin(PinName { number, ..pin.name }),
                bytes: each,
            }));
        }
        debris.extend(self.superseded(withdraw));
        debris.sort_by_key(|debris| debris.kind);
        debris
    }

    /// Those that stay in force.
    fn standing(&self, withdraw: &[String]) -> impl Iterator<Item = &Announcement> {
        let announcements = self.survey.inventory.announcements.iter();
        announcements.filter(move |it| it.id.as_ref().is_none_or(|id| !withdraw.contains(id)))
    }

    /// Announcements all of whose names stand in a later one. Those of this run count from the next one on.
    fn superseded(&self, withdraw: &[String]) -> Vec<Debris> {
        let standing: Vec<&Announcement> = self.standing(withdraw).collect();
        // `dead.json` goes last: without it there is nothing left to announce.
        let dead: BTreeSet<BackupId> =
            self.survey.inventory.backups.iter().filter(|it| it.is_dead).map(|it| it.id).collect();
        let has = |whole: &[SegmentRange], part: &SegmentRange| {
            let covers = |it: &SegmentRange| {
                it.first.timeline == part.first.timeline && it.first <= part.first && part.last <= it.last
            };
            whole.iter().any(covers)
        };
        let is_superseded = |old: &&&Announcement| {
            standing.iter().any(|new| {
                (old.at, &old.key) < (new.at, &new.key)
                    && old.segments.iter().all(|part| has(&new.segments, part))
                    && old.backups.iter().all(|id| !dead.contains(id) || new.backups.contains(id))
            })
        };
        let superseded = standing.iter().filter(is_superseded);
        let object =
            |it: &&Announcement| Debris { kind: DebrisKind::Announcement, key: it.key.clone(), bytes: it.bytes };
        superseded.map(object).collect()
    }
}

/// Overlapping and adjacent ranges as one.
fn merged(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.retain(|range| range.start < range.end);
    ranges.sort_by_key(|range| range.start);
    let mut merged: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

/// What is left of `ranges` (apart, in order) without `others`.
fn subtract(ranges: Vec<Range<u64>>, others: impl Iterator<Item = Range<u64>>) -> Vec<Range<u64>> {
    let others = merged(others.collect());
    let mut left = Vec::new();
    for mut range in ranges {
        for other in others.iter().filter(|other| other.start < range.end) {
            if other.end <= range.start {
                continue;
            }
            left.push(range.start..other.start);
            range.start = other.end.min(range.end);
        }
        left.push(range);
    }
    left.retain(|range| range.start < range.end);
    left
}

impl BackupVerdict {
    /// "kept: …", "removed: …"
    pub fn sentence(&self) -> String {
        sentence(self.fate, &self.reasons)
    }
}

impl WalVerdict {
    /// "kept: …", "removed: …"
    pub fn sentence(&self) -> String {
        sentence(self.fate, &self.reasons)
    }
}

fn sentence(fate: Fate, reasons: &[String]) -> String {
    let word = match fate {
        Fate::Keep => "kept",
        Fate::TakeBack => "taken back",
        Fate::Remove => "removed",
    };
    format!("{word}: {}", reasons.join("; "))
}

impl Plan {
    /// Nothing of it takes any doing.
    pub fn is_idle(&self) -> bool {
        self.backups.iter().all(|it| it.fate == Fate::Keep)
            && self.wal.iter().all(|it| it.fate == Fate::Keep)
            && self.indexes.is_empty()
            && self.debris.is_empty()
            && self.withdraw.is_empty()
            && self.announce.is_empty()
    }

    pub fn removed_backups(&self) -> impl Iterator<Item = &BackupVerdict> {
        self.backups.iter().filter(|verdict| verdict.fate == Fate::Remove)
    }

    pub fn removed_wal(&self) -> impl Iterator<Item = &WalVerdict> {
        self.wal.iter().filter(|verdict| verdict.fate == Fate::Remove)
    }

    /// Bytes and objects that go.
    pub fn freed(&self) -> (u64, u64) {
        let backups = self.removed_backups().map(|it| (it.bytes, u64::from(it.objects)));
        let wal = self.removed_wal().map(|it| (it.bytes, it.objects));
        let indexes = self.indexes.iter().map(|it| (it.bytes, 1));
        let debris = self.debris.iter().map(|it| (it.bytes, 1));
        let all = backups.chain(wal).chain(indexes).chain(debris);
        all.fold((0, 0), |sum, (bytes, objects)| (sum.0 + bytes, sum.1 + objects))
    }

    /// What this plan removes and `later` keeps, in words: the same inventory with pins and backups read again after the
    /// announcement. Nothing may be deleted while there is any.
    pub fn objections(&self, later: &Plan) -> Vec<String> {
        let mut objections = Vec::new();
        for gone in self.removed_backups() {
            let kept = later.backups.iter().find(|it| it.id == gone.id && it.fate != Fate::Remove);
            objections.extend(kept.map(|it| format!("backup {} {}", it.id, it.reasons.join("; "))));
        }
        for gone in self.removed_wal() {
            let overlaps = |it: &&WalVerdict| {
                it.fate != Fate::Remove
                    && it.timeline == gone.timeline
                    && it.first <= gone.last
                    && gone.first <= it.last
            };
            let kept = later.wal.iter().filter(overlaps);
            objections.extend(kept.map(|it| format!("WAL {} to {} {}", it.first, it.last, it.reasons.join("; "))));
        }
        objections
    }
}

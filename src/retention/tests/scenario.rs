//! A life of an archive, and expires that stop anywhere in it.

use std::time::Duration;

use fastrand::Rng;

use super::model::{Archive, DAY, SEGMENT, Time, VOLUMES, stamp};
use super::oracle::{Eyes, Promise, ways};
use crate::catalog::backup::PinKind;
use crate::repository::Key;
use crate::repository::layout::{BackupId, BackupType};
use crate::retention::inventory::Announcement;
use crate::retention::{Ages, Fate, Gfs, Outcome, Plan, Policy, Standing, plan};

/// One delete.
#[derive(Clone, Debug)]
enum Delete {
    Segment(u32, u64),
    Volume(BackupId),
    Begin(BackupId),
    Json(BackupId),
    Dead(BackupId),
    Index(u32, u64, u64),
    Debris(Key),
}

pub struct Scenario {
    pub rng: Rng,
    pub time: Time,
    pub archive: Archive,
    pub policy: Policy,
    /// Of the plan of an expire that lost its lease: its last batch is still on its way.
    late: Vec<Delete>,
    pub removed: u64,
    pub withdrawn: u64,
}

fn days(rng: &mut Rng, low: u64, high: u64) -> Duration {
    Duration::from_secs(rng.u64(low..=high) * DAY as u64)
}

pub fn random_policy(rng: &mut Rng) -> Policy {
    let mut policy = Policy::default();
    if rng.u8(..10) < 5 {
        policy.window = Some(days(rng, 1, 30));
    }
    if rng.u8(..10) < 4 {
        policy.count = Some(rng.u32(1..4));
    }
    if rng.u8(..10) < 3 {
        let some = |rng: &mut Rng| if rng.bool() { rng.u32(0..4) } else { 0 };
        policy.gfs = Gfs { daily: some(rng), weekly: some(rng), monthly: some(rng), yearly: some(rng) };
    }
    let age = |rng: &mut Rng| (rng.u8(..10) < 2).then(|| days(rng, 1, 40));
    policy.ages = Ages { full: age(rng), differential: age(rng), incremental: age(rng) };
    policy.wal = (rng.u8(..10) < 3).then(|| days(rng, 1, 20));
    policy
}

impl Scenario {
    pub fn new(seed: u64) -> Scenario {
        let mut rng = Rng::with_seed(seed);
        let policy = random_policy(&mut rng);
        let time = Time { real: 400 * DAY, ..Time::default() };
        let archive = Archive::new(1, time, SEGMENT * rng.u64(1..3) + rng.u64(0..2) * 40);
        let mut scenario = Scenario { rng, time, archive, policy, late: Vec::new(), removed: 0, withdrawn: 0 };
        scenario.write(false);
        scenario
    }

    fn chance(&mut self, percent: u8) -> bool {
        self.rng.u8(..100) < percent
    }

    fn write(&mut self, is_lossy: bool) {
        let seconds = match self.rng.u8(..10) {
            0 => self.rng.i64(8 * DAY..15 * DAY),
            1..=3 => self.rng.i64(DAY..4 * DAY),
            _ => self.rng.i64(60..DAY),
        };
        let bytes = match self.rng.u8(..3) {
            0 => self.rng.u64(64..SEGMENT / 2),
            _ => self.rng.u64(SEGMENT / 2..SEGMENT * 4),
        } & !7;
        self.archive.write(&mut self.rng, &mut self.time, seconds, bytes, is_lossy);
    }

    /// Something happens that is no expire.
    pub fn event(&mut self) {
        match self.rng.u8(..100) {
            0..=34 => {
                let is_lossy = self.chance(8);
                self.write(is_lossy);
            }
            35..=59 => self.backup(),
            60..=67 => self.archive.fork(&mut self.rng),
            68..=75 => self.jump(),
            76..=83 => {
                self.restore();
            }
            84..=88 => self.damage(),
            89..=92 => self.pin(),
            _ => self.let_go(),
        }
    }

    fn backup(&mut self) {
        let open: Vec<BackupId> = self.running();
        for id in open {
            match self.rng.u8(..10) {
                0 => self.archive.backups.get_mut(&id).unwrap().is_alive = false,
                1 => self.archive.backups.get_mut(&id).unwrap().is_failed = true,
                _ => self.archive.finish_backup(id, self.time),
            }
        }
        let Some(id) = self.archive.begin_backup(&mut self.rng, &mut self.time, false) else { return };
        if self.chance(80) {
            self.write(false);
            self.archive.finish_backup(id, self.time);
        }
    }

    fn running(&self) -> Vec<BackupId> {
        let is_open = |id: &&BackupId| {
            let backup = &self.archive.backups[id];
            backup.stopped.is_none() && !backup.is_failed && !backup.is_dead && !backup.is_empty
        };
        self.archive.backups.keys().filter(is_open).copied().collect()
    }

    fn jump(&mut self) {
        let offset = match self.rng.u8(..3) {
            0 => 0,
            1 => self.rng.i64(20 * DAY..500 * DAY),
            _ => -self.rng.i64(20 * DAY..380 * DAY),
        };
        self.time.was_wrong |= offset != 0;
        let was_behind = self.time.offset < offset && self.time.clock() < self.archive.latest_time();
        // By less than that a clock that jumps cannot be told from time that passed.
        let is_like_time = (0..=8 * DAY).contains(&(offset - self.time.offset));
        self.time.offset = offset;
        if was_behind || is_like_time {
            // What either clock said of a pin cannot be told from a pin that lapsed, until it is renewed.
            self.archive.renew_pins(self.time);
        }
    }

    /// Chooses what it needs, pins it, looks again; whether it goes on.
    fn restore(&mut self) -> bool {
        let ways = ways(&self.archive, Eyes::Reader);
        if ways.is_empty() {
            return false;
        }
        let way = &ways[self.rng.usize(..ways.len())];
        let to = if self.rng.u8(..4) == 0 { None } else { Some(self.rng.u64(way.stop..=way.reach)) };
        self.archive.pin(PinKind::Restore, way.backup, way.line, to, self.time);
        true
    }

    fn pin(&mut self) {
        let is_there = |id: &&BackupId| self.archive.backups[id].has_json && !self.archive.backups[id].is_dead;
        let complete: Vec<BackupId> = self.archive.backups.keys().filter(is_there).copied().collect();
        if !complete.is_empty() {
            let id = complete[self.rng.usize(..complete.len())];
            let timeline = self.archive.backups[&id].timeline;
            self.archive.pin(PinKind::Operator, id, timeline, None, self.time);
        }
    }

    /// A restore ends or dies, an operator changes their mind.
    fn let_go(&mut self) {
        let live: Vec<u64> = self.archive.pins.iter().filter(|(_, pin)| pin.is_live).map(|(id, _)| *id).collect();
        if live.is_empty() {
            return;
        }
        let id = live[self.rng.usize(..live.len())];
        let is_restore = self.archive.pins[&id].file.kind == PinKind::Restore;
        match self.chance(50) && is_restore {
            true => self.archive.pins.get_mut(&id).unwrap().is_live = false,
            false => self.archive.release(id),
        }
    }

    fn damage(&mut self) {
        if self.rng.bool() {
            let all: Vec<(u32, u64)> = self.archive.segments.keys().copied().collect();
            if !all.is_empty() {
                let one = all[self.rng.usize(..all.len())];
                self.archive.segments.remove(&one);
            }
        } else {
            let all: Vec<BackupId> = self.archive.backups.keys().copied().collect();
            if !all.is_empty() {
                self.archive.backups.get_mut(&all[self.rng.usize(..all.len())]).unwrap().is_damaged = true;
            }
        }
    }

    fn plan(&self, standing: &Standing) -> Plan {
        plan(&self.archive.inventory(), &self.policy, stamp(self.time.clock()), standing)
    }

    /// By the protocol; it stops anywhere, unless it must not.
    pub fn expire(&mut self, standing: &Standing, to_the_end: bool) -> Result<(), String> {
        let plan = self.plan(standing);
        self.check_plan(&plan)?;
        let policy = self.policy.clone();
        let before = self.archive.clone();
        let is_current = *standing == Standing::Newest;
        let promise = Promise::new(&policy, self.time, &before, is_current);
        let stops = |rng: &mut Rng| !to_the_end && rng.u8(..10) == 0;

        let known: Vec<Key> = before.announcements.iter().map(|it| it.key.clone()).collect();
        let announcement = self.announce(&plan);
        if stops(&mut self.rng) {
            return Ok(());
        }
        for gone in plan.removed_backups() {
            if stops(&mut self.rng) {
                return Ok(());
            }
            self.archive.backups.get_mut(&gone.id).unwrap().is_dead = true;
        }
        if stops(&mut self.rng) {
            return Ok(());
        }
        // Meanwhile a restore chooses, or has chosen before the announcement and pins only now.
        if !to_the_end && self.chance(40) {
            match self.rng.u8(..4) == 0 {
                true => drop(self.restore()),
                false => {
                    self.restore_chosen_before(&before);
                }
            }
        }
        let later = self.later_plan(&before, standing);
        if !plan.objections(&later).is_empty() {
            self.withdrawn += 1;
            self.archive.announcements.retain(|it| it.id.as_deref() != Some(&announcement));
            for gone in plan.removed_backups().filter(|it| !it.is_dead) {
                self.archive.backups.get_mut(&gone.id).unwrap().is_dead = false;
            }
            return match promise.broken_for(&self.archive, Eyes::Holder) {
                Some(broken) => Err(format!("withdrawn: {broken}")),
                None => Ok(()),
            };
        }
        self.confirm(|it| it.id.as_deref() == Some(&announcement));
        if stops(&mut self.rng) {
            return Ok(());
        }
        // What earlier runs have announced, and what becomes of it.
        self.confirm(|it| known.contains(&it.key) && it.id.as_ref().is_none_or(|id| !plan.withdraw.contains(id)));
        if stops(&mut self.rng) {
            return Ok(());
        }
        self.take_back(&plan);
        if let Some(broken) = promise.broken(&self.archive) {
            return Err(format!("confirmed: {broken}"));
        }
        let mut deletes = self.deletes(&plan);
        let until = if to_the_end || self.rng.bool() { deletes.len() } else { self.rng.usize(..=deletes.len()) };
        let rest = deletes.split_off(until);
        let pinned = self.archive.clone();
        let promise_pinned = Promise::new(&policy, self.time, &pinned, is_current);
        for delete in deletes {
            self.delete(delete)?;
        }
        // A batch under way when the lease went to somebody else.
        self.late = rest.into_iter().take(3).collect();
        if let Some(broken) = promise.broken(&self.archive).or_else(|| promise_pinned.broken(&self.archive)) {
            return Err(format!("deleted: {broken}"));
        }
        Ok(())
    }

    pub fn late_batch(&mut self) -> Result<(), String> {
        let before = self.archive.clone();
        let policy = self.policy.clone();
        let promise = Promise::new(&policy, self.time, &before, true);
        for delete in std::mem::take(&mut self.late) {
            self.delete(delete)?;
        }
        match promise.broken_for(&self.archive, Eyes::Holder) {
            Some(broken) => Err(format!("late batch: {broken}")),
            None => Ok(()),
        }
    }

    /// It has read the catalog before `expire` announced anything; it pins, and looks again.
    fn restore_chosen_before(&mut self, before: &Archive) {
        let now = ways(&self.archive, Eyes::Reader);
        let mut chosen = ways(before, Eyes::Reader);
        // Better one that has just been taken from it.
        if chosen.iter().any(|way| !now.contains(way)) {
            chosen.retain(|way| !now.contains(way));
        }
        if chosen.is_empty() {
            return;
        }
        let way = chosen[self.rng.usize(..chosen.len())].clone();
        let id = self.archive.pin(PinKind::Restore, way.backup, way.line, Some(way.reach), self.time);
        let now = ways(&self.archive, Eyes::Reader);
        let is_there = now.iter().any(|it| (it.line, it.backup) == (way.line, way.backup) && it.reach >= way.reach);
        if !is_there {
            // It looks after `expire` has seen the pin, or before.
            match self.rng.bool() {
                true => self.archive.release(id),
                false => self.archive.pins.get_mut(&id).unwrap().is_live = false,
            }
        }
    }

    fn check_plan(&self, plan: &Plan) -> Result<(), String> {
        if plan.backups.iter().any(|it| it.reasons.is_empty()) || plan.wal.iter().any(|it| it.reasons.is_empty()) {
            return Err("a verdict without a reason".into());
        }
        let segments: u64 = plan.wal.iter().map(|it| it.segments).sum();
        let backups = self.archive.backups.values().filter(|it| !it.is_empty).count();
        if segments != self.archive.segments.len() as u64 || plan.backups.len() != backups {
            return Err(format!("verdicts on {segments} segments of {}", self.archive.segments.len()));
        }
        if self.policy.is_empty() && !plan.is_idle() {
            return Err("no policy, and something goes".into());
        }
        Ok(())
    }

    fn announce(&mut self, plan: &Plan) -> String {
        let id = self.archive.next;
        self.archive.next += 1;
        if !plan.announce.is_empty() || plan.removed_backups().any(|it| !it.is_dead || !it.is_announced) {
            self.archive.ledger.push(self.time.clock());
            self.archive.announcements.push(Announcement {
                key: Key::new(format!("announcement-{id:08}")),
                bytes: 100,
                id: Some(id.to_string()),
                at: stamp(self.time.real),
                segments: plan.announce.clone(),
                backups: plan.removed_backups().map(|it| it.id).collect(),
                is_confirmed: false,
            });
        }
        id.to_string()
    }

    fn confirm(&mut self, which: impl Fn(&Announcement) -> bool) {
        self.archive.announcements.iter_mut().filter(|it| which(it)).for_each(|it| it.is_confirmed = true);
    }

    /// With pins and backups read again, and announcements as they were.
    fn later_plan(&self, before: &Archive, standing: &Standing) -> Plan {
        let mut later = self.archive.clone();
        later.announcements.clone_from(&before.announcements);
        for (id, backup) in &mut later.backups {
            backup.is_dead = before.backups.get(id).is_some_and(|it| it.is_dead);
        }
        plan(&later.inventory(), &self.policy, stamp(self.time.clock()), standing)
    }

    fn take_back(&mut self, plan: &Plan) {
        let is_withdrawn = |it: &Announcement| it.id.as_ref().is_some_and(|id| plan.withdraw.contains(id));
        self.archive.announcements.retain(|it| !is_withdrawn(it));
        for back in plan.backups.iter().filter(|it| it.fate == Fate::TakeBack) {
            self.archive.backups.get_mut(&back.id).unwrap().is_dead = false;
        }
    }

    fn deletes(&self, plan: &Plan) -> Vec<Delete> {
        let mut deletes = Vec::new();
        for gone in plan.removed_backups() {
            let id = gone.id;
            let volumes = (0..self.archive.backups[&id].volumes).map(|_| Delete::Volume(id));
            deletes.extend(volumes.chain([Delete::Begin(id), Delete::Json(id), Delete::Dead(id)]));
        }
        for gone in plan.removed_wal() {
            let number = |name: crate::wal::SegmentName| name.number(super::model::size()).unwrap().0;
            let (first, last) = (number(gone.first), number(gone.last));
            let names = self.archive.segments.range((gone.timeline.0, first)..=(gone.timeline.0, last));
            deletes.extend(names.map(|(&(timeline, number), _)| Delete::Segment(timeline, number)));
        }
        for index in &plan.indexes {
            let number = |name: crate::wal::SegmentName| name.number(super::model::size()).unwrap().0;
            deletes.push(Delete::Index(index.name.first.timeline.0, number(index.name.first), number(index.name.last)));
        }
        deletes.extend(plan.debris.iter().map(|it| Delete::Debris(it.key.clone())));
        deletes
    }

    fn delete(&mut self, delete: Delete) -> Result<(), String> {
        let archive = &mut self.archive;
        match delete.clone() {
            Delete::Segment(timeline, number) => {
                if !archive.is_announced(timeline, number) {
                    return Err(format!("{delete:?} without an announcement"));
                }
                archive.segments.remove(&(timeline, number));
                self.removed += 1;
            }
            Delete::Volume(id) | Delete::Begin(id) | Delete::Json(id) | Delete::Dead(id) => {
                let backup = archive.backups.get_mut(&id).unwrap();
                if !backup.is_dead && !backup.is_empty {
                    return Err(format!("{delete:?} without dead.json"));
                }
                match delete {
                    Delete::Volume(_) => backup.volumes = backup.volumes.saturating_sub(1),
                    Delete::Begin(_) => backup.has_begin = false,
                    Delete::Json(_) => backup.has_json = false,
                    _ => {
                        (backup.is_dead, backup.is_empty) = (false, true);
                        // `Backup` entries stay so that no id is taken twice.
                        (backup.has_json, backup.is_failed) = (false, true);
                    }
                }
            }
            Delete::Index(timeline, first, last) => {
                if (first..=last).any(|number| {
                    archive.segments.contains_key(&(timeline, number)) && !archive.is_announced(timeline, number)
                }) {
                    return Err(format!("{delete:?} of segments that stay"));
                }
                archive.indexes.remove(&(timeline, first, last));
            }
            Delete::Debris(key) => {
                let words = key.as_str().to_string();
                archive.announcements.retain(|it| it.key != key);
                if let Some((_, name)) = words.split_once("pins/") {
                    let name = crate::repository::layout::PinName::parse(name).unwrap();
                    let pin = archive.pins.get_mut(&name.id).unwrap();
                    if pin.is_live && *pin.numbers.last().unwrap() == name.number {
                        return Err(format!("pin {} is live", name.id));
                    }
                    pin.numbers.retain(|number| *number != name.number);
                    if pin.numbers.is_empty() {
                        archive.pins.remove(&name.id);
                    }
                }
            }
        }
        Ok(())
    }

    /// Everybody lets go, clocks are right, and the archive is used as it should be for a while.
    pub fn quiet_days(&mut self, days: i64, standing: &Standing) -> Result<i64, String> {
        self.time.offset = 0;
        self.archive.pins.values_mut().for_each(|pin| pin.is_live = false);
        let live: Vec<u64> =
            self.archive.pins.iter().filter(|(_, pin)| !pin.file.released).map(|(id, _)| *id).collect();
        live.into_iter().for_each(|id| self.archive.release(id));
        for id in self.running() {
            self.archive.backups.get_mut(&id).unwrap().is_alive = false;
        }
        let begin = self.time.real;
        // A switch, as a backup makes one: what follows shares no segment with what was.
        let end = self.archive.timelines[&self.archive.active].end;
        let rest = end.next_multiple_of(SEGMENT) - end + 64;
        self.archive.write(&mut self.rng, &mut self.time, 3600, rest, false);
        for _ in 0..days {
            self.archive.write(&mut self.rng, &mut self.time, DAY / 2, SEGMENT * 2, false);
            let id = self.archive.begin_backup(&mut self.rng, &mut self.time, true).unwrap();
            self.archive.write(&mut self.rng, &mut self.time, DAY / 2, SEGMENT, false);
            self.archive.finish_backup(id, self.time);
            self.expire(standing, true)?;
        }
        Ok(begin)
    }

    /// What is there from before an instant though no rule speaks for it.
    pub fn leaks(&self, begin: i64) -> Option<String> {
        for (id, backup) in self.archive.backups.iter().filter(|(_, it)| !it.is_empty) {
            let is_old = backup.stopped.is_none_or(|(_, _, real)| real <= begin);
            if is_old || backup.volumes < VOLUMES {
                return Some(format!("backup {id}: {backup:?}"));
            }
        }
        let oldest = self.archive.backups.values().filter(|it| !it.is_empty).map(|it| it.start).min().unwrap_or(0);
        let active = self.archive.active;
        let is_old = |&(timeline, number): &(u32, u64)| timeline != active || (number + 1) * SEGMENT <= oldest;
        if let Some(segment) = self.archive.segments.keys().find(|it| is_old(it)) {
            return Some(format!("segment {segment:?}, the oldest backup starts at {oldest:#x} of {active}"));
        }
        let index = self.archive.indexes.iter().find(|(timeline, _, last)| is_old(&(*timeline, *last)));
        if let Some(index) = index {
            return Some(format!("index {index:?}, the oldest backup starts at {oldest:#x} of {active}"));
        }
        if !self.archive.pins.is_empty() || self.archive.announcements.len() > 3 {
            return Some(format!("{:?} {:?}", self.archive.pins, self.archive.announcements));
        }
        None
    }

    /// Every verdict on a backup and the WAL.
    pub fn explained(&self, standing: &Standing) -> String {
        let plan = self.plan(standing);
        let backups = plan.backups.iter().map(|it| format!("{} {:?} {}", it.id, it.outcome, it.sentence()));
        let wal = plan.wal.iter().map(|it| format!("{} to {} {}", it.first, it.last, it.sentence()));
        backups.chain(wal).chain(plan.notes.clone()).collect::<Vec<_>>().join("\n")
    }

    /// How many verdicts there are of each kind, for a look at what the cases cover.
    pub fn outcomes(&self) -> Vec<(Outcome, Fate)> {
        self.plan(&Standing::Newest).backups.iter().map(|it| (it.outcome, it.fate)).collect()
    }

    pub fn has_only_days(&self) -> bool {
        let policy = &self.policy;
        policy.gfs.weekly == 0 && policy.gfs.monthly == 0 && policy.gfs.yearly == 0
    }

    pub fn is_full_bounded(&self) -> bool {
        let policy = &self.policy;
        policy.window.is_some()
            || policy.count.is_some()
            || !policy.gfs.is_empty()
            || policy.ages.of(BackupType::Full).is_some()
    }
}

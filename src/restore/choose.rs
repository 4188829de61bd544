//! Owns: which backup and which line serve a target, where recovery will stop, and why a target is refused
//! (proto-notes/09-restore.md).
//! Does not own: what can be restored at all (`reach.rs`), reading WAL (`search.rs`), how a refusal is shown (`cli`).
//!
//! Everything PostgreSQL will be told to stop at is known to be in the WAL, after the backup's consistency and without a
//! hole before it. The index tells where to look; where it does not tell enough, the WAL is read.

use jiff::{SignedDuration, Timestamp};

use super::plan::{Replay, Stop, StopPoint};
use super::reach::{Block, Ends, Interval, KnownBackup, Line, Reach};
use super::search::{Search, SearchError};
use super::target::{self, Action, Target, TimelineChoice, Wish};
use crate::catalog::Digest;
use crate::continuity::Stretch;
use crate::repository::layout::BackupId;
use crate::wal::{Found, FoundKind, History, Lsn, Sought, TimelineId};

/// A target that lies so soon after a backup may meet the rollbacks inside it, which the index does not keep: the
/// backup's own WAL is looked into. More would only be read more often, less would trust the clocks more.
const DOUBT: SignedDuration = SignedDuration::from_mins(5);
/// ... if it is not more than this.
const DOUBT_SEGMENTS_MAX: u64 = 64;
/// Segments that are read for one transaction or restore point at most.
const READS_MAX: usize = 256;

/// What else is known when a target is chosen.
#[derive(Clone, Copy, Debug)]
pub struct Circumstances {
    pub now: Timestamp,
    /// This backup and no other.
    pub backup: Option<BackupId>,
    /// Where the server's WAL ends, if it was asked.
    pub server: Option<ServerEnd>,
}

/// A live server's WAL ended at `lsn` at this instant.
#[derive(Clone, Copy, Debug)]
pub struct ServerEnd {
    pub timeline: TimelineId,
    pub lsn: Lsn,
    pub at: Timestamp,
}

/// How a target will be reached.
#[derive(Clone, Debug)]
pub struct Chosen {
    pub path: History,
    pub backup: KnownBackup,
    pub stop: Stop,
    pub stop_at: Option<StopPoint>,
    pub end_lsn: Lsn,
    pub end_time: Option<Timestamp>,
    pub replay: Replay,
    pub remarks: Vec<String>,
}

/// A target that cannot be reached, and what can be instead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub message: String,
    pub nearest: Vec<Nearest>,
}

/// Something that can be reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nearest {
    /// What it is, in words.
    pub what: String,
    /// What to put after `restore`.
    pub arguments: String,
}

#[derive(Debug)]
pub enum Unchosen {
    Refused(Refusal),
    Failed(SearchError),
    /// The wish contradicts itself.
    Usage(&'static str),
}

impl From<SearchError> for Unchosen {
    fn from(error: SearchError) -> Unchosen {
        Unchosen::Failed(error)
    }
}

impl From<Refusal> for Unchosen {
    fn from(refusal: Refusal) -> Unchosen {
        Unchosen::Refused(refusal)
    }
}

/// Decides how a wish comes true, or why it does not.
pub async fn choose(
    reach: &Reach<'_>,
    search: &dyn Search,
    wish: &Wish,
    circumstances: Circumstances,
) -> Result<Chosen, Unchosen> {
    if wish.exclusive && matches!(wish.target, Target::Latest | Target::Immediate | Target::Name(_)) {
        return Err(Unchosen::Usage("--exclusive stops before a time, an LSN or a transaction: name one with --to"));
    }
    if wish.standby && wish.target != Target::Latest {
        return Err(Unchosen::Usage("a standby has no target: it replays whatever comes"));
    }
    if let Some(id) = circumstances.backup
        && reach.backups.iter().all(|backup| backup.id != id)
    {
        let message = format!("backup {id} is not complete in any repository");
        return Err(Refusal { message, nearest: Vec::new() }.into());
    }
    let mut first_refusal = None;
    for candidates in lines(reach, wish.timeline, circumstances.backup)? {
        let question = Question { reach, search, wish, circumstances, candidates };
        match question.answer().await {
            Err(Unchosen::Refused(refusal)) => first_refusal = first_refusal.or(Some(refusal)),
            answered => return answered,
        }
    }
    let nothing = || Refusal { message: "there is no complete backup in the archive".into(), nearest: Vec::new() };
    Err(first_refusal.unwrap_or_else(nothing).into())
}

/// A line, and the backups that can be replayed along it, each with the WAL that follows; the newest last.
#[derive(Debug)]
struct Candidates<'a> {
    line: Line,
    usable: Vec<(&'a KnownBackup, Stretch)>,
}

/// The lines to try, the preferred one first.
fn lines<'a>(
    reach: &Reach<'a>,
    choice: TimelineChoice,
    only: Option<BackupId>,
) -> Result<Vec<Candidates<'a>>, Refusal> {
    let wanted = |backup: &&&KnownBackup| only.is_none_or(|id| backup.id == id);
    let along = |timeline: TimelineId, of: Option<TimelineId>| {
        let line = reach.line(timeline)?;
        let mine = reach.backups.iter().filter(|backup| of.is_none_or(|of| backup.timeline == of));
        let backups: Vec<&KnownBackup> = mine.collect();
        let usable = backups.iter().filter(wanted);
        let usable = usable.filter_map(|backup| Some((*backup, reach.stretch_of(&line, backup)?.clone())));
        Some(Candidates { usable: usable.collect(), line })
    };
    let unknown = |timeline: TimelineId| Refusal {
        message: format!("how timeline {timeline} came to be is not known: the archive has no history of it"),
        nearest: Vec::new(),
    };
    match choice {
        TimelineChoice::Latest => Ok(vec![along(reach.newest(), None).ok_or_else(|| unknown(reach.newest()))?]),
        TimelineChoice::Number(timeline) => Ok(vec![along(timeline, None).ok_or_else(|| unknown(timeline))?]),
        TimelineChoice::Current => {
            let mut timelines: Vec<TimelineId> =
                reach.backups.iter().filter(|it| wanted(&it)).map(|it| it.timeline).collect();
            timelines.sort();
            timelines.dedup();
            Ok(timelines.into_iter().rev().filter_map(|timeline| along(timeline, Some(timeline))).collect())
        }
    }
}

/// One wish on one line.
struct Question<'a, 's> {
    reach: &'s Reach<'a>,
    search: &'s dyn Search,
    wish: &'s Wish,
    circumstances: Circumstances,
    candidates: Candidates<'a>,
}

impl Question<'_, '_> {
    async fn answer(&self) -> Result<Chosen, Unchosen> {
        if self.candidates.usable.is_empty() {
            return Err(self.refuse(self.nothing_usable(), None).into());
        }
        match &self.wish.target {
            Target::Latest => self.latest().await,
            Target::Immediate => {
                let (backup, stretch) = self.candidates.usable.last().expect("one is usable");
                Ok(self.chosen(backup, stretch, Stop::Immediate, None, backup.stop_lsn))
            }
            Target::Lsn(lsn) => self.lsn(*lsn).await,
            Target::Time(time) => self.time(*time).await,
            Target::Xid(xid) => self.transaction(*xid).await,
            Target::Name(name) => self.restore_point(name).await,
        }
    }

    fn path(&self) -> &History {
        &self.candidates.line.path
    }

    fn nothing_usable(&self) -> String {
        let timeline = self.path().timeline;
        match (self.circumstances.backup, self.reach.backups.is_empty()) {
            (Some(id), _) => {
                format!(
                    "backup {id} cannot be replayed along timeline {timeline}: it is not of that line, or WAL it needs is missing"
                )
            }
            (None, true) => "there is no complete backup in the archive".to_string(),
            (None, false) => {
                format!(
                    "no backup can be replayed along timeline {timeline}: none is of that line with all the WAL it needs"
                )
            }
        }
    }

    // ---- targets ----

    async fn latest(&self) -> Result<Chosen, Unchosen> {
        let line = &self.candidates.line;
        let (backup, stretch) = self.candidates.usable.last().expect("one is usable");
        let interval = self.interval_at(stretch);
        let is_end = matches!(interval.as_ref().map(|it| &it.ends), Some(Ends::Archive | Ends::Timeline));
        if line.stretches.last() != Some(stretch) || !is_end {
            let why = interval.map_or_else(String::new, |interval| because(&interval.ends));
            let message = format!(
                "the latest state of timeline {} cannot be restored: the WAL after the newest usable backup ends at {}{why}",
                line.path.timeline, stretch.to
            );
            return Err(self.refuse(message, None).into());
        }
        self.end(backup, stretch).await
    }

    async fn lsn(&self, lsn: Lsn) -> Result<Chosen, Unchosen> {
        let reaches = |(backup, stretch): &&(&KnownBackup, Stretch)| backup.stop_lsn <= lsn && lsn <= stretch.to;
        let Some((backup, stretch)) = self.candidates.usable.iter().rev().find(reaches) else {
            return Err(self.refuse(format!("{lsn} cannot be restored"), Some(Wanted::Lsn(lsn))).into());
        };
        let found = self.search.find(self.path(), lsn..stretch.to, stretch.to, Sought::RecordFrom(lsn)).await?;
        match found.first() {
            Some(found) => {
                let at = StopPoint { lsn: found.lsn, time: None };
                let mut chosen = self.chosen(backup, stretch, Stop::Lsn(lsn), Some(at), found.lsn);
                chosen.remarks.extend(self.elsewhere(lsn, |interval| lsn <= interval.to.lsn));
                Ok(chosen)
            }
            // All records before it are there, and PostgreSQL would wait for one that is not.
            None => {
                let mut chosen = self.end(backup, stretch).await?;
                chosen.remarks.push(format!("no record starts at or after {lsn}: everything before it is replayed"));
                Ok(chosen)
            }
        }
    }

    async fn time(&self, time: Timestamp) -> Result<Chosen, Unchosen> {
        for (backup, stretch) in self.candidates.usable.iter().rev() {
            if !self.is_before(backup, stretch, time).await? {
                continue;
            }
            if let Some(found) = self.first_past(stretch, backup.stop_lsn..stretch.to, time).await? {
                let at = StopPoint { lsn: found.lsn, time: found.time };
                let mut chosen = self.chosen(backup, stretch, Stop::Time(time), Some(at), found.lsn);
                chosen.remarks.extend(self.elsewhere(found.lsn, |it| it.to.time.is_some_and(|last| time <= last)));
                return Ok(chosen);
            }
            return self.nothing_past(backup, stretch, time).await;
        }
        let message = format!("{} lies before the first state that can be restored", self.wish.target);
        Err(self.refuse(message, Some(Wanted::Time(time))).into())
    }

    /// No transaction ends later than `time` before the WAL does: PostgreSQL would never stop. Whether the end is the
    /// state at that time depends on whether the archive reaches that far.
    async fn nothing_past(&self, backup: &KnownBackup, stretch: &Stretch, time: Timestamp) -> Result<Chosen, Unchosen> {
        let last = self.last_time(backup, stretch).await?;
        let proven = last.is_some_and(|last| time <= last);
        let server = self.circumstances.server.filter(|server| {
            let line = &self.candidates.line;
            let is_same = server.timeline == line.path.timeline && line.stretches.last() == Some(stretch);
            is_same && server.lsn <= stretch.to && time <= server.at
        });
        if proven || server.is_some() {
            let mut chosen = self.end(backup, stretch).await?;
            let last = last.map_or_else(String::new, |last| format!(" (the last one: {})", target::instant(last)));
            chosen.remarks.push(match server {
                Some(_) if !proven => format!(
                    "no transaction ended after the target, and the server has written nothing that is not archived{last}: \
                     the end of the WAL is the state at that time"
                ),
                _ => format!("no transaction ended after the target{last}: the end of the WAL is the state at that time"),
            });
            return Ok(chosen);
        }
        let message = match (time > self.circumstances.now, last) {
            (true, _) => format!("{} is in the future", self.wish.target),
            (false, Some(last)) => format!(
                "{} cannot be restored: the WAL ends before it, the last transaction in it ended at {}",
                self.wish.target,
                target::instant(last)
            ),
            (false, None) => format!("{} cannot be restored: the WAL ends before it", self.wish.target),
        };
        let why = self.interval_at(stretch).map_or_else(String::new, |interval| because(&interval.ends));
        Err(self.refuse(format!("{message}{why}"), Some(Wanted::Time(time))).into())
    }

    async fn transaction(&self, xid: u32) -> Result<Chosen, Unchosen> {
        let may_hold = |block: &Block<'_>| {
            let Some(digest) = block.digest else { return true };
            digest.xids().is_some_and(|(min, max)| (min..=max).contains(&xid))
        };
        let sought = Sought::EndOf { xid };
        let ends = self.everywhere(&sought, may_hold).await?;
        let what = |found: &Found| match found.kind {
            FoundKind::Rollback => "rolled back",
            _ => "committed",
        };
        let name = format!("transaction {xid}");
        self.at_one(&name, ends, what, |_| Stop::Xid(xid))
    }

    async fn restore_point(&self, name: &str) -> Result<Chosen, Unchosen> {
        let may_hold = |block: &Block<'_>| {
            let Some(digest) = block.digest else { return true };
            digest.is_truncated || digest.restore_points().any(|point| point == name)
        };
        let points = self.everywhere(&Sought::RestorePoint { name: name.to_string() }, may_hold).await?;
        self.at_one(&format!("restore point {name:?}"), points, |_| "set", |_| Stop::Name(name.to_string()))
    }

    /// The one record that was meant, on this line.
    fn at_one(
        &self,
        name: &str,
        found: Vec<(TimelineId, Found)>,
        what: impl Fn(&Found) -> &'static str,
        stop: impl Fn(&Found) -> Stop,
    ) -> Result<Chosen, Unchosen> {
        let is_here = |(timeline, found): &&(TimelineId, Found)| {
            let end = self.path().end_of(*timeline).unwrap_or(Lsn::MAX);
            self.path().contains(*timeline) && found.lsn < end
        };
        let here: Vec<&(TimelineId, Found)> = found.iter().filter(is_here).collect();
        let elsewhere = || found.iter().filter(|it| !is_here(it));
        let when = |found: &Found| found.time.map_or_else(String::new, |time| format!(" at {}", target::instant(time)));
        let Some((_, record)) = here.first() else {
            let nearest = elsewhere().map(|(timeline, found)| Nearest {
                what: format!("it was {} on timeline {timeline}{}", what(found), when(found)),
                arguments: format!("--to {} --timeline {timeline}", quoted(&self.wish.target.to_string())),
            });
            let nearest: Vec<Nearest> = nearest.collect();
            let message = format!("{name} is not in the WAL of timeline {}", self.path().timeline);
            return Err(match nearest.is_empty() {
                true => self.refuse(message, None),
                false => Refusal { message, nearest },
            }
            .into());
        };
        if here.len() > 1 {
            let exclusive = if self.wish.exclusive { " --exclusive" } else { "" };
            let nearest = here.iter().map(|(_, found)| Nearest {
                what: format!("{}{}", what(found), when(found)),
                arguments: format!("--to lsn:{}{exclusive}", found.lsn),
            });
            let message = format!("{name} is there {} times on timeline {}", here.len(), self.path().timeline);
            return Err(Refusal { message, nearest: nearest.collect() }.into());
        }
        let reaches =
            |(backup, stretch): &&(&KnownBackup, Stretch)| backup.stop_lsn <= record.lsn && record.lsn < stretch.to;
        let Some((backup, stretch)) = self.candidates.usable.iter().rev().find(reaches) else {
            let message = format!("{name} ({}{}, at {}) cannot be restored", what(record), when(record), record.lsn);
            return Err(self.refuse(message, Some(Wanted::Lsn(record.lsn))).into());
        };
        let at = StopPoint { lsn: record.lsn, time: record.time };
        let mut chosen = self.chosen(backup, stretch, stop(record), Some(at), record.lsn);
        chosen.remarks.extend(elsewhere().map(|(timeline, found)| {
            format!("{name} was {} on timeline {timeline} too{}: --timeline {timeline}", what(found), when(found))
        }));
        Ok(chosen)
    }

    // ---- looking ----

    /// Records of every timeline, each once, with the timeline they are on.
    async fn everywhere(
        &self,
        sought: &Sought,
        may_hold: impl Fn(&Block<'_>) -> bool,
    ) -> Result<Vec<(TimelineId, Found)>, Unchosen> {
        let mut all: Vec<(TimelineId, Found)> = Vec::new();
        let mut reads = 0;
        for timeline in self.reach.timelines() {
            let Some(line) = self.reach.line(timeline) else { continue };
            // What its ancestors have is looked for on theirs.
            let begin = line.path.begin_of(timeline).unwrap_or(Lsn::ZERO);
            for stretch in line.stretches.iter().filter(|stretch| stretch.to > begin) {
                let from = stretch.from.max(begin);
                for range in self.ranges(&line, from..stretch.to, &may_hold) {
                    reads += 1;
                    if reads > READS_MAX {
                        let message = format!(
                            "{} may be in more than {READS_MAX} segments: name a time or an LSN, which need no search",
                            self.wish.target
                        );
                        return Err(Refusal { message, nearest: Vec::new() }.into());
                    }
                    let found = self.search.find(&line.path, range, stretch.to, sought.clone()).await?;
                    all.extend(found.into_iter().map(|found| (timeline, found)));
                }
            }
        }
        Ok(all)
    }

    /// The parts of a range that blocks which may hold something cover, whole segments at a time and none twice.
    fn ranges(
        &self,
        line: &Line,
        range: std::ops::Range<Lsn>,
        may_hold: impl Fn(&Block<'_>) -> bool,
    ) -> Vec<std::ops::Range<Lsn>> {
        let size = self.reach.size();
        let mut ranges: Vec<std::ops::Range<Lsn>> = Vec::new();
        for block in self.reach.blocks(line, range.start, range.end) {
            let is_known = block.is_cut || may_hold(&block);
            let from = block.from.max(range.start).max(ranges.last().map_or(Lsn::ZERO, |last| last.end));
            // Tails of one segment are read together.
            let to = size.end_of(size.segment_before(block.to)).min(range.end);
            if is_known && from < to {
                ranges.push(from..to);
            }
        }
        ranges
    }

    fn is_past(&self, time: Timestamp, target: Timestamp) -> bool {
        if self.wish.exclusive { time >= target } else { time > target }
    }

    /// The first end of a transaction past the target in a range: where PostgreSQL stops.
    async fn first_past(
        &self,
        stretch: &Stretch,
        range: std::ops::Range<Lsn>,
        target: Timestamp,
    ) -> Result<Option<Found>, Unchosen> {
        let line = &self.candidates.line;
        let may_hold = |block: &Block<'_>| {
            let Some(digest) = block.digest else { return true };
            digest.max_commit_time().is_some_and(|max| self.is_past(max, target))
        };
        let sought = Sought::EndPast { time: target, or_at: self.wish.exclusive };
        for part in self.ranges(line, range, may_hold) {
            let found = self.search.find(&line.path, part, stretch.to, sought.clone()).await?;
            if let Some(found) = found.first() {
                return Ok(Some(*found));
            }
        }
        Ok(None)
    }

    /// Whether a backup shows nothing later than the target, and recovery from it does not stop before it is consistent.
    async fn is_before(&self, backup: &KnownBackup, stretch: &Stretch, target: Timestamp) -> Result<bool, Unchosen> {
        let line = &self.candidates.line;
        let first = self.reach.size().floor(backup.start_lsn);
        let is_past = |time: Option<Timestamp>| time.is_some_and(|time| self.is_past(time, target));
        let before = self.reach.last_commit_before(line, stretch.from, backup.stop_lsn);
        if is_past(backup.stop_time) || is_past(before) {
            return Ok(false);
        }
        // Nothing tells how long the server had been like this: the backup itself does.
        if backup.stop_time.is_none() && before.is_none() && is_past(Some(backup.finished)) {
            return Ok(false);
        }
        let soon = backup.finished.checked_add(DOUBT).is_ok_and(|soon| target < soon);
        let segments = Replay { from: first, to: backup.stop_lsn }.segments(self.reach.size());
        let mut unclear = Vec::new();
        if soon && segments <= DOUBT_SEGMENTS_MAX {
            unclear.push(first..backup.stop_lsn);
        }
        let is_read = !unclear.is_empty();
        for block in self.reach.blocks(line, first.max(stretch.from), backup.stop_lsn) {
            match block.digest {
                Some(digest) if !is_past(digest.max_commit_time()) => {}
                Some(_) if !block.is_cut => return Ok(false),
                // What is past may lie behind the consistency, or a tail may hold it.
                _ if is_read => {}
                _ => unclear.push(block.from.max(first)..block.to),
            }
        }
        for range in unclear {
            let sought = Sought::EndPast { time: target, or_at: self.wish.exclusive };
            if !self.search.find(&line.path, range, stretch.to, sought).await?.is_empty() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The latest time that the WAL after a backup's consistency is known to tell.
    async fn last_time(&self, backup: &KnownBackup, stretch: &Stretch) -> Result<Option<Timestamp>, Unchosen> {
        let line = &self.candidates.line;
        let blocks = self.reach.blocks(line, backup.stop_lsn, stretch.to);
        let of = |block: &Block<'_>| block.digest.and_then(Digest::max_commit_time).max(block.last_commit);
        let indexed = blocks.iter().filter(|block| !block.is_cut).filter_map(of).max();
        let last_segment = self.reach.size().floor(Lsn(stretch.to.0.saturating_sub(1)));
        let range = last_segment.max(backup.stop_lsn)..stretch.to;
        let read = self.search.find(&line.path, range, stretch.to, Sought::LastTime).await?;
        let read = read.first().and_then(|found| found.time);
        Ok(indexed.max(read).max(backup.stop_time))
    }

    // ---- answers ----

    fn chosen(&self, backup: &KnownBackup, stretch: &Stretch, stop: Stop, at: Option<StopPoint>, last: Lsn) -> Chosen {
        let size = self.reach.size();
        let to = size.end_of(size.segment_of(last)).min(stretch.to);
        Chosen {
            path: self.path().clone(),
            backup: backup.clone(),
            stop,
            stop_at: at,
            end_lsn: stretch.to,
            end_time: self.reach.last_commit(&self.candidates.line, stretch),
            replay: Replay { from: size.floor(backup.start_lsn), to: to.max(backup.stop_lsn) },
            remarks: Vec::new(),
        }
    }

    /// To the end of a stretch. Without a target PostgreSQL always promotes there; for another action it is told to stop
    /// after the last record.
    async fn end(&self, backup: &KnownBackup, stretch: &Stretch) -> Result<Chosen, Unchosen> {
        if self.wish.action == Action::Promote || self.wish.standby {
            return Ok(self.chosen(backup, stretch, Stop::End, None, stretch.to));
        }
        let size = self.reach.size();
        let mut from = size.floor(Lsn(stretch.to.0.saturating_sub(1))).max(backup.stop_lsn);
        loop {
            let found = self.search.find(self.path(), from..stretch.to, stretch.to, Sought::LastRecord).await?;
            match found.first() {
                Some(found) => {
                    let at = StopPoint { lsn: found.lsn, time: None };
                    return Ok(self.chosen(backup, stretch, Stop::Lsn(found.lsn), Some(at), stretch.to));
                }
                // A record may be longer than a segment.
                None if from > backup.stop_lsn => from = size.floor(Lsn(from.0 - 1)).max(backup.stop_lsn),
                None => return Ok(self.chosen(backup, stretch, Stop::Immediate, None, stretch.to)),
            }
        }
    }

    fn interval_at(&self, stretch: &Stretch) -> Option<Interval> {
        let line = &self.candidates.line;
        self.reach.intervals(line).into_iter().find(|interval| interval.to.lsn == stretch.to)
    }

    /// Other lines that have what was asked for beyond where they part from this one.
    fn elsewhere(&self, stop: Lsn, has: impl Fn(&Interval) -> bool) -> Vec<String> {
        let others = self.reach.window().into_iter().filter(|interval| interval.timeline != self.path().timeline);
        let parted = others.filter(|interval| {
            let parting = self.reach.line(interval.timeline).map(|line| parting(self.path(), &line.path));
            parting.is_some_and(|parting| parting < stop && parting < interval.to.lsn) && has(interval)
        });
        let remark = |interval: Interval| {
            let timeline = interval.timeline;
            format!("timeline {timeline} reaches this target too, on another line: --timeline {timeline}")
        };
        let mut remarks: Vec<String> = parted.map(remark).collect();
        remarks.dedup();
        remarks
    }

    fn refuse(&self, message: String, wanted: Option<Wanted>) -> Refusal {
        let intervals = self.reach.intervals(&self.candidates.line);
        let timeline = match self.wish.timeline {
            TimelineChoice::Latest => String::new(),
            choice => format!(" --timeline {choice}"),
        };
        let first = |interval: &Interval| Nearest {
            what: format!("the first state after it, {}", place(&interval.from.time, interval.from.lsn)),
            arguments: format!("--to lsn:{}{timeline}", interval.from.lsn),
        };
        let last = |interval: &Interval| Nearest {
            what: format!(
                "the last state before it, {}{}",
                place(&interval.to.time, interval.to.lsn),
                because(&interval.ends)
            ),
            arguments: match interval.ends {
                Ends::Archive | Ends::Timeline => format!("--to latest{timeline}"),
                _ => format!("--to lsn:{}{timeline}", interval.to.lsn),
            },
        };
        let is_before = |interval: &&Interval| match wanted {
            Some(Wanted::Time(time)) => interval.to.time.is_some_and(|last| last < time),
            Some(Wanted::Lsn(lsn)) => interval.to.lsn < lsn,
            None => true,
        };
        let is_after = |interval: &&Interval| match wanted {
            Some(Wanted::Time(time)) => interval.from.time.is_none_or(|first| time < first),
            Some(Wanted::Lsn(lsn)) => lsn < interval.from.lsn,
            None => false,
        };
        let before = intervals.iter().rev().find(is_before);
        // Where an interval's first time is not known, its place tells.
        let follows = |interval: &&Interval| before.is_none_or(|before| before.to.lsn < interval.from.lsn);
        let after = intervals.iter().filter(follows).find(is_after).map(first);
        let before = before.map(last);
        Refusal { message, nearest: before.into_iter().chain(after).collect() }
    }
}

#[derive(Clone, Copy, Debug)]
enum Wanted {
    Time(Timestamp),
    Lsn(Lsn),
}

fn place(time: &Option<Timestamp>, lsn: Lsn) -> String {
    match time {
        Some(time) => format!("with everything committed up to {} ({lsn})", target::instant(*time)),
        None => format!("at {lsn}"),
    }
}

/// What follows the end of an interval.
fn because(ends: &Ends) -> String {
    match ends {
        Ends::Archive | Ends::Timeline => String::new(),
        Ends::Gap(Some(id)) => format!("; gap {id} follows"),
        Ends::Gap(None) => "; WAL is missing after it".to_string(),
        Ends::Expired => "; what follows is expired".to_string(),
        Ends::Conflict(name) => format!("; the archive holds two contents of {name}"),
    }
}

/// Where two lines part; the end of WAL when they do not.
fn parting(one: &History, other: &History) -> Lsn {
    let timelines = one.ancestors().iter().map(|entry| entry.timeline).chain([one.timeline]);
    for timeline in timelines {
        if !other.contains(timeline) {
            return one.begin_of(timeline).unwrap_or(Lsn::ZERO);
        }
        let end = |path: &History| path.end_of(timeline).unwrap_or(Lsn::MAX);
        if end(one) != end(other) {
            return end(one).min(end(other));
        }
    }
    Lsn::MAX
}

/// In quotes, where a shell would take it apart.
fn quoted(text: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || ":/._-+".contains(c);
    match text.chars().all(is_plain) {
        true => text.to_string(),
        false => format!("'{}'", text.replace('\'', r"'\''")),
    }
}

#[cfg(test)]
mod tests;

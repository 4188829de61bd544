//! When something is due: from how it is written ([`Line`]), when it was done last, and what the clock says.
//!
//! Owns: the next time of a line, what is due now, jitter, what was missed, clocks that jump.
//! Does not own: doing it (`agent`), what it was done last for (the repository tells). Pure: nothing is kept between two
//! calls, so that a process that begins anew knows what the one before it knew.
//!
//! # What is missed
//!
//! A line is due from its first time after the end of the last run on, and stays so until one has run: however many times
//! have passed, it is one run. Times that pass while one runs are none.
//!
//! # A clock that jumps
//!
//! Forward, and a time has passed: one run. Backward, and the last run lies in what is to come: were that believed,
//! nothing would run until the clock is there again. So a run that ended later than now does not count by the clock, but
//! by how long ago this process saw it end, on a clock that does not jump; if it did not see it, not at all, which costs
//! one run too many at most.

mod line;

use std::time::Duration;

use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};

pub use line::{CronLine, LINE_EXAMPLE, Line, LineError};

use crate::units::show_size;
use crate::wal::Lsn;

/// Two hosts' clocks, or one that is set right, are that far apart without having jumped.
const CLOCKS_APART: SignedDuration = SignedDuration::from_mins(10);
/// What is later than that was missed, not merely begun a moment after its time.
const LATE: SignedDuration = SignedDuration::from_mins(5);

/// What holds for all lines of a cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Timing {
    /// Of cron lines.
    pub zone: TimeZone,
    /// How much later than its time a run may begin: clusters of the same schedule begin apart from each other.
    pub jitter: Duration,
    /// Of the cluster: the same again after a restart, so that what was announced holds.
    pub seed: u64,
}

/// A run that came to a good end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ran {
    pub started: Timestamp,
    pub finished: Timestamp,
    /// Where WAL was then; `None`: it is of no concern.
    pub start_lsn: Option<Lsn>,
    /// How long ago this process saw it end, on a clock that does not jump; `None`: it was there before.
    pub seen: Option<Duration>,
}

/// What the time is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    pub now: Timestamp,
    /// From when on the line counts where nothing has run yet.
    pub since: Timestamp,
    /// For how long this process has known the line, on a clock that does not jump.
    pub up: Duration,
    /// Where WAL is; `None`: not known.
    pub lsn: Option<Lsn>,
}

/// When a line's next run is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Next {
    /// By the clock, its jitter in it; `None`: not known beforehand.
    pub at: Option<Timestamp>,
    pub is_due: bool,
    /// For people: the line, and what is to say about it.
    pub because: String,
}

impl Next {
    /// How long until it is due; `None`: it is not a matter of time.
    pub fn wait(&self, now: Timestamp) -> Option<Duration> {
        if self.is_due {
            return Some(Duration::ZERO);
        }
        Some(self.at?.duration_since(now).try_into().unwrap_or(Duration::ZERO))
    }
}

/// A run in terms of today's clock.
#[derive(Clone, Copy)]
struct Base {
    started: Timestamp,
    finished: Timestamp,
}

/// The next run of `line`, after `runs`, in any order.
pub fn next(line: &Line, timing: &Timing, runs: &[Ran], moment: &Moment) -> Next {
    let base = || base(runs, moment);
    let at = match line {
        Line::After(bytes) => return after(line, *bytes, runs, moment),
        Line::Cron(cron) => cron.next_after(base().finished, &timing.zone),
        Line::Every(interval) => every(*interval, base()),
    };
    let Some(time) = at else {
        return Next { at: None, is_due: false, because: format!("{line}: not before the calendar ends") };
    };
    let at = time.checked_add(jitter(timing, time)).unwrap_or(time);
    let late = moment.now.duration_since(at);
    let because = if late > LATE { format!("{line}, missed at {at:.0}") } else { line.to_string() };
    Next { at: Some(at), is_due: !late.is_negative(), because }
}

/// The first of `nexts` that is due: put what includes the others first.
pub fn first_due<K>(nexts: &[(K, Next)]) -> Option<&(K, Next)> {
    nexts.iter().find(|(_, next)| next.is_due)
}

/// The last run, or what stands for it.
fn base(runs: &[Ran], moment: &Moment) -> Base {
    let ago = |duration: Duration| moment.now.checked_sub(duration).unwrap_or(Timestamp::MIN);
    let is_believed = |time: Timestamp| time.duration_since(moment.now) <= CLOCKS_APART;
    let counted = runs.iter().filter_map(|run| {
        if is_believed(run.finished) {
            return Some(Base { started: run.started.min(run.finished), finished: run.finished });
        }
        let finished = ago(run.seen?);
        let took = run.finished.duration_since(run.started).max(SignedDuration::ZERO);
        // Of a run in which the clock jumped, its length is not known either.
        let started = finished.checked_sub(took).unwrap_or(finished).max(ago(moment.up)).min(finished);
        Some(Base { started, finished })
    });
    counted.max_by_key(|base| base.finished).unwrap_or_else(|| {
        let since = if is_believed(moment.since) { moment.since } else { ago(moment.up) };
        Base { started: since, finished: since }
    })
}

/// Whole intervals from its start, those skipped that passed while it ran.
fn every(interval: Duration, base: Base) -> Option<Timestamp> {
    let took = base.finished.duration_since(base.started).unsigned_abs();
    let passed = took.as_nanos() / interval.as_nanos().max(1);
    let whole = interval.checked_mul(u32::try_from(passed).ok()?.checked_add(1)?)?;
    base.started.checked_add(whole).ok()
}

fn after(line: &Line, bytes: u64, runs: &[Ran], moment: &Moment) -> Next {
    let Some(lsn) = moment.lsn else {
        return Next { at: None, is_due: false, because: format!("{line} of WAL") };
    };
    // One that began further on is one of a line that was left.
    let last = runs.iter().filter_map(|run| run.start_lsn).filter(|start| *start <= lsn).max();
    let written = lsn.0 - last.unwrap_or(Lsn::ZERO).0;
    let because = match last {
        Some(_) => format!("{line} of WAL, {} so far", show_size(rounded(written))),
        None => format!("{line} of WAL, and none has been taken on this line"),
    };
    Next { at: None, is_due: written >= bytes, because }
}

/// As much as is worth showing.
fn rounded(bytes: u64) -> u64 {
    let units = [1 << 40, 1 << 30, 1 << 20];
    let unit = units.into_iter().find(|unit| bytes >= 10 * unit).unwrap_or(1 << 20);
    bytes / unit * unit
}

/// Always the same for the same time: it is drawn from the seed, by the finalizer of SplitMix64.
fn jitter(timing: &Timing, time: Timestamp) -> Duration {
    let seconds = timing.jitter.as_secs();
    if seconds == 0 {
        return Duration::ZERO;
    }
    let mut mixed = timing.seed ^ time.as_second().cast_unsigned().wrapping_mul(0x9E37_79B9_7F4A_7C15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    Duration::from_secs((mixed ^ (mixed >> 31)) % seconds)
}

#[cfg(test)]
mod tests;

//! Owns: a schedule as it is written, `0 2 * * 0`, `every 6h`, `after 50GiB`: its grammar, and when a cron line fires.
//! Does not own: what is due (`schedule`). Pure.
//!
//! A cron line has five fields and is read by croner. Where its hours are named, its times are the wall clock's: one that
//! a change to summer time leaves out fires where the gap ends, one that comes twice fires the first time only. Where the
//! hours are `*` or a step, it fires as time passes: in both hours of the same name, and not in one that is left out.

use std::fmt;
use std::time::Duration;

use croner::Cron;
use croner::parser::{CronParser, Seconds, Year};
use jiff::civil::DateTime;
use jiff::tz::{AmbiguousOffset, TimeZone};
use jiff::{SignedDuration, Span, Timestamp};

use crate::units::{parse_duration, parse_size, show_duration, show_size};

/// What may be written.
pub const LINE_EXAMPLE: &str =
    "a schedule such as \"0 2 * * 0\" (cron: minute, hour, day, month, weekday), \"every 6h\" or \"after 50GiB\"";

const FIELDS: usize = 5;
/// A line is short; what is longer is something else.
const BYTES_MAX: usize = 200;
const EVERY: std::ops::RangeInclusive<Duration> = Duration::from_secs(60)..=Duration::from_secs(366 * 86_400);
const AFTER: std::ops::RangeInclusive<u64> = 1 << 20..=1 << 50;
/// Where the calendar is tried out, and how far: the rarest date, 29 February on one day of the week, comes within 40.
const TRIAL: DateTime = DateTime::constant(2001, 1, 1, 0, 0, 0, 0);
const TRIAL_YEARS: i16 = 50;
/// No clock is put forward or back by more.
const CHANGE_MAX: SignedDuration = SignedDuration::from_hours(25);
/// Firings that fall together into a gap, or behind us in a repeated hour: one each minute of a day.
const TOGETHER_MAX: usize = 2 * 1440;

/// When something is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Line {
    Cron(Box<CronLine>),
    /// That long after it was begun last.
    Every(Duration),
    /// That many bytes of WAL after it was begun last.
    After(u64),
}

/// Five fields, checked to fire some day.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CronLine {
    text: String,
    cron: Cron,
    /// Its hours are named, not counted.
    is_wall_clock: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LineError {
    #[error("{LINE_EXAMPLE}")]
    Unknown,
    #[error("\"every\" with a duration from 1min to 366d, such as \"every 6h\"")]
    Every,
    #[error("\"after\" with a size from 1MiB to 1024TiB, such as \"after 50GiB\"")]
    After,
    #[error("a cron line of five fields (minute, hour, day, month, weekday), such as \"0 2 * * 0\": there are {0}")]
    Fields(usize),
    #[error("a cron line of five fields (minute, hour, day, month, weekday), such as \"0 2 * * 0\": {0}")]
    Cron(String),
    #[error("a cron line that fires some day: no month it names has such a day")]
    Never,
}

impl Line {
    pub fn parse(text: &str) -> Result<Line, LineError> {
        if text.len() > BYTES_MAX {
            return Err(LineError::Unknown);
        }
        let text = text.trim();
        match text.split_once(char::is_whitespace) {
            Some(("every", duration)) => {
                let parsed = parse_duration(duration.trim()).filter(|duration| EVERY.contains(duration));
                parsed.map(Line::Every).ok_or(LineError::Every)
            }
            Some(("after", size)) => {
                let parsed = parse_size(size.trim()).filter(|bytes| AFTER.contains(bytes));
                parsed.map(Line::After).ok_or(LineError::After)
            }
            Some((first, _)) if first.starts_with(|c: char| c.is_ascii_digit() || c == '*') => {
                CronLine::parse(text).map(|cron| Line::Cron(Box::new(cron)))
            }
            _ => Err(LineError::Unknown),
        }
    }

    /// The longest time that passes between two runs; `None`: WAL decides, not time.
    pub fn longest_interval(&self) -> Option<Duration> {
        match self {
            Line::Cron(cron) => cron.longest_interval(),
            Line::Every(interval) => Some(*interval),
            Line::After(_) => None,
        }
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Line::Cron(cron) => f.write_str(&cron.text),
            Line::Every(interval) => write!(f, "every {}", show_duration(*interval)),
            Line::After(bytes) => write!(f, "after {}", show_size(*bytes)),
        }
    }
}

impl CronLine {
    fn parse(text: &str) -> Result<CronLine, LineError> {
        let fields: Vec<&str> = text.split_whitespace().collect();
        if fields.len() != FIELDS {
            return Err(LineError::Fields(fields.len()));
        }
        let text = fields.join(" ");
        let parser = CronParser::builder().seconds(Seconds::Disallowed).year(Year::Disallowed).build();
        let cron = parser.parse(&text).map_err(|error| LineError::Cron(error.to_string()))?;
        let line = CronLine { text, cron, is_wall_clock: !fields[1].contains(['*', '/']) };
        let trial_end = TRIAL + Span::new().years(TRIAL_YEARS);
        line.civil_after(TRIAL).filter(|first| *first < trial_end).map(|_| ()).ok_or(LineError::Never)?;
        Ok(line)
    }

    /// The first time it fires after `after`; `None`: not before the calendar ends.
    pub fn next_after(&self, after: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
        if !self.is_wall_clock {
            let mut from = after;
            loop {
                let at = self.cron.find_next_occurrence(&from.to_zoned(zone.clone()), false).ok()?.timestamp();
                if at > after {
                    return Some(at);
                }
                // Of the second it was asked in.
                from = from.checked_add(SignedDuration::from_secs(1)).ok()?;
            }
        }
        // What a gap left out just before stands before us on the wall clock, and fires after.
        let before = after.checked_sub(CHANGE_MAX).unwrap_or(Timestamp::MIN);
        let has_changed = zone.to_offset(before) != zone.to_offset(after);
        let mut civil = zone.to_datetime(if has_changed { before } else { after });
        for _ in 0..TOGETHER_MAX {
            civil = self.civil_after(civil)?;
            let at = first_instant(civil, zone)?;
            if at > after {
                return Some(at);
            }
        }
        None
    }

    fn civil_after(&self, after: DateTime) -> Option<DateTime> {
        self.cron.find_next_occurrence(&after, false).ok()
    }

    /// The longest time between two firings in a sample of years, by the calendar.
    fn longest_interval(&self) -> Option<Duration> {
        const DAYS: usize = 500;
        let trial_end = TRIAL + Span::new().years(TRIAL_YEARS);
        let mut longest = SignedDuration::ZERO;
        let first = self.civil_after(TRIAL)?;
        // All its days have the same times.
        let mut last = first;
        while let Some(next) = self.civil_after(last).filter(|next| next.date() == first.date()) {
            longest = longest.max(next.duration_since(last));
            last = next;
        }
        for _ in 0..DAYS {
            let Some(next) = self.civil_after(last).filter(|next| *next < trial_end) else { break };
            longest = longest.max(next.duration_since(last));
            let day_end = next.date().at(23, 59, 59, 0);
            last = self.cron.find_previous_occurrence(&day_end, true).ok()?;
        }
        longest.try_into().ok().filter(|longest: &Duration| !longest.is_zero())
    }
}

/// Where the wall clock shows `civil` for the first time, or would have.
fn first_instant(civil: DateTime, zone: &TimeZone) -> Option<Timestamp> {
    let ambiguous = zone.to_ambiguous_timestamp(civil);
    match ambiguous.offset() {
        AmbiguousOffset::Gap { .. } => {
            let before = ambiguous.earlier().ok()?;
            Some(zone.following(before).next()?.timestamp())
        }
        AmbiguousOffset::Unambiguous { .. } | AmbiguousOffset::Fold { .. } => ambiguous.earlier().ok(),
    }
}

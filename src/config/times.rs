//! Owns: what a cluster's tables say of times: when backups are taken and verified, how long things are kept; and that
//! they do not contradict each other.
//! Does not own: what a schedule means (`schedule`), what a policy keeps (`retention`).

use std::time::Duration;

use jiff::tz::TimeZone;

use super::ConfigError;
use super::section::Section;
use crate::retention::policy::{Ages, Gfs, Policy};
use crate::schedule::Line;
use crate::units::{DURATION_EXAMPLE, SIZE_EXAMPLE, parse_duration, parse_size, show_duration};

const ZONE: &str = "backup.timezone";
pub(super) const ZONE_DEFAULT: &str = "UTC";
const JITTER_MAX: Duration = Duration::from_secs(86_400);
/// A hundred years, which is for ever.
const KEPT_MAX: Duration = Duration::from_secs(36_500 * 86_400);
const COUNT_MAX: u64 = 100_000;
const RATE_MIN: u64 = 32 << 10;
const PERCENT: u8 = 5;

/// When the agent takes base backups, besides the first one and one behind a gap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScheduleConfig {
    /// Of cron lines, and of what a day, a week, a month is to retention.
    pub timezone: TimeZone,
    /// `None`: by no schedule.
    pub full: Option<Line>,
    pub jitter: Duration,
}

impl Default for ScheduleConfig {
    fn default() -> ScheduleConfig {
        ScheduleConfig { timezone: TimeZone::UTC, full: None, jitter: Duration::ZERO }
    }
}

/// How long things are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RetentionConfig {
    /// Whether the agent expires after each good backup.
    pub automatic: bool,
    /// `None`: nothing is configured, and nothing is ever removed.
    pub policy: Option<Policy>,
}

/// When the archive is verified, and how thoroughly.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerifyConfig {
    /// `None`: never by itself.
    pub quick: Option<Line>,
    pub sample: Option<Line>,
    pub full: Option<Line>,
    /// How much of it `sample` reads.
    pub sample_percent: u8,
    /// Bytes read in a second; `None`: as fast as it goes.
    pub max_rate: Option<u64>,
}

impl Default for VerifyConfig {
    fn default() -> VerifyConfig {
        VerifyConfig { quick: None, sample: None, full: None, sample_percent: PERCENT, max_rate: None }
    }
}

pub(super) struct Times {
    pub schedule: ScheduleConfig,
    pub retention: RetentionConfig,
    pub verify: VerifyConfig,
}

pub(super) fn check(section: &Section<'_>) -> Result<Times, ConfigError> {
    let timezone = timezone(section)?;
    let jitter = duration(section, "backup.jitter", Duration::ZERO..=JITTER_MAX, "0s to 1d")?.unwrap_or_default();
    let schedule = ScheduleConfig { timezone, full: line(section, "backup.full")?, jitter };
    let retention = retention(section, &schedule.timezone)?;
    agree(section, &schedule, &retention)?;
    Ok(Times { schedule, retention, verify: verify(section)? })
}

fn timezone(section: &Section<'_>) -> Result<TimeZone, ConfigError> {
    let Some(name) = section.text(ZONE)?.filter(|name| *name != ZONE_DEFAULT) else { return Ok(TimeZone::UTC) };
    TimeZone::get(name).map_err(|_| {
        let missing = match jiff::tz::db().is_definitively_empty() {
            true => "; this system has no database of them (package tzdata)",
            false => "",
        };
        let expected = format!("the name of a time zone, such as \"UTC\" or \"Europe/Berlin\"{missing}");
        section.invalid(ZONE, Some(name), expected)
    })
}

fn line(section: &Section<'_>, key: &str) -> Result<Option<Line>, ConfigError> {
    let Some(text) = section.text(key)? else { return Ok(None) };
    let parsed = Line::parse(text).map_err(|error| {
        // Blanks belong into it; what is in a connection string does not.
        let is_plain = text.len() <= 100 && !text.contains(['=', '@', ':']) && !text.contains(char::is_control);
        let value = is_plain.then(|| text.to_string());
        ConfigError::Invalid {
            source_place: section.source(key),
            key: section.key(key),
            value,
            expected: error.to_string(),
        }
    })?;
    Ok(Some(parsed))
}

fn duration(
    section: &Section<'_>,
    key: &str,
    range: std::ops::RangeInclusive<Duration>,
    words: &str,
) -> Result<Option<Duration>, ConfigError> {
    let Some(text) = section.text(key)? else { return Ok(None) };
    match parse_duration(text).filter(|duration| range.contains(duration)) {
        Some(duration) => Ok(Some(duration)),
        None => Err(section.invalid(key, Some(text), format!("{DURATION_EXAMPLE}, {words}"))),
    }
}

fn retention(section: &Section<'_>, timezone: &TimeZone) -> Result<RetentionConfig, ConfigError> {
    let age = |key| duration(section, key, Duration::from_nanos(1)..=KEPT_MAX, "longer than 0s, at most 36500d");
    let number = |key| {
        let number = section.number(key, 1..=COUNT_MAX, "a number from 1 to 100000; left out, it keeps nothing")?;
        Ok::<_, ConfigError>(number.and_then(|number| u32::try_from(number).ok()))
    };
    let policy = Policy {
        window: age("retention.window")?,
        count: number("retention.count")?,
        gfs: Gfs {
            daily: number("retention.gfs.daily")?.unwrap_or(0),
            weekly: number("retention.gfs.weekly")?.unwrap_or(0),
            monthly: number("retention.gfs.monthly")?.unwrap_or(0),
            yearly: number("retention.gfs.yearly")?.unwrap_or(0),
        },
        ages: Ages {
            full: age("retention.full")?,
            differential: age("retention.differential")?,
            incremental: age("retention.incremental")?,
        },
        wal: age("retention.wal")?,
        time_zone: timezone.clone(),
    };
    let automatic = section.flag("retention.automatic")?.unwrap_or(true);
    Ok(RetentionConfig { automatic, policy: Some(policy).filter(|policy| !policy.is_empty()) })
}

fn verify(section: &Section<'_>) -> Result<VerifyConfig, ConfigError> {
    const RATE: &str = "verify.max_rate";
    const PERCENT_KEY: &str = "verify.sample_percent";
    let by_time = |key| match line(section, key)? {
        Some(Line::After(_)) => {
            let expected = "a cron line such as \"0 4 * * 6\", or an interval such as \"every 7d\"";
            Err(section.invalid(key, None, expected))
        }
        line => Ok(line),
    };
    let max_rate = match section.text(RATE)? {
        None => None,
        Some(text) => Some(parse_size(text).filter(|bytes| *bytes >= RATE_MIN).ok_or_else(|| {
            section.invalid(RATE, Some(text), format!("{SIZE_EXAMPLE}, at least 32KiB (each second)"))
        })?),
    };
    let percent = section.number(PERCENT_KEY, 1..=100, "a number from 1 to 100")?;
    Ok(VerifyConfig {
        quick: by_time("verify.quick")?,
        sample: by_time("verify.sample")?,
        full: by_time("verify.full")?,
        sample_percent: percent.and_then(|percent| u8::try_from(percent).ok()).unwrap_or(PERCENT),
        max_rate,
    })
}

/// Refuses what cannot be meant together: each of it would forget what another part promises.
fn agree(section: &Section<'_>, schedule: &ScheduleConfig, retention: &RetentionConfig) -> Result<(), ConfigError> {
    const FULL: &str = "backup.full";
    let contradiction = |key: &str, what: String, hint: String| {
        let what = format!("{} {what}", section.key(key));
        Err(ConfigError::Contradiction { source_place: section.source(key), what, hint })
    };
    // What is switched off is no promise.
    let is_on = section.flag("backup.automatic")?.unwrap_or(true);
    let line = schedule.full.as_ref().filter(|_| is_on);
    let interval = line.and_then(Line::longest_interval);
    let between = |interval| format!("the {} between two backups of {}", show_duration(interval), section.key(FULL));
    if let Some(interval) = interval.filter(|interval| schedule.jitter >= *interval) {
        let what = format!("= {} is as long as {}", show_duration(schedule.jitter), between(interval));
        return contradiction("backup.jitter", what, "a few minutes keep clusters apart".into());
    }
    let Some(policy) = &retention.policy else { return Ok(()) };
    for (key, age) in [("retention.window", policy.window), ("retention.full", policy.ages.full)] {
        if let (Some(age), Some(interval)) = (age, interval)
            && age < interval
        {
            let what = format!("= {} is shorter than {}", show_duration(age), between(interval));
            let hint = format!("make it at least {}, or back up more often", show_duration(interval));
            return contradiction(key, what, hint);
        }
    }
    if let (Some(wal), Some(window)) = (policy.wal, policy.window)
        && wal < window
    {
        let (wal, window) = (show_duration(wal), show_duration(window));
        let what = format!("= {wal} is shorter than the window of {window}, which needs its WAL");
        let hint = format!("make it at least {window}, or the window at most {wal}");
        return contradiction("retention.wal", what, hint);
    }
    Ok(())
}

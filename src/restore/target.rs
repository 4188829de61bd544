//! Owns: what a restore may be asked for: where to stop, on which timeline, what to do then; how that is typed and printed.
//! Does not own: whether it can be reached (`choose.rs`), what PostgreSQL is told (`plan.rs`).
//!
//! Pure, but for the time zone database, which is the system's.

use std::fmt;
use std::str::FromStr;

use jiff::civil;
use jiff::tz::{AmbiguousOffset, TimeZone};
use jiff::{SignedDuration, Timestamp};
use serde::{Serialize, Serializer};

use crate::wal::{Lsn, TimelineId};

/// Where recovery ends (proto-notes/09-restore.md, "targets").
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// All there is.
    Latest,
    /// As soon as the copy is consistent.
    Immediate,
    /// Every commit up to this instant, as the server's clock took its time. To the microsecond, as PostgreSQL's clock.
    Time(Timestamp),
    /// The record that starts there, or the first one after it.
    Lsn(Lsn),
    /// The end of this transaction. The WAL has the lower half of what `pg_current_xact_id()` tells.
    Xid(u32),
    /// The restore point of this name (`pg_create_restore_point`).
    Name(String),
}

/// Says what it is first, as it would be typed.
impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Target::Latest => f.write_str("latest"),
            Target::Immediate => f.write_str("immediate"),
            Target::Time(time) => write!(f, "{}", instant(*time)),
            Target::Lsn(lsn) => write!(f, "lsn:{lsn}"),
            Target::Xid(xid) => write!(f, "xid:{xid}"),
            Target::Name(name) => write!(f, "name:{name}"),
        }
    }
}

impl Serialize for Target {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A time as people and PostgreSQL read it: `2026-11-22 12:00:00.25+00`.
pub fn instant(time: Timestamp) -> String {
    time.strftime("%Y-%m-%d %H:%M:%S%.f+00").to_string()
}

/// Restore points have names of at most 63 bytes (`MAXFNAMELEN` is 64).
const NAME_BYTES_MAX: usize = 63;
/// `FirstNormalTransactionId`: lower ones never end.
const XID_MIN: u32 = 3;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    #[error("{0:?} is no target: expected latest, immediate, a time with its zone, lsn:X/X, xid:N or name:TEXT")]
    Unknown(String),
    #[error("{0:?} says no time zone: an hour either way is another database")]
    NoZone(String),
    #[error("{0:?} is a day, not an instant")]
    NoTime(String),
    #[error("{0:?} names no time zone this system knows")]
    UnknownZone(String),
    #[error("{text:?} occurred twice, when the clocks were set back: it is {earlier} or {later}")]
    Twice { text: String, earlier: String, later: String },
    #[error("{text:?} never was: the clocks were set forward from {before} to {after}")]
    Never { text: String, before: String, after: String },
    #[error("{0:?} is finer than a microsecond, which is what PostgreSQL counts in")]
    TooFine(String),
    #[error("{0:?} is no LSN: expected two hexadecimal numbers like lsn:16/B374D848")]
    Lsn(String),
    #[error("{0:?} is no transaction that could end: expected a number from 3 on, like xid:4711")]
    Xid(String),
    #[error("{0:?} cannot be a restore point's name: it has 1 to {NAME_BYTES_MAX} bytes")]
    Name(String),
}

impl TargetError {
    pub fn hint(&self) -> String {
        const TIMES: &str =
            "\"2026-11-22 14:05:00+01\", \"2026-11-22T13:05:00Z\" or \"2026-11-22 14:05 Europe/Berlin\"";
        match self {
            TargetError::NoZone(_) => {
                format!("write the offset or the zone with it ({TIMES}), or give the zone with --tz Europe/Berlin")
            }
            TargetError::UnknownZone(_) => {
                "name it as in the IANA database (Europe/Berlin), or write an offset (+01:00); \
                                            without a zone database on this system only offsets and UTC are known"
                    .to_string()
            }
            TargetError::Twice { .. } | TargetError::Never { .. } => "write it with its offset".to_string(),
            TargetError::TooFine(_) => "leave out what follows the sixth digit".to_string(),
            TargetError::Unknown(_) | TargetError::NoTime(_) => format!("a time looks like {TIMES}"),
            TargetError::Lsn(_) => "`seawall window` shows LSNs that can be reached".to_string(),
            TargetError::Xid(_) => "pg_current_xact_id() tells a transaction's own".to_string(),
            TargetError::Name(_) => "it is what pg_create_restore_point() was given".to_string(),
        }
    }
}

impl Target {
    /// Reads what was typed. `zone` counts for times that name none.
    pub fn parse(text: &str, zone: Option<&TimeZone>) -> Result<Target, TargetError> {
        let text = text.trim();
        let short = || text.chars().take(80).collect::<String>();
        match text.split_once(':') {
            _ if text == "latest" => Ok(Target::Latest),
            _ if text == "immediate" => Ok(Target::Immediate),
            Some(("lsn", lsn)) => lsn.parse().map(Target::Lsn).map_err(|_| TargetError::Lsn(short())),
            Some(("xid", xid)) => parse_xid(xid).map(Target::Xid).ok_or_else(|| TargetError::Xid(short())),
            Some(("name", name)) => match name.len() {
                1..=NAME_BYTES_MAX if !name.contains('\0') => Ok(Target::Name(name.to_string())),
                _ => Err(TargetError::Name(short())),
            },
            _ => parse_time(text, zone).map(Target::Time),
        }
    }
}

/// The number in full, as `pg_current_xact_id()` tells it, or its lower half, as the WAL does.
fn parse_xid(text: &str) -> Option<u32> {
    let is_plain = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let full: u64 = is_plain.then(|| text.parse().ok()).flatten()?;
    Some(full as u32).filter(|xid| *xid >= XID_MIN)
}

fn parse_time(text: &str, zone: Option<&TimeZone>) -> Result<Timestamp, TargetError> {
    let short = || text.chars().take(80).collect::<String>();
    let time = match text.parse::<Timestamp>() {
        Ok(time) => time,
        Err(_) => parse_civil(text, zone)?,
    };
    match time.as_nanosecond() % 1000 {
        0 => Ok(time),
        _ => Err(TargetError::TooFine(short())),
    }
}

/// A time without an offset joined to it: `2026-11-22 14:05`, and perhaps a word that says where.
fn parse_civil(text: &str, zone: Option<&TimeZone>) -> Result<Timestamp, TargetError> {
    let short = || text.chars().take(80).collect::<String>();
    let (clock, named) = match text.rsplit_once(' ') {
        Some((clock, word)) if !word.starts_with(|c: char| c.is_ascii_digit()) => (clock.trim_end(), Some(word)),
        _ => (text, None),
    };
    let is_date = clock.parse::<civil::Date>().is_ok();
    let time = clock.parse::<civil::DateTime>().map_err(|_| TargetError::Unknown(short()))?;
    if is_date && !clock.contains(':') {
        return Err(TargetError::NoTime(short()));
    }
    let named = named.map(parse_zone).transpose()?;
    let zone = named.as_ref().or(zone).ok_or_else(|| TargetError::NoZone(short()))?;
    let found = zone.to_ambiguous_timestamp(time);
    let at = |offset: jiff::tz::Offset| offset.to_timestamp(time).ok().map(|at| at.to_string());
    let local = |at: Option<Timestamp>| at.map(|at| at.to_zoned(zone.clone()).strftime("%H:%M").to_string());
    match found.offset() {
        AmbiguousOffset::Unambiguous { .. } => found.unambiguous().map_err(|_| TargetError::Unknown(short())),
        AmbiguousOffset::Fold { before, after } => Err(TargetError::Twice {
            text: short(),
            earlier: at(before).unwrap_or_default(),
            later: at(after).unwrap_or_default(),
        }),
        AmbiguousOffset::Gap { after, .. } => {
            // The instant of the change lies in between: an hour before it and after it are on either side.
            let change = zone.following(after.to_timestamp(time).unwrap_or(Timestamp::MIN)).next();
            let change = change.map(|transition| transition.timestamp());
            let last = change.and_then(|change| change.checked_sub(SignedDuration::from_secs(60)).ok());
            Err(TargetError::Never {
                text: short(),
                before: local(last).unwrap_or_default(),
                after: local(change).unwrap_or_default(),
            })
        }
    }
}

/// `Europe/Berlin`, `UTC`, `+01:00`.
pub fn parse_zone(text: &str) -> Result<TimeZone, TargetError> {
    let unknown = || TargetError::UnknownZone(text.chars().take(80).collect());
    if text.starts_with(['+', '-']) {
        // An offset alone is read as part of a time.
        let anchored = format!("2000-01-01T00:00:00{text}").parse::<Timestamp>().map_err(|_| unknown())?;
        let seconds = Timestamp::from_second(946_684_800).map_err(|_| unknown())?.as_second() - anchored.as_second();
        let offset = jiff::tz::Offset::from_seconds(i32::try_from(seconds).map_err(|_| unknown())?);
        return offset.map(TimeZone::fixed).map_err(|_| unknown());
    }
    match text {
        "Z" | "z" | "UTC" | "utc" => Ok(TimeZone::UTC),
        name => TimeZone::get(name).map_err(|_| unknown()),
    }
}

/// Which line of history to follow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TimelineChoice {
    /// To the newest timeline the archive knows.
    #[default]
    Latest,
    /// The one the backup was taken on.
    Current,
    Number(TimelineId),
}

impl FromStr for TimelineChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<TimelineChoice, String> {
        match (text, text.parse()) {
            ("latest", _) => Ok(TimelineChoice::Latest),
            ("current", _) => Ok(TimelineChoice::Current),
            (_, Ok(0)) | (_, Err(_)) => Err("expected latest, current, or a timeline in decimal".to_string()),
            (_, Ok(number)) => Ok(TimelineChoice::Number(TimelineId(number))),
        }
    }
}

impl fmt::Display for TimelineChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TimelineChoice::Latest => f.write_str("latest"),
            TimelineChoice::Current => f.write_str("current"),
            TimelineChoice::Number(timeline) => fmt::Display::fmt(timeline, f),
        }
    }
}

/// What the server does once it is there (`recovery_target_action`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    #[default]
    Promote,
    /// It can be looked at, and goes on with `pg_wal_replay_resume()`.
    Pause,
    Shutdown,
}

impl Action {
    pub fn word(self) -> &'static str {
        match self {
            Action::Promote => "promote",
            Action::Pause => "pause",
            Action::Shutdown => "shutdown",
        }
    }
}

/// What a restore is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wish {
    pub target: Target,
    /// Stop before the target instead of after it. Times, LSNs and transactions only.
    pub exclusive: bool,
    pub timeline: TimelineChoice,
    pub action: Action,
    /// A standby, which has no end.
    pub standby: bool,
}

impl Default for Wish {
    fn default() -> Wish {
        Wish {
            target: Target::Latest,
            exclusive: false,
            timeline: TimelineChoice::Latest,
            action: Action::Promote,
            standby: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn time(text: &str) -> Target {
        Target::Time(text.parse().unwrap())
    }

    fn parse(text: &str) -> Result<Target, TargetError> {
        Target::parse(text, None)
    }

    fn berlin() -> TimeZone {
        TimeZone::get("Europe/Berlin").unwrap()
    }

    #[test]
    fn every_kind_is_read_and_printed_as_it_is_typed() {
        for text in ["latest", "immediate", "lsn:16/B374D848", "xid:4711", "name:before the upgrade"] {
            assert_eq!(parse(text).unwrap().to_string(), text);
        }
        assert_eq!(parse("2026-11-22T13:05:00Z").unwrap().to_string(), "2026-11-22 13:05:00+00");
        let printed = parse("2026-11-22 13:05:00.25+00").unwrap().to_string();
        assert_eq!(printed, "2026-11-22 13:05:00.25+00");
        assert_eq!(parse(&printed), parse("2026-11-22 13:05:00.250000Z"));
    }

    #[test]
    fn a_time_is_an_instant_however_its_zone_is_told() {
        let expected = time("2026-11-22T13:05:00Z");
        for text in [
            "2026-11-22 14:05:00+01",
            "2026-11-22 14:05:00 +01",
            "2026-11-22T14:05+01:00",
            "2026-11-22 14:05 Europe/Berlin",
            "2026-11-22 13:05 UTC",
            "2026-11-22 13:05:00 Z",
            "2026-11-22T14:05:00+01:00[Europe/Berlin]",
            "  2026-11-22 13:05:00Z ",
        ] {
            assert_eq!(parse(text).as_ref(), Ok(&expected), "{text}");
        }
        assert_eq!(Target::parse("2026-11-22 14:05", Some(&berlin())), Ok(expected.clone()));
        // What stands with the time counts.
        assert_eq!(Target::parse("2026-11-22 13:05Z", Some(&berlin())), Ok(expected.clone()));
        let fixed = parse_zone("+01:00").unwrap();
        assert_eq!(Target::parse("2026-11-22 14:05", Some(&fixed)), Ok(expected));
        assert_eq!(parse_zone("-0330").unwrap().to_offset(Timestamp::UNIX_EPOCH).seconds(), -12600);
    }

    #[test]
    fn an_instant_that_is_not_clear_is_refused() {
        assert!(matches!(parse("2026-11-22 14:05"), Err(TargetError::NoZone(_))));
        assert!(matches!(parse("2026-11-22"), Err(TargetError::NoTime(_))));
        assert!(matches!(parse("2026-11-22 14:05 Middle/Earth"), Err(TargetError::UnknownZone(_))));
        assert!(matches!(parse("2026-11-22 14:05:00.1234567Z"), Err(TargetError::TooFine(_))));
        for text in ["yesterday", "", "2026-13-01 10:00Z", "lsn", "14:05"] {
            assert!(matches!(parse(text), Err(TargetError::Unknown(_))), "{text}: {:?}", parse(text));
        }
        let twice = Target::parse("2026-10-25 02:30", Some(&berlin())).unwrap_err().to_string();
        assert!(twice.contains("2026-10-25T00:30:00Z or 2026-10-25T01:30:00Z"), "{twice}");
        let never = Target::parse("2026-03-29 02:30", Some(&berlin())).unwrap_err().to_string();
        assert!(never.contains("from 01:59 to 03:00"), "{never}");
        for error in [parse("2026-11-22 14:05").unwrap_err(), parse("soon").unwrap_err()] {
            assert!(error.hint().contains("Europe/Berlin"), "{}", error.hint());
        }
    }

    #[test]
    fn numbers_and_names_are_bounded() {
        assert_eq!(parse("xid:4294972008"), Ok(Target::Xid(4712)), "the epoch is left out");
        for text in ["xid:", "xid:2", "xid:-7", "xid:+7", "xid:4294967298", "xid:x", "xid:99999999999999999999"] {
            assert!(matches!(parse(text), Err(TargetError::Xid(_))), "{text}");
        }
        assert!(matches!(parse("lsn:1"), Err(TargetError::Lsn(_))));
        assert!(matches!(parse("name:"), Err(TargetError::Name(_))));
        assert!(matches!(parse(&format!("name:{}", "x".repeat(64))), Err(TargetError::Name(_))));
        assert_eq!("7".parse(), Ok(TimelineChoice::Number(TimelineId(7))));
        for text in ["0", "newest", "-1", "0x7"] {
            text.parse::<TimelineChoice>().unwrap_err();
        }
    }
}

//! Owns: the rules of retention as values, and in words.
//! Does not own: how they are configured and which are refused (`config`), what follows from them (`needs.rs`).
//! Pure.

use std::fmt;
use std::time::Duration;

use jiff::tz::TimeZone;

use crate::repository::layout::BackupType;

/// What is to be kept. Any rule that keeps a thing keeps it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Every instant this young stays restorable.
    pub window: Option<Duration>,
    /// So many of the newest full backups stay; at least one.
    pub count: Option<u32>,
    pub gfs: Gfs,
    pub ages: Ages,
    /// WAL older than this stays only where a backup needs it to be consistent, or the window needs it.
    pub wal: Option<Duration>,
    /// Where days, weeks, months and years begin.
    pub time_zone: TimeZone,
}

/// The newest backup of each of the last so many days, weeks (they begin on Monday), months and years that have one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Gfs {
    pub daily: u32,
    pub weekly: u32,
    pub monthly: u32,
    pub yearly: u32,
}

/// Backups of a type stay until they are this old.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ages {
    pub full: Option<Duration>,
    pub differential: Option<Duration>,
    pub incremental: Option<Duration>,
}

impl Default for Policy {
    fn default() -> Policy {
        Policy {
            window: None,
            count: None,
            gfs: Gfs::default(),
            ages: Ages::default(),
            wal: None,
            time_zone: TimeZone::UTC,
        }
    }
}

impl Gfs {
    pub fn is_empty(&self) -> bool {
        *self == Gfs::default()
    }
}

impl Ages {
    pub fn of(&self, backup_type: BackupType) -> Option<Duration> {
        match backup_type {
            BackupType::Full => self.full,
            BackupType::Differential => self.differential,
            BackupType::Incremental => self.incremental,
        }
    }

    pub fn is_empty(&self) -> bool {
        *self == Ages::default()
    }
}

impl Policy {
    /// Without any rule nothing is ever removed.
    pub fn is_empty(&self) -> bool {
        self.window.is_none() && self.wal.is_none() && !self.speaks_of_backups() && self.ages.is_empty()
    }

    /// Whether a rule decides over backups of every type.
    pub(super) fn speaks_of_backups(&self) -> bool {
        self.window.is_some() || self.count.is_some() || !self.gfs.is_empty()
    }
}

/// `14d`, `36h`: in the largest unit that fits without a rest.
pub fn words(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let units = [(86_400, "d"), (3600, "h"), (60, "min")];
    match units.into_iter().find(|(unit, _)| seconds >= *unit && seconds.is_multiple_of(*unit)) {
        Some((unit, name)) => format!("{}{name}", seconds / unit),
        None => format!("{seconds}s"),
    }
}

/// "any instant of the last 14d; the newest 4 full backups; full = 30d"
impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rules: Vec<String> = Vec::new();
        rules.extend(self.window.map(|window| format!("any instant of the last {}", words(window))));
        rules.extend(self.count.map(|count| match count {
            1 => "the newest full backup".to_string(),
            count => format!("the newest {count} full backups"),
        }));
        if !self.gfs.is_empty() {
            rules.push(format!("the newest backup of the last {}", self.gfs));
        }
        let types = [BackupType::Full, BackupType::Differential, BackupType::Incremental];
        let of = |backup_type| Some(format!("{backup_type} = {}", words(self.ages.of(backup_type)?)));
        rules.extend(types.into_iter().filter_map(of));
        rules.extend(self.wal.map(|wal| format!("wal = {}", words(wal))));
        match rules.is_empty() {
            true => f.write_str("nothing is removed"),
            false => f.write_str(&rules.join("; ")),
        }
    }
}

/// "7 days, 4 weeks"
impl fmt::Display for Gfs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let periods = [(self.daily, "day"), (self.weekly, "week"), (self.monthly, "month"), (self.yearly, "year")];
        let words = periods.iter().filter(|(count, _)| *count > 0);
        let words: Vec<String> =
            words.map(|(n, word)| format!("{n} {word}{}", if *n == 1 { "" } else { "s" })).collect();
        f.write_str(&words.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_reads_as_words() {
        let day = |n: u64| Some(Duration::from_secs(n * 86_400));
        assert!(Policy::default().is_empty());
        assert_eq!(Policy::default().to_string(), "nothing is removed");
        let policy = Policy {
            window: day(14),
            count: Some(4),
            gfs: Gfs { daily: 7, weekly: 0, monthly: 1, yearly: 0 },
            ages: Ages { full: day(30), ..Ages::default() },
            wal: Some(Duration::from_secs(36 * 3600)),
            ..Policy::default()
        };
        assert!(!policy.is_empty());
        let expected = "any instant of the last 14d; the newest 4 full backups; the newest backup of the last 7 days, \
                        1 month; full = 30d; wal = 36h";
        assert_eq!(policy.to_string(), expected);
        assert!(!Policy { wal: day(1), ..Policy::default() }.is_empty());
    }
}

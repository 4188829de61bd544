//! Owns: the plan of a restore: which backup, which line of history, how far, and what PostgreSQL is told to do.
//! Does not own: how it is made (`choose.rs`), carrying it out (`execute`).
//! Pure.

use jiff::Timestamp;

use super::target::{self, Action, Target};
use crate::catalog::BackupFile;
use crate::repository::layout::Lineage;
use crate::wal::{History, Lsn, SegmentName, SegmentSize, SystemId, TimelineId};

/// Everything a restore has decided before the first byte is fetched. Nothing in it is found out again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RestorePlan {
    /// With the cluster's name.
    pub lineage: Lineage,
    pub system_id: SystemId,
    pub segment_size: SegmentSize,
    /// The backup, in every repository that has it; at least one, the preferred one first.
    pub copies: Vec<BackupCopy>,
    /// The line of history that is followed. Its timeline is `recovery_target_timeline`.
    pub path: History,
    /// A standby of the newest line: it goes on along later promotions.
    pub follow: bool,
    /// No end, no target, `standby.signal`.
    pub standby: bool,
    /// As it was asked for.
    pub target: Target,
    /// What PostgreSQL is asked to stop at so that it gets there.
    pub stop: Stop,
    pub inclusive: bool,
    pub action: Action,
    /// Where replay begins. The segment that holds it is the first one needed.
    pub start_lsn: Lsn,
    /// Consistent from here on.
    pub consistent_lsn: Lsn,
    /// The end of the contiguous WAL of the path: names that start at or after it are not there. For a standby as of now.
    pub end_lsn: Lsn,
    /// The last commit before `end_lsn`, where it is known.
    pub end_time: Option<Timestamp>,
    /// Where recovery stops, as far as it is known: the record it stops at.
    pub stop_at: Option<StopPoint>,
    /// What has to be replayed at most: up to the end of the segment in which recovery stops.
    pub replay: Replay,
    /// What else is to be known, in sentences.
    pub remarks: Vec<String>,
}

/// One backup as one repository holds it. Objects' sizes and checksums are those of this repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackupCopy {
    /// The repository's name.
    pub repository: String,
    /// From a full backup to the one that is restored, which is last. A full backup is alone.
    pub chain: Vec<BackupFile>,
}

impl BackupCopy {
    pub fn backup(&self) -> &BackupFile {
        self.chain.last().expect("a chain has the backup itself")
    }
}

/// What recovery is told (`recovery_target…`); every one of them is known to be in the WAL of the plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Nothing: it goes to the end of the WAL and promotes, whatever the action.
    End,
    Immediate,
    Time(Timestamp),
    Lsn(Lsn),
    Xid(u32),
    Name(String),
}

impl Stop {
    /// The setting and its value, unquoted; `None` for [`Stop::End`].
    pub fn setting(&self) -> Option<(&'static str, String)> {
        Some(match self {
            Stop::End => return None,
            Stop::Immediate => ("recovery_target", "immediate".to_string()),
            Stop::Time(time) => ("recovery_target_time", target::instant(*time)),
            Stop::Lsn(lsn) => ("recovery_target_lsn", lsn.to_string()),
            Stop::Xid(xid) => ("recovery_target_xid", xid.to_string()),
            Stop::Name(name) => ("recovery_target_name", name.clone()),
        })
    }
}

/// A record recovery stops before or after.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StopPoint {
    pub lsn: Lsn,
    pub time: Option<Timestamp>,
}

/// WAL to be replayed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Replay {
    pub from: Lsn,
    pub to: Lsn,
}

impl Replay {
    pub fn bytes(self) -> u64 {
        self.to.saturating_distance(self.from)
    }

    pub fn segments(self, size: SegmentSize) -> u64 {
        match self.to <= self.from {
            true => 0,
            false => size.segment_before(self.to).0 - size.segment_of(self.from).0 + 1,
        }
    }
}

impl RestorePlan {
    /// The backup that is restored, as the preferred repository holds it.
    pub fn backup(&self) -> &BackupFile {
        self.copies.first().expect("a plan has a copy").backup()
    }

    /// `recovery_target_timeline`.
    pub fn timeline(&self) -> TimelineId {
        self.path.timeline
    }

    /// The first segment that recovery asks for.
    pub fn first_segment(&self) -> SegmentName {
        let timeline = self.backup().timeline;
        SegmentName::new(timeline, self.segment_size.segment_of(self.start_lsn), self.segment_size)
    }

    /// Of the data directory, uncompressed: what the restore writes, but for WAL.
    pub fn raw_bytes(&self) -> u64 {
        self.backup().raw_bytes
    }

    /// To be fetched from the preferred repository, without WAL.
    pub fn stored_bytes(&self) -> u64 {
        let chain = &self.copies.first().expect("a plan has a copy").chain;
        chain.iter().map(|backup| backup.stored_bytes).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn postgresql_is_told_unmistakably() {
        let time = "2026-11-22T12:00:00.000001Z".parse().unwrap();
        let expected = ("recovery_target_time", "2026-11-22 12:00:00.000001+00".to_string());
        assert_eq!(Stop::Time(time).setting(), Some(expected));
        assert_eq!(Stop::Lsn(Lsn(0x28)).setting(), Some(("recovery_target_lsn", "0/00000028".to_string())));
        assert_eq!(Stop::End.setting(), None);
    }

    #[test]
    fn replay_counts_the_segments_it_touches() {
        const MIB: u64 = 1 << 20;
        let size = SegmentSize::new(MIB).unwrap();
        let segments = |from, to| Replay { from: Lsn(from), to: Lsn(to) }.segments(size);
        assert_eq!([segments(40, 41), segments(40, MIB), segments(40, MIB + 1), segments(MIB, MIB)], [1, 1, 2, 0]);
    }
}

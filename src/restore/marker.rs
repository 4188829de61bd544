//! Owns: `seawall.restore.json`, which a restore leaves in the data directory for the `wal-get` of its recovery.
//! Does not own: when it is written (`restore/execute`), when it is removed (`wal-get --restore-end`), what follows
//! from it (`wal_get.rs`, `prefetch`).
//!
//! It counts only for the `wal-get --restore ID` that names its id: a backup of the restored server may hold both the
//! file and a `restore_command` of some earlier restore.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{Advice, Disposition, ExitCode};
use crate::repository::durable::{self, Survives};
use crate::repository::layout::{BackupId, Lineage};
use crate::wal::{History, HistoryEntry, Lsn, SegmentSize, SystemId, TimelineId};

/// In the data directory.
pub const FILE_NAME: &str = "seawall.restore.json";
const SCHEMA: u32 = 1;
/// A path of a hundred thousand timelines is shorter; a larger file is not ours.
const BYTES_MAX: u64 = 8 << 20;

/// One restore: random, sixteen lower-case hexadecimal digits. Its pins have the same id.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RestoreId(pub u64);

impl fmt::Display for RestoreId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for RestoreId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not the id of a restore: expected sixteen lower-case hexadecimal digits")]
pub struct RestoreIdError(String);

impl FromStr for RestoreId {
    type Err = RestoreIdError;

    fn from_str(text: &str) -> Result<RestoreId, RestoreIdError> {
        let digits = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        let valid = text.len() == 16 && text.bytes().all(digits);
        let id = valid.then(|| u64::from_str_radix(text, 16).ok()).flatten();
        id.map(RestoreId).ok_or_else(|| RestoreIdError(text.chars().take(40).collect()))
    }
}

impl Serialize for RestoreId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for RestoreId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<RestoreId, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// What a restore has decided, for the recovery that follows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RestoreMarker {
    pub schema: u32,
    pub id: RestoreId,
    pub cluster: String,
    /// The lineage's directory below the cluster's: `<system-id>` or `<system-id>-<n>`.
    pub lineage: String,
    pub system_id: SystemId,
    pub segment_size: SegmentSize,
    /// The line of history that is recovered, oldest timeline first. WAL beyond an end belongs to another line.
    pub path: Vec<PathStep>,
    /// Whether the path goes on along later promotions (`recovery_target_timeline = 'latest'`): a standby's may.
    pub follow: bool,
    /// The backup's: recovery reads from the segment that holds it.
    pub start_lsn: Lsn,
    /// The end of the interval the restore has planned with: names that start at or after it are absent. `None` for a
    /// standby, and only for one.
    pub end_lsn: Option<Lsn>,
    pub standby: bool,
    pub backup: BackupId,
    /// As it was asked for, for people.
    pub target: String,
    pub created: Timestamp,
    /// Whether a pin `pins/<id>-<n>.json` protects what the recovery needs, and is to be renewed.
    pub pinned: bool,
}

/// A timeline of the path and where the path leaves it; `None` for the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PathStep {
    pub timeline: TimelineId,
    pub end_lsn: Option<Lsn>,
}

#[derive(Debug, thiserror::Error)]
pub enum MarkerError {
    #[error("could not read {path}: {source}")]
    Unreadable { path: PathBuf, source: io::Error },
    #[error("could not write {path}: {source}")]
    Unwritable { path: PathBuf, source: io::Error },
    #[error("{path} does not tell about a restore: {fault}")]
    Damaged { path: PathBuf, fault: String },
    #[error("{path} has schema {found}, this seawall knows schemas up to {SCHEMA}")]
    Newer { path: PathBuf, found: u32 },
}

impl Advice for MarkerError {
    fn hint(&self) -> Option<String> {
        let text = match self {
            MarkerError::Unreadable { .. } => "run it as the owner of the data directory",
            MarkerError::Unwritable { .. } => "is there room, and may this user write there?",
            MarkerError::Damaged { .. } => {
                "restore again; or take `--restore …` out of restore_command, and the archive's newest line is followed"
            }
            MarkerError::Newer { .. } => "a newer seawall restored this: use that one in restore_command",
        };
        Some(text.to_string())
    }

    fn disposition(&self) -> Disposition {
        Disposition::Operator
    }

    fn exit_code(&self) -> ExitCode {
        match self {
            MarkerError::Unreadable { .. } => ExitCode::Permission,
            MarkerError::Unwritable { .. } => ExitCode::Unavailable,
            MarkerError::Damaged { .. } => ExitCode::Data,
            MarkerError::Newer { .. } => ExitCode::Config,
        }
    }
}

impl RestoreMarker {
    pub const SCHEMA: u32 = SCHEMA;

    /// The path that a history describes.
    pub fn path_of(history: &History) -> Vec<PathStep> {
        let ancestors = history.ancestors().iter();
        let left = ancestors.map(|entry| PathStep { timeline: entry.timeline, end_lsn: Some(entry.end) });
        left.chain([PathStep { timeline: history.timeline, end_lsn: None }]).collect()
    }

    /// The path as a history; `None` where it is not one.
    pub fn history(&self) -> Option<History> {
        let (last, left) = self.path.split_last()?;
        let entry = |step: &PathStep| Some(HistoryEntry { timeline: step.timeline, end: step.end_lsn? });
        let ancestors = left.iter().map(entry).collect::<Option<Vec<_>>>()?;
        if last.end_lsn.is_some() || last.timeline == TimelineId(0) {
            return None;
        }
        History::of_ancestors(last.timeline, ancestors)
    }

    pub fn lineage(&self) -> Option<Lineage> {
        Lineage::parse(&self.cluster, &self.lineage).filter(|lineage| lineage.system_id == self.system_id)
    }

    /// Reads the marker of a data directory; `None` when there is none.
    pub fn read(pgdata: &Path) -> Result<Option<RestoreMarker>, MarkerError> {
        let path = pgdata.join(FILE_NAME);
        let unreadable = |source| MarkerError::Unreadable { path: path.clone(), source };
        let damaged = |fault: String| MarkerError::Damaged { path: path.clone(), fault };
        match path.metadata() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(unreadable(error)),
            Ok(found) if !found.is_file() => return Err(damaged("it is not a file".to_string())),
            Ok(found) if found.len() > BYTES_MAX => return Err(damaged(format!("it is {} bytes long", found.len()))),
            Ok(_) => {}
        }
        match std::fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(unreadable(error)),
            Ok(content) => match Self::parse(&content) {
                Ok(marker) => Ok(Some(marker)),
                Err(Fault::Newer(found)) => Err(MarkerError::Newer { path, found }),
                Err(Fault::Damaged(fault)) => Err(damaged(fault)),
            },
        }
    }

    /// Writes it into a data directory, durably, in place of any other.
    pub fn write(&self, pgdata: &Path) -> Result<(), MarkerError> {
        let path = pgdata.join(FILE_NAME);
        let mut content = serde_json::to_vec_pretty(self).expect("our formats have no failing serializers");
        content.push(b'\n');
        let written =
            durable::write_file_into_place(&path, Survives::PowerLoss, |file| io::Write::write_all(file, &content));
        written.map_err(|source| MarkerError::Unwritable { path, source })
    }

    fn parse(content: &[u8]) -> Result<RestoreMarker, Fault> {
        #[derive(Deserialize)]
        struct SchemaOnly {
            schema: u32,
        }
        // A newer schema may have any shape: it is told apart from damage before the rest is read.
        let SchemaOnly { schema } = serde_json::from_slice(content).map_err(Fault::of)?;
        if schema > SCHEMA {
            return Err(Fault::Newer(schema));
        }
        let marker: RestoreMarker = serde_json::from_slice(content).map_err(Fault::of)?;
        match marker.fault() {
            Some(fault) => Err(Fault::Damaged(fault.to_string())),
            None => Ok(marker),
        }
    }

    /// Why it cannot be what a restore wrote.
    fn fault(&self) -> Option<&'static str> {
        if self.schema != SCHEMA {
            return Some("its schema is not 1");
        }
        if self.lineage().is_none() {
            return Some("its `lineage` is not one of its `system_id`");
        }
        if self.history().is_none() {
            return Some("its `path` is not a line of history: timelines rise, and all but the last end somewhere");
        }
        if self.standby == self.end_lsn.is_some() {
            return Some("a standby has no `end_lsn`, any other restore has one");
        }
        if self.follow && !self.standby {
            return Some("only a standby can `follow` later promotions");
        }
        if self.end_lsn.is_some_and(|end| end < self.start_lsn) {
            return Some("its `end_lsn` lies before its `start_lsn`");
        }
        None
    }
}

enum Fault {
    Newer(u32),
    Damaged(String),
}

impl Fault {
    fn of(error: serde_json::Error) -> Fault {
        Fault::Damaged(error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn marker() -> RestoreMarker {
        RestoreMarker {
            schema: RestoreMarker::SCHEMA,
            id: RestoreId(0xBEEF),
            cluster: "main".into(),
            lineage: "7-2".into(),
            system_id: SystemId(7),
            segment_size: SegmentSize::MIB_16,
            path: vec![
                PathStep { timeline: TimelineId(1), end_lsn: Some(Lsn(0x300_0000)) },
                PathStep { timeline: TimelineId(3), end_lsn: None },
            ],
            follow: false,
            start_lsn: Lsn(0x200_0028),
            end_lsn: Some(Lsn(0x500_0000)),
            standby: false,
            backup: "20261122T110000Z-full".parse().unwrap(),
            target: "2026-11-22 12:00:00+00".into(),
            created: "2026-11-22T13:00:00Z".parse().unwrap(),
            pinned: true,
        }
    }

    fn fault_of(content: &str) -> String {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join(FILE_NAME), content).unwrap();
        RestoreMarker::read(directory.path()).unwrap_err().to_string()
    }

    #[test]
    fn what_was_written_is_read_again() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(RestoreMarker::read(directory.path()).unwrap(), None);
        for marker in [marker(), RestoreMarker { standby: true, follow: true, end_lsn: None, ..marker() }] {
            marker.write(directory.path()).unwrap();
            assert_eq!(RestoreMarker::read(directory.path()).unwrap(), Some(marker.clone()));
            let history = marker.history().unwrap();
            assert_eq!(history.end_of(TimelineId(1)), Some(Lsn(0x300_0000)));
            assert_eq!(RestoreMarker::path_of(&history), marker.path);
            assert_eq!(marker.lineage(), Some(Lineage::new("main", SystemId(7), 2)));
        }
        let text = std::fs::read_to_string(directory.path().join(FILE_NAME)).unwrap();
        assert!(text.contains(r#""id": "000000000000beef""#), "{text}");
    }

    #[test]
    fn nothing_else_is_taken_for_one() {
        let text = |marker: &RestoreMarker| serde_json::to_string(marker).unwrap();
        let good = text(&marker());
        assert!(fault_of("").contains("does not tell about a restore"));
        assert!(fault_of(&good[..good.len() - 1]).contains("does not tell about a restore"));
        assert!(fault_of(&good.replace("\"pinned\"", "\"pined\"")).contains("unknown field"));
        assert!(fault_of(&good.replace("beef", "BEEF")).contains("sixteen lower-case"));
        assert!(fault_of(&good.replace("\"schema\":1", "\"schema\":2,\"more\":1")).contains("schema 2"));
        let step = |timeline, end_lsn| PathStep { timeline: TimelineId(timeline), end_lsn };
        let path = |path| text(&RestoreMarker { path, ..marker() });
        for wrong in [
            text(&RestoreMarker { system_id: SystemId(8), ..marker() }),
            text(&RestoreMarker { end_lsn: None, ..marker() }),
            text(&RestoreMarker { standby: true, ..marker() }),
            text(&RestoreMarker { follow: true, ..marker() }),
            text(&RestoreMarker { end_lsn: Some(Lsn(1)), ..marker() }),
            path(vec![]),
            path(vec![step(0, None)]),
            path(vec![step(1, None), step(2, None)]),
            path(vec![step(2, Some(Lsn(1))), step(1, None)]),
            path(vec![step(1, Some(Lsn(1)))]),
        ] {
            assert!(fault_of(&wrong).contains("does not tell about a restore"), "{wrong}");
        }
    }

    #[test]
    fn ids_have_one_form() {
        assert_eq!("000000000000beef".parse(), Ok(RestoreId(0xBEEF)));
        for text in ["", "beef", "000000000000BEEF", "+00000000000beef", "../../../../../.."] {
            assert!(text.parse::<RestoreId>().is_err(), "{text:?}");
        }
    }
}

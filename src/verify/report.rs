//! Owns: what a verifier found: faults, what they mean for restores, what to do; everything else worth a word.
//! Does not own: finding them (`quick.rs`, `content.rs`, `chain.rs`, `backups.rs`), how they are shown (`cli/verify.rs`).
//! Pure.

use jiff::Timestamp;
use serde::Serialize;

use super::record::Mode;
use crate::catalog::{BackupFile, IndexEntry};
use crate::repository::layout::BackupId;
use crate::wal::{Lsn, TimelineId};

/// Names of no known form that are listed; the others are counted.
const UNKNOWN_MAX: usize = 20;
/// Other notes of one run.
const NOTES_MAX: usize = 200;

/// What is wrong with an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FaultKind {
    /// It is not there.
    Missing,
    /// It is not as long as it was stored.
    Size,
    /// Its bytes are not those that were stored, or do not hold what they promise.
    Content,
    /// Its WAL is none, or does not follow the WAL before it.
    Chain,
    /// An object that describes others cannot be read, or contradicts them.
    Record,
    /// It is there, and nothing refers to it where something should.
    Unindexed,
    /// A name with two contents.
    Conflict,
    /// WAL that nothing holds, for no reason that is known.
    Hole,
}

impl FaultKind {
    /// Whether the object itself does not hold what it promised: then the ledger says so, and readers go elsewhere.
    fn is_damage(self) -> bool {
        match self {
            FaultKind::Missing | FaultKind::Size | FaultKind::Content | FaultKind::Chain | FaultKind::Record => true,
            FaultKind::Unindexed | FaultKind::Conflict | FaultKind::Hole => false,
        }
    }
}

/// WAL [from, to) of a timeline, with the commits in it where they are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    pub timeline: TimelineId,
    pub from: Lsn,
    pub to: Lsn,
    pub first_commit: Option<Timestamp>,
    pub last_commit: Option<Timestamp>,
}

impl Span {
    pub fn new(timeline: TimelineId, from: Lsn, to: Lsn) -> Span {
        Span { timeline, from, to, first_commit: None, last_commit: None }
    }

    pub fn of(entry: &IndexEntry) -> Span {
        Span {
            first_commit: entry.summary.min_commit_time,
            last_commit: entry.summary.max_commit_time,
            ..Span::new(entry.segment.timeline, entry.start_lsn, entry.end_lsn)
        }
    }

    pub fn overlaps(&self, other: &Span) -> bool {
        self.timeline == other.timeline && self.from < other.to && other.from < self.to
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Its path below the lineage.
    pub object: String,
    pub kind: FaultKind,
    /// In words.
    pub what: String,
    /// WAL that cannot be relied on because of it.
    pub wal: Option<Span>,
    /// The backup that cannot be relied on because of it.
    pub backup: Option<BackupId>,
    /// The object holds what it did, and yet something is wrong that it is named for.
    pub is_indirect: bool,
    /// Said by an earlier run, and not lifted since.
    pub known_since: Option<Timestamp>,
}

impl Fault {
    pub fn new(object: impl Into<String>, kind: FaultKind, what: impl Into<String>) -> Fault {
        Fault {
            object: object.into(),
            kind,
            what: what.into(),
            wal: None,
            backup: None,
            is_indirect: false,
            known_since: None,
        }
    }

    pub fn of_wal(self, span: Span) -> Fault {
        Fault { wal: Some(span), ..self }
    }

    pub fn of_backup(self, id: BackupId) -> Fault {
        Fault { backup: Some(id), ..self }
    }

    pub fn indirect(self) -> Fault {
        Fault { is_indirect: true, ..self }
    }

    /// Whether the ledger is told that the object is damaged.
    pub fn is_damage(&self) -> bool {
        self.kind.is_damage() && !self.is_indirect
    }
}

/// A fault, what it means, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    pub fault: Fault,
    pub means: String,
    pub remedy: String,
}

/// What follows from a fault for restores from this repository. `backups` are the complete ones there, in any order.
pub fn explain(fault: Fault, backups: &[BackupFile]) -> Finding {
    let remedy = match fault.kind {
        FaultKind::Conflict => {
            "two servers wrote to one archive: continue with `seawall init --new-lineage`; keep both objects"
                .to_string()
        }
        FaultKind::Unindexed => "keep the object; the agent indexes what it meets, or takes a new backup".to_string(),
        _ if fault.backup.is_some() => {
            "restore takes another repository's copy where there is one; else take a new one: `seawall backup`"
                .to_string()
        }
        FaultKind::Hole => "see `seawall gaps`; a new backup (`seawall backup`) begins a new window".to_string(),
        _ if fault.wal.is_some() => "the agent mends it from another repository or from the server, while either has \
             the WAL; else a new backup (`seawall backup`) begins a new window"
            .to_string(),
        _ => "keep the object for inspection; was it changed by something other than seawall?".to_string(),
    };
    let means = match (&fault.wal, fault.backup) {
        (_, Some(id)) => format!("backup {id} cannot be restored from this repository"),
        (Some(span), None) => lost(span, backups),
        (None, None) => "what it says of other objects is not known".to_string(),
    };
    Finding { fault, means, remedy }
}

/// Which instants cannot be reached without a stretch of WAL.
fn lost(span: &Span, backups: &[BackupFile]) -> String {
    let shown = |time: Timestamp| time.strftime("%Y-%m-%d %H:%M:%SZ").to_string();
    let begin = match span.first_commit {
        Some(time) => format!("{} ({})", span.from, shown(time)),
        None => span.from.to_string(),
    };
    // Another line may have left this one before: then its backups do not help this one's instants.
    let on_line = backups.iter().filter(|backup| backup.timeline == span.timeline);
    let behind = on_line.filter(|backup| backup.start_lsn >= span.to).min_by_key(|backup| backup.stop_lsn);
    let of_line = |backup: &&BackupFile| backup.timeline == span.timeline;
    let needs_it = |backup: &&BackupFile| backup.start_lsn < span.to && span.from < backup.stop_lsn;
    let needing = backups.iter().filter(of_line).filter(needs_it).map(|backup| backup.id.to_string());
    let needing: Vec<String> = needing.collect();
    let also = match needing.is_empty() {
        true => String::new(),
        false => format!("; without it no restore from backup {} is consistent", needing.join(", ")),
    };
    match behind {
        Some(backup) => {
            let end = match backup.stop_time {
                Some(time) => format!("{} ({})", backup.stop_lsn, shown(time)),
                None => backup.stop_lsn.to_string(),
            };
            let id = backup.id;
            let line = span.timeline;
            format!(
                "instants of timeline {line} from {begin} up to {end}, where backup {id} is consistent, are lost{also}"
            )
        }
        None => {
            let line = span.timeline;
            format!("instants of timeline {line} from {begin} on are lost: no backup begins behind it{also}")
        }
    }
}

/// What one run found in one lineage of one repository.
#[derive(Clone, Debug)]
pub struct Report {
    pub run: String,
    pub mode: Mode,
    pub started: Timestamp,
    pub finished: Option<Timestamp>,
    /// All of it was done; otherwise the store stopped answering.
    pub complete: bool,
    pub counts: Counts,
    /// Objects in order.
    pub findings: Vec<Finding>,
    pub notes: Notes,
    /// A run that was not finished was gone on with: when that had begun.
    pub resumed: Option<Timestamp>,
    /// Why the ledger says nothing of it.
    pub unrecorded: Option<String>,
}

impl Report {
    pub fn is_sound(&self) -> bool {
        self.findings.is_empty()
    }
}

/// How much was looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Looked at, read or not.
    pub objects: u64,
    /// Read, as stored.
    pub bytes: u64,
    pub segments: u64,
    pub segments_read: u64,
    pub backups: u64,
    pub volumes: u64,
    pub volumes_read: u64,
    /// Encrypted objects of which only the stored bytes were examined.
    pub unexamined: u64,
}

/// No faults, and yet worth a word.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Notes {
    pub lines: Vec<String>,
    pub omitted: u64,
    /// Names of no known form: left alone. The first of them, and how many there are.
    pub unknown: Vec<String>,
    pub unknown_count: u64,
}

impl Notes {
    pub fn add(&mut self, line: impl Into<String>) {
        if self.lines.len() < NOTES_MAX {
            self.lines.push(line.into());
        } else {
            self.omitted += 1;
        }
    }

    pub fn add_unknown(&mut self, name: impl Into<String>) {
        self.unknown_count += 1;
        if self.unknown.len() < UNKNOWN_MAX {
            self.unknown.push(name.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::Crc32;
    use crate::catalog::backup::ManifestEntry;
    use crate::repository::layout::BackupType;
    use crate::wal::{SegmentSize, SystemId};

    fn backup(timeline: u32, start: u64) -> BackupFile {
        let started: Timestamp = "2026-11-22T11:00:00Z".parse().unwrap();
        BackupFile {
            schema: 1,
            id: BackupId::new(started, BackupType::Full),
            backup_type: BackupType::Full,
            parent: None,
            fallback: None,
            label: None,
            started,
            finished: started,
            system_id: SystemId(7),
            server_version: "18.1".into(),
            segment_size: SegmentSize::new(1 << 20).unwrap(),
            timeline: TimelineId(timeline),
            start_lsn: Lsn(start),
            stop_lsn: Lsn(start + 8),
            stop_time: Some(started),
            from_standby: false,
            data_checksums: None,
            raw_bytes: 0,
            stored_bytes: 0,
            manifest: ManifestEntry { bytes: 0, crc32: Crc32(0), files: 0, checksums: "CRC32C".into() },
            tablespaces: Vec::new(),
            volumes: Vec::new(),
            config: Vec::new(),
            version: "0".into(),
        }
    }

    #[test]
    fn what_is_lost_ends_where_the_next_backup_of_the_line_is_consistent() {
        let fault = || Fault::new("x", FaultKind::Missing, "gone").of_wal(Span::new(TimelineId(1), Lsn(100), Lsn(200)));
        let backups = [backup(1, 50), backup(2, 200), backup(1, 900), backup(1, 300)];
        let means = explain(fault(), &backups).means;
        assert!(means.contains("from 0/00000064 up to 0/00000134 (2026-11-22 11:00:00Z)"), "{means}");
        let means = explain(fault(), &backups[..2]).means;
        assert!(means.contains("no backup begins behind it"), "{means}");
        assert!(explain(fault().of_backup(backups[0].id), &[]).means.contains("cannot be restored"));
    }

    #[test]
    fn what_is_only_named_for_another_fault_is_not_called_damaged() {
        assert!(Fault::new("x", FaultKind::Content, "y").is_damage());
        assert!(!Fault::new("x", FaultKind::Content, "y").indirect().is_damage());
        assert!(!Fault::new("x", FaultKind::Conflict, "y").is_damage());
    }

    #[test]
    fn notes_are_bounded() {
        let mut notes = Notes::default();
        (0..1000).for_each(|i| {
            notes.add(i.to_string());
            notes.add_unknown(i.to_string());
        });
        assert_eq!((notes.lines.len() as u64 + notes.omitted, notes.unknown_count), (1000, 1000));
        assert!(notes.unknown.len() < 100);
    }
}
